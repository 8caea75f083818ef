"""A replayed schedule as a table for a terminal, and as a test."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from softsgx.explore.coverage import Coverage
from softsgx.explore.replay import Line, Replayed

__all__ = ["as_test", "coverage_matrix", "interleaving", "shown_lines"]

MARK = "◀ "
_LONG = 10  # a stretch with more lines is shown by its ends
_END_LINES = 3


def shown_lines(story: Replayed) -> Iterator[tuple[int, Line | int]]:
    """Yield the lines to show with their numbers, and a number for each group of omitted lines."""
    lines = [(number, line) for number, line in enumerate(story.lines) if line.task != "main"]
    start = 0
    while start < len(lines):
        end = start + 1
        while end < len(lines) and lines[end][1].task == lines[start][1].task:
            end += 1
        stretch = lines[start:end]
        if len(stretch) <= _LONG:
            yield from stretch
        else:
            yield from stretch[:_END_LINES]
            yield stretch[_END_LINES][0], len(stretch) - 2 * _END_LINES
            yield from stretch[-_END_LINES:]
        start = end


def interleaving(story: Replayed) -> RenderableType:
    """Return the table: a task a column, a place a line; the switches that matter are marked."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("", justify="right", style="dim")
    for task in story.tasks:
        table.add_column(task)
    for number, line in shown_lines(story):
        cells: list[Text] = [Text("") for _ in story.tasks]
        if isinstance(line, int):
            cells = [Text(f"⋮ {line} more", style="dim") for _ in story.tasks[:1]]
            cells += [Text("") for _ in story.tasks[1:]]
            table.add_row("", *cells)
            continue
        cells[story.tasks.index(line.task)] = _place(line)
        table.add_row(str(number), *cells)
    parts: list[RenderableType] = [table]
    if story.failed:
        parts.append(Text(f"\n✗ {story.violated}: {story.text}", style="bold red"))
    else:
        parts.append(Text("\n✓ every property holds", style="green"))
    return Group(*parts)


def _place(line: Line) -> Text:
    style = "cyan" if line.place[:1].isupper() else ""
    text = Text(line.place, style=style)
    if line.switch == "preempted":
        text.append(f"  {MARK}switch", style="bold yellow")
    elif line.switch == "waits" and line.place != "end":
        text.append("  waits", style="dim")
    return text


def coverage_matrix(coverage: Coverage) -> Table:
    """Return the table of leaves and phases that have met: a row waited while a column executed."""
    names, met = coverage.leaves()
    table = Table(box=None, padding=(0, 1), header_style="bold", title="met (row: stood before)")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for row in names:
        counts = (met.get((row, column), 0) for column in names)
        table.add_row(row, *(str(count) if count else "·" for count in counts))
    return table


def as_test(story: Replayed) -> str:
    """Return a pytest function that fails as long as the schedule violates a property."""
    words = f"{story.scenario.name} {'with ' if story.token.defects else ''}"
    words += " ".join(story.token.defects)
    name = re.sub(r"\W+", "_", words).strip("_").lower()
    why = f"{story.violated}: {story.text}".replace("\\", "/").replace('"', "'")
    token = story.token.text()
    pieces = [token[at : at + 80] for at in range(0, len(token), 80)]
    lines = "\n".join(f'    "{piece}"' for piece in pieces)
    return f'''from softsgx.explore.finding import Token
from softsgx.explore.replay import replay

TOKEN = (
{lines}
)


def test_{name}() -> None:
    """Found: {why}."""
    seen = replay(Token.parse(TOKEN))
    assert not seen.failed, f"{{seen.violated}}: {{seen.text}}"
'''
