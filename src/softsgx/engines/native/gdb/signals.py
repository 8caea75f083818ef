"""Translates signal numbers between Linux and gdb, which has numbers of its own.

Source:
    "Debugging with GDB", "gdb Remote Serial Protocol", "Stop Reply Packets"; the list is
    ``include/gdb/signals.def`` of the binutils-gdb repository; signal(7).
"""

from __future__ import annotations

import signal
from typing import Final

__all__ = ["UNKNOWN", "from_gdb", "to_gdb"]

UNKNOWN: Final = 143
"""gdb's number for a signal that it does not know."""

_NAMES = {
    "HUP": 1,
    "INT": 2,
    "QUIT": 3,
    "ILL": 4,
    "TRAP": 5,
    "ABRT": 6,
    "FPE": 8,
    "KILL": 9,
    "BUS": 10,
    "SEGV": 11,
    "SYS": 12,
    "PIPE": 13,
    "ALRM": 14,
    "TERM": 15,
    "URG": 16,
    "STOP": 17,
    "TSTP": 18,
    "CONT": 19,
    "CHLD": 20,
    "TTIN": 21,
    "TTOU": 22,
    "IO": 23,
    "XCPU": 24,
    "XFSZ": 25,
    "VTALRM": 26,
    "PROF": 27,
    "WINCH": 28,
    "USR1": 30,
    "USR2": 31,
    "PWR": 32,
}
#: Real-time signals: gdb's numbers for 33 to 63 are consecutive; those for 32 and 64 are not.
_FIRST_IN_A_ROW, _LAST_IN_A_ROW, _NUMBER_OF_FIRST = 33, 63, 45
_TO_GDB: dict[int, int] = {
    **{int(getattr(signal, f"SIG{name}")): number for name, number in _NAMES.items()},
    **{
        number: number - _FIRST_IN_A_ROW + _NUMBER_OF_FIRST
        for number in range(_FIRST_IN_A_ROW, _LAST_IN_A_ROW + 1)
    },
    32: 77,
    64: 78,
}
_FROM_GDB = {theirs: ours for ours, theirs in _TO_GDB.items()}


def to_gdb(number: int) -> int:
    """Return gdb's number of a Linux signal, 0 for none."""
    return _TO_GDB.get(number, UNKNOWN) if number else 0


def from_gdb(number: int) -> int | None:
    """Return the Linux signal of gdb's number; ``None``: Linux has no such signal."""
    return _FROM_GDB.get(number) if number else 0
