"""Probes of this machine: the facts that decide how the native engine can run.

Each probe tries the operation itself, in a child process if it could do harm.

Source:
    ptrace(2), seccomp(2), userfaultfd(2), pidfd_getfd(2), arch_prctl(2).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import signal
from collections.abc import Callable
from functools import cache

from softsgx import compiled
from softsgx.engines.native import abi, libc
from softsgx.engines.native.limits import file_bytes
from softsgx.engines.native.memory.memory_file import MEMORY_FILE_BYTES
from softsgx.engines.native.memory.uffd import MINOR_FEATURES, open_userfaultfd
from softsgx.engines.native.x86.cpuid import host_cpuid
from softsgx.ondemand import dataclass

_ACTION_AVAIL = 2  # SECCOMP_GET_ACTION_AVAIL
_DESCRIPTORS = 4096  # enough for a thousand processes

__all__ = [
    "Finding",
    "can_answer_cpuid",
    "can_cross_unseen",
    "can_fault_cpuid",
    "choose_pager",
    "doctor",
    "requirements",
    "untraceable",
]


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact.

    Attributes:
        name: what was probed.
        ok: whether it is there.
        needed: whether the engine cannot run without it.
        text: what it is good for, or what its absence means and what to do about it.
    """

    name: str
    ok: bool
    needed: bool
    text: str


def doctor() -> list[Finding]:
    """Probe this machine and return the findings, those that matter most first."""
    return [*_needed(traceable=can_ptrace()), *_improving()]


def requirements() -> list[Finding]:
    """Return the findings about what no run can do without.

    Without a tracer of this process, the start of a program tries ptrace.  With one, a child shows
    whether the tracer follows children, as ``strace -f`` does.
    """
    return _needed(traceable=not own_tracer() or can_ptrace())


def _needed(*, traceable: bool) -> list[Finding]:
    return [
        _platform(),
        _finding(
            "ptrace",
            traceable,
            needed=True,
            good="programs can be traced",
            bad="" if traceable else untraceable(),
        ),
        _finding(
            "seccomp",
            can_filter(),
            needed=True,
            good="system calls stop only where SGX needs it",
            bad="no seccomp filters: the kernel needs CONFIG_SECCOMP_FILTER",
        ),
        _finding(
            "/proc",
            can_use_proc(),
            needed=True,
            good="processes can be looked at",
            bad="/proc is missing or shows another process namespace: mount it "
            "(container: a process namespace and /proc that belong together)",
        ),
        _finding(
            "process_vm_readv",
            can_read_memory(),
            needed=True,
            good="memory of programs can be read and written",
            bad="process_vm_readv and process_vm_writev are missing or forbidden: the kernel needs "
            "CONFIG_CROSS_MEMORY_ATTACH, a container --cap-add=SYS_PTRACE",
        ),
        _finding(
            "memory files",
            can_make_memory_files(),
            needed=True,
            good="enclaves have memory that processes share",
            bad="memfd_create is forbidden, or the limit on file sizes is below 128 TiB: allow "
            "memfd_create (container: --security-opt seccomp=PROFILE that does), and raise the "
            "hard limit (ulimit -Hf unlimited)",
        ),
        _finding(
            "pidfd_getfd",
            can_getfd(),
            needed=True,
            good="descriptors can be taken over",
            bad="pidfd_getfd is missing (Linux before 5.6) or forbidden (container: "
            "--cap-add=SYS_PTRACE)",
        ),
    ]


def _improving() -> list[Finding]:
    """Return the findings about what a run is faster or more faithful with."""
    return [
        _finding(
            "compiled core",
            compiled.speedups is not None,
            needed=False,
            good="faults are served by C code",
            bad=f"{compiled.description}: faults take longer; {compiled.remedy}",
        ),
        _finding(
            "userfaultfd",
            can_userfaultfd(),
            needed=False,
            good="pager: userfaultfd",
            bad="not usable; pager: mprotect, about three times slower (container: "
            "--security-opt seccomp=unconfined, or a profile that allows userfaultfd)",
        ),
        _finding(
            "CPUID faulting",
            can_fault_cpuid(),
            needed=False,
            good="every CPUID is answered by the software machine",
            bad="this processor has none: CPUID is replaced in code as it is loaded; code made at "
            "run time sees the processor's own",
        ),
        _finding(
            "FSGSBASE",
            can_cross_unseen(),
            needed=False,
            good="threads enter and leave enclaves again without a stop",
            bad="this kernel (5.9 at least) or processor keeps WRFSBASE from programs, or lacks "
            "BMI2: each entry and exit of an enclave stops the thread, which makes calls slower",
        ),
        _finding(
            "sched_setaffinity",
            can_choose_processors(),
            needed=False,
            good="supervisor and a program of one thread share a processor",
            bad="not allowed: stops of a program of one thread cost about three times as much, "
            "and --cpus is not possible",
        ),
        _finding(
            "open files",
            descriptors() >= _DESCRIPTORS,
            needed=False,
            good=f"up to {descriptors()} descriptors",
            bad=f"at most {descriptors()} descriptors, and each process of a program costs three: "
            "raise the hard limit (ulimit -Hn)",
        ),
        _finding(
            "ENCLU",
            True,
            needed=False,
            good=_ENCLU_TEXT[enclu_signal()],
            bad="",
        ),
    ]


def choose_pager(*, recorded: bool = False) -> str:
    """Return the name of the pager to use here, for a run that is recorded or not."""
    return "userfaultfd" if can_userfaultfd(MINOR_FEATURES if recorded else 0) else "mprotect"


def untraceable() -> str:
    """Return why no child can be traced, and what to do about it."""
    tracer = own_tracer()
    if tracer:
        return (
            f"this process is already traced, by process {tracer} (softsgx run, gdb, strace …), "
            "and so are its children; a process has one tracer: start it outside"
        )
    return (
        "programs cannot be traced: allow ptrace (container: --cap-add=SYS_PTRACE, "
        "sysctl kernel.yama.ptrace_scope below 3)"
    )


def own_tracer() -> int:
    """Return the process that traces this one, 0 for none."""
    try:
        with open("/proc/self/status") as file:
            return int(next(line.split()[1] for line in file if line.startswith("TracerPid:")))
    except (OSError, StopIteration):
        return 0


@cache
def can_ptrace() -> bool:
    """Return whether a child can be seized."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            libc.end_with(supervisor)
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    try:
        libc.ptrace(abi.PTRACE_SEIZE, pid, 0, abi.PTRACE_O_EXITKILL)
    except OSError:
        return False
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return True


@cache
def can_filter() -> bool:
    """Return whether seccomp filters that stop for a tracer exist."""
    action = ctypes.c_uint32(abi.SECCOMP_RET_TRACE)
    return _works(lambda: libc.syscall(abi.SYS_SECCOMP, _ACTION_AVAIL, 0, ctypes.addressof(action)))


@cache
def can_use_proc() -> bool:
    """Return whether /proc is there and shows the processes as this one sees them."""

    def probe() -> None:
        own = os.getpid()
        if os.readlink("/proc/self") != str(own):
            raise ProcessLookupError
        os.close(os.open(f"/proc/{own}/mem", os.O_RDWR | os.O_CLOEXEC))

    return _works(probe)


@cache
def can_read_memory() -> bool:
    """Return whether memory can be copied from and to another process."""

    def probe() -> None:
        word = ctypes.c_uint64(1)
        data = libc.read_memory(os.getpid(), ctypes.addressof(word), 8)
        libc.write_memory(os.getpid(), ctypes.addressof(word), data)

    return _works(probe)


@cache
def can_make_memory_files() -> bool:
    """Return whether memory files can be made, as long as the address space."""
    longest = file_bytes()
    if longest is not None and longest < MEMORY_FILE_BYTES:
        return False
    return _works(lambda: os.close(os.memfd_create("softsgx", os.MFD_CLOEXEC)))


@cache
def can_choose_processors() -> bool:
    """Return whether a thread may choose among its processors."""
    return _works(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0)))


def descriptors() -> int:
    """Return how many descriptors this process may have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@cache
def can_getfd() -> bool:
    """Return whether a descriptor can be duplicated out of a process."""

    def probe() -> None:
        read, write = os.pipe()
        try:
            os.close(libc.take_descriptor(os.getpid(), read))
        finally:
            os.close(read)
            os.close(write)

    return _works(probe)


@cache
def can_userfaultfd(more_features: int = 0) -> bool:
    """Return whether userfaultfd offers what the pager needs, and more UFFD_FEATURE_* bits."""

    def probe() -> None:
        flags = abi.O_CLOEXEC | abi.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
        uffd = libc.syscall(abi.SYS_USERFAULTFD, flags)
        try:
            open_userfaultfd(uffd, more_features)
        finally:
            os.close(uffd)

    return _works(probe)


@cache
def can_fault_cpuid() -> bool:
    """Return whether CPUID can be made to fault.

    Where it cannot, the kernel also refuses to let it execute as it does.
    """

    def probe() -> None:
        executes = libc.syscall(abi.SYS_ARCH_PRCTL, abi.ARCH_GET_CPUID, 0)
        libc.syscall(abi.SYS_ARCH_PRCTL, abi.ARCH_SET_CPUID, executes)

    return _works(probe)


def can_answer_cpuid() -> bool:
    """Return whether programs may execute what ``vdso/cpuid_code.py`` does: RORX, PEXT (BMI2)."""
    return bool(host_cpuid()(7, 0)[1] >> 8 & 1)


def can_keep_flags() -> bool:
    """Return whether programs may execute LAHF, as ``vdso/state_code.py`` does."""
    return bool(host_cpuid()(0x8000_0001, 0)[2] & 1)


def can_load_components() -> bool:
    """Return whether programs may execute what ``vdso/moved_state.py`` does beside XRSTOR.

    That is PEXT (BMI2), and the instructions of AVX512F and AVX512BW, where XCR0 has their state.
    """
    words = host_cpuid()(7, 0)[1]
    return all(words >> bit & 1 for bit in (8, 16, 30))


def can_cross_unseen() -> bool:
    """Return whether programs may execute what ``vdso/permit_code.py`` does.

    That is WRFSBASE and WRGSBASE, RORX (BMI2), and LAHF in 64-bit mode.
    """
    rorx, fsgsbase = (
        host_cpuid()(7, 0)[1] >> 8 & 1,
        libc.hardware_capabilities() & abi.HWCAP2_FSGSBASE,
    )
    return bool(fsgsbase and rorx and can_keep_flags())


@cache
def enclu_signal() -> int:
    """Return the signal that ENCLU of a leaf outside an enclave raises here."""

    def child() -> None:
        signal.signal(signal.SIGILL, signal.SIG_DFL)
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=7)
        page.write(bytes.fromhex("b804000000 31db 0f01d7 c3"))
        ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

    return -_in_child(child)


_ENCLU_TEXT = {
    0: "executes: this system runs its own enclaves",
    -1: "did not trap: unexpected",
    signal.SIGILL: "traps as SIGILL (no SGX in this processor)",
    signal.SIGSEGV: "traps as SIGSEGV (SGX is on, but the system does not use it)",
}


def _platform() -> Finding:
    system = os.uname()
    ok = system.sysname == "Linux" and system.machine == "x86_64"
    return _finding(
        "platform",
        ok,
        needed=True,
        good=f"Linux {system.release} on x86-64",
        bad=f"{system.sysname} on {system.machine}: the native engine needs Linux on x86-64",
    )


def _finding(name: str, ok: bool, *, needed: bool, good: str, bad: str) -> Finding:
    return Finding(name, ok, needed, good if ok else bad)


def _works(probe: Callable[[], object]) -> bool:
    try:
        probe()
    except OSError:
        return False
    return True


def _in_child(run: Callable[[], object]) -> int:
    """Run it in a child; return its exit status, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            libc.set_dumpable(False)  # a signal is an answer here, not an accident
            run()
            status = 0
        finally:
            os._exit(status)
    _pid, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)
