"""The directory of a campaign: results are appended, so that a campaign can be continued."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from softsgx.errors import SoftSgxError
from softsgx.explore.campaign import Campaign
from softsgx.explore.work import UnitResult
from softsgx.workers import Journal

__all__ = ["Store"]


class Store:
    """A directory with ``campaign.json``, the parameters, and ``units.jsonl``, one result a line.

    Args:
        directory: made if it does not exist.
        campaign: its parameters; a campaign that is already in the directory must have the same,
            except for its budget.

    Raises:
        SoftSgxError: another campaign is in the directory, or it cannot be written.
    """

    def __init__(self, directory: str, campaign: Campaign) -> None:
        self._path = Path(directory)
        self._units = Journal(self._path / "units.jsonl")
        wanted = _without_budget(campaign)
        about = self._path / "campaign.json"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            if about.exists():
                self._compare(json.loads(about.read_text()), wanted)
            else:
                about.write_text(json.dumps(wanted, indent=2) + "\n")
        except (OSError, ValueError) as error:
            raise SoftSgxError(f"{directory}: {error}; give another directory") from error

    def _compare(self, found: Any, wanted: dict[str, Any]) -> None:
        different = [key for key in wanted if found.get(key) != json.loads(json.dumps(wanted[key]))]
        if different:
            raise SoftSgxError(
                f"{self._path}: has a campaign with other {', '.join(different)}; give the same"
                " arguments, or another directory"
            )

    def results(self) -> list[UnitResult]:
        """Return the stored results, without a last line that is incomplete."""
        found = []
        for number, entry in self._units.entries():
            try:
                found.append(UnitResult.from_json(entry))
            except (ValueError, KeyError, TypeError) as error:
                raise SoftSgxError(
                    f"{self._units.path}:{number}: not a result of explore; give another --out"
                ) from error
        return found

    def append(self, result: UnitResult) -> None:
        """Add one result; it is in the file when this returns."""
        self._units.append(result.to_json())


def _without_budget(campaign: Campaign) -> dict[str, Any]:
    document = asdict(campaign)
    del document["budget"]
    return document
