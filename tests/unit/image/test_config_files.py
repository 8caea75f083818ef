"""Configuration files of the two SDKs' signing tools: every key, its range, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.enclave_files import KEY_FILE, oe_library, tcs_of
from tests.unit.image.test_sdk_signing import library

from softsgx.cli import main
from softsgx.errors import SoftSgxError
from softsgx.image import Bytes, SdkConfig, SignOptions, open_image, read_oe_config, read_sdk_config
from softsgx.image.sdk.config import _KEYS


def sdk(text: str) -> SdkConfig:
    whole = f"<!-- a comment -->\n<EnclaveConfiguration>{text}</EnclaveConfiguration>\n"
    return read_sdk_config(Bytes("e.xml", whole.encode()))


def test_an_empty_file_of_the_sdk_has_the_tools_defaults() -> None:
    config = sdk("")
    assert dict(config.layout) == {
        "threads": 1, "threads_max": None, "threads_pool": 1, "unbound": True,
        "reserved_executable": False, "stack_min": 2, "stack_max": 64, "heap_min": 1,
        "heap_init": None, "heap_max": 4096, "reserved_min": 0, "reserved_init": None,
        "reserved_max": 0, "user_region": 0,
    }  # fmt: skip
    options = SignOptions(**config.options)
    assert options.flags() == (4, 0xFF00_FFFF_FFFF_FFFD)
    assert options.states() == (3, 0xFFFF_FFFF_FFFF_FF1B)
    assert (options.miscselect, options.misc_mask) == (0, 0xFFFF_FFFF)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("<StackMaxSize>0x80000</StackMaxSize>", "stack_max", 128),
        ("<StackMinSize>12288</StackMinSize>", "stack_min", 3),
        ("<HeapMaxSize>0X4000000</HeapMaxSize>", "heap_max", 0x4000),
        ("<HeapInitSize>010000</HeapInitSize>", "heap_init", 1),  # octal, as strtoull reads it
        ("<HeapMinSize>0</HeapMinSize>", "heap_min", 0),
        ("<ReservedMemMaxSize> 0x3000 </ReservedMemMaxSize>", "reserved_max", 3),
        ("<ReservedMemInitSize>0x2000</ReservedMemInitSize>", "reserved_init", 2),
        ("<ReservedMemMinSize>0x1000</ReservedMemMinSize>", "reserved_min", 1),
        ("<ReservedMemExecutable>1</ReservedMemExecutable>", "reserved_executable", True),
        ("<UserRegionSize>0x5000</UserRegionSize>", "user_region", 5),
        ("<TCSNum>7</TCSNum>", "threads", 7),
        ("<TCSNum>7</TCSNum><TCSMaxNum>9</TCSMaxNum>", "threads_max", 9),
        ("<TCSMinPool>0</TCSMinPool>", "threads_pool", 0),
        ("<TCSPolicy>0</TCSPolicy>", "unbound", False),
    ],
)
def test_a_key_of_the_sdk_sets_its_field_of_the_layout(
    text: str, field: str, value: object
) -> None:
    assert sdk(text).layout[field] == value


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("<ProdID>0xFFFF</ProdID>", "isv_prod_id", 0xFFFF),
        ("<ISVSVN>9</ISVSVN>", "isv_svn", 9),
        ("<IntelSigned>1</IntelSigned>", "vendor", 0x8086),
        ("<ProvisionKey>1</ProvisionKey>", "provision_key", True),
        ("<LaunchKey>1</LaunchKey><HW>0x10</HW>", "launch_key", True),
        ("<LaunchKey>1</LaunchKey><HW>0x10</HW>", "swdefined", 16),
        ("<DisableDebug>1</DisableDebug>", "no_debug", True),
        ("<MiscSelect>1</MiscSelect>", "miscselect", 1),
        ("<MiscMask>0</MiscMask>", "misc_mask", 0),
        ("<EnableKSS>1</EnableKSS>", "kss", True),
        ("<ISVFAMILYID_L>1</ISVFAMILYID_L>", "isv_family_id", b"\1" + bytes(15)),
        ("<ISVFAMILYID_H>1</ISVFAMILYID_H>", "isv_family_id", bytes(8) + b"\1" + bytes(7)),
        ("<ISVEXTPRODID_H>2</ISVEXTPRODID_H>", "isv_ext_prod_id", bytes(8) + b"\2" + bytes(7)),
        ("<ISVEXTPRODID_L>2</ISVEXTPRODID_L>", "isv_ext_prod_id", b"\2" + bytes(15)),
        ("<PKRU>2</PKRU>", "pkru", "any"),
        ("<AMX>1</AMX>", "amx", "on"),
        ("<EnableAEXNotify>1</EnableAEXNotify>", "aex_notify", True),
    ],
)
def test_a_key_of_the_sdk_sets_its_field_of_the_sigstruct(
    text: str, field: str, value: object
) -> None:
    assert sdk(text).options[field] == value


def test_an_enclave_range_is_read_whole() -> None:
    elrange = sdk(
        "<ELRangeSize>0x40000000</ELRangeSize><EnclaveImageAddress>0x200000</EnclaveImageAddress>"
        "<ELRangeStartAddress>0</ELRangeStartAddress>"
    ).layout["elrange"]
    assert (elrange.enclave_image_address, elrange.elrange_start_address) == (0x20_0000, 0)
    assert elrange.elrange_size == 1 << 30


@pytest.mark.parametrize("key", list(_KEYS))
def test_a_number_beyond_its_range_is_refused(key: str) -> None:
    low, high = _KEYS[key]
    for value in (high + 1, *([low - 1] if low else [])):
        with pytest.raises(
            SoftSgxError, match=rf"e\.xml: {key}: '{value:#x}': invalid; give a number"
        ):
            sdk(f"<{key}>{value:#x}</{key}>")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<Colour>1</Colour>", "'Colour': no key"),
        ("<TCSNum>1</TCSNum><TCSNum>1</TCSNum>", "TCSNum: comes twice"),
        ("<TCSNum></TCSNum>", "TCSNum: '': invalid; give a number"),
        ("<TCSNum>-1</TCSNum>", "give a number"),
        ("<TCSNum>1 2</TCSNum>", "give a number"),
        ("<TCSNum>08</TCSNum>", "give a number"),
        (f"<TCSNum>{'9' * 5000}</TCSNum>", "give a number"),
        ("<TCSNum>٣</TCSNum>", "give a number"),
        ("<HeapMaxSize>0x1001</HeapMaxSize>", "HeapMaxSize: 0x1001: not whole pages"),
        ("<ReleaseType>1</ReleaseType>", "EINIT refuses"),
        ("<EnableIPPFIPS>1</EnableIPPFIPS>", "EnableIPPFIPS"),
        ("<EnableOSSLFIPS>1</EnableOSSLFIPS>", "EnableOSSLFIPS"),
        ("<LaunchKey>1</LaunchKey>", "launch enclaves have both"),
        ("<EnclaveImageAddress>0x1000</EnclaveImageAddress>", "needs ELRangeSize"),
        ("<TCSNum>3</TCSNum><TCSMaxNum>2</TCSMaxNum>", "at most 2"),
        ("<TCSMinPool>3</TCSMinPool>", "at most 1"),
    ],
)
def test_an_impossible_file_of_the_sdk_is_refused(text: str, why: str) -> None:
    with pytest.raises(SoftSgxError, match=why) as refused:
        sdk(text)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not XML"),
        (b"\xff\xfe\x00", "not XML"),
        (b"<a>", "not XML"),
        (b"<a/>", "element 'a'"),
        (b'<?xml version="1.0" encoding="klingon"?><a/>', "not XML"),
        (b"<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", "document type"),
        (b"<a>" * 200_000, "not XML|bytes"),
    ],
)
def test_an_invalid_configuration_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(SoftSgxError, match=why):
        read_sdk_config(Bytes("e.xml", data))


def oe(text: str, attributes: int = 6) -> dict[str, int | bytes]:
    return read_oe_config(Bytes("e.conf", text.encode()), attributes)


def test_every_key_of_open_enclave_sets_its_property() -> None:
    text = """
    # a comment
    Debug=0
    NumHeapPages = 1024
    NumStackPages 0x40
    NumTCS=8\r
    ProductID=7
    SecurityVersion=3
    FamilyID=47183823-2574-4bfd-b411-99ed177d3e43
    ExtendedProductID=2768c720-1e28-11eb-adc1-0242ac120002
    CapturePFGPExceptions=1
    CreateZeroBaseEnclave=1
    StartAddress=0x21000
    """
    assert oe(text) == {
        "heap_pages": 1024, "stack_pages": 64, "num_tcs": 8, "product_id": 7,
        "security_version": 3,
        "family_id": bytes.fromhex("4718382325744bfdb41199ed177d3e43"),
        "extended_product_id": bytes.fromhex("2768c7201e2811ebadc10242ac120002"),
        "attributes": 0x84, "flags": 3, "start_address": 0x21000,
    }  # fmt: skip


def test_debug_and_kss_follow_the_file() -> None:
    assert oe("Debug=1", 4) == {"attributes": 6, "flags": 0}
    assert oe("", 0x86) == {"attributes": 6, "flags": 0}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("NumTCS", "line 1: 'NumTCS': no Key=Value"),
        ("=", "no Key=Value"),
        ("\nColour=1", "line 2: 'Colour': no key"),
        ("Debug=2", "Debug: '2': invalid; give 0 or 1"),
        ("Debug=1\nDebug=1", "comes twice"),
        ("NumTCS=-1", "give a number"),
        ("NumTCS=99999999999999999999", "give a number"),
        ("ProductID=65535", "below 65535"),
        ("FamilyID=1", "give a UUID"),
        ("NumHeapPages=18446744073709551615", "give a number"),
    ],
)
def test_an_impossible_file_of_open_enclave_is_refused(text: str, why: str) -> None:
    with pytest.raises(SoftSgxError, match=rf"e\.conf: .*{why}|e\.conf: {why}"):
        oe(text)


def test_sign_takes_both_and_the_command_line_wins(tmp_path: Path) -> None:
    made = {"sdk": library(), "oe": oe_library(num_tcs=65535).data}
    config = {
        "sdk": "<EnclaveConfiguration><TCSNum>4</TCSNum><ISVSVN>2</ISVSVN>"
        "<EnableAEXNotify>1</EnableAEXNotify></EnclaveConfiguration>",
        "oe": "NumTCS=4\nSecurityVersion=2\n",
    }
    for name, data in made.items():
        file, out, settings = (tmp_path / f"{name}.{end}" for end in ("so", "signed", "config"))
        file.write_bytes(data)
        settings.write_text(config[name])
        argv = ["sign", str(file), "-o", str(out), "--config", str(settings)]
        assert main([*argv, "--key", str(KEY_FILE), "--isvsvn", "5"]) == 0
        image = open_image(out)
        assert image.sigstruct is not None
        assert (len(image.plan.tcs), image.sigstruct.isv_svn) == (4, 5)
        run = image.plan.find(image.plan.tcs[0])
        assert run is not None
        assert tcs_of(run.page(0).data).flags == (2 if name == "sdk" else 0)


def test_a_configuration_does_not_change_what_is_laid_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out, settings = (tmp_path / name for name in ("e.so", "e.signed.so", "e.xml"))
    file.write_bytes(library())
    settings.write_text("<EnclaveConfiguration/>")
    assert main(["sign", str(file), "-o", str(out), "--key", str(KEY_FILE)]) == 0
    argv = ["sign", str(out), "-o", str(file), "--force", "--key", str(KEY_FILE)]
    assert main([*argv, "--config", str(settings)]) == 2
    assert (
        "its layout is fixed, so --config has no effect; remove --config" in capsys.readouterr().err
    )
