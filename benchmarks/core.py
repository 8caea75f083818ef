"""The cost of a page fault through the whole stack, and that it does not grow with the machine.

A fault pair is one fault in the driver (page loaded by ELDU, PTE installed) and the eviction that
makes room for it (aged, zapped, blocked, tracked, written back), with all checks and real crypto;
``aesgcm_pair_us`` is the two bare AES-GCM calls in it, measured in turn with it.

    python benchmarks/core.py [--json] [--quick] [--enclave SIZE]

``scaling_epc`` is the pair's cost in an EPC of 64 GiB over that in one of 16 MiB, both under the
same group limit; ``scaling_enclaves`` the cost with 10 000 enclaves over that with one.  ``va`` is
an enclave whose version arrays alone are larger than the EPC: by default 1 GiB on 1.46 MiB, the
shape of 64 GiB on 93.5 MiB; ``--enclave 64GiB`` does it in full size, on disk, in about an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from softsgx.arch import PAGE_BYTES, Attributes, AttributesFlags, Secs
from softsgx.driver import FaultResult
from softsgx.host import Platform
from softsgx.image import SECINFO_RW, Blob, SignOptions, sign_plan, throwaway_key
from softsgx.paging import Fifo
from softsgx.sizes import parse_size
from softsgx.userland import SoftProcess

BASE = 0x7000_0000_0000
READ = 1
FLAGS = AttributesFlags.MODE64BIT.value | AttributesFlags.DEBUG.value
KEY = throwaway_key()
_CROWD_PAGES = 16


class Heap:
    """A process with an enclave of unmeasured pages."""

    def __init__(
        self, platform: Platform, pages: int, *, group: str = "/", init: bool = True
    ) -> None:
        self.process: SoftProcess = platform.process(group=group)
        plan = Blob().heap(pages).plan()
        attributes = Attributes(flags=FLAGS, xfrm=3)
        secs = Secs(size=plan.size, base=BASE, ssa_frame_size=1, attributes=attributes)
        fd = self.process.open()
        self.process.create(fd, secs.pack())
        for first in range(0, pages, 256):
            count = min(256, pages - first)
            data = os.urandom(PAGE_BYTES) * count
            self.process.add_pages(fd, first * PAGE_BYTES, data, SECINFO_RW, measure=False)
        if init:
            sigstruct = sign_plan(plan, KEY, SignOptions(attributes=FLAGS))
            self.process.init(fd, sigstruct.pack())
        self.process.mmap(fd, BASE, plan.size, 3)
        self.pages = pages

    def fault(self, index: int) -> None:
        """Repeat the fault until the page is mapped; waiting for a free page is included."""
        addr, mm = BASE + index * PAGE_BYTES, self.process.mm
        while (result := mm.fault(addr, READ, self.process)) is FaultResult.RETRY:
            pass
        assert result is FaultResult.NOPAGE, result


def sweep(heap: Heap, faults: int) -> Callable[[], None]:
    """Return an action: ``faults`` faults in turn, each on a page that was evicted."""
    order: Iterator[int] = iter(())

    def action() -> None:
        nonlocal order
        for _ in range(faults):
            index = next(order, None)
            if index is None:
                order = iter(range(heap.pages))
                index = next(order)
            heap.fault(index)

    return action


def bare(pairs: int) -> Callable[[], None]:
    """Return an action: bare AES-GCM calls of as many pairs."""
    aead, nonce, header = AESGCM(os.urandom(16)), bytes(12), bytes(128)
    plain = os.urandom(PAGE_BYTES)
    sealed = aead.encrypt(nonce, plain, header)

    def action() -> None:
        for _ in range(pairs):
            aead.encrypt(nonce, plain, header)
            aead.decrypt(nonce, sealed, header)

    return action


def in_turn(
    actions: dict[str, Callable[[], None]], rounds: int, per: int
) -> dict[str, list[float]]:
    """Run the actions in turn; return microseconds a part of each round."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter_ns()
            action()
            times[name].append((time.perf_counter_ns() - start) / per / 1000)
    return times


def fault_pair(rounds: int) -> dict[str, float]:
    """Return the cost of a fault with eviction beside bare crypto."""
    with Platform(epc="2MiB", policy="fifo") as platform:
        heap = Heap(platform, 1024)
        action = sweep(heap, 256)
        action()
        loaded, evicted = platform.core.counters.eldu, platform.core.counters.reclaimed
        times = in_turn({"fault_pair": action, "aesgcm_pair": bare(256)}, rounds, 256)
        loaded = platform.core.counters.eldu - loaded
        evicted = platform.core.counters.reclaimed - evicted
        assert loaded >= 256 * rounds * 0.95, f"{loaded} loads: the faults found pages resident"
        assert abs(evicted - loaded) <= 0.05 * loaded, f"{evicted} evictions, {loaded} loads"
    result = {f"{name}_us": min(values) for name, values in times.items()}
    result |= {f"{name}_median_us": statistics.median(v) for name, v in times.items()}
    result["ratio"] = result["fault_pair_us"] / result["aesgcm_pair_us"]
    return result


def reclaim_throughput(rounds: int) -> dict[str, float]:
    """Return pages a second that direct reclaim writes back."""
    best = 0.0
    with Platform(epc="8MiB", policy="fifo") as platform:
        heap = Heap(platform, 1024)
        for _ in range(rounds):
            for index in range(heap.pages):
                heap.fault(index)
            evicted, start = platform.core.counters.reclaimed, time.perf_counter()
            while platform.core.root.has_reclaimable():
                platform.core.reclaim()
            evicted = platform.core.counters.reclaimed - evicted
            best = max(best, evicted / (time.perf_counter() - start))
    return {"reclaim_pages_per_s": best, "reclaim_us": 1e6 / best}


def scaling_epc(rounds: int) -> dict[str, float]:
    """Return the pair's cost in small and large EPCs under one limit, and their ratio."""
    actions, platforms = {}, []
    for name, epc in (("epc_16MiB", "16MiB"), ("epc_64GiB", "64GiB")):
        platform = Platform(epc=epc, policy="fifo", groups={"jobs": {"max": "2MiB"}})
        platform.start()
        platforms.append(platform)
        actions[name] = sweep(Heap(platform, 1024, group="jobs"), 256)
        actions[name]()
    times = in_turn(actions, rounds, 256)
    for platform in platforms:
        platform.stop()
    small, large = (min(values) for values in times.values())
    return {"epc_16MiB_us": small, "epc_64GiB_us": large, "scaling_epc": large / small}


def scaling_enclaves(rounds: int, count: int) -> dict[str, float]:
    """Return the pair's cost with one enclave and with ``count``, and their ratio."""
    rng = random.Random(1)
    alone = Platform(epc="8MiB", policy="fifo")
    # SECS and VA pages of all enclaves stay, so that both sides do the same work for a fault.
    # Each enclave's pages are used together, so that one tracking cycle serves as many evictions.
    crowd = Platform(epc=(2 * count + 600) * PAGE_BYTES, policy=Fifo(evict_va=False))
    alone.start()
    crowd.start()
    one = sweep(Heap(alone, 4096), 256)
    one()
    heaps = [Heap(crowd, _CROWD_PAGES, init=False) for _ in range(count)]

    def many() -> None:
        for heap in rng.sample(heaps, 256 // _CROWD_PAGES):
            for index in range(_CROWD_PAGES):
                heap.fault(index)

    many()
    loaded = crowd.core.counters.eldu
    times = in_turn({"one": one, "many": many}, rounds, 256)
    loaded = crowd.core.counters.eldu - loaded
    assert loaded > 0.9 * 256 * rounds, f"{loaded} loads: the crowd's pages were resident"
    crowd.check()
    alone.stop()
    crowd.stop()
    single, crowded = (min(values) for values in times.values())
    return {
        "enclaves": count,
        "one_enclave_us": single,
        "many_enclaves_us": crowded,
        "scaling_enclaves": crowded / single,
    }


def va_eviction(enclave: int, *, on_disk: bool) -> dict[str, float]:
    """Return the cost of filling and reading an enclave with more VA pages than EPC."""
    epc = max(enclave * 187 // (128 << 10) // PAGE_BYTES, 64) * PAGE_BYTES
    pages = enclave // PAGE_BYTES
    with Platform(epc=epc, policy="fifo", backing="file" if on_disk else "memory") as platform:
        start = time.perf_counter()
        heap = Heap(platform, pages, init=False)
        filled = time.perf_counter() - start
        rng = random.Random(1)
        faults = min(pages, 4000)
        start = time.perf_counter()
        for index in rng.sample(range(pages), faults):
            heap.fault(index)
        spent = time.perf_counter() - start
        platform.check()
        return {
            "enclave_bytes": enclave,
            "epc_bytes": epc,
            "va_bytes_needed": pages * 8,
            "va_evictions": platform.core.counters.va_out,
            "fill_us_per_page": filled / pages * 1e6,
            "random_fault_us": spent / faults * 1e6,
        }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and enclaves")
    parser.add_argument("--enclave", default="1GiB", help="of the VA eviction (default 1GiB)")
    args = parser.parse_args()
    rounds = 5 if args.quick else 20
    enclave = parse_size("64MiB" if args.quick else args.enclave)
    result: dict[str, object] = dict(fault_pair(rounds))
    result |= reclaim_throughput(3)
    result |= scaling_epc(rounds)
    result |= scaling_enclaves(rounds, 1000 if args.quick else 10_000)
    result["va"] = va_eviction(enclave, on_disk=enclave > 8 << 30)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, value in result.items():
        if isinstance(value, dict):
            for key, figure in value.items():
                print(f"{name + '.' + key:28} {figure:14.2f}")
        else:
            print(f"{name:28} {value:14.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
