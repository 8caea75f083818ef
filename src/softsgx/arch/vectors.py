"""Vectors of exceptions.

Source:
    SDM vol. 3A, "Exception and Interrupt Vectors".
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Vector"]


class Vector(IntEnum):
    """Exception vectors."""

    DE = 0
    DB = 1
    NMI = 2
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20
    CP = 21
