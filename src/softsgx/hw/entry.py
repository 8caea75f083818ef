"""What EENTER, ERESUME, EDECCSSA and the exits have in common: TCS, SSA frames, saved state.

Each function is a stage of the manual's Operation sections; the leaves give their order.  TCS and
SSA bytes are in the machine's page store; nothing here keeps a copy.

Counting: a processor that enters holds the lock of the TCS and counts itself in before it checks
any other page; it counts itself out again when the entry faults.  So either EREMOVE sees the
processor, or the processor sees VALID=0.  And when the processor finds a page unblocked, the ETRACK
after that page's EBLOCK counts the processor among those that must leave before EWB.

Source:
    SDM vol. 3D, "EENTER", "ERESUME", "EEXIT", "EDECCSSA", Operation.
"""

from __future__ import annotations

import struct
from types import TracebackType
from typing import NamedTuple, Self

from softsgx.arch import (
    GPRSGX_BYTES,
    PAGE_BYTES,
    TCS_ACTIVE,
    TCS_INACTIVE,
    AttributesFlags,
    GprSgx,
    PageType,
    Tcs,
    TcsFlags,
    Xfrm,
    is_canonical,
    page_of,
    split_pages,
)
from softsgx.hw import cet
from softsgx.hw.access import check_access, epc_operand, epc_refusal
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import EnclaveMode, LogicalProcessor, SavedOutsideState, Segment, SsaFrame
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.space import READ, WRITE
from softsgx.hw.tracking import count_in, count_out

__all__ = [
    "GPR_OFFSET",
    "Entry",
    "TcsHead",
    "check_segments",
    "check_tcs",
    "check_thread_segments",
    "enter_enclave_mode",
    "find_frame",
    "leave_enclave_mode",
    "read_aep",
    "read_frame",
    "read_tcs",
    "ssa_address",
    "start_at_entry_point",
    "write_cssa",
    "write_frame",
]

GPR_OFFSET = PAGE_BYTES - GPRSGX_BYTES
"""Where GPRSGX is in the last page of a frame."""

ENCLU_BYTES = 3

# Plain integers: arithmetic on enums is ten times slower.
_DBGOPTIN, _AEXNOTIFY = int(TcsFlags.DBGOPTIN), int(TcsFlags.AEXNOTIFY)
_FLAGS_RESERVED = ~(_DBGOPTIN | _AEXNOTIFY)
_ENCLAVE_NOTIFIES = int(AttributesFlags.AEXNOTIFY)
_ACTIVE, _INACTIVE = (state.to_bytes(8, "little") for state in (TCS_ACTIVE, TCS_INACTIVE))
_ENCLAVE_SELECTOR = 0x0B
_ENCLAVE_SEGMENT = Segment(selector=_ENCLAVE_SELECTOR)
_RIGHTS = READ | WRITE
_LEGACY = int(Xfrm.X87 | Xfrm.SSE)
_TF = 1 << 8
_MODE32 = 0xFFFF_FFFF

_QWORD = struct.Struct("<Q")
_TCS = struct.Struct("<QQQIIQQQQIIQQ")
_TWO_QWORDS = struct.Struct("<QQ")
_DWORD = struct.Struct("<I")
_AEP = Tcs.OFFSETS["aep"]
_URSP = GPR_OFFSET + GprSgx.OFFSETS["ursp"]


class TcsHead(NamedTuple):
    """The fields of a TCS, :class:`~softsgx.arch.Tcs` without its reserved bytes."""

    state: int
    flags: int
    ossa: int
    cssa: int
    nssa: int
    oentry: int
    aep: int
    ofs_base: int
    ogs_base: int
    fs_limit: int
    gs_limit: int
    ocetssa: int
    prevssp: int


assert _TCS.size == Tcs.OFFSETS["reserved"], "TcsHead is not the head of a TCS"


class Entry:
    """A processor on its way into an enclave, whose TCS page it has locked.

    Counts the processor in.  A context manager: when a fault ends the entry, the processor is
    counted out and the TCS is inactive again.

    Args:
        cpu: the processor, outside any enclave.
        tcs: the page at the TCS operand.
        linaddr: that operand.

    Attributes:
        secs: the SECS page of the TCS.
        enclave: its enclave.
        entry_epoch: the epoch in which the processor was counted in.

    Raises:
        PageFault: the page is not in use, or belongs to no enclave.
    """

    __slots__ = ("_claimed", "_cpu", "_tcs", "enclave", "entry_epoch", "secs")

    def __init__(self, cpu: LogicalProcessor, tcs: EpcPage, linaddr: int) -> None:
        if not tcs.valid or tcs.secs is None:
            raise epc_refusal(linaddr, READ)
        self._cpu, self._tcs, self._claimed = cpu, tcs, False
        self.secs, self.enclave = tcs.secs, tcs.owner
        with cpu.hw.latch:
            self.entry_epoch = count_in(self.enclave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            return
        if self._claimed:
            _release_tcs(self._cpu, self._tcs)
        with self._cpu.hw.latch:
            count_out(self.enclave, self.entry_epoch)

    def claim_tcs(self) -> None:
        """Make the TCS active: one processor at a time may use it.

        Raises:
            GeneralProtection: it is active already.
        """
        store = self._cpu.hw.store
        with self._cpu.hw.latch:
            if store.read(self._tcs, 0, 8) == _ACTIVE:
                raise GeneralProtection
            store.write(self._tcs, 0, _ACTIVE)
        self._claimed = True


# --- checks, in the manual's order --------------------------------------------------------------


def check_segments(cpu: LogicalProcessor) -> None:
    """Check that 32-bit segments are flat: DS expand-up, bases 0, SS.B set.

    Raises:
        GeneralProtection: they are not.
    """
    if cpu.mode64:
        return
    ds = cpu.ds
    if not ds.usable or ds.expand_down or cpu.cs.base or ds.base:
        raise GeneralProtection
    if (cpu.es.usable and cpu.es.base) or (cpu.ss.usable and (cpu.ss.base or not cpu.ss.big)):
        raise GeneralProtection


def check_tcs(cpu: LogicalProcessor, page: EpcPage, linaddr: int, enclave: ResidentSecs) -> TcsHead:
    """Check the TCS and whether this processor, as it is set up, may run the enclave.

    Raises:
        PageFault: the page is blocked, pending, modified, no TCS, or elsewhere in the enclave.
        GeneralProtection: anything else.
    """
    if page.blocked or page.linaddr != linaddr or page.pt is not PageType.TCS:
        raise epc_refusal(linaddr, READ)
    if page.pending or page.modified:
        raise epc_refusal(linaddr, READ)
    tcs = read_tcs(cpu, page)
    if (tcs.ossa | tcs.ofs_base | tcs.ogs_base) % PAGE_BYTES:
        raise GeneralProtection
    if tcs.flags & _FLAGS_RESERVED:
        raise GeneralProtection
    if not enclave.initialized or cpu.mode64 != enclave.mode64:
        raise GeneralProtection
    # Deviation: which fault it is on hardware is not published.
    if enclave.machine_check:
        raise epc_refusal(linaddr, READ)
    if not cpu.cr4_osfxsr:
        raise GeneralProtection
    # Without XSAVE only x87 and SSE exist; with it the enclave runs on a subset of XCR0.
    if enclave.xfrm & ~(cpu.regs.xcr0 if cpu.cr4_osxsave else _LEGACY):
        raise GeneralProtection
    notify = bool(enclave.flags & _ENCLAVE_NOTIFIES)
    if not tcs.flags & _DBGOPTIN and bool(tcs.flags & _AEXNOTIFY) != notify:
        raise GeneralProtection
    return tcs


def ssa_address(enclave: ResidentSecs, tcs: TcsHead, index: int) -> int:
    """Return the linear address of SSA frame ``index`` of a thread."""
    return enclave.base + tcs.ossa + PAGE_BYTES * enclave.ssa_frame_size * index


def find_frame(cpu: LogicalProcessor, secs: EpcPage, enclave: ResidentSecs, ssa: int) -> SsaFrame:
    """Check the pages of the SSA frame at ``ssa`` and return them; CET is not looked at.

    Raises:
        PageFault: at the first page of the XSAVE area, or at GPRSGX, that is not accessible:
            ordinary, from paging; or with the SGX bit.
        GeneralProtection: GPRSGX of a 32-bit enclave is beyond DS.
    """
    size = cpu.hw.xsave.plan(enclave.xfrm).size
    xsave = [_ssa_page(cpu, secs, at) for at in range(ssa, ssa + size, PAGE_BYTES)]
    gpr_address = ssa + PAGE_BYTES * enclave.ssa_frame_size - GPRSGX_BYTES
    if page_of(gpr_address) == xsave[-1].linaddr:
        gpr = xsave[-1]
    else:
        gpr = _ssa_page(cpu, secs, gpr_address)
    if not cpu.mode64 and gpr_address + GPRSGX_BYTES - 1 > cpu.ds.limit:
        raise GeneralProtection
    return SsaFrame(gpr, tuple(xsave))


def _ssa_page(cpu: LogicalProcessor, secs: EpcPage, linaddr: int) -> EpcPage:
    # Paging has no page that can be written but not read, so one walk asks for both.
    page = epc_operand(cpu, linaddr, WRITE)
    fault = check_access(secs, page, linaddr, WRITE)
    if fault is not None:
        raise fault
    if page.rwx & _RIGHTS != _RIGHTS:
        raise epc_refusal(linaddr, READ)
    return page


def check_thread_segments(
    cpu: LogicalProcessor, tcs: TcsHead, target: int, fs_base: int, gs_base: int
) -> None:
    """Check where the thread will start and which FS and GS it will have.

    Raises:
        GeneralProtection: in 64-bit mode, not canonical; in 32-bit mode, beyond CS or DS.
    """
    if cpu.mode64:
        lower_half = not (target | fs_base | gs_base) >> 47  # all three, in one look
        if lower_half or all(map(is_canonical, (target, fs_base, gs_base))):
            return
        raise GeneralProtection
    if target > cpu.cs.limit:
        raise GeneralProtection
    for base, limit in ((fs_base, tcs.fs_limit), (gs_base, tcs.gs_limit)):
        end = base + limit
        # A segment that wraps around needs all of DS.
        if end > _MODE32 and cpu.ds.limit < _MODE32:
            raise GeneralProtection
        if end <= _MODE32 and end > cpu.ds.limit:
            raise GeneralProtection


# --- changes of state ---------------------------------------------------------------------------


def enter_enclave_mode(
    cpu: LogicalProcessor,
    page: EpcPage,
    admitted: Entry,
    tcs: TcsHead,
    frame: SsaFrame,
    slot: tuple[EpcPage, int] | None,
    aep: int,
    fs_base: int,
    gs_base: int,
) -> None:
    """Switch to enclave mode: save the outside's state, cache the frame, flush the TLB.

    The TCS is claimed; registers that the two entering leaves treat differently stay as they are.

    Args:
        cpu: the processor.
        page: the TCS.
        admitted: the entry that is about to succeed.
        tcs: its fields.
        frame: where an asynchronous exit will save.
        slot: the CET save slot that goes with it.
        aep: asynchronous exit pointer, kept in the TCS.
        fs_base: FS base of the thread.
        gs_base: GS base of the thread.
    """
    hw, regs = cpu.hw, cpu.regs
    secs, enclave = admitted.secs, admitted.enclave
    opted_in = tcs.flags & _DBGOPTIN
    outside = SavedOutsideState(
        cpu.fs,
        regs.fs_base,
        cpu.gs,
        regs.gs_base,
        regs.xcr0,
        None if opted_in else regs.rflags & _TF,
        cpu.ssp,
        cpu.u_cet,
    )
    hw.store.write(page, _AEP, _QWORD.pack(aep))
    if not opted_in:
        regs.rflags &= ~_TF
    if cpu.cr4_osxsave:
        regs.xcr0 = enclave.xfrm
    regs.fs_base, regs.gs_base = fs_base, gs_base
    if cpu.mode64:
        cpu.fs = cpu.gs = _ENCLAVE_SEGMENT
    else:
        cpu.fs = Segment(limit=tcs.fs_limit, selector=_ENCLAVE_SELECTOR)
        cpu.gs = Segment(limit=tcs.gs_limit, selector=_ENCLAVE_SELECTOR)
    cpu.inside = EnclaveMode(
        secs, enclave, page, page.linaddr, admitted.entry_epoch, frame, slot, outside
    )
    cpu.flush_tlb()


def start_at_entry_point(
    cpu: LogicalProcessor, enclave: ResidentSecs, tcs: TcsHead, frame: SsaFrame, target: int
) -> None:
    """Begin at the entry point, as EENTER does and ERESUME after a notified exit."""
    regs = cpu.regs
    mask = -1 if cpu.mode64 else _MODE32
    # The end of the frame, where an asynchronous exit will find the outside's stack.
    cpu.hw.store.write(frame.gpr, _URSP, _TWO_QWORDS.pack(regs.rsp, regs.rbp))
    regs.rax, regs.rcx, regs.rip = tcs.cssa, regs.rip + ENCLU_BYTES & mask, target
    cet.start(cpu, enclave, tcs.prevssp)


def leave_enclave_mode(cpu: LogicalProcessor) -> None:
    """Leave enclave mode: restore the outside's state, free the TCS, count out, flush the TLB."""
    inside, regs = cpu.inside, cpu.regs
    assert inside is not None, "an exit from nowhere"
    outside = inside.outside
    cpu.fs, cpu.gs = outside.fs, outside.gs
    regs.fs_base, regs.gs_base = outside.fs_base, outside.gs_base
    if cpu.cr4_osxsave:
        regs.xcr0 = outside.xcr0
    if outside.tf is not None:
        regs.rflags = regs.rflags & ~_TF | outside.tf
    if cpu.cr4_cet:
        cpu.ssp, cpu.u_cet = outside.ssp, outside.u_cet
    cpu.flush_tlb()
    _release_tcs(cpu, inside.tcs)
    cpu.inside = None
    # Last: the enclave's pages may leave once the processor is counted out.
    with cpu.hw.latch:
        count_out(inside.enclave, inside.entry_epoch)


def _release_tcs(cpu: LogicalProcessor, page: EpcPage) -> None:
    cpu.hw.store.write(page, 0, _INACTIVE)


# --- bytes of TCS and frame ---------------------------------------------------------------------


def read_tcs(cpu: LogicalProcessor, page: EpcPage) -> TcsHead:
    """Return the fields of a TCS."""
    return TcsHead._make(_TCS.unpack(cpu.hw.store.read(page, 0, _TCS.size)))


def read_aep(cpu: LogicalProcessor, page: EpcPage) -> int:
    """Return TCS.AEP."""
    (aep,) = _QWORD.unpack(cpu.hw.store.read(page, _AEP, 8))
    return int(aep)


def read_frame(cpu: LogicalProcessor, frame: SsaFrame, size: int) -> bytes:
    """Return the first ``size`` bytes of a frame's XSAVE area."""
    store = cpu.hw.store
    return b"".join(
        store.read(page, 0, min(PAGE_BYTES, size - at))
        for page, at in zip(frame.xsave, range(0, size, PAGE_BYTES), strict=True)
    )


def write_frame(cpu: LogicalProcessor, frame: SsaFrame, offset: int, data: bytes) -> None:
    """Write into a frame's XSAVE area, through the cached pages: nothing is checked."""
    store = cpu.hw.store
    for at, length in split_pages(offset, len(data)):
        part = data[at - offset : at - offset + length]
        store.write(frame.xsave[at // PAGE_BYTES], at % PAGE_BYTES, part)


def write_cssa(cpu: LogicalProcessor, page: EpcPage, cssa: int) -> None:
    """Set TCS.CSSA."""
    cpu.hw.store.write(page, Tcs.OFFSETS["cssa"], _DWORD.pack(cssa))
