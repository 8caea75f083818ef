"""Published costs of events on silicon, in cycles: profiles of prices with their sources.

A price has a low and a high end besides the figure that estimates use; the band is that of the
publications, which differ by processor, microcode and content of the caches.  An event without a
published figure has no price, and an estimate names the events that it leaves out.

A page that is swapped in is published as one figure, about 40,000 cycles (Eleos, VAULT), up to
64,000 (Regaining Lost Seconds).  Here it is the sum of AEX with ERESUME, the kernel's part, ELDU
and one EWB, so that runs in which these do not come in pairs have a price as well.

Source:
    Named with each price.  ``checked`` says whether the figure was compared with its source when it
    was written down here; the others are quoted from memory of the publication, but for the 40,000
    of a swapped page, which the abstract of VAULT has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["COST_PROFILES", "CostItem", "CostProfile", "Estimate", "Price", "estimate"]


@dataclass(frozen=True, slots=True)
class Price:
    """Cycles of one event.

    Attributes:
        event: what is counted, a key of the counts given to :func:`estimate`.
        what: the event in words.
        low, typical, high: cycles; all ``None`` where nothing is published.
        source: who says so.
        checked: see the module.
    """

    event: str
    what: str
    low: int | None
    typical: int | None
    high: int | None
    source: str
    checked: bool = False


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Prices of one kind of machine.

    Attributes:
        name: as the platform's profile.
        hertz: the clock that converts cycles to time.
        prices: by event.
    """

    name: str
    hertz: float
    prices: Mapping[str, Price]


@dataclass(frozen=True, slots=True)
class CostItem:
    """The cycles of all events of a kind.

    Attributes:
        price: their price.
        count: how many there were.
    """

    price: Price
    count: int

    @property
    def low(self) -> int:
        """Cycles at the low end, 0 without a price."""
        return self.count * (self.price.low or 0)

    @property
    def typical(self) -> int:
        """Cycles, 0 without a price."""
        return self.count * (self.price.typical or 0)

    @property
    def high(self) -> int:
        """Cycles at the high end, 0 without a price."""
        return self.count * (self.price.high or 0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run would have cost on silicon, beside what its code computes.

    Attributes:
        profile: whose prices.
        items: each kind of event that happened.
        unpriced: names of those among them for which no figure is published.
    """

    profile: CostProfile
    items: tuple[CostItem, ...]
    unpriced: tuple[str, ...] = field(default=())

    @property
    def low(self) -> int:
        """Cycles at the low end."""
        return sum(item.low for item in self.items)

    @property
    def typical(self) -> int:
        """Cycles."""
        return sum(item.typical for item in self.items)

    @property
    def high(self) -> int:
        """Cycles at the high end."""
        return sum(item.high for item in self.items)

    @property
    def seconds(self) -> float:
        """The typical cycles as time."""
        return self.typical / self.profile.hertz


def estimate(counts: Mapping[str, int], profile: CostProfile) -> Estimate:
    """Price what happened.

    Args:
        counts: number of events by name; a name that no profile has is a mistake of ours.
        profile: the prices.
    """
    unknown = counts.keys() - profile.prices.keys()
    assert not unknown, f"events without an entry in the cost profile: {sorted(unknown)}"
    items = tuple(
        CostItem(price, counts[event])
        for event, price in profile.prices.items()
        if counts.get(event)
    )
    unpriced = tuple(item.price.what for item in items if item.price.typical is None)
    return Estimate(profile, items, unpriced)


_ELEOS = "Eleos: ExitLess OS Services for SGX Enclaves (EuroSys 2017)"
_HOTCALLS = "Regaining Lost Cycles with HotCalls (ISCA 2017)"
_SGX_PERF = "sgx-perf: A Performance Analysis Tool for Intel SGX Enclaves (Middleware 2018)"
_PRELOADING = "Regaining Lost Seconds: Efficient Page Preloading for SGX Enclaves (Middleware 2020)"
_VAULT = "VAULT: Reducing Paging Overheads in SGX (ASPLOS 2018)"
_PLUG_IN = "Confidential Serverless Made Efficient with Plug-In Enclaves (ISCA 2021)"
_NONE = "no published figure known"

_WHOLE = (
    f"share of the published whole of 40,000 to 64,000 per swapped page: {_VAULT}; {_PRELOADING}"
)

_BUILDING = (
    Price("ecreate", "ECREATE", 28_500, 28_500, 28_500, _PLUG_IN),
    Price("eadd", "EADD", 12_500, 12_500, 12_500, _PLUG_IN),
    Price("einit", "EINIT", 88_000, 88_000, 88_000, _PLUG_IN),
    Price("eaug", "EAUG", 10_000, 10_000, 10_000, _PLUG_IN),
)
_PAGING = (
    Price(
        "aex",
        "AEX and ERESUME",
        7_100,
        10_000,
        20_000,
        f"low: EEXIT 3,300 and EENTER 3,800 in {_ELEOS}; high: {_PRELOADING}",
    ),
    Price("fault", "page fault, the kernel's part", 8_000, 8_000, 16_000, _WHOLE),
    Price("eldu", "ELDU", 10_000, 10_000, 16_000, _WHOLE),
    Price("ewb", "EBLOCK and EWB", 12_000, 12_000, 12_000, _WHOLE),
    Price("etrack", "ETRACK", None, None, None, _NONE),
    Price("ipi", "IPI rounds", None, None, None, _NONE),
)


def _profile(name: str, hertz: float, *prices: Price) -> CostProfile:
    return CostProfile(name, hertz, {price.event: price for price in prices})


COST_PROFILES: dict[str, CostProfile] = {
    "sgx1-client": _profile(
        "sgx1-client",
        3.4e9,
        *_BUILDING,
        Price(
            "eenter",
            "EENTER and EEXIT",
            5_850,
            8_600,
            14_200,
            f"low: before the microcode of 2018, {_SGX_PERF}; typical and high: warm and cold "
            f"caches, {_HOTCALLS}",
        ),
        *_PAGING,
    ),
    "sgx2-server": _profile(
        "sgx2-server",
        2.6e9,
        *_BUILDING,
        Price(
            "eenter",
            "EENTER and EEXIT",
            8_600,
            13_100,
            20_000,
            f"low: {_HOTCALLS}; typical: with the microcode of 2018, {_SGX_PERF}; "
            f"high: {_PLUG_IN}; all measured on clients",
        ),
        *_PAGING,
    ),
}
"""Prices by profile; paging of servers has the prices of clients: none are published for it."""

_SWAP = ("aex", "fault", "eldu", "ewb")
assert [
    sum(getattr(price, end) for price in _PAGING if price.event in _SWAP)
    for end in ("typical", "high")
] == [40_000, 64_000], "the shares of a swapped page do not add up to the published whole"
