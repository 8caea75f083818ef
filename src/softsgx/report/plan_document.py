"""A plan as one JSON object; ``docs/reference/plan-json.md`` describes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import softsgx
from softsgx.costs import CostProfile, Price
from softsgx.plan.result import Plan, SizeResult, Slowdown

__all__ = ["PLAN_FORMAT", "plan_document"]

PLAN_FORMAT = "softsgx-plan/1"


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return the object."""
    recommendation = plan.recommendation
    return {
        "format": PLAN_FORMAT,
        "version": softsgx.__version__,
        "recommendation": {
            "text": recommendation.text,
            "epc_bytes": recommendation.epc_bytes,
            "limit_bytes": recommendation.limit_bytes,
            "kubernetes": recommendation.kubernetes,
            "slowdown": _slowdown(recommendation.slowdown),
        },
        "remarks": list(plan.remarks),
        "target_slowdown": plan.target_slowdown,
        "base_seconds": plan.base_seconds or None,
        "footprint_pages": plan.footprint_pages,
        "overhead_pages": plan.overhead_pages,
        "options": dict(plan.options),
        "traces": [asdict(trace) for trace in plan.traces],
        "sizes": [_size(size) for size in plan.sizes],
        "policies": [
            {
                "policy": policy.policy,
                "epc_bytes": list(policy.capacities),
                "loads": list(policy.loads),
            }
            for policy in plan.policies
        ],
        "curve": asdict(plan.curve),
        "residency": asdict(plan.residency),
        "costs": _costs(plan.costs),
    }


def _size(size: SizeResult) -> dict[str, Any]:
    rate = size.loads_per_second
    return {
        "epc_bytes": size.epc_bytes,
        "possible": size.possible,
        "certain": size.certain,
        "overhead_pages": size.overhead_pages,
        "faults": size.faults,
        "made": size.made,
        "loads": size.loads,
        "evictions": size.evictions,
        "loads_per_second": None if rate is None else round(rate, 3),
        "slowdown": _slowdown(size.slowdown),
        "low_cycles": size.estimate.low,
        "typical_cycles": size.estimate.typical,
        "high_cycles": size.estimate.high,
        "enclaves": [asdict(enclave) for enclave in size.enclaves],
        "groups": [asdict(group) for group in size.groups],
    }


def _slowdown(slowdown: Slowdown | None) -> dict[str, float] | None:
    if slowdown is None:
        return None
    return {name: round(value, 6) for name, value in asdict(slowdown).items()}


def _costs(costs: CostProfile) -> dict[str, Any]:
    return {
        "profile": costs.name,
        "hertz": costs.hertz,
        "basis": costs.basis_text,
        "prices": [_price(price) for price in (*costs.prices.values(), costs.swap)],
    }


def _price(price: Price) -> dict[str, Any]:
    return {
        "event": price.event,
        "what": price.what,
        "low_cycles": price.low,
        "typical_cycles": price.typical,
        "high_cycles": price.high,
        "basis": price.basis,
        "printed": price.printed or None,
        "source": price.source,
    }
