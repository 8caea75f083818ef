"""The device nodes that are not there: opening and inspecting ``/dev/sgx_enclave`` and its kin.

Source:
    open(2), stat(2), statx(2), access(2), readlink(2); udev's rules for SGX devices.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from errno import EACCES, EEXIST, EFAULT, EINVAL, ENOTDIR
from typing import Protocol

from softsgx.driver import EnclaveFile, ProvisionFile
from softsgx.engines.native import abi, libc
from softsgx.engines.native.memory.store import EnclaveMemory
from softsgx.engines.native.syscalls.registry import Device, Registry
from softsgx.engines.native.tracing.program import ProgramThread

__all__ = ["DeviceNames", "Opener"]

_ENCLAVE, _PROVISION = "enclave", "provision"
_NODES = {
    b"/dev/sgx_enclave": _ENCLAVE,
    b"/dev/sgx/enclave": _ENCLAVE,
    b"/dev/sgx_provision": _PROVISION,
    b"/dev/sgx/provision": _PROVISION,
}
_PREFIX = b"/dev/sgx"
_MINORS = {_ENCLAVE: 125, _PROVISION: 126}
_MISC_MAJOR = 10
_MODE = stat.S_IFCHR | 0o666
_PROC = b"/proc/"
_LINK = re.compile(rb"/proc/(self|thread-self|\d+)/fd/(\d+)")

_STAT = struct.Struct("<QQQIIIIQqqqQQQQQQ24x")
_STATX = struct.Struct("<IIQIIIH2xQQQQ64xIIIIQ104x")
_STATX_BASIC = 0x7FF


class Opener(Protocol):
    """The driver, as far as opening goes."""

    def open_enclave(self, thread: ProgramThread) -> EnclaveFile:
        """Open ``/dev/sgx_enclave``; ``OSError`` when it is refused."""

    def open_provision(self, thread: ProgramThread) -> ProvisionFile:
        """Open ``/dev/sgx_provision``; ``OSError`` when it is refused."""


class DeviceNames:
    """Handlers of system calls that name files: a result, or ``None`` to let the call run."""

    def __init__(self, opener: Opener, registry: Registry) -> None:
        self._opener, self._registry = opener, registry

    # --- opening --------------------------------------------------------------------------------

    def open(self, thread: ProgramThread) -> int | None:
        """Do ``open`` (path, flags, mode)."""
        return self._open(thread, thread.regs.rdi, thread.regs.rsi)

    def openat(self, thread: ProgramThread) -> int | None:
        """Do ``openat`` (directory, path, flags, mode); a device's path is absolute."""
        return self._open(thread, thread.regs.rsi, thread.regs.rdx)

    def openat2(self, thread: ProgramThread) -> int | None:
        """Do ``openat2`` (directory, path, how, size)."""
        how = thread.image.read(thread.regs.rdx, 8)
        return self._open(thread, thread.regs.rsi, int.from_bytes(how, "little"))

    def _open(self, thread: ProgramThread, path: int, flags: int) -> int | None:
        node = _node(thread, path) or self._linked_node(thread, path)
        if node is None:
            return None
        if flags & abi.O_CREAT and flags & abi.O_EXCL:
            return -EEXIST
        if flags & abi.O_DIRECTORY:
            return -ENOTDIR
        self._registry.sweep()
        image = thread.image
        descriptor = thread.finish_syscall(
            abi.SYS_MEMFD_CREATE,
            image.vdso_base + image.vdso.device_name,
            abi.MFD_ALLOW_SEALING | (abi.MFD_CLOEXEC if flags & abi.O_CLOEXEC else 0),
        )
        if descriptor < 0:
            return descriptor
        try:
            memory = EnclaveMemory(libc.take_descriptor(thread.tid, descriptor))
            file: EnclaveFile | ProvisionFile
            if node == _ENCLAVE:
                file = self._opener.open_enclave(thread)
            else:
                file = self._opener.open_provision(thread)
        except OSError as error:
            thread.syscall(abi.SYS_CLOSE, descriptor)
            return -(error.errno or EACCES)
        self._registry.add(Device(file, memory, flags & abi.O_ACCMODE))
        return descriptor

    # --- inspecting -----------------------------------------------------------------------------

    def stat(self, thread: ProgramThread) -> int | None:
        """Do ``stat`` (path, buffer) and lstat."""
        node = _node(thread, thread.regs.rdi)
        return None if node is None else _give(thread, thread.regs.rsi, _stat(node))

    def fstat(self, thread: ProgramThread) -> int | None:
        """Do ``fstat`` (descriptor, buffer)."""
        node = self._descriptor_node(thread, thread.regs.rdi)
        return None if node is None else _give(thread, thread.regs.rsi, _stat(node))

    def newfstatat(self, thread: ProgramThread) -> int | None:
        """Do ``newfstatat`` (directory, path, buffer, flags)."""
        regs = thread.regs
        node = self._node_at(thread, regs.rdi, regs.rsi, regs.r10)
        return None if node is None else _give(thread, regs.rdx, _stat(node))

    def statx(self, thread: ProgramThread) -> int | None:
        """Do ``statx`` (directory, path, flags, mask, buffer)."""
        regs = thread.regs
        node = self._node_at(thread, regs.rdi, regs.rsi, regs.rdx)
        return None if node is None else _give(thread, regs.r8, _statx(node))

    def access(self, thread: ProgramThread) -> int | None:
        """Do ``access`` (path, mode)."""
        return _access(thread, thread.regs.rdi, thread.regs.rsi)

    def faccessat(self, thread: ProgramThread) -> int | None:
        """Do ``faccessat`` (directory, path, mode) and faccessat2."""
        return _access(thread, thread.regs.rsi, thread.regs.rdx)

    def readlink(self, thread: ProgramThread) -> int | None:
        """Do ``readlink`` (path, buffer, size)."""
        regs = thread.regs
        return self._readlink(thread, regs.rdi, regs.rsi, regs.rdx)

    def readlinkat(self, thread: ProgramThread) -> int | None:
        """Do ``readlinkat`` (directory, path, buffer, size)."""
        regs = thread.regs
        return self._readlink(thread, regs.rsi, regs.rdx, regs.r10)

    def _readlink(self, thread: ProgramThread, path: int, buffer: int, size: int) -> int | None:
        if _node(thread, path) is not None:
            return -EINVAL
        device = self._linked(thread, path)
        if device is None:
            return None
        text = b"/dev/sgx_" + _kind(device).encode()
        given = _give(thread, buffer, text[:size])
        return given or min(size, len(text))

    def _linked(self, thread: ProgramThread, path: int) -> Device | None:
        """Return the device whose descriptor's link in /proc is ``path``."""
        if not len(self._registry) or thread.image.read(path, len(_PROC)) != _PROC:
            return None
        link = _LINK.fullmatch(thread.image.read_string(path))
        if link is None:
            return None
        pid = int(link[1]) if link[1].isdigit() else thread.process.pid
        return self._registry.of_descriptor(pid, int(link[2]))

    def _linked_node(self, thread: ProgramThread, path: int) -> str | None:
        """Opening the link of a device's descriptor opens the device again."""
        device = self._linked(thread, path)
        return None if device is None else _kind(device)

    def _node_at(self, thread: ProgramThread, directory: int, path: int, flags: int) -> str | None:
        node = _node(thread, path)
        if node is None and flags & abi.AT_EMPTY_PATH and not thread.image.read_string(path):
            node = self._descriptor_node(thread, directory)
        return node

    def _descriptor_node(self, thread: ProgramThread, descriptor: int) -> str | None:
        device = self._registry.of_descriptor(thread.process.pid, descriptor & 0xFFFF_FFFF)
        return None if device is None else _kind(device)


def _kind(device: Device) -> str:
    return _ENCLAVE if isinstance(device.file, EnclaveFile) else _PROVISION


def _node(thread: ProgramThread, path: int) -> str | None:
    # Most paths are not ours: eight bytes tell.
    if thread.image.read(path, len(_PREFIX)) != _PREFIX:
        return None
    return _NODES.get(thread.image.read_string(path))


def _access(thread: ProgramThread, path: int, mode: int) -> int | None:
    if _node(thread, path) is None:
        return None
    return -EACCES if mode & os.X_OK else 0


def _give(thread: ProgramThread, buffer: int, data: bytes) -> int:
    try:
        libc.write_memory(thread.tid, buffer, data)
    except OSError:
        return -EFAULT
    return 0


def _stat(node: str) -> bytes:
    device = os.makedev(_MISC_MAJOR, _MINORS[node])
    info = os.stat("/dev")
    inode = _MINORS[node]
    times = (int(info.st_mtime), 0) * 3
    return _STAT.pack(info.st_dev, inode, 1, _MODE, 0, 0, 0, device, 0, 4096, 0, *times)


def _statx(node: str) -> bytes:
    info = os.stat("/dev")
    major, minor = os.major(info.st_dev), os.minor(info.st_dev)
    return _STATX.pack(
        *(_STATX_BASIC, 4096, 0, 1, 0, 0, _MODE, _MINORS[node], 0, 0, 0),
        *(_MISC_MAJOR, _MINORS[node], major, minor, 0),
    )
