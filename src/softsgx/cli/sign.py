"""Sign an enclave file, in one step, or in two steps with a key on another machine.

For libraries of Intel's SDK and of Open Enclave, the command writes a copy (-o) with the SIGSTRUCT
in it; an SDK library without metadata is laid out first.  For all other formats it writes a bare
SIGSTRUCT, name.sig.  --config reads the files of both signing tools, Enclave.config.xml or
enclave.conf; options override it.  A set bit of a mask means that EINIT compares the bit.  The same
key, options and --date give the same bytes.

Examples:
  softsgx sign --new-key key.pem enclave.sgxs
  softsgx sign --key key.pem enclave.so -o enclave.signed.so --threads 4 --heap-max 64MiB
  softsgx sign --key key.pem enclave.so -o enclave.signed.so --config Enclave.config.xml
  softsgx sign --key key.pem enclave.signed.so -o again.signed.so --no-debug --isvsvn 3

two steps, when the key is on another machine:
  softsgx sign enclave.sgxs --gendata data.bin
  openssl dgst -sha256 -sign key.pem -out data.sig data.bin        (on the other machine)
  softsgx sign enclave.sgxs --catsig data.sig --data data.bin --public-key pub.pem

exit status: 0 signed; 2 bad input.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from softsgx.arch import PAGE_BYTES, AttributesFlags, SigStruct, Tcs, TcsFlags, Xfrm
from softsgx.cli._common import number, print_json, read_file, size_bytes, write_file
from softsgx.errors import SoftSgxError
from softsgx.image import (
    FORMATS,
    Bytes,
    EnclaveImage,
    SdkConfig,
    SdkLayout,
    SignOptions,
    attach_signature,
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
    read_oe_config,
    read_sdk_config,
    sdk_is_laid_out,
    sdk_runtime_is_known,
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
    "stack_min": "stack that stays committed",
    "stack_max": "stack of each thread; Open Enclave's only stack size",
    "heap_min": "heap that stays committed",
    "heap_init": "heap at start; Open Enclave's only heap size",
    "heap_max": "largest heap, grown by EDMM: needs --miscselect 1",
    "reserved_min": "memory for code generated or loaded at run time that stays committed",
    "reserved_init": "such memory at start",
    "reserved_max": "the most such memory",
    "user_region": "memory that the enclave's own code pages: needs --miscselect 1",
}
_COUNTS = {
    "threads": "TCS pages",
    "threads_max": "the most threads, added by EDMM",
    "threads_pool": "threads besides the first that stay committed (1)",
    "ssa_frame_size": "pages of an SSA frame (default: as many as XFRM needs)",
}
_IGNORED = {
    "ignore_init_sec_error": "sign a library with a section .init; its code never runs",
    "ignore_rel_error": "sign a library whose code has relocations",
}


@dataclass(frozen=True)
class _Job:
    """An enclave ready to be signed.

    Attributes:
        file: its bytes, laid out.
        file_format: a name of ``FORMATS``.
        sigstruct: all fields but the key's.
        notes: hints for the user, one sentence each.
    """

    file: Bytes
    file_format: str
    sigstruct: SigStruct
    notes: tuple[str, ...] = ()


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="the enclave file")
    parser.add_argument("-o", "--output", metavar="FILE", help="file to write")
    parser.add_argument("--config", metavar="FILE", help="Enclave.config.xml, or enclave.conf")
    parser.add_argument("--format", choices=list(FORMATS), help="of FILE (default: detected)")
    parser.add_argument("--force", action="store_true", help="overwrite files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    keys = parser.add_argument_group("key").add_mutually_exclusive_group()
    keys.add_argument("--key", metavar="PEM", help="RSA-3072 with exponent 3")
    keys.add_argument("--new-key", metavar="PEM", help="make such a key and write it to PEM")
    keys.add_argument("--gendata", metavar="OUT", help="write the 256 bytes to be signed elsewhere")
    keys.add_argument("--catsig", metavar="SIG", help="a signature of 384 bytes, big-endian")
    parser.add_argument("--data", metavar="FILE", help="with --catsig: the file of --gendata")
    parser.add_argument("--public-key", metavar="PEM", help="with --catsig: the key's public half")

    fields = parser.add_argument_group("SIGSTRUCT")
    for name, text in _NUMBERS.items():
        fields.add_argument(_option(name), dest=name, type=number, metavar="N", help=text)
    for name, text in _IDS.items():
        fields.add_argument(_option(name), dest=name, type=number, metavar="N", help=text)
    for name, text in _SWITCHES.items():
        fields.add_argument(_option(name), action="store_true", default=None, help=text)
    for name in ("pkru", "amx"):
        text = f"{name.upper()} state: off, on, or the loader's choice (any)"
        fields.add_argument(f"--{name}", choices=("off", "on", "any"), help=text)
    fields.add_argument("--date", type=_date, metavar="YYYY-MM-DD", help="default: today, UTC")

    layout = parser.add_argument_group("layout, of SDK and Open Enclave libraries")
    for name, text in _COUNTS.items():
        layout.add_argument(_option(name), type=number, metavar="N", help=text)
    for name, text in _IGNORED.items():
        layout.add_argument(_option(name), action="store_true", help=text)
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
    if os.path.exists(output) and not args.force:
        raise SoftSgxError(f"{output}: exists; add --force to overwrite it")
    signed = _attached(args, job) if args.catsig else sign(job.sigstruct, _key(args))
    write_file(output, _embedded(job, signed), force=args.force)
    _report(args, job, signed, output)
    return 0


def _prepare(args: argparse.Namespace) -> _Job:
    """Read the enclave, lay it out if it has no layout, and fill in a SIGSTRUCT."""
    file = read_bytes(args.file)
    file_format = args.format or detect_format(file)
    sizes = _layout_arguments(args)
    given = _options(args)
    match file_format:
        case "sdk" if not sdk_is_laid_out(file):
            file, options = _laid_out_sdk(args, file, sizes, given)
        case "oe":
            file = Bytes(file.name, oe_properties(file, **_oe_changes(args, file, sizes)))
            options = replace(oe_sign_options(file), **given)
        case _:
            fixed = "--config" if args.config else next(iter(map(_option, sizes)), None)
            if fixed is not None:
                raise SoftSgxError(
                    f"{file.name}: its layout is fixed, so {fixed} has no effect; remove {fixed}"
                )
            options = replace(SignOptions(), **given)
    image = read_image(file, file_format=file_format)
    sigstruct = unsigned_sigstruct(measure(image.plan), options)
    return _Job(file, file_format, sigstruct, tuple(_notes(file, image, options)))


def _laid_out_sdk(
    args: argparse.Namespace, file: Bytes, sizes: dict[str, Any], given: dict[str, Any]
) -> tuple[Bytes, SignOptions]:
    """Return an SDK library with metadata, and the options of its SIGSTRUCT."""
    config = SdkConfig({}, {})
    if args.config:
        config = read_sdk_config(read_bytes(args.config))
    options = SignOptions(**{**config.options, **given})
    flags, _ = options.flags()
    xfrm, mask = options.states()
    layout = SdkLayout(
        **_merged(config.layout, sizes),
        xfrm=xfrm | ~mask & sum(Xfrm),
        miscselect=options.miscselect,
        misc_mask=options.misc_mask,
        aex_notify=bool(flags & AttributesFlags.AEXNOTIFY),
    )
    laid_out = lay_out_sdk(
        file, layout, init=args.ignore_init_sec_error, text_relocations=args.ignore_rel_error
    )
    return Bytes(file.name, laid_out), options


def _notes(file: Bytes, image: EnclaveImage, options: SignOptions) -> Iterator[str]:
    """Yield properties that may keep the enclave from loading or running."""
    if image.format == "sdk" and not sdk_runtime_is_known(file):
        yield "its g_global_data is unknown: a runtime of the SDK does not find its heap"
    # A machine may choose states that do not fit the enclave's SSA frames.
    xfrm, mask = options.states()
    largest = xfrm | ~mask & sum(Xfrm)
    needed = ssa_frame_pages(largest, options.miscselect & options.misc_mask | ~options.misc_mask)
    pages = image.plan.ssa_frame_size
    if needed > pages:
        yield (
            f"SSA frames of {pages} pages, but the signed XFRM allows states that need {needed}; "
            "ECREATE refuses them on machines that have them all"
        )
    wanted = bool(options.flags()[0] & AttributesFlags.AEXNOTIFY)
    flags = {Tcs.unpack(run.page(0).data).flags for run in image.plan.runs if run.is_tcs}
    if wanted and not all(flag & TcsFlags.AEXNOTIFY for flag in flags):
        yield "its threads have no TCS.FLAGS.AEXNOTIFY and are not notified"
    if not wanted and any(flag & TcsFlags.AEXNOTIFY for flag in flags):
        yield "its threads have TCS.FLAGS.AEXNOTIFY and cannot be entered without --aex-notify"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SignOptions that the command line sets."""
    names = (*_NUMBERS, *_SWITCHES, "pkru", "amx")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in _IDS:
        value = getattr(args, name)
        if value is not None:
            if not 0 <= value < 1 << 128:
                raise SoftSgxError(
                    f"sign: {_option(name)} {value:#x}: does not fit 128 bits; give a smaller one"
                )
            given[name] = value.to_bytes(16, "little")
    given["date"] = args.date or datetime.datetime.now(datetime.UTC).date()
    return given


def _layout_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of SdkLayout that the command line sets, in pages."""
    given: dict[str, Any] = {}
    for name in _SIZES:
        value = getattr(args, name)
        if value is not None:
            if value % PAGE_BYTES:
                raise SoftSgxError(
                    f"sign: {_option(name)} {value}: not whole pages; give a multiple of 4096 bytes"
                )
            given[name] = value // PAGE_BYTES
    for name in _COUNTS:
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    return given


def _merged(config: Mapping[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the layout; a bound that is set alone changes the bounds that contradict it."""
    layout = {**config, **given}
    for kind in ("heap", "reserved"):
        start = f"{kind}_init"
        if f"{kind}_max" in given and start not in given:
            layout[start] = None
        if start in given and f"{kind}_max" not in given:
            layout[f"{kind}_max"] = given[start]
    defaults = {name: getattr(SdkLayout, name) for name in ("heap_min", "stack_min")}
    for least, most in (("heap_min", "heap_init"), ("stack_min", "stack_max")):
        most = "heap_max" if most == "heap_init" and layout.get(most) is None else most
        if most in given and least not in given:
            layout[least] = min(layout.get(least, defaults[least]), layout[most])
    return layout


def _oe_changes(
    args: argparse.Namespace, file: Bytes, sizes: dict[str, Any]
) -> dict[str, int | bytes]:
    """Return the properties that configuration file and command line set."""
    names = {"threads": "num_tcs", "stack_max": "stack_pages", "heap_init": "heap_pages"}
    for ours in sizes:
        if ours not in names:
            raise SoftSgxError(
                f"{args.file}: Open Enclave has no {_option(ours)}; remove that option"
            )
    changes: dict[str, int | bytes] = {}
    if args.config:
        attributes = oe_sign_options(file).attributes
        changes = read_oe_config(read_bytes(args.config), attributes)
    changes |= {names[ours]: value for ours, value in sizes.items()}
    for ours, name in (("isv_prod_id", "product_id"), ("isv_svn", "security_version")):
        if getattr(args, ours) is not None:
            changes[name] = getattr(args, ours)
    if args.attributes is not None:
        changes["attributes"] = args.attributes
    return changes


def _attached(args: argparse.Namespace, job: _Job) -> SigStruct:
    """Return the SIGSTRUCT with the signature of --catsig; it must sign the same bytes."""
    if not args.data or not args.public_key:
        raise SoftSgxError("sign: --catsig without --data or --public-key; give both")
    data = read_file(args.data)
    wanted = split_signed(data, args.data)
    own = job.sigstruct.replace(date=wanted.date)
    if own.signed_bytes() != data:
        differing = [
            name for name in SigStruct.OFFSETS if getattr(own, name) != getattr(wanted, name)
        ]
        raise SoftSgxError(
            f"{args.data}: was made for another enclave or with other options "
            f"({', '.join(differing)} differ); give the FILE and the options of --gendata"
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
        raise SoftSgxError(
            "sign: no output for the copy of the library with its SIGSTRUCT; give one with -o"
        )
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
    for note in job.notes:
        print(f"softsgx: note: {job.file.name}: {note}", file=sys.stderr)
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
