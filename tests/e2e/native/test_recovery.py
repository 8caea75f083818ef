"""A program sees ``--inject`` and ``--tick`` as it sees such events with hardware and Linux.

Goal: each failure on demand, and timer interrupts, seen by the program itself.  Method:
``programs/recovery.c``, with an EPC that holds its enclave or does not.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx.engines.native import run
from softsgx.errors import SoftSgxError

DATA_PAGES = 20
EPC_PAGES = 28

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("recovery"), builds.enclave(DATA_PAGES)]


@pytest.mark.parametrize("pager", USABLE_PAGERS)
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


def test_a_device_that_is_refused_leaves_the_supervisor_no_descriptor(program: list[str]) -> None:
    gc.collect()  # what earlier tests dropped closes its descriptors now, not in between
    before = len(os.listdir("/proc/self/fd"))
    run([*program, "denied"], epc="1MiB", inject=("init@1", "provision"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("outcome", "number"),
    [
        ("init@1", errno.EPERM),
        ("init=SGX_INVALID_MEASUREMENT@1", errno.EPERM),
        ("init=#GP@1", errno.EIO),
        ("init=#PF", errno.EIO),
    ],
)
def test_an_init_that_fails_on_demand_has_the_errno_of_linux_and_can_be_repeated(
    program: list[str], outcome: str, number: int
) -> None:
    result = run([*program, "refused", str(number)], epc="1MiB", inject=[outcome])
    assert (result.exit_code, result.injected["refused_inits"]) == (0, 1)


@pytest.mark.slow
def test_an_event_that_stays_unmasked_is_waited_for_and_then_eperm(program: list[str]) -> None:
    inject = ["init=SGX_UNMASKED_EVENT"]
    result = run([*program, "refused", str(errno.EPERM)], epc="1MiB", inject=inject)
    assert result.exit_code == 0


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("fault", "leaf"), [(1, 2), (10, 3)], ids=["thread", "data"])
def test_a_poisoned_page_is_sigbus_for_its_user_and_is_never_handed_out_again(
    program: list[str], fault: int, leaf: int, strict: bool, pager: str
) -> None:
    argv = [*program, "poisoned", str(leaf)]
    inject = [f"poison@{fault}"]
    for epc in ("1MiB", f"{(EPC_PAGES + 1) * 4}KiB"):
        result = run(argv, epc=epc, strict=strict, pager=pager, inject=inject)
        assert (result.exit_code, result.injected["poisoned_pages"]) == (0, 1)
        assert set(result.counters["held"].values()) == {0}  # type: ignore[attr-defined]


def test_a_noexec_dev_lets_no_enclave_be_mapped_executable(program: list[str]) -> None:
    assert run([*program, "noexec"], epc="1MiB", inject=["noexec"]).exit_code == 0


@pytest.mark.parametrize(
    "text",
    [
        *("", "power", "power-loss@x", "power-loss@SIGKILL", "provision@1"),
        *("init@0", "init@", "init=@1", "init=SGX_SUCCESS", "poison@", "poison=1@2"),
    ],
)
def test_an_injection_that_is_not_known_is_named(text: str) -> None:
    with pytest.raises(SoftSgxError, match=f"injection {text!r}: not known; give"):
        run(["/bin/true"], inject=[text])


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("strict", [False, True])
def test_a_tick_is_an_exit_that_the_program_and_its_enclave_see(
    program: list[str], strict: bool, pager: str
) -> None:
    ticks = 5
    argv = [*program, "ticked", str(ticks)]
    result = run(argv, epc="1MiB", strict=strict, pager=pager, tick="4ms")
    assert result.exit_code == 0
    assert result.injected["ticks"] >= ticks


@pytest.mark.parametrize("pager", USABLE_PAGERS)
@pytest.mark.parametrize("strict", [False, True])
def test_ticks_hit_every_thread_that_is_inside(
    program: list[str], strict: bool, pager: str
) -> None:
    # Each thread goes on until it has seen five exits; a fault may be one of them.
    argv = [*program, "ticked threads", "5"]
    result = run(argv, epc="1MiB", strict=strict, pager=pager, tick="2ms")
    assert result.exit_code == 0
    assert result.injected["ticks"] > 5


@pytest.mark.parametrize("pager", USABLE_PAGERS)
def test_ticks_change_nothing_that_is_paged(program: list[str], pager: str) -> None:
    argv = [*program, "ticked paging", "5"]
    result = run(argv, epc=EPC_PAGES * 4096, pager=pager, tick="1ms")
    assert result.exit_code == 0
    assert result.counters["eldu"], "nothing was paged"


def test_without_a_tick_nothing_interrupts_an_enclave(program: list[str]) -> None:
    assert run([*program, "quiet"], epc="1MiB").exit_code == 0
    assert run([*program, "quiet"], epc="1MiB", tick="1ms").exit_code == 1


@pytest.mark.parametrize("text", ["", "4", "0ms", "ms", "1us", "2s", "-1ms", "1e3ms"])
def test_a_tick_that_no_timer_has_is_named(text: str) -> None:
    with pytest.raises(SoftSgxError, match=f"tick {text!r}: .*; give"):
        run(["/bin/true"], tick=text)
