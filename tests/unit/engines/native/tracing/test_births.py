"""What a new thread or process has of the one that made it."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace as Fake
from typing import Any, cast

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.supervisor import Supervisor
from softsgx.engines.native.tracing.program import Process, ProgramThread
from softsgx.engines.native.tracing.tasks import Tasks, _clone_flags
from softsgx.engines.native.tracing.waits import Waits

FORK, VFORK, CLONE = abi.PTRACE_EVENT_FORK, abi.PTRACE_EVENT_VFORK, abi.PTRACE_EVENT_CLONE


class Family:
    """A loop, and a thread with a sibling, which makes another one."""

    def __init__(self, *, watched: bool, announces: bool) -> None:
        self.notes: list[tuple[object, ...]] = []
        self.process = Fake(name="its process")
        self.image: Any = Fake(name="its image", current=None, threads={})
        self.parent = self._thread("parent", self.process, self.image)
        self.parent.watched, self.parent.announces_end = watched, announces
        self.image.threads = {1: self.parent, 2: self._thread("sibling", self.process, self.image)}
        self.lifecycle = Fake(
            new_process=lambda pid, parent: Fake(name=f"process {pid} of {parent.name}"),
            fork_image=lambda tid, parent: Fake(name=f"copy {tid} of {parent.name}", current=None),
            new_thread=self._new_thread,
            adopt_fork=lambda thread: self.notes.append(
                ("adopted", thread.name, thread.image.current is thread)
            ),
        )
        self.known: list[str] = []
        self.loop: Any = Fake(
            _lifecycle=self.lifecycle, _know=lambda thread: self.known.append(thread.name)
        )

    def _thread(self, name: str, process: Any, image: Any) -> Any:
        return Fake(
            name=name,
            process=process,
            image=image,
            watched=False,
            announces_end=False,
            announce_end=lambda: self.notes.append(("announces", name)),
            stop_after_call=lambda: self.notes.append(("stops", name)),
        )

    def _new_thread(self, tid: int, process: Any, image: Any) -> Any:
        thread = self._thread(f"thread {tid}", process, image)
        if image is self.image:
            image.threads[tid] = thread
        return thread

    def child(self, event: int, flags: int) -> Any:
        return Tasks._child(self.loop, 7, cast(Any, self.parent), event, flags)


@pytest.mark.parametrize(("watched", "announces"), list(product([False, True], repeat=2)))
@pytest.mark.parametrize(
    ("event", "flags", "same_process", "same_image"),
    [
        (FORK, 0, False, False),
        (CLONE, 0, False, False),
        (VFORK, 0, False, True),
        (VFORK, abi.CLONE_VM, False, True),
        (CLONE, abi.CLONE_VM, False, True),
        (CLONE, abi.CLONE_VM | abi.CLONE_THREAD, True, True),
    ],
)
def test_a_child_shares_what_its_flags_say(
    event: int, flags: int, same_process: bool, same_image: bool, watched: bool, announces: bool
) -> None:
    family = Family(watched=watched, announces=announces)
    thread = family.child(event, flags)
    assert family.known == ["thread 7"]
    assert thread.process.name == ("its process" if same_process else "process 7 of its process")
    assert thread.image.name == ("its image" if same_image else "copy 7 of its image")
    assert thread.announces_end is announces
    assert thread.watched is (same_image and watched), "filters of a copy are those of its time"
    expected: list[tuple[object, ...]] = []
    if same_process:
        expected += [("announces", "parent"), ("announces", "thread 7")]
    if same_image:
        expected += [("stops", name) for name in ("parent", "sibling", "thread 7")]
    else:
        expected += [("adopted", "thread 7", True)]
    assert family.notes == expected
    assert same_image or family.image.current is None


def test_a_new_process_has_copies_of_what_its_parent_guards() -> None:
    parent = Process(3, cast(Any, "group"))
    parent.alive = 4
    parent.guarded, parent.guarded_descriptors = {(0x1000, 0x2000)}, {5}
    parent.memory_descriptors = {6}
    child = Supervisor.new_process(cast(Any, None), 9, parent)
    assert child.pid == 9 and child.group is parent.group and not child.alive
    for name in ("guarded", "guarded_descriptors", "memory_descriptors"):
        assert getattr(child, name) == getattr(parent, name)
        assert getattr(child, name) is not getattr(parent, name)


@pytest.mark.parametrize(
    ("number", "flags"), [(abi.SYS_CLONE, 0x111), (abi.SYS_CLONE3, 0x222), (57, 0), (58, 0)]
)
def test_flags_of_a_birth_are_those_of_its_call(number: int, flags: int) -> None:
    regs = Fake(orig_rax=number, rdi=0x111)
    image = Fake(read=lambda at, size: (0x222).to_bytes(size, "little") if at == 0x111 else b"")
    assert _clone_flags(cast(Any, Fake(load=lambda: regs, image=image))) == flags


def test_a_thread_charges_its_epc_pages_to_the_group_of_its_process() -> None:
    group = cast(Any, "group")
    parent = Process(3, group)
    image = Fake(vdso_base=0x1000, vdso=Fake(inject=0x20))
    for process in (parent, Supervisor.new_process(cast(Any, None), 9, parent)):
        parts: Any = (Waits(), process, image, Fake(), Fake(xcr0=7))
        assert ProgramThread(process.pid, *parts).group is process.group is group
