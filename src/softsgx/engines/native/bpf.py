"""The seccomp filter: which system calls of the program stop for the supervisor.

Everything else runs untouched and costs a few nanoseconds.

Source:
    seccomp(2); uapi/linux/filter.h; uapi/linux/seccomp.h (``struct seccomp_data``).
"""

from __future__ import annotations

import struct

from softsgx.engines.native import abi

_LD_ABS = 0x20
_JEQ = 0x15
_AND = 0x54
_RET = 0x06

_NR, _ARCH, _ARGUMENTS = 0, 4, 16

#: Stop always: their arguments say by a string, a descriptor or a range whether they concern us.
_ALWAYS = (
    abi.SYS_OPENAT,
    abi.SYS_OPEN,
    abi.SYS_OPENAT2,
    abi.SYS_STAT,
    abi.SYS_LSTAT,
    abi.SYS_FSTAT,
    abi.SYS_NEWFSTATAT,
    abi.SYS_STATX,
    abi.SYS_ACCESS,
    abi.SYS_FACCESSAT,
    abi.SYS_FACCESSAT2,
    abi.SYS_READLINK,
    abi.SYS_READLINKAT,
    abi.SYS_MPROTECT,
    abi.SYS_PKEY_MPROTECT,
    abi.SYS_MUNMAP,
    abi.SYS_MREMAP,
    abi.SYS_SCHED_SETAFFINITY,
    abi.SYS_SCHED_GETAFFINITY,
    abi.SYS_SOFTSGX_EENTER,
)


def build_filter() -> bytes:
    """Return the filter as an array of ``struct sock_filter``."""
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((_LD_ABS, 0, 0, offset))

    def done(action: int) -> None:
        code.append((_RET, 0, 0, action))

    load(_ARCH)
    code.append((_JEQ, 1, 0, abi.AUDIT_ARCH_X86_64))
    done(abi.SECCOMP_RET_ALLOW)  # 32-bit programs are not ours
    load(_NR)
    for number in _ALWAYS:
        code.append((_JEQ, 0, 1, number))
        done(abi.SECCOMP_RET_TRACE)

    # ioctl: only commands of type 0xA4, SGX's own.
    code.append((_JEQ, 0, 5, abi.SYS_IOCTL))
    load(_ARGUMENTS + 8)
    code.append((_AND, 0, 0, 0xFF00))
    code.append((_JEQ, 0, 1, 0xA400))
    done(abi.SECCOMP_RET_TRACE)
    done(abi.SECCOMP_RET_ALLOW)

    # mmap: files, since one may be a device, and whatever may replace an existing mapping.
    code.append((_JEQ, 0, 4, abi.SYS_MMAP))
    load(_ARGUMENTS + 24)
    code.append((_AND, 0, 0, abi.MAP_FIXED | abi.MAP_ANONYMOUS))
    code.append((_JEQ, 1, 0, abi.MAP_ANONYMOUS))
    done(abi.SECCOMP_RET_TRACE)
    done(abi.SECCOMP_RET_ALLOW)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
