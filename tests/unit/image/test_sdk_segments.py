"""Segments of an SDK library: partial pages, bss, order, text relocations, version 1.3's page.

Each test builds a library with one oddity and compares its pages with a list made by hand.
"""

from __future__ import annotations

import struct

import pytest
from tests.support.elfmaker import RW, RX, SHT_RELA, Made, R, Sec, Seg, Sym, make_elf
from tests.support.enclave_files import PAGE, code

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, Run
from softsgx.image.elf import Elf
from softsgx.image.sdk.segments import image_runs, require_loadable


def runs_of(made: Made, *, tail_pages: bool = False) -> list[Run]:
    file = Bytes("lib.so", made.data)
    elf = Elf(file)
    require_loadable(elf)
    return image_runs(elf, file, tail_pages=tail_pages)


def pages(runs: list[Run]) -> list[tuple[int, int, bytes]]:
    every = (run.page(i) for run in runs for i in range(run.pages))
    return [(page.offset, page.flags, bytes(page.data)) for page in every]


def test_partial_pages_are_zero_filled_and_never_show_neighbouring_bytes() -> None:
    data = code(0x1100)
    made = make_elf([Seg(0, code(0x40, 5), R), Seg(0x2F80, data, RX)])
    raw = bytearray(made.data)
    at = made.offsets["seg1"]
    raw[at - 0x80 : at] = b"\xee" * 0x80  # what mmap would show before the segment
    raw += b"\xee" * 0x1000
    got = pages(runs_of(Made(bytes(raw))))[1:]
    whole = bytes(0xF80) + data
    expected = [
        (0x2000 + i * PAGE, 0x205, whole[i * PAGE : (i + 1) * PAGE].ljust(PAGE, b"\0"))
        for i in range(3)
    ]
    assert got == expected


@pytest.mark.parametrize(
    ("vaddr", "filesz", "memsz", "bss_pages"),
    [
        (0x1000, 0x10, 0x10, 0),
        (0x1000, 0x10, 0x1000, 0),
        (0x1000, 0x10, 0x1001, 1),
        (0x1000, 0x1000, 0x3000, 2),
        (0x1F00, 0x100, 0x101, 1),
        (0x1F00, 0, 0x200, 2),
        (0x1000, 0, 0x1000, 1),
    ],
)
def test_bss_is_measured_zero_pages_up_to_the_end_of_memory(
    vaddr: int, filesz: int, memsz: int, bss_pages: int
) -> None:
    made = make_elf([Seg(0, code(16), RX), Seg(vaddr, code(filesz), RW, memsz=memsz)])
    runs = [run for run in runs_of(made) if run.offset >= 0x1000]
    bss = [run for run in runs if "bss" in run.label]
    assert sum(run.pages for run in bss) == bss_pages
    assert all(run.mask == 0xFFFF and run.flags == 0x203 for run in runs)
    assert runs[-1].end == (vaddr + memsz + PAGE - 1) // PAGE * PAGE


def test_segments_are_added_in_header_order_and_holes_not_at_all() -> None:
    made = make_elf([Seg(0x8000, code(9), RW), Seg(0, code(9, 2), RX), Seg(0x4000, code(9, 3), R)])
    assert [run.offset for run in runs_of(made)] == [0x8000, 0, 0x4000]


def relocated(offsets: list[tuple[int, int]], *, textrel: bool, jmprel: bool = False) -> Made:
    """Return a library whose text at 0x1000–0x4fff is relocated at ``offsets`` (place, type)."""
    table = b"".join(struct.pack("<QQq", offset, kind, 0) for offset, kind in offsets)
    where, size = (23, 2) if jmprel else (7, 8)
    data = bytearray(0x1000)
    data[0x800 : 0x800 + len(table)] = table
    tags = [(where, 0x8800), (size, len(table)), *([(22, 0)] if textrel else [])]
    return make_elf(
        [Seg(0x1000, code(0x3800), RX, memsz=0x6000), Seg(0x8000, bytes(data), RW)],
        [Sec(".rela", b"", SHT_RELA)],
        dynamic=tags,
        dynamic_at=0x8000,
    )


@pytest.mark.parametrize(
    ("offsets", "writable"),
    [
        ([(0x1000, 8)], {0x1000}),
        ([(0x1000, 0)], set()),
        ([(0x2FF8, 8)], {0x2000}),
        ([(0x2FF9, 8)], {0x2000, 0x3000}),
        ([(0x1100, 8), (0x3100, 1)], {0x1000, 0x3000}),
        ([(0x5800, 8)], set()),
        ([(0x8100, 8)], set()),
    ],
)
@pytest.mark.parametrize("jmprel", [False, True])
def test_only_file_pages_that_text_relocations_touch_become_writable(
    offsets: list[tuple[int, int]], writable: set[int], jmprel: bool
) -> None:
    got = pages(runs_of(relocated(offsets, textrel=True, jmprel=jmprel)))
    text = [(offset, flags) for offset, flags, _ in got if offset < 0x8000]
    assert {offset for offset, flags in text if flags == 0x207} == writable
    assert {flags for offset, flags in text if offset not in writable} == {0x205}
    assert [offset for offset, _ in text] == [0x1000 + i * PAGE for i in range(6)]


def test_without_dt_textrel_no_text_becomes_writable() -> None:
    got = pages(runs_of(relocated([(0x1000, 8)], textrel=False)))
    assert {flags for offset, flags, _ in got if offset < 0x8000} == {0x205}


@pytest.mark.parametrize(
    ("segments", "tails"),
    [
        # R(end) = 0x3000 < R(R(size) + 0x1800) = 0x4000: a page that the old loader reserved.
        ([Seg(0, code(9), RX), Seg(0x1800, code(0x1700), RW)], [(0x3000, 0x203)]),
        # Page aligned: both sums agree.
        ([Seg(0, code(9), RX), Seg(0x1000, code(0x1700), RW)], []),
        # A next segment that begins there leaves no room...
        ([Seg(0x1800, code(0x1700), RX), Seg(0x3000, code(9), RW)], []),
        # ...one that begins later does, and it has the rights of the segment before it.
        ([Seg(0x1800, code(0x1700), RX), Seg(0x5000, code(9), RW)], [(0x3000, 0x205)]),
        # A segment at address 0 is never the one before.
        ([Seg(0, code(0x1700), RX, memsz=0x1701)], []),
        # The highest address counts, not the last header.
        ([Seg(0x5800, code(0x700), RW), Seg(0x1000, code(9), RX)], [(0x6000, 0x203)]),
    ],
)
def test_the_zero_page_of_version_1_3(segments: list[Seg], tails: list[tuple[int, int]]) -> None:
    made = make_elf(segments)
    plain, with_tails = pages(runs_of(made)), pages(runs_of(made, tail_pages=True))
    extra = [page for page in with_tails if page not in plain]
    assert [(offset, flags) for offset, flags, _ in extra] == tails
    assert all(data == bytes(PAGE) for _, _, data in extra)


def test_the_zero_page_comes_before_the_next_segment() -> None:
    made = make_elf([Seg(0x1800, code(0x1700), RX), Seg(0x5000, code(9), RW)])
    offsets = [run.offset for run in runs_of(made, tail_pages=True)]
    assert offsets == [0x1000, 0x2000, 0x3000, 0x5000]


OK = [Seg(0, code(0x100), RX), Seg(0x2000, code(0x100), RW)]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (make_elf(OK, e_type=2), "shared object"),
        (make_elf([]), "nothing to load"),
        (make_elf([Seg(0, code(9), RX, align=0)]), "aligned to 0x0"),
        (make_elf([Seg(0, code(9), RX, align=0x800)]), "aligned to 0x800"),
        (make_elf([Seg(0, code(9), 0)]), "no rights"),
        (make_elf([Seg(0, code(9), RX), Seg(0xFFF, code(9), RW)]), "overlaps"),
        (make_elf([Seg(0, code(9), RX, align=0x200000), Seg(0x2000, b"x", RW)]), "overlaps"),
        (make_elf(OK, [Sec(".ctors")]), "ctors"),
        (make_elf(OK, symbols=[Sym("printf", defined=False)]), "undefined symbol 'printf'"),
        (make_elf(OK, dynamic=[(17, 0)], dynamic_at=0x2000), "DT_REL"),
        (relocated([(0x1000, 37)], textrel=False), "relocation type 37"),
    ],
)
def test_what_the_sdks_loader_refuses_is_refused(made: Made, why: str) -> None:
    with pytest.raises(SoftSgxError, match=rf"lib\.so: .*{why}"):
        runs_of(made)


def test_weak_symbols_may_be_undefined() -> None:
    runs_of(make_elf(OK, symbols=[Sym("maybe", defined=False, weak=True)]))


@pytest.mark.parametrize("kind", [0, 1, 6, 7, 8, 16, 17, 18])
def test_the_relocations_that_the_sdk_knows_are_taken(kind: int) -> None:
    runs_of(relocated([(0x8000, kind)], textrel=False))
