"""Counts of entries and exits stay exact over millions of calls, most of them by permit.

Method: ``programs/crossings.c`` has threads that start and end, under a timer of 0.9 ms and signals
that they send themselves, and then processes with two threads each that are killed in the middle of
calls.  It prints how many calls it has made.

``python -m tests.soak.crossings --calls 10000000`` prints both counts, and ends with status 1 when
they differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time

from tests.soak.supervised import built

from softsgx.engines.native import run
from softsgx.report import Collector

__all__ = ["count"]

_EPC_BYTES = 1 << 20
_ROUNDS = 4
_CALLS_BEFORE_THE_KILL = 2000


def count(*arguments: object) -> tuple[list[int], list[int]]:
    """Run the program; return the two numbers it prints, and entries and exits of its enclaves."""
    program, collector = built("crossings"), Collector(time.monotonic_ns)
    argv = [program.program, program.enclave, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as out:
        result = run(argv, epc=_EPC_BYTES, stdio=(0, out.fileno(), 2), observer=collector)
        assert result.exit_code == 0, f"{argv} ends with {result.exit_code}"
        out.seek(0)
        printed = [int(word) for word in out.read().split()]
    enclaves = collector.enclaves()
    return printed, [sum(each.eenter for each in enclaves), sum(each.eexit for each in enclaves)]


def main() -> int:
    """Count; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000, help="of all threads together")
    parser.add_argument("--threads", type=int, default=2, help="at once, at most 6")
    parser.add_argument("--kills", type=int, default=30, help="of processes")
    args = parser.parse_args()
    of_each = args.calls // (args.threads * _ROUNDS)
    began = time.monotonic()
    (made, signals), (entries, exits) = count("many", args.threads, _ROUNDS, of_each)
    seconds = time.monotonic() - began
    exact = entries == exits == made
    print(
        f"{made} calls in {seconds:.1f} s, {signals} signals handled: "
        f"{entries} entries, {exits} exits"
    )
    (begun, ended), (entries, exits) = count("killed", args.kills, _CALLS_BEFORE_THE_KILL)
    exact &= ended <= exits <= entries <= begun <= ended + 2 * args.kills
    print(
        f"{args.kills} kills: {begun} calls begun, {ended} ended: {entries} entries, {exits} exits"
    )
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
