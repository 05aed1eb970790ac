"""A report as lines for a terminal, and as one JSON document."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moetools.analysis import Finding
from moetools.reporting import page, tables
from moetools.reporting.report import ALL_TRACES, Report

MAX_LAYERS = 24


def lines(report: Report) -> Iterator[RenderableType]:
    """What a terminal shows: coverage, findings in words, main numbers, where the rest is."""
    several = len(report.traces) > 1
    if ALL_TRACES in report.findings:
        yield Text(ALL_TRACES, style="bold")
        yield from _findings(report.findings[ALL_TRACES])
    for trace in report.traces:
        manifest = trace.manifest
        named = several and trace.name != manifest.model
        yield Text(f"{trace.name}: {manifest.title}" if named else manifest.title, style="bold")
        groups = f", {len(trace.groups)} groups" if trace.groups else ""
        coverage = manifest.coverage or f"{trace.num_tokens:,} tokens"
        yield Text(f"{coverage}; {trace.num_sequences:,} sequences{groups}")
        if not manifest.complete:
            yield Text("This trace is incomplete.", style="bold")
        yield from _findings(report.findings[trace.name])
    table = tables.headline_table(report.metrics, [trace.name for trace in report.traces])
    if table.rows:
        step = -(-len(table.rows) // MAX_LAYERS)
        yield Text(table.title + (f", one of {step} shown" if step > 1 else ""), style="bold")
        yield _rich(table, step)
    for name, reason in report.results.skipped.items():
        yield Text(f"Not run: {name}. {reason}")
    yield Text(f"Report: {report.path / 'report.html'}")


def as_json(report: Report) -> dict[str, Any]:
    """The document of `metrics.json` with the findings and the place of the report."""
    findings = {
        trace: [asdict(finding) for finding in found] for trace, found in report.findings.items()
    }
    return {**report.metrics, "findings": findings, "report": str(report.path / "report.html")}


def _findings(found: Iterable[Finding]) -> Iterator[RenderableType]:
    unusual, usual = page.split_findings(found)
    yield Text()
    for heading, some in (("Unusual", unusual), ("Also", usual)):
        if some:
            yield Text(heading, style="bold")
            yield from (_item(finding.text) for finding in some)
    yield Text()


def _item(text: str) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_row("•", Text(text))
    return Padding(grid, (0, 0, 0, 2))


def _rich(table: tables.Table, step: int) -> RenderableType:
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for name in table.names:
        shown.add_column(name)
    for column in table.columns:
        shown.add_column(column[0], justify="right", overflow="fold")
    for row in [*table.rows[:-1:step], table.rows[-1]]:
        shown.add_row(*(Text(cell.text) for cell in row))
    return shown
