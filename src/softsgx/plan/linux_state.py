"""The state of a compiled replay: arrays, and the names of their entries.

Nodes of the lists are pages (by dense number), then the SECS of each enclave, then the heads of
the groups' lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from softsgx.paging import Fifo, Prefetching
from softsgx.plan.scene import Epc, Scene

__all__ = ["State", "new_state"]

RESIDENT, ACCESSED, EVICTED = 1, 2, 4
NONE, PRESENT, OUT = 0, 1, 2  # of a SECS
(
    FREE,
    LOW,
    HIGH,
    BATCH,
    SCAN,
    PATIENCE,
    AGEING,
    CAPACITY,
    ASLEEP,
    WOKEN,
    GAVE_UP,
    OUTCOMES,
    SERVING,
    QUEUED,
    AT,
    FRUITLESS,
    FORCED,
    REQUESTED,
    WAITING,
    ACCESSES,
    MADE,
    LOADS,
    EVICTIONS,
    SECS_LOADS,
    POSSIBLE,
    JUDGED,  # a group has a verdict
    WINDOW,  # pages to load ahead
) = range(27)
GROUP, SECS, CHILDREN, PROMISED, MADE_OF, LOADS_OF, VA_OF = range(7)
(
    PARENT,  # -1 above the root
    CEILING,
    LIMITED,
    USAGE,
    PEAK,
    LENGTH,  # of its list
    MEMBERS,  # of its subtree
    POSITION,  # of the walk there
    REQUESTS,  # the groups in the order of their requests
    QUEUE,  # the groups that ksgxd serves
    VERDICTS,
) = range(11)
NEXT, LAST = 0, 1  # a node whose links are itself is on no list
DONE, NO_EPC = -1, -2  # results of _alloc, beside the group that must be reclaimed in


class State(NamedTuple):
    """The state of a replay; few arrays, since the compiler passes each as several arguments.

    Attributes:
        scalars: a number for each of the first names of the module.
        flags: of each page.
        enclave_of: of each page.
        links: of each node, ``NEXT`` and ``LAST``.
        enclaves: ``[name][enclave]`` for the second names.
        groups: ``[name][group]`` for the third names.
        order: ``[group][position]``: the group's subtree, parents first.
        work: pages that a batch has isolated; its victims.
    """

    scalars: np.ndarray[Any, Any]
    flags: np.ndarray[Any, Any]
    enclave_of: np.ndarray[Any, Any]
    links: np.ndarray[Any, Any]
    enclaves: np.ndarray[Any, Any]
    groups: np.ndarray[Any, Any]
    order: np.ndarray[Any, Any]
    work: np.ndarray[Any, Any]


def new_state(scene: Scene, epc: Epc, paths: tuple[str, ...]) -> State:
    """Return the state before the first access.

    Args:
        scene: the enclaves.
        epc: the host.
        paths: of all groups, see :func:`~softsgx.plan.scene.paths_of`.
    """
    pages, enclaves, groups = scene.footprint_pages, len(scene.enclaves), len(paths)
    nodes = pages + enclaves + groups
    policy = epc.policy
    number = {path: at for at, path in enumerate(paths)}
    limits = {"/" + path.strip("/"): limit for path, limit in epc.limits.items()}
    parent = [number.get(_above(path), -1) if path != "/" else -1 for path in paths]
    subtrees = [_subtree(parent, group) for group in range(groups)]
    scalars = np.zeros(WINDOW + 1, np.int64)
    scalars[FREE] = scalars[CAPACITY] = epc.pages
    scalars[LOW], scalars[HIGH] = policy.low(epc.pages), policy.high(epc.pages)
    scalars[BATCH], scalars[SCAN] = policy.batch(epc.pages), policy.scan_pages
    scalars[PATIENCE] = policy.patience_passes
    scalars[AGEING] = not isinstance(policy, Fifo)
    scalars[ASLEEP] = scalars[POSSIBLE] = 1
    scalars[WAITING] = -1
    scalars[WINDOW] = policy.window_pages if isinstance(policy, Prefetching) else 0
    order = np.zeros((groups, groups), np.int64)
    of_groups = np.zeros((VERDICTS + 1, groups), np.int64)
    of_groups[PARENT] = parent
    of_groups[CEILING] = [min(limits.get(path, epc.pages), epc.pages) for path in paths]
    of_groups[LIMITED] = [path in limits for path in paths]
    of_groups[MEMBERS] = [len(subtree) for subtree in subtrees]
    for group, subtree in enumerate(subtrees):
        order[group, : len(subtree)] = subtree
    of_enclaves = np.zeros((VA_OF + 1, enclaves), np.int64)
    of_enclaves[GROUP] = [number["/" + enclave.group.strip("/")] for enclave in scene.enclaves]
    sizes = [enclave.pages for enclave in scene.enclaves]
    return State(
        scalars=scalars,
        flags=np.zeros(pages, np.uint8),
        enclave_of=np.repeat(np.arange(enclaves, dtype=np.int32), sizes),
        links=np.repeat(np.arange(nodes, dtype=np.int32)[:, np.newaxis], 2, axis=1),
        enclaves=of_enclaves,
        groups=of_groups,
        order=order,
        work=np.zeros((2, max(policy.batch(epc.pages), policy.scan_pages)), np.int64),
    )


def _above(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _subtree(parent: list[int], group: int) -> list[int]:
    """Return a group and all below it, parents first, children in the order in which they are."""
    below = [child for child, above in enumerate(parent) if above == group]
    return [group, *(member for child in below for member in _subtree(parent, child))]
