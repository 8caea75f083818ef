"""Lifetimes of processes that use enclaves under EPC pressure, and end in every possible way.

Method: ``programs/lifetimes.c`` makes processes that share enclaves or build their own, with
threads inside, and that exit, are killed, execute, fork, vfork, stop or fault.  Timing is not part
of the seed, so a failing seed may need several tries.

``python -m tests.soak.lifetimes --lives 5000 --pager mprotect`` runs many at once.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from tests.soak import repeat
from tests.soak.supervised import built, check

from softsgx.engines.native import PAGERS, doctor

__all__ = ["live", "minimise", "run"]

LIVES = 50
_EPC = ("128KiB", "256KiB", "1MiB")


def usable_pagers() -> tuple[str, ...]:
    """Return the pagers that work here."""
    works = {finding.name: finding.ok for finding in doctor()}
    return PAGERS if works["userfaultfd"] else ("mprotect",)


def chosen(seed: int) -> dict[str, Any]:
    """Return the options of a run that a seed stands for."""
    choice = random.Random(seed)
    return {
        "pager": choice.choice(usable_pagers()),
        "strict": choice.random() < 0.3,
        "epc": choice.choice(_EPC),
    }


def live(seed: int, lives: int, options: dict[str, Any]) -> int:
    """Let ``lives`` processes live, some at once; return how many SIGKILL has ended."""
    program = built("lifetimes")
    at_once = 1 + random.Random(seed).randrange(6)
    argv = [program.program, program.enclave, str(seed), str(lives), str(at_once)]
    ended, killed = map(int, check(argv, options).split())
    assert ended == lives, f"{ended} of {lives} lives have ended"
    return killed


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""
    return repeat(
        seconds, seed, lambda seed: {"lives": LIVES, "kills": live(seed, LIVES, chosen(seed))}
    )


def minimise(seed: int, tries: int = 3) -> str:
    """Return the fewest lives with which a seed still fails, as a sentence."""
    failing, lives = LIVES, LIVES // 2
    while lives:
        for _try in range(tries):
            try:
                live(seed, lives, chosen(seed))
            except AssertionError:
                failing = lives
                break
        else:
            break
        lives //= 2
    return f"{failing} lives are enough"


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--lives", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pager", choices=PAGERS)
    parser.add_argument("--epc", choices=_EPC)
    parser.add_argument("--strict", action="store_true", default=None)
    args = parser.parse_args()
    fixed = {name: getattr(args, name) for name in ("pager", "epc", "strict")}
    failed = done = 0
    for seed in range(args.seed, args.seed + -(-args.lives // LIVES)):
        options = chosen(seed) | {name: value for name, value in fixed.items() if value is not None}
        try:
            live(seed, LIVES, options)
        except AssertionError as error:
            failed += 1
            print(f"FAILED: seed {seed}, {options}: {error}", flush=True)
        done += LIVES
    print(f"{done} lives, seeds {args.seed} to {seed}: {failed} runs failed", flush=True)
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    _main()
