"""Code that does the EENTER of a host's own ENCLU without a stop, by the permit of its TCS.

A *stub* stands for ``mov eax, 2 … enclu`` in code of the host.  It changes no memory but the slot
of the TCS and URSP and URBP of the frame, and the enclave finds all registers and flags as EENTER
leaves them.  So the stub may use only RAX, whose value is known (2), until it holds the lock on the
words of the slot that save the other registers.  It finds the slot by RBX, which it never changes.

The last register that the stub restores is the one by which it finds the slot.  A *tail* of each
slot does that, and jumps to the entry point: it has the addresses of its slot in its code.

If the stub cannot enter, it restores everything and jumps to the ENCLU, which stops as before.

Source:
    SDM vol. 3D, "EENTER", Operation; ``vdso/permit_code.py`` for slots and gates.
"""

from __future__ import annotations

from softsgx.engines.native import abi
from softsgx.engines.native.vdso.permit_code import (
    BUSY,
    CROSSING,
    FLAGS_BACK,
    FLAGS_KEPT,
    IN,
    OUT,
    SLOT,
    SLOT_PLACES,
    STATE_MASK,
    TAIL_BYTES,
    WHO_MASK,
    emit_own_tid,
    emit_release,
)
from softsgx.engines.native.x86.asm import Assembler

__all__ = [
    "TAIL",
    "entry_stub",
    "tail",
]

_EENTER, _ENCLU_BYTES = 2, 3
#: A word that only the stub of EEXIT uses otherwise.
_MASK = "rcx_then"


def entry_stub(
    base: int, enclu: int, table: int, between: bytes = b""
) -> tuple[bytes, dict[str, int]]:
    """Return the code that replaces ``mov eax, 2 … enclu`` of a host, and its labels.

    The labels, with the state of a thread that is stopped there:

    - before ``begun`` it executes the instructions between the load and ENCLU
    - from ``swapped`` to ``none`` RAX holds RCX; at ``locked`` RCX is zero if it has the lock
    - from ``free`` to ``owned`` RCX is restored
    - from ``owned`` the thread has the lock, and RAX holds RCX
    - from ``saved`` the slot holds RCX, and from ``spilled`` all that is changed
    - at ``added`` the thread is inside, unless the gate was already closed
    - from ``refuse`` it restores what the slot holds
    - at ``released`` the lock is free, and RAX holds RDX; from ``undone`` RDX is restored

    Args:
        base: address of the stub.
        enclu: address of the ENCLU, which stops the thread.
        table: address of the table, below 2 GiB; it is full of zeros while there is none.
        between: instructions between the load and ENCLU, as they are executed at ``base``; they do
            not use RAX.
    """
    slot, asm = SLOT_PLACES, Assembler()
    asm.labels |= {"enclu": enclu - base, "behind": enclu + _ENCLU_BYTES - base}
    asm.emit(between.hex())
    asm.label("begun")
    asm.emit("48 91")  # xchg rax, rcx
    asm.label("swapped")
    _emit_find(asm, table)
    asm.short("e3", "none")  # jrcxz
    asm.emit(f"48 87 49 {slot['lock']:02x}")  # xchg [rcx+lock], rcx
    asm.label("locked")
    asm.short("e3", "owned")  # jrcxz
    asm.label("none")
    asm.emit("48 89 c1")  # mov rcx, rax
    asm.label("free")
    asm.word("b8", _EENTER)  # mov eax, 2
    asm.near("e9", "enclu")  # jmp

    asm.label("owned")
    _emit_find(asm, table)
    asm.emit(f"48 89 41 {slot['rcx']:02x}")  # mov [rcx+rcx], rax
    asm.label("saved")
    asm.emit(f"48 89 51 {slot['rdx']:02x} 4c 89 59 {slot['r11']:02x}")  # mov [rcx+…], rdx; r11
    asm.emit(f"48 89 79 {slot['rdi']:02x} 48 89 71 {slot['rsi']:02x}")  # mov [rcx+…], rdi; rsi
    asm.emit(f"4c 89 51 {slot['r10']:02x}")  # mov [rcx+r10], r10
    asm.emit(f"{FLAGS_KEPT} 48 89 41 {slot['flags']:02x}")  # …; mov [rcx+flags], rax
    asm.label("spilled")
    _emit_checks(asm)
    _emit_claim(asm, table)
    asm.emit(f"f3 48 0f ae c0 48 89 42 {slot['outside_fs']:02x}")  # rdfsbase rax; mov [rdx+…], rax
    asm.emit(f"f3 48 0f ae c8 48 89 42 {slot['outside_gs']:02x}")  # rdgsbase rax; mov [rdx+…], rax
    asm.emit(f"48 8b 42 {slot['rcx']:02x} 48 89 42 {slot['aep']:02x}")  # by way of rax
    asm.emit(f"48 8b 42 {slot['ursp']:02x}")  # mov rax, [rdx+ursp]
    asm.emit("48 89 20 48 89 68 08")  # mov [rax], rsp; mov [rax+8], rbp
    _emit_restore(asm, "48 8b 7a rdi", "48 8b 72 rsi", "4c 8b 52 r10")
    asm.word("b8", CROSSING + IN - BUSY)  # mov eax, a crossing, and from BUSY to IN
    asm.emit(f"f0 48 0f c1 42 {slot['gate']:02x}")  # lock xadd [rdx+gate], rax
    asm.label("added")
    asm.emit(f"83 e0 {STATE_MASK:02x} 83 f8 {BUSY:02x}")  # and eax, 7; cmp eax, BUSY
    asm.near("0f 85", "refuse")  # jne
    asm.emit(f"48 8b 42 {slot['fs']:02x} f3 48 0f ae d0")  # mov rax, [rdx+fs]; wrfsbase rax
    asm.emit(f"48 8b 42 {slot['gs']:02x} f3 48 0f ae d8")  # mov rax, [rdx+gs]; wrgsbase rax
    _emit_restore(asm, "4c 8b 5a r11")
    asm.emit(f"48 8b 42 {slot['flags']:02x} {FLAGS_BACK}")  # mov rax, [rdx+flags]; …
    asm.near("48 8d 0d", "behind")  # lea rcx, [rip+behind]
    asm.emit(f"ff 62 {slot['tail']:02x}")  # jmp [rdx+tail]

    asm.label("refuse")
    _emit_restore(asm, "48 8b 7a rdi", "48 8b 72 rsi", "4c 8b 52 r10", "4c 8b 5a r11")
    _emit_restore(asm, "48 8b 4a rcx")
    emit_release(asm, "undone", _EENTER)
    asm.near("e9", "enclu")  # jmp
    asm.label("end")
    return asm.finish(), asm.labels


def _emit_find(asm: Assembler, table: int) -> None:
    """Load RCX with the slot that the list has for the TCS at RBX, or zero; keep flags."""
    asm.emit("c4 e3 7b f0 cb 0c 0f b7 c9")  # rorx ecx, ebx, 12; movzx ecx, cx
    asm.word("48 8b 0c cd", table)  # mov rcx, [8*rcx+table]


def _emit_restore(asm: Assembler, *loads: str) -> None:
    """Emit MOV of registers from words of the slot at RDX, each with the name of its word."""
    for load in loads:
        code, name = load.rsplit(maxsplit=1)
        asm.emit(f"{code} {SLOT_PLACES[name]:02x}")


def _emit_checks(asm: Assembler) -> None:
    """With all registers in the slot at RCX: RDX has its address, or jump to ``refuse``."""
    slot = SLOT_PLACES
    asm.emit("48 89 ca")  # mov rdx, rcx
    asm.emit(f"48 39 5a {slot['tcs']:02x}")  # cmp [rdx+tcs], rbx
    asm.near("0f 85", "refuse")  # jne
    asm.emit(f"48 83 7a {slot['tail']:02x} 00")  # cmp qword [rdx+tail], 0
    asm.near("0f 84", "refuse")  # je
    # An AEP that is not canonical is #GP; one in the upper half takes the slow path.
    asm.emit(f"48 8b 4a {slot['rcx']:02x} 48 c1 e9 2f")  # mov rcx, [rdx+rcx]; shr rcx, 47
    asm.near("0f 85", "refuse")  # jnz
    # rt_sigprocmask(SIG_BLOCK, NULL, a word of the slot, 8): is a signal of faults blocked?
    asm.emit("31 ff 31 f6")  # xor edi, edi; xor esi, esi
    asm.emit(f"48 8d 52 {slot[_MASK]:02x}")  # lea rdx, [rdx+mask]
    asm.word("41 ba", 8)  # mov r10d, 8
    asm.word("b8", abi.SYS_RT_SIGPROCMASK)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.emit(f"48 8d 52 {-SLOT[_MASK] & 0xFF:02x}")  # lea rdx, [rdx-mask]
    asm.word(f"f7 42 {slot[_MASK]:02x}", abi.FAULT_SIGNALS)  # test dword [rdx+mask], faults
    asm.near("0f 85", "refuse")  # jnz


def _emit_claim(asm: Assembler, table: int) -> None:
    """Set the gate of the slot at RDX to BUSY with this thread's id, or jump to ``refuse``."""
    slot = SLOT_PLACES
    emit_own_tid(asm, table)
    asm.emit("89 c6")  # mov esi, eax
    asm.emit(f"48 8b 42 {slot['gate']:02x}")  # mov rax, [rdx+gate]
    asm.emit("89 c1")  # mov ecx, eax
    asm.word("81 e1", WHO_MASK)  # and ecx, state and thread
    asm.emit(f"83 f9 {OUT:02x}")  # cmp ecx, OUT
    asm.near("0f 85", "refuse")  # jne
    asm.emit(f"48 8d 74 f0 {BUSY - OUT:02x}")  # lea rsi, [rax+8*rsi+1]: BUSY, and its id
    asm.emit(f"f0 48 0f b1 72 {slot['gate']:02x}")  # lock cmpxchg [rdx+gate], rsi
    asm.near("0f 85", "refuse")  # jne
    asm.label("claimed")


def _emit_tail(asm: Assembler, slot: int) -> None:
    asm.word("48 8b 04 25", slot + SLOT["cssa"])  # mov rax, [cssa]
    asm.word("48 8b 14 25", slot + SLOT["rdx"])  # mov rdx, [rdx]
    asm.label("loaded")
    asm.word("48 c7 04 25", slot + SLOT["lock"])  # mov qword [lock], 0
    asm.word("", 0)
    asm.label("released")
    asm.word("ff 24 25", slot + SLOT["entry"])  # jmp [entry]


def tail(slot: int) -> bytes:
    """Return the tail of the slot at an address below 2 GiB."""
    asm = Assembler()
    _emit_tail(asm, slot)
    code = asm.finish()
    assert len(code) <= TAIL_BYTES, "a tail is longer than its place"
    return code


def _tail_labels() -> dict[str, int]:
    asm = Assembler()
    _emit_tail(asm, 0)
    return asm.labels


TAIL = _tail_labels()
"""Labels of a tail: from ``loaded`` RDX is restored, and from ``released`` the lock is free."""
