"""The system of the stories, for tests of the driver; and signatures that do not fit."""

from __future__ import annotations

from typing import Any

from tests.support.hw import signed

from softsgx.arch import Attributes, AttributesFlags, Secs, SigStruct
from softsgx.image import Plan, measure
from softsgx.sim.stories import system
from softsgx.sim.stories.system import (
    BASE,
    DATA_OFFSET,
    RW,
    RWX,
    SECINFO_RW,
    SECINFO_RWX,
    SECINFO_TCS,
    SSA_OFFSET,
    Launched,
    System,
    build,
    errno_of,
    launch,
    layout_runs,
    pattern,
    plan_for,
    secs_bytes,
    tcs_bytes,
)

__all__ = [
    "BASE",
    "DATA_OFFSET",
    "RW",
    "RWX",
    "SECINFO_RW",
    "SECINFO_RWX",
    "SECINFO_TCS",
    "SSA_OFFSET",
    "Launched",
    "System",
    "build",
    "errno_of",
    "launch",
    "layout_runs",
    "pattern",
    "plan_for",
    "secs_bytes",
    "sigstruct_for",
    "tcs_bytes",
    "unsigned",
]


def sigstruct_for(plan: Plan, flags: int = AttributesFlags.MODE64BIT, **fields: Any) -> bytes:
    """A SIGSTRUCT for a plan, signed with the session's key; made once where no field differs."""
    if not fields:
        return system.sigstruct_for(plan, flags)
    secs = Secs(size=plan.size, attributes=Attributes(flags=int(flags), xfrm=3))
    return signed(measure(plan), secs, **fields).pack()


def unsigned(sigstruct: bytes, **fields: object) -> bytes:
    """A SIGSTRUCT with fields changed after it was signed."""
    return SigStruct.unpack(sigstruct).replace(**fields).pack()
