"""What fork copies of an address space is its parent's, and each goes on by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from softsgx.engines.native.tracing.process_image import ProcessImage
from softsgx.engines.native.vdso.path_calls import PathStubs
from softsgx.engines.native.x86.rewrite import Places


def test_replaced_instructions_and_stubs_of_a_parent_are_those_of_its_child() -> None:
    parent = SimpleNamespace(
        permits_at=1,
        loader=2,
        cpuid_stubs=object(),
        cpuid_sites=Places(),
        path_stubs=PathStubs(0x5000),
    )
    parent.cpuid_sites.add(0x1000, {4, 9})
    parent.path_stubs.stops[7] = 1
    child: Any = SimpleNamespace()
    ProcessImage._copy(child, cast(ProcessImage, parent))
    assert (child.permits_at, child.loader, child.cpuid_stubs) == (1, 2, parent.cpuid_stubs)
    assert set(child.cpuid_sites) == {0x1004, 0x1009}
    assert child.path_stubs.stops == {7: 1}
    child.cpuid_sites.add(0x2000, {1})
    parent.cpuid_sites.add(0x3000, {1})
    child.path_stubs.stops[8] = 1
    assert set(child.cpuid_sites) == {0x1004, 0x1009, 0x2001}
    assert set(parent.cpuid_sites) == {0x1004, 0x1009, 0x3001}
    assert parent.path_stubs.stops == {7: 1}
