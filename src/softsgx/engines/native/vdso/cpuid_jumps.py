"""Answering CPUID of the dynamic loader without a stop.

Each dynamic program starts with some seventy CPUIDs, all in its loader, and each is a stop.  The
supervisor remembers which they are.  When execve has mapped the same code again, an instruction of
five bytes or more that leads to such a CPUID becomes a jump to a *stub* behind our vDSO.  The stub
has a copy of that instruction and of those between it and the CPUID, and then code that answers
(``vdso/cpuid_code.py``).  No other instruction of the loader is changed: code that jumps to one
between finds it, and then the CPUID itself, which stops as before.

A thread that is stopped in a stub is moved to where it would be in the loader: at the instruction
of which the stub has a copy, or behind the CPUID, with its answer.

Deviation: code that reads the loader's code finds the jumps.

Deviation: at a CPUID of a leaf without a place in the table, RBX and RDX of a thread that comes
from a stub are already lost.

Source:
    execve(2), getauxval(3), AT_BASE; SDM vol. 2, CPUID.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from softsgx.engines.native.vdso.cpuid_code import (
    ANSWER_CODE,
    LABELS,
    SITE_AT,
    TABLE_AT,
    THEN_AT,
    answer_table,
)
from softsgx.engines.native.x86.rewrite import CPUID, in_step
from softsgx.ondemand import dataclass

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.x86.cpuid import CpuidLeaf

__all__ = [
    "AREA_BYTES",
    "COPIED",
    "JUMP_BYTES",
    "LOADER_BYTES",
    "CpuidAnswers",
    "CpuidStubs",
    "Window",
    "jump",
    "window_before",
]

AREA_BYTES = 8 << 12
"""Of an address space, for table and stubs."""
JUMP_BYTES = 5
"""Of the jump that replaces an instruction."""
_STUB_BYTES = 128
_LONGEST = 24
_CONTEXT = 128
_MOST_WINDOWS = 64
LOADER_BYTES = 1 << 20
"""The dynamic loader is smaller."""
_DISTANCE = struct.Struct("<i")
_LOW_32 = 0xFFFF_FFFF
#: An instruction that a jump may replace: mov r32, imm32; mov byte or dword [rsp+disp8], imm; and,
#: with a distance from its end, jcc, or mov [rip+disp32], reg.
_REPLACED = (
    rb"(?:(?P<fixed>\x41?[\xb8-\xbf].{4}|\xc6\x44\x24..|\xc7\x44\x24.{5})"
    rb"|(?P<relative>\x0f[\x80-\x8f].{4}|[\x44\x48\x4c]?\x89[\x05\x0d\x15\x1d\x25\x2d\x35\x3d].{4}))"
)
#: What may come between that and CPUID: mov and xor of registers, op reg, imm8, mov r32, imm32.
_BETWEEN = (
    rb"(?:[\x40-\x4f]?[\x31\x89][\xc0-\xff]|[\x40-\x4f]?\x83[\xc0-\xff].|\x41?[\xb8-\xbf].{4})*"
)
COPIED = re.compile(_BETWEEN, re.DOTALL)
"""Matches instructions that do the same elsewhere."""


def jump(start: int, target: int) -> bytes:
    """Return a jump from one address to another."""
    return b"\xe9" + _DISTANCE.pack(target - start - JUMP_BYTES)


@dataclass(frozen=True, slots=True)
class Window:
    """Code of the loader in front of a CPUID.

    Attributes:
        start: its distance from the start of the loader.
        code: its instructions, up to the CPUID.
        relative: bytes of its first instruction, where that ends with a distance; else 0.
    """

    start: int
    code: bytes
    relative: int

    @property
    def site(self) -> int:
        """The distance of the CPUID from the start of the loader."""
        return self.start + len(self.code)


@cache
def _window() -> re.Pattern[bytes]:
    return re.compile(_REPLACED + _BETWEEN, re.DOTALL)


def window_before(code: bytes, at: int) -> tuple[bytes, int] | None:
    """Return what may be executed elsewhere in front of the CPUID at ``at`` in ``code``.

    Returns:
        The bytes up to the CPUID, and :attr:`Window.relative`; ``None``: nothing may.
    """
    for start in range(at - JUMP_BYTES, max(at - _LONGEST, _CONTEXT // 2) - 1, -1):
        found = _window().fullmatch(code, start, at)
        if found is not None and in_step(code, start):
            relative = found["relative"]
            return code[start:at], 0 if relative is None else len(relative)
    return None


class CpuidAnswers:
    """What CPUID gives a program, with or without a stop.

    Args:
        cpuid: what CPUID (leaf, sub-leaf) gives.
        jumping: whether jumps may be stored in the loader.
    """

    def __init__(self, cpuid: Callable[[int, int], CpuidLeaf], *, jumping: bool) -> None:
        self._cpuid, self._jumping = cpuid, jumping
        # Code around each CPUID that has stopped, by its place in its loader; None: looked at.
        self._seen: dict[tuple[int, bytes], bytes | None] = {}
        self._windows: list[Window] = []
        self._table = b""

    def __call__(self, leaf: int, sub: int) -> CpuidLeaf:
        """Return EAX, EBX, ECX and EDX."""
        return self._cpuid(leaf, sub)

    def executed(self, image: ProcessImage, site: int) -> None:
        """A thread has executed the CPUID at ``site`` with a stop: spare later programs that."""
        offset = site - image.loader
        if not (self._jumping and image.loader and 0 <= offset < LOADER_BYTES):
            return
        if len(self._windows) >= _MOST_WINDOWS or len(self._seen) >= 8 * _MOST_WINDOWS:
            return
        code = image.read(site - _CONTEXT, 2 * _CONTEXT)
        # The bytes of CPUID may have been replaced, too.
        code = code[:_CONTEXT] + CPUID + code[_CONTEXT + len(CPUID) :]
        if len(code) == 2 * _CONTEXT:
            self._seen.setdefault((offset, code[_CONTEXT - _LONGEST : _CONTEXT]), code)

    def _look(self) -> None:
        """Look at the code that was seen: a run of one program has no use for that."""
        for (offset, before), code in self._seen.items():
            if code is None:
                continue
            self._seen[offset, before] = None
            found = window_before(code, _CONTEXT)
            if found is not None:
                moved, relative = found
                self._windows.append(Window(offset - len(moved), moved, relative))

    def loaded(self, image: ProcessImage) -> None:
        """A program was loaded, and has executed nothing: answer what is known of its loader."""
        base, area = image.loader, image.vdso_base + image.vdso.answers
        self._look()
        if not (base and self._windows) or abs(area - base) >> 30:
            return
        low = min(window.start for window in self._windows)
        high = max(window.site for window in self._windows)
        code = image.read(base + low, high - low)
        there = [
            window
            for window in self._windows
            if code[window.start - low : window.site - low] == window.code
        ]
        if not there:
            return
        if not self._table:
            self._table = answer_table(self._cpuid)
            self._table += bytes(-len(self._table) % _STUB_BYTES)
        most = (AREA_BYTES - len(self._table)) // _STUB_BYTES
        stubs = CpuidStubs(self, area, len(self._table), base, tuple(there[:most]))
        os.pwrite(image.memory_fd, self._table + stubs.code(), area)
        for place, jump in stubs.jumps():
            os.pwrite(image.memory_fd, jump, place)
        image.cpuid_stubs = stubs


class CpuidStubs:
    """The stubs of one address space, and of those that fork has copied.

    Args:
        answers: what CPUID gives.
        area: where the table is; the stubs are behind it.
        table_bytes: size of the table.
        base: where the loader is.
        windows: what each stub stands for.
    """

    def __init__(
        self,
        answers: CpuidAnswers,
        area: int,
        table_bytes: int,
        base: int,
        windows: tuple[Window, ...],
    ) -> None:
        self._answers, self._area, self._base, self._windows = answers, area, base, windows
        self._start = area + table_bytes
        self._end = self._start + _STUB_BYTES * len(windows)

    def code(self) -> bytes:
        """Return the code of all stubs."""
        return b"".join(
            self._stub(window, self._start + _STUB_BYTES * number)
            for number, window in enumerate(self._windows)
        )

    def jumps(self) -> list[tuple[int, bytes]]:
        """Return (address, bytes) of each jump that leads to a stub."""
        return [
            (at, jump(at, self._start + _STUB_BYTES * number))
            for number, window in enumerate(self._windows)
            for at in (self._base + window.start,)
        ]

    def _stub(self, window: Window, start: int) -> bytes:
        moved, site = bytearray(window.code), self._base + window.site
        if window.relative:
            at = window.relative - _DISTANCE.size
            (distance,) = _DISTANCE.unpack_from(moved, at)
            _DISTANCE.pack_into(moved, at, distance + self._base + window.start - start)
        code = bytearray(ANSWER_CODE)
        begin = start + len(moved)
        for at, target in (
            (TABLE_AT, self._area),
            (SITE_AT, site),
            (THEN_AT, site + len(CPUID)),
        ):
            _DISTANCE.pack_into(code, at, target - (begin + at + _DISTANCE.size))
        return bytes(moved + code).ljust(_STUB_BYTES, b"\xcc")

    def straighten(self, thread: ProgramThread) -> None:
        """Move a stopped thread out of a stub, if it is in one.

        Raises:
            Gone: it has died meanwhile.
        """
        regs = thread.load()
        if not self._start <= regs.rip < self._end:
            return
        number, at = divmod(regs.rip - self._start, _STUB_BYTES)
        window = self._windows[number]
        at -= len(window.code)
        if at <= 0:
            regs.rip = self._base + window.site + at
            thread.store()
            return
        if at < LABELS["found"]:
            answer = self._answers(regs.rax & _LOW_32, regs.rbx & _LOW_32)
            regs.rax, regs.rbx, regs.rcx, regs.rdx = answer
        elif at < LABELS["loaded"]:
            place = regs.rdx
            if at < LABELS["pointed"]:
                place += regs.rcx * (8 if at >= LABELS["doubled"] else 16)
                place += regs.rbx if at < LABELS["based"] else 0
            answer_words = struct.unpack("<4I", thread.image.read(place, 16))
            regs.rax, regs.rbx, regs.rcx, regs.rdx = answer_words
        regs.rip = self._base + window.site + len(CPUID)
        thread.store()
