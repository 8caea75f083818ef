"""Which instructions on extended state get a stub, and where a thread in one is by its program."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.vdso.state_code import STATE_STUB_BYTES, StateSite, find_site
from softsgx.engines.native.vdso.state_jumps import StateStub, straighten
from softsgx.engines.native.x86.state import StateOperation

PAGE, STUBS = 0x7000_0000, 0x7100_0000
BEFORE = b"\x90" * 32
#: xrstor64 [rcx] and its like: what one operand or another has to do with registers.
XRSTOR = b"\x48\x0f\xae\x29"
EAX, EDX = b"\xb8\x07\0\0\0", b"\xba\xff\0\0\x80"
FLAGS = 0x8D5


def site_of(loads: bytes, insn: bytes = XRSTOR, before: bytes = BEFORE) -> StateSite | None:
    code = before + loads + insn + b"\x90" * 32
    return find_site(code, len(before + loads), PAGE)


@pytest.mark.parametrize(
    ("loads", "rax", "rdx"),
    [
        (EAX + EDX, 7, 0x8000_00FF),
        (EDX + EAX, 7, 0x8000_00FF),
        (b"\x48\xc7\xc0\xfe\xff\xff\xff" + EDX, (1 << 64) - 2, 0x8000_00FF),
        (EAX + b"\x48\xc7\xc2\xfe\xff\xff\xff", 7, (1 << 64) - 2),
        (EDX + b"\x48\xc7\xc0\x07\0\0\0", 7, 0x8000_00FF),
        (EAX + b"\x89\xc2", 7, 7),
        (EDX + b"\x8b\xc2", 0x8000_00FF, 0x8000_00FF),
        (b"\x48\xc7\xc0\xfe\xff\xff\xff\x89\xc2", (1 << 64) - 2, 0xFFFF_FFFE),
        (b"\x48\xc7\xc0\xfe\xff\xff\xff\x48\x89\xc2", (1 << 64) - 2, (1 << 64) - 2),
        (b"\x48\xc7\xc2\xfe\xff\xff\xff\x89\xd0", 0xFFFF_FFFE, (1 << 64) - 2),
    ],
)
def test_constants_in_front_of_the_instruction_are_found(loads: bytes, rax: int, rdx: int) -> None:
    site = site_of(loads)
    assert site is not None
    assert (site.rax, site.rdx, site.loads) == (rax, rdx, loads)
    assert site.at == PAGE + len(BEFORE + loads) and site.behind == site.at + 4
    assert (site.operation, site.code) == (StateOperation.XRSTOR, XRSTOR)


@pytest.mark.parametrize(
    ("insn", "pointer"),
    [
        ("48 0f ae 29", "48 8d 11"),  # [rcx]
        ("0f ae 67 40", "48 8d 57 40"),  # xsave [rdi+64]
        ("49 0f ae 28", "49 8d 10"),  # [r8]
        ("48 0f ae ac 24 00 01 00 00", "48 8d 94 24 00 01 00 00"),  # [rsp+256]
        ("4a 0f c7 64 39 40", "4a 8d 54 39 40"),  # xsavec [rcx+r15+64]
        ("0f ae 34 25 00 00 00 10", "48 8d 14 25 00 00 00 10"),  # xsaveopt [10000000H]
    ],
)
def test_the_operand_is_looked_at_by_lea(insn: str, pointer: str) -> None:
    site = site_of(EAX + EDX, bytes.fromhex(insn))
    assert site is not None and site.pointer == bytes.fromhex(pointer)


@pytest.mark.parametrize(
    "insn",
    [
        "48 0f ae 28",  # [rax]
        "48 0f ae 6a 40",  # [rdx+64]
        "48 0f ae 2c 08",  # [rax+rcx]
        "48 0f ae 2c 11",  # [rcx+rdx]
        "48 0f ae 2d 00 00 00 00",  # [rip+0]
        "64 48 0f ae 29",  # fs:[rcx]
        "67 48 0f ae 29",  # [ecx]
        "0f 01 d0",  # xgetbv
    ],
)
def test_other_operands_have_no_stub(insn: str) -> None:
    assert site_of(EAX + EDX, bytes.fromhex(insn)) is None


@pytest.mark.parametrize(
    ("before", "loads"),
    [
        (BEFORE, EAX),
        (BEFORE, EDX),
        (BEFORE, EAX + EAX),
        (BEFORE, b"\x83\xc8\xff\x83\xca\xff"),  # or eax, -1; or edx, -1
        (BEFORE, EAX + EDX + b"\x90"),
        (b"\x90" * 4, EAX + EDX),  # too near to the start of the page
        (BEFORE + b"\x48\xb9\0\0\0\0\0\0", EAX + EDX),  # inside the bytes of another instruction
    ],
)
def test_other_code_in_front_has_no_stub(before: bytes, loads: bytes) -> None:
    assert site_of(loads, before=before) is None


def thread_at(stub: StateStub, at: int, **registers: int) -> Any:
    regs = UserRegs(rip=STUBS + STATE_STUB_BYTES + at, **registers)
    vdso = SimpleNamespace(state=0)
    image = SimpleNamespace(vdso=vdso, vdso_base=STUBS, state_stubs=[None, stub])
    return cast(Any, SimpleNamespace(image=image, regs=regs, load=lambda: regs, store=lambda: None))


def stub_for(loads: bytes) -> tuple[StateStub, StateSite]:
    site = site_of(loads)
    assert site is not None
    code, labels = site.stub(STUBS + STATE_STUB_BYTES, 7, range(0x1000, 0x9000), 832)
    assert len(code) <= STATE_STUB_BYTES
    return StateStub(site, 7, range(0x1000, 0x9000), labels), site


@pytest.mark.parametrize("xfrm", [3, 0x6_00E7, 1 << 62 | 3])
def test_a_stub_masks_both_halves_by_xfrm(xfrm: int) -> None:
    site = site_of(b"\x48\xc7\xc0\xff\xff\xff\xff\x89\xc2")
    assert site is not None
    code, labels = site.stub(STUBS, xfrm, range(0x1000, 0x9000), 832)
    low, high = xfrm & 0xFFFF_FFFF, xfrm >> 32
    wanted = b"\xb8" + low.to_bytes(4, "little") + b"\xba" + high.to_bytes(4, "little") + XRSTOR
    assert code[labels["flagged"] : labels["executed"]] == wanted
    start, room, foreign = struct.unpack_from("<3Q", code, labels["enclave"])
    assert (start, room) == (0x1000, 0x8000 - 832), "an area may start there"
    assert foreign == (1 << 63) - 1 & ~xfrm


@pytest.mark.parametrize(("loads", "register"), [(EAX + EDX, "rax"), (EDX + EAX, "rdx")])
def test_a_thread_that_has_only_jumped_has_executed_the_first_load(
    loads: bytes, register: str
) -> None:
    stub, site = stub_for(loads)
    thread = thread_at(stub, 0, rax=1, rdx=2, rflags=0x202)
    straighten(thread)
    assert thread.regs.rip == site.start + 5
    given = {"rax": 1, "rdx": 2, register: getattr(site, register)}
    assert (thread.regs.rax, thread.regs.rdx, thread.regs.rflags) == (*given.values(), 0x202)


@pytest.mark.parametrize(
    ("label", "ax", "rflags", "flags", "done"),
    [
        ("kept", 0x0001, 0x246, 0x246, False),
        ("flagged", 0x0001, 0x246, 0x246, False),
        ("added", 0xD780, 0xA02, 0xAD7, False),  # overflow is back, the others are in AH
        ("added", 0x0280, 0x0D7, 0x002, False),
        ("refuse", 0xD501, 0x202, 0xAD7, False),
        ("refuse", 0x0200, 0xAD7, 0x202, False),
        ("refuse_added", 0x5780, 0xA02, 0xA57 & ~0x2 | 2, False),
        ("refused", 0x0001, 0x246, 0x246, False),
        ("executed", 0x0001, 0x246, 0x246, True),
    ],
)
def test_a_thread_in_a_stub_is_in_front_of_the_instruction_or_behind_it(
    label: str, ax: int, rflags: int, flags: int, done: bool
) -> None:
    stub, site = stub_for(EAX + EDX)
    thread = thread_at(stub, stub.labels[label], rax=ax, rdx=0x55, rcx=0x66, rflags=rflags)
    straighten(thread)
    regs = thread.regs
    assert regs.rip == (site.behind if done else site.at)
    assert (regs.rax, regs.rdx, regs.rcx) == (site.rax, site.rdx, 0x66)
    assert regs.rflags & FLAGS == flags & FLAGS


@pytest.mark.parametrize(("ax", "flags"), [(0xD501, 0xAD7), (0x0200, 0x202)])
def test_flags_that_looking_at_the_area_has_changed_come_back(ax: int, flags: int) -> None:
    stub, _site = stub_for(EAX + EDX)
    behind_lea = stub.labels["kept"] + 4
    for at in range(behind_lea, stub.labels["added"]):
        thread = thread_at(stub, at, rax=ax, rflags=0xAD7 ^ flags ^ 0x202)
        straighten(thread)
        assert thread.regs.rflags & FLAGS == flags & FLAGS


def test_a_thread_elsewhere_stays_there() -> None:
    stub, _site = stub_for(EAX + EDX)
    for at in (-STATE_STUB_BYTES - 1, STATE_STUB_BYTES):
        thread = thread_at(stub, at, rax=1)
        straighten(thread)
        assert (thread.regs.rip, thread.regs.rax) == (STUBS + STATE_STUB_BYTES + at, 1)
