"""Epochs: how the processor knows that no TLB can hold an evicted page.

Modelled: the manual says what tracking promises, not how it counts.  Each enclave has an epoch;
ETRACK starts the next one.  A logical processor remembers the epoch in which it entered, and each
page the epoch in which it was last blocked, restricted or retyped.  A page is tracked once every
processor that entered in or before that epoch has left.

Invariant: every processor inside entered in ``epoch`` or ``epoch - 1``, because ETRACK refuses
while ``prev_count`` is not zero.

Source:
    SDM vol. 3D, "EPC and Management of EPC Pages"; ``docs/internals/tracking.md``.
"""

from __future__ import annotations

from softsgx.hw.epcm import EpcPage
from softsgx.hw.secs import ResidentSecs

__all__ = ["TRACKED_AGE", "count_in", "count_out", "is_tracked", "start_cycle"]

TRACKED_AGE = 2
"""Epochs after which a page is tracked, whichever processors are inside."""


def count_in(enclave: ResidentSecs) -> int:
    """A processor enters: count it and return its entry epoch.  Call under the latch."""
    enclave.cur_count += 1
    return enclave.epoch


def count_out(enclave: ResidentSecs, entry_epoch: int) -> None:
    """A processor that entered in ``entry_epoch`` leaves.  Call under the latch."""
    if entry_epoch == enclave.epoch:
        enclave.cur_count -= 1
    else:
        assert entry_epoch == enclave.epoch - 1, "a processor inside is two epochs old"
        enclave.prev_count -= 1
    assert enclave.cur_count >= 0 <= enclave.prev_count, "more exits than entries"


def start_cycle(enclave: ResidentSecs) -> bool:
    """Begin the next epoch; ``False``, unchanged, while the previous cycle is incomplete."""
    if enclave.prev_count:
        return False
    enclave.epoch += 1
    enclave.prev_count, enclave.cur_count = enclave.cur_count, 0
    return True


def is_tracked(page: EpcPage, enclave: ResidentSecs) -> bool:
    """Return whether no processor can hold a translation older than the page's last block.

    An ETRACK that came before the block does not count, even if every processor has left since.
    """
    cycles = enclave.epoch - page.bepoch
    return cycles >= TRACKED_AGE or (cycles == 1 and enclave.prev_count == 0)
