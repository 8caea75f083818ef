"""Groups are made and removed while a reclaimer in another thread walks them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice

import pytest

from softsgx.cgroup import EpcCgroup, Hierarchy
from softsgx.runtime import ThreadsRuntime

_BLOCKED_S = 0.2  # a change that waits for the walk has begun by then


class _SlowToCount(list[EpcCgroup]):
    """A walk's list that lets a change of the tree happen while it is looked at."""

    def __init__(self, groups: list[EpcCgroup], change: Callable[[], object]) -> None:
        super().__init__(groups)
        self._thread = threading.Thread(target=change)
        self._begun = False

    def __len__(self) -> int:
        if not self._begun:
            self._begun = True
            self._thread.start()
            self._thread.join(_BLOCKED_S)
        return super().__len__()

    def join(self) -> None:
        self._thread.join()


@pytest.mark.parametrize("change", ["mkdir", "rmdir", "last page"])
def test_a_group_that_comes_or_goes_waits_for_the_step_of_a_walk(change: str) -> None:
    tree = Hierarchy(100, ThreadsRuntime())
    group = tree.make("a")
    if change == "last page":
        group.try_charge()
        group.rmdir()
    does = {"mkdir": lambda: tree.make("b"), "rmdir": group.rmdir, "last page": group.uncharge}
    slow = _SlowToCount(list(tree.root.subtree()), does[change])
    tree.root._order = slow
    walk = tree.root.walk()
    next(walk)
    slow.join()
    after = {"mkdir": {"/", "/a", "/b"}}.get(change, {"/"})
    assert {walked.path for walked in islice(walk, 6)} == after
