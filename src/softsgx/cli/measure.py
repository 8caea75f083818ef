"""Measure an enclave file, and say whether its signature matches.

MRENCLAVE is computed from the pages in the order in which a loader adds them; no code is executed.
The SIGSTRUCT comes from --sigstruct, from the file, or from name.sig in the same directory.

Examples:
  softsgx measure enclave.signed.so
  softsgx measure enclave.sgxs --sigstruct release.sig
  softsgx measure --json enclave.signed.so | jq -r .mrenclave

More than --limit (128 GiB, about two minutes) is refused.
On a terminal, long measurements show their progress.

With --json: format, mrenclave, mrsigner, enclavehash (what the SIGSTRUCT expects), matches,
signature_valid, blocks_agree (all metadata blocks of an SDK library give the same mrenclave), size
(bytes), pages, tcs (offsets).  Without a SIGSTRUCT, mrsigner, enclavehash,
matches and signature_valid are null.

exit status: 0 the SIGSTRUCT matches, or the enclave has none; 1 it does not match, or metadata
blocks disagree; 2 the file cannot be read.
"""

from __future__ import annotations

import argparse
import sys

from softsgx.cli._common import print_json, size_bytes
from softsgx.image import (
    FORMATS,
    MEASURE_LIMIT_BYTES,
    EnclaveImage,
    check_signature,
    measure,
    mrsigner,
    open_image,
    same_measurement,
)

__all__ = ["NAME", "configure", "run"]

NAME = "measure"
_PROGRESS_FROM_BYTES = 1 << 30  # what is hashed in a few seconds needs no progress


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="the enclave file")
    parser.add_argument("--sigstruct", metavar="FILE", help="a bare SIGSTRUCT of 1808 bytes")
    parser.add_argument("--format", choices=list(FORMATS), help="of FILE (default: detected)")
    parser.add_argument(
        "--limit",
        type=size_bytes,
        metavar="SIZE",
        default=MEASURE_LIMIT_BYTES,
        help="the most bytes to hash (128GiB)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and compare."""
    image = open_image(args.file, args.sigstruct, file_format=args.format)
    progress = _print_progress if sys.stderr.isatty() else None
    mrenclave = measure(image.plan, limit_bytes=args.limit, progress=progress)
    different = _different(image, args.limit)
    sig = image.sigstruct
    matches = None if sig is None else sig.enclave_hash == mrenclave
    problem = None if sig is None else check_signature(sig)
    document: dict[str, object] = {
        "format": image.format,
        "mrenclave": mrenclave.hex(),
        "mrsigner": None if sig is None else mrsigner(sig).hex(),
        "enclavehash": None if sig is None else sig.enclave_hash.hex(),
        "matches": matches,
        "signature_valid": None if sig is None else problem is None,
        "blocks_agree": not different,
        "size": image.plan.size,
        "pages": image.plan.page_count,
        "tcs": list(image.plan.tcs),
    }
    if args.json:
        print_json(document)
    else:
        _print(document, image.sigstruct_from, problem)
        for name in different:
            print(f"metadata   {name} describes another enclave than {image.chosen}")
    return 0 if matches is not False and problem is None and not different else 1


def _different(image: EnclaveImage, limit_bytes: int) -> list[str]:
    """Return the metadata blocks that describe another enclave than the chosen block."""
    return [
        variant.name
        for variant in image.variants
        if variant.plan is not None
        and not same_measurement(image.plan, variant.plan, limit_bytes=limit_bytes)
    ]


def _print_progress(done: int, total: int) -> None:
    """Show the progress of a long measurement on one line of the terminal."""
    if total >= _PROGRESS_FROM_BYTES:
        end = "\n" if total - done < _PROGRESS_FROM_BYTES // 16 else ""
        share = done * 100 // total
        print(f"\rsoftsgx: measuring: {share} % of {total >> 20} MiB", end=end, file=sys.stderr)


def _print(document: dict[str, object], found: str, problem: str | None) -> None:
    print(f"format     {document['format']}")
    print(f"mrenclave  {document['mrenclave']}")
    if document["matches"] is None:
        print("sigstruct  none: give one with --sigstruct, or sign the enclave")
        return
    print(f"mrsigner   {document['mrsigner']}")
    print(f"sigstruct  {found}: {problem or 'its signature is valid'}")
    if document["matches"]:
        print("           it is for this enclave")
    else:
        print(f"           it is for another enclave: {document['enclavehash']}")
