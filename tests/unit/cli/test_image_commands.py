"""``softsgx inspect``, ``measure`` and ``sign``: what they print, write, refuse and return."""

from __future__ import annotations

import datetime
import json
import runpy
import stat
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from tests.support.enclave_files import (
    KEY_FILE,
    blob_plan,
    key,
    oe_library,
    raw_file,
    sdk_library,
    selftest_file,
    sgxs_file,
)

from softsgx.arch import SigStruct
from softsgx.cli import VERBS, command_of, main
from softsgx.image import (
    load_key,
    measure,
    mrsigner,
    open_image,
    public_pem,
    read_sigstruct,
    sign_plan,
)

FIELDS = {
    "format", "mrenclave", "mrsigner", "enclavehash", "matches", "signature_valid", "blocks_agree",
    "size", "pages", "tcs",
}  # fmt: skip


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "e.sgxs"
    path.write_bytes(sgxs_file())
    return path


def run_json(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, object]]:
    status = main([str(word) for word in argv])
    document: dict[str, object] = json.loads(capsys.readouterr().out)
    return status, document


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run, and return the one line on stderr of a refusal."""
    assert main([str(word) for word in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("softsgx: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_measure_without_a_signature_is_fine_and_says_null(
    stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, got = run_json(capsys, "measure", stream, "--json")
    assert status == 0
    assert set(got) >= FIELDS
    assert got["mrenclave"] == measure(blob_plan()).hex()
    assert got["tcs"] == list(blob_plan().tcs)
    assert (got["format"], got["pages"]) == ("sgxs", blob_plan().page_count)
    assert all(got[name] is None for name in ("mrsigner", "enclavehash", "matches"))
    assert got["signature_valid"] is None


@pytest.mark.parametrize(
    ("damage", "status", "matches", "valid"),
    [(None, 0, True, True), (1026, 1, True, False), (960, 1, False, False), (700, 1, True, False)],
)
def test_measure_exits_1_when_the_signature_does_not_fit(
    stream: Path,
    capsys: pytest.CaptureFixture[str],
    damage: int | None,
    status: int,
    matches: bool,
    valid: bool,
) -> None:
    sig = bytearray(sign_plan(blob_plan(), key()).pack())
    if damage is not None:
        sig[damage] ^= 1
    given = stream.with_name("given.css")
    given.write_bytes(sig)
    got_status, got = run_json(capsys, "measure", stream, "--sigstruct", given, "--json")
    assert (got_status, got["matches"], got["signature_valid"]) == (status, matches, valid)
    assert got["mrsigner"] == mrsigner(SigStruct.unpack(sig)).hex()


def test_measure_prints_for_people_too(stream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", str(stream)]) == 0
    assert "sigstruct  none" in capsys.readouterr().out
    stream.with_suffix(".sig").write_bytes(sign_plan(blob_plan(), key()).pack())
    assert main(["measure", str(stream)]) == 0
    assert "its signature is valid" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("e.sgxs", sgxs_file()),
        ("e.bin", raw_file()),
        ("e.elf", selftest_file().data),
    ],
)
def test_formats_without_room_are_signed_beside_the_file(
    name: str, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    status, got = run_json(capsys, "sign", path, "--key", KEY_FILE, "--json")
    assert status == 0
    assert got["output"] == str(path.with_suffix(".sig"))
    status, got = run_json(capsys, "measure", path, "--json")
    assert (status, got["matches"], got["signature_valid"]) == (0, True, True)


@pytest.mark.parametrize(
    ("library", "options"),
    [
        (sdk_library, ["--threads", "3", "--heap-max", "64KiB", "--stack-max", "16KiB"]),
        (oe_library, ["--threads", "3", "--heap-init", "64KiB", "--stack-max", "16KiB"]),
    ],
)
def test_libraries_are_signed_inside_a_copy_with_the_layout_asked_for(
    library: object, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = library()  # type: ignore[operator]
    path, out, again = (tmp_path / name for name in ("e.so", "e.signed.so", "again.so"))
    path.write_bytes(made.data)
    assert main(["sign", str(path), "--key", str(KEY_FILE), "-o", str(out), *options]) == 0
    capsys.readouterr()
    status, got = run_json(capsys, "measure", out, "--json")
    assert (status, got["matches"], got["signature_valid"]) == (0, True, True)
    assert len(got["tcs"]) == 3  # type: ignore[arg-type]
    assert path.read_bytes() == made.data
    labels = {run.label: run.pages for run in open_image(out).plan.runs}
    heap = sum(pages for label, pages in labels.items() if label.lower().startswith("heap"))
    assert heap == 16

    argv = ["sign", str(out), "--key", str(KEY_FILE), "-o", str(again), "--isvsvn", "3"]
    assert main(argv) == 0
    sig = open_image(again).sigstruct
    assert sig is not None
    assert sig.isv_svn == 3


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_keys")
def test_a_new_key_is_private_and_of_the_kind_that_sgx_takes(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pem = tmp_path / "new.pem"
    assert main(["sign", "--new-key", str(pem), str(stream)]) == 0
    assert stat.S_IMODE(pem.stat().st_mode) == 0o600
    modulus = load_key(pem.read_bytes()).public_key().public_numbers().n
    sig = read_sigstruct(stream.with_suffix(".sig"))
    assert int.from_bytes(sig.modulus, "little") == modulus
    assert main(["sign", "--new-key", str(tmp_path / "only.pem")]) == 0
    assert (tmp_path / "only.pem").exists()


def test_two_steps_with_a_key_elsewhere_give_what_one_gives(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, signature, public = (tmp_path / name for name in ("data", "signature", "pub.pem"))
    options = ["--isvprodid", "0x12", "--date", "2026-01-31", "--no-debug"]
    assert main(["sign", str(stream), "--gendata", str(data), *options]) == 0
    assert len(data.read_bytes()) == 256
    signature.write_bytes(key().sign(data.read_bytes(), padding.PKCS1v15(), hashes.SHA256()))
    public.write_bytes(public_pem(key().public_key()))
    join = ["--catsig", str(signature), "--data", str(data), "--public-key", str(public)]
    # The date comes from the data, so it need not be said again.
    assert main(["sign", str(stream), *join, "--isvprodid", "0x12", "--no-debug"]) == 0
    whole = stream.with_suffix(".sig").read_bytes()
    one = tmp_path / "one.sig"
    assert main(["sign", str(stream), "--key", str(KEY_FILE), "-o", str(one), *options]) == 0
    assert one.read_bytes() == whole
    capsys.readouterr()

    argv = ["sign", stream, *join, "--isvprodid", "0x13", "--no-debug", "--force"]
    assert "isv_prod_id differ" in refused(capsys, *argv)
    signature.write_bytes(bytes(384))
    argv = ["sign", stream, *join, "--isvprodid", "0x12", "--no-debug", "--force"]
    assert "signature" in refused(capsys, *argv)
    assert "without --data" in refused(capsys, "sign", stream, "--catsig", signature, "--force")


def test_nothing_is_overwritten_without_force(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sig, pem = stream.with_suffix(".sig"), tmp_path / "key.pem"
    for path in (sig, pem):
        path.write_bytes(b"precious")
    for argv in (
        ["sign", stream, "--key", KEY_FILE],
        ["sign", stream, "--gendata", sig],
        ["sign", stream, "--new-key", pem, "-o", tmp_path / "other.sig"],
        ["sign", "--new-key", pem],
    ):
        assert "add --force" in refused(capsys, *argv)
    assert sig.read_bytes() == pem.read_bytes() == b"precious"
    assert main(["sign", str(stream), "--key", str(KEY_FILE), "--force"]) == 0
    assert len(sig.read_bytes()) == 1808


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--isvsvn", "7"], "isv_svn", 7),
        (["--vendor", "0x8086"], "vendor", 0x8086),
        (["--swdefined", "16"], "swdefined", 16),
        (["--date", "2026-01-31"], "date", 0x20260131),
        (["--misc-mask", "0xfffffffe"], "misc_mask", 0xFFFFFFFE),
        (["--miscselect", "1"], "miscselect", 1),
        (["--kss", "--isvfamilyid", "0x1234"], "isv_family_id", b"\x34\x12" + bytes(14)),
        (["--kss", "--isvextprodid", "1"], "isv_ext_prod_id", b"\1" + bytes(15)),
    ],
)
def test_options_reach_the_sigstruct(
    options: list[str], field: str, value: object, stream: Path
) -> None:
    assert main(["sign", str(stream), "--key", str(KEY_FILE), *options]) == 0
    assert getattr(read_sigstruct(stream.with_suffix(".sig")), field) == value


@pytest.mark.parametrize(
    ("options", "flags", "mask"),
    [
        ([], 4, 0xFFFFFFFFFFFFFFFD),
        (["--no-debug"], 4, 0xFFFFFFFFFFFFFFFF),
        (["--attributes", "6", "--attribute-mask", "0"], 6, 0),
        (["--provision-key", "--attribute-mask", "0"], 0x14, 0x10),
        (["--launch-key", "--aex-notify"], 0x424, 0xFFFFFFFFFFFFFFFD),
    ],
)
def test_switches_reach_attributes_and_mask(
    options: list[str], flags: int, mask: int, stream: Path
) -> None:
    assert main(["sign", str(stream), "--key", str(KEY_FILE), *options]) == 0
    sig = read_sigstruct(stream.with_suffix(".sig"))
    assert (sig.attributes.flags, sig.attribute_mask.flags) == (flags, mask)


@pytest.mark.parametrize(("options", "noted"), [([], False), (["--amx", "any"], True)])
def test_frames_too_small_for_what_may_be_saved_are_noted(
    options: list[str], noted: bool, stream: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sign", str(stream), "--key", str(KEY_FILE), *options]) == 0
    assert ("need 3" in capsys.readouterr().err) == noted


def test_the_default_date_is_today(stream: Path) -> None:
    before = datetime.datetime.now(datetime.UTC).date()
    assert main(["sign", str(stream), "--key", str(KEY_FILE)]) == 0
    after = datetime.datetime.now(datetime.UTC).date()
    date = f"{read_sigstruct(stream.with_suffix('.sig')).date:08x}"
    assert date in {before.strftime("%Y%m%d"), after.strftime("%Y%m%d")}


def test_refusals_name_the_file_and_the_remedy(
    stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library = tmp_path / "e.so"
    library.write_bytes(sdk_library().data)
    for argv, why in (
        (["measure", tmp_path / "none"], "No such file"),
        (["measure", library], "sign the library first"),
        (["sign", stream], "no key"),
        (["sign"], "no FILE"),
        (["sign", stream, "--key", stream], "no private key in PEM"),
        (["sign", stream, "--key", tmp_path / "none.pem"], "No such file"),
        (["sign", library, "--key", KEY_FILE], "give one with -o"),
        (["sign", stream, "--key", KEY_FILE, "--threads", "2"], "its layout is fixed"),
        (["sign", stream, "--key", KEY_FILE, "--isvfamilyid", "1"], "needs KSS"),
        (["sign", stream, "--key", KEY_FILE, "--isvfamilyid", hex(1 << 128)], "128 bits"),
        (["sign", library, "--key", KEY_FILE, "--heap-max", "5000"], "whole pages"),
        (["sign", stream, "--key", KEY_FILE, "-o", tmp_path / "no" / "dir"], "No such file"),
    ):
        assert why in refused(capsys, *argv), argv


@pytest.mark.parametrize(
    "argv",
    [
        ["frob"],
        ["measure"],
        ["measure", "x", "--format", "elf"],
        ["sign", "x", "--date", "yesterday"],
        ["sign", "x", "--xfrm", "z"],
        ["sign", "x", "--heap-max", "5 bananas"],
    ],
)
def test_wrong_usage_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2


def test_inspect_tells_runs_threads_metadata_and_signature(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "e.so", tmp_path / "e.signed.so"
    path.write_bytes(sdk_library().data)
    argv = ["sign", str(path), "--key", str(KEY_FILE), "-o", str(out), "--threads", "20"]
    argv += ["--miscselect", "1", "--misc-mask", "0xfffffffe"]
    assert main([*argv, "--heap-init", "16KiB", "--heap-max", "1MiB"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    for told in (
        "metadata 3.3 (this one is used)",
        "metadata 1.5",
        "THREAD_GROUP",
        "×19",
        "HEAP_MAX",
        "POST_ADD",
        "0xcccccccc repeated",
        "+4",
        "× 20",
        "MODE64BIT",
        "free: DEBUG",
        "valid",
        "tcs_policy unbound",
    ):
        assert told in text, told
    status, document = run_json(capsys, "inspect", out, "--json")
    assert status == 0
    assert document["pages"] == open_image(out).plan.page_count
    assert [row["version"] for row in document["metadata"]] == ["3.3", "1.5"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "versions"),
    [
        ([], ["1.5"]),
        (["--heap-max", "32MiB"], ["1.5"]),
        (["--miscselect", "1"], ["3.3"]),  # its stacks may grow
        (["--miscselect", "1", "--heap-max", "32MiB"], ["3.3"]),
        (["--miscselect", "1", "--misc-mask", "0", "--heap-max", "32MiB"], ["3.3", "1.5"]),
    ],
)
def test_the_blocks_written_are_those_that_some_runtime_could_load(
    options: list[str], versions: list[str], tmp_path: Path
) -> None:
    path, out = tmp_path / "e.so", tmp_path / "e.signed.so"
    path.write_bytes(sdk_library().data)
    argv = ["sign", str(path), "--key", str(KEY_FILE), "-o", str(out), "--heap-init", "16MiB"]
    assert main([*argv, *options]) == 0
    assert [variant.name for variant in open_image(out).variants] == versions


def test_inspect_shows_a_bare_sigstruct(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.sig"
    path.write_bytes(sign_plan(blob_plan(), key()).pack())
    assert main(["inspect", str(path)]) == 0
    assert measure(blob_plan()).hex() in capsys.readouterr().out
    _, document = run_json(capsys, "inspect", path, "--json")
    assert document["format"] == "sigstruct"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    _, document = run_json(capsys, "inspect", path, "--json")
    assert "Q2" in document["sigstruct"]["signature"]  # type: ignore[index]


@pytest.mark.parametrize("name", ["sgxs", "raw", "selftest", "oe"])
def test_inspect_reads_every_format(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "sgxs": sgxs_file(), "raw": raw_file(), "selftest": selftest_file().data,
        "oe": oe_library().data,
    }  # fmt: skip
    path = tmp_path / "enclave"
    path.write_bytes(files[name])
    assert main(["inspect", str(path)]) == 0
    assert f": {name}" in capsys.readouterr().out


def test_names_in_files_are_not_taken_for_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "[bold]e.sgxs"
    path.write_bytes(sgxs_file())
    assert main(["inspect", str(path)]) == 0
    assert "[bold]e.sgxs" in capsys.readouterr().out


def test_help_says_that_it_is_an_emulation_and_teaches_by_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "protects nothing" in text
    for command in map(command_of, VERBS):
        with pytest.raises(SystemExit) as exit_info:
            main([command.NAME, "--help"])
        assert exit_info.value.code == 0
        assert f"softsgx {command.NAME}" in capsys.readouterr().out


def test_the_package_can_be_run(
    stream: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["softsgx", "measure", str(stream)])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module("softsgx", run_name="__main__")
    assert exit_info.value.code == 0
    assert measure(blob_plan()).hex() in capsys.readouterr().out


def test_without_a_verb_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "VERB" in capsys.readouterr().out
