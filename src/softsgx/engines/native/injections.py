"""Failures on demand: what a program must survive, at a moment that the user names.

``power-loss@N``
    The machine loses power when programs have entered enclaves N times: every enclave is lost, as
    after suspend to memory.  Threads inside are at their asynchronous exit pointers; new enclaves
    can be made.
``init@N``
    The Nth SGX_IOC_ENCLAVE_INIT fails with EPERM, as EINIT's refusals do.
``provision``
    No process may open ``/dev/sgx_provision``: EACCES.
``noexec``
    /dev is as if mounted noexec: mmap with PROT_EXEC fails with EPERM, mprotect with EACCES.

Source:
    SDM vol. 3D, "Intel SGX Interactions with S-States"; sgx_encl_init(), ioctl.c; do_mmap(),
    mm/mmap.c.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from softsgx.errors import SoftSgxError

__all__ = ["INJECTIONS", "Injections"]

INJECTIONS = ("power-loss", "init", "provision", "noexec")
"""What can be injected, by name."""


@dataclass(slots=True)
class Injections:
    """What is still to happen.

    Attributes:
        power_losses: after how many entries the power is lost, lowest first.
        refused_inits: which INITs fail, counted from 1.
        provision: whether the provision device may be opened.
        noexec: whether devices cannot be mapped executable.
    """

    power_losses: list[int] = field(default_factory=list)
    refused_inits: set[int] = field(default_factory=set)
    provision: bool = True
    noexec: bool = False
    _inits: int = 0

    @classmethod
    def of(cls, texts: Iterable[str]) -> Injections:
        """Return what ``WHAT`` or ``WHAT@N`` of ``texts`` ask for; N is 1 by default.

        Raises:
            SoftSgxError: one is not known.
        """
        made = cls()
        for text in texts:
            what, at, when = text.partition("@")
            number = int(when) if when.isascii() and when.isdecimal() else 0 if at else 1
            if what not in INJECTIONS or number < 1 or (what in ("provision", "noexec") and at):
                raise SoftSgxError(
                    f"injection {text!r}: not known; give power-loss@N, init@N, provision or noexec"
                )
            if what == "power-loss":
                made.power_losses.append(number)
            elif what == "init":
                made.refused_inits.add(number)
            elif what == "provision":
                made.provision = False
            else:
                made.noexec = True
        made.power_losses.sort()
        return made

    def power_is_lost(self, entries: int) -> bool:
        """Return whether the power is lost now, once for each time that it was asked for.

        Args:
            entries: how often enclaves were entered until now.
        """
        if not self.power_losses or entries < self.power_losses[0]:
            return False
        del self.power_losses[0]
        return True

    def init_is_refused(self) -> bool:
        """Count an INIT; return whether it is to fail."""
        self._inits += 1
        return self._inits in self.refused_inits
