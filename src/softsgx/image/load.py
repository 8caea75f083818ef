"""The SECS that a loader makes for a plan on a given machine.

MRENCLAVE does not cover ATTRIBUTES and MISCSELECT, so a loader may choose them differently on each
machine.  The masks of the SIGSTRUCT limit the choice.

Source:
    Intel SGX SDK, psw/urts/enclave_creator_hw_com.cpp; SDM vol. 3D, "EINIT".
"""

from __future__ import annotations

from dataclasses import dataclass

from softsgx.arch import (
    EXINFO_BYTES,
    GPRSGX_BYTES,
    PAGE_BYTES,
    XSAVE_LEGACY_BYTES,
    Attributes,
    AttributesFlags,
    MiscSelect,
    Secs,
    Xfrm,
)
from softsgx.errors import SoftSgxError
from softsgx.image.enclave import EnclaveImage
from softsgx.image.verify import check_against

__all__ = ["SecsLimits", "choose_secs", "ssa_frame_pages", "xsave_bytes"]

_LEGACY_STATES = Xfrm.X87 | Xfrm.SSE
_AMX_STATES = Xfrm.TILECFG | Xfrm.TILEDATA


_XSAVE_ENDS = (  # where the standard layout's components end, in bytes
    (Xfrm.AVX, 832),
    (Xfrm.BNDREGS | Xfrm.BNDCSR, 1088),
    (Xfrm.OPMASK | Xfrm.ZMM_HI256 | Xfrm.HI16_ZMM, 2688),
    (Xfrm.PKRU, 2752),
    (_AMX_STATES, 11008),
)


def xsave_bytes(xfrm: int) -> int:
    """Return the size of an XSAVE area of the standard layout for these XFRM bits."""
    return max((end for bits, end in _XSAVE_ENDS if xfrm & bits), default=XSAVE_LEGACY_BYTES)


def ssa_frame_pages(xfrm: int, miscselect: int = 0) -> int:
    """Return the least SSAFRAMESIZE for these XFRM and MISCSELECT bits.

    Source:
        SDM vol. 3D, "State Save Area (SSA) Frame"; component sizes as CPUID.0DH reports them.
    """
    misc = EXINFO_BYTES if miscselect & MiscSelect.EXINFO else 0
    return -(-(xsave_bytes(xfrm) + misc + GPRSGX_BYTES) // PAGE_BYTES)


@dataclass(frozen=True)
class SecsLimits:
    """The attributes that a machine allows an enclave.

    Attributes:
        flags: ATTRIBUTES.FLAGS, CPUID.12H.1:EBX:EAX.
        xfrm: ATTRIBUTES.XFRM, CPUID.12H.1:EDX:ECX and XCR0.
        miscselect: CPUID.12H.0:EBX.
    """

    flags: int = (
        AttributesFlags.DEBUG.value
        | AttributesFlags.MODE64BIT.value
        | AttributesFlags.PROVISIONKEY.value
        | AttributesFlags.EINITTOKENKEY.value
        | AttributesFlags.KSS.value
    )
    xfrm: int = _LEGACY_STATES.value
    miscselect: int = 1


def choose_secs(
    image: EnclaveImage,
    *,
    base: int | None = None,
    debug: bool | None = None,
    limits: SecsLimits | None = None,
) -> Secs:
    """Return the SECS to build ``image`` with.

    Args:
        image: the enclave.
        base: its BASEADDR, a multiple of the size; the plan's base has priority if it has one.
        debug: whether to set ATTRIBUTES.DEBUG; by default as in the SIGSTRUCT.
        limits: the attributes that the machine allows.

    Raises:
        SoftSgxError: the SIGSTRUCT forbids attributes of this machine, or ``debug``.
    """
    limits = limits or SecsLimits()
    plan, sigstruct = image.plan, image.sigstruct
    if sigstruct is not None:
        flags, xfrm = image.attributes or (
            sigstruct.attributes.flags,
            sigstruct.attributes.xfrm,
        )
        miscselect = sigstruct.miscselect & limits.miscselect
    else:
        flags, xfrm, miscselect = AttributesFlags.MODE64BIT.value, _LEGACY_STATES.value, 0
    if debug is not None:
        flags &= ~AttributesFlags.DEBUG.value
        flags |= AttributesFlags.DEBUG.value if debug else 0
    xfrm &= limits.xfrm
    if xfrm & _AMX_STATES not in (0, _AMX_STATES):
        xfrm &= ~_AMX_STATES.value
    at = base if plan.base is None else plan.base
    secs = Secs(
        size=plan.size,
        base=at or 0,
        ssa_frame_size=plan.ssa_frame_size,
        miscselect=miscselect,
        attributes=Attributes(flags=flags & limits.flags, xfrm=xfrm | _LEGACY_STATES.value),
    )
    if secs.base % plan.size:
        raise SoftSgxError(
            f"{image.name}: base {secs.base:#x} is not a multiple of the size {plan.size:#x}; "
            "give a multiple of it"
        )
    if sigstruct is not None:
        for check in check_against(sigstruct, secs):
            if not check.ok:
                raise SoftSgxError(
                    f"{image.name}: {check.name} does not fit its SIGSTRUCT: {check.detail}; "
                    f"{_remedy(check.name, debug)}"
                )
    return secs


def _remedy(name: str, debug: bool | None) -> str:
    if name == "ATTRIBUTES" and debug is not None:
        return f"load it with{'out' if debug else ''} debug, or sign it for both"
    return "choose a machine (profile) that has what it wants, or sign it for this one"
