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
_JA = 0x05

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
    abi.SYS_TRUNCATE,
    abi.SYS_CREAT,
    abi.SYS_CHMOD,
    abi.SYS_CHOWN,
    abi.SYS_LCHOWN,
    abi.SYS_UTIME,
    abi.SYS_MKNOD,
    abi.SYS_STATFS,
    abi.SYS_SETXATTR,
    abi.SYS_LSETXATTR,
    abi.SYS_GETXATTR,
    abi.SYS_LGETXATTR,
    abi.SYS_LISTXATTR,
    abi.SYS_LLISTXATTR,
    abi.SYS_REMOVEXATTR,
    abi.SYS_LREMOVEXATTR,
    abi.SYS_UTIMES,
    abi.SYS_MKNODAT,
    abi.SYS_FCHOWNAT,
    abi.SYS_FUTIMESAT,
    abi.SYS_FCHMODAT,
    abi.SYS_UTIMENSAT,
    abi.SYS_FCHMODAT2,
    abi.SYS_MPROTECT,
    abi.SYS_PKEY_MPROTECT,
    abi.SYS_MUNMAP,
    abi.SYS_MREMAP,
    abi.SYS_CLONE3,
    abi.SYS_EXECVE,
    abi.SYS_EXECVEAT,
    abi.SYS_PROCESS_VM_READV,
    abi.SYS_PROCESS_VM_WRITEV,
    abi.SYS_MLOCK,
    abi.SYS_MLOCK2,
    abi.SYS_FTRUNCATE,
    abi.SYS_FALLOCATE,
    abi.SYS_FLOCK,
    abi.SYS_DUP,
    abi.SYS_DUP2,
    abi.SYS_DUP3,
    abi.SYS_SCHED_SETAFFINITY,
    abi.SYS_SCHED_GETAFFINITY,
    abi.SYS_SOFTSGX_EENTER,
)

#: Stop when this argument is the descriptor of a device: they move data, or return a position.
_ON_DESCRIPTOR = (
    (0, abi.SYS_READ),
    (0, abi.SYS_WRITE),
    (0, abi.SYS_LSEEK),
    (0, abi.SYS_PREAD64),
    (0, abi.SYS_PWRITE64),
    (0, abi.SYS_READV),
    (0, abi.SYS_WRITEV),
    (0, abi.SYS_SENDFILE),
    (1, abi.SYS_SENDFILE),
    (0, abi.SYS_FSYNC),
    (0, abi.SYS_FDATASYNC),
    (0, abi.SYS_READAHEAD),
    (0, abi.SYS_SPLICE),
    (2, abi.SYS_SPLICE),
    (0, abi.SYS_SYNC_FILE_RANGE),
    (0, abi.SYS_PREADV),
    (0, abi.SYS_PWRITEV),
    (0, abi.SYS_COPY_FILE_RANGE),
    (2, abi.SYS_COPY_FILE_RANGE),
    (0, abi.SYS_PREADV2),
    (0, abi.SYS_PWRITEV2),
)

#: Advice that takes pages from a file, fills it, or is refused for devices; seldom given.
_RARE_ADVICE = (
    *(abi.MADV_REMOVE, abi.MADV_DOFORK, abi.MADV_DODUMP, abi.MADV_COLD, abi.MADV_PAGEOUT),
    *(abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE, abi.MADV_COLLAPSE),
)

#: Never stop: these calls have no end that the supervisor could wait for.
_NEVER = (abi.SYS_RT_SIGRETURN, abi.SYS_EXIT, abi.SYS_EXIT_GROUP)


#: Lets calls pass that the supervisor makes in the program's name, and goes on behind for others.
_OURS_PASS = (
    (_LD_ABS, 0, 0, _ARGUMENTS + 8 * 5),
    (_JEQ, 0, 3, abi.OUR_CALL & 0xFFFF_FFFF),
    (_LD_ABS, 0, 0, _ARGUMENTS + 8 * 5 + 4),
    (_JEQ, 0, 1, abi.OUR_CALL >> 32),
    (_RET, 0, 0, abi.SECCOMP_RET_ALLOW),
)


def build_guard(base: int, size: int) -> bytes:
    """Return a filter that stops every call made by code in ``[base, base + size)``.

    And every ``madvise`` of an address in there.  It says nothing of other calls: the most severe
    verdict of all filters counts.

    Args:
        base: a multiple of ``size``.
        size: a power of two, of a page at least.
    """
    mask = -size & (1 << 64) - 1
    code: list[tuple[int, int, int, int]] = []

    def stop_inside(field: int) -> None:
        """Stop if a 64-bit field is in the range, else continue after this code."""
        for offset, shift, past in ((field + 4, 32, 4), (field, 0, 1)):
            code.append((_LD_ABS, 0, 0, offset))
            code.append((_AND, 0, 0, mask >> shift & 0xFFFF_FFFF))
            code.append((_JEQ, 0, past, base >> shift & 0xFFFF_FFFF))
        code.append((_RET, 0, 0, abi.SECCOMP_RET_TRACE))

    stop_inside(_POINTER)
    code.append((_LD_ABS, 0, 0, _NR))
    code.append((_JEQ, 1, 0, abi.SYS_MADVISE))
    code.append((_RET, 0, 0, abi.SECCOMP_RET_ALLOW))
    code += _OURS_PASS
    stop_inside(_ARGUMENTS)
    code.append((_RET, 0, 0, abi.SECCOMP_RET_ALLOW))
    return _pack(code)


def build_descriptor_guard(descriptor: int) -> bytes:
    """Return a filter that stops calls which would read, write or seek ``descriptor``."""
    code: list[tuple[int, int, int, int]] = [(_LD_ABS, 0, 0, _NR)]
    by_argument: dict[int, list[int]] = {}
    for argument, number in _ON_DESCRIPTOR:
        by_argument.setdefault(argument, []).append(number)
    for argument, numbers in by_argument.items():
        # To the comparison behind the list, or past it.
        for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
            code.append((_JEQ, left, 0, number))
        code.append((_JA, 0, 0, 4))
        code.append((_LD_ABS, 0, 0, _ARGUMENTS + 8 * argument))
        code.append((_JEQ, 0, 1, descriptor))
        code.append((_RET, 0, 0, abi.SECCOMP_RET_TRACE))
        code.append((_LD_ABS, 0, 0, _NR))
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
    done(abi.SECCOMP_RET_ALLOW)  # 32-bit programs are not supervised
    code += _OURS_PASS
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

    # clone: what would not be traced.
    code.append((_JEQ, 0, 5, abi.SYS_CLONE))
    load(_ARGUMENTS)
    code.append((_AND, 0, 0, abi.CLONE_UNTRACED))
    code.append((_JEQ, 1, 0, 0))
    done(abi.SECCOMP_RET_TRACE)
    done(abi.SECCOMP_RET_ALLOW)

    # fcntl: what makes another descriptor, and seals, which devices do not have.
    code.append((_JEQ, 0, 7, abi.SYS_FCNTL))
    load(_ARGUMENTS + 8)
    for left, command in ((3, abi.F_DUPFD), (2, abi.F_DUPFD_CLOEXEC), (1, abi.F_ADD_SEALS)):
        code.append((_JEQ, left, 0, command))
    code.append((_JEQ, 0, 1, abi.F_GET_SEALS))
    done(abi.SECCOMP_RET_TRACE)
    done(abi.SECCOMP_RET_ALLOW)

    # madvise: what takes pages from a file or fills it, wherever the range begins.
    code.append((_JEQ, 0, 3 + len(_RARE_ADVICE), abi.SYS_MADVISE))
    load(_ARGUMENTS + 16)
    for left, advice in zip(range(len(_RARE_ADVICE), 0, -1), _RARE_ADVICE, strict=True):
        code.append((_JEQ, left, 0, advice))
    done(abi.SECCOMP_RET_ALLOW)
    done(abi.SECCOMP_RET_TRACE)

    # mmap: files, since one may be a device, and calls that may replace an existing mapping.
    code.append((_JEQ, 0, 4, abi.SYS_MMAP))
    load(_ARGUMENTS + 24)
    code.append((_AND, 0, 0, abi.MAP_FIXED | abi.MAP_ANONYMOUS))
    code.append((_JEQ, 1, 0, abi.MAP_ANONYMOUS))
    done(abi.SECCOMP_RET_TRACE)
    done(abi.SECCOMP_RET_ALLOW)
    return _pack(code)


def _pack(code: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
