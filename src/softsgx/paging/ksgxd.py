"""The core's background task, and waiting for what it achieves.

ksgxd sanitizes the EPC, then sleeps until free pages are few, or somebody who may not reclaim
himself asks for a page.  It works on a request until a page was freed or everything was tried in
vain; one of the two is the *outcome* that whoever asked waits for.

Lock order: the lock ``ksgxd`` is taken under any owner's lock, and nothing is taken under it.

Source:
    ``ksgxd()``, ``sgx_should_reclaim()``, main.c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from softsgx.paging.claims import PAUSE_NS
from softsgx.paging.counters import Counters
from softsgx.paging.events import Sanitized
from softsgx.paging.failures import EpcBusy
from softsgx.paging.interfaces import Group
from softsgx.paging.nodes import AtomicCount
from softsgx.paging.reclaim import Batch, Pressure
from softsgx.paging.sanitize import Sanitizer
from softsgx.runtime import Runtime, Task
from softsgx.trace import Tracer

__all__ = ["Ksgxd"]


class Ksgxd:
    """The task and what others know of it.

    Args:
        runtime: where it runs.
        root: the group it serves when nobody asks for another one.
        sanitizer: its first work.
        reclaim: runs one batch in a group's subtree, by force or not.
        scarce: whether free pages are below the high watermark.
        in_use: how many EPC pages are not free: as many pages are tried before it gives up.
        patience_passes: fruitless passes after which use is ignored.
        counters: told of wake-ups.
        tracer: as everywhere.

    Attributes:
        working: batches and sanitizing that run now and may free a page soon.
        generation: changes when a page was freed and when a batch has ended: another look is
            worth it.
        outcomes: changes when a page was freed and when everything was tried in vain.
        asleep: whether it waits to be woken.
    """

    def __init__(
        self,
        runtime: Runtime,
        root: Group,
        sanitizer: Sanitizer,
        *,
        reclaim: Callable[[Group, bool], Batch],
        scarce: Callable[[], bool],
        in_use: Callable[[], int],
        patience_passes: int,
        counters: Counters,
        tracer: Tracer | None,
    ) -> None:
        self._runtime, self._root, self._sanitizer = runtime, root, sanitizer
        self._reclaim, self._scarce, self._in_use = reclaim, scarce, in_use
        self._patience_passes = patience_passes
        self._counters, self._tracer = counters, tracer
        self.working = AtomicCount(runtime)
        self.generation = self.outcomes = 0
        self.asleep = False
        self._lock = runtime.lock("ksgxd")
        self._wake = runtime.condition(self._lock)
        self._progress = runtime.condition(self._lock)
        self._requests: dict[Group, None] = {}
        self._waiters = 0  # not counting those that were woken and have not run yet
        self._faults: Counter[Group] = Counter()  # those in wait_for_page, by whom they wait for
        # When everything was tried in vain, each of those who waited for it gets a ticket, for
        # which the next allocation says that there is no memory. Others start anew.
        self._tickets: Counter[Group] = Counter()
        self._gave_up = False
        self._stopping = False
        self._task: Task | None = None
        self._failed = False

    # --- news -------------------------------------------------------------------------------------

    def page_freed(self) -> None:
        """A page was freed."""
        self._gave_up = False
        if self._tickets:
            self._tickets.clear()
        self.outcomes += 1
        self.generation += 1
        if self._waiters:
            self._wake_waiters()

    def batch_ended(self) -> None:
        """A batch has ended: whoever waits should look again."""
        self.generation += 1
        if self._waiters:
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        with self._lock:
            self._waiters = 0
            self._progress.notify_all()

    def candidate_added(self) -> None:
        """A page has become reclaimable: that everything was tried is not true any more."""
        self._gave_up = False
        if self._tickets:
            self._tickets.clear()

    # --- waiting ----------------------------------------------------------------------------------

    def request(self, group: Group | None = None) -> None:
        """Wake it, to free a page in the subtree of ``group`` if one is given; never waits."""
        with self._lock:
            if group is not None:
                self._requests[group] = None
            if self.asleep:
                self._counters.wakeups += 1
                self._wake.notify_all()

    def take_ticket(self, group: Group) -> bool:
        """Return whether the caller, who may not reclaim, has waited in vain for ``group``."""
        if group not in self._tickets or not self._tickets[group]:
            return False
        self._tickets[group] -= 1
        return True

    def wait_for_page(self, busy: EpcBusy) -> None:
        """As :meth:`EpcCore.wait_for_page`."""
        if busy.pause:
            self._runtime.sleep(PAUSE_NS)
            return
        group = self._root if busy.group is None else busy.group
        self._faults[group] += 1
        try:
            if self._task is not None and not self._failed:
                self._wait_while(lambda: self.outcomes == busy.outcomes)
            elif self.outcomes == busy.outcomes:
                for requested in self._take_requests() or [group]:
                    self._serve(requested)
                self._runtime.yield_now()
        finally:
            self._faults[group] -= 1

    def wait_for_batch(self, generation: int) -> None:
        """Wait until :attr:`generation` is another one."""
        self._wait_while(lambda: self.generation == generation)

    def _wait_while(self, nothing_new: Callable[[], bool]) -> None:
        with self._lock:
            self._waiters += 1  # before the look: whoever comes after it will wake us
            while nothing_new() and not self._stopping:
                self._progress.wait()
                self._waiters += 1
            self._waiters -= 1

    # --- the task ---------------------------------------------------------------------------------

    def start(self) -> None:
        """As :meth:`EpcCore.start`."""
        assert self._task is None, "ksgxd is started twice"
        self._failed = False
        self._sanitizer.stopping = False
        self.working.add(1)  # sanitizing
        self._task = self._runtime.spawn(self._run, "ksgxd", daemon=True)

    def stop(self) -> None:
        """As :meth:`EpcCore.stop`."""
        task = self._task
        if task is None:
            return
        self._sanitizer.stopping = True
        with self._lock:
            self._stopping = True
            self._wake.notify_all()
        self.outcomes += 1  # who waits for it has to help himself from now on
        self.batch_ended()
        task.join()
        self._task = None
        self._stopping = False

    def settle(self) -> None:
        """As :meth:`EpcCore.settle`."""
        while self._sanitizer.pages() and self._task is not None and self.working.value:
            self.wait_for_batch(self.generation)

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            # Those who wait for it, and those who come later, do its work themselves.
            self._failed = True
            self.asleep = False
            self.outcomes += 1
            self.batch_ended()
            raise

    def _work(self) -> None:
        try:
            left = self._sanitizer.run()
            self._counters.unsanitized = left
            if self._tracer is not None:
                self._tracer(Sanitized(left))
        finally:
            self.working.add(-1)
            self.outcomes += 1
            self.batch_ended()
        while (groups := self._next_work()) is not None:
            for group in groups:
                self._serve(group)
            self._runtime.yield_now()

    def _next_work(self) -> list[Group] | None:
        """Sleep until there is something to do; return the groups to reclaim in, ``None`` to end.

        Deviation: groups at their limit have a work queue of their own in the cgroup series; here
        ksgxd serves them, in the order in which they asked.
        """
        with self._lock:
            self.asleep = True
            while not self._stopping and not self._requests and not self._should_reclaim():
                self._wake.wait()
            self.asleep = False
            if self._stopping:
                return None
        return self._take_requests() or [self._root]

    def _should_reclaim(self) -> bool:
        return self._scarce() and not self._gave_up and self._root.has_reclaimable()

    def _take_requests(self) -> list[Group]:
        with self._lock:
            groups, self._requests = list(self._requests), {}
        return groups

    def _serve(self, group: Group) -> None:
        """Run batches in the subtree of ``group`` until a page was freed or nothing will be."""
        pressure = Pressure(self._patience_passes)
        while not self._stopping:
            batch = self._reclaim(group, pressure.force)
            if batch.freed:
                return
            pressure.note(batch)
            if pressure.hopeless(self._in_use()):
                self._give_up(group)
                return
            if not group.has_reclaimable():  # all gone, or in a batch of somebody else
                self.outcomes += 1
                self.batch_ended()
                return
            self._runtime.yield_now()

    def _give_up(self, group: Group) -> None:
        """Everything was tried: until a page changes hands, there is no memory in ``group``."""
        self._gave_up = self._gave_up or group is self._root
        self._tickets[group] = self._faults[group]
        self.outcomes += 1
        self.batch_ended()
