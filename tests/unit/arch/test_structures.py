"""Every structure of the manual: offsets, sizes, alignments, typed from the manual's tables.

Goal: our declarations agree with the printed layouts.  Method: the table below repeats the manual
(not our code); a field filled with ones must change exactly the bytes the table gives it, and all
fields together must tile the structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from softsgx import arch
from softsgx.arch import (
    Attributes,
    EinitToken,
    ExInfo,
    GprSgx,
    KeyRequest,
    MacHeader,
    PageInfo,
    Pcmd,
    RdInfo,
    Report,
    ReportMacStruct,
    SecInfo,
    Secs,
    SigStruct,
    TargetInfo,
    Tcs,
)
from softsgx.layout import Structure


@dataclass(frozen=True)
class Layout:
    """One structure as printed: (our name, offset, bytes) for each field."""

    size: int
    align: int
    fields: tuple[tuple[str, int, int], ...]


_GPRS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15 rflags rip ursp urbp"

LAYOUTS: dict[type[Structure], Layout] = {
    Secs: Layout(
        4096,
        4096,
        (
            ("size", 0, 8),
            ("base", 8, 8),
            ("ssa_frame_size", 16, 4),
            ("miscselect", 20, 4),
            ("cet_leg_bitmap_offset", 24, 8),
            ("cet_attributes", 32, 1),
            ("reserved1", 33, 15),
            ("attributes", 48, 16),
            ("mrenclave", 64, 32),
            ("reserved2", 96, 32),
            ("mrsigner", 128, 32),
            ("reserved3", 160, 32),
            ("config_id", 192, 64),
            ("isv_prod_id", 256, 2),
            ("isv_svn", 258, 2),
            ("config_svn", 260, 2),
            ("reserved4", 262, 3834),
        ),
    ),
    Attributes: Layout(16, 1, (("flags", 0, 8), ("xfrm", 8, 8))),
    Tcs: Layout(
        4096,
        4096,
        (
            ("state", 0, 8),
            ("flags", 8, 8),
            ("ossa", 16, 8),
            ("cssa", 24, 4),
            ("nssa", 28, 4),
            ("oentry", 32, 8),
            ("aep", 40, 8),
            ("ofs_base", 48, 8),
            ("ogs_base", 56, 8),
            ("fs_limit", 64, 4),
            ("gs_limit", 68, 4),
            ("ocetssa", 72, 8),
            ("prevssp", 80, 8),
            ("reserved", 88, 4008),
        ),
    ),
    GprSgx: Layout(
        184,
        8,
        (
            *((name, 8 * i, 8) for i, name in enumerate(_GPRS.split())),
            ("exitinfo", 160, 4),
            ("reserved", 164, 3),
            ("aexnotify", 167, 1),
            ("fs_base", 168, 8),
            ("gs_base", 176, 8),
        ),
    ),
    ExInfo: Layout(16, 8, (("maddr", 0, 8), ("errcd", 8, 4), ("reserved", 12, 4))),
    PageInfo: Layout(
        32, 32, (("linaddr", 0, 8), ("srcpge", 8, 8), ("secinfo", 16, 8), ("secs", 24, 8))
    ),
    SecInfo: Layout(64, 64, (("flags", 0, 8), ("reserved", 8, 56))),
    Pcmd: Layout(
        128,
        128,
        (("secinfo", 0, 64), ("enclave_id", 64, 8), ("reserved", 72, 40), ("mac", 112, 16)),
    ),
    MacHeader: Layout(
        128,
        128,
        (
            ("eid", 0, 8),
            ("linaddr", 8, 8),
            ("secinfo", 16, 64),
            ("reserved", 80, 40),
            ("padding", 120, 8),
        ),
    ),
    RdInfo: Layout(
        32,
        32,
        (("status", 0, 8), ("flags", 8, 8), ("enclave_context", 16, 8), ("reserved", 24, 8)),
    ),
    SigStruct: Layout(
        1808,
        4096,
        (
            ("header", 0, 16),
            ("vendor", 16, 4),
            ("date", 20, 4),
            ("header2", 24, 16),
            ("swdefined", 40, 4),
            ("reserved1", 44, 84),
            ("modulus", 128, 384),
            ("exponent", 512, 4),
            ("signature", 516, 384),
            ("miscselect", 900, 4),
            ("misc_mask", 904, 4),
            ("cet_attributes", 908, 1),
            ("cet_attributes_mask", 909, 1),
            ("reserved2", 910, 2),
            ("isv_family_id", 912, 16),
            ("attributes", 928, 16),
            ("attribute_mask", 944, 16),
            ("enclave_hash", 960, 32),
            ("reserved3", 992, 16),
            ("isv_ext_prod_id", 1008, 16),
            ("isv_prod_id", 1024, 2),
            ("isv_svn", 1026, 2),
            ("reserved4", 1028, 12),
            ("q1", 1040, 384),
            ("q2", 1424, 384),
        ),
    ),
    EinitToken: Layout(
        304,
        512,
        (
            ("valid", 0, 4),
            ("reserved1", 4, 44),
            ("attributes", 48, 16),
            ("mrenclave", 64, 32),
            ("reserved2", 96, 32),
            ("mrsigner", 128, 32),
            ("reserved3", 160, 32),
            ("cpusvn_le", 192, 16),
            ("isv_prod_id_le", 208, 2),
            ("isv_svn_le", 210, 2),
            ("cet_masked_attributes_le", 212, 1),
            ("reserved4", 213, 23),
            ("masked_miscselect_le", 236, 4),
            ("masked_attributes_le", 240, 16),
            ("key_id", 256, 32),
            ("mac", 288, 16),
        ),
    ),
    Report: Layout(
        432,
        512,
        (
            ("cpusvn", 0, 16),
            ("miscselect", 16, 4),
            ("cet_attributes", 20, 1),
            ("reserved1", 21, 11),
            ("isv_ext_prod_id", 32, 16),
            ("attributes", 48, 16),
            ("mrenclave", 64, 32),
            ("reserved2", 96, 32),
            ("mrsigner", 128, 32),
            ("reserved3", 160, 32),
            ("config_id", 192, 64),
            ("isv_prod_id", 256, 2),
            ("isv_svn", 258, 2),
            ("config_svn", 260, 2),
            ("reserved4", 262, 42),
            ("isv_family_id", 304, 16),
            ("report_data", 320, 64),
            ("key_id", 384, 32),
            ("mac", 416, 16),
        ),
    ),
    TargetInfo: Layout(
        512,
        512,
        (
            ("measurement", 0, 32),
            ("attributes", 32, 16),
            ("cet_attributes", 48, 1),
            ("reserved1", 49, 1),
            ("config_svn", 50, 2),
            ("miscselect", 52, 4),
            ("reserved2", 56, 8),
            ("config_id", 64, 64),
            ("reserved3", 128, 384),
        ),
    ),
    KeyRequest: Layout(
        512,
        512,
        (
            ("key_name", 0, 2),
            ("key_policy", 2, 2),
            ("isv_svn", 4, 2),
            ("cet_attributes_mask", 6, 1),
            ("reserved1", 7, 1),
            ("cpusvn", 8, 16),
            ("attribute_mask", 24, 16),
            ("key_id", 40, 32),
            ("misc_mask", 72, 4),
            ("config_svn", 76, 2),
            ("reserved2", 78, 434),
        ),
    ),
    ReportMacStruct: Layout(
        256,
        256,
        (
            ("type", 0, 1),
            ("subtype", 1, 1),
            ("version", 2, 1),
            ("reserved1", 3, 1),
            ("reserved2", 4, 12),
            ("cpusvn", 16, 16),
            ("tee_tcb_info_hash", 32, 48),
            ("tee_info_hash", 80, 48),
            ("report_data", 128, 64),
            ("reserved3", 192, 32),
            ("mac", 224, 32),
        ),
    ),
}

FIELDS = [
    pytest.param(kind, *row, id=f"{kind.__name__}.{row[0]}")
    for kind, layout in LAYOUTS.items()
    for row in layout.fields
]


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
def test_a_structure_has_the_manuals_size_and_alignment(kind: type[Structure]) -> None:
    assert (LAYOUTS[kind].size, LAYOUTS[kind].align) == (kind.SIZE, kind.ALIGN)
    assert len(kind().pack()) == LAYOUTS[kind].size


@pytest.mark.parametrize("kind", LAYOUTS, ids=lambda kind: kind.__name__)
def test_the_manuals_fields_tile_a_structure(kind: type[Structure]) -> None:
    end = 0
    for _, offset, size in LAYOUTS[kind].fields:
        assert offset == end
        end += size
    assert end == LAYOUTS[kind].size
    assert list(kind.OFFSETS) == [name for name, _, _ in LAYOUTS[kind].fields]


def ones_like(value: Any, size: int) -> Any:
    if isinstance(value, Structure):
        return type(value).unpack(b"\xff" * size)
    return b"\xff" * size if isinstance(value, bytes) else (1 << 8 * size) - 1


@pytest.mark.parametrize(("kind", "name", "offset", "size"), FIELDS)
def test_a_field_owns_exactly_the_bytes_the_manual_gives_it(
    kind: type[Structure], name: str, offset: int, size: int
) -> None:
    record = kind.unpack(bytes(kind.SIZE))
    setattr(record, name, ones_like(getattr(record, name), size))
    expected = bytearray(kind.SIZE)
    expected[offset : offset + size] = b"\xff" * size
    assert record.pack() == expected


def test_sizes_that_the_manual_gives_in_prose() -> None:
    assert arch.PAGE_BYTES == 4096 == 1 << arch.PAGE_SHIFT
    assert (arch.VA_SLOTS, arch.VA_SLOT_BYTES) == (512, 8)
    assert (arch.GPRSGX_BYTES, arch.EXINFO_BYTES) == (184, 16)
    assert arch.XSAVE_LEGACY_BYTES == 576
    assert (arch.TCS_LIMIT_BYTES, arch.TCS_LIMIT_CET_BYTES) == (72, 88)
    assert (arch.CHUNK_BYTES, arch.CHUNKS_PER_PAGE) == (256, 16)
    assert (arch.REPORT_DATA_BYTES, arch.REPORT_DATA_ALIGN) == (64, 128)
    assert arch.REPORT_MACED_BYTES == 384
    assert EinitToken.MACED_BYTES == 192
    assert (arch.RSA_BYTES, arch.PADDING_BYTES) == (384, 352)


def test_the_fixed_fields_of_a_signature_are_the_manuals_bytes() -> None:
    data = SigStruct().pack()
    assert data[0:16] == bytes.fromhex("06 00 00 00 E1 00 00 00 00 00 01 00 00 00 00 00")
    assert data[24:40] == bytes.fromhex("01 01 00 00 60 00 00 00 60 00 00 00 01 00 00 00")
    assert data[512:516] == bytes.fromhex("03 00 00 00")
    assert arch.VENDOR_INTEL == 0x8086


def test_the_signed_message_is_bytes_0_to_127_and_900_to_1027() -> None:
    data = bytes((i * 7 + i // 256) % 256 for i in range(1808))
    message = SigStruct.unpack(data).signed_bytes()
    assert len(message) == 256
    assert message == data[0:128] + data[900:1028]


@pytest.mark.parametrize("pt", range(7))
@pytest.mark.parametrize("rights", range(8))
def test_a_secinfo_has_rights_in_bits_2_to_0_and_the_type_in_bits_15_to_8(
    pt: int, rights: int
) -> None:
    info = SecInfo.of(arch.PageType(pt), rights)
    assert info.pack() == (pt << 8 | rights).to_bytes(8, "little") + bytes(56)
    assert info.page_type == pt


def test_the_page_type_of_a_secinfo_may_be_none_that_exists() -> None:
    assert SecInfo(flags=0xFF00).page_type == 0xFF
    assert SecInfo(flags=0xFFFF_FFFF_FFFF_00FF).page_type == 0


def test_only_48_bit_sign_extended_addresses_are_canonical() -> None:
    assert arch.is_canonical(0)
    assert arch.is_canonical(0x7FFF_FFFF_FFFF)
    assert not arch.is_canonical(0x8000_0000_0000)
    assert not arch.is_canonical(0xFFFF_7FFF_FFFF_FFFF)
    assert arch.is_canonical(0xFFFF_8000_0000_0000)
    assert arch.is_canonical(0xFFFF_FFFF_FFFF_FFFF)


def test_the_page_of_an_address_has_its_low_12_bits_clear() -> None:
    assert arch.page_of(0x5020_1FFF) == 0x5020_1000
    assert arch.page_of(0x5020_1000) == 0x5020_1000
