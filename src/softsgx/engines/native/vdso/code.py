"""The code of our vDSO: entering enclaves, forwarding to the kernel's own vDSO, injected calls.

``__vdso_sgx_enter_enclave`` has the kernel's contract (``vdso.rst``, ``uapi/asm/sgx.h``), with one
difference that programs cannot see.  For EENTER it makes a system call that stops for the
supervisor, which is cheaper than a trapping instruction; when ``vdso/permits.py`` has permitted the
EENTER, a few instructions do it without a stop.  ERESUME and the asynchronous exit pointer are a
real ENCLU, so a signal handler finds the same interrupted context as on hardware.

Source:
    arch/x86/include/uapi/asm/sgx.h (``struct sgx_enclave_run``, ``vdso_sgx_enter_enclave_t``).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from softsgx.engines.native import abi
from softsgx.engines.native.vdso.permit_code import emit_permitted_entry
from softsgx.engines.native.x86.asm import Assembler

__all__ = [
    "CALL_WORDS",
    "KEPT_R11",
    "SCRATCH_BYTES",
    "emit_enter_enclave",
    "emit_forward",
    "emit_injection",
    "pack_calls",
    "target_of",
]

_EINVAL = -22
_WORD = (1 << 64) - 1
SCRATCH_BYTES = 512

KEPT_R11 = -8
"""Where R11 is, from RSP, at the system call that asks for EENTER."""

CALL_WORDS = 7
"""Quadwords of a call in a table of calls: its number and six arguments."""

#: mov rax, rdi, rsi, rdx, r10, r8, r9 from RBX and a byte.
_CALL_REGISTERS = (
    *("48 8b 43", "48 8b 7b", "48 8b 73", "48 8b 53"),
    *("4c 8b 53", "4c 8b 43", "4c 8b 4b"),
)

# struct sgx_enclave_run
_FUNCTION, _VECTOR, _ERROR_CODE, _ADDRESS, _HANDLER = 8, 12, 14, 16, 24
_RESERVED, _SIZE = 40, 256


def emit_injection(asm: Assembler) -> None:
    """Where injected system calls run: labels ``inject`` and ``injected`` (after its int3).

    ``illegal`` is an illegal instruction.  Arguments of calls point to bytes at ``scratch``.  At
    ``permits_at`` is the address of the table of permits, or zero.  The word at ``watched`` is not
    zero once the process has had a device.

    The code from ``calls`` to ``called`` makes RBP calls from the table at RBX.
    """
    asm.label("inject")
    asm.emit("0f05")  # syscall
    asm.emit("cc")  # int3
    asm.label("injected")
    asm.label("illegal")
    asm.emit("0f0b")  # ud2
    asm.label("calls")
    for register, place in zip(_CALL_REGISTERS, range(CALL_WORDS), strict=True):
        asm.emit(f"{register} {8 * place:02x}")  # mov register, [rbx+8*place]
    asm.emit("0f 05")  # syscall
    asm.emit(f"48 83 c3 {8 * CALL_WORDS:02x}")  # add rbx, bytes of an entry
    asm.emit("ff cd")  # dec ebp
    asm.short("75", "calls")  # jnz
    asm.emit("cc")  # int3
    asm.label("called")
    asm.align(16)
    asm.label("scratch")
    asm.emit("cc" * SCRATCH_BYTES)
    asm.align(8)
    asm.label("permits_at")
    asm.quad(0)
    asm.label("watched")
    asm.quad(0)


# By the number of words a call has, what fills its row: the mark, unless it has a sixth argument.
_RESTS = [
    array("Q", (*[0] * (CALL_WORDS - 1 - count), abi.OUR_CALL) if count < CALL_WORDS else ())
    for count in range(CALL_WORDS + 1)
]


def pack_calls(calls: Sequence[tuple[int, ...]]) -> bytes:
    """Return a table of calls, each given as its number and its arguments."""
    words = array("Q")
    for call in calls:
        words.extend([value & _WORD for value in call])
        words.extend(_RESTS[len(call)])
    return words.tobytes()


def emit_forward(asm: Assembler, name: str) -> None:
    """A function ``name`` that jumps to the address at its label :func:`target_of`."""
    asm.align(16)
    asm.label(name)
    asm.emit("f3 0f 1e fa")  # endbr64: reached by an indirect call
    asm.emit("ff 25 00 00 00 00")  # jmp [rip+0]
    asm.label(target_of(name))
    asm.quad(0)


def target_of(name: str) -> str:
    """Return the label of the address where a forwarding function continues."""
    return f"target of {name}"


def emit_enter_enclave(asm: Assembler) -> None:
    """``__vdso_sgx_enter_enclave``; labels ``eenter_after``, ``aep`` and ``fixup`` mark its places.

    The enclave gets ``eenter_after`` in RCX and exits to it.  ``aep`` is the ENCLU that
    asynchronous exits return to.  After an exception the supervisor resumes the thread at
    ``fixup``, with the leaf in RAX, the vector in DI, the error code in SI, the address in RDX.
    """
    asm.align(16)
    asm.label("__vdso_sgx_enter_enclave")
    asm.emit("f3 0f 1e fa")  # endbr64
    asm.emit("55")  # push rbp
    asm.emit("48 89 e5")  # mov rbp, rsp
    asm.emit("53")  # push rbx
    asm.emit("89 c8")  # mov eax, ecx

    # Only EENTER and ERESUME; every reserved byte must be zero.  All registers but RAX, RBX and
    # RCX go to the enclave as they are.
    asm.label("again")
    asm.emit("83 f8 02")  # cmp eax, 2
    asm.near("0f 82", "invalid")  # jb
    asm.emit("83 f8 03")  # cmp eax, 3
    asm.near("0f 87", "invalid")  # ja
    asm.emit("48 8b 5d 10")  # mov rbx, [rbp+16]: run
    asm.word("b9", (_SIZE - _RESERVED) // 8)  # mov ecx, 27
    asm.label("reserved")
    asm.emit(f"48 83 7c cb {_RESERVED - 8:02x} 00")  # cmp qword [rbx+8*rcx+32], 0
    asm.near("0f 85", "invalid")  # jne
    asm.emit("ff c9")  # dec ecx
    asm.short("75", "reserved")  # jnz
    asm.emit("48 8b 1b")  # mov rbx, [rbx]: tcs
    asm.emit("83 f8 03")  # cmp eax, 3
    asm.near("0f 84", "resume")  # je
    emit_permitted_entry(asm)
    asm.label("ask")
    asm.emit(f"4c 89 5c 24 {KEPT_R11 & 0xFF:02x}")  # mov [rsp-8], r11: the call overwrites it
    asm.word("b8", abi.SYS_SOFTSGX_EENTER)  # mov eax, number
    asm.emit("0f 05")  # syscall: EENTER of RBX with AEP ``aep``
    asm.label("eenter_after")
    asm.short("eb", "exited")  # jmp

    asm.label("resume")
    asm.near("48 8d 0d", "aep")  # lea rcx, [rip+aep]
    asm.label("aep")
    asm.emit("0f 01 d7")  # enclu

    asm.label("exited")
    asm.emit("48 8b 5d 10")  # mov rbx, [rbp+16]
    asm.word(f"c7 43 {_FUNCTION:02x}", 4)  # mov dword [rbx+8], EEXIT
    asm.short("eb", "handler")

    asm.label("fixup")
    asm.emit("48 8b 5d 10")  # mov rbx, [rbp+16]
    asm.emit(f"89 43 {_FUNCTION:02x}")  # mov [rbx+8], eax
    asm.emit(f"66 89 7b {_VECTOR:02x}")  # mov [rbx+12], di
    asm.emit(f"66 89 73 {_ERROR_CODE:02x}")  # mov [rbx+14], si
    asm.emit(f"48 89 53 {_ADDRESS:02x}")  # mov [rbx+16], rdx

    asm.label("handler")
    asm.emit(f"48 8b 43 {_HANDLER:02x}")  # mov rax, [rbx+24]
    asm.emit("48 85 c0")  # test rax, rax
    asm.short("74", "done")  # jz: no handler, return 0
    asm.emit("48 89 d9")  # mov rcx, rbx: run
    asm.emit("48 89 e3")  # mov rbx, rsp: the enclave may have left it lower than it was
    asm.emit("48 83 e4 f0")  # and rsp, -16
    asm.emit("50")  # push rax: keeps the alignment
    asm.emit("51")  # push rcx: seventh argument, run
    asm.emit("48 89 d9")  # mov rcx, rbx: fourth argument, the untrusted RSP
    asm.emit("fc")  # cld
    asm.emit("ff d0")  # call rax
    asm.emit("48 89 dc")  # mov rsp, rbx
    asm.emit("85 c0")  # test eax, eax
    asm.near("0f 8f", "again")  # jg
    asm.label("done")
    asm.emit("48 8b 5d f8")  # mov rbx, [rbp-8]
    asm.emit("c9")  # leave
    asm.emit("c3")  # ret

    asm.label("invalid")
    asm.word("b8", _EINVAL)  # mov eax, -EINVAL
    asm.short("eb", "done")
    asm.label("enter_enclave_end")
