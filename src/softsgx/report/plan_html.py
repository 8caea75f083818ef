"""A plan as one page that opens offline: the answer, curve, residency, fault rates, prices."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from html import escape

from softsgx.arch import PAGE_BYTES
from softsgx.costs import Price
from softsgx.plan.result import Curve, Plan, SizeResult
from softsgx.plan.sentence import exact_size, percent
from softsgx.report.charts import COLOURS, Axis, HeatMap, Mark, Series, heat_map, lines
from softsgx.report.elements import (
    document_page,
    figure,
    prices_table,
    silicon_figure,
    table,
    tiles,
)
from softsgx.report.tables import seconds_text
from softsgx.sizes import size_text

__all__ = ["plan_page"]

_MIB = 1 << 20
_MOST_ROWS = 100
_BLUE, _ORANGE, _GREEN = COLOURS[:3]


def plan_page(plan: Plan) -> str:
    """Return the page."""
    size = _told(plan)
    fit = "small" if plan.recommendation.epc_bytes is None else "fits"
    names = ", ".join(trace.program or trace.name for trace in plan.traces)
    parts = [
        f"<h1>EPC for <code>{escape(names)}</code></h1>",
        f"<p class='verdict {fit}'>{escape(plan.recommendation.text)}</p>",
        *(f"<p>{escape(remark)}</p>" for remark in plan.remarks),
        tiles(_tiles(plan, size)),
        _curve(plan),
        _slowdowns(plan),
        _residency(plan),
        _rates(plan),
        _sizes(plan),
        _policies(plan),
        silicon_figure(
            size.estimate,
            f"Paging on silicon, in an EPC of {exact_size(size.epc_bytes)} ({_basis(plan)})",
            "beside what the program itself computes",
        ),
        prices_table(plan.costs.basis_text, _prices(plan)),
        _traces(plan),
        _enclaves(plan, size),
    ]
    return document_page(f"plan of {names}", parts)


def _told(plan: Plan) -> SizeResult:
    """Return the recommended size, or the one that residency is for."""
    wanted = plan.recommendation.epc_bytes or plan.residency.epc_bytes
    return min(plan.sizes, key=lambda size: abs(size.epc_bytes - wanted))


def _basis(plan: Plan) -> str:
    """Return what the prices of paging are based on, in a word or two."""
    checked = [price.checked for price in _prices(plan)]
    if all(checked):
        return "with sources"
    return "partly estimated" if any(checked) else "estimated"


def _prices(plan: Plan) -> list[Price]:
    """Return the prices that the slowdowns are made from, at any size."""
    used = {item.price.event: item.price for size in plan.sizes for item in size.estimate.items}
    return [plan.costs.swap, *used.values()] if used else []


def _tiles(plan: Plan, size: SizeResult) -> list[tuple[str, str]]:
    values = []
    recommended = plan.recommendation
    if recommended.epc_bytes is not None:
        values.append((exact_size(recommended.epc_bytes), "of EPC are enough"))
    if recommended.kubernetes is not None:
        values.append((recommended.kubernetes, "sgx.intel.com/epc, for a container of its own"))
    if size.slowdown is not None:
        band = f"{percent(size.slowdown.low)} to {percent(size.slowdown.high)}"
        values.append(
            (percent(size.slowdown.typical), f"longer, predicted: {band} ({_basis(plan)})")
        )
    used = size_text(plan.footprint_pages * PAGE_BYTES)
    values.append((used, f"used: {plan.footprint_pages:,} pages"))
    values.append((f"{plan.overhead_pages:,}", "SECS and VA pages beside them"))
    values.append(
        (f"{size.loads:,}", f"pages loaded again in an EPC of {exact_size(size.epc_bytes)}")
    )
    if size.loads_per_second is not None:
        values.append((f"{size.loads_per_second:,.0f}", "of them per second"))
    return values


# --- charts --------------------------------------------------------------------------------------


def _curve(plan: Plan) -> str:
    """Draw the misses of LRU, and of Linux's policy at the sizes that were replayed."""
    curve, overhead = plan.curve, plan.overhead_pages
    possible = [size for size in plan.sizes if size.possible]
    linux = [(size.epc_bytes / _MIB, float(size.faults)) for size in possible]
    exact = [
        (_mib(pages + overhead), float(missed))
        for pages, missed in zip(curve.pages, curve.misses, strict=True)
    ]
    places = {at for at, _ in (*linux, *exact) if at >= plan.sizes[0].epc_bytes / _MIB}
    sizes = sorted(places)
    if len(sizes) < 2 or not curve.accesses:
        return ""
    series = [
        Series("LRU", _ratios(exact, sizes, curve), _BLUE),
        Series("Linux", _ratios(linux, sizes, curve), _ORANGE),
    ]
    knee = curve.knee_pages
    upright = []
    if knee is not None:
        upright.append(
            Mark(f"knee {size_text((knee + overhead) * PAGE_BYTES)}", _mib(knee + overhead))
        )
    chosen = plan.recommendation.epc_bytes
    if chosen is not None:
        upright.append(Mark(f"enough {exact_size(chosen)}", chosen / _MIB))
    note = (
        "Accesses that miss, by the size of the EPC, SECS and VA pages included. LRU is exact at "
        f"every size; Linux was replayed at {len(possible)} sizes. First accesses miss at every "
        f"size: {_ratio(curve.cold_misses, curve)}."
    )
    axis = Axis("MiB", "EPC in MiB")
    chart = lines(sizes, series, unit="%", axis=axis, upright=upright)
    return figure("Miss-ratio curve", note, chart)


def _ratios(
    known: Sequence[tuple[float, float]], sizes: Sequence[float], curve: Curve
) -> list[float | None]:
    """Return the percentages at sizes, on straight lines between the known ones."""
    return [
        None if value is None else 100 * value / curve.accesses
        for value in (_between(known, at) for at in sizes)
    ]


def _between(known: Sequence[tuple[float, float]], at: float) -> float | None:
    """Return the value at a place, ``None`` outside of the known ones."""
    index = bisect_right(known, at, key=lambda one: one[0])
    if index == 0:
        return None
    before_at, before = known[index - 1]
    if index == len(known):
        return before if at == before_at else None
    after_at, after = known[index]
    return before + (after - before) * (at - before_at) / (after_at - before_at)


def _ratio(count: int, curve: Curve) -> str:
    return f"{100 * count / curve.accesses:.2g}\N{NO-BREAK SPACE}%"


def _slowdowns(plan: Plan) -> str:
    """Draw the predicted slowdown at the sizes that were replayed, with its band."""
    found = [
        (size.epc_bytes / _MIB, size.slowdown)
        for size in plan.sizes
        if size.possible and size.slowdown is not None
    ]
    if len(found) < 2:
        return ""
    series = [
        Series("high", [100 * (slowdown.high - 1) for _, slowdown in found], "var(--quiet)"),
        Series("typical", [100 * (slowdown.typical - 1) for _, slowdown in found], _ORANGE),
        Series("low", [100 * (slowdown.low - 1) for _, slowdown in found], "var(--quiet)"),
    ]
    target = Mark(f"target {percent(plan.target_slowdown)}", 100 * (plan.target_slowdown - 1))
    note = f"How much longer the program takes, by the size of the EPC; prices: {_basis(plan)}."
    sizes = [at for at, _ in found]
    chart = lines(sizes, series, unit="%", mark=target, axis=Axis("MiB", "EPC in MiB"))
    return figure("Predicted slowdown", note, chart)


def _time_axis(plan: Plan) -> tuple[Axis, float]:
    """Return the axis of what happens over time, and its end."""
    found = plan.residency
    if found.bin_seconds:
        axis = Axis("s", "seconds since the first access")
        return axis, found.bin_seconds * len(found.loads)
    return Axis("%", "percent of the accesses"), 100.0


def _residency(plan: Plan) -> str:
    found = plan.residency
    if not found.resident:
        return ""
    axis, end = _time_axis(plan)
    rows = len(found.page_bins)
    ticks = [(row / rows, f"{found.page_bins[row]:,}") for row in range(0, rows, max(1, rows // 4))]
    ticks[0] = (0.0, "page 0")
    heat = HeatMap(
        shade=("resident", found.resident),
        part=("accessed", found.accessed),
        ticks=ticks,
        names=[(row / rows, name) for row, name in found.enclave_rows],
    )
    note = (
        f"Pages from top to bottom, time from left to right, in an EPC of "
        f"{exact_size(found.epc_bytes)}. Blue: resident at the end of a stretch of time; the "
        "paler, the fewer of a row's pages. The orange part of a row is accessed in the stretch."
    )
    return figure("Residency", note, heat_map(heat, end, axis))


def _rates(plan: Plan) -> str:
    found = plan.residency
    if len(found.loads) < 2:
        return ""
    axis, end = _time_axis(plan)
    bins = len(found.loads)
    times = [end * number / (bins - 1) for number in range(bins)]
    each = found.bin_seconds or 1.0
    series = [
        Series("first accesses", [count / each for count in found.made], _BLUE),
        Series("loads", [count / each for count in found.loads], _GREEN),
    ]
    unit = "/s" if found.bin_seconds else "pages"
    note = (
        f"Page faults in an EPC of {exact_size(found.epc_bytes)}: first accesses make a page, "
        "loads bring an evicted one back."
    )
    return figure("Page faults over time", note, lines(times, series, unit=unit, axis=axis))


# --- tables --------------------------------------------------------------------------------------


def _sizes(plan: Plan) -> str:
    chosen = plan.recommendation.epc_bytes
    marked = [number for number, size in enumerate(plan.sizes) if size.epc_bytes == chosen]
    note = "Replays with Linux's policy."
    if any(not size.certain for size in plan.sizes):
        note += " ?: the traces are not precise enough for this size."
    heads = ["EPC", "loads", "evictions", "SECS and VA"]
    timed = any(size.slowdown is not None for size in plan.sizes)
    if timed:
        note += " The prices that make the slowdown are listed below."
        heads += ["loads/s", f"slowdown ({_basis(plan)})", "band"]
    rows = [_size_row(size)[: len(heads)] for size in plan.sizes]
    return table("Sizes", note, heads, rows, text=(), marked=marked[0] if marked else None)


def _size_row(size: SizeResult) -> tuple[str, ...]:
    name = exact_size(size.epc_bytes) + ("" if size.certain else " ?")
    if not size.possible:
        return name, "no room", "", f"{size.overhead_pages:,}", "", "", ""
    rate, slowdown = size.loads_per_second, size.slowdown
    return (
        name,
        f"{size.loads:,}",
        f"{size.evictions:,}",
        f"{size.overhead_pages:,}",
        "" if rate is None else f"{rate:,.0f}",
        "" if slowdown is None else percent(slowdown.typical),
        "" if slowdown is None else f"{percent(slowdown.low)} – {percent(slowdown.high)}",
    )


def _policies(plan: Plan) -> str:
    if not plan.policies:
        return ""
    heads = ("EPC", "linux", *(policy.policy for policy in plan.policies))
    rows = []
    for at, size in enumerate(plan.sizes):
        loads = [size.loads if size.possible else None, *(one.loads[at] for one in plan.policies)]
        shown = ("no room" if count is None else f"{count:,}" for count in loads)
        rows.append((exact_size(size.epc_bytes), *shown))
    note = "Pages loaded again with other policies, in the pages that SECS and VA pages leave."
    return table("Policies", note, heads, rows, text=())


def _traces(plan: Plan) -> str:
    heads = ("trace", "program", "precision", "group", "accesses", "pages", "time")
    rows = []
    for trace in plan.traces:
        precision = trace.precision
        if trace.interval_seconds:
            precision += f" of {seconds_text(trace.interval_seconds)}"
        if not trace.complete:
            precision += ", incomplete"
        rows.append(
            (
                trace.name,
                trace.program,
                precision,
                trace.group,
                f"{trace.accesses:,}",
                f"{trace.footprint_pages:,}",
                seconds_text(trace.seconds) if trace.seconds else "",
            )
        )
    note = "What was replayed."
    if plan.options:
        note += " Not as Linux: " + ", ".join(f"{name} {value}" for name, value in plan.options)
    return table("Traces", note, heads, rows, text=(0, 1, 2, 3))


def _enclaves(plan: Plan, size: SizeResult) -> str:
    shown = sorted(size.enclaves, key=lambda one: one.loads, reverse=True)[:_MOST_ROWS]
    note = f"In an EPC of {exact_size(size.epc_bytes)}."
    if len(size.enclaves) > len(shown):
        note += f" The {len(shown)} of {len(size.enclaves)} with the most loads; JSON has all."
    rows = [
        (
            one.name,
            plan.traces[one.trace].name,
            f"{one.pages:,}",
            f"{one.overhead_pages:,}",
            f"{one.loads:,}",
        )
        for one in shown
    ]
    heads = ("enclave", "trace", "pages", "SECS and VA", "loads")
    return table("Enclaves", note, heads, rows, text=(0, 1))


def _mib(pages: int) -> float:
    return pages * PAGE_BYTES / _MIB
