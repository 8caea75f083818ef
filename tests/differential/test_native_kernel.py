"""Requests to the kernel have the same results by C and by Python.

Goal: what a stop or a fault asks of the kernel is the same with the compiled core and without it,
failures included.  Method: both forms do the same to real threads, memory files and userfaultfds;
where a request changes something, each form has its own.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from tests.support.native import needs_tracing

from softsgx import compiled
from softsgx.engines.native import abi, kernel, libc
from softsgx.engines.native.abi import SigInfo, UserRegs
from softsgx.engines.native.tracing.tracee import Gone, Thread
from softsgx.engines.native.tracing.waits import Waits

pytestmark = needs_tracing

FORMS = ["python"] if compiled.speedups is None else ["python", "c"]
NO_THREAD = 1 << 22  # above the largest process id
PAGE = abi.PAGE
_LAST_WORD = (1 << 64) - 1  # as an address, what C code returns for an error
SYS_GETPPID, SYS_PRCTL, PR_SET_NO_NEW_PRIVS = 110, 157, 38
WRITE_PROTECTED = 1 << 57  # in a word of pagemap
EVENT_REMOVE = 1 << 3


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def function(form: str, name: str) -> Callable[..., Any]:
    """Return a request in one of its forms."""
    found: Callable[..., Any] = getattr(
        kernel if form == "python" else compiled.speedups, f"_{name}" if form == "python" else name
    )
    return found


# --- threads --------------------------------------------------------------------------------------


@contextmanager
def tracee(also: Callable[[], object] = lambda: None) -> Iterator[int]:
    """Run a traced child that sends SIGUSR1 to itself for ever; it is at its first stop.

    After that it does ``also``.
    """
    pid = os.fork()
    if pid == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            os.kill(os.getpid(), signal.SIGUSR1)
            also()
    try:
        os.waitpid(pid, os.WUNTRACED)
        libc.ptrace(abi.PTRACE_SEIZE, pid, 0, abi.PTRACE_O_EXITKILL)
        os.kill(pid, signal.SIGCONT)
        while os.waitpid(pid, abi.WALL)[1] >> 8 != signal.SIGUSR1:
            libc.ptrace(abi.PTRACE_CONT, pid)
        yield pid
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            while os.WIFSTOPPED(os.waitpid(pid, abi.WALL)[1]):
                libc.raw_ptrace(abi.PTRACE_CONT, pid, 0, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_ptrace_requests(form: str) -> None:
    try_ptrace = function(form, "try_ptrace")
    regs, info, mask = UserRegs(), SigInfo(), ctypes.c_uint64()
    with tracee() as pid:
        assert try_ptrace(abi.PTRACE_GETREGS, pid, 0, ctypes.addressof(regs)) == 0
        libc.ptrace(abi.PTRACE_GETREGS, pid, 0, ctypes.addressof(other := UserRegs()))
        assert bytes(regs) == bytes(other) and regs.rip
        regs.r15 ^= 0x5A5A
        assert try_ptrace(abi.PTRACE_SETREGS, pid, 0, ctypes.addressof(regs)) == 0
        libc.ptrace(abi.PTRACE_GETREGS, pid, 0, ctypes.addressof(other))
        assert other.r15 == regs.r15
        assert try_ptrace(abi.PTRACE_GETSIGINFO, pid, 0, ctypes.addressof(info)) == 0
        assert info.signo == signal.SIGUSR1
        os.kill(pid, signal.SIGUSR2)
        peek, infos = (ctypes.c_uint64 * 2)(0, 1 | 8 << 32), (SigInfo * 8)()
        arguments = ctypes.addressof(peek), ctypes.addressof(infos)
        assert try_ptrace(abi.PTRACE_PEEKSIGINFO, pid, *arguments) == 1
        # 8 is the size of the mask; another one is refused, and so is memory that is not there.
        at = ctypes.addressof(mask)
        assert try_ptrace(abi.PTRACE_GETSIGMASK, pid, 4, at) == -errno.EINVAL
        assert try_ptrace(abi.PTRACE_GETREGS, pid, 0, 16) == -errno.EFAULT
        assert try_ptrace(abi.PTRACE_GETREGS, pid, 0, (1 << 64) - 8) == -errno.EFAULT
        assert try_ptrace(0x7777, pid, 0, 0) == -errno.EIO


def test_ptrace_of_a_thread_that_is_not_there(form: str) -> None:
    try_ptrace, regs = function(form, "try_ptrace"), UserRegs()
    at = ctypes.addressof(regs)
    assert try_ptrace(abi.PTRACE_GETREGS, NO_THREAD, 0, at) == -errno.ESRCH
    with tracee() as pid:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while try_ptrace(abi.PTRACE_CONT, pid, 0, 0) == 0 and time.monotonic() < deadline:
            pass
        assert try_ptrace(abi.PTRACE_CONT, pid, 0, 0) == -errno.ESRCH


def test_arguments_that_are_no_words_are_refused() -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    for wrong in ((1, 2, 3), (1, 2, 3, "4"), (1, 2, 3, 1 << 64), (1, 2, -3, 4)):
        with pytest.raises((TypeError, OverflowError)):
            compiled.speedups.try_ptrace(*wrong)
    arguments: Any
    for arguments in ((0,), (0, 1, 2), ("0", {}), (0, [])):
        with pytest.raises(TypeError):
            compiled.speedups.next_stop(*arguments)


def place_of(thread: Thread) -> dict[int, kernel.Place]:
    return {thread.tid: thread.place}


def test_a_stop_leads_to_the_same_registers_and_information(form: str) -> None:
    next_stop = function(form, "next_stop")
    with tracee() as pid:
        thread = Thread(pid, Waits())
        for _ in range(50):
            thread.resume(0)
            for at, content in (thread.place[0], thread.regs), (thread.place[1], SigInfo()):
                ctypes.memset(at, 0xAA, ctypes.sizeof(content))
            tid, status, fetched = next_stop(0, place_of(thread))
            assert (tid, status) == (pid, signal.SIGUSR1 << 8 | 0x7F)
            assert fetched == (3 if form == "c" else 0)
            thread.stopped(status, fetched)
            fresh = Thread(pid, thread.waits)
            assert bytes(thread.load()) == bytes(fresh.load())
            assert bytes(thread.siginfo()) == bytes(fresh.siginfo())
            assert thread.siginfo().signo == signal.SIGUSR1


def test_a_fault_on_a_file_is_reported_without_registers(form: str) -> None:
    next_stop, file = function(form, "next_stop"), os.memfd_create("short")
    os.ftruncate(file, PAGE)
    memory = mmap.mmap(file, PAGE)
    os.ftruncate(file, 0)
    code_at = ctypes.cast(ctypes.pythonapi.Py_IncRef, ctypes.c_void_p).value or 0
    for also, number, code, expected in (
        (lambda: memory[0], signal.SIGBUS, abi.BUS_ADRERR, 2),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), signal.SIGBUS, 0, 3),
        (lambda: ctypes.memset(code_at, 0, 1), signal.SIGSEGV, abi.SEGV_ACCERR, 3),  # also 2
    ):
        with tracee(also) as pid:
            thread = Thread(pid, Waits())
            thread.resume(0)
            _tid, status, fetched = next_stop(0, place_of(thread))
            thread.stopped(status, fetched)
            assert (status >> 8, fetched) == (number, expected if form == "c" else 0)
            assert thread.siginfo().code == code
            assert bytes(thread.load()) == bytes(Thread(pid, thread.waits).load())


def test_an_interrupt_fetches_nothing(form: str) -> None:
    """Its registers may change before the thread is looked at: a pending fault comes next."""
    next_stop = function(form, "next_stop")
    with tracee() as pid:
        thread = Thread(pid, Waits())
        thread.interrupt()
        thread.resume(0)
        tid, status, fetched = next_stop(0, place_of(thread))
        assert (tid, status >> 16, fetched) == (pid, abi.PTRACE_EVENT_STOP, 0)


def trace_getppid() -> None:
    """Install a filter by which getppid() stops a thread that is traced."""
    load, equal, answer = 0x20, 0x15, 6
    lines = [(load, 0, 0, 0), (equal, 0, 1, SYS_GETPPID), (answer, 0, 0, abi.SECCOMP_RET_TRACE)]
    lines.append((answer, 0, 0, abi.SECCOMP_RET_ALLOW))
    code = b"".join(struct.pack("<HBBI", *line) for line in lines)
    words = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(words)))
    libc.syscall(SYS_PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    at = ctypes.addressof(program)
    libc.syscall(SYS_PRCTL, abi.PR_SET_SECCOMP, abi.SECCOMP_MODE_FILTER, at, 0, 0)


def test_a_system_call_is_reported_with_registers_and_its_end_with_nothing(form: str) -> None:
    next_stop = function(form, "next_stop")
    begun: list[bool] = []

    def also() -> None:
        if not begun:
            trace_getppid()
            begun.append(True)
        os.getppid()

    with tracee(also) as pid:
        libc.ptrace(abi.PTRACE_SETOPTIONS, pid, 0, abi.TRACE_OPTIONS)
        thread = Thread(pid, Waits())
        thread.resume(0)
        _tid, status, fetched = next_stop(0, place_of(thread))
        assert (status >> 16, fetched) == (abi.PTRACE_EVENT_SECCOMP, 1 if form == "c" else 0)
        thread.stopped(status, fetched)
        assert thread.load().orig_rax == SYS_GETPPID
        assert bytes(thread.load()) == bytes(Thread(pid, thread.waits).load())
        thread.in_call = True
        thread.resume(0)
        _tid, status, fetched = next_stop(0, place_of(thread))
        assert (status >> 8, fetched) == (signal.SIGTRAP | 0x80, 0)


def test_a_thread_without_a_place_is_reported_alone(form: str) -> None:
    next_stop = function(form, "next_stop")
    with tracee() as pid:
        libc.ptrace(abi.PTRACE_CONT, pid)
        assert next_stop(0, {}) == (pid, signal.SIGUSR1 << 8 | 0x7F, 0)


def test_what_cannot_be_fetched_is_not_said_to_be() -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    with tracee() as pid:
        regs, info = UserRegs(), SigInfo()
        at, info_at, nowhere, last = ctypes.addressof(regs), ctypes.addressof(info), 16, _LAST_WORD
        for place, expected in (
            *(((at, nowhere), 1), ((nowhere, info_at), 2), ((nowhere, nowhere), 0)),
            *(((at, last), 1), ((last, info_at), 2)),
        ):
            libc.ptrace(abi.PTRACE_CONT, pid)
            fetched = compiled.speedups.next_stop(0, {pid: (*place, regs, info)})[2]
            assert fetched == expected


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ((), IndexError),
        ((16,), IndexError),
        (("16", 16), TypeError),
        ((16, None), TypeError),
        ((-1, 16), OverflowError),
        ((16, 1 << 64), OverflowError),
    ],
)
def test_a_place_that_is_none_is_refused(place: tuple[object, ...], error: type[Exception]) -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    with tracee() as pid:
        libc.ptrace(abi.PTRACE_CONT, pid)
        with pytest.raises(error):
            compiled.speedups.next_stop(0, {pid: place})
        libc.ptrace(abi.PTRACE_CONT, pid)
        assert compiled.speedups.next_stop(0, {})[0] == pid, "it is at its next stop"


def test_an_end_asks_for_nothing(form: str) -> None:
    def work() -> bool:
        child = os.fork()
        if child == 0:
            os._exit(signal.SIGBUS)  # the place of a stop's signal in its status
        no_place: Any = {child: ()}
        return bool(function(form, "next_stop")(0, no_place) == (child, signal.SIGBUS << 8, 0))

    alone(work)


def test_information_that_was_replaced_is_fetched_again(form: str) -> None:
    next_stop = function(form, "next_stop")
    with tracee() as pid:
        thread = Thread(pid, Waits())
        libc.ptrace(abi.PTRACE_CONT, pid)
        _tid, status, fetched = next_stop(0, place_of(thread))
        thread.stopped(status, fetched)
        other = SigInfo.from_buffer_copy(thread.siginfo())
        other.code = -77
        thread.set_siginfo(other)
        assert thread.siginfo().code == -77


def test_threads_that_are_killed_while_they_stop(form: str) -> None:
    """Each report is a stop or the end; what is fetched is right, or the thread is gone."""
    next_stop, gone = function(form, "next_stop"), 0
    for attempt in range(60):
        with tracee() as pid:
            thread = Thread(pid, Waits())
            thread.resume(0)
            for _ in range(attempt % 7 * 20):
                pass
            os.kill(pid, signal.SIGKILL)
            tid, status, fetched = next_stop(0, place_of(thread))
            assert tid == pid
            if not os.WIFSTOPPED(status):
                assert os.WTERMSIG(status) == signal.SIGKILL and not fetched
                gone += 1
                continue
            thread.stopped(status, fetched)
            try:
                assert thread.load().rip
                assert thread.siginfo().signo == signal.SIGUSR1
            except Gone:
                gone += 1
    assert gone, "no thread was killed in time"


def alone(work: Callable[[], bool]) -> None:
    """Run ``work`` in a process without children of its own; it must return ``True``."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


def test_without_a_child_there_is_nothing_to_wait_for(form: str) -> None:
    def work() -> bool:
        for options in (0, os.WNOHANG):
            try:
                function(form, "next_stop")(options, {})
            except ChildProcessError as error:
                if error.errno != errno.ECHILD:
                    return False
            else:
                return False
        return True

    alone(work)


@contextmanager
def blocked(*signals: int) -> Iterator[None]:
    """Block signals; those that no call has received are dropped at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        while signal.sigtimedwait(signals, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


ENDS = 1 << signal.SIGUSR2 - 1 | 1 << signal.SIGRTMAX - 1
LONG_NS = 60_000_000_000


@pytest.mark.parametrize("limit_ns", [0, LONG_NS])
def test_a_stop_comes_before_a_signal_and_a_time(form: str, limit_ns: int) -> None:
    within = function(form, "next_stop_within")

    def work() -> bool:
        with blocked(signal.SIGCHLD, signal.SIGUSR2), tracee() as pid:
            thread = Thread(pid, Waits())
            thread.resume(0)
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            os.kill(os.getpid(), signal.SIGUSR2)
            tid, status, fetched = within(limit_ns, ENDS, place_of(thread))
            expected = 0 if form == "python" else 3
            return (tid, status >> 8, fetched) == (pid, signal.SIGUSR1, expected)

    alone(work)


def test_a_wait_ends_with_a_stop(form: str) -> None:
    within = function(form, "next_stop_within")

    def work() -> bool:
        with blocked(signal.SIGCHLD), tracee() as pid:
            libc.ptrace(abi.PTRACE_CONT, pid)
            return bool(within(LONG_NS, 0, {})[:2] == (pid, signal.SIGUSR1 << 8 | 0x7F))

    alone(work)


@contextmanager
def child_that_waits() -> Iterator[None]:
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(1)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGRTMAX])
def test_a_wait_ends_with_a_signal(form: str, number: int) -> None:
    within = function(form, "next_stop_within")

    def work() -> bool:
        with blocked(signal.SIGCHLD, number), child_that_waits():
            os.kill(os.getpid(), number)
            looks = within(0, ENDS, {}) == (0, 0, 0)
            return bool(looks and within(LONG_NS, ENDS, {}) == (0, number, 0))

    alone(work)


def test_a_wait_ends_in_time_whatever_child_has_ended_before(form: str) -> None:
    within = function(form, "next_stop_within")

    def work() -> bool:
        with blocked(signal.SIGCHLD), child_that_waits():
            os.kill(os.getpid(), signal.SIGCHLD)
            begun_ns = time.monotonic_ns()
            ended = within(2_000_000, ENDS, {}) == (0, 0, 0)
            received = signal.sigtimedwait({signal.SIGCHLD}, 0) is None
            return ended and received and time.monotonic_ns() - begun_ns >= 2_000_000

    alone(work)


def test_handlers_run_while_it_waits(form: str) -> None:
    within = function(form, "next_stop_within")

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise InterruptedError

    def work() -> bool:
        signal.signal(signal.SIGALRM, handler)
        with blocked(signal.SIGCHLD), child_that_waits():
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            try:
                within(LONG_NS, ENDS, {})
            except InterruptedError:
                return True
        return False

    alone(work)


def test_a_handler_that_takes_longer_than_the_wait_is_no_signal_that_ends_it(form: str) -> None:
    within = function(form, "next_stop_within")
    handled: list[int] = []

    def handler(number: int, _frame: FrameType | None) -> None:
        handled.append(number)
        time.sleep(0.005)

    def work() -> bool:
        signal.signal(signal.SIGALRM, handler)
        with blocked(signal.SIGCHLD), child_that_waits():
            for _ in range(20):
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                if within(4_000_000, ENDS, {}) != (0, 0, 0):
                    return False
        return len(handled) == 20

    alone(work)


def test_a_wait_without_a_child(form: str) -> None:
    def work() -> bool:
        with suppress(ChildProcessError):
            function(form, "next_stop_within")(LONG_NS, 0, {})
            return False
        return True

    alone(work)


@pytest.mark.parametrize("arguments", [(), (0, 0), (0, 0, ()), ("", 0, {}), (0, -1, {})])
def test_a_wait_refuses_other_arguments(arguments: tuple[Any, ...]) -> None:
    if compiled.speedups is None:
        pytest.skip(compiled.description)
    with pytest.raises((TypeError, OverflowError)):
        compiled.speedups.next_stop_within(*arguments)


def test_a_look_without_a_wait(form: str) -> None:
    def work() -> bool:
        child = os.fork()
        if child == 0:
            signal.pause()
        if function(form, "next_stop")(os.WNOHANG, {}) != (0, 0, 0):
            return False
        os.kill(child, signal.SIGKILL)
        return bool(function(form, "next_stop")(0, {}) == (child, signal.SIGKILL, 0))

    alone(work)


def test_children_that_send_no_signal_at_their_end_are_reaped(form: str) -> None:
    def work() -> bool:
        child: int = libc.syscall(abi.SYS_CLONE, 0, 0, 0, 0, 0)
        if not child:
            os._exit(7)
        return bool(function(form, "next_stop")(0, {}) == (child, 7 << 8, 0))

    alone(work)


class Alarm(Exception):
    pass


@contextmanager
def alarm(raises: bool) -> Iterator[list[int]]:
    """Let SIGALRM interrupt system calls, and raise or not."""
    came: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        if raises:
            raise Alarm

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        yield came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_handlers_of_signals_run_during_a_wait(form: str) -> None:
    next_stop = function(form, "next_stop")
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    with alarm(raises=True), pytest.raises(Alarm):
        next_stop(0, {})
    with alarm(raises=False) as came:
        timer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
        timer.start()  # it also shows that other threads run during the wait
        assert next_stop(0, {}) == (child, signal.SIGKILL, 0)
        timer.join()
    assert len(came) >= 2


@contextmanager
def faults() -> Iterator[tuple[select.epoll, int, Callable[[], None]]]:
    """What is waited on: epoll, the descriptor of signals; and a function that sends a fault.

    The descriptor of faults is always ready, whether there is one to read or not.
    """
    ours, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    signals, idle = os.pipe2(os.O_NONBLOCK)
    ours.setblocking(False)
    with ours, others, select.epoll() as epoll:
        epoll.register(signals, select.EPOLLIN)

        def send() -> None:
            others.send(struct.pack("<B7xQQI4x", 0x12, 5, 7 * PAGE, 4711))

        def begin() -> None:
            epoll.register(ours, select.EPOLLIN | select.EPOLLOUT)
            threading.Timer(0.2, send).start()

        yield epoll, signals, begin
    os.close(signals)
    os.close(idle)


def test_an_event_that_its_thread_has_taken_back_is_waited_on_again(form: str) -> None:
    with faults() as (epoll, signals, begin):
        begin()
        assert function(form, "next_fault")(epoll, signals, 10_000, -1)[1:] == (4711, 7 * PAGE, 5)


def test_a_wait_for_faults_has_an_end(form: str) -> None:
    with faults() as (epoll, signals, _begin):
        for limit_ms in (0, 20):
            assert function(form, "next_fault")(epoll, signals, limit_ms, -1) is None


def test_handlers_of_signals_run_during_a_wait_for_faults(form: str) -> None:
    next_fault = function(form, "next_fault")
    with faults() as (epoll, signals, begin):
        with alarm(raises=True), pytest.raises(Alarm):
            next_fault(epoll, signals, 10_000, -1)
        with alarm(raises=False) as came:
            threading.Timer(0.2, begin).start()  # until then nothing is ready
            assert next_fault(epoll, signals, 10_000, -1)[1:] == (4711, 7 * PAGE, 5)
    assert came


# --- pages ----------------------------------------------------------------------------------------


class Range:
    """Shared memory with a userfaultfd, and what its page table says."""

    PAGES = 16

    def __init__(self, features: int = 0) -> None:
        self.file = os.memfd_create("range")
        os.ftruncate(self.file, self.PAGES * PAGE)
        self.memory = mmap.mmap(self.file, self.PAGES * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        flags = abi.O_CLOEXEC | abi.UFFD_USER_MODE_ONLY
        self.uffd = libc.syscall(abi.SYS_USERFAULTFD, flags)
        features |= abi.UFFD_FEATURE_MISSING_SHMEM | abi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        libc.ioctl(self.uffd, abi.UFFDIO_API, (ctypes.c_uint64 * 3)(abi.UFFD_API, features))
        mode = abi.UFFDIO_REGISTER_MODE_MISSING | abi.UFFDIO_REGISTER_MODE_WP
        request = (ctypes.c_uint64 * 4)(self.start, self.PAGES * PAGE, mode)
        libc.ioctl(self.uffd, abi.UFFDIO_REGISTER, request)

    def at(self, page: int) -> int:
        return self.start + page * PAGE

    def protected(self) -> list[bool]:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            words = os.pread(pagemap.fileno(), 8 * self.PAGES, self.start // PAGE * 8)
        flags = memoryview(words).cast("Q")
        return [bool(word & WRITE_PROTECTED) for word in flags]

    def present(self) -> list[bytes]:
        return [
            data
            for page in range(self.PAGES)
            if (data := os.pread(self.file, PAGE, page * PAGE)).strip(b"\0")
        ]


@pytest.fixture
def memory() -> Range:
    try:
        return Range()
    except OSError as error:
        pytest.skip(f"userfaultfd: {error.strerror}")


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_page_is_copied_with_its_entry(
    form: str, memory: Range, kind: Callable[[bytes], Any]
) -> None:
    copy_page = function(form, "copy_page")
    one, two = random.Random(1).randbytes(PAGE), random.Random(2).randbytes(PAGE)
    assert copy_page(memory.uffd, memory.at(3), 0, kind(one)) == 0
    assert copy_page(memory.uffd, memory.at(5), abi.UFFDIO_COPY_MODE_WP, kind(two)) == 0
    assert memory.present() == [one, two]
    assert [page for page, on in enumerate(memory.protected()) if on] == [5]
    assert copy_page(memory.uffd, memory.at(3), 0, kind(two)) == errno.EEXIST
    assert memory.present() == [one, two]


def test_pages_that_cannot_be_copied(form: str, memory: Range) -> None:
    copy_page, data = function(form, "copy_page"), bytes(PAGE)
    assert copy_page(memory.uffd, memory.at(0) + 1, 0, data) == errno.EINVAL
    assert copy_page(memory.uffd, memory.at(0), 1 << 40, data) == errno.EINVAL
    assert copy_page(memory.uffd, memory.at(-(1 << 20)), 0, data) == errno.ENOENT
    assert copy_page(memory.file, memory.at(0), 0, data) == errno.ENOTTY
    for wrong in (b"", bytes(PAGE - 1), bytes(PAGE + 1)):
        with pytest.raises(ValueError, match=r"."):
            copy_page(memory.uffd, memory.at(0), 0, wrong)
    with pytest.raises(TypeError):
        copy_page(memory.uffd, memory.at(0), 0, "text")
    assert not memory.present()


def test_pages_are_protected_and_freed(form: str, memory: Range) -> None:
    protect_pages = function(form, "protect_pages")
    on = abi.UFFDIO_WRITEPROTECT_MODE_WP
    for page in range(8):
        assert kernel.copy_page(memory.uffd, memory.at(page), 0, b"x" * PAGE) == 0
    assert protect_pages(memory.uffd, memory.at(2), memory.at(6), on) == 0
    assert protect_pages(memory.uffd, memory.at(4), memory.at(5), 0) == 0
    assert [page for page, yes in enumerate(memory.protected()) if yes] == [2, 3, 5]
    outside = memory.at(-(1 << 20))
    assert protect_pages(memory.uffd, outside, outside + PAGE, on) == errno.ENOENT
    assert protect_pages(memory.uffd, memory.at(1), memory.at(1), on) == errno.EINVAL
    assert protect_pages(memory.uffd, memory.at(0), memory.at(1), 1 << 9) == errno.EINVAL


@pytest.mark.parametrize("request_name", ["copy_page", "protect_pages"])
def test_a_request_is_repeated_while_mappings_change(form: str, request_name: str) -> None:
    """A thread in madvise waits for its event to be read; until then requests fail by EAGAIN."""
    try:
        memory = Range(EVENT_REMOVE)
    except OSError as error:
        pytest.skip(f"userfaultfd: {error.strerror}")
    libc_madvise = ctypes.CDLL(None).madvise
    libc_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    arguments = memory.at(8), PAGE, mmap.MADV_DONTNEED
    changing = threading.Thread(target=libc_madvise, args=arguments)
    reading = threading.Timer(0.4, os.read, (memory.uffd, 32))
    function_ = function(form, request_name)
    words = (0, b"y" * PAGE) if request_name == "copy_page" else (memory.at(1), 0)
    changing.start()
    time.sleep(0.1)  # it waits now
    try:
        with alarm(raises=True), pytest.raises(Alarm):
            function_(memory.uffd, memory.at(0), *words)
        reading.start()
        began = time.monotonic()
        assert function_(memory.uffd, memory.at(0), *words) == 0
        assert time.monotonic() - began > 0.2
    finally:
        if not reading.ident:
            reading.start()
        changing.join()
        reading.join()


def test_pages_leave_a_file(form: str) -> None:
    take_pages, chance = function(form, "take_pages"), random.Random(7)
    pages = 300
    for _ in range(20):
        file = os.memfd_create("pages")
        data = {page: chance.randbytes(PAGE) for page in chance.sample(range(pages), 250)}
        os.ftruncate(file, pages * PAGE)
        for page, content in data.items():
            os.pwrite(file, content, page * PAGE)
        ends = sorted(chance.sample(range(pages + 1), 2 * chance.randrange(1, 6)))
        if chance.random() < 0.2:
            ends = [0, pages]
        runs = [
            (start * PAGE, end * PAGE) for start, end in zip(ends[::2], ends[1::2], strict=True)
        ]
        taken = [page for start, end in runs for page in range(start // PAGE, end // PAGE)]
        assert take_pages(file, runs) == [data.get(page, bytes(PAGE)) for page in taken]
        left = {page: content for page, content in data.items() if page not in taken}
        assert os.fstat(file).st_blocks == len(left) * PAGE // 512
        assert all(os.pread(file, PAGE, page * PAGE) == data for page, data in left.items())
        os.close(file)
    assert take_pages(-1, []) == []


def test_files_that_pages_cannot_leave(form: str) -> None:
    take_pages, file = function(form, "take_pages"), os.memfd_create("short")
    os.ftruncate(file, 2 * PAGE)
    cases = [
        (-1, [(0, PAGE)], errno.EBADF),
        (file, [(PAGE, 3 * PAGE)], errno.EIO),  # ends before
        (file, [(0, 0)], errno.EINVAL),
        (os.open(f"/proc/self/fd/{file}", os.O_RDONLY), [(0, PAGE)], errno.EBADF),
    ]
    for descriptor, runs, number in cases:
        with pytest.raises(OSError, match=r".") as failed:
            take_pages(descriptor, runs)
        assert failed.value.errno == number
    for wrong in ([0], 5):
        with pytest.raises(TypeError):
            take_pages(file, wrong)


def test_c_forms_keep_no_reference() -> None:
    core = compiled.speedups
    if core is None:
        pytest.skip(compiled.description)
    file, data = os.memfd_create("pages"), bytes(PAGE)
    os.ftruncate(file, 128 * PAGE)
    runs: list[Any] = [(0, 100 * PAGE), (110 * PAGE, 112 * PAGE)]

    def once() -> None:
        core.try_ptrace(abi.PTRACE_GETREGS, NO_THREAD, 0, 0)
        core.copy_page(file, 0, 0, data)
        core.protect_pages(file, 0, PAGE, 1)
        core.take_pages(file, runs)
        for arguments in ((file, [(0, 1 << 40)]), (file, [(0,)]), (-1, runs), (file, None)):
            with suppress(OSError, TypeError):
                core.take_pages(*arguments)
        for wrong in (b"", "text"):
            with suppress(ValueError, TypeError):
                core.copy_page(file, 0, 0, wrong)

    for _ in range(10):
        once()
    before = sys.getallocatedblocks(), sys.getrefcount(data), sys.getrefcount(runs)
    for _ in range(1000):
        once()
    blocks, *references = sys.getallocatedblocks(), sys.getrefcount(data), sys.getrefcount(runs)
    assert references == list(before[1:])
    assert blocks - before[0] < 100
