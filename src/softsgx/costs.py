"""Costs of events on silicon, in cycles: profiles of prices, each with its basis.

A price has a low and a high end besides the figure that estimates use; they differ by processor,
microcode and content of the caches.  Its basis says how far it can be trusted:

``read``
    A source was read, and ``printed`` has the figure as it is printed there.
``measured``
    A user's program measured it on a processor: a profile from a file (:func:`read_profile`).
``estimated``
    No source was read.  The figure is of the right order, and no more.

An event whose order is not known has no price; an estimate names the events that it leaves
out.

A page that is swapped, so one page loaded and another one evicted for it, was read as one figure.
It is divided here among AEX with ERESUME, the kernel's part, ELDU and one EWB, so that runs in
which these do not come in pairs have a price as well.  The division is an estimate.

Source:
    Named with each price.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from softsgx.errors import SoftSgxError
from softsgx.ondemand import dataclass, field, replace

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "BASES",
    "COST_PROFILES",
    "SWAP_EVENTS",
    "CostItem",
    "CostProfile",
    "Estimate",
    "Price",
    "estimate",
    "find_profile",
    "read_profile",
]

BASES = ("read", "measured", "estimated", "none")
"""What a price can be based on; ``none``: there is no price."""

SWAP_EVENTS = ("aex", "fault", "eldu", "ewb")
"""The events of one swapped page."""


@dataclass(frozen=True, slots=True)
class Price:
    """Cycles of one event.

    Attributes:
        event: what is counted, a key of the counts given to :func:`estimate`.
        what: the event in words.
        low, typical, high: cycles; all ``None`` without a price.
        basis: one of :data:`BASES`; see the module.
        source: the publication; for an estimate, where such figures are published.
        printed: the figure as the source prints it, if ``basis`` is ``read``.
    """

    event: str
    what: str
    low: int | None
    typical: int | None
    high: int | None
    basis: str
    source: str
    printed: str = ""

    @property
    def checked(self) -> bool:
        """Whether the figure was compared with its source, or measured."""
        return self.basis in ("read", "measured")


@dataclass(frozen=True, slots=True)
class CostProfile:
    """Prices of one kind of machine.

    Attributes:
        name: as the platform's profile, or of a file.
        hertz: the clock that converts cycles to time.
        prices: by event.
        swap: the whole of one swapped page, of which :data:`SWAP_EVENTS` are the parts.
    """

    name: str
    hertz: float
    prices: Mapping[str, Price]
    swap: Price

    @property
    def basis_text(self) -> str:
        """What the prices are based on, in a sentence for people."""
        sure = [price for price in (*self.prices.values(), self.swap) if price.checked]
        if not sure:
            return f"All prices of {self.name} are estimated."
        names = ", ".join(f"{price.what} ({price.basis})" for price in sure)
        return f"Prices of {self.name}: {names}; all others are estimated."


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
        profile: the profile of the prices.
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
        counts: number of events by name; a name that no profile has is a bug.
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


_GRAMINE = "Gramine 1.9, Performance tuning and analysis, “OCALLs”"
_VAULT = "VAULT: Reducing Paging Overheads in SGX (ASPLOS 2018), abstract"
_PLUG_IN = "Confidential Serverless Made Efficient with Plug-In Enclaves (ISCA 2021)"
_OF_THE_ORDER = "not read; figures of this order are published in "
_SHARE = "our division of the whole of a swapped page"

_SWAP = Price(
    "swap",
    "one swapped page, the whole",
    35_000,
    40_000,
    64_000,
    "read",
    f"{_VAULT}; the ends of the band are estimated",
    "about 40K cycles",
)
_SHARES = {"aex": (10, "AEX and ERESUME"), "fault": (8, "page fault, the kernel's part")} | {
    "eldu": (10, "ELDU"),
    "ewb": (12, "EBLOCK and EWB"),
}
_UNKNOWN = {"etrack": "ETRACK", "ipi": "IPI rounds"}


def _building(event: str, what: str, cycles: int) -> Price:
    band = cycles // 2, cycles, cycles * 2
    return Price(event, what, *band, "estimated", _OF_THE_ORDER + _PLUG_IN)


def _shares(swap: Price) -> tuple[Price, ...]:
    """Divide the price of a swapped page; the parts add up to it."""
    ends = [end or 0 for end in (swap.low, swap.typical, swap.high)]
    parts = {event: [end * share // 40 for end in ends] for event, (share, _) in _SHARES.items()}
    for at, end in enumerate(ends):
        parts["ewb"][at] += end - sum(part[at] for part in parts.values())
    prices = []
    for event, (_share, what) in _SHARES.items():
        low, typical, high = parts[event]
        source = f"{_SHARE}: {swap.source}"
        prices.append(Price(event, what, low, typical, high, "estimated", source))
    return tuple(prices)


def _profile(name: str, hertz: float, swap: Price, *prices: Price) -> CostProfile:
    unknown = (
        Price(event, what, None, None, None, "none", "no figure known")
        for event, what in _UNKNOWN.items()
    )
    every = {price.event: price for price in (*prices, *_shares(swap), *unknown)}
    return CostProfile(name, hertz, every, swap)


_COMMON = (
    _building("ecreate", "ECREATE", 28_500),
    _building("eadd", "EADD", 12_500),
    _building("einit", "EINIT", 88_000),
    _building("eaug", "EAUG", 10_000),
    Price(
        "eenter",
        "EENTER and EEXIT",
        8_000,
        10_000,
        12_000,
        "read",
        f"{_GRAMINE}; the figure between the ends is the mean",
        "8,000 – 12,000 cycles",
    ),
)

COST_PROFILES: dict[str, CostProfile] = {
    "sgx1-client": _profile("sgx1-client", 3.4e9, _SWAP, *_COMMON),
    "sgx2-server": _profile("sgx2-server", 2.6e9, _SWAP, *_COMMON),
}
"""Prices by profile; the two differ in their clock, as no figures for servers were read."""


def find_profile(name: str) -> CostProfile:
    """Return the profile of a name in :data:`COST_PROFILES`, or the one in a TOML file.

    Raises:
        SoftSgxError: there is neither.
    """
    if name in COST_PROFILES:
        return COST_PROFILES[name]
    if name.endswith(".toml"):
        return read_profile(name)
    known = ", ".join(COST_PROFILES)
    raise SoftSgxError(f"costs = {name!r}: not known; give one of {known}, or a file FILE.toml")


def read_profile(path: str | Path) -> CostProfile:
    """Read a profile from a TOML file, as the ``calibrate`` example prints one.

    ``name``, ``hertz`` (the clock), ``source`` (machine and date), ``base`` (the profile whose
    prices the others are; ``sgx2-server`` by default), and a table ``[prices.EVENT]`` with ``low``,
    ``typical`` and ``high`` for each event that was measured, in cycles.  ``[prices.swap]`` is the
    whole of a swapped page.

    Raises:
        SoftSgxError: the file cannot be read, or is no profile.
    """
    import tomllib  # few runs read a file of prices
    from pathlib import Path

    try:
        document = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SoftSgxError(f"{path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SoftSgxError(f"{path}: {error}; give a profile in TOML") from error
    odd = sorted(document.keys() - {"name", "hertz", "source", "base", "prices"})
    if odd:
        raise SoftSgxError(f"{path}: {odd[0]}: unknown; give name, hertz, source, base, prices")
    base = COST_PROFILES.get(str(document.get("base", "sgx2-server")))
    if base is None:
        raise SoftSgxError(f"{path}: base: unknown; give one of {', '.join(COST_PROFILES)}")
    name = document.get("name", Path(path).stem)
    hertz = document.get("hertz", base.hertz)
    prices = document.get("prices", {})
    if not isinstance(name, str) or not _positive(hertz) or not isinstance(prices, dict):
        raise SoftSgxError(
            f"{path}: a value of the wrong type; give name as text, hertz as a number, prices as"
            " tables"
        )
    source = f"measured: {document.get('source', path)}"
    measured = {
        event: _measured(f"{path}: prices.{event}", base, event, table, source)
        for event, table in prices.items()
    }
    swap = measured.pop("swap", None)
    parts = {} if swap is None else {price.event: price for price in _shares(swap)}
    return CostProfile(name, float(hertz), {**base.prices, **parts, **measured}, swap or base.swap)


def _measured(where: str, base: CostProfile, event: str, table: Any, source: str) -> Price:
    known = {**base.prices, "swap": base.swap}
    if event not in known:
        raise SoftSgxError(f"{where}: unknown; give some of {', '.join(known)}")
    bad = not isinstance(table, dict) or table.keys() != {"low", "typical", "high"}
    ends = [] if bad else [table[end] for end in ("low", "typical", "high")]
    if bad or not all(map(_positive, ends)) or ends != sorted(ends):
        raise SoftSgxError(
            f"{where}: not a price; give low, typical and high in cycles, in ascending order"
        )
    low, typical, high = map(round, ends)
    return replace(
        known[event],
        low=low,
        typical=typical,
        high=high,
        basis="measured",
        source=source,
        printed="",
    )


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < 1e15  # type: ignore[operator]
