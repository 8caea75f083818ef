"""Decoding one x86-64 instruction: how long it is, and whether its memory operand is written.

Linux does not report to a tracer whether a fault was a load or a store; the instruction shows it.
Legacy, VEX and EVEX encodings of 64-bit mode are covered; what is unknown counts as a read.

Source:
    SDM vol. 2, chapter "Instruction Format" and appendix A "Opcode Map".
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["ENCLU", "Insn", "decode", "is_illegal_inside", "is_write"]

ENCLU = b"\x0f\x01\xd7"

_PREFIXES = frozenset(b"\x66\x67\xf0\xf2\xf3\x2e\x36\x3e\x26\x64\x65")
_ALU = tuple(base for base in range(0, 0x40, 8))

# First map.
_MODRM1 = frozenset(
    {base + low for base in _ALU for low in range(4)}
    | {0x63, 0x69, 0x6B, *range(0x80, 0x90), 0xC0, 0xC1, 0xC6, 0xC7}
    | {*range(0xD0, 0xD4), *range(0xD8, 0xE0), 0xF6, 0xF7, 0xFE, 0xFF}
)
_IMM8_1 = frozenset(
    {base + 4 for base in _ALU}
    | {0x6A, 0x6B, 0x80, 0x83, 0xA8, 0xC0, 0xC1, 0xC6, 0xCD, 0xEB}
    | {*range(0x70, 0x80), *range(0xB0, 0xB8), *range(0xE0, 0xE8)}
)
_IMMZ_1 = frozenset({base + 5 for base in _ALU} | {0x68, 0x69, 0x81, 0xA9, 0xC7, 0xE8, 0xE9})
_STORE1 = frozenset(
    {base + low for base in _ALU if base != 0x38 for low in (0, 1)}
    | {0x86, 0x87, 0x88, 0x89, 0x8C, 0x8F, 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4)}
)
_STACK1 = frozenset({*range(0x50, 0x58), 0x68, 0x6A, 0x9C, 0xC8, 0xE8})
_STORE_RDI = frozenset({0x6C, 0x6D, 0xA4, 0xA5, 0xAA, 0xAB})
_STORE_GROUP1: dict[int, frozenset[int]] = {
    0x80: frozenset(range(7)),
    0x81: frozenset(range(7)),
    0x83: frozenset(range(7)),
    0xF6: frozenset({2, 3}),
    0xF7: frozenset({2, 3}),
    0xFE: frozenset({0, 1}),
    0xFF: frozenset({0, 1}),
    0xD9: frozenset({2, 3, 6, 7}),
    0xDB: frozenset({1, 2, 3, 7}),
    0xDD: frozenset({1, 2, 3, 6, 7}),
    0xDF: frozenset({1, 2, 3, 6, 7}),
}

# Second map (0F).
_PLAIN2 = frozenset(
    {0x05, 0x06, 0x07, 0x08, 0x09, 0x0B, 0x0E, 0x77, 0xA0, 0xA1, 0xA2, 0xA8, 0xA9, 0xAA}
    | {*range(0x30, 0x38), *range(0xC8, 0xD0)}
)
_IMM8_2 = frozenset({0x70, 0x71, 0x72, 0x73, 0xA4, 0xAC, 0xBA, 0xC2, 0xC4, 0xC5, 0xC6})
_STORE2 = frozenset(
    {0x11, 0x13, 0x17, 0x29, 0x2B, 0x7F, 0xC3, 0xD6, 0xE7, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD}
    | {0xB0, 0xB1, 0xB3, 0xBB, 0xC0, 0xC1, *range(0x90, 0xA0)}
)
_STORE_VECTOR2 = frozenset({0x11, 0x13, 0x17, 0x29, 0x2B, 0x7F, 0xD6, 0xE7})
_STORE_GROUP2: dict[int, frozenset[int]] = {
    0x00: frozenset({0, 1}),
    0x01: frozenset({0, 1, 4}),
    0xAE: frozenset({0, 3, 4, 6}),
    0xBA: frozenset({5, 6, 7}),
    0xC7: frozenset({1, 3, 4, 5, 7}),
}

# Third maps (0F 38, 0F 3A).
_STORE38_VEX = frozenset({0x2E, 0x2F, 0x8E})
_STORE38_EVEX = frozenset({0x63, 0x8A, 0x8B, 0xA0, 0xA1, 0xA2, 0xA3})
_STORE38_DOWN = frozenset({*range(0x10, 0x16), *range(0x20, 0x26), *range(0x30, 0x36)})
_STORE3A = frozenset({0x14, 0x15, 0x16, 0x17, 0x19, 0x1B, 0x1D, 0x39, 0x3B})

# INS, OUTS, MOV to segment registers, far RET, INT n, IRET, IN, OUT.
_ILLEGAL1 = frozenset(
    {*range(0x6C, 0x70), 0x8E, 0xCA, 0xCB, 0xCD, 0xCF, *range(0xE4, 0xE8), *range(0xEC, 0xF0)}
)
# SYSCALL, RDPMC, SYSENTER, GETSEC, POP to and loads of segment registers, CPUID.
_ILLEGAL2 = frozenset({0x05, 0x33, 0x34, 0x37, 0xA1, 0xA2, 0xA9, 0xB2, 0xB4, 0xB5})


class Insn(NamedTuple):
    """One instruction.

    Attributes:
        length: bytes.
        opcode: its last opcode byte, and ``map`` the map it is from: 1, 2 (0F), 0x38, 0x3A.
        store: whether its ModRM (or moffs) memory operand is written.
        stack: whether it pushes.
        destination: whether it writes memory at RDI.
    """

    length: int
    opcode: int
    map: int
    store: bool
    stack: bool
    destination: bool


def decode(code: bytes) -> Insn | None:
    """Decode the instruction at the start of ``code``; ``None``: not one we know, or cut off."""
    try:
        return _decode(code)
    except IndexError:
        return None


def is_write(code: bytes, fault_address: int, rsp: int, rdi: int) -> bool:
    """Return whether the access of ``code`` that faulted at ``fault_address`` was a store.

    Args:
        code: up to 15 bytes at RIP.
        fault_address: where it faulted, exact or page aligned.
        rsp: the stack pointer.
        rdi: where string instructions store.
    """
    insn = decode(code)
    if insn is None:
        return False
    if insn.destination:
        return _near(fault_address, rdi)
    return insn.store or (insn.stack and _near(fault_address, rsp - 8))


def is_illegal_inside(code: bytes) -> bool:
    """Return whether the instruction at the start of ``code`` is #UD in every enclave.

    Source:
        SDM vol. 3D, "Illegal Instructions": what may change the privilege level, does input or
        output, or is for a hypervisor to answer.
    """
    at = 0
    while at < len(code) and (code[at] in _PREFIXES or code[at] & 0xF0 == 0x40):
        at += 1
    first, second, third = code[at : at + 3].ljust(3, b"\xff")
    if first != 0x0F:
        return first in _ILLEGAL1 or (
            first == 0xFF and second >> 6 != 3 and second >> 3 & 7 in (3, 5)
        )
    if second == 0x00:
        return third >> 3 & 7 in (0, 1)  # SLDT, STR
    if second == 0x01:
        memory = third >> 6 != 3
        return third in (0xC1, 0xD4) or third >> 3 & 7 == 4 or (memory and third >> 3 & 7 in (0, 1))
    return second in _ILLEGAL2


def _near(fault_address: int, operand: int) -> bool:
    return 0 <= fault_address - (operand & ~0xFFF) < 8192


def _decode(code: bytes) -> Insn | None:
    at, wide, short_operand, prefix = 0, False, False, 0
    while code[at] in _PREFIXES or code[at] & 0xF0 == 0x40:
        # A REX counts only right before the opcode.
        wide = code[at] & 0xF8 == 0x48
        short_operand |= code[at] == 0x66
        if code[at] in b"\xf2\xf3":
            prefix = code[at]
        at += 1
    first = code[at]
    if first in b"\xc5\xc4\x62":
        return _decode_vector(code, at)
    if first != 0x0F:
        return _decode_first(code, at, wide=wide, short_operand=short_operand)
    opcode = code[at + 1]
    if opcode in b"\x38\x3a":
        third, at = code[at + 2], at + 3
        size, memory, _reg = _modrm(code, at)
        if opcode == 0x38:
            store = memory and third == 0xF1 and prefix != 0xF2
            return _checked(code, Insn(at + size, third, opcode, store, False, False))
        store = memory and third in _STORE3A
        return _checked(code, Insn(at + size + 1, third, opcode, store, False, False))
    return _decode_second(code, at + 1, prefix)


def _decode_first(code: bytes, at: int, *, wide: bool, short_operand: bool) -> Insn | None:
    opcode = code[at]
    at += 1
    memory, reg = False, 0
    if opcode in _MODRM1:
        size, memory, reg = _modrm(code, at)
        at += size
    immediate = 0
    if opcode in _IMMZ_1:
        immediate = 2 if short_operand and opcode not in (0xE8, 0xE9) else 4
    elif opcode in _IMM8_1:
        immediate = 1
    elif opcode & 0xF8 == 0xB8:
        immediate = 8 if wide else 2 if short_operand else 4
    elif opcode in (0xC2, 0xCA):
        immediate = 2
    elif opcode == 0xC8:
        immediate = 3
    elif 0xA0 <= opcode <= 0xA3:
        immediate = 8
    elif opcode in (0xF6, 0xF7) and reg < 2:
        immediate = 1 if opcode == 0xF6 else 2 if short_operand else 4
    group = _STORE_GROUP1.get(opcode)
    store = memory and (opcode in _STORE1 if group is None else reg in group)
    store |= opcode in (0xA2, 0xA3)
    stack = opcode in _STACK1 or (opcode == 0xFF and reg in (2, 6))
    found = Insn(at + immediate, opcode, 1, store, stack, opcode in _STORE_RDI)
    return _checked(code, found)


def _decode_second(code: bytes, at: int, prefix: int) -> Insn | None:
    opcode = code[at]
    at += 1
    if opcode in _PLAIN2:
        return Insn(at, opcode, 2, False, opcode in (0xA0, 0xA8), False)
    if opcode & 0xF0 == 0x80:
        return _checked(code, Insn(at + 4, opcode, 2, False, False, False))
    size, memory, reg = _modrm(code, at)
    group = _STORE_GROUP2.get(opcode)
    store = memory and (opcode in _STORE2 if group is None else reg in group)
    store |= memory and opcode == 0x7E and prefix != 0xF3
    length = at + size + (opcode in _IMM8_2)
    return _checked(code, Insn(length, opcode, 2, store, False, False))


def _decode_vector(code: bytes, at: int) -> Insn | None:
    """VEX and EVEX: always ModRM (but for VZEROUPPER), immediates by map."""
    first = code[at]
    if first == 0xC5:
        table, pp, at = 1, code[at + 1] & 3, at + 2
    elif first == 0xC4:
        table, pp, at = code[at + 1] & 0x1F, code[at + 2] & 3, at + 3
    else:
        table, pp, at = code[at + 1] & 7, code[at + 2] & 3, at + 4
    evex = first == 0x62
    opcode = code[at]
    at += 1
    if table == 1 and opcode == 0x77 and not evex:
        return Insn(at, opcode, 2, False, False, False)
    size, memory, reg = _modrm(code, at)
    at += size
    if table == 1:
        store = opcode in _STORE_VECTOR2 or (opcode == 0x7E and pp != 2)
        store |= opcode == 0x91 and not evex  # KMOV
        store |= opcode == 0xAE and reg == 3  # VSTMXCSR
        length = at + (opcode in _IMM8_2)
        return _checked(code, Insn(length, opcode, 2, memory and store, False, False))
    if table == 3:
        return _checked(
            code, Insn(at + 1, opcode, 0x3A, memory and opcode in _STORE3A, False, False)
        )
    if evex:
        store = opcode in _STORE38_EVEX and pp == 1
        store |= opcode in _STORE38_DOWN and pp == 2
    else:
        store = opcode in _STORE38_VEX
    return _checked(code, Insn(at, opcode, 0x38, memory and store, False, False))


def _modrm(code: bytes, at: int) -> tuple[int, bool, int]:
    """Return (bytes of ModRM, SIB and displacement; whether it names memory; its reg field)."""
    byte = code[at]
    mod, reg, rm = byte >> 6, byte >> 3 & 7, byte & 7
    if mod == 3:
        return 1, False, reg
    size = 1
    base = rm
    if rm == 4:
        base = code[at + 1] & 7
        size = 2
    if mod == 1:
        size += 1
    elif mod == 2 or base == 5:
        size += 4
    return size, True, reg


def _checked(code: bytes, insn: Insn) -> Insn | None:
    return insn if insn.length <= len(code) else None
