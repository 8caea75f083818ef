"""Signals that are sent to a command which runs a program: the program gets them.

Before the program starts and after it has ended, a signal ends the command, by that signal, when
the files it was about to write are removed.  From just before the program is made until it has
ended, signals wait; a thread passes them on to the program, as soon as there is one.

The terminal sends the signals of its keys to each process of its foreground group, so the program
has those already.  It sends SIGHUP to the leader of its session alone, which the command may be in
the program's place.

Deviation: a program gets a signal twice that another process sends to the whole process group.

Source:
    signal(7), sigwaitinfo(2), sigaction(2) (``si_code``), credentials(7); timeout(1).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["EndedBySignal", "ProgramSignals"]

_ENDING = frozenset(
    {
        *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT),
        *(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    }
)
_SI_KERNEL = 0x80  # a key of the terminal, or its end
_STOP = signal.SIGHUP  # from the command itself, it ends the thread


class EndedBySignal(BaseException):
    """The command ends by a signal: because one was sent to it, or because its program did.

    Attributes:
        number: which signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ProgramSignals:
    """See the module; a context manager around all that the command does.

    Args:
        taken: signals to the command that mean something to the engine, and are not passed on.
    """

    def __init__(self, taken: Set[int]) -> None:
        self._passed_on = _ENDING - taken
        self._pidfd: int | None = None
        self._waiter: threading.Thread | None = None
        self._ended = False

    def __enter__(self) -> ProgramSignals:
        self._before = {number: signal.getsignal(number) for number in _ENDING}
        for number, handler in self._before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, self._handle)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let signals wait for the program, which is made, and ends, in this context."""
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            yield
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # raises what has come since

    def started(self, pid: int) -> None:
        """Pass on what has come, and what will come, to process ``pid`` and its children."""
        self._pidfd = os.pidfd_open(pid)
        # Also those of keys: what came before the program was made has not reached it, and what
        # came later and has not ended it waits, and is one signal with this one.
        for told in self._received():
            self._pass_on(told.si_signo)
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._pidfd is None:
            raise EndedBySignal(number)
        self._pass_on(number)  # a thread that does not block it has received it

    def _wait(self) -> None:
        while True:
            told = signal.sigwaitinfo(self._passed_on)
            if self._ended and told.si_pid == os.getpid() and told.si_signo == _STOP:
                return
            if not _sent_by_key(told):
                self._pass_on(told.si_signo)

    def _pass_on(self, number: int) -> None:
        assert self._pidfd is not None, "a signal is passed on to a program that was started"
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            running = _traced()  # what it has started
            for pid in running:
                with suppress(OSError):
                    os.kill(pid, number)
            if not running:
                self._keep(number)
        except PermissionError:
            return  # the program has become another user: its sender could not signal it either

    @staticmethod
    def _keep(number: int) -> None:
        """The program has ended: let a signal wait until the command can be ended by it."""
        main = threading.main_thread().ident
        assert main is not None, "the main thread has an id"
        signal.pthread_kill(main, number)

    def _received(self) -> Iterator[signal.struct_siginfo]:
        while (told := signal.sigtimedwait(self._passed_on, 0)) is not None:
            yield told

    def _stop(self) -> None:
        """End the thread; the program has ended."""
        if self._waiter is not None:
            assert self._waiter.ident is not None, "a thread that was started has an id"
            self._ended = True
            signal.pthread_kill(self._waiter.ident, _STOP)
            self._waiter.join()
            self._waiter = None
            for told in list(self._received()):
                if not _sent_by_key(told):
                    self._keep(told.si_signo)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _sent_by_key(told: signal.struct_siginfo) -> bool:
    return told.si_code == _SI_KERNEL and told.si_signo != signal.SIGHUP


def _traced() -> list[int]:
    """Return the processes that this one traces."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/status") as file:
            if f"TracerPid:\t{os.getpid()}\n" in file:
                found.append(int(name))
    return found
