"""After every kind of end, no process, file or EPC page of a run remains, and no secret leaks.

Goal: processes, memory files and EPC after ends of every kind, also beside other runs; output of
supervisors.  Method: programs that wait to be killed or work under pressure, and a check of
processes and files afterwards.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.children import running
from tests.support.native import needs_both_pagers, needs_tracing

from softsgx.engines.native import abi, run
from softsgx.host import Platform
from softsgx.paging import FileBacking, TemporaryFile
from softsgx.trace import Event

EPC = 28 * 4096
SECRET = (0x5345435245545F5F).to_bytes(8, "little")  # what limits.c puts into every page
RUN = """
import sys
from softsgx.engines.native import run
sys.exit(run(sys.argv[1:], epc=1 << 17).exit_code)
"""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("limits"), builds.enclave(40)]


def memory_files() -> list[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    found = [os.readlink(link) for link in links if os.path.lexists(link)]
    return [name for name in found if "memfd:sgx_enclave" in name or "memfd:softsgx" in name]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_nothing_stays_when_a_program_is_killed_inside_an_enclave(
    program: list[str], number: signal.Signals
) -> None:
    before = memory_files()
    read, write = os.pipe()

    def kill() -> None:
        with os.fdopen(read) as lines:
            os.kill(int(lines.readline().split()[1]), number)

    killer = threading.Thread(target=kill)
    killer.start()
    result = run([*program, "sit"], epc=EPC, stdio=(0, write, 2))
    killer.join()
    os.close(write)
    assert result.exit_code == -number
    assert set(result.counters["held"].values()) == {0}  # type: ignore[attr-defined]
    assert memory_files() == before


def test_every_process_ends_with_a_supervisor_that_is_killed(program: list[str]) -> None:
    quoted = " ".join(program)
    shell = ["/bin/sh", "-c", f"{quoted} sit & {quoted} sit & wait"]
    with running([sys.executable, "-c", RUN, *shell], stdout=subprocess.PIPE) as started:
        assert started.stdout is not None
        pids = [int(started.stdout.readline().split()[1]) for _program in range(2)]
        ends = [os.pidfd_open(pid) for pid in pids]
        started.kill()
        # The pipe ends when nobody has it any more.
        assert started.stdout.read() == b""
    # A process lets go of its descriptors a little before it has ended.
    for end in ends:
        assert select.select([end], [], [], 10)[0], "a program outlived its supervisor"
        os.close(end)


def test_programs_share_one_epc_without_seeing_each_other(program: list[str]) -> None:
    quoted = " ".join(program)
    shell = f"{quoted} secrets & a=$!; {quoted} secrets & b=$!; wait $a && wait $b"
    result = run(["/bin/sh", "-c", shell], epc=EPC)
    assert result.exit_code == 0
    assert result.counters["eldu"]
    assert set(result.counters["held"].values()) == {0}  # type: ignore[attr-defined]


def test_supervisors_run_side_by_side(program: list[str]) -> None:
    command = [sys.executable, "-c", RUN, *program, "secrets"]
    both = [subprocess.Popen(command) for _supervisor in range(2)]
    assert [one.wait() for one in both] == [0, 0]


_REFUSE = """
import ctypes, sys
from softsgx.engines.native import libc, run
from softsgx.errors import SoftSgxError
code = bytes.fromhex(sys.argv[1])
buffer = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("filter", ctypes.c_void_p)]
program = Program(len(code) // 8, ctypes.addressof(buffer))
libc.syscall(157, 38, 1, 0, 0, 0)
libc.syscall(157, 22, 2, ctypes.addressof(program), 0, 0)
result = run(sys.argv[2:], epc=1 << 17)
assert result.pager == "mprotect", result.pager
try:
    run(sys.argv[2:], pager="userfaultfd")
except SoftSgxError as error:
    print(error)
sys.exit(result.exit_code)
"""


@needs_both_pagers
def test_where_userfaultfd_is_refused_mprotect_serves(program: list[str]) -> None:
    refuse = [(0x20, 0, 0, 0), (0x15, 0, 1, abi.SYS_USERFAULTFD), (6, 0, 0, 0x5_0001)]
    refuse.append((6, 0, 0, abi.SECCOMP_RET_ALLOW))
    code = b"".join(struct.pack("<HBBI", *line) for line in refuse).hex()
    command = [sys.executable, "-c", _REFUSE, code, *program, "secrets"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "choose the mprotect pager" in done.stdout and done.stdout.count("\n") == 1


def test_malformed_requests_get_the_errno_of_linux(program: list[str]) -> None:
    assert run([*program, "refusals"], epc=64 * 4096).exit_code == 0


def _resident() -> bytes:
    """Return what this process' memory files hold, where resident pages are by design."""
    found = b""
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if os.path.lexists(link) and "sgx_enclave" in os.readlink(link):
            at = 0
            while True:
                try:
                    at = os.lseek(int(name), at, os.SEEK_DATA)
                except OSError:
                    break
                end = os.lseek(int(name), at, os.SEEK_HOLE)
                found += os.pread(int(name), end - at, at)
                at = end
    return found


def test_secrets_of_evicted_pages_are_in_no_backing_file_and_no_event(
    program: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[bytes] = []
    resident: list[bool] = []

    class Watched(TemporaryFile):
        def write(self, place: int, data: memoryview, done: int) -> int:
            stored.append(bytes(data))
            written = super().write(place, data, done)
            stored.append(self.read(place))
            resident.append(SECRET in _resident())
            return written

    monkeypatch.setattr(
        Platform, "_configured_backing", lambda _self, _pages: FileBacking(open_disk=Watched)
    )
    events: list[str] = []

    def listen(event: Event) -> None:
        events.append(repr(event))

    result = run([*program, "secrets"], epc=EPC, tracer=listen)
    assert result.exit_code == 0
    evicted = result.counters["reclaimed"]
    assert isinstance(evicted, int) and evicted >= 40
    assert any(resident), "the secret could not have been found at all"
    assert any(any(data) for data in stored) and not any(SECRET in data for data in stored)
    assert events and not any("TERCES" in text for text in events)


@pytest.mark.slow
def test_secrets_are_in_no_file_that_the_command_writes(program: list[str], tmp_path: Path) -> None:
    words = ["--epc", "128KiB", "--trace", "trace", "--json", "run.json", "--report", "run.html"]
    command = [sys.executable, "-m", "softsgx", "run", *words, "--", *program, "secrets"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["run.html", "run.json", "trace"]
    for text in (done.stdout, done.stderr, *(path.read_bytes() for path in tmp_path.iterdir())):
        assert b"TERCES" not in text and b"SECRET" not in text
