"""Every parser is total: a damaged file is read or refused in one line, soon, in little memory.

Method: mutate valid files of every format where it hurts — counts, sizes, offsets, at known places
and at random ones — and read, lay out and measure what is left.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.damage import FILES, NASTY, hot_places, original

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, measure, read_image, verify


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    data = bytearray(original(name))
    for _ in range(draw(st.integers(1, 3))):
        match draw(st.sampled_from(["place", "place", "place", "byte", "cut", "grow"])):
            case "place":
                at = draw(st.sampled_from(hot_places(name)))
                value = draw(st.one_of(st.sampled_from(NASTY), st.integers(0, (1 << 64) - 1)))
                width = draw(st.sampled_from([2, 4, 8]))
                data[at : at + width] = struct.pack("<Q", value)[:width]
            case "byte" if data:
                data[draw(st.integers(0, len(data) - 1))] ^= draw(st.integers(1, 255))
            case "cut":
                del data[draw(st.integers(0, len(data))) :]
            case _:
                data += bytes(draw(st.sampled_from([1, 256, 4096])))
    return bytes(data)


def read_and_measure(name: str, data: bytes) -> None:
    """Read as the format it was and as what it looks like now; only one kind of error may come."""
    for file_format in (name, None):
        try:
            image = read_image(Bytes("bad", data), file_format=file_format)
            measure(image.plan, limit_bytes=1 << 23)
            if image.sigstruct is not None:
                verify(image.sigstruct, mrenclave=bytes(32))
        except SoftSgxError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 600
            assert text.startswith(("bad: ", "plan: "))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_read_or_refused_in_one_line(name: str) -> None:
    @given(damaged(name))
    @settings(
        max_examples=250,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        database=None,
    )
    def check(data: bytes) -> None:
        read_and_measure(name, data)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_nasty_number_at_any_hot_place_does_no_harm(name: str) -> None:
    for at in hot_places(name)[::5]:
        for value in (0xFFFFFFFF, (1 << 63) - 1):
            data = bytearray(original(name))
            data[at : at + 8] = struct.pack("<Q", value)
            read_and_measure(name, bytes(data))


@given(st.binary(max_size=4096))
@settings(max_examples=100, deadline=None)
def test_any_bytes_at_all_are_read_or_refused(data: bytes) -> None:
    for name in FILES:
        read_and_measure(name, data)
        read_and_measure(name, original(name)[:64] + data)
