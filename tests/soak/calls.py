"""Random system calls while enclaves exist, threads are inside and another process runs.

Method: ``programs/syscalls.c`` makes them from a seed, with softsgx and without, and logs the
results of those that concern no enclave: both logs agree.  It checks what its enclave holds after
each step, and ends well.  Each step can be left out, so a failing seed is minimised.

``python -m tests.soak.calls --seed 1 --seeds 20`` runs some seeds.
"""

from __future__ import annotations

import argparse
import difflib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.soak import repeat
from tests.soak.lifetimes import chosen
from tests.soak.supervised import built, check

__all__ = ["call", "minimise", "run"]

STEPS = 200
_HANGS_S = 120


def call(seed: int, steps: Sequence[int], options: dict[str, Any]) -> None:
    """Make the calls of some steps.

    Raises:
        AssertionError: softsgx failed, or the enclave lost something, or a result is another one
            than the kernel's.
    """
    program = built("syscalls")
    with tempfile.TemporaryDirectory(prefix="softsgx-soak-") as place:
        alone, ours = Path(place, "alone"), Path(place, "ours")
        words = [program.program, program.enclave, str(seed), _text(steps)]
        status = subprocess.run([*words, str(alone), "-"], timeout=_HANGS_S, check=False).returncode
        assert not status, f"seed {seed}: the program alone ends with {status}"
        check([*words, str(ours)], options, _HANGS_S)
        kernel, softsgx = (path.read_text().splitlines() for path in (alone, ours))
        differences = list(difflib.unified_diff(kernel, softsgx, lineterm="", n=0))
        assert not differences, f"seed {seed}: {'; '.join(differences[:8])}"


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""

    def history(seed: int) -> dict[str, int]:
        call(seed, range(STEPS), chosen(seed))
        return {"system_call_steps": STEPS}

    return repeat(seconds, seed, history)


def minimise(seed: int, options: dict[str, Any] | None = None, tries: int = 2) -> str:
    """Return few steps with which a seed still fails, as a sentence.

    Halves, then quarters and so on are left out, as long as what remains fails.
    """
    steps, options = list(range(STEPS)), options or chosen(seed)
    pieces = 2
    while pieces <= len(steps):
        size = -(-len(steps) // pieces)
        for start in range(0, len(steps), size):
            fewer = steps[:start] + steps[start + size :]
            if _fails(seed, fewer, options, tries):
                steps, pieces = fewer, max(pieces - 1, 2)
                break
        else:
            if pieces == len(steps):
                break
            pieces = min(2 * pieces, len(steps))
    return f"these steps are enough: --seed {seed} --steps {_text(steps)}"


def _text(steps: Sequence[int]) -> str:
    """Return rising numbers as ranges: ``0-3,7``."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and parts[-1][-1] == step - 1:
            parts[-1][1:] = [step]
        else:
            parts.append([step])
    return ",".join("-".join(map(str, part)) for part in parts)


def _numbers(text: str) -> list[int]:
    """Return the numbers of :func:`_text`."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [step for part in ends for step in range(part[0], part[-1] + 1)]


def _fails(seed: int, steps: list[int], options: dict[str, Any], tries: int) -> bool:
    for _try in range(tries):
        try:
            call(seed, steps, options)
        except AssertionError:
            return True
    return False


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=_numbers, default=range(STEPS), help="as 0-9,12")
    parser.add_argument("--minimise", action="store_true")
    args = parser.parse_args()
    failed = 0
    for seed in range(args.seed, args.seed + args.seeds):
        try:
            call(seed, args.steps, chosen(seed))
        except AssertionError as error:
            failed += 1
            print(f"FAILED: seed {seed}, {chosen(seed)}: {error}", flush=True)
            if args.minimise:
                print(minimise(seed), flush=True)
    print(f"{args.seeds} seeds from {args.seed}: {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    _main()
