"""Charging a tree of groups: sums, limits, peaks, events, fair walks, the last resort.

Method: the tree alone, with pages that are only counted; Hypothesis for histories.
"""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable
from itertools import islice

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from softsgx.arch import EpcAddr
from softsgx.cgroup import ChargeRefused, EpcCgroup, Hierarchy, VictimKilled
from softsgx.defects import Defect
from softsgx.paging import Group, SgxEpcPage
from softsgx.runtime import InlineRuntime
from softsgx.trace import Event


def tree(capacity: int = 1000, **options: object) -> Hierarchy:
    return Hierarchy(capacity, InlineRuntime(), **options)  # type: ignore[arg-type]


def charge(group: EpcCgroup, pages: int) -> None:
    for _ in range(pages):
        assert group.try_charge() is None


def track(group: EpcCgroup) -> None:
    """Put a page on the group's list, as the core does."""
    group.lru.add(SgxEpcPage(EpcAddr(0), 0))


def test_a_charge_counts_at_every_ancestor() -> None:
    hierarchy = tree()
    leaf = hierarchy.make("a/b/c")
    charge(leaf, 3)
    charge(hierarchy.find("a"), 2)
    usage = {group.path: group.usage_pages for group in hierarchy.root.subtree()}
    assert usage == {"/": 5, "/a": 5, "/a/b": 3, "/a/b/c": 3}


def test_a_refused_charge_is_charged_nowhere_and_names_the_lowest_refusing_level() -> None:
    hierarchy = tree()
    leaf = hierarchy.make("a/b/c")
    hierarchy.find("a").max_pages = 2
    hierarchy.find("a/b").max_pages = 2
    charge(leaf, 2)
    assert leaf.try_charge() is hierarchy.find("a/b")
    assert {group.usage_pages for group in hierarchy.root.subtree()} == {2}


def test_capacity_refuses_at_the_level_that_reaches_it() -> None:
    hierarchy = tree(capacity=4)
    charge(hierarchy.make("a"), 3)
    charge(hierarchy.make("b"), 1)
    assert hierarchy.find("b").try_charge() is hierarchy.root


def test_events_count_locally_where_it_failed_and_upwards_but_not_at_the_root() -> None:
    hierarchy = tree()
    leaf = hierarchy.make("a/b/c")
    hierarchy.find("a/b").max_pages = 0
    assert leaf.try_charge() is not None
    counts = {g.path: (g.events_local, g.events) for g in hierarchy.root.subtree()}
    assert counts == {"/": (0, 0), "/a": (0, 1), "/a/b": (1, 1), "/a/b/c": (0, 0)}


def test_refusals_are_traced_with_group_and_limit() -> None:
    heard: list[Event] = []
    hierarchy = tree(tracer=heard.append)
    leaf = hierarchy.make("a/b")
    hierarchy.find("a").max_pages = 1
    charge(leaf, 1)
    leaf.try_charge()
    assert heard == [ChargeRefused("/a/b", "/a", 4096)]


@pytest.mark.parametrize(
    ("defects", "peak"), [(frozenset(), 0), (frozenset({Defect.PEAK_RAISED_BY_REFUSED_CHARGE}), 1)]
)
def test_peak_is_raised_only_by_charges_that_succeed(defects: frozenset[Defect], peak: int) -> None:
    hierarchy = tree(defects=defects)
    leaf = hierarchy.make("a/b")
    hierarchy.find("a").max_pages = 0
    leaf.try_charge()
    assert leaf.peak_pages == peak


def test_siblings_are_walked_equally_often_across_walks() -> None:
    hierarchy = tree()
    for name in "abcd":
        hierarchy.make(f"jobs/{name}")
    jobs = hierarchy.find("jobs")
    seen: Counter[str] = Counter()
    for _ in range(100):  # short walks by many callers
        seen.update(group.name for group in islice(jobs.walk(), 2))
    assert max(seen.values()) - min(seen.values()) <= 1
    assert set(seen) == {"jobs", "a", "b", "c", "d"}


def test_with_b36_a_busy_parent_is_always_walked_first() -> None:
    hierarchy = tree(defects=frozenset({Defect.GROUP_WALK_STARTS_AT_TOP}))
    hierarchy.make("jobs/a")
    jobs = hierarchy.find("jobs")
    assert [next(jobs.walk()).name for _ in range(5)] == ["jobs"] * 5


def test_a_walk_notices_groups_that_come_and_go() -> None:
    hierarchy = tree()
    jobs = hierarchy.make("jobs")
    walk = jobs.walk()
    assert next(walk) is jobs
    child = jobs.mkdir("late")
    assert {next(walk) for _ in range(2)} == {jobs, child}
    child.rmdir()
    assert {next(walk) for _ in range(4)} == {jobs}


@pytest.mark.parametrize(
    ("limit", "usage", "wanted"),
    [(128, 127, False), (128, 128, True), (160, 127, False), (160, 128, True), (0, 0, True)],
)
def test_reclaim_starts_32_pages_below_limits_over_128(
    limit: int, usage: int, wanted: bool
) -> None:
    hierarchy = tree()
    group = hierarchy.make("a")
    charge(group, usage)
    group.max_pages = limit
    track(group)
    assert group.should_reclaim() is wanted


def test_reclaim_is_never_wanted_where_nothing_can_be_reclaimed() -> None:
    group = tree().make("a")
    group.max_pages = 0
    assert not group.should_reclaim()


@pytest.mark.parametrize(
    ("defects", "asked"),
    [(frozenset(), True), (frozenset({Defect.NO_RECLAIM_AHEAD_OF_LIMIT}), False)],
)
def test_a_charge_near_the_limit_asks_for_reclaim_ahead(
    defects: frozenset[Defect], asked: bool
) -> None:
    requests: list[Group] = []
    hierarchy = tree(request_reclaim=requests.append, defects=defects)
    group = hierarchy.make("a/b")
    track(group)
    hierarchy.find("a").max_pages = 10
    charge(group, 10)
    assert (hierarchy.find("a") in requests) is asked


def test_a_removed_group_keeps_its_pages_charged_and_reclaimable_until_they_go() -> None:
    hierarchy = tree()
    parent, group = hierarchy.make("a"), hierarchy.make("a/b")
    charge(group, 2)
    track(group)
    group.rmdir()
    assert parent.usage_pages == 2
    assert parent.has_reclaimable()
    with pytest.raises(OSError, match="No such file") as missing:
        hierarchy.find("a/b")
    assert missing.value.errno == errno.ENOENT
    group.uncharge()
    group.uncharge()
    assert list(parent.subtree()) == [parent]
    assert hierarchy.root.usage_pages == 0


@pytest.mark.parametrize(
    ("action", "code"),
    [
        (lambda h: h.find("a").mkdir("b"), errno.EEXIST),
        (lambda h: h.find("a").mkdir("x/y"), errno.EINVAL),
        (lambda h: h.find("a").mkdir("misc.max"), errno.EINVAL),
        (lambda h: h.find("a").rmdir(), errno.EBUSY),
        (lambda h: h.root.rmdir(), errno.EBUSY),
    ],
)
def test_impossible_changes_of_the_tree_are_refused(
    action: Callable[[Hierarchy], object], code: int
) -> None:
    hierarchy = tree()
    hierarchy.make("a/b")
    with pytest.raises(OSError, match=r".") as refused:
        action(hierarchy)
    assert refused.value.errno == code


class Prey:
    def __init__(self, name: str, home: EpcCgroup, pages: int) -> None:
        self.name, self.home, self.pages = name, home, pages

    def pages_in(self, group: EpcCgroup) -> int:
        return self.pages if group in self.home.ancestry() else 0

    def kill(self) -> None:
        self.pages = 0


def test_the_largest_victim_in_the_subtree_is_killed_and_named() -> None:
    heard: list[Event] = []
    prey: list[Prey] = []
    hierarchy = tree(kill=True, victims=lambda: prey, tracer=heard.append)
    a, b = hierarchy.make("a"), hierarchy.make("b")
    prey += [Prey("small", a, 3), Prey("large", a, 5), Prey("elsewhere", b, 9)]
    assert a.reclaim_failed()
    assert heard == [VictimKilled("/a", "large", 5)]
    assert a.reclaim_failed()
    assert not a.reclaim_failed()  # nobody is left there


def test_no_process_is_killed_unless_asked_for() -> None:
    prey: list[Prey] = []
    hierarchy = tree(victims=lambda: prey)
    prey.append(Prey("x", hierarchy.root, 5))
    assert not hierarchy.root.reclaim_failed()


class Charges(RuleBasedStateMachine):
    """Random charges, limits and removals; every count is compared with its recount."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = tree(capacity=30)
        self.groups = [self.tree.make(path) for path in ("a", "a/b", "a/b/c", "a/d", "e")]
        self.charged: Counter[EpcCgroup] = Counter()

    @rule(which=st.integers(0, 4))
    def charge(self, which: int) -> None:
        group = self.groups[which]
        if group.removed:
            return
        refused = group.try_charge()
        if refused is None:
            self.charged[group] += 1
        else:
            assert refused in group.ancestry()

    @rule(which=st.integers(0, 4))
    def uncharge(self, which: int) -> None:
        group = self.groups[which]
        if self.charged[group]:
            group.uncharge()
            self.charged[group] -= 1

    @rule(which=st.integers(0, 4), limit=st.none() | st.integers(0, 12))
    def limit(self, which: int, limit: int | None) -> None:
        self.groups[which].max_pages = limit

    @rule(which=st.integers(0, 4))
    def remove(self, which: int) -> None:
        group = self.groups[which]
        if not group.children and not group.removed:
            group.rmdir()

    @invariant()
    def every_usage_is_the_sum_of_what_was_charged_below(self) -> None:
        self.tree.check_invariants()
        for group in self.groups:
            below = sum(n for g, n in self.charged.items() if group in g.ancestry())
            assert group.usage_pages == below
        assert self.tree.root.usage_pages == self.charged.total() <= 30


TestCharges = Charges.TestCase
