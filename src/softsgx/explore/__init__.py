"""Finds races: runs scenarios on a small platform under many schedules and checks properties.

A *scenario* sets a stage: a platform, enclaves whose content is known, tasks.  The tasks race under
the schedules of a *strategy*.  The arena checks every property of the model: counts at every place
where pages were allocated or freed, and all properties when the race is over.
"""

from softsgx.explore.finding import Finding, Token
from softsgx.explore.registry import BUILT_IN, NamedScenario, find_scenario
from softsgx.explore.stage import Inhabitant, Stage, StagedEnclave
from softsgx.explore.strategies import STRATEGIES
from softsgx.explore.violation import Violation

__all__ = [
    "BUILT_IN",
    "STRATEGIES",
    "Finding",
    "Inhabitant",
    "NamedScenario",
    "Stage",
    "StagedEnclave",
    "Token",
    "Violation",
    "find_scenario",
]
