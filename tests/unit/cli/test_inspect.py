"""What ``inspect`` and ``measure`` find beyond a well-made file: threads, strangers, limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.enclave_files import (
    KEY_FILE,
    PAGE,
    blob_plan,
    code,
    key,
    oe_library,
    raw_file,
    sdk_laid_out,
    sdk_library,
    sgxs_file,
    tcs_of,
)

from softsgx.cli import main
from softsgx.cli._enclave_text import folded
from softsgx.image import ZERO, Blob, Bytes, Data, Fill, Run, open_image, sign_plan, write_sgxs
from softsgx.image.sdk import sdk_blocks


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "e.sgxs"
    path.write_bytes(sgxs_file())
    return path


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, Any]:
    status = main([str(word) for word in argv])
    return status, json.loads(capsys.readouterr().out)


def test_threads_that_repeat_are_folded_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "e.so", tmp_path / "e.signed.so"
    path.write_bytes(sdk_library().data)
    argv = ["sign", str(path), "--key", str(KEY_FILE), "-o", str(out), "--threads", "500"]
    assert main([*argv, "--stack-max", "8KiB"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert all(told in text for told in ("× 500", "step 0x36000", "+484"))
    assert text.count("\n") < 100


@given(st.lists(st.sampled_from("abTx"), max_size=30))
def test_folding_loses_no_run(letters: list[str]) -> None:
    kinds = {"a": (0x203, ZERO), "b": (0x203, Fill(7)), "T": (0x100, ZERO)}
    data = Data(memoryview(bytes(PAGE)))
    runs = [
        Run(at * PAGE, 1, *kinds.get(letter, (0x205, data))) for at, letter in enumerate(letters)
    ]
    at = 0
    for first, count, times in folded(runs):
        assert first == at
        for again in range(1, times):
            for nth in range(count):
                one, other = runs[first + nth], runs[first + again * count + nth]
                assert (one.flags, one.source) == (other.flags, other.source)
        assert times == 1 or "T" in letters[first : first + count]
        at += count * times
    assert at == len(runs)


def test_a_long_list_of_pages_is_cut_short_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blob = Blob()
    for nth in range(300):
        blob.data(code(1, nth % 256), offset=2 * nth * PAGE)
    path = tmp_path / "e.sgxs"
    path.write_bytes(b"".join(write_sgxs(blob.plan())))
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "100 more: see --json" in text


def test_inspect_tells_the_fields_of_threads(
    stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = run_json(capsys, "inspect", stream, "--json")
    plan = blob_plan()
    (thread,) = document["threads"]
    run = plan.find(plan.tcs[0])
    assert run is not None
    tcs = tcs_of(run.page(0).data)
    assert (status, thread["offset"], thread["ossa"]) == (0, plan.tcs[0], tcs.ossa)
    assert thread["nssa"] == tcs.nssa
    assert [(row["offset_bytes"], row["page_count"], row["flags"], row["mask"])
            for row in document["runs"]] == [
        (run.offset, run.pages, run.flags, run.mask) for run in open_image(stream).plan.runs
    ]  # fmt: skip
    assert main(["inspect", str(stream)]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("oentry", f"{tcs.ossa:#x}"))


def test_a_sigstruct_of_another_enclave_is_found(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = tmp_path / "own.sig", tmp_path / "other.sig"
    own.write_bytes(sign_plan(blob_plan(), key()).pack())
    other.write_bytes(sign_plan(Blob().heap(1).plan(), key()).pack())
    assert main(["inspect", str(stream), "--sigstruct", str(own)]) == 0
    assert main(["inspect", str(stream), "--sigstruct", str(other)]) == 1
    assert "problem: SIGSTRUCT: it is for another enclave" in capsys.readouterr().out
    damaged = bytearray(own.read_bytes())
    damaged[600] ^= 1
    own.write_bytes(damaged)
    status, document = run_json(capsys, "inspect", stream, "--sigstruct", own, "--json")
    assert status == 1
    assert "SIGSTRUCT: " in document["problems"][0]


def test_metadata_blocks_that_disagree_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bytearray(sdk_laid_out().view)
    _, blocks = sdk_blocks(Bytes("lib", file))
    older = blocks[1].bytes
    at = older.origin + blocks[1].header.dir_layout.offset
    file[at + 4] += 1  # a page more of heap: over what comes next
    path = tmp_path / "e.signed.so"
    path.write_bytes(file)
    _, document = run_json(capsys, "inspect", path, "--json")
    assert "overlap" in document["metadata"][1]["problem"]
    file[at + 4] -= 2
    path.write_bytes(file)
    for verb in ("inspect", "measure"):
        assert main([verb, str(path)]) == 1, verb
        assert "1.5 describes another enclave than 3.3" in capsys.readouterr().out


def test_a_signature_of_bare_sgx_is_found_beside_its_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "encl.bin"
    path.write_bytes(raw_file())
    plan = open_image(path).plan
    (tmp_path / "encl.ss").write_bytes(sign_plan(plan, key()).pack())
    status, document = run_json(capsys, "measure", path, "--json")
    assert (status, document["matches"]) == (0, True)


def test_measuring_tells_how_far_it_is_and_keeps_to_its_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.so"
    path.write_bytes(oe_library(stack_pages=30_000, num_tcs=1).data)
    assert main(["measure", str(path), "--limit", "100MiB"]) == 2
    assert "raise it with --limit" in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("softsgx.cli.measure._PROGRESS_FROM_BYTES", 1 << 20)
    assert main(["measure", str(path), "--limit", "1GiB"]) == 0
    assert "measuring: 4" in capsys.readouterr().err


def test_an_interrupted_command_ends_quietly(
    stream: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("softsgx.cli.measure.measure", interrupt)
    assert main(["measure", str(stream)]) == 130
    assert capsys.readouterr().err == ""
