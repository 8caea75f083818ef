"""Shared by the commands that run a program: options of its machine, checks, output.

The program is the words behind ``--``; the command's exit status is the program's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

from softsgx.cli._common import discard, size_as_written, tell
from softsgx.cli._signals import EndedBySignal
from softsgx.engines.native import CPUID_SOURCES, PAGERS, libc, requirements
from softsgx.errors import NotRun, SoftSgxError
from softsgx.host import PROFILES, PlatformConfig, check_group_path, limit_option
from softsgx.report import CpuTimes

__all__ = [
    "FAILED",
    "add_machine_arguments",
    "add_program",
    "check_machine",
    "config_of",
    "cpu_times",
    "errors_printed",
    "group_of",
    "print_text",
    "program_of",
    "status_of",
]

FAILED = 125
"""The exit status after an error in softsgx, as that of env and timeout."""


def add_machine_arguments(
    parser: argparse.ArgumentParser, epc_default: str = "93.5MiB"
) -> argparse._ArgumentGroup:
    """Add the options that describe the machine; return their group."""
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--epc",
        type=size_as_written,
        metavar="SIZE",
        help=f"size of the EPC (default {epc_default})",
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
        help="the machine that CPUID describes: the profile's (default), or this one with SGX",
    )
    machine.add_argument("--config", metavar="FILE", help="a platform described in TOML")
    machine.add_argument(
        "--cpus",
        type=_cpus,
        metavar="N",
        help="processors it may use (default: one while one thread runs at a time, then all)",
    )
    machine.add_argument("--pager", choices=PAGERS, help="default: the best that doctor finds")
    machine.add_argument(
        "--strict",
        action="store_true",
        help="accesses to an enclave from outside hit the abort page, as on hardware; slower",
    )
    return machine


def add_program(parser: argparse.ArgumentParser) -> None:
    """Add the program and its arguments, which come last."""
    parser.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- PROGRAM ARG", help="what to run"
    )


def program_of(args: argparse.Namespace, verb: str) -> list[str]:
    """Return the program and its arguments.

    Raises:
        SoftSgxError: there is none.
    """
    argv: list[str] = args.argv[1:] if args.argv[:1] == ["--"] else args.argv
    if not argv:
        raise SoftSgxError(f"{verb}: no program; write softsgx {verb} [options] -- PROGRAM ARG…")
    return argv


def status_of(exit_code: int) -> int:
    """Return the program's exit status.

    Raises:
        EndedBySignal: a signal has ended the program, and ends the command.
    """
    if exit_code < 0:
        libc.set_dumpable(False)  # only the program dumps core, not the command
        raise EndedBySignal(-exit_code)
    return exit_code


def check_machine() -> None:
    """Check that this machine can run programs.

    Raises:
        NotRun: it lacks something.
    """
    for finding in requirements():
        if not finding.ok:
            raise NotRun(f"{finding.name}: {finding.text}; see softsgx doctor")


def config_of(args: argparse.Namespace) -> PlatformConfig:
    """Return the platform that the options describe."""
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


def group_of(args: argparse.Namespace, config: PlatformConfig) -> str:
    """Return the path of the group that the program runs in.

    Raises:
        SoftSgxError: the platform has no such group.
    """
    if args.group is not None:
        path = str(args.group).strip("/")
        known = {"", *(name.strip("/") for name in config.groups)}
        if path not in known:
            check_group_path(path, f"group {path!r}")
            names = ", ".join(sorted(known - {""})) or "none"
            raise SoftSgxError(
                f"group {path}: not configured (configured: {names}); add "
                f"{limit_option(path, 'SIZE')}, or {limit_option(path, 'max')} for no limit"
            )
        return path or "/"
    return str(args.limit[-1][0]) if args.limit else "/"


def _limit(text: str) -> tuple[str, str]:
    path, separator, size = text.rpartition("=")
    if not separator or not path.strip("/"):
        raise argparse.ArgumentTypeError(f"limit {text!r}; write GROUP=SIZE, such as jobs/a=16MiB")
    return path.strip("/"), size if size.strip() == "max" else size_as_written(size)


def _cpus(text: str) -> set[int]:
    usable = sorted(os.sched_getaffinity(0))
    if not text.isdecimal() or not 1 <= int(text) <= len(usable):
        raise argparse.ArgumentTypeError(f"processors {text!r}; give a number up to {len(usable)}")
    return set(usable[: int(text)])


@contextmanager
def errors_printed() -> Iterator[None]:
    """Print an error of writing an output file; the exit status stays the program's."""
    try:
        yield
    except SoftSgxError as error:
        tell(f"softsgx: {error}")


def print_text(text: str) -> None:
    """Write to standard output.

    Raises:
        SoftSgxError: it cannot be written completely.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(1)
        raise SoftSgxError(f"standard output: {error.strerror}; it is not complete") from error


def cpu_times() -> CpuTimes:
    """Return the processor time of this process, and of its children that have ended."""
    own, children = (getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN))
    return CpuTimes(own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime)
