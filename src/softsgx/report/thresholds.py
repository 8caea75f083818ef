"""Thresholds on the figures of a run: ``evictions>0``, ``platform.peak_epc_bytes>16MiB``.

A threshold is a field of the JSON document, a comparison and a value.  A field is its names joined
by dots.  A field of ``verdict`` needs no ``verdict.``; in an array each element has the field, and
one that satisfies the comparison is enough.  A value is a number, a size with a unit, or, with
``==`` and ``!=``, a word.  A field that is ``null`` satisfies nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from operator import eq, ge, gt, le, lt, ne
from typing import Any

from softsgx.costs import COST_PROFILES, estimate
from softsgx.engines.native.injector import Injected
from softsgx.errors import SoftSgxError
from softsgx.paging.counters import Counters
from softsgx.report.run_document import document
from softsgx.report.summary import (
    FAULT_KINDS,
    EnclaveSummary,
    GroupSummary,
    PlatformSummary,
    RunSummary,
)
from softsgx.sizes import parse_size

__all__ = ["Threshold"]

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": ge,
    "<=": le,
    "==": eq,
    "!=": ne,
    ">": gt,
    "<": lt,
}
_TEXT = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(>=|<=|==|!=|>|<)\s*(\S.*?)\s*", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?", re.ASCII)
_EXAMPLE = "not a comparison; write FIELD>VALUE, such as evictions>0"
_SHORT = "verdict"


@dataclass(frozen=True, slots=True)
class Threshold:
    """See the module.

    Attributes:
        text: as it was written.
        field: names from the top of the document.
        comparison: one of the six signs.
        value: what the field is compared with.
    """

    text: str
    field: tuple[str, ...]
    comparison: str
    value: float | str

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Return the threshold that a text means.

        Raises:
            SoftSgxError: it has another form, no run has such a field, or the field has values of
                another kind.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise SoftSgxError(f"threshold {text!r}: {_EXAMPLE}")
        name, comparison, written = found.groups()
        example = _example_document()
        field = tuple(name.split("."))
        if field[0] not in example and field[0] in example[_SHORT]:
            field = (_SHORT, *field)
        try:
            values = list(_values(example, field))
        except KeyError as error:
            raise SoftSgxError(_unknown(text, field, example)) from error
        known = [one for one in values if one is not None]
        if any(isinstance(one, dict | list) for one in known):
            raise SoftSgxError(f"threshold {text!r}: {name} is no single value; name a field of it")
        value: float | str = written
        if any(isinstance(one, str) for one in known):
            if comparison not in ("==", "!="):
                raise SoftSgxError(f"threshold {text!r}: {name} is a word; compare it by == or !=")
        else:
            value = _number(text, written)
        return cls(text, field, comparison, value)

    def exceeded(self, run: Mapping[str, Any]) -> str | None:
        """Return what a run's document has that satisfies the comparison, ``None`` if nothing."""
        compare = _COMPARISONS[self.comparison]
        for value in _values(run, self.field, absent=0):
            if value is None or isinstance(value, str) != isinstance(self.value, str):
                continue
            if compare(value, self.value):
                return f"{'.'.join(self.field)} is {value}"
        return None


def _number(text: str, written: str) -> float:
    if _NUMBER.fullmatch(written):
        return float(written) if "." in written else int(written)
    try:
        return parse_size(written)
    except ValueError:
        raise SoftSgxError(
            f"threshold {text!r}: {written!r} is not a number or a size; write 4096 or 16MiB"
        ) from None


def _values(document: Any, field: tuple[str, ...], *, absent: object = None) -> Iterator[Any]:
    """Yield the values of a field.

    Args:
        document: what it is a field of.
        field: the names that are left.
        absent: the value of a count that the document lacks, since nothing was counted; without
            it such a name is unknown.

    Raises:
        KeyError: there is no such field.
    """
    if isinstance(document, list):
        for element in document:
            yield from _values(element, field, absent=absent)
    elif not field:
        yield document
    elif not isinstance(document, dict) or (field[0] not in document and document):
        if absent is None:
            raise KeyError(field[0])
        yield absent
    else:  # an empty object has its names only when something was counted
        yield from _values(document.get(field[0], absent), field[1:], absent=absent)


def _unknown(text: str, field: tuple[str, ...], example: dict[str, Any]) -> str:
    known = [".".join(path) for path in _fields(example)]
    close = get_close_matches(".".join(field), known, n=1, cutoff=0.5)
    advice = f"did you mean {close[0]}?" if close else "see softsgx run --json"
    return f"threshold {text!r}: no run has the field {'.'.join(field)}; {advice}"


def _fields(document: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(document, list):
        for element in document:
            yield from _fields(element, before)
    elif isinstance(document, dict):
        for name, value in document.items():
            yield from _fields(value, (*before, name))
    else:
        yield before


def _example_document() -> dict[str, Any]:
    """Return the document of a made-up run that has every field."""
    profile = next(iter(COST_PROFILES.values()))
    priced = estimate(dict.fromkeys(profile.prices, 1), profile)
    enclave = EnclaveSummary(
        number=1,
        base=0,
        size_bytes=0,
        group="/",
        state="initialized",
        created_s=0.0,
        initialized_s=0.0,
        released_s=0.0,
        mrenclave="",
        pages_added=0,
        pages_touched=0,
        resident_bytes=0,
        peak_resident_bytes=0,
        faults=dict.fromkeys(FAULT_KINDS, 0),
        evictions=0,
        reloads=0,
        ewb=0,
        etrack=0,
        ipi=0,
        eenter=0,
        eexit=0,
        aex=0,
        eresume=0,
        fault_s=0.0,
        estimate=priced,
    )
    platform = PlatformSummary(
        epc_bytes=1 << 30,
        peak_epc_bytes=1 << 30,  # so that the verdict advises less
        processors=1,
        profile=profile.name,
        engine="native",
        pager="userfaultfd",
        fault_delivery="events",
        defects=("",),
        reclaim_s=0.0,
        counters=Counters().as_dict(),
    )
    run = RunSummary(
        command=("",),
        exit_code=0,
        wall_s=0.0,
        supervisor_s=0.0,
        program_s=0.0,
        enclaves=(enclave,),
        groups=(GroupSummary("/", 0, 0, 0),),
        platform=platform,
        estimate=priced,
        injected=Injected().as_dict(),
        options=("",),
    )
    made = document(run)
    ended = document(replace(run, exit_code=-9))
    return made | {"signal": ended["signal"]}
