"""Starts the program: a stopped child under ptrace, with its seccomp filter and our vDSO.

At each execve the supervisor replaces the vDSO, so that a lookup of ``__vdso_sgx_enter_enclave``
finds ours, and makes CPUID trap.

Source:
    ptrace(2), seccomp(2), getauxval(3); Linux fs/exec.c, arch/x86/kernel/process.c
    (``arch_setup_new_exec``: execve ends CPUID faulting).
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from array import array
from collections.abc import Mapping, Sequence
from errno import ENOENT, ENOEXEC
from functools import cache

from softsgx.engines.native import abi, libc
from softsgx.engines.native.doctor import untraceable
from softsgx.engines.native.limits import Limits, set_limits
from softsgx.engines.native.tracing.tracee import Gone, Thread
from softsgx.engines.native.tracing.waits import Waits, let_end
from softsgx.engines.native.vdso.elf import (
    HEADER_BYTES,
    Vdso,
    image_bytes,
    linker,
)
from softsgx.engines.native.x86.asm import Assembler
from softsgx.errors import NotRun, SoftSgxError

__all__ = ["EndedEarly", "install_vdso", "start_program"]

#: Exit statuses of a child that could not execute the program, as env(1) has them.
_NOT_FOUND, _NOT_EXECUTABLE, _NOT_PREPARED = 127, 126, 125


class EndedEarly(Exception):
    """A signal has ended the child before it executed the program.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def start_program(
    argv: Sequence[str],
    bpf: bytes,
    waits: Waits,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    cpus: set[int] | None = None,
    stdio: tuple[int, int, int] | None = None,
    limits: Limits | None = None,
    ends: bool = True,
) -> Thread:
    """Start ``argv`` traced, and return its first thread stopped at the end of its execve.

    Args:
        argv: program, looked up as execvp(3) does, and its arguments.
        bpf: the seccomp filter, an array of ``struct sock_filter``.
        waits: receives its stops.
        env: its environment; by default the supervisor's.
        cwd: its working directory; by default the supervisor's.
        cpus: the processors it may run on; by default the supervisor's.
        stdio: descriptors to be its standard input, output and error.
        limits: its resource limits, those that differ from the supervisor's.
        ends: whether its threads stop before they end.

    Raises:
        NotRun: there is no such program, or this machine forbids tracing.
        EndedEarly: a signal has ended the child.
    """
    failed_read, failed_write = os.pipe()
    supervisor = os.getpid()
    # A handler of this process that ran in the child would take a signal from the program.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    options = abi.TRACE_OPTIONS | (abi.PTRACE_O_TRACEEXIT if ends else 0)
    pid = os.fork()
    if pid == 0:
        _become(supervisor, argv, bpf, failed_write, env, cwd, cpus, stdio, limits)
    thread = Thread(pid, waits)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(failed_write)
        _pid, status = os.waitpid(pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            waits.keep(pid, status)
            raise Gone(pid)
        libc.ptrace(abi.PTRACE_SEIZE, pid, 0, options)
        os.kill(pid, signal.SIGCONT)
        _follow_to_exec(thread)
    except Gone:
        raise _why_it_ended(_end(thread), os.read(failed_read, 4096), argv[0]) from None
    except BaseException as error:
        os.kill(pid, signal.SIGKILL)
        _end(thread)
        if not isinstance(error, OSError):
            raise
        raise NotRun(f"ptrace: {untraceable()} ({error.strerror}); see softsgx doctor") from None
    finally:
        os.close(failed_read)
    return thread


def _end(thread: Thread) -> int:
    """Wait for the end of a child that ends; return its status."""
    while os.WIFSTOPPED(status := thread.waits.of(thread.tid)):
        let_end(thread.tid)
    return status


def _why_it_ended(status: int, report: bytes, program: str) -> Exception:
    """Return why a child did not execute the program, from its status and its report."""
    if os.WIFSIGNALED(status):
        return EndedEarly(os.WTERMSIG(status))
    reason = report.decode(errors="replace") or f"{program}: ended before it started"
    return NotRun(reason, os.WEXITSTATUS(status))


def _become(
    supervisor: int,
    argv: Sequence[str],
    bpf: bytes,
    report: int,
    env: Mapping[str, str] | None,
    cwd: str | None,
    cpus: set[int] | None,
    stdio: tuple[int, int, int] | None,
    limits: Limits | None,
) -> None:
    """In the child: wait for the tracer, then filter and execute; never returns."""
    program = argv[0] or repr(argv[0])
    status, what = _NOT_PREPARED, program
    try:
        libc.end_with(supervisor)  # until it is traced; then PTRACE_O_EXITKILL does that
        _reset_signals()
        for target, descriptor in enumerate(stdio or ()):
            os.dup2(descriptor, target)
        if cwd is not None:
            what = cwd
            os.chdir(cwd)
            what = program
        if cpus is not None:
            os.sched_setaffinity(0, cpus)
        set_limits(limits or {})
        os.kill(os.getpid(), signal.SIGSTOP)
        libc.end_with(None)
        _install_filter(bpf)
        status = _NOT_EXECUTABLE
        _execute(list(argv), dict(os.environ if env is None else env))
    except OSError as error:
        if error.errno == ENOENT and status == _NOT_EXECUTABLE:
            status = _NOT_FOUND
        os.write(report, f"{what}: {error.strerror or error}".encode())
    finally:
        os._exit(status)


def _execute(argv: list[str], env: dict[str, str]) -> None:
    """Execute a program as execvp(3) does: the shell runs a file that names no interpreter."""
    if not argv[0]:  # with PATH it would name a directory
        raise OSError(ENOENT, os.strerror(ENOENT))
    try:
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        if error.errno != ENOEXEC:
            raise
        os.execve("/bin/sh", ["/bin/sh", error.filename, *argv[1:]], env)


def _reset_signals() -> None:
    """Reset handlers to the default; signals ignored before Python started stay ignored."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())


class _Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("filter", ctypes.c_void_p)]


def _install_filter(bpf: bytes) -> None:
    buffer = ctypes.create_string_buffer(bpf, len(bpf))
    program = _Program(len(bpf) // 8, ctypes.addressof(buffer))
    # Without it only root may install a filter; with it set-user-ID programs gain no privileges.
    libc.syscall(157, abi.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.syscall(157, abi.PR_SET_SECCOMP, abi.SECCOMP_MODE_FILTER, ctypes.addressof(program), 0, 0)


def _follow_to_exec(thread: Thread) -> None:
    """Run a seized child to the end of its execve."""
    while True:
        stop = thread.wait(executes=True)
        if stop.event == abi.PTRACE_EVENT_EXEC:
            break
        # The stop it began with, signals, and the calls Python makes before execve.
        delivers = not stop.event and not stop.syscall
        thread.resume(stop.signal if delivers else 0)
    finish_exec(thread)


def finish_exec(thread: Thread) -> None:
    """Resume the thread from the execve event to the end of the call, which overwrites RAX."""
    libc.ptrace(abi.PTRACE_SYSCALL, thread.tid, 0, 0)
    while not thread.wait().syscall:
        libc.ptrace(abi.PTRACE_SYSCALL, thread.tid, 0, 0)


def install_vdso(
    thread: Thread, memory: int, *, cpuid_faults: bool = False
) -> tuple[int, Vdso, int]:
    """Map our vDSO into the image of a new program.

    Args:
        thread: stopped at the event of its execve or at the end of the call, which is over
            afterwards; its ``inject_at`` is set.
        memory: a descriptor of its ``/proc/PID/mem``, for reading and writing.
        cpuid_faults: whether to make its CPUID fault.

    Returns:
        The address of the vDSO, the vDSO, and the address of the dynamic loader, 0 without one.
    """
    regs = thread.load()
    auxiliary = _auxiliary_vector(memory, regs.rsp)
    slot, original = auxiliary.get(abi.AT_SYSINFO_EHDR, (0, 0))
    _place, loader = auxiliary.get(abi.AT_BASE, (0, 0))
    image = b""
    if original:
        size = image_bytes(os.pread(memory, HEADER_BYTES, original))
        image = os.pread(memory, size, original)
    link = linker(image)
    vdso = link.vdso

    # There is no other code yet, so the first calls run in the page of the entry point.
    regs.rax, page = 0, regs.rip & -abi.PAGE
    code = _first_calls(vdso.end)
    kept = os.pread(memory, len(code), page)
    os.pwrite(memory, code, page)
    base = thread.borrow(
        page + (0 if cpuid_faults else _MAPPING_AT),
        page + len(code),
        rdi=abi.ARCH_SET_CPUID,
        rsi=0,
        rdx=abi.PROT_READ | abi.PROT_EXEC,
        r10=abi.MAP_PRIVATE | abi.MAP_ANONYMOUS,
        r8=-1,
        r9=0,
    )
    os.pwrite(memory, kept, page)
    if base < 0:
        raise SoftSgxError(f"process {thread.tid}: no room for a vDSO ({os.strerror(-base)})")
    os.pwrite(memory, link.link(original), base)  # a tracer may write what the program may not
    thread.inject_at = base + vdso.inject
    if slot:
        os.pwrite(memory, struct.pack("<Q", base), slot)
    return base, vdso, loader


@cache
def _first_calls(bytes_mapped: int) -> bytes:
    """Return code that calls arch_prctl with the arguments in registers, and mmap after it.

    At ``_MAPPING_AT`` it begins with mmap, whose first two arguments the code itself sets.
    """
    asm = Assembler()
    asm.word("b8", abi.SYS_ARCH_PRCTL)  # mov eax, number
    asm.emit("0f 05")  # syscall
    asm.emit("31 ff")  # xor edi, edi
    asm.word("be", bytes_mapped)  # mov esi, length
    asm.word("b8", abi.SYS_MMAP)  # mov eax, number
    asm.emit("0f 05 cc")  # syscall; int3
    return asm.finish()


_MAPPING_AT = 7


def _auxiliary_vector(memory: int, stack: int) -> dict[int, tuple[int, int]]:
    """Return (address, value) of each entry of the vector on a fresh stack, by its kind."""
    words, size = array("Q"), _FIRST_STACK_BYTES
    while True:
        words.frombytes(_read_up_to(memory, stack + 8 * len(words), size))
        try:
            environment = words[0] + 2  # behind the number of arguments, these, and a zero
            vector = words.index(0, environment) + 1
            kinds, values = words[vector::2], words[vector + 1 :: 2]
            end = kinds.index(abi.AT_NULL)
        except (IndexError, ValueError):
            size *= 4
            continue
        place = stack + 8 * vector + 8  # of the first value
        places = range(place, place + 16 * end, 16)
        return dict(zip(kinds[:end], zip(places, values, strict=False), strict=False))


def _read_up_to(memory: int, address: int, size: int) -> bytes:
    """Return whole quadwords up to a distance, or as far as memory goes."""
    data = os.pread(memory, size, address)
    return data[: len(data) & -8]


_FIRST_STACK_BYTES = 4096
