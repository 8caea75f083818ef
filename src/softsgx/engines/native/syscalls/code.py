"""Replaces CPUID in new code of the program, which execve and mmap have mapped.

Programs execute the same files many times.  The positions of CPUID in a piece of a file are cached
as long as the file does not change, and so is what is written there, as long as the code around
them is the same.

Deviation: CPUID in shared mappings of files is the processor's own: a replacement there would
change the file.

Source:
    execve(2), mmap(2), proc(5), stat(2).
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import file_code
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.stubs import merged
from softsgx.engines.native.x86.rewrite import CPUID, TRAP, find_cpuid

__all__ = ["NewCode"]

_MOST_PIECES = 4096
#: A file may change again within the resolution of its times, and they tell nothing of it.
_SETTLED_NS = 2_000_000_000


class _Piece(NamedTuple):
    """Part of a file in one state: changes of its content change its times or its size."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    offset: int
    length: int


class _Known:
    """What is known of a piece.

    Attributes:
        parts: offsets of CPUID in groups; those of two groups are at least a page apart.
        code: of each group, the code from its first site to its last when it was mapped last.
        changes: (offset, bytes) of what was written then.
        replaced: the offsets of the CPUIDs that this replaced.
    """

    __slots__ = ("changes", "code", "parts", "replaced")

    def __init__(self, sites: list[int]) -> None:
        self.parts: list[list[int]] = []
        for site in sites:
            if self.parts and site - self.parts[-1][-1] < abi.PAGE:
                self.parts[-1].append(site)
            else:
                self.parts.append([site])
        self.code: list[bytes] = []
        self.changes: list[tuple[int, bytes]] = []
        self.replaced: frozenset[int] = frozenset()

    def look(self, read: Callable[[int, int], bytes]) -> None:
        """Prepare the changes for a mapping; ``read`` returns bytes of it at an offset.

        Only code near the sites is read: the kernel would read the pages between from the file.
        """
        code = [read(part[0], part[-1] + len(CPUID) - part[0]) for part in self.parts]
        if code == self.code:
            return
        self.code, self.changes, replaced = code, [], set[int]()
        for part, text in zip(self.parts, code, strict=True):
            first = part[0]
            here = [site for site in part if text.startswith(CPUID, site - first)]
            self.changes += merged([(site, TRAP) for site in here], text, first)
            replaced.update(here)
        self.replaced = frozenset(replaced)


class NewCode:
    """Replaces CPUID in new mappings of files."""

    def __init__(self) -> None:
        self._pieces: dict[_Piece, _Known] = {}

    def executed(self, image: ProcessImage, tid: int) -> None:
        """Look at what execve has mapped for its thread: the program and its loader."""
        for each in file_code(tid):
            length = each.end - each.start
            piece = _piece(each.path, each.offset, length)
            if piece and (piece.device, piece.inode) != (each.device, each.inode):
                piece = None  # another file has that name here
            self._replace(image, each.start, length, piece)

    def knows_none(self, thread: ProgramThread, length: int, descriptor: int, offset: int) -> bool:
        """Return whether what mmap will map is known and has no CPUID."""
        piece = _piece(f"/proc/{thread.tid}/fd/{descriptor}", offset, length)
        known = None if piece is None else self._pieces.get(piece)
        return known is not None and not known.parts

    def mapped(
        self, thread: ProgramThread, address: int, length: int, descriptor: int, offset: int
    ) -> None:
        """Look at what mmap has mapped from an open file."""
        piece = _piece(f"/proc/{thread.tid}/fd/{descriptor}", offset, length)
        self._replace(thread.image, address, length, piece)

    def _replace(
        self, image: ProcessImage, address: int, length: int, piece: _Piece | None
    ) -> None:
        def read(offset: int, size: int) -> bytes:
            return image.read(address + offset, size)

        known = None if piece is None else self._pieces.get(piece)
        if known is None:
            known = _Known(find_cpuid(read, length))
            if piece is not None:
                self._remember(piece, known)
        if not known.parts:
            return
        known.look(read)
        changes: Iterable[tuple[int, bytes]] = known.changes
        if image.members > 1:  # another thread may be changing the code between
            changes = [(site, TRAP) for site in known.replaced]
        for place, data in changes:
            os.pwrite(image.memory_fd, data, address + place)
        image.cpuid_sites.add(address, known.replaced)

    def _remember(self, piece: _Piece, known: _Known) -> None:
        if len(self._pieces) >= _MOST_PIECES:
            del self._pieces[next(iter(self._pieces))]
        self._pieces[piece] = known


def _piece(path: str, offset: int, length: int) -> _Piece | None:
    """Return the piece that is mapped; ``None`` where its file's times cannot tell of changes."""
    try:
        info = os.stat(path)
    except OSError:
        return None
    newest = max(info.st_mtime_ns, info.st_ctime_ns)
    if not stat.S_ISREG(info.st_mode) or time.time_ns() - newest < _SETTLED_NS:
        return None
    return _Piece(
        info.st_dev,
        info.st_ino,
        info.st_size,
        info.st_mtime_ns,
        info.st_ctime_ns,
        offset,
        length,
    )
