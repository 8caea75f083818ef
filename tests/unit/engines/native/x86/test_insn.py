"""Decoding is right where an independent disassembler can say so.

Goal: length and kind of access of instructions.  Method: Capstone on the code of the C library, and
on every opcode with random operands; rows for what Capstone does not tell.
"""

from __future__ import annotations

import ctypes.util
import random
from pathlib import Path

import pytest

from softsgx.engines.native.x86.insn import decode, is_illegal_inside, is_write

STORES = {
    "4889 37": (True, "mov [rdi], rsi"),
    "488b 37": (False, "mov rsi, [rdi]"),
    "48 39 37": (False, "cmp [rdi], rsi"),
    "48 01 37": (True, "add [rdi], rsi"),
    "f0 48 0fb1 37": (True, "lock cmpxchg"),
    "0f 94 07": (True, "sete [rdi]"),
    "c6 07 05": (True, "mov byte [rdi], 5"),
    "80 3f 05": (False, "cmp byte [rdi], 5"),
    "f6 07 05": (False, "test byte [rdi], 5"),
    "f6 1f": (True, "neg byte [rdi]"),
    "ff 07": (True, "inc dword [rdi]"),
    "8d 07": (False, "lea"),
    "0f 11 07": (True, "movups"),
    "0f 10 07": (False, "movups load"),
    "66 0f 7e 07": (True, "movd"),
    "f3 0f 7e 07": (False, "movq load"),
    "c5 fe 7f 07": (True, "vmovdqu"),
    "c5 fe 6f 07": (False, "vmovdqu load"),
    "62 f1 7c 48 11 07": (True, "vmovups zmm"),
    "d9 1f": (True, "fstp"),
    "d9 07": (False, "fld"),
    "0f ae 07": (True, "fxsave"),
    "0f ae 0f": (False, "fxrstor"),
    "0f ab 37": (True, "bts"),
    "0f a3 37": (False, "bt"),
}


@pytest.mark.parametrize(("code", "store", "name"), [(c, s, n) for c, (s, n) in STORES.items()])
def test_a_store_is_distinguished_from_a_load(code: str, store: bool, name: str) -> None:
    raw = bytes.fromhex(code)
    insn = decode(raw)
    assert insn is not None
    assert insn.length == len(raw), name
    assert is_write(raw, 0x5000, rsp=0x9000, rdi=0x5000) is store, name


def test_pushes_and_strings_store_only_where_they_point() -> None:
    push, movs = b"\xff\x37", b"\xf3\x48\xa5"  # push [rdi]; rep movsq
    assert is_write(push, 0x8FF8, rsp=0x9000, rdi=0x5000)
    assert not is_write(push, 0x5000, rsp=0x20000, rdi=0x5000)
    assert is_write(movs, 0x5010, rsp=0x9000, rdi=0x5008)
    assert not is_write(movs, 0x70000, rsp=0x9000, rdi=0x5008)


@pytest.mark.parametrize(
    "code",
    [
        *(b"", b"\x48", b"\x48\x8b", b"\x81\x07\x01", b"\x0f", b"\xc4\xe2"),
        *(bytes.fromhex("0f3800b9"), bytes.fromhex("c4e279188510")),
    ],
)
def test_an_instruction_that_is_cut_off_is_unknown(code: bytes) -> None:
    assert decode(code) is None


def _library() -> bytes:
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        if "x" in words[1] and len(words) > 5 and "/libc" in words[5]:
            start, end = (int(part, 16) for part in words[0].split("-"))
            return ctypes.string_at(start, min(end - start, 1 << 19))
    pytest.skip("no C library is mapped")


def test_the_c_library_decodes_into_the_same_instructions() -> None:
    capstone = pytest.importorskip("capstone")
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    code, at, compared = _library(), 0, 0
    while at < min(len(code) - 16, 120_000):
        piece = code[at : at + 15]
        found = next(disassembler.disasm(piece, at, 1), None)
        if found is None:
            at += 1
            continue
        mine = decode(piece)
        assert mine is not None, (piece.hex(), found.mnemonic, found.op_str)
        assert mine.length == found.size, (piece.hex(), found.mnemonic, found.op_str)
        at += found.size
        compared += 1
    assert compared > 10_000


def test_an_instruction_is_never_longer_than_its_bytes() -> None:
    source = random.Random(7)
    for _ in range(20_000):
        code = source.randbytes(1 + source.randrange(15))
        insn = decode(code)
        assert insn is None or 1 <= insn.length <= len(code)


@pytest.mark.parametrize(
    "code",
    [
        *("0fa2", "0f05", "0f34", "cd80", "cd21", "ec", "ee", "e460", "6c", "f36e", "0f33", "0f37"),
        *("cf", "48cf", "cb", "ca0800", "ff28", "ff18", "48ff2c24", "8ed8", "0fa1", "0fb200"),
        *("0f00c0", "0f00c8", "0f0100", "0f0108", "0f01e0", "0f0120", "0f01c1", "0f01d4"),
    ],
)
def test_what_the_manual_lists_is_illegal_inside_an_enclave(code: str) -> None:
    assert is_illegal_inside(bytes.fromhex(code))


@pytest.mark.parametrize(
    "code",
    [
        "0f01d7",
        "0f01d0",
        "cc",
        "f4",
        "c3",
        "ff10",
        "ff20",
        "fa",
        "0f31",
        "0fae00",
        "8cd8",
        "",
        "0f",
    ],
)
def test_other_instructions_are_what_they_are_outside(code: str) -> None:
    assert not is_illegal_inside(bytes.fromhex(code))
