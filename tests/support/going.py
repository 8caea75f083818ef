"""Made-up sequences of accesses in which pages leave their enclaves, and enclaves end."""

from __future__ import annotations

import random

import numpy as np

from softsgx.plan.scene import ENDS, GOES, Scene

__all__ = ["with_ends", "with_removals"]


def with_removals(chance: random.Random, pages: int, records: int, share: float) -> list[int]:
    """Return accesses to ``pages`` pages; a share of the records removes a page that is there."""
    there: set[int] = set()
    found: list[int] = []
    while len(found) < records:
        if there and chance.random() < share:
            page = chance.choice(sorted(there))
            there.remove(page)
            found.append(page | GOES)
        else:
            page = int(pages * chance.random() ** 2)
            there.add(page)
            found.append(page)
    return found


def with_ends(chance: random.Random, scene: Scene, share: float, ends: float) -> np.ndarray:
    """Return the accesses of a scene with removals between them, and enclaves that end."""
    there: set[int] = set()
    found: list[int] = []
    (accesses,) = scene.parts
    for access in accesses.tolist():
        if there and chance.random() < share:
            page = chance.choice(sorted(there))
            there.remove(page)
            found.append(page | GOES)
        if chance.random() < ends:
            enclave = chance.choice(scene.enclaves)
            own = range(enclave.first, enclave.first + enclave.pages)
            found += [page | GOES for page in own if page in there]
            there.difference_update(own)
            found.append(enclave.first | GOES | ENDS)
        there.add(access)
        found.append(access)
    return np.array(found, np.uint32)
