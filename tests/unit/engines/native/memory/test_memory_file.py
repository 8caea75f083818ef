"""Jumps in shown code: the enclave's own bytes are what is read and what leaves."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator

import pytest

from softsgx.engines.native.memory.memory_file import EXECUTE, READ, EnclaveMemory

PAGE, AT = 0x5000, 0x5020
OWN = bytes(range(256)) * 16
JUMP = b"\xe9\x01\x02\x03\x04"


@pytest.fixture
def memory() -> Iterator[EnclaveMemory]:
    made = EnclaveMemory(os.memfd_create("enclave", os.MFD_ALLOW_SEALING))
    made.show(PAGE, OWN, READ | EXECUTE)
    made.jump_at(AT, JUMP)
    yield made
    made.close()


def test_a_jump_is_executed_and_not_read(memory: EnclaveMemory) -> None:
    assert memory.code(AT, len(JUMP)) == JUMP
    assert memory.read(PAGE, len(OWN)) == memory.own_code(PAGE, len(OWN)) == OWN
    assert memory.jumps == {AT: len(JUMP)}


def test_a_page_that_leaves_has_no_jumps_when_it_comes_back(memory: EnclaveMemory) -> None:
    assert memory.hide([PAGE]) == [OWN]
    assert not memory.jumps and not memory.marked
    memory.show(PAGE, OWN, READ | EXECUTE)
    assert memory.code(PAGE, len(OWN)) == OWN


def test_jumps_that_end_are_known_to_threads_that_are_at_them(memory: EnclaveMemory) -> None:
    memory.end_jumps()
    assert memory.code(PAGE, len(OWN)) == OWN
    assert not memory.jumps and memory.former_jumps == {AT}


def test_a_file_that_cannot_be_a_device_leaves_no_descriptor() -> None:
    theirs = os.memfd_create("enclave", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(theirs, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    gc.collect()  # what earlier tests dropped closes its descriptors now, not in between
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError):
        EnclaveMemory(theirs)
    assert len(os.listdir("/proc/self/fd")) == before - 1
