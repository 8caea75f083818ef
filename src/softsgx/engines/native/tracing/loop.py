"""The tracer's loop: waits for stops of the program's threads and hands each to who handles it.

Everything happens in one OS thread.  A thread of the program that is stopped stays so until the
loop, or whoever holds it, resumes it; what stopped it meanwhile waits in its ``pending``.

Source:
    ptrace(2).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from softsgx.engines.native import abi, libc
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.tracing.image import Image
from softsgx.engines.native.tracing.program import Process, ProgramThread
from softsgx.engines.native.tracing.start import finish_exec
from softsgx.engines.native.tracing.tracee import Gone, Stop, decode_stop

__all__ = ["Loop", "World"]

_NO_CALL = (1 << 64) - 1
_CLONE_VM, _CLONE_THREAD = 0x100, 0x10000
_SYS_CLONE, _SYS_CLONE3 = 56, 435
_GROUP_STOPS = frozenset({abi.SIGSTOP, abi.SIGTSTP, abi.SIGTTIN, abi.SIGTTOU})

Handler = Callable[[ProgramThread], "int | None"]
"""Does a system call: its result, -ERESTARTSYS included, or ``None``: the kernel shall do it."""


class World:
    """What the loop asks for when the program's shape changes; the supervisor implements it.

    Attributes:
        background: lets background tasks run until each of them waits.
    """

    background: Callable[[], None]

    def new_thread(self, tid: int, process: Process, image: Image) -> ProgramThread:
        """A thread was made in a known process and address space."""
        raise NotImplementedError

    def new_process(self, pid: int, parent: Process) -> Process:
        """A process was made."""
        raise NotImplementedError

    def fork_image(self, tid: int, parent: Image) -> Image:
        """An address space was copied; ``tid`` is stopped in the copy, before its first step."""
        raise NotImplementedError

    def adopt_fork(self, thread: ProgramThread, parent: Image) -> None:
        """The thread of a copied address space is known: prepare its enclaves."""
        raise NotImplementedError

    def exec_image(self, tid: int, process: Process) -> ProgramThread:
        """A program was executed; ``tid`` is stopped at the end of its execve."""
        raise NotImplementedError

    def settle(self) -> None:
        """The program is about to go on: what was put off that it could notice is done now."""
        raise NotImplementedError

    def thread_gone(self, thread: ProgramThread) -> None:
        """A thread has died, or its image was replaced."""
        raise NotImplementedError


class Loop:
    """See the module.

    Args:
        world: see :class:`World`.
        transitions: signals and ENCLU.
        calls: handlers of system calls that stop, by number.

    Attributes:
        threads: living threads by id.
        statuses: exit status of each process that has ended, as wait(2) encodes it.
    """

    def __init__(self, world: World, transitions: Transitions, calls: dict[int, Handler]) -> None:
        self._world, self._transitions, self._calls = world, transitions, calls
        self.threads: dict[int, ProgramThread] = {}
        self.statuses: dict[int, int] = {}
        self._settle, self._background = world.settle, world.background
        self._permits = transitions.permits
        self._early: dict[int, int] = {}
        self._later: list[ProgramThread] = []

    def add(self, thread: ProgramThread) -> None:
        """Know a thread that is stopped."""
        self.threads[thread.tid] = thread

    def run(self) -> None:
        """Serve the program until its last thread is gone."""
        while self.threads:
            if self._later:
                thread = self._later.pop()
                if thread.pending and self.threads.get(thread.tid) is thread:
                    self._guard(thread, thread.pending.pop(0))
                continue
            try:
                event = self._wait()
            except ChildProcessError:
                break
            if event is not None:
                self._event(*event)

    def _wait(self) -> tuple[int, int] | None:
        """Wait for an event, a thread's id and its status; ``None``: look again at what is due."""
        return os.waitpid(-1, abi.WALL)

    def go(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, delivering signal ``number``."""
        image = thread.image
        image.current = thread
        if thread.borrowable:
            # Now, while it is stopped anyway: whoever it will wait for works ahead.
            self._background()
            self._permits.going()
        if thread.kicked:
            thread.kicked = False
            if not number and not image.strict:  # where it would have to wait for its turn
                number = self._transitions.resumed(thread)
        self._settle()
        image.pager.flush()
        if thread.outgoing is not None:
            info, thread.outgoing = thread.outgoing, None
            if number:
                thread.set_siginfo(info)
        thread.running = True
        image.current = None
        thread.resume(number)

    def hold(self, thread: ProgramThread) -> bool:
        """Stop a running thread; what stopped it is handled later.  ``False``: it is dead."""
        if not thread.running:
            return True
        try:
            thread.interrupt()
            stop = thread.behind(thread.wait())
            self._permits.stopped(thread)
        except Gone as gone:
            self._gone(thread, gone.status)
            return False
        thread.running = False
        thread.pending.append(stop)
        self._later.append(thread)
        return True

    def kick(self, image: Image) -> None:
        """Make every thread of ``image`` that is inside an enclave leave it."""
        for thread in list(image.threads.values()):
            if thread.cpu.inside is None or self._transitions.passes(thread):
                continue
            if not self.hold(thread) or thread.cpu.inside is None:
                continue
            stop = thread.pending[0] if thread.pending else None
            if self._transitions.kicked(thread, stop):
                thread.pending = [Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)]

    # --- events ---------------------------------------------------------------------------------

    def _event(self, tid: int, status: int) -> None:
        thread = self.threads.get(tid)
        if thread is None:
            # A child that stops before its parent's event tells of it.
            if os.WIFSTOPPED(status):
                self._early[tid] = status
            return
        if not os.WIFSTOPPED(status):
            self._gone(thread, status)
            return
        thread.running = thread.vforked = False
        self._guard(thread, thread.stopped(status))

    def _guard(self, thread: ProgramThread, stop: Stop) -> None:
        thread.image.current = thread
        try:
            stop = thread.behind(stop)
            self._permits.stopped(thread)
            self._handle(thread, stop)
        except Gone as gone:
            if gone.tid == thread.tid and gone.status is not None:
                self._gone(thread, gone.status)
            # Otherwise its end is still to be waited for.
        finally:
            thread.image.current = None

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if not stop.event and not stop.syscall:
            self.go(thread, self._transitions.signal(thread, stop.signal))
        elif stop.event == abi.PTRACE_EVENT_SECCOMP:
            self._call(thread)
        elif stop.event == abi.PTRACE_EVENT_STOP:
            if stop.signal in _GROUP_STOPS:
                thread.running = True
                thread.listen()
            else:
                self.go(thread)
        elif stop.event in (abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE):
            self._born(thread, stop.event)
            thread.image.current = thread
            thread.vforked = stop.event == abi.PTRACE_EVENT_VFORK
            self.go(thread)
        elif stop.event == abi.PTRACE_EVENT_EXEC:
            self._exec(thread)
        else:
            self.go(thread)

    def _call(self, thread: ProgramThread) -> None:
        if thread.again:
            thread.again = False
            self._make_call(thread)
            return
        number = thread.load().orig_rax
        if number == abi.SYS_SOFTSGX_EENTER:
            self._transitions.enter(thread)
            self.go(thread)
            return
        if thread.cpu.inside is not None:
            self.go(thread, self._transitions.call_inside(thread))
            return
        handler = self._calls.get(number)
        result = None if handler is None else handler(thread)
        thread.user_memory = None
        if result is None:
            self._make_call(thread)
            return
        if result == -abi.ERESTARTSYS:
            thread.restart_syscall()
        else:
            thread.skip_syscall(result)
        self.go(thread)

    def _make_call(self, thread: ProgramThread) -> None:
        """Let the call of this stop be made, by the program itself."""
        # What was put off may make calls of ours, and use the stop up.
        self._world.settle()
        thread.image.pager.flush()
        if not thread.at_call:
            regs = thread.load()
            regs.rip, regs.rax, regs.orig_rax = regs.rip - 2, regs.orig_rax, _NO_CALL
            thread.store()
            thread.again = True
        self.go(thread)

    # --- births and deaths ----------------------------------------------------------------------

    def _born(self, parent: ProgramThread, event: int) -> None:
        tid = parent.event_message()
        flags = _clone_flags(parent)
        if tid not in self._early:
            try:
                _pid, status = os.waitpid(tid, abi.WALL)
            except ChildProcessError:
                return
        else:
            status = self._early.pop(tid)
        if not os.WIFSTOPPED(status):
            return
        world = self._world
        if flags & _CLONE_THREAD:
            thread = world.new_thread(tid, parent.process, parent.image)
        else:
            process = world.new_process(tid, parent.process)
            shares = flags & _CLONE_VM or event == abi.PTRACE_EVENT_VFORK
            image = parent.image if shares else world.fork_image(tid, parent.image)
            thread = world.new_thread(tid, process, image)
            if not shares:
                image.current = thread
                world.adopt_fork(thread, parent.image)
        self.threads[tid] = thread
        stop = decode_stop(status)
        if stop.event == abi.PTRACE_EVENT_STOP and stop.signal not in _GROUP_STOPS:
            self.go(thread)
        else:
            thread.pending.append(stop)
            self._later.append(thread)

    def _exec(self, thread: ProgramThread) -> None:
        """The other threads are gone; the one that remains has the leader's id."""
        former = thread.event_message()
        process = thread.process
        for other in [t for t in self.threads.values() if t.process is process]:
            del self.threads[other.tid]
            self._world.thread_gone(other)
        if former != thread.tid and former in self.threads:
            gone = self.threads.pop(former)
            self._world.thread_gone(gone)
        finish_exec(thread)
        fresh = self._world.exec_image(thread.tid, process)
        self.threads[fresh.tid] = fresh
        self.go(fresh)

    def _gone(self, thread: ProgramThread, status: int | None) -> None:
        if self.threads.get(thread.tid) is not thread:
            return
        del self.threads[thread.tid]
        self._permits.ended(thread)
        if status is not None and thread.tid == thread.process.pid:
            self.statuses[thread.tid] = status
        self._world.thread_gone(thread)

    def kill(self) -> None:
        """End every process, and wait until it is gone."""
        for thread in list(self.threads.values()):
            try:
                os.kill(thread.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for thread in list(self.threads.values()):
            try:
                while True:
                    _pid, status = os.waitpid(thread.tid, abi.WALL)
                    if not os.WIFSTOPPED(status):
                        break
                    libc.ptrace(abi.PTRACE_CONT, thread.tid, 0, 0)
            except (ChildProcessError, ProcessLookupError):
                status = None
            self._gone(thread, status)


def _clone_flags(parent: ProgramThread) -> int:
    regs = parent.load()
    if regs.orig_rax == _SYS_CLONE:
        return regs.rdi
    if regs.orig_rax == _SYS_CLONE3:
        return int.from_bytes(parent.image.read(regs.rdi, 8), "little")
    return 0
