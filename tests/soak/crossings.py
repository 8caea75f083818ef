"""Counts of crossings stay exact over millions of calls, most of them by permit.

Method: ``programs/counts.c`` calls an enclave from threads that start and end.  Each has a timer
and gets signals of the others, and the handler calls the enclave too.  Calls leave by both forms of
exit that permits know, and some have an exception inside that the program mends.  Other processes
are killed in the middle of calls.  EENTER, EEXIT, AEX and ERESUME of each enclave have to agree
with what the program counts, the killed ones in memory that they share with their parent.

``python -m tests.soak.crossings --calls 10000000`` prints both counts, and fails when they differ.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.e2e.native.enclave import compile_host, write_enclave

from softsgx.engines.native import PAGERS, run
from softsgx.report import Collector
from softsgx.report.summary import EnclaveSummary

__all__ = ["DATA_PAGES", "LEVELS", "TCS", "killed", "many"]

#: Those of the program's threads, and behind them those of their handlers.
TCS = 16
DATA_PAGES = 16
#: How many calls of a thread may be in progress at once: one with an exception inside, one that
#: mends it, and one of a signal's handler.
LEVELS = 3
_EPC_BYTES = 1 << 20


def many(
    files: Sequence[str],
    threads: int,
    rounds: int,
    calls: int,
    microseconds: int,
    *,
    way: str = "",
    **options: Any,
) -> str:
    """Let threads call; return a sentence with the numbers.

    Args:
        files: program and enclave.
        threads: at once, at most 8.
        rounds: how often they start and end.
        calls: of a thread in a round.
        microseconds: between two signals of a thread's timer.
        way: ``own:``, ``gap:`` or ``far:``, for calls by the program's own ENCLU.
        options: keywords of :func:`softsgx.engines.native.run`.

    Raises:
        AssertionError: the program failed, or counts differ.
    """
    began = time.monotonic()
    printed, enclaves = _run([*files, f"{way}many", threads, rounds, calls, microseconds], options)
    seconds = time.monotonic() - began
    ((made, signals),), (enclave,) = printed, enclaves
    assert made > threads * rounds * calls, "those of handlers come in addition"
    numbers = f"{made} calls, {signals} signals: {_numbers(enclave)}"
    assert enclave.eenter == enclave.eexit == made, numbers
    assert enclave.aex == enclave.eresume >= threads * rounds * (calls // 4096), numbers
    return f"{numbers}; {seconds:.1f} s"


def killed(
    files: Sequence[str],
    processes: int,
    threads: int,
    calls: int,
    microseconds: int,
    *,
    way: str = "",
    **options: Any,
) -> str:
    """Let processes call until SIGKILL; return a sentence with the numbers.

    Each call has four moments in a fixed order, of which a killed thread has reached some: it is
    begun, the thread enters, code inside stores, the thread exits, it is ended.  So each count is
    at most the one before, and they differ by at most the calls in progress.

    Args:
        files: program and enclave.
        processes: one after the other.
        threads: of each.
        calls: how many a thread makes at least.
        microseconds: between two signals of a thread's timer.
        way: ``own:``, ``gap:`` or ``far:``, for calls by the program's own ENCLU.
        options: keywords of :func:`softsgx.engines.native.run`.

    Raises:
        AssertionError: the program failed, or counts are not those of the calls.
    """
    printed, enclaves = _run(
        [*files, f"{way}killed", processes, threads, calls, microseconds], options
    )
    assert len(printed) == len(enclaves) == processes
    inside = 0
    for (begun, most, least, ended), enclave in zip(printed, enclaves, strict=True):
        numbers = f"{begun} begun, {least}-{most} stores, {ended} ended: {_numbers(enclave)}"
        assert begun - LEVELS * threads <= ended <= enclave.eexit <= most, numbers
        assert least <= enclave.eenter <= begun, numbers
        left_inside = enclave.eenter - enclave.eexit
        assert 0 <= enclave.aex - enclave.eresume <= left_inside <= LEVELS * threads, numbers
        inside += left_inside
    made = sum(enclave.eenter for enclave in enclaves)
    return f"{processes} processes killed: {made} entries, {inside} of them still inside"


def _run(
    argv: Sequence[object], options: dict[str, Any]
) -> tuple[list[list[int]], Sequence[EnclaveSummary]]:
    """Run the program; return the numbers of each line that it prints, and its enclaves."""
    collector = Collector(time.monotonic_ns)
    words = [str(word) for word in argv]
    with tempfile.TemporaryFile("w+") as out:
        stdio = (0, out.fileno(), 2)
        result = run(words, stdio=stdio, observer=collector, **{"epc": _EPC_BYTES} | options)
        assert result.exit_code == 0, f"{words} ends with {result.exit_code}"
        out.seek(0)
        printed = [[int(word) for word in line.split()] for line in out]
    return printed, collector.enclaves()


def _numbers(enclave: EnclaveSummary) -> str:
    return (
        f"EENTER {enclave.eenter}, EEXIT {enclave.eexit}, "
        f"AEX {enclave.aex}, ERESUME {enclave.eresume}"
    )


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=1_000_000, help="of all threads together")
    parser.add_argument("--threads", type=int, default=8, help="at once, at most 8")
    parser.add_argument("--rounds", type=int, default=4, help="how often all start and end")
    parser.add_argument("--kills", type=int, default=30, help="of processes, each of two threads")
    parser.add_argument("--timer", type=int, default=2000, metavar="US", help="of each thread")
    parser.add_argument("--way", default="", help="own: or gap:, for ENCLU of the program's own")
    parser.add_argument("--pager", choices=PAGERS)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--epc", default="1MiB", metavar="SIZE")
    args = parser.parse_args()
    options = {"pager": args.pager, "strict": args.strict, "epc": args.epc, "way": args.way}
    of_each = args.calls // (args.threads * args.rounds)
    with tempfile.TemporaryDirectory(prefix="softsgx-soak-") as place:
        program = compile_host(Path(place), "counts")
        enclave = write_enclave(Path(place, "enclave"), DATA_PAGES, TCS)
        files = [str(program), str(enclave)]
        print(many(files, args.threads, args.rounds, of_each, args.timer, **options), flush=True)
        print(killed(files, args.kills, 2, 2000, args.timer, **options))


if __name__ == "__main__":
    main()
