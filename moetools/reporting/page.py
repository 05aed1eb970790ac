"""Builds `report.html`: one file, no requests, every number tagged with its record."""

import base64
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from moetools import __version__
from moetools.analysis import KEY_COLUMNS, VALUE_COLUMNS, Analysis, Finding
from moetools.reporting import headlines
from moetools.reporting.headlines import Headline
from moetools.trace_store import TracedRouter, TraceStore

FOLDER = Path(__file__).parent
MAX_ROWS = 100
MAX_COLUMNS = 10
MAX_FINDINGS = 12
UNUSUAL = 0.3
"""A finding of at least this weight is listed as unusual."""

USUAL_PARAMETERS: dict[str, Any] = {"m": 16, "rho": 2, "accounting": "paper"}
"""Of a metric's variants, those with these parameters come first."""

_NOT_PARAMETERS = frozenset((*KEY_COLUMNS, *VALUE_COLUMNS))

Metrics = Mapping[str, Any]
Record = Mapping[str, Any]
Label = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number on the page, or a row's name; `record` is its place in `metrics.json`."""

    text: str
    value: float | str | None = None
    low: str = ""
    high: str = ""
    analysis: str = ""
    metric: str | None = None
    record: int | None = None


MISSING = Cell(text="–")


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of a section: `names` heads the columns that name a row."""

    title: str
    names: tuple[str, ...]
    columns: Sequence[Label]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A picture ready to be written."""

    name: str
    caption: str
    uri: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """What the page says about one analysis."""

    name: str
    analysis: Analysis
    images: list[Image]
    tables: list[Table]
    limits: list[str]


def render(
    traces: Sequence[TraceStore],
    analyses: Mapping[str, Analysis],
    metrics: Metrics,
    findings: Mapping[str, Sequence[Finding]],
    images: Mapping[str, list[Image]],
) -> str:
    """The page as text.

    Args:
        traces: The traces that were analysed.
        analyses: Those that ran, by name, in the order of the page.
        metrics: The document of `metrics.json`; every number in a table is one of its records.
        findings: Sentences about each trace, by its name.
        images: Pictures by the name of their analysis.
    """
    sections = [
        Section(
            name=name,
            analysis=analysis,
            images=images.get(name, []),
            tables=section_tables(name, metrics, several=len(traces) > 1),
            limits=metrics["analyses"][name]["limits"],
        )
        for name, analysis in analyses.items()
    ]
    script = (FOLDER / "template.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("template.html").render(
        title=", ".join(dict.fromkeys(trace.manifest.model for trace in traces)),
        traces=traces,
        partial=[trace for trace in traces if not trace.manifest.complete],
        findings={name: split_findings(found) for name, found in findings.items()},
        headlines=headline_table(metrics, [trace.name for trace in traces]),
        provenance=provenance(traces),
        groups=group_table(traces),
        routers=[(trace.name, router_lines(trace.routers)) for trace in traces],
        sections=sections,
        skipped=metrics["skipped"],
        style=(FOLDER / "template.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
    )


def split_findings(found: Iterable[Finding]) -> tuple[list[Finding], list[Finding]]:
    """The unusual findings, most unusual first, and the others."""
    ordered = sorted(found, key=lambda finding: -finding.weight)[:MAX_FINDINGS]
    return (
        [finding for finding in ordered if finding.weight >= UNUSUAL],
        [finding for finding in ordered if finding.weight < UNUSUAL],
    )


def headline_table(metrics: Metrics, traces: Sequence[str]) -> Table:
    """The main numbers: of every layer for one trace, side by side for several."""
    cells = {name: number_cells(name, metrics) for name in metrics["analyses"]}
    by_trace = {trace: headlines.found(metrics, trace) for trace in traces}
    found = list(dict.fromkeys(itertools.chain.from_iterable(by_trace.values())))

    def cell(headline: Headline, trace: str, layer: int | None) -> Cell:
        place = by_trace[trace].get(headline, {}).get(layer)
        return MISSING if place is None else cells[headline.analysis][place]

    if len(traces) > 1:
        return Table(
            title="Main numbers of the whole model",
            names=("",),
            columns=[(trace,) for trace in traces],
            rows=[
                [_name(headline.heading), *(cell(headline, trace, None) for trace in traces)]
                for headline in found
            ],
        )
    places = [layers for headline, layers in by_trace[traces[0]].items()]
    layers = sorted({layer for layers in places for layer in layers if layer is not None})
    return Table(
        title="Main numbers by layer",
        names=("layer",),
        columns=[(headline.heading,) for headline in found],
        rows=[
            [
                _name(layer) if layer is not None else Cell(text="all"),
                *(cell(headline, traces[0], layer) for headline in found),
            ]
            for layer in ([*layers, None] if found else [])
        ],
    )


def section_tables(name: str, metrics: Metrics, *, several: bool) -> list[Table]:
    """Tables of an analysis: the whole model, by layer and by group.

    Args:
        name: Name of the analysis.
        metrics: The document of `metrics.json`.
        several: Whether there are several traces, so that rows must name theirs.
    """
    records, cells = metrics["analyses"][name]["records"], number_cells(name, metrics)
    of_scope: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        within_layer = record["scope"] == "group" and "layer" in record
        of_scope["group and layer" if within_layer else record["scope"]].append(i)
    tables = []
    if of_scope["model"]:
        tables.append(_model_table(records, cells, of_scope["model"]))
    for scope, title in (("layer", "By layer"), ("group", "By group")):
        if of_scope[scope]:
            tables.append(_wide_table(title, records, cells, of_scope[scope], several=several))
    return tables


def number_cells(name: str, metrics: Metrics) -> list[Cell]:
    """One cell per record of an analysis; a metric with only whole values shows no decimals."""
    records = metrics["analyses"][name]["records"]
    fractional = {
        record["metric"]
        for record in records
        if record["value"] is not None and not float(record["value"]).is_integer()
    }
    cells = []
    for i, record in enumerate(records):
        whole = record["metric"] not in fractional
        low, high = record.get("low"), record.get("high")
        known = low is not None and high is not None
        cells.append(
            Cell(
                text=number(record["value"], whole=whole),
                value=record["value"],
                low=number(low, whole=whole) if known else "",
                high=number(high, whole=whole) if known else "",
                analysis=name,
                metric=record["metric"],
                record=i,
            )
        )
    return cells


def _model_table(records: Sequence[Record], cells: Sequence[Cell], chosen: Sequence[int]) -> Table:
    """One row per metric, one column per trace."""
    traces = list(dict.fromkeys(records[i]["trace"] for i in chosen))
    rows: dict[Label, dict[str, Cell]] = {}
    for i in chosen:
        rows.setdefault(label(records[i]), {})[records[i]["trace"]] = cells[i]
    return _limited(
        title="Whole model",
        names=("metric",),
        columns=[(trace,) for trace in traces] if len(traces) > 1 else [("value",)],
        rows=[
            [_name(" · ".join(key)), *(by_trace.get(trace, MISSING) for trace in traces)]
            for key, by_trace in rows.items()
        ],
    )


def _wide_table(
    title: str,
    records: Sequence[Record],
    cells: Sequence[Cell],
    chosen: Sequence[int],
    *,
    several: bool,
) -> Table:
    """One row per layer or group, one column per metric and choice of its parameters."""
    names = tuple(
        key
        for key in ("trace", "layer", "layer_b", "group", "group_b")
        if any(key in records[i] for i in chosen) and (several or key != "trace")
    )
    columns = main_columns([records[i] for i in chosen])
    rows: dict[tuple[Any, ...], dict[Label, Cell]] = {}
    for i in chosen:
        if label(records[i]) in columns:
            key = tuple(records[i].get(name) for name in names)
            rows.setdefault(key, {})[label(records[i])] = cells[i]
    return _limited(
        title=title,
        names=names,
        columns=columns,
        rows=[
            [*map(_name, key), *(row.get(column, MISSING) for column in columns)]
            for key, row in rows.items()
        ],
    )


def _name(key: Any) -> Cell:
    return Cell(text="" if key is None else str(key), value=key)


def _limited(
    *, title: str, names: tuple[str, ...], columns: Sequence[Label], rows: list[list[Cell]]
) -> Table:
    note = f"The first {MAX_ROWS} of {len(rows):,} rows." if len(rows) > MAX_ROWS else ""
    return Table(title=title, names=names, columns=columns, rows=rows[:MAX_ROWS], note=note)


def main_columns(records: Sequence[Record]) -> list[Label]:
    """At most `MAX_COLUMNS` columns: each metric once before any a second time."""
    variants: dict[str, dict[Label, int]] = defaultdict(dict)
    for record in records:
        unusual = sum(record.get(name, usual) != usual for name, usual in USUAL_PARAMETERS.items())
        variants[record["metric"]].setdefault(label(record), unusual)
    ordered = [sorted(labels, key=labels.__getitem__) for labels in variants.values()]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*ordered))
    chosen = set(itertools.islice(filter(None, turns), MAX_COLUMNS))
    return [column for labels in variants.values() for column in labels if column in chosen]


def label(record: Record) -> Label:
    """A metric and its parameters: `("srp", "m 16")`."""
    shown = (
        value if isinstance(value, str) else f"{name} {value}"
        for name, value in record.items()
        if name not in _NOT_PARAMETERS
    )
    return (record["metric"], *shown)


def number(value: float | None, *, whole: bool = False) -> str:
    """A number as it is shown: about three significant digits, or a whole number."""
    if value is None:
        return "–"
    size = abs(value)
    if whole or size >= 100:
        return f"{value:,.0f}"
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 1 else f"{value:.2f}" if size < 10 else f"{value:.1f}"


def provenance(traces: Sequence[TraceStore]) -> list[tuple[str, list[str]]]:
    """Rows of the provenance table: what, and its value in each trace."""
    rows = {
        "Coverage": [trace.manifest.coverage for trace in traces],
        "Model": [trace.manifest.model for trace in traces],
        "Revision": [trace.manifest.revision or "" for trace in traces],
        "Family": [trace.manifest.family for trace in traces],
        "Tokens": [f"{trace.num_tokens:,}" for trace in traces],
        "Sequences": [f"{trace.num_sequences:,}" for trace in traces],
        "Groups": [f"{len(trace.groups)}" for trace in traces],
        "Data": [_plain(trace.manifest.data) for trace in traces],
        "Type and device": [
            ", ".join(filter(None, (trace.manifest.dtype, trace.manifest.device)))
            for trace in traces
        ],
        "Engine": [trace.manifest.engine for trace in traces],
        "Seed": [str(trace.manifest.seed) for trace in traces],
        "Versions": [_plain(trace.manifest.versions) for trace in traces],
        "Not recorded": [_plain(trace.manifest.ignored_routers) for trace in traces],
        "Notes": [" ".join(trace.manifest.notes) for trace in traces],
    }
    return [(name, values) for name, values in rows.items() if any(values)]


def _plain(value: Any) -> str:
    """A nested value of a manifest as one line."""
    if isinstance(value, Mapping):
        parts = ((name, _plain(part)) for name, part in value.items())
        return ", ".join(f"{name} {part}" for name, part in parts if part)
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return "" if value is None else str(value)


def group_table(traces: Sequence[TraceStore]) -> list[tuple[str, str, int, int]]:
    """Trace, group, sequences and tokens of every group."""
    rows = []
    for trace in traces:
        if not trace.groups:
            continue
        sequences = trace.sequences(["group", "num_tokens"])
        sizes = pa.TableGroupBy(sequences, "group").aggregate(
            [("num_tokens", "count"), ("num_tokens", "sum")]
        )
        for row in sorted(sizes.to_pylist(), key=lambda row: row["group"] or ""):
            name = row["group"] or "(no group)"
            rows.append((trace.name, name, row["num_tokens_count"], row["num_tokens_sum"]))
    return rows


def router_lines(routers: Sequence[TracedRouter]) -> list[tuple[str, str]]:
    """Routers that are alike in one line: their names, and what they are."""
    alike: dict[str, list[str]] = defaultdict(list)
    for router in routers:
        rule = "unknown" if router.rule is None else _plain(router.rule)
        what = (
            f"{router.kind}, {router.num_experts} experts, {router.top_k} per token; rule: {rule}"
        )
        alike[what].append(router.name)
    return [
        (f"{names[0]} to {names[-1]} ({len(names)})" if len(names) > 3 else ", ".join(names), what)
        for what, names in alike.items()
    ]
