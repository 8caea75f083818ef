"""Stories of limits: groups, their peaks, and fair reclaim."""

from __future__ import annotations

from itertools import islice

from softsgx.arch import EpcAddr
from softsgx.cgroup import Hierarchy
from softsgx.defects import Defect
from softsgx.paging import Group, SgxEpcPage
from softsgx.sim.stories.story import Scene, story

_CAPACITY = 1000


@story(
    Defect.PEAK_RAISED_BY_REFUSED_CHARGE,
    holds="The peak of a group is the most that it was charged.",
)
def a_refused_charge_raises_the_peak(scene: Scene) -> None:
    """The limit of group a is 0; a charge to its child a/b is refused."""
    tree = Hierarchy(_CAPACITY, scene.runtime, defects=scene.defects, tracer=scene.tracer)
    child = tree.make("a/b")
    tree.find("a").max_pages = 0
    child.try_charge()
    peak = child.peak_pages
    scene.claim(not peak, f"the peak of a/b is {peak} page, and it was never charged one")


@story(
    Defect.GROUP_WALK_STARTS_AT_TOP,
    holds="Reclaim looks at all groups below a limit in turn.",
)
def a_busy_parent_is_always_reclaimed_first(scene: Scene) -> None:
    """Five callers walk the group jobs and its child; each takes only the first group."""
    tree = Hierarchy(_CAPACITY, scene.runtime, defects=scene.defects, tracer=scene.tracer)
    tree.make("jobs/child")
    jobs = tree.find("jobs")
    walked = [group.name for _ in range(5) for group in islice(jobs.walk(), 1)]
    scene.claim("child" in walked, f"five walks see {', '.join(walked)}, and never the child")


@story(
    Defect.NO_RECLAIM_AHEAD_OF_LIMIT,
    holds="A charge that comes near a limit asks for reclaim.",
)
def a_charge_near_the_limit_asks_for_nothing(scene: Scene) -> None:
    """The limit of group a is 10 pages; its child a/b is charged 10."""
    requests: list[Group] = []
    tree = Hierarchy(
        _CAPACITY,
        scene.runtime,
        request_reclaim=requests.append,
        defects=scene.defects,
        tracer=scene.tracer,
    )
    child = tree.make("a/b")
    child.lru.add(SgxEpcPage(EpcAddr(0), 0))  # a page that can be reclaimed
    limited = tree.find("a")
    limited.max_pages = 10
    for _ in range(10):
        assert child.try_charge() is None, "the limit is not exceeded"
    scene.claim(limited in requests, "the group is at its limit and no reclaim was asked for")
