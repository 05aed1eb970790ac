"""Analyse traces and write one folder: `report.html`, `metrics.json` and `tables/`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from moetools import analysis, console, registry
from moetools.analysis import Analysis, Finding, Options, Results
from moetools.errors import RequestError
from moetools.files import output_folder
from moetools.reporting import metrics, page, style
from moetools.trace_store import TraceStore

AnyPath = str | PathLike[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A written report and what is in it.

    Attributes:
        path: The folder.
        traces: The traces, opened.
        results: Full tables, and reasons for what did not run.
        metrics: The document of `metrics.json`.
        findings: Sentences about each trace by its name, most unusual first.
    """

    path: Path
    traces: tuple[TraceStore, ...]
    results: Results
    metrics: dict[str, Any]
    findings: dict[str, list[Finding]]


def report(
    traces: AnyPath | Sequence[AnyPath],
    *,
    out: AnyPath,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    partial: bool = False,
    csv: bool = False,
    expert_intervals: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> Report:
    """Run all analyses that the traces allow and write the report.

    Args:
        traces: One trace folder or several, which are compared side by side.
        out: The folder to write.
        only: Names of analyses to run; all by default.
        skip: Names of analyses to leave out.
        partial: Accept incomplete traces.
        csv: Write every table as CSV too.
        expert_intervals: Intervals for single experts too, which takes longer.
        seed: Seed of resampling.
        overwrite: Replace a report that moetools wrote there.

    Raises:
        TraceError: A trace is unreadable, incomplete, or of another format.
        RequestError: An unknown analysis, traces of different engines, or nothing to analyse.
        OutputError: `out` may not be written.
    """
    paths = [Path(p) for p in ([traces] if isinstance(traces, str | PathLike) else traces)]
    chosen = analysis.choose(only, skip)
    stores = open_traces(paths, partial=partial)
    options = Options(seed=seed, expert_intervals=expert_intervals)
    with output_folder(Path(out), kind="report", overwrite=overwrite, inputs=paths) as folder:
        written = write(stores, folder.path, chosen=chosen, options=options, csv=csv)
    return replace(written, path=Path(out))


def write(
    traces: Sequence[TraceStore],
    folder: Path,
    *,
    chosen: Sequence[str] = (),
    options: Options | None = None,
    csv: bool = False,
) -> Report:
    """Write a report into a folder that the caller has claimed.

    Args:
        traces: Traces under names that differ.
        folder: An existing folder.
        chosen: Names of analyses to run; all by default.
        options: What every analysis is told.
        csv: Write every table as CSV too.

    Raises:
        RequestError: No analysis can read these traces.
    """
    results = analysis.run(traces, only=chosen, options=options)
    if not results.tables:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in results.skipped.items())
        raise RequestError(f"No analysis can read these traces. {reasons}")
    analyses = {name: registry.load("analyses", name).ANALYSIS for name in results.tables}
    document = metrics.document(traces, results)
    findings = {trace.name: all_findings(analyses, results.tables, trace.name) for trace in traces}
    write_tables(folder / "tables", results.tables, csv=csv)
    metrics.write(folder / "metrics.json", document)
    console.note("Drawing the report")
    html = page.render(traces, analyses, document, findings, draw(analyses, results.tables))
    (folder / "report.html").write_text(html, encoding="utf-8")
    return Report(
        path=folder, traces=tuple(traces), results=results, metrics=document, findings=findings
    )


def open_traces(paths: Sequence[Path], *, partial: bool = False) -> list[TraceStore]:
    """Open traces under names that differ.

    Raises:
        TraceError: A trace cannot be read.
        RequestError: No trace, one named twice, or traces of different engines.
    """
    real = [path.resolve() for path in paths]
    if not real:
        raise RequestError("Name at least one trace.")
    for path, resolved in zip(paths, real, strict=True):
        if real.count(resolved) > 1:
            raise RequestError(f"The trace {path} is named twice.")
    names = distinct_names(real)
    traces = [
        TraceStore(path, partial=partial, name=name)
        for path, name in zip(paths, names, strict=True)
    ]
    engines: dict[str, Path] = {}
    for trace in traces:
        engines.setdefault(trace.manifest.engine, trace.path)
    if len(engines) > 1:
        found = ", ".join(f"{path} by {engine}" for engine, path in engines.items())
        raise RequestError(
            f"The traces were recorded by different engines ({found}), so a difference could come "
            "from either. Report them one by one."
        )
    return traces


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many of them as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def all_findings(
    analyses: dict[str, Analysis], tables: dict[str, pd.DataFrame], trace: str
) -> list[Finding]:
    """Findings of all analyses about one trace, most unusual first."""
    found: list[Finding] = []
    for name, table in tables.items():
        of_trace = table[table["trace"] == trace]
        if len(of_trace):
            found += analyses[name].findings(of_trace)
    return sorted(found, key=lambda finding: -finding.weight)


def draw(
    analyses: dict[str, Analysis], tables: dict[str, pd.DataFrame]
) -> dict[str, list[page.Image]]:
    """The pictures of every analysis."""
    images: dict[str, list[page.Image]] = {}
    with style.applied():
        for name, table in tables.items():
            traces = list(dict.fromkeys(table["trace"]))
            images[name] = [
                page.Image(
                    name=picture.name,
                    trace=own_trace(picture.name, traces),
                    caption=picture.caption,
                    uri=style.data_uri(picture.figure),
                )
                for picture in analyses[name].plots(table)
            ]
    return images


def own_trace(picture: str, traces: Sequence[str]) -> str:
    """Of several traces the one that a picture is about (`analysis.each_trace`), or nothing."""
    own = [trace for trace in traces if picture.endswith(f"_{trace}")]
    return max(own, key=len) if own and len(traces) > 1 else ""


def write_tables(folder: Path, tables: dict[str, pd.DataFrame], *, csv: bool) -> None:
    """Write every table as Parquet, and as CSV where asked for."""
    folder.mkdir()
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet", index=False)
        if csv:
            table.to_csv(folder / f"{name}.csv", index=False)
