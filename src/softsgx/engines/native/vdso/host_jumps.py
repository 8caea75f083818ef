"""EENTER by the host's own ENCLU, without a stop.

In code of a file that the program cannot write, a load of EAX in front of an ENCLU that has
executed EENTER becomes a jump to a stub (``vdso/entry_code.py``).  No other instruction is changed:
code that jumps to one between the load and the ENCLU executes it, and the ENCLU stops as before.
Other threads are stopped while code is replaced.

Before the program gets the right to write such code, or moves it, the load is put back.

Deviation: code that reads the code finds the jump.

Source:
    mprotect(2), mremap(2); ``vdso/permits.py`` for the permits.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import mapping_at
from softsgx.engines.native.vdso.entry_code import entry_stub
from softsgx.engines.native.vdso.stubs import JUMP_BYTES, Stub
from softsgx.engines.native.x86.rewrite import in_step
from softsgx.ondemand import dataclass, pattern

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["EntrySite", "find_entry", "put_back", "replace_in_host"]

_ENCLU = b"\x0f\x01\xd7"
_BACK, _LONGEST = 192, 64
_TOO_NEAR = 16  # to the start of the code: the start of instructions is not known there
_REACH = 1 << 30
_DISTANCE = struct.Struct("<i")
_LEA = pattern(rb"[\x48\x4c]\x8d[\x05\x0d\x15\x1d\x25\x2d\x35\x3d]")
_REX_W, _REX_R, _REX_X, _REX_B = 8, 4, 2, 1


@cache
def _movable() -> re.Pattern[bytes]:
    """Return what matches instructions that do the same elsewhere, and do not use RAX.

    These are MOV and XOR of registers; MOV of a word at RSP or RBP; MOV of a constant; and LEA of
    an address near RIP, whose distance is adapted.
    """
    ways = [rb"[\x48\x4c]\x8d" + _one_of(8 * reg + 5 for reg in range(8)) + rb".{4}"]
    for rex in (0, *(rex for rex in range(0x40, 0x50) if not rex & _REX_X)):
        prefix = re.escape(bytes((rex,))) if rex else b""
        regs = range(0 if rex & _REX_R else 1, 8)
        others = range(0 if rex & _REX_B else 1, 8)
        both = _one_of(0xC0 | 8 * reg | other for reg in regs for other in others)
        ways.append(prefix + rb"[\x89\x8b\x31]" + both)
        if rex & _REX_W:
            ways.append(prefix + rb"\xc7" + _one_of(0xC0 | reg for reg in others) + rb".{4}")
        else:
            ways.append(prefix + _one_of(0xB8 | reg for reg in others) + rb".{4}")
        if not rex & _REX_B:
            for mod_and_rm, rest in ((0x04, rb"\x24"), (0x44, rb"\x24."), (0x45, rb".")):
                ways.append(
                    prefix + rb"\x8b" + _one_of(mod_and_rm | 8 * reg for reg in regs) + rest
                )
    return re.compile(b"(?!\x48\x8d\x05)(?:" + b"|".join(ways) + b")", re.DOTALL)


def _one_of(values: Iterable[int]) -> bytes:
    return b"[" + b"".join(re.escape(bytes((value,))) for value in values) + b"]"


#: mov eax, 2 or mov rax, 2.
_LOAD = pattern(rb"\xb8\x02\0\0\0|\x48\xc7\xc0\x02\0\0\0")


@dataclass(slots=True, frozen=True)
class EntrySite:
    """``mov eax, 2 … enclu`` of a host.

    Attributes:
        start: address of the load of EAX.
        load: the load.
        between: the instructions between it and ENCLU.
        table: address of the table of permits.
    """

    start: int
    load: bytes
    between: bytes
    table: int

    @property
    def at(self) -> int:
        """As :attr:`Site.at`."""
        return self.start + len(self.load) + len(self.between)

    @property
    def behind(self) -> int:
        """The address of the next instruction."""
        return self.at + len(_ENCLU)

    def stub(self, place: int) -> tuple[bytes, dict[str, int]]:
        """As :meth:`Site.stub`."""
        distance = self.start + len(self.load) - place
        between, at = bytearray(self.between), 0
        for insn in _movable().findall(self.between):
            at += len(insn)
            if _LEA.match(insn):
                (where,) = _DISTANCE.unpack_from(between, at - _DISTANCE.size)
                _DISTANCE.pack_into(between, at - _DISTANCE.size, where + distance)
        return entry_stub(place, self.at, self.table, bytes(between))


def find_entry(code: bytes, address: int, table: int) -> EntrySite | None:
    """Return the site of the ENCLU at the end of ``code``.

    Args:
        code: the code up to the ENCLU and with it.
        address: where it begins.
        table: see :class:`EntrySite`.

    Returns:
        ``None``: no stub can stand for it.
    """
    end = len(code) - len(_ENCLU)
    if code[end:] != _ENCLU:
        return None
    for load in _LOAD.finditer(code, max(_TOO_NEAR, end - _LONGEST), end):
        between = code[load.end() : end]
        if _all_move(between) and in_step(code, load.start()):
            return EntrySite(address + load.start(), load[0], between, table)
    return None


def _all_move(code: bytes) -> bool:
    """Return whether all instructions do the same elsewhere."""
    at = 0
    while at < len(code):
        insn = _movable().match(code, at)
        if insn is None:
            return False
        if _LEA.match(insn[0]) and abs(_DISTANCE.unpack(insn[0][-4:])[0]) >= _REACH:
            return False
        at = insn.end()
    return True


def replace_in_host(thread: ProgramThread, enclu: int) -> None:
    """Spare the next thread the stop at an ENCLU of the host, if that is possible.

    Args:
        thread: it has executed EENTER there.
        enclu: address of the ENCLU.
    """
    image, stubs = thread.image, thread.image.entry_stubs
    if enclu in stubs.plain or any(
        stub.site.at == enclu and _is_there(image, stub) for stub in stubs
    ):
        return
    code, first = _code_before(thread, enclu)
    if not code:
        return
    site = find_entry(code, first, image.permits_at)
    if site is None or not stubs.can_have(site, thread):
        stubs.plain.add(enclu)
        return
    _stop_others(thread)
    os.pwrite(image.memory_fd, stubs.jump_from(site, image.memory_fd), site.start)


def _is_there(image: ProcessImage, stub: Stub[EntrySite]) -> bool:
    """Return whether the jump to a stub is in the code of the program."""
    jump = image.entry_stubs.jump_of(stub.site)
    return image.read(stub.site.start, JUMP_BYTES) == jump


def _code_before(thread: ProgramThread, enclu: int) -> tuple[bytes, int]:
    """Return code of a file up to an ENCLU, and its address; no code if it can be written."""
    found, end = mapping_at(thread.tid, enclu), enclu + len(_ENCLU)
    if (
        found is None
        or found.shared
        or found.prot & (abi.PROT_WRITE | abi.PROT_EXEC) != abi.PROT_EXEC
        or not found.path.startswith("/")
        or found.end < end
    ):
        return b"", enclu
    first = max(found.start, enclu - _BACK)
    return thread.image.read(first, end - first), first


def put_back(thread: ProgramThread, start: int, end: int) -> None:
    """Put the loads back that are jumps in a range, which is about to be writable or to move."""
    image = thread.image
    for stub in image.entry_stubs:
        site = stub.site
        overlaps = site.start < end and start < site.start + JUMP_BYTES
        if overlaps and _is_there(image, stub):
            _stop_others(thread)
            os.pwrite(image.memory_fd, site.load[:JUMP_BYTES], site.start)


def _stop_others(thread: ProgramThread) -> None:
    """Stop all other threads of an address space that may execute its code."""
    for other in list(thread.image.threads.values()):
        if other is not thread and not (other.in_call or other.unstoppable):
            thread.image.hold(other)
