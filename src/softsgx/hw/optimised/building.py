"""EADD, and EEXTEND of whole pages, for enclaves that are built page by page.

These serve one thread, operands that are objects, and regular pages.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import MethodType
from typing import Any

from softsgx.arch import (
    CHUNK_BYTES,
    CHUNKS_PER_PAGE,
    PAGE_BYTES,
    PageType,
    SecInfo,
    eadd_block,
    eextend_block,
)
from softsgx.hw.leaves.eadd import eadd
from softsgx.hw.leaves.eextend import eextend
from softsgx.hw.operands import PageInfoArgs, Ref
from softsgx.hw.processor import LogicalProcessor

__all__ = ["building_leaves"]

_REG = PageType.REG
_PLAIN = {int(_REG) << 8 | rwx: rwx for rwx in (0, 1, 3, 4, 5, 7)}  # no W without R
_NO_RESERVED = bytes(56)
_OFFSETS = range(0, PAGE_BYTES, CHUNK_BYTES)
_TAG = eextend_block(0)[:8]
#: The chunks of a page, and what is measured of them: each behind its block of tag and offset.
_CHUNKS = struct.Struct(f"{CHUNK_BYTES}s" * CHUNKS_PER_PAGE)
_MEASURED = struct.Struct("<" + f"8sQ48x{CHUNK_BYTES}s" * CHUNKS_PER_PAGE)


def building_leaves(cpu: LogicalProcessor) -> dict[str, Callable[..., Any]]:
    """Return the leaves by name, bound to ``cpu``, whose space must be the direct map."""
    return {"eadd": MethodType(_eadd, cpu), "eextend_page": MethodType(_eextend_page, cpu)}


def _eadd(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int) -> None:
    hw = cpu.hw
    page = hw.page_at(rcx)
    if (
        type(rbx) is PageInfoArgs
        and page is not None
        and page.addr == rcx
        and not page.valid
        and not page.lock
        and type(rbx.secinfo) is SecInfo
        and type(rbx.srcpge) is bytes
        and len(rbx.srcpge) == PAGE_BYTES
    ):
        rwx = _PLAIN.get(rbx.secinfo.flags)
        secs, linaddr = hw.pages.get(rbx.secs), rbx.linaddr
        if (
            rwx is not None
            and rbx.secinfo.reserved == _NO_RESERVED
            and secs is not None
            and secs.valid
            and secs.enclave is not None
            and secs.lock >= 0
            and not linaddr % PAGE_BYTES
        ):
            enclave = secs.enclave
            if enclave.covers(linaddr) and not enclave.measurement_lock and not enclave.initialized:
                page.fill(_REG, rwx=rwx, secs=secs, linaddr=linaddr, valid=False)
                hw.fill_page(page, rbx.srcpge)
                block = eadd_block(linaddr - enclave.base, rbx.secinfo.flags)
                hw.measurements[enclave.eid].update(block)
                enclave.children += 1
                page.valid = True
                return
    eadd(cpu, rbx, rcx)


def _eextend_page(cpu: LogicalProcessor, rbx: int, rcx: int) -> None:
    hw = cpu.hw
    page, secs = hw.pages.get(rcx), hw.pages.get(rbx)
    if (
        page is not None
        and page.valid
        and page.pt is _REG
        and page.lock >= 0
        and secs is not None
        and page.secs is secs
    ):
        enclave = page.owner
        if not enclave.measurement_lock and not enclave.initialized:
            offset = page.linaddr - enclave.base
            measured = [_TAG, 0, b""] * CHUNKS_PER_PAGE
            measured[1::3] = range(offset, offset + PAGE_BYTES, CHUNK_BYTES)
            measured[2::3] = _CHUNKS.unpack(hw.store.read(page, 0, PAGE_BYTES))
            hw.measurements[enclave.eid].update(_MEASURED.pack(*measured))
            return
    for start in _OFFSETS:
        eextend(cpu, rbx, rcx + start)
