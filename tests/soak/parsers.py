"""Damaged input for every parser, for a given time.

Method: damage valid inputs, and inputs that reached new behaviour (``mutate.py``).  The behaviour
of an input is the line that refuses it, or the shape of the parsed result: each refusal is a
separate branch, so this approximates coverage at a low cost.  Where Python reports lines that were
never executed before (``coverage.py``), a new line counts as well.  An image that is read is
measured and verified when the behaviour is new, and otherwise for one input in sixteen.

A fault is any exception but SoftSgxError, a refusal of more than one line, an input that takes more
than ``SLOW_SECONDS`` of processor time, or one that takes more than ``LARGE_BYTES`` of memory.  A
fault is reduced and printed.

The inputs depend on the seed alone; with lines watched, also on what the process has executed
before.  ``python -m tests.soak.parsers --seconds 60 --seed 3`` runs it by hand;
``parsers_atheris.py`` gives the same parsers to a fuzzer that watches branches.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import resource
import struct
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import cache, partial
from itertools import islice
from pathlib import Path

from tests.soak import Found
from tests.soak.coverage import NewLines
from tests.soak.mutate import Mutator
from tests.support.damage import FILES, SMALL, original, small_library, tables_of
from tests.support.enclave_files import sdk_library
from tests.unit.image.test_evidence import BODY, ecdsa_quote, epid_quote, token

from softsgx.accesses import FORMATS, Trace, parse_trace, write_trace
from softsgx.arch import SigStruct
from softsgx.cgroup import EpcCgroup, Hierarchy, write_file
from softsgx.engines.native.x86.insn import decode, is_illegal_inside, is_write
from softsgx.errors import SoftSgxError
from softsgx.host import PlatformConfig
from softsgx.image import (
    Bytes,
    EnclaveImage,
    SdkLayout,
    lay_out_sdk,
    measure,
    read_evidence,
    read_image,
    read_oe_config,
    read_sdk_config,
    verify,
)
from softsgx.runtime import InlineRuntime
from softsgx.sizes import parse_size

__all__ = ["PARSERS", "SEEDS", "Counts", "Fault", "Parser", "fuzz", "run", "try_one"]

SLOW_SECONDS = 5.0
LARGE_BYTES = 256 << 20
_MEASURED_BYTES = 1 << 20
_CORPUS_INPUTS, _INPUT_BYTES = 1000, 1 << 16
_CHEAP_SECONDS = 0.25  # more than that, and what follows from an input is not worth its time
_ALSO_DEEPER = 16  # one in so many
_MESSAGE_CHARACTERS = 1000
_REDUCING_SECONDS = 20.0
_PLACE_FRAMES = 3

Parser = Callable[[bytes], str]
"""Reads its input and returns the shape of what it read; refuses with SoftSgxError."""


def _read(file_format: str | None, data: bytes) -> EnclaveImage:
    return read_image(Bytes("input", data), file_format=file_format)


def _shape(image: EnclaveImage) -> str:
    runs = len(image.plan.runs).bit_length()
    return f"{image.format} {runs} {len(image.variants)} {image.notes}"


def _used(image: EnclaveImage) -> str:
    """Do with an image what commands do."""
    measure(image.plan, limit_bytes=_MEASURED_BYTES)
    if image.sigstruct is None:
        return ""
    return str([check.name for check in verify(image.sigstruct) if not check.ok])


def _laid_out(data: bytes) -> EnclaveImage:
    dynamic = SdkLayout(threads=3, stack_max=4, miscselect=1, misc_mask=0, heap_max=8, heap_min=1)
    return _read("sdk", lay_out_sdk(Bytes("input", data), dynamic))


def _then(
    use: Callable[[EnclaveImage], str], read: Callable[[bytes], EnclaveImage], data: bytes
) -> str:
    return use(read(data))


def _evidence(data: bytes) -> str:
    found = read_evidence(Bytes("input", data))
    return "nothing" if found is None else f"{found.title} {found.problems}"


def _sigstruct(data: bytes) -> str:
    padded = data[: SigStruct.SIZE].ljust(SigStruct.SIZE, b"\0")
    return str([check.name for check in verify(SigStruct.unpack(padded)) if not check.ok])


def _platform(data: bytes) -> str:
    config = PlatformConfig.parse(data, "input")
    return f"{len(config.groups)} {len(config.section_bytes())} {config.backing}"


def _size(data: bytes) -> str:
    try:
        return str(parse_size(data.decode(errors="surrogateescape")).bit_length())
    except ValueError as error:  # as it refuses
        raise SoftSgxError(str(error)) from error


@cache
def _group() -> EpcCgroup:
    return Hierarchy(100, InlineRuntime()).make("jobs")


def _limit(data: bytes) -> str:
    try:
        write_file(_group(), "misc.max", data.decode(errors="surrogateescape"))
    except OSError as error:  # as the file refuses
        raise SoftSgxError(f"errno {error.errno}") from error
    return str(_group().max_pages is None)


def _instruction(data: bytes) -> str:
    code = data[:15]
    found = decode(code)
    write = is_write(code, 0x1000, 0x1008, 0x1000)
    assert found is None or 0 < found.length <= len(code), f"{found} of {code.hex()}"
    return f"{found and (found.length, found.map, found.store)} {write} {is_illegal_inside(data)}"


_CHUNKS = 2  # of a trace: a small file can have very many


def _trace(file_format: str, data: bytes) -> str:
    with parse_trace(io.BytesIO(data), "input", file_format) as reader:
        accesses = sum(len(chunk) for chunk in islice(reader, _CHUNKS))
        return f"{accesses.bit_length()} {len(reader.info.enclaves)} {reader.info.complete}"


_IMAGES: dict[str, Callable[[bytes], EnclaveImage]] = {
    **{name: partial(_read, name) for name in FILES},
    "any": partial(_read, None),
    "sdk layout": _laid_out,
}

PARSERS: dict[str, Parser] = {
    **{name: partial(_then, _shape, read) for name, read in _IMAGES.items()},
    "sdk config": lambda data: str(read_sdk_config(Bytes("input", data)).layout.keys()),
    "oe config": lambda data: str(read_oe_config(Bytes("input", data), 6).keys()),
    "evidence": _evidence,
    "sigstruct": _sigstruct,
    "platform": _platform,
    "size": _size,
    "misc.max": _limit,
    "instruction": _instruction,
    **{f"{name} trace": partial(_trace, name) for name in FORMATS},
}
DEEPER: dict[str, Parser] = {name: partial(_then, _used, read) for name, read in _IMAGES.items()}
"""What is done with some of the inputs of a parser besides."""

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


_KEYS = (
    *(item.name.encode() for item in fields(PlatformConfig)),
    *(b"sgx1-client", b"sgx2-server", b"memory", b"file", b"linux", b"groups", b"jobs/a"),
    *(b"64KiB", b"93.5MiB", b"1TiB", b"0.0000001KiB", b"/tmp", b"'''", b'"""'),
)
_INSTRUCTIONS = (
    bytes.fromhex("48890424"),
    bytes.fromhex("660f6f050000000090"),
    bytes.fromhex("f3a4"),
    bytes.fromhex("c5f97f4508"),
    bytes.fromhex("62f17c48118510000000"),
    bytes.fromhex("f20f38f1c1"),
    bytes.fromhex("0f01d7"),
)
_SDK_NAMES = b"""
    EnclaveConfiguration ProdID ISVSVN ReleaseType IntelSigned ProvisionKey LaunchKey DisableDebug
    HW TCSNum TCSMaxNum TCSMinPool TCSPolicy StackMaxSize StackMinSize HeapMaxSize HeapMinSize
    HeapInitSize ReservedMemMaxSize ReservedMemMinSize ReservedMemInitSize ReservedMemExecutable
    MiscSelect MiscMask EnableKSS ISVFAMILYID_H ISVFAMILYID_L ISVEXTPRODID_H ISVEXTPRODID_L
    EnclaveImageAddress ELRangeStartAddress ELRangeSize PKRU AMX UserRegionSize EnableAEXNotify
    EnableIPPFIPS EnableOSSLFIPS <!DOCTYPE <!ENTITY <![CDATA[ <!-- --> />
"""
_OE_NAMES = b"""
    Debug NumHeapPages NumStackPages NumTCS ProductID SecurityVersion FamilyID ExtendedProductID
    RequireKSS CreateZeroBaseEnclave StartAddress CapturePFGPExceptions
"""
WORDS: dict[str, tuple[bytes, ...]] = {
    "sdk config": tuple(_SDK_NAMES.split()),
    "oe config": tuple(_OE_NAMES.split()),
    "platform": _KEYS,
    "size": (b"B", b"KiB", b"MiB", b"GiB", b"TiB", b"Pi", b"MB", b"k", b".", b"kb"),
    "misc.max": (b"sgx_epc", b"max", b"0x", b"0", b"8192", b"res_a"),
    "text trace": (b"page", b"address", b"write", b"time_ns", b"0x", b",", b"\t", b"r", b"w"),
    "lackey trace": (b"I  ", b" L ", b" S ", b" M ", b"==", b",", b"fff", b"\n"),
}
"""Names that the texts are about; a parser that is not here reads bytes."""


def _valid(*names: str) -> list[bytes]:
    return [make[name]() for name in names for make in (FILES, SMALL) if name in make]


def _signature() -> bytes:
    signed = _read("oe", original("oe")).sigstruct
    assert signed is not None, "the file is signed"
    return signed.pack()


def _trace_file() -> bytes:
    file = io.BytesIO()
    write_trace(file, Trace.of([(3, True), (0, False), (7, True)] * 9))
    return file.getvalue()


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    **{name: partial(_valid, name) for name in FILES},
    "any": partial(_valid, *FILES),
    "sdk layout": lambda: [sdk_library().data, small_library()],
    "sdk config": lambda: [_XML],
    "oe config": lambda: [_CONF],
    "evidence": lambda: [token(), BODY.pack(), ecdsa_quote(), epid_quote()],
    "sigstruct": lambda: [SigStruct(exponent=3).pack(), _signature()],
    "platform": lambda: [_TOML],
    "size": lambda: [b"93.5MiB", b"4096", b"1 GiB"],
    "misc.max": lambda: [b"sgx_epc 8192\n", b"sgx_epc max", b"sgx_epc 0x4000"],
    "instruction": lambda: list(_INSTRUCTIONS),
    "softsgx trace": lambda: [_trace_file()],
    "text trace": lambda: [b"5 r\n0x0,w\n# x\n5\n", b"time_ns,address,write\n1,0x7fff123,w\n"],
    "lackey trace": lambda: [b"==1== Lackey\nI  04222540,3\n S 1ffeffeffc,8\n M 04222ff8,8\n"],
    "oracleGeneral trace": lambda: [struct.pack("<IQIq", 1, 2, 3, 4) * 3],
}
"""What is damaged first, by parser."""

_TURNS = [
    *["sdk layout"],
    *["sdk", "oe", "any"] * 2,
    *["sgxs", "raw", "selftest", "sdk config", "oe config"] * 4,
    *["evidence", "sigstruct", "platform"] * 4,
    *["size", "misc.max", "instruction", *(f"{name} trace" for name in FORMATS)] * 6,
]
"""Who gets how many of the inputs: the less, the more time one takes."""
assert set(_TURNS) == PARSERS.keys(), "a parser without its turn"


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


def try_one(parser: Parser, data: bytes) -> tuple[str, str, float]:
    """Return (shape, fault, seconds) of an input.

    The shape says where it led, the fault what is wrong there, empty for nothing; the time is the
    processor's.
    """
    started = time.thread_time()
    memory = _peak_bytes()
    fault = ""
    try:
        shape = parser(data)
    except SoftSgxError as error:
        text, shape = str(error), _place(error)
        if len(text) > _MESSAGE_CHARACTERS or len(text.splitlines()) != 1:
            fault = f"a refusal of {len(text)} characters, {len(text.splitlines())} lines"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        shape = fault = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
    seconds = time.thread_time() - started
    if seconds > SLOW_SECONDS:
        fault = "slow"
    if _peak_bytes() - memory > LARGE_BYTES:
        fault = "large"
    return shape, fault, seconds


def _place(error: Exception) -> str:
    """Return where an error was raised: the innermost lines, each a branch that was taken."""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        lines.append(f"{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " ".join(lines[-_PLACE_FRAMES:])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class _Course:
    """How far the inputs of one parser have come."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self._parser, self._deeper = PARSERS[name], DEEPER.get(name)
        self.corpus = SEEDS[name]()
        hot = tables_of(self.corpus[-1]) if self._deeper else ()
        self._mutator = Mutator(rng, hot, text=name in WORDS, words=WORDS.get(name, ()))
        self._rng, self.shapes = rng, set[str]()
        self.faults: dict[str, Fault] = {}

    def step(self, lines: NewLines | None) -> None:
        """Try one more input."""
        data = self._mutator.mutated(self.corpus)
        before = lines.seen if lines else 0
        shape, fault, seconds = try_one(self._parser, data)
        found = shape not in self.shapes or (lines is not None and lines.seen != before)
        if fault:
            self._report(self._parser, data, fault)
        elif self._deeper and (found or self._rng.random() * _ALSO_DEEPER < 1):
            _, fault, more = try_one(self._deeper, data)
            seconds += more
            if fault:
                self._report(self._deeper, data, fault)
        if not found:
            return
        self.shapes.add(shape)
        if seconds > _CHEAP_SECONDS or len(data) > _INPUT_BYTES:
            return
        if len(self.corpus) < _CORPUS_INPUTS:
            self.corpus.append(data)

    def _report(self, parser: Parser, data: bytes, fault: str) -> None:
        if fault not in self.faults:
            self.faults[fault] = Fault(self.name, fault, reduced(parser, data, fault))
            print(self.faults[fault].text(), flush=True)


def run(seconds: float, seed: int) -> dict[str, int]:
    """Run histories until ``seconds`` are over; see :mod:`tests.soak`."""
    counts = fuzz(seconds, seed)
    done = {"parser inputs": counts.inputs.total()} | {
        f"parser inputs, {name}": count for name, count in counts.inputs.items()
    }
    if counts.faults:
        raise Found("\n".join(fault.text() for fault in counts.faults), done)
    return done


def fuzz(
    seconds: float, seed: int, *, inputs: int | None = None, watch_lines: bool = True
) -> Counts:
    """Try inputs until the time is up or a number is reached; print faults.

    Args:
        seconds: of wall-clock time.
        seed: decides which inputs, in which order.
        inputs: how many at most.
        watch_lines: whether lines that are executed for the first time count as something new.
    """
    rng = random.Random(seed)
    courses = {name: _Course(name, rng) for name in PARSERS}
    turns = [courses[name] for name in _TURNS if name in courses]
    counts = Counts()
    end, done = time.monotonic() + seconds, 0
    with NewLines() if watch_lines else nullcontext() as lines:
        while time.monotonic() < end and (inputs is None or done < inputs):
            course = turns[int(rng.random() * len(turns))]
            course.step(lines)
            counts.inputs[course.name] += 1
            done += 1
    for name, course in courses.items():
        counts.shapes[name] = len(course.shapes)
        counts.faults += course.faults.values()
    return counts


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
        name = given.parser or "any"
        print(PARSERS[name](data), DEEPER[name](data) if name in DEEPER else "")
        return 0
    counts = fuzz(given.seconds, given.seed)
    for name in PARSERS:
        print(f"{name:12} {counts.inputs[name]:9} inputs, {counts.shapes[name]:5} different ends")
    print(f"{counts.inputs.total()} inputs, seed {given.seed}, {len(counts.faults)} faults")
    return 1 if counts.faults else 0


if __name__ == "__main__":
    sys.exit(main())
