"""A group that pays for EPC pages, and the tree that groups form.

Charging a page charges the group and all its ancestors, or nobody.  Walks for reclaim share one
position for each group they start from, so that in the long run every descendant is asked as often
as its sibling.

Lock order: the hierarchy's latch is innermost but for the latch of an LRU list.

Invariant: a group's ``usage_pages`` is what was charged to it and its descendants and not yet
uncharged; :meth:`Hierarchy.check_invariants` compares.

Source:
    ``misc_cg_try_charge()``, kernel/cgroup/misc.c; ``sgx_cgroup_*`` in the EPC cgroup series, v17.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from softsgx.arch import PAGE_BYTES
from softsgx.cgroup.events import ChargeRefused, VictimKilled
from softsgx.defects import Defect
from softsgx.paging import Group, Lru
from softsgx.runtime import Runtime
from softsgx.trace import Tracer

__all__ = ["EpcCgroup", "Hierarchy", "Victim", "group_name_ok"]

_NAME_MAX = 255
_MARGIN_PAGES = 32  # start reclaim this much below the limit …
_THRESHOLD_PAGES = 128  # … unless the limit is so small that the margin would hurt


def group_name_ok(name: str) -> bool:
    """Return whether a group can have this name: what a directory of cgroup v2 can be called.

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
    """Somebody who can be killed for its EPC: an enclave, a guest's virtual EPC."""

    name: str

    def pages_in(self, group: EpcCgroup) -> int:
        """Return how many EPC pages it holds that are charged in the subtree of ``group``."""

    def kill(self) -> None:
        """Take all its EPC away; whoever uses it gets SIGBUS."""


class Hierarchy:
    """The tree of groups over one EPC.

    Args:
        capacity_pages: EPC pages there are.
        runtime: for locks.
        tracer: receives events.
        request_reclaim: asks the core for a batch in a group's subtree, later; never waits.
        victims: who could be killed; asked only when ``kill`` is set and all else has failed.
        kill: whether killing the largest victim is the last resort; otherwise "no memory" is.
        defects: those to switch on; it has the broken forms of package ``cgroup``.
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
        """Return the group at ``path``, making what is not there."""
        group = self.root
        for name in path.strip("/").split("/"):
            group = group.children.get(name) or group.mkdir(name)
        return group

    def check_invariants(self) -> None:
        """Compare every group's usage with its own charges and its children's."""
        for group in self.root.subtree():
            below = sum(child.usage_pages for child in group.all_children())
            assert group.usage_pages == group.own_pages + below, (
                f"{group.path}: {group.usage_pages} pages, {group.own_pages} own + {below} below"
            )
            assert group.peak_pages >= group.usage_pages, f"{group.path}: peak below usage"
            assert len(group.lru) <= group.own_pages, f"{group.path}: more pages than charges"


class EpcCgroup:
    """One group; a :class:`~softsgx.paging.Group`.  Made by :meth:`mkdir` of its parent.

    Attributes:
        path: from the root, ``/jobs/a``; the root is ``/``.
        lru: reclaimable pages charged to exactly this group.
        usage_pages, peak_pages: of the subtree.
        own_pages: charged to exactly this group.
        events, events_local: charges that a limit refused, in the subtree and here.
        removed: ``rmdir`` was done; the group lives on until its last page is uncharged.
    """

    def __init__(self, hierarchy: Hierarchy, name: str, parent: EpcCgroup | None) -> None:
        self.hierarchy, self.name, self.parent = hierarchy, name, parent
        self.path: str = "/" if parent is None else f"{parent.path.rstrip('/')}/{name}"
        # From here to the root, which never changes: every charge goes along it.
        self._ancestry: tuple[EpcCgroup, ...] = (self, *(parent._ancestry if parent else ()))
        self.lru = Lru(hierarchy.runtime)
        self.children: dict[str, EpcCgroup] = {}
        self._max_pages: int | None = None
        self._ceiling_pages = hierarchy.capacity_pages  # the lower of it and the limit
        self.usage_pages = self.peak_pages = self.own_pages = 0
        self.events = self.events_local = 0
        self.removed = False
        self._leaving: list[EpcCgroup] = []
        self._order: list[EpcCgroup] = []
        self._position = 0

    def __repr__(self) -> str:
        limit = "max" if self.max_pages is None else self.max_pages
        return f"<cgroup {self.path} {self.usage_pages}/{limit} pages>"

    @property
    def max_pages(self) -> int | None:
        """``misc.max``; ``None`` is "max"."""
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
        child = self.children[name] = EpcCgroup(self.hierarchy, name, self)
        self._tree_changed()
        return child

    def rmdir(self) -> None:
        """Remove this group; pages charged to it stay charged and reclaimable until they go.

        Raises:
            OSError: EBUSY when it has children or is the root.
        """
        if self.children or self.parent is None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self.path)
        with self.hierarchy.latch:
            del self.parent.children[self.name]
            self.removed = True
            if self.usage_pages:
                self.parent._leaving.append(self)
        self.parent._tree_changed()

    def all_children(self) -> list[EpcCgroup]:
        """Return children, removed ones that still hold pages too."""
        return [*self.children.values(), *self._leaving]

    def subtree(self) -> Iterator[EpcCgroup]:
        """Yield this group and everything below it, parents first."""
        yield self
        for child in self.all_children():
            yield from child.subtree()

    def ancestry(self) -> tuple[EpcCgroup, ...]:
        """Return this group, its parent, … the root."""
        return self._ancestry

    def _tree_changed(self) -> None:
        """Let every walk that covers this group see its new members from the next step on."""
        for group in self._ancestry:
            group._order = []

    # --- charging -------------------------------------------------------------------------------

    def try_charge(self) -> EpcCgroup | None:
        """Charge one page here and at every ancestor, or nowhere.

        Returns:
            ``None`` when charged, else the lowest group whose limit refused.
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
            self._note_refusal(refused)
        elif tree.reclaim_ahead is not None:
            for group in ancestry:
                if group._max_pages is not None and group.should_reclaim():
                    tree.reclaim_ahead(group)
        return refused

    def _note_refusal(self, refused: EpcCgroup) -> None:
        """Count it: locally where it happened, hierarchically up to but not at the root."""
        tree = self.hierarchy
        with tree.latch:
            if tree.raises_refused:  # L8
                for group in self._ancestry[: self._ancestry.index(refused)]:
                    group.peak_pages = max(group.peak_pages, group.usage_pages + 1)
            refused.events_local += 1
            for group in refused._ancestry:
                if group.parent is not None:
                    group.events += 1
        if tree.tracer is not None:
            usage = refused.usage_pages * PAGE_BYTES
            tree.tracer(ChargeRefused(self.path, refused.path, usage))

    def uncharge(self) -> None:
        """Take one page off this group and its ancestors."""
        latch = self.hierarchy.latch
        latch.acquire()
        try:
            assert self.own_pages > 0, f"{self.path}: more pages uncharged than charged"
            self.own_pages -= 1
            for group in self._ancestry:
                group.usage_pages -= 1
            gone = self.removed and not self.usage_pages
        finally:
            latch.release()
        if gone:
            assert self.parent is not None, "the root cannot be removed"
            self.parent._leaving.remove(self)
            self.parent._tree_changed()

    # --- reclaim --------------------------------------------------------------------------------

    def walk(self) -> Iterator[EpcCgroup]:
        """Yield the subtree for ever, from where the last walk from this group stopped."""
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
        """Return which limit it is."""
        if self._max_pages is None:
            return f"the EPC of {self.hierarchy.capacity_pages} pages"
        return f"group {self.path}, limited to {self._max_pages} pages,"

    def has_reclaimable(self) -> bool:
        """Return whether any list in the subtree has a page."""
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
        """Return whether usage is so near the limit that pages should leave ahead of need."""
        limit = self.limit_pages()
        if limit > _THRESHOLD_PAGES:
            limit -= _MARGIN_PAGES
        return self.usage_pages >= limit and self.has_reclaimable()

    def reclaim_failed(self) -> bool:
        """Kill the victim with the most pages here, if killing is allowed and there is one."""
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
