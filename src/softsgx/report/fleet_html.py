"""A plan of a fleet as one page that opens offline: the answer, EPC sizes, hosts, prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from softsgx.arch import PAGE_BYTES
from softsgx.costs import Price, estimate
from softsgx.plan.fleet import FleetPlan, PlacedHost, Placement
from softsgx.plan.sentence import exact_size, percent
from softsgx.report.charts import Bar, bars
from softsgx.report.elements import document_page, figure, prices_table, table, tiles
from softsgx.report.fleet import answer
from softsgx.sizes import size_text

__all__ = ["fleet_page"]

_MOST_ROWS = 100
_PRICED = ("aex", "fault", "eldu", "ewb")


def fleet_page(plan: FleetPlan) -> str:
    """Return the page."""
    shown = plan.best or min(plan.placements, key=_missing)
    programs = sum(trace.count for trace in plan.spec.traces)
    fit = "small" if plan.best is None else "fits"
    parts = [
        f"<h1>EPC for {programs:,} programs</h1>",
        f"<p class='verdict {fit}'>{escape(answer(plan.best, programs))}</p>",
        *(f"<p>{escape(remark)}</p>" for remark in _remarks(plan, shown)),
        tiles(_tiles(plan, shown)),
        _sweep(plan),
        _use(shown),
        _hosts(shown),
        _programs(plan, shown),
        _choices(plan),
        prices_table(plan.spec.costs.basis_text, _prices(plan)),
    ]
    return document_page(f"fleet of {programs} programs", parts)


def _missing(placement: Placement) -> tuple[int, int]:
    """Return how many programs a placement has no room for, and its EPC."""
    return sum(many for _name, many in placement.unplaced), placement.epc_bytes


def _remarks(plan: FleetPlan, shown: Placement) -> Iterator[str]:
    if plan.best is None:
        yield (
            "The hosts below are those of the choice that leaves the fewest programs out: "
            f"{_left_out(shown)}."
        )
    yield (
        "Placed by first fit decreasing: there may be a placement on fewer hosts. All programs of "
        "a host begin at the same time."
    )


def _left_out(placement: Placement) -> str:
    return ", ".join(f"{many} × {name}" for name, many in placement.unplaced)


def _tiles(plan: FleetPlan, shown: Placement) -> list[tuple[str, str]]:
    slowest = max(
        (host.result.slowdown[1] for host in shown.hosts if host.result.slowdown), default=None
    )
    values = [
        (f"{len(shown.hosts):,}", "hosts" if len(shown.hosts) != 1 else "host"),
        (exact_size(shown.epc_bytes), "of EPC in all"),
        (percent(plan.spec.target_slowdown), "longer at most, on each host"),
    ]
    if slowest is not None:
        values.append((percent(slowest), "longer on the slowest host, predicted"))
    return [*values, (f"{plan.units:,}", "replays")]


# --- pictures -------------------------------------------------------------------------------------


def _sizes_text(placement: Placement) -> str:
    return ", ".join(f"{kind} {exact_size(size)}" for kind, size in placement.sizes)


def _sweep(plan: FleetPlan) -> str:
    """Draw the EPC in all for each choice of EPC sizes; nothing where there is no choice."""
    if len(plan.placements) < 2:
        return ""
    rows = []
    for placement in plan.placements[:_MOST_ROWS]:
        size = float(placement.epc_bytes)
        hosts = f"{len(placement.hosts):,} host{'s' * (len(placement.hosts) != 1)}"
        missing = _missing(placement)[0]
        text = f"{exact_size(placement.epc_bytes)}, {hosts}"
        name = _sizes_text(placement)
        if missing:
            name += f" (no room for {missing:,})"
        elif placement is plan.best:
            name += " (chosen)"
        rows.append(Bar(name, 0.0, size, 0.0, text))
    note = "EPC of all hosts that are used, for each choice of EPC sizes."
    if len(plan.placements) > len(rows):
        note += f" The first {len(rows)} of {len(plan.placements)}; JSON has all."
    return figure("EPC sizes", note, bars(rows))


def _numbered(hosts: Sequence[PlacedHost]) -> Iterator[tuple[str, PlacedHost]]:
    """Yield hosts with names: their kind and a number."""
    numbers: Counter[str] = Counter()
    for host in hosts[:_MOST_ROWS]:
        numbers[host.kind] += 1
        yield f"{host.kind} {numbers[host.kind]}", host


def _use(placement: Placement) -> str:
    """Draw what the programs of each host use, beside its EPC."""
    rows = []
    for name, host in _numbered(placement.hosts):
        used = host.result.footprint_pages * PAGE_BYTES
        text = f"{size_text(used)} of {exact_size(host.epc_bytes)}"
        rows.append(Bar(name, 0.0, float(used), float(host.epc_bytes), text))
    if not rows:
        return ""
    note = (
        "Bars: pages that the programs of a host use. Thin lines: its EPC; what is more is paged."
    )
    return figure("Use of the hosts", note + _cut(placement), bars(rows))


def _cut(placement: Placement) -> str:
    if len(placement.hosts) <= _MOST_ROWS:
        return ""
    return f" The first {_MOST_ROWS} of {len(placement.hosts)}; JSON has all."


# --- tables ---------------------------------------------------------------------------------------


def _hosts(placement: Placement) -> str:
    rows = []
    for name, host in _numbered(placement.hosts):
        counts, band, rate = Counter(host.programs), host.result.slowdown, host.result
        rows.append(
            (
                name,
                exact_size(host.epc_bytes),
                ", ".join(one if many == 1 else f"{many} × {one}" for one, many in counts.items()),
                "" if band is None else percent(band[1]),
                "" if band is None else f"{percent(band[0])} – {percent(band[2])}",
                f"{host.result.loads:,}",
                f"{host.result.evictions:,}",
                "" if rate.loads_per_second is None else f"{rate.loads_per_second:,.0f}",
            )
        )
    heads = ("host", "EPC", "programs", "slowdown", "band", "loads", "evictions", "loads/s")
    note = "Replays of all programs of a host side by side, with Linux's policy." + _cut(placement)
    return table("Hosts", note, heads, rows, text=(0, 2))


def _programs(plan: FleetPlan, shown: Placement) -> str:
    missing = dict(shown.unplaced)
    rows = [
        (
            trace.name,
            str(trace.path),
            f"{trace.count:,}",
            "max" if trace.limit_bytes is None else exact_size(trace.limit_bytes),
            ", ".join(trace.hosts) or "any",
            f"{missing.get(trace.name, 0):,}",
        )
        for trace in plan.spec.traces
    ]
    heads = ("program", "trace", "count", "limit", "hosts", "no room for")
    note = "What is placed; the limit is misc.max of each one's own group."
    return table("Programs", note, heads, rows, text=(0, 1, 4))


def _choices(plan: FleetPlan) -> str:
    chosen = None if plan.best is None else plan.placements.index(plan.best)
    rows = [
        (
            _sizes_text(placement),
            f"{len(placement.hosts):,}",
            exact_size(placement.epc_bytes),
            _left_out(placement),
        )
        for placement in plan.placements
    ]
    heads = ("EPC of", "hosts", "EPC in all", "no room for")
    return table(
        "Choices",
        "The placement of all programs for each choice of EPC sizes.",
        heads,
        rows,
        text=(0, 3),
        marked=chosen,
    )


def _prices(plan: FleetPlan) -> list[Price]:
    costs = plan.spec.costs
    items = estimate(dict.fromkeys(_PRICED, 1), costs).items
    return [costs.swap, *(item.price for item in items)]
