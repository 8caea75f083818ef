"""Sign an enclave file, with a key at hand or in two steps with a key elsewhere.

Libraries of Intel's SDK and of Open Enclave get the SIGSTRUCT inside, in a copy (-o); an SDK
library without metadata is laid out first.  All other formats get a bare SIGSTRUCT beside them,
name.sig.  Every mask has a bit set where EINIT compares.  The same key, options and --date give the
same bytes.

Examples:
  softsgx sign --new-key key.pem enclave.sgxs
  softsgx sign --key key.pem enclave.so -o enclave.signed.so --threads 4 --heap-max 64MiB
  softsgx sign --key key.pem enclave.signed.so -o again.signed.so --no-debug --isvsvn 3

two steps, when the key is in a safe place:
  softsgx sign enclave.sgxs --gendata data.bin
  openssl dgst -sha256 -sign key.pem -out data.sig data.bin        (there)
  softsgx sign enclave.sgxs --catsig data.sig --data data.bin --public-key pub.pem

exit status: 0 signed; 2 bad input.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from softsgx.arch import PAGE_BYTES, SigStruct, Xfrm
from softsgx.cli._common import number, print_json, read_file, size_bytes, write_file
from softsgx.errors import SoftSgxError
from softsgx.image import (
    FORMATS,
    Bytes,
    SdkLayout,
    SignOptions,
    attach_signature,
    blocks_for,
    detect_format,
    embed_oe_sigstruct,
    embed_sigstruct,
    key_pem,
    lay_out_sdk,
    load_key,
    load_public_key,
    measure,
    mrsigner,
    new_key,
    oe_properties,
    oe_sign_options,
    read_bytes,
    read_image,
    sdk_is_laid_out,
    sign,
    split_signed,
    ssa_frame_pages,
    unsigned_sigstruct,
)

__all__ = ["NAME", "configure", "run"]

NAME = "sign"

_NUMBERS = {
    "attributes": "ATTRIBUTES.FLAGS",
    "attribute_mask": "which of them EINIT compares",
    "xfrm": "ATTRIBUTES.XFRM",
    "xfrm_mask": "which of them EINIT compares",
    "miscselect": "MISCSELECT",
    "misc_mask": "which of them EINIT compares",
    "isv_prod_id": "product",
    "isv_svn": "security version",
    "vendor": "0 or 0x8086",
    "swdefined": "SWDEFINED",
}
_SWITCHES = {
    "kss": "key separation and sharing, in attributes and mask",
    "provision_key": "access to the provisioning key",
    "launch_key": "access to the launch key",
    "aex_notify": "AEX notification",
    "no_debug": "production only: DEBUG must be off",
}
_IDS = {"isv_family_id": "128-bit number, needs --kss", "isv_ext_prod_id": "the same"}
_SIZES = {
    "stack_min": "stack that is always there",
    "stack_max": "stack of each thread; Open Enclave's only stack size",
    "heap_min": "heap that is always there",
    "heap_init": "heap at start; Open Enclave's only heap size",
    "heap_max": "heap that there may be, by run-time paging: needs --miscselect 1",
}


@dataclass(frozen=True)
class _Job:
    """An enclave ready to be signed.

    Attributes:
        file: its bytes, laid out.
        file_format: a name of ``FORMATS``.
        sigstruct: all fields but the key's.
    """

    file: Bytes
    file_format: str
    sigstruct: SigStruct


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="the enclave file")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write")
    parser.add_argument("--format", choices=list(FORMATS), help="instead of recognising it")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    keys = parser.add_argument_group("key").add_mutually_exclusive_group()
    keys.add_argument("--key", metavar="PEM", help="RSA-3072 with exponent 3")
    keys.add_argument("--new-key", metavar="PEM", help="make such a key and write it there")
    keys.add_argument("--gendata", metavar="OUT", help="write the 256 bytes to be signed elsewhere")
    keys.add_argument("--catsig", metavar="SIG", help="384 bytes, made elsewhere, big-endian")
    parser.add_argument("--data", metavar="FILE", help="with --catsig: what --gendata wrote")
    parser.add_argument("--public-key", metavar="PEM", help="with --catsig: the key's public half")

    fields = parser.add_argument_group("SIGSTRUCT")
    for name, text in _NUMBERS.items():
        fields.add_argument(_option(name), dest=name, type=number, metavar="N", help=text)
    for name, text in _IDS.items():
        fields.add_argument(_option(name), dest=name, type=number, metavar="N", help=text)
    for name, text in _SWITCHES.items():
        fields.add_argument(_option(name), action="store_true", default=None, help=text)
    for name in ("pkru", "amx"):
        text = f"{name.upper()} state: off, on, or as the loader likes"
        fields.add_argument(f"--{name}", choices=("off", "on", "any"), help=text)
    fields.add_argument("--date", type=_date, metavar="YYYY-MM-DD", help="default: today, UTC")

    layout = parser.add_argument_group("layout, of SDK and Open Enclave libraries")
    layout.add_argument("--threads", type=number, metavar="N", help="TCS pages")
    layout.add_argument("--ssa-frame-size", type=number, metavar="PAGES", help="pages of a frame")
    for name, text in _SIZES.items():
        layout.add_argument(_option(name), type=size_bytes, metavar="SIZE", help=text)


def run(args: argparse.Namespace) -> int:
    """Lay out, measure, sign, write."""
    if args.file is None:
        if args.new_key is None:
            raise SoftSgxError("sign: no FILE; only --new-key works without one")
        write_file(args.new_key, key_pem(new_key()), force=args.force, private=True)
        return 0
    if not (args.key or args.new_key or args.gendata or args.catsig):
        raise SoftSgxError("sign: no key; give --key, --new-key, --gendata or --catsig")
    job = _prepare(args)
    if args.gendata:
        write_file(args.gendata, job.sigstruct.signed_bytes(), force=args.force)
        _report(args, job, job.sigstruct, args.gendata)
        return 0
    output = _output(args, job)
    if Path(output).exists() and not args.force:
        raise SoftSgxError(f"{output}: exists; add --force to overwrite it")
    signed = _attached(args, job) if args.catsig else sign(job.sigstruct, _key(args))
    write_file(output, _embedded(job, signed), force=args.force)
    _report(args, job, signed, output)
    return 0


def _prepare(args: argparse.Namespace) -> _Job:
    """Read the enclave, lay it out where it needs it, and fill in a SIGSTRUCT."""
    file = read_bytes(args.file)
    file_format = args.format or detect_format(file)
    sizes = _layout_arguments(args)
    options = SignOptions()
    if file_format == "sdk" and not sdk_is_laid_out(file):
        file = Bytes(file.name, lay_out_sdk(file, _sdk_layout(args, sizes)))
    elif file_format == "oe":
        file = Bytes(file.name, oe_properties(file, **_oe_changes(args, sizes)))
        options = oe_sign_options(file)
    elif sizes:
        raise SoftSgxError(
            f"{file.name}: its layout is fixed; {_option(next(iter(sizes)))} changes nothing"
        )
    image = read_image(file, file_format=file_format)
    options = replace(options, **_options(args))
    _warn_of_small_frames(image.plan.ssa_frame_size, options)
    return _Job(file, file_format, unsigned_sigstruct(measure(image.plan), options))


def _warn_of_small_frames(pages: int, options: SignOptions) -> None:
    """Say so when a machine may choose states that do not fit the enclave's SSA frames."""
    xfrm, mask = options.states()
    largest = xfrm | ~mask & sum(Xfrm)
    needed = ssa_frame_pages(largest, options.miscselect & options.misc_mask | ~options.misc_mask)
    if needed > pages:
        print(
            f"softsgx: note: SSA frames of {pages} pages, but the signed XFRM allows states that "
            f"need {needed}; ECREATE refuses them on machines that have them all",
            file=sys.stderr,
        )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line sets of SignOptions."""
    names = (*_NUMBERS, *_SWITCHES, "pkru", "amx")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in _IDS:
        value = getattr(args, name)
        if value is not None:
            if not 0 <= value < 1 << 128:
                raise SoftSgxError(f"sign: {_option(name)} {value:#x} does not fit 128 bits")
            given[name] = value.to_bytes(16, "little")
    given["date"] = args.date or datetime.datetime.now(datetime.UTC).date()
    return given


def _layout_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the command line sets of SdkLayout, in pages."""
    given: dict[str, Any] = {}
    for name in _SIZES:
        value = getattr(args, name)
        if value is not None:
            if value % PAGE_BYTES:
                raise SoftSgxError(f"sign: {_option(name)} {value}: not whole pages of 4096 bytes")
            given[name] = value // PAGE_BYTES
    for name in ("threads", "ssa_frame_size"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    # A bound that is set alone moves the ones that would contradict it.
    if "heap_max" in given:
        given.setdefault("heap_init", given["heap_max"])
    elif "heap_init" in given:
        given["heap_max"] = given["heap_init"]
    if "heap_init" in given and "heap_min" not in given:
        given["heap_min"] = min(SdkLayout.heap_min, given["heap_init"])
    if "stack_max" in given and "stack_min" not in given:
        given["stack_min"] = min(SdkLayout.stack_min, given["stack_max"])
    return given


def _sdk_layout(args: argparse.Namespace, sizes: dict[str, Any]) -> SdkLayout:
    """Return the layout, with the metadata blocks that a signer of the SDK would write."""
    select = args.miscselect or 0
    mask = SignOptions.misc_mask if args.misc_mask is None else args.misc_mask
    run_time, fallback = blocks_for(select, mask)
    return SdkLayout(
        run_time_blocks=run_time,
        fallback_block=fallback,
        desired_misc_select=select & 0xFFFF_FFFF,
        **sizes,
    )


def _oe_changes(args: argparse.Namespace, sizes: dict[str, Any]) -> dict[str, int | bytes]:
    """Return the same as Open Enclave properties."""
    for ours in ("stack_min", "heap_min", "heap_max", "ssa_frame_size"):
        if getattr(args, ours) is not None:
            raise SoftSgxError(f"{args.file}: Open Enclave has no {_option(ours)}")
    names = {"threads": "num_tcs", "stack_max": "stack_pages", "heap_init": "heap_pages"}
    changes: dict[str, int | bytes] = {
        name: sizes[ours] for ours, name in names.items() if ours in sizes
    }
    for ours, name in (("isv_prod_id", "product_id"), ("isv_svn", "security_version")):
        if getattr(args, ours) is not None:
            changes[name] = getattr(args, ours)
    if args.attributes is not None:
        changes["attributes"] = args.attributes
    return changes


def _attached(args: argparse.Namespace, job: _Job) -> SigStruct:
    """Return the SIGSTRUCT with a signature made elsewhere; it must be over what we would sign."""
    if not args.data or not args.public_key:
        raise SoftSgxError("sign: --catsig needs --data and --public-key")
    data = read_file(args.data)
    wanted = split_signed(data, args.data)
    own = job.sigstruct.replace(date=wanted.date)
    if own.signed_bytes() != data:
        differing = [
            name for name in SigStruct.OFFSETS if getattr(own, name) != getattr(wanted, name)
        ]
        raise SoftSgxError(
            f"{args.data}: was made for another enclave or with other options: "
            f"{', '.join(differing)} differ"
        )
    key = load_public_key(read_file(args.public_key), args.public_key)
    return attach_signature(own, key, read_file(args.catsig))


def _key(args: argparse.Namespace) -> rsa.RSAPrivateKey:
    if args.key:
        return load_key(read_file(args.key), args.key)
    key = new_key()
    write_file(args.new_key, key_pem(key), force=args.force, private=True)
    return key


def _output(args: argparse.Namespace, job: _Job) -> str:
    if args.output:
        return str(args.output)
    if job.file_format in ("sdk", "oe"):
        raise SoftSgxError("sign: the SIGSTRUCT goes into a copy of the library; name it with -o")
    return str(Path(args.file).with_suffix(".sig"))


def _embedded(job: _Job, sigstruct: SigStruct) -> bytes:
    match job.file_format:
        case "sdk":
            return embed_sigstruct(job.file, sigstruct)
        case "oe":
            return embed_oe_sigstruct(job.file, sigstruct)
        case _:
            return sigstruct.pack()


def _report(args: argparse.Namespace, job: _Job, sigstruct: SigStruct, output: str) -> None:
    signer = mrsigner(sigstruct).hex() if any(sigstruct.modulus) else None
    if args.json:
        print_json(
            {
                "format": job.file_format,
                "mrenclave": sigstruct.enclave_hash.hex(),
                "mrsigner": signer,
                "output": output,
            }
        )
        return
    print(f"mrenclave  {sigstruct.enclave_hash.hex()}")
    if signer:
        print(f"mrsigner   {signer}")
    print(f"wrote      {output}")


def _option(name: str) -> str:
    if name.startswith("isv_"):
        return "--" + name.replace("_", "")
    return "--" + name.replace("_", "-")


def _date(text: str) -> datetime.date:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"date {text!r}; write 2026-01-31") from None
