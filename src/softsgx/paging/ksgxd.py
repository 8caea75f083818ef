"""ksgxd, the core's background task, and waiting for its outcomes.

ksgxd sanitizes the EPC, then sleeps until free pages are few, or until a task that must not reclaim
requests a page.  It serves a request until a page was freed or no page can be evicted; either is an
*outcome*, which the requesting task waits for.

Lock order: the lock ``ksgxd`` is taken under any owner's lock, and nothing is taken under it.

Source:
    ``ksgxd()``, ``sgx_should_reclaim()``, main.c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from softsgx.compiled import record
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


@record
class Ksgxd:
    """The task, its requests, and the tasks that wait for it.

    Args:
        runtime: runs the task.
        root: the group that it reclaims in when there is no request.
        sanitizer: its first work.
        reclaim: runs one batch in a group's subtree, forced or not.
        scarce: returns whether free pages are below the high watermark.
        in_use: returns how many EPC pages are not free: it gives up after as many forced scans.
        patience_passes: batches without a freed page after which accessed bits are ignored.
        counters: the core's.
        tracer: receives events; ``None`` for none.

    Attributes:
        working: number of batches and sanitizing runs in progress, of any task.
        generation: changes when a page is freed and when a batch ends, before ``working`` falls: a
            task that found no page looks again.
        outcomes: changes with each outcome.
        asleep: whether the task sleeps.
    """

    __slots__ = (
        "_counters",
        "_failed",
        "_faults",
        "_gave_up",
        "_in_use",
        "_lock",
        "_oom_verdicts",
        "_patience_passes",
        "_progress",
        "_reclaim",
        "_requests",
        "_root",
        "_runtime",
        "_sanitizer",
        "_scarce",
        "_stopping",
        "_task",
        "_tracer",
        "_waiters",
        "_wake",
        "asleep",
        "generation",
        "outcomes",
        "working",
    )

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
        self._waiters = 0  # without those that were notified and have not run yet
        self._faults: Counter[Group] = Counter()  # tasks in wait_for_page, by group
        # When no page can be evicted, each task that waits for one gets a verdict, so that its next
        # allocation fails with NoEpc. Tasks that come later start with a new request.
        self._oom_verdicts: Counter[Group] = Counter()
        self._gave_up = False
        self._stopping = False
        self._task: Task | None = None
        self._failed = False

    # --- events -----------------------------------------------------------------------------------

    def page_freed(self) -> None:
        """A page was freed: an outcome."""
        self._gave_up = False
        if self._oom_verdicts:
            self._oom_verdicts.clear()
        self._outcome()

    def batch_began(self) -> None:
        """A batch begins, or a sanitizing run."""
        self.working.add(1)

    def batch_ended(self) -> None:
        """It has ended: wake the waiting tasks, which look for a page again."""
        # In this order: who reads working, then generation, sees each end in one of them.
        self.generation += 1
        self.working.add(-1)
        if self._waiters:
            self._wake_waiters()

    def _outcome(self) -> None:
        """Wake the waiting tasks: there is a page, or from now on they reclaim themselves."""
        self.outcomes += 1
        self.generation += 1
        if self._waiters:
            self._wake_waiters()

    def _wake_waiters(self) -> None:
        with self._lock:
            self._waiters = 0
            self._progress.notify_all()

    def candidate_added(self) -> None:
        """A page has become reclaimable: withdraw the verdicts."""
        self._gave_up = False
        if self._oom_verdicts:
            self._oom_verdicts.clear()

    # --- waiting ----------------------------------------------------------------------------------

    def request(self, group: Group | None = None) -> None:
        """Wake the task; with ``group``, request a page of its subtree.  Never waits."""
        with self._lock:
            if group is not None:
                self._requests[group] = None
            if self.asleep:
                self._counters.wakeups += 1
                self._wake.notify_all()

    def take_oom_verdict(self, group: Group) -> bool:
        """Return whether ksgxd found no page for a task that waited for ``group``; use it up."""
        if group not in self._oom_verdicts or not self._oom_verdicts[group]:
            return False
        self._oom_verdicts[group] -= 1
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

    def _wait_while(self, unchanged: Callable[[], bool]) -> None:
        with self._lock:
            # Counted before the check, so that a change after it notifies this task.
            self._waiters += 1
            while unchanged() and not self._stopping:
                self._progress.wait()
                self._waiters += 1
            self._waiters -= 1

    # --- the task ---------------------------------------------------------------------------------

    def start(self) -> None:
        """As :meth:`EpcCore.start`."""
        assert self._task is None, "ksgxd is started twice"
        self._failed = False
        self._sanitizer.allow()
        self.batch_began()
        self._task = self._runtime.spawn(self._run, "ksgxd", daemon=True)

    def stop(self) -> None:
        """As :meth:`EpcCore.stop`."""
        task = self._task
        if task is None:
            return
        self._sanitizer.stop()
        with self._lock:
            self._stopping = True
            self._wake.notify_all()
        self._outcome()
        task.join()
        self._task = None
        self._stopping = False

    def wait_sanitized(self) -> None:
        """As :meth:`EpcCore.wait_sanitized`."""
        self._wait_while(
            lambda: bool(self._sanitizer.pages() and self._task is not None and self.working.value)
        )

    def _run(self) -> None:
        try:
            self._work()
        except Exception:
            # Those who wait for it, and those who come later, do its work themselves.
            self._failed = True
            self.asleep = False
            self._outcome()
            raise

    def _work(self) -> None:
        try:
            left = self._sanitizer.run()
            self._counters.unsanitized = left
            if self._tracer is not None:
                self._tracer(Sanitized(left))
        finally:
            self.outcomes += 1
            self.batch_ended()
        while (groups := self._next_work()) is not None:
            for group in groups:
                self._serve(group)
            self._runtime.yield_now()

    def _next_work(self) -> list[Group] | None:
        """Sleep until there is work; return the groups to reclaim in, ``None`` to end.

        Deviation: groups at their limit have a work queue of their own in the cgroup series; here
        ksgxd serves them, in the order of their requests.
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
        """Run batches in the subtree of ``group`` until there is an outcome."""
        pressure = Pressure(self._patience_passes)
        while not self._stopping:
            batch = self._reclaim(group, pressure.force)
            if batch.freed:
                return
            pressure.account(batch)
            if pressure.exhausted(self._in_use()):
                self._give_up(group)
                return
            if not group.has_reclaimable():  # none left, or all in batches of other tasks
                self.outcomes += 1
                self.batch_ended()
                return
            self._runtime.yield_now()

    def _give_up(self, group: Group) -> None:
        """No page of ``group`` can be evicted: give the waiting tasks their verdicts."""
        self._gave_up = self._gave_up or group is self._root
        self._oom_verdicts[group] = self._faults[group]
        self.outcomes += 1
        self.batch_ended()
