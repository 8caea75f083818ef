"""What ``--inject`` and ``--tick`` do to a program is what hardware and Linux would show it.

Goal: each failure on demand, and timer interrupts, seen by the program itself.  Method:
``programs/recovery.c``, with an EPC that holds its enclave or does not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, compile_host, write_enclave
from tests.support.native import needs_tracing

from softsgx.engines.native import PAGERS, doctor, run
from softsgx.errors import SoftSgxError

DATA_PAGES = 20
EPC_PAGES = 28
FOUND = {finding.name: finding.ok for finding in doctor()}
EACH_PAGER = PAGERS if FOUND["userfaultfd"] else ("mprotect",)

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("recovery")
    enclave = write_enclave(directory / "enclave", DATA_PAGES)
    return [str(compile_host(directory, "recovery")), str(enclave)]


@pytest.mark.parametrize("pager", EACH_PAGER)
@pytest.mark.parametrize("strict", [False, True])
def test_enclaves_are_lost_with_the_power_and_new_ones_can_be_made(
    program: list[str], strict: bool, pager: str
) -> None:
    argv = [*program, "lost", "2"]
    inject = ("power-loss@10", "power-loss@70")
    result = run(argv, epc="1MiB", strict=strict, pager=pager, inject=inject)
    assert (result.exit_code, result.injected["power_losses"]) == (0, 2)
    result = run(argv, epc=EPC_PAGES * 4096, strict=strict, pager=pager, inject=inject)
    assert result.exit_code == 0
    assert set(result.counters["held"].values()) == {0}  # type: ignore[attr-defined]


@pytest.mark.parametrize("strict", [False, True])
def test_a_signal_to_the_supervisor_takes_the_power_and_does_not_reach_the_program(
    program: list[str], tmp_path: Path, strict: bool
) -> None:
    path = tmp_path / "run.json"
    options = ["--epc", "1MiB", "--inject", "power-loss@SIGUSR1", "--json", str(path), "--quiet"]
    command = [sys.executable, "-m", "softsgx", "run", *options, *(["--strict"] if strict else [])]
    done = subprocess.run(
        [*command, "--", *program, "signalled"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(path.read_text())["injected"]["power_losses"] >= 2


def test_init_and_the_provision_device_are_refused_on_demand(program: list[str]) -> None:
    inject = ("init@1", "provision")
    assert run([*program, "denied"], epc="1MiB", inject=inject).exit_code == 0


def test_a_noexec_dev_lets_no_enclave_be_mapped_executable(program: list[str]) -> None:
    assert run([*program, "noexec"], epc="1MiB", inject=["noexec"]).exit_code == 0


@pytest.mark.parametrize(
    "text", ["", "power", "init@0", "init@", "provision@1", "power-loss@x", "power-loss@SIGKILL"]
)
def test_an_injection_that_is_not_known_is_named(text: str) -> None:
    with pytest.raises(SoftSgxError, match=f"injection {text!r}: not known; give"):
        run(["/bin/true"], inject=[text])


@pytest.mark.parametrize("pager", EACH_PAGER)
@pytest.mark.parametrize("strict", [False, True])
def test_a_tick_is_an_exit_that_the_program_and_its_enclave_see(
    program: list[str], strict: bool, pager: str
) -> None:
    ticks = 5
    argv = [*program, "ticked", str(ticks)]
    result = run(argv, epc="1MiB", strict=strict, pager=pager, tick="4ms")
    assert result.exit_code == 0
    assert result.injected["ticks"] >= ticks


@pytest.mark.parametrize("pager", EACH_PAGER)
@pytest.mark.parametrize("strict", [False, True])
def test_ticks_hit_every_thread_that_is_inside(
    program: list[str], strict: bool, pager: str
) -> None:
    argv = [*program, "ticked threads", "5"]
    result = run(argv, epc="1MiB", strict=strict, pager=pager, tick="2ms")
    assert result.exit_code == 0
    assert result.injected["ticks"] >= 10


@pytest.mark.parametrize("pager", EACH_PAGER)
def test_ticks_change_nothing_that_is_paged(program: list[str], pager: str) -> None:
    argv = [*program, "ticked paging", "5"]
    result = run(argv, epc=EPC_PAGES * 4096, pager=pager, tick="1ms")
    assert result.exit_code == 0
    assert result.counters["eldu"], "nothing was paged"


def test_without_a_tick_nothing_interrupts_an_enclave(program: list[str]) -> None:
    result = run([*program, "ticked", "0"], epc="1MiB")
    assert result.injected["ticks"] == 0


@pytest.mark.parametrize("text", ["", "4", "0ms", "ms", "1us", "2s", "-1ms", "1e3ms"])
def test_a_tick_that_no_timer_has_is_named(text: str) -> None:
    with pytest.raises(SoftSgxError, match=f"tick {text!r}: .*; give"):
        run(["/bin/true"], tick=text)
