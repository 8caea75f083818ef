"""Strict mode: accesses from outside an enclave hit the abort page instead of its memory.

Mappings of enclaves are *covered*: they have no rights, so an access from outside faults, and
:mod:`.abort` does what hardware does.  In each address space at most one enclave is uncovered at a
time, and then only threads inside that enclave run; the others wait for their turn.  An entry
uncovers the mappings that the enclave has used lately; the use of another one uncovers that.  A
thread in a system call runs no code of the program, so it keeps running and stops when the call
ends: for that every system call stops.

A thread waits for its turn in front of its EENTER or ERESUME.  If it waited inside, every tracking
cycle of the running threads would interrupt it, and it would start again at its AEP without having
executed an instruction.

Deviation: threads outside and inside never run at the same time; turns are short.

Deviation: a system call that copies to or from an enclave's memory fails with EFAULT while the
enclave is covered, and reaches the memory while it is not.

Source:
    SDM vol. 3D, "Access Control Requirements"; mprotect(2), ptrace(2).
"""

from __future__ import annotations

from softsgx.driver import EnclaveFile
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.tracing.lifecycle import Lifecycle
from softsgx.engines.native.tracing.loop import Handler, Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.tracee import Stop
from softsgx.engines.native.tracing.waits import Waits
from softsgx.ondemand import dataclass

__all__ = ["StrictLoop"]

_NO_CALL = (1 << 64) - 1
_TURN_NS = 2_000_000


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A thread that waits for its turn.

    Attributes:
        thread: it is stopped.
        number: the signal to deliver when it is resumed.
        entry: its stop at an EENTER or ERESUME that is still to be done; ``None``: there is none.
        tcs: the address of that one's TCS. It is read when the wait begins: a thread that is killed
            meanwhile has no registers until its end is reported.
    """

    thread: ProgramThread
    number: int = 0
    entry: Stop | None = None
    tcs: int = 0

    @property
    def wanted(self) -> EnclaveFile | None:
        """The device whose memory it may use next."""
        if self.entry is not None:
            return _device_of(self.thread, self.tcs)
        return _wanted(self.thread)


class _Turns:
    """The turns of one address space: the view of its image has the turn, other threads wait."""

    def __init__(self) -> None:
        self.waiting: list[_Waiting] = []
        self.until_ns: int | None = None


class StrictLoop(Loop):
    """See the module; arguments as of :class:`Loop`."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        waits: Waits,
        transitions: Transitions,
        calls: dict[int, Handler],
    ) -> None:
        super().__init__(lifecycle, waits, transitions, calls)
        self._clock = waits.clock
        self._turns: dict[ProcessImage, _Turns] = {}

    def resume_thread(self, thread: ProgramThread, number: int = 0) -> None:
        """Resume a stopped thread when it is its turn."""
        if thread.at_call and thread.load().orig_rax != _NO_CALL:
            thread.in_call = True
        if thread.in_call or thread.mid_call or self._has_turn(thread, _wanted(thread)):
            super().resume_thread(thread, number)
        else:
            self._wait_for_turn(_Waiting(thread, number))

    def _handle(self, thread: ProgramThread, stop: Stop) -> None:
        if self._transitions.is_entry(thread, stop):
            tcs = thread.load().rbx
            device = _device_of(thread, tcs)
            if device is not None and not self._has_turn(thread, device):
                self._wait_for_turn(_Waiting(thread, entry=stop, tcs=tcs))
                return
        super()._handle(thread, stop)

    def _has_turn(self, thread: ProgramThread, wanted: EnclaveFile | None) -> bool:
        """Return whether the thread may use the memory of ``wanted`` now."""
        turns = self._turns.get(thread.image)
        over = turns is not None and turns.until_ns is not None and self._clock() >= turns.until_ns
        return wanted is thread.image.view and not over

    def _wait_for_turn(self, waiting: _Waiting) -> None:
        self._turns.setdefault(waiting.thread.image, _Turns()).waiting.append(waiting)

    def _between(self) -> int | None:
        self._end_turns()
        for image in list(self._turns):
            try:
                self._turn(image)
                while image in self._turns and not _running(image):  # entries were refused
                    self._turn(image)
            except Exception as error:
                self.image_failed(image, error)
        due = [super()._between(), *(turns.until_ns for turns in self._turns.values())]
        return min((until_ns for until_ns in due if until_ns is not None), default=None)

    def _turn(self, image: ProcessImage) -> None:
        """Change the view when no thread runs in the current one."""
        turns = self._turns.get(image)
        if turns is None:
            return
        turns.waiting = [
            each for each in turns.waiting if self.threads.get(each.thread.tid) is each.thread
        ]
        if not turns.waiting:
            del self._turns[image]
            return
        if _running(image):
            if turns.until_ns is None:
                turns.until_ns = self._clock() + _TURN_NS
            return
        view = turns.waiting[0].wanted
        if view is not image.view:
            image.uncover(view)
        ready = [each for each in turns.waiting if each.wanted is view]
        turns.waiting = [each for each in turns.waiting if each.wanted is not view]
        turns.until_ns = None  # the turn begins when they run
        for each in ready:
            thread = each.thread
            if each.entry is not None:
                self.guard(thread, each.entry)
                continue
            try:
                super().resume_thread(thread, each.number)
            except Exception as error:
                self.failed(thread.process.pid, thread.tid, error)
        if turns.waiting:
            turns.until_ns = self._clock() + _TURN_NS
        else:
            del self._turns[image]

    def _end_turns(self) -> None:
        """Stop the threads whose turn is over; they wait when their stops are handled."""
        for image, turns in list(self._turns.items()):
            if turns.until_ns is not None and self._clock() >= turns.until_ns:
                for thread in _running(image):
                    self.hold(thread)


def _wanted(thread: ProgramThread) -> EnclaveFile | None:
    """Return the device whose memory the thread may use now."""
    inside = thread.cpu.inside
    return None if inside is None else _device_of(thread, inside.tcs_linaddr)


def _device_of(thread: ProgramThread, tcs: int) -> EnclaveFile | None:
    """Return the device that has a TCS."""
    vma = thread.image.mm.find(tcs)
    return None if vma is None else vma.file


def _running(image: ProcessImage) -> list[ProgramThread]:
    """Return the threads that may be executing code of the program."""
    return [thread for thread in image.threads.values() if thread.running and not thread.in_call]
