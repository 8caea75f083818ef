"""Texts of the values of system calls, as strace prints them.

Source:
    strace(1); errno(3), mmap(2), mprotect(2), mremap(2), madvise(2), open(2); uapi/asm/sgx.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from softsgx.arch import AttributesFlags, PageType, SecInfoFlags, Xfrm
from softsgx.driver import Ioctl
from softsgx.engines.native import abi

__all__ = [
    "advice",
    "attributes",
    "command",
    "mapping",
    "open_flags",
    "page_type",
    "permissions",
    "pointer",
    "protection",
    "remapping",
    "result",
    "secinfo",
    "xfrm",
]

_LARGEST_ERRNO = 4095
_PROTECTIONS = {
    abi.PROT_READ: "PROT_READ",
    abi.PROT_WRITE: "PROT_WRITE",
    abi.PROT_EXEC: "PROT_EXEC",
}
_MAP_TYPES = {
    abi.MAP_SHARED: "MAP_SHARED",
    abi.MAP_PRIVATE: "MAP_PRIVATE",
    3: "MAP_SHARED_VALIDATE",
}
_MAPPINGS = {
    abi.MAP_FIXED: "MAP_FIXED",
    abi.MAP_ANONYMOUS: "MAP_ANONYMOUS",
    0x0100: "MAP_GROWSDOWN",
    0x2000: "MAP_LOCKED",
    0x4000: "MAP_NORESERVE",
    0x8000: "MAP_POPULATE",
    0x1_0000: "MAP_NONBLOCK",
    0x2_0000: "MAP_STACK",
    0x4_0000: "MAP_HUGETLB",
    0x8_0000: "MAP_SYNC",
    abi.MAP_FIXED_NOREPLACE: "MAP_FIXED_NOREPLACE",
}
_REMAPPINGS = {1: "MREMAP_MAYMOVE", 2: "MREMAP_FIXED", 4: "MREMAP_DONTUNMAP"}
_ACCESS_MODES = ("O_RDONLY", "O_WRONLY", "O_RDWR")
_OPEN_FLAGS = {
    abi.O_CREAT: "O_CREAT",
    abi.O_EXCL: "O_EXCL",
    abi.O_TRUNC: "O_TRUNC",
    abi.O_NONBLOCK: "O_NONBLOCK",
    abi.O_DIRECTORY: "O_DIRECTORY",
    abi.O_CLOEXEC: "O_CLOEXEC",
}
_ADVICE = {int(value): name for name, value in vars(abi).items() if name.startswith("MADV_")}
_COMMANDS = {int(each): f"SGX_IOC_{each.name}" for each in Ioctl}
_RIGHTS = ((1, "R"), (2, "W"), (4, "X"))
_SECINFO_TYPE_SHIFT = 8


def result(value: int) -> str:
    """Return what a call has returned: a number or address, or an errno value in words."""
    if value == -abi.ERESTARTSYS:
        return "? ERESTARTSYS (To be restarted if SA_RESTART is set)"
    if -_LARGEST_ERRNO <= value < 0:
        name = errno.errorcode.get(-value, str(-value))
        return f"-1 {name} ({os.strerror(-value)})"
    return pointer(value) if value > 0xFFFF else str(value)


def pointer(value: int) -> str:
    """Return an address."""
    return hex(value) if value else "NULL"


def protection(value: int) -> str:
    """Return PROT_* rights."""
    return _flags(value, _PROTECTIONS, "PROT_NONE")


def mapping(value: int) -> str:
    """Return flags of mmap."""
    kind = value & abi.MAP_TYPE
    rest = value & ~abi.MAP_TYPE
    words = [_MAP_TYPES.get(kind, hex(kind))]
    return "|".join([*words, _flags(rest, _MAPPINGS, "")] if rest else words)


def remapping(value: int) -> str:
    """Return flags of mremap."""
    return _flags(value, _REMAPPINGS, "0")


def advice(value: int) -> str:
    """Return the advice of madvise."""
    return _ADVICE.get(value, hex(value))


def open_flags(value: int) -> str:
    """Return flags of open."""
    mode = value & abi.O_ACCMODE
    words = _ACCESS_MODES[mode] if mode < len(_ACCESS_MODES) else "O_ACCMODE"
    rest = _flags(value & ~abi.O_ACCMODE, _OPEN_FLAGS, "")
    return f"{words}|{rest}" if rest else words


def command(value: int) -> str:
    """Return the command of an ioctl on SGX's devices."""
    return _COMMANDS.get(value, f"_IOC(0xa4, {value & 0xFF:#x}, {value >> 16 & 0x3FFF:#x})")


def permissions(value: int) -> str:
    """Return EPCM rights."""
    named = "|".join(name for bit, name in _RIGHTS if value & bit)
    rest = value & ~7
    return "|".join(filter(None, (named, hex(rest) if rest else ""))) or "0"


def secinfo(value: int) -> str:
    """Return SECINFO.FLAGS."""
    kind, flags = value >> _SECINFO_TYPE_SHIFT & 0xFF, value & ~int(SecInfoFlags.TYPE_MASK)
    known = {int(each): each.name for each in PageType}
    return f"{permissions(flags)}|{known.get(kind, hex(kind))}"


def page_type(value: int) -> str:
    """Return a page type."""
    return {int(each): each.name for each in PageType}.get(value, hex(value))


def attributes(value: int) -> str:
    """Return ATTRIBUTES.FLAGS."""
    return _flags(value, {int(each): str(each.name) for each in AttributesFlags}, "0")


def xfrm(value: int) -> str:
    """Return ATTRIBUTES.XFRM."""
    return _flags(value, {int(each): str(each.name) for each in Xfrm}, "0")


def _flags(value: int, names: Mapping[int, str], none: str) -> str:
    words = [name for bit, name in names.items() if value & bit]
    rest = value & ~sum(names)
    return "|".join([*words, *([hex(rest)] if rest else [])]) or none
