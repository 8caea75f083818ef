"""Accesses replayed with Linux's policy, compiled: the second implementation of a replay.

:class:`~softsgx.plan.core_replay.CoreReplay` uses the core's objects; ``linux_kernels`` does the
same in arrays.  ``tests/differential`` runs both on the same histories, and compares counts,
resident pages and the order of every list.

It covers Linux's policy with other parameters, the same with pages loaded ahead, and FIFO; not the
eviction of VA pages, and not policies that use each access.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from softsgx.paging import Fifo, LinuxPolicy, Policy, Prefetching
from softsgx.plan import linux_kernels
from softsgx.plan import linux_state as name
from softsgx.plan.linux_state import new_state
from softsgx.plan.scene import GOES, Counts, Epc, Scene, paths_of

__all__ = ["LinuxReplay", "covers"]


def covers(policy: Policy) -> bool:
    """Return whether this implementation knows a policy."""
    return type(policy) in (Policy, LinuxPolicy, Fifo, Prefetching) and not policy.evict_va


class LinuxReplay:
    """As :class:`~softsgx.plan.core_replay.CoreReplay`, for policies that :func:`covers` names."""

    any_thread = True

    def __init__(self, scene: Scene, epc: Epc) -> None:
        assert covers(epc.policy), f"no fast replay of {epc.policy}"
        self._scene = scene
        paths = paths_of(scene, epc)
        self._state = new_state(scene, epc, paths)

    @property
    def possible(self) -> bool:
        """As :attr:`CoreReplay.possible`."""
        return bool(self._state.scalars[name.POSSIBLE])

    def run(self, pages: np.ndarray[Any, Any]) -> None:
        """As :meth:`CoreReplay.run`."""
        if not self.possible:
            return
        if len(pages) and pages.max() >= GOES:
            linux_kernels.run_with_removals(self._state, pages)
        else:
            linux_kernels.run(self._state, pages)

    def counts(self) -> Counts:
        """As :meth:`CoreReplay.counts`."""
        state = self._state
        made, loads, evictions, secs_loads = (
            int(state.scalars[at])
            for at in (name.MADE, name.LOADS, name.EVICTIONS, name.SECS_LOADS)
        )
        return Counts(
            self.possible,
            int(state.scalars[name.ACCESSES]),
            made,
            loads,
            evictions,
            secs_loads,
            tuple(map(int, state.enclaves[name.LOADS_OF])),
            tuple(map(int, state.groups[name.PEAK])),
        )

    def resident(self) -> np.ndarray[Any, Any]:
        """As :meth:`CoreReplay.resident`."""
        return (self._state.flags & name.RESIDENT).astype(bool)

    def order(self) -> list[list[int]]:
        """As :meth:`CoreReplay.order`."""
        links, pages = self._state.links, len(self._state.flags)
        first = pages + len(self._scene.enclaves)
        lists = []
        for head in range(first, len(links)):
            found, node = [], int(links[head, name.NEXT])
            while node != head:
                found.append(node if node < pages else pages - 1 - node)
                node = int(links[node, name.NEXT])
            lists.append(found)
        return lists

    def close(self) -> None:
        """As :meth:`CoreReplay.close`."""
