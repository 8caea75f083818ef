"""Actors do not use a page any more after they have given up a change of it.

Goal: a history fails only for what machine, core or driver did wrong.  A page whose removal or
restriction was given up in the middle is trimmed or read-only: a store to it is an EPCM violation,
and the thread rightly gets SIGSEGV.

Method: another thread stalls while it holds a claim, so that ioctls that load a page return EAGAIN;
and actors that give up after each call of a change in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.model.programs import HOLES, TRIES, Actor, Share
from tests.support.driver import System

from softsgx.arch import PageType
from softsgx.driver import Enclave
from softsgx.hw import PageFault
from softsgx.paging import Claim
from softsgx.userland import Signal


def _launched(kind: type[Actor], **options: Any) -> tuple[Any, Share, int]:
    """Return an actor, its share, and a page that it has added to the enclave."""
    system = System()
    actor = kind(system, system.process(), cpu=0, tolerant=True, **options)
    share = actor.launch(4)
    assert share is not None
    actor.step("augment", 0, 0)
    return actor, share, max(share.pages)


def _use_every_page(actor: Actor, share: Share) -> None:
    """Augment every hole, then store to every page that the actor uses, and load it."""
    for _hole in range(HOLES):
        actor.step("augment", 0, 0)
    for page in share.pages:
        actor.store(share, page, 129, page)
    actor.read_all(share)


class _Stalled(Actor):
    """After its EACCEPTs the page is evicted, and another thread stalls while it holds a claim."""

    def accept(self, share: Share, page: int, flags: int) -> bool:
        accepted = super().accept(share, page, flags)
        core, enclave = self.system.core, share.made.enclave
        epc = enclave.pages[enclave.index_of(share.made.data(page))].epc
        assert epc is not None and core.evict(epc)
        claims, self.other = core.claims, Claim()
        claims._line_up(self.other, None)
        claims.waiting(self.other, core.root)
        claims.grace_ns = 1 << 62
        return accepted


def test_a_page_whose_removal_is_given_up_while_another_thread_holds_is_used_no_more() -> None:
    actor, share, page = _launched(_Stalled)
    refused = actor.system.core.counters.alloc_busy
    actor.remove(share, page)
    assert actor.system.core.counters.alloc_busy == refused + TRIES
    actor.system.core.claims.release(actor.other)
    _use_every_page(actor, share)
    assert page in share.unsettled and page not in share.pages
    enclave: Enclave = share.made.enclave
    assert enclave.pages[enclave.index_of(share.made.data(page))].kind is PageType.TRIM


class _GivesUp(Actor):
    """Gives up after a number of calls, the last of which has its effect."""

    left = 0

    def change(self, share: Share, page: int, ioctl: Callable[[int], None]) -> bool:
        return super().change(share, page, ioctl) and self._continues()

    def inside(self, share: Share, step: Callable[[], None]) -> bool:
        return super().inside(share, step) and self._continues()

    def _continues(self) -> bool:
        self.left -= 1
        return self.left != 0


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("change", ["remove", "restrict"])
def test_a_page_whose_change_is_given_up_after_any_call_is_used_no_more(
    change: str, calls: int
) -> None:
    actor, share, page = _launched(_GivesUp)
    actor.left = calls
    getattr(actor, change)(share, page)
    assert actor.left == 0
    _use_every_page(actor, share)
    assert page in share.unsettled and page not in share.pages


class _LeavesLate(Actor):
    """Gets SIGBUS at its first exit, as when the page of its TCS cannot be loaded."""

    refused = False

    def _leave(self) -> None:
        super()._leave()
        if not self.refused:
            self.refused = True
            raise Signal("SIGBUS", PageFault(0))


def test_a_step_inside_is_done_once_however_often_the_actor_has_to_enter() -> None:
    actor, share, page = _launched(_LeavesLate)
    actor.refused = False
    done: list[int] = []
    assert actor.inside(share, lambda: done.append(page))
    assert actor.refused and done == [page]
