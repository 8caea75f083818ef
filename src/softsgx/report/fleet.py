"""A plan of a fleet as JSON and as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

import softsgx
from softsgx.plan.fleet import FleetPlan, PlacedHost, Placement
from softsgx.plan.sentence import exact_size, percent

__all__ = ["FLEET_FORMAT", "answer", "fleet_document", "print_fleet"]

FLEET_FORMAT = "softsgx-fleet/1"


def fleet_document(plan: FleetPlan) -> dict[str, Any]:
    """Return the plan as one object; ``docs/how-to/fleet.md`` describes it."""
    best = plan.best
    return {
        "format": FLEET_FORMAT,
        "version": softsgx.__version__,
        "target_slowdown": plan.spec.target_slowdown,
        "costs": plan.spec.costs.name,
        "replays": plan.units,
        "best": None if best is None else plan.placements.index(best),
        "placements": [_placement(placement) for placement in plan.placements],
    }


def _placement(placement: Placement) -> dict[str, Any]:
    return {
        "sizes": dict(placement.sizes),
        "epc_bytes": placement.epc_bytes,
        "unplaced": dict(placement.unplaced),
        "hosts": [
            {
                "kind": host.kind,
                "epc_bytes": host.epc_bytes,
                "programs": list(host.programs),
                "slowdown": _slowdown(host),
                "loads": host.result.loads,
                "evictions": host.result.evictions,
                "loads_per_second": host.result.loads_per_second,
            }
            for host in placement.hosts
        ],
    }


def _slowdown(host: PlacedHost) -> dict[str, float] | None:
    band = host.result.slowdown
    if band is None:
        return None
    names = ("low", "typical", "high")
    return {name: round(value, 6) for name, value in zip(names, band, strict=True)}


def print_fleet(plan: FleetPlan, console: Console) -> None:
    """Print the best placement, then what each choice of EPC sizes needs."""
    best = plan.best
    programs = sum(trace.count for trace in plan.spec.traces)
    console.print(answer(best, programs))
    if best is not None:
        console.print(_hosts(best))
    if len(plan.placements) > 1:
        console.print()
        console.print(_choices(plan))
    console.print(f"\n{plan.units} replays; prices of {plan.spec.costs.name}", style="dim")


def answer(best: Placement | None, programs: int) -> str:
    """Return the answer in one sentence.

    Args:
        best: the placement to choose; ``None``: no placement has room for all.
        programs: how many there are.
    """
    if best is None:
        return f"No placement has room for all {programs} programs; add hosts or EPC."
    kinds = Counter((host.kind, host.epc_bytes) for host in best.hosts)
    hosts = ", ".join(
        f"{count} × {kind} ({exact_size(size)})" for (kind, size), count in kinds.items()
    )
    return f"{programs} programs on {hosts}: {exact_size(best.epc_bytes)} of EPC in all."


def _hosts(placement: Placement) -> Table:
    table = _table("host", "EPC", "programs", "slowdown", "loads/s")
    numbers: Counter[str] = Counter()
    for host in placement.hosts:
        numbers[host.kind] += 1
        counts = Counter(host.programs)
        rate = host.result.loads_per_second
        table.add_row(
            f"{host.kind} {numbers[host.kind]}",
            exact_size(host.epc_bytes),
            ", ".join(name if many == 1 else f"{many} × {name}" for name, many in counts.items()),
            _band(host),
            "" if rate is None else f"{rate:,.0f}",
        )
    return table


def _choices(plan: FleetPlan) -> Table:
    table = _table("EPC of", "hosts", "EPC in all", "no room for")
    for placement in plan.placements:
        table.add_row(
            ", ".join(f"{kind} {exact_size(size)}" for kind, size in placement.sizes),
            str(len(placement.hosts)),
            exact_size(placement.epc_bytes),
            ", ".join(f"{many} × {name}" for name, many in placement.unplaced),
        )
    return table


def _band(host: PlacedHost) -> str:
    band = host.result.slowdown
    if band is None:
        return ""
    low, typical, high = map(percent, band)
    return typical if low == high else f"{typical} ({low} to {high})"


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="cyan")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
