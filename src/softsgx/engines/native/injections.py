"""Failures on demand and their times: the values of ``--inject`` and ``--tick``.

``power-loss@N``, ``power-loss@SIGUSR1``, ``power-loss@SIGUSR2``
    The machine loses power when programs have entered enclaves N times, or each time that the
    supervisor receives the signal: every enclave is lost, as after suspend to memory.
``init@N``, ``init=SGX_INVALID_MEASUREMENT@N``, ``init=#GP@N``
    EINIT of the Nth SGX_IOC_ENCLAVE_INIT returns a status, or faults.  Linux's ioctl fails with
    EPERM, or with EIO.
``poison@N``
    The memory of the EPC page that the Nth page fault maps has an uncorrected error.
``provision``
    No process may open ``/dev/sgx_provision``: EACCES.
``noexec``
    /dev is as if mounted noexec: mmap with PROT_EXEC fails with EPERM, mprotect with EACCES.

Source:
    SDM vol. 3D, "EINIT", "Intel SGX Interactions with S-States"; sgx_encl_init(), ioctl.c;
    arch_memory_failure(), main.c; do_mmap(), mm/mmap.c.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable

from softsgx.arch import Status
from softsgx.errors import SoftSgxError
from softsgx.hw import Fault, GeneralProtection, PageFault
from softsgx.ondemand import dataclass, field, pattern

__all__ = ["EINIT_OUTCOMES", "INJECTIONS", "Injections", "tick_period_ns"]

INJECTIONS = ("power-loss", "init", "poison", "provision", "noexec")
"""What can be injected, by name."""

EINIT_OUTCOMES: dict[str, Status | Fault] = {
    **{
        status.manual_name: status
        for status in (
            Status.INVALID_SIGNATURE,  # the first is what init@N gives
            Status.INVALID_SIG_STRUCT,
            Status.INVALID_ATTRIBUTE,
            Status.INVALID_MEASUREMENT,
            Status.INVALID_EINITTOKEN,
            Status.INVALID_CPUSVN,
            Status.UNMASKED_EVENT,
        )
    },
    "#GP": GeneralProtection(),
    "#PF": PageFault(0),
}
"""How EINIT can end without success, by name."""

_FORMS = (
    "power-loss@N, power-loss@SIGUSR1, init@N, init=STATUS@N (SGX_INVALID_MEASUREMENT, #GP, …), "
    "poison@N, provision or noexec"
)
_SIGNALS = {"SIGUSR1": signal.SIGUSR1, "SIGUSR2": signal.SIGUSR2}
_NUMBER = pattern(r"[0-9]{1,18}")
_PERIOD = pattern(r"([0-9]{1,9})(us|ms|s)")
_NS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
_SHORTEST_NS, _LONGEST_NS = 1_000_000, 1_000_000_000


@dataclass(slots=True)
class Injections:
    """What is to go wrong.

    Attributes:
        power_losses: after how many entries the power is lost, lowest first.
        power_signals: signals to the supervisor that take the power.
        refused_inits: how EINIT ends in the INITs that fail, which are counted from 1.
        poisoned_faults: which page faults map a page that is poisoned then, counted from 1.
        provision: whether the provision device may be opened.
        noexec: whether devices cannot be mapped executable.
    """

    power_losses: list[int] = field(default_factory=list)
    power_signals: set[int] = field(default_factory=set)
    refused_inits: dict[int, Status | Fault] = field(default_factory=dict)
    poisoned_faults: set[int] = field(default_factory=set)
    provision: bool = True
    noexec: bool = False

    @classmethod
    def of(cls, texts: Iterable[str]) -> Injections:
        """Return what ``WHAT`` or ``WHAT@WHEN`` of ``texts`` ask for; a number is 1 by default.

        Raises:
            SoftSgxError: one is not known.
        """
        made = cls()
        for text in texts:
            what, at, when = text.partition("@")
            if not made._add(what, when if at else None):
                raise SoftSgxError(f"injection {text!r}: not known; give {_FORMS}")
        made.power_losses.sort()
        return made

    def _add(self, what: str, when: str | None) -> bool:
        """Add one; ``False``: it is not known."""
        number = 1 if when is None else int(when) if _NUMBER.fullmatch(when) else 0
        what, named, outcome = what.partition("=")
        if named and (what != "init" or outcome not in EINIT_OUTCOMES):
            return False
        match what:
            case "power-loss" if when in _SIGNALS:
                self.power_signals.add(_SIGNALS[when])
            case "power-loss" if number:
                self.power_losses.append(number)
            case "init" if number:
                self.refused_inits[number] = EINIT_OUTCOMES[outcome or next(iter(EINIT_OUTCOMES))]
            case "poison" if number:
                self.poisoned_faults.add(number)
            case "provision" if when is None:
                self.provision = False
            case "noexec" if when is None:
                self.noexec = True
            case _:
                return False
        return True


def tick_period_ns(text: str, option: str = "tick") -> int:
    """Return the nanoseconds that ``4ms``, ``1500us`` or ``1s`` says.

    Raises:
        SoftSgxError: it is no such text, or not between a millisecond and a second.
    """
    match = _PERIOD.fullmatch(text)
    period_ns = int(match[1]) * _NS[match[2]] if match else 0
    if not _SHORTEST_NS <= period_ns <= _LONGEST_NS:
        raise SoftSgxError(f"{option} {text!r}: not the period of a timer; give 1ms to 1s, as 4ms")
    return period_ns
