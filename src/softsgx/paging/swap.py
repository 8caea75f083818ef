"""What one enclave needs to be swapped: EWB out, ELDU in, its SECS, its VA slots, its PCMDs.

Lock order: the enclave's lock, then the VA tree's lock, then latches.  Every method whose docstring
does not say otherwise is called with the enclave's lock held.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from softsgx.arch import EpcAddr
from softsgx.paging.interfaces import BackingFile, Group, Reclaimable
from softsgx.paging.page import EpcPage
from softsgx.runtime import Lock

if TYPE_CHECKING:
    from softsgx.paging.core import EpcCore

__all__ = ["EnclaveSwap", "Pin", "Reservation", "SwapEntry"]


class Pin(Protocol):
    """The enclave's life: ``kref_get_unless_zero`` and ``kref_put``."""

    def get(self) -> bool:
        """Keep the enclave from being destroyed; ``False`` when it is dying.  Never waits."""

    def put(self) -> None:
        """Give the pin back; may destroy the enclave.  Called without any lock."""


@dataclass(slots=True)
class Reservation:
    """Everything an eviction needs, held since :meth:`EnclaveSwap.prepare`."""

    index: int


@dataclass(slots=True)
class SwapEntry:
    """Where an evicted page is.

    Attributes:
        index: page index in the enclave; the enclave's size in pages stands for the SECS.
    """

    index: int


class EnclaveSwap:
    """One enclave's half of paging; see the module for locks.

    Args:
        core: the EPC core.
        backing: where evicted pages go; this object closes it.
        pages: the enclave's size in pages (a power of two); index ``pages`` is the SECS.
        base: the enclave's linear address.
        lock: the enclave's lock.
        pin: keeps the enclave alive while the reclaimer works on its SECS or VA pages.
        kick: interrupt every processor that may be inside the enclave, now, and wait until each
            has left.
        group: who is charged for SECS and VA pages; ``None`` is the root.

    Attributes:
        secs: the EPC page of the SECS, ``None`` before :meth:`set_secs` and while it is evicted.
        children: resident pages of the enclave (secs_child_cnt).
        secs_may_leave: set it once the enclave is initialised: only then is its SECS evicted.
    """

    def __init__(
        self,
        core: EpcCore,
        backing: BackingFile,
        *,
        pages: int,
        base: int,
        lock: Lock,
        pin: Pin,
        kick: Callable[[], None],
        group: Group | None = None,
    ) -> None:
        self.secs: EpcPage | None = None
        self.children = 0
        self.secs_may_leave = False
        raise NotImplementedError

    # --- room: a VA slot for every page the enclave has -----------------------------------------

    def grow(
        self, *, cpu_node: int = 0, signal_pending: Callable[[], bool] = lambda: False
    ) -> None:
        """Promise a VA slot for one more page (the SECS counts), making a VA page if need be.

        Called WITHOUT the enclave's lock; may reclaim.

        Raises:
            NoEpc, Interrupted: there is no EPC page for it.
            LoadFailed: EPA or ELDU refused.
        """
        raise NotImplementedError

    def grow_locked(self, *, cpu_node: int = 0) -> None:
        """As :meth:`grow`, with the lock held and without reclaim.

        Raises:
            EpcBusy: as well.
        """
        raise NotImplementedError

    def shrink(self) -> None:
        """Take one promise back: a page was removed, or not added after all."""
        raise NotImplementedError

    # --- the SECS and the count of its children ---------------------------------------------------

    def set_secs(self, page: EpcPage) -> None:
        """ECREATE has made ``page`` the SECS (room for it was promised by :meth:`grow`)."""
        raise NotImplementedError

    def load_secs(self, *, cpu_node: int = 0) -> EpcPage:
        """Return the SECS page, loaded if it was evicted; never reclaims.

        Call :meth:`child_added` after a leaf that gave it a child, or :meth:`secs_idle` when none
        did.

        Raises:
            EpcBusy, NoEpc: no EPC page for it now, or at all.
            LoadFailed: ELDU refused.
        """
        raise NotImplementedError

    def child_added(self) -> None:
        """EADD or EAUG has given the enclave a resident page."""
        raise NotImplementedError

    def child_removed(self) -> None:
        """EREMOVE has taken a resident page from the enclave; does not evict the SECS."""
        raise NotImplementedError

    def secs_idle(self) -> None:
        """Let the reclaimer have a SECS that was loaded and has no child after all."""
        raise NotImplementedError

    # --- out and in -------------------------------------------------------------------------------

    def prepare(self, index: int) -> Reservation | None:
        """Reserve backing and a VA slot for page ``index``: :meth:`Reclaimable.prepare`.

        Returns:
            ``None`` when there is no backing; nothing has changed.
        """
        raise NotImplementedError

    def cancel(self, reservation: Reservation) -> None:
        """Give back what :meth:`prepare` reserved; also after :meth:`block` failed."""
        raise NotImplementedError

    def block(self, page: EpcPage) -> bool:
        """EBLOCK ``page``; every mapping of it is gone.  Sets ``page.blocked``.

        Returns:
            ``False``: it is not blocked, the reservation still stands.
        """
        raise NotImplementedError

    def write(self, page: EpcPage, reservation: Reservation) -> SwapEntry | None:
        """EWB: as it is, after ETRACK, after kicking processors out.  Ends the reservation.

        The last child takes the SECS with it.  The caller forgets ``page``, which the core frees.

        Returns:
            Where it is now.  ``None``: it is where it was, still blocked; fault handlers must back
            off (``page.blocked``) until another try has evicted it.
        """
        raise NotImplementedError

    def load(
        self,
        entry: SwapEntry,
        owner: Reclaimable | None,
        *,
        kind: str = "reg",
        cpu_node: int = 0,
        group: Group | None = None,
    ) -> EpcPage:
        """ELDU, after the VA page and the SECS: return the EPC page ``entry`` is now in.

        ``entry`` is spent.  The caller attaches the page, then marks it reclaimable.  Never
        reclaims.

        Raises:
            EpcBusy: no EPC page now; whatever was loaded on the way stays.
            NoEpc: no EPC page at all.
            LoadFailed: ELDU refused; ``entry`` stays valid and a later try may succeed.
        """
        raise NotImplementedError

    def drop(self, entry: SwapEntry) -> None:
        """Forget an evicted page (and shrink): its slot and its backing are free again."""
        raise NotImplementedError

    def destroy(self) -> None:
        """The enclave's end, all its children gone: SECS, VA pages, backing."""
        raise NotImplementedError

    def recount(self) -> None:
        """Compare every count with a slow recount (a checker)."""
        raise NotImplementedError

    @staticmethod
    def _epc(page: EpcPage) -> EpcAddr:
        return page.addr
