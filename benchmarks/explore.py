"""How many schedules a second ``softsgx explore`` tries, and how soon it finds known defects.

Prints one JSON object: for each scenario schedules, places and switches a second of processor time
on one core; for each defect the schedules and the seconds until it is found.
"""

from __future__ import annotations

import argparse
import json

from softsgx.explore import BUILT_IN
from softsgx.explore.corpus import HUNTED_IN, hunt_all
from softsgx.explore.work import Unit, run_unit

RUNS = 100
LONG_RUNS = 2000


def scenario(name: str, strategy: str, runs: int) -> dict[str, float]:
    """Measure one scenario; a unit before it does the imports."""
    run_unit(Unit(0, name, (), strategy, runs, 5))
    result = run_unit(Unit(1, name, (), strategy, 0, runs))
    coverage, seconds = result.coverage, result.seconds
    return {
        "schedules_per_second": round(coverage.runs / seconds, 1),
        "places_per_second": round(coverage.steps / seconds),
        "switches_per_second": round(coverage.switches / seconds),
        "places": round(coverage.steps / coverage.runs, 1),
        "distinct": len(coverage.distinct),
        "findings": len(result.findings),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="for symmetry: it is always JSON")
    parser.add_argument("--long", action="store_true", help="more schedules, and every defect")
    parser.add_argument("--strategy", default="random", help="of the schedules (default random)")
    parser.add_argument("scenarios", nargs="*", help="names; all built-in")
    args = parser.parse_args()
    runs = LONG_RUNS if args.long else RUNS
    names = args.scenarios or list(BUILT_IN)
    hunts = list(hunt_all([] if args.long else list(HUNTED_IN)))
    document = {
        "strategy": args.strategy,
        "scenarios": {name: scenario(name, args.strategy, runs) for name in names},
        "defects": {
            one.defect: {
                "scenario": one.scenario,
                "found": one.finding is not None,
                "schedules": one.runs,
                "seconds": round(one.seconds, 3),
            }
            for one in hunts
        },
    }
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
