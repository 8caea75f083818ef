"""Histories of all leaves on several processors, against a reference made of dictionaries.

Goal: the properties that hold everywhere.  After every step each EPC page is in one place and as
the reference has it, counts agree with a recount, no lock is left; every leaf and every access
ends as the reference says; one that refuses changes nothing; no version is used twice under one
key; no plaintext is in anything that a leaf gives to the operating system.

Method: Hypothesis drives two processors and an operating system that is careless, hostile and
now and then careful; the reference (``tests.support.dictionary``) shares no code with ``hw``.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, settings
from tests.support.dictionary import NEEDS_ETRACK, Child, Dictionary, Enc, Thread
from tests.support.inhabited import DATA, Inhabited
from tests.support.machines import BASE, CPUS, EPC, NEEDS, OK, Machines
from tests.support.paging import outcome as ends

from softsgx.arch import PageType, Status
from softsgx.trace import Event

# How often a long walk does what, and with what besides a number.
_LOADS = ["eldu", "eldu", "elduc", "elduc", "eldb", "eldbc"]
WALK: list[tuple[int, str, Callable[[random.Random], dict[str, object]]]] = [
    (1, "build", lambda rng: {}),
    (1, "make_va", lambda rng: {"number": 0}),
    (2, "block_what_somebody_uses", lambda rng: {"number": rng.randrange(9999)}),
    (1, "eblock", lambda rng: {"number": rng.randrange(9999)}),
    (6, "etrack", lambda rng: {"number": rng.randrange(9999), "by_child": rng.random() < 0.5}),
    (1, "eremove", lambda rng: {"number": rng.randrange(9999)}),
    (1, "erdinfo", lambda rng: {"number": rng.randrange(9999)}),
    (3, "ewb", lambda rng: {"number": rng.randrange(9999), "other": rng.randrange(9999)}),
    (
        14,
        "load_what_can_be_loaded",
        lambda rng: {"number": rng.randrange(9999), "name": rng.choice(_LOADS)},
    ),
    (
        2,
        "load_anything_anywhere",
        lambda rng: {
            "numbers": tuple(rng.randrange(9999) for _ in range(4)),
            "name": rng.choice(["eldu", "eldbc"]),
        },
    ),
    (6, "evict_carefully", lambda rng: {"number": rng.randrange(9999), "out": rng.random() < 0.1}),
    (
        12,
        "enter",
        lambda rng: {
            "number": rng.randrange(9999),
            "cpu": rng.randrange(CPUS),
            "thread": rng.randrange(2),
        },
    ),
    (1, "leave", lambda rng: {"number": rng.randrange(9999), "aex": rng.random() < 0.6}),
    (
        30,
        "touch",
        lambda rng: {
            "number": rng.randrange(9999),
            "page": rng.choice([0, 1, 2, 8, 10, 10, 10]),
            "at": rng.randrange(250),
            "write": rng.random() < 0.5,
        },
    ),
    (1, "eaug", lambda rng: {"number": rng.randrange(9999)}),
    (
        1,
        "emodpr",
        lambda rng: {"number": rng.randrange(9999), "rights": rng.choice([0, 1, 1, 3, 5])},
    ),
    (1, "trim", lambda rng: {"number": rng.randrange(9999)}),
    (5, "accept", lambda rng: {"number": rng.randrange(9999), "which": rng.randrange(9999)}),
    (
        2,
        "extend",
        lambda rng: {
            "number": rng.randrange(9999),
            "which": rng.randrange(9999),
            "rights": rng.choice([1, 3, 7]),
        },
    ),
    (1, "start_again", lambda rng: {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(16))
def test_a_long_walk_agrees_with_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    machines = Machines()
    machines.start(fast=seed % 2 == 0)
    weights, names, arguments = zip(*WALK, strict=True)
    for step in range(900):
        if step == 700 and seed % 4 == 3:
            machines.lose_power(number=4)
        chosen = rng.choices(range(len(WALK)), weights)[0]
        name = names[chosen]
        if name not in NEEDS or NEEDS[name](machines):
            getattr(machines, name)(**arguments[chosen](rng))
            machines.every_epc_page_is_in_one_place_and_as_it_must_be()
    machines.every_processor_is_where_the_reference_has_it()


Machines.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


TestMachines = pytest.mark.slow(Machines.TestCase)


# --- the same seed, the same events ------------------------------------------------------------


def history(seed: int) -> list[str]:
    """Return the events of a random program on a machine of its own."""
    events: list[Event] = []
    e = Inhabited(threads=2, tracer=events.append)
    rng = random.Random(seed)
    for _ in range(60):
        offset, cpu = rng.choice(DATA), rng.randrange(2)
        doing = rng.choice(["block", "track", "ewb", "eldu", "enter", "resume", "interrupt"])
        if doing == "eldu" and offset not in e.blobs:
            continue
        if doing in ("enter", "resume") and e.cpu(cpu).inside is not None:
            continue
        operand = {"track": (), "block": (offset,), "ewb": (offset,), "eldu": (offset,)}
        ends(partial(getattr(e, doing), *operand.get(doing, (cpu,))))
    return [event.line() for event in events]


@pytest.mark.parametrize("seed", range(5))
def test_the_same_program_gives_the_same_events(seed: int) -> None:
    first = history(seed)
    assert first == history(seed) and len(first) > 100
    assert first != history(seed + 100)


def test_the_reference_would_notice_a_page_that_leaves_too_early() -> None:
    model = Dictionary()
    enc = model.enclaves[1] = Enc(1, BASE, EPC[0], [Thread(0)])
    model.place = {EPC[0]: ("secs", 1), EPC[1]: Child(1, 0, PageType.REG, 3, None)}
    model.place[EPC[2]], model.slots[EPC[2]] = "va", {}
    model.do_enter(0, enc, enc.threads[0], resume=False)
    model.do_mark(EPC[1], block=True)
    child = model.place[EPC[1]]
    assert isinstance(child, Child) and child.mark == NEEDS_ETRACK
    assert model.expect_ewb(EPC[1], EPC[2]) == Status.NOT_TRACKED
    model.do_etrack(enc)
    assert model.expect_ewb(EPC[1], EPC[2]) == Status.NOT_TRACKED
    model.do_leave(0, enc, aex=False)
    assert model.expect_ewb(EPC[1], EPC[2]) == OK
