"""What the tracer's loop calls when threads, processes and address spaces begin and end."""

from __future__ import annotations

from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import Process, ProgramThread

__all__ = ["Lifecycle"]


class Lifecycle:
    """Calls of the loop when threads, processes and address spaces come and go.

    The supervisor implements it.
    """

    def background(self) -> None:
        """Let background tasks run until each of them waits."""
        raise NotImplementedError

    def new_thread(self, tid: int, process: Process, image: ProcessImage) -> ProgramThread:
        """A thread was made in a known process and address space."""
        raise NotImplementedError

    def new_process(self, pid: int, parent: Process) -> Process:
        """A process was made."""
        raise NotImplementedError

    def fork_image(self, tid: int, parent: ProcessImage) -> ProcessImage:
        """An address space was copied; ``tid`` is stopped in the copy, before its first step."""
        raise NotImplementedError

    def adopt_fork(self, thread: ProgramThread) -> None:
        """The thread of a copied address space is known: prepare its enclaves."""
        raise NotImplementedError

    def exec_image(self, tid: int, process: Process) -> ProgramThread:
        """A program was executed; ``tid`` is stopped at the end of its execve.

        The thread is known to the loop when this returns.

        Raises:
            Gone: the thread has ended; it may be unknown to the loop.
        """
        raise NotImplementedError

    def between(self) -> int | None:
        """No thread is being served: do what is due.

        Returns:
            When something is due next, on the clock of the waits; ``None``: nothing is.
        """
        raise NotImplementedError

    def before_resume(self) -> None:
        """The program is about to be resumed: do the deferred work that it could notice."""
        raise NotImplementedError

    def thread_died(self, thread: ProgramThread) -> None:
        """A thread runs no more code of its program; the loop may be serving another thread."""
        raise NotImplementedError

    def thread_gone(self, thread: ProgramThread) -> None:
        """A thread that died was reaped, or its image was replaced; no thread is being served."""
        raise NotImplementedError
