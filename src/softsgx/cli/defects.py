"""List, explain and run the known defects of Linux's SGX code.

By default softsgx has the fixed behaviour.  Each defect that it can reproduce has a story: a
program, and a property that the defect violates.  "run" runs the story with the defect and without
it.  It prints the violated property, the schedule that violates it, reduced to the switches that it
needs, and the last events.  A NAME is an identifier, such as B11, or the long name.

Examples:
  softsgx defects list
  softsgx defects show B11
  softsgx defects run B11 L2
  softsgx defects run all --json

exit status: 0 each property is violated with its defect and holds without it; 1 otherwise; 2 bad
input.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from softsgx.cli._common import print_json
from softsgx.defects import Defect
from softsgx.errors import SoftSgxError
from softsgx.sim.stories import STORIES, Outcome, Story

__all__ = ["NAME", "configure", "run"]

NAME = "defects"

_SHOWN_EVENTS = 10
_ALL = "all"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "action",
        choices=("list", "show", "run"),
        help="list: print a table of all defects; show: describe one and its story; run: run the "
        "story",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="defects to show or run, or all; none for list"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """List, show or run."""
    if args.action == "list":
        if args.names:
            raise SoftSgxError("defects list: takes no NAME; use softsgx defects show NAME")
        return _list(list(Defect), as_json=args.json)
    if not args.names:
        raise SoftSgxError(f"defects {args.action}: no NAME; see softsgx defects list")
    chosen = [defect for name in args.names for defect in _named(name)]
    if args.action == "show":
        return _show(chosen, as_json=args.json)
    return _run(_with_story(chosen, args.names), as_json=args.json)


def _named(name: str) -> list[Defect]:
    if name == _ALL:
        return list(Defect)
    for defect in Defect:
        if name.upper() in (defect.value, defect.name):
            return [defect]
    raise SoftSgxError(f"defect {name!r}: unknown; see softsgx defects list")


def _with_story(chosen: Iterable[Defect], names: list[str]) -> list[Defect]:
    """Return the defects that can be run.

    Raises:
        SoftSgxError: one that was named has no story.
    """
    if _ALL in names:
        return [defect for defect in chosen if defect in STORIES]
    for defect in chosen:
        if defect not in STORIES:
            raise SoftSgxError(
                f"defect {defect}: cannot be run: {defect.explanation.rstrip('.')}; choose one of "
                "those that softsgx defects list marks with yes"
            )
    return list(chosen)


def _described(defect: Defect) -> dict[str, object]:
    made: dict[str, object] = {
        "id": defect.value,
        "name": defect.name,
        "symptom": defect.symptom,
        "fix": defect.fix,
        "package": defect.package,
        "explanation": defect.explanation,
    }
    story = STORIES.get(defect)
    if story is not None:
        made |= {"story": story.told, "property": story.holds, "races": story.races}
    return made


def _list(defects: list[Defect], *, as_json: bool) -> int:
    if as_json:
        print_json({"defects": [_described(defect) for defect in defects]})
        return 0
    table = Table(box=None, padding=(0, 2, 1, 0), pad_edge=False, header_style="bold")
    table.add_column("id", style="cyan", no_wrap=True)
    table.add_column("what goes wrong", ratio=3)
    table.add_column("fix", ratio=3)
    table.add_column("in softsgx", ratio=2)
    for defect in defects:
        here = f"yes, in {defect.package}" if defect in STORIES else f"no: {defect.explanation}"
        table.add_row(defect, Text(defect.symptom), Text(defect.fix), Text(here))
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{len(defects)} defects, {len(STORIES)} of them can be run: softsgx defects run NAME"
    )
    return 0


def _show(defects: list[Defect], *, as_json: bool) -> int:
    if as_json:
        print_json({"defects": [_described(defect) for defect in defects]})
        return 0
    console = Console(highlight=False, markup=False)
    for number, defect in enumerate(defects):
        if number:
            console.print()
        _title(console, defect)
        _lines(console, [("fix", defect.fix)])
        story = STORIES.get(defect)
        if story is None:
            _lines(console, [("not in softsgx", defect.explanation)])
            continue
        rows = [
            ("broken form", f"{defect.explanation} (package {defect.package})"),
            ("story", story.told),
            ("property", story.holds),
            ("schedules", _schedules(story)),
            ("run it", f"softsgx defects run {defect}"),
            ("in Python", f'Platform(defects={{"{defect}"}})'),
        ]
        _lines(console, rows)
    return 0


def _schedules(story: Story) -> str:
    if story.races:
        return f"tasks race; {len(story.seeds)} schedules are tried"
    return "one; the outcome does not depend on it"


def _title(console: Console, defect: Defect) -> None:
    console.print(f"{defect} {defect.name}: {defect.symptom}", style="bold")


def _lines(console: Console, rows: Iterable[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=14)
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _run(defects: list[Defect], *, as_json: bool) -> int:
    console = Console(highlight=False, markup=False)
    results, failed = [], False
    for number, defect in enumerate(defects):
        story = STORIES[defect]
        broken, fixed = story.tell({defect}), story.tell()
        failed |= broken.violation is None or fixed.violation is not None
        if as_json:
            both = {"with_defect": _outcome(broken), "without": _outcome(fixed)}
            results.append(_described(defect) | both)
            continue
        if number:
            console.print()
        _title(console, defect)
        _lines(console, [("story", story.told), ("property", story.holds)])
        _print_broken(console, broken)
        _print_fixed(console, fixed)
    if as_json:
        print_json({"defects": results})
    return int(failed)


def _outcome(outcome: Outcome) -> dict[str, object]:
    return {
        "violation": outcome.violation,
        "runs": outcome.runs,
        "seed": outcome.schedule.seed,
        "switches": [list(step) for step in outcome.schedule.switches()],
        "steps": len(outcome.schedule),
        "events": [event.line() for event in outcome.events[-_SHOWN_EVENTS:]],
    }


def _print_broken(console: Console, outcome: Outcome) -> None:
    if outcome.violation is None:
        verdict = Text(f"holds in {_counted(outcome.runs)}: the defect does not show", "bold red")
    else:
        verdict = Text(f"violated: {outcome.violation}", "yellow")
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=14)
    grid.add_column()
    grid.add_row("with defect", verdict)
    if outcome.schedule.switches():
        grid.add_row("schedule", _schedule(outcome))
    if outcome.events:
        shown = outcome.events[-_SHOWN_EVENTS:]
        grid.add_row("last events", Text("\n".join(event.line() for event in shown)))
    console.print(grid)


def _schedule(outcome: Outcome) -> Table:
    """Return a table of tasks, each with the scheduling point where it stops running."""
    table = Table.grid(padding=(0, 1, 0, 0))
    steps = outcome.schedule.switches()
    for task, place in steps:
        table.add_row(Text(task, "cyan"), "runs until", Text(place))
    table.add_row(Text(outcome.schedule[-1][0], "cyan"), "runs to the end", "")
    return table


def _print_fixed(console: Console, outcome: Outcome) -> None:
    if outcome.violation is None:
        _lines(console, [("without", f"holds in {_counted(outcome.runs)}")])
    else:
        _lines(console, [("without", f"VIOLATED: {outcome.violation}")])


def _counted(runs: int) -> str:
    return f"{runs} schedules" if runs > 1 else "the only schedule"
