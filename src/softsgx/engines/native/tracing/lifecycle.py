"""The interface that the tracer's loop calls when threads, processes and images begin and end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import Process, ProgramThread

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.fresh import CopiedImage, FreshChild

__all__ = ["Lifecycle"]


class Lifecycle:
    """Calls of the loop when threads, processes and address spaces begin and end.

    The supervisor implements it.
    """

    def background(self) -> None:
        """Let background tasks run until each of them waits."""
        raise NotImplementedError

    def new_thread(self, tid: int, process: Process, image: ProcessImage) -> ProgramThread:
        """Make the object of a new thread in a known process and address space."""
        raise NotImplementedError

    def new_process(self, pid: int, parent: Process) -> Process:
        """Make the object of a new process."""
        raise NotImplementedError

    def fork_fresh(self, tid: int, parent: ProgramThread) -> FreshChild | None:
        """Make the object of a child of fork; ``None``: it has to be prepared, and is not fresh."""
        raise NotImplementedError

    def fresh_ended(self, tid: int) -> None:
        """A fresh child was reaped."""
        raise NotImplementedError

    def fork_image(self, tid: int, parent: ProcessImage | CopiedImage) -> ProcessImage:
        """Make the copy of an address space; ``tid`` is stopped in it, before its first step."""
        raise NotImplementedError

    def adopt_fork(self, thread: ProgramThread) -> None:
        """Prepare the enclaves of a copied address space; its thread is known now."""
        raise NotImplementedError

    def exec_image(self, tid: int, process: Process) -> ProgramThread:
        """Prepare an executed program; ``tid`` is stopped at the end of its execve.

        The thread is known to the loop when this returns.

        Raises:
            Gone: the thread has ended; it may be unknown to the loop.
        """
        raise NotImplementedError

    def between(self) -> int | None:
        """Do timed work that is due; the loop serves no thread now.

        Returns:
            When the next work is due, on the clock of the waits; ``None``: none is scheduled.
        """
        raise NotImplementedError

    def has_timed_work(self) -> bool:
        """Return whether :meth:`between` can have work to do in this run."""
        raise NotImplementedError

    def served_first(self) -> ProgramThread | None:
        """Return the thread for which others stand back; ``None``: threads are all the same."""
        raise NotImplementedError

    def before_resume(self) -> None:
        """Do the deferred work that the program could notice; the loop is about to resume it."""
        raise NotImplementedError

    def thread_died(self, thread: ProgramThread) -> None:
        """A thread runs no more code of its program; the loop may be serving another thread."""
        raise NotImplementedError

    def thread_gone(self, thread: ProgramThread) -> None:
        """A thread that died was reaped, or its image was replaced; no thread is being served."""
        raise NotImplementedError
