"""Parts of stubs for components that the processor has elsewhere than CPUID describes.

That is so in the non-compacted form of a processor of another vendor than Intel: AMD's have AVX-512
256 bytes lower.  An area of the enclave has the offsets of CPUID.  Of the components of an
instruction, some are *plain*, at the same place in both, and some *moved*.

XSAVE is executed twice.  First the moved ones are saved to the area's address plus the distance, by
which they all come to the right place.  XSTATE_BV of that lies where the second XSAVE, of the plain
components, stores; its bits are copied to XSTATE_BV of the area in between.

XRSTOR is executed with the plain components, and with the moved ones that the area does not have,
whose state becomes the initial one; then instructions of AVX-512 load the others.  These count the
registers that they extend as used, so XRSTOR of the plain ones is repeated.

Both leave the same when they are executed again from the start, which a thread does that is stopped
in between.  Deviation: an SSA frame of such a thread has some components of XRSTOR loaded already.

Source:
    SDM vol. 1, "Operation of XSAVE", "Operation of XRSTOR"; vol. 2, KMOV, VINSERTI64x4, VMOVDQU64,
    PEXT, PDEP, "Instruction Format".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from softsgx.engines.native.x86.areas import Move
from softsgx.engines.native.x86.asm import Assembler

__all__ = ["Operand", "emit_restore", "emit_save", "restores", "save_distance"]

_SSE, _AVX, _OPMASK, _ZMM_HI256, _HI16_ZMM = 1, 2, 5, 6, 7
_HEADER = 512
_HEADER_END = 576
_WIDE = 8
_REX = 0x40
_RAX, _RDX = 0, 2
_LOW_31 = (1 << 31) - 1
_FLAGS_KEPT, _OF_BACK, _FLAGS_BACK = "9f 0f 90 c0", "04 7f", "9e"  # lahf; seto al; add; sahf


class Operand(NamedTuple):
    """An operand in memory, without RIP, segment and 32-bit address.

    Attributes:
        rex: its REX bits X and B.
        modrm: mod and r/m.
        sib: the SIB byte, or none.
        displacement: is added.
    """

    rex: int
    modrm: int
    sib: bytes
    displacement: int

    def code(self, opcode: bytes, register: int, by: int = 0, wide: int = _WIDE) -> bytes:
        """Return the instruction ``opcode`` on it and ``register``, ``by`` bytes higher.

        Raises:
            OverflowError: that is too far.
        """
        at = self.displacement + by
        far = at.to_bytes(4, "little", signed=True)
        absolute = self.modrm >> 6 == 0 and bool(self.sib) and self.sib[0] & 7 == 5
        mod = self.modrm & 7 if absolute else self.modrm & 7 | 0x80
        return bytes((_REX | wide | self.rex, *opcode, mod | register << 3)) + self.sib + far


def save_distance(moves: Sequence[Move], plain: int) -> int:
    """Return how far moved components are to be saved from an area's address.

    ``plain`` are the other components that are saved.  0: XSAVE cannot do that.
    """
    distances = {move.described - move.real for move in moves}
    if len(distances) != 1:
        return 0
    (distance,) = distances
    at = distance + _HEADER
    # The header is stored there; what is stored later covers it.
    covered = plain >> _AVX & 1 and _HEADER_END <= at <= _HEADER_END + 256 - 8
    low = all(move.number < 31 for move in moves) and plain <= _LOW_31
    return distance if distance > 0 and distance % 64 == 0 and covered and low else 0


def restores(moves: Sequence[Move], plain: int) -> bool:
    """Return whether there are instructions that load these moved components."""
    numbers = {move.number for move in moves}
    known = numbers <= {_OPMASK, _ZMM_HI256, _HI16_ZMM} and plain <= _LOW_31
    return known and plain >> _SSE & plain >> _AVX & 1 == 1


def emit_save(
    asm: Assembler, insn: bytes, operand: Operand, wide: int, moves: Sequence[Move], plain: int
) -> None:
    """Save the moved components; flags are the thread's, before and after.

    From the label ``kept_again`` to ``added_again`` they are in AX.

    Args:
        asm: gets the code.
        insn: opcode of XSAVE, with the bits of ModRM in its last byte.
        operand: its area.
        wide: its REX.W.
        moves: the moved components.
        plain: the others.
    """
    distance = save_distance(moves, plain)
    moved = _bits(moves)
    asm.word("b8", moved)  # mov eax, moved
    asm.word("ba", 0)  # mov edx, 0
    asm.emit(operand.code(insn[:-1], insn[-1], distance, wide).hex())
    asm.emit(_FLAGS_KEPT)
    asm.label("kept_again")
    asm.word(operand.code(b"\x81", 4, _HEADER, 0).hex(), ~moved)  # and dword [header], others
    asm.emit(operand.code(b"\x8b", _RDX, distance + _HEADER, 0).hex())  # mov edx, [stored]
    asm.word("81 e2", moved)  # and edx, moved
    asm.emit(operand.code(b"\x09", _RDX, _HEADER, 0).hex())  # or [header], edx
    asm.emit(_OF_BACK)
    asm.label("added_again")
    asm.emit(_FLAGS_BACK)


def emit_restore(
    asm: Assembler, insn: bytes, operand: Operand, wide: int, moves: Sequence[Move], plain: int
) -> None:
    """Restore from an area with moved components, with flags in AX, and jump to ``executed``.

    From ``loads`` to ``added_loads`` and from ``kept_loading`` to ``added_loading`` flags are in
    AX, otherwise they are the thread's.  At ``moved`` is a quadword of the moved components.
    """
    pointer = operand.code(b"\x8d", _RDX).hex()
    asm.label("loads")
    # Faults come before anything is loaded.
    asm.emit(operand.code(b"\x3a", _RAX, min(move.described for move in moves), 0).hex())  # cmp al
    asm.emit(operand.code(b"\x3a", _RAX, max(map(_end, moves)) - 1, 0).hex())
    asm.emit(_OF_BACK)
    asm.label("added_loads")
    asm.emit(_FLAGS_BACK)
    asm.emit(operand.code(b"\x8b", _RAX, _HEADER).hex())  # mov rax, XSTATE_BV
    asm.emit("48 f7 d0")  # not rax
    asm.near("c4 e2 fa f5 05", "moved")  # pext rax, rax, [rip+moved]
    asm.near("c4 e2 fb f5 05", "moved")  # pdep rax, rax, [rip+moved]
    asm.word("8d 80", plain)  # lea eax, [rax+plain]
    asm.word("ba", 0)  # mov edx, 0
    xrstor = operand.code(insn[:-1], insn[-1], 0, wide).hex()
    asm.emit(xrstor)
    asm.emit(_FLAGS_KEPT)
    asm.label("kept_loading")
    asm.emit(pointer)  # lea rdx
    for move in moves:
        asm.word("f6 82", _HEADER)  # test byte [rdx+header], …
        asm.emit(f"{1 << move.number:02x}")
        asm.near("0f 84", f"without {move.number}")  # jz
        asm.emit(_loads(move).hex())
        asm.label(f"without {move.number}")
    asm.emit(_OF_BACK)
    asm.label("added_loading")
    asm.emit(_FLAGS_BACK)
    asm.word("b8", plain)  # mov eax, plain
    asm.word("ba", 0)  # mov edx, 0
    asm.emit(xrstor)
    asm.near("e9", "executed")  # jmp


def _loads(move: Move) -> bytes:
    """Return instructions that load a component from the area at RDX."""
    at, code = move.described, bytearray()
    if move.number == _OPMASK:
        for register in range(8):  # kmovq k, [rdx+…]
            code += bytes((0xC4, 0xE1, 0xF8, 0x90, 0x82 | register << 3))
            code += (at + 8 * register).to_bytes(4, "little")
    elif move.number == _ZMM_HI256:
        for register in range(16):  # vinserti64x4 zmm, zmm, [rdx+…], 1
            high = 0x73 | (not register & 8) << 7
            code += bytes((0x62, high, 0x85 | (~register & 15) << 3, 0x48, 0x3A))
            code += bytes((0x82 | (register & 7) << 3,))
            code += (at + 32 * register).to_bytes(4, "little") + b"\x01"
    else:
        for register in range(16):  # vmovdqu64 zmm16 and above, [rdx+…]
            high = 0x61 | (not register & 8) << 7
            code += bytes((0x62, high, 0xFE, 0x48, 0x6F, 0x82 | (register & 7) << 3))
            code += (at + 64 * register).to_bytes(4, "little")
    return bytes(code)


def _bits(moves: Sequence[Move]) -> int:
    return sum(1 << move.number for move in moves)


def _end(move: Move) -> int:
    return move.described + move.size
