"""Accesses replayed with Linux's policy, compiled: the second implementation of a replay.

:class:`~softsgx.plan.core_replay.CoreReplay` uses the core's objects; this module does the same in
arrays, in one function that numba compiles: LRU lists of groups with ageing, batches, ksgxd's
watermarks and requests, charges and limits, SECS pages that are evicted with their last child, VA
pages that stay.  Each function below names the one that it repeats.  ``tests/differential`` runs
both on the same histories, and compares counts, resident pages and the order of every list.

It covers Linux's policy with other parameters, and FIFO; not the eviction of VA pages, and not
policies that load pages ahead or use each access.

Nodes of the lists are pages (by dense number), then the SECS of each enclave, then the heads of
the groups' lists.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from softsgx.arch import VA_SLOTS
from softsgx.paging import Fifo, LinuxPolicy, Policy
from softsgx.plan.compiled import compiled
from softsgx.plan.scene import ENDS, GOES, MOST_PAGES, MOST_WAITS, Counts, Epc, Scene, paths_of

__all__ = ["LinuxReplay", "covers"]

_compiled = partial(compiled, counts_references=False)  # LinuxReplay keeps the arrays
_inlined = partial(compiled, inlined=True, counts_references=False)
_MARGIN_PAGES, _THRESHOLD_PAGES = 32, 128  # as in softsgx.cgroup.group
_RESIDENT, _ACCESSED, _EVICTED = 1, 2, 4
_NONE, _PRESENT, _OUT = 0, 1, 2  # of a SECS
_SCALARS = 26
(
    _FREE,
    _LOW,
    _HIGH,
    _BATCH,
    _SCAN,
    _PATIENCE,
    _AGEING,
    _CAPACITY,
    _ASLEEP,
    _WOKEN,
    _GAVE_UP,
    _OUTCOMES,
    _SERVING,
    _QUEUED,
    _AT,
    _FRUITLESS,
    _FORCED,
    _REQUESTED,
    _WAITING,
    _ACCESSES,
    _MADE,
    _LOADS,
    _EVICTIONS,
    _SECS_LOADS,
    _POSSIBLE,
    _JUDGED,  # a group has a verdict
) = range(_SCALARS)
_GROUP, _SECS, _CHILDREN, _PROMISED, _MADE_OF, _LOADS_OF, _VA_OF = range(7)
(
    _PARENT,  # -1 above the root
    _CEILING,
    _LIMITED,
    _USAGE,
    _PEAK,
    _LENGTH,  # of its list
    _MEMBERS,  # of its subtree
    _POSITION,  # of the walk there
    _REQUESTS,  # the groups in the order of their requests
    _QUEUE,  # the groups that ksgxd serves
    _VERDICTS,
) = range(11)
_NEXT, _LAST = 0, 1  # a node whose links are itself is on no list
_DONE, _NO_EPC = -1, -2  # results of _alloc, beside the group that must be reclaimed in


class _State(NamedTuple):
    """The state of a replay; few arrays, since the compiler passes each as several arguments.

    Attributes:
        scalars: a number for each of the first names above.
        flags: of each page.
        enclave_of: of each page.
        links: of each node, ``_NEXT`` and ``_LAST``.
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


@_inlined
def _append(s: _State, node: int, group: int) -> None:
    """Lru.add, Lru.put_back."""
    head = len(s.flags) + s.enclaves.shape[1] + group
    last = s.links[head, _LAST]
    s.links[last, _NEXT] = node
    s.links[node, _LAST] = last
    s.links[node, _NEXT] = head
    s.links[head, _LAST] = node
    s.groups[_LENGTH, group] += 1


@_inlined
def _unlink(s: _State, node: int, group: int) -> None:
    """Lru.remove, one page of Lru.isolate."""
    before, after = s.links[node, _LAST], s.links[node, _NEXT]
    s.links[before, _NEXT] = after
    s.links[after, _LAST] = before
    s.links[node, _NEXT] = s.links[node, _LAST] = node
    s.groups[_LENGTH, group] -= 1


@_inlined
def _clear_verdicts(s: _State) -> None:
    if s.scalars[_JUDGED]:
        s.groups[_VERDICTS, :] = 0
        s.scalars[_JUDGED] = 0


@_inlined
def _mark_reclaimable(s: _State, node: int, group: int) -> None:
    """EpcCore.mark_reclaimable with Ksgxd.candidate_added."""
    _append(s, node, group)
    s.scalars[_GAVE_UP] = 0
    _clear_verdicts(s)


@_inlined
def _has_reclaimable(s: _State, group: int) -> bool:
    """EpcCgroup.has_reclaimable."""
    for at in range(s.groups[_MEMBERS, group]):  # noqa: SIM110 - numba has no generators
        if s.groups[_LENGTH, s.order[group, at]]:
            return True
    return False


@_inlined
def _request(s: _State, group: int) -> None:
    """Ksgxd.request; -1: without a group."""
    scalars = s.scalars
    if group >= 0:
        for at in range(scalars[_REQUESTED]):
            if s.groups[_REQUESTS, at] == group:
                break
        else:
            s.groups[_REQUESTS, scalars[_REQUESTED]] = group
            scalars[_REQUESTED] += 1
    if scalars[_ASLEEP]:
        scalars[_WOKEN] = 1


@_inlined
def _reclaim_ahead(s: _State, group: int) -> None:
    """The end of EpcCgroup.try_charge, with should_reclaim and limit_pages."""
    member = group
    while member >= 0:
        if s.groups[_LIMITED, member]:
            limit, above = s.scalars[_CAPACITY], member
            while above >= 0:
                limit = min(limit, s.groups[_CEILING, above])
                above = s.groups[_PARENT, above]
            if limit > _THRESHOLD_PAGES:
                limit -= _MARGIN_PAGES
            if s.groups[_USAGE, member] >= limit and _has_reclaimable(s, member):
                _request(s, member)
        member = s.groups[_PARENT, member]


@_inlined
def _alloc(s: _State, group: int) -> int:
    """EpcCore.alloc of a caller that must not reclaim.

    Returns:
        ``_DONE``, ``_NO_EPC``, or the group whose page must leave (EpcBusy).
    """
    scalars = s.scalars
    member = group
    while member >= 0:
        if s.groups[_USAGE, member] >= s.groups[_CEILING, member]:
            # AllocSlowPath._reclaim_or_wait
            if not _has_reclaimable(s, member):
                return _NO_EPC
            if s.groups[_VERDICTS, member]:
                s.groups[_VERDICTS, member] -= 1
                return _NO_EPC
            _request(s, member)
            return member
        member = s.groups[_PARENT, member]
    member = group
    while member >= 0:
        s.groups[_USAGE, member] += 1
        s.groups[_PEAK, member] = max(s.groups[_PEAK, member], s.groups[_USAGE, member])
        member = s.groups[_PARENT, member]
    _reclaim_ahead(s, group)
    scalars[_FREE] -= 1
    if scalars[_FREE] < scalars[_LOW] and scalars[_ASLEEP] and _has_reclaimable(s, 0):
        _request(s, -1)
    return _DONE


@_inlined
def _free(s: _State, group: int) -> None:
    """EpcCore.free with Ksgxd.page_freed."""
    member = group
    while member >= 0:
        s.groups[_USAGE, member] -= 1
        member = s.groups[_PARENT, member]
    s.scalars[_FREE] += 1
    s.scalars[_GAVE_UP] = 0
    _clear_verdicts(s)
    s.scalars[_OUTCOMES] += 1


@_inlined
def _evict_secs(s: _State, enclave: int) -> None:
    """The SECS is written."""
    s.enclaves[_SECS, enclave] = _OUT
    s.scalars[_EVICTIONS] += 1
    _free(s, s.enclaves[_GROUP, enclave])


@_inlined
def _choose(s: _State, group: int, force: bool) -> tuple[int, int]:
    """Reclaimer._choose and _prepare; return pages scanned, and how many are victims."""
    scalars, pages = s.scalars, len(s.flags)
    head = pages + s.enclaves.shape[1] + group
    limit = min(max(scalars[_SCAN], scalars[_BATCH]), s.groups[_LENGTH, group])
    scanned = chosen = 0
    while scanned < limit and chosen < scalars[_BATCH]:
        wanted = min(limit - scanned, scalars[_BATCH] - chosen)
        for at in range(wanted):
            node = s.links[head, _NEXT]
            _unlink(s, node, group)
            s.work[0, at] = node
        scanned += wanted
        for at in range(wanted):
            node = s.work[0, at]
            young = False
            if not force and scalars[_AGEING] and node < pages:
                young = s.flags[node] & _ACCESSED != 0
                s.flags[node] &= ~_ACCESSED & 0xFF
            if young:
                _append(s, node, group)
            else:
                s.work[1, chosen] = node
                chosen += 1
    return scanned, chosen


@_inlined
def _batch(s: _State, group: int, force: bool) -> tuple[int, int]:
    """Reclaimer.batch; return pages scanned and pages freed."""
    pages = len(s.flags)
    scanned, chosen = _choose(s, group, force)
    for at in range(chosen):
        node = s.work[1, at]
        if node >= pages:
            _evict_secs(s, node - pages)
            continue
        s.flags[node] = _EVICTED
        s.scalars[_EVICTIONS] += 1
        enclave = s.enclave_of[node]
        s.enclaves[_CHILDREN, enclave] -= 1
        if not s.enclaves[_CHILDREN, enclave]:
            _evict_secs(s, enclave)
        _free(s, group)
    return scanned, chosen


@_inlined
def _reclaim(s: _State, group: int, force: bool) -> tuple[int, int]:
    """EpcCore.reclaim with EpcCgroup.walk."""
    while True:
        position = s.groups[_POSITION, group] + 1
        position = 0 if position == s.groups[_MEMBERS, group] else position
        s.groups[_POSITION, group] = position
        member = s.order[group, position]
        scanned, freed = _batch(s, member, force)
        if scanned or not _has_reclaimable(s, group):
            return scanned, freed


@_inlined
def _begin_serving(s: _State) -> bool:
    """Ksgxd._next_work; ``False``: ksgxd sleeps."""
    scalars = s.scalars
    scarce = scalars[_FREE] < scalars[_HIGH] and not scalars[_GAVE_UP]
    if not scalars[_REQUESTED] and not (scarce and _has_reclaimable(s, 0)):
        scalars[_ASLEEP], scalars[_WOKEN] = 1, 0
        return False
    scalars[_ASLEEP] = 0
    scalars[_QUEUED] = max(scalars[_REQUESTED], 1)
    for at in range(scalars[_REQUESTED]):
        s.groups[_QUEUE, at] = s.groups[_REQUESTS, at]
    if not scalars[_REQUESTED]:
        s.groups[_QUEUE, 0] = 0
    scalars[_REQUESTED] = 0
    scalars[_AT] = scalars[_FRUITLESS] = scalars[_FORCED] = 0
    scalars[_SERVING] = 1
    return True


@_inlined
def _serve_step(s: _State) -> bool:
    """One batch of Ksgxd._serve; return whether the group is served."""
    scalars = s.scalars
    group = s.groups[_QUEUE, scalars[_AT]]
    force = scalars[_FRUITLESS] >= scalars[_PATIENCE]
    scanned, freed = _reclaim(s, group, force)
    if freed:
        return True
    if force:
        scalars[_FORCED] += scanned
    scalars[_FRUITLESS] += 1
    exhausted = scalars[_FRUITLESS] >= scalars[_PATIENCE] and scalars[_FRUITLESS] > 1
    if exhausted and scalars[_FORCED] >= scalars[_CAPACITY] - scalars[_FREE]:
        if group == 0:
            scalars[_GAVE_UP] = 1
        s.groups[_VERDICTS, group] = 0
        if scalars[_WAITING] == group:
            s.groups[_VERDICTS, group] = scalars[_JUDGED] = 1
        scalars[_OUTCOMES] += 1
        return True
    if not _has_reclaimable(s, group):
        scalars[_OUTCOMES] += 1
        return True
    return False


@_inlined
def _ksgxd(s: _State) -> bool:
    """Let ksgxd run until it yields; ``False``: it sleeps."""
    scalars = s.scalars
    if not scalars[_SERVING]:
        if scalars[_ASLEEP] and not scalars[_WOKEN]:
            return False
        if not _begin_serving(s):
            return False
    while scalars[_AT] < scalars[_QUEUED]:
        if not _serve_step(s):
            return True
        scalars[_AT] += 1
        scalars[_FRUITLESS] = scalars[_FORCED] = 0
    scalars[_SERVING] = 0
    return True


@_inlined
def _load_secs(s: _State, enclave: int) -> int:
    """EnclaveSwap.load_secs with secs_idle."""
    if s.enclaves[_SECS, enclave] != _OUT:
        return _DONE
    group = s.enclaves[_GROUP, enclave]
    result = _alloc(s, group)
    if result == _DONE:
        s.enclaves[_SECS, enclave] = _PRESENT
        s.scalars[_SECS_LOADS] += 1
        _mark_reclaimable(s, len(s.flags) + enclave, group)
    return result


@_inlined
def _promise(s: _State, enclave: int, pages: int) -> int:
    """_Enclave._promise of the readable replay."""
    while s.enclaves[_PROMISED, enclave] < pages:
        if s.enclaves[_PROMISED, enclave] == s.enclaves[_VA_OF, enclave] * VA_SLOTS:
            result = _alloc(s, s.enclaves[_GROUP, enclave])
            if result != _DONE:
                return result
            s.enclaves[_VA_OF, enclave] += 1
        s.enclaves[_PROMISED, enclave] += 1
    return _DONE


@_inlined
def _become_resident(s: _State, page: int, enclave: int) -> None:
    """EnclaveSwap.child_added and EpcCore.mark_reclaimable."""
    group = s.enclaves[_GROUP, enclave]
    secs = len(s.flags) + enclave
    if not s.enclaves[_CHILDREN, enclave] and s.links[secs, _NEXT] != secs:
        _unlink(s, secs, group)
    s.enclaves[_CHILDREN, enclave] += 1
    s.flags[page] = _RESIDENT
    _mark_reclaimable(s, page, group)


@_inlined
def _make(s: _State, page: int) -> int:
    """_Enclave.make of the readable replay."""
    enclave = s.enclave_of[page]
    group = s.enclaves[_GROUP, enclave]
    result = _promise(s, enclave, 1)
    if result != _DONE:
        return result
    if s.enclaves[_SECS, enclave] == _NONE:
        result = _alloc(s, group)
        if result != _DONE:
            return result
        s.enclaves[_SECS, enclave] = _PRESENT
        _mark_reclaimable(s, len(s.flags) + enclave, group)
    result = _load_secs(s, enclave)
    if result != _DONE:
        return result
    result = _promise(s, enclave, s.enclaves[_MADE_OF, enclave] + 2)
    if result != _DONE:
        return result
    result = _alloc(s, group)
    if result != _DONE:
        return result
    s.enclaves[_MADE_OF, enclave] += 1
    s.scalars[_MADE] += 1
    _become_resident(s, page, enclave)
    return _DONE


@_inlined
def _load(s: _State, page: int) -> int:
    """_Enclave.load of the readable replay, with EnclaveSwap.load."""
    enclave = s.enclave_of[page]
    result = _load_secs(s, enclave)
    if result != _DONE:
        return result
    result = _alloc(s, s.enclaves[_GROUP, enclave])
    if result != _DONE:
        return result
    s.scalars[_LOADS] += 1
    s.enclaves[_LOADS_OF, enclave] += 1
    _become_resident(s, page, enclave)
    return _DONE


@_compiled
def _fault(s: _State, page: int) -> bool:
    """CoreReplay._until_done: make or load ``page``; ``False``: there is no EPC page for it."""
    scalars = s.scalars
    for _try in range(MOST_WAITS):
        outcomes = scalars[_OUTCOMES]
        loading = s.flags[page] & _EVICTED
        result = _load(s, page) if loading else _make(s, page)
        if result == _DONE:
            if loading:
                s.flags[page] |= _ACCESSED
            while _ksgxd(s):
                pass
            return True
        if result == _NO_EPC:
            break
        # Ksgxd.wait_for_page: ksgxd runs until there is an outcome.
        scalars[_WAITING] = result
        while scalars[_OUTCOMES] == outcomes:
            _ksgxd(s)
        scalars[_WAITING] = -1
    scalars[_POSSIBLE] = 0
    return False


@_compiled
def _run(s: _State, pages: np.ndarray[Any, Any]) -> None:
    """CoreReplay.run."""
    flags, scalars = s.flags, s.scalars
    for number in pages:
        page: Any = np.int64(number)  # one type everywhere: numba compiles again for each type
        if flags[page] & _RESIDENT:
            flags[page] |= _ACCESSED
        elif not _fault(s, page):
            return
        scalars[_ACCESSES] += 1


@_compiled
def _remove(s: _State, page: int) -> None:
    """_Enclave.remove of the readable replay."""
    enclave = s.enclave_of[page]
    if not s.flags[page] & (_RESIDENT | _EVICTED):
        return
    if s.flags[page] & _RESIDENT:
        group, secs = s.enclaves[_GROUP, enclave], len(s.flags) + enclave
        _unlink(s, page, group)
        _free(s, group)
        s.enclaves[_CHILDREN, enclave] -= 1
        if not s.enclaves[_CHILDREN, enclave] and s.links[secs, _NEXT] == secs:
            _mark_reclaimable(s, secs, group)
    s.flags[page] = 0
    s.enclaves[_MADE_OF, enclave] -= 1
    s.enclaves[_PROMISED, enclave] -= 1


@_compiled
def _end(s: _State, enclave: int) -> None:
    """_Enclave.end of the readable replay."""
    group, secs = s.enclaves[_GROUP, enclave], len(s.flags) + enclave
    if s.enclaves[_SECS, enclave] == _PRESENT:
        if s.links[secs, _NEXT] != secs:
            _unlink(s, secs, group)
        _free(s, group)
    for _page in range(s.enclaves[_VA_OF, enclave]):
        _free(s, group)
    s.enclaves[_SECS, enclave] = _NONE
    s.enclaves[_PROMISED, enclave] = s.enclaves[_VA_OF, enclave] = 0


@_compiled
def _run_with_removals(s: _State, pages: np.ndarray[Any, Any]) -> None:
    """As :func:`_run`, also where pages go."""
    flags, scalars = s.flags, s.scalars
    for number in pages:
        page: Any = np.int64(number & np.uint32(MOST_PAGES - 1))
        if number >= GOES:
            _remove(s, page)
            if number & np.uint32(ENDS):
                _end(s, s.enclave_of[page])
            continue
        if flags[page] & _RESIDENT:
            flags[page] |= _ACCESSED
        elif not _fault(s, page):
            return
        scalars[_ACCESSES] += 1


def covers(policy: Policy) -> bool:
    """Return whether this implementation knows a policy."""
    return type(policy) in (Policy, LinuxPolicy, Fifo) and not policy.evict_va


class LinuxReplay:
    """As :class:`~softsgx.plan.core_replay.CoreReplay`, for policies that :func:`covers` names."""

    any_thread = True

    def __init__(self, scene: Scene, epc: Epc) -> None:
        assert covers(epc.policy), f"no fast replay of {epc.policy}"
        self._scene = scene
        paths = paths_of(scene, epc)
        self._state = _new_state(scene, epc, paths)

    @property
    def possible(self) -> bool:
        """As :attr:`CoreReplay.possible`."""
        return bool(self._state.scalars[_POSSIBLE])

    def run(self, pages: np.ndarray[Any, Any]) -> None:
        """As :meth:`CoreReplay.run`."""
        if not self.possible:
            return
        if len(pages) and pages.max() >= GOES:
            _run_with_removals(self._state, pages)
        else:
            _run(self._state, pages)

    def counts(self) -> Counts:
        """As :meth:`CoreReplay.counts`."""
        state = self._state
        made, loads, evictions, secs_loads = (
            int(state.scalars[at]) for at in (_MADE, _LOADS, _EVICTIONS, _SECS_LOADS)
        )
        return Counts(
            self.possible,
            int(state.scalars[_ACCESSES]),
            made,
            loads,
            evictions,
            secs_loads,
            tuple(map(int, state.enclaves[_LOADS_OF])),
            tuple(map(int, state.groups[_PEAK])),
        )

    def resident(self) -> np.ndarray[Any, Any]:
        """As :meth:`CoreReplay.resident`."""
        return (self._state.flags & _RESIDENT).astype(bool)

    def order(self) -> list[list[int]]:
        """As :meth:`CoreReplay.order`."""
        links, pages = self._state.links, len(self._state.flags)
        first = pages + len(self._scene.enclaves)
        lists = []
        for head in range(first, len(links)):
            found, node = [], int(links[head, _NEXT])
            while node != head:
                found.append(node if node < pages else pages - 1 - node)
                node = int(links[node, _NEXT])
            lists.append(found)
        return lists

    def close(self) -> None:
        """As :meth:`CoreReplay.close`."""


def _new_state(scene: Scene, epc: Epc, paths: tuple[str, ...]) -> _State:
    pages, enclaves, groups = scene.footprint_pages, len(scene.enclaves), len(paths)
    nodes = pages + enclaves + groups
    policy = epc.policy
    number = {path: at for at, path in enumerate(paths)}
    limits = {"/" + path.strip("/"): limit for path, limit in epc.limits.items()}
    parent = [number.get(_above(path), -1) if path != "/" else -1 for path in paths]
    subtrees = [_subtree(parent, group) for group in range(groups)]
    scalars = np.zeros(_SCALARS, np.int64)
    scalars[_FREE] = scalars[_CAPACITY] = epc.pages
    scalars[_LOW], scalars[_HIGH] = policy.low(epc.pages), policy.high(epc.pages)
    scalars[_BATCH], scalars[_SCAN] = policy.batch(epc.pages), policy.scan_pages
    scalars[_PATIENCE] = policy.patience_passes
    scalars[_AGEING] = not isinstance(policy, Fifo)
    scalars[_ASLEEP] = scalars[_POSSIBLE] = 1
    scalars[_WAITING] = -1
    order = np.zeros((groups, groups), np.int64)
    of_groups = np.zeros((_VERDICTS + 1, groups), np.int64)
    of_groups[_PARENT] = parent
    of_groups[_CEILING] = [min(limits.get(path, epc.pages), epc.pages) for path in paths]
    of_groups[_LIMITED] = [path in limits for path in paths]
    of_groups[_MEMBERS] = [len(subtree) for subtree in subtrees]
    for group, subtree in enumerate(subtrees):
        order[group, : len(subtree)] = subtree
    of_enclaves = np.zeros((_VA_OF + 1, enclaves), np.int64)
    of_enclaves[_GROUP] = [number["/" + enclave.group.strip("/")] for enclave in scene.enclaves]
    sizes = [enclave.pages for enclave in scene.enclaves]
    return _State(
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
