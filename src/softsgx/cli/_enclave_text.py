"""Tables about enclave files, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from softsgx.arch import PageType, SecInfoFlags, Tcs
from softsgx.image import MASK_ALL, MASK_NONE, EnclaveImage, Fill, Plan, Run, Variant

__all__ = ["console", "fields_table", "print_image", "run_row", "threads"]

_SHOWN_TCS = 16
_SHOWN_ROWS = 200
_NARROWEST = 100  # a hash and its name fit on one line
_LONGEST_THREAD = 32  # runs
_TCS_FIELDS = ("flags", "oentry", "ossa", "nssa", "ofs_base", "ogs_base", "fs_limit", "gs_limit")


def console() -> Console:
    """Return the console for tables, on standard output."""
    made = Console(highlight=False, markup=False, soft_wrap=True)
    made.width = max(made.width, _NARROWEST)
    return made


def threads(plan: Plan) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield the offset and the fields of each TCS, in plan order."""
    for run in plan.runs:
        if not run.is_tcs:
            continue
        for index in range(run.pages):
            page = run.page(index)
            tcs = Tcs.unpack(page.data)
            yield page.offset, {name: getattr(tcs, name) for name in _TCS_FIELDS}


def print_image(out: Console, image: EnclaveImage) -> None:
    """Print everything but the SIGSTRUCT."""
    plan = image.plan
    chosen = f", metadata {image.chosen}" if image.chosen else ""
    out.print(f"{image.name}: {image.format}{chosen}")
    out.print(
        f"size {plan.size:#x}, {plan.page_count} pages, SSA frames of {plan.ssa_frame_size} pages"
        + ("" if plan.base is None else f", base address {plan.base:#x}")
    )
    for name, value in image.facts:
        out.print(f"{name}: {value}")
    for note in image.notes:
        out.print(f"note: {note}")
    out.print(_runs_table(plan.runs))
    out.print(_threads_table(plan))
    for variant in image.variants:
        out.print(_variant_table(variant, chosen=variant.name == image.chosen))
        out.print(", ".join(f"{name} {value}" for name, value in variant.facts))
        if variant.problem:
            out.print(f"cannot be read: {variant.problem}")


def fields_table(title: str, fields: Mapping[str, object]) -> Table:
    """Return names and values below a title."""
    table = _table(title, show_header=False)
    table.add_column("field")
    table.add_column("value", overflow="fold")
    for name, value in fields.items():
        table.add_row(name, str(value))
    return table


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        show_header=show_header,
        box=box.SIMPLE_HEAD,
    )


def _runs_table(runs: Sequence[Run]) -> Table:
    table = _table("pages, in the order of EADD")
    for name in ("offset", "pages", "type", "rights", "content", "measured", "what"):
        justify: JustifyMethod = "right" if name in ("offset", "pages") else "left"
        table.add_column(name, justify=justify, no_wrap=True)
    shown = 0
    for first, count, times in folded(runs):
        for run in runs[first : first + count]:
            table.add_row(*run_row(run))
        if times > 1:
            step = runs[first + count].offset - runs[first].offset
            table.add_row("…", f"× {times}", "", "", f"step {step:#x}", "", "repeated")
        shown += count
        if shown >= _SHOWN_ROWS:
            left = len(runs) - first - count * times
            if left:
                table.add_row("…", "", "", "", "", "", f"{left} more: see --json")
            break
    return table


def folded(runs: Sequence[Run]) -> Iterator[tuple[int, int, int]]:
    """Yield (first, count, times): ``count`` runs from ``first`` on, repeated ``times`` times.

    Repetitions are threads: each has a TCS, and pages of zeros or of a word.  Together they are
    all runs, in order.
    """
    kinds = [_kind(run) for run in runs]
    at = 0
    while at < len(runs):
        count, times = 1, 1
        for period in range(1, min(_LONGEST_THREAD, (len(runs) - at) // 2) + 1):
            found = _repeated(runs, kinds, at, period)
            if found > 1:
                count, times = period, found
                break
        yield at, count, times
        at += count * times


def _repeated(runs: Sequence[Run], kinds: Sequence[object], at: int, period: int) -> int:
    """Return how often the ``period`` runs at ``at`` follow each other, evenly spaced."""
    first = kinds[at : at + period]
    if None in first or not any(run.is_tcs for run in runs[at : at + period]):
        return 1
    step = runs[at + period].offset - runs[at].offset
    times = 1
    while True:
        start = at + times * period
        if kinds[start : start + period] != first or any(
            runs[start + nth].offset != runs[at + nth].offset + times * step
            for nth in range(period)
        ):
            return times
        times += 1


def _kind(run: Run) -> object:
    """Return the fields by which runs are compared; ``None``: the run has bytes of a file."""
    if isinstance(run.source, Fill):
        content: object = run.source.word
    elif run.is_tcs:
        content = "TCS"
    else:
        return None
    return (run.pages, run.flags, content, run.mask, run.label)


def run_row(run: Run) -> tuple[str, ...]:
    """Return the cells of a run's row."""
    rights = "".join(
        letter if run.flags & bit else "-"
        for letter, bit in (("r", SecInfoFlags.R), ("w", SecInfoFlags.W), ("x", SecInfoFlags.X))
    )
    content = "file"
    if isinstance(run.source, Fill):
        content = f"{run.source.word:#010x} repeated" if run.source.word else "zero"
    measured = {MASK_ALL: "yes", MASK_NONE: "no"}.get(run.mask, f"chunks {run.mask:#06x}")
    kind = PageType(run.page_type).name
    return (f"{run.offset:#x}", str(run.pages), kind, rights, content, measured, run.label)


def _threads_table(plan: Plan) -> Table:
    count = len(plan.tcs)
    table = _table(f"TCS ({count})")
    for name in ("offset", *_TCS_FIELDS):
        table.add_column(name, justify="right")
    for nth, (offset, fields) in enumerate(threads(plan)):
        if nth == _SHOWN_TCS:
            table.add_row("…", f"+{count - nth}")
            break
        table.add_row(f"{offset:#x}", *(f"{value:#x}" for value in fields.values()))
    return table


def _variant_table(variant: Variant, *, chosen: bool) -> Table:
    title = f"metadata {variant.name}" + (" (this one is used)" if chosen else "")
    table = _table(title)
    for name in ("item", "rva", "pages", "si_flags", "attributes"):
        table.add_column(name)
    for row in variant.layout:
        table.add_row(*row)
    return table
