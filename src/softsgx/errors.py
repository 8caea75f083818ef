"""Bad input: failures that the user causes and can correct.

The other kinds have their own forms: a leaf's code is an ``IntEnum`` value (``arch``), a fault is
an exception of ``hw``, a refused system call is an ``OSError``, our own mistake is an ``assert``.
"""

from __future__ import annotations

__all__ = ["NotRun", "SoftSgxError", "first_line"]


class SoftSgxError(Exception):
    """Bad input, reported in one line: the object, the problem, the remedy.

    A command prints the line after the name of the program and exits with :attr:`exit_status`.
    """

    exit_status = 2


class NotRun(SoftSgxError):
    """A program was not run, though the command line is in order.

    Attributes:
        exit_status: 127: there is no such program; 126: it cannot be executed; 125: this machine
            lacks something.

    Source:
        env(1), timeout(1).
    """

    def __init__(self, text: str, exit_status: int = 125) -> None:
        super().__init__(text)
        self.exit_status = exit_status


_MOST_CHARACTERS = 200


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, for a message of one line.

    It is cut where it is long: libraries quote their input, whose names can have any length.
    """
    line = (str(error).splitlines() or ["?"])[0]
    return line[:_MOST_CHARACTERS] + ("…" if len(line) > _MOST_CHARACTERS else "")
