"""Show what is in an enclave file: pages, threads, signature, metadata.

The output has the same form for all formats, that of a loader's work: runs of pages in the order
in which they are added, which of them are measured, the threads, the fields of the SIGSTRUCT.
Files about enclaves can be read as well: a bare SIGSTRUCT, a launch token (EINITTOKEN), a REPORT, a
quote (ECDSA or EPID).

Examples:
  softsgx inspect enclave.signed.so
  softsgx inspect enclave.sgxs --sigstruct release.sig
  softsgx inspect release.sig
  softsgx inspect quote.dat
  softsgx inspect --json enclave.signed.so

With --json, fields have numbers as well as text: in runs (offset_bytes, flags, mask), threads and
sigstruct.numbers.

exit status: 0; 1 the SIGSTRUCT given is for another enclave or not valid, metadata blocks describe
different enclaves, or a token or quote contradicts itself; 2 the file cannot be read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from enum import IntFlag

from softsgx.arch import AttributesFlags, MiscSelect, SigStruct, Xfrm
from softsgx.cli._common import print_json
from softsgx.cli._enclave_text import console, fields_table, print_image, run_row, threads
from softsgx.image import (
    FORMATS,
    Check,
    EnclaveImage,
    Evidence,
    Run,
    Variant,
    bare_sigstruct,
    check_signature,
    date_text,
    measure,
    mrsigner,
    open_image,
    read_bytes,
    read_evidence,
    same_measurement,
    verify,
)

__all__ = ["NAME", "configure", "run"]

NAME = "inspect"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="an enclave file, or a file about enclaves")
    parser.add_argument("--sigstruct", metavar="FILE", help="a bare SIGSTRUCT of 1808 bytes")
    parser.add_argument("--format", choices=list(FORMATS), help="of FILE (default: detected)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    if args.format is None:
        bare = bare_sigstruct(args.file)
        if bare is not None:
            return _show_sigstruct(args, bare)
        evidence = read_evidence(read_bytes(args.file))
        if evidence is not None:
            return _show_evidence(args, evidence)
    image = open_image(args.file, args.sigstruct, file_format=args.format)
    problems = list(_problems(image, given=args.sigstruct is not None))
    if args.json:
        print_json(_document(image, problems))
    else:
        out = console()
        print_image(out, image)
        if image.sigstruct is None:
            out.print("SIGSTRUCT: none")
        else:
            title = f"SIGSTRUCT in {image.sigstruct_from}"
            out.print(fields_table(title, _sigstruct_fields(image.sigstruct)))
        for problem in problems:
            out.print(f"problem: {problem}")
    return 1 if problems else 0


def _show_sigstruct(args: argparse.Namespace, sig: SigStruct) -> int:
    if args.json:
        print_json({"format": "sigstruct", "sigstruct": _sigstruct_document(sig)})
    else:
        console().print(fields_table(f"SIGSTRUCT in {args.file}", _sigstruct_fields(sig)))
    return 0


def _show_evidence(args: argparse.Namespace, evidence: Evidence) -> int:
    fields = dict(evidence.fields)
    if args.json:
        document: dict[str, object] = {"format": evidence.kind, "title": evidence.title}
        print_json({**document, "fields": fields, "problems": list(evidence.problems)})
    else:
        out = console()
        out.print(fields_table(f"{evidence.title}: {args.file}", fields))
        for problem in evidence.problems:
            out.print(f"problem: {problem}")
    return 1 if evidence.problems else 0


def _problems(image: EnclaveImage, *, given: bool) -> Iterator[str]:
    """Yield contradictions; only a SIGSTRUCT from --sigstruct is compared with the enclave."""
    for variant in image.variants:
        if variant.plan is not None and not same_measurement(image.plan, variant.plan):
            yield (
                f"metadata {variant.name} describes another enclave than {image.chosen}: "
                "loaders of another version would refuse it"
            )
    if given and image.sigstruct is not None:
        failed = check_signature(image.sigstruct)
        if failed is not None:
            yield f"SIGSTRUCT: {failed}"
        if image.sigstruct.enclave_hash != measure(image.plan):
            yield "SIGSTRUCT: it is for another enclave"


def _sigstruct_fields(sig: SigStruct) -> dict[str, object]:
    """Return the fields of a SIGSTRUCT as text."""

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


def _sigstruct_document(sig: SigStruct) -> dict[str, object]:
    """Return the fields of a SIGSTRUCT as text and as numbers."""
    numbers = {
        "vendor": sig.vendor,
        "date": sig.date,
        "attributes": sig.attributes.flags,
        "attribute_mask": sig.attribute_mask.flags,
        "xfrm": sig.attributes.xfrm,
        "xfrm_mask": sig.attribute_mask.xfrm,
        "miscselect": sig.miscselect,
        "misc_mask": sig.misc_mask,
        "cet_attributes": sig.cet_attributes,
        "cet_attributes_mask": sig.cet_attributes_mask,
    }
    return {**_sigstruct_fields(sig), "numbers": numbers}


def _document(image: EnclaveImage, problems: list[str]) -> dict[str, object]:
    return {
        "format": image.format,
        "size": image.plan.size,
        "ssa_frame_size": image.plan.ssa_frame_size,
        "base": image.plan.base,
        "pages": image.plan.page_count,
        "runs": [_run_document(run) for run in image.plan.runs],
        "tcs": list(image.plan.tcs),
        "threads": [{"offset": offset, **fields} for offset, fields in threads(image.plan)],
        "facts": dict(image.facts),
        "notes": list(image.notes),
        "problems": problems,
        "metadata": [_variant_document(variant, image.chosen) for variant in image.variants],
        "sigstruct": None if image.sigstruct is None else _sigstruct_document(image.sigstruct),
    }


def _run_document(run: Run) -> dict[str, object]:
    columns = ("offset", "pages", "type", "rights", "content", "measured", "what")
    words = dict(zip(columns, run_row(run), strict=True))
    numbers = {
        "offset_bytes": run.offset,
        "page_count": run.pages,
        "flags": run.flags,
        "mask": run.mask,
    }
    return {**words, **numbers}


def _variant_document(variant: Variant, chosen: str) -> dict[str, object]:
    return {
        "version": variant.name,
        "used": variant.name == chosen,
        "problem": variant.problem or None,
        "facts": dict(variant.facts),
        "layout": [list(row) for row in variant.layout],
    }
