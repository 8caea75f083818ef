"""A descriptor of the device, and memory mapped from it, answer as those of Linux's device.

Goal: errors of calls that a device does not have, and no byte of the enclave lost to one of them.
Method: ``programs/device.c`` makes the calls, with an EPC smaller than its enclave.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.native import USABLE_PAGERS, needs_free_calls, needs_tracing

from softsgx.arch import AttributesFlags
from softsgx.engines.native import CPUID_SOURCES, run
from softsgx.host import PROFILES

DATA_PAGES = 30
EPC_PAGES = 26
NODE = "/dev/sgx_enclave"

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("device"), builds.enclave(DATA_PAGES)]


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize(
    "scenario", ["calls", "links", "modes", "advice", "dumps", "heirs", "refused", "maps"]
)
def test_a_program_finds_a_device_and_no_file(
    program: list[str], scenario: str, pager: str
) -> None:
    assert run([*program, scenario], epc=EPC_PAGES * 4096, pager=pager).exit_code == 0


@pytest.mark.parametrize("scenario", ["calls", "advice", "refused"])
def test_a_program_finds_a_device_in_strict_runs(program: list[str], scenario: str) -> None:
    assert run([*program, scenario], epc=EPC_PAGES * 4096, strict=True).exit_code == 0


def test_a_child_without_the_vdso_ends_with_a_reason_and_its_parent_goes_on(
    program: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert run([*program, "bare"], epc=EPC_PAGES * 4096, pager="mprotect").exit_code == 0
    assert ["not in the child of fork" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_memory_past_page_tables_is_the_drivers(
    builds: NativeBuilds, program: list[str], pager: str
) -> None:
    flags = AttributesFlags.MODE64BIT | AttributesFlags.DEBUG
    debug = [program[0], builds.enclave(DATA_PAGES, flags=flags), "remote"]
    assert run(debug, epc=EPC_PAGES * 4096, pager=pager).exit_code == 0
    assert run([*program, "closed"], epc=EPC_PAGES * 4096, pager=pager).exit_code == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("scenario", ["thread", "orphan"])
def test_any_thread_can_open_the_device(program: list[str], scenario: str, pager: str) -> None:
    assert run([*program, scenario], epc=EPC_PAGES * 4096, pager=pager).exit_code == 0


@pytest.fixture(scope="module")
def watched(builds: NativeBuilds) -> str:
    return builds.host("watched")


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@pytest.mark.parametrize(
    "way",
    [
        *("opened", "thread", "filtered", "vfork", "after_vfork", "clone", "message", "fork"),
        *("execve", "beside_execve"),
    ],
)
def test_calls_on_a_device_are_the_drivers_however_a_process_came_to_it(
    watched: str, way: str, strict: bool
) -> None:
    assert run([watched, way], epc=EPC_PAGES * 4096, strict=strict).exit_code == 0


@needs_free_calls
def test_a_child_without_its_vdso_runs_until_it_needs_it(
    watched: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert run([watched, "bare"], epc=EPC_PAGES * 4096).exit_code == 0
    assert "not in the child of fork" in caplog.text


def test_the_nodes_are_those_of_a_file_system(program: list[str]) -> None:
    assert run([*program, "nodes"], epc=EPC_PAGES * 4096).exit_code == 0


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
def test_every_path_that_leads_to_a_node_is_the_nodes(
    program: list[str], strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTSGX_LINKS", str(tmp_path))
    existed = os.path.lexists(NODE)
    try:
        assert run([*program, "walks"], epc=EPC_PAGES * 4096, strict=strict).exit_code == 0
        assert os.path.lexists(NODE) == existed
    finally:
        if os.path.isfile(NODE):  # the kernel has made it, where a call did not stop
            os.unlink(NODE)


def test_a_program_can_watch_its_epc(program: list[str]) -> None:
    groups = {"jobs/a": {"max": 64 * 4096}}
    result = run([*program, "watches"], epc=128 * 4096, groups=groups, group="jobs/a")
    assert result.exit_code == 0


@pytest.mark.parametrize("cpuid", CPUID_SOURCES)
@pytest.mark.parametrize("profile", PROFILES)
def test_cpuinfo_agrees_with_cpuid(program: list[str], profile: str, cpuid: str) -> None:
    assert run([*program, "cpuinfo"], profile=profile, cpuid=cpuid).exit_code == 0
