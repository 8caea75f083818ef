"""A recording has each page that a program uses in an interval once, in order of its first use.

Goal: the two pagers, permits, leaves, forks, and enclaves that are created and released, with the
real engine.  Method: ``programs/recorded.c`` uses pages in the order of its arguments; the
recorder's clock advances at stores to one page only, so the test controls the intervals.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, PAGE, compile_host, enclave_plan, write_enclave
from tests.support.native import USABLE_PAGERS, needs_no_strict_mode, needs_tracing

from softsgx.engines.native import RunResult, run
from softsgx.engines.native.memory.memory_file import EnclaveMemory
from softsgx.engines.native.recording import Recorder
from softsgx.image import Run

DATA_PAGES = 24
INTERVAL_NS = 10**9
PLAN = enclave_plan(DATA_PAGES)
TCS, SSA = 0, 2
CODE, DATA = (run.offset // PAGE for run in PLAN.runs[-2:])
ENDS = DATA + 12
ENTRY = [(TCS, "W"), (SSA, "W"), (CODE, "R")]
"""What each call of the enclave uses first."""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]
each_pager = pytest.mark.parametrize("pager", USABLE_PAGERS)


class Accesses:
    """Keeps what is written: (enclave, page, "R" or "W"), and with pages that go.

    Attributes:
        events: the same, and (enclave, page, "removed"), (enclave, 0, "ended").
    """

    def __init__(self) -> None:
        self.enclaves: list[tuple[str, int, int]] = []
        self.all: list[tuple[int, int, str]] = []
        self.events: list[tuple[int, int, str]] = []
        self.times: list[int] = []

    def add_enclave(self, name: str, pages: int, pid: int) -> int:
        self.enclaves.append((name, pages, pid))
        return len(self.enclaves) - 1

    def append(self, enclave: int, page: int, write: bool, time_ns: int) -> None:
        self.all.append((enclave, page, "W" if write else "R"))
        self.events.append(self.all[-1])
        self.times.append(time_ns)

    def remove_page(self, enclave: int, page: int, time_ns: int) -> None:
        self.events.append((enclave, page, "removed"))
        self.times.append(time_ns)

    def end_enclave(self, enclave: int, time_ns: int) -> None:
        self.events.append((enclave, 0, "ended"))
        self.times.append(time_ns)

    def add_late_interval(self) -> None:
        pass

    def flush(self) -> None:
        pass


class Recording(Recorder):
    """Its time passes when pages are added, and once at each page that ``/`` stores to."""

    def __init__(self, precision: str) -> None:
        self.written, self.cuts, self.passed_ns = Accesses(), [0], 0
        self.ends: set[int] = set()
        super().__init__(
            self.written,
            interval_ns=INTERVAL_NS if precision == "intervals" else None,
            clock=lambda: self.passed_ns,
        )

    def pages_added(self, memory: EnclaveMemory, start: int, size: int) -> None:
        super().pages_added(memory, start, size)
        self.passed_ns += 2 * INTERVAL_NS

    def page_used(self, epc_addr: int, memory: EnclaveMemory, linaddr: int, *, write: bool) -> None:
        super().page_used(epc_addr, memory, linaddr, write=write)
        page = linaddr % PLAN.size // PAGE
        # A thread that the end of the interval interrupts stores again.
        if write and page >= ENDS and page not in self.ends:
            self.ends.add(page)
            self.passed_ns += 2 * INTERVAL_NS

    def end_interval(self) -> None:
        super().end_interval()
        self.cuts.append(len(self.written.all))

    def used(self) -> list[list[tuple[int, int, str]]]:
        """Data pages, from 0, in each interval that has some, without those of ``/``.

        Intervals in which pages are added are left out.
        """
        bounds = sorted({*self.cuts, len(self.written.all)})
        parts = [
            [(enclave, page - DATA, how) for enclave, page, how in self.written.all[a:b]]
            for a, b in pairwise(bounds)
        ]
        data = [[one for one in part if one[1] >= 0] for part in parts]
        used = [[one for one in part if one[1] < ENDS - DATA] for part in data]
        added = [(page, "W") for page in range(ENDS - DATA)]
        return [part for part in used if part and [one[1:] for one in part] != added]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("recording")
    enclave = write_enclave(directory / "enclave", DATA_PAGES)
    return [str(compile_host(directory, "recorded")), str(enclave)]


def record(
    program: list[str],
    words: str,
    precision: str = "intervals",
    *,
    pages: int = 1024,
    **options: object,
) -> tuple[Recording, RunResult]:
    recording = Recording(precision)
    result = run(
        [*program, *words.split()],
        epc=pages * PAGE,
        recorder=recording,
        **options,  # type: ignore[arg-type]
    )
    return recording, result


@each_pager
@pytest.mark.parametrize("strict", [False, True])
def test_each_page_is_once_in_an_interval_in_order_of_first_use(
    program: list[str], pager: str, strict: bool
) -> None:
    words = "g3 p1 g3 g1 g0 p0 p3 / g1 / p2 g1 p2 g1 p1 g7 /"
    recording, result = record(program, words, pager=pager, strict=strict)
    assert result.exit_code == 0
    assert recording.used() == [
        [(0, 3, "W"), (0, 1, "W"), (0, 0, "W")],
        [(0, 1, "R")],
        [(0, 2, "W"), (0, 1, "W"), (0, 7, "R")],
    ]
    assert recording.written.times == sorted(recording.written.times)


@each_pager
def test_tcs_frame_and_code_are_used_in_each_interval_before_data(
    program: list[str], pager: str
) -> None:
    recording, _ = record(program, "p0 g1 / g1 / g2 p2 /", pager=pager)
    bounds = sorted({*recording.cuts, len(recording.written.all)})
    parts = [recording.written.all[a:b] for a, b in pairwise(bounds)]
    with_data = [part for part in parts if any(DATA <= one[1] < ENDS for one in part)][-3:]
    assert [part[:3] for part in with_data] == [[(0, *one) for one in ENTRY]] * 3


@each_pager
def test_a_trace_of_intervals_does_not_depend_on_the_epc(program: list[str], pager: str) -> None:
    words = " ".join(f"p{first} g{(first + 5) % 10} g{(first + 2) % 10} /" for first in range(10))
    roomy, _ = record(program, words, pager=pager)
    tight, result = record(program, words, pages=25, pager=pager)
    assert result.counters["eldu"], "nothing was paged"
    assert tight.used() == roomy.used()
    assert roomy.used()[3] == [(0, 3, "W"), (0, 8, "R"), (0, 5, "R")]


@each_pager
def test_a_trace_of_faults_has_each_page_again_when_it_was_loaded_again(
    program: list[str], pager: str
) -> None:
    words = " ".join(f"p{page}" for page in range(11)) + " g0 g1 g0 g1"
    roomy, _ = record(program, words, "faults", pager=pager)
    added = [(0, page, "W") for run in PLAN.runs for page in run_pages(run)]
    first_uses = [(0, *one) for one in ENTRY] + [(0, DATA + page, "W") for page in range(11)]
    assert roomy.written.all == added + first_uses
    tight, result = record(program, words, "faults", pages=25, pager=pager)
    used = [one for one in tight.written.all[len(added) :] if one[1] >= DATA]
    assert used[:11] == first_uses[len(ENTRY) :], "the pages were used in this order"
    assert len(used) - 11 <= int(str(result.counters["eldu"]))
    assert {one[2] for one in used[11:]} <= {"R"}, "only loads come after that"


@each_pager
def test_enclaves_that_come_and_go_are_told_apart(program: list[str], pager: str) -> None:
    recording, result = record(program, "p0 / n p1 / s0 g2 / u s1 g3 / n g4 /", pager=pager)
    assert result.exit_code == 0
    assert [pages for _name, pages, _pid in recording.written.enclaves] == [PLAN.size // PAGE] * 3
    assert [name for name, _pages, _pid in recording.written.enclaves] == [
        "recorded 1",
        "recorded 2",
        "recorded 3",
    ]
    wanted = [(0, 0, "W"), (1, 1, "W"), (0, 2, "R"), (1, 3, "R"), (2, 4, "R")]
    assert recording.used() == [[one] for one in wanted]
    events = recording.written.events
    ends = [events.index((number, 0, "ended")) for number in range(3)]
    assert ends[0] > events.index((0, DATA + 2, "R"))
    assert ends[0] < events.index((2, DATA + 4, "R")), "the driver looks when a device is opened"
    assert ends[1:] == [len(events) - 2, len(events) - 1], "the others end with the program"
    assert recording.written.times == sorted(recording.written.times)


@each_pager
@pytest.mark.parametrize("precision", ["intervals", "faults"])
def test_a_page_that_was_removed_is_gone_until_a_new_one_is_made(
    tmp_path: Path, pager: str, precision: str
) -> None:
    pages = DATA_PAGES - 1  # the next one is for EAUG
    enclave = write_enclave(tmp_path / "enclave", pages)
    recording = Recording(precision)
    command = [str(compile_host(tmp_path)), str(enclave), "dynamic"]
    result = run(command, epc=1024 * PAGE, pager=pager, recorder=recording)
    assert result.exit_code == 0
    page = DATA + pages
    events = [how for _enclave, number, how in recording.written.events if number == page]
    assert events.count("removed") == 1
    at = events.index("removed")
    assert events[:at], "it was used before"
    assert events[at + 1 :], "it was used after, as a new page"
    assert recording.written.times == sorted(recording.written.times)


@each_pager
def test_a_child_uses_pages_of_its_parents_enclave(program: list[str], pager: str) -> None:
    recording, result = record(program, "p0 g1 / f g1 p0 g2 / g1 /", pager=pager)
    assert result.exit_code == 0
    assert recording.used() == [
        [(0, 0, "W"), (0, 1, "R")],
        [(0, 1, "R"), (0, 0, "W"), (0, 2, "R")],
        [(0, 1, "R")],
    ]
    assert len(recording.written.enclaves) == 1


@needs_no_strict_mode
@each_pager
def test_a_use_from_outside_the_enclave_counts(program: list[str], pager: str) -> None:
    recording, _ = record(program, "o1 g0 o2 / o0", pager=pager)
    numbers = [page - DATA for _enclave, page, _how in recording.written.all if page >= DATA]
    assert numbers[DATA_PAGES:][:3] == [1, 0, 2]
    assert numbers[-1] == 0


@each_pager
def test_what_was_used_before_the_program_was_killed_is_recorded(
    program: list[str], pager: str
) -> None:
    recording, result = record(program, "g4 p5 k", pager=pager)
    assert result.exit_code == -9
    assert recording.used() == [[(0, 4, "R"), (0, 5, "W")]]


class Hasty(Recorder):
    """An interval is over with each use of a page that it sees."""

    def __init__(self) -> None:
        self.passed_ns = 0
        super().__init__(Accesses(), interval_ns=INTERVAL_NS, clock=lambda: self.passed_ns)

    def page_used(self, epc_addr: int, memory: EnclaveMemory, linaddr: int, *, write: bool) -> None:
        super().page_used(epc_addr, memory, linaddr, write=write)
        self.passed_ns += 2 * INTERVAL_NS


@each_pager
@pytest.mark.timeout(60)
def test_instructions_are_executed_however_short_intervals_are(
    program: list[str], pager: str
) -> None:
    recorder = Hasty()
    words = ["p0", "g1", "p2", "/", "f", "g0", "g2", "/", "p3", "/", "n", "p0", "g5", "o1"]
    result = run([*program, *words], epc=1024 * PAGE, pager=pager, recorder=recorder)
    assert result.exit_code == 0
    # A store needs the page of its code and that of the data at once: two faults.
    assert recorder.overhead.intervals > 20


@each_pager
@pytest.mark.parametrize("scenario", ["paging", "threads", "forks"])
def test_programs_find_every_byte_while_pages_are_hidden_every_millisecond(
    tmp_path: Path, pager: str, scenario: str
) -> None:
    enclave = write_enclave(tmp_path / "enclave", 28)
    recorder = Recorder(Accesses(), interval_ns=1_000_000)
    command = [str(compile_host(tmp_path)), str(enclave), scenario]
    result = run(command, epc=25 * PAGE, pager=pager, recorder=recorder)
    assert result.exit_code == 0
    assert recorder.overhead.intervals > 10
    assert result.counters["eldu"], "nothing was paged"


def run_pages(run: Run) -> range:
    """The pages of a part of an enclave."""
    first = run.offset // PAGE
    return range(first, first + run.pages)
