"""Code that executes an instruction on extended state with XFRM in its mask, without a stop.

XSAVE, XSAVEOPT, XSAVEC and XRSTOR use the components of XCR0 & EDX:EAX.  The processor keeps the
system's XCR0, which may have more than XFRM.  Runtimes of enclaves load EDX and EAX with constants
in front of these instructions.  A *stub* stands for the two loads and the instruction: it executes
the instruction with the constants masked by XFRM, and then the loads.  It may use RAX and RDX,
whose values are known, and keeps the flags in RAX.

The stub refuses what the processor would not do as with XFRM in XCR0, or what the supervisor has
reasons to look at: an area that is not aligned or not in the enclave, and an XRSTOR whose header
has more than XFRM.  Then the thread continues at the instruction itself, which stops it.

The processor may have components elsewhere in the non-compacted form than CPUID describes to the
program.  What does not touch these is executed as it is: XSAVEC, and XRSTOR of a compacted area or
of one that has none of their state.  For the rest see ``vdso/moved_state.py``.

Source:
    SDM vol. 1, "Managing State Using the XSAVE Feature Set"; vol. 2, LAHF, SETcc, SAHF, LEA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from softsgx.engines.native.vdso.moved_state import (
    Operand,
    emit_restore,
    emit_save,
    restores,
    save_distance,
)
from softsgx.engines.native.vdso.stubs import STATE_STUB_BYTES
from softsgx.engines.native.x86.areas import Move
from softsgx.engines.native.x86.asm import Assembler
from softsgx.engines.native.x86.rewrite import in_step
from softsgx.engines.native.x86.state import StateInsn, StateOperation, decode_state
from softsgx.ondemand import dataclass, pattern

__all__ = ["StateSite", "find_site"]

_LOW_32 = 0xFFFF_FFFF
_BITS_64 = (1 << 64) - 1
_COMPACTED = 1 << 63
_ALIGN, _HEADER_WORDS = 64, (512, 520)
#: MOV r32, imm32 or MOV r64, imm32; behind it the same of the other register, a copy, or XOR.
_LOADS = pattern(
    rb"(?P<rax>\xb8.{4}|\x48\xc7\xc0.{4})(?:(?:\xba|\x48\xc7\xc2)(?P<edx>.{4})"
    rb"|(?P<no_edx>\x48?[\x31\x33]\xd2)|\x48?(?:\x89\xc2|\x8b\xd0))"
    rb"|(?P<rdx>\xba.{4}|\x48\xc7\xc2.{4})(?:(?:\xb8|\x48\xc7\xc0)(?P<eax>.{4})"
    rb"|(?P<no_eax>\x48?[\x31\x33]\xc0)|\x48?(?:\x89\xd0|\x8b\xc2))",
    re.DOTALL,
)
#: MOV [RSP+disp8] or [RSP+disp32], RDX: the dynamic loader clears the header so.
_STORES = pattern(rb"(?:\x48\x89(?:\x54\x24.|\x94\x24.{4}))*", re.DOTALL)
_MOST_STORES = 64
_SHORTEST, _LONGEST = 7, 14
_TOO_NEAR = 16  # to the start of a page: the start of instructions is not known there
_RAX, _RDX, _RSP = 0, 2, 4
_REX_W, _REX_X, _REX_B = 8, 2, 1
_FAR = (1 << 31) - (1 << 16)  # displacements of parts of an area have 32 bits, too
_REX = 0x40
_FLAGS_KEPT, _OF_BACK, _FLAGS_BACK = "9f 0f 90 c0", "04 7f", "9e"  # lahf; seto al; add; sahf


@dataclass(slots=True, frozen=True)
class StateSite:
    """Two loads of constants, and the instruction on extended state behind them.

    Attributes:
        start: address of the first load.
        loads: both loads.
        first: bytes of the first one; loads_rax: whether it loads RAX.
        before: all in front of the instruction, if the second load is XOR, which changes flags, or
            RDX is stored behind it: the stub has a copy.
        rax, rdx: what they load.
        operation, code: the instruction.
        opcode: behind 0F, and the bits of its ModRM that name it.
        wide: its REX.W.
        operand: what it is executed on.
    """

    start: int
    loads: bytes
    first: int
    loads_rax: bool
    before: bytes
    rax: int
    rdx: int
    operation: StateOperation
    code: bytes
    opcode: bytes
    wide: int
    operand: Operand

    @property
    def at(self) -> int:
        """The address of the instruction."""
        return self.start + max(len(self.loads), len(self.before))

    @property
    def behind(self) -> int:
        """The address of the next one."""
        return self.at + len(self.code)

    @property
    def mask(self) -> int:
        """The components that it asks for."""
        return self.rax & _LOW_32 | (self.rdx & _LOW_32) << 32

    @property
    def pointer(self) -> bytes:
        """LEA RDX with its operand."""
        return self.operand.code(b"\x8d", _RDX)

    def can_have_stub(self, xfrm: int, moves: Sequence[Move]) -> bool:
        """Return whether there is a stub for it, see :meth:`stub`."""
        moves, plain = self._moves(xfrm, moves)
        match self.operation:
            case StateOperation.XSAVE:
                return not moves or save_distance(moves, plain) > 0
            case StateOperation.XSAVEOPT:
                return not moves
            case _:
                return True

    def _moves(self, xfrm: int, moves: Sequence[Move]) -> tuple[list[Move], int]:
        """Return those of its components that are elsewhere, and the others."""
        wanted = self.mask & xfrm
        found = [move for move in moves if wanted >> move.number & 1]
        return found, wanted & ~sum(1 << move.number for move in found)

    def stub(
        self,
        place: int,
        xfrm: int,
        enclave: range,
        area_bytes: int,
        moves: Sequence[Move],
        loading: bool,
    ) -> tuple[bytes, dict[str, int]]:
        """Return the code of the stub, and its labels.

        The labels, with the state of a thread that is stopped there:

        - at the start it has executed the first load; within a copy of ``before`` what is in front
        - up to ``kept``, and from ``flagged`` on, flags are those of the thread
        - in between AH has them, and AL overflow; at ``added`` overflow is that of the thread
        - from ``executed`` to ``refuse`` the instruction was executed
        - from ``refuse`` on the same holds for ``refuse_added`` and ``refused``
        - for moved components see :func:`emit_save` and :func:`emit_restore`

        Args:
            place: address of the stub.
            xfrm: of the enclave.
            enclave: its addresses.
            area_bytes: size of an area with all components of XFRM.
            moves: components that this processor has elsewhere in the non-compacted form.
            loading: whether the processor has the instructions of :func:`emit_restore`.
        """
        moves, plain = self._moves(xfrm, moves)
        restoring = self.operation is StateOperation.XRSTOR
        loads = restoring and bool(moves) and loading and restores(moves, plain)
        asm = Assembler()
        asm.labels |= {"site": self.at - place, "then": self.behind - place}
        asm.emit(self.before.hex())
        asm.emit(_FLAGS_KEPT)
        asm.label("kept")
        asm.emit(self.pointer.hex())
        asm.emit(f"f6 c2 {_ALIGN - 1:02x}")  # test dl, 63
        asm.near("0f 85", "refuse")  # jnz
        asm.near("48 2b 15", "enclave")  # sub rdx, [rip+enclave]
        asm.near("48 3b 15", "room")  # cmp rdx, [rip+room]
        asm.near("0f 87", "refuse")  # ja
        if restoring:
            for word in _HEADER_WORDS:
                asm.emit(self.pointer.hex())
                asm.word("48 8b 92", word)  # mov rdx, [rdx+word]
                asm.near("48 85 15", "foreign")  # test [rip+foreign], rdx
                asm.near("0f 85", "refuse")  # jnz
            if moves:
                self._find_moved(asm, "loads" if loads else "refuse")
        asm.emit(_OF_BACK)
        asm.label("added")
        asm.emit(_FLAGS_BACK)
        asm.label("flagged")
        masked = self.mask & xfrm
        if moves and self.operation is StateOperation.XSAVE:
            emit_save(asm, self.opcode, self.operand, self.wide, moves, plain)
            masked = plain
        asm.word("b8", masked)  # mov eax, masked
        asm.word("ba", masked >> 32)  # mov edx, masked
        asm.emit(self.code.hex())
        asm.label("executed")
        asm.emit(self.loads.hex())
        asm.near("e9", "then")  # jmp
        asm.label("refuse")
        asm.emit(_OF_BACK)
        asm.label("refuse_added")
        asm.emit(_FLAGS_BACK)
        asm.label("refused")
        asm.emit(self.loads.hex())
        asm.near("e9", "site")  # jmp
        asm.label("end")
        if loads:
            emit_restore(asm, self.opcode, self.operand, self.wide, moves, plain)
        asm.align(8)
        asm.label("enclave")
        asm.quad(enclave.start)
        asm.label("room")
        asm.quad(len(enclave) - area_bytes)
        asm.label("foreign")
        asm.quad(~xfrm & _BITS_64 & ~_COMPACTED)
        asm.label("moved")
        asm.quad(sum(1 << move.number for move in moves))
        code = asm.finish()
        assert len(code) <= STATE_STUB_BYTES, "a stub is longer than its place"
        return code, asm.labels

    def _find_moved(self, asm: Assembler, found: str) -> None:
        """Jump to ``found`` if XRSTOR loads a moved component; RDX has XCOMP_BV of the area."""
        asm.emit("48 85 d2")  # test rdx, rdx
        asm.near("0f 88", "plain")  # js: it is compacted
        asm.emit(self.pointer.hex())
        asm.word("48 8b 92", _HEADER_WORDS[0])  # mov rdx, [rdx+512]
        asm.near("48 85 15", "moved")  # test [rip+moved], rdx
        asm.near("0f 85", found)  # jnz
        asm.label("plain")

    def executed(self, labels: Mapping[str, int], at: int) -> bool:
        """Return whether a thread at this offset of the stub has executed the instruction."""
        return labels["executed"] <= at < labels["refuse"]


def find_site(code: bytes, at: int, address: int) -> StateSite | None:
    """Return the site of the instruction at ``at`` of a page of code, which is at ``address``.

    ``None``: it has no loads in front of it that a jump may replace, or an operand that depends on
    where the instruction is, on a segment, or on what the loads change.
    """
    insn = decode_state(code[at : at + 15])
    operand = None if insn is None else _operand(insn)
    if insn is None or operand is None:
        return None
    second, modrm = insn.code[insn.opcode_at : insn.opcode_at + 2]
    opcode = bytes((0x0F, second, modrm >> 3 & 7))
    for end in range(at, max(at - _MOST_STORES, _TOO_NEAR), -1):
        if end < at and code[end : end + 2] != b"\x48\x89":
            continue
        if _STORES.fullmatch(code, end, at):
            site = _site_with(insn, operand, opcode, code, end, at, address)
            if site is not None:
                return site
    return None


def _site_with(
    insn: StateInsn,
    operand: Operand,
    opcode: bytes,
    code: bytes,
    end: int,
    at: int,
    address: int,
) -> StateSite | None:
    """Return the site of the instruction at ``at`` with loads up to ``end``, if there are any."""
    for size in range(_SHORTEST, _LONGEST + 1):
        start = end - size
        found = _LOADS.fullmatch(code, start, end) if start >= _TOO_NEAR else None
        if found is None or not in_step(code, start):
            continue
        loads_rax, zeroing = found["rax"] is not None, found["no_edx"] or found["no_eax"]
        before = code[start:at] if zeroing or end < at else b""
        first = found["rax"] or found["rdx"]
        one = _constant(first)
        given = found["edx"] or found["eax"]
        second = found[0][len(first) :]
        if zeroing:
            other = 0
        elif given is not None:
            other = _constant(second)
        else:
            other = one if second[0] & 0xF0 == _REX else one & _LOW_32
        rax, rdx = (one, other) if loads_rax else (other, one)
        return StateSite(
            *(address + start, found[0], len(first), loads_rax, before, rax, rdx),
            *(insn.operation, insn.code[: insn.length], opcode, insn.rex & _REX_W, operand),
        )
    return None


def _constant(load: bytes) -> int:
    """Return what MOV r32, imm32 or MOV r64, imm32 loads."""
    return int.from_bytes(load[-4:], "little", signed=load[0] & 0xF0 == _REX) & _BITS_64


def _operand(insn: StateInsn) -> Operand | None:
    """Return the memory operand of an instruction, if a stub can use it."""
    if insn.operation is StateOperation.XGETBV or insn.segment or insn.narrow:
        return None
    modrm, rest = insn.code[insn.opcode_at + 1], insn.code[insn.opcode_at + 2 : insn.length]
    mod, base = modrm >> 6, modrm & 7
    if mod == 0 and base == 5:
        return None
    used, sib = set(), b""
    if base == _RSP:
        sib, rest = rest[:1], rest[1:]
        used.add(sib[0] >> 3 & 7 | (insn.rex & _REX_X) << 2)
        base = sib[0] & 7
        if mod == 0 and base == 5:
            base = _RSP  # a displacement alone
    used.add(base | (insn.rex & _REX_B) << 3)
    displacement = int.from_bytes(rest, "little", signed=True)
    if used & {_RAX, _RDX} or not -_FAR < displacement < _FAR:
        return None
    return Operand(insn.rex & (_REX_X | _REX_B), modrm & 0xC7, sib, displacement)
