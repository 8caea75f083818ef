"""The metadata note, its blocks, which of them is used, and writing them."""

from __future__ import annotations

import struct

import pytest
from tests.support.elfmaker import RW, RX, Sec, Seg, Sym, make_elf, note_section
from tests.support.enclave_files import code, key, sdk_laid_out, sdk_library
from tests.unit.image.test_sdk_layout import entry, spec

from softsgx.arch import SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, SignOptions, measure, read_sdk, sign_plan
from softsgx.image.elf import Elf
from softsgx.image.sdk import (
    SdkLayout,
    block_plan,
    choose_block,
    embed_sigstruct,
    lay_out_sdk,
    sdk_blocks,
    write_blocks,
)
from softsgx.image.sdk.metadata import (
    DATA_AT_2_DIRS,
    MAX_BLOCKS,
    METADATA_MAGIC,
    Block,
    BlockHeader,
    Elrange,
    Extend,
    LayoutEntry,
    LayoutGroup,
    ModuleExtension,
    Patch,
    metadata_area,
    read_blocks,
)
from softsgx.layout import Structure

VERSIONS = [
    (1, 3), (1, 4), (1, 5), (2, 1), (2, 2), (2, 3), (2, 4), (3, 0), (3, 1), (3, 2), (3, 3),
    (11, 4), (12, 4), (13, 0), (13, 3), (11, 5),
]  # fmt: skip


@pytest.mark.parametrize(
    ("structure", "offsets"),
    [
        (
            BlockHeader,
            {
                "magic_num": 0, "version": 8, "size": 16, "tcs_policy": 20, "ssa_frame_size": 24,
                "max_save_buffer_size": 28, "desired_misc_select": 32, "tcs_min_pool": 36,
                "enclave_size": 40, "attributes": 48, "enclave_css": 64, "dir_patch": 1872,
                "dir_layout": 1880,
            },
        ),
        (
            LayoutEntry,
            {"item_id": 0, "attributes": 2, "page_count": 4, "rva": 8, "content_size": 16,
             "content_offset": 20, "si_flags": 24},
        ),
        (
            LayoutGroup,
            {"item_id": 0, "entry_count": 2, "load_times": 4, "load_step": 8, "reserved": 16},
        ),
        (Patch, {"dst": 0, "src": 8, "size": 12, "reserved": 16}),
        (Elrange, {"enclave_image_address": 0, "elrange_start_address": 8, "elrange_size": 16}),
        (Extend, {"extend_id": 0, "size": 4, "offset": 8, "reserved": 12}),
        (ModuleExtension, {"file_offset": 0, "mem_offset": 8, "size": 16, "reserved": 24}),
    ],
)  # fmt: skip
def test_structures_are_where_the_sdk_has_them(
    structure: type[Structure], offsets: dict[str, int]
) -> None:
    assert offsets == structure.OFFSETS


def test_metadata_begins_right_behind_the_name_without_padding() -> None:
    made = sdk_library()
    area = metadata_area(Elf(Bytes("lib", made.data)))
    assert area.origin == made.offsets[".note.sgxmeta"] + 25
    assert len(area) == 0x6000


@pytest.mark.parametrize("align", [1, 4])
def test_notes_of_old_and_new_alignment_are_read(align: int) -> None:
    made = make_elf([], [note_section(0x1001, align)])
    assert len(metadata_area(Elf(Bytes("lib", made.data)))) == 0x1001


@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [(0, 12, "name of 12"), (4, 0x5000, "holds a note"), (8, 2, "note type 2"), (12, 0, "name")],
)
def test_a_section_that_is_not_the_note_is_refused(offset: int, value: int, why: str) -> None:
    made = sdk_library()
    data = bytearray(made.data)
    struct.pack_into("<I", data, made.offsets[".note.sgxmeta"] + offset, value)
    with pytest.raises(SoftSgxError, match=rf"lib: offset 0x[0-9a-f]+: .*{why}"):
        sdk_blocks(Bytes("lib", data))


def test_a_library_without_the_section_says_so() -> None:
    with pytest.raises(SoftSgxError, match=r"no section \.note\.sgxmeta"):
        sdk_blocks(Bytes("lib", make_elf([], [Sec(".text")]).data))
    with pytest.raises(SoftSgxError, match="metadata section is empty"):
        read_sdk(Bytes("lib", sdk_library().data))


def area_of(*blocks: tuple[int, int]) -> list[Block]:
    data = write_blocks(
        Bytes("lib", sdk_library().data), [spec(entry(), version=v) for v in blocks]
    )
    return sdk_blocks(Bytes("lib", data))[1]


def test_blocks_come_in_file_order_and_end_where_the_magic_does() -> None:
    assert [b.version for b in area_of((2, 4), (2, 1), (1, 4))] == ["2.4", "2.1", "1.4"]


@pytest.mark.parametrize(
    ("size", "why"), [(0, "block size 0"), (1887, "block size 1887"), (1 << 31, "metadata block")]
)
def test_an_impossible_block_size_is_refused(size: int, why: str) -> None:
    area = BlockHeader(size=size).pack() + bytes(64)
    with pytest.raises(SoftSgxError, match=why):
        read_blocks(Bytes("lib", area))


def test_more_blocks_than_a_signer_writes_are_refused() -> None:
    block = BlockHeader(size=1888).pack()
    assert len(read_blocks(Bytes("lib", block * MAX_BLOCKS))) == MAX_BLOCKS
    with pytest.raises(SoftSgxError, match="more blocks"):
        read_blocks(Bytes("lib", block * (MAX_BLOCKS + 1)))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("field", ["dir_patch", "dir_layout"])
def test_a_table_outside_its_block_is_refused(version: tuple[int, int], field: str) -> None:
    elrange = Elrange(elrange_size=0x40000) if version[0] > 10 else None
    data = bytearray(
        write_blocks(
            Bytes("lib", sdk_library().data), [spec(entry(), version=version, elrange=elrange)]
        )
    )
    elf, (block,) = sdk_blocks(Bytes("lib", data))
    at = block.bytes.origin + BlockHeader.OFFSETS[field]
    for offset, size in ((block.header.size, 32), (1888, 0xFFFFFFE0), (0xFFFFFFFF, 32), (1888, 33)):
        struct.pack_into("<II", data, at, offset, size)
        elf, (bad,) = sdk_blocks(Bytes("lib", data))
        with pytest.raises(SoftSgxError, match="table"):
            block_plan(elf, bad)


@pytest.mark.parametrize("version", VERSIONS)
def test_all_versions_of_a_block_build_the_same_enclave(version: tuple[int, int]) -> None:
    # Page-aligned segments: the one thing that 1.3 does otherwise needs one that is not.
    segments = [Seg(0, code(0x1800), RX), Seg(0x3000, code(0x300, 2), RW, memsz=0x2100)]
    elrange = Elrange(elrange_size=0x40000) if version[0] > 10 else None
    data = write_blocks(
        Bytes("lib", sdk_library(segments=segments).data),
        [spec(entry(), version=version, elrange=elrange), spec(entry(), version=(1, 5))],
    )
    elf, (one, other) = sdk_blocks(Bytes("lib", data))
    assert (one.major, one.minor) == version
    assert measure(block_plan(elf, one)) == measure(block_plan(elf, other))


@pytest.mark.parametrize(
    ("versions", "options", "chosen"),
    [
        ([(1, 3)], {}, "1.3"),
        ([(3, 3), (1, 5)], {}, "3.3"),
        ([(3, 3), (1, 5)], {"sgx2": False}, "1.5"),
        ([(3, 3), (1, 5)], {"driver_edmm": False}, "1.5"),
        ([(3, 3), (1, 5)], {"simulation": True}, "1.5"),
        ([(3, 3), (1, 5)], {"newest_major": 1}, "1.5"),
        ([(3, 3)], {"sgx2": False}, None),
        ([(2, 4), (2, 1), (1, 4)], {}, "1.4"),
        ([(2, 4), (2, 1), (1, 4)], {"takes_2x": True, "newest_major": 2}, "2.4"),
        ([(2, 4), (2, 1), (1, 4)], {"takes_2x": True, "newest_major": 1}, "1.4"),
        ([(12, 4), (11, 4)], {"takes_2x": True, "newest_major": 2}, "12.4"),
        ([(12, 4), (11, 4)], {}, "11.4"),
        ([(13, 2), (1, 5)], {}, "13.2"),
        ([(4, 0), (1, 5)], {}, "1.5"),
        ([(4, 0)], {}, None),
        ([(2, 4)], {}, None),
        ([], {}, None),
    ],
)
def test_the_block_is_chosen_as_a_runtime_would(
    versions: list[tuple[int, int]], options: dict[str, bool], chosen: str | None
) -> None:
    blocks = [
        Block(Bytes("", b""), BlockHeader(version=major << 32 | minor)) for major, minor in versions
    ]
    got = choose_block(blocks, **options)
    assert (got.version if got else None) == chosen


def test_the_first_of_equal_versions_wins() -> None:
    blocks = [Block(Bytes("", b""), BlockHeader(version=1 << 32, size=n)) for n in (1, 2)]
    assert choose_block(blocks) is blocks[0]


def test_only_blocks_that_no_runtime_takes_are_an_error_that_lists_them() -> None:
    data = write_blocks(Bytes("lib", sdk_library().data), [spec(entry(), version=(2, 4))])
    with pytest.raises(SoftSgxError, match=r"metadata 2\.4 only"):
        read_sdk(Bytes("lib", data))
    assert read_sdk(Bytes("lib", data), takes_2x=True).chosen == "2.4"


def test_a_damaged_block_that_is_not_used_is_shown_and_does_no_harm() -> None:
    specs = [spec(entry(rva=1), version=(2, 4)), spec(entry(), version=(1, 4))]
    image = read_sdk(Bytes("lib", write_blocks(Bytes("lib", sdk_library().data), specs)))
    bad, good = image.variants
    assert (bad.name, good.name, image.chosen) == ("2.4", "1.4", "1.4")
    assert bad.plan is None
    assert "page aligned" in bad.problem
    assert not good.problem


def test_every_field_of_a_block_is_printed() -> None:
    one = spec(
        entry(), tcs_policy=0, tcs_min_pool=5, ssa_frame_size=2, max_save_buffer_size=2688,
        desired_misc_select=1,
    )  # fmt: skip
    image = read_sdk(Bytes("lib", write_blocks(Bytes("lib", sdk_library().data), [one])))
    facts = dict(image.variants[0].facts)
    assert facts == {
        "version": "1.5", "size": facts["size"], "tcs_policy": "bound", "ssa_frame_size": "2",
        "max_save_buffer_size": "2688", "desired_misc_select": "0x1", "tcs_min_pool": "5",
        "enclave_size": "0x40000", "attributes": "0x4", "xfrm": "0xe7",
    }  # fmt: skip


@pytest.mark.parametrize(
    "versions",
    [((3, 3), (1, 5)), ((3, 0), (1, 4)), ((2, 4), (1, 4)), ((2, 3), (1, 4))],
)
def test_all_blocks_of_one_file_give_the_same_measurement(
    versions: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    file = sdk_laid_out(
        SdkLayout(
            stack_max=5,
            heap_init=3,
            heap_max=9,
            threads=4,
            miscselect=1,
            misc_mask=0,
            versions=versions,
        )
    )
    elf, blocks = sdk_blocks(file)
    assert len(blocks) == 2
    assert len({measure(block_plan(elf, block)) for block in blocks}) == 1


def test_a_block_of_version_1_3_leaves_room_for_its_zero_page() -> None:
    versions = ((3, 3), (1, 3))
    plan = read_sdk(sdk_laid_out(SdkLayout(stack_max=4, versions=versions))).plan
    labels = [run.label for run in plan.runs]
    assert labels.index("1.3 tail page") + 1 == labels.index("HEAP_MIN")


def test_a_laid_out_library_has_as_many_tcs_as_threads_with_the_right_addresses() -> None:
    plan = read_sdk(sdk_laid_out()).plan
    assert len(plan.tcs) == 3
    for at in plan.tcs:
        run = plan.find(at)
        assert run
        tcs = run.page(0).data
        ossa, oentry = struct.unpack_from("<Q", tcs, 16)[0], struct.unpack_from("<Q", tcs, 32)[0]
        thread_data = struct.unpack_from("<Q", tcs, 48)[0]
        assert (ossa, oentry) == (at + 4096, 0x1234)
        for place in (ossa, ossa + 4096, thread_data, at - 17 * 4096):
            assert plan.find(place) is not None
        assert plan.find(at - 4096) is None  # a guard


def test_the_entry_point_is_enclave_entry_or_else_the_elf_entry() -> None:
    for symbols, entry_point in (([Sym("enclave_entry", 0x1500)], 0x1500), ([], 0x1000)):
        made = sdk_library(symbols=symbols)
        file = Bytes("lib", lay_out_sdk(Bytes("lib", made.data), SdkLayout()))
        plan = read_sdk(file).plan
        run = plan.find(plan.tcs[0])
        assert run
        assert struct.unpack_from("<Q", run.page(0).data, 32)[0] == entry_point


def test_a_note_that_is_too_small_is_refused() -> None:
    small = sdk_library(descsz=0x800).data
    with pytest.raises(SoftSgxError, match="of note"):
        lay_out_sdk(Bytes("lib", small), SdkLayout())


def test_a_library_is_not_laid_out_twice() -> None:
    with pytest.raises(SoftSgxError, match="metadata already"):
        lay_out_sdk(sdk_laid_out(), SdkLayout())


def test_a_signature_goes_into_every_block_and_into_nothing_else() -> None:
    file = sdk_laid_out()
    plan = read_sdk(file).plan
    sig = sign_plan(plan, key(), SignOptions(isv_svn=9, attributes=0x14))
    data = embed_sigstruct(file, sig)
    _, blocks = sdk_blocks(Bytes("lib", data))
    assert [block.header.enclave_css for block in blocks] == [sig, sig]
    assert {(b.header.attributes.flags, b.header.attributes.xfrm) for b in blocks} == {(0x14, 0xE7)}
    assert measure(read_sdk(Bytes("lib", data)).plan) == measure(plan)
    changed = {i for i, (a, b) in enumerate(zip(file.view, data, strict=True)) if a != b}
    allowed = {
        b.bytes.origin + i
        for b in blocks
        for i in (*range(48, 64), *range(64, 64 + SigStruct.SIZE))
    }
    assert changed <= allowed


def test_blocks_with_different_sigstructs_are_noted() -> None:
    file = sdk_laid_out()
    data = bytearray(embed_sigstruct(file, sign_plan(read_sdk(file).plan, key())))
    _, blocks = sdk_blocks(file)
    data[blocks[1].bytes.origin + 64 + 1026] ^= 1
    notes = read_sdk(Bytes("lib", data)).notes
    assert any("different SIGSTRUCTs" in note for note in notes)


def test_simulation_and_encrypted_libraries_are_noted() -> None:
    made = sdk_library(symbols=[Sym("g_global_data_sim", 0x10)], extra=[Sec(".pcltbl")])
    file = Bytes("lib", lay_out_sdk(Bytes("lib", made.data), SdkLayout(heap_max=5000)))
    image = read_sdk(file)
    assert image.chosen == "1.5"  # a simulation runtime has no run-time paging
    assert [note.split()[0] for note in image.notes] == ["a", "encrypted"]


@pytest.mark.parametrize(
    "sizes",
    [{"stack_min": 3, "stack_max": 2}, {"heap_init": 9, "heap_max": 8}, {"threads": 0},
     {"ssa_frame_size": 5}, {"heap_min": 5, "heap_init": 4}, {"threads": 3, "threads_max": 2},
     {"reserved_min": 1}],
)  # fmt: skip
def test_sizes_that_contradict_each_other_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(SoftSgxError, match="minimum <= start <= maximum"):
        SdkLayout(**sizes)  # type: ignore[arg-type]


def test_the_magic_is_the_sdks() -> None:
    assert METADATA_MAGIC == 0x86A80294635D0E4C
    assert DATA_AT_2_DIRS == BlockHeader.SIZE
