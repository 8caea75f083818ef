"""Build an enclave from C: compile, lay out, measure, sign.

The sources define one function, `long ecall(unsigned long function, void *argument, size_t size)`,
and include softsgx.h; there is no C library inside.  The command writes OUT, an SGXS stream, and
its SIGSTRUCT, OUT with the suffix .sig.  Without --key it signs with a throw-away key: MRENCLAVE
depends only on sources, sizes and compiler, and MRSIGNER changes with every build.

The compiler is --cc, else cc, else ziglang's.

Examples:
  softsgx build enclave.c
  softsgx build enclave.c --heap 64MiB --threads 4 --key key.pem
  softsgx build enclave.c --host host.c                the program that uses it as well
  cc -I"$(softsgx build --include)" host.c -o host     the same by hand
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import tempfile
from pathlib import Path

from softsgx.arch import PAGE_BYTES, AttributesFlags
from softsgx.cli._common import absolute, number, print_json, read_file, size_bytes, write_file
from softsgx.errors import SoftSgxError
from softsgx.image import Plan, SignOptions, load_key, mrsigner, new_key, sign_plan, write_sgxs
from softsgx.image.csource import (
    INCLUDE,
    BuildOptions,
    Compiler,
    build_enclave,
    find_compiler,
)

__all__ = ["NAME", "configure", "run"]

NAME = "build"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("sources", metavar="SOURCE.c", nargs="*", help="sources of the enclave")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help="the stream (default: SOURCE.sgxs, here)"
    )
    parser.add_argument(
        "--heap", type=size_bytes, metavar="SIZE", default="1MiB", help="for all threads (1MiB)"
    )
    parser.add_argument(
        "--stack", type=size_bytes, metavar="SIZE", default="64KiB", help="of each thread (64KiB)"
    )
    parser.add_argument("--threads", type=number, metavar="N", default=1, help="TCS pages (1)")
    parser.add_argument(
        "--key", metavar="PEM", help="RSA-3072 with exponent 3; softsgx sign --new-key makes one"
    )
    parser.add_argument("--cc", metavar="COMMAND", help="a compiler, such as clang or 'ccache gcc'")
    parser.add_argument(
        "--cflags",
        metavar="FLAGS",
        default="",
        help="for SOURCE.c, after the default ones: --cflags='-O3 -DN=4'",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help="build a debug enclave, and write its code with debug information for gdb, to OUT "
        "with the suffix .elf; add --cflags=-O0 to step by lines",
    )
    parser.add_argument(
        "--host",
        metavar="HOST.c",
        help="compile this program too, to a file beside OUT called HOST",
    )
    parser.add_argument(
        "--include", action="store_true", help="print the directory of softsgx_host.h, and exit"
    )
    parser.add_argument("--force", action="store_true", help="overwrite files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Build and write."""
    if args.include:
        print(INCLUDE)
        return 0
    if not args.sources:
        raise SoftSgxError("build: no SOURCE.c; give the sources of the enclave")
    sources = [absolute(source) for source in args.sources]
    output = Path(args.output or f"{sources[0].stem}.sgxs")
    sigstruct_file = output.with_suffix(".sig")
    if output == sigstruct_file:
        raise SoftSgxError(f"{output}: is the file for the signature; end OUT with .sgxs")
    host = output.with_name(Path(args.host).stem) if args.host else None
    elf = output.with_suffix(".elf") if args.debug else None
    for file in (output, sigstruct_file, host, elf):
        if file is not None and os.path.exists(file) and not args.force:
            raise SoftSgxError(f"{file}: exists; add --force to overwrite it")
    key = load_key(read_file(args.key), args.key) if args.key else None
    options = BuildOptions(heap_bytes=args.heap, stack_bytes=args.stack, threads=args.threads)

    compiler = find_compiler(args.cc)
    plan = build_enclave(sources, compiler, options, shlex.split(args.cflags), elf)
    if host is not None:
        _build_host(compiler, absolute(args.host), host, force=args.force)
    today = datetime.datetime.now(datetime.UTC).date()
    # XFRM: x87 and SSE, since the compiler uses at most SSE2.
    attributes = AttributesFlags.MODE64BIT | (AttributesFlags.DEBUG if args.debug else 0)
    signed_with = SignOptions(date=today, xfrm_mask=(1 << 64) - 1, attributes=int(attributes))
    sigstruct = sign_plan(plan, key or new_key(), signed_with)
    write_file(str(output), b"".join(write_sgxs(plan)), force=args.force)
    write_file(str(sigstruct_file), sigstruct.pack(), force=args.force)

    document: dict[str, object] = {
        "mrenclave": sigstruct.enclave_hash.hex(),
        "mrsigner": mrsigner(sigstruct).hex(),
        "pages": plan.page_count,
        "bytes": plan.page_count * PAGE_BYTES,
        "output": str(output),
        "sigstruct": str(sigstruct_file),
        "host": None if host is None else str(host),
        "elf": None if elf is None else str(elf),
    }
    if args.json:
        print_json(document)
    else:
        _print(document, plan)
    return 0


def _build_host(compiler: Compiler, source: Path, output: Path, *, force: bool) -> None:
    """Compile to a temporary file and rename it: a failed build keeps the old program."""
    if not os.path.isfile(source):
        raise SoftSgxError(f"{source}: no such file; give the host program's C source")
    directory = output.parent
    if not os.access(directory, os.W_OK):
        raise SoftSgxError(f"{directory}: not a directory that can be written; give another -o")
    with tempfile.TemporaryDirectory(prefix="softsgx-", dir=directory) as scratch:
        made = Path(scratch) / output.name
        compiler.host([source], made)
        if os.path.exists(output) and not force:
            raise SoftSgxError(f"{output}: exists; add --force to overwrite it")
        made.replace(output)


def _print(document: dict[str, object], plan: Plan) -> None:
    print(f"mrenclave  {document['mrenclave']}")
    print(f"mrsigner   {document['mrsigner']}")
    print(f"pages      {plan.page_count} ({plan.page_count * PAGE_BYTES / (1 << 20):.1f} MiB)")
    for name in ("output", "sigstruct", "host", "elf"):
        if document[name] is not None:
            print(f"wrote      {document[name]}")
