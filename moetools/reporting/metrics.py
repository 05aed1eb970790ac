"""The numbers of a report as one JSON document, `metrics.json`, and the names of its metrics."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moetools import registry
from moetools.analysis import KEY_COLUMNS, VALUE_COLUMNS, Results
from moetools.files import atomic_file
from moetools.trace_store import TraceStore

FORMAT = 1
SCOPES = ("model", "group", "layer")
MAX_RECORDS = 6000
"""Records of one analysis in the document; all rows are in `tables/`."""

_MANIFEST_FIELDS = (
    "model", "revision", "family", "dtype", "device", "engine", "data", "seed", "groups",
    "reference_group", "coverage", "complete", "ignored_routers", "notes", "versions",
)  # fmt: skip
_ROUTER_FIELDS = ("name", "layer", "kind", "num_experts", "top_k", "rule", "sha256")


def document(traces: Sequence[TraceStore], results: Results) -> dict[str, Any]:
    """What is written as `metrics.json`.

    Returns:
        `format`, `traces`, `analyses` (by name: `source`, `records`, `omitted`: how many rows of
        these scopes only the table has, and `limits`: what was left out and why) and `skipped`
        (reasons by name).
    """
    analyses = {}
    for name, table in results.tables.items():
        in_scope = table[table["scope"].isin(SCOPES)]
        kept = thinned(in_scope, MAX_RECORDS)
        analyses[name] = {
            "source": registry.load("analyses", name).ANALYSIS.source,
            "records": records(kept),
            "omitted": len(in_scope) - len(kept),
            "limits": list(results.limits.get(name, ())),
        }
    return {
        "format": FORMAT,
        "traces": [_described(trace) for trace in traces],
        "analyses": analyses,
        "skipped": dict(results.skipped),
    }


def _described(trace: TraceStore) -> dict[str, Any]:
    manifest = trace.manifest
    facts = {field: getattr(manifest, field) for field in _MANIFEST_FIELDS}
    return {
        "name": trace.name,
        "num_sequences": trace.num_sequences,
        "num_tokens": trace.num_tokens,
        **{name: list(fact) if isinstance(fact, tuple) else fact for name, fact in facts.items()},
        "routers": [
            {field: getattr(router, field) for field in _ROUTER_FIELDS}
            for router in manifest.routers
        ],
    }


def thinned(table: pd.DataFrame, limit: int) -> pd.DataFrame:
    """At most `limit` rows: first groups within layers go, then points of long curves.

    Of cache curves, the sizes that are whole multiples of the experts per token (`rho`) are kept
    longest, among them 1, 2 and 4; of another parameter with many values, every second is left
    out until the table fits.
    """
    if len(table) > limit:
        table = table[~((table["scope"] == "group") & table["layer"].notna())]
    if "rho" in table:
        rho = table["rho"].dropna().unique()
        powers = 2.0 ** np.arange(16)
        for kept in (rho[rho % 1 == 0], powers, powers[:3]):
            if len(table) > limit:
                table = table[table["rho"].isna() | table["rho"].isin(kept)]
    while len(table) > limit:
        values = {name: table[name].dropna().unique() for name in parameters(table)}
        longest = max(values, key=lambda name: len(values[name]), default=None)
        if longest is None or len(values[longest]) < 4:
            return table.head(limit)
        kept = np.sort(values[longest])[1::2]
        table = table[table[longest].isna() | table[longest].isin(kept)]
    return table


def parameters(table: pd.DataFrame) -> list[str]:
    """Names of the columns that are parameters of metrics (`m`, `cache_size`, ...)."""
    return [name for name in table.columns if name not in (*KEY_COLUMNS, *VALUE_COLUMNS)]


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON objects: what does not apply is left out, a value that is not finite is null."""
    columns = {name: _json_values(table[name]) for name in table.columns}
    return [
        {
            name: value
            for name, value in zip(columns, row, strict=True)
            if value is not None or name == "value"
        }
        for row in zip(*columns.values(), strict=True)
    ]


def _json_values(column: pd.Series) -> list[Any]:
    values = column.astype(object).where(column.notna(), None).tolist()
    if column.name in (*KEY_COLUMNS, *VALUE_COLUMNS) and column.dtype != "float64":
        return values
    numeric = [value for value in values if isinstance(value, float | np.floating)]
    whole = column.name not in VALUE_COLUMNS and all(float(value).is_integer() for value in numeric)
    return [_json_value(value, whole=whole) for value in values]


def _json_value(value: Any, *, whole: bool) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        if not np.isfinite(value):
            return None
        return int(value) if whole else value
    return value


def metric_names(tables: Mapping[str, pd.DataFrame]) -> dict[str, list[str]]:
    """The metrics that tables hold, sorted, by analysis name."""
    return {name: sorted(table["metric"].unique()) for name, table in tables.items()}


def write(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write the document with one record per line, so that two of them can be compared."""
    with atomic_file(path) as part:
        part.write_text("\n".join(_lines(metrics)) + "\n", encoding="utf-8")


def _lines(metrics: Mapping[str, Any]) -> Iterable[str]:
    head = {name: metrics[name] for name in ("format", "traces")}
    yield _json(head)[:-1] + ', "analyses": {'
    for i, (name, analysis) in enumerate(metrics["analyses"].items()):
        rest = {key: value for key, value in analysis.items() if key != "records"}
        yield ("," if i else "") + f'{_json(name)}: {_json(rest)[:-1]}, "records": ['
        yield ",\n".join(_json(record) for record in analysis["records"])
        yield "]}"
    yield f'}}, "skipped": {_json(metrics["skipped"])}}}'


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
