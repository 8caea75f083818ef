"""Bits of the fields ATTRIBUTES, MISCSELECT and CET_ATTRIBUTES.

Source:
    SDM vol. 3D, "ATTRIBUTES", "MISCSELECT".
"""

from __future__ import annotations

from enum import IntFlag

__all__ = ["AttributesFlags", "CetAttributes", "MiscSelect", "Xfrm"]


class AttributesFlags(IntFlag):
    """ATTRIBUTES bits 63:0."""

    INIT = 1 << 0
    DEBUG = 1 << 1
    MODE64BIT = 1 << 2
    PROVISIONKEY = 1 << 4
    EINITTOKENKEY = 1 << 5
    CET = 1 << 6
    KSS = 1 << 7
    AEXNOTIFY = 1 << 10


class Xfrm(IntFlag):
    """XSAVE components that ATTRIBUTES.XFRM and XCR0 name."""

    X87 = 1 << 0
    SSE = 1 << 1
    AVX = 1 << 2
    BNDREGS = 1 << 3
    BNDCSR = 1 << 4
    OPMASK = 1 << 5
    ZMM_HI256 = 1 << 6
    HI16_ZMM = 1 << 7
    PKRU = 1 << 9
    TILECFG = 1 << 17
    TILEDATA = 1 << 18


class MiscSelect(IntFlag):
    """MISCSELECT: what an asynchronous exit writes below GPRSGX."""

    EXINFO = 1
    CPINFO = 2


class CetAttributes(IntFlag):
    """CET_ATTRIBUTES; bits 1:0 are the shadow stack's, 5:2 indirect branch tracking's."""

    SH_STK_EN = 1 << 0
    WR_SHSTK_EN = 1 << 1
    ENDBR_EN = 1 << 2
    LEG_IW_EN = 1 << 3
    NO_TRACK_EN = 1 << 4
    SUPPRESS_DIS = 1 << 5
    SHADOW_STACK = 0x03
    BRANCH_TRACKING = 0x3C
    RESERVED = 0xC0
