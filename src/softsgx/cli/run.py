"""Run a program that uses SGX, unmodified, on a machine without SGX.

The program finds /dev/sgx_enclave and a finite EPC, and runs at native speed.  Its exit status,
output and signals are its own: 128 + n when signal n ended it.  A summary on stderr says what
paging it did and what that would have cost on silicon.

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
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any, BinaryIO, cast

from softsgx import report
from softsgx.cli._common import discard, log_told, size_as_written, tell
from softsgx.cli._outputs import Outputs
from softsgx.cli._signals import EndedBySignal, ProgramSignals
from softsgx.engines.native import (
    CPUID_SOURCES,
    PAGERS,
    GdbServer,
    RunFailed,
    RunResult,
    doctor,
    libc,
)
from softsgx.engines.native import run as run_natively
from softsgx.engines.native.injections import Injections, tick_period_ns
from softsgx.errors import NotRun, SoftSgxError
from softsgx.host import PROFILES, Platform, PlatformConfig
from softsgx.report import (
    COST_PROFILES,
    Collector,
    CpuTimes,
    RunSummary,
    Sampler,
    Ticker,
    document,
)

__all__ = ["NAME", "configure", "run"]

NAME = "run"

_STANDARD_OUTPUT = "-"
_FAILED = 125  # as env and timeout have it
_EXCEEDED = 124  # as timeout has it
_STDERR = "-"
_STATUS_AFTER_S = 2.0
_STATUS_EVERY_S = 0.5
_DEFAULT_WIDTH = 80


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--epc", type=size_as_written, metavar="SIZE", help="size of the EPC (default 93.5MiB)"
    )
    machine.add_argument(
        "--limit",
        action="append",
        default=[],
        type=_limit,
        metavar="GROUP=SIZE",
        help="misc.max of a group, or max; repeatable; the program runs in the last one given",
    )
    machine.add_argument("--group", metavar="PATH", help="the group that the program runs in")
    machine.add_argument("--profile", choices=list(PROFILES), help="features of the machine")
    machine.add_argument(
        "--cpuid",
        choices=CPUID_SOURCES,
        default="profile",
        help="what CPUID describes: the profile's machine (default), or this one with SGX",
    )
    machine.add_argument("--config", metavar="FILE", help="a platform described in TOML")
    machine.add_argument(
        "--cpus",
        type=_cpus,
        metavar="N",
        help="processors it may use (default: one while it has one thread, then all)",
    )
    machine.add_argument("--pager", choices=PAGERS, help="default: the best that doctor finds")
    machine.add_argument(
        "--strict",
        action="store_true",
        help="accesses to an enclave from outside hit the abort page, as on hardware; slower",
    )
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
        help="interrupt threads inside enclaves by a timer: 1ms to 1s (default: never)",
    )
    debugging = parser.add_argument_group("debugging")
    debugging.add_argument(
        "--gdb",
        metavar="[HOST:]PORT|SOCKET",
        help="wait for a gdb at a port of 127.0.0.1 (0: any) or a Unix socket, and let it debug "
        "the program and its debug enclaves; who reaches another HOST can run code as you",
    )
    debugging.add_argument(
        "--enclave-file",
        action="append",
        default=[],
        metavar="ELF",
        help="for --gdb: a file with the code of an enclave, with symbols, where the program does "
        "not open it; repeatable",
    )
    debugging.add_argument(
        "--syscalls",
        nargs="?",
        const=_STDERR,
        metavar="FILE",
        help="print what the program asks of SGX, as strace does: ioctls, mappings, entries by the "
        "vDSO; to stderr, or to FILE",
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
        help="end with status 124 if a field of the JSON compares so: evictions>0, "
        "platform.peak_epc_bytes>16MiB, epc==small; repeatable",
    )
    output.add_argument(
        "--status",
        action="store_true",
        help="show a status line even if the program writes to the same terminal",
    )
    output.add_argument(
        "--costs", choices=list(COST_PROFILES), help="prices (default: the profile's)"
    )
    output.add_argument("--quiet", action="store_true", help="print no summary at the end")
    output.add_argument("--force", action="store_true", help="overwrite files")
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARG", help="what to run"
    )


def run(args: argparse.Namespace) -> int:
    """Run it; return its exit status.

    Raises:
        EndedBySignal: a signal has ended the program, or comes when it does not run.
    """
    argv = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise SoftSgxError("run: no program; write softsgx run [options] -- PROGRAM ARG…")
    # Before a file is made: the engine finds what is wrong with these after that.
    taken = Injections.of(args.inject).power_signals
    if args.tick is not None:
        tick_period_ns(args.tick)
    thresholds = [report.Threshold.parse(text) for text in args.fail_if]
    with log_told(), ProgramSignals(taken) as signals:
        _check_machine()
        config = _config(args)
        group = _group(args, config)
        with _outputs(args) as outputs, _gdb_server(args) as gdb:
            if not args.quiet:
                for line in config.roundings():
                    tell(f"softsgx: {line}")
            collector = Collector(time.monotonic_ns, _cpu_times, args.costs)
            sampler = Sampler(collector) if args.report else None
            watch = _Watch(collector, sampler, signals, status=_status_wanted(args), gdb=gdb)
            began = datetime.now(UTC).isoformat(timespec="seconds")
            result, mistakes = _run_watched(args, argv, config, group, watch)
            outputs.keep(args.trace, args.syscalls)
            summary = collector.summary(
                argv, result.exit_code, result.injected, began=began, options=_options(args)
            )
            _report(args, outputs, summary, sampler)
    exceeded = _exceeded(thresholds, summary)
    for mistake in mistakes:
        tell(f"softsgx: {mistake!r}: a mistake of softsgx; please report it")
    if mistakes:
        return _FAILED
    if result.exit_code < 0:
        libc.set_dumpable(False)  # the core to look at is the program's
        raise EndedBySignal(-result.exit_code)
    return result.exit_code or exceeded


@contextmanager
def _gdb_server(args: argparse.Namespace) -> Iterator[GdbServer | None]:
    if args.gdb is None:
        yield None
        return
    with closing(GdbServer(args.gdb, args.enclave_file)) as server:
        yield server


def _run_watched(
    args: argparse.Namespace, argv: list[str], config: PlatformConfig, group: str, watch: _Watch
) -> tuple[RunResult, list[Exception]]:
    """Run the program; return how it ended, and mistakes of ours."""
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
    return result, []


def _exceeded(thresholds: list[report.Threshold], summary: RunSummary) -> int:
    """Name each threshold that the run exceeds; return the status for that, 0 if there is none."""
    run, status = document(summary), 0
    for threshold in thresholds:
        seen = threshold.exceeded(run)
        if seen is not None:
            tell(f"softsgx: --fail-if {shlex.quote(threshold.text)}: {seen}")
            status = _EXCEEDED
    return status


def _report(
    args: argparse.Namespace, outputs: Outputs, summary: RunSummary, sampler: Sampler | None
) -> None:
    """Write what was asked for.  What cannot be written is told; the status stays the program's."""
    if sampler is not None:
        sampler.take()
        with _failure_told():
            outputs.write(args.report, report.html_page(summary, sampler.samples).encode())
    if args.json:
        text = json.dumps(document(summary), indent=2) + "\n"
        with _failure_told():
            if args.json == _STANDARD_OUTPUT:
                _print(text)
            else:
                outputs.write(args.json, text.encode())
    if not args.quiet:
        try:
            report.print_summary(summary, report.error_console())
        except OSError:
            discard(2)


@contextmanager
def _failure_told() -> Iterator[None]:
    try:
        yield
    except SoftSgxError as error:
        tell(f"softsgx: {error}")


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(1)
        raise SoftSgxError(f"standard output: {error.strerror}; it is not complete") from error


@contextmanager
def _call_log(path: str | None) -> Iterator[Callable[[str], None] | None]:
    """Give what takes the lines of --syscalls, ``None`` without it.

    Each is written at once, so that it stands where it belongs among the lines of the program.
    """
    if path is None:
        yield None
    elif path == _STDERR:
        yield tell
    else:
        with open(path, "wb", buffering=0) as file:
            yield _Lines(cast(BinaryIO, file), path).write


class _Lines:
    """A file that takes lines until it cannot be written; the program runs on then.

    Args:
        file: without a buffer, so that nothing is left to be written when it is closed.
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
        signals: what is sent to the command.
        status: whether to show a status line after two seconds.
        gdb: the address where the program waits for a gdb, which a message names.
    """

    def __init__(
        self,
        collector: Collector,
        sampler: Sampler | None,
        signals: ProgramSignals,
        *,
        status: bool,
        gdb: GdbServer | None = None,
    ) -> None:
        self.collector, self.signals = collector, signals
        self._sampler, self._status = sampler, status
        self.gdb = gdb
        self._tickers: list[Ticker] = []
        self._shown = False

    def attached(self, platform: Platform, pager: str) -> None:
        self.collector.attached(platform, pager)

    def started(self, pid: int) -> None:
        """Begin to pass signals on, and to look at the run."""
        self.signals.started(pid)
        self.collector.started(pid)
        if self.gdb is not None:
            _say_where(self.gdb)
        # No thread may exist before the program's fork.
        if self._sampler is not None:
            self._sampler.take()
            self._tickers.append(Ticker(self._sampler.tick, self._sampler.interval_s))
        if self._status:
            self._tickers.append(Ticker(self._show_status, _STATUS_AFTER_S))

    def stop(self) -> None:
        """End threads and clear the status line."""
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
    """Say where the program waits for gdb."""
    if gdb.is_public:
        tell(
            f"softsgx: --gdb {gdb.address}: other machines may reach this port, and who connects "
            "first can run any code as you; gdb's protocol has no password"
        )
    tell(f"softsgx: the program waits for gdb; in gdb: target remote {gdb.address}")


def _terminal_width(descriptor: int) -> int:
    """Return the columns of a descriptor's terminal, 80 where there is none."""
    try:
        return os.get_terminal_size(descriptor).columns or _DEFAULT_WIDTH
    except OSError:
        return _DEFAULT_WIDTH


def _status_wanted(args: argparse.Namespace) -> bool:
    """Return whether to show a status line: its terminal is free, or the user asked for it."""
    if args.status:
        return True
    return not args.quiet and os.isatty(2) and not os.isatty(1)


def _check_machine() -> None:
    for finding in doctor():
        if finding.needed and not finding.ok:
            raise NotRun(f"{finding.name}: {finding.text}; see softsgx doctor")


def _outputs(args: argparse.Namespace) -> Outputs:
    """Open the files that were asked for; only the summary's object can go to standard output."""
    if _STANDARD_OUTPUT in (args.trace, args.report):
        raise SoftSgxError("-: only --json can be written to standard output; give a file")
    log = None if args.syscalls == _STDERR else args.syscalls
    paths = [args.trace, args.report, log, None if args.json == _STANDARD_OUTPUT else args.json]
    return Outputs([path for path in paths if path is not None], force=args.force)


def _config(args: argparse.Namespace) -> PlatformConfig:
    changes: dict[str, Any] = {}
    if args.epc is not None:
        changes["epc"] = args.epc
    if args.profile is not None:
        changes["profile"] = args.profile
    if args.cpus is not None:
        changes["processors"] = len(args.cpus)
    if not args.config:
        return PlatformConfig.of(**changes, groups=_limits(args, {}))
    config = PlatformConfig.load(args.config, **changes)
    return config.but(groups=_limits(args, dict(config.groups)))


def _limits(args: argparse.Namespace, groups: dict[str, Any]) -> dict[str, Any]:
    return {**groups, **{path: {"max": size} for path, size in args.limit}}


def _group(args: argparse.Namespace, config: PlatformConfig) -> str:
    if args.group is not None:
        path = str(args.group).strip("/")
        known = {"", *(name.strip("/") for name in config.groups)}
        if path not in known:
            names = ", ".join(sorted(known - {""})) or "none"
            raise SoftSgxError(
                f"group {path}: not configured (configured: {names}); add --limit {path}=SIZE, or "
                f"--limit {path}=max for no limit"
            )
        return path or "/"
    return str(args.limit[-1][0]) if args.limit else "/"


def _limit(text: str) -> tuple[str, str]:
    path, separator, size = text.rpartition("=")
    if not separator or not path.strip("/"):
        raise argparse.ArgumentTypeError(f"limit {text!r}; write GROUP=SIZE, as jobs/a=16MiB")
    return path.strip("/"), size if size.strip() == "max" else size_as_written(size)


def _cpus(text: str) -> set[int]:
    usable = sorted(os.sched_getaffinity(0))
    if not text.isdecimal() or not 1 <= int(text) <= len(usable):
        raise argparse.ArgumentTypeError(f"processors {text!r}; give a number up to {len(usable)}")
    return set(usable[: int(text)])


def _cpu_times() -> CpuTimes:
    own, children = (getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    return CpuTimes(own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime)
