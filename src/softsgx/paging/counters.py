"""What the core counts beside its state: how often things happened.

Source:
    Mainline Linux counts none of this; the names are those its patches have proposed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

__all__ = ["Counters"]


@dataclass(slots=True)
class Counters:
    """Events since the core was made; only ever grows, except ``held``.

    Attributes:
        held: pages handed out now, by kind (``secs``, ``va``, ``reg``, ``tcs``, ``vepc``).
        batches: batches of reclaim; ``scanned`` pages isolated, of which ``young`` and
            ``not_prepared`` (no backing, no VA slot), ``kept`` (for a thread that holds),
            ``not_blocked`` and ``not_written`` went back, ``dying`` were forgotten, ``reclaimed``
            left.
        ewb_first, ewb_second, ewb_third: evictions by the try that succeeded.
        ewb_failed: evictions that did not.
        etrack, prev_trk_incmpl, kicks: tracking cycles begun, refused, rounds of interrupts.
        eldu, eldu_failed: pages loaded; refused by MAC, fault or backing.
        secs_out, secs_in, va_out, va_in: those of them that were SECS and VA pages.
        va_made: EPA.
        truncated, pcmd_truncated: backing pages given back.
        lost: pages whose content no longer exists (power loss, or a defect).
        alloc_busy, alloc_none, alloc_interrupted: refused allocations.
        direct: batches that an allocation had to wait for.
        claims: turns of threads that were thrashes of what they had loaded.
        wakeups: times that ksgxd was woken.
        leaked: pages that EREMOVE refused.
        unsanitized: pages left after sanitizing.
    """

    held: dict[str, int] = field(default_factory=dict)
    batches: int = 0
    scanned: int = 0
    young: int = 0
    not_prepared: int = 0
    kept: int = 0
    not_blocked: int = 0
    not_written: int = 0
    dying: int = 0
    reclaimed: int = 0
    ewb_first: int = 0
    ewb_second: int = 0
    ewb_third: int = 0
    ewb_failed: int = 0
    etrack: int = 0
    prev_trk_incmpl: int = 0
    kicks: int = 0
    eldu: int = 0
    eldu_failed: int = 0
    secs_out: int = 0
    secs_in: int = 0
    va_out: int = 0
    va_in: int = 0
    va_made: int = 0
    truncated: int = 0
    pcmd_truncated: int = 0
    lost: int = 0
    alloc_busy: int = 0
    alloc_none: int = 0
    alloc_interrupted: int = 0
    direct: int = 0
    claims: int = 0
    wakeups: int = 0
    leaked: int = 0
    unsanitized: int = 0

    def as_dict(self) -> dict[str, object]:
        """Return all of them by name, a copy."""
        return asdict(self)
