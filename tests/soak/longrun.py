"""Millions of EPC faults of one program: the cost of a fault and the memory do not grow.

Method: ``programs/longrun.c`` visits every page of an enclave that is larger than its EPC, again
and again, so that nearly every visit is a fault with an eviction, and each page counts its visits.
Meanwhile the test samples the supervisor: its memory, descriptors, Python objects and processor
time.  It counts loads of pages by the core (``eldu``), not visits.

``python -m tests.soak.longrun --faults 10000000 --rows 10`` prints a table, for documents.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.e2e.native.enclave import compile_host, write_enclave
from tests.soak import record
from tests.soak.lifetimes import usable_pagers

from softsgx.engines.native import PAGERS
from softsgx.engines.native import run as run_natively
from softsgx.host import Platform
from softsgx.paging import Counters
from softsgx.report.sampler import Ticker

__all__ = ["HEAD", "Sample", "faults", "row", "run"]

_ENCLAVE_PAGES, _EPC = 512, "1MiB"
_LOOKS_S = 0.05
_SLICE_FAULTS = 20_000
#: The program goes on for so many faults after those wanted.  A sample within half of them is taken
#: while it runs; a later one is dropped, since the supervisor may already free what it needed.
_TAIL_FAULTS = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    """How the supervisor stands after so many faults.

    Attributes:
        faults: pages loaded so far.
        seconds: wall-clock time since the program's start.
        cpu_s: processor time of the supervisor.
        memory_bytes: its resident memory.
        descriptors: its open files.
        objects: blocks that Python has allocated.
    """

    faults: int
    seconds: float
    cpu_s: float
    memory_bytes: int
    descriptors: int
    objects: int


class _Observer:
    """Takes a sample each time that another ``every`` of ``wanted`` pages were loaded; tells it."""

    def __init__(self, wanted: int, every: int, tell: Callable[[Sample, Sample], None]) -> None:
        self._wanted, self._every, self._tell = wanted, every, tell
        self.samples: list[Sample] = []

    def attached(self, platform: Platform, pager: str) -> None:
        """The platform is ready."""
        self.pager, self._counters = pager, platform.core.counters

    def started(self, pid: int) -> None:
        """The program is about to start."""
        gc.collect()  # what the process dropped before the run must not leave between two samples
        self._began = time.monotonic()
        self.samples.append(self._look(self._counters))
        self.ticker = Ticker(self._tick, _LOOKS_S)

    def _tick(self) -> float:
        if len(self.samples) * self._every <= min(self._counters.eldu, self._wanted):
            sample = self._look(self._counters)
            if self._counters.eldu <= self._wanted + _TAIL_FAULTS // 2:
                self.samples.append(sample)
                self._tell(*self.samples[-2:])
        return _LOOKS_S

    def _look(self, counters: Counters) -> Sample:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return Sample(
            counters.eldu,
            time.monotonic() - self._began,
            time.process_time(),
            resident * os.sysconf("SC_PAGE_SIZE"),
            len(os.listdir("/proc/self/fd")),
            sys.getallocatedblocks(),
        )


def _ignored(before: Sample, after: Sample) -> None:
    """Print nothing."""


def faults(
    wanted: int, every: int, pager: str, tell: Callable[[Sample, Sample], None] = _ignored
) -> list[Sample]:
    """Run the program for about ``wanted`` faults; return a sample for each ``every`` of them.

    Args:
        wanted: how many faults.
        every: how many faults between two samples.
        pager: one of :data:`PAGERS`.
        tell: is called with each sample and the one before.

    Raises:
        AssertionError: the program lost a visit, or the supervisor has kept something.
    """
    with tempfile.TemporaryDirectory(prefix="softsgx-soak-") as directory:
        program = compile_host(Path(directory), "longrun")
        enclave = write_enclave(Path(directory) / "enclave", _ENCLAVE_PAGES, 1)
        observer = _Observer(wanted, every, tell)
        argv = [str(program), str(enclave), str(wanted + _TAIL_FAULTS)]
        result = run_natively(argv, epc=_EPC, pager=pager, observer=observer)
        observer.ticker.stop()
    assert result.exit_code == 0, f"the program ends with {result.exit_code}"
    held = result.counters["held"]
    assert isinstance(held, dict) and not any(held.values()), f"the core still has {held}"
    return observer.samples


HEAD = """\
| faults | µs of wall clock each | µs of the supervisor each | memory | descriptors | objects |
|---|---|---|---|---|---|"""


def row(before: Sample, after: Sample) -> str:
    """Return a sample as a row of a document's table below ``HEAD``."""
    done = after.faults - before.faults
    wall, cpu = after.seconds - before.seconds, after.cpu_s - before.cpu_s
    return (
        f"| {after.faults} | {wall / done * 1e6:.0f} | {cpu / done * 1e6:.0f} | "
        f"{after.memory_bytes / (1 << 20):.1f} MiB | {after.descriptors} | {after.objects} |"
    )


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""
    until, done = time.monotonic() + seconds, 0
    while not done or time.monotonic() < until:
        usable = usable_pagers()
        pager = usable[(seed + done) % len(usable)]
        done += faults(_SLICE_FAULTS, _SLICE_FAULTS // 4, pager)[-1].faults
    return {"native faults": done}


def _main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--faults", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=10, help="of the table")
    parser.add_argument("--pager", choices=PAGERS, default=PAGERS[0])
    parser.add_argument("--record", metavar="FILE", help="add what was done to this file, by rows")
    args = parser.parse_args()
    at = record.commit()
    print(f"{args.faults} faults, pager {args.pager}, commit {at}\n\n{HEAD}", flush=True)

    def tell(before: Sample, after: Sample) -> None:
        print(row(before, after), flush=True)
        if args.record:
            done = {f"native faults, {args.pager}": after.faults - before.faults}
            line = record.slice_done("longrun", 0, at, done)
            record.write(args.record, line | {"sample": asdict(after)})

    faults(args.faults, args.faults // args.rows, args.pager, tell)


if __name__ == "__main__":
    _main()
