"""Libraries of Intel's SDK are laid out as the SDK's own signing tool laid them out.

Method: below the directory that ``SOFTSGX_ENCLAVES`` names, ``NAME.so`` and ``Enclave.config.xml``
beside ``NAME.signed.so`` must give that file, byte for byte, once they have its SIGSTRUCT.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.real_enclaves import ABSENT, real_files

from softsgx.arch import Xfrm
from softsgx.image import (
    Bytes,
    SdkLayout,
    SignOptions,
    embed_sigstruct,
    lay_out_sdk,
    open_image,
    read_bytes,
    read_sdk_config,
)

_SIGNED = ".signed.so"


def _unsigned(signed: Path) -> Path:
    return signed.with_name(signed.name.removesuffix(_SIGNED) + ".so")


def _settings(signed: Path) -> Path:
    return signed.with_name("Enclave.config.xml")


FILES = [
    path
    for path in real_files()
    if path.name.endswith(_SIGNED) and _unsigned(path).is_file() and _settings(path).is_file()
]


@pytest.mark.skipif(not FILES, reason=f"{ABSENT} with what they were made of")
@pytest.mark.parametrize("signed", FILES, ids=str)
def test_a_library_and_its_configuration_give_the_signed_file(signed: Path) -> None:
    config = read_sdk_config(read_bytes(_settings(signed)))
    options = SignOptions(**config.options)
    xfrm, mask = options.states()
    layout = SdkLayout(
        **config.layout,
        xfrm=xfrm | ~mask & sum(Xfrm),
        miscselect=options.miscselect,
        misc_mask=options.misc_mask,
        aex_notify=options.aex_notify,
    )
    unsigned = _unsigned(signed)
    laid_out = Bytes(str(unsigned), lay_out_sdk(read_bytes(unsigned), layout))
    sigstruct = open_image(signed).sigstruct
    assert sigstruct is not None
    assert embed_sigstruct(laid_out, sigstruct) == signed.read_bytes()
