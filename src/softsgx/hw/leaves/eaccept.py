"""ENCLU[EACCEPT]: the enclave accepts what the OS has changed of one of its pages."""

from __future__ import annotations

from softsgx.arch import (
    CHILD_TYPES,
    PAGE_BYTES,
    AttributesFlags,
    PageType,
    SecInfo,
    SecInfoFlags,
    Status,
    Tcs,
    TcsFlags,
    tcs_ok,
)
from softsgx.hw.access import enclave_operand, epc_operand, epc_refusal
from softsgx.hw.checks import secinfo_reserved_zero
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs
from softsgx.hw.space import READ
from softsgx.hw.tracking import is_tracked

__all__ = ["STATE_BITS", "eaccept"]

STATE_BITS = int(SecInfoFlags.PENDING | SecInfoFlags.MODIFIED | SecInfoFlags.PR)
"""SECINFO flags that EACCEPT, EACCEPTCOPY and EMODPE take beside R, W, X and the type."""

_PENDING, _MODIFIED = int(SecInfoFlags.PENDING), int(SecInfoFlags.MODIFIED)
_NEW_OR_RESTRICTED = int(SecInfoFlags.PR | SecInfoFlags.PENDING)

# PR is not compared: EMODPR may have been repeated.
_COMPARED = int(
    SecInfoFlags.RWX | SecInfoFlags.PENDING | SecInfoFlags.MODIFIED | SecInfoFlags.TYPE_MASK
)


def eaccept(cpu: LogicalProcessor, rbx: int, rcx: int) -> Status:
    """Accept the pending or modified state of the enclave's page at ``rcx``.

    Args:
        cpu: the processor, inside the enclave.
        rbx: SECINFO the enclave expects, 64-byte aligned, in its own memory.
        rcx: the page, 4096-byte aligned, in ELRANGE.

    Returns:
        ``SUCCESS``: PENDING, MODIFIED and PR are clear.  Unchanged otherwise:
        ``PAGE_ATTRIBUTES_MISMATCH`` (the page is not as SECINFO says), ``NOT_TRACKED`` (a
        processor, this one included, may hold an older translation).

    Raises:
        GeneralProtection: an operand is misaligned or outside ELRANGE, SECINFO names a
            state that no page has, another leaf works on the page, or a page that becomes a TCS is
            none.
        PageFault: SECINFO cannot be read, or ``rcx`` is no page of this enclave or blocked.

    Source:
        SDM vol. 3D, "EACCEPT", Operation.  The comparison of SECINFO's address is printed with a
        mask that no page would pass; the page's address is meant.
    """
    hw, inside = cpu.hw, cpu.inside
    if inside is None:
        raise GeneralProtection
    enclave = inside.enclave

    # Operands
    if rbx % SecInfo.ALIGN or not enclave.covers(rbx):
        raise GeneralProtection
    wanted = enclave_operand(cpu, rbx, READ)
    secinfo = SecInfo.unpack(hw.store.read(wanted, rbx % PAGE_BYTES, SecInfo.SIZE))
    if (
        not secinfo_reserved_zero(secinfo, STATE_BITS)
        or rcx % PAGE_BYTES
        or not enclave.covers(rcx)
    ):
        raise GeneralProtection
    page = epc_operand(cpu, rcx, READ)
    if not _legal(secinfo):
        raise GeneralProtection

    # Checks before the locks
    if not _is_own(page, inside.secs) or page.blocked or page.pt not in CHILD_TYPES:
        raise epc_refusal(rcx, READ)

    with hw.leaf_locks() as locks:
        # Locks
        if not locks.shared(page):
            raise GeneralProtection
        if not locks.modify(page):
            raise GeneralProtection
        hw.point("EACCEPT")

        # Checks
        if not _is_own(page, inside.secs):
            raise epc_refusal(rcx, READ)
        if page.linaddr != rcx or (page.secinfo_flags() ^ secinfo.flags) & _COMPARED:
            return Status.PAGE_ATTRIBUTES_MISMATCH
        with hw.latch:
            # A page that is merely new never had a translation that could be stale.
            changed = page.pr or page.modified
            if changed and not is_tracked(page, enclave):
                return Status.NOT_TRACKED
        if page.pt is PageType.TCS and not _becomes_tcs(cpu, page, enclave):
            raise GeneralProtection

        # Commit
        page.pending = page.modified = page.pr = False
    return Status.SUCCESS


def _is_own(page: EpcPage, secs: EpcPage) -> bool:
    return page.valid and page.secs is secs


def _legal(secinfo: SecInfo) -> bool:
    """Return whether EACCEPT takes this page type with these state flags."""
    state = secinfo.flags & STATE_BITS
    match secinfo.page_type:
        case PageType.REG:
            return bool(state & _NEW_OR_RESTRICTED) and not state & _MODIFIED
        case PageType.TCS | PageType.TRIM:
            return state == _MODIFIED
        case PageType.SS_FIRST | PageType.SS_REST:
            return state == _PENDING
        case _:
            return False


def _becomes_tcs(cpu: LogicalProcessor, page: EpcPage, enclave: ResidentSecs) -> bool:
    """Return whether a page that EMODT retyped holds a TCS that no processor has entered.

    Deviation: the manual refuses CSSA >= NSSA, and so a page of zeros.  Intel's tests of its memory
    manager accept such a page and demand success, so processors seem to take it (inferred, not
    measured).  No thread can enter it.
    """
    tcs = Tcs.unpack(cpu.hw.store.read(page, 0, PAGE_BYTES))
    cet = bool(enclave.flags & AttributesFlags.CET)
    return (
        tcs_ok(tcs, mode64=enclave.mode64, cet=cet)
        and not tcs.flags & TcsFlags.DBGOPTIN
        and (tcs.cssa < tcs.nssa or not tcs.cssa)
        and not tcs.aep
        and not tcs.state
    )
