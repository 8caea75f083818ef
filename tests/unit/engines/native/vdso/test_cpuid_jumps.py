"""CPUID without a stop gives what CPUID with a stop gives, and changes nothing else.

Method: the code of a stub is executed here, beside a function that stands for the supervisor; and
threads are put at each of its instructions.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.vdso.cpuid_code import ANSWER_CODE, LABELS
from softsgx.engines.native.vdso.cpuid_jumps import (
    AREA_BYTES,
    CpuidAnswers,
    CpuidStubs,
    Window,
    nop_near,
    window_before,
)
from softsgx.engines.native.x86.insn import decode
from softsgx.engines.native.x86.rewrite import TRAP, Places

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


_NUMBERS = count()


class Image:
    """A loader and our vDSO in memory of this process."""

    def __init__(self, code: bytes = CODE) -> None:
        self.index = next(_NUMBERS)
        self.memory = mmap.mmap(-1, LOADER_BYTES + AREA_BYTES, prot=7)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.loader = ctypes.addressof(self.anchor)
        self.memory[: len(code)] = code
        self.vdso_base, self.vdso = self.loader, SimpleNamespace(answers=LOADER_BYTES)
        self.memory_fd = os.open("/proc/self/mem", os.O_RDWR)
        self.cpuid_stubs: CpuidStubs | None = None
        self.cpuid_sites = Places()

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


NOP = bytes.fromhex("66 2e 0f 1f 84 00 00 00 00 00")
#: No instruction of five bytes leads to the CPUID at AT; there is a no-operation behind it.
TIGHT = bytes.fromhex("90" * 200 + "89 f8" + "89 f1") + CPUID + b"\x90" * 60 + NOP + b"\x90" * 200
AT = TIGHT.index(CPUID)


@pytest.fixture
def tight() -> Any:
    made = Image(TIGHT)
    yield made
    made.close()


def test_a_cpuid_without_room_in_front_jumps_by_a_no_operation(tight: Any) -> None:
    learned(tight, TIGHT).loaded(tight)
    nop = TIGHT.index(NOP)
    after = bytes(tight.memory[: len(TIGHT)])
    assert after[:AT] == TIGHT[:AT]
    assert after[AT] == 0xEB
    assert AT + 2 + after[AT + 1] == nop + 2
    assert after[nop : nop + 3] == bytes((0xEB, len(NOP) - 2, 0xE9))  # it still does nothing
    assert after[AT + 2 : nop] == TIGHT[AT + 2 : nop]
    assert after[nop + 7 :] == TIGHT[nop + 7 :]


@pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2")
def test_such_a_stub_answers_or_executes_cpuid_itself(tight: Any) -> None:
    learned(tight, TIGHT).loaded(tight)
    (trap,) = tight.cpuid_stubs.traps()
    at = bytes.fromhex("49c7c502000000") + _RETURN  # mov r13, 2
    behind = bytes.fromhex("49c7c501000000") + _RETURN
    for place, code in ((0x400, behind), (0x500, at), (0x600, _CALL)):
        tight.memory[place : place + len(code)] = code
    assert tight.read(trap, 2) == CPUID
    (distance,) = struct.unpack("<i", tight.read(trap + 3, 4))
    assert trap + 7 + distance == tight.loader + AT + 2
    jumps = [(trap - tight.loader, 0x500), (AT + 2, 0x400)]
    for place, target in jumps:
        tight.memory[place : place + 5] = b"\xe9" + struct.pack("<i", target - (place + 5))
    call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    answered = 0
    for leaf, sub in [*ASKED, (0x25, 0), (0xFFFF_FFFF, 1)]:
        given = (ctypes.c_uint64 * 5)(leaf, 8, sub, 10, 0x246)
        out = (ctypes.c_uint64 * 5)()
        entry = tight.loader + AT
        how = call(tight.loader + 0x600)(ctypes.addressof(given), ctypes.addressof(out), entry)
        if how == 1:
            assert tuple(out[:4]) == cpuid(leaf, sub)
            answered += 1
        else:
            assert (out[0], out[2] & 0xFFFF_FFFF) == (leaf, sub)
    assert answered > len(ASKED) * 0.7


def trapped(image: Any, rip: int, signo: int | None, code: int = abi.SI_KERNEL) -> Any:
    thread = Stopped(image, rip, rax=4, rbx=2, rcx=2, rdx=5)
    thread.at_signal = signo is not None  # type: ignore[attr-defined]
    thread.siginfo = lambda: SimpleNamespace(signo=signo, code=code)  # type: ignore[attr-defined]
    image.cpuid_stubs.straighten(thread)
    return thread


def test_a_thread_at_a_jump_or_at_the_cpuid_of_such_a_stub(tight: Any) -> None:
    learned(tight, TIGHT).loaded(tight)
    (trap,) = tight.cpuid_stubs.traps()
    site = tight.loader + AT
    entry = tight.loader + TIGHT.index(NOP) + 2
    stubs = tight.cpuid_stubs
    assert [place for place in range(entry - 9, entry + 9) if stubs.has_entry(place)] == [entry]
    assert trapped(tight, entry, None).regs.rip == site
    assert trapped(tight, trap, abi.SIGSEGV).regs.rip == trap  # the stop is that of its CPUID
    for signo, code in ((None, 0), (abi.SIGSEGV, 1), (signal.SIGTERM, abi.SI_KERNEL)):
        answered = trapped(tight, trap, signo, code).regs
        assert answered.rip == site + 2
        assert (answered.rax, answered.rbx, answered.rcx, answered.rdx) == cpuid(4, 2)
    behind = trapped(tight, trap + 2, None).regs
    assert (behind.rip, behind.rax) == (site + 2, 4)


def test_where_cpuid_does_not_fault_a_trap_takes_its_place(tight: Any) -> None:
    tight.memory[AT : AT + 2] = TRAP  # new code is looked at first
    answers = CpuidAnswers(cpuid, jumping=True, faulting=False)
    answers.executed(tight, tight.loader + AT)
    answers.loaded(tight)
    (trap,) = tight.cpuid_stubs.traps()
    assert tight.read(trap, 2) == TRAP
    assert tight.read(tight.loader + AT, 1) == b"\xeb"
    assert set(tight.cpuid_sites) == {trap}
    assert trapped(tight, trap + 1, abi.SIGTRAP).regs.rip == trap + 1


def test_a_cpuid_that_its_stub_does_not_serve_gets_another(image: Any) -> None:
    code = CODE[:-180] + NOP + CODE[-180 + len(NOP) :]
    image.memory[: len(code)] = code
    answers = learned(image, code)
    answers.loaded(image)
    site = image.loader + code.index(CPUID)
    answers.executed(image, site)  # code jumps to an instruction behind the first
    answers.executed(image, site)
    image.memory[: len(code)] = code
    answers.loaded(image)
    nop = code.index(NOP)
    assert image.memory[nop : nop + 1] == b"\xeb"
    assert image.memory[code.index(CPUID)] == 0xEB
    assert len(image.cpuid_stubs.jumps()) == 3


@pytest.mark.parametrize(
    ("nop", "distance", "usable"),
    [
        ("0f1f8000000000", 40, True),
        ("0f1f840000000000", -90, True),
        ("66662e0f1f840000000000", 100, True),
        ("0f1f440000", 40, False),  # no room
        ("0f1f8400000000cc", 40, False),
        ("0f1f8000000000", 130, False),  # too far
    ],
)
def test_only_a_near_no_operation_with_room_has_a_jump(
    nop: str, distance: int, usable: bool
) -> None:
    code = bytearray(b"\x90" * 300)
    code[128:130] = CPUID
    made = bytes.fromhex(nop)
    code[128 + distance : 128 + distance + len(made)] = made
    expected = (128 + distance, made) if usable else None
    assert nop_near(bytes(code), 128) == expected
    assert nop_near(bytes(code), 128, {distance}) is None


def test_another_instruction_in_the_place_of_the_no_operation_stays(tight: Any) -> None:
    answers = learned(tight, TIGHT)
    other = Image(TIGHT.replace(NOP, bytes.fromhex("48b80f1f84000000cccc")))
    try:
        answers.loaded(other)  # type: ignore[arg-type]
        assert other.cpuid_stubs is None
    finally:
        other.close()


def test_two_cpuids_do_not_share_a_no_operation(tight: Any) -> None:
    code = TIGHT.replace(CPUID + b"\x90" * 40, CPUID + b"\x90" * 20 + CPUID + b"\x90" * 18)
    tight.memory[: len(code)] = code
    answers = learned(tight, code)
    answers.executed(tight, tight.loader + code.rindex(CPUID))
    answers.loaded(tight)
    assert len(tight.cpuid_stubs.jumps()) == 2
    assert tight.read(tight.loader + code.rindex(CPUID), 2) == CPUID
