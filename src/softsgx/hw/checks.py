"""What several leaves check in the same words: SECINFO, XFRM, SVNs.

Pure: nothing here raises a fault or changes anything; the leaf that asks decides what follows.

Source:
    SDM vol. 3D, "ECREATE", "EADD", "EACCEPT", "EGETKEY", Operation.
"""

from __future__ import annotations

from softsgx.arch import PAGE_BYTES, SecInfo, SecInfoFlags, Xfrm
from softsgx.hw.processor import LogicalProcessor
from softsgx.hw.secs import ResidentSecs

__all__ = [
    "child_present",
    "secinfo_reserved_zero",
    "shadow_stack_token",
    "svn_beyond",
    "touches_range_end",
    "xfrm_legal",
]

_SECINFO_BITS = int(SecInfoFlags.RWX | SecInfoFlags.TYPE_MASK)
_SECINFO_RESERVED = bytes(56)
_AVX512 = Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM


def secinfo_reserved_zero(secinfo: SecInfo, more: int = 0) -> bool:
    """Return whether reserved bits and bytes of SECINFO are zero.

    Args:
        secinfo: what to look at.
        more: bits that are meaningful to this leaf beside R, W, X and the type.  Modelled:
            PENDING, MODIFIED and PR are reserved wherever the manual gives them no meaning.
    """
    return (
        secinfo.flags & ~(_SECINFO_BITS | int(more)) == 0 and secinfo.reserved == _SECINFO_RESERVED
    )


def xfrm_legal(xfrm: int, supported: int, *, xsave_enabled: bool) -> bool:
    """Return whether XCR0 would take ``xfrm``.

    Args:
        xfrm: SECS.ATTRIBUTES.XFRM.
        supported: XCR0 bits that the processor has.
        xsave_enabled: CR4.OSXSAVE; without it only x87 and SSE exist.

    Source:
        SDM vol. 1, "Enabling the XSAVE Feature Set and XSAVE-Enabled Features".
    """
    legacy = Xfrm.X87 | Xfrm.SSE
    if xfrm & legacy != legacy:
        return False
    if xfrm == legacy:
        return True
    if not xsave_enabled or xfrm & ~int(supported):
        return False
    if xfrm & _AVX512 and (xfrm & _AVX512 != _AVX512 or not xfrm & Xfrm.AVX):
        return False
    pairs = (Xfrm.BNDREGS | Xfrm.BNDCSR, Xfrm.TILECFG | Xfrm.TILEDATA)
    return all(xfrm & pair in (0, pair) for pair in pairs)


def child_present(cpu: LogicalProcessor, enclave: ResidentSecs) -> bool:
    """Return whether a SECS has children that keep it in the EPC.

    Those are EPC-resident pages; in a guest with EPC virtualization also the ones that VIRTCHILDCNT
    counts.

    Source:
        SDM vol. 3D, "EWB" and "EREMOVE", Operation: the case PT_SECS.
    """
    return bool(enclave.children or (cpu.epc_virtualization and enclave.virt_children))


def svn_beyond(requested: bytes, current: bytes) -> bool:
    """Return whether a CPUSVN is beyond the current one.

    Modelled: a CPUSVN is no ordered number; one is beyond another if any component is greater.
    """
    return any(mine > theirs for mine, theirs in zip(requested, current, strict=True))


def touches_range_end(enclave: ResidentSecs, linaddr: int) -> bool:
    """Return whether ``linaddr`` is the first or last page of the enclave's linear range."""
    return linaddr in (enclave.base, enclave.base + enclave.size - PAGE_BYTES)


def shadow_stack_token(enclave: ResidentSecs, linaddr: int) -> bytes:
    """Return the last 8 bytes of an SS_FIRST page: its end, with MODE64BIT in bit 0."""
    return (linaddr + PAGE_BYTES | enclave.mode64).to_bytes(8, "little")
