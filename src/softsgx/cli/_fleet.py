"""``softsgx plan --fleet``: placements of many programs on many hosts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from softsgx.cli._common import tell
from softsgx.cli._outputs import Outputs
from softsgx.errors import SoftSgxError
from softsgx.workers import InProcess, Journal, Workers

if TYPE_CHECKING:
    from softsgx.plan.fleet import UnitResult

__all__ = ["add_fleet", "run_fleet"]

_STANDARD_OUTPUT = "-"
_MOST_JOBS = 1024
_OF_ONE_HOST = (
    *("traces", "format", "epc", "limit", "group", "policy", "batch", "scan", "low", "high"),
    *("prefetch", "evict_va", "costs", "target_slowdown", "run_time"),
)


def add_fleet(parser: argparse.ArgumentParser) -> None:
    """Add the options for fleets."""
    fleet = parser.add_argument_group("a fleet")
    fleet.add_argument(
        "--fleet", metavar="SPEC.toml", help="place many programs on many hosts, in place of TRACE"
    )
    fleet.add_argument(
        "--jobs",
        type=_jobs,
        metavar="N",
        help="processes of a local Dask cluster (default: one for each processor; 1, or Dask not "
        "installed: no cluster)",
    )
    fleet.add_argument("--cluster", metavar="tcp://HOST:PORT", help="use a running Dask scheduler")
    fleet.add_argument(
        "--results", metavar="FILE", help="append each result to a file, and continue from it"
    )


def run_fleet(args: argparse.Namespace, defaults: argparse.Namespace) -> int:
    """Plan the fleet; return 0, or 1 if no placement has room for all programs.

    Args:
        args: arguments of the command.
        defaults: the default of each.
    """
    _check_alone(args, defaults)
    from softsgx.plan.fleet import plan_fleet
    from softsgx.plan.fleet_spec import load_fleet
    from softsgx.report.fleet import fleet_document, print_fleet

    spec = load_fleet(args.fleet)
    journal = None if args.results is None else Journal(Path(args.results))
    known = {} if journal is None else _known(journal)
    to_stdout = args.json == _STANDARD_OUTPUT
    json_file = None if to_stdout else args.json
    files = [name for name in (json_file, args.report) if name]
    with Outputs(files, force=args.force) as outputs, _workers(args) as workers:
        try:
            with _following() as found:
                plan = plan_fleet(spec, workers, known, _both(found, journal))
        except KeyboardInterrupt:
            if journal is not None:
                tell(f"softsgx: interrupted; the same command continues from {args.results}")
            raise
        if args.json:
            text = json.dumps(fleet_document(plan), indent=2) + "\n"
            if to_stdout:
                print(text, end="")
            else:
                outputs.write(args.json, text.encode())
        if args.report:
            from softsgx.report.fleet_html import fleet_page

            outputs.write(args.report, fleet_page(plan).encode())
    if not args.quiet and not to_stdout:
        print_fleet(plan, Console(highlight=False, markup=False, emoji=False))
    return 0 if plan.best is not None else 1


def _check_alone(args: argparse.Namespace, defaults: argparse.Namespace) -> None:
    """Refuse options of one host; an option with its default value changes nothing."""
    for name in _OF_ONE_HOST:
        if getattr(args, name) != getattr(defaults, name):
            option = "TRACE" if name == "traces" else f"--{name.replace('_', '-')}"
            raise SoftSgxError(
                f"{option}: not possible with --fleet; write properties of hosts and programs "
                f"into {args.fleet}"
            )


def _known(journal: Journal) -> dict[str, UnitResult]:
    from softsgx.plan.fleet import UnitResult

    known = {}
    for number, entry in journal.entries():
        try:
            result = UnitResult.from_json(entry)
        except (KeyError, TypeError) as error:
            raise SoftSgxError(
                f"{journal.path}:{number}: not a result of a fleet; give another file"
            ) from error
        known[result.key] = result
    return known


def _both(
    found: Callable[[UnitResult], None], journal: Journal | None
) -> Callable[[UnitResult], None]:
    def keep(result: UnitResult) -> None:
        if journal is not None:
            journal.append(asdict(result))
        found(result)

    return keep


@contextmanager
def _workers(args: argparse.Namespace) -> Iterator[Workers]:
    if args.cluster is not None:
        from softsgx.workers import DaskCluster

        with closing(DaskCluster(args.cluster)) as cluster:
            yield cluster
        return
    jobs = args.jobs or (len(os.sched_getaffinity(0)) if find_spec("distributed") else 1)
    if jobs == 1:
        yield InProcess()
        return
    from softsgx.workers import local_cluster

    with local_cluster(jobs) as cluster:
        yield cluster


@contextmanager
def _following() -> Iterator[Callable[[UnitResult], None]]:
    """Yield a callback that shows the number of finished replays, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _result: None
        return
    done = 0
    with Console(stderr=True).status("replaying") as status:

        def found(_result: UnitResult) -> None:
            nonlocal done
            done += 1
            status.update(f"replaying: {done} done")

        yield found


def _jobs(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST_JOBS:
        raise argparse.ArgumentTypeError(f"jobs {text!r}; write a number from 1")
    return int(text)
