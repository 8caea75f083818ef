"""How much EPC an application needs, and what less costs: its accesses replayed at many sizes.

:func:`plan` is a pure function of traces, host, policies and prices.  ``curves`` and ``policies``
are what-if for caches in general; ``core_replay`` and ``linux_replay`` replay through the EPC core.

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
