"""A thread that may be about to make a call without a stop is stopped when a device is opened."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from softsgx.engines.native.tracing import filters


@pytest.mark.parametrize("stubs", [None, object()])
def test_other_threads_leave_their_stubs_before_there_is_a_device(
    monkeypatch: pytest.MonkeyPatch, stubs: object
) -> None:
    monkeypatch.setattr(filters, "add_filter", lambda _thread, _bpf: 0)
    memory, process = os.memfd_create("memory"), object()
    held: list[Any] = []
    image = SimpleNamespace(
        memory_fd=memory,
        vdso_base=0,
        vdso=SimpleNamespace(watched=64),
        strict=False,
        watched=False,
        path_stubs=stubs,
        hold=held.append,
    )
    announced: list[int] = []
    threads: list[Any] = [
        SimpleNamespace(
            process=process,
            image=image,
            watched=False,
            in_call=in_call,
            unstoppable=False,
            announce_end=partial(announced.append, number),
            stop_after_call=lambda: None,
        )
        for number, in_call in enumerate((False, False, True))
    ]
    image.threads = dict(enumerate(threads))
    assert filters.watch_devices(threads[0]) == 0
    assert all(thread.watched for thread in threads)
    assert announced == [0]
    assert held == ([] if stubs is None else [threads[1]])
    assert os.pread(memory, 8, 64) != bytes(8)
    os.close(memory)
