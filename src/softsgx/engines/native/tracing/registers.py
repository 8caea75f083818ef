"""The general registers of a thread, as the machine's processor has them."""

from __future__ import annotations

from softsgx.engines.native.abi import UserRegs

__all__ = ["NativeRegisters"]


class NativeRegisters(UserRegs):
    """The machine's view of a thread's registers.

    Attributes:
        xcr0: what the enclave may use; the real register stays as the system set it.
        xsave: the thread's XSAVE area, valid while a leaf or an exit works on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.xcr0 = 0
        self.xsave = b""
