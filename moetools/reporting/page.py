"""Builds `report.html`: one file, no requests, every number tagged with its record."""

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa

from moetools import __version__
from moetools.analysis import Analysis, Finding
from moetools.reporting.tables import Table, headline_table, section_tables
from moetools.trace_store import TracedRouter, TraceStore

FOLDER = Path(__file__).parent
MAX_FINDINGS = 12
UNUSUAL = 0.5
"""A finding of at least this weight is listed as unusual."""

ORDER = (
    "load", "entropy", "local_consistency", "specialization", "multilingual", "co_activation",
    "congestion", "coupling", "importance", "collinearity", "drift",
)  # fmt: skip
"""Sections of the page; those of other analyses follow by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """A picture ready to be written; `trace` is set if it shows one of several."""

    name: str
    trace: str
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
    metrics: Mapping[str, Any],
    findings: Mapping[str, Sequence[Finding]],
    images: Mapping[str, list[Image]],
) -> str:
    """The page as text.

    Args:
        traces: The traces that were analysed.
        analyses: Those that ran, by name.
        metrics: The document of `metrics.json`; every number in a table is one of its records.
        findings: Sentences about each trace, by its name, and about all together.
        images: Pictures by the name of their analysis.
    """
    sections = [
        Section(
            name=name,
            analysis=analysis,
            images=images.get(name, []),
            tables=section_tables(name, metrics),
            limits=metrics["analyses"][name]["limits"],
        )
        for name, analysis in sorted(analyses.items(), key=_place)
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
        title=", ".join(dict.fromkeys(short_name(trace.manifest.title) for trace in traces)),
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


def _place(item: tuple[str, Analysis]) -> tuple[int, str]:
    name, _ = item
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def short_name(model: str) -> str:
    """A model as a heading: a hub id as it is, of a path the last part."""
    return Path(model).name if Path(model).is_absolute() else model


def split_findings(found: Iterable[Finding]) -> tuple[list[Finding], list[Finding]]:
    """The unusual findings, most unusual first, and the others."""
    ordered = sorted(found, key=lambda finding: -finding.weight)[:MAX_FINDINGS]
    return (
        [finding for finding in ordered if finding.weight >= UNUSUAL],
        [finding for finding in ordered if finding.weight < UNUSUAL],
    )


def provenance(traces: Sequence[TraceStore]) -> list[tuple[str, list[str]]]:
    """Rows of the provenance table: what, and its value in each trace."""
    rows = {
        "Coverage": [trace.manifest.coverage for trace in traces],
        "Model": [trace.manifest.title for trace in traces],
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
        size = f"{router.num_experts} experts, {router.top_k} per token"
        what = f"{router.kind}, {size}; scoring rule: {rule_line(router.rule)}"
        alike[what].append(router.name)
    return [
        (f"{names[0]} to {names[-1]} ({len(names)})" if len(names) > 3 else ", ".join(names), what)
        for what, names in alike.items()
    ]


def rule_line(rule: Mapping[str, Any] | None) -> str:
    """A scoring rule in one line, without the steps that it does not have."""
    if rule is None:
        return "unknown"
    told_elsewhere = ("top_k", "score_function", "num_tokens", "num_ties", "num_exact")
    absent = (None, False, 0, 1, "never", "max")
    steps = [
        name if value is True else f"{name} {value}"
        for name, value in rule.items()
        if name not in told_elsewhere and (value is True or value not in absent)
    ]
    checked = f"found on {rule['num_tokens']:,} tokens" if rule.get("num_tokens") else ""
    return ", ".join(filter(None, [str(rule.get("score_function", "")), *steps, checked]))
