"""Open Enclave libraries: the derived layout, what the loader writes, signing."""

from __future__ import annotations

import struct

import pytest
from tests.support.elfmaker import PT_TLS, RW, RX, Made, Sec, Seg, Sym, make_elf
from tests.support.enclave_files import (
    PAGE,
    ExpectedPage,
    code,
    key,
    mrenclave,
    oe_file,
    oe_library,
    pages_of,
    tcs_of,
)

from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, measure, read_oe, sign_oe, verify
from softsgx.image.elf import ProgramHeader
from softsgx.image.oe import OeProperties, oe_properties, oe_sign_options

INFO = 0x2100


def read(made: Made | bytes) -> object:
    return read_oe(Bytes("oe.so", made if isinstance(made, bytes) else made.data))


@pytest.mark.parametrize(
    ("field", "offset"),
    [
        ("heap_pages", 8), ("stack_pages", 16), ("num_tcs", 24), ("product_id", 32),
        ("security_version", 34), ("flags", 36), ("family_id", 40), ("extended_product_id", 56),
        ("attributes", 72), ("xfrm", 80), ("start_address", 88), ("oeinfo_rva", 96),
        ("oeinfo_size", 104), ("reloc_rva", 112), ("reloc_size", 120), ("heap_rva", 128),
        ("enclave_size", 136), ("sigstruct", 144), ("end_marker", 1952),
    ],
)  # fmt: skip
def test_properties_are_where_open_enclave_has_them(field: str, offset: int) -> None:
    assert OeProperties.OFFSETS[field] == offset


def expected_pages(made: Made) -> list[ExpectedPage]:
    """Write down what a loader makes of ``oe_library()``: 4 + 1 + 3 pages, two threads."""
    text = code(0x1100)
    data = bytearray(made.data[made.offsets["seg1"] : made.offsets["seg1"] + PAGE])
    info = (INFO, 1960, 0x6000, PAGE, 0x7000, 0x20000)
    at = INFO - 0x2000
    data[at + 96 : at + 144] = struct.pack("<6Q", *info)
    data[at + 144 : at + 144 + 1808] = bytes(1808)
    data[0x40:0x48] = struct.pack("<Q", 0x6000)  # _reloc_rva
    bss = bytearray(PAGE)
    bss[8:16] = struct.pack("<Q", 0x5008)  # _enclave_rva, in a page of zeros
    relocations = (
        struct.pack("<QQQ", 0x2000, 8, 0x123)
        + struct.pack("<QQQ", 0x2008, 2 << 32 | 18, 0x77)  # the addend became the symbol's value
        + struct.pack("<QQQ", 0x2010, 7, 0)
    )
    pages: list[ExpectedPage] = [
        (0, 0x205, text[:PAGE], True),
        (0x1000, 0x205, text[PAGE:], True),
        (0x2000, 0x203, bytes(data), True),
        *pages_of(0x3000, 2, 0x203),
        (0x5000, 0x203, bytes(bss), True),
        (0x6000, 0x201, relocations, True),
        *pages_of(0x7000, 3, 0x203, measured=False),
    ]
    start = 0xA000
    for _ in range(2):
        tcs = start + 4 * PAGE
        page = bytearray(PAGE)
        struct.pack_into("<Q", page, 16, tcs + PAGE)
        struct.pack_into("<II", page, 24, 0, 2)
        struct.pack_into("<Q", page, 32, 0x800)
        # TLS is ceil(0x40, 8) + ceil(0x1001, 32): two pages.
        struct.pack_into("<QQ", page, 48, tcs + 6 * PAGE, tcs + 6 * PAGE)
        struct.pack_into("<II", page, 64, 0xFFFFFFFF, 0xFFFFFFFF)
        pages += [
            *pages_of(start + PAGE, 2, 0x203, word=0xCCCCCCCC),
            (tcs, 0x100, bytes(page), True),
            *pages_of(tcs + PAGE, 2, 0x203),
            *pages_of(tcs + 4 * PAGE, 3, 0x203),
        ]
        start = tcs + 7 * PAGE
    return pages


def test_a_library_measures_as_written_down_by_hand() -> None:
    made = oe_library()
    plan = read_oe(Bytes("oe.so", made.data)).plan
    assert plan.size == 0x20000  # 32 pages, exactly
    assert measure(plan) == mrenclave(0x20000, expected_pages(made))


@pytest.mark.parametrize("address", [0x2FF8, 0x3000, 0x4008, 0x5FF8, 0x3FFC])
def test_writing_into_zeros_neither_adds_nor_drops_a_page(address: int) -> None:
    info = OeProperties(num_tcs=1, heap_pages=1).pack()
    made = make_elf(
        [Seg(0, code(0x1100), RX), Seg(0x2000, code(0x1000, 2), RW, memsz=0x4000)],
        [Sec(".oeinfo", info, addr=INFO, in_segment=True)],
        symbols=[Sym("_enclave_rva", address)],
    )
    plan = read_oe(Bytes("oe.so", made.data)).plan
    image = [page for page in plan.pages() if page.offset < 0x6000]
    assert [page.offset for page in image] == [i * PAGE for i in range(6)]
    memory = b"".join(bytes(page.data) for page in image)
    assert memory[address : address + 8] == struct.pack("<Q", address)


def test_the_signature_in_the_file_is_measured_as_zeros() -> None:
    signed = read_oe(Bytes("oe.so", oe_file()))
    assert measure(signed.plan) == measure(read_oe(Bytes("oe.so", oe_library().data)).plan)
    assert signed.sigstruct is not None
    assert [c for c in verify(signed.sigstruct, mrenclave=measure(signed.plan)) if not c.ok] == []


def test_the_configuration_is_measured() -> None:
    file = Bytes("oe.so", oe_library().data)
    plain = measure(read_oe(file).plan)
    for name in ("product_id", "security_version", "heap_pages", "xfrm"):
        changed = Bytes("oe.so", oe_properties(file, **{name: 9}))
        assert measure(read_oe(changed).plan) != plain, name


def test_without_rela_dyn_there_are_no_relocation_pages() -> None:
    plan = read_oe(Bytes("oe.so", oe_library(relocations=False).data)).plan
    assert not [run for run in plan.runs if run.flags == 0x201]
    assert [run.offset for run in plan.runs if run.label == "heap"] == [0x6000]


@pytest.mark.parametrize("empty", [".tdata", ".tbss"])
def test_variables_of_an_empty_thread_local_section_keep_their_values(empty: str) -> None:
    variables = ("_tdata_rva", "_tdata_size", "_tdata_align", "_tbss_size", "_tbss_align")
    sizes = {".tdata": 0x40, ".tbss": 0x80} | {empty: 0}
    data = bytearray(code(0x1000))
    made = make_elf(
        [Seg(0, code(0x100), RX), Seg(0x2000, bytes(data), RW)],
        [
            Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=INFO, in_segment=True),
            Sec(".tdata", addr=0x2F00, size=sizes[".tdata"], align=8, kind=8),
            Sec(".tbss", addr=0x2F40, size=sizes[".tbss"], align=16, kind=8),
        ],
        symbols=[Sym(name, 0x2000 + 8 * nth) for nth, name in enumerate(variables)],
    )
    run = read_oe(Bytes("oe.so", made.data)).plan.find(0x2000)
    assert run
    written = dict(zip(variables, struct.unpack_from("<5Q", run.page(0).data), strict=True))
    on_disk = dict(zip(variables, struct.unpack_from("<5Q", data), strict=True))
    values = {
        "_tdata_rva": 0x2F00, "_tdata_size": 0x40, "_tdata_align": 8,
        "_tbss_size": 0x80, "_tbss_align": 16,
    }  # fmt: skip
    kept = {name for name in variables if name.startswith(empty.replace(".", "_"))}
    assert written == values | {name: on_disk[name] for name in kept}


def test_tls_alignment_comes_from_the_segment_that_begins_with_it() -> None:
    def thread_data(align: int, vaddr: int) -> int:
        tls = ProgramHeader(p_type=PT_TLS, p_vaddr=vaddr, p_align=align)
        made = make_elf(
            [Seg(0, code(0x100), RX), Seg(0x2000, code(0x1000), RW)],
            [
                Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=INFO, in_segment=True),
                Sec(".tdata", addr=0x2F00, size=1, align=1, kind=8),
                Sec(".tbss", addr=0x2F40, size=0x800, align=1, kind=8),
            ],
            tls=tls,
        )
        plan = read_oe(Bytes("oe.so", made.data)).plan
        (at,) = plan.tcs
        run = plan.find(at)
        assert run
        return tcs_of(run.page(0).data).ofs_base - at

    assert thread_data(1, 0x2F00) == 5 * PAGE
    assert thread_data(0x801, 0x2F00) == 6 * PAGE  # 0x801 + 0x800 bytes: one more page
    assert thread_data(0x801, 0x2F01) == 5 * PAGE


def test_a_zero_base_enclave_is_moved_to_its_start_address() -> None:
    plain = read_oe(Bytes("oe.so", oe_library().data)).plan
    moved = read_oe(Bytes("oe.so", oe_library(flags=2, start_address=0x20000).data)).plan
    assert (moved.base, plain.base) == (0, None)
    assert moved.size == 0x40000
    assert [page.offset for page in moved.pages()] == [p.offset + 0x20000 for p in plain.pages()]
    run = moved.find(moved.tcs[0])
    assert run
    tcs = tcs_of(run.page(0).data)
    assert (tcs.ossa, tcs.oentry) == (moved.tcs[0] + PAGE, 0x20800)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_tcs": 0}, "0 threads"),
        ({"num_tcs": 1 << 40}, "threads"),
        ({"heap_pages": 1 << 60}, "asks for|size"),
        ({"stack_pages": (1 << 64) - 1}, "asks for|size"),
        ({"size": 1952}, "properties of 1952"),
        ({"end_marker": 0}, "end marker"),
    ],
)
def test_impossible_properties_are_refused(changes: dict[str, int], why: str) -> None:
    with pytest.raises(SoftSgxError, match=rf"oe\.so: .*({why})"):
        read(oe_library(**changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("segments", "why"),
    [
        ([Seg(0x1000, code(9), RX), Seg(0x2000, code(0x1000), RW)], "no segment at address 0"),
        ([Seg(0, code(0x2001), RX), Seg(0x2000, code(0x1000), RW)], "begins before"),
        ([Seg(0, code(9), RX, memsz=1 << 60), Seg(0x2000, code(0x1000), RW)], "begins before"),
    ],
)
def test_segments_that_the_loader_refuses_are_refused(segments: list[Seg], why: str) -> None:
    info = Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=INFO, in_segment=True)
    with pytest.raises(SoftSgxError, match=why):
        read(make_elf(segments, [info]))


def test_properties_outside_every_segment_are_refused() -> None:
    info = Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=0x100000)
    with pytest.raises(SoftSgxError, match="no segment has"):
        read(make_elf([Seg(0, code(9), RX)], [info]))


@pytest.mark.parametrize(
    ("properties", "mask", "misc_mask"),
    [
        ({"attributes": 4}, 0xFFFFFFFFFFFFFF7B, 0xFFFFFFFF),
        ({"attributes": 6}, 0xFFFFFFFFFFFFFF79, 0xFFFFFFFF),
        ({"attributes": 0x84}, 0xFFFFFFFFFFFFFFFB, 0xFFFFFFFF),
        ({"attributes": 4, "flags": 1}, 0xFFFFFFFFFFFFFF7B, 0xFFFFFFFE),
    ],
)
def test_options_are_those_of_open_enclaves_tool(
    properties: dict[str, int], mask: int, misc_mask: int
) -> None:
    made = oe_library(**properties)  # type: ignore[arg-type]
    options = oe_sign_options(Bytes("oe.so", made.data))
    assert options.flags() == (properties["attributes"], mask)
    assert options.states() == (3, 0xFFFFFFFFFFFFFF1B)
    assert options.misc_mask == misc_mask


def test_signing_sets_properties_and_refuses_those_that_are_not_there() -> None:
    file = Bytes("oe.so", oe_library().data)
    image = read_oe(Bytes("oe.so", sign_oe(file, key(), product_id=7, num_tcs=3)))
    assert len(image.plan.tcs) == 3
    assert image.sigstruct is not None
    assert image.sigstruct.isv_prod_id == 7
    for change in ({"enclave_size": 1}, {"nothing": 1}):
        with pytest.raises(SoftSgxError, match="no property"):
            sign_oe(file, key(), **change)  # type: ignore[arg-type]
    with pytest.raises(SoftSgxError, match="properties"):
        sign_oe(file, key(), product_id=1 << 16)


def test_an_unsigned_library_says_so() -> None:
    image = read_oe(Bytes("oe.so", oe_library().data))
    assert image.sigstruct is None
    assert any("not signed" in note for note in image.notes)


def test_a_library_that_needs_another_is_refused() -> None:
    made = make_elf(
        [Seg(0, code(0x100), RX), Seg(0x2000, code(0x1000), RW)],
        [Sec(".oeinfo", OeProperties(num_tcs=1).pack(), addr=INFO, in_segment=True)],
        dynamic=[(1, 0)],
        dynamic_at=0x2E00,
    )
    with pytest.raises(SoftSgxError, match="needs another library"):
        read(made)
