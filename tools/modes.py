"""Run the end-to-end tests in every mode of the native engine; print a table of the results.

    python3 tools/dev.py modes                        every mode below, one after the other
    python3 tools/dev.py modes --list                 names of the modes
    python3 tools/dev.py modes --only strict,stops    modes that have one of these words
    python3 tools/dev.py modes -- -m "not slow"       words behind -- go to pytest

A mode is one choice of each: the pager; whether threads cross by permit and wait for pages without
a stop (else: `signals`, `stops`, `strict` or `recorded`, see tests/support/modes); and whether the
compiled core is used.  The log of each is
kept in a directory, which is printed.  Exit status 1: a test failed, or a mode did not end.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from softsgx.engines.native import PAGERS, doctor

ROOT = Path(__file__).resolve().parent.parent
CROSSINGS = ("permits", "signals", "stops", "strict", "recorded")
CORES = ("compiled", "pure")
#: After this time without an end of a test, pytest prints where all threads are.
STUCK_SECONDS = 250


@dataclass(frozen=True)
class Mode:
    """How the programs of the tests run."""

    core: str
    pager: str
    crossing: str

    @property
    def words(self) -> tuple[str, ...]:
        """What the mode is called."""
        return self.core, self.pager, self.crossing

    @property
    def name(self) -> str:
        """The words as one."""
        return "-".join(self.words)

    @property
    def native(self) -> str:
        """The value of pytest's option ``--native-mode``."""
        return self.pager if self.crossing == "permits" else f"{self.pager},{self.crossing}"

    def environment(self) -> dict[str, str]:
        """Return the environment of the tests."""
        found = {name: text for name, text in os.environ.items() if name != "SOFTSGX_PURE"}
        return found | ({"SOFTSGX_PURE": "1"} if self.core == "pure" else {})


MODES = tuple(
    Mode(core, pager, crossing)
    for core, crossing, pager in product(CORES, CROSSINGS, PAGERS)
    if (pager, crossing) != ("mprotect", "signals")  # by mprotect each fault is a signal
)


@dataclass
class Result:
    """What the tests did in one mode.

    Attributes:
        status: pytest's; 124 after ``--limit``.
        seconds: how long it took.
        passed, failed, skipped: numbers of tests; errors count as failed.
        names: of the tests that failed.
    """

    status: int
    seconds: float
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    names: list[str] = field(default_factory=list)


def main(words: Sequence[str] | None = None) -> int:
    """Parse the command line, run, print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="dev.py modes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="print the names of the modes")
    parser.add_argument("--only", default="", metavar="WORDS", help="modes with one of the words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="tests at once")
    parser.add_argument("--limit", type=int, default=3600, metavar="SECONDS", help="of one mode")
    parser.add_argument("--logs", type=Path, help="the directory of the logs")
    parser.add_argument("rest", nargs="*", metavar="PYTEST", help="behind --: words for pytest")
    args = parser.parse_args(words)
    wanted = set(filter(None, args.only.split(",")))
    unknown = wanted - {word for mode in MODES for word in (*mode.words, mode.name)}
    if unknown:
        parser.error(f"--only: {min(unknown)!r} is in no mode; see --list")
    modes = [
        mode
        for mode in MODES
        if mode.pager in usable_pagers() and (not wanted or wanted & {*mode.words, mode.name})
    ]
    if args.list:
        print("\n".join(mode.name for mode in modes))
        return 0
    logs = args.logs or Path(tempfile.mkdtemp(prefix="softsgx-modes-"))
    logs.mkdir(parents=True, exist_ok=True)
    results = {}
    for mode in modes:
        print(f"== {mode.name}: {logs / mode.name}.log", file=sys.stderr, flush=True)
        results[mode] = run(mode, logs, args.jobs, args.limit, args.rest)
    print(table(results))
    return 1 if any(result.status for result in results.values()) else 0


def usable_pagers() -> tuple[str, ...]:
    """Return the pagers that this machine lets programs have."""
    works = {finding.name: finding.ok for finding in doctor()}
    return PAGERS if works.get("userfaultfd") else ("mprotect",)


def run(mode: Mode, logs: Path, jobs: int, limit: int, rest: Sequence[str]) -> Result:
    """Run the tests in one mode."""
    report = logs / f"{mode.name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/e2e", "-q", "-rfEs", "--tb=short"]
    command += ["-n", str(jobs), "--dist", "worksteal", f"--native-mode={mode.native}"]
    command += [f"--junitxml={report}", "-o", f"faulthandler_timeout={STUCK_SECONDS}", *rest]
    start = time.monotonic()
    with (logs / f"{mode.name}.log").open("w") as log:
        tests = subprocess.Popen(
            command, cwd=ROOT, env=mode.environment(), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = tests.wait(limit)
        except subprocess.TimeoutExpired:
            tests.terminate()
            tests.wait()
            status = 124
    result = Result(status, time.monotonic() - start)
    if report.exists():
        read(result, report)
    return result


def read(result: Result, report: Path) -> None:
    """Add what pytest's report in JUnit's format has."""
    for case in ET.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
            result.names.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            result.skipped += 1
        else:
            result.passed += 1


def table(results: dict[Mode, Result]) -> str:
    """Return the results as a table in Markdown, and the failed tests behind it."""
    lines = ["| core | pager | crossings | passed | skipped | failed | seconds |"]
    lines.append("|---|---|---|--:|--:|--:|--:|")
    for mode, one in results.items():
        ended = one.status in (0, 1)
        numbers = (one.passed, one.skipped, one.failed if ended else f"ended with {one.status}")
        cells = (*mode.words, *numbers, f"{one.seconds:.0f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"FAILED {mode.name}: {name}" for mode, one in results.items() for name in one.names]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
