"""Decodes XGETBV, XSAVE, XSAVEOPT, XSAVEC and XRSTOR, and the address of their operand.

Source:
    SDM vol. 2, "Instruction Format", and the pages of these instructions.
"""

from __future__ import annotations

from enum import Enum, auto
from functools import lru_cache

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.x86.insn import decode
from softsgx.ondemand import dataclass

__all__ = ["StateInsn", "StateOperation", "decode_state"]

_BITS_64, _BITS_32 = (1 << 64) - 1, (1 << 32) - 1
_REGISTERS = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)
_SEGMENTS = {0x64: "fs_base", 0x65: "gs_base"}
_ADDRESS_SIZE = 0x67
#: Other encodings, or #UD.
_REFUSED = frozenset(b"\x66\xf0\xf2\xf3")
_IGNORED = frozenset(b"\x26\x2e\x36\x3e")


class StateOperation(Enum):
    """Which instruction it is."""

    XGETBV = auto()
    XSAVE = auto()
    XSAVEOPT = auto()
    XSAVEC = auto()
    XRSTOR = auto()


_BY_OPCODE = {
    (0xAE, 4): StateOperation.XSAVE,
    (0xAE, 5): StateOperation.XRSTOR,
    (0xAE, 6): StateOperation.XSAVEOPT,
    (0xC7, 4): StateOperation.XSAVEC,
}


@dataclass(frozen=True, slots=True)
class StateInsn:
    """One of these instructions.

    Attributes:
        operation: which.
        length: bytes.
        opcode_at: offset of the byte behind 0F.
        rex: its REX prefix, 0 for none.
        segment: the name of the base that is added to its address, empty for none.
        narrow: whether the address has 32 bits.
    """

    operation: StateOperation
    code: bytes
    length: int
    opcode_at: int
    rex: int
    segment: str
    narrow: bool

    def address(self, regs: UserRegs) -> int:
        """Return the linear address of its operand; RIP of ``regs`` is its own."""
        at = self.opcode_at + 1
        modrm = self.code[at]
        mod, rm = modrm >> 6, modrm & 7
        at += 1
        address, displacement = 0, 1 if mod == 1 else 4 if mod == 2 else 0
        if rm == 4:
            sib = self.code[at]
            at += 1
            index = sib >> 3 & 7 | (self.rex & 2) << 2
            if index != 4:
                address += _register(regs, index) << (sib >> 6)
            base = sib & 7 | (self.rex & 1) << 3
            if base & 7 == 5 and mod == 0:
                displacement = 4
            else:
                address += _register(regs, base)
        elif rm == 5 and mod == 0:
            displacement = 4
            address += regs.rip + self.length
        else:
            address += _register(regs, rm | (self.rex & 1) << 3)
        given = self.code[at : at + displacement]
        address += int.from_bytes(given, "little", signed=True)
        if self.narrow:
            address &= _BITS_32
        if self.segment:
            address += getattr(regs, self.segment)
        return address & _BITS_64


@lru_cache(maxsize=1024)
def decode_state(code: bytes) -> StateInsn | None:
    """Decode the instruction at the start of ``code``; ``None``: it is another one, or cut off."""
    at, rex, segment, narrow = 0, 0, "", False
    while at < len(code):
        byte = code[at]
        if byte in _SEGMENTS:
            segment = _SEGMENTS[byte]
        elif byte == _ADDRESS_SIZE:
            narrow = True
        elif byte not in _IGNORED:
            break
        at += 1
    if at < len(code) and code[at] & 0xF0 == 0x40:
        rex = code[at]
        at += 1
    insn = decode(code)
    if insn is None or code[at : at + 1] != b"\x0f" or any(byte in _REFUSED for byte in code[:at]):
        return None
    opcode, modrm = code[at + 1], code[at + 2] if len(code) > at + 2 else 0
    if (opcode, modrm) == (0x01, 0xD0):
        return StateInsn(StateOperation.XGETBV, code, at + 3, at + 1, rex, segment, narrow)
    operation = _BY_OPCODE.get((opcode, modrm >> 3 & 7))
    if operation is None or modrm >> 6 == 3:
        return None
    return StateInsn(operation, code, insn.length, at + 1, rex, segment, narrow)


def _register(regs: UserRegs, number: int) -> int:
    value: int = getattr(regs, _REGISTERS[number])
    return value
