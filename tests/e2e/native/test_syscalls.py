"""``softsgx run --syscalls``: the program's use of SGX is printed in the style of strace.

Goal: each call to the device, to memory mapped from it and to the vDSO has its line, and no other
call has one.  Method: a program of softsgx_host.h, whose calls are known.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, PROGRAMS, NativeBuilds
from tests.support.enclave_files import KEY_FILE

from softsgx.engines.native import doctor
from softsgx.image.csource import INCLUDE

SOFTSGX = [sys.executable, "-m", "softsgx"]
_LACKING = [finding.text for finding in doctor() if finding.needed and not finding.ok]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(bool(_LACKING), reason=f"this machine cannot: {'; '.join(_LACKING)}"),
]


def build(directory: Path) -> None:
    assert COMPILER is not None
    host = [COMPILER, "-pthread", f"-I{INCLUDE}", str(PROGRAMS / "debugged_host.c")]
    subprocess.run([*host, "-o", str(directory / "host")], check=True)
    words = [str(PROGRAMS / "debugged_enclave.c"), "-o", str(directory / "enclave.sgxs")]
    words += ["--key", str(KEY_FILE)]
    subprocess.run([*SOFTSGX, "build", *words], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    directory = builds.directory("logged", build)
    return [str(directory / "host"), str(directory / "enclave.sgxs")]


def lines_of(program: list[str], mode: str, status: int) -> list[str]:
    """Return the lines of a run, without the ids of its threads."""
    command = [*SOFTSGX, "run", "--quiet", "--syscalls", "--", *program, mode]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    found = re.findall(r"^\[pid \d+\] (.*)$", done.stderr, re.MULTILINE)
    return [re.sub(r"0x[0-9a-f]{8,}", "ADDRESS", line) for line in found]


def test_building_and_entering_an_enclave_is_shown_in_its_order(program: list[str]) -> None:
    opened, created, *added, call = lines_of(program, "call", 42)
    assert opened == 'openat(AT_FDCWD, "/dev/sgx_enclave", O_RDWR|O_CLOEXEC) = 3'
    assert created == (
        "ioctl(3, SGX_IOC_ENCLAVE_CREATE, {src={size=0x200000, base=ADDRESS, ssaframesize=1, "
        "miscselect=0x0, attributes=MODE64BIT, xfrm=X87|SSE}}) = 0"
    )
    assert added[0] == (
        "ioctl(3, SGX_IOC_ENCLAVE_ADD_PAGES, {src=ADDRESS, offset=0, length=0x1000, "
        "secinfo={flags=R|X|REG}, flags=SGX_PAGE_MEASURE, count=>0x1000}) = 0"
    )
    assert any("secinfo={flags=0|TCS}" in line for line in added)
    (init,) = (line for line in added if "INIT" in line)
    assert init == "ioctl(3, SGX_IOC_ENCLAVE_INIT, {sigstruct=ADDRESS}) = 0"
    mapped = [line for line in added if line.startswith("mmap(")]
    assert mapped[0] == (
        "mmap(ADDRESS, 4096, PROT_READ|PROT_EXEC, MAP_SHARED|MAP_FIXED, 3, 0) = ADDRESS"
    )
    assert len(added) == len(mapped) + sum("ioctl" in line for line in added)
    assert re.fullmatch(
        r"__vdso_sgx_enter_enclave\(NULL, NULL, 0xe, EENTER, .*\{tcs=ADDRESS, "
        r"user_handler=ADDRESS, user_data=ADDRESS, function=EEXIT\}\) = \? "
        r"\(what user_handler returns\)",
        call,
    )


def test_an_exception_inside_is_shown_as_the_vdso_tells_it(program: list[str]) -> None:
    call = lines_of(program, "trap", 99)[-1]
    told = "function=ERESUME, exception_vector=#UD, exception_error_code=0x0, exception_addr=NULL}"
    assert told in call


def test_lines_go_to_a_file_that_is_named(program: list[str], tmp_path: Path) -> None:
    path = tmp_path / "calls"
    command = [*SOFTSGX, "run", "--quiet", "--syscalls", str(path), "--", *program, "call"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (42, "")
    assert len(path.read_text().splitlines()) > 10


def test_a_file_that_is_full_ends_the_log_and_not_the_program(program: list[str]) -> None:
    command = [*SOFTSGX, "run", "--quiet", "--force", "--syscalls", "/dev/full", "--", *program]
    done = subprocess.run([*command, "call"], capture_output=True, text=True, check=False)
    assert done.returncode == 42
    assert done.stderr == "softsgx: /dev/full: No space left on device; it is not complete\n"
