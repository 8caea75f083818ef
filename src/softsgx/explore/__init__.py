"""Finding races: scenarios on a small platform, run under many schedules, and what they violate.

A *scenario* sets a stage: a platform, enclaves whose content is known, tasks.  The tasks race under
the schedules of a *strategy*, and every property that the model has is checked: counts at every
place where pages were allocated or freed, everything when the race is over.
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
