"""Enclaves loaded from Python: what a caller gets, sees and is refused.

Method: the SDK library and the plan that the tests of files use, loaded through the driver of a
small platform.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.enclave_files import blob_plan, key, sdk_laid_out

import softsgx
from softsgx.arch import PAGE_BYTES, AttributesFlags, EinitToken, PageType
from softsgx.errors import SoftSgxError
from softsgx.host import Platform
from softsgx.hw.keys import derive, launch_token_key
from softsgx.hw.secrets import cmac
from softsgx.image import (
    MASK_ALL,
    SECINFO_RW,
    Bytes,
    EnclaveImage,
    Plan,
    Run,
    SignOptions,
    embed_sigstruct,
    measure,
    mrsigner,
    read_sdk,
    sign_plan,
    write_sgxs,
)
from softsgx.userland import EnclaveLoadError, LoadedEnclave, Residency
from softsgx.userland import enclave as enclave_module


def sdk(**options: Any) -> EnclaveImage:
    """A signed SDK library."""
    file = sdk_laid_out()
    sig = sign_plan(read_sdk(file).plan, key(), SignOptions(**options))
    return read_sdk(Bytes("lib.so", embed_sigstruct(file, sig)))


def unsigned() -> EnclaveImage:
    return EnclaveImage("blob", "sgxs", blob_plan())


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    # Generating a key for an unsigned file takes longer than all the rest.
    monkeypatch.setattr(enclave_module, "new_key", key)
    with softsgx.Platform(epc="1MiB") as made:
        yield made
        made.check()


def load(platform: Platform, image: EnclaveImage, **options: Any) -> LoadedEnclave:
    return platform.process("loader").load(image, **options)


def test_a_loaded_enclave_is_the_one_that_was_signed(platform: Platform) -> None:
    image = sdk()
    with load(platform, image) as enclave:
        assert enclave.mrenclave == measure(image.plan) == image.sigstruct.enclave_hash  # type: ignore[union-attr]
        assert enclave.mrsigner == mrsigner(image.sigstruct)  # type: ignore[arg-type]
        assert [address - enclave.base for address in enclave.tcs] == list(image.plan.tcs)
        assert enclave.base % enclave.size == 0
        assert list(enclave.pages) == sorted(
            run.offset + n * PAGE_BYTES for run in image.plan.runs for n in range(run.pages)
        )
        kinds = {offset: page.kind for offset, page in enclave.pages.items()}
        assert {at for at, kind in kinds.items() if kind is PageType.TCS} == set(image.plan.tcs)


def test_a_file_of_any_format_is_loaded_by_its_path(platform: Platform, tmp_path: Path) -> None:
    path = tmp_path / "blob.sgxs"
    path.write_bytes(b"".join(write_sgxs(blob_plan())))
    with platform.process().load(path) as enclave:
        assert enclave.mrenclave == measure(blob_plan())


def test_a_thread_enters_a_loaded_enclave(platform: Platform) -> None:
    process = platform.process()
    with process.load(sdk()) as enclave:
        thread = process.thread()
        thread.enter(enclave.tcs[0])
        thread.exit()


@pytest.mark.parametrize("debug", [True, False])
def test_an_unsigned_file_gets_the_attributes_that_were_asked_for(
    platform: Platform, debug: bool
) -> None:
    with load(platform, unsigned(), debug=debug) as enclave:
        assert enclave.debug is debug
        assert enclave.image.sigstruct is None


@pytest.mark.parametrize("signed_for", [0, AttributesFlags.DEBUG.value])
def test_debug_is_as_the_sigstruct_has_it_unless_the_caller_decides(
    platform: Platform, signed_for: int
) -> None:
    image = sdk(attributes=AttributesFlags.MODE64BIT.value | signed_for)
    with load(platform, image) as enclave:
        assert enclave.debug is bool(signed_for)
    with load(platform, image, debug=not signed_for) as enclave:
        assert enclave.debug is not bool(signed_for)


def test_a_debug_enclave_is_read_and_written_and_a_production_one_is_not(
    platform: Platform,
) -> None:
    image = unsigned()
    with load(platform, image, debug=True) as enclave:
        writable = next(run.offset for run in image.plan.runs if run.flags & 2)
        enclave.write(writable + 5, b"from outside")
        assert enclave.read(writable + 4, 13) == b"\0from outside"
        assert enclave.evict(writable)
        assert enclave.read(writable + 5, 4) == b"from"
        with pytest.raises(SoftSgxError, match=r"no page|Bad address"):
            enclave.read(enclave.size - PAGE_BYTES, 8)
    with load(platform, image) as enclave, pytest.raises(SoftSgxError, match="not a debug enclave"):
        enclave.read(writable, 8)


def test_evicting_a_page_moves_it_and_touching_it_brings_it_back(platform: Platform) -> None:
    process = platform.process()
    with process.load(unsigned(), debug=True) as enclave:
        count = len(enclave.pages)
        assert enclave.residency() == Residency(count, 0, secs_resident=True)
        offsets = list(enclave.pages)
        assert all(enclave.evict(offset) for offset in offsets)
        assert enclave.residency() == Residency(0, count, secs_resident=False)
        assert not enclave.evict(offsets[0])
        reg = next(at for at, page in enclave.pages.items() if page.kind is PageType.REG)
        enclave.read(reg, 8)
        assert enclave.residency() == Residency(1, count - 1, secs_resident=True)
        assert enclave.pages[reg].resident
        with pytest.raises(SoftSgxError, match="no page at offset 0x8"):
            enclave.evict(8)


def test_an_enclave_larger_than_the_epc_is_loaded_and_paged() -> None:
    plan = Plan(1 << 20, (Run(0, 200, SECINFO_RW, mask=MASK_ALL),))
    with softsgx.Platform(epc="256KiB") as platform:
        with load(platform, EnclaveImage("large", "sgxs", plan), debug=True) as enclave:
            assert enclave.residency().evicted > 100
            assert all(enclave.read(n * PAGE_BYTES, 8) == bytes(8) for n in range(200))
        platform.check()


def test_what_differs_is_named_when_einit_refuses(platform: Platform) -> None:
    image = sdk()
    sig = image.sigstruct
    assert sig is not None
    other = replace_field(sig, enclave_hash=bytes(32))
    with pytest.raises(EnclaveLoadError, match=r"lib\.so: EINIT: SGX_INVALID_SIGNATURE") as caught:
        load(platform, replace(image, sigstruct=other))
    assert (caught.value.leaf, caught.value.status) == ("EINIT", "SGX_INVALID_SIGNATURE")
    assert any(text.startswith("ENCLAVEHASH: ") for text in caught.value.differences)

    signed_for_another = sign_plan(blob_plan(), key(), SignOptions())
    with pytest.raises(EnclaveLoadError, match="SGX_INVALID_MEASUREMENT: ENCLAVEHASH: ") as caught:
        load(platform, replace(image, sigstruct=signed_for_another))
    assert caught.value.status == "SGX_INVALID_MEASUREMENT"
    assert not list(platform.machine.enclaves())


def replace_field(sig: Any, **fields: Any) -> Any:
    copy = type(sig).unpack(sig.pack())
    for name, value in fields.items():
        setattr(copy, name, value)
    return copy


def test_a_missing_permission_is_reported_before_any_page_is_added(platform: Platform) -> None:
    image = sdk(provision_key=True)
    process = platform.process(may_provision=False)
    before = platform.core.free_pages
    with pytest.raises(SoftSgxError, match="PROVISIONKEY, and the process may not open"):
        process.load(image)
    with pytest.raises(SoftSgxError, match="EINITTOKENKEY, which Linux gives to no enclave"):
        process.load(sdk(launch_key=True))
    assert platform.core.free_pages == before
    with platform.process().load(image) as enclave:
        assert enclave.secs.attributes.flags & AttributesFlags.PROVISIONKEY


def test_limits_of_the_secs_come_from_the_platform() -> None:
    image = sdk(attributes=AttributesFlags.MODE64BIT.value | AttributesFlags.KSS.value)
    with softsgx.Platform(epc="1MiB", profile="sgx2-server") as platform:
        load(platform, image).close()
    with (
        softsgx.Platform(epc="1MiB", profile="sgx1-client") as platform,
        pytest.raises(SoftSgxError, match="ATTRIBUTES does not fit its SIGSTRUCT"),
    ):
        load(platform, image)


def test_a_locked_launch_key_hash_takes_its_signer_or_a_token(tmp_path: Path) -> None:
    image = sdk()
    sig = image.sigstruct
    assert sig is not None
    hashed = hashlib.sha256(sig.modulus).hexdigest()
    with softsgx.Platform(epc="1MiB", launch_control=False, launch_key_hash=hashed) as platform:
        load(platform, image).close()
    locked: dict[str, Any] = {"epc": "1MiB", "launch_control": False, "launch_key_hash": "17" * 32}
    with (
        softsgx.Platform(**locked) as platform,
        pytest.raises(EnclaveLoadError, match="no valid token permits this enclave"),
    ):
        load(platform, image)

    token = tmp_path / "app.token"
    with softsgx.Platform(**locked) as platform:
        token.write_bytes(made_token(platform, image).pack())
    with softsgx.Platform(**locked, tokens=(str(token),)) as platform:
        load(platform, image).close()


def made_token(platform: Platform, image: EnclaveImage) -> EinitToken:
    """What a launch enclave of this machine makes for the image."""
    assert image.sigstruct is not None
    machine, sig = platform.machine, image.sigstruct
    with softsgx.Platform(epc="1MiB") as anywhere, load(anywhere, image) as enclave:
        attributes = enclave.secs.attributes
    token = EinitToken(
        valid=1,
        attributes=attributes,
        mrenclave=sig.enclave_hash,
        mrsigner=mrsigner(sig),
        cpusvn_le=machine.cpusvn,
        key_id=b"\7" * 32,
    )
    launcher = struct.pack("<4Q", *machine.launch_key_hash)
    mac_key = derive(machine, launch_token_key(machine, token, launcher))
    token.mac = cmac(mac_key, token.pack()[: EinitToken.MACED_BYTES])
    return token


@pytest.mark.slow
def test_sources_of_pages_are_freed_as_they_are_added() -> None:
    plan = Plan(32 << 20, (Run(0, 4096, SECINFO_RW, mask=0),))
    with softsgx.Platform(epc="1MiB") as platform:
        process = platform.process()
        with process.load(EnclaveImage("large", "sgxs", plan)):
            pages = platform.machine.ram._pages
            assert len(pages) < 16, f"{len(pages)} pages of sources are kept"
