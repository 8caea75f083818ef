"""madvise and mlock on mappings of a device, with Linux's results for pages without a struct page.

Source:
    madvise(2), mlock(2); mm/madvise.c, mm/mlock.c: what each does with VM_PFNMAP and VM_IO.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENODEV, ENOMEM

from softsgx.driver import EnclaveVma
from softsgx.engines.native import abi
from softsgx.engines.native.mappings import mappings
from softsgx.engines.native.syscalls.registry import Registry
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["drop_left_behind", "madvise", "mlock"]

_REFUSED = {
    abi.MADV_DONTNEED: EINVAL,
    abi.MADV_FREE: EINVAL,
    abi.MADV_REMOVE: ENODEV,  # a device has no holes to punch
    abi.MADV_DOFORK: EINVAL,
    abi.MADV_HUGEPAGE: EINVAL,
    abi.MADV_DODUMP: EINVAL,
    abi.MADV_COLD: EINVAL,
    abi.MADV_PAGEOUT: EINVAL,
    abi.MADV_POPULATE_READ: EINVAL,
    abi.MADV_POPULATE_WRITE: EINVAL,
    abi.MADV_COLLAPSE: EINVAL,
    abi.MADV_GUARD_INSTALL: EINVAL,
    abi.MADV_GUARD_REMOVE: EINVAL,
}

_POPULATING = (abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE)


def madvise(thread: ProgramThread) -> int | None:
    """Do ``madvise`` (address, length, advice)."""
    regs = thread.regs
    error = _REFUSED.get(regs.rdx & 0xFFFF_FFFF)
    vmas = _enclaves(thread, regs.rdi, regs.rsi)
    if error is None or not vmas:
        return None  # other advice means the same for the memory file

    def advise(start: int, length: int) -> int:
        return thread.syscall(abi.SYS_MADVISE, start, length, regs.rdx)

    # Linux goes from mapping to mapping, and ends at the first that refuses.  A hole before is its
    # answer only where it would fill memory.
    before = _around(vmas[:1], regs.rdi, vmas[0].start, advise)
    passes_holes = regs.rdx & 0xFFFF_FFFF not in _POPULATING
    return -error if not before or (before == -ENOMEM and passes_holes) else before


def mlock(thread: ProgramThread) -> int | None:
    """Do ``mlock`` (address, length) and ``mlock2``: nothing where a device is mapped."""
    regs = thread.regs
    start, end = regs.rdi & abi.PAGE_MASK, regs.rdi + regs.rsi
    vmas = _enclaves(thread, start, end - start)
    if not vmas:
        return None
    flags = regs.rdx if regs.orig_rax == abi.SYS_MLOCK2 else 0
    return _around(
        vmas,
        start,
        end,
        lambda low, length: thread.syscall(abi.SYS_MLOCK2, low, length, flags),
    )


def drop_left_behind(image: ProcessImage, tid: int, registry: Registry) -> None:
    """Unmap in a fork child what MADV_DONTFORK kept from it.

    Args:
        image: of the child, with all mappings of its parent.
        tid: its thread.
        registry: which memory file each mapping is of.
    """
    vmas = image.mm.vmas()
    if not vmas:
        return
    inherited: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for each in mappings(tid):
        inherited.setdefault((each.device, each.inode), []).append((each.start, each.end))
    for vma in vmas:
        key = registry.of_file(vma.file).memory.key
        at, end = vma.start, vma.end
        for low, high in [*inherited.get(key, []), (end, end)]:
            if at < min(low, end):
                image.mm.munmap(at, min(low, end) - at)
            if low < end:
                at = max(at, high)


def _enclaves(thread: ProgramThread, start: int, length: int) -> list[EnclaveVma]:
    end = start + length
    if not length or start % abi.PAGE or end > 1 << 64:
        return []  # the kernel refuses it, or has nothing to do
    return thread.image.mm.vmas(start, end)


def _around(vmas: list[EnclaveVma], start: int, end: int, do: Callable[[int, int], int]) -> int:
    """Do something with the parts of a range that are no enclave's; return its first error.

    A hole is no error before the end of the range, as for Linux.
    """
    result, at = 0, start
    for low, high in [*((vma.start, vma.end) for vma in vmas), (end, end)]:
        if at < low:
            outcome = do(at, low - at)
            if outcome not in (0, -ENOMEM):
                return outcome
            result = result or outcome
        at = max(at, high)
    return result
