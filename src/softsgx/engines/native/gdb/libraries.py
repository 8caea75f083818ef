"""The list of loaded libraries, from which gdb finds symbols.

The dynamic linker's list has the program's own libraries.  An enclave is reported as one more
library, under the name of the file with its code.

Source:
    "Debugging with GDB", "Library List Format for SVR4 Targets"; System V ABI, "Dynamic Linking";
    ``struct r_debug`` and ``struct link_map``, link.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

__all__ = ["Library", "auxiliary_vector", "libraries_xml", "linked_libraries"]

_AT_PHDR, _AT_PHNUM = 3, 5
_PT_DYNAMIC, _PT_PHDR = 2, 6
_DT_NULL, _DT_DEBUG = 0, 21
_PHDR = struct.Struct("<IIQQQQQQ")
_PAIR, _LINK_MAP = struct.Struct("<QQ"), struct.Struct("<QQQQ")
_MAP_OFFSET = 8  # of r_map in struct r_debug
_LONGEST_NAME = 4096
_MOST = 4096

Read = Callable[[int, int], bytes]
"""(address, size) to at most ``size`` bytes of the program there; OSError: none are readable."""


@dataclass(frozen=True, slots=True)
class Library:
    """One library.

    Attributes:
        name: path of its file.
        link_map: address of its ``struct link_map``; for an enclave any unique address.
        load_bias: added to addresses of the file.
        dynamic: address of its dynamic section.
    """

    name: str
    link_map: int
    load_bias: int
    dynamic: int


def auxiliary_vector(data: bytes) -> dict[int, int]:
    """Return the entries of ``/proc/PID/auxv``."""
    return dict(_PAIR.iter_unpack(data[: len(data) // _PAIR.size * _PAIR.size]))


def linked_libraries(auxv: dict[int, int], read: Read) -> tuple[int, list[Library]]:
    """Return the address of the program's own link map, 0 for none yet, and its libraries.

    An unreadable entry ends the list: a program may have overwritten it.
    """
    try:
        head = _debug_address(auxv, read)
        at = int.from_bytes(read(head + _MAP_OFFSET, 8), "little") if head else 0
        main = at
        found: list[Library] = []
        while at and len(found) < _MOST:
            bias, name, dynamic, following = _LINK_MAP.unpack(read(at, _LINK_MAP.size))
            if at != main:
                found.append(Library(_string(name, read), at, bias, dynamic))
            at = following
    except (OSError, struct.error):
        return 0, []
    return main, [library for library in found if library.name]


def _debug_address(auxv: dict[int, int], read: Read) -> int:
    """Return the address of ``struct r_debug``, 0 while the dynamic linker has not set it."""
    start, count = auxv.get(_AT_PHDR, 0), auxv.get(_AT_PHNUM, 0)
    headers = list(_PHDR.iter_unpack(read(start, count * _PHDR.size)))
    bias = next((start - vaddr for kind, _f, _o, vaddr, *_ in headers if kind == _PT_PHDR), 0)
    for kind, _flags, _offset, vaddr, _paddr, _filesz, memsz, _align in headers:
        if kind == _PT_DYNAMIC:
            for tag, value in _PAIR.iter_unpack(read(bias + vaddr, memsz)):
                if tag == _DT_DEBUG:
                    return int(value)
                if tag == _DT_NULL:
                    break
    return 0


def _string(address: int, read: Read) -> str:
    found = b""
    while len(found) < _LONGEST_NAME:
        part = read(address + len(found), 256 - (address + len(found)) % 256)
        end = part.find(0)
        if end >= 0:
            return (found + part[:end]).decode(errors="surrogateescape")
        found += part
    return ""


def libraries_xml(main: int, libraries: Iterable[Library]) -> bytes:
    """Return the list in gdb's format."""
    lines = "".join(
        f"<library name={quoteattr(library.name)} lm={quoteattr(hex(library.link_map))} "
        f"l_addr={quoteattr(hex(library.load_bias))} l_ld={quoteattr(hex(library.dynamic))} "
        'lmid="0x0"/>'
        for library in libraries
    )
    head = f" main-lm={quoteattr(hex(main))}" if main else ""
    text = f'<library-list-svr4 version="1.0"{head}>{lines}</library-list-svr4>'
    return text.encode(errors="surrogateescape")
