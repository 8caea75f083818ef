"""The speed of computing MRENCLAVE, compared with SHA-256 of as many bytes and page headers.

Prints one JSON object: MB/s of hashed bytes for pages of file data, for equal pages and for
unmeasured ones, each with its ratio to ``hashlib.sha256`` in the same run, and the peak of memory.

    python benchmarks/measure.py --megabytes 256
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import tracemalloc
from collections.abc import Callable

from softsgx.arch import PAGE_BYTES
from softsgx.image import (
    MASK_NONE,
    SECINFO_RW,
    SECINFO_RX,
    Data,
    Plan,
    Run,
    enclave_size,
    hashed_bytes,
    measure,
)

_PIECE = 64 * 5184  # what one call of sha256.update gets in both


def _best(work: Callable[[], object], rounds: int) -> float:
    """Return the seconds of the fastest of some rounds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _sha256(total_bytes: int) -> None:
    piece = bytes(_PIECE)
    digest = hashlib.sha256()
    for _ in range(total_bytes // _PIECE):
        digest.update(piece)
    digest.digest()


def main() -> None:
    """Measure three kinds of pages and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=int, default=128, help="size of each enclave")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pages = args.megabytes * (1 << 20) // PAGE_BYTES
    size = enclave_size(pages * PAGE_BYTES)
    file_bytes = memoryview(os.urandom(pages * PAGE_BYTES))
    gigabyte = 1 << 18
    plans = {
        "file_pages": Plan(size, (Run(0, pages, SECINFO_RX, Data(file_bytes)),)),
        "equal_pages": Plan(size, (Run(0, pages, SECINFO_RW),)),
        "unmeasured_gib": Plan(1 << 30, (Run(0, gigabyte, SECINFO_RW, mask=MASK_NONE),)),
    }
    result: dict[str, object] = {"pages": pages}
    for name, plan in plans.items():
        total = hashed_bytes(plan)
        ours = _best(lambda plan=plan: measure(plan), args.rounds)  # type: ignore[misc]
        plain = _best(lambda total=total: _sha256(total), args.rounds)  # type: ignore[misc]
        tracemalloc.start()
        measure(plan)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        result[name] = {
            "hashed_mb": round(total / 1e6, 1),
            "mb_per_s": round(total / ours / 1e6),
            "sha256_mb_per_s": round(total / plain / 1e6),
            "ratio": round(plain / ours, 2),
            "seconds": round(ours, 4),
            "peak_kib": peak >> 10,
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
