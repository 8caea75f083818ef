"""Parts of pages: the page itself, figures, tables, prices.

A page loads nothing and needs no library; style sheet and script are files beside this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources

from softsgx.costs import Estimate, Price
from softsgx.report.charts import Bar, bars
from softsgx.report.tables import cycles_text, seconds_text

__all__ = ["document_page", "figure", "prices_table", "silicon_figure", "table", "tiles"]


def document_page(title: str, parts: Sequence[str]) -> str:
    """Return a page.

    Args:
        title: text.
        parts: HTML, in order.
    """
    style, script = (
        resources.files(__package__).joinpath(name).read_text() for name in ("page.css", "page.js")
    )
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>softsgx: {escape(title)}</title><style>\n{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main>\n<script>\n{script}</script></body></html>\n"
    )


def tiles(values: Sequence[tuple[str, str]]) -> str:
    """Return a tile for each value and what it is."""
    cells = "".join(
        f"<li><b>{escape(value)}</b><span>{escape(what)}</span></li>" for value, what in values
    )
    return f"<ul class='tiles'>{cells}</ul>"


def figure(heading: str, note: str, chart: str) -> str:
    """Return a section with a chart, which is HTML."""
    return (
        f"<section><h2>{escape(heading)}</h2><figure>"
        f"<figcaption>{escape(note)}</figcaption>{chart}</figure></section>"
    )


def table(
    heading: str,
    note: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int],
    long: int | None = None,
    marked: int | None = None,
) -> str:
    """Return a section with a table.

    Args:
        heading: of the section.
        note: what the table says.
        heads: of the columns.
        rows: text of the cells.
        text: columns of words; others have numbers.
        long: the column of sentences.
        marked: the row that stands out.
    """

    def kind(column: int) -> str:
        names = ["text"] * (column in text) + ["long"] * (column == long)
        return f" class='{' '.join(names)}'" if names else ""

    def row(number: int, values: Sequence[str]) -> str:
        first, *rest = values
        cells = "".join(f"<td{kind(n)}>{escape(value)}</td>" for n, value in enumerate(rest, 1))
        mark = " class='marked'" if number == marked else ""
        return f"<tr{mark}><th scope='row'{kind(0)}>{escape(first)}</th>{cells}</tr>"

    head = "".join(f"<th scope='col'{kind(n)}>{escape(name)}</th>" for n, name in enumerate(heads))
    body = "".join(row(number, values) for number, values in enumerate(rows))
    return (
        f"<section><h2>{escape(heading)}</h2><figure><figcaption>{escape(note)}</figcaption>"
        f"<div class='scroll' role='region' tabindex='0' aria-label='{escape(heading)}'><table>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        "</figure></section>"
    )


def silicon_figure(estimate: Estimate, heading: str, context: str) -> str:
    """Return the cycles of each kind of event as bars; nothing if there are none.

    Args:
        estimate: the events.
        heading: of the section.
        context: ends the sentence on the whole, as "beside what the code itself computes".
    """
    items = [item for item in estimate.items if item.price.typical is not None]
    if not items:
        return ""
    items.sort(key=lambda item: item.typical, reverse=True)
    rows = [
        Bar(
            f"{item.price.what} × {item.count:,}",
            item.low,
            item.typical,
            item.high,
            f"{cycles_text(item.typical)} cycles",
        )
        for item in items
    ]
    note = (
        f"About {cycles_text(estimate.typical)} cycles, {cycles_text(estimate.low)} to "
        f"{cycles_text(estimate.high)}: {seconds_text(estimate.seconds)} at "
        f"{estimate.profile.hertz / 1e9:g} GHz, {context}. The thin line on a bar is the band of "
        "the prices."
    )
    if estimate.unpriced:
        note += f" No figure is known for {', '.join(estimate.unpriced)}."
    return figure(heading, note, bars(rows))


def prices_table(note: str, prices: Sequence[Price], counts: Sequence[int] = ()) -> str:
    """Return prices, each with its basis and source; nothing without any.

    Args:
        note: what the prices are.
        prices: in order.
        counts: how many events each is the price of; empty: no column.
    """
    rows = []
    told = [f"{count:,}" for count in counts]
    for number, price in enumerate(prices):
        each = "none" if price.typical is None else f"{price.typical:,}"
        ends = "" if price.low == price.high else f"{price.low:,} to {price.high:,}"
        source = price.source + (f": “{price.printed}”" if price.printed else "")
        rows.append((price.what, *told[number : number + 1], each, ends, price.basis, source))
    if not rows:
        return ""
    heads = ("event", *(["count"] if told else []), "cycles each", "band", "basis", "source")
    basis, source_column = len(heads) - 2, len(heads) - 1
    words = (0, basis, source_column)
    return table("Prices", note, heads, rows, text=words, long=source_column)
