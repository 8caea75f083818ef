"""A platform's description: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.arch import PAGE_BYTES
from softsgx.defects import Defect
from softsgx.errors import SoftSgxError
from softsgx.host import PROFILES, Platform, PlatformConfig
from softsgx.paging import needed_pages


def test_sizes_as_text_are_rounded_down_to_pages_with_a_message() -> None:
    config = PlatformConfig.of(epc="3.3MiB", groups={"a": {"max": "12M"}, "b": {"max": "1MiB"}})
    assert config.section_bytes() == [844 * PAGE_BYTES]
    assert config.group_max_pages("a") == 2929
    assert config.roundings() == [
        "epc = '3.3MiB': rounded down to 844 pages (3376KiB)",
        "groups.a.max = '12M': rounded down to 2929 pages (11716KiB)",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epc": "much"}, "epc = 'much'"),
        ({"epc": "80KiB"}, "20 pages are too few; give at least 25 (100KiB)"),
        ({"groups": {"a": {"max": 0}}}, "groups.a.max = 0: 0 pages are too few; give at least 25"),
        ({"epc": 114689}, "multiples of 4096"),
        ({"epc": True}, "epc = True"),
        ({"epc": ("1MiB",) * 9}, "9 sections"),
        ({"processors": 0}, "processors = 0: too few"),
        ({"profile": "sgx9"}, "sgx2-server"),
        ({"policy": "psychic"}, "linux, fifo, clock"),
        ({"backing": "tape"}, "memory or file"),
        ({"backing_limit": "x"}, "backing_limit"),
        ({"groups": {"a": {"min": 1}}}, "groups.a: 'min'"),
        ({"groups": {"a": {"max": "lots"}}}, "groups.a.max"),
        ({"defects": ["B99"]}, "'B99': unknown"),
        ({"colour": "red"}, "colour: unknown; give some of epc, processors"),
        ({"epc": "9" * 400 + "MiB"}, "epc = '9999"),
        ({"epc": "99999999999999999999GiB"}, "give 0 to 2**64 bytes"),
        ({"epc": "٤٠٩٦٠٠"}, "not a size"),
        ({"processors": 1 << 30}, "at most 8192"),
        ({"seed": 1 << 20000}, "(a number of 20001 bits)"),
        ({"groups": {"a": 5}}, "groups.a = 5: not a table"),
        ({"groups": {"a": ["max"]}}, "groups.a = (a list of 1): not a table"),
        ({"groups": {"a": {"max": -4096}}}, "groups.a.max = -4096"),
        ({"groups": {"a": {"max": 1.5}}}, "groups.a.max = 1.5"),
        ({"groups": {"a/../b": {"max": 0}}}, "not a path"),
        ({"groups": {"": {"max": 0}}}, "not a path"),
        ({"groups": {"/": {"max": 0}}}, "not a path"),
        ({"groups": {"a//b": {"max": 0}}}, "not a path"),
        ({"groups": {"misc.max": {"max": 0}}}, "not a path"),
        ({"groups": {"a\nb": {"max": 0}}}, "groups.'a\\nb': not a path"),
        ({"groups": {"a" * 256: {"max": 0}}}, "not a path"),
        ({"backing_limit": -5}, "backing_limit = -5"),
        ({"backing_directory": "/nowhere/at/all"}, "not a directory that can be written"),
        ({"backing_directory": "a\0b"}, "not a directory that can be written"),
        ({"backing_directory": "a" * 256}, "not a directory that can be written"),
        ({"defects": ["B1", 5, "zz"]}, "unknown; give"),
        ({"defects": [["B1"]]}, "defects: (a list of 1): unknown"),
        ({"defects": [{"a": 1}]}, "defects: (a dict of 1): unknown"),
    ],
)
def test_the_impossible_is_refused_in_one_line_that_names_it(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(SoftSgxError) as refused:
        PlatformConfig.of(**values)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("defect", [each for each in Defect if not each.can_be_switched_on])
def test_a_defect_that_cannot_be_switched_on_is_refused_with_the_reason(defect: Defect) -> None:
    for given in (defect, str(defect)):
        with pytest.raises(SoftSgxError) as refused:
            PlatformConfig.of(defects=["B1", given])
        assert str(refused.value) == (
            f"defects: {defect}: cannot be switched on; remove it: {defect.explanation}"
        )


def test_defects_are_given_as_members_or_identifiers_and_kept_as_members() -> None:
    every = frozenset(defect for defect in Defect if defect.can_be_switched_on)
    assert PlatformConfig(defects=every) == PlatformConfig.of(defects=sorted(map(str, every)))
    (kept,) = PlatformConfig.of(defects=["B1"]).defects
    assert type(kept) is Defect


@pytest.mark.parametrize("profile", PROFILES)
def test_the_needed_pages_are_accepted_and_one_page_less_is_not(profile: str) -> None:
    needed = needed_pages(PlatformConfig(profile=profile).machine())
    enough, few = needed * PAGE_BYTES, (needed - 1) * PAGE_BYTES
    PlatformConfig(epc=enough, profile=profile, groups={"jobs": {"max": enough}})
    complaint = (
        rf": {needed - 1} pages are too few; give at least {needed} \({needed * 4}KiB\): one"
    )
    with pytest.raises(SoftSgxError, match=rf"^epc = {few}{complaint}"):
        PlatformConfig(epc=few, profile=profile)
    with pytest.raises(SoftSgxError, match=rf"^groups.jobs.max = {few}{complaint}"):
        PlatformConfig(profile=profile, groups={"jobs": {"max": few}})


def test_each_section_is_a_node_and_processors_are_spread_over_them() -> None:
    machine = PlatformConfig(epc=("1MiB", "2MiB"), processors=3).machine()
    assert [(section.size >> 20, section.node) for section in machine.sections] == [(1, 0), (2, 1)]
    assert machine.cpu_nodes == (0, 1, 0)


def test_a_file_says_the_same_as_keywords(tmp_path: Path) -> None:
    path = tmp_path / "platform.toml"
    path.write_text('epc = ["1MiB", "2MiB"]\nseed = 3\n[groups."jobs/a"]\nmax = "128KiB"\n')
    config = PlatformConfig.load(path, seed=4)
    assert config == PlatformConfig(
        epc=("1MiB", "2MiB"), seed=4, groups={"jobs/a": {"max": "128KiB"}}
    )
    assert config.group_max_pages("jobs/a") == 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        (b"epc = ", "platform.toml: not TOML"),
        (b"epc = 1", "platform.toml: epc = 1"),
        (b'epc = "\xff"', "platform.toml: not TOML: 'utf-8' codec"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "platform.toml: nested too deep"),
        (b"seed = " + b"9" * 5000, "platform.toml: not TOML"),
        ((b"[" + b"a" * 5000 + b"]\n") * 2, "platform.toml: not TOML: Cannot declare ('aaa"),
        (b"seed = 0x" + b"f" * 5000, "(a number of 20000 bits)"),
        (b"#" * (1 << 21), "larger than 1048576 bytes"),
        (b"epc = 1979-05-27T07:32:00Z", "platform.toml: epc = "),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_bad_file_is_named(tmp_path: Path, text: bytes | None, words: str) -> None:
    path = tmp_path / "platform.toml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(SoftSgxError) as refused:
        PlatformConfig.load(path)
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 500


def test_every_group_that_a_configuration_takes_can_be_made(tmp_path: Path) -> None:
    names = ["a", "jobs/a", "/jobs/b/", "ä", "a" * 255, "0", " "]
    config = PlatformConfig(groups={name: {"max": "1MiB"} for name in names})
    with Platform(config, backing_directory=str(tmp_path)) as platform:
        assert all(platform.cgroups.make(name).max_pages == 256 for name in names)
