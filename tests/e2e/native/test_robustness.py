"""A missing feature of the machine is one line; a failure of one process affects no other.

Method: supervisors under system call filters and resource limits, and failures injected into one
process of several.
"""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support import modes
from tests.support.native import needs_tracing, needs_userfaultfd

from softsgx.engines.native import RunFailed, Supervisor, abi, kernel, libc, run
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.errors import NotRun
from softsgx.paging import Group
from softsgx.paging.ksgxd import Ksgxd
from softsgx.trace import Event

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]

_TIGHT = 25 * 4096  # no room for one enclave of the program

_FILTERED = """
import ctypes, os, sys
code = bytes.fromhex(sys.argv[1])
buffer = ctypes.create_string_buffer(code, len(code))
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint16), ("filter", ctypes.c_void_p)]
program = Program(len(code) // 8, ctypes.addressof(buffer))
libc = ctypes.CDLL(None)
assert not libc.prctl(38, 1, 0, 0, 0)
assert not libc.prctl(22, 2, ctypes.byref(program))
os.execv(sys.executable, [sys.executable, "-m", "softsgx", *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("limits"), builds.enclave(20)]


def softsgx_without(call: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command while a system call fails with EPERM."""
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (6, 0, 0, 0x5_0001)]
    code.append((6, 0, 0, abi.SECCOMP_RET_ALLOW))
    packed = b"".join(struct.pack("<HBBI", *line) for line in code).hex()
    command = [sys.executable, "-c", _FILTERED, packed, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "name"), [(abi.SYS_MEMFD_CREATE, "memory files"), (310, "process_vm_readv")]
)
def test_a_call_that_the_supervisor_cannot_do_without_is_named(call: int, name: str) -> None:
    refused = softsgx_without(call, "run", "--", "/bin/true")
    assert refused.returncode == 125
    assert refused.stderr.startswith(f"softsgx: {name}: ") and refused.stderr.count("\n") == 1
    found = softsgx_without(call, "doctor")
    assert found.returncode == 1
    assert "MISSING" in found.stdout and name in found.stdout


@pytest.mark.slow
def test_a_program_runs_where_processors_cannot_be_chosen(program: list[str]) -> None:
    done = softsgx_without(abi.SYS_SCHED_SETAFFINITY, "run", "--quiet", "--", *program, "secrets")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_limit_on_file_sizes_is_raised_for_the_supervisor_and_kept_for_the_program(
    program: list[str],
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    soft = 1 << 20
    shell = f'{" ".join(program)} secrets && [ "$(ulimit -Sf)" = "{soft // 1024}" ]'
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, before[1]))
    try:
        assert run(["/bin/bash", "-c", shell], epc=1 << 20).exit_code == 0
        assert resource.getrlimit(resource.RLIMIT_FSIZE) == (soft, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_more_processes_run_than_the_supervisor_began_with_descriptors_for() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
    shell = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do read x & done <&0; wait"
    read, write = os.pipe()
    try:
        assert run(["/bin/sh", "-c", shell], epc=1 << 20, stdio=(read, 1, 2)).exit_code in (0, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(read)
        os.close(write)


@pytest.mark.slow
def test_hundreds_of_processes_run_at_once_with_a_thousand_descriptors() -> None:
    shell = "for i in $(seq 200); do sleep 1000 & done; kill $(jobs -p); wait; exit 7"
    command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--", "/bin/bash", "-c", shell]
    limited = ["/bin/bash", "-c", 'ulimit -n 1024; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.slow
def test_without_free_descriptors_only_the_new_process_is_ended_with_a_message() -> None:
    shell = 'for i in $(seq 500); do sleep 1000 & p="$p $!"; done; kill $p; wait; exit 7'
    command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--", "/bin/bash", "-c", shell]
    limited = ["/bin/bash", "-c", 'ulimit -n 400; exec "$@"', "bash", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    told = [line for line in done.stderr.splitlines() if "is ended" in line]
    assert done.returncode == 7
    assert 0 < len(told) < (400 if modes.has("recorded") else 300)  # it serves each from its start
    assert all("too few descriptors are left to serve it" in line for line in told)
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_hard_limit_on_file_sizes_is_named() -> None:
    command = [sys.executable, "-m", "softsgx"]
    limited = ["/bin/bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *command]
    refused = subprocess.run(
        [*limited, "run", "--", "/bin/true"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 125
    assert refused.stderr.startswith("softsgx: memory files: ") and "ulimit -Hf" in refused.stderr
    assert refused.stderr.count("\n") == 1
    found = subprocess.run([*limited, "doctor"], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "ulimit -Hf" in found.stdout


@pytest.mark.slow
def test_a_proc_of_other_processes_is_named() -> None:
    """In a process namespace of its own, /proc still shows the outer one."""
    apart = ["unshare", "--user", "--map-root-user", "--pid", "--fork"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine makes no process namespaces")
    command = [*apart, sys.executable, "-m", "softsgx"]
    refused = subprocess.run(
        [*command, "run", "--", "/bin/true"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 125
    assert refused.stderr.startswith("softsgx: /proc: /proc is missing or shows another")
    found = subprocess.run([*command, "doctor"], capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "/proc" in found.stdout


@pytest.mark.slow
def test_a_run_inside_a_run_is_refused_because_a_process_has_one_tracer() -> None:
    command = [sys.executable, "-m", "softsgx", "run", "--quiet", "--"]
    nested = subprocess.run(
        [*command, *command, "/bin/true"], capture_output=True, text=True, check=False
    )
    assert nested.returncode == 125
    assert nested.stderr.startswith("softsgx: ptrace: this process is already traced, by process ")
    assert nested.stderr.count("\n") == 1


def test_a_machine_that_forbids_tracing_is_found_out_by_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(libc, "ptrace", refuse)
    with pytest.raises(NotRun, match=r"^ptrace: .* --cap-add=SYS_PTRACE.*; see softsgx doctor$"):
        run(["/bin/true"])


def test_a_directory_that_is_not_there_is_named() -> None:
    with pytest.raises(NotRun, match=r"^/no/such/directory: No such file or directory") as failed:
        run(["/bin/true"], cwd="/no/such/directory")
    assert failed.value.exit_status == 125


_KILLED = """
import os, sys
from softsgx.engines.native import abi, doctor, libc, run
ptrace = libc.ptrace
def dying(request, *arguments):
    if request == abi.PTRACE_SEIZE:
        os.kill(os.getpid(), 9)
    return ptrace(request, *arguments)
libc.ptrace = dying
doctor() if sys.argv[1] == "probe" else run(["/bin/true"], epc="1MiB")
"""


@pytest.mark.parametrize("seizes", ["probe", "start"])
def test_no_child_outlives_a_supervisor_that_is_killed_before_it_traces(seizes: str) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-c", _KILLED, seizes]
    assert subprocess.run(command, stdout=write, check=False).returncode == -9
    os.close(write)
    with os.fdopen(read) as out:
        assert out.read() == ""  # the pipe ends when no process has it any more


class Mistake(Exception):
    """One of ours, made on demand."""


def two_in_turn(program: list[str], tmp_path: Path, **options: Any) -> tuple[bytes, RunFailed]:
    """Run a program twice, one after the other, with a mistake; return what was said of both."""
    once = f"{' '.join(program)} secrets; echo $?"
    with (tmp_path / "out").open("w+b") as out, pytest.raises(RunFailed) as failed:
        run(["/bin/sh", "-c", f"{once}; {once}"], stdio=(0, out.fileno(), 2), **options)
    assert [type(error) for error in failed.value.errors] == [Mistake]
    return (tmp_path / "out").read_bytes(), failed.value


def test_a_failure_in_serving_one_process_ends_that_one_only(
    program: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([Mistake("of ours")])

    def listen(event: Event) -> None:
        if event.NAME == "sgx:enclave_init":
            for failure in failures:
                raise failure

    said, failed = two_in_turn(program, tmp_path, epc=1 << 17, tracer=listen)
    assert (said, failed.result.exit_code) == (b"137\n0\n", 0)
    assert any("is ended" in message and "of ours" in message for message in caplog.messages)


def test_processes_go_on_without_ksgxd(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve, failures = Ksgxd._serve, iter([Mistake("in ksgxd")])

    def failing(self: Ksgxd, group: Group) -> None:
        for failure in failures:
            raise failure
        serve(self, group)

    monkeypatch.setattr(Ksgxd, "_serve", failing)
    said, failed = two_in_turn(program, tmp_path, epc=_TIGHT)
    assert (said, failed.result.exit_code) == (b"0\n0\n", 0)
    assert failed.result.counters["reclaimed"], "pages are evicted after it, by those who need one"


def test_a_failure_in_taking_a_process_apart_ends_no_other(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, failures = Supervisor.thread_gone, iter([Mistake("at its end")])

    def failing(self: Supervisor, thread: ProgramThread) -> None:
        gone(self, thread)
        for failure in failures:
            raise failure

    monkeypatch.setattr(Supervisor, "thread_gone", failing)
    said, failed = two_in_turn(program, tmp_path, epc=_TIGHT)
    assert (said, failed.result.exit_code) == (b"0\n0\n", 0)


def test_a_process_in_which_no_call_can_be_made_ends_and_not_the_one_that_needs_it(
    program: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt, make = Supervisor._adopt_program, ProcessImage._make
    images: dict[str, ProcessImage] = {}

    def adopting(self: Supervisor, *arguments: Any) -> ProgramThread:
        thread = adopt(self, *arguments)
        images[Path(f"/proc/{thread.tid}/comm").read_text().strip()] = thread.image
        return thread

    def failing(self: ProcessImage, thread: ProgramThread, calls: list[tuple[int, ...]]) -> None:
        if self is images.get("sleep"):
            raise Mistake("in another process")
        make(self, thread, calls)

    def listen(event: Event) -> None:
        if event.NAME == "sgx:enclave_init":  # another process is served
            images["sleep"].inject([(abi.SYS_GETPID,)])

    monkeypatch.setattr(Supervisor, "_adopt_program", adopting)
    monkeypatch.setattr(ProcessImage, "_make", failing)
    begun = 'sleep 1000 & while [ "$(cat /proc/$!/comm)" != sleep ]; do :; done'
    argv = ["/bin/bash", "-c", f"{begun}; {' '.join(program)} secrets; echo $?; wait $!; echo $?"]
    with (tmp_path / "out").open("w+b") as out, pytest.raises(RunFailed) as failed:
        run(argv, epc=1 << 20, stdio=(0, out.fileno(), 2), tracer=listen)
    assert [type(error) for error in failed.value.errors] == [Mistake]
    assert (tmp_path / "out").read_bytes() == b"0\n137\n"


@needs_userfaultfd
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOMEM])
def test_a_request_on_an_address_space_that_the_kernel_refuses_ends_its_process_and_no_other(
    program: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    adopt, protect = Supervisor._adopt_program, kernel.protect_pages
    pagers: dict[str, UffdPager] = {}

    def adopting(self: Supervisor, *arguments: Any) -> ProgramThread:
        thread = adopt(self, *arguments)
        thread.image._start_paging()
        assert isinstance(thread.image.pager, UffdPager)
        pagers[Path(f"/proc/{thread.tid}/comm").read_text().strip()] = thread.image.pager
        return thread

    def refusing(descriptor: int, start: int, end: int, mode: int) -> int:
        if descriptor == pagers["sleep"]._uffd:
            return code
        return protect(descriptor, start, end, mode)

    def listen(event: Event) -> None:
        if event.NAME == "sgx:enclave_init":
            pagers["sleep"].before_hide(1 << 20, 3 << 20)

    monkeypatch.setattr(Supervisor, "_adopt_program", adopting)
    monkeypatch.setattr(kernel, "protect_pages", refusing)
    begun = 'sleep 1000 & while [ "$(cat /proc/$!/comm)" != sleep ]; do :; done'
    argv = ["/bin/bash", "-c", f"{begun}; {' '.join(program)} secrets; echo $?; wait $!; echo $?"]
    with (tmp_path / "out").open("w+b") as out:
        try:
            status = run(argv, epc=1 << 20, stdio=(0, out.fileno(), 2), tracer=listen).exit_code
        except RunFailed as failed:
            assert code == errno.EPERM, "a shortage is no mistake of ours"
            status = failed.result.exit_code
    assert status == 0
    assert (tmp_path / "out").read_bytes() == b"0\n137\n"
    reason = "UFFDIO_WRITEPROTECT" if code == errno.EPERM else "no memory left for its enclaves"
    assert [reason in message for message in caplog.messages] == [True]


def test_a_failure_of_the_platform_ends_every_process_and_is_summed_up(
    program: list[str], tmp_path: Path
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(_FAILING)
    command = [sys.executable, str(script), "run", "--epc", "128KiB", "--", *program, "secrets"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 125
    assert "every process is ended" in done.stderr and "EPC" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "softsgx: Exception('of ours'): a bug in softsgx; please report it"
    )


_FAILING = """
import sys
from softsgx.cli import main
from softsgx.engines.native import Supervisor
left = 50
def between(self):
    global left
    left -= 1
    if not left:
        raise Exception("of ours")
Supervisor.between, Supervisor.has_timed_work = between, lambda self: True
sys.exit(main())
"""
