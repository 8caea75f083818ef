"""Mappings of a process: one, or the whole of ``/proc/PID/maps``.

A process that has ended, or whose memory is already gone, is an ``OSError`` here: an empty list
would say that it lives and has nothing mapped.

Source:
    proc_pid_maps(5), with PROCMAP_QUERY; ``show_map_vma()``, fs/proc/task_mmu.c.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
from errno import ENAMETOOLONG, ENOTTY, ESRCH
from functools import cache
from typing import NamedTuple

from softsgx.engines.native import abi
from softsgx.errors import SoftSgxError

__all__ = ["Mapping", "file_code", "mapping_at", "mappings", "maps_lines", "parse_lines"]

#: struct procmap_query: size, flags, address asked for; start, end, PROCMAP_QUERY_VMA_* flags,
#: page size, offset, inode; device (major, minor), bytes of the name and of the build id; where
#: these are.
_QUERY = struct.Struct("<9Q4I2Q")
_ASKED, _ASKED_AT = struct.Struct("<2Q"), 8
_ANSWER, _ANSWER_AT = struct.Struct("<6Q3I"), 24
_QUERY_COMMAND = 0xC0686611
_QUERY_RIGHTS, _QUERY_SHARED = 7, 8  # the rights have the values of PROT_*
_QUERY_OR_NEXT, _QUERY_FILE = 0x10, 0x20
_NAME_BYTES = 4096
_CANNOT_ASK = (ENOTTY, ENAMETOOLONG)
_FIELDS = 5
_ENCODING = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
#: Rights, and whether a mapping is shared, by the four letters that say both.
_RIGHTS = {
    read + write + execute + kind: (
        (read == "r") * abi.PROT_READ
        | (write == "w") * abi.PROT_WRITE
        | (execute == "x") * abi.PROT_EXEC,
        kind == "s",
    )
    for read in "-r"
    for write in "-w"
    for execute in "-x"
    for kind in "ps"
}


class Mapping(NamedTuple):
    """One mapping.

    Attributes:
        start: first address.
        end: address behind the last.
        prot: PROT_* rights.
        shared: whether it is mapped with MAP_SHARED.
        offset: of ``start`` in its file, in bytes.
        device: number of the device that has its file, as ``os.stat`` returns it.
        inode: of its file; 0: it has none.
        path: of its file, with `` (deleted)`` behind it if it has been removed; or a name in
            brackets; or empty.
    """

    start: int
    end: int
    prot: int
    shared: bool
    offset: int
    device: int
    inode: int
    path: str


def mappings(pid: int) -> list[Mapping]:
    """Return the mappings of a process, in order of addresses.

    Args:
        pid: of the process, or of one of its threads.

    Raises:
        OSError: the process has ended, or may not be inspected.
        SoftSgxError: the kernel writes lines that proc_pid_maps(5) does not describe.
    """
    return parse_lines(maps_lines(pid))


def maps_lines(pid: int) -> list[str]:
    """Return the lines of ``/proc/PID/maps``, without their ends, as ``os.fsdecode`` does.

    Raises:
        OSError: as :func:`mappings`.
    """
    with open(f"/proc/{pid}/maps", "rb", buffering=0) as file:
        text = file.read()
    if not text:
        raise ProcessLookupError(ESRCH, f"process {pid} has no memory any more")
    # Only \n ends a line: paths may have every other character at which str.splitlines() cuts.
    return text[:-1].decode(*_ENCODING).split("\n")


def parse_lines(lines: list[str]) -> list[Mapping]:
    """Return the mappings that lines of ``/proc/PID/maps`` describe.

    Raises:
        SoftSgxError: one of them has another form.
    """
    found, line = [], ""
    # Each fork and exec comes here with many lines, so the loop calls little.
    device_of, new = {"00:00": 0}, tuple.__new__
    try:
        for line in lines:
            words = line.split(None, _FIELDS)
            place, letters, offset, device, inode, path = (
                words if len(words) > _FIELDS else (*words, "")
            )
            start, end = place.split("-")
            prot, shared = _RIGHTS[letters]
            number = device_of.get(device)
            if number is None:
                number = device_of[device] = _device(device)
            if "\\" in path:
                path = path.replace("\\012", "\n")  # the kernel's way to keep it in one line
            at = int(start, 16), int(end, 16), prot, shared, int(offset, 16)
            found.append(new(Mapping, (*at, number, int(inode), path)))
    except (ValueError, KeyError):
        message = (
            f"/proc/PID/maps: line {line!r} is not what proc_pid_maps(5) describes;"
            " report it with the version of this kernel"
        )
        raise SoftSgxError(message) from None
    return found


def _device(text: str) -> int:
    major, minor = text.split(":")
    return os.makedev(int(major, 16), int(minor, 16))


def mapping_at(pid: int, address: int) -> Mapping | None:
    """Return the mapping that holds an address, ``None`` if nothing is mapped there.

    Kernels before Linux 6.11 cannot be asked for one mapping; there it reads all of them.

    Raises:
        OSError: as :func:`mappings`.
        SoftSgxError: as :func:`mappings`.
    """
    maps = _open_maps(pid)
    try:
        return _query(maps, address)
    except OSError as error:
        if error.errno not in _CANNOT_ASK:
            raise
    finally:
        os.close(maps)
    return next((each for each in mappings(pid) if each.start <= address < each.end), None)


def file_code(pid: int) -> list[Mapping]:
    """Return the executable mappings of files, in order of addresses.

    Raises:
        OSError: as :func:`mappings`.
        SoftSgxError: as :func:`mappings`.
    """
    maps = _open_maps(pid)
    found, address = [], 0
    try:
        while each := _query(maps, address, _QUERY_OR_NEXT | _QUERY_FILE | abi.PROT_EXEC):
            address = each.end
            found.append(each)
    except OSError as error:
        if error.errno not in _CANNOT_ASK:
            raise
        found = [each for each in mappings(pid) if each.prot & abi.PROT_EXEC]
    finally:
        os.close(maps)
    return [each for each in found if each.path.startswith("/")]


def _open_maps(pid: int) -> int:
    return os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)


def _query(maps: int, address: int, which: int = 0) -> Mapping | None:
    """Ask for one mapping; ``OSError`` ENAMETOOLONG: its path is longer than paths may be.

    Args:
        maps: a descriptor of ``/proc/PID/maps``.
        address: an address in it.
        which: PROCMAP_QUERY_* flags of the mappings that are asked for.
    """
    request = bytearray(_request())
    _ASKED.pack_into(request, _ASKED_AT, which, address)
    try:
        fcntl.ioctl(maps, _QUERY_COMMAND, request)
    except FileNotFoundError:
        return None
    start, end, flags, _page, offset, inode, major, minor, name_bytes = _ANSWER.unpack_from(
        request, _ANSWER_AT
    )
    device = os.makedev(major, minor)
    path = os.fsdecode(_name().value) if name_bytes else ""
    rights, shared = flags & _QUERY_RIGHTS, bool(flags & _QUERY_SHARED)
    return Mapping(start, end, rights, shared, offset, device, inode, path)


@cache
def _name() -> ctypes.Array[ctypes.c_char]:
    """Return where the kernel stores the name of a mapping; only the tracer's thread asks."""
    return ctypes.create_string_buffer(_NAME_BYTES)


@cache
def _request() -> bytes:
    name = ctypes.addressof(_name())
    return _QUERY.pack(_QUERY.size, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, _NAME_BYTES, 0, name, 0)
