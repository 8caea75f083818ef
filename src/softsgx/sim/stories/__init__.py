"""Stories: one small program for each known defect that can be switched on.

A story runs a scenario on the components of this package and checks one property.  The property
holds in the fixed form and is violated in the broken one.  ``STORIES`` maps each :class:`~softsgx.
defects.Defect` to its :class:`Story`; defects with one symptom share a story.

>>> from softsgx.defects import Defect
>>> from softsgx.sim.stories import STORIES
>>> story = STORIES[Defect.CONCURRENT_EAUG_REFUSED]
>>> story.holds
'Two threads that touch the same hole of an enclave both get its page.'
>>> story.tell().violation is None
True

A story is also a program for the schedule searches of :mod:`softsgx.runtime`, which fails when the
property is violated.  It builds its state on the runtime that the search passes to it::

    explore(story.program({Defect.CONCURRENT_EAUG_REFUSED}), seeds=range(1000))
    explore_all(story.program(), preemptions=2)

Where ``story.races`` is false the scenario has one task and every schedule is the same.
"""

from softsgx.sim.stories import backing, core, faults, guests, leaves, lifetimes, limits, mappings
from softsgx.sim.stories.story import STORIES, Outcome, PropertyViolated, Scene, Story

__all__ = ["STORIES", "Outcome", "PropertyViolated", "Scene", "Story"]

# Importing a module of stories registers them.
_MODULES = (backing, core, faults, guests, leaves, lifetimes, limits, mappings)
