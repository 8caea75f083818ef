"""A violated property, the page that it concerns, and the token that repeats the schedule."""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from softsgx.defects import Defect
from softsgx.errors import SoftSgxError
from softsgx.runtime import Stretch

__all__ = ["Finding", "Token"]

_PREFIX = "x1-"


@dataclass(frozen=True)
class Token:
    """All that is needed to repeat one schedule.

    Attributes:
        scenario: its name.
        defects: identifiers of the defects that were on.
        seed: of the tasks' own random numbers.
        stretches: (task, number of places that it passes), in order.
        digest: CRC-32 of the places that were passed; a different one after a repetition means that
            the program has changed.
    """

    scenario: str
    defects: tuple[str, ...]
    seed: int
    stretches: tuple[Stretch, ...]
    digest: int

    def text(self) -> str:
        """Return it as one word."""
        names = sorted({task for task, _until in self.stretches})
        short = [[names.index(task), until] for task, until in self.stretches]
        document = [self.scenario, self.defects, self.seed, names, short, self.digest]
        packed = zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 9)
        return _PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the token that :meth:`text` wrote.

        Raises:
            SoftSgxError: it is none.
        """
        body = text.strip().removeprefix(_PREFIX)
        try:
            if body == text.strip():
                raise ValueError("no prefix")
            packed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            unpacked = zlib.decompressobj().decompress(packed, 1 << 20)
            scenario, defects, seed, names, short, digest = json.loads(unpacked)
            stretches = tuple((str(names[task]), int(until)) for task, until in short)
            if not set(defects) <= set(Defect):
                raise ValueError("it names a defect that is not known")
            return cls(str(scenario), tuple(map(str, defects)), int(seed), stretches, int(digest))
        except (ValueError, TypeError, IndexError, zlib.error) as error:
            raise SoftSgxError(
                f"token {text[:20]!r}…: not a token of softsgx explore ({error}); "
                "copy the whole token from its output"
            ) from None

    @property
    def defect_set(self) -> frozenset[Defect]:
        """The defects that were on."""
        return frozenset(defect for defect in Defect if defect in self.defects)


@dataclass(frozen=True)
class Finding:
    """A schedule that violates a property.

    Attributes:
        violated: name of the property: ``lost page``.
        text: what was observed.
        signature: the same for findings of one kind.
        page: address of the page that it concerns, 0 for none.
        token: repeats the schedule.
        strategy: the strategy that has found it.
        run: number of schedules of the unit of work before this one.
        steps: places of the schedule.
        switches: of the schedule.
        times: number of schedules that violate the property.
        repeats: whether the schedule violates it on a new stage, too; otherwise the violation
            depends on the state that earlier rounds have left, and the token may not repeat it.
        minimal: whether the schedule was shortened.
    """

    violated: str
    text: str
    signature: str
    page: int
    token: Token
    strategy: str
    run: int
    steps: int
    switches: int
    times: int = 1
    repeats: bool = True
    minimal: bool = False

    def seen(self, times: int) -> Finding:
        """Return it, seen so many times more."""
        return replace(self, times=self.times + times)

    def to_json(self) -> dict[str, Any]:
        """Return everything, for output and files; ``token`` as its word."""
        return {**asdict(self), "token": self.token.text()}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """Return what :meth:`to_json` wrote."""
        return cls(**{**document, "token": Token.parse(document["token"])})
