"""CPUID is found where it is an instruction, and nowhere else."""

from __future__ import annotations

import random

import pytest

from softsgx.engines.native.x86.rewrite import CPUID, TRAP, cpuid_sites

PROLOGUE = bytes.fromhex("55 4889e5 53 4883ec18 897dec 8975e8")
BEFORE = bytes.fromhex("488b45f0 4885c0 7408 4889c7")
AFTER = bytes.fromhex("8945f4 895df0 894dec 8955e8 5b 5d c3")
LOADS = {"imm": "b807000000", "zero": "31c0", "from edi": "89f8", "from memory": "8b45ec"}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_an_instruction_is_found(load: str) -> None:
    before = PROLOGUE + BEFORE * 8 + bytes.fromhex(load) + b"\x31\xc9"
    assert cpuid_sites(before + CPUID + AFTER) == [len(before)]


def test_the_bytes_inside_another_instruction_are_not() -> None:
    code = PROLOGUE + BEFORE * 8 + b"\xb8" + CPUID + b"\0\0" + AFTER  # mov eax, 0xa20f
    assert cpuid_sites(code) == []


def test_data_is_not_code() -> None:
    source = random.Random(3)
    found = 0
    for _ in range(300):
        table = source.randbytes(120) + CPUID + source.randbytes(60)
        found += bool(cpuid_sites(table))
    # Random bytes can spell out "load EAX, CPUID" too, but hardly ever do.
    assert found <= 15


def test_a_replacement_is_as_long_as_what_it_replaces() -> None:
    assert len(TRAP) == len(CPUID)
