"""Scenarios by name: the built-in ones, the stories of known defects, and those of users."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

from softsgx.errors import SoftSgxError
from softsgx.explore.guest_scenarios import GUEST_SCENARIOS
from softsgx.explore.scenarios import HOST_SCENARIOS
from softsgx.explore.stage import Scenario, Stage
from softsgx.runtime import Script
from softsgx.sim.stories import STORIES, Scene, Story

__all__ = ["BUILT_IN", "NamedScenario", "find_scenario"]

_STORY = "story:"


@dataclass(frozen=True)
class NamedScenario:
    """A scenario.

    Attributes:
        name: how a user names it: ``fault-reclaim``, ``story:B11``, ``module:function``.
        summary: what races, as one sentence.
        scenario: sets the stage.
        step_limit: places after which a race of it is in a livelock; ``None``: the usual number.
        races: whether it has more than one schedule.
    """

    name: str
    summary: str
    scenario: Scenario
    step_limit: int | None = None
    races: bool = True


def _built_in() -> dict[str, NamedScenario]:
    functions = {**HOST_SCENARIOS, **GUEST_SCENARIOS}
    return {name: NamedScenario(name, _summary(run), run) for name, run in functions.items()}


def _summary(function: Callable[..., object]) -> str:
    return (function.__doc__ or "").partition("\n")[0]


BUILT_IN = _built_in()
"""The built-in scenarios by name."""


def find_scenario(name: str) -> NamedScenario:
    """Return a scenario.

    Args:
        name: of a built-in one; ``story:B11``, the story of a defect; or ``module:function``, a
            function of yours that sets a stage.

    Raises:
        SoftSgxError: there is none of that name.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith(_STORY):
        return _story(name.removeprefix(_STORY))
    module, colon, function = name.partition(":")
    if colon:
        return _of_user(name, module, function)
    raise SoftSgxError(
        f"scenario {name!r}: not known; softsgx explore --list has the names, and yours is"
        " MODULE:FUNCTION"
    )


def _of_user(name: str, module: str, function: str) -> NamedScenario:
    here = os.getcwd()
    if here not in sys.path:  # as ``python -m`` finds modules
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SoftSgxError(
            f"scenario {name!r}: {error}; give MODULE:FUNCTION, importable from here"
        ) from error
    if not callable(found):
        raise SoftSgxError(f"scenario {name!r}: not a function; give MODULE:FUNCTION")
    return NamedScenario(name, _summary(found), found)


def _story(identifier: str) -> NamedScenario:
    story = next((story for defect, story in STORIES.items() if defect == identifier), None)
    if story is None:
        raise SoftSgxError(
            f"scenario 'story:{identifier}': no defect with a story; see softsgx defects list"
        )
    races = story.races or isinstance(story.policy, Script)
    return NamedScenario(
        f"{_STORY}{identifier}", story.holds, partial(_set_story, story), story.step_limit, races
    )


class _StagedScene(Scene):
    """A scene whose tasks race under the schedule that is explored."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.runtime, stage.defects, stage.tracer)
        object.__setattr__(self, "_stage", stage)

    def together(self, **runs: Callable[[], object]) -> None:
        """As :meth:`Scene.together`; only this is scheduled."""
        stage: Stage = self._stage  # type: ignore[attr-defined]
        stage.race(runs)


def _set_story(story: Story, stage: Stage) -> None:
    if story.races or isinstance(story.policy, Script):
        stage.body = lambda: story.scenario(_StagedScene(stage))
    else:
        # One task whose steps count, so that a story without end is found to be a livelock.
        scene = Scene(stage.runtime, stage.defects, stage.tracer)
        stage.body = lambda: stage.race({"story": lambda: story.scenario(scene)})
