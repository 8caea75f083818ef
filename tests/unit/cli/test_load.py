"""``softsgx load``: what it prints and returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.enclave_files import blob_plan, key

from softsgx.cli import main
from softsgx.image import SignOptions, measure, sign_plan, write_sgxs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "blob.sgxs"
    path.write_bytes(b"".join(write_sgxs(blob_plan())))
    return path


def sign_beside(file: Path, **options: int) -> None:
    sig = sign_plan(blob_plan(), key(), SignOptions(**options))  # type: ignore[arg-type]
    file.with_suffix(".sig").write_bytes(sig.pack())


def test_a_signed_file_is_loaded_with_its_own_sigstruct(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign_beside(file)
    assert main(["load", str(file)]) == 0
    out = capsys.readouterr().out
    assert "EINIT      SGX_SUCCESS" in out
    assert f"sigstruct  {file.with_suffix('.sig')}" in out
    assert "production" in out


def test_the_json_has_what_was_loaded(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", str(file), "--debug", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    plan = blob_plan()
    assert document["loaded"] and document["debug"] and document["signed_for_this"]
    assert document["mrenclave"] == measure(plan).hex()
    assert document["pages"] == plan.page_count == document["resident_pages"]
    assert document["tcs"] == [document["base"] + offset for offset in plan.tcs]


def test_a_refusal_names_leaf_status_and_difference(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign_beside(file)
    sig = bytearray(file.with_suffix(".sig").read_bytes())
    sig[960] ^= 1
    file.with_suffix(".sig").write_bytes(sig)
    assert main(["load", str(file)]) == 1
    assert "refused    " in (out := capsys.readouterr().out)
    assert "EINIT: SGX_INVALID_SIGNATURE" in out and "SIGNATURE: " in out
    assert main(["load", str(file), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["loaded"], document["leaf"]) == (False, "EINIT")
    assert document["status"] == "SGX_INVALID_SIGNATURE" and document["differences"]


def test_a_locked_launch_key_hash_refuses_other_signers(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign_beside(file)
    assert main(["load", str(file), "--launch-key-hash", "17" * 32]) == 1
    assert "SGX_INVALID_EINITTOKEN: the launch key hash is another" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--launch-key-hash", "17"], "give 64 hexadecimal digits"),
        (["--token", "/nowhere"], "give a file with an EINITTOKEN"),
        (["--epc", "4096"], "epc"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    file: Path, options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["load", str(file), *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith("softsgx: ") and err.count("\n") == 1 and problem in err
