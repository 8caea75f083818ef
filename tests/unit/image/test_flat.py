"""The kernel selftest's ELF files and raw images: pages by place in the file."""

from __future__ import annotations

import struct

import pytest
from tests.support.elfmaker import RW, RX, R, Seg, make_elf
from tests.support.enclave_files import (
    PAGE,
    code,
    mrenclave,
    pages_of,
    raw_file,
    selftest_file,
)

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, measure, read_raw, read_selftest, tcs_page
from softsgx.image.flat import looks_like_tcs

TCS0 = tcs_page(ossa=0x4000, oentry=0x2000, nssa=1)


def test_a_selftest_enclave_takes_raw_pages_of_the_file() -> None:
    made = selftest_file()
    origin = made.offsets["seg0"]
    file = made.data.ljust(origin + 0x6000, b"\0")
    expected = [
        (0, 0x100, file[origin : origin + PAGE], True),
        (0x1000, 0x100, file[origin + 0x1000 : origin + 0x2000], True),
        (0x2000, 0x205, file[origin + 0x2000 : origin + 0x3000], True),
        (0x3000, 0x203, file[origin + 0x3000 : origin + 0x4000], True),
        (0x4000, 0x203, file[origin + 0x4000 : origin + 0x5000], True),
        (0x5000, 0x203, b"", False),
    ]
    plan = read_selftest(Bytes("t.elf", made.data)).plan
    assert plan.size == 0x8000
    assert plan.tcs == (0, 0x1000)
    assert measure(plan) == mrenclave(0x8000, expected)


def test_the_tail_of_a_selftest_page_is_what_the_file_has_there() -> None:
    made = make_elf([Seg(0, TCS0, RW, offset=0x1000), Seg(0x1000, code(0x10), RX, offset=0x2000)])
    data = bytearray(made.data.ljust(0x3000, b"\0"))
    data[0x2800] = 0xAA
    page = list(read_selftest(Bytes("t.elf", data)).plan.pages())[1]
    assert page.data[0x800] == 0xAA


def test_selftest_pages_go_by_file_offset_not_by_address() -> None:
    made = make_elf(
        [Seg(0x7000, TCS0, RW, offset=0x1000), Seg(0x5000, code(0x20), RX, offset=0x4000)]
    )
    plan = read_selftest(Bytes("t.elf", made.data), heap_pages=0).plan
    assert [page.offset for page in plan.pages()] == [0, 0x3000]


@pytest.mark.parametrize("heap", [0, 1, 9])
def test_the_heap_comes_last_and_is_not_measured(heap: int) -> None:
    plan = read_selftest(Bytes("t.elf", selftest_file().data), heap_pages=heap).plan
    rest = list(plan.pages())[5:]
    assert [(p.offset, p.flags, p.mask) for p in rest] == [
        (0x5000 + i * PAGE, 0x203, 0) for i in range(heap)
    ]


def test_a_selftest_enclave_must_begin_with_its_tcs_segment() -> None:
    made = make_elf([Seg(0, TCS0, RX)])
    with pytest.raises(SoftSgxError, match="begins with its TCS"):
        read_selftest(Bytes("t.elf", made.data))
    with pytest.raises(SoftSgxError, match="no PT_LOAD"):
        read_selftest(Bytes("t.elf", make_elf([]).data))


@pytest.mark.parametrize(("flags", "expected"), [(R, 0x201), (RW, 0x203), (RX, 0x205), (7, 0x207)])
def test_segments_rights_become_secinfo(flags: int, expected: int) -> None:
    made = make_elf([Seg(0, TCS0, RW), Seg(0x1000, code(9), flags)])
    assert list(read_selftest(Bytes("t.elf", made.data)).plan.pages())[1].flags == expected


def test_a_raw_image_is_a_tcs_and_pages_with_all_rights() -> None:
    file = raw_file()
    expected = [
        (i * PAGE, 0x207 if i else 0x100, file[i * PAGE : (i + 1) * PAGE], True) for i in range(4)
    ]
    assert measure(read_raw(Bytes("raw", file)).plan) == mrenclave(0x4000, expected)


def test_a_raw_image_of_one_page_is_an_enclave_of_two() -> None:
    plan = read_raw(Bytes("raw", TCS0)).plan
    assert plan.size == 0x2000
    assert measure(plan) == mrenclave(0x2000, [(0, 0x100, TCS0, True)])


@pytest.mark.parametrize("size", [0, 100, PAGE + 1])
def test_a_raw_image_has_whole_pages(size: int) -> None:
    with pytest.raises(SoftSgxError, match="whole number"):
        read_raw(Bytes("raw", bytes(size)))


@pytest.mark.parametrize(
    ("offset", "value"),
    [(0, 1), (8, 4), (16, 1), (24, 1), (28, 0), (28, 1 << 17), (40, 1), (48, 8), (56, 8), (100, 1)],
)
def test_a_page_that_could_not_be_entered_is_no_tcs(offset: int, value: int) -> None:
    page = bytearray(TCS0)
    assert looks_like_tcs(page)
    struct.pack_into("<I", page, offset, value)
    assert not looks_like_tcs(page)
    with pytest.raises(SoftSgxError, match="no TCS"):
        read_raw(Bytes("raw", page))


def test_pages_of_helper_is_the_manuals() -> None:
    assert mrenclave(0x2000, pages_of(0, 1, 0x203)).hex().startswith("1f2cf80b")
