"""Processors of a guest: two levels of translation, and VM exits that go to the hypervisor.

Deviation: each keeps its state and its TLB while another one runs on the same processor of the
machine; on silicon the switch would be a VM exit.  Software sees the difference only in time.

Source:
    SDM vol. 3C, "VMX Non-Root Operation", "VMX Support for Address Translation"; vol. 3D, "VMX
    Operation and SGX".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from softsgx.arch import PAGE_BYTES, VmExitReason
from softsgx.hw import DirectMap, EncluLeaves, LogicalProcessor, VmExit
from softsgx.paging import Claim

if TYPE_CHECKING:
    from softsgx.kvm.guest import Guest

__all__ = ["GuestProcessor"]

T = TypeVar("T")


class _GuestDirectMap(DirectMap):
    """The guest kernel's own mapping: a linear address equals the guest-physical one.

    It is a separate type, since the processor skips translation for a :class:`DirectMap` itself.
    """


class GuestProcessor(LogicalProcessor):
    """One virtual processor.

    Args:
        guest: the guest it belongs to.
        number: its number there.
        encls_exiting: ENCLS-exiting bitmap.

    Attributes:
        claim: the pages that its current instruction needs together.
    """

    def __init__(self, guest: Guest, number: int, encls_exiting: int) -> None:
        self.guest = guest
        self.claim = Claim()
        super().__init__(
            guest.machine,
            number,
            EncluLeaves,
            name=f"{guest.name}.cpu{number}",
            space=_GuestDirectMap(),
            vmx_operation=True,
            vmx_nonroot=True,
            epc_virtualization=True,
            encls_exiting=encls_exiting,
        )

    @property
    def launch_key_hash(self) -> list[int]:
        """The guest's launch key hash, which its RDMSR, EINIT and EGETKEY read.

        Deviation: KVM loads it into the processor before EINIT only, so EGETKEY of a launch key
        fails on hardware after another EINIT on the same processor, of the host or another guest.
        """
        return self.guest.launch_key_hash

    def translate(self, linaddr: int, access: int, *, user: bool) -> int:
        """Return the machine's physical address: the guest's paging, then the second level.

        Raises:
            GeneralProtection, PageFault: as on a machine; the guest's own.
            VmExit: EPT_VIOLATION: the second level has no entry, or the guest is paused.
        """
        gpa = super().translate(linaddr, access, user=user)
        guest = self.guest
        if guest.paused or guest.stopped is not None:
            raise VmExit(VmExitReason.EPT_VIOLATION, access, guest_physical=gpa)
        mapping = guest.mapping_of(gpa)
        if mapping is None:
            return gpa + guest.ram_base
        index = (gpa - mapping.vepc.base) // PAGE_BYTES
        at = mapping.entries.get(index)
        if at is None:
            raise VmExit(
                VmExitReason.EPT_VIOLATION,
                access,
                guest_physical=gpa & -PAGE_BYTES,
                guest_linear=linaddr,
            )
        mapping.accessed.add(index)
        return at | gpa % PAGE_BYTES

    def handle_vm_exit(self, exit: VmExit, retry: Callable[[], T]) -> T:
        """Let the host handle the exit, then let the guest continue."""
        return self.guest.resume(self, exit, retry)
