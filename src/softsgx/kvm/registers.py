"""ENCLS in a guest as an instruction, with its operands in registers: VM exits and emulation.

Source:
    handle_encls(), handle_encls_ecreate(), handle_encls_einit(), vmx/sgx.c.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from softsgx.arch import Encls, SgxFeature, Status, VmExitReason
from softsgx.hw import (
    ENCLS,
    GeneralProtection,
    LogicalProcessor,
    Registers,
    UndefinedOpcode,
    VmExit,
    finish_leaf,
)
from softsgx.hw import encls as execute_encls
from softsgx.kvm.monitor import CONFLICT_CODES

if TYPE_CHECKING:
    from softsgx.kvm.guest import Guest

__all__ = ["encls"]

_MODE32 = 0xFFFF_FFFF


def encls(guest: Guest, cpu: LogicalProcessor) -> None:
    """Execute ENCLS on a processor of a guest to its end: leaf in EAX, operands in registers.

    Leaves that the guest's CPUID does not report raise #GP.  Where the host traps ECREATE and
    EINIT, it emulates them: on success RIP is behind the instruction, RAX is EINIT's code, ZF is
    set if the code is not zero, and the other status flags are clear.

    Raises:
        Fault: the guest's own; nothing architectural has changed.
        GuestStoppedError: the guest was stopped.
    """
    before = replace(cpu.regs)

    def once(cpu: LogicalProcessor) -> Status | None:
        _copy(before, cpu.regs)
        execute_encls(cpu)
        return Status(cpu.regs.rax) if cpu.regs.rax in CONFLICT_CODES else None

    try:
        reflected = guest.execute(cpu, once)
    except VmExit as exit:
        _copy(before, cpu.regs)
        if exit.reason is not VmExitReason.ENCLS:
            raise
        _emulate(guest, cpu, exit.code)
        return
    if reflected is not None and cpu.regs.rip == before.rip:
        finish_leaf(cpu, ENCLS[Encls(before.rax & _MODE32)], reflected)


def _emulate(guest: Guest, cpu: LogicalProcessor, number: int) -> None:
    if not guest.config.features & SgxFeature.SGX1:
        raise UndefinedOpcode
    if number not in (Encls.ECREATE, Encls.EINIT):
        raise GeneralProtection
    leaf = ENCLS[number]
    mask = -1 if cpu.mode64 else _MODE32
    operands = [getattr(cpu.regs, register) & mask for register in leaf.registers]
    status = guest.execute(cpu, guest.leaves.trapped(leaf), *operands)
    finish_leaf(cpu, leaf, status)


def _copy(source: Registers, target: Registers) -> None:
    for item in fields(source):
        setattr(target, item.name, getattr(source, item.name))
