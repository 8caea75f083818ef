"""Plans the EPC for traces: how much they need, and the cost of less.

:func:`plan` is a pure function: the same arguments give the same :class:`~.result.Plan`, and
arguments and result can be pickled, so other processes can run it.

The EPC's size is searched: a replay in sizes of a geometric series, then in sizes between the
largest one that misses the target and the smallest that meets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from softsgx.arch import PAGE_BYTES
from softsgx.costs import COST_PROFILES, CostProfile, estimate
from softsgx.errors import SoftSgxError
from softsgx.paging import LinuxPolicy, Policy, Prefetching
from softsgx.plan.curves import Distances
from softsgx.plan.loading import PlannedTrace, load
from softsgx.plan.policies import POLICIES, lives, misses
from softsgx.plan.replays import Part, ResidencyReplay, new_replay, replay_all
from softsgx.plan.result import (
    Curve,
    EnclaveResult,
    GroupResult,
    Plan,
    PolicyResult,
    Recommendation,
    SizeResult,
    Slowdown,
    TraceSummary,
)
from softsgx.plan.scene import Counts, Epc, Scene, paths_of
from softsgx.plan.sentence import exact_size, recommendation_text
from softsgx.plan.warm_up import compile_kernels
from softsgx.sizes import size_text

__all__ = ["Host", "Options", "plan"]

SMALLEST_PAGES = 25
"""The smallest EPC and the smallest limit of ``softsgx run``."""
_MOST_PAGES = 1 << 28
_SERIES = 12
_PROBES = 2  # sizes that are replayed at once, each by one processor
_MIB_PAGES = (1 << 20) // PAGE_BYTES
_LIMIT_TRIES = 32
_CURVE_POINTS = 256

Progress = Callable[[str, int, int], None]
"""Called with the name of the current step, the work done so far, and all the work."""


@dataclass(frozen=True, slots=True)
class Options:
    """Parameters that differ from Linux's policy.

    Attributes:
        batch_pages, scan_pages: pages that one batch evicts and scans at most.
        low_pages, high_pages: watermarks of ksgxd.
        prefetch_pages: further pages to load with the page of a fault.
        evict_va: whether VA pages may be evicted.
    """

    batch_pages: int = LinuxPolicy.batch_pages
    scan_pages: int = LinuxPolicy.scan_pages
    low_pages: int = LinuxPolicy.low_pages
    high_pages: int = LinuxPolicy.high_pages
    prefetch_pages: int = 0
    evict_va: bool = False

    def policy(self) -> Policy:
        """Return the policy of the core."""
        common = {
            name: getattr(self, name)
            for name in ("batch_pages", "scan_pages", "low_pages", "high_pages", "evict_va")
        }
        if self.prefetch_pages:
            return Prefetching(window_pages=self.prefetch_pages, **common)
        return LinuxPolicy(**common)

    def changed(self) -> tuple[tuple[str, int | bool], ...]:
        """Return (name, value) of the parameters that differ from Linux's."""
        linux = Options()
        names = [name for name in self.__slots__ if getattr(self, name) != getattr(linux, name)]
        return tuple((name, getattr(self, name)) for name in names)


@dataclass(frozen=True, slots=True)
class Host:
    """The machine.

    Attributes:
        smallest_bytes, largest_bytes: range of EPC sizes; ``None``: chosen from the traces.
        limits: ``misc.max`` of groups in bytes, by path (``jobs/a``).
        options: parameters that differ from Linux's policy.
        run_seconds: run time without paging; ``None``: that of the traces.
    """

    smallest_bytes: int | None = None
    largest_bytes: int | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    options: Options = Options()
    run_seconds: float | None = None


@dataclass(frozen=True)
class _Planner:
    """The arguments of one plan, loaded."""

    scene: Scene
    distances: Distances
    traces: tuple[TraceSummary, ...]
    host: Host
    costs: CostProfile
    target: float
    base_seconds: float
    certain_pages: int  # predictions are certain for an EPC of at least this size
    progress: Progress

    def epc(self, pages: int) -> Epc:
        options = self.host.options
        limits = {path: limit // PAGE_BYTES for path, limit in self.host.limits.items()}
        return Epc(pages, limits, options.policy())

    def replay(self, epcs: Sequence[Epc], *beside: Part) -> list[Counts]:
        """Replay all accesses in each EPC, and in what is beside them, in one pass."""
        replays = [new_replay(self.scene, epc) for epc in epcs]
        accesses, count = self.scene.edges[-1], len(epcs)
        what = f"replay in {count} size{'s' if count > 1 else ''} of EPC"
        try:
            replay_all(
                self.scene,
                [*replays, *beside],
                lambda done: self.progress(what, done, accesses),
            )
            return [replay.counts() for replay in replays]
        finally:
            for replay in replays:
                replay.close()

    def at(self, sizes: Sequence[int]) -> dict[int, SizeResult]:
        """Return the results at some sizes, in pages."""
        epcs = [self.epc(pages) for pages in sizes]
        found = zip(sizes, epcs, self.replay(epcs), strict=True)
        return {pages: self._result(epc, counts) for pages, epc, counts in found}

    def slowdown(self, counts: Counts) -> Slowdown | None:
        """Return the slowdown by the loads and evictions of a replay; ``None``: without times."""
        if not self.base_seconds:
            return None
        cost = estimate(_events(counts), self.costs)
        each = self.base_seconds * self.costs.hertz
        return Slowdown(1 + cost.low / each, 1 + cost.typical / each, 1 + cost.high / each)

    def meets(self, counts: Counts) -> bool:
        """Return whether a replay meets the target; without times, whether it loads nothing."""
        slowdown = self.slowdown(counts)
        if not counts.possible:
            return False
        return not counts.loads if slowdown is None else slowdown.typical <= self.target

    def _result(self, epc: Epc, counts: Counts) -> SizeResult:
        scene = self.scene
        enclaves = tuple(
            EnclaveResult(one.trace, one.name, one.pages, one.overhead_pages, loads)
            for one, loads in zip(scene.enclaves, counts.loads_of, strict=True)
        )
        limits = {"/" + path.strip("/"): pages for path, pages in epc.limits.items()}
        groups = []
        for path, peak in zip(paths_of(scene, epc), counts.peaks, strict=True):
            limit = limits.get(path)
            own = [
                loads
                for one, loads in zip(scene.enclaves, counts.loads_of, strict=True)
                if one.group == path
            ]
            limit_bytes = None if limit is None else limit * PAGE_BYTES
            groups.append(GroupResult(path, limit_bytes, peak * PAGE_BYTES, sum(own)))
        seconds = self.base_seconds
        return SizeResult(
            epc_bytes=epc.pages * PAGE_BYTES,
            possible=counts.possible,
            overhead_pages=scene.overhead_pages,
            made=counts.made,
            loads=counts.loads,
            evictions=counts.evictions,
            loads_per_second=counts.loads / seconds if seconds else None,
            estimate=estimate(_events(counts), self.costs),
            slowdown=self.slowdown(counts),
            certain=epc.pages >= self.certain_pages,
            enclaves=enclaves,
            groups=tuple(groups),
        )


def plan(
    traces: Sequence[PlannedTrace],
    host: Host = Host(),
    policies: Sequence[str] = (),
    costs: CostProfile = COST_PROFILES["sgx2-server"],
    *,
    target_slowdown: float = 1.1,
    progress: Progress = lambda _what, _done, _of: None,
) -> Plan:
    """Plan the EPC of one host for enclaves that run side by side.

    Args:
        traces: the accesses of the enclaves; all traces begin at the same time.
        host: the machine.
        policies: policies to compare with Linux's, from :data:`softsgx.plan.policies.POLICIES`.
        costs: prices of faults and evictions.
        target_slowdown: acceptable run time, divided by that without paging.
        progress: called while the plan is made.

    Raises:
        SoftSgxError: a trace cannot be read, or an argument is invalid.
    """
    if not 1 < target_slowdown < math.inf:
        raise SoftSgxError(f"target slowdown {target_slowdown}: not above 1; give 1.1 for 10 %")
    compile_kernels(progress)
    progress("reading traces", 0, 1)
    loaded = load(traces, lambda done, of: progress("reading traces", done, of))
    scene, summaries, working_set = loaded.scene, loaded.summaries, loaded.working_set
    planner = _Planner(
        scene=scene,
        distances=loaded.distances,
        traces=summaries,
        host=host,
        costs=costs,
        target=target_slowdown,
        base_seconds=_base_seconds(summaries, host),
        certain_pages=_certain_pages(scene, summaries, working_set),
        progress=progress,
    )
    low, high = _range(planner)
    results = _search(planner, low, high)
    best = _best(planner, results)
    shown = best or results[-1]
    residency = ResidencyReplay(scene, planner.epc(shown.epc_bytes // PAGE_BYTES))
    limit = _limit_pages(planner, best, residency)
    sizes = tuple(results)
    return Plan(
        traces=summaries,
        recommendation=_recommendation(planner, best, results, limit),
        remarks=tuple(_remarks(planner, working_set, policies)),
        target_slowdown=target_slowdown,
        base_seconds=planner.base_seconds,
        footprint_pages=scene.footprint_pages,
        overhead_pages=scene.overhead_pages,
        options=host.options.changed(),
        sizes=sizes,
        policies=tuple(_compare(planner, policies, sizes)),
        curve=_curve(loaded.distances),
        residency=residency.result(),
        costs=costs,
    )


def _events(counts: Counts) -> dict[str, int]:
    """Return the events that a larger EPC avoids; first accesses cost the same at every size."""
    eldu = counts.loads + counts.secs_loads
    return {"aex": counts.loads, "fault": counts.loads, "eldu": eldu, "ewb": counts.evictions}


def _base_seconds(traces: Iterable[TraceSummary], host: Host) -> float:
    if host.run_seconds is not None:
        return host.run_seconds
    # A recording stops the program at faults, and the times include the waits: the program's own
    # work does not take longer than its processor time.
    seconds = [min(trace.seconds, trace.user_seconds or trace.seconds) for trace in traces]
    return max(seconds) if all(seconds) else 0.0


def _certain_pages(scene: Scene, traces: Iterable[TraceSummary], working_set: int) -> int:
    """Return the smallest EPC for which the precision of the traces gives a certain result."""
    recorded = [trace.recorded_epc_pages for trace in traces if trace.precision == "faults"]
    certain = max(recorded, default=0)
    return max(certain, working_set + scene.overhead_pages if working_set else 0)


def _range(planner: _Planner) -> tuple[int, int]:
    """Return the smallest and the largest EPC to replay, in pages."""
    host, scene = planner.host, planner.scene
    pages = planner.distances.pages + scene.overhead_pages
    spare = planner.epc(_MOST_PAGES).policy.low_pages
    enough = _rounded_up(max(pages + spare, SMALLEST_PAGES))
    high = enough if host.largest_bytes is None else host.largest_bytes // PAGE_BYTES
    low = host.smallest_bytes
    low_pages = max(SMALLEST_PAGES, min(enough, high) // 32) if low is None else low // PAGE_BYTES
    shown = f"{size_text(low_pages * PAGE_BYTES)} to {size_text(high * PAGE_BYTES)}"
    if low_pages < SMALLEST_PAGES:
        least = size_text(SMALLEST_PAGES * PAGE_BYTES)
        raise SoftSgxError(f"EPC of {shown}: too small for an enclave; give at least {least}")
    if low_pages > high:
        raise SoftSgxError(f"EPC of {shown}: empty; give the smaller size first")
    if high > _MOST_PAGES:
        most = size_text(_MOST_PAGES * PAGE_BYTES)
        raise SoftSgxError(f"EPC of {shown}: too large; give at most {most}")
    for path, limit in host.limits.items():
        if limit // PAGE_BYTES < SMALLEST_PAGES:
            least = size_text(SMALLEST_PAGES * PAGE_BYTES)
            raise SoftSgxError(
                f"limit of {path}: {size_text(limit)}: too small for an enclave; "
                f"give at least {least}"
            )
    return low_pages, high


def _step(pages: int) -> int:
    """Return the step between sizes near ``pages``: about 3 %, a power of two."""
    return 1 << max(pages.bit_length() - 6, 0)


def _rounded_up(pages: int) -> int:
    step = _step(pages)
    return -(-pages // step) * step


def _series(low: int, high: int) -> list[int]:
    """Return sizes from ``low`` to ``high`` in about equal ratios."""
    ratio = (high / low) ** (1 / _SERIES)
    inner = (_rounded_up(round(low * ratio**at)) for at in range(1, _SERIES))
    return sorted({low, high, *(pages for pages in inner if low < pages < high)})


def _search(planner: _Planner, low: int, high: int) -> list[SizeResult]:
    """Replay sizes of the range, with smaller steps where the slowdown crosses the target."""
    results = planner.at(_series(low, high))
    while more := _between(planner, results):
        results |= planner.at(more)
    return [results[size] for size in sorted(results)]


def _between(planner: _Planner, results: Mapping[int, SizeResult]) -> list[int]:
    """Return sizes between the largest that misses the target and the next; none: done."""
    for smaller, larger in reversed(list(pairwise(sorted(results)))):
        if _good(planner, results[larger]) and not _good(planner, results[smaller]):
            step = _step(larger)
            first = smaller // step + 1
            choices = [at * step for at in range(first, -(-larger // step))]
            parts = min(_PROBES, len(choices)) + 1
            return [choices[len(choices) * at // parts] for at in range(1, parts)]
    return []


def _good(planner: _Planner, result: SizeResult) -> bool:
    """Return whether a size can be recommended."""
    if not result.possible or not result.certain:
        return False
    if result.slowdown is None:
        return not result.loads
    return result.slowdown.typical <= planner.target


def _best(planner: _Planner, results: Sequence[SizeResult]) -> SizeResult | None:
    """Return the smallest size such that it and every larger one meet the target."""
    best = None
    for result in reversed(results):
        if not _good(planner, result):
            break
        best = result
    return best


def _recommendation(
    planner: _Planner, best: SizeResult | None, results: Sequence[SizeResult], limit: int | None
) -> Recommendation:
    limit_bytes = None if limit is None else limit * PAGE_BYTES
    return Recommendation(
        text=recommendation_text(best, results, planner.target, limit_bytes),
        epc_bytes=None if best is None else best.epc_bytes,
        limit_bytes=limit_bytes,
        kubernetes=None if limit is None else f"{limit // _MIB_PAGES}Mi",
        slowdown=None if best is None else best.slowdown,
    )


def _limit_pages(planner: _Planner, best: SizeResult | None, beside: Part) -> int | None:
    """Return the smallest limit, in whole MiB, with which a group alone meets the target.

    The group is on a machine with more EPC, so its limit makes it evict, not ksgxd's watermarks.
    SECS and VA pages are charged to it.

    Args:
        planner: the plan.
        best: the recommended size; ``None``: no limit is looked for.
        beside: makes all accesses, too.
    """
    scene = planner.scene
    if best is None or planner.host.limits or len(planner.traces) > 1:
        planner.replay([], beside)
        return None
    enclaves = tuple(replace(enclave, group="/pod") for enclave in scene.enclaves)
    pod = replace(planner, scene=replace(scene, enclaves=enclaves))
    plenty = 2 * (scene.footprint_pages + scene.overhead_pages) + 1024
    limit = -(-best.epc_bytes // PAGE_BYTES // _MIB_PAGES) * _MIB_PAGES
    tried: tuple[Part, ...] = (beside,)
    for _try in range(_LIMIT_TRIES):
        epc = planner.epc(max(plenty, 2 * limit)).but(limits={"/pod": limit})
        (counts,) = pod.replay([epc], *tried)
        if pod.meets(counts):
            return limit
        limit += _MIB_PAGES * max(1, limit // _MIB_PAGES // 32)
        tried = ()
    return None


def _compare(
    planner: _Planner, policies: Sequence[str], sizes: Sequence[SizeResult]
) -> Iterable[PolicyResult]:
    """Yield the other policies at the same sizes, in the pages that SECS and VA pages leave."""
    scene = planner.scene
    capacities = tuple(size.epc_bytes for size in sizes)
    room = [size // PAGE_BYTES - scene.overhead_pages for size in capacities]
    parts, made = scene.parts, planner.distances.cold
    if scene.goes and set(policies) - {"lru"}:
        parts, made = lives(parts)
    for name in POLICIES:
        if name not in policies:
            continue
        planner.progress(f"policy {name}", 0, 1)
        wanted = [pages for pages in room if pages > 0]
        if name == "lru":
            missed = iter([planner.distances.misses_at(pages) for pages in wanted])
        else:
            missed = iter(misses(name, parts, wanted))
        loads = [next(missed) - made if pages > 0 else None for pages in room]
        yield PolicyResult(name, capacities, tuple(loads))


def _curve(distances: Distances) -> Curve:
    """Return the miss-ratio curve of exact LRU, thinned to about equal ratios of capacity."""
    every = distances.misses()
    last = len(every) - 1
    capacities = sorted({round(last ** (at / _CURVE_POINTS)) for at in range(_CURVE_POINTS + 1)})
    return Curve(
        pages=tuple(capacities),
        misses=tuple(int(every[pages]) for pages in capacities),
        accesses=distances.accesses,
        cold_misses=distances.cold,
        knee_pages=_knee(capacities, [int(every[pages]) for pages in capacities]),
    )


def _knee(pages: Sequence[int], missed: Sequence[int]) -> int | None:
    """Return the capacity where the curve is farthest below the line between its ends.

    Source:
        V. Satopää et al., "Finding a Kneedle in a Haystack", ICDCS workshops 2011, without the
        smoothing.
    """
    width, height = pages[-1] - pages[0], missed[0] - missed[-1]
    if not width or not height:
        return None
    below = [
        (missed[0] - y) / height - (x - pages[0]) / width
        for x, y in zip(pages, missed, strict=True)
    ]
    deepest = max(below)
    return pages[below.index(deepest)] if deepest > 0 else None


def _remarks(planner: _Planner, working_set: int, policies: Sequence[str]) -> Iterable[str]:
    """Yield the assumptions and limits of the figures, each a sentence."""
    if not planner.base_seconds:
        yield (
            "The traces have no times, so no slowdown is predicted; --run-time gives the run time"
            " without paging."
        )
    elif planner.host.run_seconds is None:
        yield (
            f"The run time without paging, {planner.base_seconds:.3g} s, is taken from the traces:"
            " processor time in user mode, where recorded; --run-time gives a measured one."
        )
    if planner.scene.goes and {"fifo", "clock", "s3fifo"} & set(policies):
        yield (
            "Pages leave their enclaves before the traces end. Linux's policy and LRU use their"
            " frames at once; fifo, clock and s3fifo keep such pages until they evict them, so they"
            " may load more here than they would."
        )
    for trace in planner.traces:
        if not trace.complete:
            yield f"{trace.name} was not recorded to its end."
    if working_set:
        least = exact_size(planner.certain_pages * PAGE_BYTES)
        lengths = {trace.interval_seconds for trace in planner.traces if trace.interval_seconds}
        shown = ", ".join(f"{seconds * 1e3:g} ms" for seconds in sorted(lengths))
        yield (
            f"Intervals of {shown} access up to {working_set:,} pages again: predictions for an EPC"
            f" below {least} are not certain, since the traces miss faults within an interval."
        )
    elif planner.certain_pages:
        least = exact_size(planner.certain_pages * PAGE_BYTES)
        yield (
            f"The traces are of faults at an EPC of {least}: predictions for less are not certain."
        )
    yield planner.costs.basis_text
