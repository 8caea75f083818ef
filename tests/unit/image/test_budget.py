"""Budgets of the readers: no small file makes one take memory or time out of proportion.

Each file is a few KiB to a MiB and asks for thousands of times as much; it is read within a
constant, or refused in one line.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import pytest
from tests.support.elfmaker import RW, RX, Sec, Seg, make_elf
from tests.support.enclave_files import PAGE, code, oe_library, sdk_laid_out

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, EnclaveImage, read_image
from softsgx.image.elf import ElfHeader, ProgramHeader
from softsgx.image.oe import OeProperties
from softsgx.image.sdk.metadata import (
    DATA_AT_2_DIRS,
    METADATA_MAGIC,
    BlockHeader,
    Directory,
    Extend,
    LayoutEntry,
    LayoutGroup,
    ModuleExtension,
)

INFO = 0x2100


def oe_whose_segments_repeat(count: int = 64) -> bytes:
    size = 1 << 16
    info = Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=INFO, in_segment=True)
    segments = [Seg(0, code(0x1000), RX), Seg(0x2000, code(0x1000), RW)]
    segments += [Seg(0x10000 + i * 0x1000, code(16), RW) for i in range(count)]
    made = bytearray(make_elf(segments, [info]).data.ljust(size, b"\0"))
    for i in range(count):
        at = ElfHeader.SIZE + (2 + i) * ProgramHeader.SIZE
        header = ProgramHeader.unpack(made[at : at + ProgramHeader.SIZE])
        repeated = header.replace(p_offset=0, p_filesz=size, p_memsz=size, p_vaddr=(i + 1) * size)
        made[at : at + ProgramHeader.SIZE] = repeated.pack()
    return bytes(made)


def sdk_edited(edit: Callable[[bytearray, int], None]) -> bytes:
    """Return a laid-out library, its first block edited; ``edit`` gets the file and its place."""
    file = bytearray(sdk_laid_out().view)
    edit(file, file.index(struct.pack("<Q", METADATA_MAGIC)))
    return bytes(file)


def one_item(file: bytearray, at: int, *items: LayoutEntry | LayoutGroup) -> None:
    """Make the block's layout table these items, and its enclave as large as one can be."""
    struct.pack_into("<Q", file, at + BlockHeader.OFFSETS["enclave_size"], 1 << 55)
    directory = at + BlockHeader.OFFSETS["dir_layout"]
    where = at + Directory.unpack(file[directory : directory + Directory.SIZE]).offset
    table = b"".join(item.pack() for item in items)
    file[where : where + len(table)] = table
    struct.pack_into("<I", file, directory + 4, len(table))


def sdk_of_threads_without_content(pages: int) -> bytes:
    tcs = LayoutEntry(item_id=4, attributes=1, page_count=pages, rva=1 << 50, si_flags=0x100)
    return sdk_edited(lambda file, at: one_item(file, at, tcs))


def sdk_of_many_groups() -> bytes:
    heap = LayoutEntry(item_id=1, attributes=1, page_count=1, rva=1 << 50, si_flags=0x203)
    group = LayoutGroup(item_id=4096 + 9, entry_count=1, load_times=(1 << 32) - 1, load_step=PAGE)
    return sdk_edited(lambda file, at: one_item(file, at, heap, group))


def sdk_of_many_modules() -> bytes:
    """Return a library whose second module is itself, thousands of times."""

    def edit(file: bytearray, at: int) -> None:
        entries, module = 500, 8
        table = module + ModuleExtension.SIZE
        file[at + 8 : at + 16] = struct.pack("<II", 3, 3)
        size = struct.unpack_from("<I", file, at + 16)[0]
        area = size + table + entries * Extend.SIZE
        struct.pack_into("<I", file, at + 16, area)
        file[at + size + module : at + size + table] = ModuleExtension(size=len(file)).pack()
        entry = Extend(extend_id=0x1002, size=ModuleExtension.SIZE, offset=size + module)
        start = at + size + table
        file[start : start + entries * Extend.SIZE] = entry.pack() * entries
        directory = Directory(offset=size + table, size=entries * Extend.SIZE).pack()
        place = at + DATA_AT_2_DIRS + Directory.SIZE
        file[place : place + Directory.SIZE] = directory
        file[at + area : at + area + 8] = bytes(8)

    return sdk_edited(edit)


def read_within(file: bytes, most_bytes: int) -> EnclaveImage | SoftSgxError:
    tracemalloc.start()
    try:
        return read_image(Bytes("small", file))
    except SoftSgxError as refusal:
        return refusal
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < most_bytes, f"{peak} bytes for a file of {len(file)}"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (oe_whose_segments_repeat, "repeat the same bytes"),
        (lambda: sdk_of_threads_without_content(20_000_000), "20000000 TCS pages"),
        (lambda: sdk_of_threads_without_content((1 << 32) - 1), "4294967295 TCS pages"),
        (sdk_of_many_groups, "load_times is 4294967295"),
        (sdk_of_many_modules, "500 second modules"),
        (lambda: oe_library(num_tcs=1 << 20).data, "1048576 threads"),
    ],
)
def test_a_small_file_that_asks_for_much_is_refused_at_once(
    make: Callable[[], bytes], why: str
) -> None:
    refusal = read_within(make(), 8 << 20)
    assert isinstance(refusal, SoftSgxError)
    assert why in str(refusal)


def test_segments_are_read_without_a_copy() -> None:
    """A library whose pages are written at both ends still costs less than its size."""
    size = 8 << 20
    info = Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=0x100, in_segment=True)
    made = make_elf([Seg(0, bytes(size), RX)], [info])
    image = read_within(made.data, 1 << 20)
    assert isinstance(image, EnclaveImage)
    assert image.plan.page_count > size // PAGE


def test_pages_that_are_not_in_the_file_cost_nothing() -> None:
    for heap in (1 << 20, 1 << 40):
        image = read_within(oe_library(heap_pages=heap).data, 1 << 20)
        assert isinstance(image, EnclaveImage)
        assert image.plan.page_count > heap


@pytest.mark.parametrize("start", [0, 1 << 20])
def test_an_entry_point_beyond_all_addresses_wraps_as_the_loaders_sum_does(start: int) -> None:
    flags = 2 if start else 0
    file = bytearray(oe_library(flags=flags, start_address=start).data)
    struct.pack_into("<Q", file, ElfHeader.OFFSETS["e_entry"], (1 << 64) - 1)
    image = read_image(Bytes("small", bytes(file)))
    run = image.plan.find(image.plan.tcs[0])
    assert run is not None
    assert struct.unpack_from("<Q", run.page(0).data, 32)[0] == (start - 1) % (1 << 64)
