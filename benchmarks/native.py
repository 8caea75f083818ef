"""The cost of the native engine for real programs, compared with its lower bounds.

Each round runs all measurements in turn:

``compute``  the same C code inside an enclave and outside, over a second each
``ecall``    a call into an enclave that does nothing
``ecall_own``  the same by an ENCLU of the program's own, as Gramine has it
``ecall_sdk``  the same, with extended state cleared at entry and exit, as Intel's SDK does
``ecall_threads``  calls in a second by 1, 2, 4, 8 threads at once, each by a TCS of its own; beside
             them what the same loop does with a C function, and what two stops would allow
``fault``    an EPC fault, with the eviction and the two AES-GCM calls that go with it: an enclave
             larger than its EPC touches its pages in order, so that each touch is a fault
``fault_random``  the same in an order in which no page follows its neighbour
``pure_fault``, ``pure_fault_random``  the same without the compiled core, where there is one
``trap``     floor of both: a breakpoint that bare Python handles as tracer, registers in and out
``c_fault``  comparison with the fault: a C program with a thread that fills pages by userfaultfd;
             no eviction, no crypto
``c_fault_calls``  a fairer comparison: a C program in another process on the same processor, which
             makes all requests to the kernel that our fault makes (event, copy; for each 16
             pages a stop of the program, page map, 16 pages read, and a hole made of them), without
             bookkeeping, crypto and checks; ``fault_minus_calls`` is what those cost us
``aesgcm_pair``  the crypto of a fault
``add_pages``, ``build``  a page of ADD_PAGES, without and with EEXTEND
``edmm_page``  a page that the enclave accepts (EAUG at the fault of EACCEPT) and touches at once
``edmm_batch_page``  the same, when all pages are accepted before the first is touched
``edmm_trim_page``  a page of a range that is trimmed, accepted and removed
``copy``, ``sha256``  comparison with ADD_PAGES: the copy out of another process, the hash of a page
``start``, ``exec``, ``fork``, ``tools``, ``supervisor``  see ``processes.py``

Best and median of all rounds, in microseconds, or MiB/s where the name says so.  Programs are
compiled when it starts.

    python benchmarks/native.py [--json] [--rounds N] [--pager NAME]
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import addressof
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.engines.native import PAGERS, abi, doctor, libc, run
from softsgx.errors import SoftSgxError
from softsgx.image import sign_plan, throwaway_key, write_sgxs
from softsgx.image.csource import BuildOptions, build_enclave, find_compiler

SOURCES = Path(__file__).parent / "native"
EPC_BYTES = 4 << 20
PAGES = 2048  # twice what the EPC has
ECALLS = 4000
THREADS = (1, 2, 4, 8)
THREAD_CALLS = {"ecall": 200_000, "function": 20_000_000}
TRAPS = 4000
PASSES = 12_000
ADDED = 4096  # pages of one ADD_PAGES
GROWN = 512
MEASURED_BYTES = PAGE_BYTES + 17 * 64  # hashed for a page: EADD, and EEXTEND of 16 chunks
SLICES = 4

# Inside and outside get the same instructions at the same places.
_SAME = ("-fcf-protection=none", "-fPIE")


@dataclass
class Times:
    """Measured microseconds by name."""

    all: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, values: list[float]) -> None:
        """Add measurements."""
        self.all.setdefault(name, []).extend(values)

    def best(self, name: str) -> float:
        """Return the least."""
        return min(self.all[name])

    def median(self, name: str) -> float:
        """Return the median."""
        return statistics.median(self.all[name])


@dataclass(frozen=True)
class Programs:
    """The compiled programs, and how to run them."""

    directory: Path
    pager: str | None

    @classmethod
    def build(cls, directory: Path, pager: str | None) -> Programs:
        """Compile all programs into ``directory``.

        Raises:
            SoftSgxError: there is no compiler.
        """
        found = find_compiler()
        named = type(found)((*found.command, *found.baseline, *_SAME), found.linker, found.baseline)
        options = BuildOptions(heap_bytes=(PAGES + 16) * PAGE_BYTES, threads=max(THREADS))
        plan = build_enclave([SOURCES / "inside.c"], named, options)
        with (directory / "inside.sgxs").open("wb") as file:
            file.writelines(write_sgxs(plan))
        (directory / "inside.sig").write_bytes(sign_plan(plan, throwaway_key()).pack())
        named.host([SOURCES / "host.c"], directory / "host")
        named.host([SOURCES / "rival.c"], directory / "rival")
        named.host([SOURCES / "pages.c"], directory / "pages")
        return cls(directory, pager)

    def engine(self, *arguments: object, epc_bytes: int) -> tuple[list[list[float]], int]:
        """Run the host program under the engine; return the numbers it printed, and reloads."""
        return self._run("host", self.directory / "inside.sgxs", *arguments, epc_bytes=epc_bytes)

    def pages(self, *arguments: object) -> list[list[float]]:
        """Run the program that adds pages; return the numbers it printed."""
        return self._run("pages", *arguments, epc_bytes=64 << 20)[0]

    def _run(
        self, program: str, *arguments: object, epc_bytes: int
    ) -> tuple[list[list[float]], int]:
        reading, writing = os.pipe()
        try:
            argv = [str(self.directory / program), *map(str, arguments)]
            result = run(argv, epc=epc_bytes, pager=self.pager, stdio=(0, writing, 2))
        finally:
            os.close(writing)
        with os.fdopen(reading) as out:
            numbers = [[float(word) for word in line.split()] for line in out]
        if result.exit_code:
            raise SoftSgxError(f"{argv[0]}: ended with status {result.exit_code}")
        reloads = result.counters["eldu"]
        assert isinstance(reloads, int)
        return numbers, reloads

    def rival(self, how: str) -> list[float]:
        """Return the seconds of each slice of faults handled in C; none without userfaultfd."""
        argv = [str(self.directory / "rival"), how, str(PAGES), str(SLICES)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"rival {how}: {done.stderr.strip()}", file=sys.stderr)
            return []
        return [float(line) for line in done.stdout.split()]

    def trap(self) -> float:
        """Return the seconds of one trap handled by a bare tracer in Python."""
        pid = os.fork()
        if pid == 0:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            os.kill(os.getpid(), signal.SIGSTOP)
            os.execv(self.directory / "rival", ["rival", "trap", str(TRAPS)])
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            os.waitpid(pid, os.WUNTRACED)
            libc.ptrace(abi.PTRACE_SEIZE, pid, 0, abi.PTRACE_O_EXITKILL)
            os.kill(pid, signal.SIGCONT)
            return _handle_traps(pid)
        finally:
            os.sched_setaffinity(0, allowed)


def _handle_traps(pid: int) -> float:
    registers = abi.UserRegs()
    at, ptrace, waitpid = addressof(registers), libc.raw_ptrace, os.waitpid
    get, put, go = abi.PTRACE_GETREGS, abi.PTRACE_SETREGS, abi.PTRACE_CONT
    handled, start, end = 0, 0, 0
    while True:
        _pid, status = waitpid(pid, 0)
        if not os.WIFSTOPPED(status):
            break
        if status >> 8 != signal.SIGTRAP:
            ptrace(go, pid, 0, 0)
            continue
        ptrace(get, pid, 0, at)
        ptrace(put, pid, 0, at)
        ptrace(go, pid, 0, 0)
        handled += 1
        end = time.perf_counter_ns()
        start = start or end
    assert handled >= TRAPS, f"{handled} traps of {TRAPS}"
    return (end - start) / (handled - 1) * 1e-9


def _crypto(count: int = 1000) -> float:
    """Return the seconds of one encryption and one decryption of a page."""
    aead, nonce, header = AESGCM(os.urandom(16)), bytes(12), bytes(128)
    plain = os.urandom(PAGE_BYTES)
    sealed = aead.encrypt(nonce, plain, header)
    start = time.perf_counter()
    for _ in range(count):
        aead.encrypt(nonce, plain, header)
        aead.decrypt(nonce, sealed, header)
    return (time.perf_counter() - start) / count


def _faults(programs: Programs, times: Times) -> None:
    rounds = 2
    touches = PAGES * (rounds + 1)  # the last pass puts the pages back
    for how, name in (("touch", "fault"), ("scatter", "fault_random")):
        slices, reloads = programs.engine(how, PAGES, rounds, SLICES, epc_bytes=EPC_BYTES)
        if reloads < 0.95 * touches * SLICES:
            raise SoftSgxError(f"{how}: {reloads} reloads for {touches * SLICES} touches")
        times.add(name, [numbers[0] / touches * 1e6 for numbers in slices])


def _pure_faults(programs: Programs, times: Times) -> None:
    """Measure faults without the compiled core, in a process of its own."""
    if compiled.speedups is None:
        return
    argv = [sys.executable, __file__, "--only-faults", str(programs.directory)]
    if programs.pager is not None:
        argv += ["--pager", programs.pager]
    environment = {**os.environ, compiled.PURE: "1"}
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, env=environment)
    for name, values in json.loads(done.stdout).items():
        times.add(f"pure_{name}", values)


def _computing(programs: Programs, times: Times) -> None:
    slices, _reloads = programs.engine("compute", SLICES, PASSES, epc_bytes=4 * EPC_BYTES)
    times.add("inside", [numbers[0] * 1e6 for numbers in slices])
    times.add("outside", [numbers[1] * 1e6 for numbers in slices])


def _ecalls(programs: Programs, times: Times) -> None:
    slices, _reloads = programs.engine("ecall", ECALLS, SLICES, epc_bytes=4 * EPC_BYTES)
    times.add("ecall", [numbers[0] / ECALLS * 1e6 for numbers in slices])
    slices, _reloads = programs.engine("own", ECALLS, SLICES, epc_bytes=4 * EPC_BYTES)
    times.add("ecall_own", [numbers[0] / ECALLS * 1e6 for numbers in slices])
    slices, _reloads = programs.engine("clear", ECALLS, SLICES, epc_bytes=4 * EPC_BYTES)
    times.add("ecall_sdk", [numbers[0] / ECALLS * 1e6 for numbers in slices])


def _threads(programs: Programs, times: Times) -> None:
    for threads in THREADS:
        for mode, name in (("threads", "ecall"), ("functions", "function")):
            arguments = mode, threads, THREAD_CALLS[name], 2
            slices, _reloads = programs.engine(*arguments, epc_bytes=4 * EPC_BYTES)
            calls = threads * THREAD_CALLS[name]
            times.add(f"{name}_{threads}", [numbers[0] / calls * 1e6 for numbers in slices])


def _adding(programs: Programs, times: Times) -> None:
    for name, kind in (("add", 1), ("measured", 2)):
        slices = programs.pages("add", ADDED, kind, SLICES)
        times.add(name, [numbers[0] / ADDED * 1e6 for numbers in slices])
    source = ctypes.create_string_buffer(os.urandom(libc.MOST_PAGES * PAGE_BYTES))
    times.add("copy", [_page_us(lambda: _copy(source)) for _ in range(SLICES)])
    data = os.urandom(libc.MOST_PAGES * MEASURED_BYTES)
    times.add("sha256", [_page_us(lambda: hashlib.sha256(data)) for _ in range(SLICES)])


def _copy(source: ctypes.Array[ctypes.c_char]) -> None:
    libc.read_pages(os.getpid(), addressof(source), libc.MOST_PAGES)


def _page_us(work: Callable[[], object], count: int = 64) -> float:
    """Return the microseconds of a page, where ``work`` does as many as are read at once."""
    start = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - start) / count / libc.MOST_PAGES * 1e6


def _growing(programs: Programs, times: Times) -> None:
    for how, name in (("grow", "edmm_page"), ("grow-all", "edmm_batch_page")):
        slices = programs.pages(how, programs.directory / "inside.sgxs", GROWN, SLICES)
        times.add(name, [numbers[0] / GROWN * 1e6 for numbers in slices])
        times.add("edmm_trim_page", [numbers[1] / GROWN * 1e6 for numbers in slices])


def measure(programs: Programs, rounds: int) -> Times:
    """Run all measurements in turn."""
    times = Times()
    steps: list[Callable[[], None]] = [
        lambda: times.add("trap", [programs.trap() * 1e6]),
        lambda: _ecalls(programs, times),
        lambda: _threads(programs, times),
        lambda: times.add("aesgcm_pair", [_crypto() * 1e6]),
        lambda: times.add("c_fault", [t / PAGES * 1e6 for t in programs.rival("fault")]),
        lambda: times.add("c_fault_calls", [t / PAGES * 1e6 for t in programs.rival("calls")]),
        lambda: _faults(programs, times),
        lambda: _pure_faults(programs, times),
        lambda: _computing(programs, times),
        lambda: _adding(programs, times),
        lambda: _growing(programs, times),
    ]
    for _round in range(rounds):
        for step in steps:
            step()
    return times


def _processes(rounds: int) -> dict[str, object]:
    """Return the rows of ``processes.py``."""
    argv = [sys.executable, str(SOURCES.parent / "processes.py"), "--rounds", str(rounds)]
    rows = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    assert isinstance(rows, dict), f"{argv[1]} prints an object"
    return rows


def report(times: Times) -> dict[str, object]:
    """Return the report."""
    result: dict[str, object] = {}
    grown = ("edmm_page", "edmm_batch_page", "edmm_trim_page")
    for name in (
        "ecall",
        "ecall_own",
        "ecall_sdk",
        "trap",
        "fault",
        "fault_random",
        "pure_fault",
        "pure_fault_random",
        "c_fault",
        "c_fault_calls",
        "aesgcm_pair",
        *grown,
    ):
        if times.all.get(name):
            result[f"{name}_us"] = round(times.best(name), 2)
            result[f"{name}_median_us"] = round(times.median(name), 2)
    result["compute_ratio"] = round(times.best("inside") / times.best("outside"), 4)
    pairs = zip(times.all["inside"], times.all["outside"], strict=True)
    result["compute_ratio_median"] = round(statistics.median(i / o for i, o in pairs), 4)
    result["compute_inside_s"] = round(sum(times.all["inside"]) / 1e6, 2)
    result["compute_outside_s"] = round(sum(times.all["outside"]) / 1e6, 2)
    result["ecall_per_two_traps"] = round(times.best("ecall") / (2 * times.best("trap")), 2)
    for name in ("ecall", "function"):
        result[f"{name}_threads_per_s"] = {
            threads: round(1e6 / times.best(f"{name}_{threads}")) for threads in THREADS
        }
    result["two_stops_per_s"] = round(1e6 / (2 * times.best("trap")))
    names = {"add": "add_pages", "measured": "build", "copy": "copy", "sha256": "sha256"}
    for name, row in names.items():
        result[f"{row}_mib_per_s"] = round(PAGE_BYTES / (1 << 20) / times.best(name) * 1e6, 1)
    for name in grown:
        result[f"{name}_per_trap"] = round(times.best(name) / times.best("trap"), 2)
    if times.all.get("c_fault"):
        floor = times.best("c_fault") + times.best("aesgcm_pair")
        for name in ("fault", "fault_random"):
            result[f"{name}_per_rival"] = round(times.best(name) / floor, 2)
    if times.all.get("c_fault_calls"):
        calls = times.best("c_fault_calls")
        for name in ("fault", "fault_random"):
            result[f"{name}_minus_calls_us"] = round(times.best(name) - calls, 2)
            result[f"{name}_per_calls"] = round(times.best(name) / calls, 2)
    for name in ("fault", "fault_random"):
        if times.all.get(f"pure_{name}"):
            ratio = times.best(f"pure_{name}") / times.best(name)
            result[f"{name}_compiled_speedup"] = round(ratio, 2)
    return result


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default 5)")
    parser.add_argument("--pager", choices=PAGERS, help="default: the best this machine allows")
    parser.add_argument("--only-faults", type=Path, metavar="PROGRAMS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_faults:
        times = Times()
        _faults(Programs(args.only_faults, args.pager), times)
        print(json.dumps(times.all))
        return 0
    for finding in doctor():
        if not finding.ok and (finding.needed or finding.name == "userfaultfd"):
            print(f"{finding.name}: {finding.text}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="softsgx-") as scratch:
            programs = Programs.build(Path(scratch), args.pager)
            result = report(measure(programs, args.rounds))
            result |= _processes(min(args.rounds, 3))
    except SoftSgxError as error:
        print(f"native.py: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    for name, value in result.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            print(f"{name:34} {part:>2} {number:>12}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
