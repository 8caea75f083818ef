"""The dynamic loader gets the same CPUID with jumps as with stops; later programs stop rarely.

Goal: a fast start of programs, with the results of a slow one.  Method: ``getconf`` prints the
loader's data about caches, with the supervisor's jumps switched on and off.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.stepper import go_in_steps
from tests.support.native import needs_tracing

from softsgx.engines.native import run, supervisor
from softsgx.engines.native.doctor import can_answer_cpuid
from softsgx.engines.native.faults.transitions import Transitions
from softsgx.engines.native.tracing.program import ProgramThread

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(shutil.which("getconf") is None, reason="needs getconf"),
    pytest.mark.skipif(not can_answer_cpuid(), reason="needs BMI2"),
]

SIZES = ("LEVEL1_DCACHE_SIZE", "LEVEL2_CACHE_SIZE", "LEVEL3_CACHE_SIZE", "LEVEL1_DCACHE_LINESIZE")
ROUNDS = 4
_MOST_VISITS = 40


def printed(tmp_path: Path, rounds: int = ROUNDS, **options: Any) -> list[str]:
    once = "; ".join(f"getconf {size}" for size in SIZES)
    script = f"for i in $(seq {rounds}); do {once}; done"
    with (tmp_path / "out").open("w+") as out:
        run(["/bin/sh", "-c", script], epc=1 << 20, stdio=(0, out.fileno(), 2), **options)
        out.seek(0)
        return out.read().split()


def without_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "can_answer_cpuid", lambda: False)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """How many CPUIDs of each address space have stopped."""
    counted: dict[int, int] = {}
    emulate = Transitions._emulate_cpuid

    def emulated(self: Transitions, thread: ProgramThread, then: int) -> None:
        counted[thread.image.index] = counted.get(thread.image.index, 0) + 1
        emulate(self, thread, then)

    monkeypatch.setattr(Transitions, "_emulate_cpuid", emulated)
    return counted


@pytest.mark.parametrize("cpuid", ["profile", "host"])
def test_the_loader_finds_the_same_and_stops_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: dict[int, int], cpuid: str
) -> None:
    fast = printed(tmp_path, cpuid=cpuid)
    stops = dict(counts)
    counts.clear()
    with monkeypatch.context() as slow:
        without_jumps(slow)
        assert printed(tmp_path, cpuid=cpuid) == fast
    assert fast == fast[: len(SIZES)] * ROUNDS
    assert sum(stops.values()) < sum(counts.values()) / 2


class Visits:
    """Takes a thread that goes in steps out of stubs, at each of their instructions in turn.

    Attributes:
        places: at how many instructions of a stub that was.
    """

    def __init__(self) -> None:
        self.places: set[int] = set()
        self._inside = self._visits = 0
        self._stepped: set[int] = set()

    def steps(self, thread: ProgramThread) -> bool:
        """Return whether it is a thread of the first program that has stubs."""
        image = thread.image
        first = not self._stepped or image.index in self._stepped
        if image.cpuid_stubs is None or not first or self._visits >= _MOST_VISITS:
            return False
        self._stepped.add(image.index)
        return True

    def after(self, thread: ProgramThread, rip: int) -> bool:
        """Count a step, and take the thread out of a stub if it is the stub's turn."""
        image, stubs = thread.image, thread.image.cpuid_stubs
        area = range(image.vdso_base + image.vdso.answers, image.vdso_base + image.vdso.state)
        if rip not in area:
            self._inside = 0
            return False
        self._inside += 1
        if self._inside == self._visits % 30 + 1:
            self._visits += 1
            self._inside = -100  # what it does again, up to the end of the stub
            self.places.add((rip - area.start) % 128)
            assert stubs is not None
            stubs.straighten(thread)
            assert thread.load().rip not in area
        return self._visits >= _MOST_VISITS


@pytest.mark.slow
def test_a_thread_may_be_stopped_at_each_instruction_of_a_stub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = printed(tmp_path, 1)
    visits = Visits()
    go_in_steps(monkeypatch, visits.steps, visits.after)
    assert printed(tmp_path, 2) == plain * 2
    assert len(visits.places) > 20
