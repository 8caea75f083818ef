"""Damage to inputs of parsers: bytes of binary files, words of texts.

A mutator has one random generator, so its seed determines its work.  It changes tables more often
than code, and short inputs more often than long ones: both find more in the same time.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Sequence

from tests.support.damage import NASTY

__all__ = ["Mutator"]

INPUT_BYTES = 1 << 17
_NEAR_BYTES = 1024  # from either end of a file: headers and section tables
_WIDTHS = (1, 2, 4, 4, 8, 8)
_CUTS = (1, 4, 32, 4096, INPUT_BYTES)
_GROWTHS = (1, 8, 256, 4096)
_COPIES = (8, 16, 32, 56, 64)
_WORD = re.compile(rb"[0-9A-Za-z_.]+|\s+|.", re.DOTALL)
_NUMBERS = [str(value).encode() for value in NASTY] + [hex(value).encode() for value in NASTY]
_PIECES = (
    *(b"0", b"-1", b"+7", b"1e9", b"0b1", b"0o7", b"1_0", b"99999999999999999999", b"nan", b"inf"),
    *(b"'", b'"', b"[", b"]", b"{", b"}", b"<", b">", b"/", b"=", b"\n", b"#", b"\\", b"&", b"\0"),
    *(b"\xff", b"\xc3\xa9", b"\xef\xbb\xbf", b"\r\n", b"true", b"max", b"", b" ", b"9" * 5000),
)


class Mutator:
    """Damages inputs of one parser.

    Args:
        rng: where every choice comes from.
        hot: offsets where damage leads far; none for inputs that are not laid out by offsets.
        text: whether inputs are texts, and words are what to damage.
        words: what the parser knows by name.
    """

    def __init__(
        self,
        rng: random.Random,
        hot: Sequence[int] = (),
        *,
        text: bool = False,
        words: Sequence[bytes] = (),
    ) -> None:
        self._rand, self._bits = rng.random, rng.getrandbits
        self._hot, self._text, self._words = hot, text, (*words, *_NUMBERS, *_PIECES)
        self._damages = (
            *(self._number, self._number, self._number, self._byte),
            *(self._cut, self._grow, self._copy, self._splice),
        )

    def mutated(self, corpus: Sequence[bytes]) -> bytes:
        """Return one of ``corpus``, damaged in one to four ways."""
        data = self._one_of(corpus)
        if self._rand() < 0.75:
            other = self._one_of(corpus)
            data = min(data, other, key=len)
        if self._text and self._rand() < 0.8:
            return self._reworded(data, corpus)
        damaged = bytearray(data)
        for _ in range((1, 1, 2, 3, 4)[self._below(5)]):
            self._damages[self._below(8)](damaged, corpus)
        return bytes(damaged[:INPUT_BYTES])

    # --- choices ------------------------------------------------------------------------------

    def _below(self, end: int) -> int:
        return int(self._rand() * end)

    def _one_of(self, choices: Sequence[bytes]) -> bytes:
        return choices[int(self._rand() * len(choices))]

    def _place(self, data: bytearray) -> int:
        """Return an offset, more often one of a table than of the middle of some code."""
        size = len(data)
        if self._hot and self._rand() < 0.7:
            return min(size, self._hot[self._below(len(self._hot))])
        chosen = self._rand()
        if chosen < 0.33:
            return min(size, self._below(_NEAR_BYTES))
        if chosen < 0.66:
            return max(0, size - self._below(_NEAR_BYTES))
        return self._below(size + 1)

    # --- bytes --------------------------------------------------------------------------------

    def _number(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        at, width, chosen = self._place(data), _WIDTHS[self._below(6)], self._rand()
        if chosen < 0.33:
            value = NASTY[self._below(len(NASTY))]
        elif chosen < 0.5:
            value = self._bits(64)
        elif chosen < 0.75:
            value = self._below(64)
        else:  # a little more or less than there is: borders of what is allowed
            old = int.from_bytes(data[at : at + width], "little")
            value = old + self._below(9) - 4
        data[at : at + width] = struct.pack("<Q", value & (1 << 64) - 1)[:width]

    def _byte(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        if data:
            data[self._place(data) % len(data)] ^= 1 << self._below(8)

    def _cut(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        at = self._place(data)
        del data[at : at + _CUTS[self._below(5)]]

    def _grow(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        at = self._place(data)
        data[at:at] = bytes(_GROWTHS[self._below(4)])

    def _copy(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        at, start, size = self._place(data), self._place(data), _COPIES[self._below(5)]
        data[at : at + size] = data[start : start + size]

    def _splice(self, data: bytearray, corpus: Sequence[bytes]) -> None:
        at, other = self._place(data), self._one_of(corpus)
        start = self._below(len(other) + 1) if self._rand() < 0.5 else at
        data[at:] = other[start:]

    # --- words --------------------------------------------------------------------------------

    def _reworded(self, data: bytes, corpus: Sequence[bytes]) -> bytes:
        """Return a text with words replaced, left out, repeated or taken from another one."""
        words = _WORD.findall(data)
        for _ in range((1, 1, 2, 3, 4)[self._below(5)]):
            at, chosen = self._below(len(words) + 1), self._rand()
            if chosen < 0.5:
                words[at : at + 1] = [self._one_of(self._words)]
            elif chosen < 0.6:
                del words[at : at + 1 + self._below(3)]
            elif chosen < 0.7:
                words[at:at] = [self._one_of(self._words)]
            elif chosen < 0.85:
                start = self._below(len(words) + 1)
                words[at:at] = words[start : start + 1 + self._below(8)]
            else:
                other = _WORD.findall(self._one_of(corpus))
                words[at:] = other[self._below(len(other) + 1) :]
        return b"".join(words)[:INPUT_BYTES]
