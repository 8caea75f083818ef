"""The Linux kernel's own selftest passes, unmodified, with every size of the EPC.

Goal: the tests of the driver's own authors.  Method: ``test_sgx`` is built from Debian's package of
the kernel's sources at test time and run by the engine; it is skipped, with the reason, where that
package or a compiler is not available.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.e2e.native.selftest import CannotHave, built_selftest
from tests.support.native import needs_tracing

from softsgx.engines.native import doctor, run

WORKS = {finding.name: finding.ok for finding in doctor()}
TESTS = 16

pytestmark = [
    pytest.mark.slow,
    needs_tracing,
]


@pytest.fixture(scope="module")
def selftest() -> Path:
    try:
        return built_selftest()
    except CannotHave as reason:
        pytest.skip(f"the kernel's selftest cannot be had: {reason}")


@pytest.mark.timeout(600)  # the first time it is built
@pytest.mark.parametrize(
    ("pages", "pager", "strict"),
    [
        (28, "userfaultfd", False),
        (64, "userfaultfd", False),
        (64, "userfaultfd", True),
        (64, "mprotect", False),
        (1024, "userfaultfd", False),
        (16384, "userfaultfd", False),
    ],
)
def test_the_kernels_selftest_passes(
    selftest: Path, tmp_path: Path, pages: int, pager: str, strict: bool
) -> None:
    if pager == "userfaultfd" and not WORKS["userfaultfd"]:
        pager = "mprotect"
    with (tmp_path / "out").open("w+") as out:
        stdio = 0, out.fileno(), out.fileno()
        result = run(
            ["./test_sgx"],
            epc=pages * 4096,
            pager=pager,
            strict=strict,
            cwd=str(selftest),
            stdio=stdio,
        )
        out.seek(0)
        told = out.read()
    totals = re.search(r"# Totals: pass:(\d+) fail:(\d+) .* skip:(\d+)", told)
    assert totals is not None, told
    assert [int(total) for total in totals.groups()] == [TESTS, 0, 0], told
    assert result.exit_code == 0
