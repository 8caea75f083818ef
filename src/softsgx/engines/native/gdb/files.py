"""Files that gdb reads through its connection: programs, libraries, ``/proc``.

Files are read-only.  gdb names files as the program does.

Source:
    "Debugging with GDB", "File-I/O Remote Protocol Extension", "Host I/O Packets".
"""

from __future__ import annotations

import os
import struct
from errno import EACCES, EBADF, EINVAL, ENOENT

from softsgx.engines.native.gdb.packets import escape

__all__ = ["HostFiles"]

_READ_ONLY = 0
_MOST_BYTES = 1 << 17
#: Errors that the protocol has numbers for, which are Linux's.
_KNOWN = frozenset({1, 2, 4, 9, 13, 14, 16, 17, 19, 20, 21, 22, 23, 24, 27, 28, 29, 30})
_OTHER = 9999
_STAT = struct.Struct(">7I3Q3I")


class HostFiles:
    """The files that gdb has open."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def answer(self, request: bytes) -> bytes:
        """Return the answer to the rest of a ``vFile:`` packet; empty: unknown operation."""
        operation, _colon, rest = request.partition(b":")
        arguments = rest.split(b",")
        try:
            match operation, arguments:
                case b"setfs", [_pid]:
                    return b"F0"
                case b"open", [name, flags, _mode]:
                    return self._opened(_path(name), int(flags, 16))
                case b"pread", [descriptor, count, offset]:
                    return self._read(int(descriptor, 16), int(count, 16), int(offset, 16))
                case b"fstat", [descriptor]:
                    return _success(_stat_bytes(os.fstat(self._known(int(descriptor, 16)))))
                case b"close", [descriptor]:
                    number = self._known(int(descriptor, 16))
                    self._open.discard(number)
                    os.close(number)
                    return b"F0"
                case b"readlink", [name]:
                    return _success(os.fsencode(os.readlink(_path(name))))
                case _:
                    return b""
        except OSError as error:
            number = error.errno or EINVAL
            return b"F-1,%x" % (number if number in _KNOWN else _OTHER)
        except ValueError:
            return b"F-1,%x" % EINVAL

    def close(self) -> None:
        """Close the files that gdb has left open."""
        for descriptor in self._open:
            os.close(descriptor)
        self._open.clear()

    def _opened(self, path: bytes, flags: int) -> bytes:
        if flags & 0xFFF != _READ_ONLY:
            raise OSError(EACCES, "files can be read only")
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._open.add(descriptor)
        return b"F%x" % descriptor

    def _read(self, descriptor: int, count: int, offset: int) -> bytes:
        return _success(os.pread(self._known(descriptor), min(count, _MOST_BYTES), offset))

    def _known(self, descriptor: int) -> int:
        if descriptor not in self._open:
            raise OSError(EBADF, os.strerror(EBADF))
        return descriptor


def _path(name: bytes) -> bytes:
    path = bytes.fromhex(name.decode("ascii", errors="strict"))
    if not path or b"\0" in path:
        raise OSError(ENOENT, os.strerror(ENOENT))
    return path


def _success(data: bytes) -> bytes:
    return b"F%x;%b" % (len(data), escape(data))


def _stat_bytes(status: os.stat_result) -> bytes:
    """Return ``struct stat`` of the protocol: big-endian."""
    low = 0xFFFF_FFFF
    return _STAT.pack(
        *(status.st_dev & low, status.st_ino & low, status.st_mode, status.st_nlink & low),
        *(status.st_uid, status.st_gid, 0, status.st_size, status.st_blksize, status.st_blocks),
        *(int(status.st_atime) & low, int(status.st_mtime) & low, int(status.st_ctime) & low),
    )
