"""Ordinary programs in a small EPC: their memory is evicted and loaded again, unchanged.

Goal: outputs that depend on every byte, with evictions; which loads the trace has.  Method:
programs whose working set is known, or larger than the EPC.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.e2e.ordinary.recording import COMPILER, compile_program, record
from tests.support.native import needs_tracing

from softsgx.engines.ordinary import can_record

PAGE = 4096

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(not can_record(), reason="needs userfaultfd for accesses of system calls"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paging")


@pytest.mark.slow
def test_half_a_working_set_is_paged_and_every_byte_comes_back(directory: Path) -> None:
    argv = [compile_program(directory, "touch"), "300", "3"]
    alone = subprocess.run(argv, stdout=subprocess.PIPE, check=True).stdout
    result, output, recorded = record(argv, epc=150 * PAGE)
    assert (result.exit_code, output) == (0, alone)
    # Each of the six passes over 300 pages finds at most 150 of them in the EPC.
    assert result.evictions >= 5 * 150
    assert result.loads == len(recorded.accesses) >= 300 + 5 * 150
    assert result.epc_pages == 150


@pytest.mark.slow
def test_a_large_epc_evicts_nothing_and_loads_each_page_once(directory: Path) -> None:
    argv = [compile_program(directory, "touch"), "300", "3"]
    result, _output, recorded = record(argv, epc=2000 * PAGE)
    assert result.evictions == 0
    pages = [page for _enclave, page, _write, _time in recorded.accesses]
    assert len(pages) == len(set(pages)) == result.loads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["threads", "forks", "mappings"])
def test_memory_keeps_its_content_in_a_small_epc(directory: Path, name: str) -> None:
    argv = [compile_program(directory, name)]
    alone = subprocess.run(argv, stdout=subprocess.PIPE, check=False)
    result, output, _recorded = record(argv, epc=100 * PAGE)
    assert (result.exit_code, output) == (alone.returncode, alone.stdout)
    assert result.evictions > 0


@pytest.mark.slow
def test_sort_in_half_of_its_memory_sorts_the_same() -> None:
    path = shutil.which("sort")
    if path is None:
        pytest.skip("needs sort")
    given = "\n".join(map(str, random.Random(1).sample(range(9**9), 8000))).encode()
    alone = subprocess.run([path], input=given, stdout=subprocess.PIPE, check=True).stdout
    result, output, _recorded = record([path], given=given, epc=150 * PAGE)
    assert (result.exit_code, output) == (0, alone)
    assert result.evictions > 0
