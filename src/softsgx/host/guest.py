"""A guest of a platform: a virtual machine with a core and a driver of its own in it.

::

    with Platform(epc="16MiB") as platform:
        guest = platform.guest("a", epc="16MiB", ballast="1MiB", group="guests/a")
        process = guest.process()
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from softsgx import kvm, userland
from softsgx.arch import PAGE_BYTES
from softsgx.cgroup import EpcCgroup
from softsgx.driver import Driver
from softsgx.errors import SoftSgxError
from softsgx.host.config import configured_size
from softsgx.hw import MachineConfig
from softsgx.paging import Backing, EpcCore, Policy, needed_pages
from softsgx.trace import Tracer

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["GuestPlatform", "GuestVictim", "check_ballast"]


class GuestPlatform:
    """A guest with an operating system in it.

    Args:
        guest: the virtual machine.
        policy: of its core.
        backing: makes the backing files of its enclaves, which are in its own memory.
        tracer: receives the events of its core and its driver.

    Attributes:
        guest: the virtual machine.
        core: the paging core in it.
        driver: the driver in it.
    """

    def __init__(
        self,
        guest: kvm.Guest,
        *,
        policy: Policy,
        backing: Callable[[int], Backing],
        tracer: Tracer | None = None,
    ) -> None:
        self.guest = guest
        self.core = EpcCore(guest, guest.runtime, policy=policy, dirty=(), tracer=tracer)
        self.driver = Driver(self.core, guest.runtime, backing=backing, tracer=tracer)
        self._started = False

    def start(self) -> None:
        """Start its ksgxd."""
        self.core.start()
        self.core.wait_sanitized()
        self._started = True

    def stop(self) -> None:
        """Stop its ksgxd; its enclaves stay as they are."""
        if self._started:
            self._started = False
            with suppress(kvm.GuestStoppedError):  # a stopped guest has no ksgxd any more
                self.core.stop()

    def process(self, name: str = "") -> userland.SoftProcess:
        """Return a new simulated process in the guest."""
        return userland.SoftProcess(self.guest, self.driver, name=name)

    def power_loss(self) -> None:
        """Suspend and resume, or reset, only this guest."""
        self.guest.power_transition()

    def check(self) -> None:
        """Check the guest's counts against raw state; call it while no task runs.

        Raises:
            AssertionError: a count is wrong, or a page is not in exactly one place.
        """
        self.guest.check_invariants()
        self.core.check_invariants()
        self.driver.check_invariants()


class GuestVictim:
    """A guest as the cgroup's out-of-memory handling sees it."""

    def __init__(self, guest: kvm.Guest) -> None:
        self._guest = guest
        self.name = repr(guest)

    def pages_in(self, group: EpcCgroup) -> int:
        """Return its EPC pages if it is charged below ``group``, else 0."""
        payer = self._guest.group
        below = isinstance(payer, EpcCgroup) and group in payer.ancestry()
        return self._guest.resident if below and self._guest.alive else 0

    def kill(self) -> None:
        """Take all its EPC away."""
        self._guest.stop("killed for its EPC")


def check_ballast(
    name: str,
    ballast: int | str,
    group: EpcCgroup,
    guests: Iterable[kvm.Guest],
    machine: MachineConfig,
) -> int:
    """Return a ballast in pages.

    Raises:
        SoftSgxError: it leaves too few pages to the machine, or to the guest's group.
    """
    pages = configured_size(ballast, f"guest {name}: ballast") // PAGE_BYTES
    others = sum(guest.ballast_pages for guest in guests)
    epc_pages = sum(section.pages for section in machine.sections)
    needed = needed_pages(machine)
    if pages and pages + others + needed > epc_pages:
        raise SoftSgxError(
            f"guest {name}: ballast = {ballast!r}: with the {others} pages of other guests it"
            f" leaves fewer than {needed} of {epc_pages} EPC pages; give less"
        )
    if pages and pages >= group.limit_pages():
        raise SoftSgxError(
            f"guest {name}: ballast = {ballast!r}: not below the limit of {group.path},"
            f" {group.limit_pages()} pages; give less"
        )
    return pages
