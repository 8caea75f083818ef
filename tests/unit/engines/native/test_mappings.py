"""Reading /proc/PID/maps: what the kernel writes, what it answers for one address, and its ends."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from errno import ENAMETOOLONG, ENOTTY, ESRCH
from pathlib import Path

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native import mappings as reader
from softsgx.engines.native.mappings import Mapping, file_code, mapping_at, mappings, parse_lines
from softsgx.errors import SoftSgxError


@pytest.mark.parametrize(
    ("line", "mapping"),
    [
        (
            "7f3a0c000000-7f3a0c021000 rw-p 00000000 00:00 0 ",
            Mapping(0x7F3A0C000000, 0x7F3A0C021000, 3, False, 0, 0, 0, ""),
        ),
        (
            "00400000-0040b000 r-xp 0001f000 fe:102 173521      /usr/lib/a b  (deleted)",
            Mapping(
                *(0x400000, 0x40B000, 5, False, 0x1F000, os.makedev(0xFE, 0x102), 173521),
                "/usr/lib/a b  (deleted)",
            ),
        ),
        (
            "7ffff7fc0000-7ffff7fc4000 ---s 7fffffffff000 00:01 18446744073709551615  /memfd:x",
            Mapping(
                *(0x7FFFF7FC0000, 0x7FFFF7FC4000, 0, True, 0x7FFFFFFFFF000, os.makedev(0, 1)),
                *((1 << 64) - 1, "/memfd:x"),
            ),
        ),
        (
            "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
            Mapping(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, 4, False, 0, 0, 0, "[vsyscall]"),
        ),
    ],
)
def test_a_line_is_one_mapping(line: str, mapping: Mapping) -> None:
    assert parse_lines([line]) == [mapping]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "00400000-0040b000",
        "00400000 r-xp 00000000 00:00 0",
        "00400000-0040b000 rwxq 00000000 00:00 0",
        "0040000g-0040b000 r-xp 00000000 00:00 0",
        "00400000-0040b000 r-xp 00000000 0000 0",
        "00400000-0040b000 r-xp 00000000 00:00 inode",
    ],
)
def test_a_line_of_another_form_is_refused_with_the_line(line: str) -> None:
    good = "00400000-0040b000 r-xp 00000000 00:00 0"
    with pytest.raises(SoftSgxError) as refusal:
        parse_lines([good, line])
    assert repr(line) in str(refusal.value)


@pytest.mark.parametrize(
    "name",
    [
        b"plain",
        b" two  words ",
        b"line\nend",
        b"\r\x0b\x0c\x1c\x85",
        "\u2028\xa0".encode(),
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_path_is_the_files_whatever_its_characters(tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 4 * abi.PAGE)
    info = os.fstat(file)
    with mmap.mmap(file, 2 * abi.PAGE, prot=mmap.PROT_READ, offset=abi.PAGE):
        found = [each for each in mappings(os.getpid()) if each.inode == info.st_ino]
        asked = mapping_at(os.getpid(), found[0].start)
    os.close(file)
    assert [os.fsencode(each.path) for each in found] == [path]
    assert found[0][2:7] == (abi.PROT_READ, True, abi.PAGE, info.st_dev, info.st_ino)
    assert asked == found[0]


def test_the_answer_for_an_address_is_its_line_with_and_without_the_query(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(b"loaded\n")
        child.stdin.flush()
        child.stdout.readline()  # now it waits, and maps nothing more
        # The kernel's own page above user space has a line and no answer.
        lines = [each for each in mappings(child.pid) if each.end <= abi.TASK_SIZE]
        places = [(each, at) for each in lines for at in (each.start, each.end - 1)]
        asked = [mapping_at(child.pid, at) for _each, at in places]
        monkeypatch.setattr(reader, "_QUERY_COMMAND", 0xC068_66FF)  # as before Linux 6.11
        read = [mapping_at(child.pid, at) for _each, at in places]
        assert mapping_at(child.pid, 0) is None
    assert asked == read == [each for each, _at in places]
    assert {each.prot for each in lines} >= {1, 3, 5}


def test_nothing_is_mapped_at_address_zero() -> None:
    assert mapping_at(os.getpid(), 0) is None


def test_a_process_that_has_ended_has_no_list_of_mappings() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.DEVNULL) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        for read in (mappings, lambda pid: mapping_at(pid, abi.PAGE)):
            with pytest.raises(OSError, match=r"no memory|No such process"):
                read(ended.pid)
    with pytest.raises(FileNotFoundError):
        mappings(ended.pid)


@pytest.mark.parametrize("error", [None, ENOTTY, ENAMETOOLONG])
def test_code_of_files_is_what_the_list_of_mappings_has_of_it(
    error: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object) -> Mapping:
        raise OSError(error, "refused")

    def read(*, deleted: bool) -> list[Mapping]:
        path = tmp_path / f"code {deleted}"
        path.write_bytes(bytes(8192))
        with path.open("r+b") as file:
            if deleted:
                path.unlink()
            one = mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_EXEC)
            two = mmap.mmap(file.fileno(), 4096, mmap.MAP_SHARED, 7, offset=4096)
            none = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=5)
            try:
                found = file_code(os.getpid())
                assert found == [
                    each
                    for each in mappings(os.getpid())
                    if each.prot & abi.PROT_EXEC and each.path.startswith("/")
                ]
                return [each for each in found if str(path) in each.path]
            finally:
                for each in (one, two, none):
                    each.close()

    if error is not None:
        monkeypatch.setattr(reader, "_query", refuse)
    for deleted in (False, True):
        assert sorted((each.prot, each.shared) for each in read(deleted=deleted)) == [
            (abi.PROT_EXEC, False),
            (7, True),
        ]


def test_another_error_is_not_an_empty_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Mapping:
        raise ProcessLookupError(ESRCH, "no memory any more")

    monkeypatch.setattr(reader, "_query", refuse)
    with pytest.raises(ProcessLookupError):
        file_code(os.getpid())
