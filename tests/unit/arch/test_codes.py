"""Numbers software sees: error codes and their flags, leaf numbers, types, bits, MSRs.

Goal: all numbers are the manual's.  Method: tables typed from it, decimal where it prints decimal
and hexadecimal where it prints hexadecimal.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, IntFlag

import pytest

from softsgx import arch
from softsgx.arch import Encls, Enclu, Enclv, Status, reports_in_cf

CODES = {
    0: "SGX_SUCCESS",
    1: "SGX_INVALID_SIG_STRUCT",
    2: "SGX_INVALID_ATTRIBUTE",
    3: "SGX_BLKSTATE",
    4: "SGX_INVALID_MEASUREMENT",
    5: "SGX_NOTBLOCKABLE",
    6: "SGX_PG_INVLD",
    7: "SGX_EPC_PAGE_CONFLICT",
    8: "SGX_INVALID_SIGNATURE",
    9: "SGX_MAC_COMPARE_FAIL",
    10: "SGX_PAGE_NOT_BLOCKED",
    11: "SGX_NOT_TRACKED",
    12: "SGX_VA_SLOT_OCCUPIED",
    13: "SGX_CHILD_PRESENT",
    14: "SGX_ENCLAVE_ACT",
    15: "SGX_ENTRYEPOCH_LOCKED",
    16: "SGX_INVALID_EINITTOKEN",
    17: "SGX_PREV_TRK_INCMPL",
    18: "SGX_PG_IS_SECS",
    19: "SGX_PAGE_ATTRIBUTES_MISMATCH",
    20: "SGX_PAGE_NOT_MODIFIABLE",
    21: "SGX_PAGE_NOT_DEBUGGABLE",
    25: "SGX_INVALID_COUNTER",
    26: "SGX_PG_NONEPC",
    27: "SGX_TRACK_NOT_REQUIRED",
    28: "SGX_INVALID_REPORTMACSTRUCT",
    29: "SGX_INSUFFICIENT_ENTROPY",
    30: "SGX_EPC_NOT_READY",
    31: "SGX_NO_UPDATE",
    32: "SGX_INVALID_CPUSVN",
    64: "SGX_INVALID_ISVSVN",
    128: "SGX_UNMASKED_EVENT",
    256: "SGX_INVALID_KEYNAME",
}

IN_CF = {
    (Encls.EBLOCK, 3),
    (Encls.EBLOCK, 5),
    (Encls.EBLOCK, 18),
    (Encls.EWB, 12),
    (Encls.ERDINFO, 6),
    (Encls.ERDINFO, 26),
    (Encls.ETRACKC, 27),
}

NUMBERS: dict[type[IntEnum] | type[IntFlag], dict[str, int]] = {
    Encls: {
        "ECREATE": 0x00,
        "EADD": 0x01,
        "EINIT": 0x02,
        "EREMOVE": 0x03,
        "EDBGRD": 0x04,
        "EDBGWR": 0x05,
        "EEXTEND": 0x06,
        "ELDB": 0x07,
        "ELDU": 0x08,
        "EBLOCK": 0x09,
        "EPA": 0x0A,
        "EWB": 0x0B,
        "ETRACK": 0x0C,
        "EAUG": 0x0D,
        "EMODPR": 0x0E,
        "EMODT": 0x0F,
        "ERDINFO": 0x10,
        "ETRACKC": 0x11,
        "ELDBC": 18,
        "ELDUC": 0x13,
        "EUPDATESVN": 24,
    },
    Enclu: {
        "EREPORT": 0,
        "EGETKEY": 1,
        "EENTER": 2,
        "ERESUME": 3,
        "EEXIT": 4,
        "EACCEPT": 5,
        "EMODPE": 6,
        "EACCEPTCOPY": 7,
        "EVERIFYREPORT2": 8,
        "EDECCSSA": 9,
    },
    Enclv: {"EDECVIRTCHILD": 0, "EINCVIRTCHILD": 1, "ESETCONTEXT": 2},
    arch.PageType: {
        "SECS": 0,
        "TCS": 1,
        "REG": 2,
        "VA": 3,
        "TRIM": 4,
        "SS_FIRST": 5,
        "SS_REST": 6,
    },
    arch.SecInfoFlags: {"R": 1, "W": 2, "X": 4, "PENDING": 8, "MODIFIED": 16, "PR": 32},
    arch.RdInfoStatus: {"CHILDPRESENT": 1, "VIRTCHILDPRESENT": 2},
    arch.RdInfoFlags: {
        "R": 1,
        "W": 2,
        "X": 4,
        "PENDING": 8,
        "MODIFIED": 16,
        "PR": 32,
        "BLOCKED": 1 << 63,
    },
    arch.AttributesFlags: {
        "INIT": 0x1,
        "DEBUG": 0x2,
        "MODE64BIT": 0x4,
        "PROVISIONKEY": 0x10,
        "EINITTOKENKEY": 0x20,
        "CET": 0x40,
        "KSS": 0x80,
        "AEXNOTIFY": 0x400,
    },
    arch.MiscSelect: {"EXINFO": 1, "CPINFO": 2},
    arch.TcsFlags: {"DBGOPTIN": 1, "AEXNOTIFY": 2},
    arch.KeyName: {
        "EINITTOKEN": 0,
        "PROVISION": 1,
        "PROVISION_SEAL": 2,
        "REPORT": 3,
        "SEAL": 4,
    },
    arch.KeyPolicy: {
        "MRENCLAVE": 1,
        "MRSIGNER": 2,
        "NOISVPRODID": 4,
        "CONFIGID": 8,
        "ISVFAMILYID": 16,
        "ISVEXTPRODID": 32,
    },
    arch.ExitType: {"HARDWARE": 3, "SOFTWARE": 6},
    arch.Vector: {
        "DE": 0,
        "DB": 1,
        "BP": 3,
        "BR": 5,
        "UD": 6,
        "GP": 13,
        "PF": 14,
        "MF": 16,
        "AC": 17,
        "XM": 19,
        "CP": 21,
    },
    arch.Pfec: {"P": 1, "W": 2, "U": 4, "RSVD": 8, "I": 16, "PK": 32, "SS": 64, "SGX": 0x8000},
    arch.VmExitReason: {"ENCLS": 60, "ENCLV": 70, "SGX_CONFLICT": 71},
    arch.ConflictCode: {
        "TRACKING_RESOURCE_CONFLICT": 0,
        "TRACKING_REFERENCE_CONFLICT": 1,
        "EPC_PAGE_CONFLICT_EXCEPTION": 2,
        "EPC_PAGE_CONFLICT_ERROR": 3,
    },
    arch.SgxFeature: {
        "SGX1": 1,
        "SGX2": 2,
        "ENCLV": 1 << 5,
        "OVERSUB_ENCLS": 1 << 6,
        "EVERIFYREPORT2": 1 << 7,
        "EUPDATESVN": 1 << 10,
        "EDECCSSA": 1 << 11,
    },
    arch.Msr: {
        "IA32_FEATURE_CONTROL": 0x3A,
        "IA32_SGXLEPUBKEYHASH0": 0x8C,
        "IA32_SGXLEPUBKEYHASH3": 0x8F,
        "MSR_SGXOWNER0": 0x300,
        "MSR_SGXOWNER1": 0x301,
        "IA32_SGX_SVN_STATUS": 0x500,
    },
    arch.FeatureControl: {"LOCK": 1, "SGX_LAUNCH_CONTROL": 1 << 17, "SGX_ENABLE": 1 << 18},
}


def test_the_codes_are_the_manuals_and_no_others() -> None:
    assert {int(status): status.manual_name for status in Status} == CODES


@pytest.mark.parametrize("leaf", [*Encls, *Enclu, *Enclv], ids=lambda leaf: leaf.name)
def test_a_leaf_reports_in_cf_only_what_the_manual_prints_so(leaf: Encls | Enclu | Enclv) -> None:
    for status in Status:
        expected = any(leaf is there and status == code for there, code in IN_CF)
        assert reports_in_cf(leaf, status) is expected, status


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [(kind, *row) for kind, rows in NUMBERS.items() for row in rows.items()],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_a_name_has_the_manuals_number(
    kind: type[IntEnum] | type[IntFlag], name: str, number: int
) -> None:
    assert kind[name] == number


@pytest.mark.parametrize(
    "kind", [Encls, Enclu, Enclv, arch.PageType, arch.KeyName, arch.ConflictCode]
)
def test_there_is_nothing_that_the_manual_does_not_have(kind: type[IntEnum]) -> None:
    assert {member.name: int(member) for member in kind} == NUMBERS[kind]


def test_leaves_that_report_no_code_are_those_that_only_fault() -> None:
    # By name: members of different enumerations are equal when their numbers are.
    silent = {leaf.name for leaf in (*Encls, *Enclu, *Enclv) if not arch.reports_code(leaf)}
    assert silent == {
        *("ECREATE", "EADD", "EEXTEND", "EPA", "EAUG"),
        *("EREPORT", "EENTER", "ERESUME", "EEXIT", "EMODPE", "EDECCSSA"),
    }


def test_every_page_type_that_has_a_secs_is_a_child_type() -> None:
    assert {int(pt) for pt in arch.CHILD_TYPES} == {1, 2, 4, 5, 6}


def test_the_measured_blocks_give_the_published_digests() -> None:
    running = hashlib.sha256(arch.ecreate_block(1, 0x2000))
    assert running.hexdigest() == "9e197c8837c6d65632dbdd59cd7df4f1a25b68d8e4e5eb6ca3b20b05311fecb8"
    running.update(arch.eadd_block(0, 0x203))
    assert running.hexdigest() == "995c454650d39811c9c53e1af534aa6c34a496ce9302c34e0ced2c7a7e2c4103"
    for chunk in range(16):
        running.update(arch.eextend_block(256 * chunk) + bytes(256))
    assert running.hexdigest() == "1f2cf80bd03ffd8bfac33f7cba128aff511c3af666b93bb66e7ef718418bdade"
    running.update(arch.eadd_block(0x1000, 0x100))
    assert running.hexdigest() == "2280eda7599b4f23813224621835d69de20107e0d8b13881e19481578669e02c"


def test_measured_blocks_are_64_bytes_in_the_manuals_order() -> None:
    assert arch.ecreate_block(2, 0x10000, 0x1234) == (
        b"ECREATE\0"
        + (2).to_bytes(4, "little")
        + (0x10000).to_bytes(8, "little")
        + (0x1234).to_bytes(8, "little")
        + bytes(36)
    )
    assert arch.eadd_block(0x3000, 0x205) == (
        b"EADD\0\0\0\0" + (0x3000).to_bytes(8, "little") + (0x205).to_bytes(8, "little") + bytes(40)
    )
    assert arch.eextend_block(0x3100) == b"EEXTEND\0" + (0x3100).to_bytes(8, "little") + bytes(48)
