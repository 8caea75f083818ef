"""The page of a thread that waits is in the memory file whenever anything could look at it.

Goal: C code may fill the hole at the very end of a fault, together with the wake-up.  Nothing else
that the supervisor does at the fault happens before the page is there, and no page is lost.
Method: the scene of ``test_waiting_faults`` with the memory of a site of ``test_native_memory``;
what the supervisor calls looks into the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import greenlet
import pytest
from tests.differential.test_native_memory import Site
from tests.support.native import USABLE_PAGERS, needs_tracing
from tests.unit.engines.native.test_plain_faults import FAULT, FORMS, attributes_of
from tests.unit.engines.native.test_waiting_faults import WaitingScene

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.driver import FaultResult, Mm
from softsgx.engines.native import abi
from softsgx.engines.native.memory.uffd import UffdPager
from softsgx.engines.native.tracing.fault_events import FaultEvent
from softsgx.engines.native.tracing.process_image import ProcessImage

NUMBER = 2  # a page that can be written
END = 12, 0, 0

pytestmark = [
    needs_tracing,
    pytest.mark.skipif(compiled.speedups is None, reason=compiled.description),
    pytest.mark.skipif("userfaultfd" not in USABLE_PAGERS, reason="needs userfaultfd"),
]


class LateScene(WaitingScene):
    """Notes at each step whether the page is in the file."""

    def __init__(self, form: str) -> None:
        self.site = Site(0, True if form == "python" else "compiled", "userfaultfd")
        self.pager = cast(UffdPager, self.site.pager)
        self.pager._dontwake = abi.UFFDIO_COPY_MODE_DONTWAKE
        super().__init__(form, self.pager._uffd)
        self.at = self.site.address(NUMBER)
        self.content = bytes(range(256)) * (PAGE_BYTES // 256)
        self._evict()
        self.after: Callable[[], object] = lambda: None
        self.site.table._installed = None
        fake: Any = self.image
        del fake.flush
        self.image = cast(Any, ProcessImage.__new__(ProcessImage))
        mm = self.site.mm
        fake.mm = SimpleNamespace(found=None, find=mm.find, fault=self.fault)
        fake.page_table, fake._deferred_calls = self.site.table, []
        fake.inject = lambda _calls: self.note("inject")
        fake.pager = self.pager
        for name, value in attributes_of(fake).items():
            setattr(self.image, name, value)
        self.thread.image = self.image
        self.images[self.pager._uffd] = self.image
        self.event = self.reports[0] = FaultEvent(self.pager._uffd, 11, self.at + 8, 0)
        self.store._leaving.clear()

    def _evict(self) -> None:
        """Give the page its content, and evict it."""
        self.site.do("fault", NUMBER, 0)
        os.pwrite(self.site.file, self.content, self.at)
        self.site.do("zap", NUMBER, 0)
        self.site.hide()
        self.site.do("evict", NUMBER, 0)
        assert not self.there

    @property
    def there(self) -> bool:
        try:
            return os.lseek(self.site.memory.fd, self.at, os.SEEK_DATA) == self.at
        except OSError:
            return False

    def note(self, what: str) -> None:
        self.log.append(f"{what}: {self.there}")

    def fault(self, address: int, access: int, task: object) -> FaultResult:
        assert (address, task) == (self.at + 8, self.thread)
        result: FaultResult = self.site.mm.fault(address, access, self.site.process)
        self.after()
        return result

    def skip(self, thread: object, vector: int) -> None:
        if self.cpu.hw.tracer is not None:
            self.note("skip")
        self.crossings.aex += 1
        self.crossings.eresume += 1

    def background(self) -> None:
        self.note("background")

    def hide(self) -> None:
        self.note("hide")

    def hold(self, thread: object) -> bool:
        self.note("hold")
        return True

    def failed(self, pid: int, tid: int, error: Exception) -> None:
        self.note("failed")

    def outcome(self) -> object:
        """Serve the fault; return what was noted, and what there is then."""
        assert self.serve(self.served) == END
        content = os.pread(self.site.memory.fd, PAGE_BYTES, self.at)
        rest = content == self.content, self.thread.running, len(self.site.errors)
        return [each for each in self.log if ":" in each], rest


def plain(scene: LateScene) -> None:
    """Nothing special."""


def busy(scene: LateScene) -> None:
    scene.runtime._ready.append(cast(Any, None))


def traced(scene: LateScene) -> None:
    scene.cpu.hw.tracer = print


def leaving(scene: LateScene) -> None:
    scene.store._leaving.add(4096)
    scene.store.hide_unmapped = scene.hide


def deferred(scene: LateScene) -> None:
    scene.image._deferred_calls.append((1, 2))


def due(scene: LateScene) -> None:
    scene.pager._watched.add(scene.site.address(0))
    scene.pager._inject = lambda _calls: scene.note("made")


def going(scene: LateScene) -> None:
    scene.slot()
    scene.permits._open.clear()
    cast(Any, scene.permits).going = lambda _thread: scene.note("going")


def stopped(scene: LateScene) -> None:
    scene.after = lambda: setattr(scene.thread, "running", False)


def left(scene: LateScene) -> None:
    scene.after = lambda: setattr(scene.cpu, "inside", None)


def not_a_hole(scene: LateScene) -> None:
    os.pwrite(scene.site.file, b"\2", scene.at)


def installed(scene: LateScene) -> None:
    scene.site.table._installed = lambda _page: scene.note("installed")


SETTINGS = [
    *(plain, busy, traced, leaving, deferred, due, going, stopped, left, not_a_hole, installed),
]


@pytest.fixture(params=SETTINGS, ids=lambda setting: setting.__name__)
def outcomes(request: pytest.FixtureRequest) -> dict[str, object]:
    found: dict[str, object] = {}
    for form in FORMS:
        scene = LateScene(form)
        try:
            request.param(scene)
            found[form] = scene.outcome()
        finally:
            scene.site.close()
    return found


def test_a_page_is_there_before_anything_looks(outcomes: dict[str, Any]) -> None:
    assert outcomes["python"] == outcomes["c"] == outcomes["records"]
    notes, (right, _running, _errors) = outcomes["c"]
    assert right and all(note.endswith("True") for note in notes)


@pytest.mark.parametrize("form", FORMS)
def test_a_page_that_is_loaded_once_more_at_the_fault_is_there_at_once(form: str) -> None:
    """The driver has resolved the fault; background work evicts the page, and loads it."""
    scene = LateScene(form)
    busy(scene)

    def background() -> None:
        scene.note("background")
        scene._evict()
        scene.site.do("fault", NUMBER, 0)
        scene.note("loaded")

    scene.background = background  # type: ignore[method-assign]
    noted, rest = cast(Any, scene.outcome())
    scene.site.close()
    assert noted == ["background: True", "loaded: True"]
    assert rest == (True, True, 0)


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("stops", [False, True], ids=["waits", "stops"])
def test_another_function_in_the_place_of_the_drivers_is_called(
    monkeypatch: pytest.MonkeyPatch, form: str, replaced: bool, stops: bool
) -> None:
    called: list[object] = []
    original = Mm.fault

    def fault(mm: Mm, *arguments: Any) -> FaultResult:
        called.append(arguments)
        return original(mm, *arguments)

    scene = LateScene(form)
    try:
        if replaced:
            monkeypatch.setattr(Mm, "fault", fault)
        process = scene.site.process
        scene.image.mm = scene.site.mm
        thread: Any = scene.thread
        thread.group, thread.claim = process.group, process.claim
        if stops:
            thread.info.addr, scene.waits.faults = scene.at + 8, None
            scene.events = [FAULT, END]
        _notes, (right, running, errors) = cast(Any, scene.outcome())
        assert right and running and not errors and scene.served.served == 1
        assert called == [(scene.at + 8, abi.PROT_READ, thread)] * replaced
    finally:
        scene.site.close()


@pytest.mark.parametrize("form", FORMS)
def test_a_page_that_another_task_loads_while_a_fault_waits_is_there_at_once(form: str) -> None:
    """The stack of a task that waits is elsewhere, and its place is used by others."""
    scene, seen = LateScene(form), list[bool]()

    def load() -> None:
        main.switch()
        scene.site.mm.fault(scene.at, abi.PROT_READ, scene.site.process)
        seen.append(scene.there)

    def fault(*_arguments: object) -> FaultResult:
        other.switch()
        return FaultResult.RETRY

    def outcome(depth: int) -> object:
        """Deep in the stack of C."""
        return next(map(outcome, [depth - 1])) if depth else scene.outcome()

    main, other = greenlet.getcurrent(), greenlet.greenlet(load)
    other.switch()
    scene.image.mm.fault = fault
    try:
        _notes, (right, running, errors) = cast(Any, outcome(100))
        assert seen == [True] and right and running and not errors
    finally:
        scene.site.close()
