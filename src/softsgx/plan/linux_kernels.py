"""The reclaim of Linux, compiled: what the EPC core does in objects, in the arrays of a state.

LRU lists of groups with ageing, batches, ksgxd's watermarks and requests, charges and limits, SECS
pages that are evicted with their last child, VA pages that stay, pages that are loaded ahead, pages
and enclaves that go.  Each function names the one that it repeats.  ``run`` is one function of
machine code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from softsgx.arch import VA_SLOTS
from softsgx.plan import linux_state as name
from softsgx.plan.compiled import compiled
from softsgx.plan.linux_state import State
from softsgx.plan.scene import ENDS, GOES, MOST_PAGES, MOST_WAITS

__all__ = ["run", "run_with_removals"]

_compiled = partial(compiled, counts_references=False)  # LinuxReplay keeps the arrays
_inlined = partial(compiled, inlined=True, counts_references=False)
_MARGIN_PAGES, _THRESHOLD_PAGES = 32, 128  # as in softsgx.cgroup.group


@_inlined
def _append(s: State, node: int, group: int) -> None:
    """Lru.add, Lru.put_back."""
    head = len(s.flags) + s.enclaves.shape[1] + group
    last = s.links[head, name.LAST]
    s.links[last, name.NEXT] = node
    s.links[node, name.LAST] = last
    s.links[node, name.NEXT] = head
    s.links[head, name.LAST] = node
    s.groups[name.LENGTH, group] += 1


@_inlined
def _unlink(s: State, node: int, group: int) -> None:
    """Lru.remove, one page of Lru.isolate."""
    before, after = s.links[node, name.LAST], s.links[node, name.NEXT]
    s.links[before, name.NEXT] = after
    s.links[after, name.LAST] = before
    s.links[node, name.NEXT] = s.links[node, name.LAST] = node
    s.groups[name.LENGTH, group] -= 1


@_inlined
def _clear_verdicts(s: State) -> None:
    if s.scalars[name.JUDGED]:
        s.groups[name.VERDICTS, :] = 0
        s.scalars[name.JUDGED] = 0


@_inlined
def _mark_reclaimable(s: State, node: int, group: int) -> None:
    """EpcCore.mark_reclaimable with Ksgxd.candidate_added."""
    _append(s, node, group)
    s.scalars[name.GAVE_UP] = 0
    _clear_verdicts(s)


@_inlined
def _has_reclaimable(s: State, group: int) -> bool:
    """EpcCgroup.has_reclaimable."""
    for at in range(s.groups[name.MEMBERS, group]):
        if s.groups[name.LENGTH, s.order[group, at]]:
            return True
    return False


@_inlined
def _request(s: State, group: int) -> None:
    """Ksgxd.request; -1: without a group."""
    scalars = s.scalars
    if group >= 0:
        for at in range(scalars[name.REQUESTED]):
            if s.groups[name.REQUESTS, at] == group:
                break
        else:
            s.groups[name.REQUESTS, scalars[name.REQUESTED]] = group
            scalars[name.REQUESTED] += 1
    if scalars[name.ASLEEP]:
        scalars[name.WOKEN] = 1


@_inlined
def _reclaim_ahead(s: State, group: int) -> None:
    """The end of EpcCgroup.try_charge, with should_reclaim and limit_pages."""
    member = group
    while member >= 0:
        if s.groups[name.LIMITED, member]:
            limit, above = s.scalars[name.CAPACITY], member
            while above >= 0:
                limit = min(limit, s.groups[name.CEILING, above])
                above = s.groups[name.PARENT, above]
            if limit > _THRESHOLD_PAGES:
                limit -= _MARGIN_PAGES
            if s.groups[name.USAGE, member] >= limit and _has_reclaimable(s, member):
                _request(s, member)
        member = s.groups[name.PARENT, member]


@_inlined
def _alloc(s: State, group: int) -> int:
    """EpcCore.alloc of a caller that must not reclaim.

    Returns:
        ``name.DONE``, ``name.NO_EPC``, or the group whose page must leave (EpcBusy).
    """
    scalars = s.scalars
    member = group
    while member >= 0:
        if s.groups[name.USAGE, member] >= s.groups[name.CEILING, member]:
            # AllocSlowPath._reclaim_or_wait
            if not _has_reclaimable(s, member):
                return name.NO_EPC
            if s.groups[name.VERDICTS, member]:
                s.groups[name.VERDICTS, member] -= 1
                return name.NO_EPC
            _request(s, member)
            return member
        member = s.groups[name.PARENT, member]
    member = group
    while member >= 0:
        s.groups[name.USAGE, member] += 1
        s.groups[name.PEAK, member] = max(s.groups[name.PEAK, member], s.groups[name.USAGE, member])
        member = s.groups[name.PARENT, member]
    _reclaim_ahead(s, group)
    scalars[name.FREE] -= 1
    if scalars[name.FREE] < scalars[name.LOW] and scalars[name.ASLEEP] and _has_reclaimable(s, 0):
        _request(s, -1)
    return name.DONE


@_inlined
def _free(s: State, group: int) -> None:
    """EpcCore.free with Ksgxd.page_freed."""
    member = group
    while member >= 0:
        s.groups[name.USAGE, member] -= 1
        member = s.groups[name.PARENT, member]
    s.scalars[name.FREE] += 1
    s.scalars[name.GAVE_UP] = 0
    _clear_verdicts(s)
    s.scalars[name.OUTCOMES] += 1


@_inlined
def _evict_secs(s: State, enclave: int) -> None:
    """The SECS is written."""
    s.enclaves[name.SECS, enclave] = name.OUT
    s.scalars[name.EVICTIONS] += 1
    _free(s, s.enclaves[name.GROUP, enclave])


@_inlined
def _choose(s: State, group: int, force: bool) -> tuple[int, int]:
    """Reclaimer._choose and _prepare; return pages scanned, and how many are victims."""
    scalars, pages = s.scalars, len(s.flags)
    head = pages + s.enclaves.shape[1] + group
    limit = min(max(scalars[name.SCAN], scalars[name.BATCH]), s.groups[name.LENGTH, group])
    scanned = chosen = 0
    while scanned < limit and chosen < scalars[name.BATCH]:
        wanted = min(limit - scanned, scalars[name.BATCH] - chosen)
        for at in range(wanted):
            node = s.links[head, name.NEXT]
            _unlink(s, node, group)
            s.work[0, at] = node
        scanned += wanted
        for at in range(wanted):
            node = s.work[0, at]
            young = False
            if not force and scalars[name.AGEING] and node < pages:
                young = s.flags[node] & name.ACCESSED != 0
                s.flags[node] &= ~name.ACCESSED & 0xFF
            if young:
                _append(s, node, group)
            else:
                s.work[1, chosen] = node
                chosen += 1
    return scanned, chosen


@_inlined
def _batch(s: State, group: int, force: bool) -> tuple[int, int]:
    """Reclaimer.batch; return pages scanned and pages freed."""
    pages = len(s.flags)
    scanned, chosen = _choose(s, group, force)
    for at in range(chosen):
        node = s.work[1, at]
        if node >= pages:
            _evict_secs(s, node - pages)
            continue
        s.flags[node] = name.EVICTED
        s.scalars[name.EVICTIONS] += 1
        enclave = s.enclave_of[node]
        s.enclaves[name.CHILDREN, enclave] -= 1
        if not s.enclaves[name.CHILDREN, enclave]:
            _evict_secs(s, enclave)
        _free(s, group)
    return scanned, chosen


@_inlined
def _reclaim(s: State, group: int, force: bool) -> tuple[int, int]:
    """EpcCore.reclaim with EpcCgroup.walk."""
    while True:
        position = s.groups[name.POSITION, group] + 1
        position = 0 if position == s.groups[name.MEMBERS, group] else position
        s.groups[name.POSITION, group] = position
        member = s.order[group, position]
        scanned, freed = _batch(s, member, force)
        if scanned or not _has_reclaimable(s, group):
            return scanned, freed


@_inlined
def _begin_serving(s: State) -> bool:
    """Ksgxd._next_work; ``False``: ksgxd sleeps."""
    scalars = s.scalars
    scarce = scalars[name.FREE] < scalars[name.HIGH] and not scalars[name.GAVE_UP]
    if not scalars[name.REQUESTED] and not (scarce and _has_reclaimable(s, 0)):
        scalars[name.ASLEEP], scalars[name.WOKEN] = 1, 0
        return False
    scalars[name.ASLEEP] = 0
    scalars[name.QUEUED] = max(scalars[name.REQUESTED], 1)
    for at in range(scalars[name.REQUESTED]):
        s.groups[name.QUEUE, at] = s.groups[name.REQUESTS, at]
    if not scalars[name.REQUESTED]:
        s.groups[name.QUEUE, 0] = 0
    scalars[name.REQUESTED] = 0
    scalars[name.AT] = scalars[name.FRUITLESS] = scalars[name.FORCED] = 0
    scalars[name.SERVING] = 1
    return True


@_inlined
def _serve_step(s: State) -> bool:
    """One batch of Ksgxd._serve; return whether the group is served."""
    scalars = s.scalars
    group = s.groups[name.QUEUE, scalars[name.AT]]
    force = scalars[name.FRUITLESS] >= scalars[name.PATIENCE]
    scanned, freed = _reclaim(s, group, force)
    if freed:
        return True
    if force:
        scalars[name.FORCED] += scanned
    scalars[name.FRUITLESS] += 1
    exhausted = scalars[name.FRUITLESS] >= scalars[name.PATIENCE] and scalars[name.FRUITLESS] > 1
    if exhausted and scalars[name.FORCED] >= scalars[name.CAPACITY] - scalars[name.FREE]:
        if group == 0:
            scalars[name.GAVE_UP] = 1
        s.groups[name.VERDICTS, group] = 0
        if scalars[name.WAITING] == group:
            s.groups[name.VERDICTS, group] = scalars[name.JUDGED] = 1
        scalars[name.OUTCOMES] += 1
        return True
    if not _has_reclaimable(s, group):
        scalars[name.OUTCOMES] += 1
        return True
    return False


@_inlined
def _ksgxd(s: State) -> bool:
    """Let ksgxd run until it yields; ``False``: it sleeps."""
    scalars = s.scalars
    if not scalars[name.SERVING]:
        if scalars[name.ASLEEP] and not scalars[name.WOKEN]:
            return False
        if not _begin_serving(s):
            return False
    while scalars[name.AT] < scalars[name.QUEUED]:
        if not _serve_step(s):
            return True
        scalars[name.AT] += 1
        scalars[name.FRUITLESS] = scalars[name.FORCED] = 0
    scalars[name.SERVING] = 0
    return True


@_inlined
def _load_secs(s: State, enclave: int) -> int:
    """EnclaveSwap.load_secs with secs_idle."""
    if s.enclaves[name.SECS, enclave] != name.OUT:
        return name.DONE
    group = s.enclaves[name.GROUP, enclave]
    result = _alloc(s, group)
    if result == name.DONE:
        s.enclaves[name.SECS, enclave] = name.PRESENT
        s.scalars[name.SECS_LOADS] += 1
        _mark_reclaimable(s, len(s.flags) + enclave, group)
    return result


@_inlined
def _promise(s: State, enclave: int, pages: int) -> int:
    """_Enclave._promise of the readable replay."""
    while s.enclaves[name.PROMISED, enclave] < pages:
        if s.enclaves[name.PROMISED, enclave] == s.enclaves[name.VA_OF, enclave] * VA_SLOTS:
            result = _alloc(s, s.enclaves[name.GROUP, enclave])
            if result != name.DONE:
                return result
            s.enclaves[name.VA_OF, enclave] += 1
        s.enclaves[name.PROMISED, enclave] += 1
    return name.DONE


@_inlined
def _become_resident(s: State, page: int, enclave: int) -> None:
    """EnclaveSwap.child_added and EpcCore.mark_reclaimable."""
    group = s.enclaves[name.GROUP, enclave]
    secs = len(s.flags) + enclave
    if not s.enclaves[name.CHILDREN, enclave] and s.links[secs, name.NEXT] != secs:
        _unlink(s, secs, group)
    s.enclaves[name.CHILDREN, enclave] += 1
    s.flags[page] = name.RESIDENT
    _mark_reclaimable(s, page, group)


@_inlined
def _make(s: State, page: int) -> int:
    """_Enclave.make of the readable replay."""
    enclave = s.enclave_of[page]
    group = s.enclaves[name.GROUP, enclave]
    result = _promise(s, enclave, 1)
    if result != name.DONE:
        return result
    if s.enclaves[name.SECS, enclave] == name.NONE:
        result = _alloc(s, group)
        if result != name.DONE:
            return result
        s.enclaves[name.SECS, enclave] = name.PRESENT
        _mark_reclaimable(s, len(s.flags) + enclave, group)
    result = _load_secs(s, enclave)
    if result != name.DONE:
        return result
    result = _promise(s, enclave, s.enclaves[name.MADE_OF, enclave] + 2)
    if result != name.DONE:
        return result
    result = _alloc(s, group)
    if result != name.DONE:
        return result
    s.enclaves[name.MADE_OF, enclave] += 1
    s.scalars[name.MADE] += 1
    _become_resident(s, page, enclave)
    return name.DONE


@_inlined
def _load(s: State, page: int) -> int:
    """_Enclave.load of the readable replay, with EnclaveSwap.load."""
    enclave = s.enclave_of[page]
    result = _load_secs(s, enclave)
    if result != name.DONE:
        return result
    result = _alloc(s, s.enclaves[name.GROUP, enclave])
    if result != name.DONE:
        return result
    s.scalars[name.LOADS] += 1
    s.enclaves[name.LOADS_OF, enclave] += 1
    _become_resident(s, page, enclave)
    return name.DONE


@_inlined
def _load_ahead(s: State, page: int) -> None:
    """The neighbours in _Enclave.load of the readable replay, and Prefetching.neighbours."""
    enclave = s.enclave_of[page]
    for other in range(page + 1, min(page + 1 + s.scalars[name.WINDOW], len(s.flags))):
        if s.enclave_of[other] != enclave:
            break
        if s.flags[other] & name.EVICTED and _load(s, other) != name.DONE:
            break


@_compiled
def _fault(s: State, page: int) -> bool:
    """CoreReplay._until_done: make or load ``page``; ``False``: there is no EPC page for it."""
    scalars = s.scalars
    for _try in range(MOST_WAITS):
        outcomes = scalars[name.OUTCOMES]
        loading = s.flags[page] & name.EVICTED
        result = _load(s, page) if loading else _make(s, page)
        if result == name.DONE:
            if loading:
                _load_ahead(s, page)
                s.flags[page] |= name.ACCESSED
            while _ksgxd(s):
                pass
            return True
        if result == name.NO_EPC:
            break
        # Ksgxd.wait_for_page: ksgxd runs until there is an outcome.
        scalars[name.WAITING] = result
        while scalars[name.OUTCOMES] == outcomes:
            _ksgxd(s)
        scalars[name.WAITING] = -1
    scalars[name.POSSIBLE] = 0
    return False


@_compiled
def run(s: State, pages: np.ndarray[Any, Any]) -> None:
    """CoreReplay.run."""
    flags, scalars = s.flags, s.scalars
    for number in pages:
        page: Any = np.int64(number)  # one type everywhere: numba compiles again for each type
        if flags[page] & name.RESIDENT:
            flags[page] |= name.ACCESSED
        elif not _fault(s, page):
            return
        scalars[name.ACCESSES] += 1


@_compiled
def _remove(s: State, page: int) -> None:
    """_Enclave.remove of the readable replay."""
    enclave = s.enclave_of[page]
    if not s.flags[page] & (name.RESIDENT | name.EVICTED):
        return
    if s.flags[page] & name.RESIDENT:
        group, secs = s.enclaves[name.GROUP, enclave], len(s.flags) + enclave
        _unlink(s, page, group)
        _free(s, group)
        s.enclaves[name.CHILDREN, enclave] -= 1
        if not s.enclaves[name.CHILDREN, enclave] and s.links[secs, name.NEXT] == secs:
            _mark_reclaimable(s, secs, group)
    s.flags[page] = 0
    s.enclaves[name.MADE_OF, enclave] -= 1
    s.enclaves[name.PROMISED, enclave] -= 1


@_compiled
def _end(s: State, enclave: int) -> None:
    """_Enclave.end of the readable replay."""
    group, secs = s.enclaves[name.GROUP, enclave], len(s.flags) + enclave
    if s.enclaves[name.SECS, enclave] == name.PRESENT:
        if s.links[secs, name.NEXT] != secs:
            _unlink(s, secs, group)
        _free(s, group)
    for _page in range(s.enclaves[name.VA_OF, enclave]):
        _free(s, group)
    s.enclaves[name.SECS, enclave] = name.NONE
    s.enclaves[name.PROMISED, enclave] = s.enclaves[name.VA_OF, enclave] = 0


@_compiled
def run_with_removals(s: State, pages: np.ndarray[Any, Any]) -> None:
    """As :func:`run`, also where pages go."""
    flags, scalars = s.flags, s.scalars
    for number in pages:
        page: Any = np.int64(number & np.uint32(MOST_PAGES - 1))
        if number >= GOES:
            _remove(s, page)
            if number & np.uint32(ENDS):
                _end(s, s.enclave_of[page])
            continue
        if flags[page] & name.RESIDENT:
            flags[page] |= name.ACCESSED
        elif not _fault(s, page):
            return
        scalars[name.ACCESSES] += 1
