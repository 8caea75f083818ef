"""Every parser is total: a damaged file is read or refused in one line, soon, in little memory.

Method: mutate valid files of every format where it hurts — counts, sizes, offsets, at known places
and at random ones — and read, lay out and measure what is left.
"""

from __future__ import annotations

import struct
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.enclave_files import (
    oe_file,
    raw_file,
    sdk_laid_out,
    selftest_file,
    sgxs_file,
)

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, measure, read_image, verify
from softsgx.image.elf import Elf
from softsgx.image.sdk import sdk_blocks

FILES = {
    "sgxs": sgxs_file,
    "raw": raw_file,
    "selftest": lambda: selftest_file().data,
    "sdk": lambda: bytes(sdk_laid_out().view),
    "oe": oe_file,
}
NASTY = [0, 1, 7, 255, 4095, 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 40,
         (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip


@cache
def original(name: str) -> bytes:
    return FILES[name]()


@cache
def hot_places(name: str) -> list[int]:
    """Return offsets of tables: headers, section table, metadata, properties."""
    data = original(name)
    places = list(range(0, 512, 4))
    if data[:4] == b"\x7fELF":
        elf = Elf(Bytes(name, data))
        shoff = elf.header.e_shoff
        places += range(shoff, min(len(data), shoff + 64 * elf.header.e_shnum), 4)
        for section in elf.sections:
            start = section.header.sh_offset
            places += range(start, min(len(data), start + 256), 4)
    if name == "sdk":
        for block in sdk_blocks(Bytes(name, data))[1]:
            start = block.bytes.origin
            places += range(start, start + 64, 4)
            places += range(start + 1872, start + len(block.bytes), 4)
    return places


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
