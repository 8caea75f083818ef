"""Which loads of EAX in front of a host's ENCLU become jumps, and when they are put back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native import abi
from softsgx.engines.native.mappings import Mapping
from softsgx.engines.native.vdso import host_jumps
from softsgx.engines.native.vdso.host_jumps import find_entry, put_back, replace_in_host
from softsgx.engines.native.vdso.permit_code import STUB_BYTES
from softsgx.engines.native.vdso.stubs import Stubs, jump

TABLE, CODE, AREA = 0x4000_0000, 0x1_0000, 0x8_0000
BEFORE = bytes.fromhex("4889c3" * 40)
LOAD, ENCLU = bytes.fromhex("b802000000"), bytes.fromhex("0f01d7")


def page_with(code: str) -> tuple[bytes, int]:
    """Return a page with code in front of an ENCLU, and where the ENCLU is."""
    front = BEFORE + bytes.fromhex(code)
    return (front + ENCLU + b"\x0f\x0b" * 8).ljust(4096, b"\xcc"), CODE + len(front)


#: Code in front of ENCLU, and how much of that is behind the load of EAX.
@pytest.mark.parametrize(
    ("code", "between"),
    [
        ("b802000000", 0),
        ("488d0d20000000 48c7c002000000", 0),
        ("b802000000 488d0d20000000", 7),
        ("b802000000 4c8d3d00ff00ff 4889cb 89d9", 12),
        ("48c7c002000000 488b5c2408 488b5d10 488b1c24", 13),
        ("b802000000 31d2 4531db 48c7c700000000 41b807000000 bb00000000", 23),
        ("b802000000 49c7c207000000", 7),
        ("b802000000 488d0500000000", None),  # lea rax
        ("b802000000 4889c3", None),  # mov rbx, rax
        ("b802000000 4889d8", None),  # mov rax, rbx
        ("b802000000 8b45f8", None),
        ("b802000000 8b0424", None),
        ("b802000000 48c7c000000000", None),
        ("b802000000 488b0d00000000", None),  # mov rcx, [rip]
        ("b802000000 488b03", None),
        ("b802000000 eb00", None),
        ("b802000000 90", None),
        ("b802000000 488d0d00000040", None),  # it would not reach as far from elsewhere
        ("b803000000", None),
        ("41b802000000", None),
        ("6a0258", None),
    ],
)
def test_loads_of_eax_in_front_of_an_entry_are_found(code: str, between: int | None) -> None:
    page, enclu = page_with(code)
    found = find_entry(page[: enclu - CODE + 3], CODE, TABLE)
    assert (None if found is None else len(found.between)) == between
    if found is not None:
        assert (found.at, found.behind) == (enclu, enclu + 3)
        assert page[found.start - CODE :].startswith(found.load)


def test_addresses_near_code_are_the_same_in_the_stub() -> None:
    page, enclu = page_with("b802000000 488d0d20000000 4889cb 4c8d0df0ffffff")
    site = find_entry(page[: enclu - CODE + 3], CODE, TABLE)
    assert site is not None
    code, labels = site.stub(AREA)
    start = site.start + len(site.load)
    for at, distance in ((7, 0x20), (17, -16)):
        there = int.from_bytes(code[at - 4 : at], "little", signed=True)
        assert AREA + at + there == start + at + distance
    assert code[7:10] == bytes.fromhex("4889cb")
    assert labels["begun"] == len(site.between)


class Scene:
    """A thread that has entered by an ENCLU, and what has happened to its code, in order."""

    def __init__(self, directory: Path, code: str = "b802000000") -> None:
        self.did: list[str] = []
        self.fd = os.open(directory / "memory", os.O_RDWR | os.O_CREAT)
        page, self.enclu = page_with(code)
        os.pwrite(self.fd, page, CODE)
        self.start = CODE + len(BEFORE)
        self.own = os.pread(self.fd, 4096, CODE)
        self.others = {
            name: SimpleNamespace(
                in_call=name == "called", unstoppable=name == "waiting", name=name
            )
            for name in ("runs", "called", "waiting")
        }
        self.image = SimpleNamespace(
            memory_fd=self.fd,
            permits_at=TABLE,
            entry_stubs=Stubs(STUB_BYTES, (AREA, 2)),
            read=lambda at, size: os.pread(self.fd, size, at),
            hold=lambda thread: self.did.append(f"{thread.name} is stopped"),
            threads=dict(self.others),
        )
        self.thread: Any = SimpleNamespace(image=self.image, tid=1)
        self.image.threads["this"] = self.thread
        self.mapping: Mapping | None = Mapping(
            CODE, CODE + 4096, abi.PROT_READ | abi.PROT_EXEC, False, 0, 1, 1, "/bin/host"
        )

    def enter(self) -> bytes:
        """Return the code after the stop."""
        self.did.clear()
        replace_in_host(self.thread, self.enclu)
        return os.pread(self.fd, 4096, CODE)


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    made = Scene(tmp_path)
    monkeypatch.setattr(host_jumps, "mapping_at", lambda tid, address: made.mapping)
    yield made
    os.close(made.fd)


def test_the_load_becomes_a_jump_while_other_threads_are_stopped(scene: Scene) -> None:
    offset = scene.start - CODE
    expected = scene.own[:offset] + jump(scene.start, AREA) + scene.own[offset + 5 :]
    assert scene.enter() == expected
    assert scene.did == ["runs is stopped"]
    assert scene.enter() == expected
    assert scene.did == [], "it is there already"
    (stub,) = scene.image.entry_stubs
    code, labels = stub.site.stub(AREA)
    assert os.pread(scene.fd, len(code), AREA) == code and labels == stub.labels


@pytest.mark.parametrize(
    "change",
    [
        {"prot": abi.PROT_READ | abi.PROT_WRITE | abi.PROT_EXEC},
        {"prot": abi.PROT_READ},
        {"shared": True},
        {"path": ""},
        {"path": "[vdso]"},
        {"end": 0},
        None,
    ],
)
def test_code_of_another_kind_is_left_alone_until_it_changes(
    scene: Scene, change: dict[str, Any] | None
) -> None:
    usable = scene.mapping
    assert usable is not None
    scene.mapping = None if change is None else usable._replace(**change)
    assert scene.enter() == scene.own
    scene.mapping = usable
    assert scene.enter() != scene.own


def test_code_without_a_load_is_looked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene, looked = Scene(tmp_path, "b802000000 90"), []

    def look(_tid: int, address: int) -> Mapping | None:
        looked.append(address)
        return scene.mapping

    monkeypatch.setattr(host_jumps, "mapping_at", look)
    for _ in range(3):
        assert scene.enter() == scene.own
    assert looked == [scene.enclu]


@pytest.mark.parametrize(("start", "end"), [(-1, 1), (4, 5), (-4096, 4096)])
def test_a_load_is_put_back_before_its_code_can_be_written(
    scene: Scene, start: int, end: int
) -> None:
    scene.enter()
    scene.did.clear()
    put_back(scene.thread, scene.start + start, scene.start + end)
    assert os.pread(scene.fd, 4096, CODE) == scene.own
    assert scene.did == ["runs is stopped"]
    assert scene.enter() != scene.own and len(scene.image.entry_stubs) == 1


def test_other_code_is_not_put_back(scene: Scene) -> None:
    changed = scene.enter()
    scene.did.clear()
    for start, end in ((-9, 0), (5, 9)):
        put_back(scene.thread, scene.start + start, scene.start + end)
    assert (os.pread(scene.fd, 4096, CODE), scene.did) == (changed, [])
    os.pwrite(scene.fd, b"\x90", scene.start)  # the program has mapped other code there
    put_back(scene.thread, CODE, CODE + 4096)
    assert os.pread(scene.fd, 1, scene.start) == b"\x90"
