"""A plan as text for a terminal, in 80 columns."""

from __future__ import annotations

import textwrap

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softsgx.arch import PAGE_BYTES
from softsgx.plan.result import Plan, SizeResult, TraceSummary
from softsgx.plan.sentence import exact_size, percent
from softsgx.sizes import size_text

__all__ = ["print_plan"]


def print_plan(plan: Plan, console: Console) -> None:
    """Print the whole plan: the answer first."""
    width = console.width
    console.print(Text(_filled(plan.recommendation.text, width), "bold"))
    console.print()
    for trace in plan.traces:
        console.print(_filled(_trace(trace), width))
    used = size_text(plan.footprint_pages * PAGE_BYTES)
    console.print(
        _filled(
            f"{plan.footprint_pages:,} pages are used ({used}); SECS and VA pages take"
            f" {plan.overhead_pages:,} more",
            width,
        )
    )
    if plan.options:
        changed = ", ".join(f"{name} {value}" for name, value in plan.options)
        console.print(_filled(f"not as Linux: {changed}", width))
    console.print()
    console.print(_sizes(plan))
    if any(not size.certain for size in plan.sizes):
        console.print(Text("? the trace is not precise enough for this size", "dim"))
    if plan.policies:
        console.print()
        console.print(_policies(plan))
    console.print()
    for remark in plan.remarks:
        console.print(Text(_filled(remark, width), "dim"))


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False, break_long_words=False)


def _trace(trace: TraceSummary) -> str:
    precision = trace.precision
    if trace.interval_seconds:
        precision = f"intervals of {trace.interval_seconds * 1e3:g} ms"
    enclaves = "1 enclave" if trace.enclaves == 1 else f"{trace.enclaves} enclaves"
    text = (
        f"{trace.name}: {precision}, {trace.accesses:,} accesses to {trace.footprint_pages:,}"
        f" pages of {enclaves}"
    )
    if trace.seconds:
        text += f" in {trace.seconds:.3g} s"
    if trace.group != "/":
        text += f", group {trace.group}"
    return text


def _sizes(plan: Plan) -> Table:
    table = _table("EPC", "loads", "loads/s", "evictions", "slowdown", "band", "")
    for size in plan.sizes:
        table.add_row(*_row(size), style=_style(plan, size))
    return table


def _row(size: SizeResult) -> tuple[str, ...]:
    mark = "" if size.certain else "?"
    if not size.possible:
        return exact_size(size.epc_bytes), "", "", "", "no room", "", mark
    rate, slowdown = size.loads_per_second, size.slowdown
    return (
        exact_size(size.epc_bytes),
        f"{size.loads:,}",
        "" if rate is None else f"{rate:,.0f}",
        f"{size.evictions:,}",
        "" if slowdown is None else percent(slowdown.typical),
        "" if slowdown is None else f"{percent(slowdown.low)} – {percent(slowdown.high)}",
        mark,
    )


def _style(plan: Plan, size: SizeResult) -> str:
    return "green" if size.epc_bytes == plan.recommendation.epc_bytes else ""


def _policies(plan: Plan) -> Table:
    table = _table("loads at EPC", "linux", *(policy.policy for policy in plan.policies))
    for at, size in enumerate(plan.sizes):
        others = [policy.loads[at] for policy in plan.policies]
        loads = [size.loads if size.possible else None, *others]
        shown = ["no room" if load is None else f"{load:,}" for load in loads]
        table.add_row(exact_size(size.epc_bytes), *shown)
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="cyan")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table
