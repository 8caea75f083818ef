"""Instructions on extended state that do not stop do what those do that stop.

Method: a program whose enclave saves and restores state behind loads of constants, in eleven ways
and with eighteen states each, compares registers, flags, all state and the area of each execution
with the first, and what was left with executions that all stop.  Meanwhile the thread is stopped at
each instruction of the code that executes them, and pages of the areas leave the EPC.
"""

from __future__ import annotations

import signal
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.native.enclave import COMPILER, NativeBuilds
from tests.e2e.native.stepper import Stepper
from tests.support import modes
from tests.support.native import (
    FAULTS_ARE_SIGBUS,
    needs_no_strict_mode,
    needs_pages_that_stay,
    needs_permits,
    needs_tracing,
)

from softsgx import compiled
from softsgx.driver import Mm
from softsgx.driver.optimised import PlainMm
from softsgx.engines.native import run
from softsgx.engines.native.faults import extended
from softsgx.engines.native.faults.enclave import EnclaveFaults
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.program import ProgramThread
from softsgx.engines.native.vdso.permits import Permits
from softsgx.engines.native.x86.areas import AreaLayouts
from softsgx.engines.native.x86.cpuid import host_cpuid, xsave_components
from softsgx.engines.native.x86.profile import intel_layout

KINDS, VARIANTS, AREA = 11, 18, 3008
RESTORING, OFFSET = 5, 5
XCR0, LAYOUT = xsave_components(host_cpuid())
#: Which of the components that the program looks at enclaves may have here.
STATES = [xfrm for xfrm in (3, 7, 0xE7) if not xfrm & ~XCR0]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    needs_tracing,
    needs_no_strict_mode,  # the program looks at its enclave's memory from outside
    pytest.mark.skipif(XCR0 == 3, reason="this processor has XFRM in XCR0"),
    pytest.mark.skipif(not host_cpuid()(0xD, 1)[0] & 2, reason="this processor has no XSAVEC"),
]

#: From which component on this processor's seem to be elsewhere than CPUID describes, and how far.
MOVES: dict[str, tuple[int, int]] = {
    "as here": (64, 0),
    "as on AMD": (5, 256),
    "one": (7, 128),
    "all": (2, 64),
}


Outcomes = dict[tuple[int, int], tuple[bytes, ...]]


def differences(these: Outcomes, others: Outcomes) -> list[str]:
    """Return where they differ."""
    return [
        f"{kind=} {variant=} {part=}: byte {number} is {one[number]:x}, not {two[number]:x}"
        for (kind, variant), parts in these.items()
        for part, (one, two) in enumerate(zip(parts, others[kind, variant], strict=True))
        for number in range(len(one))
        if one[number] != two[number]
    ]


class Program:
    """The program, and how often instructions on extended state have stopped it.

    Attributes:
        xfrm: of its enclave.
        stops: of all kinds, and of instructions on extended state.
    """

    def __init__(self, builds: NativeBuilds, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._builds, self.out, self.xfrm = builds, out, 3
        self.host = builds.host("extended")
        self.stops, self.all_stops = 0, 0
        execute, guard = EnclaveFaults._extended_state, Loop.guard

        def counted(faults: EnclaveFaults, *arguments: Any) -> int:
            self.stops += 1
            return execute(faults, *arguments)

        def counted_too(loop: Loop, *arguments: Any) -> None:
            self.all_stops += 1
            guard(loop, *arguments)

        monkeypatch.setattr(EnclaveFaults, "_extended_state", counted)
        monkeypatch.setattr(Loop, "guard", counted_too)

    def run(self, mode: str, *arguments: object, pages: int = 256, **options: Any) -> list[str]:
        """Return the lines that it prints."""
        enclave = self._builds.enclave(40, xfrm=self.xfrm)
        argv = [self.host, enclave, hex(self.xfrm), mode, *map(str, arguments)]
        with self.out.open("wb") as out:
            done = run(argv, epc=pages * 4096, stdio=(0, out.fileno(), 2), **options)
        assert done.exit_code == 0
        return self.out.read_text().splitlines()

    def same(self, rounds: int, others: int = 0, **options: Any) -> tuple[int, int]:
        """Return how often an instruction was executed, and how often a handler."""
        (line,) = self.run("same", rounds, others, self.outcomes_at, **options)
        executed, handled = map(int, line.split())
        assert executed == rounds * KINDS * VARIANTS
        return executed, handled

    def outcomes(self) -> Outcomes:
        """Return what it has left by kind and variant: registers, FXSAVE, area, state."""
        data = self.outcomes_at.read_bytes()
        size = len(data) // (KINDS * VARIANTS)
        found = {}
        for number in range(KINDS * VARIANTS):
            one = bytearray(data[number * size : (number + 1) * size])
            for masks in (64, 576):
                one[masks + 28 : masks + 32] = bytes(4)  # MXCSR_MASK is no state
            ends = (0, 64, 576, 576 + AREA, size)
            found[divmod(number, VARIANTS)] = tuple(
                [bytes(one[start:end]) for start, end in pairwise(ends)]
            )
        return found

    @property
    def outcomes_at(self) -> Path:
        """Where it writes what each execution has left."""
        return self.out.with_name("outcomes")


@pytest.fixture
def program(builds: NativeBuilds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    return Program(builds, tmp_path / "out", monkeypatch)


def describe(monkeypatch: pytest.MonkeyPatch, name: str) -> int:
    """Let CPUID describe components as :data:`MOVES` says; return which are elsewhere."""
    first, distance = MOVES[name]
    layout = intel_layout(host_cpuid())
    if distance:
        layout = {
            number: (size, offset + (distance if number >= first else 0))
            for number, (size, offset) in LAYOUT.items()
        }
    run_module = import_module("softsgx.engines.native.run")
    monkeypatch.setattr(run_module, "intel_layout", lambda _host: layout)
    return AreaLayouts(LAYOUT, layout).moved


@needs_permits
@needs_pages_that_stay
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("xfrm", STATES)
@pytest.mark.parametrize("form", ["compacted", "plain"])
def test_a_thousand_calls_do_not_stop(
    program: Program, monkeypatch: pytest.MonkeyPatch, xfrm: int, moves: str, form: str
) -> None:
    moved = describe(monkeypatch, moves)
    if form == "plain" and xfrm & moved & 4:
        pytest.skip("no processor has AVX elsewhere; no code is for that")
    program.xfrm = xfrm
    program.run("calls", 10, form)
    few = program.all_stops
    program.run("calls", 1010, form)
    assert program.all_stops - 2 * few < 20, "of 2000 calls"
    assert program.stops <= 4, "two instructions, two runs"


@needs_pages_that_stay
def test_only_the_first_execution_of_each_stops(program: Program) -> None:
    program.same(20)
    assert program.stops == KINDS


@needs_pages_that_stay
@pytest.mark.parametrize("moves", MOVES)
@pytest.mark.parametrize("xfrm", STATES)
def test_stubs_and_copies_leave_what_the_model_leaves(
    program: Program, monkeypatch: pytest.MonkeyPatch, xfrm: int, moves: str
) -> None:
    moved = describe(monkeypatch, moves)
    program.xfrm = xfrm
    program.same(2)
    by_stubs, few = program.outcomes(), program.stops
    monkeypatch.setattr("softsgx.engines.native.supervisor.can_keep_flags", lambda: False)
    program.same(1)
    by_copies, all_of_them = program.outcomes(), program.stops - few
    natively = xfrm == XCR0 and not xfrm & moved
    assert all_of_them == (0 if natively else KINDS * VARIANTS)
    monkeypatch.setattr(extended, "out_of_line", lambda *_arguments: None)
    program.same(1)
    by_model = program.outcomes()
    assert differences(by_stubs, by_model) == []
    assert differences(by_copies, by_model) == []


@pytest.mark.parametrize(
    ("xfrm", "pager"),
    [
        (3, "mprotect"),
        pytest.param(3, None, marks=pytest.mark.slow),
        pytest.param(STATES[-1], None, marks=pytest.mark.slow),
    ],
)
def test_areas_may_leave_the_epc(
    program: Program, monkeypatch: pytest.MonkeyPatch, xfrm: int, pager: str | None
) -> None:
    describe(monkeypatch, "as on AMD")
    program.xfrm = xfrm
    program.same(2, 24, pages=26, pager=pager)
    assert program.stops > KINDS


@needs_pages_that_stay
@pytest.mark.parametrize("xfrm", STATES)
def test_what_is_refused_is_as_without_a_stub(
    program: Program, monkeypatch: pytest.MonkeyPatch, xfrm: int
) -> None:
    moved = describe(monkeypatch, "as on AMD")
    program.xfrm = xfrm

    def refused() -> list[str]:
        # The model reads the header first where XSAVE stores: error code 8005H, not 8007H.
        return [line.replace(" 8005 ", " 8007 ") for line in program.run("refused")]

    jumped, few = refused(), program.stops
    whole = 6 if xfrm & 0xE0 else 0
    assert len(jumped) == 2 * 3 * (3 * KINDS + 4 * RESTORING - 2 + whole)
    # Misaligned ones, headers with more than XFRM of five XRSTORs, areas outside the enclave.
    least = 3 * (2 * KINDS - 1 + 2 * RESTORING + KINDS - OFFSET - 1)
    always = 3 * 5 if xfrm & moved else 1  # XSAVEOPT, twice where the page is added first
    if not FAULTS_ARE_SIGBUS:  # where the page is added, others are repeated outside the stub, too
        always += 3 * (KINDS - 1 - bool(xfrm & moved))  # but for the one whose stores fault first
    if xfrm != XCR0 or xfrm & moved:
        assert few == KINDS - 1 + always + least
    monkeypatch.setattr("softsgx.engines.native.supervisor.can_keep_flags", lambda: False)
    assert refused() == jumped
    assert program.stops - few > few or not few
    monkeypatch.setattr(extended, "out_of_line", lambda *_arguments: None)
    assert refused() == jumped


@pytest.mark.slow
@pytest.mark.parametrize("xfrm", [each for each in STATES if each in (3, 0xE7)])
@pytest.mark.parametrize("number", [0, signal.SIGUSR1])
def test_a_thread_may_be_stopped_at_each_instruction_of_a_stub(
    program: Program, monkeypatch: pytest.MonkeyPatch, number: int, xfrm: int
) -> None:
    describe(monkeypatch, "as on AMD")
    program.xfrm = xfrm

    def counts(image: ProcessImage, place: int) -> bool:
        return image.vdso.state <= place < image.vdso.paths

    program.same(1)
    undisturbed = program.outcomes()
    # Without permits each entry stops, and only enclave code has to be stepped through.
    monkeypatch.setattr(Permits, "_has_permits", lambda *_arguments: False)
    stepper = Stepper(monkeypatch, number, counts, lambda thread: thread.cpu.inside is not None)
    _executed, handled = program.same(10)
    assert stepper.stops > 40
    assert differences(program.outcomes(), undisturbed) == []
    assert handled == (stepper.stops if number else 0)


@pytest.mark.slow
@pytest.mark.skipif(modes.has("userfaultfd"), reason="its faults are signals of the other pager")
def test_faults_of_such_an_instruction_settle_all_permits(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With this pager, faults are SIGSEGV, as ENCLU outside an enclave may be.
    serving = Mm if compiled.speedups is not None else PlainMm
    stopped, settle, fault = Permits.stopped, Permits.settle, serving.fault
    settled, faults = False, 0

    def at_stop(permits: Permits, thread: ProgramThread) -> None:
        nonlocal settled
        settled = False
        stopped(permits, thread)

    def at_settling(permits: Permits) -> None:
        nonlocal settled
        settled = True
        settle(permits)

    def at_fault(*arguments: Any) -> Any:
        nonlocal faults
        faults += 1
        assert settled
        return fault(*arguments)

    monkeypatch.setattr(Permits, "stopped", at_stop)
    monkeypatch.setattr(Permits, "settle", at_settling)
    monkeypatch.setattr(serving, "fault", at_fault)
    program.same(1, 24, pages=26, pager="mprotect")
    assert faults > 500
