"""Enclave files that other tools made: which there are, and loading one through the driver.

``SOFTSGX_ENCLAVES`` names a directory.  Every file below it that begins like an ELF file or an SGXS
stream is an enclave; a SIGSTRUCT may lie beside it.  Other files are left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from softsgx.arch import PAGE_BYTES, AttributesFlags, Secs
from softsgx.host import Platform
from softsgx.image import MASK_ALL, MASK_NONE, EnclaveImage, Plan, SecsLimits, choose_secs
from softsgx.userland import SoftProcess

__all__ = ["ABSENT", "build_image", "not_loadable", "platform_for", "real_files"]

VARIABLE = "SOFTSGX_ENCLAVES"
ABSENT = f"{VARIABLE} names no directory of real signed enclaves"
_MAGICS = (b"\x7fELF", b"ECREATE\0", b"UNSIZED\0")
_BATCH_PAGES = 256
_BASE = 1 << 46


def real_files() -> list[Path]:
    """Return the enclave files of the directory, none without one."""
    root = os.environ.get(VARIABLE, "")
    if not root:
        return []
    return sorted(path for path in Path(root).rglob("*") if path.is_file() and _is_enclave(path))


def _is_enclave(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(_MAGICS)


def not_loadable(plan: Plan) -> str:
    """Return why Linux has no ioctl for some page of the plan; empty when it has."""
    for run in plan.runs:
        if run.mask not in (MASK_ALL, MASK_NONE):
            return f"the page at {run.offset:#x} is measured in part; ADD_PAGES cannot do that"
    return ""


def platform_for(plan: Plan) -> Platform:
    """Return a platform whose EPC holds the whole enclave."""
    return Platform(epc=(plan.page_count + plan.page_count // 256 + 64) * PAGE_BYTES)


def build_image(
    process: SoftProcess, image: EnclaveImage, *, flip: int | None = None, base: int = _BASE
) -> tuple[int, Secs]:
    """Create the enclave of an image and add its pages; return descriptor and SECS.

    Args:
        process: who builds it.
        image: what to build.
        flip: offset in the enclave of a byte whose lowest bit is to be inverted.
        base: where, unless the image insists on a place.
    """
    config = process.driver.core.hw.config
    limits = SecsLimits(int(config.attributes), config.xfrm, int(config.miscselect))
    at = -(-base // image.plan.size) * image.plan.size
    secs = choose_secs(image, base=at, limits=limits)
    fd = process.open()
    if secs.attributes.flags & AttributesFlags.PROVISIONKEY:
        process.provision(fd, process.open_provision())
    process.create(fd, secs.pack())
    for offset, data, flags, mask in _batches(image.plan):
        if flip is not None and offset <= flip < offset + len(data):
            data[flip - offset] ^= 1
        process.add_pages(fd, offset, bytes(data), flags, measure=mask == MASK_ALL)
    return fd, secs


def _batches(plan: Plan) -> Iterator[tuple[int, bytearray, int, int]]:
    for run in plan.runs:
        for first in range(0, run.pages, _BATCH_PAGES):
            last = min(first + _BATCH_PAGES, run.pages)
            data = bytearray().join(bytes(run.page(n).data) for n in range(first, last))
            yield run.offset + first * PAGE_BYTES, data, run.flags, run.mask
