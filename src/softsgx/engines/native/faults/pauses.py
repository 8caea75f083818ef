"""Pauses of signals: a thread inside executes code between two signals, however many come.

A signal that interrupts enclave code costs several stops: the signal, the handler, and the ERESUME
after it.  When the signals of all threads together take the supervisor's time, the next signal of a
thread is pending when the thread has resumed.  The kernel then stops it again before its first
instruction, and no thread makes progress.

So a thread that two signals in a row have stopped where it went in gets a pause after its next
ERESUME: it blocks all signals but those of faults for 2 ms, and for longer if it does not get a
processor.  They stay pending.  The same holds for the second signal in a row that finds a thread in
front of its ERESUME.  A thread that leaves its enclave gets its signal mask back at once.

Deviation: on hardware a handler is called before the next instruction of the enclave.

Source:
    sched-stats.rst: ``/proc/PID/schedstat``; signal(7) for blocked signals; kernel/signal.c: a
    signal that a tracer delivers and its thread blocks stays pending.
"""

from __future__ import annotations

from softsgx.arch import Enclu
from softsgx.engines.native import abi, kernel
from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.x86.insn import ENCLU

__all__ = ["SignalPauses", "begin_again"]

_LOW_32 = 0xFFFF_FFFF
_MOST_HELD_UP = 2
_PAUSE_NS = 2_000_000
_PROGRESS_NS = 500_000  # what a pause is for
_LONGEST_PAUSE_NS = 64_000_000
_ALL_BUT_FAULTS = (1 << 64) - 1 & ~abi.FAULT_SIGNALS
_CAN_WAIT = (1 << 31) - 1 & ~abi.FAULT_SIGNALS & ~(1 << abi.SIGSTOP - 1)


class SignalPauses:
    """See the module.

    Args:
        waits: of the supervisor; they are interrupted at the end of a pause.
        usable: whether there are pauses at all.
    """

    def __init__(self, waits: Waits, *, usable: bool) -> None:
        self._waits, self._usable = waits, usable
        self._threads: set[ProgramThread] = set()

    def interrupted(self, thread: ProgramThread) -> None:
        """A signal is about to take a thread out of its enclave; its registers are loaded."""
        same = self._usable and _general_registers(thread) == thread.went_in
        thread.held_up = thread.held_up + 1 if same else 0

    def went_in(self, thread: ProgramThread) -> None:
        """A thread that has stopped is inside; its registers are loaded.

        Signals of faults must not be blocked, since the kernel resets the handler of one that it
        has to force.
        """
        thread.went_in = _general_registers(thread)
        if thread.pause_ns:
            return
        if thread.held_up >= _MOST_HELD_UP:
            self._start(thread)
            return
        mask = thread.sigmask()
        if mask & abi.FAULT_SIGNALS:
            thread.blocked = mask
            thread.set_sigmask(mask & ~abi.FAULT_SIGNALS)

    def before_return(self, thread: ProgramThread, number: int) -> None:
        """A signal has stopped a thread outside that has been inside.

        If a pause begins, the kernel keeps the signal pending, and the thread executes its ERESUME.
        That is not for signals that are queued: this one would come behind those sent later.
        """
        regs = thread.load()
        if (
            not self._usable
            or not _CAN_WAIT >> number - 1 & 1
            or regs.rax & _LOW_32 != Enclu.ERESUME
            or thread.image.read(regs.rip, len(ENCLU)) != ENCLU
        ):
            return
        thread.held_up += 1
        if thread.held_up >= _MOST_HELD_UP:
            self._start(thread)

    def end(self, thread: ProgramThread) -> None:
        """End the pause of a stopped thread, if it has one."""
        if thread.pause_ns:
            _allow_signals(thread)

    def _start(self, thread: ProgramThread) -> None:
        mask = thread.sigmask()
        if thread.blocked is not None:
            mask |= thread.blocked & abi.FAULT_SIGNALS
        thread.blocked = mask
        thread.set_sigmask(_ALL_BUT_FAULTS)
        thread.held_up, thread.ran_ns = 0, _run_time_ns(thread)
        self._begin(thread, _PAUSE_NS)

    def going(self, thread: ProgramThread, number: int) -> None:
        """A stopped thread in a pause is about to be resumed: end the pause if its time is over.

        It is over, too, if a handler of signal ``number`` may run.  The handler's return gives the
        thread the mask that it has now.
        """
        if number and abi.FAULT_SIGNALS >> number - 1 & 1:
            _allow_signals(thread)
            return
        if self._waits.clock() < thread.paused_until_ns:
            return
        ran_ns = _run_time_ns(thread) - thread.ran_ns
        if ran_ns < _PROGRESS_NS and thread.pause_ns < _LONGEST_PAUSE_NS:
            self._begin(thread, 2 * thread.pause_ns)
        else:
            _allow_signals(thread)

    def _begin(self, thread: ProgramThread, pause_ns: int) -> None:
        thread.pause_ns = pause_ns
        thread.paused_until_ns = self._waits.clock() + pause_ns
        self._threads.add(thread)
        self._waits.look_at(self._look, thread.paused_until_ns)

    def _look(self) -> None:
        """Stop the threads whose pauses are over."""
        now_ns = self._waits.clock()
        for thread in list(self._threads):
            if not thread.pause_ns or thread.image.threads.get(thread.tid) is not thread:
                self._threads.remove(thread)
            elif now_ns < thread.paused_until_ns:
                self._waits.look_at(self._look, thread.paused_until_ns)
            else:
                self._threads.remove(thread)
                if thread.running:
                    kernel.try_ptrace(abi.PTRACE_INTERRUPT, thread.tid, 0, 0)


def _allow_signals(thread: ProgramThread) -> None:
    """End the pause of a stopped thread."""
    thread.pause_ns, blocked = 0, thread.blocked
    assert blocked is not None, f"thread {thread.tid} has a pause, and its signal mask is unknown"
    thread.set_sigmask(blocked & ~abi.FAULT_SIGNALS)
    if not blocked & abi.FAULT_SIGNALS:
        thread.blocked = None


def begin_again(thread: ProgramThread) -> None:
    """A thread leaves its enclave in a pause, and may come back: let the pause begin again then."""
    _allow_signals(thread)
    thread.held_up = _MOST_HELD_UP


def _general_registers(thread: ProgramThread) -> bytes:
    """Return the loaded registers that almost every instruction changes one of."""
    raw = bytes(thread.regs)
    return raw[:_ORIG_RAX] + raw[_RIP] + raw[_RSP]


def _run_time_ns(thread: ProgramThread) -> int:
    """Return for how long a stopped thread has run; 0 where the kernel does not say it."""
    try:
        with open(f"/proc/{thread.tid}/schedstat", "rb", buffering=0) as file:
            return int(file.read(64).split()[0])
    except (OSError, IndexError):
        return 0


def _offset(name: str) -> int:
    return int(getattr(UserRegs, name).offset)


_ORIG_RAX = _offset("orig_rax")
_RIP, _RSP = (slice(at, at + 8) for at in (_offset("rip"), _offset("rsp")))
