"""ENCLS, ENCLU and ENCLV as instructions: by registers, over the processor's address space.

The same leaf functions as the typed ones, after the checks that come before any leaf.  When a
fault, a VM exit or a transaction's abort is raised, nothing architectural has changed.  Prefixes
that make the instruction undefined (LOCK, 66H, REP, VEX) are left to the decoder.

Source:
    SDM vol. 3D, "ENCLS", "ENCLU", "ENCLV": Operation and exceptions.
"""

from __future__ import annotations

from collections.abc import Callable

from softsgx.arch import (
    FEATURE_CONTROL_READY,
    Enclu,
    SgxFeature,
    Status,
    VmExitReason,
    reports_code,
    reports_in_cf,
)
from softsgx.hw.cet import waits_for_endbranch
from softsgx.hw.faults import (
    ControlProtection,
    DeviceNotAvailable,
    GeneralProtection,
    TsxAbort,
    UndefinedOpcode,
    VmExit,
)
from softsgx.hw.leaves.registry import ENCLS, ENCLU, ENCLV, Leaf, eid_inside, eid_of, traced
from softsgx.hw.processor import LogicalProcessor

__all__ = ["INSTRUCTION_BYTES", "encls", "enclu", "enclv", "finish_leaf"]

INSTRUCTION_BYTES = 3
"""Length of each of the three: 0F 01 and CF, D7 or C0."""

_ENTERING = frozenset({Enclu.EENTER, Enclu.ERESUME})

# Plain integers: arithmetic on enums is ten times slower, and every leaf asks.
_SGX1, _ENCLV = int(SgxFeature.SGX1), int(SgxFeature.ENCLV)
_READY = int(FEATURE_CONTROL_READY)
_CF, _ZF = 1 << 0, 1 << 6
_STATUS_FLAGS = 0x8D5  # CF PF AF ZF SF OF
_MODE32 = 0xFFFF_FFFF
_LAST_BIT = 63


def encls(cpu: LogicalProcessor) -> None:
    """Execute ENCLS: leaf in EAX, operands in RBX, RCX and RDX.

    On success RIP is the address after the instruction; a leaf that reports has its code in RAX and
    in ZF or CF; EDBGRD has its data in RBX.

    Raises:
        TsxAbort: inside a transaction.
        UndefinedOpcode: no SGX in this mode or on this machine, or CPL above 0.
        VmExit: the exiting bitmap has this leaf; or what the leaf itself raises.
        GeneralProtection: SGX is not enabled, EAX names no leaf, paging is off, DS expands down;
            or what the leaf itself raises.
        PageFault: what the leaf itself raises.

    Source:
        SDM vol. 3D, "ENCLS", Operation.
    """
    number = cpu.regs.rax & _MODE32
    _check_available(cpu)
    if cpu.cpl:
        raise UndefinedOpcode
    if cpu.vmx_nonroot and _exits(cpu.encls_exiting, number):
        raise VmExit(VmExitReason.ENCLS, number)
    _check_enabled(cpu)
    leaf = ENCLS.get(number)
    if leaf is None or not cpu.hw.features & leaf.needs:
        raise GeneralProtection
    _check_memory(cpu)
    finish_leaf(cpu, leaf, _run(cpu, leaf, eid_of))


def enclu(cpu: LogicalProcessor) -> None:
    """Execute ENCLU: leaf in EAX, operands in RBX, RCX and RDX.

    On success RIP is the address after the instruction, or the target of EENTER, ERESUME or EEXIT;
    a leaf that reports has its code in RAX and in ZF.

    Raises:
        TsxAbort: inside a transaction.
        ControlProtection: the processor waits for ENDBRANCH, and this is no ERESUME.
        UndefinedOpcode: no SGX in this mode or on this machine, or CPL below 3.
        DeviceNotAvailable: CR0.TS is set.
        GeneralProtection: SGX is not enabled, EAX names no leaf, paging or CR0.NE is off, 16-bit
            code, or the leaf needs enclave mode and the processor is outside, or the reverse; or
            what the leaf itself raises.
        PageFault: what the leaf itself raises.

    Source:
        SDM vol. 3D, "ENCLU", Operation.
    """
    with cpu.busy:
        number = cpu.regs.rax & _MODE32
        if cpu.in_tsx:
            raise TsxAbort
        if waits_for_endbranch(cpu) and number != Enclu.ERESUME:
            raise ControlProtection
        _check_available(cpu)
        if cpu.cr0_ts:
            raise DeviceNotAvailable
        if cpu.cpl < 3:
            raise UndefinedOpcode
        _check_enabled(cpu)
        leaf = ENCLU.get(number)
        if leaf is None or not cpu.hw.features & leaf.needs:
            raise GeneralProtection
        if not cpu.paging or not cpu.cr0_ne:
            raise GeneralProtection
        if not cpu.mode64 and not cpu.cs.big:
            raise GeneralProtection
        if (cpu.inside is None) != (number in _ENTERING):
            raise GeneralProtection

        result = _run(cpu, leaf, eid_inside)
        if number not in _ENTERING and number != Enclu.EEXIT:  # those have set RIP
            finish_leaf(cpu, leaf, result)


def enclv(cpu: LogicalProcessor) -> None:
    """Execute ENCLV: leaf in EAX, operands in RBX, RCX and RDX.

    On success RIP is the address after the instruction; RAX and ZF have the code.

    Raises:
        TsxAbort: inside a transaction.
        UndefinedOpcode: no ENCLV in this mode or on this machine, not in VMX operation, CPL above
            0, or a guest whose hypervisor has not enabled ENCLV.
        VmExit: the exiting bitmap has this leaf.
        GeneralProtection: SGX is not enabled, EAX names no leaf, paging is off, DS expands down;
            or what the leaf itself raises.
        PageFault: what the leaf itself raises.

    Source:
        SDM vol. 3D, "ENCLV", Operation.
    """
    number = cpu.regs.rax & _MODE32
    _check_available(cpu)
    if not cpu.hw.features & _ENCLV:
        raise UndefinedOpcode
    if not cpu.vmx_operation or cpu.compatibility_mode:
        raise UndefinedOpcode
    if cpu.cpl:
        raise UndefinedOpcode
    if cpu.vmx_nonroot:
        if cpu.enclv_exiting < 0:
            raise UndefinedOpcode
        if _exits(cpu.enclv_exiting, number):
            raise VmExit(VmExitReason.ENCLV, number)
    _check_enabled(cpu)
    leaf = ENCLV.get(number)
    if leaf is None:
        raise GeneralProtection
    _check_memory(cpu)
    finish_leaf(cpu, leaf, _run(cpu, leaf, eid_of))


# --- checks -------------------------------------------------------------------------------------


def _check_available(cpu: LogicalProcessor) -> None:
    if cpu.in_tsx:
        raise TsxAbort
    if cpu.real_mode or not cpu.hw.features & _SGX1:
        raise UndefinedOpcode


def _check_enabled(cpu: LogicalProcessor) -> None:
    if cpu.hw.feature_control & _READY != _READY:
        raise GeneralProtection


def _check_memory(cpu: LogicalProcessor) -> None:
    if not cpu.paging or (not cpu.mode64 and cpu.ds.usable and cpu.ds.expand_down):
        raise GeneralProtection


def _exits(bitmap: int, number: int) -> bool:
    """Return whether an exiting bitmap has the bit of a leaf; -1 is no bitmap."""
    return bitmap >= 0 and bool(bitmap >> min(number, _LAST_BIT) & 1)


# --- registers ----------------------------------------------------------------------------------


def _run(cpu: LogicalProcessor, leaf: Leaf, eid: Callable[[LogicalProcessor, int], int]) -> object:
    """Run a leaf on the operands that its registers hold."""
    mask = -1 if cpu.mode64 else _MODE32
    operands = [getattr(cpu.regs, register) & mask for register in leaf.registers]
    function, tracer = leaf.function, cpu.hw.tracer
    if tracer is not None:
        function = traced(leaf, function, tracer, eid)
    result: object = function(cpu, *operands)
    return result


def finish_leaf(cpu: LogicalProcessor, leaf: Leaf, result: object) -> None:
    """Write a leaf's result to the registers and advance RIP past the instruction."""
    regs = cpu.regs
    if isinstance(result, tuple):  # EDBGRD
        result, data = result
        if result is Status.SUCCESS:
            regs.rbx = data
    if reports_code(leaf.number):
        assert isinstance(result, Status), f"{leaf.name} returned {result!r}"
        regs.rax = int(result)
        regs.rflags &= ~_STATUS_FLAGS
        if result is not Status.SUCCESS:
            regs.rflags |= _CF if reports_in_cf(leaf.number, result) else _ZF
    regs.rip = regs.rip + INSTRUCTION_BYTES & (-1 if cpu.mode64 else _MODE32)
