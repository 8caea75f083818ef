"""Declared structures add up, or they do not load.

Goal: a wrong offset, a forgotten reserved field or a wrong size can never reach a leaf.  Method:
declare wrong structures and watch them being refused; pack and unpack right ones.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.layout import U8, U16, U32, U64, LayoutError, Nested, Raw, Structure, at


class Inner(Structure, size=4, align=2):
    low: int = at(0, U16)
    high: int = at(2, U16)


class Outer(Structure, size=32, align=16):
    byte: int = at(0, U8)
    pad: bytes = at(1, Raw(1))
    half: int = at(2, U16)
    word: int = at(4, U32, default=7)
    quad: int = at(8, U64)
    inner: Inner = at(16, Nested(Inner))
    rest: bytes = at(20, Raw(12))


def test_a_gap_between_two_fields_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"Holey: gap before late"):

        class Holey(Structure, size=8):
            early: int = at(0, U16)
            late: int = at(4, U32)


def test_a_gap_before_the_first_field_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"gap before only"):

        class Late(Structure, size=8):
            only: int = at(4, U32)


def test_overlapping_fields_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"Crowded: overlap at second"):

        class Crowded(Structure, size=8):
            first: int = at(0, U64)
            second: int = at(4, U32)


def test_fields_declared_out_of_order_are_refused() -> None:
    with pytest.raises(LayoutError):

        class Shuffled(Structure, size=8):
            second: int = at(4, U32)
            first: int = at(0, U32)


@pytest.mark.parametrize("declared", [4, 7, 9, 4096])
def test_a_size_that_the_fields_do_not_fill_is_refused(declared: int) -> None:
    with pytest.raises(LayoutError, match=rf"declared size is {declared}"):

        class Wrong(Structure, size=declared):
            only: int = at(0, U64)


def test_a_structure_without_fields_has_no_bytes() -> None:
    with pytest.raises(LayoutError):

        class Empty(Structure, size=1):
            pass


def test_size_alignment_and_offsets_are_those_declared() -> None:
    assert (Outer.SIZE, Outer.ALIGN) == (32, 16)
    assert Outer.OFFSETS == {
        "byte": 0,
        "pad": 1,
        "half": 2,
        "word": 4,
        "quad": 8,
        "inner": 16,
        "rest": 20,
    }


def test_integers_are_little_endian() -> None:
    assert Outer(quad=0x0102030405060708, word=0).pack()[8:16] == bytes(range(8, 0, -1))
    assert Inner.unpack(b"\x01\x02\x03\x04").low == 0x0201


def test_a_field_left_out_has_its_default_or_zero_bytes() -> None:
    data = Outer().pack()
    assert data == bytes(4) + b"\x07\0\0\0" + bytes(24)


def test_zero_given_for_a_field_with_a_default_is_zero() -> None:
    assert Outer(word=0).pack() == bytes(32)


def test_a_field_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="no field 'wrod'"):
        Outer(wrod=1)


@pytest.mark.parametrize("length", [0, 11, 13])
def test_bytes_of_a_wrong_length_are_refused_instead_of_padded_or_cut(length: int) -> None:
    with pytest.raises(ValueError, match=f"takes 12 bytes, got {length}"):
        Outer(rest=bytes(length)).pack()


@pytest.mark.parametrize(("name", "value"), [("byte", 256), ("half", 1 << 16), ("quad", -1)])
def test_an_integer_that_does_not_fit_its_field_is_refused(name: str, value: int) -> None:
    with pytest.raises(struct.error):
        Outer(**{name: value}).pack()


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(struct.error):
        Outer.unpack(bytes(31))
    with pytest.raises(struct.error):
        Outer.unpack(bytes(40), 9)


def test_two_structures_made_without_a_nested_field_do_not_share_it() -> None:
    one, other = Outer(), Outer()
    one.inner.low = 5
    assert other.inner.low == 0


def test_replace_leaves_the_original_as_it_was() -> None:
    before = Outer(quad=1)
    after = before.replace(quad=2, byte=3)
    assert (before.quad, before.byte) == (1, 0)
    assert (after.quad, after.byte) == (2, 3)


def test_structures_are_equal_when_their_bytes_are_and_they_are_of_one_kind() -> None:
    class Twin(Structure, size=4):
        low: int = at(0, U16)
        high: int = at(2, U16)

    assert Inner(low=1) == Inner(low=1)
    assert Inner(low=1) != Inner(low=2)
    assert Inner(low=1) != Twin(low=1)


def test_a_mutable_record_is_no_dictionary_key() -> None:
    with pytest.raises(TypeError):
        hash(Inner())


def test_a_representation_shows_what_is_not_zero() -> None:
    assert repr(Inner(high=9)) == "Inner(high=9)"


@given(st.binary(min_size=32, max_size=32), st.integers(0, 9), st.sampled_from([bytes, bytearray]))
def test_unpacking_and_packing_gives_back_every_byte(data: bytes, before: int, kind: Any) -> None:
    padded = kind(bytes(before) + data)
    assert Outer.unpack(padded, before).pack() == data
    assert Outer.unpack(memoryview(padded), before).pack() == data
