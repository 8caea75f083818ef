"""A run as text for a terminal, as ``softsgx run`` prints it at the end.

A few enclaves have a paragraph each, many have a row each; the text fits into 80 columns.  Every
run prints it, so it does not use ``rich``, whose import takes longer than a short program runs.
"""

from __future__ import annotations

import re
import shlex
import textwrap

from softsgx.arch import PAGE_BYTES
from softsgx.costs import Estimate
from softsgx.report.summary import Collector, EnclaveSummary, RunSummary, pager_text
from softsgx.report.verdict import verdict
from softsgx.sizes import size_text

__all__ = [
    "cycles_text",
    "enclave_name",
    "seconds_text",
    "status_line",
    "summary_text",
]

#: Numbers of ECMA-48, "Select Graphic Rendition".
_PLAIN, _BOLD, _DIM, _YELLOW, _CYAN = 0, 1, 2, 33, 36
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


def summary_text(run: RunSummary, width: int, *, styled: bool = False) -> str:
    """Return the whole run as lines.

    Args:
        run: the run.
        width: columns of the terminal.
        styled: whether titles and remarks have a style of their own (ECMA-48).
    """
    page = _Page(width, styled)
    _add_head(run, page)
    if len(run.enclaves) <= _PARAGRAPHS:
        for enclave in run.enclaves:
            _add_paragraph(enclave, page)
    else:
        _add_rows(run, page)
    injected = [f"{_INJECTED[what]} {count:,}" for what, count in run.injected.items() if count]
    if injected:
        page.add_named("on demand", ", ".join(injected), indent=0)
    if len(run.enclaves) > 1:
        page.add_named("on silicon", _estimate_text(run.estimate), indent=0)
    if run.estimate.unpriced:
        unpriced = ", ".join(run.estimate.unpriced)
        page.add(f"not priced, since no figure is known: {unpriced}", _DIM)
    if run.estimate.items:
        page.add(run.estimate.profile.basis_text, _DIM)
    return page.text()


def status_line(collector: Collector) -> str:
    """Return the state of a run in one short line; may be called from another thread."""
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


class _Page:
    """Lines of text, at most as wide as the terminal.

    Args:
        width: columns.
        styled: whether styles are written.
    """

    def __init__(self, width: int, styled: bool) -> None:
        self._width, self._styled = width, styled
        self._lines: list[str] = []

    def text(self) -> str:
        """Return all lines."""
        return "".join(f"{line}\n" for line in self._lines)

    def add(self, text: str, style: int = _PLAIN) -> None:
        """Add a paragraph in one style."""
        lines = textwrap.wrap(text, self._width)
        self._lines += [self._in_style(line, style) for line in lines]

    def add_title(self, title: str, text: str, remark: str = "") -> None:
        """Add a line that begins with a title and may end with a remark."""
        whole = textwrap.fill(f"{title}{text}{remark}", self._width)
        if whole.startswith(title):
            whole = self._in_style(title, _BOLD) + whole[len(title) :]
        word = remark.strip(", ")
        if word and whole.endswith(word):
            whole = whole[: -len(word)] + self._in_style(word, _YELLOW)
        self._lines.append(whole)

    def add_named(self, name: str, text: str, indent: int = 2) -> None:
        """Add a name and its text; the lines of a long text stay in their column."""
        start = indent + _NAME_WIDTH
        glued = _BEFORE_UNIT.sub("\N{NO-BREAK SPACE}", text)
        lines = textwrap.wrap(glued, max(self._width - start, 20), break_on_hyphens=False)
        column = ("\n" + " " * start).join(lines).replace("\N{NO-BREAK SPACE}", " ")
        name = self._in_style(name.ljust(_NAME_WIDTH), _CYAN)
        self._lines.append(f"{' ' * indent}{name}{column}")

    def add_table(self, rows: list[tuple[str, ...]]) -> None:
        """Add columns that end at the right; the first row is their titles."""
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for number, row in enumerate(rows):
            cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            line = "  ".join(cells)
            if len(line) > self._width:
                line = line[: self._width - 1] + "…"
            self._lines.append(self._in_style(line, _PLAIN if number else _CYAN))

    def _in_style(self, text: str, style: int) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self._styled and style else text


def _add_head(run: RunSummary, page: _Page) -> None:
    platform = run.platform
    ended = f"exit status {run.exit_status}" if run.signal is None else f"ended by {run.signal}"
    page.add_title(f"softsgx: {shlex.join(run.command)}", f": {ended}")
    page.add(verdict(run).text)
    page.add(
        f"{seconds_text(run.wall_s)}, of which reclaim {seconds_text(platform.reclaim_s)}; "
        f"processor time: program {seconds_text(run.program_s)}, "
        f"softsgx {seconds_text(run.supervisor_s)}"
    )
    page.add(
        f"EPC {size_text(platform.epc_bytes)}, {size_text(platform.peak_epc_bytes)} used at most; "
        f"{platform.profile}, pager {pager_text(platform)}"
    )
    if platform.defects:
        page.add(f"defects switched on: {', '.join(platform.defects)}", _YELLOW)
    for group in run.groups:
        if group.max_bytes is not None:
            refused = f", {_times(group.refused, 'charge')} refused" if group.refused else ""
            page.add(
                f"group {group.path}: limit {size_text(group.max_bytes)}, "
                f"peak {size_text(group.peak_bytes)}{refused}"
            )


def _add_paragraph(enclave: EnclaveSummary, page: _Page) -> None:
    page.add_title(
        enclave_name(enclave),
        f": {size_text(enclave.size_bytes)}, {enclave.pages_added:,} pages added, "
        f"peak resident {size_text(enclave.peak_resident_bytes)}",
        "" if enclave.state == "initialized" else f", {enclave.state}",
    )
    kinds = [f"{count:,} {_NAMES[kind]}" for kind, count in enclave.faults.items() if count]
    faults = f"{enclave.fault_count:,}"
    if kinds:
        each = enclave.fault_s / enclave.fault_count
        faults += (
            f" ({', '.join(kinds)}); {seconds_text(enclave.fault_s)}, {seconds_text(each)} each"
        )
    page.add_named("faults", faults)
    page.add_named(
        "paging",
        f"{enclave.evictions:,} evictions, {enclave.reloads:,} reloads; EWB {enclave.ewb:,}, "
        f"ELDU {enclave.reloads:,}, ETRACK {enclave.etrack:,}, IPI {enclave.ipi:,}",
    )
    page.add_named(
        "crossings",
        f"EENTER {enclave.eenter:,}, EEXIT {enclave.eexit:,}, AEX {enclave.aex:,}, "
        f"ERESUME {enclave.eresume:,}",
    )
    page.add_named("on silicon", _estimate_text(enclave.estimate))


def _add_rows(run: RunSummary, page: _Page) -> None:
    rows: list[tuple[str, ...]] = [
        ("enclave", "size", "peak", "faults", "evicted", "reloaded", "enter", "AEX", "cycles")
    ]
    ranked = sorted(run.enclaves, key=lambda enclave: enclave.fault_count, reverse=True)
    for enclave in sorted(ranked[:_ROWS], key=lambda enclave: enclave.number):
        mark = {"initialized": "", "killed": " killed", "building": " new"}[enclave.state]
        rows.append(
            (
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
        )
    page.add_table(rows)
    more = len(run.enclaves) - _ROWS
    if more > 0:
        page.add(f"and {more} more with fewer faults; --json has them all", _DIM)


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
