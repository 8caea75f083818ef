"""Replaces CPUID in new code of the program, which execve and mmap have mapped.

Programs execute the same files many times.  The positions of CPUID in a piece of a file are cached
as long as the file does not change.

Deviation: CPUID in shared mappings of files is the processor's own: a replacement there would
change the file.

Source:
    execve(2), mmap(2), proc(5), stat(2).
"""

from __future__ import annotations

import os
import stat
import time
from typing import NamedTuple

from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.x86.rewrite import CPUID, TRAP, cpuid_sites

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


class NewCode:
    """Replaces CPUID in new mappings of files."""

    def __init__(self) -> None:
        self._sites: dict[_Piece, list[int]] = {}

    def executed(self, thread: ProgramThread) -> None:
        """Look at what execve has mapped: the program and its loader."""
        with open(f"/proc/{thread.tid}/maps") as maps:
            for line in maps:
                words = line.rstrip("\n").split(maxsplit=5)
                if "x" in words[1] and len(words) > 5 and words[5].startswith("/"):
                    start, end = (int(part, 16) for part in words[0].split("-"))
                    piece = _piece(words[5], int(words[2], 16), end - start)
                    if piece and (piece.device, piece.inode) != (_device(words[3]), int(words[4])):
                        piece = None  # another file has that name here
                    self._replace(thread, start, end - start, piece)

    def mapped(
        self, thread: ProgramThread, address: int, length: int, descriptor: int, offset: int
    ) -> None:
        """Look at what mmap has mapped from an open file."""
        piece = _piece(f"/proc/{thread.tid}/fd/{descriptor}", offset, length)
        self._replace(thread, address, length, piece)

    def _replace(
        self, thread: ProgramThread, address: int, length: int, piece: _Piece | None
    ) -> None:
        image = thread.image
        sites = None if piece is None else self._sites.get(piece)
        if sites is None:
            sites = cpuid_sites(image.read(address, length))
            if piece is not None:
                self._remember(piece, sites)
        for site in sites:
            at = address + site
            if image.read(at, len(CPUID)) == CPUID:
                os.pwrite(image.memory_fd, TRAP, at)
                image.cpuid_sites.add(at)

    def _remember(self, piece: _Piece, sites: list[int]) -> None:
        if len(self._sites) >= _MOST_PIECES:
            del self._sites[next(iter(self._sites))]
        self._sites[piece] = sites


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


def _device(text: str) -> int:
    """Return the number of a device as ``/proc/PID/maps`` writes it."""
    major, minor = text.split(":")
    return os.makedev(int(major, 16), int(minor, 16))
