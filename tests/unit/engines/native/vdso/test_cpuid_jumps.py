"""CPUID without a stop gives what CPUID with a stop gives, and changes nothing else.

Method: the code of a stub is executed here, beside a function that stands for the supervisor; and
threads are put at each of its instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.vdso.cpuid_code import ANSWER_CODE, LABELS
from softsgx.engines.native.vdso.cpuid_jumps import (
    AREA_BYTES,
    CpuidAnswers,
    CpuidStubs,
    Window,
    window_before,
)
from softsgx.engines.native.x86.insn import decode

CPUID = b"\x0f\xa2"
Leaf = tuple[int, int, int, int]


def cpuid(leaf: int, sub: int) -> Leaf:
    """A machine with leaves of every kind."""
    if leaf in (0, 0x8000_0000):
        return leaf + 0x24, 1, 2, 3
    if not (leaf < 0x25 or 0x8000_0000 <= leaf < 0x8000_0025):
        return 0, 0, 0, 0
    number = sub if leaf in (4, 7, 0xB, 0xD, 0x12, 0x8000_001D) else 0
    return leaf ^ 0xFFFF_0000, number, 0x8000_0000 | number, leaf & 0xFF


LOADER_BYTES = 0x1000
CODE = bytes.fromhex("90" * 200 + "b8 44 33 22 11" + "89 f8" + "89 f1") + CPUID + b"\x90" * 200


class Image:
    """A loader and our vDSO in memory of this process."""

    def __init__(self, code: bytes = CODE) -> None:
        self.memory = mmap.mmap(-1, LOADER_BYTES + AREA_BYTES, prot=7)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.loader = ctypes.addressof(self.anchor)
        self.memory[: len(code)] = code
        self.vdso_base, self.vdso = self.loader, SimpleNamespace(answers=LOADER_BYTES)
        self.memory_fd = os.open("/proc/self/mem", os.O_RDWR)
        self.cpuid_stubs: CpuidStubs | None = None

    def read(self, address: int, size: int) -> bytes:
        return os.pread(self.memory_fd, size, address)

    def close(self) -> None:
        os.close(self.memory_fd)
        del self.anchor
        self.memory.close()


@pytest.fixture
def image() -> Any:
    made = Image()
    yield made
    made.close()


def learned(image: Any, code: bytes = CODE) -> CpuidAnswers:
    answers = CpuidAnswers(cpuid, jumping=True)
    answers.executed(image, image.loader + code.index(CPUID))
    return answers


def test_the_first_program_is_left_alone_and_the_next_has_jumps(image: Any) -> None:
    answers = CpuidAnswers(cpuid, jumping=True)
    answers.loaded(image)
    assert image.memory[: len(CODE)] == CODE
    answers.executed(image, image.loader + CODE.index(CPUID))
    answers.executed(image, image.loader + CODE.index(CPUID))
    answers.loaded(image)
    start = CODE.index(CPUID) - 9
    assert image.memory[: len(CODE)].hex() != CODE.hex()
    assert image.memory[start] == 0xE9
    assert image.memory[:start] == CODE[:start]
    assert image.memory[start + 5 : len(CODE)] == CODE[start + 5 :]


def test_other_code_at_the_same_place_gets_no_jump(image: Any) -> None:
    answers = learned(image)
    other = Image(CODE.replace(b"\x44\x33", b"\x45\x33"))
    try:
        answers.loaded(other)  # type: ignore[arg-type]
        assert other.cpuid_stubs is None
        assert other.memory[: len(CODE)] == CODE.replace(b"\x44\x33", b"\x45\x33")
    finally:
        other.close()


def test_a_run_that_may_not_jump_learns_nothing(image: Any) -> None:
    answers = CpuidAnswers(cpuid, jumping=False)
    answers.executed(image, image.loader + CODE.index(CPUID))
    answers.loaded(image)
    assert image.cpuid_stubs is None
    assert answers(4, 3) == cpuid(4, 3)


#: void call(uint64_t in[5], out[6], code): in and out are RAX, RBX, RCX, RDX, flags; out[5]: where
#: it came back: 1 behind CPUID, 2 at it.
_CALL = bytes.fromhex(
    "53 55 4154 4155"  # push rbx, rbp, r12, r13
    "4989f4 4989d5"  # mov r12, rsi; mov r13, rdx
    "ff7720 9d"  # push [rdi+32]; popfq
    "488b07 488b5f08 488b4f10 488b5718"  # mov rax, rbx, rcx, rdx
    "41ffe5"  # jmp r13
)
_RETURN = bytes.fromhex(
    "49890424 49895c2408 49894c2410 4989542418"  # mov [r12], rax …
    "9c 418f442420"  # pushfq; pop [r12+32]
    "4155 58"  # push r13; pop rax
    "415d 415c 5d 5b c3"  # pop r13, r12, rbp, rbx; ret
)


def executed(image: Any, leaf: int, sub: int, flags: int) -> tuple[list[int], int, bool]:
    """Execute the first stub; return registers, flags, and whether it went on behind CPUID."""
    site = CODE.index(CPUID)
    behind = bytes.fromhex("49c7c501000000") + _RETURN  # mov r13, 1
    at = bytes.fromhex("49c7c502000000") + _RETURN
    image.memory[0x400 : 0x400 + len(behind)] = behind
    image.memory[0x500 : 0x500 + len(at)] = at
    image.memory[0x600 : 0x600 + len(_CALL)] = _CALL
    # From the CPUID and from behind it, on to the two places.
    image.memory[site : site + 2] = b"\xeb\x20"
    image.memory[site + 2 : site + 7] = b"\xe9" + struct.pack("<i", 0x400 - (site + 7))
    image.memory[site + 0x22 : site + 0x27] = b"\xe9" + struct.pack("<i", 0x500 - (site + 0x27))
    given = (ctypes.c_uint64 * 5)(leaf | 7 << 40, 8 << 40, sub | 9 << 40, 10 << 40, flags)
    out = (ctypes.c_uint64 * 5)()
    call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    stub = image.loader + image.stub_at
    how = call(image.loader + 0x600)(ctypes.addressof(given), ctypes.addressof(out), stub)
    return list(out[:4]), out[4], how == 1


ASKED = [
    (leaf, sub)
    for leaf in (0, 1, 4, 7, 0xB, 0xD, 0x12, 0x24, 0x8000_0000, 0x8000_001D, 0x8000_0024)
    for sub in (0, 1, 15, 16, 63, 64, 0xFFFF_FFFF)
]


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
@pytest.mark.parametrize("flags", [0x246, 0x2 | 0x8D5])
def test_the_code_answers_as_the_supervisor_and_keeps_flags(image: Any, flags: int) -> None:
    answers = learned(image)
    answers.loaded(image)
    jump = CODE.index(CPUID) - 9
    (distance,) = struct.unpack_from("<i", image.memory, jump + 1)
    image.stub_at = jump + 5 + distance + 9  # behind the copies
    answered = 0
    for leaf, sub in [*ASKED, (0x25, 0), (0x7FFF_FFFF, 0), (0x4000_0000, 0), (0xFFFF_FFFF, 1)]:
        registers, flags_then, behind = executed(image, leaf, sub, flags)
        assert flags_then & 0x8D5 == flags & 0x8D5
        if behind:
            assert tuple(registers) == cpuid(leaf, sub), (hex(leaf), sub)
            answered += 1
        else:
            assert (registers[0] & 0xFFFF_FFFF, registers[2] & 0xFFFF_FFFF) == (leaf, sub)
            assert leaf not in (0, 1, 0x24)
            assert sub > 15 or leaf > 0x24
    assert answered > len(ASKED) * 0.7


class Stopped:
    """A thread that is stopped at an instruction of the stub, for a leaf and a sub-leaf."""

    def __init__(self, image: Any, rip: int, **regs: int) -> None:
        self.image, self.regs = image, SimpleNamespace(rip=rip, **regs)
        self.stored = 0

    def load(self) -> Any:
        return self.regs

    def store(self) -> None:
        self.stored += 1


def steps(image: Any, leaf: int, sub: int) -> list[tuple[int, dict[str, int]]]:
    """What a thread has in its registers at each instruction behind the copies."""
    stub = image.loader + image.stub_at
    table = image.loader + LOADER_BYTES
    word = (1 << 64) - 1
    entry = table + 32 * (leaf << 1 & 0xFF | leaf >> 31)
    _key, distance, index, _rest = struct.unpack("<qqQQ", image.read(entry, 32))
    number = sub & index
    answer = entry + distance + 16 * number
    regs = {"rax": leaf, "rbx": 111, "rcx": sub, "rdx": 222}
    found = [(0, dict(regs))]
    writes: list[tuple[str, int]] = [
        *(("rbx", sub), ("rdx", leaf << 1 & 0xFFFF_FFFF | leaf >> 31)),
        *(("rdx", (leaf << 1 & 0xFF | leaf >> 31)), ("rdx", 8 * (leaf << 1 & 0xFF | leaf >> 31))),
        *(("rcx", table), ("rdx", entry), ("rax", leaf), ("rcx", -leaf & word), ("rcx", 0)),
        *(("", 0), ("rcx", 0), ("", 0), ("rcx", number), ("rbx", distance)),
        *(("rdx", entry + distance), ("rcx", 2 * number), ("rdx", answer)),
        *zip(("rax", "rbx", "rcx", "rdx"), cpuid(leaf, sub), strict=True),
    ]
    at = 0
    for register, value in writes:
        insn = decode(ANSWER_CODE[at:])
        assert insn is not None
        at += insn.length
        if at == LABELS["refuse"]:
            at = LABELS["known"]
        if ANSWER_CODE[at : at + 1] == b"\xeb" and at < LABELS["answered"]:
            at = LABELS["answered"]
        if register:
            regs[register] = value
        found.append((at, dict(regs)))
    assert at == LABELS["loaded"]
    return [(stub + at, values) for at, values in found]


@pytest.mark.parametrize(("leaf", "sub"), [(1, 0), (4, 3), (0xD, 40), (0x8000_0008, 5)])
def test_a_thread_that_is_stopped_in_a_stub_is_in_front_of_the_cpuid_or_behind_it(
    image: Any, leaf: int, sub: int
) -> None:
    answers = learned(image)
    answers.loaded(image)
    jump, site = CODE.index(CPUID) - 9, CODE.index(CPUID)
    (distance,) = struct.unpack_from("<i", image.memory, jump + 1)
    image.stub_at = jump + 5 + distance + 9
    stubs = image.cpuid_stubs
    for begun, (rip, regs) in enumerate(steps(image, leaf, sub)):
        thread = Stopped(image, rip, **regs)
        stubs.straighten(thread)
        seen = thread.regs
        assert thread.stored == 1
        if begun:
            assert seen.rip == image.loader + site + 2
            assert (seen.rax, seen.rbx, seen.rcx, seen.rdx) == cpuid(leaf, sub), begun
        else:
            assert vars(seen) == {"rip": image.loader + site, **regs}


def test_a_thread_that_is_stopped_at_a_copy_is_at_the_instruction(image: Any) -> None:
    answers = learned(image)
    answers.loaded(image)
    jump = CODE.index(CPUID) - 9
    (distance,) = struct.unpack_from("<i", image.memory, jump + 1)
    for at in (0, 5, 7):
        thread = Stopped(image, image.loader + jump + 5 + distance + at, rax=1)
        image.cpuid_stubs.straighten(thread)
        assert thread.regs.rip == image.loader + jump + at
        assert thread.regs.rax == 1
    elsewhere = Stopped(image, image.loader + jump, rax=1)
    image.cpuid_stubs.straighten(elsewhere)
    assert not elsewhere.stored


@pytest.mark.parametrize(
    ("code", "found", "relative"),
    [
        ("b804000000 31c9", "b804000000 31c9", 0),
        ("41bc0d000000 4489e0", "41bc0d000000 4489e0", 0),
        ("c644240f00", "c644240f00", 0),
        ("c744246000000000", "c744246000000000", 0),
        ("0f84b0000000 83c601 89f8 89f1", "0f84b0000000 83c601 89f8 89f1", 6),
        ("891596e20100", "891596e20100", 6),
        ("4c89051de40100", "4c89051de40100", 7),
        ("48c7c0ffffffff 31c9", None, 0),  # not known to be the same elsewhere
        ("e805000000 31c9", None, 0),
        ("8d7901 4489e0", None, 0),  # shorter than a jump
        ("b804000000 8b0d00000000", None, 0),
        ("b804000000 7402 31c9", None, 0),
    ],
)
def test_only_code_that_is_the_same_elsewhere_is_executed_elsewhere(
    code: str, found: str | None, relative: int
) -> None:
    before = bytes.fromhex(code)
    whole = b"\x90" * (128 - len(before)) + before + CPUID + b"\x90" * 100
    expected = None if found is None else (bytes.fromhex(found), relative)
    assert window_before(whole, 128) == expected


def test_distances_are_those_from_the_new_place() -> None:
    answers = CpuidAnswers(cpuid, jumping=True)
    code = bytes.fromhex("0f84b0000000 89f1")
    stubs = CpuidStubs(answers, 0x2000_0000, 0x4000, 0x1000_0000, (Window(0x500, code, 6),))
    (distance,) = struct.unpack_from("<i", stubs.code(), 2)
    assert 0x2000_4000 + 6 + distance == 0x1000_0500 + 6 + 0xB0
    ((place, jump),) = stubs.jumps()
    assert place == 0x1000_0500
    assert place + 5 + struct.unpack("<i", jump[1:])[0] == 0x2000_4000
