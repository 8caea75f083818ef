"""Enclaves signed by other tools are measured, launched and refused as on hardware.

Goal: the readers of formats agree with files of other tools.  Method: each file
below the directory that ``SOFTSGX_ENCLAVES`` names is built by the driver's ioctls and launched
with the SIGSTRUCT that came with it, then once more with one bit changed.  A file without a
SIGSTRUCT is signed here with a throwaway key.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.real_enclaves import (
    ABSENT,
    build_image,
    not_loadable,
    platform_for,
    real_files,
)

from softsgx.arch import PAGE_BYTES, SigStruct, Status
from softsgx.image import (
    MASK_ALL,
    Bytes,
    Data,
    EnclaveImage,
    Padded,
    SdkLayout,
    detect_format,
    hashed_bytes,
    lay_out_sdk,
    measure,
    open_image,
    read_bytes,
    read_image,
    sdk_is_laid_out,
    sign_plan,
    throwaway_key,
    verify,
)
from softsgx.userland import SoftProcess

MEASURED_BYTES, LOADED_PAGES, TAMPERED_PAGES = 512 << 20, 48 << 10, 8 << 10
"""What a test of one file may take: bytes hashed, pages added once, pages added twice."""

TAMPERED_FIELDS = [
    ("header", Status.INVALID_SIG_STRUCT),
    ("date", Status.INVALID_SIGNATURE),
    ("modulus", Status.INVALID_SIGNATURE),
    ("exponent", Status.INVALID_SIG_STRUCT),
    ("signature", Status.INVALID_SIGNATURE),
    ("enclave_hash", Status.INVALID_SIGNATURE),
    ("isv_svn", Status.INVALID_SIGNATURE),
    ("reserved4", Status.INVALID_SIG_STRUCT),
    ("q1", Status.INVALID_SIGNATURE),
    ("q2", Status.INVALID_SIGNATURE),
]
"""Fields of SIGSTRUCT, and how EINIT refuses one whose first bit is inverted."""

FILES = real_files()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES, reason=ABSENT),
    pytest.mark.timeout(600),
    pytest.mark.parametrize("path", FILES, ids=lambda path: "-".join(path.parts[-3:])),
]


def opened(path: Path) -> EnclaveImage:
    """The image of a file; that of a library which is not yet laid out, with the usual layout."""
    file = read_bytes(path)
    if detect_format(file) == "sdk" and not sdk_is_laid_out(file):
        laid_out = read_image(Bytes(str(path), lay_out_sdk(file, SdkLayout())))
        return replace(laid_out, sigstruct=None)
    return open_image(path)


def small(image: EnclaveImage, pages: int) -> EnclaveImage:
    """The image, or a skipped test when it would take too long."""
    hashed = hashed_bytes(image.plan)
    if hashed > MEASURED_BYTES:
        pytest.skip(f"{hashed >> 20} MiB to hash, more than {MEASURED_BYTES >> 20}")
    if image.plan.page_count > pages:
        pytest.skip(f"{image.plan.page_count} pages to add, more than {pages}")
    return image


def refusal(process: SoftProcess, fd: int, sigstruct: bytes) -> str:
    """What EINIT says, by way of the ioctl that makes every status EPERM."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - errno is looked at below
        process.init(fd, sigstruct)
    assert caught.value.errno == errno.EPERM, caught.value
    return str(caught.value.strerror)


def test_a_file_measures_as_its_signer_said(path: Path) -> None:
    image = opened(path)
    if image.sigstruct is None:
        pytest.skip("no SIGSTRUCT in it or beside it")
    small(image, image.plan.page_count)
    failed = [
        check for check in verify(image.sigstruct, mrenclave=measure(image.plan)) if not check.ok
    ]
    assert not failed
    for variant in image.variants:
        assert not variant.problem, f"{variant.name}: {variant.problem}"
        assert variant.plan is not None
        assert measure(variant.plan) == image.sigstruct.enclave_hash, variant.name


@pytest.fixture
def image(path: Path) -> EnclaveImage:
    image = small(opened(path), LOADED_PAGES)
    if problem := not_loadable(image.plan):
        pytest.skip(problem)
    if image.sigstruct is None:
        return replace(image, sigstruct=sign_plan(image.plan, throwaway_key()))
    return image


@pytest.fixture
def process(image: EnclaveImage) -> Iterator[SoftProcess]:
    with platform_for(image.plan) as platform:
        process = platform.process()
        yield process
        process.exit()
        platform.check()


def test_a_file_is_launched_with_its_own_signature_only(
    image: EnclaveImage, process: SoftProcess
) -> None:
    sigstruct = image.sigstruct
    assert sigstruct is not None
    fd, _secs = build_image(process, image)
    signed = sigstruct.pack()
    for name, status in TAMPERED_FIELDS:
        tampered = bytearray(signed)
        tampered[SigStruct.OFFSETS[name]] ^= 1
        assert status.manual_name in refusal(process, fd, bytes(tampered)), name
    process.init(fd, signed)
    assert process.enclave_file(fd).enclave.initialized


def test_a_changed_byte_in_a_measured_page_is_another_enclave(
    image: EnclaveImage, process: SoftProcess
) -> None:
    small(image, TAMPERED_PAGES)
    assert image.sigstruct is not None
    fd, _secs = build_image(process, image, flip=last_measured_byte(image))
    said = refusal(process, fd, image.sigstruct.pack())
    assert Status.INVALID_MEASUREMENT.manual_name in said


def last_measured_byte(image: EnclaveImage) -> int:
    """Offset of the last byte of a measured page that the file gives the bytes of."""
    runs = [
        run
        for run in image.plan.runs
        if run.mask == MASK_ALL and not run.is_tcs and isinstance(run.source, Data | Padded)
    ]
    assert runs, "nothing that the file gives is measured"
    return runs[-1].offset + runs[-1].pages * PAGE_BYTES - 1
