"""EBLOCK, ETRACK, EWB and ELDU for the hot path: a page is evicted and loaded again.

These serve one thread, operands that are objects, and child pages: the cases that succeed, and an
EWB before its ETRACK, with which every batch begins.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

from cryptography.exceptions import InvalidTag

from softsgx import compiled
from softsgx.arch import CHILD_TYPES, PAGE_BYTES, MacHeader, PageType, Status
from softsgx.hw.epcm import EpcPage
from softsgx.hw.leaves.eblock import eblock
from softsgx.hw.leaves.eld import eldu
from softsgx.hw.leaves.etrack import etrack
from softsgx.hw.leaves.ewb import ewb
from softsgx.hw.operands import Buffer, PageInfoArgs, Ref, Sealed
from softsgx.hw.processor import EnclaveMode, LogicalProcessor
from softsgx.hw.secrets import PagingKey, Secrets
from softsgx.hw.secs import Crossings, ResidentSecs
from softsgx.hw.store import DictStore
from softsgx.hw.tracking import TRACKED_AGE, start_cycle

__all__ = ["compiled_leaves", "paging_leaves"]

_CONTENT = struct.Struct(f"{PAGE_BYTES}s")  # without the MAC that follows it
_PCMD = struct.Struct("<Q56xQ40x16s")
_READ_PCMD = struct.Struct("<Q56s8s40s16s")
_MAC_HEADER = struct.Struct("<QQQ104x")  # EID, LINADDR, SECINFO.FLAGS; the rest is zero
assert _MAC_HEADER.size == MacHeader.SIZE, "the MAC header is 128 bytes"
_SUCCESS, _NOT_TRACKED = Status.SUCCESS, Status.NOT_TRACKED
_SECS = PageType.SECS
_CHILD_TYPES = {int(pt): pt for pt in CHILD_TYPES}
_STATES = 8 | 16 | 32  # PENDING, MODIFIED, PR
_NO_RESERVED = bytes(40)
_NO_SECINFO_RESERVED = bytes(56)
_SLOT_MASK = PAGE_BYTES - 8
_PAGE_MASK = -PAGE_BYTES


def paging_leaves(cpu: LogicalProcessor) -> dict[str, Callable[..., Any]]:
    """Return the leaves by name, bound to ``cpu``, whose space must be the direct map."""
    leaves: dict[str, Callable[..., Any]] = {
        "eblock": _eblock,
        "etrack": _etrack,
        "ewb": _ewb,
        "eldu": _eldu,
        "try_ewb": _try_ewb,
        "try_eldu": _try_eldu,
        "eblock_pages": _eblock_pages,
        "ewb_pages": _ewb_pages,
    }
    return {name: MethodType(leaf, cpu) for name, leaf in leaves.items()}


def compiled_leaves(cpu: LogicalProcessor) -> dict[str, Callable[..., Any]]:
    """Return those that are compiled, and else those of :func:`paging_leaves`."""
    leaves, core = paging_leaves(cpu), compiled.speedups
    if core is not None:
        leaves.update(core.leaves(cpu, cpu.hw))
    return leaves


def _give(core: ModuleType) -> None:
    """Give the compiled core the classes and objects that its leaves use."""
    from softsgx.hw.machine import Machine

    for record in (
        *(Crossings, DictStore, EnclaveMode, EpcPage, Machine, PagingKey, ResidentSecs),
        Secrets,
    ):
        core.bind(record.__name__, record)
    for name, value in {
        "InvalidTag": InvalidTag,
        "PagingKey": PagingKey,
        "child_types": _CHILD_TYPES,
        "SUCCESS": _SUCCESS,
        "NOT_TRACKED": _NOT_TRACKED,
        "SECS": _SECS,
        "TRACKED_AGE": TRACKED_AGE,
        "eblock": eblock,
        "etrack": etrack,
    }.items():
        core.give(name, value)


if compiled.speedups is not None:
    _give(compiled.speedups)


def _eblock(cpu: LogicalProcessor, rcx: int) -> Status:
    page: Any = cpu.hw.pages.get(rcx)
    if page is not None and page.valid and not page.blocked and not page.lock:
        secs = page.secs
        if secs is not None and not secs.enclave.etrack_running:
            page.blocked = True
            page.bepoch = secs.enclave.epoch
            return _SUCCESS
    return eblock(cpu, rcx)


def _eblock_pages(cpu: LogicalProcessor, addresses: list[int]) -> int:
    pages: dict[int, Any] = cpu.hw.pages
    done = 0
    for addr in addresses:
        page = pages.get(addr)
        if page is None or not page.valid or page.blocked or page.lock:
            break
        secs = page.secs
        if secs is None or secs.enclave.etrack_running:
            break
        page.blocked = True
        page.bepoch = secs.enclave.epoch
        done += 1
    return done


def _etrack(cpu: LogicalProcessor, rcx: int) -> Status:
    page = cpu.hw.pages.get(rcx)
    if page is not None and page.valid and page.pt is _SECS and page.lock >= 0:
        enclave = page.enclave
        if enclave is not None and not enclave.tracking_lock and start_cycle(enclave):
            return _SUCCESS
    return etrack(cpu, rcx)


def _try_ewb(cpu: LogicalProcessor, rcx: int, rdx: int) -> Sealed | Status | None:
    pages: dict[int, Any] = cpu.hw.pages
    page, va_page = pages.get(rcx), pages.get(rdx & _PAGE_MASK)
    if (
        page is not None
        and page.valid
        and page.secs is not None
        and page.blocked
        and not page.lock
        and va_page is not None
        and va_page.valid
        and va_page.slots is not None
        and va_page.lock >= 0
        and not rdx & 7
    ):
        enclave = page.secs.enclave
        slot, slots = (rdx & _SLOT_MASK) >> 3, va_page.slots
        cycles = enclave.epoch - page.bepoch
        if cycles < 0 or enclave.tracking_lock:
            return None
        if cycles < TRACKED_AGE and (not cycles or enclave.prev_count):
            return _NOT_TRACKED
        if not slots[slot]:
            hw = cpu.hw
            key = hw.secrets.paging
            flags = page.pt << 8 | page.rwx
            if page.pending or page.modified or page.pr:
                flags = page.secinfo_flags()
            version, eid = key.next_version(), enclave.eid
            header = _MAC_HEADER.pack(eid, page.linaddr, flags)
            sealed = key.seal(hw.store.freeze(page), version, header)
            slots[slot] = version
            enclave.children -= 1
            hw.store.drop(page)
            page.valid, page.secs = False, None
            return sealed, flags, eid
    return None


def _ewb_pages(cpu: LogicalProcessor, addresses: list[int], slots: list[int]) -> list[Sealed]:
    hw = cpu.hw
    pages: dict[int, Any] = hw.pages
    store, key = hw.store, hw.secrets.paging
    freeze, drop, pack, seal = store.freeze, store.drop, _MAC_HEADER.pack, key.seal
    done: list[Sealed] = []
    va_addr, versions = -1, None
    for rcx, rdx in zip(addresses, slots, strict=True):
        if rdx & _PAGE_MASK != va_addr:
            va_addr = rdx & _PAGE_MASK
            va_page = pages.get(va_addr)
            if va_page is None or not va_page.valid or va_page.lock < 0:
                break
            versions = va_page.slots
        page, slot = pages.get(rcx), (rdx & _SLOT_MASK) >> 3
        if (
            versions is None
            or page is None
            or not page.valid
            or page.secs is None
            or not page.blocked
            or page.lock
            or rdx & 7
            or versions[slot]
        ):
            break
        enclave = page.secs.enclave
        cycles = enclave.epoch - page.bepoch
        if cycles <= 0 or enclave.tracking_lock or (cycles < TRACKED_AGE and enclave.prev_count):
            break
        flags = page.pt << 8 | page.rwx
        if page.pending or page.modified or page.pr:
            flags = page.secinfo_flags()
        version, eid = key.next_version(), enclave.eid
        header = pack(eid, page.linaddr, flags)
        sealed = seal(freeze(page), version, header)
        versions[slot] = version
        enclave.children -= 1
        drop(page)
        page.valid, page.secs = False, None
        done.append((sealed, flags, eid))
    return done


def _ewb(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    if type(rbx) is PageInfoArgs and not rbx.linaddr and not rbx.secs:
        srcpge: Any = rbx.srcpge
        pcmd: Any = rbx.secinfo
        if type(srcpge) is not int and type(pcmd) is not int and len(srcpge) == PAGE_BYTES:
            done = _try_ewb(cpu, rcx, rdx)
            if type(done) is tuple:
                sealed, flags, eid = done
                # In place: assigning to a slice would make a copy first.
                _CONTENT.pack_into(srcpge, 0, sealed)
                _PCMD.pack_into(pcmd, 0, flags, eid, sealed[PAGE_BYTES:])
                rbx.linaddr = cpu.hw.pages[rcx].linaddr
                return _SUCCESS
            if done is _NOT_TRACKED:
                return _NOT_TRACKED
    return ewb(cpu, rbx, rcx, rdx)


def _try_eldu(
    cpu: LogicalProcessor,
    linaddr: int,
    secs_addr: int,
    sealed: Buffer,
    flags: int,
    rcx: int,
    rdx: int,
) -> bool:
    pages: dict[int, Any] = cpu.hw.pages
    page, va_page, secs = pages.get(rcx), pages.get(rdx & _PAGE_MASK), pages.get(secs_addr)
    pt = _CHILD_TYPES.get(flags >> 8)
    if (
        page is not None
        and not page.valid
        and not page.lock
        and va_page is not None
        and va_page.valid
        and va_page.slots is not None
        and va_page.lock >= 0
        and not rdx & 7
        and secs is not None
        and secs.valid
        and secs.enclave is not None
        and secs.lock >= 0
        and pt is not None
    ):
        hw, enclave = cpu.hw, secs.enclave
        slot, slots = (rdx & _SLOT_MASK) >> 3, va_page.slots
        header = _MAC_HEADER.pack(enclave.eid, linaddr, flags)
        plain = hw.secrets.paging.unseal(sealed, slots[slot], header)
        if plain is not None:
            page.pt, page.rwx = pt, flags & 7
            page.secs, page.linaddr = secs, linaddr
            page.blocked = page.pending = page.modified = page.pr = False
            if flags & _STATES:
                page.pending, page.modified = bool(flags & 8), bool(flags & 16)
                page.pr = bool(flags & 32)
            page.bepoch = enclave.epoch - TRACKED_AGE
            page.enclave = page.slots = None
            hw.store.fill(page, plain)
            slots[slot] = 0
            enclave.children += 1
            page.valid = True
            return True
    return False


def _eldu(cpu: LogicalProcessor, rbx: Ref | PageInfoArgs, rcx: int, rdx: int) -> Status:
    if type(rbx) is PageInfoArgs:
        srcpge: Any = rbx.srcpge
        pcmd: Any = rbx.secinfo
        if type(srcpge) is not int and type(pcmd) is not int:
            flags, secinfo_reserved, _eid, reserved, mac = _READ_PCMD.unpack(pcmd)
            if (
                secinfo_reserved == _NO_SECINFO_RESERVED
                and reserved == _NO_RESERVED
                and _try_eldu(cpu, rbx.linaddr, rbx.secs, b"".join((srcpge, mac)), flags, rcx, rdx)
            ):
                return _SUCCESS
    return eldu(cpu, rbx, rcx, rdx)
