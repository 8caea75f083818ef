"""Opening files: the format is recognised, the signature beside it found, nonsense refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from tests.support.elfmaker import RX, Sec, Seg, Sym, make_elf
from tests.support.enclave_files import (
    blob_plan,
    code,
    key,
    oe_file,
    raw_file,
    sdk_laid_out,
    selftest_file,
    sgxs_file,
)

from softsgx.errors import SoftSgxError
from softsgx.image import (
    Bytes,
    SecsLimits,
    bare_sigstruct,
    choose_secs,
    detect_format,
    embed_sigstruct,
    measure,
    open_image,
    read_bytes,
    read_sdk,
    sign_plan,
    ssa_frame_pages,
)
from softsgx.image.elf import Elf
from softsgx.image.sign import SignOptions

FILES = {
    "sgxs": sgxs_file,
    "raw": raw_file,
    "selftest": lambda: selftest_file().data,
    "sdk": lambda: bytes(sdk_laid_out().view),
    "oe": oe_file,
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_recognised(name: str, tmp_path: Path) -> None:
    path = tmp_path / "enclave"
    path.write_bytes(FILES[name]())
    image = open_image(path)
    assert image.format == name
    assert measure(image.plan) == measure(open_image(path, file_format=name).plan)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "begins with nothing"),
        (b"MZ" + bytes(4094), "begins 4d5a"),
        (bytes(8192), "known are SGXS"),
        (b"\x7fELF", "ELF header takes 64"),
        (make_elf([Seg(0, code(9), RX)]).data, "neither"),
        (b"\x7fELF\x01\x01\x01" + bytes(60), "64-bit"),
    ],
)
def test_other_files_are_refused_with_what_is_known(data: bytes, why: str) -> None:
    with pytest.raises(SoftSgxError, match=f"f: .*{why}"):
        detect_format(Bytes("f", data))


def test_a_bare_sigstruct_is_no_enclave_but_is_known(tmp_path: Path) -> None:
    path = tmp_path / "x.sig"
    path.write_bytes(sign_plan(blob_plan(), key()).pack())
    with pytest.raises(SoftSgxError, match="a bare SIGSTRUCT"):
        open_image(path)
    assert bare_sigstruct(path) == sign_plan(blob_plan(), key())


def test_the_signature_beside_a_stream_is_found_and_another_can_be_given(tmp_path: Path) -> None:
    stream, beside, other = (tmp_path / name for name in ("e.sgxs", "e.sig", "other.sig"))
    stream.write_bytes(sgxs_file())
    assert open_image(stream).sigstruct is None
    beside.write_bytes(sign_plan(blob_plan(), key()).pack())
    other.write_bytes(sign_plan(blob_plan(), key(), SignOptions(isv_svn=5)).pack())
    found, given = open_image(stream), open_image(stream, other)
    assert found.sigstruct is not None
    assert given.sigstruct is not None
    assert (found.sigstruct.isv_svn, given.sigstruct.isv_svn) == (0, 5)
    assert found.sigstruct_from == str(beside)


@pytest.mark.parametrize("data", [b"", bytes(1808), bytes(1807)])
def test_a_given_sigstruct_must_be_one(data: bytes, tmp_path: Path) -> None:
    stream, sig = tmp_path / "e.sgxs", tmp_path / "s.sig"
    stream.write_bytes(sgxs_file())
    sig.write_bytes(data)
    with pytest.raises(SoftSgxError, match=r"s\.sig"):
        open_image(stream, sig)


def test_a_path_that_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, why in (
        (fifo, "not a regular file"),
        (tmp_path, "regular file|directory"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(SoftSgxError, match=why):
            read_bytes(path)


def test_a_file_of_impossible_size_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate((4 << 30) + 1)
    with pytest.raises(SoftSgxError, match="4294967297 bytes"):
        read_bytes(path)


def test_our_elf_tables_agree_with_those_of_pyelftools(tmp_path: Path) -> None:
    made = make_elf(
        [Seg(0, code(0x1800), RX), Seg(0x3010, code(0x300), 6, memsz=0x999)],
        [Sec(".data", b"abc", addr=0x10), Sec(".note.x", b"y", 7)],
        symbols=[Sym("first", 0x10), Sym("second", 0x20, weak=True), Sym("out", defined=False)],
        dynamic=[(22, 0), (7, 0x30)],
        dynamic_at=0x3100,
    )
    path = tmp_path / "e.so"
    path.write_bytes(made.data)
    ours = Elf(read_bytes(path))
    with path.open("rb") as file:
        theirs = ELFFile(file)
        assert [s.name for s in ours.sections] == [s.name for s in theirs.iter_sections()]
        assert [s.header.sh_size for s in ours.sections] == [
            s["sh_size"] for s in theirs.iter_sections()
        ]
        loads = [s for s in theirs.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert [(p.p_vaddr, p.p_memsz) for p in ours.loads] == [
            (s["p_vaddr"], s["p_memsz"]) for s in loads
        ]
        table = theirs.get_section_by_name(".dynsym")
        assert isinstance(table, SymbolTableSection)
        symbols = list(table.iter_symbols())[1:]
        assert [(s.name, s.value) for s in ours.dynamic_symbols] == [
            (s.name, s["st_value"]) for s in symbols
        ]
        assert [s.is_defined for s in ours.dynamic_symbols] == [
            s["st_shndx"] != "SHN_UNDEF" for s in symbols
        ]
        assert [s.is_weak for s in ours.dynamic_symbols] == [
            s["st_info"]["bind"] == "STB_WEAK" for s in symbols
        ]
    assert ours.dynamic == {22: 0, 7: 0x30}


def signed_image(**options: int) -> object:
    file = sdk_laid_out()
    sig = sign_plan(read_sdk(file).plan, key(), SignOptions(**options))  # type: ignore[arg-type]
    return read_sdk(Bytes("lib", embed_sigstruct(file, sig)))


@pytest.mark.parametrize(
    ("options", "limits", "debug", "expected"),
    [
        ({}, SecsLimits(), False, (4, 3, 0)),
        ({}, SecsLimits(), True, (6, 3, 0)),
        ({}, SecsLimits(xfrm=0x602E7), False, (4, 0xE7, 0)),
        ({"xfrm": 7}, SecsLimits(xfrm=7), False, (4, 7, 0)),
        ({"miscselect": 1}, SecsLimits(), False, (4, 3, 1)),
        ({"no_debug": 1}, SecsLimits(), True, "ATTRIBUTES"),
        ({"provision_key": 1}, SecsLimits(flags=6), False, "ATTRIBUTES"),
        ({"pkru": "on"}, SecsLimits(), False, "XFRM"),
        ({"miscselect": 1}, SecsLimits(miscselect=0), False, "MISCSELECT"),
        ({"amx": "any"}, SecsLimits(xfrm=0x20003), False, (4, 3, 0)),
        ({"amx": "any"}, SecsLimits(xfrm=0x60003), False, (4, 0x60003, 0)),
    ],
)
def test_secs_is_what_file_caller_and_machine_allow(
    options: dict[str, int], limits: SecsLimits, debug: bool, expected: object
) -> None:
    image = signed_image(**options)
    if isinstance(expected, str):
        with pytest.raises(SoftSgxError, match=f"{expected} does not fit"):
            choose_secs(image, debug=debug, limits=limits)  # type: ignore[arg-type]
        return
    secs = choose_secs(image, base=0x7F0000000000, debug=debug, limits=limits)  # type: ignore[arg-type]
    assert (secs.attributes.flags, secs.attributes.xfrm, secs.miscselect) == expected
    assert secs.base == 0x7F0000000000


@pytest.mark.parametrize(
    ("xfrm", "miscselect", "pages"),
    [(3, 0, 1), (7, 1, 1), (0xE7, 1, 1), (0x2E7, 1, 1), (0x602E7, 0, 3), (0x60003, 1, 3)],
)
def test_an_ssa_frame_holds_the_states_the_registers_and_the_fault(
    xfrm: int, miscselect: int, pages: int
) -> None:
    assert ssa_frame_pages(xfrm, miscselect) == pages


def test_a_base_that_is_not_aligned_to_the_size_is_refused() -> None:
    with pytest.raises(SoftSgxError, match="multiple of the size"):
        choose_secs(signed_image(), base=0x1000)  # type: ignore[arg-type]
