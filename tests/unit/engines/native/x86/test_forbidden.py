"""Instructions that an enclave may not execute as this machine does are found, and decoded."""

from __future__ import annotations

import pytest

from softsgx.engines.native.abi import UserRegs
from softsgx.engines.native.x86.forbidden import ForbiddenCode
from softsgx.engines.native.x86.state import StateOperation, decode_state

BEFORE = bytes.fromhex("488b45f0 4885c0 7408 4889c7")
AFTER = bytes.fromhex("8945f4 895df0 894dec 8955e8 5b 5d c3")
EVERYTHING = ForbiddenCode(cpuid=True, time=True, state=True)
SITES = {  # bytes, and where the byte behind 0F is
    "rdtsc": ("0f31", 1),
    "rdtscp": ("0f01f9", 2 - 1),
    "xgetbv": ("0f01d0", 1),
    "xsave": ("0fae27", 1),
    "xsave64": ("480fae27", 2),
    "xsave64 at r9 + disp": ("490fae6140", 2),
    "xrstor": ("0fae6b10", 1),
    "xsaveopt": ("0fae75f0", 1),
    "xsavec64": ("480fc72424", 2),
    "xsave of fs": ("640fae242500000000", 2),
}


@pytest.mark.parametrize("name", SITES)
def test_an_instruction_is_found(name: str) -> None:
    text, site = SITES[name]
    start = BEFORE * 10
    assert EVERYTHING(start + bytes.fromhex(text) + AFTER) == [len(start) + site]


@pytest.mark.parametrize(
    "text",
    ["0faee8", "660fae37", "0fae1f", "0fae0f", "0fc70f", "0fc7f0", "0f01d7", "b80f310000", "0f05"],
)
def test_others_are_left_alone(text: str) -> None:
    """LFENCE, CLWB, STMXCSR, FXRSTOR, CMPXCHG8B, RDRAND, ENCLU, an immediate, SYSCALL."""
    assert EVERYTHING(BEFORE * 10 + bytes.fromhex(text) + AFTER) == []


def test_what_is_not_asked_for_is_not_found() -> None:
    code = BEFORE * 10 + bytes.fromhex("0f31 0f01d0") + AFTER
    assert ForbiddenCode(cpuid=False, time=False, state=True)(code) == [len(BEFORE) * 10 + 3]
    assert ForbiddenCode(cpuid=False, time=True, state=False)(code) == [len(BEFORE) * 10 + 1]
    assert not ForbiddenCode(cpuid=False, time=False, state=False)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("480fae27", 0x7000),  # [rdi]
        ("490fae6140", 0x9040),  # [r9 + 40h]
        ("480fae642408", 0x5008),  # [rsp + 8]
        ("0fae24fd10000000", 0x7000 * 8 + 0x10),  # [rdi * 8 + 10h]
        ("420fae24fd10000000", 0x1_5000 * 8 + 0x10),  # [r15 * 8 + 10h]
        ("430fae24cf", 0x1_5000 + 0x9000 * 8),  # [r15 + r9 * 8]
        ("480fae2510000000", 0x4000 + 8 + 0x10),  # [rip + 10h]
        ("0faea7f0ffffff", 0x7000 - 0x10),  # [rdi - 10h]
        ("640fae27", 0xF000 + 0x7000),  # fs:[rdi]
        ("670fae23", 0x2000_0000),  # [ebx]
    ],
)
def test_an_operand_is_where_the_manual_says(text: str, address: int) -> None:
    insn = decode_state(bytes.fromhex(text))
    assert insn is not None and insn.operation is StateOperation.XSAVE
    regs = UserRegs(rip=0x4000, rsp=0x5000, rdi=0x7000, r9=0x9000, r15=0x1_5000, fs_base=0xF000)
    regs.rbx = 0x1_2000_0000
    assert insn.address(regs) == address
    assert insn.length == len(bytes.fromhex(text))
