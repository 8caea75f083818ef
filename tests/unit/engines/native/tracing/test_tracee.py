"""A traced program is itself again after whatever was done in its name."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Iterator

import pytest
from tests.support.native import needs_tracing
from tests.support.tracees import end_tracee

from softsgx.engines.native import abi, libc
from softsgx.engines.native.tracing.bpf import build_filter
from softsgx.engines.native.tracing.start import install_vdso, start_program
from softsgx.engines.native.tracing.tracee import Gone, Stop, Thread
from softsgx.engines.native.tracing.waits import Waits
from softsgx.engines.native.vdso.code import pack_calls
from softsgx.engines.native.vdso.elf import build_vdso

_TGKILL, _RT_TGSIGQUEUEINFO = 234, 297

pytestmark = needs_tracing


@pytest.fixture
def thread() -> Iterator[Thread]:
    started = start_program(["/bin/sh", "-c", "exit 7"], build_filter(), Waits())
    memory = os.open(f"/proc/{started.tid}/mem", os.O_RDWR)
    install_vdso(started, memory)
    os.close(memory)
    yield started
    end_tracee(started.tid)


def finish(thread: Thread) -> int:
    """Let it run to its end; return its exit status."""
    thread.resume()
    while True:
        try:
            stop = thread.wait()
        except Gone:
            return os.waitstatus_to_exitcode(thread.waits.of(thread.tid))
        thread.resume(0 if stop.event or stop.syscall else stop.signal)


def test_an_injected_call_is_made_in_the_programs_name(thread: Thread) -> None:
    assert thread.syscall(abi.SYS_GETPID) == thread.tid
    assert thread.syscall(abi.SYS_CLOSE, 12345) == -9  # EBADF
    assert finish(thread) == 7


def test_registers_and_signal_mask_survive_injected_calls(thread: Thread) -> None:
    thread.load()
    before, mask = bytes(thread.regs), thread.sigmask()
    xstate = thread.xstate()
    for number in range(20):
        thread.syscall(abi.SYS_MADVISE, number, number)
    thread.flush()
    fresh = Thread(thread.tid, thread.waits)
    assert bytes(fresh.load()) == before
    assert fresh.sigmask() == mask
    # But for XSTATE_BV: whether an all-zero component counts as unused is for the processor to say.
    assert _without_bitmap(fresh.xstate()) == _without_bitmap(xstate)


def _without_bitmap(area: bytes) -> bytes:
    return area[:512] + area[520:]


def test_changes_of_registers_are_kept_across_injected_calls(thread: Thread) -> None:
    thread.load()
    thread.regs.r15 = 0x1234
    thread.store()
    thread.syscall(abi.SYS_GETPID)
    assert thread.regs.r15 == 0x1234
    thread.flush()
    assert Thread(thread.tid, thread.waits).load().r15 == 0x1234


def test_a_signal_that_comes_during_an_injected_call_is_delivered_afterwards(
    thread: Thread,
) -> None:
    os.kill(thread.tid, signal.SIGTERM)
    assert thread.syscall(abi.SYS_GETPID) == thread.tid
    assert finish(thread) == -signal.SIGTERM


def test_a_signal_that_waits_is_seen(thread: Thread) -> None:
    assert thread.waiting_signals() == []
    os.kill(thread.tid, signal.SIGUSR1)
    libc.syscall(_TGKILL, thread.tid, thread.tid, signal.SIGTERM)
    assert sorted(thread.waiting_signals()) == [signal.SIGUSR1, signal.SIGTERM]


def test_signal_information_of_a_stop_survives_an_injected_call(thread: Thread) -> None:
    os.kill(thread.tid, signal.SIGTERM)
    thread.resume()
    assert thread.wait().signal == signal.SIGTERM
    thread.syscall(abi.SYS_GETPID)
    assert (thread.siginfo().signo, thread.siginfo().code) == (signal.SIGTERM, 0)
    thread.resume(signal.SIGTERM)
    with pytest.raises(Gone):
        thread.wait()
    assert thread.waits.of(thread.tid) == signal.SIGTERM


def test_a_call_can_be_skipped_or_made_in_place_of_another(thread: Thread) -> None:
    seen: list[int] = []
    thread.resume()
    while len(seen) < 2:
        stop = thread.wait()
        if stop.event != abi.PTRACE_EVENT_SECCOMP:
            thread.resume()
            continue
        regs = thread.load()
        arguments = regs.rdi, regs.rsi, regs.rdx
        if not seen:
            thread.skip_syscall(-38)
            seen.append(-38)
        else:
            seen.append(thread.finish_syscall(abi.SYS_GETPID, 1, 2, 3))
            assert (regs.rdi, regs.rsi, regs.rdx) == arguments
        thread.resume()
    assert seen == [-38, thread.tid]


def test_a_thread_is_not_borrowed_while_its_own_call_is_to_be_made(thread: Thread) -> None:
    while True:
        thread.resume()
        if thread.wait().event == abi.PTRACE_EVENT_SECCOMP:
            break
    assert not thread.borrowable
    thread.skip_syscall(-2)
    assert thread.borrowable
    os.kill(thread.tid, signal.SIGTERM)
    thread.resume()
    assert thread.wait().signal == signal.SIGTERM
    assert thread.borrowable


def test_a_table_of_calls_is_made_in_one_stop(thread: Thread) -> None:
    memory = os.open(f"/proc/{thread.tid}/mem", os.O_RDWR)
    vdso = build_vdso({})
    base = thread.inject_at - vdso.inject  # where the fixture has put it
    before = bytes(thread.load())
    calls = [(abi.SYS_DUP2, 0, 40), (abi.SYS_FCNTL, 0, abi.F_DUPFD, 41), (abi.SYS_CLOSE, 40)]
    os.pwrite(memory, pack_calls(calls), base + vdso.table)
    os.close(memory)
    thread.borrow(base + vdso.calls, base + vdso.called, rbx=base + vdso.table, rbp=len(calls))
    assert {"40", "41"} & set(os.listdir(f"/proc/{thread.tid}/fd")) == {"41"}
    assert bytes(thread.regs) == before
    assert finish(thread) == 7


def test_calls_of_a_table_have_a_mark_unless_they_have_six_arguments() -> None:
    assert unpack_words(pack_calls([(1, -1), (9, 1, 2, 3, 4, 5, 6)])) == (
        *(1, (1 << 64) - 1, 0, 0, 0, 0, abi.OUR_CALL),
        *(9, 1, 2, 3, 4, 5, 6),
    )


def unpack_words(data: bytes) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}Q", data)


def test_a_thread_that_is_killed_is_gone(thread: Thread) -> None:
    os.kill(thread.tid, signal.SIGKILL)
    with pytest.raises(Gone):
        thread.wait()


def test_memory_beyond_a_process_is_a_bad_address() -> None:
    page = ctypes.create_string_buffer(b"abc")
    assert libc.read_memory(os.getpid(), ctypes.addressof(page), 3) == b"abc"
    with pytest.raises(OSError, match="cannot read") as error:
        libc.read_memory(os.getpid(), 8, 16)
    assert error.value.errno == 14


def test_a_restarted_call_is_made_again_with_or_without_a_signal(thread: Thread) -> None:
    for sent in ((), (signal.SIGCHLD,), ()):
        thread.resume()
        while thread.wait().event != abi.PTRACE_EVENT_SECCOMP:
            thread.resume()
        before = bytes(thread.load())
        for number in sent:
            os.kill(thread.tid, number)
        thread.restart_syscall()
        thread.resume()
        while (stop := thread.wait()).event != abi.PTRACE_EVENT_SECCOMP:
            thread.resume(0 if stop.event or stop.syscall else stop.signal)
        assert bytes(thread.load()) == before
    assert finish(thread) == 7


@pytest.mark.parametrize("number", [signal.SIGILL, signal.SIGTRAP])
def test_the_stop_of_a_fault_is_not_hidden_by_an_interrupt(thread: Thread, number: int) -> None:
    stop = interrupted_at_a_fault(thread, number)
    assert stop.event == abi.PTRACE_EVENT_STOP
    rip = thread.load().rip
    stop = thread.behind(stop)
    assert (stop.event, stop.signal) == (0, number)
    assert (thread.siginfo().code, thread.load().rip) == (1, rip)
    assert not thread.fault_waits()


def test_a_signal_that_a_process_sends_is_no_fault(thread: Thread) -> None:
    os.kill(thread.tid, signal.SIGSEGV)
    thread.interrupt()
    thread.resume()
    stop = thread.wait()
    assert not thread.fault_waits()
    assert thread.behind(stop) is stop
    assert finish(thread) == -signal.SIGSEGV


def interrupted_at_a_fault(thread: Thread, number: int) -> Stop:
    """Let a signal of code 1, as the kernel sends for faults, and an interrupt come at once."""
    thread.resume()
    while thread.wait().event != abi.PTRACE_EVENT_SECCOMP:
        thread.resume()
    at = thread.load().rsp - 512
    libc.write_memory(thread.tid, at, bytes(abi.SigInfo(signo=number, code=1)))
    # No other process may send such a signal, so it is sent in place of the program's own call.
    assert thread.finish_syscall(_RT_TGSIGQUEUEINFO, thread.tid, thread.tid, number, at) == 0
    thread.interrupt()
    thread.resume()
    return thread.wait()
