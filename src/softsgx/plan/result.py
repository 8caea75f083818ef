"""The result of a plan; text, JSON and the HTML page are made from it.

A :class:`Plan` is plain data: it can be pickled and compared.

Sizes are bytes or pages as the names say, times seconds since the first access of all traces.
"""

from __future__ import annotations

from dataclasses import dataclass

from softsgx.costs import CostProfile, Estimate

__all__ = [
    "Curve",
    "EnclaveResult",
    "GroupResult",
    "Plan",
    "PolicyResult",
    "Recommendation",
    "Residency",
    "SizeResult",
    "Slowdown",
    "TraceSummary",
]


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """One trace.

    Attributes:
        name: the file.
        program: what was recorded.
        precision: ``accesses``, ``faults`` or ``intervals``.
        complete: ``False``: the recorder did not end it; the plan uses the records in the file.
        enclaves: how many enclaves it has.
        accesses: its accesses.
        footprint_pages: pages that it accesses.
        seconds: from its first access to its last; 0 without times.
        user_seconds: the program's processor time in user mode; 0: the trace does not have it.
        group: the group that its enclaves are charged to, ``/`` for the root.
        interval_seconds: the length of an interval; 0 unless ``precision`` is ``intervals``.
        recorded_epc_pages: the EPC during the recording; 0: the trace does not have it.
    """

    name: str
    program: str
    precision: str
    complete: bool
    enclaves: int
    accesses: int
    footprint_pages: int
    seconds: float
    group: str
    interval_seconds: float = 0.0
    recorded_epc_pages: int = 0
    user_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Curve:
    """The miss-ratio curve of exact LRU over all traces together.

    Attributes:
        pages: capacities in pages of enclaves, without SECS and VA pages, ascending.
        misses: misses at each capacity, first accesses to a page included.
        accesses: of all traces.
        cold_misses: first accesses to a page, which miss at every capacity.
        knee_pages: the capacity at the curve's knee, ``None`` if it has none.
    """

    pages: tuple[int, ...]
    misses: tuple[int, ...]
    accesses: int
    cold_misses: int
    knee_pages: int | None


@dataclass(frozen=True, slots=True)
class Slowdown:
    """Predicted run time over the run time with an EPC that never pages; 1.1 is 10 % longer.

    Attributes:
        low, typical, high: with the prices of the profile's band.
    """

    low: float
    typical: float
    high: float


@dataclass(frozen=True, slots=True)
class EnclaveResult:
    """One enclave at one size.

    Attributes:
        trace: index of its trace.
        name: its name in the trace.
        pages: pages that the trace accesses.
        overhead_pages: its SECS and VA pages.
        loads: its pages that were loaded again after an eviction.
    """

    trace: int
    name: str
    pages: int
    overhead_pages: int
    loads: int


@dataclass(frozen=True, slots=True)
class GroupResult:
    """One group at one size.

    Attributes:
        path: from the root, ``/jobs/a``.
        limit_bytes: ``misc.max``, ``None`` without a limit.
        peak_bytes: the most that was charged to it, SECS and VA pages included.
        loads: pages of its own enclaves that were loaded again.
    """

    path: str
    limit_bytes: int | None
    peak_bytes: int
    loads: int


@dataclass(frozen=True, slots=True)
class SizeResult:
    """The replay of all traces in an EPC of one size, with Linux's policy.

    Attributes:
        epc_bytes: size of the EPC.
        possible: ``False``: an allocation failed, since every page of the EPC was needed; the
            figures are those up to that point.
        overhead_pages: SECS and VA pages of all enclaves together.
        faults: page faults that made or loaded a page: ``made + loads``.
        made: first accesses, which make a page (EADD or EAUG) at every size.
        loads: pages loaded again by ELDU, which a larger EPC avoids.
        evictions: pages evicted by EWB, SECS included.
        loads_per_second: ``loads`` over the traces' time, ``None`` without times.
        estimate: the prices of loads and evictions.
        slowdown: ``None`` without times.
        certain: whether the precision of the traces suffices for this size; see ``Plan.remarks``.
        enclaves, groups: the figures of each enclave and of each group.
    """

    epc_bytes: int
    possible: bool
    overhead_pages: int
    made: int
    loads: int
    evictions: int
    loads_per_second: float | None
    estimate: Estimate
    slowdown: Slowdown | None
    certain: bool
    enclaves: tuple[EnclaveResult, ...]
    groups: tuple[GroupResult, ...]

    @property
    def faults(self) -> int:
        """Page faults that made or loaded a page."""
        return self.made + self.loads


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """A policy for caches, without batches and watermarks, in the same EPCs.

    Its capacity is the EPC without SECS and VA pages.

    Attributes:
        policy: its name.
        capacities: EPC sizes in bytes, as those of ``Plan.sizes``.
        loads: at each of them, pages loaded again after they were evicted; ``None``: no room.
    """

    policy: str
    capacities: tuple[int, ...]
    loads: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Residency:
    """Residency and page faults over time, at one size.

    Attributes:
        epc_bytes: that size.
        bin_seconds: length of a time bin; 0: the traces have no times, and bins have equally many
            accesses.
        loads: pages loaded again in each time bin.
        made: pages made in each time bin.
        page_bins: for each row, the first dense page number in it; pages are sorted by trace,
            enclave, page.
        pages: number of all pages.
        enclave_rows: for each enclave that begins there, index of its row and its name.
        resident: ``resident[row][bin]``: share of the row's pages in the EPC at the end of the
            bin, 0 to 1.
        accessed: ``accessed[row][bin]``: share of the row's pages that were accessed in the bin.
    """

    epc_bytes: int
    bin_seconds: float
    loads: tuple[int, ...]
    made: tuple[int, ...]
    page_bins: tuple[int, ...]
    pages: int
    enclave_rows: tuple[tuple[int, str], ...]
    resident: tuple[tuple[float, ...], ...]
    accessed: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer.

    Attributes:
        text: in one sentence.
        epc_bytes: the smallest size that meets the target, ``None`` if none in the range does.
        limit_bytes: for one trace, the limit of a group of its own that does the same on a
            machine with more EPC: ``misc.max`` and ``sgx.intel.com/epc``.
        kubernetes: that limit as a Kubernetes quantity.
        slowdown: predicted at that size.
    """

    text: str
    epc_bytes: int | None
    limit_bytes: int | None = None
    kubernetes: str | None = None
    slowdown: Slowdown | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module.

    Attributes:
        traces: the traces, in the order of the arguments.
        recommendation: the answer.
        remarks: assumptions and limits of the figures, each a sentence.
        target_slowdown: see :func:`softsgx.plan.plan`.
        base_seconds: run time without paging; 0 if no trace has times.
        footprint_pages: pages of all enclaves that are accessed.
        overhead_pages: their SECS and VA pages.
        options: parameters that differ from those of Linux's policy, by name.
        sizes: ascending.
        policies: other policies.
        curve: of LRU.
        residency: at the recommended size, or the largest one.
        costs: the prices.
    """

    traces: tuple[TraceSummary, ...]
    recommendation: Recommendation
    remarks: tuple[str, ...]
    target_slowdown: float
    base_seconds: float
    footprint_pages: int
    overhead_pages: int
    options: tuple[tuple[str, int | bool], ...]
    sizes: tuple[SizeResult, ...]
    policies: tuple[PolicyResult, ...]
    curve: Curve
    residency: Residency
    costs: CostProfile
