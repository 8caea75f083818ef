"""A program sees faults of enclave code, and of ENCLU itself, as on hardware with Linux.

Goal: error codes in ``struct sgx_enclave_run``; number, information and frame of signals.  Method:
``programs/faults.c`` makes each fault and compares; an EPC smaller than the enclave.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx.engines.native import run

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("faults"), builds.enclave(20)]


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("scenario", ["codes", "frames"])
def test_a_fault_is_reported_as_hardware_and_linux_report_it(
    program: list[str], scenario: str, pager: str, strict: bool, tmp_path: Path
) -> None:
    with (tmp_path / "out").open("w+b") as out:
        stdio = (0, out.fileno(), out.fileno())
        result = run([*program, scenario], epc=28 * 4096, pager=pager, strict=strict, stdio=stdio)
        out.seek(0)
        assert (result.exit_code, out.read().decode()) == (0, "")
