"""Compile the kernels that every plan uses, before they are needed, and say so.

Machine code is cached (:mod:`softsgx.plan.compiled`): only the first plan of a user waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from softsgx.plan import curves, linux_kernels
from softsgx.plan.compiled import is_cached
from softsgx.plan.curves import StackDistances
from softsgx.plan.linux_replay import LinuxReplay
from softsgx.plan.numbering import PageNumbers
from softsgx.plan.scene import Epc, Scene, SceneEnclave

__all__ = ["compile_kernels"]

_PAGES = 2


def compile_kernels(progress: Callable[[str, int, int], None]) -> None:
    """Compile what is not cached.

    Args:
        progress: called before each part that takes seconds.
    """
    steps: tuple[tuple[str, Any, Callable[[], None]], ...] = (
        ("the curve", curves._count, _curve),
        ("the replay", linux_kernels.run, _replay),
    )
    for done, (what, kernel, work) in enumerate(steps):
        if not is_cached(kernel):
            progress(f"compiling {what}, once", done, len(steps))
            work()


def _curve() -> None:
    StackDistances().add(PageNumbers().of(np.zeros(1, np.uint64)))


def _replay() -> None:
    accesses = np.arange(_PAGES, dtype=np.uint32)
    scene = Scene((SceneEnclave(0, "", 0, _PAGES),), [accesses])
    LinuxReplay(scene, Epc(100)).run(accesses)
