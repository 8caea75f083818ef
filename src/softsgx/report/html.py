"""A run as one page that opens offline: verdict, residency and paging over time, costs.

See :mod:`~softsgx.report.elements` for the parts of pages.
"""

from __future__ import annotations

import shlex
from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from operator import itemgetter

from softsgx.arch import PAGE_BYTES
from softsgx.report.charts import COLOURS, Mark, Series, lines, shares
from softsgx.report.elements import (
    document_page,
    figure,
    prices_table,
    silicon_figure,
    table,
    tiles,
)
from softsgx.report.sampler import Sample
from softsgx.report.summary import EnclaveSummary, GroupSummary, RunSummary, pager_text
from softsgx.report.tables import cycles_text, seconds_text
from softsgx.report.verdict import Verdict, verdict
from softsgx.sizes import size_text

__all__ = ["html_page"]

_MIB = 1 << 20
_SHOWN = 11
_MOST_ROWS = 100
_MOST_BINS = 120
_BLUE, _ORANGE, _GREEN, _RED = COLOURS[:4]
_GREY = "var(--quiet)"
_FIRST_TOUCHES = ("minor", "augment")
"""Kinds of faults that load nothing: the page is resident and not mapped yet, or EAUG makes it."""


def html_page(run: RunSummary, samples: Sequence[Sample]) -> str:
    """Return the page.

    Args:
        run: the summary.
        samples: in order of time; without two of them there are no charts over time.
    """
    title, judged = shlex.join(run.command), verdict(run)
    parts = [
        f"<h1><code>{escape(title)}</code></h1>",
        f"<p>{escape(_ended(run))}</p>",
        f"<p class='verdict {judged.fit}'>{_verdict_text(judged)}</p>",
        _warning(run),
        _tiles(run),
        _residency(run, samples),
        _rates(run, samples),
        _times(run),
        silicon_figure(
            run.estimate, "On silicon (estimated)", "beside what the code itself computes"
        ),
        _enclaves(run),
        _groups(run),
        prices_table(
            run.estimate.profile.basis_text,
            [item.price for item in run.estimate.items],
            [item.count for item in run.estimate.items],
        ),
        _circumstances(run),
    ]
    return document_page(title, parts)


def _ended(run: RunSummary) -> str:
    ended = f"exit status {run.exit_status}" if run.signal is None else f"ended by {run.signal}"
    began = run.began.replace("T", " ").replace("+00:00", " UTC")
    return f"{ended} after {seconds_text(run.wall_s)}" + (f"; began {began}" if began else "")


def _verdict_text(judged: Verdict) -> str:
    """Return the verdict with its option as code, which no line break divides."""
    text, option = escape(judged.text), escape(judged.next_option or "")
    return text.replace(option, f"<code class='option'>{option}</code>") if option else text


def _warning(run: RunSummary) -> str:
    defects = ", ".join(run.platform.defects)
    return f"<p class='warn'>Defects switched on: {escape(defects)}</p>" if defects else ""


def _tiles(run: RunSummary) -> str:
    platform, judged = run.platform, verdict(run)
    entries = sum(enclave.eenter for enclave in run.enclaves)
    used = 100 * platform.peak_epc_bytes / platform.epc_bytes if platform.epc_bytes else 0
    fault_s = sum(enclave.fault_s for enclave in run.enclaves)
    silicon = "of SGX events on silicon, estimated"
    if judged.evictions:
        silicon += f"; paging: {_percent(100 * judged.silicon)} of that run"
    values = [
        (
            size_text(platform.peak_epc_bytes),
            f"of {size_text(platform.epc_bytes)} EPC used at most ({_percent(used)})",
        ),
        _pages_tile(judged.evictions, "left the EPC", "no page left the EPC"),
        _pages_tile(judged.reloads, "came back", "no page was loaded again"),
        _faults_tile(run),
        (seconds_text(fault_s), f"in page faults: {_percent(100 * judged.here)} of the run here"),
        (f"{entries:,}", "calls into enclaves (EENTER)"),
        (seconds_text(run.estimate.seconds), silicon),
        (f"{judged.touched:,}", f"pages touched; {judged.added:,} were added"),
    ]
    return tiles(values)


def _pages_tile(pages: int, what: str, none: str) -> tuple[str, str]:
    if not pages:
        return "0", none
    return f"{pages:,}", f"pages {what}: {size_text(pages * PAGE_BYTES)} in all"


def _faults_tile(run: RunSummary) -> tuple[str, str]:
    """Group page faults by their effect: a first touch costs little, a reload is paging."""
    faults = sum(enclave.fault_count for enclave in run.enclaves)
    touches = sum(enclave.faults[kind] for enclave in run.enclaves for kind in _FIRST_TOUCHES)
    reloads = sum(enclave.faults["major"] for enclave in run.enclaves)
    kinds = [f"{touches:,} first touches", f"{reloads:,} reloads"]
    if faults > touches + reloads:
        kinds.append(f"{faults - touches - reloads:,} others")
    return f"{faults:,}", f"page faults: {', '.join(kinds)}"


def _percent(percent: float) -> str:
    digits = 0 if percent >= 10 or not percent else 1
    return f"{percent:.{digits}f}\N{NO-BREAK SPACE}%"


# --- charts -------------------------------------------------------------------------------------


def _residency(run: RunSummary, samples: Sequence[Sample]) -> str:
    if len(samples) < 2 or samples[-1].time_s <= 0:
        return ""
    times = [sample.time_s for sample in samples]
    ranked = sorted(run.enclaves, key=lambda enclave: enclave.peak_resident_bytes, reverse=True)
    shown = sorted(enclave.number for enclave in ranked[:_SHOWN])
    series = [
        Series(
            f"enclave {number}",
            [_mib(sample.resident.get(number, 0)) for sample in samples],
            colour,
        )
        for colour, number in zip(COLOURS, shown, strict=False)
    ]
    series.append(Series("all in use", [_mib(sample.used_pages) for sample in samples], _GREY))
    name, limit = _limit_of(run)
    highest = max(sample.used_pages for sample in samples) * PAGE_BYTES
    near = limit < 3 * highest
    mark = Mark(f"{name} {size_text(limit)}", limit / _MIB) if near else None
    note = "Pages of each enclave, and all that is in use: SECS and VA pages too."
    if len(ranked) > _SHOWN:
        note += f" The {_SHOWN} largest of {len(ranked)} enclaves."
    if not near:
        note += f" The {name} of {size_text(limit)} is far above."
    return figure("Resident in the EPC", note, lines(times, series, unit="MiB", mark=mark))


def _limit_of(run: RunSummary) -> tuple[str, int]:
    """Return what made pages leave: the name and the bytes of a group's limit, or of the EPC."""
    limited = verdict(run).limited_by
    for group in run.groups:
        if group.path in limited and group.max_bytes is not None:
            return f"limit of {group.path}", group.max_bytes
    return "EPC", run.platform.epc_bytes


def _rates(run: RunSummary, samples: Sequence[Sample]) -> str:
    if len(samples) < 2 or samples[-1].time_s <= 0:
        return ""
    # Coarser than the samples, and even: single faults would only be noise.
    end = samples[-1].time_s
    bins = max(2, min(_MOST_BINS, len(samples) // 2))
    times = [number * end / (bins - 1) for number in range(bins)]
    paged = any(enclave.evictions for enclave in run.enclaves)
    counts = [
        ("other faults", [max(0, one.faults - one.reloads) for one in samples], _BLUE),
        ("evictions", [one.evictions for one in samples], _ORANGE),
        ("reloads", [one.reloads for one in samples], _GREEN),
    ]
    series = []
    for name, sums, colour in counts if paged else [("faults", counts[0][1], _BLUE)]:
        known = [(one.time_s, count) for one, count in zip(samples, sums, strict=True)]
        borders = [_interpolated(known, number * end / bins) for number in range(bins + 1)]
        rates = [(after - before) * bins / end for before, after in pairwise(borders)]
        series.append(Series(name, rates, colour))
    heading = "Paging" if paged else "First touches"
    note = "Pages of enclaves, per second. Other faults load nothing: first touches, and waits."
    if not paged:
        note = "No page left the EPC: these page faults map pages that are there, per second."
    return figure(heading, note, lines(times, series, unit="/s"))


def _interpolated(known: Sequence[tuple[float, int]], at: float) -> float:
    """Return the value at a time, on the straight line between the known ones around it."""
    index = bisect_left(known, at, key=itemgetter(0))
    if index == 0 or index == len(known):
        return known[min(index, len(known) - 1)][1]
    (before_s, before), (after_s, after) = known[index - 1], known[index]
    if after_s == before_s:
        return after
    return before + (after - before) * (at - before_s) / (after_s - before_s)


def _times(run: RunSummary) -> str:
    faults = sum(enclave.fault_s for enclave in run.enclaves)
    faults, reclaim = min(faults, run.wall_s), min(run.platform.reclaim_s, run.wall_s)
    ours = max(run.supervisor_s - faults - reclaim, 0.0)
    idle = max(run.wall_s - run.program_s - faults - reclaim - ours, 0.0)
    parts = (
        ("program", run.program_s, _GREEN),
        ("page faults", faults, _ORANGE),
        ("reclaim", reclaim, _RED),
        ("rest of softsgx", ours, _BLUE),
        ("waiting", idle, _GREY),
    )
    note = (
        "Page faults and reclaim are softsgx at work while the program waits; the rest of softsgx "
        "is tracing, crossings and ioctls."
    )
    chart = shares([(f"{name} {seconds_text(s)}", s, colour) for name, s, colour in parts])
    return figure("Where the time went here", note, chart)


def _mib(pages: int) -> float:
    return pages * PAGE_BYTES / _MIB


# --- tables -------------------------------------------------------------------------------------


def _enclaves(run: RunSummary) -> str:
    if not run.enclaves:
        return ""
    paging = (
        *("enclave", "MRENCLAVE", "group", "size", "added", "touched", "peak resident"),
        *("first touches", "evictions", "reloads", "others", "in faults"),
    )
    leaves = (
        *("enclave", "EENTER", "EEXIT", "AEX", "ERESUME", "EWB", "ETRACK", "IPI"),
        "cycles on silicon",
    )
    ranked = sorted(run.enclaves, key=lambda enclave: enclave.fault_count, reverse=True)
    shown = sorted(ranked[:_MOST_ROWS], key=lambda enclave: enclave.number)
    note = "Pages added and touched; faults by what they did: first touches load nothing."
    if len(ranked) > _MOST_ROWS:
        note += f" The {_MOST_ROWS} of {len(ranked)} enclaves with the most faults; JSON has all."
    first = table("Enclaves", note, paging, [_paging_row(one) for one in shown], text=(0, 1, 2))
    note = "How often each leaf was executed; IPI counts rounds of interrupts."
    rows = [_leaves_row(one) for one in shown]
    return first + table("Crossings and leaves", note, leaves, rows, text=(0,))


def _paging_row(enclave: EnclaveSummary) -> tuple[str, ...]:
    state = "" if enclave.state == "initialized" else f" ({enclave.state})"
    touches = sum(enclave.faults[kind] for kind in _FIRST_TOUCHES)
    others = enclave.fault_count - touches - enclave.faults["major"]
    return (
        f"{enclave.number}{state}",
        "" if enclave.mrenclave is None else f"{enclave.mrenclave[:8]}…",
        enclave.group,
        size_text(enclave.size_bytes),
        f"{enclave.pages_added:,}",
        f"{enclave.pages_touched:,}",
        size_text(enclave.peak_resident_bytes),
        *(f"{count:,}" for count in (touches, enclave.evictions, enclave.reloads, others)),
        seconds_text(enclave.fault_s),
    )


def _leaves_row(enclave: EnclaveSummary) -> tuple[str, ...]:
    crossings = (enclave.eenter, enclave.eexit, enclave.aex, enclave.eresume)
    counts = (*crossings, enclave.ewb, enclave.etrack, enclave.ipi)
    cycles = cycles_text(enclave.estimate.typical)
    return f"{enclave.number}", *(f"{count:,}" for count in counts), cycles


def _groups(run: RunSummary) -> str:
    rows = [
        (
            group.path,
            _limit(group, run),
            size_text(group.peak_bytes),
            f"{group.refused:,}",
        )
        for group in run.groups
    ]
    note = "A charge that a limit refuses makes a page of the group leave."
    return table("Limits", note, ("group", "limit", "peak", "charges refused"), rows, text=(0,))


def _limit(group: GroupSummary, run: RunSummary) -> str:
    if group.max_bytes is not None:
        return size_text(group.max_bytes)
    root = group.path == "/"
    return f"the EPC: {size_text(run.platform.epc_bytes)}" if root else "none"


def _circumstances(run: RunSummary) -> str:
    platform = run.platform
    facts = [
        ("began", run.began),
        ("softsgx", run.version),
        ("options", shlex.join(run.options) or "none"),
        ("machine", f"{platform.profile}, {size_text(platform.epc_bytes)} of EPC"),
        ("processors", str(platform.processors)),
        ("engine", f"{platform.engine}, pager {pager_text(platform)}"),
        ("defects", ", ".join(platform.defects) or "none switched on"),
        *(
            (f"MRENCLAVE of {enclave.number}", enclave.mrenclave)
            for enclave in run.enclaves[:_MOST_ROWS]
            if enclave.mrenclave
        ),
    ]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>"
        for name, value in facts
        if value
    )
    return (
        f"<section><h2>This run</h2><dl>{items}</dl><p>softsgx is an emulation: it protects "
        "nothing from the owner of the machine.</p></section>"
    )
