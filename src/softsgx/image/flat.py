"""Two formats without metadata: the kernel selftest's ELF file and raw flat images.

Neither holds a signature.  It is in a file beside them, or a loader makes one.

Source:
    tools/testing/selftests/sgx/load.c, Linux v6.12.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, SecInfoFlags, Tcs
from softsgx.image._file import Bytes
from softsgx.image.blob import enclave_size
from softsgx.image.elf import PF_R, PF_W, PF_X, Elf, ProgramHeader
from softsgx.image.enclave import EnclaveImage, plan_of
from softsgx.image.plan import (
    MASK_NONE,
    SECINFO_RW,
    SECINFO_RWX,
    SECINFO_TCS,
    Buffer,
    Run,
    lay,
)

__all__ = ["looks_like_tcs", "page_flags", "read_raw", "read_selftest"]

_SECINFO_REG = SECINFO_RW & ~SecInfoFlags.RWX.value
_LARGEST_NSSA = (
    1 << 16
)  # no program nests exceptions so deep: a larger number means that the page is no TCS


def page_flags(p_flags: int) -> int:
    """Return the SECINFO flags of a regular page with an ELF segment's rights."""
    rights = 0
    for bit, right in ((PF_R, SecInfoFlags.R), (PF_W, SecInfoFlags.W), (PF_X, SecInfoFlags.X)):
        if p_flags & bit:
            rights |= right.value
    return _SECINFO_REG | rights


def looks_like_tcs(page: Buffer) -> bool:
    """Return whether EENTER could accept 4096 bytes as a TCS."""
    if len(page) != PAGE_BYTES:
        return False
    tcs = Tcs.unpack(page)
    aligned = all(x % PAGE_BYTES == 0 for x in (tcs.ossa, tcs.ofs_base, tcs.ogs_base))
    return (
        aligned
        and tcs.state == tcs.cssa == tcs.aep == 0
        and 0 < tcs.nssa <= _LARGEST_NSSA
        and tcs.flags & ~3 == 0
        and not any(tcs.reserved)
    )


def read_selftest(file: Bytes, *, heap_pages: int = 1) -> EnclaveImage:
    """Read an enclave of the kernel's selftests.

    Its loader places segments by their offset in the file, not by their address, and maps the raw
    bytes of the file up to the end of their last page.

    Args:
        file: the ELF file; needs no section headers.
        heap_pages: unmeasured pages after the last segment.

    Raises:
        SoftSgxError: it has no segments, or the first is not readable and writable only.
    """
    elf = Elf(file)
    loads = [load for load in elf.loads if load.p_filesz]
    if not loads:
        raise file.bad(elf.header.e_phoff, "no PT_LOAD segment", "a selftest enclave has three")
    if loads[0].p_flags & (PF_R | PF_W | PF_X) != PF_R | PF_W:
        raise file.bad(
            elf.header.e_phoff,
            f"first segment has flags {loads[0].p_flags:#x}",
            "a selftest enclave begins with its TCS pages, RW",
        )
    origin = loads[0].p_offset & -PAGE_BYTES
    runs: list[Run] = []
    for index, load in enumerate(loads):
        tcs = index == 0
        runs += lay(
            (load.p_offset & -PAGE_BYTES) - origin,
            _raw_pages(file, load),
            SECINFO_TCS if tcs else page_flags(load.p_flags),
            label="TCS" if tcs else f"PT_LOAD {index}",
        )
    end = runs[-1].end
    if heap_pages:
        heap = Run(end, heap_pages, SECINFO_RW, mask=MASK_NONE, label="heap")
        runs.append(heap)
        end = heap.end
    plan = plan_of(file.name, enclave_size(end), runs)
    return EnclaveImage(file.name, "selftest", plan, notes=(f"heap of {heap_pages} pages assumed",))


def _raw_pages(file: Bytes, load: ProgramHeader) -> memoryview:
    """Return R(p_filesz) bytes from T(p_offset), fewer at the end of the file: mmap adds zeros."""
    start = load.p_offset & -PAGE_BYTES
    size = -(-load.p_filesz // PAGE_BYTES) * PAGE_BYTES
    return file.view[start : start + size]


def read_raw(file: Bytes) -> EnclaveImage:
    """Read a flat image: whole pages, the first a TCS, the rest readable, writable, executable.

    Raises:
        SoftSgxError: it has no whole number of pages, or its first is no TCS.
    """
    if not len(file) or len(file) % PAGE_BYTES:
        raise file.bad(0, f"{len(file)} bytes", "a raw image has a whole number of 4096-byte pages")
    if not looks_like_tcs(file.view[:PAGE_BYTES]):
        raise file.bad(0, "first page is no TCS", "a raw image begins with one")
    runs = [
        *lay(0, file.view[:PAGE_BYTES], SECINFO_TCS, label="TCS"),
        *lay(PAGE_BYTES, file.view[PAGE_BYTES:], SECINFO_RWX, label="image"),
    ]
    plan = plan_of(file.name, enclave_size(len(file)), runs)
    return EnclaveImage(file.name, "raw", plan)
