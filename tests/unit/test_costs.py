"""Prices: bands are ordered, only measured events have prices, and sums are correct."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softsgx.costs import (
    BASES,
    COST_PROFILES,
    CostProfile,
    estimate,
    find_profile,
    read_profile,
)
from softsgx.errors import SoftSgxError
from softsgx.host import PROFILES
from softsgx.report import Collector

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
        assert price.basis in BASES
        assert bool(price.printed) == (price.basis == "read")
        assert (price.basis == "none") == (price.typical is None)
        ends = (price.low, price.typical, price.high)
        if None in ends:
            assert ends == (None, None, None)
        else:
            assert 0 < ends[0] <= ends[1] <= ends[2]  # type: ignore[operator]


@profiles
def test_a_swapped_page_costs_what_is_published(profile: CostProfile) -> None:
    swapped = estimate({"aex": 1, "fault": 1, "eldu": 1, "ewb": 1}, profile)
    whole = profile.swap
    assert (swapped.low, swapped.typical, swapped.high) == (whole.low, whole.typical, whole.high)
    assert (whole.typical, whole.printed) == (40_000, "about 40K cycles")


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


def test_an_unknown_event_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="warp"):
        estimate({"warp": 1}, COST_PROFILES["sgx1-client"])


def test_prices_that_do_not_exist_are_refused_in_one_line() -> None:
    with pytest.raises(SoftSgxError, match=r"costs = 'abacus'.*sgx1-client"):
        Collector(lambda: 0, profile="abacus")


MEASURED = """
name = "mine"
hertz = 2.0e9
source = "our machine, 2026-11-29"

[prices.swap]
low = 20_001
typical = 30_003
high = 50_007

[prices.eenter]
low = 5000
typical = 6000
high = 9000
"""


def test_a_profile_of_ones_own_divides_the_swapped_page_as_ours(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MEASURED)
    profile = find_profile(str(path))
    swapped = estimate({"aex": 1, "fault": 1, "eldu": 1, "ewb": 1}, profile)
    assert (swapped.low, swapped.typical, swapped.high) == (20_001, 30_003, 50_007)
    assert profile.prices["eenter"].basis == profile.swap.basis == "measured"
    assert "our machine" in profile.prices["eenter"].source
    assert profile.prices["eadd"].basis == "estimated"
    assert profile.hertz == 2e9


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name = ", "TOML"),
        ("speed = 3", "speed: unknown"),
        ('base = "abacus"', "base: unknown"),
        ("hertz = -1", "hertz as a number"),
        ("[prices.warp]\nlow = 1\ntypical = 1\nhigh = 1", "prices.warp: unknown"),
        ("[prices.ewb]\nlow = 2\ntypical = 1\nhigh = 3", "ascending"),
        ("[prices.ewb]\nlow = 2\nhigh = 3", "low, typical and high"),
        ("[prices]\newb = 3", "low, typical and high"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_in_one_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text)
    with pytest.raises(SoftSgxError, match=problem) as refused:
        read_profile(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_profile_that_does_not_exist_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SoftSgxError, match=r"none\.toml: No such file"):
        find_profile(str(tmp_path / "none.toml"))
