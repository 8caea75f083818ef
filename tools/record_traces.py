"""Record the page-access traces in ``tests/data`` from four programs of Debian.

Needs valgrind, sqlite3, python3, sort and gzip. Each program runs under valgrind's lackey; its
fetches, loads and stores become accesses to 4 KiB pages. Accesses that hit in a cache of the 8
pages accessed last are left out, which changes no number of misses of LRU with 8 pages or more;
then the first 400,000 accesses are kept.

    python tools/record_traces.py                    all four, to tests/data
    python tools/record_traces.py --to DIR sqlite3   one
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from softsgx.accesses import Trace, write_trace
from softsgx.accesses.lackey import open_lackey
from softsgx.accesses.source import Source

FILTER_PAGES = 8
MOST_ACCESSES = 400_000
_NUMBERS = 6000
_ROWS = 3000

_SQL = f"""
CREATE TABLE item(id INTEGER PRIMARY KEY, name TEXT, price INTEGER);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {_ROWS})
INSERT INTO item SELECT i, hex(i * 7919), i * 31 % 997 FROM n;
CREATE INDEX by_price ON item(price);
SELECT count(*), sum(a.price) FROM item a JOIN item b ON a.price = b.id;
"""
_JSON = """
import json
tree = {str(i): {"name": "item %d" % i, "tags": [i % 7, i % 11]} for i in range(3000)}
assert json.loads(json.dumps(tree)) == tree
"""


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the programs, and write their input files."""
    chance = random.Random(1)
    numbers = "".join(f"{chance.randrange(10**9)}\n" for _ in range(_NUMBERS))
    (folder / "numbers").write_text(numbers)
    (folder / "text").write_text(" ".join(str(chance.randrange(5000)) for _ in range(60_000)))
    return {
        "sqlite3": ["sqlite3", ":memory:", _SQL],
        "python3-json": ["python3", "-I", "-S", "-c", _JSON],
        "sort": ["sort", "--parallel=1", str(folder / "numbers")],
        "gzip": ["gzip", "--stdout", str(folder / "text")],
    }


def accesses(command: list[str]) -> Iterator[tuple[int, bool]]:
    """Run a program under lackey; yield key and write of each access that the filter passes."""
    reading, writing = os.pipe()
    lackey = ["valgrind", "--tool=lackey", "--trace-mem=yes", f"--log-fd={writing}"]
    program = subprocess.Popen(
        [*lackey, *command],
        pass_fds=[writing],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"LC_ALL": "C", "PYTHONHASHSEED": "0"},
    )
    os.close(writing)
    try:
        with open(reading, "rb") as log:
            yield from _filtered(open_lackey(log, command[0]))
        if program.wait():
            raise SystemExit(f"{command[0]}: exit status {program.returncode}")
    finally:
        program.kill()
        program.wait()


def _filtered(source: Source) -> Iterator[tuple[int, bool]]:
    recent: OrderedDict[int, None] = OrderedDict()  # the page accessed last is the last
    for block in source.blocks:
        changes = np.flatnonzero(np.diff(block.keys, prepend=block.keys[0] + np.uint64(1)))
        writes = np.logical_or.reduceat(block.writes, changes)
        for key, write in zip(block.keys[changes].tolist(), writes.tolist(), strict=True):
            known = key in recent
            recent[key] = None
            recent.move_to_end(key)
            if known:
                continue
            if len(recent) > FILTER_PAGES:
                recent.popitem(last=False)
            yield key, write


def record(name: str, command: list[str]) -> Trace:
    """Return the trace of a program; its pages are numbered in order of first use."""
    numbers: dict[int, int] = {}
    kept = [
        (numbers.setdefault(key, len(numbers)), write)
        for key, write in islice(accesses(command), MOST_ACCESSES)
    ]
    return Trace.of(kept, program=name)


def main() -> None:
    """Record the programs of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("program", nargs="*")
    here = Path(__file__).resolve().parent.parent / "tests" / "data"
    parser.add_argument("--to", type=Path, default=here)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, command in commands(Path(folder)).items():
            if given.program and name not in given.program:
                continue
            trace = record(name, command)
            path = given.to / f"{name}.trace"
            write_trace(path, trace)
            size = path.stat().st_size
            print(f"{path}: {len(trace)} accesses to {trace.used_pages} pages, {size} bytes")


if __name__ == "__main__":
    main()
