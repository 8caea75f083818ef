"""The tracer's loop for a program that gdb debugs (all-stop mode).

Before this loop resumes a thread, it decides whether gdb receives a stop instead: for a signal to
the thread, and for the end of a step.  While gdb examines the program, no thread runs.  gdb does
not see faults that the supervisor resolves, nor instructions that it emulates.

At a stop every thread leaves its enclave, as on hardware (:mod:`.ssa`), and returns by the ENCLU at
its AEP.  A step inside a debug enclave is one instruction there.  A thread enters a production
enclave without single-stepping, and a step over its EENTER ends after its EEXIT, as if the entry
had opted out of debugging.

gdb debugs the first process, also after it executes another program.  Its children run without gdb
and without breakpoints.

Deviation: TCS.FLAGS.DBGOPTIN is neither read nor set: gdb can always step a thread in a debug
enclave.

Deviation: a child that shares memory with the program, by vfork or an enclave's mapping, gets
SIGTRAP at the program's breakpoints.

Source:
    "Debugging with GDB", "gdb Remote Serial Protocol"; SDM vol. 3D, "Enclave Debugging"; ptrace(2).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

from softsgx.arch import AttributesFlags
from softsgx.engines.native import abi
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.gdb.libraries import Library, auxiliary_vector, linked_libraries
from softsgx.engines.native.gdb.link import Link
from softsgx.engines.native.gdb.memory import DebuggedMemory
from softsgx.engines.native.gdb.monitor import enclaves
from softsgx.engines.native.gdb.server import GdbServer
from softsgx.engines.native.gdb.ssa import SsaFrame
from softsgx.engines.native.gdb.symbols import EnclaveFiles
from softsgx.engines.native.gdb.target import Action, StopReason
from softsgx.engines.native.tracing.failures import kill
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.loop import Handler, Loop
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Gone, Stop
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.x86.insn import ENCLU

__all__ = ["DebugLoop"]

_ERESUME, _SYSCALL_BYTES = 3, 2
_DEBUG = int(AttributesFlags.DEBUG)
_INTERRUPTED = Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)
#: ``si_code`` of a step over an instruction, over a system call, and to the entry of a handler.
_STEPPED = frozenset({abi.TRAP_TRACE, abi.TRAP_BRKPT, abi.SIGTRAP})
_BREAKPOINT, _LIBRARY = b"swbreak:;", b"library:;"
#: Calls that change which enclaves are mapped and initialised, and calls that open files.
_CHANGING = frozenset({abi.SYS_IOCTL, abi.SYS_MMAP, abi.SYS_MUNMAP, abi.SYS_MREMAP})
_OPENING = {abi.SYS_OPEN: "rdi", abi.SYS_OPENAT: "rsi", abi.SYS_OPENAT2: "rsi"}
#: Signals that end a program while it waits for its first gdb.
_ENDING = frozenset(
    {int(signal.SIGINT), int(signal.SIGTERM), int(signal.SIGHUP), int(signal.SIGQUIT)}
)
_LOOK_EVERY_NS = 200_000_000


class DebugLoop(Loop):
    """See the module.

    Args:
        lifecycle, waits, transitions, calls: as for :class:`Loop`.
        server: where gdb connects.
        files: finds the files of enclaves.

    Attributes:
        pid: the process that gdb debugs.
        memory: its memory.
        reason: why the process stopped last.
    """

    memory: DebuggedMemory

    def __init__(
        self,
        lifecycle: Lifecycle,
        waits: Waits,
        transitions: Transitions,
        calls: dict[int, Handler],
        *,
        server: GdbServer,
        files: EnclaveFiles,
    ) -> None:
        super().__init__(lifecycle, waits, transitions, calls)
        self._server, self._files = server, files
        self._link = Link(server, self)
        self.pid = 0
        self.reason = StopReason(0, abi.SIGTRAP)
        self._debugged = True  # by a gdb, or until the first one connects
        self._stopped = True  # every thread waits for gdb
        self._next: list[StopReason] = []
        self._halted: dict[int, int] = {}
        self._signals: dict[int, int] = {}
        self._actions: dict[int, Action] = {}
        self._default: Action | None = None
        self._passed: frozenset[int] = frozenset()
        self._changing = self._executing = False
        self._loaded: list[Library] = []

    def add(self, thread: ProgramThread) -> None:
        """Add a stopped thread; gdb debugs the process of the first one."""
        super().add(thread)
        if not self.pid or self._follows(thread):
            self.pid = thread.process.pid
            self.memory = DebuggedMemory(thread.image)

    def run(self) -> None:
        """Serve the program until its last thread has ended."""
        self.reason = StopReason(self.pid, abi.SIGTRAP)
        with self._server.sigio_enabled():
            super().run()

    # --- requests of a session -------------------------------------------------------------------

    def program_threads(self) -> dict[int, ProgramThread]:
        """Return the threads of the debugged process by id."""
        return {tid: each for tid, each in self.threads.items() if each.process.pid == self.pid}

    def libraries(self) -> tuple[int, list[Library]]:
        """Return the address of the program's own link map, 0 for none, and its libraries."""
        thread = next(iter(self.program_threads().values()))
        with open(f"/proc/{thread.tid}/auxv", "rb") as file:
            auxv = auxiliary_vector(file.read())
        main, found = linked_libraries(
            auxv, lambda address, size: self.memory.read(thread, address, size)
        )
        return main, found + self._enclave_libraries(thread)

    def pass_signals(self, numbers: frozenset[int]) -> None:
        """Deliver these Linux signals without a stop for gdb."""
        self._passed = numbers

    def attach(self) -> None:
        """A gdb has connected: stop the process if it runs."""
        threads = self.program_threads()
        self._debugged = bool(threads)
        if threads and not self._stopped:
            self._next.append(StopReason(next(iter(threads)), 0))

    def break_in(self) -> None:
        """Stop the process, if it runs."""
        threads = self.program_threads()
        if threads and self._debugged and not self._stopped and not self._next:
            tid = self.reason.tid if self.reason.tid in threads else next(iter(threads))
            self._next.append(StopReason(tid, signal.SIGINT))

    def resume_threads(self, actions: Mapping[int, Action], default: Action | None) -> None:
        """Resume the threads that ``actions`` names, and the others if there is a default."""
        threads = self.program_threads()
        self._default, self._actions = default, {}
        for tid, thread in threads.items():
            action = actions.get(tid) or (None if default is None else replace(default))
            if action is not None:
                with suppress(Gone):  # the loop receives its end next
                    action.returning = action.step and SsaFrame.of(thread) is not None
                self._actions[tid] = action
        if self._next:  # gdb gets this stop before any thread runs
            return
        self._stopped = False
        for tid in list(self._halted):
            if tid in self._actions:
                self._release(threads[tid], self._actions[tid])

    def detach(self) -> None:
        """Remove breakpoints, and let the process run without gdb."""
        threads = self.program_threads()
        for thread in threads.values():
            self.memory.remove_all(thread)
            break
        self._debugged = self._stopped = False
        self._next.clear()
        self._actions.clear()
        for tid in list(self._halted):
            shown = self._signals.get(tid, 0)
            self._release(threads[tid], Action(number=0 if shown == abi.SIGTRAP else shown))

    def end_process(self) -> None:
        """End the process."""
        kill(self.pid)

    # --- running and stopping -------------------------------------------------------------------

    def _follows(self, thread: ProgramThread) -> bool:
        return self._debugged and thread.process.pid == self.pid

    def _between(self) -> int | None:
        self._report_stop()
        while self._link.poll():
            self._report_stop()
        if not (self._debugged and self._stopped):
            return super()._between()
        if self._link.connected:
            return None
        if any(_ENDING.intersection(each.waiting_signals()) for each in self._halted_threads()):
            self.detach()
        return self._waits.clock() + _LOOK_EVERY_NS

    def _halted_threads(self) -> list[ProgramThread]:
        return [self.threads[tid] for tid in self._halted if tid in self.threads]

    def _report_stop(self) -> None:
        """If there is a stop for gdb, stop the process and send the stop reply."""
        if not self._debugged or (self._stopped and not self._link.waits):
            return
        threads = self.program_threads()
        if not self._next:
            if threads and self._link.waits and not self._stopped and not self._can_run(threads):
                self._stopped = True
                self._link.send_none_runs()
            return
        self._stop_all()
        self.reason = self._next.pop(0)
        threads = self.program_threads()
        if not threads:
            return  # gdb gets the end of the process next
        if self.reason.tid not in threads:
            self.reason = replace(self.reason, tid=next(iter(threads)))
        if self._link.waits:
            self._link.send_stop()

    def _can_run(self, threads: dict[int, ProgramThread]) -> bool:
        return any(tid in self._actions or each.unstoppable for tid, each in threads.items())

    def _stop_all(self) -> None:
        """Stop every thread of the process, outside of enclaves."""
        self._stopped = True
        for thread in list(self.program_threads().values()):
            if thread.unstoppable and thread.running:
                continue  # in the kernel; it stops when it returns from there
            if self.hold(thread):
                try:
                    self._prepare_for_gdb(thread)
                except Exception as error:
                    self.failed(thread.process.pid, thread.tid, error)

    def _prepare_for_gdb(self, thread: ProgramThread) -> None:
        """Take a held thread out of its enclave, and drop its own breakpoint trap or step.

        When it runs again, it executes the breakpoint again, unless gdb has removed it; gdb itself
        drops a step that a stop of another thread has interrupted.
        """
        stop = thread.pending[0] if thread.pending else None
        if stop is not None and stop.signal == abi.SIGTRAP and not stop.event and not stop.syscall:
            action = self._actions.get(thread.tid)
            stepped = action is not None and action.step and thread.siginfo().code in _STEPPED
            if self._take_back(thread) or stepped:
                thread.pending[0] = _INTERRUPTED
        if thread.cpu.inside is not None:
            self._take_out(thread)

    def _take_back(self, thread: ProgramThread) -> bool:
        """Return whether a thread has executed a breakpoint; then move it back in front of it."""
        regs = thread.load()
        if thread.siginfo().code != abi.SI_KERNEL or regs.rip - 1 not in self.memory.breakpoints:
            return False
        regs.rip -= 1
        thread.store()
        return True

    def _halt(self, thread: ProgramThread, reason: StopReason | None, number: int = 0) -> None:
        """Keep a thread stopped until gdb resumes it; ``number`` is a signal not shown to gdb."""
        self._halted[thread.tid] = number
        if reason is not None:
            self._next.append(reason)

    def _release(self, thread: ProgramThread, action: Action) -> None:
        """Resume a halted thread."""
        number, shown = self._halted.pop(thread.tid), self._signals.pop(thread.tid, 0)
        wanted, action.number = action.number or number, 0
        if shown and wanted != shown:
            thread.outgoing = None
        if wanted and not thread.at_signal:
            os.kill(self.pid, wanted)
            wanted = 0
        try:
            if not wanted:
                self._ready_to_return(thread)
            self._run_on(thread, wanted)
        except Exception as error:
            self.failed(thread.process.pid, thread.tid, error)
        finally:
            thread.image.current = None

    @staticmethod
    def _ready_to_return(thread: ProgramThread) -> None:
        """Make the supervisor execute the ERESUME that a thread is at, before the thread can trap.

        The thread blocks its signals again, and the kernel resets the handler of a blocked signal
        that a trap forces.
        """
        if thread.cpu.inside is None and not thread.mid_call:
            regs, image = thread.load(), thread.image
            if regs.rax == _ERESUME and image.read(regs.rip, len(ENCLU)) == ENCLU:
                thread.kicked = True

    def _run_on(self, thread: ProgramThread, number: int) -> None:
        if thread.kicked and not number and not thread.mid_call:
            thread.image.current = thread
            thread.kicked = False
            number = self._transitions.resumed(thread)
            if number:
                self.resume_thread(thread, number)
                return
        super().resume_thread(thread, number)

    def _may_run(self, thread: ProgramThread) -> bool:
        if not self._follows(thread):
            return True
        return not self._stopped and not self._next and thread.tid in self._actions

    # --- the tracer's loop ----------------------------------------------------------------------

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread, or keep it for gdb if its stop is one for gdb."""
        if not self._follows(thread):
            super().resume_thread(thread, number)
            return
        if number and number not in self._passed:
            self._signalled(thread, number)
            return
        reason = self._changed(thread)
        action = self._actions.get(thread.tid)
        if reason is None and action is not None and self._has_stepped(thread, action):
            reason = StopReason(thread.tid, abi.SIGTRAP)
        if reason is not None or not self._may_run(thread):
            self._halt(thread, reason, number)
            return
        self._run_on(thread, number)

    def _changed(self, thread: ProgramThread) -> StopReason | None:
        """Return the stop for gdb that the current system call has caused, if any."""
        if self._executing:
            self._executing = False
            path = os.fsencode(os.readlink(f"/proc/{thread.tid}/exe"))
            detail = b"exec:%b;" % path.hex().encode() if self._link.knows_exec else b""
            return StopReason(thread.tid, abi.SIGTRAP, detail)
        if self._changing:
            self._changing = False
            loaded = self._enclave_libraries(thread)
            if loaded != self._loaded:
                self._loaded = loaded
                return StopReason(thread.tid, abi.SIGTRAP, _LIBRARY)
        return None

    def _has_stepped(self, thread: ProgramThread, action: Action) -> bool:
        """Return whether the supervisor has emulated the instruction that gdb steps."""
        before, action.before = action.before, None
        rip = thread.load().rip
        if not action.step or before is None or rip == before or action.returning:
            return False
        if thread.at_call or thread.illegal_at is not None:
            return False  # the kernel still reports the end of the step, or a signal follows
        inside = thread.cpu.inside
        if inside is not None and not inside.enclave.flags & _DEBUG:
            return False
        return not action.start <= rip < action.end

    def _signalled(self, thread: ProgramThread, number: int) -> None:
        """Handle a signal before delivery: a breakpoint, the end of a step, or the program's."""
        if number == abi.SIGTRAP:
            info = thread.siginfo() if thread.outgoing is None else thread.outgoing.info
            frame, action = SsaFrame.of(thread), self._actions.get(thread.tid)
            breakpoints = self.memory.breakpoints
            if info.code == abi.SI_KERNEL and frame is not None and frame.rip - 1 in breakpoints:
                frame.set_rip(frame.rip - 1)
                thread.outgoing = None
                self._halt(thread, StopReason(thread.tid, number, _BREAKPOINT))
                return
            if info.code in _STEPPED and action is not None and action.step:
                thread.outgoing = None
                rip = thread.load().rip if frame is None else frame.rip
                if action.start <= rip < action.end and self._may_run(thread):
                    self._ready_to_return(thread)
                    self._run_on(thread, 0)
                else:
                    self._halt(thread, StopReason(thread.tid, number))
                return
        self._signals[thread.tid] = number
        self._halt(thread, StopReason(thread.tid, number))

    def _go(self, thread: ProgramThread, number: int = 0) -> None:
        action = self._actions.get(thread.tid) if self._follows(thread) else None
        step = action is not None and action.step
        if action is not None and step:
            inside = thread.cpu.inside
            if inside is not None:
                action.returning = False
                step = bool(inside.enclave.flags & _DEBUG)
            else:
                step = not action.returning
        thread.resume(number, step=step)

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if self._follows(thread):
            signalled = not stop.event and not stop.syscall
            action = self._actions.get(thread.tid)
            if action is not None:
                action.before = _begun_at(thread, stop)
            outside = thread.cpu.inside is None
            if signalled and stop.signal == abi.SIGTRAP and outside and self._take_back(thread):
                self._halt(thread, StopReason(thread.tid, abi.SIGTRAP, _BREAKPOINT))
                return
        super()._handle(thread, stop)

    def guard(self, thread: ProgramThread, stop: Stop) -> None:
        """Handle a stop of a thread that gdb lets run."""
        if self._may_run(thread) or stop.event == abi.PTRACE_EVENT_EXIT:
            super().guard(thread, stop)
        else:
            thread.pending.append(stop)
            self.held.append(thread)

    def _next_held(self) -> ProgramThread | None:
        for index in range(len(self.held) - 1, -1, -1):
            if self._may_run(self.held[index]) or not self.held[index].pending:
                return self.held.pop(index)
        return None

    def _call(self, thread: ProgramThread) -> None:
        if self._follows(thread):
            regs = thread.load()
            if regs.orig_rax in _OPENING:
                path = getattr(regs, _OPENING[regs.orig_rax])
                self._files.opened(thread.tid, thread.image.read_string(path))
            self._changing = regs.orig_rax in _CHANGING
        try:
            super()._call(thread)
        finally:
            self._changing = False

    def _enclave_libraries(self, thread: ProgramThread) -> list[Library]:
        """Return the files of the debug enclaves that the process has mapped and initialised."""
        found = [
            self._files.enclave_library(
                thread.tid,
                enclave.number,
                enclave.base,
                lambda address, size: self.memory.read(thread, address, size),
            )
            for enclave in enclaves(thread.image)
            if enclave.initialized and enclave.debug and not enclave.dead
        ]
        return [library for library in found if library is not None]

    # --- children, execve and ends --------------------------------------------------------------

    def _child(self, tid: int, parent: ProgramThread, event: int, flags: int) -> ProgramThread:
        thread = super()._child(tid, parent, event, flags)
        if self._follows(thread):
            if self._default is not None:
                self._actions[tid] = Action()
        elif self._follows(parent) and thread.image is not parent.image:
            self.memory.give_back(thread.image)
        return thread

    def _exec(self, thread: ProgramThread) -> None:
        self._executing = self._follows(thread)
        try:
            super()._exec(thread)
        finally:
            self._executing = False

    def _die(self, thread: ProgramThread) -> None:
        super()._die(thread)
        self._halted.pop(thread.tid, None)
        self._signals.pop(thread.tid, None)
        self._actions.pop(thread.tid, None)

    def _gone(self, thread: ProgramThread, status: int) -> None:
        super()._gone(thread, status)
        if thread.tid == self.pid:
            self._debugged = False
            self._link.send_end(status)


def _begun_at(thread: ProgramThread, stop: Stop) -> int | None:
    """Return the address of the instruction that a stop is a part of; ``None``: of none."""
    if stop.event == abi.PTRACE_EVENT_SECCOMP:
        return thread.load().rip - _SYSCALL_BYTES
    return None if stop.event or stop.syscall else thread.load().rip
