"""ENCLS as an instruction in a guest: by registers, with the exits and emulation behind it.

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
)
from softsgx.hw import encls as execute_encls

if TYPE_CHECKING:
    from softsgx.kvm.guest import Guest

__all__ = ["encls"]

_LENGTH = 3
_ZF = 1 << 6
_STATUS_FLAGS = 0x8D5  # CF PF AF ZF SF OF
_MODE32 = 0xFFFF_FFFF
_BUSY = (Status.EPC_PAGE_CONFLICT, Status.ENTRYEPOCH_LOCKED)


def encls(guest: Guest, cpu: LogicalProcessor) -> None:
    """Execute ENCLS on a processor of a guest to its end: leaf in EAX, operands in registers.

    What the guest's CPUID does not name does not exist; ECREATE and EINIT are emulated where the
    host wants to see them: on success RIP is behind the instruction, and EINIT's code in RAX, with
    ZF set unless it is zero and the other status flags clear.

    Raises:
        Fault: the guest's own; nothing architectural has changed.
        GuestStoppedError: the guest cannot go on.
    """
    before = replace(cpu.regs)

    def once(cpu: LogicalProcessor) -> Status | None:
        _copy(before, cpu.regs)
        execute_encls(cpu)
        return Status(cpu.regs.rax) if cpu.regs.rax in _BUSY else None

    try:
        reflected = guest.execute(cpu, once)
    except VmExit as exit:
        _copy(before, cpu.regs)
        if exit.reason is not VmExitReason.ENCLS:
            raise
        _emulate(guest, cpu, exit.code)
        return
    if reflected is not None and cpu.regs.rip == before.rip:
        _finish(cpu, reflected)


def _emulate(guest: Guest, cpu: LogicalProcessor, number: int) -> None:
    if not guest.config.features & SgxFeature.SGX1:
        raise UndefinedOpcode
    if number not in (Encls.ECREATE, Encls.EINIT):
        raise GeneralProtection
    leaf = ENCLS[number]
    mask = -1 if cpu.mode64 else _MODE32
    operands = [getattr(cpu.regs, register) & mask for register in leaf.registers]
    status = guest.execute(cpu, guest.leaves.trapped(leaf), *operands)
    _finish(cpu, status if isinstance(status, Status) else None)


def _finish(cpu: LogicalProcessor, status: Status | None) -> None:
    """Skip the instruction, with a code where the leaf reports one."""
    if status is not None:
        cpu.regs.rax = int(status)
        cpu.regs.rflags &= ~_STATUS_FLAGS
        cpu.regs.rflags |= _ZF if status is not Status.SUCCESS else 0
    cpu.regs.rip += _LENGTH


def _copy(source: Registers, target: Registers) -> None:
    for item in fields(source):
        setattr(target, item.name, getattr(source, item.name))
