"""No failing request of a backing store loses a byte, ends another enclave, or stops the platform.

Method: two enclaves and a guest with one share an EPC that is too small for them, on a platform
on which the n-th request of a kind fails, for every n.  An enclave may get SIGBUS, with the
reason; a thread that tries again then finds its bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest
from tests.support.driver import Launched, launch, pattern
from tests.support.failing import DISK_FAILURES, MEMORY_FAILURES, Fate

from softsgx.host import Platform
from softsgx.userland import Signal

PAGES = 4
_TRIES = 20


def workload(fate: Fate) -> int:
    """Write and read every page of three enclaves; return how many signals there were."""
    signals = 0
    with Platform(epc="100KiB", make_backing=fate.backing) as platform:
        guest = platform.guest("a", epc="100KiB")
        made = [launch(platform.process(), PAGES) for _ in range(2)]
        made.append(launch(guest.process(), PAGES))
        for salt in (0, 100):
            for enclave in made:
                signals += attempt(enclave, salt)
        platform.check()
        for enclave in made:
            enclave.process.exit()
        platform.remove_guest(guest)
        platform.check()
        assert platform.core.free_pages == platform.core.epc_pages
    return signals


def attempt(enclave: Launched, salt: int) -> int:
    """Let a thread check what was there and store what comes next."""
    thread = enclave.process.thread()
    signals = trying(lambda: thread.enter(enclave.tcs()), enclave)
    for number in range(PAGES):
        at = enclave.data(number)
        before: list[bytes] = []
        signals += trying(lambda at=at, b=before: b.append(thread.load(at, 64)), enclave)  # type: ignore[misc]
        assert before == [pattern(salt + number)[:64]], f"page {number} is stale or lost"
        after = pattern(salt + 100 + number)[:64]
        signals += trying(lambda at=at, a=after: thread.store(at, a), enclave)  # type: ignore[misc]
    signals += trying(thread.exit, enclave)
    return signals


def trying(step: Callable[[], object], enclave: Launched) -> int:
    """Repeat a step until no signal interrupts it; return how many did."""
    for signals in range(_TRIES):
        try:
            step()
        except Signal as signal:
            told = signal.name, bool(enclave.enclave.refusal)
        else:
            return signals
        assert told == ("SIGBUS", True), "an enclave is refused without a reason"
    raise AssertionError("one failure is held against an enclave again and again")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*MEMORY_FAILURES, *DISK_FAILURES])
def test_no_single_failure_loses_a_byte(kind: str) -> None:
    signals = 0
    for nth in count(1):
        fate = Fate(kind, nth)
        signals += workload(fate)
        if not fate.failed:
            break
    assert nth > 10, "the workload asks too little of its backing"
    assert (signals > 0) == (kind in ("open", "read", "short read")), f"{signals} signals"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("reserve", "fails on command"),
        ("allocate", "the backing file cannot grow: No space left on device"),
        ("write", "the backing file cannot be written: No space left on device"),
    ],
)
def test_a_store_that_never_works_is_named_and_others_go_on(kind: str, why: str) -> None:
    fate = Fate(kind, 1, lasting=True)
    with Platform(epc="128KiB", make_backing=fate.backing) as platform:
        small = launch(platform.process(), 4)
        thread = small.thread()
        told = f"the EPC of 32 pages has no free page, and none can be evicted, because {why}"
        large = platform.process()
        with pytest.raises(OSError, match=f"{told}$"):
            launch(large, 60)
        platform.check()
        large.exit()
        for number in range(4):
            assert thread.load(small.data(number), 64) == pattern(number)[:64]
        platform.check()
        small.process.exit()
