"""Groups that EPC pages are charged to, and their tree.

A page is charged to a group and all its ancestors, or to none.  The walks for reclaim that start at
a group share one position, so that all groups of a subtree are reclaimed from equally often.

Lock order: the hierarchy's latch, then the latch of an LRU list, which is innermost.

Invariant: ``usage_pages`` of a group is the number of pages charged to it and its descendants;
:meth:`Hierarchy.check_invariants` compares.

Source:
    ``misc_cg_try_charge()``, kernel/cgroup/misc.c; ``sgx_cgroup_*`` in the EPC cgroup series, v17.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from softsgx import compiled
from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.paging import Group, Lru
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["EpcCgroup", "Hierarchy", "Victim", "group_name_ok"]

_NAME_MAX = 255
_MARGIN_PAGES = 32  # reclaim ahead begins this much below the limit …
_THRESHOLD_PAGES = 128  # … except below this limit, where the margin would be too large a part


def group_name_ok(name: str) -> bool:
    """Return whether a group can have this name: the rules for a directory of cgroup v2.

    Source:
        cgroup_mkdir(), kernel/cgroup/cgroup.c: no newlines; a path component has 255 bytes.
    """
    return (
        name not in ("", ".", "..")
        and not any(byte in name for byte in "/\n\0")
        and len(os.fsencode(name)) <= _NAME_MAX
        and not name.startswith("misc.")
    )


class Victim(Protocol):
    """An enclave or a guest that can be killed for its EPC pages."""

    name: str

    def pages_in(self, group: EpcCgroup) -> int:
        """Return how many of its EPC pages are charged in the subtree of ``group``."""

    def kill(self) -> None:
        """Free all its EPC pages; later accesses are SIGBUS."""


class Hierarchy:
    """The tree of groups over one EPC.

    Args:
        capacity_pages: EPC pages of the machine.
        runtime: for locks.
        tracer: receives events.
        request_reclaim: requests a batch in a group's subtree from ksgxd; never waits.
        victims: returns enclaves and guests to kill; called only when ``kill`` is set and reclaim
            has failed.
        kill: whether to kill the largest victim as a last resort; otherwise the charge fails.
        defects: the defects to switch on; those of package ``cgroup`` have an effect.
    """

    def __init__(
        self,
        capacity_pages: int,
        runtime: Runtime,
        *,
        tracer: Tracer | None = None,
        request_reclaim: Callable[[Group], None] | None = None,
        victims: Callable[[], Iterable[Victim]] | None = None,
        kill: bool = False,
        defects: frozenset[Defect] = frozenset(),
    ) -> None:
        self.capacity_pages, self.runtime, self.tracer = capacity_pages, runtime, tracer
        self.request_reclaim, self.victims, self.kill = request_reclaim, victims, kill
        self.defects = defects
        self.reclaim_ahead = (
            None if Defect.NO_RECLAIM_AHEAD_OF_LIMIT in defects else request_reclaim
        )
        self.raises_refused = Defect.PEAK_RAISED_BY_REFUSED_CHARGE in defects
        self.latch = runtime.latch()
        self.root = EpcCgroup(self, "", None)

    def find(self, path: str) -> EpcCgroup:
        """Return the group at ``path``, as ``jobs/a``; ``""`` or ``/`` is the root.

        Raises:
            OSError: ENOENT.
        """
        group = self.root
        for name in path.strip("/").split("/") if path.strip("/") else ():
            child = group.children.get(name)
            if child is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            group = child
        return group

    def make(self, path: str) -> EpcCgroup:
        """Return the group at ``path``; make the missing groups on the way."""
        group = self.root
        for name in path.strip("/").split("/"):
            group = group.children.get(name) or group.mkdir(name)
        return group

    def check_invariants(self) -> None:
        """Compare every group's usage with its own pages and its children's usage."""
        for group in self.root.subtree():
            below = sum(child.usage_pages for child in group.all_children())
            assert group.usage_pages == group.own_pages + below, (
                f"{group.path}: {group.usage_pages} pages, {group.own_pages} own + {below} below"
            )
            assert group.peak_pages >= group.usage_pages, f"{group.path}: peak below usage"
            assert len(group.lru) <= group.own_pages, f"{group.path}: more pages than charges"


@compiled.record
class EpcCgroup:
    """One group; a :class:`~softsgx.paging.Group`.  Made by :meth:`mkdir` of its parent.

    Attributes:
        path: from the root, ``/jobs/a``; the root is ``/``.
        lru: reclaimable pages charged to exactly this group.
        usage_pages, peak_pages: pages charged to the subtree; the highest number so far.
        own_pages: pages charged to exactly this group.
        events, events_local: charges that a limit refused, of the subtree and of this group.
        removed: ``rmdir`` has succeeded; the group exists until its last page is uncharged.
    """

    __slots__ = (
        "_ancestry",
        "_ceiling_pages",
        "_dying",
        "_max_pages",
        "_order",
        "_position",
        "children",
        "events",
        "events_local",
        "hierarchy",
        "lru",
        "name",
        "own_pages",
        "parent",
        "path",
        "peak_pages",
        "removed",
        "usage_pages",
    )

    def __init__(self, hierarchy: Hierarchy, name: str, parent: EpcCgroup | None) -> None:
        self.hierarchy, self.name, self.parent = hierarchy, name, parent
        self.path: str = "/" if parent is None else f"{parent.path.rstrip('/')}/{name}"
        # From here to the root; it never changes, and every charge uses it.
        self._ancestry: tuple[EpcCgroup, ...] = (self, *(parent._ancestry if parent else ()))
        self.lru = Lru(hierarchy.runtime)
        self.children: dict[str, EpcCgroup] = {}
        self._max_pages: int | None = None
        self._ceiling_pages = hierarchy.capacity_pages  # the lower of capacity and limit
        self.usage_pages = self.peak_pages = self.own_pages = 0
        self.events = self.events_local = 0
        self.removed = False
        self._dying: list[EpcCgroup] = []
        self._order: list[EpcCgroup] = []
        self._position = 0

    def __repr__(self) -> str:
        limit = "max" if self.max_pages is None else self.max_pages
        return f"<cgroup {self.path} {self.usage_pages}/{limit} pages>"

    @property
    def max_pages(self) -> int | None:
        """``misc.max`` in pages; ``None`` is "max"."""
        return self._max_pages

    @max_pages.setter
    def max_pages(self, limit: int | None) -> None:
        capacity = self.hierarchy.capacity_pages
        self._max_pages = limit
        self._ceiling_pages = capacity if limit is None else min(limit, capacity)

    # --- the tree -------------------------------------------------------------------------------

    def mkdir(self, name: str) -> EpcCgroup:
        """Make a child group.

        Raises:
            OSError: EEXIST, EINVAL for an impossible name, ENODEV when this group was removed.
        """
        if not group_name_ok(name):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), name)
        if self.removed:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), self.path)
        if name in self.children:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        child = EpcCgroup(self.hierarchy, name, self)
        with self.hierarchy.latch:
            self.children[name] = child
            self._tree_changed()
        return child

    def rmdir(self) -> None:
        """Remove this group; its pages stay charged and reclaimable until they are freed.

        Raises:
            OSError: EBUSY when it has children or is the root.
        """
        if self.children or self.parent is None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self.path)
        with self.hierarchy.latch:
            del self.parent.children[self.name]
            self.removed = True
            if self.usage_pages:
                self.parent._dying.append(self)
            self.parent._tree_changed()

    def all_children(self) -> list[EpcCgroup]:
        """Return the children, including removed ones that still have pages."""
        return [*self.children.values(), *self._dying]

    def subtree(self) -> Iterator[EpcCgroup]:
        """Yield this group and all groups below it, parents first."""
        yield self
        for child in self.all_children():
            yield from child.subtree()

    def ancestry(self) -> tuple[EpcCgroup, ...]:
        """Return this group, its parent, … the root."""
        return self._ancestry

    def _tree_changed(self) -> None:
        """Make every walk that covers this group list its members again at its next step.

        The latch is held, as while a walk reads its list.
        """
        for group in self._ancestry:
            group._order = []

    # --- charging -------------------------------------------------------------------------------

    def try_charge(self) -> EpcCgroup | None:
        """Charge one page to this group and every ancestor, or to none.

        Returns:
            ``None``: charged; otherwise the lowest group whose limit refused.
        """
        tree, ancestry = self.hierarchy, self._ancestry
        tree.latch.acquire()
        try:
            for group in ancestry:
                if group.usage_pages >= group._ceiling_pages:
                    refused = group
                    break
            else:
                refused = None
                self.own_pages += 1
                for group in ancestry:
                    usage = group.usage_pages = group.usage_pages + 1
                    if usage > group.peak_pages:
                        group.peak_pages = usage
        finally:
            tree.latch.release()
        if refused is not None:
            self._count_refusal(refused)
        elif tree.reclaim_ahead is not None:
            for group in ancestry:
                if group._max_pages is not None and group.should_reclaim():
                    tree.reclaim_ahead(group)
        return refused

    def _count_refusal(self, refused: EpcCgroup) -> None:
        """Count a refused charge at ``refused``, and in ``events`` of all groups below the root."""
        tree = self.hierarchy
        with tree.latch:
            if tree.raises_refused:
                for group in self._ancestry[: self._ancestry.index(refused)]:
                    group.peak_pages = max(group.peak_pages, group.usage_pages + 1)
            refused.events_local += 1
            for group in refused._ancestry:
                if group.parent is not None:
                    group.events += 1
        if tree.tracer is not None:
            from softsgx.cgroup.events import ChargeRefused

            usage = refused.usage_pages * PAGE_BYTES
            tree.tracer(ChargeRefused(self.path, refused.path, usage))

    def uncharge(self, pages: int = 1) -> None:
        """Uncharge pages from this group and its ancestors."""
        latch = self.hierarchy.latch
        latch.acquire()
        try:
            assert self.own_pages >= pages, f"{self.path}: more pages uncharged than charged"
            self.own_pages -= pages
            for group in self._ancestry:
                group.usage_pages -= pages
            if self.removed and not self.usage_pages:
                assert self.parent is not None, "the root cannot be removed"
                self.parent._dying.remove(self)
                self.parent._tree_changed()
        finally:
            latch.release()

    # --- reclaim --------------------------------------------------------------------------------

    def walk(self) -> Iterator[EpcCgroup]:
        """Yield the groups of the subtree without end, from where the last walk stopped."""
        if Defect.GROUP_WALK_STARTS_AT_TOP in self.hierarchy.defects:
            while True:
                yield from list(self.subtree())
        while True:
            with self.hierarchy.latch:
                if not self._order:
                    self._order = list(self.subtree())
                self._position = (self._position + 1) % len(self._order)
                group = self._order[self._position]
            yield group

    def is_below(self, other: Group) -> bool:
        """Return whether ``other`` is this group or an ancestor."""
        return other in self._ancestry

    def describe(self) -> str:
        """Return the group and its limit, for messages."""
        if self._max_pages is None:
            return f"the EPC of {self.hierarchy.capacity_pages} pages"
        return f"group {self.path}, limited to {self._max_pages} pages,"

    def has_reclaimable(self) -> bool:
        """Return whether any LRU list in the subtree has a page."""
        if self.lru:
            return True
        return any(child.has_reclaimable() for child in self.all_children())

    def limit_pages(self) -> int:
        """Return the smallest limit from here to the root, in pages."""
        lowest = self.hierarchy.capacity_pages
        for group in self._ancestry:
            if group._ceiling_pages < lowest:
                lowest = group._ceiling_pages
        return lowest

    def should_reclaim(self) -> bool:
        """Return whether usage is so near the limit that ksgxd should reclaim before a refusal."""
        limit = self.limit_pages()
        if limit > _THRESHOLD_PAGES:
            limit -= _MARGIN_PAGES
        return self.usage_pages >= limit and self.has_reclaimable()

    def reclaim_failed(self) -> bool:
        """Kill the victim with the most pages in the subtree, if killing is allowed."""
        from softsgx.cgroup.events import VictimKilled

        tree = self.hierarchy
        if not tree.kill or tree.victims is None:
            return False
        largest = max(tree.victims(), key=lambda victim: victim.pages_in(self), default=None)
        if largest is None or not (pages := largest.pages_in(self)):
            return False
        if tree.tracer is not None:
            tree.tracer(VictimKilled(self.path, largest.name, pages))
        largest.kill()
        return True


if compiled.speedups is not None:
    compiled.speedups.bind("EpcCgroup", EpcCgroup)
    compiled.speedups.give("EpcCgroup", EpcCgroup)
