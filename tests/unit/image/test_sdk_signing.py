"""What a signer of the SDK writes: layout table, blocks, the runtime's variable, refusals.

The tables are written down by hand from the signing tool's rules; the same rules give, byte for
byte, the metadata of public libraries signed with SDK 2.18 to 2.26.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from tests.support.elfmaker import PT_TLS, RW, RX, Sec, Seg, Sym, make_elf, note_section
from tests.support.enclave_files import PAGE, code, sdk_library, tcs_of

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, Elrange, SdkLayout, lay_out_sdk, measure, read_sdk
from softsgx.image.elf import ProgramHeader
from softsgx.image.sdk import block_plan, sdk_blocks
from softsgx.image.sdk.metadata import Block, LayoutEntry, LayoutGroup

PAGED: dict[str, Any] = {"miscselect": 1, "misc_mask": 0}
G = (10, 0, 16)


def library(variable_bytes: int = 1768, sdk: int = 26, **more: Any) -> bytes:
    """Return a library with the runtime's variable of ``variable_bytes``."""
    data = bytearray(code(0x1000, 2))
    data[0x40:0x48] = struct.pack("<Q", 2 << 32 | sdk << 16 | 100)
    return make_elf(
        [Seg(0, code(0x1800), RX), Seg(0x3000, bytes(data), RW)],
        [note_section(0x6000), *more.pop("extra", [])],
        symbols=[
            Sym("enclave_entry", 0x1234),
            Sym("g_global_data", 0x3040, size=variable_bytes),
        ],
        **more,
    ).data


def blocks_of(layout: SdkLayout, file: bytes | None = None) -> list[Block]:
    laid_out = Bytes("lib", lay_out_sdk(Bytes("lib", file or library()), layout))
    return sdk_blocks(laid_out)[1]


def rows(block: Block) -> list[tuple[int, ...]]:
    """Return (id, attributes, pages) of entries, (id, entries, times) of groups."""
    return [
        (item.item_id, item.attributes, item.page_count)
        if isinstance(item, LayoutEntry)
        else (item.item_id, item.entry_count, item.load_times)
        for item in block.layout()
    ]


def thread(stack_max: int = 67, more: int = 0) -> list[tuple[int, int, int]]:
    """Return a thread of 2 + 2 pages of stack; ``more`` attributes of all but guards."""
    return [G, (7, stack_max, 2), (8, 3 | more, 2), G, (4, 3 | more, 1), (6, 3 | more, 2), G,
            (5, 3 | more, 1)]  # fmt: skip


SMALL: dict[str, Any] = {"stack_max": 4, "heap_min": 1, "heap_init": 3, "heap_max": 8}


def test_a_static_layout_has_one_block_and_one_group_of_threads() -> None:
    (block,) = blocks_of(SdkLayout(threads=3, **SMALL))
    assert block.version == "1.5"
    assert rows(block) == [
        (1, 1, 1), (2, 17, 2), (3, 0, 5), *thread(83), (4096 + 9, 8, 2),
    ]  # fmt: skip
    heap_max = block.layout()[2]
    assert isinstance(heap_max, LayoutEntry)
    assert heap_max.si_flags == 0


def test_threads_beyond_the_pool_are_removed_or_made_at_run_time() -> None:
    newer, older = blocks_of(
        SdkLayout(threads=4, threads_max=6, threads_pool=1, user_region=0, **SMALL, **PAGED)
    )
    assert (newer.version, older.version) == ("3.3", "1.5")
    made_later = [G, (17, 72, 2), (18, 40, 2), G, (14, 40, 1), (16, 40, 2), G, (15, 40, 1)]
    *items, region, last = rows(newer)
    assert items == [
        (1, 1, 1), (2, 25, 2), (3, 8, 5),
        *thread(91),
        *thread(),  # the pool
        *thread(71, 4), (4096 + 9, 8, 1),  # removed after EINIT
        *made_later, (4096 + 19, 8, 4),  # for up to six in all, beside the two
    ]  # fmt: skip
    assert region[:2] == (23, 8)
    assert last[:2] == (10, 0)
    assert rows(older)[3:] == [*thread(83), (4096 + 9, 8, 3)]


def test_all_threads_are_made_up_for_from_three_on() -> None:
    for threads, later in ((1, False), (2, False), (3, True)):
        newer, _ = blocks_of(SdkLayout(threads=threads, **SMALL, **PAGED))
        assert any(row[0] == 4096 + 19 for row in rows(newer)) == later, threads


def test_no_guard_pages_are_added_to_an_enclave_that_fills_its_size() -> None:
    # 4 pages of image, 83 of heap and stack, 3 guards of 16, TCS, SSA and thread data: 128.
    layout = SdkLayout(stack_min=2, stack_max=2, heap_min=70, heap_max=70)
    (block,) = blocks_of(layout)
    assert block.header.enclave_size == 128 * PAGE
    assert rows(block)[-1] == (5, 3, 1)
    (larger,) = blocks_of(SdkLayout(stack_min=2, stack_max=2, heap_min=71, heap_max=71))
    assert larger.header.enclave_size == 256 * PAGE


STATIC: dict[str, Any] = {"stack_min": 2, "stack_max": 2, "heap_min": 4, "heap_max": 4}


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, ["1.5"]),
        (PAGED, ["1.5"]),  # nothing is dynamic
        ({"heap_max": 5, "heap_init": 4}, ["1.5"]),
        ({"heap_max": 5, "heap_init": 4, **PAGED}, ["3.3", "1.5"]),
        ({"heap_min": 3, "heap_init": 4, **PAGED}, ["3.3", "1.5"]),
        ({"stack_max": 3, **PAGED}, ["3.3", "1.5"]),
        ({"threads": 3, **PAGED}, ["3.3", "1.5"]),
        ({"threads": 2, "threads_pool": 0, **PAGED}, ["3.3", "1.5"]),
        ({"reserved_max": 2, "reserved_init": 1, **PAGED}, ["3.3", "1.5"]),
        ({"stack_max": 3, "miscselect": 1, "misc_mask": 1}, ["3.3"]),
        ({"user_region": 1, "miscselect": 1, "misc_mask": 1}, ["3.3"]),
    ],
)
def test_a_block_for_run_time_paging_is_written_when_something_is_dynamic(
    changes: dict[str, Any], blocks: list[str]
) -> None:
    layout = SdkLayout(**{**STATIC, **changes})
    assert [block.version for block in blocks_of(layout)] == blocks


def test_a_user_region_needs_run_time_paging() -> None:
    choices: tuple[dict[str, Any], ...] = ({}, PAGED, {"miscselect": 0, "misc_mask": 1})
    for misc in choices:
        with pytest.raises(SoftSgxError, match="user region needs run-time paging"):
            SdkLayout(user_region=1, **misc)


@pytest.mark.parametrize(
    ("size", "sdk", "versions"),
    [
        (1768, 26, ["3.3", "1.5"]), (1768, 25, ["3.2", "1.5"]), (1760, 24, ["3.2", "1.5"]),
        (1760, 22, ["3.1", "1.4"]), (1720, 19, ["3.0", "1.4"]), (1688, 18, ["3.0", "1.4"]),
    ],
)  # fmt: skip
def test_blocks_are_those_of_the_sdk_that_the_library_was_built_with(
    size: int, sdk: int, versions: list[str]
) -> None:
    layout = SdkLayout(threads=3, **SMALL, **PAGED)
    blocks = blocks_of(layout, library(size, sdk))
    assert [block.version for block in blocks] == versions
    elf, _ = sdk_blocks(Bytes("lib", library(size, sdk)))
    file = lay_out_sdk(elf.file, layout)
    elf, blocks = sdk_blocks(Bytes("lib", file))
    assert len({measure(block_plan(elf, block)) for block in blocks}) == 1


def test_a_library_of_an_older_sdk_has_no_block_for_run_time_paging() -> None:
    (block,) = blocks_of(SdkLayout(threads=3, **SMALL), library(1688, 17))
    assert block.version == "1.4"
    with pytest.raises(SoftSgxError, match=r"before 2\.18"):
        blocks_of(SdkLayout(threads=3, **SMALL, **PAGED), library(1688, 17))


def variable_of(file: bytes, size: int) -> bytes:
    plan = read_sdk(Bytes("lib", file)).plan
    run = plan.find(0x3000)
    assert run is not None
    return bytes(run.page(0).data)[0x40 : 0x40 + size]


@pytest.mark.parametrize(("size", "sdk", "td_words"), [(1768, 26, 24), (1688, 18, 20)])
def test_the_runtimes_variable_says_where_everything_is(size: int, sdk: int, td_words: int) -> None:
    tls = ProgramHeader(p_type=PT_TLS, p_vaddr=0x3000, p_memsz=0x1234, p_align=16)
    layout = SdkLayout(threads=3, reserved_max=2, reserved_executable=True, **SMALL)
    file = lay_out_sdk(Bytes("lib", library(size, sdk, tls=tls)), layout)
    _, (block,) = sdk_blocks(Bytes("lib", file))
    items = {i.item_id: i for i in reversed(block.layout()) if isinstance(i, LayoutEntry)}
    tcs, td = items[4].rva, items[5].rva
    words = struct.unpack_from("<10Q", variable_of(file, size))
    assert words == (
        0, block.header.enclave_size, items[1].rva, 3 * PAGE, items[20].rva, 2 * PAGE, 1, 1, 3, 3,
    )  # fmt: skip
    own = td + 2 * PAGE - tcs  # two pages of thread-local storage before it
    thread_data = struct.unpack_from(f"<{td_words}Q", variable_of(file, size), 80)
    stack = items[8].rva + 2 * PAGE - tcs
    ssa = items[6].rva - tcs
    first = (own, stack % 2**64, stack % 2**64, (stack - 4 * PAGE) % 2**64, ssa + PAGE - 184)
    assert thread_data[:9] == (*first, 0, 0, 2688, 0)
    tls_at = 13 if td_words == 24 else 10
    assert thread_data[tls_at : tls_at + 2] == (own - 0x1240, own + 8 * tls_at)
    at = 80 + 8 * td_words
    template = variable_of(file, size)[at : at + 72]
    assert template == bytes(block.content(items[4].content_offset, 72, "TCS"))
    count = struct.unpack_from("<I", variable_of(file, size), at + 72)[0]
    # The table for run-time paging, although its block is not written: guards, dynamic threads.
    assert count > len(block.layout())


def test_frames_are_as_large_as_xfrm_needs() -> None:
    for xfrm, pages, save in ((0xE7, 1, 2688), (0x3, 1, 576), (0x602E7, 3, 11008)):
        (block,) = blocks_of(SdkLayout(xfrm=xfrm))
        header = block.header
        assert (header.ssa_frame_size, header.max_save_buffer_size) == (pages, save)
        ssa = next(i for i in block.layout() if isinstance(i, LayoutEntry) and i.item_id == 6)
        assert ssa.page_count == 2 * pages


def test_aex_notification_is_set_in_every_thread() -> None:
    for wanted in (False, True):
        file = lay_out_sdk(Bytes("lib", library()), SdkLayout(threads=3, aex_notify=wanted))
        plan = read_sdk(Bytes("lib", file)).plan
        flags = {tcs_of(run.page(0).data).flags for run in plan.runs if run.is_tcs}
        assert flags == {2 if wanted else 0}


def test_an_enclave_range_moves_addresses_in_the_threads() -> None:
    elrange = Elrange(
        enclave_image_address=0x20_0000, elrange_start_address=0, elrange_size=1 << 30
    )
    layout = SdkLayout(threads=2, elrange=elrange)
    file = Bytes("lib", lay_out_sdk(Bytes("lib", library()), layout))
    _, (block,) = sdk_blocks(file)
    plan = read_sdk(file).plan
    assert (block.version, plan.base, plan.size) == ("11.5", 0, 1 << 30)
    for at in plan.tcs:
        run = plan.find(at)
        assert run is not None
        tcs = tcs_of(run.page(0).data)
        assert (tcs.oentry, tcs.ossa) == (0x20_1234, at + PAGE)
    assert struct.unpack_from("<3Q", block_variable(block), 1768 - 40) == (0x20_0000, 0, 1 << 30)


def block_variable(block: Block) -> bytes:
    patch = block.patches()[0]
    return bytes(block.content(patch.src, patch.size, "g_global_data"))


@pytest.mark.parametrize(
    ("image", "start", "size"),
    [
        (0x1000, 0x1000, 1 << 30),
        (0x1001, 0, 1 << 30),
        (0, 1 << 30, 1 << 30),
        (1 << 30, 0, 1 << 30),
        (0, 0, 3 << 28),
        (0, 0, 1 << 20),
    ],
)
def test_an_impossible_enclave_range_is_refused(image: int, start: int, size: int) -> None:
    elrange = Elrange(enclave_image_address=image, elrange_start_address=start, elrange_size=size)
    with pytest.raises(SoftSgxError, match="enclave range"):
        blocks_of(SdkLayout(elrange=elrange))


def test_a_section_init_is_refused_unless_it_is_to_be_ignored() -> None:
    file = Bytes("lib", library(extra=[Sec(".init", bytes(8))]))
    with pytest.raises(SoftSgxError, match=r"section \.init"):
        lay_out_sdk(file, SdkLayout())
    assert lay_out_sdk(file, SdkLayout(), init=True)


@pytest.mark.parametrize(
    ("offset", "refused"), [(0x800, True), (0xFFF, True), (0x1000, False), (0x7FF, False)]
)
def test_relocations_of_code_are_refused_unless_they_are_to_be_ignored(
    offset: int, refused: bool
) -> None:
    text = Sec(".text", addr=0x800, size=0x800, flags=6, kind=8)
    body = bytearray(code(0x1000, 3))
    body[0x100:0x118] = struct.pack("<QQq", offset, 8, 0)
    made = make_elf(
        [Seg(0, code(0x1800), RX), Seg(0x3000, bytes(body), RW)],
        [note_section(0x6000), text],
        symbols=[Sym("enclave_entry", 0x1234)],
        dynamic=[(7, 0x3100), (8, 24)],
        dynamic_at=0x3200,
    )
    file = Bytes("lib", made.data)
    if refused:
        with pytest.raises(SoftSgxError, match=r"relocation of code, at .* in \.text"):
            lay_out_sdk(file, SdkLayout())
    assert lay_out_sdk(file, SdkLayout(), text_relocations=refused)


def test_a_table_that_the_runtime_has_no_place_for_is_refused() -> None:
    layout = SdkLayout(
        threads=4, threads_max=9, reserved_min=1, reserved_init=2, reserved_max=3, **SMALL, **PAGED
    )
    assert blocks_of(layout, library(1768))
    groups = [item for item in blocks_of(layout)[0].layout() if isinstance(item, LayoutGroup)]
    assert len(groups) == 2


@pytest.mark.parametrize("address", [1 << 45, 1 << 56, (1 << 64) - 0x1000])
def test_a_library_at_an_impossible_address_is_refused(address: int) -> None:
    segments = [Seg(0, code(0x1800), RX), Seg(address, code(0x300, 2), RW)]
    with pytest.raises(SoftSgxError, match="bytes of addresses"):
        lay_out_sdk(Bytes("lib", sdk_library(segments=segments).data), SdkLayout())


def test_a_library_without_the_variable_is_laid_out_all_the_same() -> None:
    file = lay_out_sdk(Bytes("lib", sdk_library().data), SdkLayout())
    _, (block,) = sdk_blocks(Bytes("lib", file))
    assert [patch.size for patch in block.patches()] == [2, 8, 2]


@pytest.mark.parametrize("address", [1 << 60, 0xFFFF_FF00_0000_0000])
def test_an_image_that_needs_more_addresses_than_an_enclave_has_is_refused(address: int) -> None:
    file = sdk_library(segments=[Seg(0, code(0x1800), RX), Seg(address, b"", RW, offset=0x2000)])
    with pytest.raises(SoftSgxError, match="an enclave has at most 0x100000000000000"):
        blocks_of(SdkLayout(**SMALL), file.data)
