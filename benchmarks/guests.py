"""The cost of evicting a guest's EPC by the host, compared with a native enclave that swaps.

``fault``: a thread inside an enclave loads from pages in turn, more of them than there is EPC, so
that each load faults, evicts a page and loads another, crypto included.  ``native`` is an enclave
of the host's driver; ``host_evicts`` one in a guest that has room, on a host that has not;
``guest_evicts`` the reverse; in ``both`` neither has room.  ``pairs_per_load`` is how many pages
were loaded for one load of the thread.

``slow_down``: time of a load over that in a guest with room on a host with room, for ratios of the
guest's virtual EPC to the host's EPC, and of the enclave to the guest's virtual EPC.

Microseconds are processor time, the best of several rounds, all variants in turn; on the inline
runtime with the "fifo" policy.

    python benchmarks/guests.py [--json] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, PageType, Secs, Tcs
from softsgx.host import GuestPlatform, Platform
from softsgx.image import (
    MASK_NONE,
    SECINFO_RW,
    Data,
    Plan,
    Run,
    SignOptions,
    enclave_size,
    sign_plan,
    throwaway_key,
)
from softsgx.userland import SoftProcess

BASE = 0x7000_0000_0000
FLAGS = AttributesFlags.MODE64BIT.value
KEY = throwaway_key()
SMALL, LARGE = 256, 2048
DATA_OFFSET = 3 * PAGE_BYTES
RATIOS = (0.5, 1.5, 2.0, 4.0)


class Enclave:
    """An enclave with a number of data pages, and a thread inside."""

    def __init__(self, process: SoftProcess, pages: int) -> None:
        tcs = Tcs(ossa=PAGE_BYTES, nssa=2, fs_limit=0xFFF, gs_limit=0xFFF).pack()
        runs = (
            Run(0, 1, PageType.TCS << 8, Data(memoryview(tcs)), MASK_NONE),
            Run(PAGE_BYTES, 2 + pages, SECINFO_RW, mask=MASK_NONE),
        )
        plan = Plan(enclave_size((3 + pages) * PAGE_BYTES), runs)
        attributes = Attributes(flags=FLAGS, xfrm=3)
        secs = Secs(size=plan.size, base=BASE, ssa_frame_size=1, attributes=attributes)
        fd = process.open()
        process.create(fd, secs.pack())
        for run in runs:
            data = b"".join(bytes(run.source.page(at)) for at in range(run.pages))
            process.add_pages(fd, run.offset, data, run.flags, measure=False)
        process.init(fd, sign_plan(plan, KEY, SignOptions(attributes=FLAGS)).pack())
        process.mmap(fd, BASE, plan.size, 3)
        self.pages = pages
        self._next = 0
        self._thread = process.thread()
        self._thread.enter(BASE)

    def touch(self, loads: int) -> None:
        """Load from the pages in turn."""
        load, pages, at = self._thread.load, self.pages, self._next
        for _ in range(loads):
            load(BASE + DATA_OFFSET + at * PAGE_BYTES)
            at = (at + 1) % pages
        self._next = at


@dataclass
class Variant:
    """One way to run the same loads.

    Attributes:
        platform: the machine.
        enclave: the enclave; its pages are loaded.
        guest: the guest of the enclave; ``None``: it is on the host.
    """

    platform: Platform
    enclave: Enclave
    guest: GuestPlatform | None

    @classmethod
    def make(cls, *, host: int, guest: int | None, enclave: int) -> Variant:
        """Return a variant with EPCs and an enclave of these sizes, all its pages touched once."""
        platform = Platform(epc=host * PAGE_BYTES, policy="fifo")
        platform.start()
        inside = None if guest is None else platform.guest("guest", epc=guest * PAGE_BYTES)
        process = platform.process() if inside is None else inside.process()
        made = cls(platform, Enclave(process, enclave), inside)
        made.enclave.touch(enclave)
        return made

    def loaded(self) -> tuple[int, int]:
        """Return how many pages the host's core and the guest's have loaded."""
        own = 0 if self.guest is None else self.guest.core.counters.eldu
        return self.platform.core.counters.eldu, own


def timed(variants: dict[str, Variant], loads: int, rounds: int) -> dict[str, list[float]]:
    """Run the variants in turn; return microseconds a load of each round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            start = time.process_time_ns()
            variant.enclave.touch(loads)
            times[name].append((time.process_time_ns() - start) / loads / 1000)
    return times


def faults(rounds: int) -> dict[str, dict[str, float]]:
    """Return the cost of a load that faults, by the party that evicts."""
    pages = 2 * SMALL
    variants = {
        "native": Variant.make(host=SMALL, guest=None, enclave=pages),
        "host_evicts": Variant.make(host=SMALL, guest=LARGE, enclave=pages),
        "guest_evicts": Variant.make(host=LARGE, guest=SMALL, enclave=pages),
        "both": Variant.make(host=SMALL // 2, guest=SMALL, enclave=pages),
    }
    before = {name: variant.loaded() for name, variant in variants.items()}
    times = timed(variants, pages, rounds)
    native = min(times["native"])
    result: dict[str, dict[str, float]] = {}
    for name, variant in variants.items():
        host, own = (
            (after - start) / rounds / pages
            for after, start in zip(variant.loaded(), before[name], strict=True)
        )
        result[name] = {
            "us": min(times[name]),
            "median_us": statistics.median(times[name]),
            "ratio": min(times[name]) / native,
            "host_pairs_per_load": host,
            "guest_pairs_per_load": own,
        }
        variant.platform.stop()
    return result


def slow_down(rounds: int) -> dict[str, dict[str, float]]:
    """Return the time of a load over that with room, by overcommit of host and of guest."""
    roomy = Variant.make(host=LARGE, guest=LARGE // 2, enclave=SMALL)
    result: dict[str, dict[str, float]] = {}
    for host_ratio in RATIOS:
        row: dict[str, float] = {}
        for guest_ratio in RATIOS:
            variant = Variant.make(
                host=round(SMALL / host_ratio), guest=SMALL, enclave=round(SMALL * guest_ratio)
            )
            times = timed({"roomy": roomy, "tight": variant}, 2 * SMALL, rounds)
            row[f"guest {guest_ratio}"] = min(times["tight"]) / min(times["roomy"])
            variant.platform.stop()
        result[f"host {host_ratio}"] = row
    return result


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=7, help="sweeps of each (default 7)")
    args = parser.parse_args()
    result = {"fault": faults(args.rounds), "slow_down": slow_down(args.rounds)}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for kind, rows in result.items():
        print(kind)
        for name, row in rows.items():
            figures = "  ".join(f"{key} {figure:.2f}" for key, figure in row.items())
            print(f"  {name:12} {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
