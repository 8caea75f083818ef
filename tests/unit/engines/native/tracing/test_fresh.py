"""A child of fork that has not stopped since: when there is one, what it has, how it grows."""

from __future__ import annotations

from types import SimpleNamespace as Fake
from typing import Any, cast

import pytest

from softsgx.engines.native import abi, kernel
from softsgx.engines.native.supervisor import Supervisor
from softsgx.engines.native.tracing import orphans
from softsgx.engines.native.tracing.fresh import CopiedImage, FreshChild
from softsgx.engines.native.tracing.loop import Loop
from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.tracing.tasks import Tasks
from softsgx.engines.native.vdso.path_calls import PathStubs
from softsgx.engines.native.x86.rewrite import Places

FORK, VFORK, CLONE = abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE
CHILD, EXITED, KILLED, STOPPED = 7, 3 << 8, 9, abi.SIGTRAP << 8 | 0x7F


def copied() -> Any:
    return Fake(
        vdso_base=0x1000,
        vdso=object(),
        permits_at=0,
        loader=2,
        cpuid_stubs=object(),
        cpuid_sites=Places(),
        path_stubs=PathStubs(0x5000),
    )


class Family:
    """The tasks of a program, with a parent whose children may be fresh."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[tuple[object, ...]] = []
        lifecycle: Any = Fake(
            new_process=None,
            fork_fresh=lambda tid, parent: (
                FreshChild(cast(Any, Fake(pid=tid)), CopiedImage(parent.image))
                if parent.image.left_alone
                else None
            ),
            fresh_ended=lambda tid: self.notes.append(("ended", tid)),
            fork_image=lambda tid, image: Fake(copy=image, tid=tid),
            new_thread=lambda tid, process, image: Fake(
                tid=tid, process=process, image=image, place=None, running=False
            ),
            before_resume=lambda: self.notes.append(("hides",)),
        )
        waits: Any = Fake(unreported={}, kept=[], places={})
        self.tasks = Tasks(lifecycle, waits, cast(Any, Fake()))
        self.waits = waits
        self.parent = Fake(tid=1, process=Fake(pid=1), image=copied(), announces_end=False)
        self.parent.image.left_alone = True
        monkeypatch.setattr(
            kernel,
            "try_ptrace",
            lambda request, tid, *_: self.notes.append((request, tid)),
        )

    def child(self, event: int = FORK, flags: int = abi.SIGCHLD) -> bool:
        return self.tasks._is_fresh(CHILD, cast(Any, self.parent), event, flags)


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    return Family(monkeypatch)


def test_a_child_is_resumed_when_what_the_program_could_notice_is_done(family: Family) -> None:
    assert family.child()
    assert list(family.tasks.fresh) == [CHILD] and not family.tasks.threads
    assert family.notes == [("hides",), (abi.PTRACE_CONT, CHILD)]
    assert family.tasks.are_any()


@pytest.mark.parametrize(
    ("event", "flags"),
    [(VFORK, 0), (CLONE, 0), (FORK, abi.CLONE_VM), (CLONE, abi.CLONE_VM | abi.CLONE_THREAD)],
)
def test_a_child_that_shares_memory_is_not_fresh(family: Family, event: int, flags: int) -> None:
    assert not family.child(event, flags)
    assert not family.tasks.fresh and not family.notes


@pytest.mark.parametrize("why", ["involved", "announces"])
def test_a_child_that_needs_preparation_is_not_fresh(family: Family, why: str) -> None:
    family.parent.image.left_alone = why != "involved"
    family.parent.announces_end = why == "announces"
    assert not family.child()
    assert not family.tasks.fresh and not family.notes


def test_a_child_that_grows_has_what_fork_has_copied(family: Family) -> None:
    image = family.parent.image
    image.path_stubs.stops[1], image.path_stubs.sites = 2, {3}
    image.cpuid_sites.add(0x1000, {4})
    assert family.child()
    image.path_stubs.stops[1] = image.path_stubs.stops[8] = 5
    image.path_stubs.sites.add(9)
    image.cpuid_sites.add(0x1000, {5})
    thread = family.tasks._fresh_event(CHILD, STOPPED)
    assert thread is family.tasks.threads[CHILD] and not family.tasks.fresh
    assert thread.running
    found: Any = thread.image
    assert (found.copy.path_stubs.stops, found.copy.path_stubs.sites) == ({1: 2}, {3})
    assert set(found.copy.cpuid_sites) == {0x1004}
    for name in ("vdso_base", "vdso", "permits_at", "loader", "cpuid_stubs"):
        assert getattr(found.copy, name) is getattr(image, name)
    assert found.copy.uninvolved


def test_an_address_space_begins_with_what_was_copied_when_the_child_was_made() -> None:
    parent, child = copied(), cast(Any, Fake())
    parent.path_stubs.stops[1] = 2
    snapshot = CopiedImage(parent)
    ProcessImage._copy(child, snapshot)
    child.path_stubs.stops[1] = 3
    assert parent.path_stubs.stops == snapshot.path_stubs.stops == {1: 2}  # type: ignore[union-attr]
    assert (child.loader, child.cpuid_stubs) == (2, parent.cpuid_stubs)


def test_a_child_that_exits_leaves_only_its_status(family: Family) -> None:
    assert family.child()
    assert family.tasks._fresh_event(CHILD, EXITED) is None
    assert family.notes[2:] == [("ended", CHILD)]
    assert family.tasks.statuses == {CHILD: EXITED}
    assert not family.tasks.threads and not family.tasks.are_any()


@pytest.mark.parametrize("why", ["killed", "unreported", "kept"])
def test_a_child_that_may_leave_children_grows_at_its_end(family: Family, why: str) -> None:
    assert family.child()
    family.waits.unreported = {9: STOPPED} if why == "unreported" else {}
    family.waits.kept = [(9, STOPPED)] if why == "kept" else []
    thread = family.tasks._fresh_event(CHILD, KILLED if why == "killed" else EXITED)
    assert thread is family.tasks.threads[CHILD]


def test_a_child_that_another_process_asks_for_grows(family: Family) -> None:
    assert family.child()
    assert family.tasks.find(5) is None
    thread = family.tasks.find(CHILD)
    assert thread is family.tasks.threads[CHILD] and family.tasks.find(CHILD) is thread


def test_a_child_is_known_when_orphans_are_looked_for(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert family.child()
    seen: list[tuple[set[int], set[int]]] = []
    monkeypatch.setattr(
        orphans, "orphans", lambda _waits, known, living, killed: seen.append((known, living))
    )
    family.tasks._orphans_of(cast(Any, Fake(pid=3)), killed=True)
    assert seen == [({CHILD}, {CHILD})]


@pytest.mark.parametrize(
    "name", ["exit_stubs", "entry_stubs", "state_stubs", "foreign_mappings", "mm"]
)
def test_an_address_space_with_parts_that_fork_copies_is_not_left_alone(name: str) -> None:
    class Image:
        uninvolved = True
        is_left_alone = ProcessImage.is_left_alone

    image: Any = Image()
    assert image.is_left_alone
    setattr(image, name, None)
    assert not image.is_left_alone
    other: Any = Image()
    other.uninvolved = False
    assert not other.is_left_alone


@pytest.mark.parametrize("alone", [True, False])
def test_the_supervisor_counts_a_fresh_child_as_a_thread_that_may_run(alone: bool) -> None:
    notes: list[tuple[object, ...]] = []
    affinity = Fake(
        born=lambda tid: notes.append(("born", tid)), gone=lambda tid: notes.append((tid,))
    )
    parts: Any = Fake(
        _affinity=affinity,
        _registry=Fake(sweep=lambda: notes.append(("sweeps",))),
        new_process=lambda pid, parent: (pid, parent),
    )
    image = copied()
    image.is_left_alone = alone
    parent: Any = Fake(process="parent", image=image)
    child = Supervisor.fork_fresh(parts, CHILD, parent)
    if not alone:
        assert child is None and not notes
        return
    assert child is not None and child.process == cast(Any, (CHILD, "parent"))
    assert child.copied.vdso is image.vdso
    Supervisor.fresh_ended(parts, CHILD)
    assert notes == [("born", CHILD), (CHILD,), ("sweeps",)]


class Told:
    """A thread that has stopped for SIGCHLD, and a loop that may let it receive that."""

    def __init__(self) -> None:
        self.notes: list[object] = []

        def note(what: object) -> Any:
            return lambda *arguments: self.notes.append(arguments or what)

        self.regs = Fake(rip=0x9000)
        stubs = Fake(has_entry=lambda place: place == 0x8000)
        self.image = Fake(
            uninvolved=True, vdso_base=0x1000, vdso=Fake(end=0x2000), cpuid_stubs=stubs
        )
        self.thread: Any = Fake(
            image=self.image,
            process=Fake(guarded=set(), pid=1),
            running=False,
            load=lambda: self.regs,
            resume=note("resumed"),
        )
        self.loop: Any = Fake(
            _permits=Fake(settle=note("settles")),
            _background=note("background"),
            _before_resume=note("hides"),
        )

    def passes(self) -> bool:
        return Loop._passes(self.loop, self.thread)


def test_a_thread_receives_sigchld_at_once_after_what_it_could_notice_is_done() -> None:
    told = Told()
    assert told.passes()
    assert told.notes == ["settles", "background", "hides", (abi.SIGCHLD,)]
    assert told.thread.running


@pytest.mark.parametrize("rip", [0x1000, 0x2FFF, 0x8000])
def test_a_thread_in_a_stub_does_not_receive_sigchld_there(rip: int) -> None:
    told = Told()
    told.regs.rip = rip
    assert not told.passes()
    assert not told.notes and not told.thread.running


@pytest.mark.parametrize("why", ["involved", "guarded"])
def test_a_process_with_devices_receives_sigchld_as_other_signals(why: str) -> None:
    told = Told()
    told.image.uninvolved = why != "involved"
    told.thread.process.guarded = {(0, 1)} if why == "guarded" else set()
    assert not told.passes()
    assert not told.notes and not told.thread.running
