"""Load an enclave file through the driver, and say whether EINIT accepts it.

The command adds every page as an untrusted runtime does, with real measurement and real paging; no
code of the enclave runs.  The SIGSTRUCT comes from --sigstruct, from the file, or from name.sig in
the same directory; a file without one is signed with a throw-away key.

Examples:
  softsgx load enclave.signed.so
  softsgx load enclave.signed.so --debug --epc 1MiB
  softsgx load enclave.sgxs --sigstruct release.sig --json
  softsgx load le.signed.so --launch-key-hash HEX --token app.token
                                      as on a machine whose launch key hash is locked

exit status: 0 the enclave is initialised; 1 a leaf or the driver refuses it; 2 bad input.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from softsgx.cli._common import print_json, size_as_written
from softsgx.host import PROFILES, Platform, PlatformConfig
from softsgx.image import FORMATS, open_image
from softsgx.userland import EnclaveLoadError, LoadedEnclave

__all__ = ["NAME", "configure", "run"]

NAME = "load"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", help="the enclave file")
    parser.add_argument("--sigstruct", metavar="FILE", help="a bare SIGSTRUCT of 1808 bytes")
    parser.add_argument("--format", choices=list(FORMATS), help="of FILE (default: detected)")
    debug = parser.add_mutually_exclusive_group()
    debug.add_argument("--debug", action="store_true", default=None, help="set ATTRIBUTES.DEBUG")
    debug.add_argument(
        "--no-debug",
        dest="debug",
        action="store_false",
        help="clear ATTRIBUTES.DEBUG (default: the SIGSTRUCT's)",
    )
    parser.add_argument(
        "--no-provision",
        dest="provision",
        action="store_false",
        help="the process may not open /dev/sgx_provision",
    )
    machine = parser.add_argument_group("the machine")
    machine.add_argument(
        "--epc", type=size_as_written, metavar="SIZE", help="size of the EPC (default 93.5MiB)"
    )
    machine.add_argument("--profile", choices=list(PROFILES), help="features of the machine")
    machine.add_argument("--config", metavar="FILE", help="a platform described in TOML")
    machine.add_argument(
        "--token",
        action="append",
        metavar="FILE",
        help="an EINITTOKEN of 304 bytes; the launch key hash is locked then",
    )
    machine.add_argument(
        "--launch-key-hash",
        metavar="HEX",
        help="lock the launch key hash to this MRSIGNER (default with --token: Intel's)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Load the enclave and print the result."""
    image = open_image(args.file, args.sigstruct, file_format=args.format)
    with Platform(_config(args)) as platform:
        process = platform.process("loader", may_provision=args.provision)
        start = time.perf_counter()
        try:
            enclave = process.load(image, debug=args.debug)
        except EnclaveLoadError as error:
            if not args.json:
                print(f"refused    {error}")
                return 1
            print_json(
                {
                    "format": image.format,
                    "loaded": False,
                    "leaf": error.leaf,
                    "status": error.status or None,
                    "differences": list(error.differences),
                }
            )
            return 1
        with enclave:
            document = _document(enclave, platform, time.perf_counter() - start)
    if args.json:
        print_json(document)
    else:
        _print(document, image.sigstruct_from)
    return 0


def _config(args: argparse.Namespace) -> PlatformConfig:
    changes: dict[str, Any] = {
        name: getattr(args, name) for name in ("epc", "profile") if getattr(args, name) is not None
    }
    if args.token or args.launch_key_hash:
        changes["launch_control"] = False
        changes["tokens"] = tuple(args.token or ())
        if args.launch_key_hash:
            changes["launch_key_hash"] = args.launch_key_hash
    if args.config:
        return PlatformConfig.load(args.config, **changes)
    return PlatformConfig.of(**changes)


def _document(enclave: LoadedEnclave, platform: Platform, seconds: float) -> dict[str, object]:
    residency, secs = enclave.residency(), enclave.secs
    return {
        "format": enclave.image.format,
        "loaded": True,
        "mrenclave": enclave.mrenclave.hex(),
        "mrsigner": enclave.mrsigner.hex(),
        "signed_for_this": enclave.image.sigstruct is None,
        "debug": enclave.debug,
        "base": enclave.base,
        "size": enclave.size,
        "attributes": secs.attributes.flags,
        "xfrm": secs.attributes.xfrm,
        "miscselect": int(secs.miscselect),
        "pages": len(enclave.pages),
        "tcs": list(enclave.tcs),
        "resident_pages": residency.resident,
        "evicted_pages": residency.evicted,
        "epc_pages": platform.core.epc_pages,
        "seconds": seconds,
    }


def _print(document: dict[str, object], found: str) -> None:
    signed = "with a throw-away key" if document["signed_for_this"] else found
    print(f"EINIT      SGX_SUCCESS in {document['seconds']:.2f} s")
    print(f"mrenclave  {document['mrenclave']}")
    print(f"mrsigner   {document['mrsigner']}")
    print(f"sigstruct  {signed or 'in the file'}")
    kind = "debug" if document["debug"] else "production"
    print(
        f"secs       {kind}; attributes {document['attributes']:#x}, xfrm {document['xfrm']:#x}, "
        f"miscselect {document['miscselect']:#x}; {document['size']:#x} bytes"
    )
    tcs = document["tcs"]
    assert isinstance(tcs, list), "threads are a list"
    print(
        f"pages      {document['pages']}: {document['resident_pages']} in the EPC of "
        f"{document['epc_pages']}, {document['evicted_pages']} evicted; {len(tcs)} TCS"
    )
