"""The soak of the parsers: repeatable by its seed, and a fault is found, reduced and printed."""

from __future__ import annotations

import pytest
from tests.soak import parsers
from tests.soak.parsers import Fault, fuzz, main, reduced, run, try_one

from softsgx.errors import SoftSgxError


def test_every_parser_has_inputs_that_it_takes() -> None:
    assert parsers.SEEDS.keys() == parsers.PARSERS.keys()
    for name, make in parsers.SEEDS.items():
        for data in make():
            assert try_one(parsers.PARSERS[name], data)[1] == "", name
            parsers.PARSERS[name](data)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_without_a_fault() -> None:
    one, other = (fuzz(600, 7, inputs=3000, watch_lines=False) for _ in range(2))
    assert one.inputs.total() == 3000
    assert (one.inputs, one.shapes) == (other.inputs, other.shapes)
    assert one.faults == []
    assert fuzz(600, 8, inputs=300).inputs != fuzz(600, 9, inputs=300).inputs


def test_a_fault_is_found_reduced_and_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fragile(data: bytes) -> str:
        if len(data) > 10 and data[8] > 100:
            raise IndexError("planted")
        return "well"

    monkeypatch.setattr(parsers, "PARSERS", {"sgxs": fragile})
    monkeypatch.setattr(parsers, "DEEPER", {})
    (fault,) = fuzz(600, 1, inputs=3000).faults
    assert "IndexError at test_soak_parsers.py" in fault.what
    assert len(fault.data) == 11
    assert fault.data[:8] == bytes(8)
    printed = capsys.readouterr().out
    assert "--parser 'sgxs' --again" in printed
    with pytest.raises(IndexError, match="planted"):
        main(["--parser", "sgxs", "--again", printed.split()[-1]])


def test_a_slice_says_how_many_inputs_there_were_and_fails_with_its_faults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(0.2, 1)["parser inputs"] > 0
    monkeypatch.setattr(parsers, "PARSERS", {"raw": lambda data: str(1 // len(data[:0]))})
    with pytest.raises(AssertionError, match="raw: ZeroDivisionError"):
        run(0.2, 1)


def test_a_refusal_of_several_lines_is_a_fault() -> None:
    def chatty(data: bytes) -> str:
        raise SoftSgxError("one\ntwo")

    assert "2 lines" in try_one(chatty, b"")[1]


def test_what_is_slow_or_large_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsers, "SLOW_SECONDS", -1.0)
    assert try_one(lambda _: "", b"")[1] == "slow"
    monkeypatch.setattr(parsers, "LARGE_BYTES", -1)
    assert try_one(lambda _: "", b"")[1] == "large"
    assert reduced(lambda _: "", b"abc", "slow") == b"abc"
    assert "3 bytes" in Fault("sgxs", "slow", b"abc").text()
