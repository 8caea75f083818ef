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

_NR, _ARCH, _POINTER, _ARGUMENTS = 0, 4, 8, 16

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
    abi.SYS_EXECVE,
    abi.SYS_EXECVEAT,
    abi.SYS_SCHED_SETAFFINITY,
    abi.SYS_SCHED_GETAFFINITY,
    abi.SYS_SOFTSGX_EENTER,
)

#: Never stop, whatever is asked for: they have no end that could be waited for.
_NEVER = (abi.SYS_RT_SIGRETURN, abi.SYS_EXIT, abi.SYS_EXIT_GROUP)


def build_guard(base: int, size: int) -> bytes:
    """Return a filter that stops every call made by code in ``[base, base + size)``.

    It says nothing of other calls: the most severe verdict of all filters counts.

    Args:
        base: a multiple of ``size``.
        size: a power of two, of a page at least.
    """
    mask = -size & (1 << 64) - 1
    code: list[tuple[int, int, int, int]] = []
    for offset, shift, to_allow in ((_POINTER + 4, 32, 4), (_POINTER, 0, 1)):
        code.append((_LD_ABS, 0, 0, offset))
        code.append((_AND, 0, 0, mask >> shift & 0xFFFF_FFFF))
        code.append((_JEQ, 0, to_allow, base >> shift & 0xFFFF_FFFF))
    code.append((_RET, 0, 0, abi.SECCOMP_RET_TRACE))
    code.append((_RET, 0, 0, abi.SECCOMP_RET_ALLOW))
    return _pack(code)


def build_filter(*, everything: bool = False) -> bytes:
    """Return the filter as an array of ``struct sock_filter``.

    Calls that the supervisor makes in the program's name carry a mark, where they have a register
    free for it, and do not stop.

    Args:
        everything: stop every call that can return, for those who must know when it is made.
    """
    code: list[tuple[int, int, int, int]] = []

    def load(offset: int) -> None:
        code.append((_LD_ABS, 0, 0, offset))

    def done(action: int) -> None:
        code.append((_RET, 0, 0, action))

    load(_ARCH)
    code.append((_JEQ, 1, 0, abi.AUDIT_ARCH_X86_64))
    done(abi.SECCOMP_RET_ALLOW)  # 32-bit programs are not ours
    load(_ARGUMENTS + 8 * 5)
    code.append((_JEQ, 0, 3, abi.OUR_CALL & 0xFFFF_FFFF))
    load(_ARGUMENTS + 8 * 5 + 4)
    code.append((_JEQ, 0, 1, abi.OUR_CALL >> 32))
    done(abi.SECCOMP_RET_ALLOW)
    load(_NR)
    if everything:
        for number in _NEVER:
            code.append((_JEQ, 0, 1, number))
            done(abi.SECCOMP_RET_ALLOW)
        done(abi.SECCOMP_RET_TRACE)
        return _pack(code)
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
    return _pack(code)


def _pack(code: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
