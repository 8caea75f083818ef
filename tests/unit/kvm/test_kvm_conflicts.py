"""Leaves of host and guest at the same time: the guest sees only conflicts of its own leaves.

Goal: where both need a SECS or its tracking, both leaves complete; conflicts among the guest's own
leaves are reflected to it with the code or fault of a machine.

Method: scripted schedules stop one side in the middle of a leaf, where it holds its locks, and let
the other one run into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from tests.support.driver import Launched, launch, pattern
from tests.support.guests import GuestHost, GuestSystem

from softsgx.arch import PAGE_BYTES, PageType, SecInfo, Status
from softsgx.hw import Fault, PageInfoArgs
from softsgx.kvm import ConflictResolved, VepcPage
from softsgx.runtime import Script, SeededRuntime, Step
from softsgx.userland import SoftThread


@dataclass
class Scene:
    """A guest with an enclave, a page that the host evicts, and what tasks made of it."""

    host: GuestHost
    guest: GuestSystem
    made: Launched
    ends: dict[str, object] = field(default_factory=dict)
    thread: SoftThread | None = None

    def page(self, number: int) -> VepcPage:
        return self.guest.data(self.made.enclave, self.made.offset(number) // PAGE_BYTES)

    def evict(self) -> None:
        """The host evicts data page 0."""
        self.host.evict(self.page(0))

    def leaf(self, name: str, *operands: object) -> object:
        """A leaf of the guest's kernel: its code, or the fault's name."""
        try:
            return getattr(self.guest.guest.leaves, name)(*operands)
        except Fault as fault:
            return str(fault)

    def etrack(self) -> object:
        return self.leaf("etrack", self.guest.secs(self.made.enclave).gpa)

    def ewb_operands(self, number: int) -> tuple[object, ...]:
        """What EWB of a data page takes."""
        va = self.made.enclave.swap.va.pages()[0].epc
        assert va is not None
        out = PageInfoArgs(0, bytearray(PAGE_BYTES), bytearray(128), 0)
        return out, self.page(number).gpa, va.addr + 511 * 8

    @property
    def resolved(self) -> list[tuple[str, str, str]]:
        events = [event for event in self.host.events if isinstance(event, ConflictResolved)]
        return [(event.leaf, event.what, event.how) for event in events]


def play(
    script: tuple[Step, ...],
    prepare: Callable[[Scene], None],
    *,
    readable: bool = True,
    **tasks: Callable[[Scene], object],
) -> Scene:
    """Prepare, then run the tasks as the script says; their results are in ``ends``."""
    runtime = SeededRuntime(0, policy=Script(*script, strict=False))

    def main() -> Scene:
        host = GuestHost(epc_pages=80, runtime=runtime)
        guest = host.guest(24)
        scene = Scene(host, guest, launch(guest.process(), 4))
        prepare(scene)
        host.events.clear()

        def keep(name: str, task: Callable[[Scene], object]) -> Callable[[], None]:
            return lambda: scene.ends.update({name: task(scene)})

        spawned = [runtime.spawn(keep(name, task), name) for name, task in tasks.items()]
        for task in spawned:
            task.join()
        thread = scene.thread or scene.made.thread()
        if readable:
            assert thread.load(scene.made.data(0), 8) == pattern(0)[:8]
        host.check_invariants()
        return scene

    return runtime.run(main)


HELD = ("guest", "acquire guest0.vepc")
"""The guest has met the host, and wants to wait for it."""


def nothing(scene: Scene) -> None:
    """Nothing to prepare."""


@pytest.mark.parametrize("place", ["EWB", "ETRACKC"])
def test_etrack_of_the_guest_waits_for_the_host(place: str) -> None:
    scene = play((("host", place), HELD), nothing, host=Scene.evict, guest=Scene.etrack)
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.resolved == [("etrack", "TRACKING_RESOURCE_CONFLICT", "again")]


@pytest.mark.parametrize("place", ["EWB", "ETRACKC"])
def test_ewb_of_the_guest_waits_for_the_host(place: str) -> None:
    def block(scene: Scene) -> None:
        scene.leaf("eblock", scene.page(1).gpa)
        scene.etrack()

    scene = play(
        (("host", place), HELD),
        block,
        host=Scene.evict,
        guest=lambda scene: scene.leaf("ewb", *scene.ewb_operands(1)),
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.resolved == [("ewb", "#GP(0)", "again")]


def test_eblock_of_the_guest_waits_for_a_cycle_that_the_host_begins() -> None:
    scene = play(
        (("host", "ETRACKC"), HELD),
        nothing,
        host=Scene.evict,
        guest=lambda scene: scene.leaf("eblock", scene.page(1).gpa),
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.resolved == [("eblock", "SGX_ENTRYEPOCH_LOCKED", "again")]


def test_etrack_of_the_guest_does_not_see_the_cycle_of_the_host() -> None:
    """A thread inside makes the host's cycle incomplete; the guest's own must succeed."""

    def enter(scene: Scene) -> None:
        scene.thread = scene.made.thread()
        scene.thread.load(scene.made.data(1))

    # The host stops in the EWB after its ETRACKC, before it has kicked anybody.
    scene = play(
        (("host", "ETRACKC"), ("host", "EWB"), HELD), enter, host=Scene.evict, guest=Scene.etrack
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert {how for _leaf, _what, how in scene.resolved} == {"again"}
    assert scene.guest.guest.counters.kicks >= 1


@pytest.mark.parametrize(("place", "waits"), [("ERDINFO", "EBLOCK"), ("EBLOCK", "EWB")])
def test_the_host_waits_for_a_cycle_that_the_guest_begins(place: str, waits: str) -> None:
    """The guest stands in ETRACK when the host comes to a leaf that cannot overlap with it."""
    scene = play(
        (("host", place), ("guest", "ETRACK"), ("host", "acquire guest0.gate")),
        nothing,
        host=Scene.evict,
        guest=Scene.etrack,
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.guest.guest.counters.host_waits == 1, waits
    assert scene.guest.guest.counters.loaded == 1
    assert scene.resolved == []


def test_a_leaf_that_has_translated_is_waited_for_before_its_page_is_blocked() -> None:
    """The guest is in the middle of EMODPR of the page when the host takes it."""

    def restrict(scene: Scene) -> object:
        return scene.leaf("emodpr", SecInfo.of(PageType.REG, 3), scene.page(0).gpa)

    scene = play(
        (("guest", "EMODPR"), ("host", "acquire guest0.gate")),
        nothing,
        host=Scene.evict,
        guest=restrict,
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.resolved == []


def test_a_leaf_that_has_translated_does_not_see_what_the_host_does_then() -> None:
    """Without the wait, the guest's EBLOCK would find the page blocked by the host."""
    scene = play(
        (("guest", "EBLOCK"), ("host", "acquire guest0.gate")),
        nothing,
        host=Scene.evict,
        guest=lambda scene: scene.leaf("eblock", scene.page(0).gpa),
        readable=False,  # the guest has blocked it
    )
    assert scene.ends["guest"] is Status.SUCCESS
    assert scene.guest.guest.counters.guest_blocked == 1


def test_a_page_on_its_way_out_is_waited_for() -> None:
    def load(scene: Scene) -> object:
        scene.thread = scene.made.thread()
        return scene.thread.load(scene.made.data(0), 8)

    scene = play((("host", "EWB"), HELD), nothing, host=Scene.evict, guest=load)
    assert scene.ends["guest"] == pattern(0)[:8]


# --- the guest's own ------------------------------------------------------------------------------


def test_conflicts_among_the_guests_own_leaves_are_reflected_as_faults() -> None:
    def twice(scene: Scene) -> object:
        return scene.leaf("eremove", scene.page(1).gpa)

    scene = play(
        (("one", "EMODT"), ("two", "end")),
        nothing,
        one=lambda scene: scene.leaf("emodt", SecInfo.of(PageType.TRIM, 0), scene.page(1).gpa),
        two=twice,
    )
    assert scene.ends == {"one": Status.SUCCESS, "two": "#GP(0)"}
    assert scene.resolved == [("eremove", "EPC_PAGE_CONFLICT_EXCEPTION", "reflect")]


def test_conflicts_among_the_guests_own_leaves_are_reflected_as_codes() -> None:
    def retype(scene: Scene) -> object:
        return scene.leaf("emodt", SecInfo.of(PageType.TRIM, 0), scene.page(1).gpa)

    scene = play((("one", "EMODT"), ("two", "end")), nothing, one=retype, two=retype)
    assert scene.ends == {"one": Status.SUCCESS, "two": Status.EPC_PAGE_CONFLICT}
    assert scene.resolved == [("emodt", "EPC_PAGE_CONFLICT_ERROR", "reflect")]
    assert scene.guest.guest.counters.reflected == 1


def test_a_cycle_of_the_guest_that_is_incomplete_is_the_guests_to_complete() -> None:
    host = GuestHost(epc_pages=80)
    guest = host.guest(24)
    made = launch(guest.process(), 4)
    thread = made.thread()
    thread.load(made.data(0))
    secs = guest.secs(made.enclave).gpa
    assert guest.guest.leaves.etrack(secs) is Status.SUCCESS
    assert guest.guest.leaves.etrack(secs) is Status.PREV_TRK_INCMPL
    made.process.ptes.kick()
    assert guest.guest.leaves.etrack(secs) is Status.SUCCESS
