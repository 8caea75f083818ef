"""Forbidden actions of an enclave, and forbidden accesses to it, end as on hardware.

Goal: abort-page semantics of strict runs, and illegal instructions, seen by the program itself.
Method: ``programs/limits.c`` tries each thing with an EPC smaller than its enclave.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from signal import SIGUSR1

import pytest
from tests.e2e.native.enclave import COMPILER, ILLEGAL, TIME, NativeBuilds, write_enclave
from tests.support.native import USABLE_PAGERS, needs_no_strict_mode, needs_tracing

from softsgx.engines.native import abi, libc, run
from softsgx.engines.native.faults import exits, extended
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.out_of_line import OutOfLine
from softsgx.engines.native.x86.state import StateInsn
from softsgx.hw import LogicalProcessor, aex

DATA_PAGES = 20
EPC_PAGES = 28
BITS_64 = (1 << 64) - 1

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("limits"), builds.enclave(DATA_PAGES)]


def exit_code(program: list[str], *arguments: str, strict: bool, pager: str | None = None) -> int:
    argv = [*program, *arguments]
    return run(argv, epc=EPC_PAGES * 4096, strict=strict, pager=pager).exit_code


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("scenario", ["ones", "neighbours", "children"])
def test_in_strict_runs_threads_outside_read_ones_and_store_nothing(
    program: list[str], scenario: str, pager: str
) -> None:
    assert exit_code(program, scenario, strict=True, pager=pager) == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_an_entry_of_a_strict_run_changes_the_rights_of_few_mappings_however_many_there_are(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pager: str
) -> None:
    made = []
    inject = ProcessImage._make

    def counted(image: ProcessImage, thread: ProgramThread, calls: list[tuple[int, ...]]) -> None:
        made.extend(calls)
        inject(image, thread, calls)

    monkeypatch.setattr(ProcessImage, "_make", counted)
    pages, calls = 60, 100
    enclave = write_enclave(tmp_path / "enclave", pages)
    argv = [program[0], str(enclave), "patchwork", str(calls)]
    assert run(argv, epc="1MiB", strict=True, pager=pager).exit_code == 0
    crossings = 3 * calls + 7 * pages  # at least: put, get and load, and the sweeps over all pages
    assert len(made) < pages // 2 * crossings


@pytest.mark.slow
@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_in_strict_runs_a_thread_outside_sees_nothing_of_those_inside(
    program: list[str], pager: str
) -> None:
    assert exit_code(program, "spies", strict=True, pager=pager) == 0


@needs_no_strict_mode
def test_by_default_only_pages_that_enclave_code_cannot_use_read_as_ones(
    program: list[str],
) -> None:
    assert exit_code(program, "fast", strict=False) == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_instruction_is_ud_inside(program: list[str], name: str, strict: bool) -> None:
    number, length = list(ILLEGAL).index(name), len(bytes.fromhex(ILLEGAL[name]))
    assert exit_code(program, "illegal", str(100 * number + length), strict=strict) == 0


@pytest.mark.parametrize("name", TIME)
def test_the_time_stamp_counter_is_read_inside_with_sgx2_only(
    program: list[str], name: str
) -> None:
    number, length = list(TIME).index(name), len(bytes.fromhex(TIME[name]))
    illegal = [*program, "illegal", str(100 * (len(ILLEGAL) + number) + length)]
    assert run(illegal, epc=EPC_PAGES * 4096, profile="sgx1-client").exit_code == 0
    assert exit_code(program, "ticks", str(number), strict=False) == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("by", ["the thread", "the model"])
@pytest.mark.parametrize("strict", [False, True])
def test_xcr0_is_xfrm_inside(
    program: list[str], pager: str, by: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[bool] = []

    def out_of_line(thread: ProgramThread, insn: StateInsn) -> OutOfLine | None:
        how = thread_does(thread, insn) if by == "the thread" else None
        done.append(how is not None)
        return how

    thread_does = extended.out_of_line
    monkeypatch.setattr(extended, "out_of_line", out_of_line)
    assert exit_code(program, "state", strict=strict, pager=pager) == 0
    # XGETBV, and headers with more than XFRM has, are the model's in any case.
    assert any(done) == (by == "the thread") and not all(done)


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_thread_stopped_out_of_line_is_at_its_instruction_or_after_it(
    program: list[str], pager: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signals, kicks and interrupts come between any two instructions of the copy's slot."""
    random, resume = Random(7), ProgramThread.resume
    places: dict[str, set[int]] = {"signal": set(), "kick": set(), "interrupt": set()}
    sites: dict[int, tuple[int, int]] = {}
    exits_seen: list[int] = []

    def disturbed(thread: ProgramThread, signal: int = 0) -> None:
        how = thread._next
        if how is None or signal:
            resume(thread, signal)
            return
        sites[thread.cpu.index] = how.rip, how.then
        thread.flush()
        steps, event = random.randrange(7), random.choice(list(places))
        for _step in range(steps):
            libc.ptrace(abi.PTRACE_SINGLESTEP, thread.tid, 0, 0)
            thread.waits.of(thread.tid)
        places[event].add(steps)
        resume(thread, signal)
        if event == "signal":
            os.kill(thread.tid, SIGUSR1)
        elif event == "interrupt":
            thread.interrupt()
        else:
            thread.running = True
            thread.image.page_table.kick_all()

    def checked(cpu: LogicalProcessor, vector: int, code: int = 0, address: int = 0) -> None:
        regs, (rip, then) = cpu.regs, sites.get(cpu.index, (0, 0))
        if regs.rip in (rip, then):
            exits_seen.append(regs.rip - rip)
            assert (regs.rax, regs.rdx) == (BITS_64, BITS_64)
        inside = cpu.inside
        assert inside is not None and inside.enclave.covers(regs.rip)
        aex(cpu, vector, code, address)

    monkeypatch.setattr(ProgramThread, "resume", disturbed)
    monkeypatch.setattr(exits, "aex", checked)
    monkeypatch.setattr(exits, "try_virtual_exit", lambda _cpu: False)  # kicks are real exits
    assert exit_code(program, "states", "120", strict=strict, pager=pager) == 0
    assert all(found == set(range(7)) for found in places.values())
    assert set(exits_seen) == {0, 4}


def test_vector_registers_go_to_the_ssa_and_come_back(program: list[str]) -> None:
    assert exit_code(program, "vector", strict=False) == 0


@pytest.mark.parametrize("backing", ["memory", "file"])
def test_without_room_for_its_pages_an_enclave_gets_sigbus_and_others_go_on(
    program: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, backing: str
) -> None:
    enclave = write_enclave(tmp_path / "enclave", 60)
    result = run(
        [program[0], str(enclave), "drowns"],
        epc=32 * 4096,
        backing=backing,
        backing_limit=72 * 4096,
    )
    assert result.exit_code == 0
    (message,) = caplog.messages
    assert "SIGBUS at 0x" in message and "backing" in message
    assert set(result.counters["held"].values()) == {0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [False, True])
def test_a_system_call_is_made_once_in_spite_of_stops_during_it(
    program: list[str], strict: bool
) -> None:
    assert exit_code(program, "calls", strict=strict) == 0


@pytest.mark.parametrize("restart", [False, True])
def test_an_ioctl_that_a_signal_came_before_is_made_again_or_eintr_as_its_handler_says(
    program: list[str], restart: bool
) -> None:
    assert exit_code(program, "interrupted", str(int(restart)), strict=False) == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("before", [False, True])
def test_locking_all_memory_leaves_the_pages_of_enclaves_to_the_epc(
    program: list[str], before: bool, pager: str
) -> None:
    argv = [*program, "locked", str(int(before))]
    result = run(argv, epc=EPC_PAGES * 4096, pager=pager)
    assert result.exit_code == 0
    assert result.counters["reclaimed"] and result.counters["eldu"], "nothing was paged"


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_wild_arguments_fail_with_the_errno_of_linux_and_change_nothing(
    program: list[str], pager: str
) -> None:
    assert exit_code(program, "wild", strict=False, pager=pager) == 0
