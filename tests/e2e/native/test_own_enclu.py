"""EENTER by the host's own ENCLU, by permit, is the EENTER that stops.

Method: as ``test_permits``, by programs whose own code has the ENCLU: next to the load of EAX, with
other instructions in between, and, to compare, with a jump in between, where each EENTER stops.
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
from tests.support import modes
from tests.support.native import (
    HAS_PERMITS,
    USABLE_PAGERS,
    needs_pages_that_stay,
    needs_permits,
    needs_tracing,
)

from softsgx.engines.native import run
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.report import Collector

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]

#: Flags of the caller that the enclave finds: all but the system's, by the last bit of R15.
ARITHMETIC, FLAGS = 0xCD5, {1: 0xCD5, 0: 0}
RUN = 11


class Host:
    """A program with its own ENCLU, and how it ran."""

    def __init__(self, builds: NativeBuilds, name: str, out: Path) -> None:
        self.host, self.enclave, self._out = builds.host(name), builds.enclave(4), out
        self.stops = 0

    def run(self, *arguments: object, pager: str | None = None) -> None:
        collector = Collector(time.monotonic_ns)
        argv = [self.host, self.enclave, *map(str, arguments)]
        stopped, self.stops = Permits.stopped, 0

        def counted(permits: Permits, thread: Any) -> None:
            self.stops += 1
            stopped(permits, thread)

        with pytest.MonkeyPatch.context() as patch, self._out.open("wb") as out:
            patch.setattr(Permits, "stopped", counted)
            stdio = (0, out.fileno(), 2)
            done = run(argv, epc=1 << 20, stdio=stdio, observer=collector, pager=pager)
            assert done.exit_code == 0
        self.calls = [(each.eenter, each.eexit) for each in collector.enclaves()]

    def printed(self) -> list[int]:
        return [int(word) for word in self._out.read_text().split()]


@pytest.fixture
def same(builds: NativeBuilds, tmp_path: Path) -> Host:
    return Host(builds, "crossings", tmp_path / "out")


@pytest.fixture
def code(builds: NativeBuilds, tmp_path: Path) -> Host:
    return Host(builds, "ownenclu", tmp_path / "out")


def _crosses(image: ProcessImage, place: int) -> bool:
    """Return whether code at this offset from our vDSO is of an EENTER."""
    vdso = image.vdso
    own = image.entry_stubs.find(image.vdso_base + place) is not None
    return own or vdso.tails <= place < vdso.answers


class Flags:
    """Compares flags at the entry point with those in front of the ENCLU."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()

    def look(self, thread: ProgramThread, how: str) -> None:
        """A thread is about to execute an instruction; it got there in this way."""
        regs, table = thread.load(), thread.image.permits
        slots = () if table is None else tuple(table._slots.values())
        if regs.rdx == RUN and any(regs.rip == slot.word("entry") for slot in slots):
            assert regs.rflags & ARITHMETIC == FLAGS[regs.r15 & 1]
            self.seen.add((how, regs.r15 & 1))

    def stepped(self, image: ProcessImage) -> None:
        """The only thread has made a step."""
        (thread,) = image.threads.values()
        self.look(thread, "stepped")


def _step(monkeypatch: pytest.MonkeyPatch, number: int, counts: Any) -> Stepper:
    return Stepper(monkeypatch, number, counts, lambda thread: thread.image.permits is not None)


@needs_permits
@pytest.mark.slow
@pytest.mark.parametrize("number", [0, signal.SIGUSR1])
@pytest.mark.parametrize("way", ["own", "gap"])
def test_a_thread_may_be_stopped_at_each_instruction_of_an_entry(
    same: Host, monkeypatch: pytest.MonkeyPatch, number: int, way: str
) -> None:
    flags, stopped = Flags(), Permits.stopped

    def counts(image: ProcessImage, place: int) -> bool:
        flags.stepped(image)
        return _crosses(image, place)

    def moved(permits: Permits, thread: ProgramThread) -> None:
        stopped(permits, thread)
        flags.look(thread, "moved")

    stepper = _step(monkeypatch, number, counts)
    monkeypatch.setattr(Permits, "stopped", moved)
    calls = 300
    same.run(f"{way}:same", calls)
    assert stepper.stops > 80
    assert same.calls == [(3 * calls, 3 * calls)]
    assert same.printed() == [calls, stepper.stops if number else 0]
    # The recorder ends permits and moves threads more often than an entry takes in single steps.
    if not modes.has("recorded"):
        assert flags.seen == {(how, bit) for how in ("stepped", "moved") for bit in (0, 1)}


@needs_permits
@pytest.mark.parametrize("way", ["own", "gap"])
def test_an_entry_leaves_the_flags_alone(
    same: Host, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    flags = Flags()

    def counts(image: ProcessImage, _place: int) -> bool:
        flags.stepped(image)
        return False

    _step(monkeypatch, 0, counts)
    same.run(f"{way}:same", 12)
    assert flags.seen == {("stepped", 0), ("stepped", 1)}


@needs_pages_that_stay
@pytest.mark.parametrize("mode", ["own:same", "gap:same", "mixed", "low", "own:low"])
def test_entries_by_permit_are_as_those_that_stop(same: Host, mode: str) -> None:
    calls = 8000 if HAS_PERMITS else 300
    same.run(mode, calls)
    assert same.calls == [(3 * calls, 3 * calls)]
    if HAS_PERMITS:
        assert same.stops < (400 if mode != "mixed" else 3 * calls), "of 48000 crossings"


@needs_permits
@pytest.mark.parametrize("way", ["own", "gap"])
def test_an_entry_that_is_refused_has_changed_nothing(
    same: Host, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    stopped, seen = Permits.stopped, 0

    def look(permits: Permits, thread: ProgramThread) -> None:
        nonlocal seen
        stopped(permits, thread)
        regs = thread.regs
        if regs.rdx == RUN and any(regs.rip == stub.site.at for stub in thread.image.entry_stubs):
            assert regs.rflags & ARITHMETIC == FLAGS[regs.r15 & 1]
            seen += 1

    monkeypatch.setattr(Permits, "stopped", look)
    calls = 200
    same.run(f"{way}:blocked", calls)
    assert same.calls == [(3 * calls, 3 * calls)]
    assert seen > calls // 2 - 5


def test_an_entry_with_an_aep_that_is_not_canonical_faults(same: Host) -> None:
    same.run("noncanonical", 0)
    assert same.calls == [(150, 150)]


def test_enclaves_with_one_place_for_their_permits_are_told_apart(same: Host) -> None:
    calls = 100
    same.run("own:twins", calls)
    assert same.calls == [(2 * calls, 2 * calls)] * 2


def test_an_enclu_without_a_load_in_front_of_it_stops(same: Host) -> None:
    same.run("far:same", 500)
    assert same.calls == [(1500, 1500)]
    assert same.stops > 1500


@pytest.mark.parametrize("way", ["own", "gap"])
@pytest.mark.parametrize(
    ("threads", "rounds", "calls"),
    [(1, 2, 4000), (2, 2, 2000), pytest.param(8, 3, 20_000, marks=pytest.mark.slow)],
)
def test_calls_of_threads_that_come_and_go_are_counted_exactly(
    builds: NativeBuilds, way: str, threads: int, rounds: int, calls: int
) -> None:
    files = builds.host("counts"), builds.enclave(crossings.DATA_PAGES, crossings.TCS)
    timer_us = 1300 * threads  # of each thread: pure Python serves no more signals than that
    calls = calls if HAS_PERMITS else calls // 8
    crossings.many(files, threads, rounds, calls, timer_us, way=f"{way}:")


@needs_pages_that_stay
@pytest.mark.parametrize(
    ("mode", "calls", "stops"),
    [
        ("writable", 703, 550),
        ("moved", 400, 200),
        ("replaced", 760, 300),
        ("forked", 1300, 300),
        ("executed", 200, 190),
    ],
)
def test_code_is_the_programs_own(code: Host, mode: str, calls: int, stops: int) -> None:
    code.run(mode)
    if HAS_PERMITS:
        assert code.stops < stops, "of the entries alone as many as calls"
    assert sum(entries for entries, _exits in code.calls) == calls
    assert all(entries == exits for entries, exits in code.calls)


@needs_permits
@needs_pages_that_stay
@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("way", ["", "vdso:"])
def test_few_calls_of_a_child_stop_though_no_code_but_entries_uses_its_ssa(
    code: Host, way: str, pager: str
) -> None:
    code.run(f"{way}forked", pager=pager)
    assert code.stops < 300, "of 2600 crossings"
    assert sum(entries for entries, _exits in code.calls) == 1300
