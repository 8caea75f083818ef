"""A platform's description: what it accepts, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from softsgx.errors import SoftSgxError
from softsgx.host import MIN_EPC_PAGES, PlatformConfig, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [(4096, 4096), ("4096", 4096), ("64KiB", 65536), ("93.5MiB", 0x5D80000), ("1 GiB", 1 << 30)],
)
def test_sizes_carry_units(text: int | str, size: int) -> None:
    assert parse_size(text, "epc") == size


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epc": "much"}, "epc = 'much'"),
        ({"epc": "44KiB"}, "11 pages; an enclave needs 12"),
        ({"epc": 49153}, "multiples of 4096"),
        ({"epc": True}, "epc = True"),
        ({"epc": ("1MiB",) * 9}, "9 EPC sections"),
        ({"processors": 0}, "0 processors"),
        ({"profile": "sgx9"}, "sgx2-server"),
        ({"policy": "psychic"}, "linux, fifo, clock"),
        ({"backing": "tape"}, "memory or file"),
        ({"backing_limit": "x"}, "backing_limit"),
        ({"groups": {"a": {"min": 1}}}, "groups.a: 'min'"),
        ({"groups": {"a": {"max": "lots"}}}, "groups.a.max"),
        ({"defects": ["B99"]}, "'B99' is not known"),
        ({"colour": "red"}, "colour: not known; keys are epc, processors"),
    ],
)
def test_the_impossible_is_refused_in_one_line_that_names_it(
    values: dict[str, object], words: str
) -> None:
    with pytest.raises(SoftSgxError) as refused:
        PlatformConfig.of(**values)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_smallest_epc_is_accepted() -> None:
    assert PlatformConfig(epc=MIN_EPC_PAGES * 4096).machine().sections[0].pages == MIN_EPC_PAGES


def test_each_section_is_a_node_and_processors_are_spread_over_them() -> None:
    machine = PlatformConfig(epc=("1MiB", "2MiB"), processors=3).machine()
    assert [(section.size >> 20, section.node) for section in machine.sections] == [(1, 0), (2, 1)]
    assert machine.cpu_nodes == (0, 1, 0)


def test_a_file_says_the_same_as_keywords(tmp_path: Path) -> None:
    path = tmp_path / "platform.toml"
    path.write_text('epc = ["1MiB", "2MiB"]\nseed = 3\n[groups."jobs/a"]\nmax = "64KiB"\n')
    config = PlatformConfig.load(path, seed=4)
    assert config == PlatformConfig(
        epc=("1MiB", "2MiB"), seed=4, groups={"jobs/a": {"max": "64KiB"}}
    )
    assert config.group_max_pages("jobs/a") == 16


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "No such file"), ("epc = ", "platform.toml: "), ("epc = 1", "platform.toml: epc = 1")],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "platform.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SoftSgxError) as refused:
        PlatformConfig.load(path)
    assert words in str(refused.value)
