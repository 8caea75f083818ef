"""Thread control structures, SSA frames, and the state that an asynchronous exit saves in them.

Source:
    SDM vol. 3D, "Thread Control Structure (TCS)", "State Save Area (SSA) Frame".
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from softsgx.layout import U8, U32, U64, Raw, Structure, at

__all__ = [
    "EXINFO_BYTES",
    "GPRSGX_BYTES",
    "TCS_ACTIVE",
    "TCS_INACTIVE",
    "TCS_LIMIT_BYTES",
    "TCS_LIMIT_CET_BYTES",
    "ExInfo",
    "ExitType",
    "GprSgx",
    "Tcs",
    "TcsFlags",
    "tcs_as_added",
    "tcs_ok",
]

TCS_INACTIVE, TCS_ACTIVE = 0, 1
TCS_LIMIT_BYTES = 72  # what EDBGRD may read of a TCS
TCS_LIMIT_CET_BYTES = 88


class TcsFlags(IntFlag):
    """TCS.FLAGS; every other bit is reserved."""

    DBGOPTIN = 1
    AEXNOTIFY = 2


class Tcs(Structure, size=4096, align=4096):
    """Thread Control Structure.

    Attributes:
        state: ``TCS_INACTIVE`` or ``TCS_ACTIVE``.
        ossa: offset of the SSA stack from the enclave's base, page aligned.
        cssa: index of the frame that the next entry or exit uses.
        nssa: number of frames.
        oentry: offset of the entry point from the base.
        aep: asynchronous exit pointer of the last entry.
        ocetssa: CET only; zero in every enclave without CET.
        prevssp: CET only.

    Source:
        SDM vol. 3D, "Thread Control Structure (TCS)"; the two CET fields' offsets are from
        public headers.
    """

    state: int = at(0, U64)
    flags: int = at(8, U64)
    ossa: int = at(16, U64)
    cssa: int = at(24, U32)
    nssa: int = at(28, U32)
    oentry: int = at(32, U64)
    aep: int = at(40, U64)
    ofs_base: int = at(48, U64)
    ogs_base: int = at(56, U64)
    fs_limit: int = at(64, U32)
    gs_limit: int = at(68, U32)
    ocetssa: int = at(72, U64)
    prevssp: int = at(80, U64)
    reserved: bytes = at(88, Raw(4008))


_LIMIT_BITS = 0xFFF


def tcs_ok(tcs: Tcs, *, mode64: bool, cet: bool) -> bool:
    """Return whether EADD or EACCEPT accepts a page as a TCS.

    Reserved bytes and PREVSSP must be zero, limits of a 32-bit enclave must be whole pages.

    Args:
        tcs: the content of the page.
        mode64: whether the enclave is a 64-bit one.
        cet: whether the machine has CET; without it the two CET fields are reserved.

    Source:
        SDM vol. 3D, "EADD" and "EACCEPT", Operation.
    """
    if any(tcs.reserved) or tcs.prevssp or (tcs.ocetssa and not cet):
        return False
    limits = (tcs.fs_limit, tcs.gs_limit)
    return mode64 or all(limit & _LIMIT_BITS == _LIMIT_BITS for limit in limits)


def tcs_as_added(tcs: Tcs) -> Tcs:
    """Return what EADD stores: DBGOPTIN, STATE, CSSA and AEP are cleared.

    Source:
        SDM vol. 3D, "EADD", Operation.
    """
    flags = tcs.flags & ~int(TcsFlags.DBGOPTIN)
    return tcs.replace(flags=flags, state=TCS_INACTIVE, cssa=0, aep=0)


class ExitType(IntEnum):
    """GPRSGX.EXITINFO.EXIT_TYPE."""

    HARDWARE = 3
    SOFTWARE = 6


class GprSgx(Structure, size=184, align=8):
    """The last 184 bytes of an SSA frame: the registers of an interrupted enclave.

    Attributes:
        exitinfo: vector in 7:0, type in 10:8, valid in 31.
        aexnotify: bit 0 makes ERESUME enter at OENTRY instead of resuming.

    Source:
        SDM vol. 3D, "GPRSGX Region".
    """

    rax: int = at(0, U64)
    rcx: int = at(8, U64)
    rdx: int = at(16, U64)
    rbx: int = at(24, U64)
    rsp: int = at(32, U64)
    rbp: int = at(40, U64)
    rsi: int = at(48, U64)
    rdi: int = at(56, U64)
    r8: int = at(64, U64)
    r9: int = at(72, U64)
    r10: int = at(80, U64)
    r11: int = at(88, U64)
    r12: int = at(96, U64)
    r13: int = at(104, U64)
    r14: int = at(112, U64)
    r15: int = at(120, U64)
    rflags: int = at(128, U64)
    rip: int = at(136, U64)
    ursp: int = at(144, U64)
    urbp: int = at(152, U64)
    exitinfo: int = at(160, U32)
    reserved: bytes = at(164, Raw(3))
    aexnotify: int = at(167, U8)
    fs_base: int = at(168, U64)
    gs_base: int = at(176, U64)


GPRSGX_BYTES = GprSgx.SIZE


class ExInfo(Structure, size=16, align=8):
    """MISC.EXINFO: the address and code of a #PF or #GP inside the enclave.

    Source:
        SDM vol. 3D, "EXINFO Structure".
    """

    maddr: int = at(0, U64)
    errcd: int = at(8, U32)
    reserved: int = at(12, U32)


EXINFO_BYTES = ExInfo.SIZE
