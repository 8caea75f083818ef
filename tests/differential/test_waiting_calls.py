"""The thread of a fault drops the entries of watched pages, without a call of Python code.

Goal: afterwards the pages have no entry, the thread has the registers and the signal mask that it
had, and it runs.  Where anything is unusual, the calls of the readable path are made; before that
nothing has changed.
Method: the scene of ``test_waiting_faults`` with a process that executes code of our vDSO as a
thread of an enclave does; ``test_plain_faults`` compares whole programs.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.native import USABLE_PAGERS, needs_tracing
from tests.support.tracees import end_tracee
from tests.unit.engines.native.test_plain_faults import ADDRESS, BASE, END, PAGE
from tests.unit.engines.native.test_waiting_faults import WaitingScene, uffd

from softsgx import compiled
from softsgx.engines.native import abi, libc
from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.memory.page_table import EnclavePageTable
from softsgx.engines.native.memory.store import NativeStore
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.fault_events import FaultEvent, FaultEvents
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.engines.native.tracing.tracee import Stop, Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.code import emit_injection
from softsgx.engines.native.x86.asm import Assembler

__all__ = ["uffd"]

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(compiled.speedups is None, reason=compiled.description),
    pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd"),
]

PAGES = 360
RT_TGSIGQUEUEINFO = 297
ALL_RIGHTS = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
INTERRUPTED = Stop(abi.SIGTRAP, abi.PTRACE_EVENT_STOP, False)
BLOCKED = 1 << signal.SIGUSR2 - 1 | 1 << signal.SIGSEGV - 1
FAULT_SIGNALS = [signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV]
USUAL = ["fault", "hide"]
OTHERWISE = [*USUAL, "flush"]


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Spinner:
    """A process that has touched its pages, and loops in code beside that of our vDSO."""

    def __init__(self, pending: int = 0, signo: int = signal.SIGSEGV) -> None:
        asm = Assembler()
        emit_injection(asm)
        asm.align(16)
        asm.label("loop")
        asm.emit("49 c7 c1 39 30 00 00")  # mov r9, 12345
        asm.label("again")
        asm.short("eb", "again")  # jmp
        asm.align(16)
        asm.label("space")
        self.labels = asm.labels
        self._code = mmap.mmap(-1, 4 * PAGE, prot=ALL_RIGHTS)
        self._code[: len(asm.finish())] = asm.finish()
        self._memory = mmap.mmap(-1, PAGES * PAGE)
        self.code, self.pages = address_of(self._code), address_of(self._memory)
        self.spins = self.code + self.labels["again"]
        self.tid = os.fork()
        if not self.tid:
            try:
                self._child(pending, signo)
            finally:
                os._exit(1)
        libc.ptrace(abi.PTRACE_SEIZE, self.tid, 0, abi.PTRACE_O_EXITKILL | abi.PTRACE_O_TRACEEXIT)
        while self.stopped().rip != self.spins:
            self.go()
            time.sleep(0.002)
        self.before = bytes(self.stopped())
        self.go()

    def _child(self, pending: int, signo: int) -> None:
        for at in range(0, PAGES * PAGE, PAGE):
            self._memory[at] = 1
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGSEGV})
        if pending:  # as the kernel raises it
            signal.pthread_sigmask(signal.SIG_BLOCK, {signo})
            info = abi.SigInfo(signo=signo, code=pending)
            me = os.getpid()
            libc.syscall(RT_TGSIGQUEUEINFO, me, me, signo, ctypes.addressof(info))
        ctypes.CFUNCTYPE(None)(self.code + self.labels["loop"])()

    def stopped(self) -> UserRegs:
        """Stop it, if it runs; return its registers."""
        if not self.is_stopped():
            libc.ptrace(abi.PTRACE_INTERRUPT, self.tid)
            assert os.WIFSTOPPED(os.waitpid(self.tid, abi.WALL)[1])
        regs = UserRegs()
        libc.ptrace(abi.PTRACE_GETREGS, self.tid, 0, ctypes.addressof(regs))
        return regs

    def go(self) -> None:
        libc.ptrace(abi.PTRACE_CONT, self.tid)

    def state(self) -> str:
        with open(f"/proc/{self.tid}/status") as file:
            return next(line for line in file if line.startswith("State")).split()[1]

    def is_stopped(self) -> bool:
        return self.state() in "tT"

    def blocked(self) -> int:
        with open(f"/proc/{self.tid}/status") as file:
            return int(next(line for line in file if line.startswith("SigBlk")).split()[1], 16)

    def behind_table(self) -> bytes:
        """Return what follows the page that has the calls."""
        return self._code[self.labels["space"] + PAGE :]

    def present(self) -> set[int]:
        """Return the numbers of the pages that have an entry."""
        with open(f"/proc/{self.tid}/pagemap", "rb", buffering=0) as file:
            words = os.pread(file.fileno(), 8 * PAGES, self.pages // PAGE * 8)
        return {page for page in range(PAGES) if words[8 * page + 7] & 0x80}


class Server(WaitingScene):
    """The fault of such a process; its address space and its pager are real."""

    def __init__(self, spinner: Spinner, uffd: int) -> None:
        super().__init__("c", uffd)
        self.spinner, tid = spinner, spinner.tid
        self.kept: list[tuple[int, int]] = []
        make: Callable[..., UffdPager] = UffdPager
        null = os.open(os.devnull, os.O_RDONLY)
        self.pager = make(uffd, null, *[lambda *_: None] * 2, lambda _at: 3, lambda _error: None)
        self._use_image()
        self._use_thread(tid)
        self.faults = FaultEvents()
        self.faults.images[uffd] = cast(ProcessImage, self.image)
        self.faults.may_have_stopped = False
        self.waits.faults, self.waits.asked, self.waits.keep = self.faults, {}, self.keep
        self.event = self.reports[0] = FaultEvent(uffd, tid, ADDRESS, 0)

    def _use_image(self) -> None:
        fake, image, spinner = self.image, ProcessImage.__new__(ProcessImage), self.spinner
        table = EnclavePageTable(
            *(0, NativeStore(), {}, self.pager),
            memory_at=lambda _at: None,
            mapped_in=lambda _start, _end: [],
            is_readable=lambda _at: False,
            kick_all=lambda: None,
        )
        labels = spinner.labels
        vdso: Any = SimpleNamespace(
            calls=labels["calls"], called=labels["called"], table=labels["space"]
        )
        own = {"page_table": table, "pager": self.pager, "_deferred_calls": []}
        for name, value in (vars(fake) | own).items():
            setattr(image, name, value)
        self.memory_fd = os.open(f"/proc/{spinner.tid}/mem", os.O_RDWR)
        vars(image).update(vdso=vdso, vdso_base=spinner.code, memory_fd=self.memory_fd)
        vars(image).update(inject=lambda calls: self.log.append(f"inject {calls}"))
        self.image = cast(Any, image)

    def _use_thread(self, tid: int) -> None:
        thread, fake = ProgramThread.__new__(ProgramThread), self.thread
        Thread.__init__(thread, tid, Waits(), NativeRegisters())
        for name in ("process", "cpu", "breakpoints", "watched", "blocked", "resumes", "spurious"):
            setattr(thread, name, getattr(fake, name))
        thread.image, thread._own_tid, thread.pending = cast(Any, self.image), tid, []
        thread.inject_at, thread.kicked = self.spinner.code + self.spinner.labels["inject"], False
        thread.running = thread.unstoppable = True
        del self.threads[11]
        self.threads[tid] = self.thread = cast(Any, thread)

    def keep(self, tid: int, status: int) -> None:
        self.kept.append((tid, status))

    def hold(self, thread: object) -> bool:
        self.log.append("hold")
        return True

    def watch(self, pages: range) -> None:
        self.pager._present[1 << 18] = b"read before"
        self.pager._watched.update(self.spinner.pages + page * PAGE for page in pages)

    def close(self) -> None:
        self.faults.close()
        os.close(self.pager._pagemap)
        os.close(self.memory_fd)


@pytest.fixture
def spinner() -> Iterator[Spinner]:
    made = Spinner()
    yield made
    end_tracee(made.tid)


@pytest.fixture
def server(spinner: Spinner, uffd: int) -> Iterator[Server]:
    made = Server(spinner, uffd)
    yield made
    made.close()


def expect_as_before(spinner: Spinner) -> None:
    """Check the registers and the mask of the thread, which runs."""
    assert spinner.state() == "R"
    assert bytes(spinner.stopped()) == spinner.before
    assert spinner.blocked() == BLOCKED


# --- the usual case -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pages",
    [
        *(range(7, 8), range(7, 30), range(7, 11, 3)),
        *(range(0, 146, 2), range(0, 148, 2), range(0, PAGES, 2)),
    ],
    ids=["one page", "one run", "two runs", "a full table", "one run more", "three tables"],
)
def test_the_thread_drops_the_entries_and_runs(server: Server, pages: range) -> None:
    spinner = server.spinner
    assert spinner.present() == set(range(PAGES))
    server.watch(pages)
    thread: Any = server.thread
    thread._kept = abi.SigInfo()  # of an earlier stop
    assert server.run() == USUAL
    assert spinner.present() == set(range(PAGES)) - set(pages)
    assert thread._kept is None
    assert not server.pager._watched and not server.pager._present
    assert server.thread.running and not server.kept and server.faults.may_have_stopped
    assert (server.crossings.aex, server.served.served) == (1, 1)
    assert not any(spinner.behind_table()), "more calls than a table has"
    expect_as_before(spinner)


def test_pages_that_are_mapped_no_more_do_no_harm(server: Server) -> None:
    server.watch(range(3))
    server.pager._watched.add(server.spinner.pages - (PAGE << 16))
    server.pager._watched.add(1 << 46)
    assert server.run() == USUAL
    assert server.spinner.present() == set(range(3, PAGES))
    expect_as_before(server.spinner)


def test_the_gate_opens_while_the_thread_is_stopped(server: Server) -> None:
    seen = []

    def going(thread: ProgramThread) -> None:
        seen.append((thread.running, server.spinner.state(), server.spinner.present()))

    server.slot()
    server.permits._open.clear()
    cast(Any, server.permits).going = going
    server.watch(range(5))
    assert server.run() == USUAL
    assert seen == [(False, "t", set(range(5, PAGES)))]
    assert server.thread.running and server.spinner.state() == "R"


def test_the_calls_leave_no_objects(server: Server) -> None:
    blocks = 0
    for number in range(25):
        if number == 5:
            blocks = sys.getallocatedblocks()
        server.reports[:] = [server.event, END]
        server.log.clear()
        server.watch(range(50))
        assert server.run() == USUAL
    assert abs(sys.getallocatedblocks() - blocks) < 200


# --- something else happens -----------------------------------------------------------------------


def flag(name: str, value: object) -> Callable[[Server], None]:
    def change(server: Server) -> None:
        setattr(server.thread, name, value)

    return change


def image_flag(name: str, value: object) -> Callable[[Server], None]:
    def change(server: Server) -> None:
        setattr(server.image, name, value)

    return change


def another_thread(server: Server) -> None:
    server.image.threads = {**server.threads, 1: object()}


def not_its_thread(server: Server) -> None:
    server.image.threads = {1: cast(Any, object())}


def asked(server: Server) -> None:
    server.waits.asked[1] = ADDRESS


def kept(server: Server) -> None:
    server.waits.kept.append((1, 0))


def fetches(server: Server) -> None:
    server.pager._fetches.due.add(BASE)


BEFORE: dict[str, Callable[[Server], None]] = {
    **{name: flag(name, True) for name in ("kicked", "in_call", "mid_call", "unstoppable")},
    **{name: flag(name, True) for name in ("_changed", "_ended")},
    **{name: flag(name, b"something") for name in ("_elsewhere", "_next", "_new_xstate")},
    "pending": flag("pending", [INTERRUPTED]),
    "no place for calls": flag("inject_at", 0),
    "calls": image_flag("_deferred_calls", [(1, 2)]),
    "collecting": image_flag("_collecting", True),
    "current": image_flag("current", "another thread"),
    **{each.__name__: each for each in (another_thread, not_its_thread, asked, kept, fetches)},
}


@pytest.mark.parametrize("what", BEFORE)
def test_otherwise_the_thread_is_not_stopped(server: Server, what: str) -> None:
    server.watch(range(5))
    server.during = lambda: BEFORE[what](server)
    assert server.serve(server.served) in (END, None)
    assert server.log == OTHERWISE
    assert len(server.pager._watched) >= 5 and server.pager._present
    assert server.spinner.present() == set(range(PAGES)) and server.thread.running
    assert server.spinner.state() == "R" and not server.kept


def test_a_thread_that_was_stopped_during_its_fault_is_not_resumed(server: Server) -> None:
    server.watch(range(5))
    server.flushing = lambda: setattr(server.thread, "running", False)
    server.during = lambda: setattr(server.thread, "kicked", True)
    assert server.run() == OTHERWISE


def expect_kept(server: Server) -> None:
    """Check that its stop was left to the loop."""
    assert server.run() == OTHERWISE
    assert server.kept == [
        (server.spinner.tid, abi.PTRACE_EVENT_STOP << 16 | abi.SIGTRAP << 8 | 0x7F)
    ]
    assert len(server.pager._watched) == 5 and server.thread.running
    assert server.spinner.state() == "t"
    assert bytes(server.spinner.stopped()) == server.spinner.before


def test_a_thread_that_is_not_in_the_enclave_is_left_to_the_loop(server: Server) -> None:
    server.watch(range(5))
    server.mm.find = lambda at: None if at == server.spinner.spins else server.vma
    expect_kept(server)


@pytest.mark.parametrize("found", [False, True])
def test_a_thread_at_a_stub_of_cpuid_is_left_to_the_loop(server: Server, found: bool) -> None:
    stubs: Any = SimpleNamespace(has_entry=lambda at: found and at == server.spinner.spins)
    server.image.cpuid_stubs = stubs
    server.watch(range(5))
    if found:
        expect_kept(server)
    else:
        assert server.run() == USUAL
        expect_as_before(server.spinner)


@pytest.mark.parametrize(
    ("signo", "code"), [*((signo, 1) for signo in FAULT_SIGNALS), (signal.SIGSEGV, -1)]
)
def test_the_signal_of_a_fault_that_is_pending_is_left_to_the_loop(
    uffd: int, signo: int, code: int
) -> None:
    spinner = Spinner(pending=code, signo=signo)
    server = Server(spinner, uffd)
    server.watch(range(5))
    try:
        if code > 0:
            expect_kept(server)
        else:  # any program can have sent it
            assert server.run() == USUAL
            expect_as_before(spinner)
    finally:
        server.close()
        end_tracee(spinner.tid)


@pytest.mark.parametrize("signo", [signal.SIGSTOP, signal.SIGUSR1])
def test_a_signal_that_arrives_at_the_calls_arrives_after_them(server: Server, signo: int) -> None:
    """The calls of all tables are made.  Nothing blocks SIGSTOP, which interrupts them."""
    spinner = server.spinner
    server.watch(range(0, PAGES, 2))
    find = server.mm.find

    def later(at: int) -> object:
        if at == spinner.spins:  # it has been interrupted
            os.kill(spinner.tid, signo)
        return find(at)

    server.mm.find = later
    assert server.run() == USUAL
    assert cast(Any, server.thread)._borrowed is (signo == signal.SIGSTOP)
    assert spinner.present() == set(range(1, PAGES, 2))
    _tid, status = os.waitpid(spinner.tid, abi.WALL)
    assert status == signo << 8 | 0x7F
    assert bytes(spinner.stopped()) == spinner.before
    assert spinner.blocked() == BLOCKED


def test_a_sigtrap_that_arrives_at_the_calls_does_not_end_them(server: Server) -> None:
    spinner, find = server.spinner, server.mm.find

    def later(at: int) -> object:
        if at == spinner.spins:  # it has been interrupted
            os.kill(spinner.tid, signal.SIGTRAP)
        return find(at)

    server.watch(range(0, 10, 2))
    server.mm.find = later
    assert server.run() == USUAL
    assert spinner.present() == set(range(PAGES)) - set(range(0, 10, 2))
    expect_as_before(spinner)


def test_code_that_was_begun_elsewhere_ends_as_borrowed_code(server: Server) -> None:
    spinner = server.spinner
    thread: Any = server.thread
    regs = spinner.stopped()
    regs.rip, regs.rax, regs.orig_rax = thread.inject_at, abi.SYS_GETPID, (1 << 64) - 1
    libc.ptrace(abi.PTRACE_SETREGS, spinner.tid, 0, ctypes.addressof(regs))
    spinner.go()
    thread._changed = thread.in_call = True  # of an earlier stop
    thread.end_borrowed(spinner.before, thread.inject_at + 3, BLOCKED)
    assert thread._kept is None and thread._borrowed
    assert not (thread.at_signal or thread.in_call)
    assert bytes(thread.load()) == spinner.before
    thread.resume()
    expect_as_before(spinner)


def test_another_stop_instead_of_the_interrupt_is_left_to_the_loop(server: Server) -> None:
    """A thread that has stopped already for a signal."""
    server.watch(range(5))

    def stop() -> None:
        os.kill(server.spinner.tid, signal.SIGUSR1)
        while server.spinner.state() != "t":
            time.sleep(0.001)

    server.during = stop
    assert server.run() == OTHERWISE
    assert not server.kept and len(server.pager._watched) == 5
    _tid, status = os.waitpid(server.spinner.tid, abi.WALL)
    assert status == signal.SIGUSR1 << 8 | 0x7F


def test_a_thread_that_was_killed_is_left_to_the_loop(server: Server) -> None:
    server.watch(range(5))
    server.during = lambda: os.kill(server.spinner.tid, signal.SIGKILL)
    assert server.run() == OTHERWISE
    assert not server.kept and len(server.pager._watched) == 5


def test_a_thread_that_is_killed_at_its_calls_has_ended(server: Server) -> None:
    """The loop hears of its end."""
    spinner, find = server.spinner, server.mm.find

    def kill(at: int) -> object:
        if at == spinner.spins:
            os.kill(spinner.tid, signal.SIGKILL)
        return find(at)

    server.watch(range(5))
    server.mm.find = kill
    [*first, held, failure] = server.run()
    assert first == USUAL and held == "hold"
    # At the stop of its end, which it may have reached, it answers once more.
    reasons = f"thread {spinner.tid} is gone", "a request to a stopped thread has failed"
    assert failure in [f"failed 10 {spinner.tid} {reason}" for reason in reasons]
    assert not server.thread.running and not server.pager._watched
