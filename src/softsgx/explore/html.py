"""The findings of a campaign as one HTML page that opens offline: tables only, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from softsgx.explore.coverage import Coverage
from softsgx.explore.replay import Line, Replayed
from softsgx.explore.text import shown_lines

__all__ = ["html_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1d2733; background: #f4f6f8;
  max-width: 1120px; margin: 0 auto; padding: 24px; }
section { background: #fff; border: 1px solid #dde3ea; border-radius: 8px; padding: 14px 18px;
  margin: 14px 0; overflow-x: auto; }
table { border-collapse: collapse; font: 13px/1.35 ui-monospace, "DejaVu Sans Mono", monospace; }
td, th { padding: 2px 12px; text-align: left; white-space: nowrap; }
th { color: #5d6a78; font-weight: 600; border-bottom: 1px solid #dde3ea; }
td.n { color: #a3aab3; text-align: right; }
td.leaf { color: #3566a8; font-weight: 600; }
td.switch { background: #fdf0dc; }
td.switch::after { content: "  ◀ switch"; color: #b06d10; }
td.zero { color: #c9d0d8; } td.met { background: #e3efe6; text-align: right; }
p.bad { color: #b5403b; font-weight: 600; } code { overflow-wrap: anywhere; font-size: 12px; }
h1 { font-size: 22px; } h2 { font-size: 16px; margin: 0 0 6px; }
"""


def html_page(stories: Sequence[Replayed], coverage: Mapping[str, Coverage]) -> str:
    """Return the page.

    Args:
        stories: the findings, replayed.
        coverage: of each scenario; may be empty.
    """
    runs = sum(one.runs for one in coverage.values())
    found = f"{len(stories)} finding{'' if len(stories) == 1 else 's'}"
    head = f"<h1>softsgx explore: {found}" + (f" in {runs} schedules</h1>" if runs else "</h1>")
    body = [head, *map(_story, stories)]
    body += [_coverage(name, one) for name, one in coverage.items()]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>softsgx explore</title><style>{_STYLE}</style></head>\n"
        f"<body>{chr(10).join(body)}</body></html>\n"
    )


def _story(story: Replayed) -> str:
    named = story.scenario
    defects = f" with {' '.join(story.token.defects)}" if story.token.defects else ""
    rows = "".join(_row(story, number, line) for number, line in shown_lines(story))
    heads = "".join(f"<th>{escape(task)}</th>" for task in story.tasks)
    history = "".join(
        f'<tr><td class="n">{at}</td><td>{escape(text)}</td></tr>' for at, text in story.history
    )
    what = "Events of the page" if story.page else "Events"
    return (
        f"<section><h2>{escape(named.name + defects)}</h2><p>{escape(named.summary)}</p>"
        f'<p class="bad">{escape(f"{story.violated}: {story.text}")}</p>'
        f"<table><tr><th></th>{heads}</tr>{rows}</table>"
        f"<p>Repeat: <code>softsgx explore --replay {escape(story.token.text())}</code></p>"
        f"<details><summary>{what}</summary><table>{history}</table></details></section>"
    )


def _row(story: Replayed, number: int, line: Line | int) -> str:
    if isinstance(line, int):
        rest = f'<td colspan="{len(story.tasks)}">⋮ {line} more</td>'
        return f'<tr><td class="n"></td>{rest}</tr>'
    kinds = ["leaf"] if line.place[:1].isupper() else []
    kinds += ["switch"] if line.switch == "preempted" else []
    cells = (
        f'<td class="{" ".join(kinds)}">{escape(line.place)}</td>' if task == line.task else "<td/>"
        for task in story.tasks
    )
    return f'<tr><td class="n">{number}</td>{"".join(cells)}</tr>'.replace("<td/>", "<td></td>")


def _coverage(name: str, coverage: Coverage) -> str:
    names, met = coverage.leaves()
    heads = "".join(f"<th>{escape(column)}</th>" for column in names)
    rows = "".join(
        f"<tr><th>{escape(row)}</th>"
        + "".join(_met(met.get((row, column), 0)) for column in names)
        + "</tr>"
        for row in names
    )
    missing, possible = len(coverage.missing()), len(coverage.possible())
    return (
        f"<section><h2>{escape(name)}</h2><p>{coverage.runs} schedules, {len(coverage.distinct)} "
        f"distinct; {possible - missing} of {possible} pairs of places have met.</p>"
        f"<p>A row stood before its place while a column was executed:</p>"
        f"<table><tr><th></th>{heads}</tr>{rows}</table></section>"
    )


def _met(count: int) -> str:
    return f'<td class="met">{count}</td>' if count else '<td class="zero">·</td>'
