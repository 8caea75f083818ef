"""Measure an enclave file, and say whether its signature fits.

MRENCLAVE is computed from the pages as a loader would add them; nothing is executed.  The
SIGSTRUCT is the one in the file, the one beside it (name.sig), or the one given.

Examples:
  softsgx measure enclave.signed.so
  softsgx measure enclave.sgxs --sigstruct release.sig
  softsgx measure --json enclave.signed.so | jq -r .mrenclave

With --json: format, mrenclave, mrsigner, enclavehash (what the SIGSTRUCT expects), matches,
signature_valid, size (bytes), pages, tcs (offsets).  Without a SIGSTRUCT, mrsigner, enclavehash,
matches and signature_valid are null.

exit status: 0 it fits, or there is no SIGSTRUCT; 1 it does not fit; 2 the file cannot be read.
"""

from __future__ import annotations

import argparse

from softsgx.cli._common import print_json
from softsgx.image import FORMATS, check_signature, measure, mrsigner, open_image

__all__ = ["NAME", "configure", "run"]

NAME = "measure"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="the enclave file")
    parser.add_argument("--sigstruct", metavar="FILE", help="a bare SIGSTRUCT of 1808 bytes")
    parser.add_argument("--format", choices=list(FORMATS), help="instead of recognising it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure and compare."""
    image = open_image(args.file, args.sigstruct, file_format=args.format)
    mrenclave = measure(image.plan)
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
        "size": image.plan.size,
        "pages": image.plan.page_count,
        "tcs": list(image.plan.tcs),
    }
    if args.json:
        print_json(document)
    else:
        _print(document, image.sigstruct_from, problem)
    return 0 if matches is not False and problem is None else 1


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
