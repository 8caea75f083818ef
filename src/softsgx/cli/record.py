"""Record which pages of enclaves an unmodified program uses, and when.

The program runs as under softsgx run.  softsgx plan predicts from the trace how much EPC it needs.
With --precision intervals each page appears once in each interval, at its first use, so the trace
does not depend on the EPC.  With --precision faults each load of a page appears; that costs less,
and records the faults at the EPC that you choose.

Examples:
  softsgx record -o app.trace -- ./app --its-own options
  softsgx plan app.trace                          how much EPC it needs
  softsgx record --interval 50ms -- ./app         fewer intervals: less overhead, coarser
  softsgx record --precision faults --epc 4MiB -- ./app
  softsgx record --as-enclave -- sort big.txt     a program that is not ported yet
  softsgx record --as-enclave --epc 2MiB -- sort big.txt      paged in an EPC of 2 MiB

The trace is written while the program runs, so it stays readable if the command is killed.  It has
numbers of pages, not their contents.

exit status: the program's; 2 when the command line or a file it names is wrong, 127 when there is
no such program, 126 when it cannot be executed, 125 when this machine lacks something and after an
error in softsgx.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from softsgx.arch import PAGE_BYTES
from softsgx.cli._as_enclave import (
    describe_ordinary,
    record_ordinary,
    refuse_machine,
)
from softsgx.cli._common import log_to_stderr, tell, utc_now
from softsgx.cli._live import Live, add_metrics
from softsgx.cli._outputs import Outputs
from softsgx.cli._program import (
    FAILED,
    add_machine_arguments,
    add_program,
    check_machine,
    config_of,
    cpu_times,
    errors_printed,
    group_of,
    print_text,
    program_of,
    status_of,
)
from softsgx.cli._signals import ProgramSignals
from softsgx.cli._trace_file import (
    TraceFile,
    check_libraries,
    describe_overhead,
    shell_status,
)
from softsgx.engines.native import RunFailed, RunResult
from softsgx.engines.native import run as run_natively
from softsgx.engines.native.injections import tick_period_ns
from softsgx.engines.native.recording import Recorder
from softsgx.errors import SoftSgxError
from softsgx.host import Platform, PlatformConfig
from softsgx.live import About, state
from softsgx.report import Collector
from softsgx.sizes import size_text

__all__ = ["NAME", "configure", "run"]

NAME = "record"

_FORMAT = 1
_STANDARD_OUTPUT = "-"
_FAULTS_EPC = "1MiB"
_INTERVAL = "10ms"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    trace = parser.add_argument_group("the trace")
    trace.add_argument(
        "-o", "--output", metavar="FILE", help="file of the trace (default: PROGRAM.trace)"
    )
    trace.add_argument(
        "--precision",
        choices=("intervals", "faults"),
        default="intervals",
        help="each page once in each interval (default), or each load of a page by the pager",
    )
    trace.add_argument(
        "--interval",
        metavar="TIME",
        help=f"length of an interval: 1ms to 1s (default {_INTERVAL})",
    )
    trace.add_argument(
        "--as-enclave",
        action="store_true",
        help="record a program without enclaves as if its memory were enclave memory",
    )
    add_machine_arguments(parser, f"93.5MiB; {_FAULTS_EPC} with --precision faults")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="write the summary as one JSON object; - is standard output"
    )
    add_metrics(output)
    output.add_argument("--quiet", action="store_true", help="print no summary at the end")
    output.add_argument("--force", action="store_true", help="overwrite files")
    add_program(parser)


def run(args: argparse.Namespace) -> int:
    """Record the program; return its exit status.

    Raises:
        EndedBySignal: a signal has ended the program, or arrives while it does not run.
    """
    argv = program_of(args, NAME)
    if args.as_enclave:
        refuse_machine(args)
        if args.epc is not None:  # the trace then has the loads into that EPC
            args.precision = "faults"
    interval_ns = _interval_ns(args)
    check_libraries()
    if args.as_enclave:
        return _run_as_enclave(args, argv, interval_ns)
    with log_to_stderr(), ProgramSignals(frozenset()) as signals:
        check_machine()
        if args.epc is None and not args.config and args.precision == "faults":
            args.epc = _FAULTS_EPC
        config = config_of(args)
        path = args.output or f"{Path(argv[0]).name}.trace"
        with _outputs(args, path) as outputs:
            trace = TraceFile(path, args.precision, shlex.join(argv), interval_ns)
            recorder = Recorder(trace, interval_ns=interval_ns or None)
            result, mistakes = _run_recorded(args, argv, config, signals, trace, recorder)
            outputs.keep(path)
            _report(args, outputs, _document(argv, result, trace, recorder))
    return _status(result.exit_code, mistakes)


def _run_as_enclave(args: argparse.Namespace, argv: list[str], interval_ns: int) -> int:
    with log_to_stderr(), ProgramSignals(frozenset()) as signals:
        path = args.output or f"{Path(argv[0]).name}.trace"
        with _outputs(args, path) as outputs:
            trace = TraceFile(path, args.precision, shlex.join(argv), interval_ns)
            epc = None if interval_ns else args.epc or _FAULTS_EPC
            offer = partial(_live, args, argv)
            result, mistakes = record_ordinary(argv, signals, trace, interval_ns, epc, offer)
            outputs.keep(path)
            document = {"format": _FORMAT, "command": argv, **describe_ordinary(result, trace)}
            _report(args, outputs, document)
    return _status(result.exit_code, mistakes)


def _status(exit_code: int, mistakes: list[Exception]) -> int:
    for mistake in mistakes:
        tell(f"softsgx: {mistake!r}: a bug in softsgx; please report it")
    return FAILED if mistakes else status_of(exit_code)


class _Watch:
    """Opens the trace when the program starts, and passes signals on to it.

    Args:
        signals: passes signals on to the program.
        trace: the trace file.
        collector: receives the platform, for ``live``.
        live: serves the state of the program to other processes.
    """

    def __init__(
        self, signals: ProgramSignals, trace: TraceFile, collector: Collector, live: Live
    ) -> None:
        self._signals, self._trace = signals, trace
        self._collector, self._live = collector, live
        self._epc_pages = 0

    def attached(self, platform: Platform, pager: str) -> None:
        """Remember the size of the EPC."""
        self._epc_pages = platform.core.epc_pages
        self._collector.attached(platform, pager)

    def started(self, pid: int) -> None:
        """Start passing signals on, and open the trace."""
        self._signals.started(pid)
        self._collector.started(pid)
        self._trace.open(self._epc_pages)
        self._live.start()


def _run_recorded(
    args: argparse.Namespace,
    argv: list[str],
    config: PlatformConfig,
    signals: ProgramSignals,
    trace: TraceFile,
    recorder: Recorder,
) -> tuple[RunResult, list[Exception]]:
    """Run the program; return how it ended, and exceptions that are bugs of softsgx."""
    collector = Collector(time.monotonic_ns, cpu_times)
    live = _live(args, argv, partial(state, collector))
    with signals.waiting(), trace, closing(live):
        try:
            result = run_natively(
                argv,
                config,
                group=group_of(args, config),
                pager=args.pager,
                cpuid=args.cpuid,
                cpus=args.cpus,
                strict=args.strict,
                observer=_Watch(signals, trace, collector, live),
                recorder=recorder,
            )
        except RunFailed as failed:  # the trace is not complete
            trace.is_whole = False
            return failed.result, failed.errors
        signals.ended(result.exit_code)
    return result, []


def _live(
    args: argparse.Namespace, argv: list[str], state: Callable[[About], dict[str, Any]]
) -> Live:
    """Return what offers a state to other processes."""
    return Live(
        state,
        verb=NAME,
        command=argv,
        began=utc_now(),
        quiet=args.quiet,
        metrics=args.metrics,
    )


def _interval_ns(args: argparse.Namespace) -> int:
    """Return the length of an interval in nanoseconds; 0: the precision is ``faults``."""
    if args.precision == "intervals":
        return tick_period_ns(args.interval or _INTERVAL, "--interval")
    if args.interval is not None:
        raise SoftSgxError("--interval: not possible with --precision faults; remove one of them")
    return 0


def _outputs(args: argparse.Namespace, path: str) -> Outputs:
    """Open the files; only the summary's object can go to standard output."""
    if path == _STANDARD_OUTPUT:
        raise SoftSgxError("-: the trace cannot be written to standard output; give a file")
    json_file = None if args.json == _STANDARD_OUTPUT else args.json
    return Outputs([each for each in (path, json_file) if each is not None], force=args.force)


# --- summary ------------------------------------------------------------------------------------


def _document(
    argv: list[str], result: RunResult, trace: TraceFile, recorder: Recorder
) -> dict[str, Any]:
    """Return the object that ``--json`` writes."""
    overhead, wall_ns = recorder.overhead, recorder.wall_ns
    return {
        "format": _FORMAT,
        "command": argv,
        "exit_status": shell_status(result.exit_code),
        "trace": trace.describe(
            epc_pages=result.epc_pages,
            enclaves=recorder.enclaves,
            accesses=recorder.accesses,
            writes=recorder.writes,
        ),
        "pager": result.pager,
        "reloads": result.counters["eldu"],
        "overhead": describe_overhead(
            wall_ns=wall_ns,
            hiding_ns=overhead.hiding_ns,
            serving_ns=overhead.serving_ns,
            faults=overhead.faults,
            intervals=overhead.intervals,
            late_intervals=overhead.late_intervals,
            longest_interval_ns=overhead.longest_interval_ns,
        ),
    }


def _lines(document: dict[str, Any]) -> list[str]:
    """Return the summary's lines."""
    trace, overhead = document["trace"], document["overhead"]
    each = trace["bytes_per_access"]
    lines = [
        f"{trace['file']}: {trace['accesses']:,} accesses, {trace['writes']:,} of them writes; "
        f"{trace['enclaves']} {'enclave' if trace['enclaves'] == 1 else 'enclaves'}; "
        f"{trace['bytes']:,} bytes" + ("" if each is None else f", {each:.1f} an access"),
        f"recording took {overhead['hiding_seconds'] + overhead['serving_seconds']:.2f} s, "
        f"{overhead['share_of_wall']:.0%} of {overhead['wall_seconds']:.2f} s: "
        f"{overhead['serving_seconds']:.2f} s for {overhead['faults']:,} faults"
        + (
            f", {overhead['hiding_seconds']:.2f} s for {overhead['intervals']:,} intervals"
            if trace["precision"] == "intervals"
            else ""
        ),
    ]
    if overhead["late_intervals"]:
        lines.append(
            f"{overhead['late_intervals']:,} of {overhead['intervals']:,} intervals took more than "
            f"twice {1e3 * trace['interval_seconds']:g} ms, the longest "
            f"{1e3 * overhead['longest_interval_seconds']:.0f} ms: the machine is busy, or the "
            "interval too short for it"
        )
    if not trace["complete"]:
        lines.append(f"{trace['file']}: is not complete")
    if "address_spaces" in document:
        lines.insert(1, _memory_line(document))
    if not trace["accesses"]:
        lines.append("the program has used no enclave; for an ordinary program: --as-enclave")
    else:
        lines.append(f"next: softsgx plan {shlex.quote(trace['file'])}")
    return lines


def _memory_line(document: dict[str, Any]) -> str:
    """Return the line about an ordinary program's memory."""
    pages, epc_bytes = document["pages"], document["trace"]["epc_bytes"]
    what = f"{pages:,} pages ({pages * PAGE_BYTES / 2**20:,.1f} MiB) of private memory"
    if not epc_bytes:
        return f"{what}, at most {document['most_pages']:,} in one interval"
    return (
        f"{what} in an EPC of {size_text(epc_bytes)}: {document['loads']:,} loads, "
        f"{document['evictions']:,} evictions"
    )


def _report(args: argparse.Namespace, outputs: Outputs, document: dict[str, Any]) -> None:
    """Write the output files; an error is printed, and the status stays the program's."""
    if args.json:
        text = json.dumps(document, indent=2) + "\n"
        with errors_printed():
            if args.json == _STANDARD_OUTPUT:
                print_text(text)
            else:
                outputs.write(args.json, text.encode())
    if not args.quiet:
        for line in _lines(document):
            tell(f"softsgx: {line}")
