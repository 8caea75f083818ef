"""Placements of a fleet: complete, below the target, the same with all kinds of workers.

Goal: no program is lost or placed twice; workers, their order and interruptions change nothing.
Method: replays by arithmetic (a host has room for so many pages), and real ones on a Dask cluster
that loses a worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.accesses import hot_and_cold, trace_of

from softsgx.accesses import write_trace
from softsgx.errors import SoftSgxError
from softsgx.plan.fleet import FleetPlan, Unit, UnitResult, plan_fleet, replay_unit
from softsgx.plan.fleet_spec import FleetHost, FleetSpec, FleetTrace, load_fleet
from softsgx.workers import DaskCluster, InProcess, Journal

PAGE = 4096


def by_arithmetic(unit: Unit) -> UnitResult:
    """A host has room for as many pages as it has; a trace has as many as its file has bytes."""
    pages = sum(Path(tenant.path).stat().st_size for tenant in unit.tenants)
    room = pages * PAGE <= unit.epc_bytes
    alone = all(
        not tenant.limit_bytes or Path(tenant.path).stat().st_size * PAGE <= tenant.limit_bytes
        for tenant in unit.tenants
    )
    return UnitResult(unit.key, room and alone, pages, None, 0, 0, None)


class Arithmetic:
    """Workers that replay by arithmetic.

    Args:
        order: in which units are done.
        most: units after which the user interrupts.
    """

    def __init__(
        self, order: Callable[[list[Any]], list[Any]] = list, most: int | None = None
    ) -> None:
        self._order, self._most = order, most
        self.done: list[str] = []

    def run(self, function: Callable[[Any], Any], units: Iterator[Any]) -> Iterator[Any]:
        assert function is replay_unit
        for unit in self._order(list(units)):
            if self._most is not None and len(self.done) >= self._most:
                raise KeyboardInterrupt
            self.done.append(unit.key)
            yield by_arithmetic(unit)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 1 to 60 bytes, all different."""
    path = tmp_path_factory.mktemp("fleet")
    for pages in range(1, 61):
        (path / str(pages)).write_bytes(bytes([pages]) * pages)
    return path


def fleet(
    directory: Path, traces: dict[int, int], *hosts: tuple[int, ...], count: int | None = None
) -> FleetSpec:
    """Programs by their pages, and hosts by the pages that they may have."""
    return FleetSpec(
        tuple(
            FleetHost(f"kind{at}", tuple(pages * PAGE for pages in sizes), count)
            for at, sizes in enumerate(hosts)
        ),
        tuple(
            FleetTrace(f"p{pages}", directory / str(pages), many) for pages, many in traces.items()
        ),
    )


def check(plan: FleetPlan) -> None:
    """Every program is somewhere, once; every host has room; none is used that is not there."""
    wanted = Counter({trace.name: trace.count for trace in plan.spec.traces})
    limits = {host.name: host.count for host in plan.spec.hosts}
    for placement in plan.placements:
        placed = Counter(program for host in placement.hosts for program in host.programs)
        assert placed + Counter(dict(placement.unplaced)) == wanted
        assert all(host.result.fits for host in placement.hosts)
        for kind, used in Counter(host.kind for host in placement.hosts).items():
            limit = limits[kind]
            assert limit is None or used <= limit


@given(
    traces=st.dictionaries(st.integers(1, 60), st.integers(1, 5), min_size=1, max_size=6),
    sizes=st.lists(st.integers(30, 200), min_size=1, max_size=3, unique=True),
    count=st.none() | st.integers(1, 3),
)
def test_every_program_is_placed_once_where_there_is_room(
    directory: Path, traces: dict[int, int], sizes: list[int], count: int | None
) -> None:
    spec = fleet(directory, traces, tuple(sizes), (60,), count=count)
    workers = Arithmetic()
    plan = plan_fleet(spec, workers)
    check(plan)
    assert len(workers.done) == len(set(workers.done)) == plan.units, "no replay is made twice"
    backwards = plan_fleet(spec, Arithmetic(lambda units: units[::-1]))
    assert backwards == plan
    if count is None:
        assert plan.best is not None


def test_the_largest_are_placed_first_and_share_hosts(directory: Path) -> None:
    plan = plan_fleet(fleet(directory, {10: 2, 50: 2, 40: 2}, (60,)), Arithmetic())
    assert [host.programs for host in plan.placements[0].hosts] == [
        ("p50", "p10"),
        ("p50", "p10"),
        ("p40",),
        ("p40",),
    ]


def test_the_best_choice_of_sizes_has_the_least_epc(directory: Path) -> None:
    plan = plan_fleet(fleet(directory, {40: 4}, (45, 70, 160)), Arithmetic())
    assert [len(one.hosts) for one in plan.placements] == [4, 4, 1]
    assert plan.best is plan.placements[2]
    assert plan.best.epc_bytes == 160 * PAGE


def test_a_program_that_no_host_has_room_for_is_named(directory: Path) -> None:
    plan = plan_fleet(fleet(directory, {60: 2, 20: 1}, (50,)), Arithmetic())
    assert plan.placements[0].unplaced == (("p60", 2),)
    assert plan.best is None


def test_a_program_runs_only_on_the_hosts_that_it_names(directory: Path) -> None:
    spec = FleetSpec(
        (FleetHost("a", (60 * PAGE,)), FleetHost("b", (60 * PAGE,))),
        (
            FleetTrace("one", directory / "30", 2, hosts=("b",)),
            FleetTrace("other", directory / "30"),
        ),
    )
    plan = plan_fleet(spec, Arithmetic())
    on = {host.kind: host.programs for host in plan.placements[0].hosts}
    assert on == {"b": ("one", "one"), "a": ("other",)}


@given(most=st.integers(0, 12))
def test_an_interrupted_fleet_goes_on_where_it_was(directory: Path, most: int) -> None:
    spec = fleet(directory, {10: 3, 50: 2, 40: 2}, (60, 100))
    whole = plan_fleet(spec, Arithmetic())
    assert whole.units > 12
    journal: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        plan_fleet(spec, Arithmetic(most=most), found=lambda one: journal.append(asdict(one)))
    assert len(journal) == most
    known = {result.key: result for result in map(UnitResult.from_json, journal)}
    workers = Arithmetic()
    assert plan_fleet(spec, workers, known) == whole
    assert len(workers.done) == whole.units - most


def test_what_was_cut_off_is_left_out_and_written_anew(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "results")
    for number in range(3):
        journal.append({"number": number})
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole[:-5])
    assert [entry["number"] for _line, entry in journal.entries()] == [0, 1]
    journal.append({"number": 2})
    assert journal.path.read_bytes() == whole
    journal.path.write_bytes(b"x" + whole)
    with pytest.raises(SoftSgxError, match="results:1: "):
        list(journal.entries())


# --- real replays -------------------------------------------------------------------------------


def real_fleet(directory: Path) -> FleetSpec:
    traces = []
    for seed, pages in enumerate((60, 90, 140)):
        path = directory / f"t{pages}.trace"
        write_trace(path, trace_of(hot_and_cold(seed, pages, 3000), seconds=0.5))
        traces.append(FleetTrace(path.stem, path, 2, limit_bytes=100 * PAGE if seed else None))
    sizes = tuple(pages * PAGE for pages in (160, 320))
    return FleetSpec((FleetHost("host", sizes),), tuple(traces))


@pytest.mark.slow
def test_what_a_placement_says_is_what_a_replay_of_its_hosts_gives(tmp_path: Path) -> None:
    spec = real_fleet(tmp_path)
    plan = plan_fleet(spec, InProcess())
    check(plan)
    assert plan.best is not None
    for host in plan.best.hosts:
        assert host.result.slowdown is not None
        assert host.result.slowdown[1] <= spec.target_slowdown
    (first, _) = plan.placements
    assert len(first.hosts) > 1, "one host has no room for all"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own, at the end of a worker
def test_a_cluster_that_loses_a_worker_places_as_one_process_does(tmp_path: Path) -> None:
    distributed = pytest.importorskip(
        "distributed", reason="Dask is not installed: pip install 'softsgx[cluster]'"
    )
    spec = real_fleet(tmp_path)
    alone = plan_fleet(spec, InProcess())
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as processes:
        cluster = DaskCluster(processes)
        found: list[UnitResult] = []

        def kill_at_the_first(result: UnitResult) -> None:
            found.append(result)
            if len(found) == 1:
                next(iter(processes.workers.values())).process.process.kill()

        together = plan_fleet(spec, cluster, found=kill_at_the_first)
        cluster.close()
    assert together == alone
    assert len(found) == alone.units


def test_a_trace_that_has_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.trace"
    path.write_bytes(b"one")
    asked: list[Unit] = []

    class Recording:
        def run(self, _function: Any, units: Iterator[Any]) -> Iterator[Any]:
            asked.extend(units)
            return map(by_arithmetic, asked)

    plan_fleet(FleetSpec((FleetHost("a", (1 << 20,)),), (FleetTrace("t", path),)), Recording())
    path.write_bytes(b"two")
    with pytest.raises(SoftSgxError, match=r"t\.trace: has changed"):
        replay_unit(asked[0])


# --- the file -----------------------------------------------------------------------------------

HOST = '[[host]]\nname = "a"\nepc = "1MiB"\n'
TRACE = '[[trace]]\nfile = "t.trace"\n'


def test_a_spec_is_what_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(
        "target_slowdown = 1.5\n"
        '[[host]]\nname = "a"\nepc = ["2MiB", "1MiB"]\ncount = 3\n'
        '[[trace]]\nfile = "sub/t.trace"\ncount = 2\nlimit = "512KiB"\nhosts = ["a"]\n'
    )
    spec = load_fleet(str(path))
    assert spec.hosts == (FleetHost("a", (1 << 20, 2 << 20), 3),)
    assert spec.traces == (FleetTrace("t", tmp_path / "sub/t.trace", 2, 1 << 19, ("a",)),)
    assert spec.target_slowdown == 1.5


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "write at least one"),
        (HOST, "write at least one"),
        ("x = 1\n" + HOST + TRACE, "the file: x: not known"),
        ("target_slowdown = 1.0\n" + HOST + TRACE, "not above 1"),
        ("target_slowdown = 'x'\n" + HOST + TRACE, "not a number; write one"),
        ("costs = 'gold'\n" + HOST + TRACE, "gold"),
        ("host = 1\n" + TRACE, "write [[host]]"),
        (HOST + HOST + TRACE, "host a: name used twice"),
        (HOST + TRACE + TRACE, "trace t: name used twice"),
        (HOST.replace("1MiB", "1kB") + TRACE, "too small"),
        (HOST.replace('"1MiB"', "[]") + TRACE, "no size; write at least one"),
        (HOST.replace("1MiB", "much") + TRACE, "not a size"),
        (HOST + "count = 0\n" + TRACE, "count = 0"),
        (HOST + "cores = 4\n" + TRACE, "cores: not known"),
        (HOST + TRACE + "hosts = ['b']\n", "no such host"),
        (HOST + TRACE + "limit = '1KiB'\n", "too small"),
        (HOST + "[[trace]]\n", "trace: file"),
        ("[", "fleet.toml: "),
    ],
)
def test_what_a_spec_cannot_say_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text)
    with pytest.raises(SoftSgxError) as refused:
        load_fleet(str(path))
    line = str(refused.value)
    assert line.startswith(f"{path}: ")
    assert problem in line
    assert "\n" not in line
