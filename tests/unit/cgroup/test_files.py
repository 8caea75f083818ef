"""The misc.* files: contents, places, and what writing refuses."""

from __future__ import annotations

import errno

import pytest

from softsgx.cgroup import Hierarchy, file_names, read_file, write_file
from softsgx.runtime import InlineRuntime


@pytest.fixture
def tree() -> Hierarchy:
    hierarchy = Hierarchy(100, InlineRuntime())
    group = hierarchy.make("jobs/a")
    for _ in range(3):
        group.try_charge()
    group.uncharge()
    group.max_pages = 2
    group.try_charge()
    return hierarchy


@pytest.mark.parametrize(
    ("path", "name", "text"),
    [
        ("/", "misc.capacity", "sgx_epc 409600\n"),
        ("/", "misc.current", "sgx_epc 8192\n"),
        ("/", "misc.peak", "sgx_epc 12288\n"),
        ("jobs", "misc.max", "sgx_epc max\n"),
        ("jobs/a", "misc.max", "sgx_epc 8192\n"),
        ("jobs/a", "misc.current", "sgx_epc 8192\n"),
        ("jobs/a", "misc.peak", "sgx_epc 12288\n"),
        ("jobs/a", "misc.events.local", "sgx_epc.max 1\n"),
        ("jobs", "misc.events.local", "sgx_epc.max 0\n"),
        ("jobs", "misc.events", "sgx_epc.max 1\n"),
    ],
)
def test_each_file_tells_bytes_under_its_key(
    tree: Hierarchy, path: str, name: str, text: str
) -> None:
    assert read_file(tree.find(path), name) == text


@pytest.mark.parametrize(
    ("path", "name"),
    [("/", "misc.max"), ("/", "misc.events"), ("jobs", "misc.capacity"), ("jobs", "memory.max")],
)
def test_a_file_is_only_where_it_belongs(tree: Hierarchy, path: str, name: str) -> None:
    assert name not in file_names(tree.find(path))
    with pytest.raises(OSError, match="No such file") as refused:
        read_file(tree.find(path), name)
    assert refused.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("text", "pages"),
    [
        ("sgx_epc 8192", 2),
        ("sgx_epc 8191\n", 1),
        ("sgx_epc 0", 0),
        ("sgx_epc max", None),
        (" \t\n\v\f\rsgx_epc max\n\n", None),
        ("sgx_epc 0x3000", 3),
        ("sgx_epc 0XFfFf", 15),
        ("sgx_epc 030000", 3),
        ("sgx_epc 00", 0),
        ("sgx_epc +8192", 2),
        ("sgx_epc +0x2000\n", 2),
        ("sgx_epc 8192\0whatever", 2),
        ("sgx_epc " + "0" * 4000 + "20000", 2),
        ("sgx_epc 0xffffffffffffffff", (1 << 52) - 1),
        ("sgx_epc 01777777777777777777777", (1 << 52) - 1),
    ],
)
def test_limits_are_rounded_down_to_pages(tree: Hierarchy, text: str, pages: int | None) -> None:
    group = tree.find("jobs")
    write_file(group, "misc.max", text)
    assert group.max_pages == pages


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("8192", errno.EINVAL),
        ("res_a 8192", errno.EINVAL),
        ("sgx_epc -1", errno.EINVAL),
        ("sgx_epc many", errno.EINVAL),
        ("sgx_epc ٣", errno.EINVAL),
        (f"sgx_epc {1 << 64}", errno.ERANGE),
        ("sgx_epc  8192", errno.EINVAL),
        ("sgx_epc\t8192", errno.EINVAL),
        ("sgx_epc", errno.EINVAL),
        ("sgx_epc ", errno.EINVAL),
        ("", errno.EINVAL),
        ("sgx_epc Max", errno.EINVAL),
        ("sgx_epc +max", errno.EINVAL),
        ("sgx_epc max max", errno.EINVAL),
        ("sgx_epc +", errno.EINVAL),
        ("sgx_epc ++1", errno.EINVAL),
        ("sgx_epc +-1", errno.EINVAL),
        ("sgx_epc 1_000", errno.EINVAL),
        ("sgx_epc 4096 8192", errno.EINVAL),
        ("sgx_epc 4KiB", errno.EINVAL),
        ("sgx_epc 08", errno.EINVAL),
        ("sgx_epc 0x", errno.EINVAL),
        ("sgx_epc 0xg", errno.EINVAL),
        ("sgx_epc 0b1", errno.EINVAL),
        ("sgx_epc 1\n\n2", errno.EINVAL),
        ("sgx_epc " + "9" * 4000, errno.ERANGE),
        ("sgx_epc " + "9" * 4000 + "x", errno.ERANGE),
        ("sgx_epc 0x10000000000000000", errno.ERANGE),
        ("sgx_epc 02000000000000000000000", errno.ERANGE),
        ("sgx_epc " + "9" * 4096, errno.E2BIG),
    ],
)
def test_an_invalid_limit_is_refused_and_changes_nothing(
    tree: Hierarchy, text: str, code: int
) -> None:
    group = tree.find("jobs/a")
    with pytest.raises(OSError, match=r".") as refused:
        write_file(group, "misc.max", text)
    assert refused.value.errno == code
    assert group.max_pages == 2


def test_only_the_limit_can_be_written(tree: Hierarchy) -> None:
    with pytest.raises(OSError, match="Permission") as refused:
        write_file(tree.find("jobs"), "misc.current", "sgx_epc 0")
    assert refused.value.errno == errno.EACCES


def test_a_machine_without_epc_shows_no_key_and_takes_no_limit() -> None:
    group = Hierarchy(0, InlineRuntime()).make("a")
    assert read_file(group, "misc.current") == ""
    with pytest.raises(OSError, match="Invalid"):
        write_file(group, "misc.max", "sgx_epc 4096")
