"""Run a program that uses SGX, unmodified, on a machine without SGX.

The program finds /dev/sgx_enclave and a finite EPC, and runs at native speed.  The command's exit
status is the program's: 128 + n when signal n ended it.  A summary on stderr has the counts of its
paging, and an estimate of their cost on silicon.

Examples:
  softsgx run -- ./app --its-own options
  softsgx run --epc 16MiB --json run.json -- ./app
  softsgx run --limit jobs/a=8MiB -- ./app        the program runs in that group
  softsgx run --quiet --report run.html -- ./app  a page that opens offline
  softsgx run --fail-if "reloads>1000" -- ./app   for CI

exit status: the program's; 124 when that is 0 and a --fail-if holds; 2 when the command line or a
file it names is wrong, 127 when there is no such program, 126 when it cannot be executed, 125 when
this machine lacks something and after an error in softsgx.
This is an emulation: it protects nothing from the owner of this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, cast

from softsgx import report
from softsgx.cli._common import log_to_stderr, takes_styles, tell, utc_now
from softsgx.cli._help import terminal_columns
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
from softsgx.engines.native import RunFailed
from softsgx.engines.native import run as run_natively
from softsgx.engines.native.injections import Injections, tick_period_ns
from softsgx.errors import SoftSgxError
from softsgx.host import Platform, PlatformConfig
from softsgx.live import state
from softsgx.report import (
    COST_PROFILES,
    Collector,
    RunSummary,
)

if TYPE_CHECKING:
    from softsgx.engines.native import GdbServer, RunResult
    from softsgx.report import Sampler, Ticker

__all__ = ["NAME", "configure", "run"]

NAME = "run"

_STANDARD_OUTPUT = "-"
_EXCEEDED = 124  # as timeout has it
_STDERR = "-"
_STATUS_AFTER_S = 2.0
_STATUS_EVERY_S = 0.5
_DEFAULT_WIDTH = 80


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    machine = add_machine_arguments(parser)
    machine.add_argument(
        "--inject",
        action="append",
        default=[],
        metavar="WHAT",
        help="fail on demand: power-loss@N, power-loss@SIGUSR1, init@N, init=STATUS@N, poison@N, "
        "provision, noexec; repeatable",
    )
    machine.add_argument(
        "--tick",
        metavar="TIME",
        help="interrupt threads inside enclaves at this interval: 1ms to 1s (default: never)",
    )
    debugging = parser.add_argument_group("debugging")
    debugging.add_argument(
        "--gdb",
        metavar="[HOST:]PORT|SOCKET",
        help="wait for a gdb at a port of 127.0.0.1 (0: any) or a Unix socket, and let it debug "
        "the program and its debug enclaves; anyone who can connect to another HOST can run code "
        "as you",
    )
    debugging.add_argument(
        "--enclave-file",
        action="append",
        default=[],
        metavar="ELF",
        help="for --gdb: a file with the code and symbols of an enclave, if the program does not "
        "open it; repeatable",
    )
    debugging.add_argument(
        "--syscalls",
        nargs="?",
        const=_STDERR,
        metavar="FILE",
        help="print the program's use of SGX in the style of strace: ioctls, mappings, entries "
        "through the vDSO; to stderr, or to FILE",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", metavar="FILE", help="write the summary as one JSON object; - is standard output"
    )
    output.add_argument(
        "--trace", metavar="FILE", help="write every event as a Perfetto trace; paging gets slower"
    )
    output.add_argument(
        "--report", metavar="FILE", help="write a page with charts that opens offline"
    )
    output.add_argument(
        "--fail-if",
        action="append",
        default=[],
        metavar="FIELD>VALUE",
        help="end with status 124 if a comparison with a field of the JSON holds: evictions>0, "
        "platform.peak_epc_bytes>16MiB, epc==small; repeatable",
    )
    output.add_argument(
        "--status",
        action="store_true",
        help="show a status line even if the program writes to the same terminal",
    )
    output.add_argument(
        "--costs",
        metavar="PROFILE",
        help=f"prices: {', '.join(COST_PROFILES)}, or a file FILE.toml (default: the profile's)",
    )
    add_metrics(output)
    output.add_argument("--quiet", action="store_true", help="print no summary at the end")
    output.add_argument("--force", action="store_true", help="overwrite files")
    add_program(parser)


def run(args: argparse.Namespace) -> int:
    """Run the program; return its exit status.

    Raises:
        EndedBySignal: a signal has ended the program, or arrives while it does not run.
    """
    argv = program_of(args, NAME)
    # Check these options before files are created; the engine would check them later.
    taken = Injections.of(args.inject).power_signals
    if args.tick is not None:
        tick_period_ns(args.tick)
    thresholds = [report.Threshold.parse(text) for text in args.fail_if]
    with log_to_stderr(), ProgramSignals(taken) as signals:
        check_machine()
        config = config_of(args)
        group = group_of(args, config)
        with _outputs(args) as outputs, _gdb_server(args) as gdb:
            if not args.quiet:
                for line in config.roundings():
                    tell(f"softsgx: {line}")
            collector = Collector(time.monotonic_ns, cpu_times, args.costs)
            sampler = report.Sampler(collector) if args.report else None
            began = utc_now()
            live = Live(
                partial(state, collector),
                verb=NAME,
                command=argv,
                began=began,
                quiet=args.quiet,
                metrics=args.metrics,
            )
            watch = _Watch(collector, sampler, signals, live, status=_status_wanted(args), gdb=gdb)
            result, mistakes = _run_watched(args, argv, config, group, watch)
            outputs.keep(args.trace, args.syscalls)
            summary = collector.summary(
                argv,
                result.exit_code,
                result.injected,
                fault_delivery=result.fault_delivery,
                began=began,
                options=_options(args),
            )
            _report(args, outputs, summary, sampler)
    exceeded = _exceeded(thresholds, summary) if thresholds else 0
    for mistake in mistakes:
        tell(f"softsgx: {mistake!r}: a bug in softsgx; please report it")
    if mistakes:
        return FAILED
    return status_of(result.exit_code) or exceeded


@contextmanager
def _gdb_server(args: argparse.Namespace) -> Iterator[GdbServer | None]:
    if args.gdb is None:
        yield None
        return
    from softsgx.engines.native import GdbServer

    with closing(GdbServer(args.gdb, args.enclave_file)) as server:
        yield server


def _run_watched(
    args: argparse.Namespace, argv: list[str], config: PlatformConfig, group: str, watch: _Watch
) -> tuple[RunResult, list[Exception]]:
    """Run the program; return how it ended, and exceptions that are bugs of softsgx."""
    with ExitStack() as stack:
        tracer = None
        if args.trace:
            writer = report.PerfettoWriter(args.trace, time.monotonic_ns, watch.collector.levels)
            tracer = stack.enter_context(writer)
        stack.enter_context(watch.signals.waiting())
        stack.callback(watch.stop)
        try:
            result = run_natively(
                argv,
                config,
                group=group,
                pager=args.pager,
                cpuid=args.cpuid,
                cpus=args.cpus,
                tracer=tracer,
                observer=watch,
                strict=args.strict,
                inject=args.inject,
                tick=args.tick,
                gdb=watch.gdb,
                syscalls=stack.enter_context(_call_log(args.syscalls)),
            )
        except RunFailed as failed:  # the summary covers a failed run, too
            return failed.result, failed.errors
        watch.signals.ended(result.exit_code)
    return result, []


def _exceeded(thresholds: list[report.Threshold], summary: RunSummary) -> int:
    """Print each threshold that the run exceeds; return the exit status; 0: it exceeds none."""
    run, status = report.document(summary), 0
    for threshold in thresholds:
        seen = threshold.exceeded(run)
        if seen is not None:
            import shlex

            tell(f"softsgx: --fail-if {shlex.quote(threshold.text)}: {seen}")
            status = _EXCEEDED
    return status


def _report(
    args: argparse.Namespace, outputs: Outputs, summary: RunSummary, sampler: Sampler | None
) -> None:
    """Write the output files; an error is printed, and the status stays the program's."""
    if sampler is not None:
        sampler.take()
        with errors_printed():
            outputs.write(args.report, report.html_page(summary, sampler.samples).encode())
    if args.json:
        import json

        text = json.dumps(report.document(summary), indent=2) + "\n"
        with errors_printed():
            if args.json == _STANDARD_OUTPUT:
                print_text(text)
            else:
                outputs.write(args.json, text.encode())
    if not args.quiet:
        width, styled = terminal_columns(2), takes_styles(sys.stderr)
        tell(report.summary_text(summary, width, styled=styled).removesuffix("\n"))


@contextmanager
def _call_log(path: str | None) -> Iterator[Callable[[str], None] | None]:
    """Yield the function that writes lines of --syscalls; ``None``: without --syscalls.

    Each line is written at once, so that it is in order with the program's own output.
    """
    if path is None:
        yield None
    elif path == _STDERR:
        yield tell
    else:
        with open(path, "wb", buffering=0) as file:
            yield _Lines(cast(BinaryIO, file), path).write


class _Lines:
    """A file for lines; after a failed write, lines are dropped and the program continues.

    Args:
        file: unbuffered, so that closing it writes nothing.
        path: its name.
    """

    def __init__(self, file: BinaryIO, path: str) -> None:
        self._file: BinaryIO | None = file
        self._path = path

    def write(self, line: str) -> None:
        if self._file is None:
            return
        try:
            self._file.write(f"{line}\n".encode(errors="backslashreplace"))
        except OSError as error:
            tell(f"softsgx: {self._path}: {error.strerror}; it is not complete")
            self._file = None


class _Watch:
    """Follows the run for the reports, and passes signals on to the program.

    Args:
        collector: receives the events.
        sampler: takes samples while the program runs.
        signals: passes signals on to the program.
        live: serves the state of the run to other processes.
        status: whether to show a status line after two seconds.
        gdb: where the program waits for a gdb; a message has its address.
    """

    def __init__(
        self,
        collector: Collector,
        sampler: Sampler | None,
        signals: ProgramSignals,
        live: Live,
        *,
        status: bool,
        gdb: GdbServer | None = None,
    ) -> None:
        self.collector, self.signals, self._live = collector, signals, live
        self._sampler, self._status = sampler, status
        self.gdb = gdb
        self._tickers: list[Ticker] = []
        self._shown = False

    def attached(self, platform: Platform, pager: str) -> None:
        self.collector.attached(platform, pager)

    def started(self, pid: int) -> None:
        """Start passing signals on, and start the threads that observe the run."""
        self.signals.started(pid)
        self.collector.started(pid)
        if self.gdb is not None:
            _say_where(self.gdb)
        # No thread may exist before the program's fork.
        self._live.start()
        if self._sampler is not None:
            self._sampler.take()
            self._tickers.append(report.Ticker(self._sampler.tick, self._sampler.interval_s))
        if self._status:
            self._tickers.append(report.Ticker(self._show_status, _STATUS_AFTER_S))

    def stop(self) -> None:
        """End threads and clear the status line."""
        self._live.close()
        for ticker in self._tickers:
            ticker.stop()
        self._tickers.clear()
        if self._shown:
            self._write("")

    def _show_status(self) -> float:
        self._shown = True
        width = _terminal_width(2)
        self._write(report.status_line(self.collector)[: width - 1])
        return _STATUS_EVERY_S

    @staticmethod
    def _write(text: str) -> None:
        with suppress(OSError):
            os.write(2, f"\r{text}\x1b[K".encode())


def _options(args: argparse.Namespace) -> list[str]:
    """Return the words of the command line between the verb and the program."""
    words: list[str] = args.words
    return words[1 : len(words) - len(args.argv)]


def _say_where(gdb: GdbServer) -> None:
    """Print where the program waits for gdb."""
    if gdb.is_public:
        tell(
            f"softsgx: --gdb {gdb.address}: other machines may reach this port, and the first to "
            "connect can run any code as you; gdb's protocol has no password"
        )
    tell(f"softsgx: the program waits for gdb; in gdb: target remote {gdb.address}")


def _terminal_width(descriptor: int) -> int:
    """Return the columns of a descriptor's terminal; 80: it is not a terminal."""
    try:
        return os.get_terminal_size(descriptor).columns or _DEFAULT_WIDTH
    except OSError:
        return _DEFAULT_WIDTH


def _status_wanted(args: argparse.Namespace) -> bool:
    """Return whether to show a status line: --status, or only stderr is a terminal."""
    if args.status:
        return True
    return not args.quiet and os.isatty(2) and not os.isatty(1)


def _outputs(args: argparse.Namespace) -> Outputs:
    """Open the output files; only the summary's object can go to standard output."""
    if _STANDARD_OUTPUT in (args.trace, args.report):
        raise SoftSgxError("-: only --json can be written to standard output; give a file")
    log = None if args.syscalls == _STDERR else args.syscalls
    paths = [args.trace, args.report, log, None if args.json == _STANDARD_OUTPUT else args.json]
    return Outputs([path for path in paths if path is not None], force=args.force)
