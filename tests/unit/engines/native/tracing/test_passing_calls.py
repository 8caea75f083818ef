"""Calls of processes that are left alone are served in one step, and no others.

Method: stand-ins for a stopped thread and the loop say what was done.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.tracee import Gone

VDSO, VDSO_BYTES, SITE = 0x7000_0000, 0x1000, 0x40_0000


class Scene:
    """A thread at the stop of a call, and a loop whose handlers return ``result``."""

    def __init__(self, result: int | None = None) -> None:
        self.done: list[object] = []
        self.result, self.error = result, None
        self.image: Any = SimpleNamespace(
            uninvolved=True, vdso_base=VDSO, vdso=SimpleNamespace(end=VDSO_BYTES), cpuid_stubs=None
        )
        self.image.current = None
        self.regs = SimpleNamespace(rip=SITE, orig_rax=abi.SYS_MMAP)
        self.thread: Any = SimpleNamespace(
            tid=5,
            again=None,
            at_call=True,
            running=False,
            image=self.image,
            process=SimpleNamespace(pid=5, guarded=set()),
            regs=self.regs,
            load=lambda: self.regs,
            resume=lambda: self.note("resume", self.thread.running),
        )

    def note(self, *what: object) -> None:
        self.done.append(what[0] if len(what) == 1 else what)

    def _handled(self, _thread: object, number: int) -> int | None:
        assert self.image.current is self.thread, "its handlers make calls in its name"
        self.note(number)
        self.during()
        if self.error is not None:
            raise self.error
        return self.result

    def during(self) -> None:
        """What happens while the call is handled."""

    def serve(self) -> bool:
        """Serve the stop; return whether it was served."""
        loop: Any = SimpleNamespace(
            _permits=SimpleNamespace(settle=lambda: self.note("settle")),
            _result=self._handled,
            _answer=lambda _thread, result: self.note("answer", result),
            _make_call=lambda _thread: self.note("make"),
            _before_resume=lambda: self.note("before"),
            failed=lambda pid, tid, error: self.note("failed", pid, tid, error),
        )
        served = Loop._passes_call(loop, self.thread)
        assert self.image.current is None
        return served


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_call_that_the_kernel_makes_is_let_go(scene: Scene) -> None:
    assert scene.serve()
    assert scene.done == ["settle", abi.SYS_MMAP, "before", ("resume", True)]


@pytest.mark.parametrize("result", [0, 7, -abi.ERESTARTSYS])
def test_an_answer_is_given(result: int) -> None:
    scene = Scene(result)
    assert scene.serve()
    assert scene.done == ["settle", abi.SYS_MMAP, ("answer", result)]


@pytest.mark.parametrize("number", [abi.SYS_EXECVE, abi.SYS_EXECVEAT])
def test_execve_cannot_be_stopped_meanwhile(scene: Scene, number: int) -> None:
    scene.regs.orig_rax = number
    assert scene.serve()
    assert scene.done == ["settle", number, "make"]


def test_a_handler_may_have_used_the_stop_up(scene: Scene) -> None:
    scene.during = lambda: setattr(scene.thread, "at_call", False)  # type: ignore[method-assign]
    assert scene.serve()
    assert scene.done == ["settle", abi.SYS_MMAP, "make"]


def test_a_handler_may_have_opened_a_device(scene: Scene) -> None:
    scene.during = lambda: setattr(scene.image, "uninvolved", False)  # type: ignore[method-assign]
    assert scene.serve()
    assert scene.done == ["settle", abi.SYS_MMAP, "make"]


@pytest.mark.parametrize("error", [Gone(5), OSError("refused")])
def test_a_failure_ends_no_other_process(scene: Scene, error: Any) -> None:
    scene.error = error
    assert scene.serve()
    assert scene.done == ["settle", abi.SYS_MMAP, ("failed", 5, 5, error)]


def unlike(scene: Scene, what: str) -> None:
    if what == "with a device":
        scene.image.uninvolved = False
    elif what == "with an enclave's filter":
        scene.thread.process.guarded.add((0, 4096))
    elif what == "repeated":
        scene.thread.again = (1,)
    elif what == "EENTER":
        scene.regs.orig_rax = abi.SYS_SOFTSGX_EENTER
    elif what == "first byte of the vDSO":
        scene.regs.rip = VDSO
    elif what == "last byte of the vDSO":
        scene.regs.rip = VDSO + VDSO_BYTES - 1
    elif what == "at a jump":
        scene.image.cpuid_stubs = SimpleNamespace(has_entry=lambda place: place == SITE)


@pytest.mark.parametrize(
    "what",
    [
        *("with a device", "with an enclave's filter", "repeated", "EENTER"),
        *("first byte of the vDSO", "last byte of the vDSO", "at a jump"),
    ],
)
def test_other_calls_are_served_as_any_stop(scene: Scene, what: str) -> None:
    unlike(scene, what)
    assert not scene.serve()
    assert scene.done == []


def test_calls_near_the_vdso_and_jumps_are_served(scene: Scene) -> None:
    scene.image.cpuid_stubs = SimpleNamespace(has_entry=lambda place: place == SITE)
    for place in (VDSO - 1, VDSO + VDSO_BYTES):
        scene.regs.rip = place
        assert scene.serve()
    assert len(scene.done) == 8
