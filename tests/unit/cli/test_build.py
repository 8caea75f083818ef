"""``softsgx build``: what it lays out, what it refuses, and that it always makes the same.

Goal: the layout against the table in its module; determinism; one line for every refusal.
Method: ``lay_out`` gets images made by hand, so it needs no compiler and its measurement is golden;
the command gets C sources and the compiler of the machine.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.elfmaker import RW, RX, R, Seg, make_elf

from softsgx.arch import PAGE_BYTES, Tcs
from softsgx.cli import main
from softsgx.errors import SoftSgxError
from softsgx.image import (
    MASK_ALL,
    MASK_NONE,
    SECINFO_R,
    SECINFO_RW,
    SECINFO_RX,
    Bytes,
    Plan,
    check_signature,
    key_pem,
    load_key,
    measure,
    mrsigner,
    open_image,
    public_pem,
    read_image,
    write_sgxs,
)
from softsgx.image.csource import INCLUDE, BuildOptions, compiler, find_compiler, lay_out

GOLDEN = Path(__file__).parents[2] / "golden"
RELATIVE, GLOB_DAT = 8, 6
SOURCE = """\
#include <softsgx.h>
static const char *const name = __FILE__;
long ecall(unsigned long function, void *argument, size_t size)
{
#ifdef OTHER
    function++;
#endif
    return name[function % 3] + VALUE;
}
"""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no cc")


def image(
    code: bytes = b"\x90" * 100,
    data: bytes = b"data",
    *,
    bss: int = 0,
    entry: int = 0,
    relocation: int = RELATIVE,
) -> Bytes:
    """A linked image as a linker would leave it: code, constants with relocations, data."""
    data_at = 2 * PAGE_BYTES
    rela = struct.pack("<QQq", data_at, relocation, 0x10)
    made = make_elf(
        [
            Seg(0, code, RX),
            Seg(PAGE_BYTES, rela, R),
            Seg(data_at, data, RW, memsz=len(data) + bss),
        ],
        dynamic=[(7, PAGE_BYTES), (8, len(rela))],
        dynamic_at=data_at,
        entry=entry,
    )
    return Bytes("image.elf", made.data)


def page_at(plan: Plan, offset: int) -> bytes:
    run = plan.find(offset)
    assert run is not None
    return bytes(run.page((offset - run.offset) // PAGE_BYTES).data)


# --- layout -------------------------------------------------------------------------------------


def test_the_measurement_of_an_image_never_changes(update_golden: bool) -> None:
    path = GOLDEN / "build.json"
    options = {
        "small": BuildOptions(),
        "threads": BuildOptions(threads=5, stack_bytes=8192, heap_bytes=0),
        "large": BuildOptions(heap_bytes=64 << 20),
    }
    found = {
        name: measure(lay_out(image(bss=9000), option)).hex() for name, option in options.items()
    }
    if update_golden:
        path.write_text(json.dumps(found, indent=2) + "\n")
    assert found == json.loads(path.read_text())


@given(
    threads=st.integers(1, 9),
    stack=st.integers(1, 40),
    heap=st.integers(0, 3000),
    bss=st.integers(0, 20000),
)
def test_every_thread_has_what_the_runtime_looks_for(
    threads: int, stack: int, heap: int, bss: int
) -> None:
    options = BuildOptions(
        threads=threads, stack_bytes=stack * PAGE_BYTES, heap_bytes=heap * PAGE_BYTES
    )
    plan = lay_out(image(bss=bss), options)
    assert len(plan.tcs) == threads
    for number, at in enumerate(plan.tcs):
        tcs = Tcs.unpack(page_at(plan, at))
        assert (tcs.oentry, tcs.nssa, tcs.cssa) == (0, 2, 0)
        page, size, heap_at, heap_bytes, told = struct.unpack(
            "<5Q", page_at(plan, tcs.ogs_base)[:40]
        )
        assert (page, size, told) == (tcs.ogs_base, plan.size, number)
        assert page == tcs.ossa + 2 * PAGE_BYTES == at + 3 * PAGE_BYTES
        assert heap_bytes == heap * PAGE_BYTES
        for index in range(1, stack + 1):
            below = plan.find(at - index * PAGE_BYTES)
            assert below is not None and below.flags == SECINFO_RW
        assert plan.find(at - (stack + 1) * PAGE_BYTES) is None, "no guard below the stack"
        thread_page = plan.find(page)
        assert thread_page is not None and thread_page.flags == SECINFO_R
        assert plan.find(heap_at - PAGE_BYTES) is None, "no guard below the heap"
        if heap:
            run = plan.find(heap_at)
            assert run is not None
            assert (run.offset, run.pages, run.mask) == (heap_at, heap, MASK_NONE)


def test_rights_are_the_segments_and_all_but_the_heap_is_measured() -> None:
    plan = lay_out(image(bss=2 * PAGE_BYTES), BuildOptions())
    flags = [plan.find(page * PAGE_BYTES) for page in range(5)]
    assert [run.flags if run else None for run in flags] == [
        SECINFO_RX,
        SECINFO_R,
        SECINFO_RW,
        SECINFO_RW,
        SECINFO_RW,
    ]
    assert {run.mask for run in plan.runs if run.label != "heap"} == {MASK_ALL}
    assert page_at(plan, 0)[:100] == b"\x90" * 100


def test_the_stream_reads_back_as_the_plan() -> None:
    plan = lay_out(image(), BuildOptions(threads=2))
    again = read_image(Bytes("x.sgxs", b"".join(write_sgxs(plan)))).plan
    assert (again.size, again.tcs, measure(again)) == (plan.size, plan.tcs, measure(plan))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (image(entry=PAGE_BYTES), "in no code"),
        (image(relocation=GLOB_DAT), "relocation type 6"),
        (image(code=b"\x90" * 5000), "on its own pages"),
    ],
)
def test_an_image_that_the_runtime_could_not_start_is_refused(broken: Bytes, said: str) -> None:
    with pytest.raises(SoftSgxError, match=said):
        lay_out(broken, BuildOptions())


@pytest.mark.parametrize(
    "sizes",
    [
        {"heap_bytes": 5000},
        {"stack_bytes": 0},
        {"stack_bytes": 4097},
        {"heap_bytes": 1 << 50},
        {"threads": 0},
        {"threads": 5000},
    ],
)
def test_sizes_that_no_enclave_has_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(SoftSgxError, match="give"):
        BuildOptions(**sizes)


# --- the command --------------------------------------------------------------------------------


def build(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, str]:
    key = ["--key", str(GOLDEN / "signing-key.pem")]  # making one takes longer than all the rest
    assert main(["build", "--json", *key, *map(str, arguments)]) == 0
    document: dict[str, str] = json.loads(capsys.readouterr().out)
    return document


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command line that is bad input; return its one line."""
    assert main(["build", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("softsgx: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "inside.c"
    path.write_text(SOURCE.replace("VALUE", "1"))
    return path


@pytest.mark.slow
@needs_cc
def test_the_same_source_gives_the_same_enclave_wherever_it_lies(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    elsewhere = tmp_path / "a longer, deeper" / "place"
    elsewhere.mkdir(parents=True)
    shutil.copy(source, elsewhere)
    first = build(capsys, source, "-o", tmp_path / "one.sgxs")
    monkeypatch.chdir(elsewhere)
    second = build(capsys, "inside.c")
    assert first["mrenclave"] == second["mrenclave"]
    assert second["output"] == "inside.sgxs"
    assert (tmp_path / "one.sgxs").read_bytes() == (elsewhere / "inside.sgxs").read_bytes()


@needs_cc
@pytest.mark.slow
def test_what_changes_the_enclave_changes_its_measurement(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("-o", tmp_path / "x.sgxs", "--force")
    builds = [
        (),
        ("--heap", "2MiB"),
        ("--stack", "4KiB"),
        ("--threads", "2"),
        ("--cflags=-O1 -DOTHER",),
    ]
    found = {build(capsys, source, *out, *options)["mrenclave"] for options in builds}
    source.write_text(SOURCE.replace("VALUE", "2"))
    found.add(build(capsys, source, *out)["mrenclave"])
    assert len(found) == len(builds) + 1


@needs_cc
def test_the_signature_beside_the_stream_is_the_keys_and_fits(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = GOLDEN / "signing-key.pem"
    built = build(capsys, source, "-o", tmp_path / "x.sgxs")
    opened = open_image(tmp_path / "x.sgxs")
    assert opened.sigstruct is not None
    assert check_signature(opened.sigstruct) is None
    assert (
        opened.sigstruct.enclave_hash == measure(opened.plan) == bytes.fromhex(built["mrenclave"])
    )
    modulus = load_key(key.read_bytes()).public_key().public_numbers().n
    assert opened.sigstruct.modulus == modulus.to_bytes(384, "little")
    assert mrsigner(opened.sigstruct).hex() == built["mrsigner"]
    assert main(["measure", str(tmp_path / "x.sgxs")]) == 0


@needs_cc
@pytest.mark.slow
def test_nothing_is_overwritten_without_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("x.sgxs", "x.sig", "hosting"):
        (tmp_path / name).write_text("precious")
        (tmp_path / "hosting.c").write_text("int main(void) { return 0; }")
        line = (source, "-o", tmp_path / "x.sgxs", "--host", tmp_path / "hosting.c")
        assert f"{name}: exists" in refused(capsys, *line)
        assert (tmp_path / name).read_text() == "precious"
        build(capsys, *line, "--force")
        for made in ("x.sgxs", "x.sig", "hosting"):
            (tmp_path / made).unlink()


@needs_cc
@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("long ecall(void) { return undeclared; }", "undeclared"),
        ("int nothing;", "ecall"),
        ("static __thread int mine; long ecall(void) { return mine++; }", "thread-local"),
        ('long puts(const char *); long ecall(void) { return puts(""); }', "puts"),
    ],
)
def test_what_does_not_compile_is_bad_input_and_leaves_nothing(
    text: str, told: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.c").write_text(text)
    assert main(["build", str(tmp_path / "bad.c"), "-o", str(tmp_path / "x.sgxs")]) == 2
    error = capfd.readouterr().err
    assert told in error
    assert error.splitlines()[-1].startswith(f"softsgx: {tmp_path}/bad.c: ")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.c"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "no SOURCE.c"),
        (("missing.c",), "missing.c: no such file"),
        (("missing.c", "--heap", "5000"), "--heap 5000"),
        (("missing.c", "-o", "x.sig"), "end OUT with .sgxs"),
        (("missing.c", "--cc", "no-such-compiler-anywhere"), "no such program"),
        (("missing.c", "--key", "no-such-key.pem"), "no-such-key.pem"),
    ],
)
def test_bad_input_is_reported_in_one_line(
    arguments: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "--cc" not in arguments:
        monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert said in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_public_key_cannot_sign(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private = load_key((GOLDEN / "signing-key.pem").read_bytes())
    assert b"PRIVATE" in key_pem(private)
    (tmp_path / "public.pem").write_bytes(public_pem(private.public_key()))
    assert "no private key" in refused(capsys, source, "--key", tmp_path / "public.pem")


def test_cc_comes_before_ziglang_and_without_both_the_error_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert find_compiler().command == ("cc",)
    assert find_compiler("clang -O3 '-DN=a b'").command == ("clang", "-O3", "-DN=a b")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert find_compiler().command[1:4] == ("-m", "ziglang", "cc")
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(SoftSgxError, match=r"no C compiler; .*softsgx\[cc\]"):
        find_compiler()


def test_the_headers_are_where_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--include"]) == 0
    said = Path(capsys.readouterr().out.strip())
    assert said == INCLUDE
    names = {path.name for path in said.iterdir()}
    assert names == {"softsgx.h", "softsgx_keys.h", "softsgx_host.h"}
