"""VIRTCHILDCNT: pages of an enclave that the host has evicted and the guest still counts.

Every function is called with ``Monitor.lock`` held, during :meth:`Monitor.host_working`.

Source:
    SDM vol. 3D, "EINCVIRTCHILD", "EDECVIRTCHILD".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from softsgx.arch import Status
from softsgx.paging import SgxEpcPage, result_name

if TYPE_CHECKING:
    from softsgx.kvm.page import VepcPage

__all__ = ["add_virtual_child", "remove_virtual_child"]


def add_virtual_child(page: VepcPage, epc: SgxEpcPage, secs: VepcPage) -> bool:
    """Execute EINCVIRTCHILD for ``page``, which is in ``epc``; ``False``: the leaf has failed."""
    monitor = page.vepc.monitor
    assert secs.epc is not None, f"{page!r} is resident, its SECS is not"
    at = secs.epc.addr
    result = monitor.host_leaf(lambda: monitor.host.leaves.eincvirtchild(epc.addr, at))
    return result is Status.SUCCESS


def remove_virtual_child(page: VepcPage, epc: SgxEpcPage, secs: VepcPage) -> None:
    """Execute EDECVIRTCHILD for ``page`` through ``epc``, a page of the enclave or its SECS."""
    monitor = page.vepc.monitor
    assert secs.epc is not None, f"{secs!r} counts virtual children, but is evicted"
    at = secs.epc.addr
    result = monitor.host_leaf(lambda: monitor.host.leaves.edecvirtchild(epc.addr, at))
    assert result is Status.SUCCESS, f"EDECVIRTCHILD for {page!r}: {result_name(result)}"
