"""Instructions on extended state that do not stop do what those do that stop.

Method: a program whose enclave saves and restores state behind loads of constants, in seven ways
and with eighteen states each, compares registers, flags, FXSAVE and the area of each execution with
the first, which has stopped.  Meanwhile the thread is stopped at each instruction of the code that
executes them, and pages of the areas leave the EPC.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.e2e.native.stepper import Stepper
from tests.support import modes
from tests.support.native import needs_tracing

from softsgx.driver import Mm
from softsgx.engines.native import run
from softsgx.engines.native.faults.enclave import EnclaveFaults
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.cpuid import host_cpuid, xsave_components
from softsgx.report import Collector

KINDS, VARIANTS = 7, 18
XFRM = 3

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
    pytest.mark.skipif(
        modes.has("strict"), reason="the program looks at its enclave's memory from outside"
    ),
    pytest.mark.skipif(
        xsave_components(host_cpuid())[0] == XFRM, reason="this processor has XFRM in XCR0"
    ),
]


class Program:
    """The program, and how often instructions on extended state have stopped it."""

    def __init__(self, builds: NativeBuilds, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.enclave, self.out = builds.host("extended"), builds.enclave(40), out
        self.collector = Collector(time.monotonic_ns)
        self.stops = 0
        execute = EnclaveFaults._extended_state

        def counted(faults: EnclaveFaults, *arguments: Any) -> int:
            self.stops += 1
            return execute(faults, *arguments)

        monkeypatch.setattr(EnclaveFaults, "_extended_state", counted)

    def run(self, *arguments: object, pages: int = 256, **options: Any) -> list[str]:
        """Return the lines that it prints."""
        argv = [self.host, self.enclave, *map(str, arguments)]
        self.collector = Collector(time.monotonic_ns)
        with self.out.open("wb") as out:
            stdio = (0, out.fileno(), 2)
            done = run(argv, epc=pages * 4096, stdio=stdio, observer=self.collector, **options)
        assert done.exit_code == 0
        return self.out.read_text().splitlines()


@pytest.fixture
def program(builds: NativeBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(builds, tmp_path / "out", monkeypatch)


def test_only_the_first_execution_of_each_stops(program: Program) -> None:
    rounds = 20
    (line,) = program.run("same", rounds, 0)
    assert line.split() == [str(rounds * KINDS * VARIANTS), "0"]
    assert program.stops == KINDS


@pytest.mark.parametrize("pager", [pytest.param(None, marks=pytest.mark.slow), "mprotect"])
def test_areas_may_leave_the_epc(program: Program, pager: str | None) -> None:
    rounds = 2
    (line,) = program.run("same", rounds, 24, pages=26, pager=pager)
    assert line.split() == [str(rounds * KINDS * VARIANTS), "0"]
    assert program.stops > KINDS


def test_what_is_refused_is_as_without_a_stub(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    jumped = program.run("refused")
    assert len(jumped) == 3 * (2 * KINDS + 3 * 3)
    # Misaligned ones, headers with more than XFRM of three XRSTORs, areas outside the enclave.
    assert program.stops == KINDS + 3 * (2 * KINDS + 2 * 3 + 4)
    monkeypatch.setattr("softsgx.engines.native.supervisor.can_keep_flags", lambda: False)
    stops = program.stops
    assert program.run("refused") == jumped
    assert program.stops - stops > stops


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, signal.SIGUSR1])
def test_a_thread_may_be_stopped_at_each_instruction_of_a_stub(
    program: Program, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def counts(image: ProcessImage, place: int) -> bool:
        return image.vdso.state <= place < image.vdso.paths

    # Without permits each entry stops, and only enclave code has to be stepped through.
    monkeypatch.setattr(Permits, "_has_permits", lambda *_arguments: False)
    stepper = Stepper(number, counts, lambda thread: thread.cpu.inside is not None)
    monkeypatch.setattr(ProgramThread, "resume", lambda *arguments: stepper(*arguments))
    rounds = 10
    (line,) = program.run("same", rounds, 0)
    assert stepper.stops > 40
    handled = stepper.stops if number else 0
    assert line.split() == [str(rounds * KINDS * VARIANTS), str(handled)]


@pytest.mark.slow
def test_faults_of_such_an_instruction_settle_all_permits(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With this pager, faults are SIGSEGV, as ENCLU outside an enclave may be.
    stopped, settle, fault = Permits.stopped, Permits.settle, Mm.fault
    settled, faults = False, 0

    def at_stop(permits: Permits, thread: ProgramThread) -> None:
        nonlocal settled
        settled = False
        stopped(permits, thread)

    def at_settling(permits: Permits) -> None:
        nonlocal settled
        settled = True
        settle(permits)

    def at_fault(*arguments: Any) -> Any:
        nonlocal faults
        faults += 1
        assert settled
        return fault(*arguments)

    monkeypatch.setattr(Permits, "stopped", at_stop)
    monkeypatch.setattr(Permits, "settle", at_settling)
    monkeypatch.setattr(Mm, "fault", at_fault)
    program.run("same", 1, 24, pages=26, pager="mprotect")
    assert faults > 500
