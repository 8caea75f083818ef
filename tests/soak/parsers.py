"""Damaged input for every parser, for as long as there is time.

Method: mutate valid inputs, and inputs that led somewhere new.  Where an input leads is told by the
refusal without its numbers, or by the shape of what was read: each refusal is a branch of its own,
so this is coverage without its cost.  A fault is any exception but SoftSgxError, a refusal of more
than one line, an input that takes more than ``SLOW_SECONDS`` of processor time, or one that takes
more than ``LARGE_BYTES`` of memory.  A fault is reduced and printed.

The inputs depend on the seed alone.  ``python -m tests.soak.parsers --seconds 60 --seed 3`` runs it
by hand; ``tests/soak/parsers_atheris.py`` gives the same parsers to a fuzzer that watches branches.
"""

from __future__ import annotations

import argparse
import base64
import random
import re
import resource
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.support.damage import FILES, NASTY, hot_places, original
from tests.support.enclave_files import sdk_library
from tests.unit.image.test_evidence import BODY, ecdsa_quote, epid_quote, token

from softsgx.arch import SigStruct
from softsgx.errors import SoftSgxError
from softsgx.host import PlatformConfig
from softsgx.image import (
    Bytes,
    SdkLayout,
    lay_out_sdk,
    measure,
    read_evidence,
    read_image,
    read_oe_config,
    read_sdk_config,
    verify,
)

__all__ = ["PARSERS", "SEEDS", "Counts", "Fault", "Parser", "run", "try_one"]

SLOW_SECONDS = 5.0
LARGE_BYTES = 256 << 20
_MEASURED_BYTES = 1 << 20
_CORPUS_INPUTS, _INPUT_BYTES = 400, 1 << 17
_MESSAGE_CHARACTERS = 1000
_REDUCING_SECONDS = 20.0
_NEAR_BYTES = 1024  # from either end of a file: headers and section tables
_NUMBERS = re.compile(r"0x[0-9a-f]+|[0-9a-f]{8,}|[0-9]+|'[^']*'|\"[^\"]*\"")

Parser = Callable[[bytes], str]
"""Reads its input and returns the shape of what it read; refuses with SoftSgxError."""


def _image(file_format: str | None) -> Parser:
    def parse(data: bytes) -> str:
        image = read_image(Bytes("input", data), file_format=file_format)
        measure(image.plan, limit_bytes=_MEASURED_BYTES)
        failed = []
        if image.sigstruct is not None:
            failed = [check.name for check in verify(image.sigstruct) if not check.ok]
        runs = len(image.plan.runs).bit_length()
        return f"{image.format} {runs} {len(image.variants)} {image.notes} {failed}"

    return parse


def _laid_out(data: bytes) -> str:
    dynamic = SdkLayout(threads=3, stack_max=4, miscselect=1, misc_mask=0, heap_max=8, heap_min=1)
    made = lay_out_sdk(Bytes("input", data), dynamic)
    return _image("sdk")(made)


def _evidence(data: bytes) -> str:
    found = read_evidence(Bytes("input", data))
    return "nothing" if found is None else f"{found.title} {found.problems}"


def _sigstruct(data: bytes) -> str:
    padded = data[: SigStruct.SIZE].ljust(SigStruct.SIZE, b"\0")
    return str([check.name for check in verify(SigStruct.unpack(padded)) if not check.ok])


def _platform(data: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(data)
        file.flush()
        try:
            config = PlatformConfig.load(file.name)
        except SoftSgxError as error:
            raise SoftSgxError(str(error).replace(file.name, "input")) from error
    return f"{len(config.groups)} {len(config.section_bytes())} {config.backing}"


PARSERS: dict[str, Parser] = {
    **{name: _image(name) for name in FILES},
    "any": _image(None),
    "sdk layout": _laid_out,
    "sdk config": lambda data: str(read_sdk_config(Bytes("input", data)).layout.keys()),
    "oe config": lambda data: str(read_oe_config(Bytes("input", data), 6).keys()),
    "evidence": _evidence,
    "sigstruct": _sigstruct,
    "platform": _platform,
}

_XML = (
    b"<EnclaveConfiguration><ProdID>0</ProdID><StackMaxSize>0x40000</StackMaxSize>"
    b"<HeapMaxSize>0x100000</HeapMaxSize><TCSNum>10</TCSNum><TCSPolicy>1</TCSPolicy>"
    b"<ELRangeSize>0x40000000</ELRangeSize><MiscSelect>1</MiscSelect></EnclaveConfiguration>"
)
_CONF = (
    b"# comment\nDebug=1\nNumHeapPages=1024\nNumTCS=1\nProductID=1\n"
    b"FamilyID=47183823-2574-4bfd-b411-99ed177d3e43\nStartAddress=0x1000\n"
)
_TOML = (
    b'epc = ["1MiB", 65536]\nprocessors = 4\nseed = 0x10\nbacking_limit = "1GiB"\n'
    b'defects = ["B1"]\n[groups."jobs/a"]\nmax = "16MiB"\n'
)


def _valid(*names: str) -> list[bytes]:
    return [original(name) for name in names]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    **{name: partial(_valid, name) for name in FILES},
    "any": partial(_valid, *FILES),
    "sdk layout": lambda: [sdk_library().data],
    "sdk config": lambda: [_XML],
    "oe config": lambda: [_CONF],
    "evidence": lambda: [token(), BODY.pack(), ecdsa_quote(), epid_quote()],
    "sigstruct": lambda: [SigStruct(exponent=3).pack()],
    "platform": lambda: [_TOML],
}
"""What is mutated first, by parser."""


@dataclass(frozen=True)
class Fault:
    """An input that a parser did not stand.

    Attributes:
        parser: a name of ``PARSERS``.
        what: the exception and where it was raised, or what was exceeded.
        data: the input, reduced.
    """

    parser: str
    what: str
    data: bytes

    def text(self) -> str:
        """Return lines to print: the fault, and how to see it again."""
        packed = base64.b64encode(zlib.compress(self.data, 9)).decode()
        return (
            f"{self.parser}: {self.what}\n{len(self.data)} bytes; again with:\n"
            f"python -m tests.soak.parsers --parser '{self.parser}' --again {packed}"
        )


@dataclass
class Counts:
    """What a run did.

    Attributes:
        inputs: how many inputs each parser got.
        shapes: how many different ends each parser came to.
        faults: what went wrong.
    """

    inputs: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)


def try_one(parser: Parser, data: bytes) -> tuple[str, str]:
    """Return (shape, fault): where the input led, and what is wrong there; empty for nothing."""
    started = time.thread_time()
    memory = _peak_bytes()
    fault = ""
    try:
        shape = parser(data)
    except SoftSgxError as error:
        text = str(error)
        shape = _NUMBERS.sub("#", text)
        if len(text.splitlines()) != 1 or len(text) > _MESSAGE_CHARACTERS:
            fault = f"a refusal of {len(text)} characters, {len(text.splitlines())} lines"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        shape = fault = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    seconds = time.thread_time() - started
    if seconds > SLOW_SECONDS:
        fault = "slow"
    if _peak_bytes() - memory > LARGE_BYTES:
        fault = "large"
    return shape, fault


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def run(seconds: float, seed: int, *, inputs: int | None = None) -> Counts:
    """Try inputs until the time is up or a number is reached; print faults.

    Args:
        seconds: of wall-clock time.
        seed: decides which inputs, in which order.
        inputs: how many at most.
    """
    rng = random.Random(seed)
    corpus = {name: list(make()) for name, make in SEEDS.items()}
    known: dict[str, set[str]] = {name: set() for name in PARSERS}
    reported: set[tuple[str, str]] = set()
    counts = Counts()
    names = list(PARSERS)
    end = time.monotonic() + seconds
    while time.monotonic() < end and (inputs is None or counts.inputs.total() < inputs):
        name = rng.choice(names)
        data = mutated(rng, name, corpus[name])
        shape, fault = try_one(PARSERS[name], data)
        counts.inputs[name] += 1
        if shape not in known[name]:
            known[name].add(shape)
            counts.shapes[name] += 1
            if len(data) <= _INPUT_BYTES and len(corpus[name]) < _CORPUS_INPUTS:
                corpus[name].append(data)
        if fault and (name, fault) not in reported:
            reported.add((name, fault))
            found = Fault(name, fault, reduced(PARSERS[name], data, fault))
            counts.faults.append(found)
            print(found.text())
    return counts


def mutated(rng: random.Random, name: str, corpus: list[bytes]) -> bytes:
    """Return one of the inputs, damaged in up to four ways."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        kind = rng.choice(("number", "number", "number", "byte", "cut", "grow", "copy", "splice"))
        at = _place(rng, name, data)
        match kind:
            case "number":
                width = rng.choice((1, 2, 4, 8))
                value = rng.choice((rng.choice(NASTY), rng.getrandbits(64), rng.randrange(64)))
                data[at : at + width] = struct.pack("<Q", value)[:width]
            case "byte" if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case "cut":
                del data[at : at + rng.choice((1, 4, 32, 4096, len(data)))]
            case "grow":
                data[at:at] = bytes(rng.choice((1, 8, 256, 4096)))
            case "copy":
                size = rng.choice((8, 16, 32, 56, 64))
                start = rng.randrange(len(data) + 1)
                data[at : at + size] = data[start : start + size]
            case _:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                data[at:] = other[start:] if rng.randrange(2) else other[at:]
    return bytes(data[: 1 << 20])


def _place(rng: random.Random, name: str, data: bytearray) -> int:
    """Return an offset, more often one of a table than of the middle of some code."""
    if name in FILES and rng.randrange(4):
        return min(len(data), rng.choice(hot_places(name)))
    near = rng.randrange(_NEAR_BYTES)
    places = (near, max(0, len(data) - near), rng.randrange(len(data) + 1))
    return min(len(data), rng.choice(places))


def reduced(parser: Parser, data: bytes, fault: str) -> bytes:
    """Return a smaller input with the same fault: without parts of it, and with zeros."""
    end = time.monotonic() + _REDUCING_SECONDS
    if fault in ("slow", "large"):
        return data  # trying again would take as long, and memory is not given back
    size = max(1, len(data) // 2)
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            shorter = data[:at] + data[at + size :]
            blank = data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
            if try_one(parser, shorter)[1] == fault:
                data = shorter
                continue
            if blank != data and try_one(parser, blank)[1] == fault:
                data = blank
            at += size
        size //= 2
    return data


def main(argv: list[str] | None = None) -> int:
    """Run by hand; return 1 when there was a fault."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--parser", choices=list(PARSERS))
    arguments.add_argument("--again", metavar="INPUT", help="an input that a fault printed")
    given = arguments.parse_args(argv)
    if given.again is not None:
        data = zlib.decompress(base64.b64decode(given.again))
        print(PARSERS[given.parser or "any"](data))
        return 0
    counts = run(given.seconds, given.seed)
    for name in PARSERS:
        print(f"{name:12} {counts.inputs[name]:9} inputs, {counts.shapes[name]:5} different ends")
    print(f"{counts.inputs.total()} inputs, seed {given.seed}, {len(counts.faults)} faults")
    return 1 if counts.faults else 0


if __name__ == "__main__":
    sys.exit(main())
