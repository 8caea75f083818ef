"""Plans: what they recommend, and what they say about their limits."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from tests.support.accesses import hot_and_cold, trace_of

from softsgx.accesses import Trace
from softsgx.arch import PAGE_BYTES
from softsgx.costs import COST_PROFILES
from softsgx.errors import SoftSgxError
from softsgx.plan import Host, Options, Plan, PlannedTrace, plan
from softsgx.plan.sentence import exact_size, percent
from softsgx.sizes import parse_size

PAGES, ACCESSES = 400, 6000
ANY_HOST, LINUX = Host(), Options()
WALK = list(range(200)) * 20


def planned(
    *traces: Trace, groups: Sequence[str] = (), host: Host = ANY_HOST, **options: Any
) -> Plan:
    """Return a plan for traces in memory."""
    paths = groups or ["/"] * len(traces)
    sources = [PlannedTrace(trace, path) for trace, path in zip(traces, paths, strict=True)]
    return plan(sources, host, **options)


def at(pages: int, options: Options = LINUX, limits: dict[str, int] | None = None) -> Host:
    """Return a host with an EPC of that many pages."""
    return Host(pages * PAGE_BYTES, pages * PAGE_BYTES, limits or {}, options)


HOT = trace_of(hot_and_cold(1, PAGES, ACCESSES), seconds=0.05)


@pytest.fixture(scope="module")
def hot() -> Plan:
    return planned(HOT, policies=("lru", "opt"))


def test_the_recommended_size_meets_the_target_and_the_next_smaller_does_not(hot: Plan) -> None:
    sizes = [size.epc_bytes for size in hot.sizes]
    best = sizes.index(hot.recommendation.epc_bytes or 0)
    slowdowns = [size.slowdown.typical for size in hot.sizes if size.slowdown]
    assert slowdowns[best] <= 1.1 < slowdowns[best - 1]
    assert sizes[best] - sizes[best - 1] <= sizes[best] / 16


def test_the_answer_is_one_sentence_with_the_limits_of_kubernetes_and_of_the_cgroup(
    hot: Plan,
) -> None:
    answer = hot.recommendation
    assert answer.epc_bytes is not None and answer.limit_bytes is not None
    assert answer.text.startswith(f"{exact_size(answer.epc_bytes)} of EPC keep the slowdown under")
    assert answer.text.count(". ") == 0 and answer.text.endswith(".")
    assert f"sgx.intel.com/epc: {answer.kubernetes}" in answer.text
    assert f"misc.max: sgx_epc {answer.limit_bytes}" in answer.text
    assert answer.kubernetes is not None
    assert parse_size(answer.kubernetes) == answer.limit_bytes >= answer.epc_bytes


def test_a_group_with_the_recommended_limit_meets_the_target_too(hot: Plan) -> None:
    limit = hot.recommendation.limit_bytes
    assert limit is not None
    limited = planned(HOT, groups=["pod"], host=at(4096, limits={"pod": limit}))
    slowdown = limited.sizes[0].slowdown
    assert slowdown is not None and slowdown.typical <= 1.1
    peaks = {group.path: group.peak_bytes for group in limited.sizes[0].groups}
    assert peaks["/pod"] <= limit


def test_no_policy_beats_opt_and_an_epc_of_everything_loads_nothing(hot: Plan) -> None:
    opt = next(policy for policy in hot.policies if policy.policy == "opt")
    for size, least in zip(hot.sizes, opt.loads, strict=True):
        assert least is not None
        assert size.loads >= least
        for policy in hot.policies:
            assert all(loads is not None for loads in policy.loads)
    assert (hot.sizes[-1].loads, hot.sizes[-1].evictions) == (0, 0)
    assert hot.sizes[-1].made == PAGES


def test_the_curve_ends_with_first_accesses_only_and_its_knee_is_on_it(hot: Plan) -> None:
    curve = hot.curve
    assert curve.misses[-1] == curve.cold_misses == PAGES
    assert list(curve.misses) == sorted(curve.misses, reverse=True)
    assert curve.knee_pages in curve.pages
    assert PAGES // 8 <= (curve.knee_pages or 0) <= PAGES // 2


def test_residency_adds_up_to_the_replay_at_the_recommended_size(hot: Plan) -> None:
    shown = hot.residency
    best = next(size for size in hot.sizes if size.epc_bytes == hot.recommendation.epc_bytes)
    assert shown.epc_bytes == best.epc_bytes
    assert (sum(shown.loads), sum(shown.made)) == (best.loads, best.made)
    assert len(shown.resident) == len(shown.accessed) == len(shown.page_bins)
    assert {len(row) for row in shown.resident} == {len(shown.loads)}
    assert all(0 <= share <= 1 for row in (*shown.resident, *shown.accessed) for share in row)
    assert shown.enclave_rows == ((0, "app.sgxs"),)


def test_the_same_arguments_give_the_same_plan_which_can_be_pickled(hot: Plan) -> None:
    again = planned(HOT, policies=("lru", "opt"))
    assert again == hot
    assert pickle.loads(pickle.dumps(hot)) == hot


def test_overhead_is_counted_in_every_size(hot: Plan) -> None:
    assert hot.overhead_pages == 2  # a SECS, and a VA page for up to 512 pages
    exact = planned(trace_of(WALK), host=at(200 + 2 + 32))
    assert exact.sizes[0].loads == 0
    assert planned(trace_of(WALK), host=at(200 - 8)).sizes[0].loads > 0


def test_no_size_in_the_range_that_is_enough_is_said_so() -> None:
    none = planned(trace_of(WALK, seconds=0.01), host=Host(400 << 10, 600 << 10))
    assert (none.recommendation.epc_bytes, none.recommendation.kubernetes) == (None, None)
    assert none.recommendation.text.startswith(
        "No size up to 600 KiB keeps the slowdown under 10 %"
    )


def test_the_smallest_size_that_was_asked_for_is_not_called_the_smallest() -> None:
    enough = planned(trace_of(WALK), host=Host(1 << 20, 2 << 20))
    assert enough.recommendation.epc_bytes == 1 << 20
    assert "less was not tried" in enough.recommendation.text


def test_an_epc_without_room_for_the_enclaves_own_pages_is_no_size() -> None:
    many = [trace_of([page]) for page in range(30)]  # each has a VA page, which stays
    crowded = planned(*many, host=at(25))
    assert not crowded.sizes[0].possible
    assert "every page was needed at once" in crowded.recommendation.text


def test_interval_traces_cannot_tell_below_their_largest_interval() -> None:
    walk = trace_of(WALK, seconds=0.2, interval_ns=10_000_000)  # each page once in an interval
    told = planned(walk, host=Host(100 << 10, 2 << 20))
    uncertain = [size.epc_bytes // PAGE_BYTES for size in told.sizes if not size.certain]
    assert uncertain and max(uncertain) < 200 + 2
    assert (told.recommendation.epc_bytes or 0) // PAGE_BYTES >= 200 + 2
    assert any("for an EPC below 808 KiB are not certain" in remark for remark in told.remarks)


def test_traces_without_times_tell_what_holds_everything_that_is_used_again() -> None:
    untimed = planned(trace_of(WALK, timed=False))
    assert untimed.base_seconds == 0
    assert all(size.slowdown is None for size in untimed.sizes)
    assert "hold all pages that are used again" in untimed.recommendation.text
    assert any("no times" in remark for remark in untimed.remarks)
    timed = planned(trace_of(WALK, timed=False), host=Host(run_seconds=2.0))
    assert timed.base_seconds == 2
    assert timed.sizes[0].slowdown is not None


def test_the_run_time_is_the_processor_time_of_the_program_where_it_is_recorded() -> None:
    assert planned(trace_of(WALK, seconds=2), host=at(300)).base_seconds == 2
    for user_ns, base in ((500_000_000, 0.5), (9_000_000_000, 2)):  # two threads may use more
        told = planned(trace_of(WALK, seconds=2, user_ns=user_ns), host=at(300))
        assert told.base_seconds == base


def test_a_trace_that_was_cut_off_is_planned_with_a_remark() -> None:
    cut = planned(trace_of(WALK, complete=False), host=at(300))
    assert any("not recorded to its end" in remark for remark in cut.remarks)


def test_enclaves_side_by_side_take_pages_from_each_other_and_a_limit_stops_that() -> None:
    small = trace_of([page for page in range(40) for _ in range(2)] * 20)
    large = trace_of(WALK)
    free = planned(small, large, host=at(150))
    assert len(free.traces) == len(free.sizes[0].enclaves) == 2
    alone = planned(small, host=at(150)).sizes[0]
    assert free.sizes[0].enclaves[0].loads > alone.loads == 0
    limits = {"jobs/large": 80 * PAGE_BYTES}
    limited = planned(
        small, large, groups=["jobs/small", "jobs/large"], host=at(150, limits=limits)
    )
    loads = [enclave.loads for enclave in limited.sizes[0].enclaves]
    assert loads[0] < free.sizes[0].enclaves[0].loads
    paths = {group.path: group for group in limited.sizes[0].groups}
    assert paths["/jobs/large"].peak_bytes <= 80 * PAGE_BYTES
    assert paths["/jobs/large"].loads == loads[1]


def test_prefetching_loads_a_sequence_with_fewer_faults_than_linux() -> None:
    ahead = Options(prefetch_pages=4)
    walk = trace_of(list(range(150)) * 4)
    plain, fetched = (planned(walk, host=at(100, one)).sizes[0] for one in (Options(), ahead))
    assert fetched.loads > 0 < plain.loads
    assert planned(walk, host=at(100, ahead)).options == (("prefetch_pages", 4),)


def test_va_pages_that_may_leave_give_their_pages_to_the_enclave() -> None:
    walk = trace_of([*range(3000), *(list(range(100)) * 3)])
    stay = planned(walk, host=at(64)).sizes[0]
    leave = planned(walk, host=at(64, Options(evict_va=True))).sizes[0]
    assert leave.possible and stay.possible
    assert leave.evictions != stay.evictions


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        (Host(4096, 8192), "too small for an enclave; give at least 100 KiB"),
        (Host(2 << 20, 1 << 20), "empty; give the smaller size first"),
        (Host(1 << 20, 1 << 50), "too large"),
        (
            Host(limits={"a": 4096}),
            "limit of a: 4 KiB: too small for an enclave; give at least 100 KiB",
        ),
        (Host(limits={"a/../b": 1 << 20}), "not a path"),
    ],
)
def test_an_impossible_host_is_refused_in_one_line(host: Host, problem: str) -> None:
    with pytest.raises(SoftSgxError, match=problem) as refused:
        planned(trace_of(WALK), host=host)
    assert "\n" not in str(refused.value)


def test_a_trace_without_accesses_is_refused() -> None:
    with pytest.raises(SoftSgxError, match="no accesses; record a program"):
        planned(trace_of([]))


@pytest.mark.parametrize("target", [1.0, 0.5, float("nan"), float("inf")])
def test_a_target_that_no_run_can_miss_or_meet_is_refused(target: float) -> None:
    with pytest.raises(SoftSgxError, match="not above 1"):
        planned(trace_of(WALK), target_slowdown=target)


def test_the_band_of_the_slowdown_is_that_of_the_prices(hot: Plan) -> None:
    prices = COST_PROFILES["sgx2-server"]
    size = hot.sizes[0]
    assert size.slowdown is not None
    cycles = hot.base_seconds * prices.hertz
    assert size.slowdown.low == pytest.approx(1 + size.estimate.low / cycles)
    assert size.slowdown.high == pytest.approx(1 + size.estimate.high / cycles)
    assert size.slowdown.low < size.slowdown.typical < size.slowdown.high


@pytest.mark.parametrize("size", [98041856, 1472 << 10, 4096 * 674, 100 << 10, 68 << 20, 5000])
def test_sizes_are_written_so_that_they_read_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


def test_small_slowdowns_are_told_with_two_digits() -> None:
    assert [percent(value) for value in (1.0, 1.0042, 1.0996, 1.42, 3.5)] == [
        *("0 %", "0.42 %", "10 %", "42 %", "250 %")
    ]
