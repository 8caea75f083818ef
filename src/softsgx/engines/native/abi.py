"""Numbers and layouts of Linux on x86-64 that the supervisor speaks: calls, ptrace, registers.

Source:
    ptrace(2), seccomp(2), userfaultfd(2), ioctl_userfaultfd(2); uapi headers of the same names;
    arch/x86/entry/syscalls/syscall_64.tbl; asm/user_64.h.
"""

from __future__ import annotations

import ctypes
from typing import Final

PAGE: Final = 4096
PAGE_MASK: Final = ~0xFFF
TASK_SIZE: Final = 1 << 47

# System calls.
SYS_READ: Final = 0
SYS_WRITE: Final = 1
SYS_LSEEK: Final = 8
SYS_PREAD64: Final = 17
SYS_PWRITE64: Final = 18
SYS_READV: Final = 19
SYS_WRITEV: Final = 20
SYS_DUP: Final = 32
SYS_DUP2: Final = 33
SYS_SENDFILE: Final = 40
SYS_FCNTL: Final = 72
SYS_FLOCK: Final = 73
SYS_FSYNC: Final = 74
SYS_FDATASYNC: Final = 75
SYS_FTRUNCATE: Final = 77
SYS_TRUNCATE: Final = 76
SYS_CREAT: Final = 85
SYS_CHMOD: Final = 90
SYS_CHOWN: Final = 92
SYS_LCHOWN: Final = 94
SYS_UTIME: Final = 132
SYS_MKNOD: Final = 133
SYS_STATFS: Final = 137
SYS_SETXATTR: Final = 188
SYS_LSETXATTR: Final = 189
SYS_GETXATTR: Final = 191
SYS_LGETXATTR: Final = 192
SYS_LISTXATTR: Final = 194
SYS_LLISTXATTR: Final = 195
SYS_REMOVEXATTR: Final = 197
SYS_LREMOVEXATTR: Final = 198
SYS_UTIMES: Final = 235
SYS_MKNODAT: Final = 259
SYS_PROCESS_VM_READV: Final = 310
SYS_PROCESS_VM_WRITEV: Final = 311
SYS_FCHOWNAT: Final = 260
SYS_FUTIMESAT: Final = 261
SYS_FCHMODAT: Final = 268
SYS_UTIMENSAT: Final = 280
SYS_FCHMODAT2: Final = 452
SYS_MLOCK: Final = 149
SYS_MUNLOCK: Final = 150
SYS_READAHEAD: Final = 187
SYS_SPLICE: Final = 275
SYS_SYNC_FILE_RANGE: Final = 277
SYS_FALLOCATE: Final = 285
SYS_DUP3: Final = 292
SYS_PREADV: Final = 295
SYS_PWRITEV: Final = 296
SYS_MLOCK2: Final = 325
SYS_COPY_FILE_RANGE: Final = 326
SYS_PREADV2: Final = 327
SYS_PWRITEV2: Final = 328
SYS_OPEN: Final = 2
SYS_STAT: Final = 4
SYS_FSTAT: Final = 5
SYS_LSTAT: Final = 6
SYS_MMAP: Final = 9
SYS_MPROTECT: Final = 10
SYS_MUNMAP: Final = 11
SYS_BRK: Final = 12
SYS_RT_SIGPROCMASK: Final = 14
SYS_RT_SIGTIMEDWAIT: Final = 128
SYS_IOCTL: Final = 16
SYS_ACCESS: Final = 21
SYS_MREMAP: Final = 25
SYS_MADVISE: Final = 28
SYS_GETPID: Final = 39
SYS_GETTID: Final = 186
SYS_RT_SIGRETURN: Final = 15
CLONE_VM: Final = 0x100
CLONE_THREAD: Final = 0x1_0000
CLONE_UNTRACED: Final = 0x80_0000
CLONE_CHILD_CLEARTID: Final = 0x20_0000
CLONE_CHILD_SETTID: Final = 0x100_0000
SYS_CLONE: Final = 56
SYS_FORK: Final = 57
SYS_VFORK: Final = 58
SYS_EXECVE: Final = 59
SYS_CLONE3: Final = 435
SYS_EXIT: Final = 60
SYS_WAIT4: Final = 61
SYS_KCMP: Final = 312
KCMP_VM: Final = 1
SYS_EXIT_GROUP: Final = 231
SYS_READLINK: Final = 89
SYS_PRCTL: Final = 157
SYS_ARCH_PRCTL: Final = 158
SYS_CLOSE: Final = 3
SYS_OPENAT: Final = 257
SYS_NEWFSTATAT: Final = 262
SYS_READLINKAT: Final = 267
SYS_FACCESSAT: Final = 269
SYS_SCHED_SETAFFINITY: Final = 203
SYS_SCHED_GETAFFINITY: Final = 204
SYS_MLOCKALL: Final = 151
SYS_FUTEX: Final = 202
FUTEX_CMD_MASK: Final = 0x7F
#: WAKE_OP, LOCK_PI, UNLOCK_PI, TRYLOCK_PI, WAIT_REQUEUE_PI, CMP_REQUEUE_PI, LOCK_PI2.
FUTEX_STORES: Final = (5, 6, 7, 8, 11, 12, 13)
SYS_SET_TID_ADDRESS: Final = 218
SYS_GET_ROBUST_LIST: Final = 274
SYS_TKILL: Final = 200
SYS_SIGNALFD4: Final = 289
SYS_SECCOMP: Final = 317
SYS_MEMFD_CREATE: Final = 319
SYS_EXECVEAT: Final = 322
SYS_USERFAULTFD: Final = 323
SYS_PKEY_MPROTECT: Final = 329
SYS_STATX: Final = 332
SYS_PIDFD_OPEN: Final = 434
SYS_OPENAT2: Final = 437
SYS_PIDFD_GETFD: Final = 438
SYS_CLOSE_RANGE: Final = 436
SYS_FACCESSAT2: Final = 439
SYS_PROCESS_MADVISE: Final = 440
#: Not a system call of Linux: "enter the enclave", made by our own vDSO only.
SYS_SOFTSGX_EENTER: Final = 0x5358_4702

#: Sixth argument of calls that are made in the program's name and have none: they do not stop.
OUR_CALL: Final = 0x5358_4702_CA11_0001

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_TYPE: Final = 0x0F
MAP_FIXED: Final = 0x10
MAP_32BIT: Final = 0x40
MAP_LOCKED: Final = 0x2000
MAP_POPULATE: Final = 0x8000
MAP_HUGETLB: Final = 0x4_0000
MAP_ANONYMOUS: Final = 0x20
MAP_FIXED_NOREPLACE: Final = 0x10_0000
MADV_DONTNEED: Final = 4
MADV_DONTNEED_LOCKED: Final = 24
MADV_FREE: Final = 8
MADV_REMOVE: Final = 9
MADV_DOFORK: Final = 11
MADV_HUGEPAGE: Final = 14
MADV_DONTDUMP: Final = 16
MADV_DODUMP: Final = 17
MADV_WIPEONFORK: Final = 18
MADV_KEEPONFORK: Final = 19
MADV_COLD: Final = 20
MADV_PAGEOUT: Final = 21
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103
AT_EMPTY_PATH: Final = 0x1000
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_FDCWD: Final = 0xFFFF_FF9C  # as an int of 32 bits
O_NOFOLLOW: Final = 0o400000
O_CLOEXEC: Final = 0o2000000
PIDFD_THREAD: Final = 0o200  # O_EXCL
O_NONBLOCK: Final = 0o4000
O_DIRECTORY: Final = 0o200000
O_CREAT: Final = 0o100
O_EXCL: Final = 0o200
O_TRUNC: Final = 0o1000
O_ACCMODE: Final = 3
O_RDONLY: Final = 0
O_WRONLY: Final = 1
O_RDWR: Final = 2
MFD_CLOEXEC: Final = 1
MFD_ALLOW_SEALING: Final = 2
F_DUPFD: Final = 0
F_DUPFD_CLOEXEC: Final = 1030
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 1
F_SEAL_SHRINK: Final = 2
F_SEAL_GROW: Final = 4
F_SEAL_WRITE: Final = 8

ARCH_GET_CPUID: Final = 0x1011
ARCH_SET_CPUID: Final = 0x1012

# ptrace requests, options and events.
PTRACE_POKEUSER: Final = 6
PTRACE_CONT: Final = 7
PTRACE_SINGLESTEP: Final = 9
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_SYSCALL: Final = 24
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GETSIGINFO: Final = 0x4202
PTRACE_SETSIGINFO: Final = 0x4203
PTRACE_GETREGSET: Final = 0x4204
PTRACE_SETREGSET: Final = 0x4205
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_LISTEN: Final = 0x4208
PTRACE_PEEKSIGINFO: Final = 0x4209
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_GET_RSEQ: Final = 0x420F
PTRACE_O_TRACESYSGOOD: Final = 0x01
PTRACE_O_TRACEFORK: Final = 0x02
PTRACE_O_TRACEVFORK: Final = 0x04
PTRACE_O_TRACECLONE: Final = 0x08
PTRACE_O_TRACEEXEC: Final = 0x10
PTRACE_O_TRACEEXIT: Final = 0x40
PTRACE_O_TRACESECCOMP: Final = 0x80
PTRACE_O_EXITKILL: Final = 0x10_0000
#: Of each thread of a program; the kernel copies them to those that it makes.
TRACE_OPTIONS: Final = (
    PTRACE_O_TRACESYSGOOD
    | PTRACE_O_TRACEFORK
    | PTRACE_O_TRACEVFORK
    | PTRACE_O_TRACECLONE
    | PTRACE_O_TRACEEXEC
    | PTRACE_O_TRACESECCOMP
    | PTRACE_O_EXITKILL
)
PTRACE_EVENT_FORK: Final = 1
PTRACE_EVENT_VFORK: Final = 2
PTRACE_EVENT_CLONE: Final = 3
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_EXIT: Final = 6
PTRACE_EVENT_SECCOMP: Final = 7
PTRACE_EVENT_STOP: Final = 128
NT_X86_XSTATE: Final = 0x202
WALL: Final = 0x4000_0000

#: Of DR0 in ``struct user``.
DEBUG_REGISTERS: Final = 848

# Signals and their codes.
SIGILL: Final = 4
SIGTRAP: Final = 5
SIGBUS: Final = 7
SIGKILL: Final = 9
SIGFPE: Final = 8
SIGSEGV: Final = 11
SIGCHLD: Final = 17
SIGSTOP: Final = 19
SIGTSTP: Final = 20
SIGTTIN: Final = 21
SIGTTOU: Final = 22
FAULT_SIGNALS: Final = sum(1 << number - 1 for number in (SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV))
"""Signals that code in an enclave raises, as a mask."""

ERESTARTSYS: Final = 512
"""A result inside the kernel: a signal decides whether the call is made again or is EINTR."""

SEGV_MAPERR: Final = 1
SEGV_ACCERR: Final = 2
ILL_ILLOPN: Final = 2
BUS_ADRALN: Final = 1
BUS_ADRERR: Final = 2
FPE_INTDIV: Final = 1
SI_KERNEL: Final = 0x80
TRAP_BRKPT: Final = 1
TRAP_TRACE: Final = 2
TRAP_HWBKPT: Final = 4

# struct ucontext, the argument of a handler: err, then trapno, of its struct sigcontext; cr2.
UCONTEXT_ERR: Final = 40 + 8 * 19
UCONTEXT_CR2: Final = 40 + 8 * 22

# seccomp and its BPF.
PR_SET_PDEATHSIG: Final = 1
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_SECCOMP: Final = 22
PR_SET_NO_NEW_PRIVS: Final = 38
SECCOMP_MODE_FILTER: Final = 2
SECCOMP_SET_MODE_FILTER: Final = 1
SECCOMP_FILTER_FLAG_TSYNC: Final = 1
SECCOMP_RET_TRACE: Final = 0x7FF0_0000
SECCOMP_RET_ALLOW: Final = 0x7FFF_0000
AUDIT_ARCH_X86_64: Final = 0xC000_003E

# Auxiliary vector.
AT_NULL: Final = 0
AT_BASE: Final = 7
AT_SYSINFO_EHDR: Final = 33
AT_HWCAP2: Final = 26
#: FSGSBASE instructions are usable in user mode.
HWCAP2_FSGSBASE: Final = 2

# userfaultfd.
UFFD_USER_MODE_ONLY: Final = 1
UFFD_API: Final = 0xAA
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
UFFDIO_CONTINUE: Final = 0xC020AA07
UFFDIO_POISON: Final = 0xC020AA08
UFFDIO_COPY_MODE_DONTWAKE: Final = 1
UFFDIO_COPY_MODE_WP: Final = 2
UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_PAGEFAULT_FLAG_WRITE: Final = 1
UFFD_PAGEFAULT_FLAG_WP: Final = 2
UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFDIO_REGISTER_MODE_MISSING: Final = 1
UFFDIO_REGISTER_MODE_WP: Final = 2
UFFDIO_REGISTER_MODE_MINOR: Final = 4
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 2
UFFDIO_CONTINUE_MODE_WP: Final = 2

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2


class UserRegs(ctypes.Structure):
    """``struct user_regs_struct``; ``eflags`` has the manual's name."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
            *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp"),
            *("ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    rflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int


class SigInfo(ctypes.Structure):
    """``siginfo_t`` as far as faults use it; 128 bytes."""

    _fields_ = [
        ("signo", ctypes.c_int32),
        ("errno", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("_pad", ctypes.c_int32),
        ("addr", ctypes.c_uint64),
        ("_rest", ctypes.c_uint8 * 104),
    ]

    signo: int
    errno: int
    code: int
    addr: int


class IoVec(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    base: int
    length: int


assert ctypes.sizeof(UserRegs) == 216, "struct user_regs_struct has 27 words"
assert ctypes.sizeof(SigInfo) == 128, "siginfo_t has 128 bytes"
