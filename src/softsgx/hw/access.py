"""Memory accesses of a logical processor: what a TLB miss checks, and what a hit does not.

A translation is made at a miss and kept until the TLB is flushed, which every enclave entry and
exit does.  A kind of access (read, write, fetch) that was granted once is not checked again: a
page that is then blocked, restricted or evicted stays usable through it.  ETRACK and EWB exist for
this case.

:func:`check_access` is the EPCM's verdict alone, for engines that run on a real TLB.

Source:
    SDM vol. 3D, "Enclave Access Control and Data Structures", "Access-control for accesses that
    originate from non-SGX instructions", "#PF error code".
"""

from __future__ import annotations

from softsgx.arch import (
    PAGE_BYTES,
    SHADOW_STACK_TYPES,
    PageType,
    Pfec,
    page_of,
    split_pages,
)
from softsgx.hw.epcm import EpcPage
from softsgx.hw.faults import GeneralProtection, PageFault, VmExit
from softsgx.hw.processor import LogicalProcessor, Translation
from softsgx.hw.space import EXECUTE, READ, WRITE

__all__ = [
    "check_access",
    "enclave_operand",
    "epc_operand",
    "epc_refusal",
    "fetch",
    "load",
    "store",
]

# An enclave runs at CPL 3, and so does every ENCLU.
_REFUSAL = int(Pfec.P | Pfec.SGX | Pfec.U)
_ACCESS_BITS = {READ: 0, WRITE: int(Pfec.W), EXECUTE: int(Pfec.I)}


def epc_refusal(linaddr: int, access: int) -> PageFault:
    """Return the #PF of a user-mode access that paging allows and the EPC or EPCM refuses."""
    return PageFault(linaddr, _REFUSAL | _ACCESS_BITS[access])


def check_access(
    secs: EpcPage, page: EpcPage | None, linaddr: int, access: int, *, shadow_stack: bool = False
) -> PageFault | None:
    """Check one direct enclave access that paging has allowed; nothing changes.

    Args:
        secs: CR_ACTIVE_SECS of the processor.
        page: the EPC page that ``linaddr`` translates to; ``None`` for ordinary memory.
        linaddr: the address accessed, inside ELRANGE.
        access: ``READ``, ``WRITE`` or ``EXECUTE``.
        shadow_stack: it is a shadow-stack access, which needs a page of type SS_*.

    Returns:
        ``None`` when it is allowed; otherwise the #PF, with the SGX bit and the exact address.

    Source:
        SDM vol. 3D, "Enclave Page Cache Map": the conditions of a direct enclave access.
    """
    if (
        page is not None
        and page.valid
        and not (page.blocked or page.pending or page.modified)
        and (page.pt in SHADOW_STACK_TYPES if shadow_stack else page.pt is PageType.REG)
        and page.secs is secs
        and page.linaddr == linaddr & -PAGE_BYTES
        and page.rwx & access
    ):
        return None
    fault = epc_refusal(linaddr, access)
    if shadow_stack:
        fault.code |= Pfec.SS
    return fault


# --- operands of ENCLU leaves ------------------------------------------------------------------


def epc_operand(
    cpu: LogicalProcessor, linaddr: int, access: int, *, stores: bool = False
) -> EpcPage:
    """Return the EPC page of an operand of an ENCLU leaf: "resolves within an EPC".

    Args:
        cpu: the processor.
        linaddr: the operand.
        access: what the leaf's own refusals report.
        stores: the leaf also stores there, which paging must allow.

    Raises:
        GeneralProtection: ``linaddr`` is not canonical.
        PageFault: ordinary, from paging; or with the SGX bit, when it is no EPC.
    """
    physical = cpu.translate(linaddr, WRITE if stores else access, user=True)
    page = cpu.hw.pages.get(physical & -PAGE_BYTES)  # every entry comes here several times
    if page is None:
        page = cpu.hw.page_at(physical)
        if page is None:
            raise epc_refusal(linaddr, access)
    return page


def enclave_operand(cpu: LogicalProcessor, linaddr: int, access: int) -> EpcPage:
    """Return the page of the running enclave that holds an operand of an ENCLU leaf.

    The leaf itself checks first that ``linaddr`` is aligned and inside ELRANGE.  The leaf
    does not use the TLB: it checks the EPCM each time.

    Args:
        cpu: the processor, inside an enclave.
        linaddr: the operand; it must not cross a page.
        access: ``READ`` or ``WRITE``.

    Raises:
        GeneralProtection: ``linaddr`` is not canonical.
        PageFault: at ``linaddr``: ordinary, from paging; or with the SGX bit, when it is no
            accessible REG page of this enclave at this address with the right ``access``.

    Source:
        SDM vol. 3D, Operation of EREPORT, EGETKEY, EACCEPT: the checks of each operand's page.
    """
    assert cpu.inside is not None, "an enclave operand outside an enclave"
    page = epc_operand(cpu, linaddr, access)
    fault = check_access(cpu.inside.secs, page, linaddr, access)
    if fault is not None:
        raise fault
    return page


# --- accesses of code ---------------------------------------------------------------------------


def load(cpu: LogicalProcessor, linaddr: int, size: int) -> bytes:
    """Return ``size`` bytes at ``linaddr``, as an instruction of ``cpu`` would see them.

    A range that crosses pages, or the end of the enclave, is checked piece by piece.

    Raises:
        GeneralProtection: an address is not canonical.
        PageFault: the first byte's address that cannot be read.
    """
    try:
        return _load(cpu, linaddr, size)
    except VmExit as exit:
        return cpu.handle_vm_exit(exit, lambda: _load(cpu, linaddr, size))


def _load(cpu: LogicalProcessor, linaddr: int, size: int) -> bytes:
    with cpu.busy:
        pieces = [
            (_translate(cpu, at, READ), at % PAGE_BYTES, length)
            for at, length in split_pages(linaddr, size)
        ]
        return b"".join(_read(cpu, *piece) for piece in pieces)


def store(cpu: LogicalProcessor, linaddr: int, data: bytes) -> None:
    """Store ``data`` at ``linaddr``, all of it or, when any of it faults, nothing.

    Raises:
        GeneralProtection: an address is not canonical.
        PageFault: the first byte's address that cannot be written.
    """
    try:
        _store(cpu, linaddr, data)
    except VmExit as exit:
        cpu.handle_vm_exit(exit, lambda: _store(cpu, linaddr, data))


def _store(cpu: LogicalProcessor, linaddr: int, data: bytes) -> None:
    with cpu.busy:
        pieces = [
            (_translate(cpu, at, WRITE), at % PAGE_BYTES, length)
            for at, length in split_pages(linaddr, len(data))
        ]
        done = 0
        for translation, offset, length in pieces:
            part = data[done : done + length]
            done += length
            if translation.page is not None:
                cpu.hw.store.write(translation.page, offset, part)
            elif not translation.abort:
                cpu.hw.ram.write(translation.physical + offset, part)


def fetch(cpu: LogicalProcessor, linaddr: int, size: int) -> bytes:
    """Return ``size`` bytes of code at ``linaddr``; outside an enclave, EPC reads as ones.

    Raises:
        GeneralProtection: an address is not canonical; or, inside an enclave, any byte is outside
            ELRANGE and paging allows the access.
        PageFault: the first byte's address that cannot be fetched.
    """
    try:
        return _fetch(cpu, linaddr, size)
    except VmExit as exit:
        return cpu.handle_vm_exit(exit, lambda: _fetch(cpu, linaddr, size))


def _fetch(cpu: LogicalProcessor, linaddr: int, size: int) -> bytes:
    with cpu.busy:
        pieces = split_pages(linaddr, size)
        inside = cpu.inside
        if inside is not None and not all(inside.enclave.covers(at) for at, _length in pieces):
            for at, _length in pieces:
                cpu.translate(at, EXECUTE, user=True)
            raise GeneralProtection
        return b"".join(
            _read(cpu, _translate(cpu, at, EXECUTE), at % PAGE_BYTES, length)
            for at, length in pieces
        )


def _read(cpu: LogicalProcessor, translation: Translation, offset: int, size: int) -> bytes:
    if translation.page is not None:
        return cpu.hw.store.read(translation.page, offset, size)
    if translation.abort:
        return b"\xff" * size
    return cpu.hw.ram.read(translation.physical + offset, size)


def _translate(cpu: LogicalProcessor, linaddr: int, access: int) -> Translation:
    """Return the translation for one kind of access, from the TLB or made now."""
    known = cpu.tlb.get(linaddr & -PAGE_BYTES)
    if known is not None and known.rights & access:
        return known
    return _miss(cpu, linaddr, access, known)


def _miss(
    cpu: LogicalProcessor, linaddr: int, access: int, known: Translation | None
) -> Translation:
    """Walk and check; the page may be known for other kinds of access already."""
    inside = cpu.inside
    user = inside is not None or cpu.cpl == 3
    physical = page_of(cpu.translate(linaddr, access, user=user))
    page = cpu.hw.page_at(physical)

    if inside is None or not inside.enclave.covers(linaddr):
        # Not a direct enclave access: EPC looks like the abort page.
        made = Translation(physical, access, abort=page is not None)
    else:
        if known is not None and known.page is page and not known.epcm_rights & access:
            # The entry was filled before EMODPE extended the page's rights: one fault, whose
            # asynchronous exit flushes it.
            del cpu.tlb[linaddr & -PAGE_BYTES]
            raise epc_refusal(linaddr, access)
        fault = check_access(inside.secs, page, linaddr, access)
        if fault is not None:
            raise fault
        assert page is not None, "the check let ordinary memory pass"
        made = Translation(physical, access, page=page, epcm_rights=page.rwx)

    if known is not None and known.physical == made.physical:
        # Rights accumulate: a TLB holds each kind on its own, and a miss removes none.
        known.rights |= access
        return known
    cpu.tlb[linaddr & -PAGE_BYTES] = made
    return made
