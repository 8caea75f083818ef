"""Crossings by permit have the state and the counts of crossings that stop.

Method: a program whose enclave code notes its registers, and that notes them again behind EEXIT,
compares each crossing with its first, which stops twice.  Meanwhile the thread is stopped at each
instruction of the code that crosses, one crossing after the other.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.e2e.native.stepper import Stepper
from tests.soak import crossings
from tests.support.native import needs_pages_that_stay, needs_permits, needs_tracing

from softsgx.driver import Mm
from softsgx.driver.optimised import PlainMm
from softsgx.engines.native import RunFailed, RunResult, run, supervisor
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.report import Collector
from softsgx.runtime import InlineRuntime

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
    needs_permits,
]


class Program:
    """The program, with an enclave of eight threads."""

    def __init__(self, builds: NativeBuilds, out: Path) -> None:
        self.host, self.out = builds.host("crossings"), out
        self.enclave, self.two = builds.enclave(16, threads=8), builds.enclave(4)
        self.collector = Collector(time.monotonic_ns)

    def run(self, *arguments: object, enclave: str | None = None, pages: int = 256) -> RunResult:
        argv = [self.host, enclave or self.enclave, *map(str, arguments)]
        self.collector = Collector(time.monotonic_ns)
        with self.out.open("wb") as out:
            return run(argv, epc=pages * 4096, stdio=(0, out.fileno(), 2), observer=self.collector)

    def printed(self) -> list[int]:
        return [int(word) for word in self.out.read_text().split()]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return Program(builds, tmp_path_factory.mktemp("crossings") / "out")


def _crosses(image: ProcessImage, place: int) -> bool:
    """Return whether code at this offset from our vDSO enters or leaves an enclave."""
    vdso = image.vdso
    return vdso.pushed <= place < vdso.undo or vdso.stubs <= place < vdso.answers


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, signal.SIGUSR1])
def test_a_thread_may_be_stopped_at_each_instruction_of_a_crossing(
    program: Program, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    stepper = Stepper(
        monkeypatch, number, _crosses, lambda thread: thread.image.permits is not None
    )
    calls = 400
    assert program.run("same", calls, enclave=program.two).exit_code == 0
    assert stepper.stops > 150
    made, handled = program.printed()
    (enclave,) = program.collector.enclaves()
    assert (enclave.eenter, enclave.eexit) == (3 * calls, 3 * calls)
    assert (made, handled) == (calls, stepper.stops if number else 0)


def test_crossings_by_permit_are_as_those_that_stop(program: Program) -> None:
    calls = 20_000
    assert program.run("same", calls, enclave=program.two).exit_code == 0
    (enclave,) = program.collector.enclaves()
    assert (enclave.eenter, enclave.eexit) == (3 * calls, 3 * calls)


def test_an_exit_to_an_address_that_is_not_canonical_faults_inside(program: Program) -> None:
    assert program.run("astray", 0).exit_code == 0
    (enclave,) = program.collector.enclaves()
    assert (enclave.eenter, enclave.eexit, enclave.aex - enclave.eresume) == (101, 100, 1)


def test_a_program_that_writes_to_its_table_of_permits_harms_itself_only(
    program: Program,
) -> None:
    one, other = (f"{program.host} {program.two} {mode} 0" for mode in ("spoil", "go_on"))
    with pytest.raises(RunFailed, match=r"entry by 0x\w+") as failed:
        run(["/bin/sh", "-c", f"{one} | {other}"], epc=1 << 20)
    assert failed.value.result.exit_code == 0  # of the other


@pytest.mark.parametrize(
    ("threads", "calls", "pages", "always"),
    [
        (3, 300, 256, True),
        pytest.param(3, 3000, 256, True, marks=pytest.mark.slow),
        pytest.param(3, 1000, 28, False, marks=pytest.mark.slow),
    ],
)
def test_only_crossings_happen_while_running_threads_have_permits(
    builds: NativeBuilds,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    calls: int,
    pages: int,
    always: bool,
) -> None:
    counting = builds.host("counts"), builds.enclave(crossings.DATA_PAGES, crossings.TCS)
    made: list[Permits] = []
    looked: set[str] = set()
    init = Permits.__init__

    def noted(permits: Permits, *arguments: Any) -> None:
        made.append(permits)
        init(permits, *arguments)

    def watch(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            looked.add(name)
            (permits,) = made
            assert permits._open <= set(permits._unused.values())
            return real(*arguments)

        monkeypatch.setattr(owner, name, watched)

    def something_to_do(runtime: InlineRuntime) -> bool:
        runtime.spawn(lambda: None, "background task")
        return True

    monkeypatch.setattr(Permits, "__init__", noted)
    if always:
        monkeypatch.setattr(InlineRuntime, "has_pending", something_to_do)
    watch(InlineRuntime, "run_pending")
    watch(Mm, "fault")
    watch(PlainMm, "fault")  # does not always use that of Mm
    watch(ProgramThread, "skip_syscall")
    crossings.many(counting, threads, 2, calls, 5000, epc=pages * 4096)
    assert looked == {"run_pending", "fault", "skip_syscall"}


@needs_pages_that_stay
def test_calls_of_one_thread_do_not_stop_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = 0
    stopped = Permits.stopped

    def counted(permits: Permits, thread: Any) -> None:
        nonlocal stops
        stops += 1
        stopped(permits, thread)

    monkeypatch.setattr(Permits, "stopped", counted)
    assert program.run("same", 4000, enclave=program.two).exit_code == 0
    assert stops < 400, "of 16000 crossings"


def test_an_exit_that_stops_is_marked_once_and_known_from_then_on(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked: list[int] = []
    mark = EnclaveMemory.mark

    def noted(memory: EnclaveMemory, address: int) -> None:
        marked.append(address)
        mark(memory, address)

    monkeypatch.setattr(EnclaveMemory, "mark", noted)
    monkeypatch.setattr(supervisor, "can_cross_unseen", lambda: False)
    assert program.run("same", 100, enclave=program.two).exit_code == 0
    assert marked and len(marked) == len(set(marked)), "whatever signal an ENCLU raises here"
