"""Faults on the short path have the effects of the readable path.

Goal: a program cannot find out which of the two serves its faults, and neither can what watches it:
events in their order, counters, crossings, what ksgxd does.  Method: the same program runs with
each; its pages and its accesses are the same in each run, and so are their addresses.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support import modes
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx import compiled
from softsgx.engines.native import run
from softsgx.engines.native.faults import plain
from softsgx.engines.native.faults.plain import PlainFaults
from softsgx.engines.native.tracing.loop import Loop
from softsgx.report import Collector

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(shutil.which("setarch") is None, reason="needs setarch of util-linux"),
    pytest.mark.skipif(
        modes.has("strict", "recorded", "mprotect"),
        reason="in this mode no fault takes the short path",
    ),
    needs_tracing,
]

FORMS = ["python"] if compiled.speedups is None else ["python", "c"]
DATA_PAGES, EPC_PAGES = 100, 48

needs_userfaultfd = pytest.mark.skipif(
    "userfaultfd" not in USABLE_PAGERS, reason="by mprotect no fault takes the short path"
)


@dataclass
class Outcome:
    """What a run did, without times; ``served`` says how many faults took the short path."""

    exit_code: int = 0
    printed: str = ""
    counters: dict[str, object] = field(default_factory=dict)
    enclaves: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    served: int = field(default=0, compare=False)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> NativeBuilds:
    return NativeBuilds(tmp_path_factory)


class Runs:
    """Runs a program by each path."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self._patch, self._out = monkeypatch, out

    def __call__(self, form: str, argv: list[str], *, traced: bool, **options: Any) -> Outcome:
        made: list[PlainFaults] = []
        outcome, collector = Outcome(), Collector(time.monotonic_ns)
        with self._patch.context() as patch, self._out.open("w+") as out:
            _use(patch, form, made)
            if traced:
                options["tracer"] = lambda event: outcome.events.append(event.line())
            options.setdefault("epc", EPC_PAGES * 4096)
            stdio = (0, out.fileno(), 2)
            # Addresses are the same in each run.
            result = run(["setarch", "-R", *argv], stdio=stdio, observer=collector, **options)
            out.seek(0)
            outcome.printed = out.read()
        outcome.exit_code, outcome.counters = result.exit_code, result.counters
        outcome.enclaves = [_without_times(asdict(each)) for each in collector.enclaves()]
        outcome.served = sum(each.served for each in made)
        return outcome


def _use(patch: pytest.MonkeyPatch, form: str, made: list[PlainFaults]) -> None:
    if form == "readable":
        patch.setattr(Loop, "serve_plain_faults", lambda *_: None)
        return
    serve: Callable[..., Any] = plain.serve_in_python
    if form == "c":
        assert compiled.speedups is not None
        serve = compiled.speedups.serve_faults
    patch.setattr(plain, "serve", serve)
    init = PlainFaults.__init__

    def remember(self: PlainFaults, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    patch.setattr(PlainFaults, "__init__", remember)


def _without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in summary.items() if not name.endswith(("_ns", "_s", "pid"))
    }


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runs:
    return Runs(monkeypatch, tmp_path / "out")


def words(seed: int, count: int) -> list[str]:
    """Return accesses for ``programs/recorded.c``: most use 30 pages, which change."""
    chance = random.Random(seed)
    found = []
    for number in range(count):
        part = 30 if chance.random() < 0.7 else DATA_PAGES
        page = (chance.randrange(part) + number // 200 * 25) % DATA_PAGES
        found.append(f"{chance.choice('gp')}{page}")
        if chance.random() < 0.02:
            found.append(chance.choice(["/", "o3"]))
    return found


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("traced", [False, True], ids=["untraced", "traced"])
@needs_userfaultfd
@pytest.mark.parametrize("form", FORMS)
def test_a_program_that_pages_has_the_same_history(
    builds: NativeBuilds, runs: Runs, form: str, traced: bool, pager: str
) -> None:
    argv = [builds.host("recorded"), builds.enclave(DATA_PAGES), *words(5, 600)]
    expected = runs("readable", argv, traced=traced, pager=pager)
    assert expected.exit_code == 0 and expected.counters["eldu"] and not expected.served
    found = runs(form, argv, traced=traced, pager=pager)
    assert found == expected
    # By mprotect a fault is a SIGSEGV.
    assert found.served > 200 if pager == "userfaultfd" else not found.served


@needs_userfaultfd
@pytest.mark.parametrize("form", FORMS)
def test_many_faults_between_two_crossings_have_the_same_history(
    builds: NativeBuilds, runs: Runs, form: str
) -> None:
    argv = [builds.host("longrun"), builds.enclave(DATA_PAGES), str(12 * DATA_PAGES)]
    expected = runs("readable", argv, traced=False, pager="userfaultfd")
    assert expected.exit_code == 0
    found = runs(form, argv, traced=False, pager="userfaultfd")
    assert found == expected
    assert found.served > 10 * DATA_PAGES


@needs_userfaultfd
@pytest.mark.parametrize("form", FORMS)
def test_a_program_beside_another_one_takes_the_same_path(
    builds: NativeBuilds, runs: Runs, form: str
) -> None:
    """While two processes live, waits end from time to time, for the choice of processors."""
    program = f"{builds.host('longrun')} {builds.enclave(DATA_PAGES)} {6 * DATA_PAGES}"
    found = runs(form, ["/bin/sh", "-c", f"{program}; exit $?"], traced=False, pager="userfaultfd")
    assert found.exit_code == 0
    assert found.served > 5 * DATA_PAGES
