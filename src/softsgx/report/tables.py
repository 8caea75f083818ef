"""A run as text for a terminal: what ``softsgx run`` says at the end.

Few enclaves get a paragraph each, many a row; either way it fits into 80 columns.
"""

from __future__ import annotations

import re
import textwrap

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from softsgx.arch import PAGE_BYTES
from softsgx.costs import Estimate
from softsgx.report.summary import Collector, EnclaveSummary, RunSummary
from softsgx.report.verdict import verdict
from softsgx.sizes import size_text

__all__ = [
    "cycles_text",
    "enclave_name",
    "error_console",
    "print_summary",
    "seconds_text",
    "status_line",
]

_PARAGRAPHS = 3
_ROWS = 20
_LARGE = 1_000_000
_ALMOST = 0.9995  # what three digits round up to 1
_NAME_WIDTH = 12
_BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:s|ms|µs|GHz)\b)")
_NAMES = {
    "major": "reloaded",
    "minor": "already resident",
    "augment": "new",
    "busy": "had to wait",
    "refused": "refused",
}
_INJECTED = {
    "power_losses": "losses of power",
    "refused_inits": "refused INITs",
    "poisoned_pages": "poisoned pages",
    "ticks": "exits by ticks",
}


def error_console() -> Console:
    """Return a console on stderr that prints summaries as they are."""
    return Console(stderr=True, highlight=False, markup=False)


def print_summary(run: RunSummary, console: Console) -> None:
    """Print the whole run."""
    width = console.width
    _print_head(run, console)
    for enclave in run.enclaves[:_PARAGRAPHS] if len(run.enclaves) <= _PARAGRAPHS else ():
        console.print(_paragraph(enclave, width))
    if len(run.enclaves) > _PARAGRAPHS:
        console.print(_rows(run))
    injected = [f"{_INJECTED[what]} {count:,}" for what, count in run.injected.items() if count]
    if injected:
        console.print(_line("on demand", ", ".join(injected), width, indent=0))
    if len(run.enclaves) > 1:
        console.print(_line("on silicon", _estimate_text(run.estimate), width, indent=0))
    if run.estimate.unpriced:
        unpriced = ", ".join(run.estimate.unpriced)
        console.print(Text(f"not priced, since no figure is known: {unpriced}", "dim"))
    if run.estimate.items:
        basis = textwrap.fill(run.estimate.profile.basis_text, width)
        console.print(Text(basis, "dim"))


def status_line(collector: Collector) -> str:
    """Return how a run stands in one short line; may be called from another thread."""
    assert collector.platform is not None, "a status before the collector was attached"
    epc_bytes = collector.platform.core.epc_pages * PAGE_BYTES
    resident, totals = collector.resident(), collector.totals()
    return (
        f"softsgx: {collector.elapsed_s:.0f} s, {_times(len(resident), 'enclave')}, "
        f"{size_text(sum(resident.values()) * PAGE_BYTES)} of {size_text(epc_bytes)} EPC, "
        f"{totals.faults:,} faults, {totals.evictions:,} evictions"
    )


def enclave_name(enclave: EnclaveSummary) -> str:
    """Return ``enclave 3 (0a1b2c3d…)``: its number and how MRENCLAVE begins, if it has one."""
    digest = "" if enclave.mrenclave is None else f" ({enclave.mrenclave[:8]}…)"
    return f"enclave {enclave.number}{digest}"


def seconds_text(seconds: float) -> str:
    """Return ``81.5 ms`` for seconds."""
    if seconds >= _ALMOST:
        return f"{seconds:.2f} s"
    if seconds >= _ALMOST * 1e-3:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs" if seconds else "0 s"


def cycles_text(cycles: int) -> str:
    """Return ``1.25 G`` for cycles."""
    for unit, scale in ((" T", 10**12), (" G", 10**9), (" M", 10**6), (" k", 10**3)):
        if cycles >= _ALMOST * scale:
            return f"{cycles / scale:.3g}{unit}"
    return str(cycles)


def _print_head(run: RunSummary, console: Console) -> None:
    platform = run.platform
    ended = f"exit status {run.exit_status}" if run.signal is None else f"ended by {run.signal}"
    import shlex

    head = Text(f"softsgx: {shlex.join(run.command)}", "bold")
    head.append(f": {ended}", "not bold")
    console.print(head)
    console.print(textwrap.fill(verdict(run).text, console.width))
    times = (
        f"{seconds_text(run.wall_s)}, of which reclaim {seconds_text(platform.reclaim_s)}; "
        f"processor time: program {seconds_text(run.program_s)}, "
        f"softsgx {seconds_text(run.supervisor_s)}"
    )
    epc = (
        f"EPC {size_text(platform.epc_bytes)}, {size_text(platform.peak_epc_bytes)} used at most; "
        f"{platform.profile}, pager {platform.pager}"
    )
    console.print(textwrap.fill(times, console.width))
    console.print(textwrap.fill(epc, console.width))
    if platform.defects:
        defects = f"defects switched on: {', '.join(platform.defects)}"
        console.print(Text(textwrap.fill(defects, console.width), "yellow"))
    for group in run.groups:
        if group.max_bytes is not None:
            refused = f", {_times(group.refused, 'charge')} refused" if group.refused else ""
            console.print(
                f"group {group.path}: limit {size_text(group.max_bytes)}, "
                f"peak {size_text(group.peak_bytes)}{refused}"
            )


def _paragraph(enclave: EnclaveSummary, width: int) -> RenderableType:
    title = Text(enclave_name(enclave), "bold")
    title.append(
        f": {size_text(enclave.size_bytes)}, {enclave.pages_added:,} pages added, "
        f"peak resident {size_text(enclave.peak_resident_bytes)}",
        "not bold",
    )
    if enclave.state != "initialized":
        title.append(f", {enclave.state}", "yellow not bold")
    kinds = [f"{count:,} {_NAMES[kind]}" for kind, count in enclave.faults.items() if count]
    faults = f"{enclave.fault_count:,}"
    if kinds:
        each = enclave.fault_s / enclave.fault_count
        faults += (
            f" ({', '.join(kinds)}); {seconds_text(enclave.fault_s)}, {seconds_text(each)} each"
        )
    return Group(
        title,
        _line("faults", faults, width),
        _line(
            "paging",
            f"{enclave.evictions:,} evictions, {enclave.reloads:,} reloads; EWB {enclave.ewb:,}, "
            f"ELDU {enclave.reloads:,}, ETRACK {enclave.etrack:,}, IPI {enclave.ipi:,}",
            width,
        ),
        _line(
            "crossings",
            f"EENTER {enclave.eenter:,}, EEXIT {enclave.eexit:,}, AEX {enclave.aex:,}, "
            f"ERESUME {enclave.eresume:,}",
            width,
        ),
        _line("on silicon", _estimate_text(enclave.estimate), width),
    )


def _rows(run: RunSummary) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="cyan")
    columns = ("enclave", "size", "peak", "faults", "evicted", "reloaded", "enter", "AEX", "cycles")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    ranked = sorted(run.enclaves, key=lambda enclave: enclave.fault_count, reverse=True)
    for enclave in sorted(ranked[:_ROWS], key=lambda enclave: enclave.number):
        mark = {"initialized": "", "killed": " killed", "building": " new"}[enclave.state]
        table.add_row(
            f"{enclave.number}{mark}",
            size_text(enclave.size_bytes),
            size_text(enclave.peak_resident_bytes),
            _count(enclave.fault_count),
            _count(enclave.evictions),
            _count(enclave.reloads),
            _count(enclave.eenter),
            _count(enclave.aex),
            cycles_text(enclave.estimate.typical),
        )
    more = len(run.enclaves) - _ROWS
    if more <= 0:
        return table
    return Group(table, Text(f"and {more} more with fewer faults; --json has them all", "dim"))


def _line(name: str, text: str, width: int, indent: int = 2) -> RenderableType:
    """A name and its text; the lines of a long text stay in their column."""
    start = indent + _NAME_WIDTH
    glued = _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)
    wrapped = textwrap.wrap(glued, max(width - start, 20), break_on_hyphens=False)
    line = Text(" " * indent)
    line.append(name.ljust(_NAME_WIDTH), "cyan")
    line.append(("\n" + " " * start).join(wrapped).replace("\N{NO-BREAK SPACE}", " "))
    return line


def _estimate_text(estimate: Estimate) -> str:
    profile = estimate.profile
    cycles = f"about {cycles_text(estimate.typical)} cycles"
    band = f"{cycles_text(estimate.low)} to {cycles_text(estimate.high)}"
    time = f"{seconds_text(estimate.seconds)} at {profile.hertz / 1e9:g} GHz"
    return f"{cycles} ({band}), {time}; prices of {profile.name}"


def _count(count: int) -> str:
    return f"{count:,}" if count < _LARGE else cycles_text(count)


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
