"""Areas of stubs near code that cannot jump to our vDSO, mapped when the first stub needs one.

An area is just below some mapping, so that neither a heap nor a stack grows into it, and outside
the ranges of enclaves.

Source:
    mmap(2), MAP_FIXED_NOREPLACE; brk(2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import mappings
from softsgx.engines.native.vdso.stubs import REACH

if TYPE_CHECKING:
    from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["AREA_PAGES", "gap_near", "make_area"]

AREA_PAGES = 4
_LOWEST = 1 << 16
_GUARD = 16 * abi.PAGE
_GROWS_DOWN = "[stack]"


def gap_near(taken: list[tuple[int, int, str]], address: int, size: int) -> int | None:
    """Return the start of a range of ``size`` bytes that is free and near an address.

    Args:
        taken: start, end and name of ranges that are in use.
        address: where code jumps from.
        size: bytes, a multiple of a page.
    """
    found, end = None, _LOWEST
    for low, high, name in sorted(taken):
        start = low - _GUARD - size
        fits = start - _GUARD >= end and name != _GROWS_DOWN
        if fits and (found is None or abs(start - address) < abs(found - address)):
            found = start
        end = max(end, high)
    return found if found is not None and abs(found - address) < REACH - size else None


def make_area(thread: ProgramThread, near: int, size: int) -> tuple[int, int] | None:
    """Map an area for stubs of ``size`` bytes near an address; return where, and for how many.

    Args:
        thread: a stopped thread of the address space.
        near: address of the code.
        size: bytes of a stub.

    Returns:
        ``None``: there is no room.

    Raises:
        Gone: the thread has died.
    """
    total = AREA_PAGES * abi.PAGE
    taken = [(each.start, each.end, each.path) for each in mappings(thread.tid)]
    enclaves = {vma.file.enclave for vma in thread.image.mm.vmas()}
    taken += [(each.base, each.base + each.size, "") for each in enclaves]
    start = gap_near(taken, near, total)
    if start is None:
        return None
    kind = abi.MAP_PRIVATE | abi.MAP_ANONYMOUS | abi.MAP_FIXED_NOREPLACE
    rights = abi.PROT_READ | abi.PROT_EXEC
    if thread.syscall(abi.SYS_MMAP, start, total, rights, kind, -1, 0) != start:
        return None
    return start, total // size
