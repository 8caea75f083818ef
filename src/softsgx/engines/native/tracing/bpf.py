"""The seccomp filters: which system calls of the program stop for the supervisor.

The program starts with one filter.  It stops calls that may name a device, and calls by which a
process can get a descriptor or a mapping of one.  A process that has got one receives a second
filter, which stops calls that concern open devices and mappings of them.  No other call stops.

The filters test a call's number before any argument: for each filter the kernel keeps a table of
the numbers that it always allows, and does not run the filter for them.

Source:
    seccomp(2); uapi/linux/filter.h; uapi/linux/seccomp.h (``struct seccomp_data``);
    ``seccomp_is_const_allow()``, kernel/seccomp.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from softsgx.engines.native import abi

_LD_ABS = 0x20
_JEQ = 0x15
_AND = 0x54
_RET = 0x06
_JA = 0x05

#: One instruction: operation, jumps if true and if false, operand.
_Instruction = tuple[int, int, int, int]
#: Targets of jumps: the ends of a filter.
_ALLOW, _STOP = -1, -2

_NR, _ARCH, _POINTER, _ARGUMENTS = 0, 4, 8, 16

#: Always stop: whether they concern a device depends on a string, or on another process.
_ALWAYS = (
    abi.SYS_OPENAT,
    abi.SYS_OPEN,
    abi.SYS_OPENAT2,
    abi.SYS_STAT,
    abi.SYS_LSTAT,
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
    abi.SYS_CLONE3,
    abi.SYS_PROCESS_VM_READV,
    abi.SYS_PROCESS_VM_WRITEV,
    abi.SYS_FTRUNCATE,
    abi.SYS_FALLOCATE,
    abi.SYS_FLOCK,
    abi.SYS_SCHED_SETAFFINITY,
    abi.SYS_SCHED_GETAFFINITY,
    abi.SYS_SOFTSGX_EENTER,
)

_EXECVES = (abi.SYS_EXECVE, abi.SYS_EXECVEAT)
#: Stop in a process that has a device: they concern its descriptors and mappings.  A thread in
#: execve cannot be stopped for another one that needs a page.
_WITH_DEVICES = (
    *_EXECVES,
    *(abi.SYS_FSTAT, abi.SYS_DUP, abi.SYS_DUP2, abi.SYS_DUP3),
    *(abi.SYS_MPROTECT, abi.SYS_PKEY_MPROTECT, abi.SYS_MUNMAP, abi.SYS_MREMAP),
    *(abi.SYS_MLOCK, abi.SYS_MLOCK2),
)

#: Stop when this argument is the descriptor of a device: they transfer data, seek, or ask.
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
    (0, abi.SYS_IOCTL),
    (0, abi.SYS_PREADV2),
    (0, abi.SYS_PWRITEV2),
)

#: Advice that takes pages from a file, fills it, or is refused for devices; seldom given.
_RARE_ADVICE = (
    *(abi.MADV_REMOVE, abi.MADV_DOFORK, abi.MADV_DODUMP, abi.MADV_COLD, abi.MADV_PAGEOUT),
    *(abi.MADV_POPULATE_READ, abi.MADV_POPULATE_WRITE, abi.MADV_COLLAPSE),
)

#: Never stop: these calls do not return, so the supervisor cannot wait for their end.
_NEVER = (abi.SYS_RT_SIGRETURN, abi.SYS_EXIT, abi.SYS_EXIT_GROUP)


#: Allows calls that the supervisor makes in the program's name; continues after it for others.
_OURS_PASS = (
    (_LD_ABS, 0, 0, _ARGUMENTS + 8 * 5),
    (_JEQ, 0, 3, abi.OUR_CALL & 0xFFFF_FFFF),
    (_LD_ABS, 0, 0, _ARGUMENTS + 8 * 5 + 4),
    (_JEQ, 0, 1, abi.OUR_CALL >> 32),
    (_RET, 0, 0, abi.SECCOMP_RET_ALLOW),
)


def build_guard(base: int, size: int) -> bytes:
    """Return a filter that stops every call made by code in ``[base, base + size)``.

    It also stops every ``madvise`` of an address in that range.  It allows other calls; the kernel
    applies the most restrictive result of all filters.

    Args:
        base: a multiple of ``size``.
        size: a power of two, of a page at least.
    """
    mask = -size & (1 << 64) - 1
    code: list[tuple[int, int, int, int]] = []

    def stop_inside(field: int) -> None:
        """Stop if a 64-bit field is in the range; otherwise continue after this code."""
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
        # To the comparison after the list, or past that.
        for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
            code.append((_JEQ, left, 0, number))
        code.append((_JA, 0, 0, 4))
        code.append((_LD_ABS, 0, 0, _ARGUMENTS + 8 * argument))
        code.append((_JEQ, 0, 1, descriptor))
        code.append((_RET, 0, 0, abi.SECCOMP_RET_TRACE))
        code.append((_LD_ABS, 0, 0, _NR))
    code.append((_RET, 0, 0, abi.SECCOMP_RET_ALLOW))
    return _pack(code)


def build_filter(*, everything: bool = False, code: bool = True, executions: bool = False) -> bytes:
    """Return the filter for the start of a program as an array of ``struct sock_filter``.

    Calls that the supervisor makes in the program's name carry a mark in a free register, if there
    is one, and do not stop.

    Args:
        everything: stop every call that can return, as strict mode needs.
        code: stop mappings of code from files, as is needed where CPUID does not fault.
        executions: stop execve, too.
    """
    instructions = _of_this_architecture()
    if everything:
        instructions += [(_JEQ, _ALLOW, 0, number) for number in _NEVER]
        return _assemble([*instructions, (_JA, 0, 0, _STOP)])
    always = _ALWAYS + (_EXECVES if executions else ())
    instructions += [(_JEQ, _STOP, 0, number) for number in always]
    # ioctl: only commands of type 0xA4, SGX's own.
    instructions += _if_call(
        abi.SYS_IOCTL,
        (_LD_ABS, 0, 0, _ARGUMENTS + 8),
        (_AND, 0, 0, 0xFF00),
        (_JEQ, _STOP, _ALLOW, 0xA400),
    )
    # clone: threads that would not be traced.
    instructions += _if_call(
        abi.SYS_CLONE,
        (_LD_ABS, 0, 0, _ARGUMENTS),
        (_AND, 0, 0, abi.CLONE_UNTRACED),
        (_JEQ, _ALLOW, _STOP, 0),
    )
    # fcntl: seals, which devices do not have.
    instructions += _if_call(
        abi.SYS_FCNTL,
        (_LD_ABS, 0, 0, _ARGUMENTS + 8),
        (_JEQ, _STOP, 0, abi.F_ADD_SEALS),
        (_JEQ, _STOP, _ALLOW, abi.F_GET_SEALS),
    )
    # mmap: shared files, since one may be a device received from a process; code from files.
    mask = abi.PROT_EXEC if code else 0
    instructions += _if_call(
        abi.SYS_MMAP,
        (_LD_ABS, 0, 0, _ARGUMENTS + 24),
        (_AND, 0, 0, abi.MAP_ANONYMOUS | abi.MAP_TYPE),
        (_JEQ, 1, 0, abi.MAP_PRIVATE),
        (_JEQ, _ALLOW, 3, abi.MAP_ANONYMOUS | abi.MAP_PRIVATE),
        (_LD_ABS, 0, 0, _ARGUMENTS + 16),
        (_AND, 0, 0, mask),
        (_JEQ, _ALLOW, _STOP, 0),
        (_AND, 0, 0, abi.MAP_ANONYMOUS),
        (_JEQ, _STOP, _ALLOW, 0),
    )
    return _assemble([*instructions, (_JA, 0, 0, _ALLOW)])


def build_calls_filter(numbers: Iterable[int]) -> bytes:
    """Return a filter that stops the calls of these numbers, and futex(2) that stores.

    Those operations on futexes are the ones with priority inheritance, and FUTEX_WAKE_OP.
    """
    code = [*_of_this_architecture(), *((_JEQ, _STOP, 0, number) for number in numbers)]
    code += _if_call(
        abi.SYS_FUTEX,
        (_LD_ABS, 0, 0, _ARGUMENTS + 8),
        (_AND, 0, 0, abi.FUTEX_CMD_MASK),
        *((_JEQ, _STOP, 0, operation) for operation in abi.FUTEX_STORES),
        (_JA, 0, 0, _ALLOW),
    )
    return _assemble([*code, (_JA, 0, 0, _ALLOW)])


def build_device_filter() -> bytes:
    """Return the filter of a process that has a descriptor or a mapping of a device."""
    code = _of_this_architecture()
    code += [(_JEQ, _STOP, 0, number) for number in _WITH_DEVICES]
    # fcntl: commands that make another descriptor.
    code += _if_call(
        abi.SYS_FCNTL,
        (_LD_ABS, 0, 0, _ARGUMENTS + 8),
        (_JEQ, _STOP, 0, abi.F_DUPFD),
        (_JEQ, _STOP, _ALLOW, abi.F_DUPFD_CLOEXEC),
    )
    # madvise: advice that takes pages from a file or fills it; the range may begin anywhere.
    code += _if_call(
        abi.SYS_MADVISE,
        (_LD_ABS, 0, 0, _ARGUMENTS + 16),
        *((_JEQ, _STOP, 0, advice) for advice in _RARE_ADVICE),
        (_JA, 0, 0, _ALLOW),
    )
    # mmap: files, since one may be a device, and calls that may replace an existing mapping.
    code += _if_call(
        abi.SYS_MMAP,
        (_LD_ABS, 0, 0, _ARGUMENTS + 24),
        (_AND, 0, 0, abi.MAP_FIXED | abi.MAP_ANONYMOUS),
        (_JEQ, _ALLOW, _STOP, abi.MAP_ANONYMOUS),
    )
    return _assemble([*code, (_JA, 0, 0, _ALLOW)])


def _of_this_architecture() -> list[_Instruction]:
    """Allow calls of 32-bit programs, which are not supervised; load the number of others."""
    return [
        (_LD_ABS, 0, 0, _ARCH),
        (_JEQ, 0, _ALLOW, abi.AUDIT_ARCH_X86_64),
        (_LD_ABS, 0, 0, _NR),
    ]


def _if_call(number: int, *then: _Instruction) -> list[_Instruction]:
    """Execute ``then``, which has to end in jumps, for one call."""
    return [(_JEQ, 0, len(then), number), *then]


def _assemble(code: list[_Instruction]) -> bytes:
    """Add the two ends, allow and stop, and resolve jumps to them."""
    ends = {_ALLOW: len(code), _STOP: len(code) + 1}

    def resolved(at: int, target: int) -> int:
        return ends[target] - at - 1 if target in ends else target

    jumps = [
        (operation, 0, 0, resolved(at, operand))
        if operation == _JA
        else (operation, resolved(at, true), resolved(at, false), operand)
        for at, (operation, true, false, operand) in enumerate(code)
    ]
    allow, stop = (_RET, 0, 0, abi.SECCOMP_RET_ALLOW), (_RET, 0, 0, abi.SECCOMP_RET_TRACE)
    return _pack([*jumps, allow, *_OURS_PASS, stop])


def _pack(code: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)
