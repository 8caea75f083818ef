"""Faults and VM exits: how an instruction ends when it does not complete.

Source:
    SDM vol. 3A, "Interrupt and Exception Handling"; vol. 3C, "VM exits".
"""

from __future__ import annotations

from softsgx.arch import ConflictCode, Pfec, Vector, VmExitReason

__all__ = [
    "ControlProtection",
    "DeviceNotAvailable",
    "EnclaveLeft",
    "Fault",
    "GeneralProtection",
    "MachineCheck",
    "PageFault",
    "TsxAbort",
    "UndefinedOpcode",
    "VmExit",
]


class Fault(Exception):
    """An exception of the processor; nothing architectural has changed.

    Attributes:
        vector: its number.
        code: its error code, 0 where it has none.
    """

    vector: Vector
    code: int = 0


class GeneralProtection(Fault):
    """#GP(0)."""

    vector = Vector.GP

    def __str__(self) -> str:
        return "#GP(0)"


class PageFault(Fault):
    """#PF: ``address`` goes to CR2, ``code`` onto the stack.

    Attributes:
        address: the linear address that could not be used.
        code: :class:`~softsgx.arch.Pfec` bits; SGX with P when the EPC or EPCM refuses the access.
    """

    vector = Vector.PF

    def __init__(self, address: int, code: int = Pfec.P | Pfec.SGX) -> None:
        super().__init__(address, code)
        self.address, self.code = address, int(code)

    def __str__(self) -> str:
        return f"#PF({self.address:#x}, {self.code:#x})"


class UndefinedOpcode(Fault):
    """#UD."""

    vector = Vector.UD

    def __str__(self) -> str:
        return "#UD"


class DeviceNotAvailable(Fault):
    """#NM."""

    vector = Vector.NM

    def __str__(self) -> str:
        return "#NM"


class MachineCheck(Fault):
    """#MC: the memory of an EPC page that the instruction uses has an uncorrected error."""

    vector = Vector.MC

    def __str__(self) -> str:
        return "#MC"


class ControlProtection(Fault):
    """#CP."""

    vector = Vector.CP

    def __str__(self) -> str:
        return "#CP"


class EnclaveLeft(Fault):
    """A VM exit has made the processor leave the enclave; the instruction has not completed.

    The guest sees an interrupt before the instruction, not an exception.  The processor is outside,
    at the AEP.
    """

    def __str__(self) -> str:
        return "VM exit"


class TsxAbort(Exception):
    """The leaf ran inside a transaction, which aborts."""


class VmExit(Exception):
    """Control goes to the hypervisor; the guest's instruction has not completed.

    Attributes:
        reason: basic exit reason.
        code: SGX_CONFLICT code, the leaf number for ENCLS and ENCLV exits, or the kind of access
            for EPT violations.
        error: qualification bits 31:16; 7 with EPC_PAGE_CONFLICT_ERROR.
        guest_physical: where the conflict is, as the guest's paging sees it.
        guest_linear: the operand's linear address, 0 for tracking conflicts.
    """

    def __init__(
        self,
        reason: VmExitReason,
        code: ConflictCode | int,
        *,
        error: int = 0,
        guest_physical: int = 0,
        guest_linear: int = 0,
    ) -> None:
        super().__init__(reason, code, error, guest_physical, guest_linear)
        self.reason, self.code, self.error = reason, code, error
        self.guest_physical, self.guest_linear = guest_physical, guest_linear
