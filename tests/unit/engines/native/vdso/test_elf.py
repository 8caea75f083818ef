"""The vDSO image satisfies each way in which programs look symbols up."""

from __future__ import annotations

import ctypes
import io
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from softsgx.engines.native.vdso.elf import (
    DEVICE_NAME,
    HEADER_BYTES,
    Vdso,
    build_vdso,
    image_bytes,
    linked_image,
    linker,
    read_symbols,
    vdso_of,
)

ORIGINAL = {
    "__vdso_clock_gettime": 0x7FFF_0000_0A00,
    "clock_gettime": 0x7FFF_0000_0A00,
    "__vdso_gettimeofday": 0x7FFF_0000_0B00,
    "__vdso_time": 0x7FFF_0000_0C00,
    "__vdso_getcpu": 0x7FFF_0000_0D00,
    "__vdso_sgx_enter_enclave": 0x7FFF_0000_0E00,
}
ENTER = "__vdso_sgx_enter_enclave"


@pytest.fixture(scope="module")
def vdso() -> Vdso:
    return build_vdso(ORIGINAL)


@pytest.fixture(scope="module")
def elf(vdso: Vdso) -> ELFFile:
    return ELFFile(io.BytesIO(vdso.image))


def section(elf: ELFFile, name: str) -> Any:
    found = elf.get_section_by_name(name)
    assert found is not None, name
    return found


def test_addresses_are_file_offsets(elf: ELFFile, vdso: Vdso) -> None:
    assert len(vdso.image) % 4096 == 0
    for segment in elf.iter_segments():
        assert segment["p_vaddr"] == segment["p_offset"]


def test_every_symbol_is_found_by_both_hash_tables(elf: ELFFile, vdso: Vdso) -> None:
    for name in (".hash", ".gnu.hash"):
        table = section(elf, name)
        for symbol, value in vdso.symbols.items():
            assert table.get_symbol(symbol)["st_value"] == value, (name, symbol)


def test_a_debugger_finds_the_asynchronous_exit_pointer_in_its_function(
    elf: ELFFile, vdso: Vdso
) -> None:
    sizes = {each.name: each["st_size"] for each in section(elf, ".dynsym").iter_symbols()}
    places = sorted(vdso.symbols.values())
    for name, start in vdso.symbols.items():
        behind = [place for place in places if place > start]
        assert 0 < sizes[name] <= min(behind, default=len(vdso.image)) - start, name
    assert vdso.aep < vdso.symbols[ENTER] + sizes[ENTER]


def test_the_dynamic_segment_names_what_loaders_need(elf: ELFFile) -> None:
    dynamic = next(s for s in elf.iter_segments() if isinstance(s, DynamicSegment))
    tags = {tag.entry.d_tag for tag in dynamic.iter_tags()}
    assert tags >= {"DT_HASH", "DT_GNU_HASH", "DT_SYMTAB", "DT_STRTAB", "DT_STRSZ", "DT_SYMENT"}
    assert tags >= {"DT_SONAME", "DT_VERSYM", "DT_VERDEF", "DT_VERDEFNUM", "DT_NULL"}


def test_symbols_have_the_kernels_version(elf: ELFFile) -> None:
    definitions = section(elf, ".gnu.version_d")
    names = {
        version["vd_ndx"]: next(iter(aux)).name for version, aux in definitions.iter_versions()
    }
    assert names == {1: "linux-vdso.so.1", 2: "LINUX_2.6"}
    versions = section(elf, ".gnu.version")
    assert {versions.get_symbol(i)["ndx"] for i in range(1, versions.num_symbols())} == {2}


def test_section_headers_find_the_symbol_by_section_name(elf: ELFFile, vdso: Vdso) -> None:
    dynsym = section(elf, ".dynsym")
    assert dynsym["sh_entsize"] == 24
    assert elf.get_section(dynsym["sh_link"]).name == ".dynstr"
    assert dynsym.get_symbol_by_name(ENTER)[0]["st_value"] == vdso.symbols[ENTER]
    assert read_symbols(vdso.image) == vdso.symbols


def test_the_dynamic_loader_takes_it_as_a_library(vdso: Vdso, tmp_path: Path) -> None:
    path = tmp_path / "vdso.so"
    path.write_bytes(vdso.image)
    library = ctypes.CDLL(str(path))
    for name in vdso.symbols:
        assert getattr(library, name)


def test_forwards_jump_to_the_original_and_entry_does_not(vdso: Vdso) -> None:
    for name, target in ORIGINAL.items():
        at = vdso.symbols[name]
        forwards = target.to_bytes(8, "little") in vdso.image[at : at + 32]
        assert forwards is (name != ENTER)


def test_each_process_goes_on_at_its_own_addresses(vdso: Vdso) -> None:
    elsewhere = {name: address + 0x1000 for name, address in ORIGINAL.items()}
    test_forwards_jump_to_the_original_and_entry_does_not(vdso)
    other = build_vdso(elsewhere)
    assert other.symbols == vdso.symbols
    for name, place in other.targets.items():
        assert int.from_bytes(other.image[place : place + 8], "little") == elsewhere[name]
    assert build_vdso(ORIGINAL) == vdso


@pytest.mark.parametrize(
    "original", [1 << 12, 0x7FFF_F7FC_0000, 0x7FFF_FFFF_F000, 0x7FC4_85CB_D000]
)
def test_a_linker_makes_the_image_that_is_linked_name_by_name(original: int) -> None:
    kernels = [b"", build_vdso({}).image, build_vdso(ORIGINAL).image, build_vdso({"a": 5}).image]
    for kernel in [*kernels, *reversed(kernels)]:
        symbols = read_symbols(kernel)
        expected = vdso_of(symbols)
        at = {name: original + value for name, value in symbols.items()}
        made = linker(kernel)
        assert made.vdso == expected
        assert made.link(original) == linked_image(expected, at)
        assert made is linker(bytes(bytearray(kernel)))


def test_a_process_without_a_vdso_still_gets_the_entry() -> None:
    assert set(build_vdso({}).symbols) == {ENTER}


def test_the_places_the_supervisor_needs_are_where_they_say(vdso: Vdso) -> None:
    image = vdso.image
    assert image[vdso.inject : vdso.injected] == b"\x0f\x05\xcc"
    assert image[vdso.aep : vdso.aep + 3] == b"\x0f\x01\xd7"
    assert image[vdso.eenter_after - 2 : vdso.eenter_after] == b"\x0f\x05"
    assert image[vdso.device_name :].startswith(DEVICE_NAME)


@pytest.mark.parametrize("image", [b"", b"\x7fELF", b"no ELF at all" * 20, bytes(4096)])
def test_a_file_that_is_not_elf_has_no_symbols(image: bytes) -> None:
    assert read_symbols(image) == {}


def test_the_size_of_an_image_reaches_to_the_end_of_its_section_headers(vdso: Vdso) -> None:
    size = image_bytes(vdso.image[:HEADER_BYTES])
    assert 0 < size <= len(vdso.image)
    assert read_symbols(vdso.image[:size]) == vdso.symbols
    for header in (b"", b"\x7fELF", bytes(HEADER_BYTES)):
        assert image_bytes(header) == 0
