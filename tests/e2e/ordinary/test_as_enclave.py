"""Ordinary programs recorded with ``--as-enclave`` behave as without it, and pages are counted.

Goal: outputs, exit statuses and contents of memory while pages are hidden and shown; which pages
are counted and when.  Method: programs of Debian and of this folder, with and without the recorder.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from tests.e2e.native.test_unsupervised import elf32, load
from tests.e2e.ordinary.recording import COMPILER, MS, compile_program, record
from tests.support.children import running
from tests.support.native import needs_tracing

from softsgx.engines.ordinary import can_record
from softsgx.errors import NotRun, SoftSgxError

JSON = """
import json
rows = [{"id": i, "name": f"n{i}", "values": [i * k for k in range(5)]} for i in range(1500)]
text = json.dumps(rows)
print(len(text), sum(row["values"][4] for row in json.loads(text)))
"""
SQL = b"""
create table t(a integer primary key, b text);
with recursive c(x) as (select 1 union all select x + 1 from c where x < 5000)
  insert into t select x, 'row' || (x * 7919 % 10007) from c;
create index i on t(b);
select count(*), sum(a) from t where b like 'row1%';
select b, count(*) from t group by b order by 2 desc, 1 limit 5;
"""
PIPES = """
for i in 1 2 3; do echo $i | (cat; ls / | wc -l); done
x=$(seq 1 500 | sort -r | head -3 | tr '\\n' ' '); echo $x
(exit 7)
"""
BLOCK = 512

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(not can_record(), reason="needs userfaultfd for accesses of system calls"),
    needs_tracing,
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ordinary")


def is_the_same(argv: list[str], *, interval_ms: float = 10, given: bytes = b"") -> None:
    alone = subprocess.run(argv, input=given, stdout=subprocess.PIPE, check=False)
    result, output, recorded = record(argv, interval_ms=interval_ms, given=given)
    assert (result.exit_code, output) == (alone.returncode, alone.stdout)
    assert recorded.accesses, "nothing was recorded"
    assert result.counts.accesses == len(recorded.accesses)


# --- what the program sees ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "options", "given"),
    [
        (sys.executable, ["-I", "-c", JSON], b""),
        ("sqlite3", [":memory:"], SQL),
        ("sort", [], "\n".join(map(str, random.Random(1).sample(range(9**9), 5000))).encode()),
        ("gzip", ["-cn"], random.Random(2).randbytes(300_000) + bytes(300_000)),
        ("bash", ["-c", PIPES], b""),
    ],
    ids=["python3", "sqlite3", "sort", "gzip", "pipes"],
)
def test_a_program_behaves_as_without_the_recorder(
    program: str, options: list[str], given: bytes
) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"needs {program}")
    is_the_same([path, *options], given=given)


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-static",)], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["threads", "forks", "mappings", "touch"])
def test_memory_keeps_its_content_while_pages_are_hidden(
    directory: Path, name: str, options: tuple[str, ...]
) -> None:
    is_the_same([compile_program(directory, name, *options)], interval_ms=1)


def test_a_signal_that_ends_the_program_is_its_result() -> None:
    result, _output, _recorded = record(["/bin/sh", "-c", "kill -9 $$"])
    assert result.exit_code == -9


# --- what is counted ------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_interval_has_the_pages_that_were_used_in_it(directory: Path) -> None:
    _result, _output, recorded = record([compile_program(directory, "phases")])
    phases = [{page for page in range(BLOCK) if page % step == 0} for step in (2, 3, 4)]
    block = array_block(recorded.accesses, set().union(*phases))
    intervals = split([each for each in recorded.accesses if each[1] // BLOCK == block])
    used = [{page % BLOCK for _enclave, page, _write, _time in each} for each in intervals]
    stored = [
        {page % BLOCK for _enclave, page, write, _time in each if write} for each in intervals
    ]
    odd = {page for page in range(BLOCK) if page % 2}
    # An interval in which the phase changes, and the first and last, have parts of phases.
    for phase in phases:
        whole = [at for at, pages in enumerate(used) if pages == phase]
        assert len(whole) >= 2, "a phase of 80 ms has whole intervals of 10 ms"
        assert all(stored[at] == phase & odd for at in whole), "W is where the program wrote"
    either = [phases[0] | phases[1], phases[1] | phases[2]]
    assert all(any(pages <= each for each in either) for pages in used)


def array_block(accesses: list[tuple[int, int, bool, int]], pages: set[int]) -> int:
    """Return which block of the trace's page numbers is the program's array."""
    blocks: dict[int, set[int]] = {}
    for _enclave, page, _write, _time in accesses:
        blocks.setdefault(page // BLOCK, set()).add(page % BLOCK)
    (found,) = [block for block, touched in blocks.items() if touched == pages]
    return found


def split(
    accesses: list[tuple[int, int, bool, int]],
) -> list[list[tuple[int, int, bool, int]]]:
    """Split accesses into intervals: a page that is there for a second time begins another one."""
    intervals: list[list[tuple[int, int, bool, int]]] = [[]]
    seen: set[int] = set()
    for access in accesses:
        if access[1] in seen:
            seen.clear()
            intervals.append([])
        seen.add(access[1])
        intervals[-1].append(access)
    return intervals


def test_pages_that_are_unmapped_and_processes_that_end_are_gone(directory: Path) -> None:
    result, _output, recorded = record([compile_program(directory, "gone")])
    assert result.exit_code == 0
    block = array_block(recorded.accesses, {*range(100), *range(300, 310)})
    events: dict[int, list[str]] = {}
    for enclave, page, how in recorded.events:
        if enclave == 0 and page // BLOCK == block and how != "ended":
            events.setdefault(page % BLOCK, []).append(how[0])
    assert all("r" not in events[page] for page in (*range(10), *range(60, 90)))
    assert [page for page in events if events[page][-1] == "r"] == [*range(20, 60), *range(90, 100)]
    # A thread that the end of an interval interrupts stores again.
    assert all(re.fullmatch("W+rW+", "".join(events[page])) for page in range(10, 20))
    ends = [enclave for enclave, _page, how in recorded.events if how == "ended"]
    assert ends == [1, 0], "the child ends before its parent"


def test_a_break_that_shrinks_gives_its_pages_back(directory: Path) -> None:
    result, _output, recorded = record([compile_program(directory, "gone"), "brk"])
    assert result.exit_code == 0
    gone = [page for _enclave, page, how in recorded.events if how == "removed"]
    pages = {page for _enclave, page, _write, _time in recorded.accesses}
    longest = max(len(run) for run in runs_of(gone))
    assert longest == 60
    assert set(gone) <= pages


def test_an_address_space_ends_when_another_program_is_executed() -> None:
    _result, _output, recorded = record(["sh", "-c", "exec true"])
    assert [name for name, _pages, _pid in recorded.enclaves] == ["dash", "true"]
    ends = [at for at, (_enclave, _page, how) in enumerate(recorded.events) if how == "ended"]
    assert [recorded.events[at][0] for at in ends] == [0, 1]
    assert {enclave for enclave, _page, _how in recorded.events[ends[0] + 1 :]} == {1}


def runs_of(pages: list[int]) -> list[list[int]]:
    """Split pages into runs, in which each is one more than the one before."""
    runs: list[list[int]] = []
    for page in pages:
        if runs and runs[-1][-1] + 1 == page:
            runs[-1].append(page)
        else:
            runs.append([page])
    return runs


@pytest.mark.slow
def test_a_program_that_touches_more_pages_has_as_many_more_in_its_trace(directory: Path) -> None:
    program = compile_program(directory, "touch")
    few, many = (record([program, pages])[0].counts.pages for pages in ("10", "1510"))
    # Where ASLR puts stack and data decides how many pages they share.
    assert 1480 <= many - few <= 1520


@pytest.mark.slow
def test_pages_of_python_are_those_that_smaps_says() -> None:
    script = "import json; print(open('/proc/self/smaps_rollup').read())"
    text = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, check=True
    ).stdout
    rss_pages = int(re.search(rb"Rss: +(\d+) kB", text)[1]) // 4  # type: ignore[index]
    pages = record([sys.executable, "-I", "-c", script])[0].counts.pages
    # Fault-around of the kernel maps pages of files that are not accessed: they are in Rss only.
    assert 0.4 * rss_pages <= pages <= 1.05 * rss_pages


def test_accesses_are_in_order_of_time_and_pages_within_their_enclave() -> None:
    _result, _output, recorded = record(["/bin/sh", "-c", "true; /bin/true"], interval_ms=1)
    times = [time_ns for _enclave, _page, _write, time_ns in recorded.accesses]
    assert all(before <= after for before, after in pairwise(times))
    for enclave, page, _write, _time in recorded.accesses:
        assert page < recorded.enclaves[enclave][1]  # type: ignore[operator]
    assert {name for name, _pages, _pid in recorded.enclaves} >= {"true"}


def test_an_interval_that_is_not_over_has_each_page_once(directory: Path) -> None:
    program = compile_program(directory, "touch")
    _result, _output, recorded = record([program, "50", "3"], interval_ms=100_000)
    pages = [page for _enclave, page, _write, _time in recorded.accesses]
    assert len(pages) == len(set(pages))


# --- ends and refusals ----------------------------------------------------------------------------

KILLED = """
import sys
from tests.e2e.native.test_unsupervised import elf32, load
from tests.e2e.ordinary.recording import Recorded
from softsgx.engines.ordinary import record_as_enclave
record_as_enclave(sys.argv[1:], Recorded(), interval_ns=1_000_000)
"""


def test_no_process_stays_when_the_recorder_is_killed() -> None:
    with running(
        [sys.executable, "-c", KILLED, "/bin/sh", "-c", "echo ready; (cat <&3; :) 3<&0; :"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as recorder:
        assert recorder.stdout is not None
        assert recorder.stdout.readline() == b"ready\n"
        recorder.kill()
        # The pipe has an end while any process of the program is there, also a stopped one.
        assert recorder.stdout.read() == b""


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
def test_a_user_without_the_right_is_told_what_to_change() -> None:
    sysctl = Path("/proc/sys/vm/unprivileged_userfaultfd")
    if sysctl.read_text().strip() != "0":
        pytest.skip("everybody may here")
    done = subprocess.run(
        [
            *("setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"),
            *(sys.executable, "-c", KILLED, "/bin/true"),
        ],
        capture_output=True,
        check=False,
    )
    last = done.stderr.decode().splitlines()[-1]
    assert "NotRun: userfaultfd: not allowed" in last
    assert "sysctl vm.unprivileged_userfaultfd=1" in last


def test_a_program_that_is_not_there_is_not_run() -> None:
    with pytest.raises(NotRun, match="no-such-program: No such file"):
        record(["no-such-program"])


def test_an_interval_is_of_the_program_s_own_time() -> None:
    result, _output, _recorded = record(["/bin/true"], interval_ms=1)
    counts = result.counts
    assert counts.intervals * MS <= result.wall_ns - counts.serving_ns + MS


def test_a_32_bit_program_is_refused_in_one_line(tmp_path: Path) -> None:
    exits = load(3, 0) + load(0, 1) + b"\xcd\x80"
    with pytest.raises(SoftSgxError, match="memory of 32-bit programs cannot be recorded"):
        record([elf32(tmp_path / "small", exits)])
