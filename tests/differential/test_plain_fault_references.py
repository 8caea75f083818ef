"""The path of plain faults in C gives back each reference that it takes.

Method: each setting of ``test_plain_fault_steps`` many times, and real threads and address spaces.
What one scene leaves behind is a block that stays allocated; objects that all scenes share keep
their number of references.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tests.differential.test_plain_fault_steps import SETTINGS, Scene
from tests.differential.test_plain_fault_threads import faults_of, with_image, with_thread

from softsgx import compiled
from softsgx.arch import EpcAddr
from softsgx.driver import FaultResult
from softsgx.engines.native import abi
from softsgx.engines.native.faults import plain
from softsgx.engines.native.memory.store import StoredPage
from softsgx.hw import EpcPage

TIMES = 100

pytestmark = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)

SHARED: tuple[object, ...] = (
    *(None, True, False, 0, 1, 2, 3, 11, 12, abi.BUS_ADRERR, abi.SIGBUS, *FaultResult),
    *(plain._NO_REPETITION, ValueError, RuntimeError, AttributeError),
)


def references(action: Callable[[], object]) -> list[int]:
    """Return how many blocks and how many references of each shared object a few actions leave."""
    action()
    gc.collect()
    before = sys.getallocatedblocks(), *map(sys.getrefcount, SHARED)
    for _ in range(TIMES):
        action()
    gc.collect()
    after = sys.getallocatedblocks(), *map(sys.getrefcount, SHARED)
    return [late - early for early, late in zip(before, after, strict=True)]


def real_thread(scene: Scene) -> None:
    with_thread(scene)


def real_space(scene: Scene) -> None:
    with_image(scene)


def real_entry(scene: Scene) -> None:
    image, _pager = with_image(scene)
    image.page_table._entries[0x7000_1000] = StoredPage(EpcPage(EpcAddr(0x8000)))


def no_event(scene: Scene) -> None:
    scene.waits.next = lambda: None


def without_waits(scene: Scene) -> None:
    del scene.waits.look_ns


def interrupted(scene: Scene) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    scene.during = interrupt


def wrong_table(scene: Scene) -> None:
    scene.table._slots = None  # type: ignore[assignment]


def wrong_open(scene: Scene) -> None:
    scene.permits._open = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "setting",
    [
        *(*SETTINGS, real_thread, real_space, real_entry, no_event, without_waits, interrupted),
        *(wrong_table, wrong_open),
    ],
    ids=lambda setting: setting.__name__,
)
def test_a_stop_leaves_no_reference_behind(setting: Any) -> None:
    assert compiled.speedups is not None
    serve = compiled.speedups.serve_faults

    def action() -> None:
        scene = Scene()
        setting(scene)
        try:
            serve(faults_of(scene))
        except (KeyboardInterrupt, AttributeError, TypeError):
            return

    left = references(action)
    assert all(abs(count) < TIMES // 2 for count in left), left
