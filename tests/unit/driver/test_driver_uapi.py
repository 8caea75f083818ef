"""The numbers and layouts of ``uapi/asm/sgx.h``, which programs were compiled with."""

from __future__ import annotations

import pytest

from softsgx.driver import (
    AddPages,
    Create,
    Init,
    Ioctl,
    ModifyTypes,
    Provision,
    RemovePages,
    RestrictPermissions,
)
from softsgx.layout import Structure


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (Ioctl.ENCLAVE_CREATE, 0x4008A400),
        (Ioctl.ENCLAVE_ADD_PAGES, 0xC030A401),
        (Ioctl.ENCLAVE_INIT, 0x4008A402),
        (Ioctl.ENCLAVE_PROVISION, 0x4008A403),
        (Ioctl.ENCLAVE_RESTRICT_PERMISSIONS, 0xC028A405),
        (Ioctl.ENCLAVE_MODIFY_TYPES, 0xC028A406),
        (Ioctl.ENCLAVE_REMOVE_PAGES, 0xC018A407),
    ],
)
def test_an_ioctl_has_the_number_programs_use(command: int, number: int) -> None:
    assert command == number


@pytest.mark.parametrize(
    ("struct", "offsets"),
    [
        (Create, {"src": 0}),
        (
            AddPages,
            {"src": 0, "offset": 8, "length": 16, "secinfo": 24, "flags": 32, "count": 40},
        ),
        (Init, {"sigstruct": 0}),
        (Provision, {"fd": 0}),
        (
            RestrictPermissions,
            {"offset": 0, "length": 8, "permissions": 16, "result": 24, "count": 32},
        ),
        (ModifyTypes, {"offset": 0, "length": 8, "page_type": 16, "result": 24, "count": 32}),
        (RemovePages, {"offset": 0, "length": 8, "count": 16}),
    ],
)
def test_a_structure_has_its_fields_where_programs_put_them(
    struct: type[Structure], offsets: dict[str, int]
) -> None:
    assert offsets == struct.OFFSETS
