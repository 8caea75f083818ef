"""Passes signals that a command receives on to the program that it runs.

Before the program starts and after it has ended, a signal ends the command.  The command first
removes the files that it has not written, and then ends by that signal.  From just before the
program's process is made until it has ended, signals are blocked in the command; a thread receives
them and passes them on to the program.

The terminal sends the signals of its keys to each process of its foreground group, so the program
receives those itself.  It sends SIGHUP only to the leader of its session, which may be the command
instead of the program.

Deviation: a program gets a signal twice that another process sends to the whole process group.

The command can get one twice, too: timeout(1) sends its signal to the process that it started, and
then to the process group.  The first ends the program, and the second can come when the program has
ended and the command writes its reports.  Therefore, after the program's end, the command drops one
signal of each number that has reached the program.

Source:
    signal(7), sigwaitinfo(2), sigaction(2) (``si_code``), credentials(7); timeout(1), and
    coreutils, src/timeout.c: ``cleanup()``.
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
    """The command ends by a signal: one was sent to it, or one has ended its program.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ProgramSignals:
    """See the module; a context manager around all that the command does.

    Args:
        taken: signals to the command that the engine handles, and that are not passed on.
    """

    def __init__(self, taken: Set[int]) -> None:
        self._passed_on = _ENDING - taken
        self._pidfd: int | None = None
        self._waiter: threading.Thread | None = None
        self._ended = False
        self._reached = set[int]()  # numbers that have reached the program

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
        """Block signals while the program starts, runs and ends in this context.

        Threads that start meanwhile inherit that, and all of the command's do: one that does not
        block a signal can receive it, and Python's handler then waits for the main thread, which
        waits for the program.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
        try:
            yield
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # delivers signals that are pending

    def started(self, pid: int) -> None:
        """Pass pending and later signals on to process ``pid`` and its children."""
        self._pidfd = os.pidfd_open(pid)
        # Signals of keys as well: one from before the program's fork has not reached the program.
        # One from after the fork is pending there, and the kernel keeps one signal of each number.
        for info in self._received():
            self._pass_on(info.si_signo)
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def ended(self, exit_code: int) -> None:
        """Take note of how the program has ended, in the context of :meth:`waiting`."""
        if exit_code < 0:
            self._reached.add(-exit_code)  # from the sender that also sends it to the command

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._pidfd is not None:
            self._pass_on(number)  # a thread that does not block it has received it
        elif number in self._reached:
            self._reached.remove(number)  # a repetition; the next one ends the command
        else:
            raise EndedBySignal(number)

    def _wait(self) -> None:
        while True:
            info = signal.sigwaitinfo(self._passed_on)
            if self._ended and info.si_pid == os.getpid() and info.si_signo == _STOP:
                return
            if _sent_by_key(info):
                self._reached.add(info.si_signo)
            else:
                self._pass_on(info.si_signo)

    def _pass_on(self, number: int) -> None:
        assert self._pidfd is not None, "a signal is passed on to a program that was started"
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            running = _traced()  # processes that the program has started
            for pid in running:
                with suppress(OSError):
                    os.kill(pid, number)
            if not running:
                self._keep(number)
                return
        except PermissionError:
            return  # the program runs as another user: the sender could not signal it either
        self._reached.add(number)

    @staticmethod
    def _keep(number: int) -> None:
        """The program has ended: leave a signal pending, so that it ends the command later."""
        main = threading.main_thread().ident
        assert main is not None, "the main thread has an id"
        signal.pthread_kill(main, number)

    def _received(self) -> Iterator[signal.struct_siginfo]:
        while (info := signal.sigtimedwait(self._passed_on, 0)) is not None:
            yield info

    def _stop(self) -> None:
        """End the thread; the program has ended."""
        if self._waiter is not None:
            assert self._waiter.ident is not None, "a thread that was started has an id"
            self._ended = True
            signal.pthread_kill(self._waiter.ident, _STOP)
            self._waiter.join()
            self._waiter = None
            for info in list(self._received()):
                if _sent_by_key(info):
                    self._reached.add(info.si_signo)
                else:
                    self._keep(info.si_signo)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _sent_by_key(info: signal.struct_siginfo) -> bool:
    return info.si_code == _SI_KERNEL and info.si_signo != signal.SIGHUP


def _traced() -> list[int]:
    """Return the processes that this one traces."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/status") as file:
            if f"TracerPid:\t{os.getpid()}\n" in file:
                found.append(int(name))
    return found
