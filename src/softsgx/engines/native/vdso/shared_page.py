"""A page that a program shares with the supervisor; our vDSO reads and writes it.

Source:
    ``vdso/code.py`` for the layout and its readers.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from softsgx.engines.native import abi
from softsgx.engines.native.vdso.code import CALL_WORDS, CALLS_AT

__all__ = ["SharedPage"]

_WORD_BYTES = 8
_WORD = (1 << 64) - 1
_CALLS = CALLS_AT // _WORD_BYTES


class SharedPage:
    """The page in the supervisor; an address space and those forked from it have the same one.

    Args:
        fd: a memory file of one page; the constructor closes it.

    Attributes:
        words: its quadwords.
        address: where it is mapped in the program.
    """

    MOST_CALLS = (abi.PAGE - CALLS_AT) // (CALL_WORDS * _WORD_BYTES)

    def __init__(self, fd: int) -> None:
        try:
            os.ftruncate(fd, abi.PAGE)
            self._memory = mmap.mmap(fd, abi.PAGE)
        finally:
            os.close(fd)
        self.words = memoryview(self._memory).cast("Q")
        self.address = 0

    @property
    def calls_at(self) -> int:
        """Where the program finds the table of :meth:`put_calls`."""
        return self.address + CALLS_AT

    def put_calls(self, calls: Sequence[tuple[int, ...]]) -> None:
        """Write a table of system calls, each a number and its arguments; at most MOST_CALLS."""
        words, at = self.words, _CALLS
        for call in calls:
            words[at + CALL_WORDS - 1] = abi.OUR_CALL  # unless the call has a sixth argument
            for place, value in enumerate(call, start=at):
                words[place] = value & _WORD
            at += CALL_WORDS

    def close(self) -> None:
        """Unmap the page; no address space has it any more."""
        self.words.release()
        self._memory.close()
