"""The cost of evicting a page and loading it again, compared with the two AES-GCM calls in it.

A pair is EBLOCK + EWB + ELDU of one page, with ETRACK once for a batch of 16 pages, all checks and
real crypto, without buffers in between, as the driver does it; ``buffered_pair_us`` is one with
memory operands; ``aesgcm_pair_us`` is one ``AESGCM.encrypt`` and one ``decrypt`` of 4 KiB with the
same associated data, measured in turn with it.  Also: leaves per second, and what an EPC costs to
set up.  Times are the best of many rounds; the machine's noise is the median beside them.

    python benchmarks/page_pair.py [--json] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from softsgx.arch import PAGE_BYTES, Attributes, PageType, SecInfo, Secs, Status
from softsgx.hw import Machine, MachineConfig, PageInfoArgs
from softsgx.hw.optimised import OPTIMISED
from softsgx.runtime import InlineRuntime

BATCH = 16
BASE = 0x1000_0000
SIZES = {"16 MiB": 16 << 20, "1 GiB": 1 << 30, "64 GiB": 64 << 30, "512 GiB": 512 << 30}


class Batch:
    """An enclave of 16 pages in a machine, and the memory that they go to."""

    def __init__(self, *, fast: bool) -> None:
        self.hw = Machine(
            MachineConfig.with_epc(1 << 20), InlineRuntime(), optimised=OPTIMISED if fast else None
        )
        section = self.hw.config.sections[0]
        self.secs, va = section.page(0), section.page(1)
        self.pages = [section.page(2 + n) for n in range(BATCH)]
        self.slots = [va + 8 * n for n in range(BATCH)]
        leaves = self.hw.leaves
        secs = Secs(
            size=1 << 20, base=BASE, ssa_frame_size=1, attributes=Attributes(flags=4, xfrm=3)
        )
        leaves.ecreate(PageInfoArgs(srcpge=secs.pack(), secinfo=SecInfo()), self.secs)
        leaves.epa(int(PageType.VA), va)
        for n, page in enumerate(self.pages):
            info = PageInfoArgs(
                BASE + n * PAGE_BYTES,
                os.urandom(PAGE_BYTES),
                SecInfo.of(PageType.REG, 3),
                self.secs,
            )
            leaves.eadd(info, page)
        self.out = [(bytearray(PAGE_BYTES), bytearray(128)) for _ in range(BATCH)]

    def _track(self) -> None:
        """Make all pages ready for EWB."""
        leaves = self.hw.leaves
        for page in self.pages:
            leaves.eblock(page)
        leaves.etrack(self.secs)

    def round_trip_of_objects(self) -> None:
        """As :meth:`round_trip`, by the leaves that need no buffers, as evictions use them."""
        self._track()
        leaves, kept = self.hw.leaves, []
        for page, slot in zip(self.pages, self.slots, strict=True):
            done = leaves.try_ewb(page, slot)
            assert isinstance(done, tuple), done
            kept.append(done)
        linaddr = BASE
        for page, slot, (sealed, flags, _eid) in zip(self.pages, self.slots, kept, strict=True):
            assert leaves.try_eldu(linaddr, self.secs, sealed, flags, page, slot)
            linaddr += PAGE_BYTES

    def round_trip(self) -> None:
        """Evict all 16 pages, load all 16."""
        self._track()
        leaves = self.hw.leaves
        for page, slot, (contents, pcmd) in zip(self.pages, self.slots, self.out, strict=True):
            status = leaves.ewb(PageInfoArgs(0, contents, pcmd, 0), page, slot)
            assert status is Status.SUCCESS, status
        linaddr = BASE
        for page, slot, (contents, pcmd) in zip(self.pages, self.slots, self.out, strict=True):
            status = leaves.eldu(PageInfoArgs(linaddr, contents, pcmd, self.secs), page, slot)
            assert status is Status.SUCCESS, status
            linaddr += PAGE_BYTES


def timed(action: Callable[[], None], per: int) -> float:
    """Return microseconds of one of ``per`` equal parts of ``action``."""
    start = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - start) / per / 1000


def bare_pairs() -> Callable[[], None]:
    """Return an action: 16 bare pairs of AES-GCM calls on 4 KiB."""
    aead, nonce, header = AESGCM(os.urandom(16)), bytes(12), bytes(128)
    plain = os.urandom(PAGE_BYTES)
    sealed = aead.encrypt(nonce, plain, header)

    def action() -> None:
        for _ in range(BATCH):
            aead.encrypt(nonce, plain, header)
            aead.decrypt(nonce, sealed, header)

    return action


def measure_pairs(rounds: int) -> dict[str, float]:
    """Return the pair, readable and fast, and the bare pair, measured in turn."""
    actions = {
        "pair": Batch(fast=True).round_trip_of_objects,
        "buffered_pair": Batch(fast=True).round_trip,
        "readable_pair": Batch(fast=False).round_trip,
        "aesgcm_pair": bare_pairs(),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            times[name].append(timed(action, BATCH))
    result = {f"{name}_us": min(values) for name, values in times.items()}
    result |= {f"{name}_median_us": statistics.median(v) for name, v in times.items()}
    result["ratio"] = result["pair_us"] / result["aesgcm_pair_us"]
    return result


def leaves_per_second(rounds: int) -> dict[str, float]:
    """Return the rate of single leaves that need no crypto."""
    batch = Batch(fast=True)
    leaves, section = batch.hw.leaves, batch.hw.config.sections[0]
    free = [section.page(100 + n) for n in range(BATCH)]

    def make_and_remove() -> None:
        for page in free:
            leaves.epa(3, page)
        for page in free:
            leaves.eremove(page)

    def track() -> None:
        for _ in range(BATCH):
            leaves.etrack(batch.secs)

    return {
        "epa_eremove_per_s": 1e6 / min(timed(make_and_remove, 2 * BATCH) for _ in range(rounds)),
        "etrack_per_s": 1e6 / min(timed(track, BATCH) for _ in range(rounds)),
    }


_SET_UP = """
import resource, time
from softsgx.hw import Machine, MachineConfig
from softsgx.runtime import InlineRuntime
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
machine = Machine(MachineConfig.with_epc({size}), InlineRuntime())
section = machine.config.sections[0]
machine.leaves.epa(3, section.page(section.pages - 1))
spent = time.perf_counter() - start
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(spent * 1000, (after - before) / 1024)
"""


def set_up(size: int) -> dict[str, float]:
    """Return milliseconds and MiB for a machine with ``size`` bytes of EPC, in a new process."""
    out = subprocess.run(
        [sys.executable, "-c", _SET_UP.format(size=size)], capture_output=True, check=True
    )
    spent_ms, grown_mib = map(float, out.stdout.split())
    return {"set_up_ms": spent_ms, "memory_mib": grown_mib}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=400, help="batches of 16 (default 400)")
    args = parser.parse_args()
    result: dict[str, object] = dict(measure_pairs(args.rounds))
    result |= leaves_per_second(args.rounds)
    result["epc"] = {name: set_up(size) for name, size in SIZES.items()}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, value in result.items():
        if isinstance(value, dict):
            for size, figures in value.items():
                line = "  ".join(f"{key} {figure:.1f}" for key, figure in figures.items())
                print(f"EPC {size:>8}  {line}")
        else:
            print(f"{name:24} {value:12.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
