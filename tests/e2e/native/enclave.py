"""A tiny enclave and the program that uses it, for tests of the native engine.

RDX says what the enclave does: 0 nothing, 1 store RSI at RDI, 2 load from RDI and store at R8
outside, 3 UD2, 4 divide by zero, 5 count RDI down, 6 EACCEPT and 7 EMODPE the page at RDI with the
SECINFO at RSI, the result going to R8, 8 keep RSI in XMM0 over a UD2 and store it at R8, 9 store
RSI at RDI, then a byte at R9, then what RDI holds at R8, 10 store R10, R11, RAX and RCX at R8, 11
jump to RDI with R11 where to come back to, from 12 on the instructions of ``ILLEGAL`` and ``TIME``,
and three on extended state: store XGETBV(0) at R8, XSAVE64 with every bit at RDI, XRSTOR64 with
every bit from RDI, both with XMM0, RAX, RCX, RDX, RFLAGS and the RCX of entry to R8; the next one
counts up the first words of RSI pages from RDI on, all of which must be R8.  The next ones are
those of ``MASKED`` with the area at RDI and flags of RSI; they store registers and what FXSAVE64
does at R8.  The last one stores RSI at RDI, and leaves as 5 does.  Then it exits.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

from tests.support.builds import Builds
from tests.support.driver import sigstruct_for

from softsgx.arch import Attributes, AttributesFlags, Tcs
from softsgx.engines.native.x86.asm import Assembler
from softsgx.image import MASK_ALL, MASK_NONE, SECINFO_RW, SECINFO_RX, SECINFO_TCS, Data, Plan, Run

PAGE = 4096
THREADS, FRAMES = 2, 2
COMPILER = shutil.which("cc") or shutil.which("gcc")
PROGRAMS = Path(__file__).parent / "programs"


_OPERATIONS = (
    *("put", "get", "ud2", "div", "spin", "accept", "extend", "vector", "keep"),
    *("registers", "run"),
)

#: Instructions that are #UD in every enclave, with RSI in EAX, by name.
ILLEGAL = {
    "cpuid": "0f a2",
    "syscall": "0f 05",
    "int80": "cd 80",
    "int21": "cd 21",
    "in": "ec",
    "out": "ee",
    "insb": "6c",
    "rdpmc": "0f 33",
}

#: Instructions that are #UD in enclaves of machines without SGX2.
TIME = {"rdtsc": "0f 31", "rdtscp": "0f 01 f9"}
_STATE = ("getbv", "save", "restore", "sweep")

#: Loads of EDX:EAX with constants and instructions on extended state, as runtimes have them.
MASKED = {
    "save_rdi": "b8 ff ff ff ff ba ff ff ff ff 48 0f ae 27",  # xsave64 [rdi]
    "restore_rdi": "b8 ff ff ff ff ba ff ff ff ff 48 0f ae 2f",  # xrstor64 [rdi]
    "compact_rcx": "ba ff ff ff ff b8 ff ff ff ff 48 0f c7 21",  # xsavec64 [rcx]
    "restore_rcx": "48 c7 c0 ff ff ff ff 89 c2 48 0f ae 29",  # xrstor64 [rcx]
    "optimised": "48 c7 c2 fe ff ff ff 48 89 d0 48 0f ae 74 39 c0",  # xsaveopt64 [rcx+rdi-64]
    "narrow_save": "b8 02 00 00 00 ba 01 00 00 00 0f ae 67 40",  # xsave [rdi+64]
    "narrow_restore": "b8 01 00 00 00 48 c7 c2 00 00 00 80 0f ae 6f 40",  # xrstor [rdi+64]
    "some_save": "b8 66 00 00 00 ba 00 00 00 00 48 0f ae 67 40",  # xsave64 [rdi+64]
    "some_restore": "b8 66 00 00 00 ba 00 00 00 00 48 0f ae 6f 40",  # xrstor64 [rdi+64]
    "by_xor": "b8 ef 00 00 00 31 d2 0f ae 2f",  # xrstor [rdi]
    # As the dynamic loader: mov eax, mask; xor edx, edx; stores of RDX; xsavec [rsp+64].
    "on_stack": "b8 ee 00 00 00 31 d2 48 89 94 24 50 02 00 00 48 89 54 24 78 0f c7 64 24 40",
}


def enclave_code() -> bytes:
    """The enclave's only code page."""
    asm = Assembler()
    # R10 is free, but for the operation that tells what EENTER has left in it.
    asm.emit(f"83 fa {1 + _OPERATIONS.index('registers'):02x}")  # cmp edx, number
    asm.near("0f 84", "registers")
    asm.label("dispatch")
    asm.emit("49 89 ca")  # mov r10, rcx: where to go back to
    labels = (*_OPERATIONS, *ILLEGAL, *TIME, *_STATE, *MASKED, "leave")
    for number, label in enumerate(labels, start=1):
        asm.emit(f"83 fa {number:02x}")  # cmp edx, number
        asm.near("0f 84", label)
    asm.label("exit")
    asm.emit("4c 89 d3")  # mov rbx, r10
    asm.emit("31 d2 31 c9")  # scrub RDX, RCX
    asm.word("b8", 4)  # EEXIT
    asm.emit("0f 01 d7")
    asm.label("put")
    asm.emit("48 89 37")  # mov [rdi], rsi
    asm.near("e9", "exit")
    asm.label("get")
    asm.emit("48 8b 07")  # mov rax, [rdi]
    asm.emit("49 89 00")  # mov [r8], rax
    asm.near("e9", "exit")
    asm.label("ud2")
    asm.emit("0f 0b")
    asm.label("div")
    asm.emit("31 d2 31 c9 f7 f1")  # div ecx
    asm.label("spin")
    asm.emit("48 ff cf")  # dec rdi
    asm.short("75", "spin")
    asm.label("scrubbed")
    # As some runtimes leave: they scrub registers and flags behind the load of EAX.
    asm.emit("4c 89 d3")  # mov rbx, r10
    asm.emit("48 c7 c0 04 00 00 00")  # mov rax, 4
    asm.emit("48 31 c9 48 31 d2 4d 31 d2 48 01 d2 fc")  # xor rcx, rcx; …; add rdx, rdx; cld
    asm.emit("0f 01 d7")
    asm.label("leave")
    asm.emit("48 89 37")  # mov [rdi], rsi
    asm.near("e9", "scrubbed")
    for label, leaf in (("accept", 5), ("extend", 6)):
        asm.label(label)
        asm.emit("48 89 f3 48 89 f9")  # mov rbx, rsi; mov rcx, rdi
        asm.word("b8", leaf)
        asm.emit("0f 01 d7")
        asm.emit("49 89 00")  # mov [r8], rax
        asm.near("e9", "exit")
    asm.label("vector")
    asm.emit("66 48 0f 6e c6")  # movq xmm0, rsi
    asm.emit("0f 0b")
    asm.emit("66 49 0f 7e 00")  # movq [r8], xmm0
    asm.near("e9", "exit")
    asm.label("keep")
    asm.emit("48 89 37")  # mov [rdi], rsi
    asm.emit("41 80 09 01")  # or byte [r9], 1
    asm.emit("48 8b 07 49 89 00")  # mov rax, [rdi]; mov [r8], rax
    asm.near("e9", "exit")
    asm.label("registers")
    asm.emit("4d 89 10 4d 89 58 08")  # mov [r8], r10; mov [r8+8], r11
    asm.emit("49 89 40 10 49 89 48 18")  # mov [r8+16], rax; mov [r8+24], rcx
    asm.emit("31 d2")  # xor edx, edx: nothing more
    asm.near("e9", "dispatch")
    asm.label("run")
    asm.near("4c 8d 1d", "exit")  # lea r11, [rip+exit]
    asm.emit("ff e7")  # jmp rdi
    asm.label("getbv")
    asm.emit("31 c9 0f 01 d0 49 89 00")  # xor ecx, ecx; xgetbv; mov [r8], rax
    asm.near("e9", "exit")
    for label, code in (("save", "48 0f ae 27"), ("restore", "48 0f ae 2f")):
        asm.label(label)
        asm.emit("48 83 c8 ff 48 83 ca ff f9")  # or rax, -1; or rdx, -1; stc
        asm.emit(code)
        asm.emit("9c 41 8f 40 20")  # pushf; pop [r8+32]
        asm.emit("49 89 40 08 49 89 48 10")  # mov [r8+8], rax; mov [r8+16], rcx
        asm.emit("4d 89 50 28 49 89 50 18 66 49 0f 7e 00")  # r10 to r8+40, rdx to r8+24, xmm0
        asm.near("e9", "exit")
    asm.label("sweep")
    asm.emit("4c 39 07")  # cmp [rdi], r8
    asm.near("0f 85", "ud2")
    asm.emit("48 ff 07")  # inc qword [rdi]
    asm.emit("48 81 c7 00 10 00 00")  # add rdi, 4096
    asm.emit("48 ff ce")  # dec rsi
    asm.short("75", "sweep")
    asm.near("e9", "exit")
    for label, code in MASKED.items():
        asm.label(label)
        asm.emit("48 89 f9" if label != "optimised" else "b9 40 00 00 00")  # mov rcx, rdi or 64
        asm.emit("56 9d")  # push rsi; popf
        if label == "on_stack":
            code = f"49 89 e3 48 89 fc {code} 4c 89 dc"  # mov r11, rsp; mov rsp, rdi; …; back
        asm.emit(code)
        asm.emit("9c 41 8f 40 20")  # pushf; pop [r8+32]
        asm.emit("49 89 40 08 49 89 48 10 49 89 50 18")  # rax, rcx, rdx to r8+8
        asm.emit("4d 89 50 28 49 89 78 30 fc")  # r10 to r8+40, rdi to r8+48; cld
        asm.emit("49 0f ae 40 40")  # fxsave64 [r8+64]
        asm.near("e9", "exit")
    for label, code in (ILLEGAL | TIME).items():
        asm.label(label)
        asm.emit("89 f0")  # mov eax, esi
        asm.emit(code)
        asm.near("e9", "exit")
    return asm.finish().ljust(PAGE, b"\xcc")


def enclave_plan(data_pages: int, threads: int = THREADS) -> Plan:
    """Threads with two SSA frames each, code, and zeroed data pages; a gap before the latter."""
    ssa_offset = threads * PAGE
    code_offset = ssa_offset + FRAMES * threads * PAGE
    data_offset = code_offset + 2 * PAGE
    tcs = b"".join(
        Tcs(
            ossa=ssa_offset + thread * FRAMES * PAGE,
            nssa=FRAMES,
            oentry=code_offset,
            ogs_base=thread * PAGE,
            fs_limit=0xFFF,
            gs_limit=0xFFF,
        ).pack()
        for thread in range(threads)
    )
    runs = (
        Run(0, threads, SECINFO_TCS, Data(memoryview(tcs)), MASK_ALL),
        Run(ssa_offset, FRAMES * threads, SECINFO_RW, mask=MASK_NONE),
        Run(code_offset, 1, SECINFO_RX, Data(memoryview(enclave_code())), MASK_ALL),
        Run(data_offset, data_pages, SECINFO_RW, mask=MASK_NONE),
    )
    end = data_offset + data_pages * PAGE
    return Plan(1 << (end - 1).bit_length(), runs)


def write_enclave(
    path: Path,
    data_pages: int,
    threads: int = THREADS,
    flags: int = AttributesFlags.MODE64BIT,
    xfrm: int = 3,
) -> Path:
    """Write the file that the programs read."""
    plan = enclave_plan(data_pages, threads)
    fields = {} if xfrm == 3 else {"attributes": Attributes(flags=int(flags), xfrm=xfrm)}
    with path.open("wb") as file:
        file.write(struct.pack("<QQ", plan.size, len(plan.runs)))
        file.write(sigstruct_for(plan, flags, **fields))
        for run in plan.runs:
            measured = int(run.mask == MASK_ALL)
            file.write(struct.pack("<QQQQ", run.offset, run.pages, run.flags, measured))
            for page in range(run.pages):
                data = b"" if not isinstance(run.source, Data) else bytes(run.source.view)
                file.write(data[page * PAGE : (page + 1) * PAGE].ljust(PAGE, b"\0"))
    return path


def compile_host(directory: Path, name: str = "host") -> Path:
    """Compile a program."""
    assert COMPILER is not None, "no C compiler"
    out = directory / name
    source = str(PROGRAMS / f"{name}.c")
    command = [COMPILER, "-O1", "-g", "-o", str(out), source, "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return out


class NativeBuilds(Builds):
    """Programs and enclaves of these tests, see :class:`Builds`."""

    def host(self, name: str = "host") -> str:
        """Return the path of a compiled program."""
        return str(self.directory(name, partial(compile_host, name=name)) / name)

    def enclave(
        self,
        data_pages: int,
        threads: int = THREADS,
        flags: int = AttributesFlags.MODE64BIT,
        xfrm: int = 3,
    ) -> str:
        """Return the path of an enclave, see :func:`write_enclave`."""
        name = f"enclave-{data_pages}-{threads}-{int(flags):x}-{xfrm:x}"

        def write(directory: Path) -> None:
            write_enclave(directory / "enclave", data_pages, threads, flags, xfrm)

        return str(self.directory(name, write) / "enclave")
