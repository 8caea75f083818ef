"""Unmodified programs see an SGX system, also with a small EPC.

Goal: the native engine with the real machine, core and driver.  Method: ``programs/host.c`` checks
behaviour of hardware and Linux from inside the enclave; each scenario runs with an EPC that is
smaller than its enclave, so that code, stacks, SSA frames and TCS are evicted and loaded.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support import modes
from tests.support.children import running
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx.engines.native import RunFailed, RunResult, abi, libc, run
from softsgx.engines.native.faults.enclave import EnclaveFaults
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.errors import SoftSgxError
from softsgx.report import Collector
from softsgx.trace import Event

DATA_PAGES = 28
EPC_PAGES = 25

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


class Program:
    """The compiled program, its enclave file, and a way to run a scenario."""

    def __init__(self, builds: NativeBuilds) -> None:
        self.host, self.enclave = builds.host(), builds.enclave(DATA_PAGES)
        self.events: list[Event] = []

    def argv(self, scenario: str) -> list[str]:
        return [self.host, self.enclave, scenario]

    def run(self, scenario: str, pages: int = EPC_PAGES, **options: object) -> RunResult:
        return run(self.argv(scenario), epc=pages * 4096, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> Program:
    return Program(builds)


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("scenario", ["paging", "threads", "forks"])
def test_every_byte_comes_back_from_an_epc_that_is_too_small(
    program: Program, scenario: str, pager: str
) -> None:
    result = program.run(scenario, pager=pager)
    assert result.exit_code == 0
    assert result.pager == pager or modes.has(*USABLE_PAGERS)
    assert result.counters["reclaimed"] and result.counters["eldu"], "nothing was paged"


@pytest.mark.parametrize(
    "scenario",
    [
        *(
            "handlers",
            "exceptions",
            "signals",
            "raw",
            "nested",
            "blocked",
            "shielded",
            "often",
            "alternating",
            "stacks",
            "registers",
            "counted",
        ),
        *("dynamic", "execs", "names", "reopen", "untraced"),
    ],
)
def test_a_program_finds_what_hardware_and_linux_promise(program: Program, scenario: str) -> None:
    assert program.run(scenario).exit_code == 0


@pytest.mark.parametrize("scenario", ["untraced", "moved", "names", "reopen", "execs"])
def test_a_call_is_handled_though_calls_for_pages_have_used_the_stop_of_it_or_of_one_before(
    program: Program, scenario: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread repeats such a call, and not each of them stops again."""
    used: set[int] = set()
    handle = Loop._result

    def handle_late(self: Loop, thread: ProgramThread, number: int) -> int | None:
        if thread.at_call:
            used.add(number)
            thread.syscall(abi.SYS_GETPID)
        return handle(self, thread, number)

    monkeypatch.setattr(Loop, "_result", handle_late)
    assert program.run(scenario).exit_code == 0
    assert {abi.SYS_OPENAT, abi.SYS_MMAP} <= used


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("scenario", ["rights", "unreadable", "foreign", "moved"])
def test_a_page_can_be_used_as_far_as_its_epcm_entry_and_its_mapping_allow(
    program: Program, scenario: str, pager: str, strict: bool
) -> None:
    assert program.run(scenario, pager=pager, strict=strict).exit_code == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_a_fault_is_judged_by_its_own_code_even_if_that_has_left_since(
    program: Program, pager: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zapped: list[tuple[int, int]] = []
    handle = EnclaveFaults.page_fault

    def handle_late(self: EnclaveFaults, thread: Any, address: int, code: int) -> int:
        """Handle a fault after the reclaimer has taken the page of the code from page tables."""
        rip, space = thread.load().rip, thread.image.page_table
        if rip != address and zapped[-1:] != [(rip, address)]:
            zapped.append((rip, address))
            space.zap(rip & -4096)
            space._store.hide_unmapped()
        return handle(self, thread, address, code)

    monkeypatch.setattr(EnclaveFaults, "page_fault", handle_late)
    monkeypatch.setattr(Loop, "serve_plain_faults", lambda *_: None)  # reads no code
    assert program.run("readers", pager=pager).exit_code == 0
    assert len(zapped) > DATA_PAGES


def test_calls_of_one_thread_are_counted_wherever_a_timer_interrupts_them(program: Program) -> None:
    collector = Collector(time.monotonic_ns)
    assert program.run("often", pages=256, observer=collector).exit_code == 0
    (enclave,) = collector.enclaves()
    assert enclave.eenter == enclave.eexit
    assert enclave.eenter > 6700, "the program makes that many calls, handlers not counted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "scenario",
    ["paging", "threads", "forks", "signals", "raw", "nested", "dynamic", "execs", "names"],
)
def test_a_program_finds_the_same_in_strict_runs(program: Program, scenario: str) -> None:
    assert program.run(scenario, strict=True).exit_code == 0


def test_a_program_may_have_more_threads_than_the_machine_has_processors(
    program: Program,
) -> None:
    assert program.run("threads", processors=1).exit_code == 0


def test_nothing_of_an_enclave_stays_when_its_program_has_ended(program: Program) -> None:
    held = program.run("reopen").counters["held"]
    assert isinstance(held, dict)
    assert set(held.values()) == {0}


def test_closing_and_unmapping_releases_an_enclave_at_once(program: Program) -> None:
    events: list[str] = []
    assert program.run("reopen", tracer=lambda event: events.append(event.NAME)).exit_code == 0
    order = [name for name in events if name in ("sgx:enclave_create", "sgx:enclave_release")]
    assert order == ["sgx:enclave_create", "sgx:enclave_release"] * 8


def test_cpuid_tells_the_size_of_the_software_epc(program: Program, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w+b") as out:
        number = out.fileno()
        assert program.run("cpuid", pages=96, stdio=(0, number, number)).exit_code == 0
        out.seek(0)
        assert out.read() == b"%d\n" % (96 * 4096)


def test_the_limit_of_a_group_makes_its_programs_page(program: Program) -> None:
    groups = {"jobs": {"max": EPC_PAGES * 4096}}
    free = program.run("paging", pages=256, groups=groups)
    held = program.run("paging", pages=256, groups=groups, group="jobs")
    assert (free.exit_code, held.exit_code) == (0, 0)
    assert not free.counters["eldu"]
    assert held.counters["eldu"]


def test_exit_codes_and_signals_are_the_programs_own() -> None:
    assert run(["/bin/sh", "-c", "exit 3"]).exit_code == 3
    assert run(["/bin/sh", "-c", "kill -TERM $$"]).exit_code == -signal.SIGTERM


def test_a_program_that_is_not_there_is_named() -> None:
    with pytest.raises(SoftSgxError, match="/no/such/program: No such file or directory"):
        run(["/no/such/program"])


def test_a_supervisor_that_is_aborted_leaves_no_core_dump(program: Program, tmp_path: Path) -> None:
    """Hidden pages and the paging key are in its memory."""
    code = (
        "import resource, sys; from softsgx.engines.native import run;"
        "most = resource.getrlimit(resource.RLIMIT_CORE)[1];"
        "resource.setrlimit(resource.RLIMIT_CORE, (most, most));"
        "run(sys.argv[1:], epc=4 << 20)"
    )
    command = [sys.executable, "-c", code, *program.argv("endless")]
    with running(command, stdout=subprocess.PIPE, cwd=tmp_path) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline()
        supervisor.send_signal(signal.SIGABRT)
        _, status = os.waitpid(supervisor.pid, 0)
        supervisor.returncode = os.waitstatus_to_exitcode(status)
    assert supervisor.returncode == -signal.SIGABRT
    assert not os.WCOREDUMP(status)
    assert not list(tmp_path.iterdir())


def test_after_a_run_its_caller_can_be_dumped_as_before(program: Program) -> None:
    seen: set[bool] = set()
    before = libc.dumpable()
    assert program.run("reopen", tracer=lambda _event: seen.add(libc.dumpable())).exit_code == 0
    assert seen == {False}
    assert libc.dumpable() == before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_program_ends_with_its_supervisor(program: Program, how: signal.Signals) -> None:
    code = "import sys; from softsgx.engines.native import run; run(sys.argv[1:], epc=4 << 20)"
    command = [sys.executable, "-c", code, *program.argv("endless")]
    with running(command, stdout=subprocess.PIPE) as supervisor:
        assert supervisor.stdout is not None
        pid = int(supervisor.stdout.readline())
        watched = os.pidfd_open(pid)
        supervisor.send_signal(how)
        # The pipe ends when the last process that has it is gone: the program among them.
        assert supervisor.stdout.read() == b""
        supervisor.wait()
    # Readable: it has ended, whether its new parent has noticed or not.
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)


def test_a_failure_of_ours_ends_the_program_and_is_reported(program: Program) -> None:
    class Mistake(Exception):
        pass

    def listen(event: Event) -> None:
        if event.NAME == "sgx:enclave_init":
            raise Mistake

    read, write = os.pipe()
    with pytest.raises(RunFailed):
        program.run("endless", tracer=listen, stdio=(0, write, 2))
    os.close(write)
    with os.fdopen(read, "rb") as out:
        assert out.read() == b"", "the program went on, or still runs"
