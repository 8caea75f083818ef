"""The ioctls of ``/dev/sgx_enclave`` by number; imported with the first ioctl.

Source:
    arch/x86/include/uapi/asm/sgx.h.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from softsgx.driver import build, sgx2
from softsgx.driver.enclave import Enclave
from softsgx.driver.task import Task
from softsgx.driver.uapi import Ioctl

__all__ = ["COMMANDS"]

COMMANDS: Mapping[int, Callable[[Enclave, Task, int], int]] = {
    Ioctl.ENCLAVE_CREATE: build.create,
    Ioctl.ENCLAVE_ADD_PAGES: build.add_pages,
    Ioctl.ENCLAVE_INIT: build.init,
    Ioctl.ENCLAVE_PROVISION: build.provision,
    Ioctl.ENCLAVE_RESTRICT_PERMISSIONS: sgx2.restrict_permissions,
    Ioctl.ENCLAVE_MODIFY_TYPES: sgx2.modify_types,
    Ioctl.ENCLAVE_REMOVE_PAGES: sgx2.remove_pages,
}
"""The function of each command; it returns the bytes processed, or 0 if it does not count."""
