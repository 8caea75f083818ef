"""Code that executes an instruction on extended state with XFRM in its mask, without a stop.

XSAVE, XSAVEOPT, XSAVEC and XRSTOR use the components of XCR0 & EDX:EAX.  The processor keeps the
system's XCR0, which may have more than XFRM.  Runtimes of enclaves load EDX and EAX with constants
in front of these instructions.  A *stub* stands for the two loads and the instruction: it executes
the instruction with the constants masked by XFRM, and then the loads.  It may use RAX and RDX,
whose values are known, and keeps the flags in RAX.

The stub refuses what the processor would not do as with XFRM in XCR0, or what the supervisor has
reasons to look at: an area that is not aligned or not in the enclave, and an XRSTOR whose header
has more than XFRM.  Then the thread continues at the instruction itself, which stops it.

Source:
    SDM vol. 1, "Managing State Using the XSAVE Feature Set"; vol. 2, LAHF, SETcc, SAHF, LEA.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from softsgx.engines.native import abi
from softsgx.engines.native.x86.asm import Assembler
from softsgx.engines.native.x86.rewrite import in_step
from softsgx.engines.native.x86.state import StateInsn, StateOperation, decode_state
from softsgx.ondemand import dataclass

__all__ = ["MOST_STATE_STUBS", "STATE_BYTES", "STATE_STUB_BYTES", "StateSite", "find_site"]

STATE_STUB_BYTES = 256
STATE_BYTES = 2 * abi.PAGE
"""Of an address space, for its stubs."""
MOST_STATE_STUBS = STATE_BYTES // STATE_STUB_BYTES

_LOW_32 = 0xFFFF_FFFF
_BITS_64 = (1 << 64) - 1
_COMPACTED = 1 << 63
_ALIGN, _HEADER_WORDS = 64, (512, 520)
#: MOV r32, imm32 or MOV r64, imm32; behind it the same of the other register, or a copy.
_LOADS = re.compile(
    rb"(?P<rax>\xb8.{4}|\x48\xc7\xc0.{4})(?:(?:\xba|\x48\xc7\xc2)(?P<edx>.{4})|\x48?(?:\x89\xc2|\x8b\xd0))"
    rb"|(?P<rdx>\xba.{4}|\x48\xc7\xc2.{4})(?:(?:\xb8|\x48\xc7\xc0)(?P<eax>.{4})|\x48?(?:\x89\xd0|\x8b\xc2))",
    re.DOTALL,
)
_SHORTEST, _LONGEST = 7, 14
_TOO_NEAR = 16  # to the start of a page: the start of instructions is not known there
_RAX, _RDX, _RSP = 0, 2, 4
_REX_X, _REX_B = 2, 1
_REX = 0x40
_FLAGS_KEPT, _OF_BACK, _FLAGS_BACK = "9f 0f 90 c0", "04 7f", "9e"  # lahf; seto al; add; sahf


@dataclass(slots=True, frozen=True)
class StateSite:
    """Two loads of constants, and the instruction on extended state behind them.

    Attributes:
        start: address of the first load.
        loads: both loads.
        first: bytes of the first one; loads_rax: whether it loads RAX.
        rax, rdx: what they load.
        operation, code: the instruction.
        pointer: LEA RDX with the operand of the instruction.
    """

    start: int
    loads: bytes
    first: int
    loads_rax: bool
    rax: int
    rdx: int
    operation: StateOperation
    code: bytes
    pointer: bytes

    @property
    def at(self) -> int:
        """The address of the instruction."""
        return self.start + len(self.loads)

    @property
    def behind(self) -> int:
        """The address of the next one."""
        return self.at + len(self.code)

    def stub(
        self, place: int, xfrm: int, enclave: range, area_bytes: int
    ) -> tuple[bytes, dict[str, int]]:
        """Return the code of the stub, and its labels.

        The labels, with the state of a thread that is stopped there:

        - up to ``kept``, and from ``flagged`` on, flags are those of the thread
        - in between AH has them, and AL overflow; at ``added`` overflow is that of the thread
        - from ``executed`` to ``refuse`` the instruction was executed
        - from ``refuse`` on the same holds for ``refuse_added`` and ``refused``

        Args:
            place: address of the stub.
            xfrm: of the enclave.
            enclave: its addresses.
            area_bytes: size of an area with all components of XFRM.
        """
        asm = Assembler()
        asm.labels |= {"site": self.at - place, "then": self.behind - place}
        asm.emit(_FLAGS_KEPT)
        asm.label("kept")
        asm.emit(self.pointer.hex())
        asm.emit(f"f6 c2 {_ALIGN - 1:02x}")  # test dl, 63
        asm.near("0f 85", "refuse")  # jnz
        asm.near("48 2b 15", "enclave")  # sub rdx, [rip+enclave]
        asm.near("48 3b 15", "room")  # cmp rdx, [rip+room]
        asm.near("0f 87", "refuse")  # ja
        if self.operation is StateOperation.XRSTOR:
            for word in _HEADER_WORDS:
                asm.emit(self.pointer.hex())
                asm.word("48 8b 92", word)  # mov rdx, [rdx+word]
                asm.near("48 85 15", "foreign")  # test [rip+foreign], rdx
                asm.near("0f 85", "refuse")  # jnz
        asm.emit(_OF_BACK)
        asm.label("added")
        asm.emit(_FLAGS_BACK)
        asm.label("flagged")
        asm.word("b8", self.rax & xfrm)  # mov eax, masked
        asm.word("ba", self.rdx & xfrm >> 32)  # mov edx, masked
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
        asm.align(8)
        asm.label("enclave")
        asm.quad(enclave.start)
        asm.label("room")
        asm.quad(len(enclave) - area_bytes)
        asm.label("foreign")
        asm.quad(~xfrm & _BITS_64 & ~_COMPACTED)
        code = asm.finish()
        assert len(code) <= STATE_STUB_BYTES, "a stub is longer than its place"
        return code, asm.labels

    def executed(self, labels: Mapping[str, int], at: int) -> bool:
        """Return whether a thread at this offset of the stub has executed the instruction."""
        return labels["executed"] <= at < labels["refuse"]


def find_site(code: bytes, at: int, address: int) -> StateSite | None:
    """Return the site of the instruction at ``at`` of a page of code, which is at ``address``.

    ``None``: it has no loads in front of it that a jump may replace, or an operand that depends on
    where the instruction is, on a segment, or on what the loads change.
    """
    insn = decode_state(code[at : at + 15])
    pointer = None if insn is None else _pointer(insn)
    if insn is None or pointer is None:
        return None
    for size in range(_SHORTEST, _LONGEST + 1):
        start = at - size
        found = _LOADS.fullmatch(code, start, at) if start >= _TOO_NEAR else None
        if found is None or not in_step(code, start):
            continue
        loads_rax = found["rax"] is not None
        first = found["rax"] or found["rdx"]
        one = _constant(first)
        given = found["edx"] or found["eax"]
        second = found[0][len(first) :]
        if given is not None:
            other = _constant(second)
        else:
            other = one if second[0] & 0xF0 == _REX else one & _LOW_32
        rax, rdx = (one, other) if loads_rax else (other, one)
        return StateSite(
            *(address + start, found[0], len(first), loads_rax, rax, rdx),
            *(insn.operation, insn.code[: insn.length], pointer),
        )
    return None


def _constant(load: bytes) -> int:
    """Return what MOV r32, imm32 or MOV r64, imm32 loads."""
    return int.from_bytes(load[-4:], "little", signed=load[0] & 0xF0 == _REX) & _BITS_64


def _pointer(insn: StateInsn) -> bytes | None:
    """Return LEA RDX with the memory operand of an instruction."""
    if insn.operation is StateOperation.XGETBV or insn.segment or insn.narrow:
        return None
    modrm, rest = insn.code[insn.opcode_at + 1], insn.code[insn.opcode_at + 2 : insn.length]
    mod, base = modrm >> 6, modrm & 7
    if mod == 0 and base == 5:
        return None
    used = set()
    if base == _RSP:
        index = rest[0] >> 3 & 7 | (insn.rex & _REX_X) << 2
        used.add(index)
        base = rest[0] & 7
        if mod == 0 and base == 5:
            base = _RSP  # a displacement alone
    used.add(base | (insn.rex & _REX_B) << 3)
    if used & {_RAX, _RDX}:
        return None
    rex = _REX | 8 | insn.rex & (_REX_X | _REX_B)
    return bytes((rex, 0x8D, modrm & 0xC7 | _RDX << 3)) + rest
