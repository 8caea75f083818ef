"""System calls with paths that do not stop: in C libraries, after the same call has stopped.

Such calls are most of the stops of ordinary programs, and few of their paths concern SGX.  A C
library makes them by ``mov eax, number; syscall``.  That ``mov`` becomes a jump to a *stub* behind
our vDSO, which has a copy of it and then ``vdso/path_code.py``.  Nothing else is changed: code that
jumps to the ``syscall`` finds it, and it stops as before.

A library gets its stubs when a call has stopped twice.  Later programs get those of their dynamic
loader at execve, and those of another library when it makes its first such call.  Code is replaced
only while its address space has one thread, which is stopped.

A thread that is stopped in a stub is moved to where it would be in the library: at an instruction
of which the stub has a copy, at the ``syscall``, or behind it.  If its call has ended with ENOENT,
it makes the call once more, with a stop.

Deviation: code that reads the library's code finds the jumps.

Deviation: RCX and R11 of a thread that is stopped in front of such a call may have other values;
the call would change them.

Deviation: if the path cannot be read, or the stack has no room, while the program blocks or ignores
SIGSEGV, the kernel unblocks the signal and resets its handler, although the program receives none.

Source:
    syscall(2); proc(5): ``/proc/PID/maps``; ``force_sig_info_to_task()``, kernel/signal.c.
"""

from __future__ import annotations

import os
import struct
from errno import ENOENT
from functools import lru_cache
from typing import TYPE_CHECKING

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import Mapping, mapping_at
from softsgx.engines.native.vdso.cpuid_jumps import COPIED, LOADER_BYTES
from softsgx.engines.native.vdso.path_code import KEPT_BYTES, NUMBERS, PathCode, path_code
from softsgx.engines.native.vdso.stubs import JUMP_BYTES, jump, merged
from softsgx.engines.native.x86.rewrite import in_step
from softsgx.ondemand import dataclass, pattern

if TYPE_CHECKING:
    from softsgx.engines.native.abi import UserRegs
    from softsgx.engines.native.tracing.loop import Handler
    from softsgx.engines.native.tracing.process_image import ProcessImage
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["PATH_BYTES", "PathCalls", "PathStubs", "PathWindow", "window_of_call"]

PATH_BYTES = 3 << 12
"""Of an address space, for stubs."""
_STUB_BYTES = 336
_MOST_STUBS = PATH_BYTES // _STUB_BYTES
_MOST_LIBRARIES = 16
_MOST_PREPARED = 32
_LONGEST = 24
_BEFORE, _AFTER = 128, 64
_SYSCALL = b"\x0f\x05"
_MOV_EAX = 0xB8
_DISTANCE = struct.Struct("<i")
#: What the code of a call keeps on the stack: R9, and registers of flags and buffer.
_KEPT = struct.Struct("<3Q")
_MISSING = (1 << 64) - ENOENT
#: The loader and the C library, in one file or in several.
_LIBRARY = pattern(r".*/(?:ld|libc|libpthread)[-.][^/]*so[^/]*")
_LOADER = ""


@dataclass(frozen=True, slots=True)
class PathWindow:
    """Code of a library in front of a system call.

    Attributes:
        start: its distance from the start of the mapping; for the dynamic loader, from its base.
        code: its instructions, up to the ``syscall``; the first is ``mov eax, number``.
    """

    start: int
    code: bytes

    @property
    def site(self) -> int:
        """The distance of the ``syscall``."""
        return self.start + len(self.code)

    @property
    def number(self) -> int:
        """The number of the call."""
        return int.from_bytes(self.code[1:JUMP_BYTES], "little")

    @property
    def path_code(self) -> PathCode:
        """The code that makes the call."""
        return path_code(self.number)

    def is_in(self, code: bytes, low: int) -> bool:
        """Return whether the code of a library from ``low`` on has what this was made from."""
        there = self.code + _SYSCALL
        return code[self.start - low : self.start - low + len(there)] == there


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a library gets.

    Attributes:
        windows: what each stub stands for.
        stubs: their code.
        changes: (distance from the start of the mapping, bytes) of what changes there.
        sites: distances of the calls.
    """

    windows: tuple[PathWindow, ...]
    stubs: bytes
    changes: tuple[tuple[int, bytes], ...]
    sites: tuple[int, ...]


def window_of_call(code: bytes, at: int, number: int) -> bytes | None:
    """Return the code in front of the ``syscall`` at ``at`` that sets its number, up to there.

    Returns:
        ``None``: some of that cannot be executed elsewhere, or it is not known to be instructions.
    """
    if number not in NUMBERS or code[at : at + len(_SYSCALL)] != _SYSCALL:
        return None
    load = bytes((_MOV_EAX,)) + number.to_bytes(4, "little")
    start = code.rfind(load, max(at - _LONGEST, 0), at)
    if start < 0 or not COPIED.fullmatch(code, start + JUMP_BYTES, at) or not in_step(code, start):
        return None
    return code[start:at]


class PathCalls:
    """What is known of calls with paths in C libraries.

    Args:
        jumping: whether jumps may be stored there.
    """

    def __init__(self, *, jumping: bool) -> None:
        self._jumping = jumping
        # By the path of a library's file, and by the place of the syscall.
        self._windows: dict[str, dict[int, PathWindow]] = {}
        self._places: set[int] = set()  # of all of them, in their pages
        # What libraries have got, by name and distances, and the code that it was made for: a
        # program has them at the same distances each time.
        self._prepared: dict[tuple[object, ...], tuple[bytes, _Prepared]] = {}

    def watching(self, handlers: dict[int, Handler]) -> dict[int, Handler]:
        """Return the table of handlers; those of calls with paths learn from what they let run."""
        if not self._jumping:
            return handlers
        return handlers | {number: self._watched(handlers[number]) for number in NUMBERS}

    def _watched(self, handler: Handler) -> Handler:
        def watched(thread: ProgramThread) -> int | None:
            result = handler(thread)
            if result is None and thread.image.members == 1:
                self._stopped(thread)
            return result

        return watched

    def loaded(self, image: ProcessImage) -> None:
        """A program was loaded, and has executed nothing: store the jumps of its loader."""
        if image.loader and _LOADER in self._windows:
            self._store(image, image.loader, _LOADER)

    def _stopped(self, thread: ProgramThread) -> None:
        """A call that is the kernel's has stopped the only thread of its address space."""
        image, regs = thread.image, thread.regs
        if image.path_stubs is None:
            image.path_stubs = PathStubs(image.vdso_base + image.vdso.paths)
        stubs, site = image.path_stubs, regs.rip - len(_SYSCALL)
        if site in stubs.sites:
            return  # its stub let it stop
        stops = stubs.stops.get(site, 0) + 1
        stubs.stops[site] = stops
        repeated = stops == 2 or (stops == 1 and _in_loader(image, site))
        if not repeated and (stops > 2 or site % abi.PAGE not in self._places):
            return
        found = _library(thread.tid, site)
        if found is None:
            return
        base, name = found.start, found.path
        if _in_loader(image, site):
            base, name = image.loader, _LOADER
        if repeated and len(self._windows) < _MOST_LIBRARIES:
            self._learn(image, base, name, site, regs.orig_rax)
        self._store(image, base, name)

    def _learn(self, image: ProcessImage, base: int, name: str, site: int, number: int) -> None:
        known = self._windows.setdefault(name, {})
        if site - base in known or len(known) >= _MOST_STUBS:
            return
        code = window_of_call(image.read(site - _BEFORE, _BEFORE + _AFTER), _BEFORE, number)
        if code is not None:
            known[site - base] = PathWindow(site - base - len(code), code)
            self._places.add(site % abi.PAGE)

    def _store(self, image: ProcessImage, base: int, name: str) -> None:
        """Store jumps for all that is known of a library, where its code is as it was."""
        if image.path_stubs is None:
            image.path_stubs = PathStubs(image.vdso_base + image.vdso.paths)
        stubs, known = image.path_stubs, self._windows.get(name)
        if not known:
            return
        low = min(known) - _LONGEST
        code = image.read(base + low, max(known) + len(_SYSCALL) - low)
        key = name, len(known), *stubs.distances(image, base)
        found = self._prepared.get(key)
        if found is None or found[0] != code:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            windows = [window for window in known.values() if window.is_in(code, low)]
            found = self._prepared[key] = code, stubs.prepare(image, base, windows, code, low)
        try:
            stubs.store(image, base, found[1])
        except OSError:
            return  # what cannot be written stays as it is


@lru_cache(maxsize=4 * _MOST_STUBS)
def _stub(window: PathWindow, base: int, watched: int) -> bytes:
    """Return a stub at address 0 for a library at ``base``.

    Most programs have stub, library and word as far apart.
    """
    made = window.path_code
    code = bytearray(made.code)
    for label, target in (
        ("watched", watched),
        ("site", base + window.site),
        ("then", base + window.site + len(_SYSCALL)),
    ):
        at = made.labels[label]
        _DISTANCE.pack_into(code, at, target - (len(window.code) + at + _DISTANCE.size))
    return bytes(window.code + code).ljust(_STUB_BYTES, b"\xcc")


class PathStubs:
    """The stubs of one address space.

    Args:
        area: where they are.

    Attributes:
        stops: how often the call at an address has stopped, if no stub stands for it.
        sites: addresses of the calls that stubs stand for.
    """

    def __init__(self, area: int) -> None:
        self._area = area
        self.stops: dict[int, int] = {}
        self.sites: set[int] = set()
        self._stubs: list[tuple[int, PathWindow]] = []

    def copy(self) -> PathStubs:
        """Return those of an address space that fork makes of this one."""
        other = PathStubs(self._area)
        other.stops, other.sites = dict(self.stops), set(self.sites)
        other._stubs = list(self._stubs)
        return other

    @property
    def _next(self) -> int:
        """Where the next stub will be."""
        return self._area + _STUB_BYTES * len(self._stubs)

    def distances(self, image: ProcessImage, base: int) -> tuple[int, int, int]:
        """Return what the code of the next stubs for a library at ``base`` depends on."""
        watched = image.vdso_base + image.vdso.watched
        return len(self._stubs), base - self._next, watched - self._next

    def prepare(
        self, image: ProcessImage, base: int, windows: list[PathWindow], code: bytes, low: int
    ) -> _Prepared:
        """Prepare stubs, and jumps to them.

        Args:
            image: the address space.
            base: where the library is.
            windows: what each stub stands for.
            code: its code as it is.
            low: the distance from ``base`` at which that begins.
        """
        count, distance, watched = self.distances(image, base)
        windows = [] if abs(distance) >> 30 else windows[: _MOST_STUBS - count]
        places = range(0, _STUB_BYTES * len(windows), _STUB_BYTES)
        placed = list(zip(places, windows, strict=True))
        stubs = [_stub(window, distance - place, watched - place) for place, window in placed]
        jumps = [(window.start, jump(distance + window.start, place)) for place, window in placed]
        return _Prepared(
            tuple(windows),
            b"".join(stubs),
            tuple(merged(sorted(jumps), code, low)),
            tuple(window.site for window in windows),
        )

    def store(self, image: ProcessImage, base: int, prepared: _Prepared) -> None:
        """Store what :meth:`prepare` has returned for a library at these distances.

        Args:
            image: the address space; its only thread is stopped.
            base: where the library is.
            prepared: what is stored.

        Raises:
            OSError: the code cannot be written.
        """
        if not prepared.windows:
            return
        os.pwrite(image.memory_fd, prepared.stubs, self._next)
        self._stubs += [(base, window) for window in prepared.windows]
        self.sites.update([base + site for site in prepared.sites])
        for place, changed in prepared.changes:
            os.pwrite(image.memory_fd, changed, base + place)

    def straighten(self, thread: ProgramThread) -> bool:
        """Move a stopped thread out of a stub, if it is in one.

        Returns:
            Whether its stop is a fault of the stub: a path that cannot be read, no more stack.

        Raises:
            Gone: it has died meanwhile.
        """
        regs = thread.load()
        if not 0 <= regs.rip - self._area < _STUB_BYTES * len(self._stubs):
            return False
        number, at = divmod(regs.rip - self._area, _STUB_BYTES)
        base, window = self._stubs[number]
        made, site = window.path_code, base + window.site
        labels, image = made.labels, thread.image
        at -= len(window.code)
        then = site + min(at, 0)
        moved = labels["moved"] <= at < labels["left"]
        moved |= labels["missing"] <= at < labels["again_left"]
        if moved and at > labels["moved"]:
            kept = image.read(regs.rsp, _KEPT.size)
            if len(kept) == _KEPT.size:  # unless another thread has unmapped the stack
                regs.r9, flags, buffer = _KEPT.unpack(kept)
                if labels["changed"] <= at < labels["unchanged"]:
                    _set(regs, made, flags, buffer)
        if moved:
            regs.rsp += KEPT_BYTES
        if labels["made"] <= at:
            then = site + len(_SYSCALL)
            if at >= labels["missing"] or regs.rax == _MISSING:
                # It has changed nothing, and the supervisor has to see the path.
                then, regs.rax = site, window.number
        regs.rip = then
        thread.store()
        reads = 0 < at <= labels["moved"] or labels["missing"] <= at < labels["again"]
        return reads and thread.at_signal and _is_fault(thread)


def _set(regs: UserRegs, made: PathCode, flags: int, buffer: int) -> None:
    """Give the registers of a call their values of before."""
    if made.flags:
        setattr(regs, made.flags, flags)
    if made.buffer:
        setattr(regs, made.buffer, buffer)


def _is_fault(thread: ProgramThread) -> bool:
    info = thread.siginfo()
    return info.signo in (abi.SIGSEGV, abi.SIGBUS) and info.code > 0


def _library(tid: int, site: int) -> Mapping | None:
    """Return the mapping of the C library, or the loader, with the code at ``site``."""
    found = mapping_at(tid, site)
    if (
        found is None
        or found.shared
        or found.prot & (abi.PROT_WRITE | abi.PROT_EXEC) != abi.PROT_EXEC
    ):
        return None
    return found if _LIBRARY.fullmatch(found.path) else None


def _in_loader(image: ProcessImage, site: int) -> bool:
    return bool(image.loader) and 0 <= site - image.loader < LOADER_BYTES
