"""Random histories for some minutes: ``python -m tests.soak --minutes N --jobs N``.

The kinds of histories take turns, in slices with seeds that follow from the first one.  A slice
that fails is reported with its seed and, if the kind can minimise, with the smallest part that
still fails.  With ``--record FILE`` the counts are added to a file, which several runs may share.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import subprocess
import sys
import threading
import time
from typing import Any

from tests.soak import KINDS, Found, record

_SLICE_S = 20.0
_SEEDS_A_SLICE = 1000
_HANGS_S = 900


def _slice(kind: str, seed: int, seconds: float) -> None:
    """In a process of its own: run a kind, and print what was done as JSON."""
    module = importlib.import_module(f"tests.soak.{kind}")
    try:
        print(json.dumps(module.run(seconds, seed)))
    except AssertionError as error:
        found = error if isinstance(error, Found) else Found(str(error), {}, None)
        failed = seed if found.seed is None else found.seed
        print(json.dumps(found.done), flush=True)
        print(f"{kind}, seed {failed}: {found}", file=sys.stderr, flush=True)
        if hasattr(module, "minimise"):
            print(module.minimise(failed), file=sys.stderr)
        raise SystemExit(1) from None


class _Soak:
    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self._until, self._lock = time.monotonic() + 60 * args.minutes, threading.Lock()
        kinds = args.kind or KINDS
        self._slices = zip(itertools.cycle(kinds), itertools.count(seed, _SEEDS_A_SLICE))
        self._slice_s, self._file, self._commit = args.slice_seconds, args.record, record.commit()
        self.lines: list[record.Line] = []

    def work(self) -> None:
        """Run slices until the time is over."""
        while (left := self._until - time.monotonic()) > 0:
            with self._lock:
                kind, seed = next(self._slices)
            done, error = self._run(kind, seed, min(left, self._slice_s))
            line = record.slice_done(kind, seed, self._commit, done, error)
            with self._lock:
                self.lines.append(line)
                if self._file:
                    record.write(self._file, line)

    def _run(self, kind: str, seed: int, seconds: float) -> tuple[dict[str, int], str]:
        """Run a slice; return what was done and, when it failed, how."""
        command = [sys.executable, "-m", "tests.soak", "--slice", kind, str(seed), str(seconds)]
        try:
            told = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds + _HANGS_S, check=False
            )
        except subprocess.TimeoutExpired:
            done, error = dict[str, int](), f"no end {_HANGS_S} s after its time"
        else:
            # What a kind prints itself is before; a slice that was killed prints nothing.
            last = (told.stdout.splitlines() or ["{}"])[-1]
            done = json.loads(last) if last.startswith("{") else {}
            error = f"status {told.returncode}: {told.stderr[-6000:]}" if told.returncode else ""
        if error:
            print(f"FAILED: {' '.join(command[1:])}\n{error}", file=sys.stderr, flush=True)
        return done, error


def main() -> int:
    """Soak; return the exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, help="by default the time says")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; default: all")
    parser.add_argument("--slice-seconds", type=float, default=_SLICE_S, metavar="N")
    parser.add_argument("--record", metavar="FILE", help="add what was done to this file")
    parser.add_argument("--json", action="store_true", help="print the totals as JSON")
    parser.add_argument("--totals", metavar="FILE", help="print what a file has, and do nothing")
    parser.add_argument("--slice", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.slice:
        _slice(args.slice[0], int(args.slice[1]), float(args.slice[2]))
        return 0
    if args.totals:
        return _tell(record.totals(record.read(args.totals)), as_json=True)
    seed = int(time.time()) if args.seed is None else args.seed
    print(f"soak: seed {seed}, {args.minutes:g} min, {args.jobs} jobs", file=sys.stderr, flush=True)
    soak = _Soak(args, seed)
    jobs = [threading.Thread(target=soak.work) for _job in range(args.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    return _tell(record.totals(soak.lines), as_json=args.json)


def _tell(totals: dict[str, Any], *, as_json: bool) -> int:
    """Print totals; return the exit status that they stand for."""
    if as_json:
        print(json.dumps(totals, indent=2))
    else:
        print("soak:", ", ".join(f"{count} {what}" for what, count in totals["done"].items()))
        if totals["failed"]:
            print(f"soak: FAILED: {', '.join(totals['failed'])}")
    return 1 if totals["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
