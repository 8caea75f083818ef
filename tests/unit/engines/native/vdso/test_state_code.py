"""Which instructions on extended state get a stub, and where a thread in one is by its program."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.vdso.state_code import StateSite, find_site
from softsgx.engines.native.vdso.state_jumps import EnclaveSite, straighten
from softsgx.engines.native.vdso.stubs import STATE_STUB_BYTES, Stub, Stubs
from softsgx.engines.native.x86.areas import Move
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
        (EAX + b"\x31\xd2", 7, 0),
        (EAX + b"\x48\x33\xd2", 7, 0),
        (EDX + b"\x33\xc0", 0, 0x8000_00FF),
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
        ("48 0f ae 29", "48 8d 91 00 00 00 00"),  # [rcx]
        ("0f ae 67 40", "48 8d 97 40 00 00 00"),  # xsave [rdi+64]
        ("49 0f ae 68 c0", "49 8d 90 c0 ff ff ff"),  # [r8-64]
        ("48 0f ae ac 24 00 01 00 00", "48 8d 94 24 00 01 00 00"),  # [rsp+256]
        ("4a 0f c7 64 39 40", "4a 8d 94 39 40 00 00 00"),  # xsavec [rcx+r15+64]
        ("48 0f ae 64 0d 00", "48 8d 94 0d 00 00 00 00"),  # xsave [rbp+rcx]
        ("4a 0f ae 2c 3d 00 01 00 00", "4a 8d 14 3d 00 01 00 00"),  # [r15+256]
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
        "48 0f ae a9 00 00 ff 7f",  # [rcx+7fff0000H]: parts of the area would be too far
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
        (BEFORE, EAX + b"\x31\xc0"),  # xor eax, eax
        (BEFORE, EAX + b"\x31\xc2"),  # xor edx, eax
        (BEFORE, b"\x31\xd2" + EAX),
        (BEFORE, b"\x83\xc8\xff\x83\xca\xff"),  # or eax, -1; or edx, -1
        (BEFORE, EAX + EDX + b"\x90"),
        (b"\x90" * 4, EAX + EDX),  # too near to the start of the page
        (BEFORE + b"\x48\xb9\0\0\0\0\0\0", EAX + EDX),  # inside the bytes of another instruction
    ],
)
def test_other_code_in_front_has_no_stub(before: bytes, loads: bytes) -> None:
    assert site_of(loads, before=before) is None


def thread_at(stub: Stub[EnclaveSite], at: int, **registers: int) -> Any:
    regs = UserRegs(rip=STUBS + STATE_STUB_BYTES + at, **registers)
    stubs: Stubs[EnclaveSite] = Stubs(STATE_STUB_BYTES, (STUBS, 2))
    stubs._areas[0].made += [cast(Any, None), stub]
    image = SimpleNamespace(state_stubs=stubs)
    return cast(Any, SimpleNamespace(image=image, regs=regs, load=lambda: regs, store=lambda: None))


def stub_for(
    loads: bytes, insn: bytes = XRSTOR, xfrm: int = 7, moves: tuple[Move, ...] = ()
) -> tuple[Stub[EnclaveSite], StateSite]:
    site = site_of(loads, insn)
    assert site is not None
    code, labels = site.stub(
        STUBS + STATE_STUB_BYTES, xfrm, range(0x1000, 0x9000), 832, moves, True
    )
    assert len(code) <= STATE_STUB_BYTES
    made = EnclaveSite(site, xfrm, range(0x1000, 0x9000), 832, moves, True)
    return Stub(made, labels), site


@pytest.mark.parametrize("xfrm", [3, 0x6_00E7, 1 << 62 | 3])
def test_a_stub_masks_both_halves_by_xfrm(xfrm: int) -> None:
    site = site_of(b"\x48\xc7\xc0\xff\xff\xff\xff\x89\xc2")
    assert site is not None
    code, labels = site.stub(STUBS, xfrm, range(0x1000, 0x9000), 832, (), True)
    low, high = xfrm & 0xFFFF_FFFF, xfrm >> 32
    wanted = b"\xb8" + low.to_bytes(4, "little") + b"\xba" + high.to_bytes(4, "little") + XRSTOR
    assert code[labels["flagged"] : labels["executed"]] == wanted
    start, room, foreign = struct.unpack_from("<3Q", code, labels["enclave"])
    assert (start, room) == (0x1000, 0x8000 - 832), "an area may start there"
    assert foreign == (1 << 63) - 1 & ~xfrm


XSAVE, XSAVEC, XSAVEOPT = b"\x48\x0f\xae\x21", b"\x48\x0f\xc7\x21", b"\x48\x0f\xae\x31"
SOME = b"\xb8\x03\0\0\0\xba\0\0\0\0"


NO_AVX = b"\xb8\xe3\0\0\0\xba\0\0\0\0"
ALL = EDX + b"\xb8\xff\xff\xff\xff"
AMD = (Move(5, 64, 832, 1088), Move(6, 512, 896, 1152), Move(7, 1024, 1408, 1664))
AMD_KEYS = (*AMD, Move(9, 8, 2432, 2688))
ZEN_3 = (Move(9, 8, 832, 2688),)
ONE = (Move(7, 1024, 1408, 1536),)
LOWER, CROOKED = (Move(7, 1024, 1408, 1344),), (Move(7, 1024, 1408, 1418),)
NEVER: set[bytes] = set()


@pytest.mark.parametrize(
    ("moves", "xfrm", "loads", "without"),
    [
        ((), 0xE7, ALL, NEVER),
        (AMD_KEYS, 3, ALL, NEVER),
        (AMD_KEYS, 7, ALL, NEVER),
        (AMD_KEYS, 0x2E7, SOME, NEVER),
        (AMD, 0xE7, ALL, {XSAVEOPT}),
        (AMD_KEYS, 0xE7, ALL, {XSAVEOPT}),
        (AMD_KEYS, 0x2E7, ALL, {XSAVEOPT}),
        (ONE, 0xE7, ALL, {XSAVEOPT}),
        # The header of what is moved would be where nothing else is stored.
        (ZEN_3, 0x207, ALL, {XSAVE, XSAVEOPT}),
        (AMD, 0xE7, NO_AVX, {XSAVE, XSAVEOPT}),
        ((*AMD, ZEN_3[0]), 0x2E7, ALL, {XSAVE, XSAVEOPT}),  # two distances
        (LOWER, 0xE7, ALL, {XSAVE, XSAVEOPT}),
        (CROOKED, 0xE7, ALL, {XSAVE, XSAVEOPT}),
        ((Move(2, 256, 576, 640),), 7, ALL, {XSAVE, XSAVEOPT}),
    ],
)
def test_a_stub_for_components_that_are_elsewhere_needs_room_for_a_header(
    moves: tuple[Move, ...], xfrm: int, loads: bytes, without: set[bytes]
) -> None:
    for insn in (XSAVE, XSAVEOPT, XSAVEC, XRSTOR):
        site = site_of(loads, insn)
        assert site is not None
        assert site.can_have_stub(xfrm, moves) == (insn not in without)


@pytest.mark.parametrize(
    ("moves", "xfrm", "loads", "loading", "section"),
    [
        (AMD, 0xE7, ALL, True, True),
        (AMD_KEYS, 0xE7, ALL, True, True),
        (AMD, 0xE7, ALL, False, False),  # no AVX512BW
        (AMD_KEYS, 0x2E7, ALL, True, False),  # WRPKRU needs ECX
        (AMD, 0xE7, NO_AVX, True, False),  # loads would count AVX as in use
        (AMD, 0xE7, SOME, True, False),
        (AMD, 7, ALL, True, False),
    ],
)
def test_xrstor_loads_components_from_elsewhere_where_instructions_can(
    moves: tuple[Move, ...], xfrm: int, loads: bytes, loading: bool, section: bool
) -> None:
    site = site_of(loads)
    assert site is not None
    code, labels = site.stub(STUBS, xfrm, range(0x1000, 0x9000), 832, moves, loading)
    assert ("loads" in labels) == section
    asked = site.mask & xfrm
    found = sum(1 << move.number for move in moves if asked >> move.number & 1)
    assert struct.unpack_from("<Q", code, labels["moved"]) == (found,)
    assert ("plain" in labels) == bool(found)


@pytest.mark.parametrize("rex", [b"", b"\x48"])
def test_components_at_their_places_are_restored_again_behind_loads(rex: bytes) -> None:
    site = site_of(ALL, rex + b"\x0f\xae\x29")
    assert site is not None
    code, labels = site.stub(STUBS, 0xE7, range(0x1000, 0x9000), 2688, AMD, True)
    xrstor = (rex or b"\x40") + b"\x0f\xae\xa9\0\0\0\0"
    again = b"\x9e\xb8\x07\0\0\0\xba\0\0\0\0" + xrstor + b"\xe9"  # sahf; both loads; …; jmp
    assert code[labels["added_loading"] :].startswith(again)
    assert code[: labels["kept_loading"]].endswith(xrstor + bytes.fromhex("9f 0f 90 c0"))


@pytest.mark.parametrize("rex", [b"", b"\x48"])
def test_components_elsewhere_are_saved_first(rex: bytes) -> None:
    site = site_of(ALL, rex + b"\x0f\xae\x21")
    assert site is not None
    code, labels = site.stub(STUBS, 0xE7, range(0x1000, 0x9000), 2688, AMD, True)
    first = b"\xb8\xe0\0\0\0\xba\0\0\0\0" + (rex or b"\x40") + b"\x0f\xae\xa1\0\x01\0\0"
    assert code[labels["flagged"] :].startswith(first)
    assert code[: labels["executed"]].endswith(
        b"\xb8\x07\0\0\0\xba\0\0\0\0" + rex + b"\x0f\xae\x21"
    )


def test_no_stub_is_longer_than_its_place() -> None:
    far = b"\x4b\x0f\xae\xac\xfe\x00\x01\x00\x00"  # xrstor64 [r14+8*r15+256]
    site = site_of(b"\x48\xc7\xc0\xff\xff\xff\xff\x48\xc7\xc2\xff\xff\xff\xff", far)
    assert site is not None
    code, labels = site.stub(STUBS, 0xE7, range(0x1000, 0x9000), 2688, AMD, True)
    assert "loads" in labels and 768 < len(code) <= STATE_STUB_BYTES


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


def test_a_load_that_changes_flags_is_executed_before_these_are_kept() -> None:
    site = site_of(EAX + b"\x31\xd2")
    assert site is not None
    code, labels = site.stub(STUBS, 7, range(0x1000, 0x9000), 832, (), True)
    assert code[: labels["kept"]] == EAX + b"\x31\xd2" + bytes.fromhex("9f 0f 90 c0")
    stub = Stub(EnclaveSite(site, 7, range(0x1000, 0x9000), 832, (), True), labels)
    for at, rip in ((0, site.start + 5), (5, site.start + 5), (7, site.at)):
        thread = thread_at(stub, at, rax=7, rdx=0, rflags=0x246)
        straighten(thread)
        assert (thread.regs.rip, thread.regs.rax, thread.regs.rflags) == (rip, 7, 0x246)


STORES = b"\x48\x89\x94\x24\x50\x02\0\0" + b"\x48\x89\x54\x24\x78"


@pytest.mark.parametrize("loads", [EAX + b"\x31\xd2", EDX + EAX, EAX + b"\x89\xc2"])
def test_stores_of_rdx_on_the_stack_are_executed_by_the_stub(loads: bytes) -> None:
    site = site_of(loads + STORES)
    assert site is not None
    assert (site.loads, site.before) == (loads, loads + STORES)
    assert (site.at, site.behind) == (site.start + len(site.before), site.at + 4)
    code, labels = site.stub(STUBS, 7, range(0x1000, 0x9000), 832, (), True)
    assert code.startswith(site.before) and code.count(STORES) == 1
    stub = Stub(EnclaveSite(site, 7, range(0x1000, 0x9000), 832, (), True), labels)
    for at in (len(loads), len(loads) + 8):
        thread = thread_at(stub, at, rax=0x11, rdx=0x22, rflags=0x202)
        straighten(thread)
        regs = thread.regs
        assert (regs.rip, regs.rax, regs.rdx) == (site.start + at, 0x11, 0x22)


@pytest.mark.parametrize(
    "stores",
    [
        b"\x48\x89\x44\x24\x78",  # of RAX
        b"\x48\x89\x51\x08",  # by RCX
        b"\x89\x54\x24\x78",  # of EDX
        b"\x48\x89\x54\x24\x78\x90",
        b"\x48\x89\x54\x24\x78" * 20,  # too many
    ],
)
def test_other_stores_have_no_stub(stores: bytes) -> None:
    assert site_of(EAX + b"\x31\xd2" + stores) is None


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


@pytest.mark.parametrize(
    ("insn", "start", "first", "added"),
    [
        (XSAVE, "kept_again", 1, "added_again"),
        (XRSTOR, "loads", 0, "added_loads"),
        (XRSTOR, "kept_loading", 1, "added_loading"),
    ],
)
def test_flags_come_back_from_where_moved_components_are_handled(
    insn: bytes, start: str, first: int, added: str
) -> None:
    stub, site = stub_for(ALL, insn, 0xE7, AMD)
    begin, end = stub.labels[start], stub.labels[added]
    for at in range(begin - 4 if first else begin, end + 6):
        thread = thread_at(stub, at, rax=0xD501, rflags=0x202)
        straighten(thread)
        wanted = 0x202 if not begin + first <= at <= end else 0xAD7 if at < end else 0x2D7
        assert (thread.regs.rflags, thread.regs.rip) == (wanted, site.at), at


def test_a_thread_elsewhere_stays_there() -> None:
    stub, _site = stub_for(EAX + EDX)
    for at in (-STATE_STUB_BYTES - 1, STATE_STUB_BYTES):
        thread = thread_at(stub, at, rax=1)
        straighten(thread)
        assert (thread.regs.rip, thread.regs.rax) == (STUBS + STATE_STUB_BYTES + at, 1)
