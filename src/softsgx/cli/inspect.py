"""Show what is in an enclave file: pages, threads, signature, metadata.

All formats are told alike, as what a loader would do: runs of pages in the order in which they are
added, which of them are measured, the threads, the SIGSTRUCT field by field.

Examples:
  softsgx inspect enclave.signed.so
  softsgx inspect enclave.sgxs --sigstruct release.sig
  softsgx inspect release.sig
  softsgx inspect --json enclave.signed.so
"""

from __future__ import annotations

import argparse
from enum import IntFlag

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from softsgx.arch import AttributesFlags, MiscSelect, PageType, SecInfoFlags, SigStruct, Xfrm
from softsgx.cli._common import print_json
from softsgx.image import (
    FORMATS,
    MASK_ALL,
    MASK_NONE,
    Check,
    EnclaveImage,
    Fill,
    Run,
    Variant,
    bare_sigstruct,
    date_text,
    mrsigner,
    open_image,
    verify,
)

__all__ = ["NAME", "configure", "run"]

NAME = "inspect"
_SHOWN_TCS = 16
_SHOWN_RUNS = 200
_NARROWEST = 100  # a hash and its name fit: nobody wants half a hash


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="an enclave file, or a bare SIGSTRUCT")
    parser.add_argument("--sigstruct", metavar="FILE", help="a bare SIGSTRUCT of 1808 bytes")
    parser.add_argument("--format", choices=list(FORMATS), help="instead of recognising it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, _NARROWEST)
    bare = bare_sigstruct(args.file)
    if bare is not None:
        if args.json:
            print_json({"format": "sigstruct", "sigstruct": _sigstruct_document(bare)})
        else:
            console.print(_sigstruct_table(bare, args.file))
        return 0
    image = open_image(args.file, args.sigstruct, file_format=args.format)
    if args.json:
        print_json(_document(image))
        return 0
    _print_image(console, image)
    return 0


def _print_image(console: Console, image: EnclaveImage) -> None:
    plan = image.plan
    chosen = f", metadata {image.chosen}" if image.chosen else ""
    console.print(f"{image.name}: {image.format}{chosen}")
    console.print(
        f"size {plan.size:#x}, {plan.page_count} pages, SSA frames of {plan.ssa_frame_size} pages"
        + ("" if plan.base is None else f", base address {plan.base:#x}")
    )
    for name, value in image.facts:
        console.print(f"{name}: {value}")
    for note in image.notes:
        console.print(f"note: {note}")
    console.print(_runs_table(plan.runs))
    shown = ", ".join(f"{offset:#x}" for offset in plan.tcs[:_SHOWN_TCS])
    more = len(plan.tcs) - _SHOWN_TCS
    console.print(f"TCS ({len(plan.tcs)}): {shown}" + (f" and {more} more" if more > 0 else ""))
    for variant in image.variants:
        console.print(_variant_table(variant, chosen=variant.name == image.chosen))
        console.print(", ".join(f"{name} {value}" for name, value in variant.facts))
        if variant.problem:
            console.print(f"cannot be read: {variant.problem}")
    if image.sigstruct is None:
        console.print("SIGSTRUCT: none")
    else:
        console.print(_sigstruct_table(image.sigstruct, image.sigstruct_from))


def _table(title: str, *, show_header: bool = True) -> Table:
    return Table(
        title=Text(title),
        title_justify="left",
        title_style="bold",
        show_header=show_header,
        box=box.SIMPLE_HEAD,
    )


def _runs_table(runs: tuple[Run, ...]) -> Table:
    table = _table("pages, in the order of EADD")
    for name in ("offset", "pages", "type", "rights", "content", "measured", "what"):
        table.add_column(name, justify="right" if name in ("offset", "pages") else "left")
    for run in runs[:_SHOWN_RUNS]:
        table.add_row(*_run_row(run))
    more = len(runs) - _SHOWN_RUNS
    if more > 0:
        table.add_row("…", "", "", "", "", "", f"{more} more: see --json")
    return table


def _run_row(run: Run) -> tuple[str, ...]:
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


def _variant_table(variant: Variant, *, chosen: bool) -> Table:
    title = f"metadata {variant.name}" + (" (this one is used)" if chosen else "")
    table = _table(title)
    for name in ("item", "rva", "pages", "si_flags", "attributes"):
        table.add_column(name)
    for row in variant.layout:
        table.add_row(*row)
    return table


def _sigstruct_table(sig: SigStruct, where: str) -> Table:
    table = _table(f"SIGSTRUCT in {where}", show_header=False)
    table.add_column("field")
    table.add_column("value", overflow="fold")
    for name, value in _sigstruct_document(sig).items():
        table.add_row(name, str(value))
    return table


def _sigstruct_document(sig: SigStruct) -> dict[str, object]:
    def flags(kind: type[IntFlag], value: int, mask: int, digits: int) -> str:
        names = [bit.name for bit in kind if value & bit and bit.name]
        free = [bit.name for bit in kind if not mask & bit and bit.name]
        text = f"{value:#0{digits}x} {' '.join(names)}".rstrip()
        return f"{text}; mask {mask:#0{digits}x}" + (f", free: {' '.join(free)}" if free else "")

    checks: list[Check] = verify(sig)
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    return {
        "mrsigner": mrsigner(sig).hex(),
        "enclavehash": sig.enclave_hash.hex(),
        "vendor": f"{sig.vendor:#06x}",
        "date": date_text(sig.date),
        "swdefined": sig.swdefined,
        "attributes": flags(AttributesFlags, sig.attributes.flags, sig.attribute_mask.flags, 18),
        "xfrm": flags(Xfrm, sig.attributes.xfrm, sig.attribute_mask.xfrm, 18),
        "miscselect": flags(MiscSelect, sig.miscselect, sig.misc_mask, 10),
        "cet_attributes": f"{sig.cet_attributes:#04x}; mask {sig.cet_attributes_mask:#04x}",
        "isvprodid": sig.isv_prod_id,
        "isvsvn": sig.isv_svn,
        "isvfamilyid": sig.isv_family_id.hex(),
        "isvextprodid": sig.isv_ext_prod_id.hex(),
        "signature": "; ".join(failed) or "valid",
    }


def _document(image: EnclaveImage) -> dict[str, object]:
    columns = ("offset", "pages", "type", "rights", "content", "measured", "what")
    return {
        "format": image.format,
        "size": image.plan.size,
        "ssa_frame_size": image.plan.ssa_frame_size,
        "base": image.plan.base,
        "pages": image.plan.page_count,
        "runs": [dict(zip(columns, _run_row(run), strict=True)) for run in image.plan.runs],
        "tcs": list(image.plan.tcs),
        "facts": dict(image.facts),
        "notes": list(image.notes),
        "metadata": [
            {
                "version": variant.name,
                "used": variant.name == image.chosen,
                "problem": variant.problem or None,
                "facts": dict(variant.facts),
                "layout": [list(row) for row in variant.layout],
            }
            for variant in image.variants
        ],
        "sigstruct": None if image.sigstruct is None else _sigstruct_document(image.sigstruct),
    }
