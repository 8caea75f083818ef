"""The screen of ``softsgx top``: a block for each run, as wide and as high as the terminal.

A narrow terminal shows fewer columns; a low one shows the enclaves with the most faults.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from softsgx.live.watching import Watched
from softsgx.sizes import size_text

__all__ = ["screen", "sparkline"]

_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_WIDE = 76
_BAR = 12
_NAME, _SHORT_NAME = 15, 10
_LARGE = 100_000.0


@dataclass(frozen=True, slots=True)
class _Terminal:
    """The terminal.

    Attributes:
        width: columns.
        ascii_only: whether it shows ASCII only.
    """

    width: int
    ascii_only: bool

    @property
    def overflow(self) -> Literal["crop", "ellipsis"]:
        """How rich ends text that is too wide."""
        return "crop" if self.ascii_only else "ellipsis"

    def fit(self, text: Text, room: int | None = None, *, pad: bool = False) -> Text:
        """Cut a line to ``room`` columns; ``None``: to the width of the terminal."""
        width = max(self.width if room is None else room, 1)
        text.truncate(width, overflow=self.overflow, pad=pad)
        return text


def screen(
    runs: Sequence[Watched], *, width: int, height: int | None = None, ascii_only: bool = False
) -> RenderableType:
    """Return the drawing.

    Args:
        runs: in this order.
        width: columns.
        height: lines; ``None``: no limit.
        ascii_only: whether the terminal shows ASCII only.
    """
    rows = None
    if height is not None:
        fixed = sum(_fixed_lines(run) for run in runs)
        rows = max(1, (height - fixed) // max(1, len(runs)))
    terminal = _Terminal(width, ascii_only)
    parts: list[RenderableType] = []
    for run in runs:
        parts += _block(run, terminal, rows)
        parts.append(Text())
    return Group(*parts[:-1])


def sparkline(values: Iterable[float], width: int, *, ascii_only: bool = False) -> str:
    """Return the last ``width`` values as one line, the highest of them as a full block.

    >>> sparkline([0, 1, 2, 4, 8], 4)
    '▂▃▅█'
    """
    blocks = _ASCII_BLOCKS if ascii_only else _BLOCKS
    shown = list(values)[-width:]
    highest = max(shown, default=0.0)
    steps = len(blocks) - 1
    return "".join(blocks[round(value / highest * steps) if highest else 0] for value in shown)


def _fixed_lines(run: Watched) -> int:
    """Return the number of lines of a block without its enclaves."""
    if not run.state:
        return 2
    groups = len(run.state["groups"]) - 1
    return 4 + (groups + 1 if groups else 0) + 2


def _block(run: Watched, terminal: _Terminal, rows: int | None) -> list[RenderableType]:
    state = run.state
    if not state:
        return [terminal.fit(Text(f"{run.pid}  does not answer: {run.silent}", "yellow"))]
    parts: list[RenderableType] = [
        _title(run, terminal),
        _epc(state, terminal) if state["epc"] is not None else _interval(state, terminal),
        _rates(state, terminal),
        _history(run, terminal),
    ]
    if len(state["groups"]) > 1:
        parts.append(_groups(state["groups"], terminal))
    if state["enclaves"]:
        parts += _enclaves(state["enclaves"], terminal, rows)
    else:
        parts.append(Text("no enclave now", "dim"))
    return parts


def _title(run: Watched, terminal: _Terminal) -> Text:
    state = run.state
    time = f"  {_time_text(state['elapsed_seconds'])}"
    if run.silent:
        time += "  does not answer"
    title = Text(f"{run.pid} {state['verb']}: {shlex.join(state['command'])}", "bold")
    terminal.fit(title, terminal.width - len(time), pad=True)
    return title.append(time, "not bold yellow" if run.silent else "not bold")


def _epc(state: dict[str, Any], terminal: _Terminal) -> Text:
    epc = state["epc"]
    filled = round(epc["used_bytes"] / epc["size_bytes"] * _BAR)
    full, empty = ("#", ".") if terminal.ascii_only else ("█", "░")
    line = Text("EPC       ", "cyan")
    if terminal.width >= _WIDE:
        line.append(full * filled + empty * (_BAR - filled) + " ", "not cyan")
    text = f"{size_text(epc['used_bytes'])} of {size_text(epc['size_bytes'])}"
    text += f", {size_text(epc['free_bytes'])} free, {epc['pages'].get('va', 0)} VA pages"
    return terminal.fit(line.append(text, "not cyan"))


def _interval(state: dict[str, Any], terminal: _Terminal) -> Text:
    """Return the line of an ordinary program, whose accesses are recorded by intervals."""
    recording = state["recording"]
    used, most = size_text(recording["used_bytes"]), size_text(recording["most_bytes"])
    length = f"{1e3 * recording['interval_seconds']:g} ms"
    text = f"{used}, at most {most} in one of {recording['intervals']:,} intervals of {length}"
    return terminal.fit(Text("used      ", "cyan").append(text, "not cyan"))


def _rates(state: dict[str, Any], terminal: _Terminal) -> Text:
    rates = state["rates"]
    words = {"faults": "faults", "evictions": "evicted", "reloads": "reloaded", "eenter": "EENTER"}
    text = ", ".join(f"{_rate(rates[f'{name}_per_second'])} {word}" for name, word in words.items())
    return terminal.fit(Text("a second  ", "cyan").append(text, "not cyan"))


def _history(run: Watched, terminal: _Terminal) -> Text:
    most = max(run.history)
    scale = f" {_rate(most)} at most"
    line = Text("faults/s  ", "cyan")
    room = max(terminal.width - len(line.plain) - len(scale), 1)
    values = sparkline(run.history, room, ascii_only=terminal.ascii_only)
    return terminal.fit(line.append(values, "not cyan green").append(scale, "not cyan dim"))


def _groups(groups: Sequence[dict[str, Any]], terminal: _Terminal) -> Table:
    table = _table(terminal, "group", "used", "limit", "peak", "refused")
    for group in groups:
        if group["path"] == "/":
            continue
        limit = group["max_bytes"]
        table.add_row(
            group["path"],
            size_text(group["usage_bytes"]),
            "max" if limit is None else size_text(limit),
            size_text(group["peak_bytes"]),
            f"{group['refused']:,}",
        )
    return table


def _enclaves(
    enclaves: Sequence[dict[str, Any]], terminal: _Terminal, rows: int | None
) -> list[RenderableType]:
    shown = list(enclaves)
    if rows is not None and len(shown) > rows:
        shown.sort(key=lambda enclave: -enclave["rates"]["faults_per_second"])
        shown = sorted(shown[: max(rows - 1, 1)], key=lambda enclave: enclave["number"])
    headings = ["enclave", "pid", "name", "resident", "faults/s", "evicted/s"]
    if terminal.width >= _WIDE:
        headings += ["size", "EENTER/s"]
    table = _table(terminal, *headings)
    for enclave in shown:
        rates = enclave["rates"]
        mark = "" if enclave["state"] in ("initialized", "recorded") else f" {enclave['state']}"
        row = [
            f"{enclave['number']}{mark}",
            str(enclave["pids"][0]) if enclave["pids"] else "",
            enclave["name"],
            size_text(enclave["resident_bytes"]),
            _rate(rates["faults_per_second"]),
            _rate(rates["evictions_per_second"]),
            size_text(enclave["size_bytes"]),
            _rate(rates["eenter_per_second"]),
        ]
        table.add_row(*row[: len(headings)])
    more = len(enclaves) - len(shown)
    return [table, Text(f"and {more} more", "dim")] if more else [table]


def _table(terminal: _Terminal, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="cyan")
    name_width = _NAME if terminal.width >= _WIDE else _SHORT_NAME
    for heading in headings:
        table.add_column(
            heading,
            justify="left" if heading in ("group", "name") else "right",
            no_wrap=True,
            overflow=terminal.overflow,
            max_width=name_width if heading == "name" else None,
        )
    return table


def _rate(value: float) -> str:
    if value >= _LARGE:
        return f"{value / 1000:,.0f}k"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _time_text(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
