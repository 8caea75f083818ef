"""Prices: bands are bands, nothing is priced that nobody measured, and sums are sums."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.errors import SoftSgxError
from softsgx.host import PROFILES
from softsgx.report import COST_PROFILES, Collector, CostProfile, estimate

EVENTS = sorted(COST_PROFILES["sgx1-client"].prices)
profiles = pytest.mark.parametrize("profile", COST_PROFILES.values(), ids=lambda p: p.name)
counts = st.dictionaries(st.sampled_from(EVENTS), st.integers(0, 10**9))


def test_every_platform_has_prices() -> None:
    assert COST_PROFILES.keys() == PROFILES.keys()


@profiles
def test_every_profile_prices_the_same_events(profile: CostProfile) -> None:
    assert sorted(profile.prices) == EVENTS


@profiles
def test_a_price_lies_in_its_band_and_names_its_source(profile: CostProfile) -> None:
    for event, price in profile.prices.items():
        assert price.event == event
        assert price.source
        ends = (price.low, price.typical, price.high)
        if None in ends:
            assert ends == (None, None, None)
        else:
            assert 0 < ends[0] <= ends[1] <= ends[2]  # type: ignore[operator]


@profiles
def test_a_swapped_page_costs_what_is_published(profile: CostProfile) -> None:
    swapped = estimate({"aex": 1, "fault": 1, "eldu": 1, "ewb": 1}, profile)
    assert (swapped.typical, swapped.high) == (40_000, 64_000)


@given(counts, counts)
def test_what_happens_twice_costs_the_sum(one: dict[str, int], two: dict[str, int]) -> None:
    profile = COST_PROFILES["sgx2-server"]
    both = {event: one.get(event, 0) + two.get(event, 0) for event in one.keys() | two.keys()}
    parts = [estimate(part, profile) for part in (one, two)]
    whole = estimate(both, profile)
    for end in ("low", "typical", "high"):
        assert getattr(whole, end) == sum(getattr(part, end) for part in parts)
    assert whole.low <= whole.typical <= whole.high


def test_an_estimate_names_what_it_left_out() -> None:
    profile = COST_PROFILES["sgx1-client"]
    assert estimate({"etrack": 5, "ipi": 0}, profile).unpriced == ("ETRACK",)
    assert estimate({"etrack": 5}, profile).typical == 0
    assert estimate({"ewb": 5}, profile).unpriced == ()


def test_an_event_nobody_knows_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="warp"):
        estimate({"warp": 1}, COST_PROFILES["sgx1-client"])


def test_prices_that_do_not_exist_are_refused_in_one_line() -> None:
    with pytest.raises(SoftSgxError, match=r"costs = 'abacus'.*sgx1-client"):
        Collector(lambda: 0, profile="abacus")
