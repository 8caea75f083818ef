"""Answering CPUID of the dynamic loader without a stop.

Each dynamic program starts with some seventy CPUIDs, all in its loader, and each is a stop.  The
supervisor remembers which they are.  When execve has mapped the same code again, an instruction of
five bytes or more that leads to such a CPUID becomes a jump to a *stub* behind our vDSO.  The stub
has a copy of that instruction and of those between it and the CPUID, and then code that answers
(``vdso/cpuid_code.py``).  No other instruction of the loader is changed: code that jumps to one
between finds it, and then the CPUID itself, which stops as before.

Where no such instruction leads to a CPUID, the CPUID itself becomes a short jump to a no-operation
near it, of seven bytes or more.  That becomes a short jump over its own rest, where there is room
for the jump to the stub; so it still does nothing.  The stub has a CPUID of its own then.

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
from collections.abc import Callable, Container
from functools import cache
from typing import TYPE_CHECKING

from softsgx.engines.native import abi
from softsgx.engines.native.vdso.cpuid_code import (
    ANSWER_CODE,
    LABELS,
    SITE_AT,
    TABLE_AT,
    THEN_AT,
    answer_table,
)
from softsgx.engines.native.vdso.stubs import JUMP_BYTES, jump, merged
from softsgx.engines.native.x86.rewrite import CPUID, TRAP, in_step
from softsgx.ondemand import dataclass, pattern

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread
    from softsgx.engines.native.x86.cpuid import CpuidLeaf

__all__ = [
    "AREA_BYTES",
    "COPIED",
    "LOADER_BYTES",
    "CpuidAnswers",
    "CpuidStubs",
    "Window",
    "window_before",
]

AREA_BYTES = 8 << 12
"""Of an address space, for table and stubs."""
_STUB_BYTES = 128
_LONGEST = 24
_CONTEXT = 128
_MOST_WINDOWS = 64
_MOST_TRIES = 8
LOADER_BYTES = 1 << 20
"""The dynamic loader is smaller."""
_DISTANCE = struct.Struct("<i")
_LOW_32 = 0xFFFF_FFFF
#: Behind the code that answers.
_TRAP_AT = len(ANSWER_CODE)
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
#: No-operations of compilers: nop [rax] and nop [rax+rax], with a distance and with prefixes.
_NOP = pattern(rb"\x66{0,2}\x2e?\x0f\x1f(?:\x80\x00{4}|\x84\x00{5})", re.DOTALL)
_SHORT_JUMP, _SHORT_JUMP_BYTES, _REACH = 0xEB, 2, range(-128, 128)

COPIED = pattern(_BETWEEN, re.DOTALL)
"""Matches instructions that do the same elsewhere."""


@dataclass(frozen=True, slots=True)
class Window:
    """Code of the loader in front of a CPUID.

    Attributes:
        start: its distance from the start of the loader.
        code: its instructions, up to the CPUID.
        relative: bytes of its first instruction, where that ends with a distance; else 0.
        nop: the distance of a no-operation from the start of the loader, by which a jump leads to
            the stub; 0: the first instruction of ``code`` is the jump.
        nop_code: its bytes.
    """

    start: int
    code: bytes
    relative: int
    nop: int = 0
    nop_code: bytes = b""

    @property
    def site(self) -> int:
        """The distance of the CPUID from the start of the loader."""
        return self.start + len(self.code)

    @property
    def entry(self) -> int:
        """The distance of the jump to the stub from the start of the loader."""
        return self.nop + _SHORT_JUMP_BYTES if self.nop else self.start

    def is_in(self, code: bytes, low: int, trap: bytes = CPUID) -> bool:
        """Return whether the code of a loader from ``low`` on has what this was made from.

        ``trap`` is what it has in place of CPUID.
        """
        start, nop = self.start - low, self.nop - low
        there = self.code + trap
        if code[start : start + len(there)] != there:
            return False
        return not self.nop or code[nop : nop + len(self.nop_code)] == self.nop_code


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


def nop_near(code: bytes, at: int, taken: Container[int] = ()) -> tuple[int, bytes] | None:
    """Return a no-operation that a short jump at ``at`` in ``code`` reaches, and its bytes.

    Args:
        code: the code around a CPUID.
        at: where the CPUID is.
        taken: distances from it of no-operations that have jumps already.
    """
    found = [
        (match.start(), match[0])
        for match in _NOP.finditer(code)
        if match.start() - at in _REACH and match.start() - at not in taken
    ]
    for start, nop in sorted(found, key=lambda each: abs(each[0] - at)):
        if in_step(code, start):
            return start, nop
    return None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What is stored in an address space.

    Attributes:
        windows: what each stub stands for.
        stubs: the table and the stubs.
        changes: (distance from the start of the loader, bytes) of what changes there.
        entries: distance of a jump, and that of its CPUID, where there is no copy of the jump.
        traps: distances of the stubs' own CPUIDs.
    """

    windows: tuple[Window, ...]
    stubs: bytes
    changes: tuple[tuple[int, bytes], ...]
    entries: dict[int, int]
    traps: frozenset[int]


class CpuidAnswers:
    """What CPUID gives a program, with or without a stop.

    Args:
        cpuid: what CPUID (leaf, sub-leaf) gives.
        jumping: whether jumps may be stored in the loader.
        faulting: whether CPUID faults; otherwise other code takes its place.
    """

    def __init__(
        self,
        cpuid: Callable[[int, int], CpuidLeaf],
        *,
        jumping: bool,
        faulting: bool = True,
    ) -> None:
        self._cpuid, self._jumping = cpuid, jumping
        self._trap = CPUID if faulting else TRAP
        # Code around each CPUID that has stopped, by its place in its loader; None: looked at.
        self._seen: dict[tuple[int, bytes], bytes | None] = {}
        self._unseen: list[tuple[int, bytes]] = []  # that were not looked at yet
        self._tries: dict[int, tuple[int, int]] = {}  # in how many address spaces each has stopped
        self._windows: list[Window] = []
        self._range = (1 << 64, 0)  # of the code of all windows
        self._table = b""
        self._last: tuple[tuple[int, int, bytes], _Prepared] | None = None

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
        last, tries = self._tries.get(offset, (-1, 0))
        if last != image.index:
            tries += 1
            self._tries[offset] = image.index, tries
        if tries > _MOST_TRIES:
            return
        stubs = image.cpuid_stubs
        again = stubs is not None and stubs.has(offset)  # it was not reached by its stub
        code = image.read(site - _CONTEXT, 2 * _CONTEXT)
        # The bytes of CPUID may have been replaced, too.
        code = code[:_CONTEXT] + CPUID + code[_CONTEXT + len(CPUID) :]
        if len(code) == 2 * _CONTEXT:
            before = b"" if again else code[_CONTEXT - _LONGEST : _CONTEXT]
            key = offset, before
            if key not in self._seen:
                self._seen[key] = code
                self._unseen.append(key)

    def _look(self) -> None:
        """Look at the code that was seen: a run of one program has no use for that."""
        unseen, self._unseen = self._unseen, []
        for offset, before in unseen:
            code, self._seen[offset, before] = self._seen[offset, before], None
            assert code is not None, "it is looked at once"
            found = window_before(code, _CONTEXT) if before else None
            if found is not None:
                moved, relative = found
                self._add(Window(offset - len(moved), moved, relative))
                continue
            taken = {window.nop - offset for window in self._windows if window.nop}
            near = nop_near(code, _CONTEXT, taken)
            if near is not None:
                start, nop = near
                self._add(Window(offset, b"", 0, offset + start - _CONTEXT, nop))

    def _add(self, window: Window) -> None:
        self._windows.append(window)
        low, high = self._range
        self._range = min(low, window.start - _CONTEXT), max(high, window.site + _CONTEXT)

    def loaded(self, image: ProcessImage) -> None:
        """A program was loaded, and has executed nothing: answer what is known of its loader."""
        base, area = image.loader, image.vdso_base + image.vdso.answers
        self._look()
        if not (base and self._windows) or abs(area - base) >> 30:
            return
        low, high = self._range
        code = image.read(base + low, high - low)
        # Most programs have the same loader, at the same distance from the vDSO.
        key = len(self._windows), area - base, code
        if self._last is None or self._last[0] != key:
            self._last = key, self._prepare(area - base, low, code)
        found = self._last[1]
        if not found.windows:
            return
        os.pwrite(image.memory_fd, found.stubs, area)
        for place, changed in found.changes:
            os.pwrite(image.memory_fd, changed, base + place)
        stubs = self._stubs(area, base, found.windows, found.entries)
        if self._trap != CPUID:
            image.cpuid_sites.add(base, found.traps)
        image.cpuid_stubs = stubs

    def _stubs(
        self,
        area: int,
        base: int,
        windows: tuple[Window, ...],
        entries: dict[int, int] | None = None,
    ) -> CpuidStubs:
        table_bytes = len(self._table)
        return CpuidStubs(self, area, table_bytes, base, windows, trap=self._trap, entries=entries)

    def _prepare(self, area: int, low: int, code: bytes) -> _Prepared:
        """Prepare what is stored, for a loader at address 0 with ``code`` from ``low`` on."""
        if not self._table:
            self._table = answer_table(self._cpuid)
            self._table += bytes(-len(self._table) % _STUB_BYTES)
        most = (AREA_BYTES - len(self._table)) // _STUB_BYTES
        windows = tuple(
            [each for each in self._windows if each.is_in(code, low, self._trap)][:most]
        )
        stubs = self._stubs(area, 0, windows)
        changes = merged(sorted(stubs.jumps()), code, low)
        stored = self._table + stubs.code()
        traps = frozenset(stubs.traps())
        return _Prepared(windows, stored, tuple(changes), _entries(windows), traps)


def _entries(windows: tuple[Window, ...]) -> dict[int, int]:
    """Return the distance of the jump, and of the CPUID, where a CPUID is such a jump itself."""
    return {each.entry: each.site for each in windows if each.nop}


class CpuidStubs:
    """The stubs of one address space, and of those that fork has copied.

    Args:
        answers: what CPUID gives.
        area: where the table is; the stubs are behind it.
        table_bytes: size of the table.
        base: where the loader is.
        windows: what each stub stands for.
        trap: what stops in place of a CPUID.
        entries: distances of jumps and their CPUIDs, if they are known already.
    """

    def __init__(
        self,
        answers: CpuidAnswers,
        area: int,
        table_bytes: int,
        base: int,
        windows: tuple[Window, ...],
        *,
        trap: bytes = CPUID,
        entries: dict[int, int] | None = None,
    ) -> None:
        self._answers, self._area, self._base, self._windows = answers, area, base, windows
        self._trap = trap
        # Distances in the loader from which a jump leads to a stub, other than instructions that it
        # has a copy of, and the CPUID each stands for.
        self._entries = _entries(windows) if entries is None else entries
        self._start = area + table_bytes
        self._end = self._start + _STUB_BYTES * len(windows)

    def has(self, site: int) -> bool:
        """Return whether there is a stub for the CPUID at a distance from the loader's start."""
        return any(window.site == site for window in self._windows)

    def code(self) -> bytes:
        """Return the code of all stubs."""
        return b"".join(
            self._stub(window, self._start + _STUB_BYTES * number)
            for number, window in enumerate(self._windows)
        )

    def jumps(self) -> list[tuple[int, bytes]]:
        """Return (address, bytes) of each jump that leads to a stub, or to such a jump."""
        found = []
        for number, window in enumerate(self._windows):
            entry = self._base + window.entry
            to_stub = jump(entry, self._start + _STUB_BYTES * number)
            if window.nop:
                over = len(window.nop_code) - _SHORT_JUMP_BYTES
                found.append((self._base + window.nop, bytes((_SHORT_JUMP, over)) + to_stub))
                distance = window.nop - window.site
                found.append((self._base + window.site, bytes((_SHORT_JUMP, distance & 0xFF))))
            else:
                found.append((entry, to_stub))
        return found

    def traps(self) -> set[int]:
        """Return the addresses of the stubs' own CPUIDs."""
        return {
            self._start + _STUB_BYTES * number + len(window.code) + _TRAP_AT
            for number, window in enumerate(self._windows)
            if window.nop
        }

    def _stub(self, window: Window, start: int) -> bytes:
        moved, site = bytearray(window.code), self._base + window.site
        if window.relative:
            at = window.relative - _DISTANCE.size
            (distance,) = _DISTANCE.unpack_from(moved, at)
            _DISTANCE.pack_into(moved, at, distance + self._base + window.start - start)
        code = bytearray(ANSWER_CODE)
        begin, then = start + len(moved), site + len(CPUID)
        if window.nop:
            site = begin + _TRAP_AT
            code += self._trap
            code += jump(begin + len(code), then)
        for at, target in (
            (TABLE_AT, self._area),
            (SITE_AT, site),
            (THEN_AT, then),
        ):
            _DISTANCE.pack_into(code, at, target - (begin + at + _DISTANCE.size))
        return bytes(moved + code).ljust(_STUB_BYTES, b"\xcc")

    def has_entry(self, place: int) -> bool:
        """Return whether a jump at an address leads to a stub that has no copy of it."""
        return place - self._base in self._entries

    def straighten(self, thread: ProgramThread) -> None:
        """Move a stopped thread out of a stub, if it is in one.

        Raises:
            Gone: it has died meanwhile.
        """
        regs = thread.load()
        if not self._start <= regs.rip < self._end:
            site = self._entries.get(regs.rip - self._base)
            if site is not None:
                regs.rip = self._base + site
                thread.store()
            return
        number, at = divmod(regs.rip - self._start, _STUB_BYTES)
        window = self._windows[number]
        at -= len(window.code)
        if at <= 0:
            regs.rip = self._base + window.site + at
            thread.store()
            return
        if at in (_TRAP_AT, _TRAP_AT + 1) and _has_trapped(thread):
            return  # its CPUID is the stop that is handled next
        if at < LABELS["found"] or at == _TRAP_AT:
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


def _has_trapped(thread: ProgramThread) -> bool:
    if not thread.at_signal:
        return False
    info = thread.siginfo()
    return info.signo in (abi.SIGSEGV, abi.SIGTRAP) and info.code == abi.SI_KERNEL
