"""Contents of the program's hidden pages, in memory of the recorder.

After fork, address spaces share a content until one of them replaces it.
"""

from __future__ import annotations

import ctypes
import mmap

from softsgx.engines.native import abi

__all__ = ["Contents"]

_PIECE_BYTES = 16 << 20


class Contents:
    """See the module.  A content is named by the address of its page in the recorder's memory.

    Attributes:
        zero: the content of a page that was never written.
    """

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []
        self._free: list[int] = []
        self._shared: dict[int, int] = {}
        self.zero = self.allocate()

    def allocate(self) -> int:
        """Return a page for a new content; its bytes are arbitrary (the very first has zeros)."""
        if not self._free:
            piece = mmap.mmap(-1, _PIECE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._pieces.append(piece)
            base = ctypes.addressof(ctypes.c_char.from_buffer(piece))
            self._free = [base + at for at in range(0, _PIECE_BYTES, abi.PAGE)][::-1]
        return self._free.pop()

    def store(self, data: bytes) -> int:
        """Return a new content: at most 4096 bytes of ``data``, padded with zeros."""
        at = self.allocate()
        self.fill(at, data)
        return at

    def fill(self, at: int, data: bytes) -> None:
        """Replace a content by at most 4096 bytes of ``data``, padded with zeros."""
        ctypes.memmove(at, data.ljust(abi.PAGE, b"\0"), abi.PAGE)

    def bytes(self, at: int) -> bytes:
        """Return the 4096 bytes of a content."""
        return ctypes.string_at(at, abi.PAGE)

    def share(self, at: int) -> None:
        """One more page has this content."""
        self._shared[at] = self._shared.get(at, 0) + 1

    def is_shared(self, at: int) -> bool:
        """Return whether several pages have this content."""
        return at in self._shared

    def release(self, at: int) -> None:
        """One page fewer has this content; it is freed with the last."""
        others = self._shared.get(at)
        if others is None:
            self._free.append(at)
        elif others == 1:
            del self._shared[at]
        else:
            self._shared[at] = others - 1
