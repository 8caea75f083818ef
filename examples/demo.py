"""Build an example enclave and run it with an EPC a quarter of its size.

    python3 tools/dev.py demo             sets the environment up first
    python3 examples/demo.py sorter       in an environment that has softsgx
    python3 examples/demo.py kvstore --epc 8MiB 20000

The example is built in a temporary directory, which is removed afterwards.  Exit status: 0 when the
example ran and verified its own result.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEAPS = {"matrix": "13MiB", "sorter": "14MiB", "kvstore": "14MiB"}
SHARE = 4


def main() -> int:
    """Build and run the example, and announce each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("example", nargs="?", choices=sorted(HEAPS), default="matrix")
    parser.add_argument("size", nargs="?", help="of its input (default: what fits its heap)")
    parser.add_argument("--heap", metavar="SIZE", help="of the enclave, for other input sizes")
    parser.add_argument("--epc", metavar="SIZE", help="default: a quarter of the enclave")
    args = parser.parse_args()

    say(1, "Can programs be run here?")
    if not can_run():
        return tour_instead()
    with tempfile.TemporaryDirectory(prefix="softsgx-demo-") as scratch:
        say(2, f"Build the example {args.example!r}: an enclave and its host program, both in C.")
        built = build(args.example, Path(scratch), args.heap or HEAPS[args.example])
        if built is None:
            print("\nThe example was not built; the lines above say why.", file=sys.stderr)
            return 1
        pages = int(str(built["pages"]))
        epc = args.epc or f"{pages // SHARE * 4}KiB"
        share = "" if args.epc else f", a quarter of its {pages * 4}KiB"
        say(3, f"Run it with an EPC of {epc}{share}; it checks its result.")
        names = [Path(str(built[part])).name for part in ("host", "output")]
        program = [f"./{names[0]}", names[1], *([args.size] if args.size else [])]
        status = softsgx("run", "--epc", epc, "--cpus", "1", "--", *program, cwd=scratch)
    if status:
        print(f"\nThe example ended with status {status}.", file=sys.stderr)
        return 1
    return 0


def build(example: str, scratch: Path, heap: str) -> dict[str, object] | None:
    """Build into ``scratch``; return the object of ``softsgx build --json``; None: it failed."""
    source = HERE / example
    arguments = ["build", str(source / "enclave.c"), "--host", str(source / "host.c")]
    arguments += ["--heap", heap, "-o", str(scratch / f"{example}.sgxs")]
    done = subprocess.run(command(*arguments, "--json"), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        return None
    document: dict[str, object] = json.loads(done.stdout)
    print(f"   MRENCLAVE {document['mrenclave']}", flush=True)
    return document


def can_run() -> bool:
    """Print the output of ``softsgx doctor``; return whether programs can run here."""
    return softsgx("doctor") == 0


def tour_instead() -> int:
    """Print that programs cannot run here, and run ``softsgx tour`` instead."""
    print(
        "\nThis machine does not let programs be traced, so the example cannot run here: the lines "
        "above say what\nto change (a container needs --cap-add=SYS_PTRACE). This is NOT the demo: "
        "instead, the tour of the\nsame machine, which needs nothing of that kind.",
        flush=True,
    )
    softsgx("tour")
    return 1


def softsgx(*arguments: str, cwd: str | None = None) -> int:
    """Print a softsgx command, run it, and return its exit status."""
    print(f"   $ softsgx {shlex.join(arguments)}", flush=True)
    return subprocess.run(command(*arguments), check=False, cwd=cwd).returncode


def command(*arguments: str) -> list[str]:
    """Return the command line of softsgx in this very environment."""
    return [sys.executable, "-m", "softsgx", *arguments]


def say(step: int, text: str) -> None:
    """Announce a step."""
    print(f"\n{step}. {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
