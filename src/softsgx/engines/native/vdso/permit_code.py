"""Code that enters and leaves enclaves without a stop, in memory that the supervisor shares.

A TCS has a *slot*.  Its *gate*, one quadword, says whether EENTER or EEXIT is permitted now:

====== ===============  =======================================================================
bits   name             meaning
====== ===============  =======================================================================
0–2    state            OUT: EENTER is permitted; BUSY: a thread is about to do it; IN: that thread
                        may do EEXIT; CLOSED and above: nothing is permitted
3–24   thread           the thread's id, as its gettid() returns it; 0 in state OUT
25–63  crossings        number of crossings since the supervisor opened the gate
====== ===============  =======================================================================

A crossing takes effect in one atomic instruction on the gate.  When the supervisor exchanges the
gate for CLOSED, the old value says where the thread is and how often it has crossed.  From
registers and slot the supervisor can undo the instructions before the atomic one, and complete
those after it; the labels of both pieces of code say what is due at which instruction.

The code of EENTER may use RAX, RCX and flags, which our vDSO does not preserve.  The code of EEXIT
may use only RAX, whose value is known (4), until it holds the lock on those words of the slot that
save the other registers.  It finds the slot by GS.  Enclave code can change GS, so the code also
compares the thread's id with the one in the gate.

Source:
    SDM vol. 3D, "EENTER" and "EEXIT", Operation; vol. 3A, "Locked Atomic Operations".
"""

from __future__ import annotations

from softsgx.engines.native import abi
from softsgx.engines.native.x86.asm import Assembler

__all__ = [
    "ALONE_AT",
    "BUSY",
    "CLOSED",
    "CROSSING",
    "EXITS_AT",
    "FLAGS_BACK",
    "FLAGS_KEPT",
    "HASHED",
    "IN",
    "OUT",
    "SLOT",
    "SLOTS",
    "SLOTS_AT",
    "SLOT_BYTES",
    "SLOT_PLACES",
    "STATE_MASK",
    "STUB_BYTES",
    "TABLE_BYTES",
    "TAILS_BYTES",
    "TAIL_BYTES",
    "THREAD_MASK",
    "THREAD_SHIFT",
    "WHO_MASK",
    "emit_own_tid",
    "emit_permitted_entry",
    "emit_release",
    "exit_stub",
    "hashed",
]

OUT, BUSY, IN, CLOSED = 1, 2, 3, 4
STATE_MASK, THREAD_SHIFT, THREAD_MASK = 7, 3, (1 << 22) - 1
CROSSING = 1 << 25
WHO_MASK = CROSSING - 1
"""State and thread of a gate."""

HASHED = 1 << 16
"""Entries of each of the two lists of pointers to slots, which are hashed by page address."""

SLOT_BYTES = 256
EXITS_AT = 8 * HASHED
SLOTS_AT, SLOTS = 2 * EXITS_AT, 256
ALONE_AT = SLOTS_AT + SLOTS * SLOT_BYTES
#: Of a tail (``vdso/entry_code.py``), and of those of all slots, a multiple of a page.
TAIL_BYTES = 48
TAILS_BYTES = SLOTS * TAIL_BYTES
TABLE_BYTES = ALONE_AT + abi.PAGE
"""Size of the table: pointers by TCS, pointers by GS base, slots, the id of an only thread or 0."""

SLOT = {
    name: 8 * number - 64
    for number, name in enumerate(
        (
            *("gate", "tcs", "entry", "cssa", "fs", "gs", "ursp", "aep", "exited"),
            *("outside_fs", "outside_gs"),
            *("lock", "rcx", "rdx", "r11", "flags", "inside_fs", "inside_gs", "rcx_then"),
            *("rdi", "rsi", "r10", "tail"),
        )
    )
}
"""Offsets of the quadwords of a slot from the address that pointers to it hold; each fits a byte.

The supervisor writes the first line and ``tail``, and threads its gate; EEXIT adds ``exited`` to
the gate.  EENTER writes ``aep`` and the second line for EEXIT.  The thread that holds the lock
writes the others.
"""

SLOT_PLACES = {name: offset & 0xFF for name, offset in SLOT.items()}
"""The same as displacements of one byte."""

STUB_BYTES = 512
FLAGS_KEPT = "9f 0f 90 c0"  # lahf; seto al
FLAGS_BACK = "04 7f 9e"  # add al, 0x7f; sahf


def hashed(address: int) -> int:
    """Return the place of an address in a list of pointers."""
    return address >> 12 & HASHED - 1


def emit_permitted_entry(asm: Assembler) -> None:
    """EENTER of RBX if it is permitted; otherwise jump to ``ask``.

    The labels:

    - From ``pushed`` seven words are on the stack; a jump to ``undo`` gives up the attempt.
    - From ``popping`` the code pops them; ``undo`` has the same instructions.
    - At ``added`` the thread is inside, unless the gate was already closed.
    - At ``permit_end`` the thread is at the entry point.
    """
    slot = SLOT_PLACES
    asm.near("48 8b 0d", "permits_at")  # mov rcx, [rip+permits_at]
    asm.emit("48 85 c9")  # test rcx, rcx
    asm.near("0f 84", "ask")  # jz
    asm.emit("48 89 d8 48 c1 e8 0c 0f b7 c0")  # mov rax, rbx; shr rax, 12; movzx eax, ax
    asm.emit("48 8b 0c c1")  # mov rcx, [rcx+8*rax]
    asm.emit("48 85 c9")  # test rcx, rcx
    asm.near("0f 84", "ask")  # jz
    asm.emit(f"48 39 59 {slot['tcs']:02x}")  # cmp [rcx+tcs], rbx
    asm.near("0f 85", "ask")  # jne
    asm.emit("57 56 52 41 51 41 52 41 53 51")  # push rdi, rsi, rdx, r9, r10, r11, rcx
    asm.label("pushed")
    asm.emit("49 89 c9")  # mov r9, rcx

    # rt_sigprocmask(SIG_BLOCK, NULL, rsp, 8): is a signal of faults blocked?
    asm.emit("31 ff 31 f6")  # xor edi, edi; xor esi, esi
    asm.emit("48 89 e2")  # mov rdx, rsp
    asm.word("41 ba", 8)  # mov r10d, 8
    asm.word("b8", abi.SYS_RT_SIGPROCMASK)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.emit("8b 04 24")  # mov eax, [rsp]
    asm.word("a9", abi.FAULT_SIGNALS)  # test eax, faults
    asm.near("0f 85", "undo")  # jnz

    _emit_claim(asm)
    asm.emit(f"f3 48 0f ae c0 49 89 41 {slot['outside_fs']:02x}")  # rdfsbase rax; mov [r9+…], rax
    asm.emit(f"f3 48 0f ae c8 49 89 41 {slot['outside_gs']:02x}")  # rdgsbase rax; mov [r9+…], rax
    asm.near("48 8d 05", "aep")  # lea rax, [rip+aep]
    asm.emit(f"49 89 41 {slot['aep']:02x}")  # mov [r9+aep], rax
    asm.emit(f"49 8b 41 {slot['ursp']:02x}")  # mov rax, [r9+ursp]
    asm.emit("48 8d 54 24 38")  # lea rdx, [rsp+7*8]
    asm.emit("48 89 10 48 89 68 08")  # mov [rax], rdx; mov [rax+8], rbp
    asm.emit("4c 89 c9")  # mov rcx, r9
    asm.label("popping")
    asm.emit(_POP_ALL)
    asm.label("popped")
    asm.word("b8", CROSSING + IN - BUSY)  # mov eax, a crossing, and from BUSY to IN
    asm.emit(f"f0 48 0f c1 41 {slot['gate']:02x}")  # lock xadd [rcx+gate], rax
    asm.label("added")
    asm.emit(f"83 e0 {STATE_MASK:02x} 83 f8 {BUSY:02x}")  # and eax, 7; cmp eax, BUSY
    asm.near("0f 85", "ask")  # jne
    asm.emit(f"48 8b 41 {slot['fs']:02x} f3 48 0f ae d0")  # mov rax, [rcx+fs]; wrfsbase rax
    asm.emit(f"48 8b 41 {slot['gs']:02x} f3 48 0f ae d8")  # mov rax, [rcx+gs]; wrgsbase rax
    asm.emit(f"48 8b 41 {slot['entry']:02x} 48 89 44 24 f8")  # mov rax, [rcx+…]; mov [rsp-8], rax
    asm.emit(f"48 8b 41 {slot['cssa']:02x}")  # mov rax, [rcx+cssa]
    asm.near("48 8d 0d", "eenter_after")  # lea rcx, [rip+eenter_after]
    asm.emit("ff 64 24 f8")  # jmp [rsp-8]
    asm.label("permit_end")
    asm.label("undo")
    asm.emit(_POP_ALL)
    asm.label("undone")
    asm.near("e9", "ask")  # jmp


def _emit_claim(asm: Assembler) -> None:
    """Set the gate of the slot at R9 to BUSY with this thread's id, or jump to ``undo``."""
    slot = SLOT_PLACES
    asm.near("48 8b 15", "permits_at")  # mov rdx, [rip+permits_at]
    asm.word("8b b2", ALONE_AT)  # mov esi, [rdx+alone]
    asm.emit("85 f6")  # test esi, esi
    asm.short("75", "known")  # jnz
    asm.word("b8", abi.SYS_GETTID)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.emit("89 c6")  # mov esi, eax
    asm.label("known")
    asm.emit(f"49 8b 41 {slot['gate']:02x}")  # mov rax, [r9+gate]
    asm.emit("89 c2")  # mov edx, eax
    asm.word("81 e2", WHO_MASK)  # and edx, state and thread
    asm.emit(f"83 fa {OUT:02x}")  # cmp edx, OUT
    asm.near("0f 85", "undo")  # jne
    asm.emit(f"48 8d 74 f0 {BUSY - OUT:02x}")  # lea rsi, [rax+8*rsi+1]: BUSY, and its id
    asm.emit(f"f0 49 0f b1 71 {slot['gate']:02x}")  # lock cmpxchg [r9+gate], rsi
    asm.near("0f 85", "undo")  # jne


def emit_own_tid(asm: Assembler, table: int) -> None:
    """Load EAX with the id of the thread; the system call changes RCX and R11."""
    asm.word("8b 04 25", table + ALONE_AT)  # mov eax, [alone]
    asm.emit("85 c0")  # test eax, eax
    asm.short("75", "known")  # jnz
    asm.word("b8", abi.SYS_GETTID)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.label("known")


def emit_release(asm: Assembler, restored: str, leaf: int) -> None:
    """With the slot at RDX: restore flags and RDX, release the lock, and load EAX.

    The lock is free from the label ``released``, and RDX is restored from the label ``restored``.
    """
    slot = SLOT_PLACES
    asm.emit(f"48 8b 42 {slot['flags']:02x} {FLAGS_BACK}")  # mov rax, [rdx+flags]; …
    asm.emit(f"48 8b 42 {slot['rdx']:02x}")  # mov rax, [rdx+rdx]
    asm.word(f"48 c7 42 {slot['lock']:02x}", 0)  # mov qword [rdx+lock], 0
    asm.label("released")
    asm.emit("48 89 c2")  # mov rdx, rax
    asm.label(restored)
    asm.word("b8", leaf)  # mov eax, leaf


_POP_ALL = "41 5b 41 5b 41 5a 41 59 5a 5e 5f"
"""pop r11 twice, r10, r9, rdx, rsi, rdi: the seven words on the stack; keeps flags and RCX."""


def exit_stub(
    base: int, enclu: int, table: int, between: bytes = b""
) -> tuple[bytes, dict[str, int]]:
    """Return the code that replaces ``mov eax, 4 … enclu`` in an enclave, and its labels.

    The labels, with the state of a thread that is stopped there:

    - before ``begun`` it executes the instructions between the load and ENCLU
    - before ``locked`` only RAX is changed; at ``locked`` RAX is zero if the thread has the lock
    - at ``swapped`` RAX and RCX are exchanged
    - at ``busy`` they are, too, without the lock; from ``free`` RCX is restored
    - from ``owned`` the thread has the lock, and RAX holds RCX
    - from ``saved`` the slot at RCX holds RCX
    - from ``spilled`` the slot, at RCX and later at RDX, holds all that is changed
    - at ``tried`` the thread is outside, unless the gate was already closed
    - at ``released`` the lock is free, and RAX holds RDX; from ``restored`` RDX is restored

    Args:
        base: address of the stub.
        enclu: address of the ENCLU, which stops the thread.
        table: address of the table, below 2 GiB.
        between: instructions between the load and ENCLU; they are position-independent and do not
            use RAX.
    """
    slot, asm = SLOT_PLACES, Assembler()
    asm.labels["enclu"] = enclu - base
    asm.emit(between.hex())
    asm.label("begun")
    asm.emit("f3 48 0f ae c8")  # rdgsbase rax
    asm.emit("c4 e3 7b f0 c0 0c 0f b7 c0")  # rorx eax, eax, 12; movzx eax, ax
    asm.word("48 8b 04 c5", table + EXITS_AT)  # mov rax, [8*rax+exits]
    asm.emit(f"48 87 40 {slot['lock']:02x}")  # xchg rax, [rax+lock]
    asm.label("locked")
    asm.emit("48 91")  # xchg rax, rcx
    asm.label("swapped")
    asm.short("e3", "owned")  # jrcxz
    asm.label("busy")
    asm.emit("48 91")  # xchg rax, rcx
    asm.label("free")
    asm.word("b8", 4)  # mov eax, 4
    asm.near("e9", "enclu")  # jmp

    _emit_spill(asm, table)
    asm.label("spilled")
    asm.emit("48 89 ca")  # mov rdx, rcx
    emit_own_tid(asm, table)
    asm.word("4c 8d 1c c5", IN)  # lea r11, [8*rax+IN]
    asm.emit(f"48 8b 42 {slot['gate']:02x}")  # mov rax, [rdx+gate]
    asm.emit("89 c1")  # mov ecx, eax
    asm.word("81 e1", WHO_MASK)  # and ecx, state and thread
    asm.emit("44 39 d9")  # cmp ecx, r11d
    asm.near("0f 85", "refuse")  # jne
    # A target that is not canonical is #GP inside; one in the upper half takes the slow path.
    asm.emit("48 89 d9 48 c1 e9 2f")  # mov rcx, rbx; shr rcx, 47
    asm.near("0f 85", "refuse")  # jnz
    asm.emit(f"48 89 c1 4c 29 d9 48 03 4a {slot['exited']:02x}")  # mov rcx, rax; sub, r11; add, …
    asm.emit(f"4c 8b 5a {slot['outside_fs']:02x} f3 49 0f ae d3")  # mov r11, [rdx+…]; wrfsbase r11
    asm.emit(f"4c 8b 5a {slot['outside_gs']:02x} f3 49 0f ae db")  # mov r11, [rdx+…]; wrgsbase r11
    # Once outside, another thread may enter: later reads must be of the third line only.
    asm.emit(f"4c 8b 5a {slot['aep']:02x} 4c 89 5a {slot['rcx_then']:02x}")  # by way of r11
    asm.emit(f"f0 48 0f b1 4a {slot['gate']:02x}")  # lock cmpxchg [rdx+gate], rcx
    asm.label("tried")
    asm.short("75", "refuse")  # jne
    asm.emit(f"4c 8b 5a {slot['r11']:02x}")  # mov r11, [rdx+r11]
    asm.emit(f"48 8b 4a {slot['rcx_then']:02x}")  # mov rcx, [rdx+…]
    emit_release(asm, "restored", 4)
    asm.emit("ff e3")  # jmp rbx
    asm.label("refuse")
    asm.emit("f4")  # hlt: a stop, where the supervisor undoes the attempt
    asm.label("end")
    code = asm.finish()
    assert len(code) <= STUB_BYTES, "a stub is longer than its place"
    return code, asm.labels


def _emit_spill(asm: Assembler, table: int) -> None:
    """With the lock held, save all that is changed to the slot, and its address in RCX."""
    slot = SLOT_PLACES
    asm.label("owned")
    asm.emit("f3 48 0f ae c9")  # rdgsbase rcx
    asm.emit("c4 e3 7b f0 c9 0c 0f b7 c9")  # rorx ecx, ecx, 12; movzx ecx, cx
    asm.word("48 8b 0c cd", table + EXITS_AT)  # mov rcx, [8*rcx+exits]
    asm.emit(f"48 89 41 {slot['rcx']:02x}")  # mov [rcx+rcx], rax
    asm.label("saved")
    asm.emit(f"48 89 51 {slot['rdx']:02x}")  # mov [rcx+rdx], rdx
    asm.emit(f"4c 89 59 {slot['r11']:02x}")  # mov [rcx+r11], r11
    asm.emit(f"f3 48 0f ae c0 48 89 41 {slot['inside_fs']:02x}")  # rdfsbase rax; mov [rcx+…], rax
    asm.emit(f"f3 48 0f ae c8 48 89 41 {slot['inside_gs']:02x}")  # rdgsbase rax; mov [rcx+…], rax
    asm.emit(f"{FLAGS_KEPT} 48 89 41 {slot['flags']:02x}")  # …; mov [rcx+flags], rax
