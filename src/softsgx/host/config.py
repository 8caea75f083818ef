"""One description of a platform: keyword arguments or a TOML file, checked before anything is made.

::

    # platform.toml
    epc = "64MiB"            # or a list: one section each
    processors = 4
    profile = "sgx2-server"
    backing = "memory"       # or "file"
    backing_limit = "1GiB"

    [groups."jobs/a"]
    max = "16MiB"
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from softsgx.arch import PAGE_BYTES, SKYLAKE_CLIENT, AttributesFlags, MiscSelect, SgxFeature
from softsgx.cgroup import CGROUP_DEFECTS
from softsgx.driver import DEFECTS
from softsgx.errors import SoftSgxError
from softsgx.hw import DEFAULT_EPC_BASE, EpcSection, MachineConfig
from softsgx.paging import Clock, Fifo, LeastRecentlyUsed, LinuxPolicy, Policy, Prefetching

__all__ = ["MIN_EPC_PAGES", "PROFILES", "PlatformConfig", "parse_size"]

MIN_EPC_PAGES = 12
"""SECS, its VA page, an upper VA page, and what one instruction of one thread can need at once:
TCS, two SSA frames, and two pages each of code, stack and data."""

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SECTION_GAP = 1 << 30

PROFILES: dict[str, dict[str, Any]] = {
    "sgx1-client": {
        "features": SgxFeature.SGX1,
        "miscselect": MiscSelect(0),
        "attributes": AttributesFlags.DEBUG
        | AttributesFlags.MODE64BIT
        | AttributesFlags.PROVISIONKEY
        | AttributesFlags.EINITTOKENKEY,
        "xfrm": 0x1F,
        "max_size_64": 36,
        "model": SKYLAKE_CLIENT,
    },
    "sgx2-server": {},
}
"""A Skylake client without SGX2, and a Sapphire Rapids server with everything we model."""

_POLICIES: dict[str, type[Policy]] = {
    "linux": LinuxPolicy,
    "fifo": Fifo,
    "clock": Clock,
    "prefetching": Prefetching,
    "lru": LeastRecentlyUsed,
}


def parse_size(value: int | str, what: str) -> int:
    """Return the bytes of ``4096``, ``"64MiB"`` or ``"93.5MiB"``.

    Raises:
        SoftSgxError: it is no size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise SoftSgxError(f"{what} = {value!r}: no size; write 4096, 64KiB, 93.5MiB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class PlatformConfig:
    """What a :class:`~softsgx.host.Platform` is made of.

    Sizes are bytes or text with a unit; everything is checked when the object is made.

    Attributes:
        epc: size of the EPC; a sequence gives one section each, on NUMA nodes 0, 1, ….
        processors: logical processors, spread over the nodes in turn.
        profile: a name from ``PROFILES``.
        seed: of everything that decides what happens; the same seed gives the same events, and,
            in every version, the same keys by EGETKEY.  Keys of one power cycle (paging key,
            report key id) come from the system's randomness, except on a seeded runtime.
        backing: "memory", or "file" for unnamed temporary files.
        backing_limit: bytes that all evicted pages of one enclave may take; ``None`` for any.
        backing_directory: where files go.
        policy: "linux", "fifo", "clock", "prefetching", or "lru" where every access is seen;
            in Python also a policy object.
        groups: path to ``{"max": SIZE}``; made before anything runs.
        kill: whether killing the largest enclave is the last resort of a group over its limit.
        sanitize: whether ksgxd runs EREMOVE over the whole EPC first, as a kernel must that does
            not know what ran before; a machine that was just made has an empty EPC.
        defects: names of known defects to switch on; ``softsgx.driver.DEFECTS`` has them all.
    """

    epc: int | str | tuple[int | str, ...] = "93.5MiB"
    processors: int = 2
    profile: str = "sgx2-server"
    seed: int = 0
    backing: str = "memory"
    backing_limit: int | str | None = None
    backing_directory: str | None = None
    policy: str | Policy = "linux"
    groups: Mapping[str, Mapping[str, int | str]] = field(default_factory=dict)
    kill: bool = False
    sanitize: bool = False
    defects: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "defects", frozenset(self.defects))
        for name, wanted in (("profile", PROFILES), ("policy", _POLICIES)):
            if isinstance(getattr(self, name), str) and getattr(self, name) not in wanted:
                raise SoftSgxError(
                    f"{name} = {getattr(self, name)!r}: not known; give one of {', '.join(wanted)}"
                )
        if self.backing not in ("memory", "file"):
            raise SoftSgxError(f"backing = {self.backing!r}: give memory or file")
        pages = sum(size // PAGE_BYTES for size in self.section_bytes())
        if pages < MIN_EPC_PAGES:
            raise SoftSgxError(
                f"epc = {self.epc!r}: {pages} pages; an enclave needs {MIN_EPC_PAGES} to run at all"
            )
        unknown = sorted(self.defects - DEFECTS.keys() - CGROUP_DEFECTS.keys())
        if unknown:
            raise SoftSgxError(
                f"defects: {unknown[0]!r} is not known; names are {', '.join(DEFECTS)}"
            )
        for path, settings in self.groups.items():
            odd = sorted(settings.keys() - {"max"})
            if odd:
                raise SoftSgxError(f"groups.{path}: {odd[0]!r} is not known; only max is")
            self.group_max_pages(path)
        self.backing_limit_pages()
        self.machine()

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Self:
        """Read a TOML file; keyword arguments win over it.

        Raises:
            SoftSgxError: the file cannot be read, is not TOML, or says something impossible.
        """
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise SoftSgxError(f"{path}: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise SoftSgxError(f"{path}: {error}") from error
        try:
            return cls.of(**{**values, **changes})
        except SoftSgxError as error:
            raise SoftSgxError(f"{path}: {error}") from error

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return a configuration from keywords that come from a person.

        Raises:
            SoftSgxError: a key is unknown, or a value has the wrong type or is impossible.
        """
        known = {item.name: item for item in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise SoftSgxError(f"{name}: not known; keys are {', '.join(known)}")
            kinds = _KINDS[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise SoftSgxError(f"{name} = {value!r}: give {wanted}")
        if isinstance(values.get("epc"), list):
            values["epc"] = tuple(values["epc"])
        return cls(**values)

    def but(self, **changes: Any) -> Self:
        """Return a copy with some values changed."""
        return replace(self, **changes)

    def section_bytes(self) -> list[int]:
        """Return the size of each EPC section."""
        sizes = self.epc if isinstance(self.epc, tuple) else (self.epc,)
        return [parse_size(size, "epc") for size in sizes]

    def group_max_pages(self, path: str) -> int | None:
        """Return the limit of a configured group in pages, ``None`` for none."""
        limit = self.groups[path].get("max", "max")
        return None if limit == "max" else parse_size(limit, f"groups.{path}.max") // PAGE_BYTES

    def machine(self) -> MachineConfig:
        """Return the machine that this describes."""
        sections, base = [], DEFAULT_EPC_BASE
        for node, size in enumerate(self.section_bytes()):
            sections.append(EpcSection(base, size, node))
            base += (size + _SECTION_GAP - 1) // _SECTION_GAP * _SECTION_GAP
        nodes = tuple(number % len(sections) for number in range(self.processors))
        return MachineConfig(
            sections=tuple(sections),
            processors=self.processors,
            cpu_nodes=nodes,
            **PROFILES[self.profile],
        )

    def paging_policy(self) -> Policy:
        """Return the policy object."""
        return self.policy if isinstance(self.policy, Policy) else _POLICIES[self.policy]()

    def backing_limit_pages(self) -> int | None:
        """Return ``backing_limit`` in pages."""
        if self.backing_limit is None:
            return None
        return parse_size(self.backing_limit, "backing_limit") // PAGE_BYTES


_KINDS: dict[str, tuple[type, ...]] = {
    "epc": (int, str, list, tuple),
    "processors": (int,),
    "profile": (str,),
    "seed": (int,),
    "backing": (str,),
    "backing_limit": (int, str, type(None)),
    "backing_directory": (str, type(None)),
    "policy": (str, Policy),
    "groups": (dict,),
    "kill": (bool,),
    "sanitize": (bool,),
    "defects": (frozenset, set, list, tuple),
}
assert _KINDS.keys() == {item.name for item in fields(PlatformConfig)}, "a key without its types"
