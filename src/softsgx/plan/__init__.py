"""How much EPC an application needs, and the cost of less: its accesses replayed at many sizes.

:func:`plan` is a pure function of traces, host, policies and prices.  ``curves`` and ``policies``
compute misses of caches in general; ``core_replay`` replays accesses through the EPC core, and
``linux_replay`` through a compiled copy of its policy.

Needs numpy, numba and pyarrow (``softsgx[plan]``), which are imported at first use.
"""

from typing import TYPE_CHECKING

from softsgx.ondemand import on_demand

if TYPE_CHECKING:
    from softsgx.plan.loading import PlannedTrace
    from softsgx.plan.planner import Host, Options, plan
    from softsgx.plan.policies import POLICIES
    from softsgx.plan.result import Plan

__all__ = ["POLICIES", "Host", "Options", "Plan", "PlannedTrace", "plan"]

__getattr__ = on_demand(
    __name__,
    {
        "loading": ("PlannedTrace",),
        "planner": ("Host", "Options", "plan"),
        "policies": ("POLICIES",),
        "result": ("Plan",),
    },
)
