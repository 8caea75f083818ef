"""Find races: run small scenarios under many schedules and check everything.

A scenario is a few tasks that race on a small platform: a fault against a reclaim batch, two faults
on one page, an ioctl against a fault.  The command runs its schedules one after the other.  After
each it checks all counts against raw state, and all pages against their known content.  It reduces
a failing schedule to the switches that matter, and prints it with a token that repeats it.

Examples:
  softsgx explore --list                      the scenarios
  softsgx explore --budget 10s                all of them, for ten seconds
  softsgx explore fault-reclaim --strategy bounded --budget 5000
  softsgx explore fault-reclaim --defect B1   find a known defect of Linux
  softsgx explore mymodule:my_race            a scenario from your own module
  softsgx explore --replay TOKEN              one schedule again, as a table; or --as-test
  softsgx explore --corpus                    every known defect: is it found, how soon?

exit status: 0 no violation, or with --corpus every defect was found; 1 otherwise; 2 bad input.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from softsgx.cli._common import print_json, write_file
from softsgx.defects import Defect
from softsgx.errors import SoftSgxError
from softsgx.explore import BUILT_IN, STRATEGIES, Finding, Token, find_scenario
from softsgx.explore.campaign import (
    Budget,
    Campaign,
    Summary,
    run_campaign,
)
from softsgx.explore.corpus import Hunt, hunt_all
from softsgx.explore.html import html_page
from softsgx.explore.replay import Replayed, replay
from softsgx.explore.store import Store
from softsgx.explore.text import as_test, coverage_matrix, interleaving
from softsgx.workers import InProcess, Processes, Workers

__all__ = ["NAME", "configure", "run"]

NAME = "explore"

_MOST_JOBS = 1024
_UNITS = {"": 0.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_HISTORY = 40
_SHOWN_MISSING = 6


def budget(text: str) -> Budget:
    """Return the budget of ``60s``, ``5m``, ``2h``, or of a number of schedules."""
    found = re.fullmatch(r"(\d+)([smh]?)", text)
    if found is None or not int(found[1]):
        raise argparse.ArgumentTypeError(f"budget {text!r}; write 60s, 5m, 2h, or a number")
    number, unit = int(found[1]), found[2]
    return Budget(seconds=number * _UNITS[unit]) if unit else Budget(runs=number)


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_JOBS:
        raise argparse.ArgumentTypeError(f"jobs {text!r}; write a number from 1 to {_MOST_JOBS}")
    return int(text)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help="names, or MODULE:FUNCTION (default: all built-in ones)",
    )
    parser.add_argument("--list", action="store_true", help="print the scenarios")
    parser.add_argument(
        "--defect", action="append", default=[], metavar="B1", help="switch a known defect on"
    )
    parser.add_argument(
        "--strategy",
        choices=tuple(STRATEGIES),
        default="random",
        help="; ".join(f"{name}: {what}" for name, what in STRATEGIES.items()),
    )
    parser.add_argument(
        "--budget",
        type=budget,
        default=Budget(seconds=10.0),
        metavar="TIME|N",
        help="total time (60s, 5m, 2h), or a number of schedules of each scenario (default 10s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default 0)")
    parser.add_argument(
        "--until-found", action="store_true", help="end a scenario at its first finding"
    )
    parser.add_argument("--jobs", type=_jobs, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--cluster", metavar="tcp://HOST:PORT", help="run on a Dask scheduler")
    parser.add_argument(
        "--out", metavar="DIR", help="append results to a directory, and continue from it"
    )
    parser.add_argument("--replay", metavar="TOKEN", help="run one schedule again and show it")
    parser.add_argument("--as-test", action="store_true", help="print a pytest function")
    parser.add_argument("--corpus", action="store_true", help="search for every known defect")
    parser.add_argument(
        "--matrix", action="store_true", help="print which pairs of leaves were interleaved"
    )
    parser.add_argument("--report", metavar="FILE.html", help="write the findings as one page")
    parser.add_argument("--force", action="store_true", help="overwrite the report")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """List, replay, run the corpus, or explore."""
    if args.list:
        return _list(as_json=args.json)
    if args.replay is not None:
        return _replay(Token.parse(args.replay), args)
    if args.corpus:
        return _corpus(args)
    return _explore(args)


def _console() -> Console:
    return Console(highlight=False, emoji=False)


def _list(*, as_json: bool) -> int:
    named = BUILT_IN.values()
    if as_json:
        print_json({"scenarios": {scenario.name: scenario.summary for scenario in named}})
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for scenario in named:
        table.add_row(scenario.name, scenario.summary)
    table.add_row("story:B11", "the story of a known defect; see softsgx defects list")
    _console().print(table)
    return 0


# --- one schedule ---------------------------------------------------------------------------------


def _replay(token: Token, args: argparse.Namespace) -> int:
    story = replay(token)
    if args.report:
        _write_report(args, [story], None)
    if args.json:
        print_json(_story_json(story))
    elif args.as_test:
        print(as_test(story), end="")
    else:
        _print_story(_console(), story)
    return int(story.failed)


def _print_story(console: Console, story: Replayed) -> None:
    defects = f", with {' '.join(story.token.defects)}" if story.token.defects else ""
    console.print(f"[bold]{story.scenario.name}[/bold]{defects}: {story.scenario.summary}\n")
    console.print(interleaving(story))
    if not story.faithful:
        console.print(
            "the program has changed: its scheduling points differ from those of the token",
            style="yellow",
        )
    if story.failed and story.history:
        console.print(f"\n[bold]{'its page' if story.page else 'events'}[/bold]")
        for at, text in story.history[-_HISTORY:]:
            console.print(f"{at:4}  {text}", markup=False)


def _story_json(story: Replayed) -> dict[str, object]:
    return {
        "scenario": story.scenario.name,
        "summary": story.scenario.summary,
        "defects": list(story.token.defects),
        "replay": story.token.text(),
        "property": story.violated,
        "text": story.text,
        "page": story.page,
        "faithful": story.faithful,
        "tasks": list(story.tasks),
        "schedule": [[line.task, line.place, line.switch] for line in story.lines],
        "history": [list(item) for item in story.history],
    }


# --- a campaign -----------------------------------------------------------------------------------


def _explore(args: argparse.Namespace) -> int:
    campaign = Campaign(
        tuple(dict.fromkeys(args.scenarios)) or tuple(BUILT_IN),
        tuple(_defect(name) for name in args.defect),
        args.strategy,
        args.budget,
        args.seed,
        args.until_found,
    )
    for name in campaign.scenarios:
        find_scenario(name)
    store = Store(args.out, campaign) if args.out else None
    with _workers(args) as workers:
        steps = run_campaign(
            campaign,
            workers,
            before=[] if store is None else store.results(),
            report=None if store is None else lambda _summary, result: store.append(result),
        )
        summary, interrupted = _follow(steps, campaign)
    summary.minimise()
    found = summary.found()
    stories = [replay(finding.token) for finding in found]
    if args.report:
        _write_report(args, stories, summary)
    if args.json:
        print_json(_summary_json(summary, found, stories))
    elif args.as_test:
        print("\n\n".join(as_test(story) for story in stories), end="")
    else:
        _print_summary(_console(), summary, found, stories, matrix=args.matrix)
        if interrupted:
            print("interrupted: these are the results so far", file=sys.stderr)
    return int(bool(found))


def _defect(name: str) -> str:
    for defect in Defect:
        if name.upper() in (defect.value, defect.name) and defect.can_be_switched_on:
            return defect.value
    raise SoftSgxError(f"defect {name!r}: cannot be switched on; see softsgx defects list")


@contextmanager
def _workers(args: argparse.Namespace) -> Iterator[Workers]:
    if args.cluster is None:
        yield InProcess() if args.jobs == 1 else Processes(args.jobs)
        return
    from softsgx.workers import DaskCluster  # imports a second's worth of packages

    with closing(DaskCluster(args.cluster)) as cluster:
        yield cluster


def _follow(steps: Iterator[Summary], campaign: Campaign) -> tuple[Summary, bool]:
    """Show progress until the campaign ends, or is interrupted; return the results so far."""
    summary, interrupted = Summary(), False
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    wanted = campaign.budget
    total = (wanted.seconds or 0) or (wanted.runs or 0) * len(campaign.scenarios)
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=total)
        try:
            for summary in steps:
                done = summary.seconds if wanted.seconds else summary.runs
                rate = summary.runs / summary.seconds if summary.seconds else 0.0
                distinct = sum(len(c.distinct) for c in summary.coverage.values())
                text = f"{summary.runs} schedules, {rate:.0f}/s, {distinct} distinct"
                text += f", {len(summary.findings)} findings"
                progress.update(bar, completed=done, description=text)
        except KeyboardInterrupt:
            interrupted = True
    return summary, interrupted


def _print_summary(
    console: Console,
    summary: Summary,
    found: list[Finding],
    stories: list[Replayed],
    *,
    matrix: bool,
) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scenario", style="cyan", no_wrap=True)
    for heading in ("schedules", "distinct", "places met", "findings"):
        table.add_column(heading, justify="right")
    for name, coverage in summary.coverage.items():
        number = sum(scenario == name for scenario, _signature in summary.findings)
        possible = len(coverage.possible())
        met = possible - len(coverage.missing())
        table.add_row(
            name,
            f"{coverage.runs}{' (all)' if coverage.complete else ''}",
            str(len(coverage.distinct)),
            f"{met} of {possible}",
            f"[red]{number}[/red]" if number else "0",
        )
    console.print(table)
    if matrix:
        for name, coverage in summary.coverage.items():
            console.print(f"\n[bold]{name}[/bold]")
            console.print(coverage_matrix(coverage))
            missing = coverage.missing()[:_SHOWN_MISSING]
            console.print(f"never met: {'; '.join(' / '.join(pair) for pair in missing) or '–'}")
    for finding, story in zip(found, stories, strict=True):
        console.print()
        _print_story(console, story)
        times = "once" if finding.times == 1 else f"{finding.times} times"
        again = f"softsgx explore --replay {story.token.text()}"
        console.print(f"\nseen {times}; repeat:\n{again}", soft_wrap=True)
        if not finding.repeats:
            console.print("seen only after earlier rounds on the same platform", style="yellow")
    cpu = summary.cpu_seconds
    if cpu:
        rate = f"{summary.runs / cpu:.0f} a second of processor time"
        plural = "" if summary.runs == 1 else "s"
        console.print(f"\n{summary.runs} schedule{plural}, {rate}", style="dim")


def _summary_json(
    summary: Summary, found: list[Finding], stories: list[Replayed]
) -> dict[str, object]:
    scenarios: dict[str, Any] = {}
    for name, coverage in summary.coverage.items():
        names, met = coverage.leaves()
        scenarios[name] = {
            "schedules": coverage.runs,
            "distinct": len(coverage.distinct),
            "steps": coverage.steps,
            "switches": coverage.switches,
            "complete": coverage.complete,
            "met": len(coverage.possible()) - len(coverage.missing()),
            "possible": len(coverage.possible()),
            "leaves": names,
            "matrix": [[*pair, count] for pair, count in sorted(met.items())],
            "missing": [list(pair) for pair in coverage.missing()],
        }
    findings = [
        {**_story_json(story), "times": finding.times, "repeats": finding.repeats}
        for finding, story in zip(found, stories, strict=True)
    ]
    return {
        "schedules": summary.runs,
        "seconds": round(summary.seconds, 3),
        "cpu_seconds": round(summary.cpu_seconds, 3),
        "scenarios": scenarios,
        "findings": findings,
    }


def _write_report(
    args: argparse.Namespace, stories: list[Replayed], summary: Summary | None
) -> None:
    page = html_page(stories, {} if summary is None else summary.coverage)
    write_file(args.report, page.encode(), force=args.force)


# --- the corpus -----------------------------------------------------------------------------------


def _corpus(args: argparse.Namespace) -> int:
    chosen = [_defect(name) for name in args.defect]
    hunts = []
    console = _console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("defect", "scenario", "schedules", "seconds", "violated property"):
        table.add_column(
            heading, justify="right" if heading in ("schedules", "seconds") else "left"
        )
    for hunt in hunt_all(chosen):
        hunts.append(hunt)
        table.add_row(*_hunt_row(hunt))
        if sys.stderr.isatty():
            print(f"\r{len(hunts)} defects", end="", file=sys.stderr, flush=True)
    missed = [hunt for hunt in hunts if hunt.finding is None or hunt.without]
    if args.json:
        print_json({"hunts": [hunt.to_json() for hunt in hunts], "missed": len(missed)})
    else:
        console.print(table)
        console.print(f"\n{len(hunts) - len(missed)} of {len(hunts)} found, and only when on")
    return int(bool(missed))


def _hunt_row(hunt: Hunt) -> tuple[str, str, str, str, str]:
    found = hunt.finding
    what = "not found" if found is None else f"{found.violated}: {found.text}"
    if hunt.without:
        what += " (also when off)"
    return hunt.defect, hunt.scenario, str(hunt.runs), f"{hunt.seconds:.2f}", what
