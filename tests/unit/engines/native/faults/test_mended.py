"""A page fault that the driver resolves is an exit wherever a program can see the difference.

Method: a real machine with an enclave whose processor has the registers of a fake thread.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.inhabited import Inhabited

from softsgx.arch import AttributesFlags, GprSgx, Pfec, Tcs, TcsFlags
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults import enclu
from softsgx.engines.native.faults.breakpoints import Breakpoints
from softsgx.engines.native.faults.enclave import EnclaveFaults
from softsgx.engines.native.faults.enclu import EncluLeaves
from softsgx.engines.native.faults.exits import AsynchronousExits
from softsgx.engines.native.tracing.registers import NativeRegisters
from softsgx.hw import Machine, MachineConfig, PageFault
from softsgx.hw.entry import GPR_OFFSET
from softsgx.runtime import InlineRuntime

AEP, OUR_AEP = 0x40_1000, 0x7F00_0000
INSIDE = 0x1234


class Scene:
    """A thread inside an enclave that has just faulted; ``code`` is at its AEP."""

    def __init__(self, *, notified: bool = False, code: bytes = b"\x0f\x01\xd7") -> None:
        config = MachineConfig.with_epc(64 * 4096, processors=1, attributes=AttributesFlags(0x7FF))
        self.inhabited = Inhabited(1, Machine(config, InlineRuntime(seed=3)))
        self.cpu = self.inhabited.cpu(0)
        regs = NativeRegisters()
        regs.xcr0, regs.rip, regs.xsave = self.cpu.regs.xcr0, 0x40_0000, bytes(4096)
        self.regs, self.cpu.regs = regs, cast(Any, regs)
        if notified:
            self.inhabited.enclave.flags |= int(AttributesFlags.AEXNOTIFY)
            self.write(0, Tcs.OFFSETS["flags"], bytes([int(TcsFlags.AEXNOTIFY)]))
        self.cpu.enclu.eenter(self.inhabited.base + self.inhabited.tcs(0), AEP)
        if notified:
            self.write(1, GPR_OFFSET + GprSgx.OFFSETS["aexnotify"], b"\x01")
        regs.rip = INSIDE
        image = SimpleNamespace(
            aep=OUR_AEP, eenter=0, read=lambda address, size: code, state_stubs={}
        )
        self.thread = cast(
            Any,
            SimpleNamespace(
                image=image,
                cpu=self.cpu,
                regs=regs,
                blocked=None,
                pause_ns=0,
                held_up=0,
                spurious=(0, (0, 0)),
                breakpoints=0,
                resumes=None,
                load=lambda: regs,
                store=lambda: None,
                sigmask=lambda: 0,
                machine_xstate=lambda: bytes(4096),
                set_machine_xstate=lambda area: None,
            ),
        )
        stub = cast(Any, None)
        breakpoints = Breakpoints(lambda _thread, _memory: [])
        self.exits = exits = AsynchronousExits(breakpoints)
        nothing = lambda *_arguments: None  # noqa: E731
        permits = cast(Any, SimpleNamespace(entering=nothing, settle=nothing))
        pauses = cast(Any, SimpleNamespace(went_in=nothing))
        leaves = EncluLeaves(exits, stub, permits, breakpoints, pauses)
        self.faults = EnclaveFaults(exits, leaves, permits, stub, stub, stub, stub)

    def write(self, page: int, offset: int, data: bytes) -> None:
        """Write to the TCS (0), or a page behind it."""
        at = self.inhabited.page(self.inhabited.tcs(0) + page * 4096)
        self.inhabited.hw.store.write(at, offset, data)

    def mend(self) -> None:
        assert self.faults._mended(self.thread, 4, 0x5000) == 0


def test_a_thread_that_comes_straight_back_goes_on_where_it_was() -> None:
    scene = Scene()
    scene.mend()
    assert scene.regs.rip == INSIDE
    crossings = scene.inhabited.enclave.crossings
    assert (crossings.aex, crossings.eresume) == (1, 1)


def test_an_enclave_that_asks_for_it_is_notified_of_the_exit() -> None:
    scene = Scene(notified=True)
    entry = scene.regs.rip
    scene.mend()
    assert scene.cpu.inside is not None
    assert scene.regs.rip != entry, "it goes on as if there had been no exit"
    assert scene.regs.rip == scene.inhabited.base, "its entry point"
    assert scene.regs.rax == 1, "CSSA: the frame of the exit stays in use"


@pytest.mark.parametrize("code", [b"\x90\x90\x90", b""])
def test_code_of_the_program_at_the_aep_is_executed(code: bytes) -> None:
    scene = Scene(code=code)
    scene.mend()
    assert scene.cpu.inside is None
    assert (scene.regs.rip, scene.regs.rax) == (AEP, 3)


class Leaves:
    """Does ENCLU; its operand faults as often as is wanted."""

    def __init__(self, scene: Scene, faults: int) -> None:
        self.scene, self.left, self.tries, self.leaf_ran = scene, faults, 0, False

    def execute(self, thread: Any) -> int:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise PageFault(0x5000, int(Pfec.U))
        self.leaf_ran = True
        thread.regs.rip += 3
        return 0


def _enclu(faults: int, *, traps: bool = True) -> tuple[Scene, Leaves]:
    scene = Scene()
    leaves = Leaves(scene, faults)
    scene.faults._leaves = cast(Any, leaves)
    image = scene.thread.image
    image.mm = SimpleNamespace(find=lambda _at: 1, fault=lambda *_fault: FaultResult.NOPAGE)
    image.page_table = SimpleNamespace(traps_at=lambda at: traps and at == INSIDE)
    assert scene.faults.enclu(scene.thread) == 0
    return scene, leaves


def test_an_enclu_whose_page_fault_is_mended_is_executed_in_the_same_stop() -> None:
    scene, leaves = _enclu(1)
    assert leaves.leaf_ran and scene.regs.rip == INSIDE + 3
    crossings = scene.inhabited.enclave.crossings
    assert (crossings.aex, crossings.eresume) == (1, 1)


def test_an_enclu_that_faults_again_lets_other_threads_run_before_it_is_repeated() -> None:
    scene, leaves = _enclu(2)
    assert leaves.tries == 2 and not leaves.leaf_ran
    assert scene.regs.rip == INSIDE


def test_an_enclu_whose_own_page_may_have_left_is_not_executed_for_the_thread() -> None:
    scene, leaves = _enclu(1, traps=False)
    assert leaves.tries == 1 and scene.regs.rip == INSIDE


@pytest.mark.parametrize(("blocked", "waits"), [(0, 3), (abi.FAULT_SIGNALS, 41)])
def test_an_entry_that_has_waited_without_success_lets_the_loop_serve_others(
    monkeypatch: pytest.MonkeyPatch, blocked: int, waits: int
) -> None:
    scene, execute = Scene(), enclu._execute
    scene.faults._exits.leave(scene.thread, 14, 4, 0x5000, comes_back=True)
    results = [*[FaultResult.RETRY] * 40, FaultResult.NOPAGE]
    seen: list[FaultResult] = []

    def fault(*_fault: object) -> FaultResult:
        seen.append(results[len(seen)])
        return seen[-1]

    def needs_a_page(cpu: Any, leaf: int) -> None:
        if FaultResult.NOPAGE not in seen:
            raise PageFault(0x5000, int(Pfec.U))
        execute(cpu, leaf)

    monkeypatch.setattr(enclu, "_execute", needs_a_page)
    scene.thread.image.mm = SimpleNamespace(find=lambda _at: 1, fault=fault)
    scene.thread.sigmask = lambda: blocked
    scene.thread.set_sigmask = lambda _mask: None
    assert scene.faults._leaves.resume(scene.thread) == 0
    assert len(seen) == waits
    # A thread that blocks SIGILL cannot trap: the kernel would reset its handler.
    assert (scene.cpu.inside is None) == (not blocked)
    assert scene.regs.rip == (INSIDE if blocked else AEP)


@pytest.mark.parametrize(("vector", "fault"), [(0xFD, False), (14, True)])
def test_a_pause_of_signals_ends_with_an_asynchronous_exit(vector: int, *, fault: bool) -> None:
    scene = Scene()
    masks: list[int] = []
    scene.thread.set_sigmask = masks.append
    scene.thread.blocked, scene.thread.pause_ns = 0x200, 2_000_000
    scene.exits.leave(scene.thread, vector)
    assert (masks, scene.thread.blocked, scene.thread.pause_ns) == ([0x200], None, 0)
    assert scene.thread.held_up == (0 if fault else 2), "behind an interrupt it begins again"
