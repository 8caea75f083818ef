"""Charts as HTML and inline SVG, without a library: lines, heat maps, shares, bars with a band.

Text is HTML and only the lines are SVG.  A browser stretches the lines to the width of the page,
and letters keep their size on a phone.  Colours are variables of the style sheet,
``--c0`` to ``--c11``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor, log10
from typing import overload

__all__ = [
    "COLOURS",
    "Axis",
    "Bar",
    "HeatMap",
    "Mark",
    "Series",
    "bars",
    "heat_map",
    "lines",
    "shares",
]

COLOURS = tuple(f"var(--c{number})" for number in range(12))
_WIDTH, _HEIGHT = 1000, 400
_MOST_POINTS = 250
_DIGITS = 4
_SHADES = 4  # steps of a share in a heat map


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        values: one for each place on the axis; ``None`` before the line begins and after its end.
        colour: CSS.
    """

    name: str
    values: Sequence[float | None]
    colour: str


@dataclass(frozen=True, slots=True)
class Axis:
    """The axis from left to right, from 0.

    Attributes:
        unit: of its values.
        name: written below it.
    """

    unit: str
    name: str


SECONDS = Axis("s", "seconds since the program's start")


@dataclass(frozen=True, slots=True)
class Mark:
    """A level, or a place on the axis, that lines are compared with.

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


@dataclass(frozen=True, slots=True)
class HeatMap:
    """Rows of cells with two shares, 0 to 1, by row and by stretch of the axis.

    Attributes:
        shade: name and share that a cell's colour shows.
        part: name and share that is the coloured part of a cell.
        ticks: places from top (0) to bottom (1), and what is written beside them.
        names: places, and names of what begins there.
    """

    shade: tuple[str, Sequence[Sequence[float]]]
    part: tuple[str, Sequence[Sequence[float]]]
    ticks: Sequence[tuple[float, str]]
    names: Sequence[tuple[float, str]]


def lines(
    places: Sequence[float],
    series: Sequence[Series],
    *,
    unit: str,
    axis: Axis = SECONDS,
    mark: Mark | None = None,
    upright: Sequence[Mark] = (),
) -> str:
    """Return lines over an axis, with what :file:`page.js` needs.

    Args:
        places: on the axis, rising, at least two.
        series: what to draw; long ones are thinned out, and keep their highest values.
        unit: of the values.
        axis: what the places are.
        mark: a level, drawn as a dashed line.
        upright: places on the axis, drawn as dashed lines.
    """
    kept = _kept(places, series)
    xs = [_rounded(places[at]) for at in kept]
    values = [[_rounded(one.values[at]) for at in kept] for one in series]
    known = [value for one in values for value in one if value is not None]
    highest = max([*known, mark.value if mark else 0.0])
    ticks = _ticks(highest)
    top, end = ticks[-1], xs[-1]
    parts = [_grid(ticks, top)]
    for one, ys in zip(series, values, strict=True):
        points = (
            f"{_short(_WIDTH * x / end)} {_short(_HEIGHT * (1 - y / top))}"
            for x, y in zip(xs, ys, strict=True)
            if y is not None
        )
        path = f"M{'L'.join(points)}"
        parts.append(f"<path class='series' style='stroke:{one.colour}' d='{path}'/>")
    if mark is not None:
        parts.append(_level("limit", _HEIGHT * (1 - mark.value / top)))
    parts += [
        f"<line class='upright' x1='{at}' x2='{at}' y1='0' y2='{_HEIGHT}'/>"
        for at in (_short(_WIDTH * one.value / end) for one in upright)
    ]
    parts.append(f"<line class='cursor' x1='0' x2='0' y1='0' y2='{_HEIGHT}'/>")
    svg = (
        f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' preserveAspectRatio='none' aria-hidden='true'>"
        f"{''.join(parts)}</svg>"
    )
    data = {
        "x": xs,
        "xUnit": axis.unit,
        "unit": unit,
        "series": [{"name": one.name, "y": ys} for one, ys in zip(series, values, strict=True)],
    }
    held = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"{_legend([(one.name, one.colour) for one in series])}"
        f"<div class='plot'>{svg}{_labels(ticks, top, unit)}{_mark_label(mark, top, xs, values)}"
        f"{_axis_labels(axis, end, upright)}<output></output>"
        f"<script type='application/json'>{held}</script></div>"
    )


def heat_map(heat: HeatMap, end: float, axis: Axis) -> str:
    """Return a heat map whose cells share the axis evenly.

    Args:
        heat: what to draw.
        end: of the axis.
        axis: what it is.
    """
    shade_name, shades = heat.shade
    part_name, parts = heat.part
    rows, columns = len(shades), len(shades[0])
    levels = range(1, _SHADES + 1)
    drawn = [
        f"<path style='fill:{COLOURS[0]};fill-opacity:{level / _SHADES:g}' d='{path}'/>"
        for level in levels
        if (path := _cells_path(shades, level, 1))
    ]
    bars_path = "".join(_cells_path(parts, level, level / _SHADES) for level in levels)
    drawn.append(f"<path style='fill:{COLOURS[1]}' d='{bars_path}'/>")
    svg = (
        f"<svg viewBox='0 0 {columns} {rows}' preserveAspectRatio='none' aria-hidden='true'>"
        f"{''.join(drawn)}</svg>"
    )
    labels = [
        f"<span class='y' style='top:{100 * at:.1f}%'>{escape(text)}</span>"
        for at, text in heat.ticks
    ]
    labels += [
        f"<span class='name' style='top:{100 * at:.1f}%'>{escape(name)}</span>"
        for at, name in heat.names
    ]
    legend = _legend([(shade_name, COLOURS[0]), (part_name, COLOURS[1])])
    return (
        f"{legend}<div class='plot heat'>{svg}{''.join(labels)}{_axis_labels(axis, end, ())}</div>"
    )


def _cells_path(cells: Sequence[Sequence[float]], level: int, height: float) -> str:
    """Return the cells of a level, of a height from their lower edge; neighbours are one piece."""
    path = []
    for row, shares_of_row in enumerate(cells):
        column = 0
        for found, same in groupby(ceil(share * _SHADES) for share in shares_of_row):
            count = len(list(same))
            if found == level:
                top = f"{row + 1 - height:g}"
                path.append(f"M{column} {top}h{count}v{height:g}h-{count}z")
            column += count
    return "".join(path)


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


def _kept(places: Sequence[float], series: Sequence[Series]) -> list[int]:
    """Return the indices to draw: of each stretch the first, and those with the extremes."""
    count = len(places)
    if count <= _MOST_POINTS:
        return list(range(count))
    stretch = ceil(count / (_MOST_POINTS // 2))
    kept = {count - 1}
    for start in range(0, count, stretch):
        inside = range(start, min(start + stretch, count))
        kept |= {start, max(inside, key=lambda at: sum(one.values[at] or 0.0 for one in series))}
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


def _labels(ticks: Sequence[float], top: float, unit: str) -> str:
    cells = [
        f"<span class='y' style='top:{100 * (1 - tick / top):.1f}%'>{tick:,.10g}</span>"
        for tick in ticks[:-1]
    ]
    cells.append(f"<span class='y' style='top:0'>{ticks[-1]:,.10g} {escape(unit)}</span>")
    return "".join(cells)


def _mark_label(
    mark: Mark | None, top: float, xs: Sequence[float], values: Sequence[Sequence[float | None]]
) -> str:
    """Return the name of a level, above its right end, or its left end if lines are farther."""
    if mark is None:
        return ""

    def room(first: float, last: float) -> float:
        above = (
            y - mark.value
            for ys in values
            for x, y in zip(xs, ys, strict=True)
            if y is not None and y > mark.value and first <= x <= last
        )
        return min(above, default=top)

    end = xs[-1]
    left = room(0, end / 4) > room(end * 3 / 4, end)
    at = 100 * (1 - mark.value / top)
    kind = "mark left" if left else "mark"
    return f"<span class='{kind}' style='top:{at:.1f}%'>{escape(mark.name)}</span>"


def _axis_labels(axis: Axis, end: float, upright: Sequence[Mark]) -> str:
    cells = [
        f"<span class='x' style='left:{100 * tick / end:.1f}%'>{tick:,.10g}</span>"
        for tick in _ticks(end)
        if tick <= end
    ]
    cells.append(f"<span class='unit'>{escape(axis.name)}</span>")
    for number, mark in enumerate(upright):
        share = mark.value / end
        side = f"left:{100 * share:.1f}%" if share < 0.5 else f"right:{100 - 100 * share:.1f}%"
        style = f"{side};top:{20 * number}px"
        cells.append(f"<span class='place' style='{style}'>{escape(mark.name)}</span>")
    return "".join(cells)


def _legend(names: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f"<li><i style='background:{colour}'></i>{escape(name)}</li>" for name, colour in names
    )
    return f"<ul class='legend'>{items}</ul>"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


@overload
def _rounded(number: float) -> float: ...


@overload
def _rounded(number: float | None) -> float | None: ...


def _rounded(number: float | None) -> float | None:
    """Return a number with few digits: these are pixels, and the page is to stay small."""
    return None if number is None else float(f"{number:.{_DIGITS}g}")
