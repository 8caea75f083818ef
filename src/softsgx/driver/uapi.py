"""The ioctl interface in bytes: numbers, structures, flags, and ERESTARTSYS.

Source:
    arch/x86/include/uapi/asm/sgx.h; include/uapi/asm-generic/ioctl.h; include/linux/errno.h.
"""

from __future__ import annotations

import os
from enum import IntEnum, IntFlag
from typing import NoReturn

from softsgx.arch import Status
from softsgx.hw import Fault
from softsgx.layout import U64, Structure, at

__all__ = [
    "ERESTARTSYS",
    "MAP_FIXED",
    "MAP_FIXED_NOREPLACE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MAP_SHARED_VALIDATE",
    "PROT_EXEC",
    "PROT_READ",
    "PROT_WRITE",
    "AddPages",
    "AddPagesFlags",
    "Create",
    "Init",
    "Ioctl",
    "LeafRefused",
    "ModifyTypes",
    "Provision",
    "RemovePages",
    "RestrictPermissions",
    "refuse",
]

ERESTARTSYS = 512
"""A signal is pending and nothing has changed: the kernel restarts the call or returns EINTR."""

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_SHARED_VALIDATE = 1, 2, 3
MAP_FIXED, MAP_FIXED_NOREPLACE = 0x10, 0x100000

_IOC_WRITE, _IOC_READ = 1, 2
_SGX_MAGIC = 0xA4


def refuse(errno: int, why: str = "") -> NoReturn:
    """Refuse a system call.

    Raises:
        OSError: with ``errno`` positive; ``why`` is the reason, for messages.
    """
    text = "interrupted by a signal" if errno == ERESTARTSYS else os.strerror(errno)
    raise OSError(errno, f"{text}: {why}" if why else text)


class LeafRefused(OSError):
    """A system call fails because a leaf failed.

    Attributes:
        leaf: the leaf's name: ``EINIT``.
        status: the name of its return code; empty if it faulted.
    """

    def __init__(self, errno: int, leaf: str, outcome: Status | Fault) -> None:
        self.leaf = leaf
        self.status = outcome.manual_name if isinstance(outcome, Status) else ""
        super().__init__(errno, f"{os.strerror(errno)}: {leaf}: {self.status or outcome}")


class Create(Structure, size=8):
    """struct sgx_enclave_create.

    Attributes:
        src: address of a 4096-byte SECS image.
    """

    src: int = at(0, U64)


class AddPages(Structure, size=48):
    """struct sgx_enclave_add_pages.

    Attributes:
        src: address of the first source page.
        offset: of the first page in the enclave, bytes from its base.
        length: bytes.
        secinfo: address of a 64-byte SECINFO.
        flags: :class:`AddPagesFlags`.
        count: out: bytes added.
    """

    src: int = at(0, U64)
    offset: int = at(8, U64)
    length: int = at(16, U64)
    secinfo: int = at(24, U64)
    flags: int = at(32, U64)
    count: int = at(40, U64)


class AddPagesFlags(IntFlag):
    """``flags`` of :class:`AddPages`; other bits are ignored."""

    MEASURE = 1


class Init(Structure, size=8):
    """struct sgx_enclave_init.

    Attributes:
        sigstruct: address of a 1808-byte SIGSTRUCT.
    """

    sigstruct: int = at(0, U64)


class Provision(Structure, size=8):
    """struct sgx_enclave_provision.

    Attributes:
        fd: a descriptor of ``/dev/sgx_provision``.
    """

    fd: int = at(0, U64)


class RestrictPermissions(Structure, size=40):
    """struct sgx_enclave_restrict_permissions.

    Attributes:
        offset, length: the pages, bytes from the enclave's base.
        permissions: R 1, W 2, X 4.
        result: out: the code of the leaf that refused.
        count: out: bytes changed.
    """

    offset: int = at(0, U64)
    length: int = at(8, U64)
    permissions: int = at(16, U64)
    result: int = at(24, U64)
    count: int = at(32, U64)


class ModifyTypes(Structure, size=40):
    """struct sgx_enclave_modify_types.

    Attributes:
        offset, length: the pages, bytes from the enclave's base.
        page_type: TCS or TRIM.
        result: out: the code of the leaf that refused.
        count: out: bytes changed.
    """

    offset: int = at(0, U64)
    length: int = at(8, U64)
    page_type: int = at(16, U64)
    result: int = at(24, U64)
    count: int = at(32, U64)


class RemovePages(Structure, size=24):
    """struct sgx_enclave_remove_pages.

    Attributes:
        offset, length: the pages, bytes from the enclave's base.
        count: out: bytes removed.
    """

    offset: int = at(0, U64)
    length: int = at(8, U64)
    count: int = at(16, U64)


def _ioc(direction: int, number: int, struct: type[Structure]) -> int:
    return direction << 30 | struct.SIZE << 16 | _SGX_MAGIC << 8 | number


class Ioctl(IntEnum):
    """Commands of ``/dev/sgx_enclave``."""

    ENCLAVE_CREATE = _ioc(_IOC_WRITE, 0, Create)
    ENCLAVE_ADD_PAGES = _ioc(_IOC_WRITE | _IOC_READ, 1, AddPages)
    ENCLAVE_INIT = _ioc(_IOC_WRITE, 2, Init)
    ENCLAVE_PROVISION = _ioc(_IOC_WRITE, 3, Provision)
    ENCLAVE_RESTRICT_PERMISSIONS = _ioc(_IOC_WRITE | _IOC_READ, 5, RestrictPermissions)
    ENCLAVE_MODIFY_TYPES = _ioc(_IOC_WRITE | _IOC_READ, 6, ModifyTypes)
    ENCLAVE_REMOVE_PAGES = _ioc(_IOC_WRITE | _IOC_READ, 7, RemovePages)
