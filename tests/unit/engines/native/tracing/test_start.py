"""The auxiliary vector is found on stacks of every size.

Method: stacks in a memory file, in place of the memory of a process.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest

from softsgx.engines.native.tracing.start import _auxiliary_vector

STACK = 0x7000
VECTOR = {33: 0x7FFF_0000, 7: 0x7F00_0000, 6: 4096, 23: 0}


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("stack")
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("behind", [b"", bytes(4096), b"strings" * 5000])
@pytest.mark.parametrize("arguments", [0, 1, 3, 505, 506, 507, 508, 2000])
@pytest.mark.parametrize("variables", [0, 1, 40, 500, 3000])
def test_it_is_found_behind_arguments_and_environment(
    memory: int, arguments: int, variables: int, behind: bytes
) -> None:
    words = [arguments, *range(1, arguments + 1), 0, *range(1, variables + 1), 0]
    at = STACK + 8 * len(words)
    for kind, value in VECTOR.items():
        words += kind, value
    os.pwrite(memory, struct.pack(f"<{len(words) + 2}Q", *words, 0, 0) + behind, STACK)
    found = _auxiliary_vector(memory, STACK)
    places = {kind: at + 16 * number + 8 for number, kind in enumerate(VECTOR)}
    assert found == {kind: (places[kind], value) for kind, value in VECTOR.items()}
