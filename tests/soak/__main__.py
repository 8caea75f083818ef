"""Random histories for some minutes: ``python -m tests.soak --minutes N --jobs N``.

Each kind of history gets its turn, in slices with seeds that follow from the first one.  A slice
that fails is told with its seed and, where the kind can, how little of it still fails.
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
from collections import Counter

from tests.soak.parsers import Counts

KINDS = ("lifetimes", "models", "parsers")
_SLICE_S = 20.0
_SEEDS_A_SLICE = 1000
_HANGS_S = 900


def _slice(kind: str, seed: int, seconds: float) -> None:
    """In a process of its own: run a kind, and print what was done as JSON."""
    module = importlib.import_module(f"tests.soak.{kind}")
    try:
        print(json.dumps(_done(module.run(seconds, seed))))
    except AssertionError as error:
        print(f"{kind}, from seed {seed}: {error}", file=sys.stderr)
        if hasattr(module, "minimise"):
            print(module.minimise(seed), file=sys.stderr)
        raise SystemExit(1) from None


def _done(result: dict[str, int] | Counts) -> dict[str, int]:
    if isinstance(result, Counts):
        assert not result.faults, result.faults
        return {"parser_inputs": result.inputs.total()}
    return result


class _Soak:
    def __init__(self, until: float, seed: int, kinds: tuple[str, ...]) -> None:
        self._until, self._lock = until, threading.Lock()
        self._slices = zip(itertools.cycle(kinds), itertools.count(seed, _SEEDS_A_SLICE))
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []

    def work(self) -> None:
        """Run slices until the time is over."""
        while (left := self._until - time.monotonic()) > 0:
            with self._lock:
                kind, seed = next(self._slices)
            seconds = str(min(left, _SLICE_S))
            command = [sys.executable, "-m", "tests.soak", "--slice", kind, str(seed), seconds]
            try:
                told = subprocess.run(
                    command, capture_output=True, text=True, timeout=_HANGS_S, check=False
                )
                error = told.stderr if told.returncode else ""
            except subprocess.TimeoutExpired:
                error = f"no end after {_HANGS_S} s"
            with self._lock:
                if error:
                    self.failed.append(f"{kind} {seed}")
                    print(f"FAILED: {' '.join(command[1:])}\n{error}", flush=True)
                else:
                    self.done.update(json.loads(told.stdout.splitlines()[-1]))


def main() -> int:
    """Soak; return the exit status."""
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, help="by default the time says")
    parser.add_argument("--kind", choices=KINDS, action="append", help="repeatable; default: all")
    parser.add_argument("--slice", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.slice:
        _slice(args.slice[0], int(args.slice[1]), float(args.slice[2]))
        return 0
    seed = int(time.time()) if args.seed is None else args.seed
    print(f"soak: seed {seed}, {args.minutes:g} min, {args.jobs} jobs", flush=True)
    kinds = tuple(args.kind or KINDS)
    soak = _Soak(time.monotonic() + 60 * args.minutes, seed, kinds)
    jobs = [threading.Thread(target=soak.work) for _job in range(args.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    print("soak:", ", ".join(f"{count} {what}" for what, count in sorted(soak.done.items())))
    if soak.failed:
        print(f"soak: FAILED: {', '.join(soak.failed)}")
    return 1 if soak.failed else 0


if __name__ == "__main__":
    sys.exit(main())
