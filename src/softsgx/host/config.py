"""The description of a platform: keyword arguments or a TOML file, checked before the platform.

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

import os
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

from softsgx.arch import PAGE_BYTES, SKYLAKE_CLIENT, AttributesFlags, MiscSelect, SgxFeature
from softsgx.cgroup import group_name_ok
from softsgx.defects import Defect
from softsgx.errors import SoftSgxError, first_line
from softsgx.hw import DEFAULT_EPC_BASE, EpcSection, MachineConfig
from softsgx.ondemand import dataclass, field, field_names, replace
from softsgx.paging import (
    Clock,
    Fifo,
    LeastRecentlyUsed,
    LinuxPolicy,
    Policy,
    Prefetching,
    needed_pages,
)
from softsgx.sizes import MOST_BYTES, parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from softsgx.arch import EinitToken

__all__ = [
    "PROFILES",
    "PlatformConfig",
    "check_group_path",
    "check_pages",
    "configured_size",
    "least_bytes",
    "limit_option",
]

_SECTION_GAP = 1 << 30
_MOST_PROCESSORS = 8192  # the largest NR_CPUS of Linux on x86-64
_NUMBER_BITS = 64
_FILE_BYTES = 1 << 20
_SHOWN_CHARACTERS = 60

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
"""A Skylake client without SGX2, and a Sapphire Rapids server with all modelled features."""

_POLICIES: dict[str, type[Policy]] = {
    "linux": LinuxPolicy,
    "fifo": Fifo,
    "clock": Clock,
    "prefetching": Prefetching,
    "lru": LeastRecentlyUsed,
}


def configured_size(value: int | str, what: str) -> int:
    """Return the bytes of a number, or of text that :func:`softsgx.sizes.parse_size` reads.

    Raises:
        SoftSgxError: it is not a size; the message begins with ``what``.
    """
    try:
        if isinstance(value, str):
            return parse_size(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("not a size; write 4096, 64KiB, 93.5MiB, 512Mi or 0x10000")
        if not 0 <= value <= MOST_BYTES:
            raise ValueError("out of range; give 0 to 2**64 bytes")
    except ValueError as error:
        raise SoftSgxError(f"{what} = {_shown(value)}: {error}") from None
    return value


def _hexadecimal(text: str, size: int, what: str) -> bytes:
    """Return ``size`` bytes of hexadecimal text."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if len(data) != size:
        raise SoftSgxError(
            f"{what} = {_shown(text)}: not {size} bytes; give {2 * size} hexadecimal digits"
        )
    return data


def _shown(value: object) -> str:
    """Return any ``value`` as text for a message of one line."""
    if isinstance(value, int) and value.bit_length() > 2 * _NUMBER_BITS:
        return f"(a number of {value.bit_length()} bits)"
    if isinstance(value, str):
        short = value[:_SHOWN_CHARACTERS]
        return repr(short) + ("…" if len(value) > len(short) else "")
    if isinstance(value, list | tuple | dict | set | frozenset):
        return f"(a {type(value).__name__} of {len(value)})"
    return repr(value)


def _check_defects(given: Iterable[object]) -> frozenset[Defect]:
    """Return the defects with these identifiers; members of ``given`` need not be hashable.

    Raises:
        SoftSgxError: an identifier is unknown, or softsgx cannot reproduce the defect.
    """
    known = {str(defect): defect for defect in Defect}
    found = set[Defect]()
    for name in given:
        defect = known.get(name) if isinstance(name, str) else None
        if defect is None:
            names = ", ".join(defect for defect in Defect if defect.can_be_switched_on)
            raise SoftSgxError(f"defects: {_shown(name)}: unknown; give some of {names}")
        if not defect.can_be_switched_on:
            raise SoftSgxError(
                f"defects: {defect}: cannot be switched on; remove it: {defect.explanation}"
            )
        found.add(defect)
    return frozenset(found)


def least_bytes(profile: str) -> int:
    """Return the smallest EPC, and the smallest limit of a group, with a profile."""
    return needed_pages(MachineConfig(**PROFILES[profile])) * PAGE_BYTES


def check_pages(what: str, pages: int, machine: MachineConfig) -> None:
    """Check that this number of EPC pages suffices for every program to make progress.

    Raises:
        SoftSgxError: they are too few.
    """
    needed = needed_pages(machine)
    if pages < needed:
        raise SoftSgxError(
            f"{what}: {pages} pages are too few; give at least {needed}"
            f" ({needed * PAGE_BYTES // 1024}KiB): one thread can need as many at once to execute"
            " an instruction, SECS and VA pages included"
        )


@dataclass(frozen=True)
class PlatformConfig:
    """The description of a :class:`~softsgx.host.Platform`.

    Sizes are bytes or text with a unit; the constructor checks every field.

    Attributes:
        epc: size of the EPC; a sequence gives one section each, on NUMA nodes 0, 1, ….
        processors: logical processors, spread over the nodes in turn.
        profile: a name from ``PROFILES``.
        seed: seed of all pseudo-random decisions; the same seed gives the same events, and, in
            every version, the same keys by EGETKEY.  Keys of one power cycle (paging key,
            report key id) come from the system's randomness, except on a seeded runtime.
        backing: "memory", or "file" for unnamed temporary files.
        backing_limit: bytes that all evicted pages of one enclave may take; ``None``: no limit.
        backing_directory: directory of the files.
        policy: "linux", "fifo", "clock", "prefetching", or "lru" where the engine sees every
            access; in Python also a policy object.
        groups: path to ``{"max": SIZE}``; the platform makes them.
        launch_control: whether the launch key hash can be written, so that every signer may launch.
            Without it, the driver behaves as Intel's out-of-tree driver: an enclave needs the
            signer of ``launch_key_hash``, or a token.
        launch_key_hash: reset value of IA32_SGXLEPUBKEYHASH as 64 hexadecimal digits, MRSIGNER of
            the launch enclave; Intel's by default.
        cpusvn: CPUSVN as 32 hexadecimal digits.
        tokens: files with one EINITTOKEN of 304 bytes each, which INIT passes to EINIT.
        kill: whether a group over its limit kills its largest enclave as a last resort.
        sanitize: whether ksgxd runs EREMOVE over the whole EPC first, as Linux does after kexec;
            the EPC of a new machine is empty.
        defects: known defects to enable: members of :class:`~softsgx.defects.Defect`, or their
            identifiers.
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
    launch_control: bool = True
    launch_key_hash: str | None = None
    cpusvn: str | None = None
    tokens: tuple[str, ...] = ()
    kill: bool = False
    sanitize: bool = False
    defects: frozenset[Defect] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "defects", _check_defects(self.defects))
        for name, wanted in (("profile", PROFILES), ("policy", _POLICIES)):
            value = getattr(self, name)
            if isinstance(value, str) and value not in wanted:
                raise SoftSgxError(
                    f"{name} = {_shown(value)}: unknown; give one of {', '.join(wanted)}"
                )
        if not -(1 << _NUMBER_BITS) < self.seed < 1 << _NUMBER_BITS:
            raise SoftSgxError(
                f"seed = {_shown(self.seed)}: too large; give less than 2**{_NUMBER_BITS}"
            )
        if self.processors > _MOST_PROCESSORS:
            raise SoftSgxError(
                f"processors = {_shown(self.processors)}: too many; give at most {_MOST_PROCESSORS}"
            )
        pages = sum(size // PAGE_BYTES for size in self.section_bytes())
        check_pages(f"epc = {_shown(self.epc)}", pages, self._profile())
        self._check_backing()
        self._check_groups()
        self.machine()

    def _check_backing(self) -> None:
        """Refuse a backing store that cannot be opened."""
        if self.backing not in ("memory", "file"):
            raise SoftSgxError(f"backing = {_shown(self.backing)}: unknown; give memory or file")
        self.backing_limit_pages()
        directory = self.backing_directory
        if directory is None:
            return
        if not os.path.isdir(directory) or not os.access(directory, os.W_OK | os.X_OK):
            raise SoftSgxError(
                f"backing_directory = {_shown(directory)}: not a directory that can be written; "
                "make it, or name another one"
            )

    def _check_groups(self) -> None:
        """Refuse group paths that are not legal, and unknown settings."""
        for path, settings in self.groups.items():
            where = f"groups.{_named(path)}"
            check_group_path(path, where)
            if not isinstance(settings, Mapping):
                raise SoftSgxError(
                    f'{where} = {_shown(settings)}: not a table; write max = "16MiB" in it'
                )
            odd = sorted(settings.keys() - {"max"})
            if odd:
                raise SoftSgxError(f"{where}: {_shown(odd[0])}: unknown; only max is allowed")
            limit = self.group_max_pages(path)
            if limit is not None:
                check_pages(f"{where}.max = {_shown(settings['max'])}", limit, self._profile())

    def _profile(self) -> MachineConfig:
        """Return the machine of the profile, without the other fields."""
        return MachineConfig(**PROFILES[self.profile])

    @classmethod
    def load(cls, path: str | Path, **changes: Any) -> Self:
        """Read a TOML file; keyword arguments override it.

        Raises:
            SoftSgxError: the file cannot be read, is not TOML, or has an invalid value.
        """
        try:
            with open(path, "rb") as file:
                text = file.read(_FILE_BYTES + 1)
        except OSError as error:
            raise SoftSgxError(f"{path}: {error.strerror}") from error
        return cls.parse(text, str(path), **changes)

    @classmethod
    def parse(cls, text: bytes, name: str, **changes: Any) -> Self:
        """Read the contents of a TOML file; keyword arguments override them.

        Args:
            text: the contents.
            name: the file's name in messages.
            changes: values that replace those of the text.

        Raises:
            SoftSgxError: the text is not TOML, or has an invalid value.
        """
        if len(text) > _FILE_BYTES:
            raise SoftSgxError(
                f"{name}: larger than {_FILE_BYTES} bytes; give a platform's description in TOML"
            )
        import tomllib  # few platforms come from a file

        try:
            values = tomllib.loads(text.decode())
        # Errors of TOML and of UTF-8 are ValueErrors, and so are numbers of thousands of digits.
        except ValueError as error:
            raise SoftSgxError(
                f"{name}: not TOML: {first_line(error)}; correct the line"
            ) from error
        except RecursionError as error:
            raise SoftSgxError(f"{name}: nested too deep; remove levels of arrays") from error
        try:
            return cls.of(**{**values, **changes})
        except SoftSgxError as error:
            raise SoftSgxError(f"{name}: {error}") from error

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Return a configuration from a user's keywords, whose names and types are checked.

        Raises:
            SoftSgxError: a key is unknown, or a value has the wrong type or is invalid.
        """
        known = field_names(cls)
        for name, value in values.items():
            if name not in known:
                raise SoftSgxError(f"{_named(name)}: unknown; give some of {', '.join(known)}")
            kinds = _KINDS[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise SoftSgxError(f"{name} = {_shown(value)}: wrong type; give {wanted}")
        for name in ("epc", "tokens"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def but(self, **changes: Any) -> Self:
        """Return a copy with some values changed."""
        return replace(self, **changes)

    def section_bytes(self) -> list[int]:
        """Return the size of each EPC section; text is rounded down to whole pages."""
        sizes = []
        for section in self._sections():
            size = configured_size(section, "epc")
            sizes.append(size - size % PAGE_BYTES if isinstance(section, str) else size)
        return sizes

    def _sections(self) -> tuple[int | str, ...]:
        return self.epc if isinstance(self.epc, tuple) else (self.epc,)

    def roundings(self) -> list[str]:
        """Return a message for each size that is rounded down to whole pages."""
        sizes = [(f"epc = {_shown(size)}", size) for size in self._sections()]
        for path, settings in self.groups.items():
            limit = settings.get("max", "max")
            if limit != "max":
                sizes.append((f"groups.{_named(path)}.max = {_shown(limit)}", limit))
        lines = []
        for what, value in sizes:
            size = configured_size(value, what)
            if size % PAGE_BYTES:
                pages = size // PAGE_BYTES
                lines.append(f"{what}: rounded down to {pages} pages ({pages * 4}KiB)")
        return lines

    def group_max_pages(self, path: str) -> int | None:
        """Return the limit of a configured group in pages; ``None``: it has no limit."""
        limit = self.groups[path].get("max", "max")
        if limit == "max":
            return None
        return configured_size(limit, f"groups.{_named(path)}.max") // PAGE_BYTES

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
            **self._launch(),
            **PROFILES[self.profile],
        )

    def _launch(self) -> dict[str, Any]:
        changes: dict[str, Any] = {"launch_control": self.launch_control}
        if self.launch_key_hash is not None:
            digest = _hexadecimal(self.launch_key_hash, 32, "launch_key_hash")
            changes["launch_key_hash"] = struct.unpack("<4Q", digest)
        if self.cpusvn is not None:
            changes["cpusvn"] = changes["microcode_svn"] = _hexadecimal(self.cpusvn, 16, "cpusvn")
        return changes

    def read_tokens(self) -> dict[bytes, EinitToken]:
        """Return the tokens by MRENCLAVE.

        Raises:
            SoftSgxError: a file cannot be read, or has another size.
        """
        tokens: dict[bytes, EinitToken] = {}
        for path in self.tokens:
            try:
                with open(path, "rb") as file:
                    data = file.read()
            except (OSError, ValueError) as error:
                raise SoftSgxError(f"{path}: {error}; give a file with an EINITTOKEN") from None
            from softsgx.arch import EinitToken

            if len(data) != EinitToken.SIZE:
                raise SoftSgxError(
                    f"{path}: {len(data)} bytes are no EINITTOKEN; give a file of {EinitToken.SIZE}"
                )
            token = EinitToken.unpack(data)
            tokens[token.mrenclave] = token
        return tokens

    def paging_policy(self) -> Policy:
        """Return the policy object."""
        return self.policy if isinstance(self.policy, Policy) else _POLICIES[self.policy]()

    def backing_limit_pages(self) -> int | None:
        """Return ``backing_limit`` in pages."""
        if self.backing_limit is None:
            return None
        return configured_size(self.backing_limit, "backing_limit") // PAGE_BYTES


def check_group_path(path: str, where: str) -> None:
    """Check that a group can have this path.

    Args:
        path: such as ``jobs/a``; slashes at the ends do not count.
        where: starts the message.

    Raises:
        SoftSgxError: it cannot.
    """
    if not all(group_name_ok(name) for name in path.strip("/").split("/")):
        raise SoftSgxError(f"{where}: not a path; write names, such as jobs/a")


def limit_option(path: str, size: str) -> str:
    """Return the option that limits a group, as a shell reads it."""
    import shlex  # only for advice

    path = path.strip("/")
    # A parser takes a word that begins with a dash for an option.
    return ("--limit=" if path.startswith("-") else "--limit ") + shlex.quote(f"{path}={size}")


def _named(name: str) -> str:
    """Return a key for a message, quoted if it would break the line."""
    plain = name and name.isprintable() and len(name) <= _SHOWN_CHARACTERS
    return name if plain else _shown(name)


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
    "launch_control": (bool,),
    "launch_key_hash": (str, type(None)),
    "cpusvn": (str, type(None)),
    "tokens": (list, tuple),
    "kill": (bool,),
    "sanitize": (bool,),
    "defects": (frozenset, set, list, tuple),
}
assert _KINDS.keys() == set(field_names(PlatformConfig)), "a key without its types"
