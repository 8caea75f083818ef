"""The counts of soaks in a file: a line of JSON for each slice, so that runs add up.

``python -m tests.soak --totals FILE`` prints the sums.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["commit", "read", "slice_done", "totals", "write"]

Line = dict[str, Any]


def commit() -> str:
    """Return the commit that is checked out, with ``+`` when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def slice_done(kind: str, seed: int, at: str, done: dict[str, int], error: str = "") -> Line:
    """Return the line of a slice.

    Args:
        kind: of history.
        seed: its own.
        at: the commit it ran on.
        done: how much was done, by name.
        error: what went wrong, empty for nothing.
    """
    python = ".".join(map(str, sys.version_info[:2]))
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = {"kind": kind, "seed": seed, "commit": at, "date": date, "python": python, "done": done}
    return line | ({"error": error} if error else {})


def write(path: str, line: Line) -> None:
    """Append a line; several soaks may write to the same file."""
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: str) -> list[Line]:
    """Return the lines of a file."""
    return [json.loads(text) for text in Path(path).read_text().splitlines()]


def totals(lines: Iterable[Line]) -> dict[str, Any]:
    """Return the sums: in all and by commit, the seeds of each kind, and what failed."""
    done: Counter[str] = Counter()
    by_commit: defaultdict[str, Counter[str]] = defaultdict(Counter)
    seeds: defaultdict[str, list[int]] = defaultdict(list)
    failed = []
    for line in lines:
        done.update(line["done"])
        by_commit[line["commit"]].update(line["done"])
        seeds[line["kind"]].append(line["seed"])
        if "error" in line:
            failed.append(f"{line['kind']} {line['seed']}")
    return {
        "done": dict(sorted(done.items())),
        "by_commit": {at: dict(sorted(counts.items())) for at, counts in by_commit.items()},
        "seeds": {kind: [min(all_), max(all_), len(all_)] for kind, all_ in seeds.items()},
        "failed": failed,
    }
