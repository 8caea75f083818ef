"""Show what this machine allows, and which engine and pager programs would use.

Every line is the result of a probe.  A line about something missing has its consequence and the
remedy.

Examples:
  softsgx doctor
  softsgx doctor --json | jq -r .pager

exit status: 0 programs can run here; 1 they cannot.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from softsgx.cli._common import print_json
from softsgx.engines.native import Finding, choose_pager, doctor

__all__ = ["NAME", "configure", "run"]

NAME = "doctor"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Probe and print."""
    findings = doctor()
    missing = [finding for finding in findings if finding.needed and not finding.ok]
    engine = None if missing else "native"
    pager = None if missing else choose_pager()
    if args.json:
        print_json(
            {
                "engine": engine,
                "pager": pager,
                "findings": [asdict(finding) for finding in findings],
            }
        )
    else:
        _print(findings, missing, pager)
    return 1 if missing else 0


def _print(findings: list[Finding], missing: list[Finding], pager: str | None) -> None:
    console = Console(highlight=False, markup=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        table.add_row(*_verdict(finding), finding.text)
    console.print(table)
    if missing:
        names = ", ".join(finding.name for finding in missing)
        console.print(f"softsgx run: cannot run here; missing: {names}", style="bold red")
    else:
        console.print(f"softsgx run: engine native, pager {pager}", style="bold green")


def _verdict(finding: Finding) -> tuple[str, str]:
    if finding.ok:
        return "ok", finding.name
    return "MISSING" if finding.needed else "degraded", finding.name
