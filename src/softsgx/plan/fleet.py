"""Which hosts run which programs: placements that keep the slowdown of every host below a target.

Programs are placed one after the other, those with the most pages first, on the first host that
has room: first fit decreasing.  A host has room if a replay of all its programs side by side, in
its EPC and with their limits, meets the target.  Such a replay is a unit of work.  Its result
depends only on the unit, so any worker can run it, in any order, and a unit with a known result is
not run again.

Where hosts have several EPC sizes to choose from, the fleet is placed once for each choice.  All
placements advance together, so that many units can run at once.

First fit decreasing is no search for the optimum: there may be a placement on fewer hosts.

Source:
    D. S. Johnson, "Near-optimal bin packing algorithms", 1973.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

from softsgx.costs import CostProfile
from softsgx.errors import SoftSgxError
from softsgx.plan.fleet_spec import FleetHost, FleetSpec, FleetTrace
from softsgx.plan.loading import PlannedTrace
from softsgx.plan.planner import Host, plan
from softsgx.workers import Workers

__all__ = [
    "FleetPlan",
    "PlacedHost",
    "Placement",
    "Tenant",
    "Unit",
    "UnitResult",
    "plan_fleet",
    "replay_unit",
]

_MOST_CHOICES = 256

Choice = Mapping[str, int]
"""An EPC size for each kind of hosts, bytes."""


@dataclass(frozen=True, slots=True, order=True)
class Tenant:
    """A program on a host.

    Attributes:
        digest: SHA-256 of its trace.
        path: of the trace.
        limit_bytes: ``misc.max`` of its own group; 0 for no limit.
    """

    digest: str
    path: str
    limit_bytes: int


@dataclass(frozen=True, slots=True)
class Unit:
    """The question whether programs can share a host.

    Attributes:
        epc_bytes: of the host.
        tenants: ascending; a program that runs twice is there twice.
        target_slowdown, costs: those of the fleet.
    """

    epc_bytes: int
    tenants: tuple[Tenant, ...]
    target_slowdown: float
    costs: CostProfile

    @property
    def key(self) -> str:
        """Identifies the result: it does not depend on the paths of the traces."""
        tenants = [(tenant.digest, tenant.limit_bytes) for tenant in self.tenants]
        text = repr((self.epc_bytes, sorted(tenants), self.target_slowdown, self.costs))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class UnitResult:
    """The answer.

    Attributes:
        key: of the unit.
        fits: whether the target is met.
        footprint_pages: pages of all programs.
        slowdown: low, typical and high; ``None`` where an allocation failed, or without times.
        loads, evictions: of a replay.
        loads_per_second: ``None`` where a trace has no times.
    """

    key: str
    fits: bool
    footprint_pages: int
    slowdown: tuple[float, float, float] | None
    loads: int
    evictions: int
    loads_per_second: float | None

    @classmethod
    def from_json(cls, document: Any) -> Self:
        """Return the result of an object that :func:`dataclasses.asdict` has returned."""
        slowdown = document["slowdown"]
        return cls(**{**document, "slowdown": None if slowdown is None else tuple(slowdown)})


@dataclass(frozen=True, slots=True)
class PlacedHost:
    """One host and its programs.

    Attributes:
        kind: of the host.
        epc_bytes: its EPC.
        programs: names, in the order of placement.
        result: of all of them side by side.
    """

    kind: str
    epc_bytes: int
    programs: tuple[str, ...]
    result: UnitResult


@dataclass(frozen=True, slots=True)
class Placement:
    """All programs, for one choice of EPC sizes.

    Attributes:
        sizes: (kind of hosts, EPC in bytes) of each kind.
        hosts: those that are used.
        unplaced: (program, how many) for which no host has room.
    """

    sizes: tuple[tuple[str, int], ...]
    hosts: tuple[PlacedHost, ...]
    unplaced: tuple[tuple[str, int], ...]

    @property
    def epc_bytes(self) -> int:
        """EPC of all hosts that are used."""
        return sum(host.epc_bytes for host in self.hosts)


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """See the module.

    Attributes:
        spec: the fleet.
        placements: one for each choice of EPC sizes.
        units: how many replays they are made of.
    """

    spec: FleetSpec
    placements: tuple[Placement, ...]
    units: int

    @property
    def best(self) -> Placement | None:
        """The placement of all programs with the least EPC, of those the one on fewest hosts."""
        whole = [placement for placement in self.placements if not placement.unplaced]
        return min(whole, key=lambda one: (one.epc_bytes, len(one.hosts)), default=None)


def plan_fleet(
    spec: FleetSpec,
    workers: Workers,
    known: Mapping[str, UnitResult] | None = None,
    found: Callable[[UnitResult], None] = lambda _result: None,
) -> FleetPlan:
    """Place the programs of a fleet.

    Args:
        spec: the fleet.
        workers: run the replays; each worker needs the traces under the same paths.
        known: results of an earlier run, by key.
        found: called with each new result, at once.

    Raises:
        SoftSgxError: a trace cannot be read, or there are too many choices of EPC sizes.
    """
    choices = _choices(spec)
    tenants = {trace.name: _tenant(trace) for trace in spec.traces}
    results: dict[str, UnitResult] = {}
    before = dict(known or {})
    running = {at: _Placing(spec, choice, tenants).steps() for at, choice in enumerate(choices)}
    wanted = {at: next(steps) for at, steps in running.items()}
    placements: dict[int, Placement] = {}
    while running:
        units = {unit.key: unit for asked in wanted.values() for unit in asked}
        for key in units.keys() & before.keys():
            results[key] = before[key]
        missing = (unit for key, unit in units.items() if key not in results)
        for result in workers.run(replay_unit, missing):
            found(result)
            results[result.key] = result
        for at, steps in list(running.items()):
            try:
                wanted[at] = steps.send(results)
            except StopIteration as ended:
                placements[at] = ended.value
                del running[at], wanted[at]
    return FleetPlan(spec, tuple(placements[at] for at in range(len(choices))), len(results))


def replay_unit(unit: Unit) -> UnitResult:
    """Return whether the programs of a unit can share its host: a pure function.

    Raises:
        SoftSgxError: a trace is not the one that the unit names.
    """
    for path, digest in {(tenant.path, tenant.digest) for tenant in unit.tenants}:
        if _digest(Path(path)) != digest:
            raise SoftSgxError(
                f"{path}: has changed, or is another file on this worker; copy the same trace to "
                "every worker, and do not change it meanwhile"
            )
    groups = [f"program{number}" for number in range(1, len(unit.tenants) + 1)]
    planned = plan(
        [
            PlannedTrace(tenant.path, group)
            for tenant, group in zip(unit.tenants, groups, strict=True)
        ],
        Host(
            unit.epc_bytes,
            unit.epc_bytes,
            {
                group: tenant.limit_bytes
                for tenant, group in zip(unit.tenants, groups, strict=True)
                if tenant.limit_bytes
            },
        ),
        costs=unit.costs,
        target_slowdown=unit.target_slowdown,
    )
    (size,) = planned.sizes
    band = size.slowdown
    return UnitResult(
        key=unit.key,
        fits=planned.recommendation.epc_bytes is not None,
        footprint_pages=planned.footprint_pages,
        slowdown=None if band is None or not size.possible else (band.low, band.typical, band.high),
        loads=size.loads,
        evictions=size.evictions,
        loads_per_second=size.loads_per_second,
    )


class _Open:
    """A host that has programs."""

    def __init__(self, kind: FleetHost, program: str, tenant: Tenant) -> None:
        self.kind = kind
        self.programs, self.tenants = [program], [tenant]

    def add(self, program: str, tenant: Tenant) -> None:
        self.programs.append(program)
        self.tenants.append(tenant)


class _Placing:
    """One placement that is being made."""

    def __init__(self, spec: FleetSpec, choice: Choice, tenants: Mapping[str, Tenant]) -> None:
        self._spec, self._choice, self._tenants = spec, choice, tenants
        self._opened: list[_Open] = []
        self._unplaced: dict[str, int] = {}

    def steps(self) -> Generator[list[Unit], Mapping[str, UnitResult], Placement]:
        """Yield the units that the next decision needs; receive the results of all units so far."""
        spec = self._spec
        alone = {
            trace.name: [self._unit(kind, self._tenants[trace.name]) for kind in kinds]
            for trace in spec.traces
            if (kinds := spec.kinds_for(trace))
        }
        results = yield [unit for units in alone.values() for unit in units]

        def pages(trace: FleetTrace) -> int:
            return max(results[unit.key].footprint_pages for unit in alone[trace.name])

        for trace in sorted(spec.traces, key=lambda trace: (-pages(trace), trace.name)):
            for _copy in range(trace.count):
                results = yield self._questions(trace)
                self._place(trace, results)
        return self._placement(results)

    def _questions(self, trace: FleetTrace) -> list[Unit]:
        return [unit for _host, unit in self._candidates(trace)]

    def _place(self, trace: FleetTrace, results: Mapping[str, UnitResult]) -> None:
        """Put one program on the first host that has room."""
        tenant = self._tenants[trace.name]
        for host, unit in self._candidates(trace):
            if results[unit.key].fits:
                if isinstance(host, _Open):
                    host.add(trace.name, tenant)
                else:
                    self._opened.append(_Open(host, trace.name, tenant))
                return
        self._unplaced[trace.name] = self._unplaced.get(trace.name, 0) + 1

    def _candidates(self, trace: FleetTrace) -> Iterator[tuple[_Open | FleetHost, Unit]]:
        """Yield the hosts that may run a program, those in use first, each with the unit to run."""
        tenant, kinds = self._tenants[trace.name], self._spec.kinds_for(trace)
        for host in self._opened:
            if host.kind in kinds:
                yield host, self._unit(host.kind, tenant, *host.tenants)
        for kind in kinds:
            used = sum(host.kind is kind for host in self._opened)
            if kind.count is None or used < kind.count:
                yield kind, self._unit(kind, tenant)

    def _unit(self, kind: FleetHost, *tenants: Tenant) -> Unit:
        spec = self._spec
        return Unit(
            self._choice[kind.name], tuple(sorted(tenants)), spec.target_slowdown, spec.costs
        )

    def _placement(self, results: Mapping[str, UnitResult]) -> Placement:
        hosts = tuple(
            PlacedHost(
                host.kind.name,
                self._choice[host.kind.name],
                tuple(host.programs),
                results[self._unit(host.kind, *host.tenants).key],
            )
            for host in self._opened
        )
        return Placement(tuple(self._choice.items()), hosts, tuple(self._unplaced.items()))


def _choices(spec: FleetSpec) -> list[Choice]:
    names = [host.name for host in spec.hosts]
    choices: list[Choice] = [
        dict(zip(names, sizes, strict=True))
        for sizes in product(*(host.epc_bytes for host in spec.hosts))
    ]
    if len(choices) > _MOST_CHOICES:
        raise SoftSgxError(
            f"epc: {len(choices)} choices of sizes; give at most {_MOST_CHOICES} in all"
        )
    return choices


def _tenant(trace: FleetTrace) -> Tenant:
    return Tenant(_digest(trace.path), str(trace.path.absolute()), trace.limit_bytes or 0)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
