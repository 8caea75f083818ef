"""Large tables of cases: whole in ``test``, a sample of them in ``quick``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["sampled"]


def sampled(cases: Iterable[Any], every: int = 7) -> list[Any]:
    """Return the cases as parameters; all but each ``every``-th are marked ``exhaustive``.

    Args:
        cases: values, tuples of values or ``pytest.param``.
        every: the distance of two cases of the sample; coprime to the lengths of the table's axes,
            so that the sample meets each row and each column.
    """
    return [case if index % every == 0 else _exhaustive(case) for index, case in enumerate(cases)]


def _exhaustive(case: Any) -> Any:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, id=case.id, marks=(*case.marks, pytest.mark.exhaustive))
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.exhaustive)
