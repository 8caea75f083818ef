"""EENTER and EEXIT for calls that go into an enclave and come out by the million.

These serve processors that are no guest's, in the plain case that succeeds: 64-bit mode, no CET, no
debugging and no AEX-Notify, everything present, the XSAVE area of a frame in one page.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from softsgx import compiled
from softsgx.arch import (
    PAGE_BYTES,
    TCS_ACTIVE,
    TCS_INACTIVE,
    AttributesFlags,
    GprSgx,
    PageType,
    Tcs,
)
from softsgx.hw.entry import GPR_OFFSET
from softsgx.hw.faults import Fault, VmExit
from softsgx.hw.processor import EnclaveMode, LogicalProcessor, SavedOutsideState, Segment, SsaFrame
from softsgx.hw.space import READ, WRITE
from softsgx.hw.tracking import count_in, count_out

__all__ = ["entry_leaves", "try_virtual_exit"]

_HEAD = struct.Struct("<QQQIIQQQQ")  # STATE up to OGSBASE
_CHANGED = struct.Struct("<QQQIIQQ")  # STATE up to AEP
_TWO_QWORDS = struct.Struct("<QQ")
_QWORD = struct.Struct("<Q")
_AEP = Tcs.OFFSETS["aep"]
_URSP = GPR_OFFSET + GprSgx.OFFSETS["ursp"]
_ACTIVE, _INACTIVE = int(TCS_ACTIVE), _QWORD.pack(TCS_INACTIVE)
_TCS, _REG = PageType.TCS, PageType.REG
_MUST = int(AttributesFlags.INIT | AttributesFlags.MODE64BIT)
_MAY_NOT = int(AttributesFlags.CET | AttributesFlags.AEXNOTIFY)
_LOOKED_AT = _MUST | _MAY_NOT
_INSIDE = Segment(selector=0x0B)
_RIGHTS = READ | WRITE
_PAGE_MASK = -PAGE_BYTES
_TF = 1 << 8


def entry_leaves(
    cpu: LogicalProcessor, eenter: Callable[..., Any], eexit: Callable[..., Any]
) -> dict[str, Callable[..., Any]]:
    """Return the leaves by name, bound to ``cpu``.

    Args:
        cpu: the processor.
        eenter: the readable leaf, bound to it.
        eexit: the readable leaf, bound to it.
    """

    def enter(rbx: int, rcx: int) -> None:
        if not _eenter(cpu, rbx, rcx):
            eenter(rbx, rcx)

    def leave(rbx: int) -> None:
        if not _eexit(cpu, rbx):
            eexit(rbx)

    enter.__name__, leave.__name__ = "eenter", "eexit"
    enter.__doc__, leave.__doc__ = eenter.__doc__, eexit.__doc__
    return {"eenter": enter, "eexit": leave}


def _eenter(cpu: LogicalProcessor, rbx: int, rcx: int) -> bool:
    """Do a plain EENTER; ``False`` when it is not plain, and nothing has changed."""
    if (
        cpu.inside is not None
        or not cpu.mode64
        or cpu.cr4_cet
        or not (cpu.cr4_osfxsr and cpu.cr4_osxsave)
        or rbx & ~_PAGE_MASK
        or (rbx | rcx) >> 47
    ):
        return False
    hw, regs, translate = cpu.hw, cpu.regs, cpu.space.translate
    pages, store = hw.pages, hw.store
    try:
        page = pages.get(translate(rbx, WRITE, user=True))
        if (
            page is None
            or not page.valid
            or page.lock < 0
            or page.pt is not _TCS
            or page.linaddr != rbx
            or page.blocked
            or page.pending
            or page.modified
        ):
            return False
        secs = page.secs
        enclave = page.owner
        assert secs is not None, "a TCS page without an enclave"
        xfrm, xcr0 = enclave.xfrm, regs.xcr0
        state, flags, ossa, cssa, nssa, oentry, _aep, ofs_base, ogs_base = _HEAD.unpack(
            store.read(page, 0, _HEAD.size)
        )
        if (
            enclave.flags & _LOOKED_AT != _MUST
            or enclave.machine_check
            or flags
            or state == _ACTIVE
            or cssa >= nssa
            or (ossa | ofs_base | ogs_base) & ~_PAGE_MASK
            or xfrm & ~xcr0
            or hw.xsave.plan(xfrm).size > PAGE_BYTES
        ):
            return False

        base, frame_pages = enclave.base, enclave.ssa_frame_size
        at = base + ossa + PAGE_BYTES * frame_pages * cssa
        last = at + PAGE_BYTES * (frame_pages - 1)
        target, fs_base, gs_base = base + oentry, base + ofs_base, base + ogs_base
        if (last | target | fs_base | gs_base) >> 47:
            return False
        xsave = gpr = pages.get(translate(at, WRITE, user=True))
        if last != at:
            gpr = pages.get(translate(last, WRITE, user=True))
    except (Fault, VmExit):
        return False
    for frame_page, linaddr in ((xsave, at), (gpr, last)):
        if (
            frame_page is None
            or not frame_page.valid
            or frame_page.pt is not _REG
            or frame_page.secs is not secs
            or frame_page.linaddr != linaddr
            or frame_page.rwx & _RIGHTS != _RIGHTS
            or frame_page.blocked
            or frame_page.pending
            or frame_page.modified
        ):
            return False
    assert gpr is not None and xsave is not None, "the frame was looked at"

    # Nothing can fail from here on.
    rflags = regs.rflags
    enclave.cur_count += 1
    store.write(page, 0, _CHANGED.pack(_ACTIVE, flags, ossa, cssa, nssa, oentry, rcx))
    outside = SavedOutsideState(
        cpu.fs, regs.fs_base, cpu.gs, regs.gs_base, xcr0, rflags & _TF, cpu.ssp, cpu.u_cet
    )
    if rflags & _TF:
        regs.rflags = rflags & ~_TF
    regs.xcr0 = xfrm
    regs.fs_base, regs.gs_base = fs_base, gs_base
    cpu.fs = cpu.gs = _INSIDE
    frame = SsaFrame(gpr, (xsave,))
    cpu.inside = EnclaveMode(secs, enclave, page, rbx, enclave.epoch, frame, None, outside)
    cpu.tlb.clear()
    store.write(gpr, _URSP, _TWO_QWORDS.pack(regs.rsp, regs.rbp))
    regs.rax, regs.rcx, regs.rip = cssa, regs.rip + 3, target
    enclave.crossings.eenter += 1
    return True


def _eexit(cpu: LogicalProcessor, rbx: int) -> bool:
    """Do a plain EEXIT; ``False`` when it is not plain, and nothing has changed."""
    inside = cpu.inside
    if inside is None or not cpu.mode64 or cpu.cr4_cet or rbx >> 47:
        return False
    outside = inside.outside
    if not cpu.cr4_osxsave or outside.tf is None or inside.enclave.flags & _MAY_NOT:
        return False
    regs, store, tcs = cpu.regs, cpu.hw.store, inside.tcs
    regs.rip, (regs.rcx,) = rbx, _QWORD.unpack(store.read(tcs, _AEP, 8))
    cpu.fs, cpu.gs = outside.fs, outside.gs
    regs.fs_base, regs.gs_base, regs.xcr0 = outside.fs_base, outside.gs_base, outside.xcr0
    rflags = regs.rflags
    if rflags & _TF != outside.tf:
        regs.rflags = rflags & ~_TF | outside.tf
    cpu.tlb.clear()
    store.write(tcs, 0, _INACTIVE)
    cpu.inside = None
    count_out(inside.enclave, inside.entry_epoch)
    inside.enclave.crossings.eexit += 1
    return True


def try_virtual_exit(cpu: LogicalProcessor) -> bool:
    """Do the exit of an interrupt and the ERESUME after it in one step.

    Afterwards the processor is inside as of the present epoch, without older translations.

    Deviation: the SSA frame is neither written nor read; software that looks into it for exits that
    were resumed does not see this one.

    Args:
        cpu: a processor inside an enclave; its AEP is the address of an ENCLU.

    Returns:
        ``False``, nothing has changed, when ERESUME could fault or would go elsewhere.

    Source:
        SDM vol. 3D, "Asynchronous Enclave Exit", "ERESUME", Operation.
    """
    inside = cpu.inside
    assert inside is not None, "an exit from nowhere"
    enclave, translate = inside.enclave, cpu.space.translate
    if not cpu.mode64 or enclave.flags & _LOOKED_AT != _MUST or inside.outside.tf is None:
        return False
    tcs, frame = inside.tcs, inside.frame
    gone = not tcs.valid or tcs.blocked or tcs.pending or tcs.modified or tcs.lock < 0
    if gone or tcs.linaddr != inside.tcs_linaddr:
        return False
    head = _HEAD.unpack(cpu.hw.store.read(tcs, 0, _HEAD.size))
    _state, flags, ossa, cssa, nssa, _oentry, _aep, ofs_base, ogs_base = head
    at = enclave.base + ossa + PAGE_BYTES * enclave.ssa_frame_size * cssa
    if flags or cssa >= nssa or (ofs_base | ogs_base) & ~_PAGE_MASK or at != frame.xsave[0].linaddr:
        return False
    try:
        if translate(tcs.linaddr, WRITE, user=True) != tcs.addr:
            return False
        for page in {frame.gpr, *frame.xsave}:
            gone = not page.valid or page.blocked or page.pending or page.modified
            if gone or page.pt is not _REG or page.rwx & _RIGHTS != _RIGHTS:
                return False
            if translate(page.linaddr, WRITE, user=True) != page.addr:
                return False
    except (Fault, VmExit):
        return False
    count_out(enclave, inside.entry_epoch)
    inside.entry_epoch = count_in(enclave)
    cpu.tlb.clear()
    return True


exit_in_python = try_virtual_exit
if compiled.speedups is not None:
    compiled.speedups.give("virtual_exit", exit_in_python)
    try_virtual_exit = compiled.speedups.try_virtual_exit
