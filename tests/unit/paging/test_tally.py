"""Counts by label are a mapping, as a dictionary is; C code adds to them."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
from collections.abc import MutableMapping
from typing import Any

import pytest

from softsgx import compiled
from softsgx.paging.counters import Counters, Tally

needs_core = pytest.mark.skipif(compiled.speedups is None, reason=compiled.description)


def filled() -> MutableMapping[str, int]:
    tally = Tally()
    for number, label in enumerate(["reg", "va", "secs", "reg"]):
        tally[label] = tally.get(label, 0) + number
    return tally


def test_a_tally_is_used_as_a_dictionary() -> None:
    tally = filled()
    assert tally == {"reg": 3, "va": 1, "secs": 2} and tally == {"va": 1, "reg": 3, "secs": 2}
    assert tally != {"reg": 3, "va": 1} and tally == filled()
    assert list(tally) == list(tally.keys()) == ["reg", "va", "secs"], "in order of first use"
    assert list(tally.values()) == [3, 1, 2] and sum(tally.values()) == 6
    assert list(tally.items()) == [("reg", 3), ("va", 1), ("secs", 2)]
    assert dict(tally) == {**tally} == json.loads(json.dumps(dict(tally)))
    assert repr(tally) == "{'reg': 3, 'va': 1, 'secs': 2}"
    other: object = 5
    assert "va" in tally and "tcs" not in tally and other not in tally
    assert len(tally) == 3 and tally.get("tcs", 7) == 7 and tally.pop("va") == 1
    assert list(tally) == ["reg", "secs"]
    with pytest.raises(KeyError, match="va"):
        _ = tally["va"]
    with pytest.raises(KeyError, match="va"):
        del tally["va"]
    tally["va"] = 4
    assert list(tally.items()) == [("reg", 3), ("secs", 2), ("va", 4)]


def test_equal_labels_are_one_label() -> None:
    tally = Tally()
    tally["".join(["r", "eg"])] = 1
    tally["".join(["re", "g"])] += 1
    assert dict(tally) == {"reg": 2}


def test_copies_of_a_tally_are_independent() -> None:
    tally = filled()
    for other in (copy.copy(tally), copy.deepcopy(tally), pickle.loads(pickle.dumps(tally))):
        assert type(other) is type(tally) and other == tally
        other["reg"] = 0
        assert tally["reg"] == 3


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_there_is_room_for_every_label(count: int) -> None:
    tally = Tally()
    for number in range(count):
        tally[f"label {number}"] = number
    assert dict(tally) == {f"label {number}": number for number in range(count)}
    for number in range(0, count, 2):
        del tally[f"label {number}"]
    assert list(tally.values()) == [*range(1, count, 2)]


@needs_core
def test_a_count_has_64_bits_and_its_label_is_a_string() -> None:
    tally: Any = filled()
    for number in (2**63 - 1, -(2**63)):
        tally["reg"] = number
        assert tally["reg"] == number
    for label, wrong, error in [
        *(("reg", 2**63, OverflowError), ("reg", "1", TypeError), (5, 1, TypeError)),
    ]:
        with pytest.raises(error):
            tally[label] = wrong
    assert dict(tally) == {"reg": -(2**63), "va": 1, "secs": 2}


@needs_core
def test_a_tally_that_ends_leaves_nothing_behind() -> None:
    labels = [f"label {number}" for number in range(20)]

    def use() -> None:
        for _ in range(100):
            tally: Any = Tally()
            for label in labels:
                tally[label] = 1 << 40
            del tally[labels[3]]
            assert len(list(tally)) == 19 and Counters(held=tally).held is tally
            with pytest.raises(KeyError):
                _ = tally[labels[3]]

    use()
    gc.collect()
    before, blocks = [*map(sys.getrefcount, labels)], sys.getallocatedblocks()
    use()
    gc.collect()
    assert [*map(sys.getrefcount, labels)] == before
    assert sys.getallocatedblocks() - blocks < 50
