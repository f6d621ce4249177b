"""Findings as a table for people: what was checked, how it went, what was found."""

from __future__ import annotations

from collections.abc import Sequence

from specforge_lite.checkpoints.contract import Finding

COLOURS = {"ok": "green", "skipped": "yellow", "warning": "yellow", "broken": "bold red"}


def print_findings(title: str, findings: Sequence[Finding]) -> None:
    """Print the table, then one `broken:` line per finding that is."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found")
    for finding in findings:
        level = "OK" if finding.level == "ok" else finding.level.upper()
        table.add_row(finding.check, f"[{COLOURS[finding.level]}]{level}[/]", escape(finding.message))
    Console().print(table)
    for finding in findings:
        if finding.is_broken:
            print(f"broken: {finding.check}: {finding.message}", flush=True)
