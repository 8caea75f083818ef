"""Opening an enclave file of any format."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from softsgx.arch import PAGE_BYTES, SigStruct
from softsgx.errors import SoftSgxError
from softsgx.image._file import Bytes, read_bytes
from softsgx.image.elf import ELF_MAGIC, PF_R, PF_W, PF_X, Elf
from softsgx.image.enclave import EnclaveImage
from softsgx.image.flat import looks_like_tcs, read_raw, read_selftest
from softsgx.image.oe import OE_SECTION, read_oe
from softsgx.image.sdk.metadata import NOTE_SECTION
from softsgx.image.sdk.reader import read_sdk
from softsgx.image.sgxs import SGXS_MAGICS, read_sgxs
from softsgx.image.sigfile import has_sigstruct, read_sigstruct

__all__ = ["FORMATS", "detect_format", "open_image", "read_image"]

FORMATS: dict[str, Callable[[Bytes], EnclaveImage]] = {
    "sgxs": read_sgxs,
    "sdk": read_sdk,
    "oe": read_oe,
    "selftest": read_selftest,
    "raw": read_raw,
}
"""Readers by format name."""

_SIG_SUFFIXES = (".sig", ".css", ".ss")


def open_image(
    path: str | os.PathLike[str],
    sigstruct: str | os.PathLike[str] | None = None,
    *,
    file_format: str | None = None,
) -> EnclaveImage:
    """Read an enclave file, and the SIGSTRUCT beside it if the file itself has none.

    Args:
        path: the enclave file.
        sigstruct: a bare SIGSTRUCT file, which replaces any other; by default ``name.sig``,
            ``name.css`` or ``name.ss`` beside ``name.sgxs``.
        file_format: a name of ``FORMATS``; by default the content decides.

    Raises:
        SoftSgxError: the format is not known, or the file is damaged; the message names the offset.
    """
    image = read_image(read_bytes(path), file_format=file_format)
    if sigstruct is not None:
        return replace(
            image, sigstruct=read_sigstruct(sigstruct), sigstruct_from=os.fspath(sigstruct)
        )
    if image.sigstruct is None:
        for suffix in _SIG_SUFFIXES:
            beside = Path(path).with_suffix(suffix)
            if os.path.isfile(beside):
                found = read_sigstruct(beside)
                return replace(image, sigstruct=found, sigstruct_from=str(beside))
    return image


def read_image(file: Bytes, *, file_format: str | None = None) -> EnclaveImage:
    """Read an enclave file that is in memory."""
    name = file_format or detect_format(file)
    reader = FORMATS.get(name)
    if reader is None:
        raise SoftSgxError(f"{file.name}: no format {name!r}; there are {', '.join(FORMATS)}")
    return reader(file)


def detect_format(file: Bytes) -> str:
    """Return the format's name.

    Raises:
        SoftSgxError: it is none of them.
    """
    if len(file) == SigStruct.SIZE and has_sigstruct(file):
        raise SoftSgxError(
            f"{file.name}: a bare SIGSTRUCT; give the enclave file, and this one as its sigstruct"
        )
    if bytes(file.view[:8]) in SGXS_MAGICS:
        return "sgxs"
    if file.view[:4] == ELF_MAGIC:
        return _detect_elf(file)
    if len(file) % PAGE_BYTES == 0 and looks_like_tcs(file.view[:PAGE_BYTES]):
        return "raw"
    raise file.bad(
        0,
        f"begins {bytes(file.view[:8]).hex() or 'with nothing'}",
        "known are SGXS streams, ELF files of Intel's SDK, Open Enclave or the kernel's selftest, "
        "and raw images that begin with a TCS",
    )


def _detect_elf(file: Bytes) -> str:
    elf = Elf(file)
    loads = [load for load in elf.loads if load.p_filesz]
    if loads and loads[0].p_flags & (PF_R | PF_W | PF_X) == PF_R | PF_W:
        start = loads[0].p_offset & -PAGE_BYTES
        if looks_like_tcs(file.view[start : start + PAGE_BYTES]):
            return "selftest"
    if elf.section(NOTE_SECTION) is not None:
        return "sdk"
    if elf.section(OE_SECTION) is not None:
        return "oe"
    raise SoftSgxError(
        f"{file.name}: an ELF file with neither {NOTE_SECTION} nor {OE_SECTION}, and its first "
        "segment is no TCS; is it a signed enclave?"
    )
