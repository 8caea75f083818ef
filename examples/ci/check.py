"""Fail a job when a program pages more than it may: check.py run.json MOST_RELOADS."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    """Return 1 when the enclaves of a run have reloaded more pages than the limit."""
    report, most = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])
    reloads = sum(enclave["reloads"] for enclave in report["enclaves"])
    print(f"{reloads} reloads, at most {most} allowed")
    return int(reloads > most)


if __name__ == "__main__":
    sys.exit(main())
