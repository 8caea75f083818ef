"""Registers as gdb transfers them.

Goal: a register that gdb sets is what it reads next, and nothing else has changed; the target
description names what is transferred.  Method: Hypothesis.
"""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.engines.native.gdb.registers import (
    REGISTERS,
    RegisterFile,
    description,
    pack_tag_word,
    unpack_tag_word,
)
from softsgx.engines.native.gdb.signals import UNKNOWN, from_gdb, to_gdb

NAMES = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx"),
    *("rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss", "fs_base", "gs_base"),
    *("ds", "es", "fs", "gs"),
)
NUMBER = {register.name: number for number, register in enumerate(REGISTERS)}
LEGACY_BYTES, AVX_BYTES = 576, 256


def registers(xsave: bytes = bytes(LEGACY_BYTES + AVX_BYTES), *, avx: bool = True) -> RegisterFile:
    return RegisterFile(dict.fromkeys(NAMES, 0), xsave, avx=avx)


@pytest.mark.parametrize("avx", [True, False])
def test_the_description_names_the_registers_in_the_order_of_their_bytes(avx: bool) -> None:
    tree = ElementTree.fromstring(description(avx=avx))
    found = [(each.get("name"), int(each.get("bitsize", 0)) // 8) for each in tree.iter("reg")]
    assert found == [(each.name, each.size) for each in REGISTERS[: len(found)]]
    for area_bytes in (LEGACY_BYTES, LEGACY_BYTES + AVX_BYTES):  # an enclave may have less
        file = registers(bytes(area_bytes), avx=avx)
        assert len(file.all()) == sum(size for _name, size in found)


@given(st.sampled_from(REGISTERS), st.data())
def test_a_register_that_was_set_is_read_and_no_other_has_changed(
    register: object, data: st.DataObject
) -> None:
    number = REGISTERS.index(register)
    size = REGISTERS[number].size
    # Fields of the x87 environment are two bytes; those of the tag word hang together.
    short = REGISTERS[number].name in ("fctrl", "fstat", "fop", "fiseg", "foseg")
    value = data.draw(st.binary(min_size=size, max_size=size))
    value = value[:2] + bytes(2) if short else value
    before, file = registers(), registers()
    file.set(number, value)
    if REGISTERS[number].name == "ftag":
        return
    assert file.get(number) == value
    dependent = (
        {"ftag"} if REGISTERS[number].name in ("fstat", *(f"st{n}" for n in range(8))) else set()
    )
    for other, each in enumerate(REGISTERS):
        if other != number and each.name not in dependent:
            assert file.get(other) == before.get(other), each.name


def test_state_in_its_initial_configuration_reads_so_with_any_bytes_in_the_area() -> None:
    file = registers(b"\xff" * 512 + bytes(64) + b"\xff" * 256)
    assert file.get(NUMBER["fctrl"]) == bytes.fromhex("7f030000")
    assert file.get(NUMBER["mxcsr"]) == bytes.fromhex("801f0000")
    assert file.get(NUMBER["ftag"]) == bytes.fromhex("ffff0000")
    assert file.get(NUMBER["xmm3"]) == file.get(NUMBER["ymm3h"]) == bytes(16)


@given(
    st.integers(0, 255),
    st.integers(0, 7),
    st.lists(st.binary(min_size=10, max_size=10), min_size=8, max_size=8),
)
def test_the_abridged_tag_word_comes_back(abridged: int, top: int, stack: list[bytes]) -> None:
    assert pack_tag_word(unpack_tag_word(abridged, top, stack)) == abridged


@pytest.mark.parametrize("number", range(1, 65))
def test_each_signal_comes_back_from_gdbs_number(number: int) -> None:
    assert from_gdb(to_gdb(number)) == number or to_gdb(number) == UNKNOWN


def test_numbers_are_gdbs() -> None:
    assert [to_gdb(number) for number in (0, 5, 7, 8, 10, 11, 17, 34)] == [
        0,
        5,
        10,
        8,
        30,
        11,
        20,
        46,
    ]
