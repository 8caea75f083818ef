"""Numbers of events in the core.

Source:
    Mainline Linux counts none of this; the names are those its patches have proposed.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

from softsgx.compiled import record, speedups
from softsgx.ondemand import dataclass, field, field_names

__all__ = ["Counters", "Tally"]

if TYPE_CHECKING or speedups is None:
    Tally = dict[str, int]
else:

    class Tally(speedups.Tally, MutableMapping[str, int]):
        """Counts by label, as a dictionary has them; C code adds to them."""

        __slots__ = ()

        def __repr__(self) -> str:
            return repr(dict(self))

        def __reduce__(self) -> tuple[Any, tuple[()], None, None, Iterable[tuple[str, int]]]:
            return type(self), (), None, None, iter([*self.items()])

    speedups.give("Tally", Tally)


@dataclass(slots=True)
@record
class Counters:
    """Events since the core was made; each number only grows, except ``held``.

    Attributes:
        held: pages allocated now, by kind (``secs``, ``va``, ``reg``, ``tcs``, ``vepc``).
        batches: reclaim batches; ``scanned``: pages that they isolated.  Of these ``young``,
            ``not_prepared`` (no backing, no VA slot), ``kept`` (for a thread that holds),
            ``not_blocked`` and ``not_written`` went back to their list, ``dying`` had an owner that
            was being destroyed, ``reclaimed`` were evicted.
        ewb_first, ewb_second, ewb_third: evictions, by the try that succeeded.
        ewb_failed: evictions that failed.
        etrack, prev_trk_incmpl, kicks: ETRACKs, those that returned PREV_TRK_INCMPL, rounds of
            interrupts.
        eldu, eldu_failed: pages loaded; loads refused by MAC, fault or backing.
        secs_out, secs_in, va_out, va_in: SECS and VA pages evicted and loaded.
        va_made: VA pages made by EPA.
        truncated, pcmd_truncated: backing pages freed; those of them that held PCMDs.
        lost: pages whose content no longer exists (power loss, or a defect).
        alloc_busy, alloc_none, alloc_interrupted: refused allocations.
        direct: batches that an allocation ran itself.
        claims: turns of threads that thrashed.
        wakeups: times that ksgxd was woken.
        leaked: pages that EREMOVE refused.
        unsanitized: pages left after sanitizing.
    """

    held: MutableMapping[str, int] = field(default_factory=Tally)
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
        """Return a copy of the counters by name."""
        values = {name: getattr(self, name) for name in field_names(Counters)}
        return {**values, "held": dict(self.held)}
