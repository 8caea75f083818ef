"""ENCLS as a guest's kernel executes it: the same leaves, with VM exits in between.

A leaf that ends with a VM exit has changed nothing, so the host handles the exit and the guest
executes the leaf again; to the guest the leaf only takes longer.  The host traps ECREATE and EINIT
where it must check them, and executes them for the guest.

Source:
    arch/x86/kvm/vmx/sgx.c; SDM vol. 3D, "VMX Operation and SGX", SGX_CONFLICT.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from softsgx.arch import (
    PAGE_BYTES,
    AttributesFlags,
    Encls,
    Enclv,
    PageInfo,
    SecInfo,
    Secs,
    SgxFeature,
    Status,
)
from softsgx.defects import Defect
from softsgx.hw import (
    GeneralProtection,
    Leaf,
    Leaves,
    LogicalProcessor,
    MachineConfig,
    PageInfoArgs,
    UndefinedOpcode,
)
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from softsgx.kvm.guest import Guest

__all__ = ["GuestLeaves", "exiting_bitmap"]

_SGX1 = range(Encls.ECREATE, Encls.EWB + 2)  # up to ETRACK, 0CH
_SGX2 = (Encls.EAUG, Encls.EMODPR, Encls.EMODT)
_ALL = (1 << 64) - 1


def exiting_bitmap(config: MachineConfig, guest: MachineConfig) -> int:
    """Return the ENCLS-exiting bitmap: the leaves of the guest that cause a VM exit.

    They are all leaves that the guest's CPUID does not report; ECREATE, unless the guest may use
    all features of the machine; and EINIT, if the launch key hash can be written.

    Source:
        vmx_write_encls_bitmap(), sgx_intercept_encls_ecreate(), vmx/sgx.c.
    """
    bitmap = _ALL
    if guest.features & SgxFeature.SGX1:
        for leaf in _SGX1:
            bitmap &= ~(1 << leaf)
        same = (config.features & _SHOWN, config.miscselect, config.attributes, config.xfrm) == (
            guest.features & _SHOWN,
            guest.miscselect,
            guest.attributes,
            guest.xfrm,
        )
        if not same or config.max_size_64 != guest.max_size_64:
            bitmap |= 1 << Encls.ECREATE
        if config.launch_control:
            bitmap |= 1 << Encls.EINIT
    if guest.features & SgxFeature.SGX2:
        for leaf in _SGX2:
            bitmap &= ~(1 << leaf)
    return bitmap


_SHOWN = SgxFeature.SGX1 | SgxFeature.SGX2


class GuestLeaves(Leaves):
    """Leaves bound to the guest's kernel, as :class:`~softsgx.hw.Leaves` are to a machine's.

    ERDINFO, ETRACKC, ELDBC, ELDUC and EUPDATESVN raise #GP in a guest, ENCLV raises #UD.
    """

    def __init__(
        self, guest: Guest, kernel: LogicalProcessor, *, tracer: Tracer | None = None
    ) -> None:
        self._guest = guest
        super().__init__(kernel, tracer=tracer)

    def _function(self, leaf: Leaf) -> Callable[..., Any]:
        """Return a function that executes a leaf to its end; repetitions make one event."""
        guest, exits = self._guest, self._cpu.encls_exiting >> leaf.number & 1
        if isinstance(leaf.number, Enclv):
            function = _undefined(leaf.function)
        else:
            function = self.trapped(leaf) if exits else leaf.function

        def execute(cpu: LogicalProcessor, *operands: Any) -> Any:
            return guest.execute(cpu, function, *operands)

        return execute

    def _eid_of(self, cpu: LogicalProcessor, page: int) -> int:
        """Return 0: an identifier would show the guest how many enclaves the host has."""
        return 0

    def trapped(self, leaf: Leaf) -> Callable[..., Any]:
        """Return the function that the host executes when the guest's ``leaf`` exits."""
        match leaf.number:
            case Encls.ECREATE:
                return partial(_ecreate, self._guest, leaf.function)
            case Encls.EINIT:
                return partial(_einit, self._guest, leaf.function)
            case _:
                return _not_enabled(leaf.function)


# --- trapped leaves -------------------------------------------------------------------------------


def _ecreate(
    guest: Guest,
    leaf: Callable[..., None],
    cpu: LogicalProcessor,
    rbx: Any,
    rcx: int,
) -> None:
    """Check the SECS that the guest passes, and execute ECREATE with the checked copy.

    Raises:
        GeneralProtection: the guest may not create such an enclave; or what the leaf raises.

    Source:
        handle_encls_ecreate(), vmx/sgx.c.
    """
    guest.counters.trapped += 1
    if type(rbx) is int and rbx % PageInfo.ALIGN:
        raise GeneralProtection
    info = cpu.page_info(rbx)
    for ref, align in ((info.srcpge, PAGE_BYTES), (info.secinfo, SecInfo.ALIGN)):
        if type(ref) is int and ref % align:
            raise GeneralProtection
    # Copied before it is checked: the guest's other processors may write to it meanwhile.
    secs = Secs.unpack(bytes(cpu.read(info.srcpge, Secs.SIZE)))
    secinfo = SecInfo.unpack(cpu.sec_info(info.secinfo).pack())
    config = guest.config
    flags, xfrm = secs.attributes.flags, secs.attributes.xfrm
    mode64 = flags & AttributesFlags.MODE64BIT
    if (
        secs.miscselect & ~int(config.miscselect)
        or flags & ~int(config.attributes)
        or xfrm & ~config.xfrm
        or secs.size > 1 << (config.max_size_64 if mode64 else config.max_size_32)
    ):
        raise GeneralProtection
    if Defect.GUEST_SECS_READ_TWICE in guest.defects:
        guest.runtime.point("ECREATE trapped")
        leaf(cpu, rbx, rcx)
        return
    leaf(cpu, PageInfoArgs(info.linaddr, secs.pack(), secinfo, info.secs), rcx)


def _einit(
    guest: Guest,
    leaf: Callable[..., Status],
    cpu: LogicalProcessor,
    rbx: Any,
    rcx: int,
    rdx: Any,
) -> Status:
    """Execute EINIT with the guest's launch key hash in the processor's registers.

    Source:
        handle_encls_einit(), vmx/sgx.c; sgx_virt_einit(), virt.c.
    """
    guest.counters.trapped += 1
    return leaf(cpu, rbx, rcx, rdx)


def _undefined(leaf: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(leaf)
    def run(cpu: LogicalProcessor, *operands: Any) -> Any:
        raise UndefinedOpcode

    return run


def _not_enabled(leaf: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(leaf)
    def run(cpu: LogicalProcessor, *operands: Any) -> Any:
        raise GeneralProtection

    return run
