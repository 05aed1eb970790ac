"""Analyse traces and write one folder: `report.html`, `metrics.json` and `tables/`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pandas as pd

from moetools import analysis, console, registry
from moetools.analysis import Analysis, Finding, Options, Results
from moetools.errors import DataError, RequestError
from moetools.files import output_folder
from moetools.reporting import metrics, page, style
from moetools.trace_store import TraceStore

if TYPE_CHECKING:
    from moetools.checkpoint import Checkpoint

AnyPath = str | PathLike[str]
STEP_SOURCES = ("name", "manifest")
ALL_TRACES = "All traces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A written report and what is in it.

    Attributes:
        path: The folder.
        traces: The traces, opened.
        results: Full tables, and reasons for what did not run.
        metrics: The document of `metrics.json`.
        findings: Sentences about each trace by its name, most unusual first; under
            `ALL_TRACES` about several together.
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
    models: str | Sequence[str] = (),
    scores: Mapping[str, float] | AnyPath = MappingProxyType({}),
    step_from: str | None = None,
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
        models: The checkpoints that were traced, for analyses that need weights.
        scores: A number for each group, such as accuracy, or a json or csv file of them.
        step_from: Where the training step of each trace stands: `name` or `manifest`.
        overwrite: Replace a report that moetools wrote there.

    Raises:
        TraceError: A trace is unreadable, incomplete, or of another format.
        RequestError: An unknown analysis, traces of different engines, or nothing to analyse.
        OutputError: `out` may not be written.
    """
    paths = [Path(p) for p in ([traces] if isinstance(traces, str | PathLike) else traces)]
    chosen = analysis.choose(only, skip)
    stores = open_traces(paths, partial=partial, step_from=step_from)
    names = (models,) if isinstance(models, str) else tuple(models)
    options = Options(
        seed=seed,
        expert_intervals=expert_intervals,
        models=open_models(names),
        scores=scores if isinstance(scores, Mapping) else read_scores(Path(scores)),
    )
    inputs = [*paths, *(path for name in names if (path := Path(name)).exists())]
    refuse_unused(options, stores)
    with output_folder(Path(out), kind="report", overwrite=overwrite, inputs=inputs) as folder:
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
    together = [
        finding
        for name, table in results.tables.items()
        if table["trace"].nunique() > 1
        for finding in analyses[name].findings_across(table)
    ]
    findings = {ALL_TRACES: together} if together else {}
    for trace in traces:
        findings[trace.name] = all_findings(analyses, results.tables, trace.name)
    write_tables(folder / "tables", results.tables, csv=csv)
    metrics.write(folder / "metrics.json", document)
    console.note("Drawing the report")
    html = page.render(traces, analyses, document, findings, draw(analyses, results.tables))
    (folder / "report.html").write_text(html, encoding="utf-8")
    return Report(
        path=folder, traces=tuple(traces), results=results, metrics=document, findings=findings
    )


def open_traces(
    paths: Sequence[Path], *, partial: bool = False, step_from: str | None = None
) -> list[TraceStore]:
    """Open traces under names that differ; by training step where that is asked for.

    Raises:
        TraceError: A trace cannot be read.
        RequestError: No trace, one named twice, traces of different engines, or a trace that
            does not tell its step.
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
    if step_from is not None:
        for trace in traces:
            trace.step = step_of(trace, step_from)
        traces.sort(key=lambda trace: trace.step or 0)
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


def step_of(trace: TraceStore, step_from: str) -> int:
    """The training step of a trace: the last number in its name, or in the name of its model.

    Args:
        trace: Any trace.
        step_from: `name`: of the trace; `manifest`: of the model or revision that was traced.

    Raises:
        RequestError: There is no number, or `step_from` is neither.
    """
    if step_from not in STEP_SOURCES:
        raise RequestError(f"--step-from {step_from}: expected {' or '.join(STEP_SOURCES)}.")
    manifest = trace.manifest
    texts = [trace.name] if step_from == "name" else [manifest.revision or "", manifest.model]
    if step_from == "manifest" and re.fullmatch("[0-9a-f]{40}", texts[0]):
        texts = texts[1:]
    for text in texts:
        if numbers := re.findall(r"\d+", text):
            return int(numbers[-1])
    raise RequestError(
        f"--step-from {step_from}: {trace.path} has no number in '{texts[-1]}' to tell its step."
    )


def open_models(names: Sequence[str]) -> "tuple[Checkpoint, ...]":
    """The checkpoints of these names; headers only."""
    if not names:
        return ()
    from moetools.checkpoint import Checkpoint

    return tuple(Checkpoint.open(name) for name in names)


def refuse_unused(options: Options, traces: Sequence[TraceStore]) -> None:
    """Refuse a model that none of the traces was recorded from.

    Raises:
        RequestError: There is one.
    """
    for model in options.models:
        reasons = [analysis.model_of(t, replace(options, models=(model,))) for t in traces]
        if reasons and all(isinstance(reason, str) for reason in reasons):
            raise RequestError(f"--model {model.name}: {reasons[0]}")


def read_scores(path: Path) -> dict[str, float]:
    """Scores by group.

    Args:
        path: A json object `{"de": 0.53, ...}`, or a csv or jsonl file with the columns `group`
            and `score`.

    Raises:
        DataError: The file cannot be read, or has no such numbers.
    """
    try:
        if path.suffix == ".json":
            scores = json.loads(path.read_text(encoding="utf-8"))
        else:
            lines = path.suffix in (".jsonl", ".ndjson")
            table = pd.read_json(path, lines=True) if lines else pd.read_csv(path)
            scores = dict(zip(table["group"].astype(str), table["score"], strict=True))
        found = {str(group): float(score) for group, score in scores.items()}
    except OSError as error:
        raise DataError(f"--scores {path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f'--scores {path}: expected a json object such as {{"de": 0.53}}, or a csv file with '
            "the columns group and score, all scores numbers."
        ) from None
    bad = [group for group, score in found.items() if not math.isfinite(score)]
    if bad or not found:
        raise DataError(f"--scores {path}: no finite number for {bad[0] if bad else 'any group'}.")
    return found


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
