"""Charts as HTML and inline SVG, without a library: lines over time, shares, bars with a band.

Text is HTML and only the lines are SVG, which is stretched to the width that there is; so letters
keep their size on a phone.  Colours are the style sheet's variables ``--c0`` to ``--c11``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

__all__ = ["COLOURS", "Bar", "Mark", "Series", "bars", "lines", "shares"]

COLOURS = tuple(f"var(--c{number})" for number in range(12))
_WIDTH, _HEIGHT = 1000, 400
_MOST_POINTS = 250
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        values: one for each time.
        colour: CSS.
    """

    name: str
    values: Sequence[float]
    colour: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A level that a line is compared with.

    Attributes:
        name: written beside it.
        value: where it is.
    """

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar with a band.

    Attributes:
        name: what it is.
        low, value, high: the ends of the band, and the bar's own end.
        text: written beside it.
    """

    name: str
    low: float
    value: float
    high: float
    text: str


def lines(
    times: Sequence[float], series: Sequence[Series], *, unit: str, mark: Mark | None = None
) -> str:
    """Return lines over the seconds since the start, with what :file:`page.js` needs.

    Args:
        times: seconds, rising, at least two.
        series: what to draw; long ones are thinned out, and keep their highest values.
        unit: of the values.
        mark: drawn as a dashed line.
    """
    kept = _kept(times, series)
    xs = [_rounded(times[at]) for at in kept]
    values = [[_rounded(one.values[at]) for at in kept] for one in series]
    highest = max([*(max(one) for one in values), mark.value if mark else 0.0])
    ticks = _ticks(highest)
    top, end = ticks[-1], xs[-1]
    parts = [_grid(ticks, top)]
    for one, ys in zip(series, values, strict=True):
        points = (
            f"{_short(_WIDTH * x / end)} {_short(_HEIGHT * (1 - y / top))}"
            for x, y in zip(xs, ys, strict=True)
        )
        path = f"M{'L'.join(points)}"
        parts.append(f"<path class='series' style='stroke:{one.colour}' d='{path}'/>")
    if mark is not None:
        parts.append(_level("limit", _HEIGHT * (1 - mark.value / top)))
    parts.append(f"<line class='cursor' x1='0' x2='0' y1='0' y2='{_HEIGHT}'/>")
    svg = (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' preserveAspectRatio='none' aria-hidden='true'>"
        f"{''.join(parts)}</svg>"
    )
    data = {
        "x": xs,
        "unit": unit,
        "series": [{"name": one.name, "y": ys} for one, ys in zip(series, values, strict=True)],
    }
    held = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"{_legend([(one.name, one.colour) for one in series])}"
        f"<div class='plot'>{svg}{_labels(ticks, top, end, unit, mark)}<output></output>"
        f"<script type='application/json'>{held}</script></div>"
    )


def shares(parts: Sequence[tuple[str, float, str]]) -> str:
    """Return one bar that is divided among parts: name with its value as text, value, colour."""
    whole = sum(value for _name, value, _colour in parts) or 1.0
    cells = "".join(
        f"<div style='width:{100 * value / whole:.2f}%;background:{colour}'"
        f" title='{escape(name, quote=True)}'></div>"
        for name, value, colour in parts
        if value
    )
    legend = _legend([(name, colour) for name, _value, colour in parts])
    return f"<div class='parts' aria-hidden='true'>{cells}</div>{legend}"


def bars(rows: Sequence[Bar]) -> str:
    """Return a bar for each row; the thin line on it is its band."""
    longest = max((max(row.high, row.value) for row in rows), default=0.0) or 1.0
    cells = []
    for row in rows:
        value, low, high = (100 * part / longest for part in (row.value, row.low, row.high))
        band = f"<div class='band' style='left:{low:.2f}%;width:{high - low:.2f}%'></div>"
        cells.append(
            f"<li><span class='name'>{escape(row.name)}</span>"
            f"<div class='track'><div class='value' style='width:{value:.2f}%'></div>{band}</div>"
            f"<span class='number'>{escape(row.text)}</span></li>"
        )
    return f"<ul class='bars'>{''.join(cells)}</ul>"


def _kept(times: Sequence[float], series: Sequence[Series]) -> list[int]:
    """Return the indices to draw: of each stretch the first, and those with the extremes."""
    count = len(times)
    if count <= _MOST_POINTS:
        return list(range(count))
    stretch = ceil(count / (_MOST_POINTS // 2))
    kept = {count - 1}
    for start in range(0, count, stretch):
        inside = range(start, min(start + stretch, count))
        kept |= {start, max(inside, key=lambda at: sum(one.values[at] for one in series))}
    return sorted(kept)


def _ticks(highest: float) -> list[float]:
    """Return round numbers from 0 to at least ``highest``, four to six of them."""
    if highest <= 0:
        return [0.0, 1.0]
    rough = highest / 4
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [number * step for number in range(ceil(highest / step * 0.9999) + 1)]


def _grid(ticks: Sequence[float], top: float) -> str:
    return "".join(_level("grid" if tick else "axis", _HEIGHT * (1 - tick / top)) for tick in ticks)


def _level(kind: str, at: float) -> str:
    return f"<line class='{kind}' x1='0' x2='{_WIDTH}' y1='{_short(at)}' y2='{_short(at)}'/>"


def _labels(ticks: Sequence[float], top: float, end: float, unit: str, mark: Mark | None) -> str:
    cells = [
        f"<span class='y' style='top:{100 * (1 - tick / top):.1f}%'>{tick:,.10g}</span>"
        for tick in ticks[:-1]
    ]
    cells.append(f"<span class='y' style='top:0'>{ticks[-1]:,.10g} {escape(unit)}</span>")
    cells += [
        f"<span class='x' style='left:{100 * tick / end:.1f}%'>{tick:,.10g}</span>"
        for tick in _ticks(end)
        if tick <= end
    ]
    cells.append("<span class='unit'>seconds since the program's start</span>")
    if mark is not None:
        at = 100 * (1 - mark.value / top)
        cells.append(f"<span class='mark' style='top:{at:.1f}%'>{escape(mark.name)}</span>")
    return "".join(cells)


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<li><i style='background:{colour}'></i>{escape(name)}</li>" for name, colour in names
    )
    return f"<ul class='legend'>{items}</ul>"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _rounded(number: float) -> float:
    """Return a number with few digits: these are pixels, and the page is to stay small."""
    return float(f"{number:.{_DIGITS}g}")
