"""Predict how much EPC recorded programs need, and the slowdown with less.

The command replays the accesses of a trace with Linux's policy in EPCs of many sizes, SECS and VA
pages included.  It computes a slowdown from the counts and the prices of page faults and evictions.
Several traces are enclaves that run side by side.

Examples:
  softsgx record -o app.trace -- ./app          first record the pages that it uses
  softsgx plan app.trace                        the smallest EPC with at most 10 % slowdown
  softsgx plan app.trace --target-slowdown 1.5 --epc 4MiB:64MiB
  softsgx plan a.trace b.trace --group jobs/a --group jobs/b --limit jobs/a=16MiB
  softsgx plan app.trace --policy lru,s3fifo,opt --json -
  softsgx plan app.trace --report plan.html     a page with curve, residency and fault rates
  softsgx plan app.trace --costs mine.toml      prices measured on your machine
  softsgx plan --fleet fleet.toml               many programs on many hosts

The answer means: in an EPC of that size, or in a container with that limit, the program takes at
most 10 % longer than in an EPC that never evicts a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from softsgx.cli._common import size_bytes
from softsgx.cli._fleet import add_fleet, run_fleet
from softsgx.cli._outputs import Outputs
from softsgx.costs import COST_PROFILES, find_profile
from softsgx.errors import SoftSgxError

if TYPE_CHECKING:
    from softsgx.plan import Host, Options, Plan, PlannedTrace

__all__ = ["NAME", "configure", "run"]

NAME = "plan"

_STANDARD_OUTPUT = "-"
_LIBRARIES = ("numpy", "numba", "pyarrow")
_POLICIES = ("linux", "fifo", "lru", "clock", "s3fifo", "opt")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("traces", nargs="*", metavar="TRACE", help="files of softsgx record")
    parser.add_argument(
        "--format",
        choices=("softsgx", "text", "lackey", "oracleGeneral"),
        help="of the traces (default: detected)",
    )
    _add_host(parser)
    _add_policy(parser)
    prices = parser.add_argument_group("prices")
    prices.add_argument(
        "--costs",
        metavar="PROFILE",
        default="sgx2-server",
        help=f"prices: {', '.join(COST_PROFILES)}, or a file FILE.toml (default: sgx2-server)",
    )
    prices.add_argument(
        "--target-slowdown",
        type=float,
        default=1.1,
        metavar="FACTOR",
        help="acceptable run time, divided by that without paging (default 1.1: 10 %% longer)",
    )
    prices.add_argument(
        "--run-time",
        type=float,
        metavar="SECONDS",
        help="run time without paging (default: from the traces)",
    )
    add_fleet(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="write the plan as one JSON object; - is standard output"
    )
    output.add_argument(
        "--report",
        metavar="FILE.html",
        help="write a page with curve, residency and prices; of a fleet, with hosts and sizes",
    )
    output.add_argument("--quiet", action="store_true", help="print no text")
    output.add_argument("--force", action="store_true", help="overwrite files")


def _add_host(parser: argparse.ArgumentParser) -> None:
    host = parser.add_argument_group("the host")
    host.add_argument(
        "--epc",
        type=_range,
        default=(None, None),
        metavar="SIZE:SIZE",
        help="smallest and largest EPC to replay, or one size (default: from the traces)",
    )
    host.add_argument(
        "--limit",
        action="append",
        default=[],
        type=_limit,
        metavar="GROUP=SIZE",
        help="limit of a group's EPC (misc.max); repeatable",
    )
    host.add_argument(
        "--group",
        action="append",
        default=[],
        metavar="GROUP",
        help="group of the enclaves of a trace; once for each trace, or once for all "
        "(default: the last one that --limit names)",
    )


def _add_policy(parser: argparse.ArgumentParser) -> None:
    policy = parser.add_argument_group("what if")
    policy.add_argument(
        "--policy",
        type=_policies,
        default=(),
        metavar="NAME,NAME",
        help=f"compare with: {', '.join(_POLICIES)}",
    )
    for option, help_text in (
        ("--batch", "pages that a batch evicts at most (Linux: 16)"),
        ("--scan", "pages that a batch scans (Linux: 16)"),
        ("--low", "free pages below which ksgxd wakes (Linux: 32)"),
        ("--high", "free pages at which ksgxd sleeps again (Linux: 64)"),
        ("--prefetch", "further pages to load with the page of a fault (Linux: 0)"),
    ):
        policy.add_argument(option, type=_count, metavar="PAGES", help=help_text)
    policy.add_argument(
        "--evict-va", action="store_true", help="evict VA pages as well (Linux: never)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan; return 0, or 1 if no size in the range is enough."""
    for name in _LIBRARIES:
        if find_spec(name) is None:
            raise SoftSgxError(f"plan: package {name} is missing; pip install 'softsgx[plan]'")
    if args.fleet is not None:
        return run_fleet(args, _defaults())
    if not args.traces:
        raise SoftSgxError("plan: no trace; make one with softsgx record -- PROGRAM")
    from softsgx.plan import plan

    costs = find_profile(args.costs)
    if args.run_time is not None and not 0 < args.run_time < 1e9:
        raise SoftSgxError(f"--run-time {args.run_time:g}: not a run time; give seconds above 0")
    files = [name for name in (args.json, args.report) if name and name != _STANDARD_OUTPUT]
    with Outputs(files, force=args.force) as outputs:
        with _progress() as progress:
            planned = plan(
                _traces(args),
                _host(args),
                args.policy,
                costs,
                target_slowdown=args.target_slowdown,
                progress=progress,
            )
        _report(args, outputs, planned)
    return 0 if planned.recommendation.epc_bytes is not None else 1


def _defaults() -> argparse.Namespace:
    """Return the default of each argument."""
    parser = argparse.ArgumentParser()
    configure(parser)
    return parser.parse_args([])


def _traces(args: argparse.Namespace) -> list[PlannedTrace]:
    from softsgx.plan import PlannedTrace

    groups = args.group or ([args.limit[-1][0]] if args.limit else ["/"])
    if len(groups) == 1:
        groups = groups * len(args.traces)
    if len(groups) != len(args.traces):
        raise SoftSgxError(
            f"--group: {len(groups)} groups for {len(args.traces)} trace(s); give one for each"
        )
    return [
        PlannedTrace(path, group, args.format)
        for path, group in zip(args.traces, groups, strict=True)
    ]


def _host(args: argparse.Namespace) -> Host:
    from softsgx.plan import Host

    smallest, largest = args.epc
    return Host(smallest, largest, dict(args.limit), _options(args), args.run_time)


def _options(args: argparse.Namespace) -> Options:
    from softsgx.plan import Options

    given = {
        "batch_pages": args.batch,
        "scan_pages": args.scan,
        "low_pages": args.low,
        "high_pages": args.high,
        "prefetch_pages": args.prefetch,
    }
    changed = {name: pages for name, pages in given.items() if pages is not None}
    return Options(evict_va=args.evict_va, **changed)


def _report(args: argparse.Namespace, outputs: Outputs, planned: Plan) -> None:
    from softsgx.report.plan_document import plan_document
    from softsgx.report.plan_text import print_plan

    if args.json:
        text = json.dumps(plan_document(planned), indent=2) + "\n"
        if args.json == _STANDARD_OUTPUT:
            print(text, end="")
        else:
            outputs.write(args.json, text.encode())
    if args.report:
        from softsgx.report.plan_html import plan_page

        outputs.write(args.report, plan_page(planned).encode())
    if not args.quiet and args.json != _STANDARD_OUTPUT:
        print_plan(planned, Console(highlight=False, markup=False, emoji=False))


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show progress on a terminal; the first plan of a user compiles for some seconds."""
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        yield lambda _what, _done, _of: None
        return
    with console.status("starting") as status:
        yield lambda what, done, of: status.update(
            f"{what}: {100 * done // of} %" if of > 1 else what
        )


def _range(text: str) -> tuple[int, int]:
    smallest, colon, largest = text.partition(":")
    low = size_bytes(smallest)
    return low, size_bytes(largest) if colon else low


def _limit(text: str) -> tuple[str, int]:
    path, equals, size = text.rpartition("=")
    if not equals or not path.strip("/"):
        raise argparse.ArgumentTypeError(f"limit {text!r}; write GROUP=SIZE, such as jobs/a=16MiB")
    return path.strip("/"), size_bytes(size)


def _policies(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    for name in names:
        if name not in _POLICIES:
            raise argparse.ArgumentTypeError(
                f"policy {name!r}: unknown; give some of {', '.join(_POLICIES)}"
            )
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 20:
        raise argparse.ArgumentTypeError(f"{text!r}; give a number of pages, at least 1")
    return int(text)
