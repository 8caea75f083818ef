"""Strict mode: who is not inside an enclave gets the abort page in place of its memory.

Mappings of enclaves are *covered*: every right is taken from them, so an access from outside is a
fault, and :mod:`.abort` does what hardware does.  In each address space one enclave at most is
uncovered at a time, and then only threads inside that enclave run; the others wait for their turn.
Of its mappings those are uncovered that it has used lately, and others when it uses them.
A thread in a system call does not run code of the program, so it goes on, and stops when the call
ends: that is why every system call stops here.

Deviation: threads outside and inside never run at the same time; turns are short.

Deviation: a system call that copies to or from an enclave's memory fails with EFAULT while the
enclave is covered, and reaches the memory while it is not.

Source:
    SDM vol. 3D, "Access Control Requirements"; mprotect(2), ptrace(2).
"""

from __future__ import annotations

from softsgx.driver import EnclaveFile
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.tracing.loop import Handler, Lifecycle, Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.tracing.waits import Waits

__all__ = ["StrictLoop"]

_NO_CALL = (1 << 64) - 1
_TURN_NS = 2_000_000


class _Turns:
    """Whose turn it is in one address space: the view of the image says; the others wait here."""

    def __init__(self) -> None:
        self.waiting: list[tuple[ProgramThread, int]] = []
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
        image = thread.image
        if thread.in_call or thread.mid_call:
            super().resume_thread(thread, number)
            return
        turns = self._turns.get(image)
        over = turns is not None and turns.until_ns is not None and self._clock() >= turns.until_ns
        if _wanted(thread) is image.view and not over:
            super().resume_thread(thread, number)
            return
        self._turns.setdefault(image, _Turns()).waiting.append((thread, number))

    def _between(self) -> int | None:
        self._end_turns()
        for image in list(self._turns):
            try:
                self._turn(image)
            except Exception as error:
                self.image_failed(image, error)
        due = [super()._between(), *(turns.until_ns for turns in self._turns.values())]
        return min((until_ns for until_ns in due if until_ns is not None), default=None)

    def _turn(self, image: ProcessImage) -> None:
        """Change the view when no thread runs in the present one any more."""
        turns = self._turns.get(image)
        if turns is None:
            return
        turns.waiting = [
            (thread, number)
            for thread, number in turns.waiting
            if self.threads.get(thread.tid) is thread
        ]
        if not turns.waiting:
            del self._turns[image]
            return
        if _running(image):
            if turns.until_ns is None:
                turns.until_ns = self._clock() + _TURN_NS
            return
        view = _wanted(turns.waiting[0][0])
        if view is not image.view:
            image.uncover(view)
        ready = [entry for entry in turns.waiting if _wanted(entry[0]) is view]
        turns.waiting = [entry for entry in turns.waiting if _wanted(entry[0]) is not view]
        turns.until_ns = self._clock() + _TURN_NS if turns.waiting else None
        if not turns.waiting:
            del self._turns[image]
        for thread, number in ready:
            try:
                super().resume_thread(thread, number)
            except Exception as error:
                self.failed(thread.process.pid, thread.tid, error)

    def _end_turns(self) -> None:
        """Stop the threads whose turn is over; they wait when their stops are handled."""
        for image, turns in list(self._turns.items()):
            if turns.until_ns is not None and self._clock() >= turns.until_ns:
                for thread in _running(image):
                    self.hold(thread)


def _wanted(thread: ProgramThread) -> EnclaveFile | None:
    """Return the device whose memory the thread may use now."""
    inside = thread.cpu.inside
    if inside is None:
        return None
    vma = thread.image.mm.find(inside.tcs_linaddr)
    return None if vma is None else vma.file


def _running(image: ProcessImage) -> list[ProgramThread]:
    """Return the threads that may be executing code of the program."""
    return [thread for thread in image.threads.values() if thread.running and not thread.in_call]
