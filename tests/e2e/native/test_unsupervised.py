"""32-bit programs run without supervision, and 64-bit programs in the same tree are supervised.

Method: executables of a few instructions, assembled by the test, since compilers for 32-bit code
are rarely installed.
"""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.ends import kill_at_event
from tests.support.native import needs_tracing

from softsgx.engines.native import run
from softsgx.engines.native.tracing.program import Process
from softsgx.engines.native.tracing.unsupervised import Unsupervised

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]

_BASE, _HEADERS = 0x10000, 52 + 32
_INT80 = b"\xcd\x80"


def elf32(path: Path, code: bytes, data: bytes = b"") -> str:
    """Write a static executable: ``code``, and ``data`` behind it."""
    size = _HEADERS + len(code) + len(data)
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    entry = _BASE + _HEADERS
    header = struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, 1, 40, 0, 0)
    segment = struct.pack("<8I", 1, 0, _BASE, _BASE, size, size, 7, 0x1000)
    path.write_bytes(ident + header + segment + code + data)
    path.chmod(0o755)
    return str(path)


def load(register: int, value: int) -> bytes:
    """MOV of a constant: 0 EAX, 1 ECX, 2 EDX, 3 EBX."""
    return bytes([0xB8 + register]) + struct.pack("<I", value)


def forking(path: Path, status: int) -> str:
    """fork; the child exits with ``status``; the parent waits and exits with the child's."""
    child = load(3, status) + load(0, 1) + _INT80
    wait = load(3, 0xFFFF_FFFF) + b"\x83\xec\x04\x89\xe1" + load(2, 0) + load(0, 7) + _INT80
    leave = b"\x8b\x1c\x24\xc1\xeb\x08" + load(0, 1) + _INT80  # mov ebx, [esp]; shr ebx, 8; exit
    fork = load(0, 2) + _INT80 + b"\x85\xc0\x75" + bytes([len(child)])  # test eax, eax; jnz
    return elf32(path, fork + child + wait + leave)


def telling(path: Path) -> str:
    """fork; the child writes one byte to standard output; the parent waits for it."""
    leave = load(3, 0) + load(0, 1) + _INT80
    child = load(3, 1) + load(1, _BASE) + load(2, 1) + load(0, 4) + _INT80 + leave
    wait = load(3, 0xFFFF_FFFF) + load(1, 0) + load(2, 0) + load(0, 7) + _INT80 + leave
    fork = load(0, 2) + _INT80 + b"\x85\xc0\x75" + bytes([len(child)])
    return elf32(path, fork + child + wait)


def executing(path: Path, words: list[str]) -> str:
    """execve of ``words``, without an environment."""
    code_bytes = 4 * 5 + 2
    strings = [word.encode() + b"\0" for word in words]
    at = _BASE + _HEADERS + code_bytes + 4 * (len(words) + 1)
    places = [at + sum(map(len, strings[:index])) for index in range(len(words))]
    table = struct.pack(f"<{len(words) + 1}I", *places, 0)
    code = load(0, 11) + load(3, places[0]) + load(1, _BASE + _HEADERS + code_bytes)
    return elf32(path, code + load(2, 0) + _INT80, table + b"".join(strings))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = forking(tmp_path_factory.mktemp("small") / "forking", 23)
    try:
        assert subprocess.run([path], check=False).returncode == 23
    except OSError:
        pytest.skip("this kernel executes no 32-bit programs")
    return path


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("limits"), builds.enclave(20), "secrets"]


@pytest.mark.parametrize("strict", [False, True])
def test_a_32_bit_program_runs_with_its_child_and_has_its_own_status(
    small: str, caplog: pytest.LogCaptureFixture, strict: bool
) -> None:
    assert run([small], epc="1MiB", strict=strict).exit_code == 23
    (told,) = caplog.messages
    assert f"{small} is a 32-bit program: it runs without SGX" in told


@pytest.mark.parametrize("pager", ["userfaultfd", "mprotect"])
def test_a_32_bit_program_harms_no_other_and_is_reported_once(
    small: str, program: list[str], caplog: pytest.LogCaptureFixture, pager: str
) -> None:
    served = f"{' '.join(program)} || exit 1"
    shell = f"{small}; [ $? = 23 ] || exit 2; {served}; {small} & {served}; wait $!; exit $?"
    assert run(["/bin/sh", "-c", shell], epc=1 << 17, pager=pager).exit_code == 23
    assert len(caplog.messages) == 1


def test_a_64_bit_program_that_a_32_bit_one_executes_has_enclaves(
    small: str, program: list[str], tmp_path: Path
) -> None:
    path = executing(tmp_path / "executing", program)
    result = run([path], epc=25 * 4096)
    assert result.exit_code == 0
    assert result.counters["reclaimed"]


@pytest.mark.parametrize("strict", [False, True])  # with it there is an event of the end
def test_the_child_of_a_32_bit_parent_that_is_killed_at_the_event_of_fork_runs(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    killed: list[int] = []
    adopted: list[int] = []
    born, adopt = Unsupervised._born, Unsupervised.adopt

    def killing(unsupervised: Unsupervised, parent: int, event: int) -> None:
        killed.append(parent)
        kill_at_event(parent)
        born(unsupervised, parent, event)

    def noting(unsupervised: Unsupervised, tid: int, maker: Process) -> None:
        adopted.append(tid)
        adopt(unsupervised, tid, maker)

    monkeypatch.setattr(Unsupervised, "_born", killing)
    monkeypatch.setattr(Unsupervised, "adopt", noting)
    reading, writing = os.pipe()
    try:
        argv = [telling(tmp_path / "telling")]
        result = run(argv, epc="1MiB", strict=strict, stdio=(0, writing, 2))
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as told:
        assert (result.exit_code, told.read()) == (-9, b"\x7f")
    assert len(killed) == len(adopted) == 1 and killed != adopted


@pytest.mark.parametrize("strict", [False, True])
def test_a_32_bit_program_that_is_killed_at_the_event_of_execve_ends_as_killed(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict: bool
) -> None:
    executed = Unsupervised._executed

    def killing(unsupervised: Unsupervised, tid: int) -> Process:
        kill_at_event(tid)
        return executed(unsupervised, tid)

    monkeypatch.setattr(Unsupervised, "_executed", killing)
    path = executing(tmp_path / "executing", [small])
    assert run([path], epc="1MiB", strict=strict).exit_code == -9
