"""Layout tables: each rule of expanding one, with hand-made blocks."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from tests.support.elfmaker import RX, Seg, make_elf
from tests.support.enclave_files import (
    PAGE,
    ExpectedPage,
    code,
    mrenclave,
    pages_of,
    sdk_library,
    tcs_of,
)

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, Plan, measure
from softsgx.image.sdk import BlockSpec, block_plan, read_sdk, sdk_blocks, write_blocks
from softsgx.image.sdk.layout import MAX_EXPANDED, entry_name, has_old_ids
from softsgx.image.sdk.metadata import (
    DATA_AT_4_DIRS,
    Block,
    BlockHeader,
    Elrange,
    LayoutEntry,
    LayoutGroup,
    ModuleExtension,
    Patch,
)
from softsgx.image.sdk.tables import IN_DATA
from softsgx.image.sdk.writer import tcs_template

SIZE = 0x40000
AT = 0x8000
Item = LayoutEntry | LayoutGroup


def entry(attributes: int = 3, pages: int = 1, rva: int = AT, **fields: Any) -> LayoutEntry:
    values = {"item_id": 8, "si_flags": 0x203, **fields}
    return LayoutEntry(attributes=attributes, page_count=pages, rva=rva, **values)


def group(count: int, times: int, step: int) -> LayoutGroup:
    return LayoutGroup(item_id=4096 + 9, entry_count=count, load_times=times, load_step=step)


def spec(*layout: Item, **fields: Any) -> BlockSpec:
    return BlockSpec(**{"version": (1, 5), "enclave_size": SIZE, "layout": layout, **fields})


def plan_for(one: BlockSpec, made: bytes | None = None) -> Plan:
    data = write_blocks(Bytes("lib", made or sdk_library().data), [one])
    elf, blocks = sdk_blocks(Bytes("lib", data))
    return block_plan(elf, blocks[0])


def behind(plan: Plan) -> list[tuple[int, int, bytes, bool]]:
    return [
        (page.offset, page.flags, bytes(page.data), page.mask == 0xFFFF)
        for page in plan.pages()
        if page.offset >= AT
    ]


def expanded(*layout: Item, data: bytes = b"") -> list[tuple[int, int, bytes, bool]]:
    return behind(plan_for(spec(*layout, data=data)))


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (entry(1, 2), pages_of(AT, 2, 0x203, measured=False)),
        (entry(3, 2), pages_of(AT, 2, 0x203)),
        (entry(3, 1, content_size=0xCCCCCCCC), pages_of(AT, 1, 0x203, word=0xCCCCCCCC)),
        (entry(1, 1, content_size=7), pages_of(AT, 1, 0x203, word=7, measured=False)),
        (entry(0, 1), []),
        (entry(2, 1), []),
        (entry(8, 1), []),
        (entry(40, 1), []),
        (entry(72, 1), []),
        (entry(3, 1, si_flags=0), []),
        (entry(7, 1), pages_of(AT, 1, 0x203)),
        (entry(17, 1), pages_of(AT, 1, 0x203, measured=False)),
        (entry(25, 1), pages_of(AT, 1, 0x203, measured=False)),
        (entry(71, 1), pages_of(AT, 1, 0x203)),
        (entry(3, 1, si_flags=0x100), pages_of(AT, 1, 0x100)),
        (entry(3, 0), []),
    ],
)
def test_an_entry_is_added_by_its_attributes_flags_and_content(
    item: LayoutEntry, expected: list[ExpectedPage]
) -> None:
    assert expanded(item) == [(a, f, d.ljust(PAGE, b"\0"), m) for a, f, d, m in expected]


def test_an_invalid_tcs_is_written_and_measured_with_any_attributes() -> None:
    data = code(5000)
    item = entry(1, 3, content_offset=IN_DATA, content_size=len(data))
    whole = data.ljust(3 * PAGE, b"\0")
    pages = [(AT + i * PAGE, 0x203, whole[i * PAGE : (i + 1) * PAGE], True) for i in range(3)]
    assert expanded(item, data=data) == pages


TEMPLATE = tcs_template(oentry=0x1234, ssa_frame_size=1, thread_data=0x5000)


def tcs_entry(rva: int, attributes: int = 3) -> LayoutEntry:
    return entry(
        attributes, 1, rva, item_id=4, si_flags=0x100, content_offset=IN_DATA, content_size=72
    )


def test_a_tcs_has_three_addresses_moved_and_its_entry_point_not() -> None:
    ((offset, flags, page, measured),) = expanded(tcs_entry(0xA000), data=TEMPLATE)
    tcs = tcs_of(page)
    assert (offset, flags, measured) == (0xA000, 0x100, True)
    assert (tcs.ossa, tcs.ofs_base, tcs.ogs_base) == (0xB000, 0xF000, 0xF000)
    assert (tcs.oentry, tcs.nssa, tcs.fs_limit) == (0x1234, 2, 0xFFFFFFFF)
    assert page[72:] == bytes(PAGE - 72)


def test_tcs_addresses_wrap_at_64_bits() -> None:
    template = bytearray(TEMPLATE)
    struct.pack_into("<Q", template, 48, (1 << 64) - 0x1000)
    ((_, _, page, _),) = expanded(tcs_entry(0xA000), data=bytes(template))
    assert tcs_of(page).ofs_base == 0x9000


def test_a_dynamic_tcs_has_content_and_flags_but_is_not_added() -> None:
    assert expanded(tcs_entry(AT, attributes=40), data=TEMPLATE) == []


def test_a_tcs_without_eextend_is_not_measured() -> None:
    ((_, _, _, measured),) = expanded(tcs_entry(AT, attributes=1), data=TEMPLATE)
    assert not measured


def test_a_group_repeats_the_entries_before_it_with_their_tcs_moved() -> None:
    got = expanded(entry(1, 1), tcs_entry(0xA000), entry(3, 1, 0xB000), group(2, 3, 0x2000),
                   data=TEMPLATE)  # fmt: skip
    assert [offset for offset, *_ in got] == [
        AT, 0xA000, 0xB000, 0xC000, 0xD000, 0xE000, 0xF000, 0x10000, 0x11000,
    ]  # fmt: skip
    assert [tcs_of(p).ossa for _, flags, p, _ in got if flags == 0x100] == [
        0xB000, 0xD000, 0xF000, 0x11000,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ([group(1, 1, 0x1000)], "group of 1 at item 0"),
        ([entry(), group(2, 1, 0x1000)], "group of 2 at item 1"),
        ([entry(), group(1, 1, 0x1000), group(1, 1, 0x1000)], "group in it"),
        ([entry(), group(1, 1 << 31, 0)], f"at most {MAX_EXPANDED}"),
        ([entry(), group(1, (1 << 32) - 1, 0x1000)], f"at most {MAX_EXPANDED}"),
        ([entry(), group(1, 4, 0x10000)], "leave it|below"),
        ([entry(), group(1, 2, 0)], "overlap"),
        ([entry(), group(1, 1, 0x800)], "page aligned"),
        ([entry(rva=0x8800)], "page aligned"),
        ([entry(rva=SIZE)], f"below {SIZE:#x}"),
        ([entry(rva=SIZE - PAGE, pages=2)], f"below {SIZE:#x}"),
        ([entry(rva=1 << 63)], f"below {SIZE:#x}"),
        ([entry(), entry()], "overlap"),
        ([entry(0, 3), entry(3, 1, AT + PAGE)], "overlap"),
        ([entry(rva=0x1000)], "overlap"),
        ([entry(si_flags=0x202)], "W needs R"),
        ([entry(3, 2, si_flags=0x100, content_offset=IN_DATA, content_size=72)], "for 2 pages"),
        ([entry(3, 1, content_offset=IN_DATA, content_size=5000)], "takes 5000|for 1 pages"),
        ([entry(3, 1, content_offset=0xFFFF, content_size=72)], "HEAP|STACK|takes 72"),
    ],
)
def test_a_damaged_table_is_refused(layout: list[Item], why: str) -> None:
    with pytest.raises(SoftSgxError, match=f"lib: .*({why})"):
        plan_for(spec(*layout, data=bytes(5000)[: 5000 if "5000" not in why else 100]))


def test_the_largest_load_times_is_refused_at_once() -> None:
    with pytest.raises(SoftSgxError, match="load_times is 4294967295"):
        plan_for(spec(entry(), group(1, (1 << 32) - 1, 0)))


def test_the_image_comes_first_and_the_table_in_its_order() -> None:
    plan = plan_for(spec(entry(rva=0xC000), entry(rva=AT)))
    offsets = [page.offset for page in plan.pages()]
    assert offsets[-2:] == [0xC000, AT]
    assert offsets[:-2] == sorted(offsets[:-2])
    assert offsets[-3] < AT


def test_a_whole_library_measures_as_written_down_by_hand() -> None:
    plan = plan_for(spec(entry(1, 2), entry(3, 1, 0xB000, content_size=0xCCCCCCCC)))
    text, data = code(0x1800), bytes(0x10) + code(0x300, 2)
    expected = [
        (0, 0x205, text[:PAGE], True),
        (0x1000, 0x205, text[PAGE:], True),
        (0x3000, 0x203, data, True),
        (0x4000, 0x203, b"", True),
        (0x5000, 0x203, b"", True),
        *pages_of(AT, 2, 0x203, measured=False),
        *pages_of(0xB000, 1, 0x203, word=0xCCCCCCCC),
    ]
    assert measure(plan) == mrenclave(SIZE, expected)


def test_patches_go_by_file_offset_and_over_the_file_that_is_laid_out() -> None:
    made = sdk_library()
    at = made.offsets["seg1"] + 0x20
    patched = plan_for(spec(entry(), patches=[(at, b"PATCH"), (at + 2, b"!")]), made.data)
    (page,) = [page for page in patched.pages() if page.offset == 0x3000]
    assert bytes(page.data[0x30:0x35]) == b"PA!CH"


def test_patching_away_the_section_table_leaves_the_metadata_readable() -> None:
    zeros = [(40, bytes(8)), (60, bytes(4))]
    data = write_blocks(Bytes("lib", sdk_library().data), [spec(entry(), patches=zeros)])
    assert read_sdk(Bytes("lib", data)).plan.page_count


def test_patches_outside_the_file_are_refused() -> None:
    with pytest.raises(SoftSgxError, match="patch destination"):
        plan_for(spec(entry(), patches=[(1 << 40, b"x")]))


def test_patches_may_not_add_up_to_more_than_the_file() -> None:
    # Many patches from the same bytes: small to write down, long to apply.
    table = Patch(dst=0, src=DATA_AT_4_DIRS, size=0x4000).pack() * 64
    lib = Bytes("lib", sdk_library().data)
    data = bytearray(write_blocks(lib, [spec(entry(), data=table + bytes(0x4000))]))
    _, (block,) = sdk_blocks(Bytes("lib", data))
    at = block.bytes.origin + BlockHeader.OFFSETS["dir_patch"]
    struct.pack_into("<II", data, at, DATA_AT_4_DIRS, len(table))
    with pytest.raises(SoftSgxError, match="bytes of patches"):
        read_sdk(Bytes("lib", data))


def test_an_elrange_moves_every_page_and_gives_the_size_and_base() -> None:
    elrange = Elrange(enclave_image_address=0x200000, elrange_size=1 << 37)
    plain = plan_for(spec(entry(), tcs_entry(0xA000), data=TEMPLATE))
    moved = plan_for(
        spec(entry(), tcs_entry(0xA000), data=TEMPLATE, version=(11, 5), elrange=elrange)
    )
    assert (moved.size, moved.base, plain.base) == (1 << 37, 0, None)
    for one, other in zip(plain.pages(), moved.pages(), strict=True):
        assert other.offset == one.offset + 0x200000
        assert bytes(other.data) == bytes(one.data)  # a TCS too: its template has the distance


def test_an_elrange_directory_is_only_read_where_the_version_has_one() -> None:
    # In 1.4 the same bytes are data: here, what would be an impossible directory.
    plan = plan_for(spec(entry(), version=(1, 4), data=b"\xff" * 16))
    assert plan.base is None
    with pytest.raises(SoftSgxError, match="ELRANGE"):
        plan_for(spec(entry(), version=(11, 4), data=b"\xff" * 16))


@pytest.mark.parametrize(
    ("version", "read"),
    [((1, 4), False), ((1, 5), True), ((3, 1), False), ((3, 2), True), ((2, 4), False)],
)
def test_an_extend_directory_is_only_read_where_the_version_has_one(
    version: tuple[int, int], read: bool
) -> None:
    # 2-directory blocks have data at 1888; the writer knows, so garbage there must be harmless.
    block = spec(entry(), version=version, data=b"" if read else b"\xff" * 32)
    assert plan_for(block).page_count
    if read:
        extended = replace(block, extends=[(0x1001, bytes(772))])
        _, (parsed,) = sdk_blocks(
            Bytes("lib", write_blocks(Bytes("lib", sdk_library().data), [extended]))
        )
        assert [(e.extend_id, e.size) for e in parsed.extends()] == [(0x1001, 772)]


@pytest.mark.parametrize(
    ("version", "has_one"),
    [
        ((1, 3), False), ((1, 4), False), ((1, 5), True), ((2, 1), False), ((2, 4), False),
        ((3, 0), False), ((3, 1), False), ((3, 2), True), ((3, 3), True), ((11, 4), False),
        ((11, 5), True), ((12, 4), False), ((13, 1), False), ((13, 2), True),
    ],
)  # fmt: skip
def test_bytes_1896_are_a_directory_from_1_5_and_3_2_on(
    version: tuple[int, int], has_one: bool
) -> None:
    major, minor = version
    header = BlockHeader(version=major << 32 | minor).pack()
    extend = struct.pack("<II", 1904, 16) + struct.pack("<IIII", 0x1001, 772, 1920, 0)
    file = Bytes("lib", header + bytes(8) + extend)
    block = Block(file, BlockHeader.unpack(header))
    assert [entry.size for entry in block.extends()] == ([772] if has_one else [])


def test_a_second_module_follows_the_first_at_its_address() -> None:
    second = make_elf([Seg(0, code(0x200, 7), RX)]).data
    first = sdk_library().data
    module = ModuleExtension(file_offset=len(first), mem_offset=0x10000, size=len(second))
    block = spec(entry(), extends=[(0x1002, module.pack())])
    plan = plan_for(block, first + second)
    offsets = [page.offset for page in plan.pages()]
    assert offsets[-2:] == [0x10000, AT]
    (page,) = [page for page in plan.pages() if page.offset == 0x10000]
    assert bytes(page.data[:0x200]) == code(0x200, 7)


@pytest.mark.parametrize("pages", [0, 5, 1 << 31])
def test_an_ssa_frame_has_one_to_four_pages(pages: int) -> None:
    with pytest.raises(SoftSgxError, match="SSA frame"):
        plan_for(spec(entry(), ssa_frame_size=pages))


@pytest.mark.parametrize("pages", [1, 2, 3, 4])
def test_the_ssa_frame_size_is_in_the_plan(pages: int) -> None:
    assert plan_for(spec(entry(), ssa_frame_size=pages)).ssa_frame_size == pages


def test_segments_end_inside_the_enclave() -> None:
    with pytest.raises(SoftSgxError, match="beyond the enclave's size"):
        plan_for(spec(enclave_size=0x2000))
    with pytest.raises(SoftSgxError, match="beyond the enclave's size"):
        plan_for(spec(), sdk_library(segments=[Seg(0, b"x", RX, memsz=1 << 62)]).data)


def test_old_ids_are_known_by_a_tcs_that_is_item_2() -> None:
    old = [entry(item_id=1), tcs_entry(AT).replace(item_id=2)]
    assert has_old_ids(old)
    assert not has_old_ids([entry(item_id=2), tcs_entry(AT)])
    assert (entry_name(5, old=True), entry_name(5, old=False)) == ("STACK", "TD")
    assert entry_name(99, old=False) == "id 99"


def test_old_ids_measure_as_new_ones() -> None:
    old: list[Item] = [entry(item_id=5), tcs_entry(0xA000).replace(item_id=2), group(2, 1, 0x4000)]
    new: list[Item] = [entry(item_id=8), tcs_entry(0xA000), group(2, 1, 0x4000)]
    old[2] = old[2].replace(item_id=4096 + 6)
    plans = [plan_for(spec(*items, data=TEMPLATE)) for items in (old, new)]
    assert measure(plans[0]) == measure(plans[1])
