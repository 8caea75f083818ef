"""A run as one page that opens offline: residency over time, fault rate, where the time went.

Source:
    plotly, whose JavaScript is written into the page.
"""

from __future__ import annotations

import shlex
from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from operator import itemgetter
from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.errors import SoftSgxError
from softsgx.report.costs import Estimate
from softsgx.report.sampler import Sample
from softsgx.report.summary import RunSummary
from softsgx.report.tables import cycles_text, seconds_text
from softsgx.report.verdict import verdict
from softsgx.sizes import size_text

__all__ = ["html_page", "require_plotly"]

_MIB = 1 << 20
_SHOWN = 12
_MOST_BINS = 120
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#3566a8", "#d98324", "#4c956c", "#b5403b", "#a3aab3"
_COLOURS = (
    *(_BLUE, _ORANGE, _GREEN, _RED, "#7b5ea7", "#8c6d46"),
    *("#c86fa0", "#5a6b7b", "#a9a13c", "#3c9aa9", "#6a8fd0", "#e2a76a"),
)
_STYLE = """
:root { --ink: #1d2733; --dim: #5d6a78; --line: #dde3ea; --paper: #fff; --back: #f4f6f8; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 2px; }
p { margin: 2px 0; color: var(--dim); }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
p.verdict { color: var(--ink); font-size: 17px; font-weight: 600; margin: 10px 0 6px;
  padding: 8px 14px; border-left: 5px solid #a3aab3; background: var(--paper); }
p.verdict.fits, p.verdict.nearly { border-color: #4c956c; }
p.verdict.small { border-color: #b5403b; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); gap: 12px;
  margin: 20px 0; }
.tile, section { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 20px; font-weight: 600; white-space: nowrap; }
.tile span { color: var(--dim); font-size: 13px; }
section { padding: 16px 18px; margin: 14px 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: 500; }
th.text, td.text { text-align: left; white-space: normal; }
tr:last-child td { border-bottom: 0; }
"""


def require_plotly() -> None:
    """Raise before a run what would be raised after it.

    Raises:
        SoftSgxError: the package is missing.
    """
    _plotly()


def html_page(run: RunSummary, samples: Sequence[Sample]) -> str:
    """Return the page.

    Args:
        run: the summary.
        samples: in order of time; without two of them there are no charts over time.

    Raises:
        SoftSgxError: the package ``plotly`` is missing.
    """
    go, io, offline = _plotly()
    title, judged = escape(shlex.join(run.command)), verdict(run)
    parts = [
        f"<h1><code>{title}</code></h1>",
        f"<p class='verdict {judged.fit}'>{escape(judged.text)}</p>",
        f"<p>{escape(_subtitle(run))}</p>",
        _tiles(run),
    ]
    charts = [
        ("Resident in the EPC", _RESIDENT_NOTE, _residency(go, run, samples)),
        ("Paging", _RATE_NOTE, _rates(go, samples)),
        ("Where the time went here", _TIME_NOTE, _times(go, run)),
        ("On silicon", _silicon_note(run.estimate), _silicon(go, run.estimate)),
    ]
    for heading, note, figure in charts:
        if figure is None:
            continue
        chart = io.to_html(
            figure, include_plotlyjs=False, full_html=False, config={"displayModeBar": False}
        )
        parts.append(_section(heading, note, chart))
    parts += [_section("Enclaves", "", _enclaves(run)), _prices(run.estimate)]
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>softsgx: {title}</title><style>{_STYLE}</style>"
        f"<script>{offline.get_plotlyjs()}</script></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


_RESIDENT_NOTE = "Pages of each enclave, and all that is in use: SECS and VA pages too."
_RATE_NOTE = "Pages of enclaves, per second."
_TIME_NOTE = (
    "Page faults and reclaim are softsgx at work while the program waits; the rest of softsgx is "
    "tracing, crossings and ioctls."
)


def _subtitle(run: RunSummary) -> str:
    ended = f"exit status {run.exit_status}" if run.signal is None else f"ended by {run.signal}"
    platform = run.platform
    defects = f"; defects switched on: {', '.join(platform.defects)}" if platform.defects else ""
    return (
        f"{ended} after {seconds_text(run.wall_s)} on softsgx: {platform.profile}, "
        f"{size_text(platform.epc_bytes)} of EPC, engine {platform.engine}, pager {platform.pager}"
        f"{defects}"
    )


def _tiles(run: RunSummary) -> str:
    enclaves = run.enclaves
    tiles = [
        (f"{len(enclaves):,}", "enclave" if len(enclaves) == 1 else "enclaves"),
        (size_text(run.platform.peak_epc_bytes), "EPC at most"),
        (f"{sum(enclave.fault_count for enclave in enclaves):,}", "page faults"),
        (f"{sum(enclave.evictions for enclave in enclaves):,}", "evictions"),
        (f"{sum(enclave.reloads for enclave in enclaves):,}", "reloads"),
        (f"{sum(enclave.eenter for enclave in enclaves):,}", "entries"),
        (cycles_text(run.estimate.typical), "cycles on silicon"),
    ]
    cells = "".join(f"<div class='tile'><b>{b}</b><span>{what}</span></div>" for b, what in tiles)
    return f"<div class='tiles'>{cells}</div>"


def _section(heading: str, note: str, content: str) -> str:
    told = f"<p>{escape(note)}</p>" if note else ""
    return f"<section><h2>{escape(heading)}</h2>{told}{content}</section>"


# --- charts -------------------------------------------------------------------------------------


def _residency(go: Any, run: RunSummary, samples: Sequence[Sample]) -> Any:
    if len(samples) < 2:
        return None
    times = [sample.time_s for sample in samples]
    ranked = sorted(run.enclaves, key=lambda enclave: enclave.peak_resident_bytes, reverse=True)
    shown = sorted(enclave.number for enclave in ranked[:_SHOWN])
    figure = go.Figure()
    for colour, number in zip(_COLOURS, shown, strict=False):
        figure.add_scatter(
            x=times,
            y=[_mib(sample.resident.get(number, 0)) for sample in samples],
            name=f"enclave {number}",
            mode="lines",
            line={"color": colour, "width": 1.8},
        )
    figure.add_scatter(
        x=times,
        y=[_mib(sample.used_pages) for sample in samples],
        name="all in use",
        mode="lines",
        line={"color": _GREY, "width": 1.2},
    )
    limit = run.platform.epc_bytes / _MIB
    highest = max(_mib(sample.used_pages) for sample in samples)
    if limit < 3 * highest:
        figure.add_hline(
            y=limit,
            line={"color": _RED, "width": 1.2, "dash": "dash"},
            annotation_text=f"EPC {size_text(run.platform.epc_bytes)}",
            annotation_position="top left",
        )
    figure.update_yaxes(title_text="MiB", rangemode="tozero")
    figure.update_xaxes(range=[0, times[-1]])
    return _dressed(figure, "seconds since the program's start")


def _rates(go: Any, samples: Sequence[Sample]) -> Any:
    if len(samples) < 2 or samples[-1].time_s <= 0:
        return None
    # Coarser than the samples, and even: single faults would only be noise.
    end = samples[-1].time_s
    bins = max(1, min(_MOST_BINS, len(samples) // 2))
    times = [(number + 0.5) * end / bins for number in range(bins)]
    figure = go.Figure()
    for name, colour in (("faults", _BLUE), ("evictions", _ORANGE), ("reloads", _GREEN)):
        known = [(sample.time_s, getattr(sample, name)) for sample in samples]
        borders = [_interpolated(known, number * end / bins) for number in range(bins + 1)]
        rates = [(after - before) * bins / end for before, after in pairwise(borders)]
        figure.add_scatter(
            x=times, y=rates, name=name, mode="lines", line={"color": colour, "width": 1.8}
        )
    figure.update_yaxes(title_text="per second", rangemode="tozero")
    figure.update_xaxes(range=[0, samples[-1].time_s])
    return _dressed(figure, "seconds since the program's start")


def _interpolated(known: Sequence[tuple[float, float]], at: float) -> float:
    """Return the value at a time, on the straight line between the known ones around it."""
    index = bisect_left(known, at, key=itemgetter(0))
    if index == 0 or index == len(known):
        return known[min(index, len(known) - 1)][1]
    (before_s, before), (after_s, after) = known[index - 1], known[index]
    if after_s == before_s:
        return after
    return before + (after - before) * (at - before_s) / (after_s - before_s)


def _times(go: Any, run: RunSummary) -> Any:
    faults = sum(enclave.fault_s for enclave in run.enclaves)
    faults, reclaim = min(faults, run.wall_s), min(run.platform.reclaim_s, run.wall_s)
    ours = max(run.supervisor_s - faults - reclaim, 0.0)
    idle = max(run.wall_s - run.program_s - faults - reclaim - ours, 0.0)
    parts = (
        ("program", run.program_s, _GREEN),
        ("page faults", faults, _ORANGE),
        ("reclaim", reclaim, _RED),
        ("rest of softsgx", ours, _BLUE),
        ("waiting", idle, _GREY),
    )
    figure = go.Figure()
    for name, seconds, colour in parts:
        figure.add_bar(
            x=[seconds],
            y=[""],
            name=f"{name} {seconds_text(seconds)}",
            orientation="h",
            marker_color=colour,
        )
    figure.update_layout(barmode="stack", bargap=0.35, legend_traceorder="normal")
    figure.update_yaxes(showticklabels=False)
    return _dressed(figure, "seconds", height=170)


def _silicon(go: Any, estimate: Estimate) -> Any:
    items = [item for item in estimate.items if item.price.typical is not None]
    if not items:
        return None
    items.sort(key=lambda item: item.typical)
    figure = go.Figure()
    figure.add_bar(
        x=[item.typical for item in items],
        y=[f"{item.price.what} × {item.count:,}" for item in items],
        orientation="h",
        marker_color=_BLUE,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [item.high - item.typical for item in items],
            "arrayminus": [item.typical - item.low for item in items],
            "color": "#333",
            "thickness": 1.2,
        },
        showlegend=False,
    )
    figure.update_yaxes(automargin=True, ticksuffix="  ")
    return _dressed(
        figure, "cycles; the line is the band of what is published", 90 + 34 * len(items), top=8
    )


def _silicon_note(estimate: Estimate) -> str:
    note = (
        f"About {cycles_text(estimate.typical)} cycles, {cycles_text(estimate.low)} to "
        f"{cycles_text(estimate.high)}: {seconds_text(estimate.seconds)} at "
        f"{estimate.profile.hertz / 1e9:g} GHz, beside what the code itself computes."
    )
    if estimate.unpriced:
        note += f" Nobody has published a figure for {', '.join(estimate.unpriced)}."
    return note


def _dressed(figure: Any, below: str, height: int = 300, top: int = 40) -> Any:
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 16, "t": top, "b": 44},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        font={"size": 13, "color": "#1d2733"},
        hovermode="x unified" if height == 300 else "closest",
    )
    figure.update_xaxes(title_text=below)
    return figure


def _mib(pages: int) -> float:
    return pages * PAGE_BYTES / _MIB


# --- tables -------------------------------------------------------------------------------------


def _enclaves(run: RunSummary) -> str:
    heads = (
        *(
            "enclave",
            "MRENCLAVE",
            "size",
            "peak resident",
            "pages added",
            "faults",
            "evictions",
            "reloads",
        ),
        *("EWB", "ETRACK", "IPI", "EENTER", "EEXIT", "AEX", "in faults", "cycles"),
    )
    rows = []
    for enclave in run.enclaves:
        state = "" if enclave.state == "initialized" else f" ({enclave.state})"
        rows.append(
            (
                f"{enclave.number}{state}",
                "" if enclave.mrenclave is None else f"{enclave.mrenclave[:8]}…",
                size_text(enclave.size_bytes),
                size_text(enclave.peak_resident_bytes),
                *(f"{count:,}" for count in (enclave.pages_added, enclave.fault_count)),
                *(f"{count:,}" for count in (enclave.evictions, enclave.reloads, enclave.ewb)),
                *(f"{count:,}" for count in (enclave.etrack, enclave.ipi, enclave.eenter)),
                *(f"{count:,}" for count in (enclave.eexit, enclave.aex)),
                seconds_text(enclave.fault_s),
                cycles_text(enclave.estimate.typical),
            )
        )
    return _table(heads, rows)


def _prices(estimate: Estimate) -> str:
    rows = []
    for item in estimate.items:
        price = item.price
        band = "none" if price.typical is None else f"{price.typical:,}"
        ends = "" if price.low == price.high else f"{price.low:,} to {price.high:,}"
        sure = "" if price.checked or price.typical is None else " (quoted from memory)"
        rows.append((price.what, f"{item.count:,}", band, ends, price.source + sure))
    heads = ("event", "count", "cycles each", "band", "source")
    note = f"The profile {estimate.profile.name}."
    return _section("Prices", note, _table(heads, rows, text=(0, 4)))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int] = ()) -> str:
    def cell(tag: str, column: int, value: str) -> str:
        kind = " class='text'" if column in text else ""
        return f"<{tag}{kind}>{escape(value)}</{tag}>"

    lines = ["".join(cell("th", column, head) for column, head in enumerate(heads))]
    lines += ["".join(cell("td", column, value) for column, value in enumerate(r)) for r in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _plotly() -> tuple[Any, Any, Any]:
    try:
        import plotly.graph_objects
        import plotly.io
        import plotly.offline
    except ImportError as error:
        raise SoftSgxError(
            "a report needs the package plotly: pip install 'softsgx[report]'"
        ) from error
    return plotly.graph_objects, plotly.io, plotly.offline
