"""``softsgx run --gdb`` with a real gdb.

Goal: a user of gdb sees host and debug enclave as one program, a production enclave as on hardware,
and the program ends as it would without gdb.  Method: a program and an enclave with debug
information, and gdb's own commands in a file.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, PROGRAMS, NativeBuilds
from tests.support.enclave_files import KEY_FILE
from tests.support.native import USABLE_PAGERS

from softsgx.engines.native import doctor
from softsgx.image.csource import INCLUDE

SOFTSGX = [sys.executable, "-m", "softsgx"]
GDB = shutil.which("gdb")
_LACKING = [finding.text for finding in doctor() if finding.needed and not finding.ok]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(GDB is None, reason="needs gdb, which is not installed"),
    pytest.mark.skipif(bool(_LACKING), reason=f"this machine cannot: {'; '.join(_LACKING)}"),
]

QUIETLY = [
    *("set pagination off", "set confirm off", "set debuginfod enabled off", "set width 0"),
    *("set breakpoint pending on", "set sysroot /"),
]


def build(directory: Path) -> None:
    assert COMPILER is not None
    source = PROGRAMS / "debugged_host.c"
    flags = ["-g", "-O0", "-pthread", f"-I{INCLUDE}"]
    host = [COMPILER, *flags, str(source), "-o", str(directory / "host")]
    subprocess.run(host, check=True)
    enclave = str(PROGRAMS / "debugged_enclave.c")
    for name, options in (("debug", ["--debug"]), ("production", [])):
        output = ["-o", str(directory / f"{name}.sgxs"), "--cflags=-O0", "--threads=3"]
        words = [enclave, *options, *output, "--key", str(KEY_FILE)]
        subprocess.run([*SOFTSGX, "build", *words], check=True)


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> Path:
    """The directory of ``host``, ``debug.sgxs`` and ``production.sgxs``."""
    return builds.directory("debugged", build)


@dataclass
class Run:
    """A run that a gdb debugs.

    Attributes:
        gdb: what gdb has said.
        output: what the program has said.
        status: the program's exit status.
    """

    gdb: str
    output: str
    status: int


class Debugged:
    """``softsgx run --gdb`` of a program, which waits for its gdb."""

    def __init__(
        self, program: Path, socket: Path, enclave: str, *arguments: str, pager: str | None = None
    ) -> None:
        self.socket = socket
        words = ["--quiet", "--gdb", str(self.socket), *(["--pager", pager] if pager else [])]
        words += ["--", str(program / "host")]
        self.softsgx = subprocess.Popen(
            [*SOFTSGX, "run", *words, str(program / f"{enclave}.sgxs"), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.softsgx.stderr is not None
        assert "target remote" in self.softsgx.stderr.readline()

    def gdb(self, *commands: str) -> subprocess.Popen[str]:
        """Start a gdb that does ``commands``."""
        assert GDB is not None
        lines = [*QUIETLY, f"target remote {self.socket}", *commands]
        options = [word for line in lines for word in ("-ex", line)]
        return subprocess.Popen(
            [GDB, "-nx", "-batch", *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, gdb: subprocess.Popen[str]) -> Run:
        """Return how it was, at the end of both."""
        said, _nothing = gdb.communicate(timeout=60)
        output, _errors = self.softsgx.communicate(timeout=60)
        return Run(said, output, self.softsgx.returncode)

    def run(self, *commands: str) -> Run:
        """Let one gdb do ``commands``; return how it was, at the end of both."""
        return self.finish(self.gdb(*commands))

    def end(self) -> None:
        """Leave nothing behind."""
        if self.softsgx.poll() is None:
            self.softsgx.kill()
            self.softsgx.communicate()


Start = Callable[..., Debugged]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Debugged] = []

    def begin(enclave: str, *arguments: str, pager: str | None = None) -> Debugged:
        started.append(Debugged(program, tmp_path / "socket", enclave, *arguments, pager=pager))
        return started[-1]

    yield begin
    for each in started:
        each.end()


def test_a_breakpoint_inside_a_debug_enclave_shows_its_function(start: Start) -> None:
    run = start("debug", "call").run(
        *("break triple", "continue", "print value", "backtrace", "next"),
        *("print result", "info sharedlibrary", "monitor enclaves", "set var result = 40"),
        *("x/2i $pc", "continue"),
    )
    assert "triple (value=14)" in run.gdb
    assert "$1 = 14\n" in run.gdb
    assert re.search(r"#1 .* in ecall \(function=0, argument=0x0, size=14\)", run.gdb)
    assert "$2 = 42\n" in run.gdb
    assert "debug.elf" in run.gdb
    assert re.search(r"enclave 1: 0x\w+ to 0x\w+, debug, initialized, \d+ of \d+ pages", run.gdb)
    assert "exited with code 050" in run.gdb
    assert run.status == 40, run.gdb


def test_a_breakpoint_in_the_host_shows_its_function(start: Start) -> None:
    run = start("debug", "fork").run(
        *("break main", "continue", "print argc", "break twice", "continue"),
        *("print value", "backtrace", "finish", "continue"),
    )
    assert "$1 = 3\n" in run.gdb
    # The child has no breakpoint: its status is that of twice(3), and gdb sees twice(1) only.
    assert "$2 = 1\n" in run.gdb
    assert re.search(r"#1 .* in main \(", run.gdb)
    assert "Value returned is $3 = 2" in run.gdb
    assert run.status == 8, run.gdb


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_steps_lead_into_a_debug_enclave_and_out_of_it(start: Start, pager: str) -> None:
    run = start("debug", "call", pager=pager).run(
        *("break __vdso_sgx_enter_enclave", "continue", "info symbol $pc"),
        "python base = int(gdb.execute('monitor enclaves', to_string=True).split()[2], 16)",
        "python inside = lambda: base <= int(gdb.parse_and_eval('$pc')) < base + 0x1000",
        "python\nwhile not inside(): gdb.execute('stepi', to_string=True)\nend",
        "info symbol $pc",
        "python\nwhile inside(): gdb.execute('stepi', to_string=True)\nend",
        "python print('back outside')",
        *("delete", "continue"),
    )
    assert "sgx_entry in section .text" in run.gdb
    assert "back outside" in run.gdb
    assert run.status == 42, run.gdb


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("call", ["open", "mmap", "ioctl"])
def test_a_step_over_a_call_that_the_supervisor_makes_ends_behind_it(
    start: Start, call: str, pager: str
) -> None:
    run = start("debug", "call", pager=pager).run(
        *("break main", "continue", f"break {call}", "continue"),
        "python code = lambda: bytes(gdb.selected_inferior().read_memory(at(), 2))",
        "python at = lambda: int(gdb.parse_and_eval('(long)$pc'))",
        "python\nwhile code() != b'\\x0f\\x05': gdb.execute('stepi', to_string=True)\n",
        "python before = at(); gdb.execute('stepi', to_string=True)",
        "python print('the step has', at() - before, 'bytes')",
        *("delete", "continue"),
    )
    assert "the step has 2 bytes" in run.gdb, run.gdb
    assert run.status == 42, run.gdb


def test_a_production_enclave_shows_nothing(start: Start) -> None:
    run = start("production", "call").run(
        *("break __vdso_sgx_enter_enclave", "continue"),
        "python base = int(gdb.execute('monitor enclaves', to_string=True).split()[2], 16)",
        "python inside = lambda: base <= int(gdb.parse_and_eval('$pc')) < base + 0x400000",
        "python\nseen = []\nfor turn in range(120):\n    gdb.execute('stepi', to_string=True)\n"
        "    seen.append(inside())\nend",
        "python print('inside' if any(seen) else 'never inside')",
        "python\ntry: gdb.execute('x/4xb %#x' % base)\nexcept gdb.error as e: print(e)\nend",
        *("info sharedlibrary", "delete", "continue"),
    )
    assert "never inside" in run.gdb
    assert "Cannot access memory at address" in run.gdb
    assert ".elf" not in run.gdb
    assert run.status == 42, run.gdb


@pytest.mark.parametrize("kind", ["debug", "production"])
def test_an_interrupt_stops_threads_inside_and_outside(start: Start, kind: str) -> None:
    debugged = start(kind, "spin")
    gdb = debugged.gdb(
        *("continue", "info threads", "thread apply all backtrace", "thread 1", "info registers"),
        *("print shared.stop = 1", "continue"),
    )
    assert debugged.softsgx.stdout is not None
    assert debugged.softsgx.stdout.readline() == "ready\n"
    gdb.send_signal(signal.SIGINT)
    run = debugged.finish(gdb)
    assert "received signal SIGINT" in run.gdb
    assert "wait_outside" in run.gdb
    if kind == "debug":
        assert "(in debug enclave 1)" in run.gdb
        assert re.search(r"spin \(stop=0x", run.gdb)
    else:
        assert "(left production enclave 1)" in run.gdb
        assert re.search(r"rax +0x3 ", run.gdb), "RAX of the synthetic state is ERESUME"
        assert re.search(r"rdi +0x0 ", run.gdb)
        assert "__vdso_sgx_enter_enclave" in run.gdb
    assert run.status == 5, run.gdb


def test_each_thread_meets_a_breakpoint_as_often_as_it_executes_it(start: Start) -> None:
    run = start("debug", "threads").run(
        "break tally", "ignore 1 1000", "continue", "info breakpoints"
    )
    assert "already hit 60 times" in run.gdb
    assert run.status == 60, run.gdb


def test_gdb_gets_each_signal_and_decides_its_delivery(start: Start) -> None:
    run = start("debug", "signal").run("continue", "signal 0", "continue")
    assert run.gdb.count("received signal SIGUSR1") == 2
    assert run.status == 1, "the first was dropped, the second delivered"


def test_another_program_is_followed_over_execve(start: Start) -> None:
    run = start("debug", "exec").run("break triple", "continue", "print value", "continue")
    assert "is executing new program" in run.gdb
    assert "$1 = 14\n" in run.gdb
    assert run.status == 42, run.gdb


def test_a_program_goes_on_when_gdb_detaches(start: Start) -> None:
    run = start("debug", "call").run("break triple", "continue", "detach")
    assert run.status == 42, run.gdb


def test_a_program_waits_for_another_gdb_when_one_is_disconnected(start: Start) -> None:
    debugged = start("debug", "call")
    first, _nothing = debugged.gdb("break triple", "continue", "disconnect").communicate(timeout=60)
    assert "triple (value=14)" in first
    run = debugged.finish(debugged.gdb("backtrace 1", "continue"))
    assert "triple (value=14)" in run.gdb
    assert run.status == 42, run.gdb


def test_gdb_ends_the_program_when_it_quits(start: Start) -> None:
    run = start("debug", "spin").run("break triple", "kill")
    assert run.status == -signal.SIGKILL, run.gdb


def test_a_page_can_be_evicted_and_its_breakpoint_stays(start: Start) -> None:
    run = start("debug", "call").run(
        *("break sgx__dispatch", "continue", "break triple"),
        "python address = int(gdb.parse_and_eval('(long)&triple'))",
        "python print(gdb.execute('monitor evict %#x' % address, to_string=True))",
        *("continue", "print value", "continue"),
    )
    assert "is evicted" in run.gdb
    assert "$1 = 14\n" in run.gdb
    assert run.status == 42, run.gdb


def test_a_signal_ends_a_program_that_no_gdb_comes_for(start: Start) -> None:
    debugged = start("debug", "spin")
    debugged.softsgx.send_signal(signal.SIGTERM)
    debugged.softsgx.communicate(timeout=60)
    assert debugged.softsgx.returncode == -signal.SIGTERM


def test_a_strict_run_cannot_be_debugged(program: Path) -> None:
    command = [*SOFTSGX, "run", "--strict", "--gdb", "0", "--", str(program / "host")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "gdb: not possible in a strict run; remove one of the two" in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
