"""The speed of reading traces, computing curves and replaying policies, next to libcachesim.

Prints one JSON object.  Rates are millions of accesses per second of processor time, kernels
compiled; libcachesim replays the same accesses in the same run with ``process_trace``, its fastest
way.

    python benchmarks/plan.py --json
    python benchmarks/plan.py --json --large 200000000     and softsgx plan with a long trace
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from softsgx.accesses import Chunk, TraceWriter, open_trace
from softsgx.plan import readable
from softsgx.plan.curves import stack_distances
from softsgx.plan.linux_replay import LinuxReplay
from softsgx.plan.numbering import numbered
from softsgx.plan.policies import POLICIES, PolicyName, misses
from softsgx.plan.scene import Epc, Scene, SceneEnclave

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PART = 1 << 20
_RESOLUTION_NS = 1000  # as recorders have it
_READABLE_ACCESSES = 20_000
_DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
_RECORD = np.dtype([("seconds", "<u4"), ("object", "<u8"), ("size", "<u4"), ("next", "<i8")])


def made(accesses: int, pages: int) -> Iterator[Chunk]:
    """Yield accesses: hot pages by Zipf's law, and scans of all pages, 10 microseconds apart."""
    chance = np.random.default_rng(1)
    order = chance.permutation(pages).astype(np.uint32)
    for first in range(0, accesses, _PART):
        count = min(_PART, accesses - first)
        hot = order[np.minimum(chance.zipf(1.2, count) - 1, pages - 1)]
        scan = (np.arange(first, first + count) // 4 % pages).astype(np.uint32)
        pages_used = np.where(chance.random(count) < 0.8, hot, scan)
        times = first * 10_000 + np.cumsum(chance.integers(0, 20_000, count))
        events = (chance.random(count) < 0.3).astype(np.uint8)
        yield Chunk(np.zeros(count, np.uint16), pages_used, events, times.astype("u8"))


def write(path: Path, accesses: int, pages: int) -> None:
    """Write a trace file of such accesses."""
    last_ns = np.uint64(0)
    with TraceWriter(
        path, precision="accesses", program="made up", resolution_ns=_RESOLUTION_NS
    ) as writer:
        writer.add_enclave("made up", pages, 0)
        for chunk in made(accesses, pages):
            times = np.maximum(chunk.times_ns, last_ns)  # parts overlap a little
            last_ns = times[-1]
            writer.extend(0, chunk.pages, chunk.writes, times)


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Return the seconds of processor time of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def rival(path: Path, policy: str, capacity: int) -> Callable[[], Any] | None:
    """Return the replay of libcachesim; ``None`` if it is not installed, or has no such policy."""
    try:
        import libcachesim
    except ImportError:
        return None
    names = {"lru": "LRU", "fifo": "FIFO", "clock": "Clock", "s3fifo": "S3FIFO"}
    if policy not in names:
        return None
    kind = libcachesim.TraceType.ORACLE_GENERAL_TRACE

    def replay() -> Any:
        cache = getattr(libcachesim, names[policy])(cache_size=capacity)
        return cache.process_trace(libcachesim.TraceReader(str(path), kind))

    return replay


def policies(
    numbers: NDArray[np.uint32], pages: int, folder: Path, rounds: int
) -> dict[str, dict[str, float]]:
    """Return the rates of each policy at a quarter of the pages."""
    capacity, path = pages // 4, folder / "pages.oracleGeneral"
    records = np.zeros(len(numbers), _RECORD)
    records["object"], records["size"] = numbers + np.uint32(1), 1
    records.tofile(path)
    found: dict[str, dict[str, float]] = {}
    for policy in POLICIES:
        ours = seconds(lambda policy=policy: misses(policy, [numbers], [capacity]), rounds)  # type: ignore[misc]
        rates = {"million_per_s": len(numbers) / ours / 1e6}
        theirs = rival(path, policy, capacity)
        if theirs is not None:
            taken = seconds(theirs, rounds)
            rates["libcachesim_million_per_s"] = len(numbers) / taken / 1e6
            rates["ratio"] = taken / ours
        found[policy] = rates
    return found


def linux(numbers: NDArray[np.uint32], pages: int, folder: Path, rounds: int) -> dict[str, float]:
    """Return the rate of the replay of Linux's policy at a quarter of the pages.

    libcachesim has no such policy: the ratios are those to its LRU and CLOCK.
    """
    scene = Scene((SceneEnclave(0, "made up", 0, int(numbers.max()) + 1),), [numbers])

    def replay(part: NDArray[np.uint32]) -> None:
        LinuxReplay(scene, Epc(pages // 4)).run(part)

    replay(numbers[:1000])  # compiles
    ours = seconds(lambda: replay(numbers), rounds)
    rates = {"million_per_s": len(numbers) / ours / 1e6}
    for policy in ("lru", "clock"):
        theirs = rival(folder / "pages.oracleGeneral", policy, pages // 4)
        if theirs is not None:
            rates[f"ratio_to_libcachesim_{policy}"] = seconds(theirs, rounds) / ours
    return rates


def oracle(policy: PolicyName, numbers: list[int], pages: int) -> float:
    """Return the rate of a readable policy."""
    work = getattr(readable, policy)
    return len(numbers) / seconds(lambda: work(numbers, pages // 4), 1) / 1e6


def bytes_per_access() -> dict[str, float]:
    """Return how many bytes of a file the accesses of recorded traces take."""
    sizes = {}
    for path in sorted(_DATA.glob("*.trace")):
        with open_trace(path) as trace:
            sizes[path.stem] = path.stat().st_size / len(trace)
    return sizes


def large(path: Path, accesses: int, pages: int) -> dict[str, float]:
    """Return time and memory of ``softsgx plan`` with a long trace."""
    write(path, accesses, pages)
    command = [sys.executable, "-m", "softsgx", "plan", str(path), "--quiet"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, env=os.environ | {"TMPDIR": str(path.parent)})
    taken, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "accesses": accesses,
        "bytes_per_access": path.stat().st_size / accesses,
        "seconds": taken,
        "processor_seconds": used,
        "peak_mib": after.ru_maxrss / 1024,
    }


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run all measurements."""
    path = folder / "made.trace"
    write(path, given.accesses, given.pages)
    with open_trace(path) as trace:
        numbers = np.concatenate(list(numbered(trace)))
        misses("lru", [numbers[:1000]], [1])  # compiles
        reading = seconds(lambda: [len(chunk) for chunk in trace], given.rounds)
        whole = seconds(lambda: stack_distances(numbered(trace)), given.rounds)
    curve = seconds(lambda: stack_distances([numbers]), given.rounds)
    for policy in POLICIES:
        misses(policy, [numbers[:1000]], [100])
    some = numbers[:_READABLE_ACCESSES].tolist()
    result: dict[str, Any] = {
        "accesses": given.accesses,
        "pages": given.pages,
        "bytes_per_access": path.stat().st_size / given.accesses,
        "recorded_bytes_per_access": bytes_per_access(),
        "read_million_per_s": given.accesses / reading / 1e6,
        "lru_curve_million_per_s": given.accesses / curve / 1e6,
        "read_and_lru_curve_million_per_s": given.accesses / whole / 1e6,
        "policies_at_a_quarter_of_the_pages": policies(numbers, given.pages, folder, given.rounds),
        "linux_at_a_quarter_of_the_pages": linux(numbers, given.pages, folder, given.rounds),
        "readable_million_per_s": {
            policy: oracle(policy, some, given.pages) for policy in ("lru", "clock")
        },
    }
    if given.large:
        result["large"] = large(folder / "large.trace", given.large, given.pages)
    return result


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accesses", type=int, default=1 << 22)
    parser.add_argument("--pages", type=int, default=1 << 15, help="different pages; 128 MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=0, help="accesses of a long trace")
    parser.add_argument("--json", action="store_true", help="one line instead of many")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = _rounded(measured(given, Path(folder)))
    print(json.dumps(result, indent=None if given.json else 2))


if __name__ == "__main__":
    main()
