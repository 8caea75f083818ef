"""Signal handlers that enter the enclave again find the state that hardware leaves for them.

Goal: exceptions inside enclaves, with other events at the same moment, for programs that execute
ENCLU themselves.  Method: ``programs/handlers.c`` handles each exception inside the enclave and
counts.
"""

from __future__ import annotations

import os
import signal

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.support.native import USABLE_PAGERS, needs_tracing

from softsgx.engines.native import run, supervisor
from softsgx.engines.native.tracing.program import ProgramThread

DATA_PAGES = 20

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def program(builds: NativeBuilds) -> list[str]:
    return [builds.host("handlers"), builds.enclave(DATA_PAGES)]


@pytest.mark.parametrize(
    ("pager", "strict", "times"),
    [*((pager, False, 300) for pager in USABLE_PAGERS), (USABLE_PAGERS[0], True, 20)],
)
@pytest.mark.parametrize("instruction", ["ud2", "syscall"])
def test_an_interrupt_at_the_same_moment_hides_no_exception(
    program: list[str], instruction: str, pager: str, strict: bool, times: int
) -> None:
    """Whatever the number of interrupts, the thread inside makes progress."""
    argv = [*program, "kicked", instruction, str(times)]
    assert run(argv, epc="1MiB", pager=pager, strict=strict).exit_code == 0


@pytest.mark.parametrize(
    ("scenario", "strict", "pager"),
    [
        *(("bytes", False, pager) for pager in USABLE_PAGERS),
        ("shared-bytes", False, USABLE_PAGERS[0]),
        ("bytes", True, USABLE_PAGERS[0]),
    ],
)
@pytest.mark.parametrize("faulting", [True, False])
def test_a_handler_inside_finds_the_instruction_that_was_illegal(
    program: list[str],
    monkeypatch: pytest.MonkeyPatch,
    faulting: bool,
    scenario: str,
    strict: bool,
    pager: str,
) -> None:
    if not faulting:
        monkeypatch.setattr(supervisor, "can_fault_cpuid", lambda: False)
    argv = [*program, scenario, "cpuid", "6"]
    assert run(argv, epc=28 * 4096, pager=pager, strict=strict).exit_code == 0


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("instruction", ["ud2", "syscall"])
def test_a_handler_that_enters_again_while_its_signal_is_blocked_is_kept(
    program: list[str], instruction: str, strict: bool
) -> None:
    argv = [*program, "deferred", instruction, "5"]
    assert run(argv, epc="1MiB", strict=strict).exit_code == 0


def test_a_handler_that_enters_while_every_signal_is_blocked_leaves_others_alone(
    program: list[str],
) -> None:
    assert run([*program, "masked", "ud2", "20"], epc="1MiB").exit_code == 0


@pytest.mark.parametrize("name", ["ILL", "SEGV", "BUS"])
def test_a_signal_of_faults_that_a_process_sends_at_an_enclu_reaches_its_handler(
    program: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    resume = ProgramThread.resume
    sent: list[int] = []

    def sending(self: ProgramThread, number: int = 0) -> None:
        # At the AEP after a tick; the thread meets the signal before it executes the instruction.
        if not (sent or number) and self.image.read(self.load().rip, 3) == b"\x0f\x01\xd7":
            sent.append(self.tid)
            os.kill(self.tid, getattr(signal, f"SIG{name}"))
        resume(self, number)

    monkeypatch.setattr(ProgramThread, "resume", sending)
    result = run([*program, "sent", "ud2", "1"], epc="1MiB", tick="1ms")
    assert sent
    assert result.exit_code == 0
