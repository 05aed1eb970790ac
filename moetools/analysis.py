"""What an analysis is, and running several of them over one reading of a trace.

An analysis is one file in `analyses/` that defines `ANALYSIS`. Its state is additive: it is fed
whole sequences batch by batch, parts can be merged, and `table` turns it into one long, tidy
table with one row per number.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import console, registry
from moetools.errors import RequestError
from moetools.intervals import Scope, basic_interval
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moetools.checkpoint import Checkpoint

KEY_COLUMNS = (
    "trace", "step", "metric", "scope", "layer", "expert", "group",
    "layer_b", "expert_b", "group_b",
)  # fmt: skip
VALUE_COLUMNS = ("value", "low", "high", "num_tokens")
INTEGER_COLUMNS = ("step", "layer", "expert", "layer_b", "expert_b", "num_tokens")
SCOPES = ("model", "group", "layer", "expert", "pair", "token")
"""A row's scope. `group` rows may also carry a layer; expert and finer scopes stay out of
`metrics.json`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What every analysis is told.

    Attributes:
        seed: Seed of everything random.
        expert_intervals: Intervals for single experts too.
        models: Opened checkpoints, for analyses that need weights (`model_of`).
        scores: A score of each group, such as its accuracy; to be set against its routing.
        reference: The trace that the others are compared with; None for a trace on its own, and
            for the reference itself.
    """

    seed: int = 0
    expert_intervals: bool = False
    models: tuple["Checkpoint", ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    reference: TraceStore | None = None


class State(Protocol):
    """Additive state of one analysis over one trace."""

    def update(self, batch: TraceBatch) -> None:
        """Take in whole sequences; `batch` has the columns that the analysis asked for."""

    def merge(self, other: Self) -> None:
        """Add the state of another part of the same trace."""

    def table(self) -> pd.DataFrame:
        """Rows made with `rows`, without the `trace` column."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A figure of a report with the sentence that says how to read it."""

    name: str
    caption: str
    figure: "Figure"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A sentence about this router made from the numbers, for the report's summary.

    Attributes:
        text: The sentence, with its numbers.
        weight: How unusual it is, 0 (as expected) to 1; the summary shows the highest first.
        metric: The metric it rests on.
    """

    text: str
    weight: float
    metric: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """One analysis: what it needs, how it starts, how its table is shown.

    Attributes:
        title: Heading in the report.
        source: Paper and equation, or "moetools" for our own definitions.
        about: Two or three sentences: what it says, how to read it, what would fool you.
        columns: The columns it reads from a trace, or the reason (a string) why it cannot run.
        start: Makes an empty state.
        plots: Pictures of the finished table (of one or several traces).
        findings: Sentences for the summary, from the finished table of one trace.
        limits: From a trace and the state that has read it, sentences on what is left out, with
            the reason.
        across: From the finished table of several traces, the rows that are about more than one
            of them; each names in `trace` the one that it belongs to.
        findings_across: Sentences about several traces together, from the table with all rows.
    """

    title: str
    source: str
    about: str
    columns: Callable[[TraceStore, Options], Sequence[str] | str]
    start: Callable[[TraceStore, Options], State]
    plots: Callable[[pd.DataFrame], Iterable[Picture]]
    findings: Callable[[pd.DataFrame], Iterable[Finding]]
    limits: Callable[[TraceStore, Any], Sequence[str]] = lambda trace, state: ()
    across: Callable[[pd.DataFrame], pd.DataFrame | None] = lambda table: None
    findings_across: Callable[[pd.DataFrame], Iterable[Finding]] = lambda table: ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What the analyses of some traces gave, by analysis name.

    Attributes:
        tables: One table with the rows of all traces.
        skipped: Reasons of the analyses that did not run, or not on every trace.
        limits: What an analysis that ran left out, with the reasons.
    """

    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    limits: dict[str, tuple[str, ...]] = field(default_factory=dict)


def router_columns(trace: TraceStore, family: str) -> list[str]:
    """The columns of one family for all routers that have it, e.g. `experts.00`, ..."""
    names = (f"{family}.{router.name}" for router in trace.routers)
    return [name for name in names if name in trace.columns]


def mlp_routers(trace: TraceStore) -> list[TracedRouter]:
    """Routers of feed-forward experts, in order of depth: at most one for each layer."""
    return [router for router in trace.routers if router.kind == "mlp"]


def model_of(trace: TraceStore, options: Options) -> "Checkpoint | str":
    """The checkpoint that a trace was recorded from, or the reason (a string) why there is none.

    A checkpoint fits if the routers of the trace have the same bytes in it.
    """
    if not options.models:
        return "It needs the weights: name the traced checkpoint with --model."
    hashes = {key: sha for router in trace.routers for key, sha in router.sha256.items()}
    for model in options.models:
        if hashes and set(hashes) <= set(model.tensors) and model.fingerprint(hashes) == hashes:
            return model
    names = " and ".join(model.name for model in options.models)
    return (
        f"The routers of {names} are not those that were traced (their hashes differ); name the "
        f"checkpoint of {trace.manifest.model} with --model."
    )


def rows(metric: str, scope: str, value: Any, **columns: Any) -> pd.DataFrame:
    """Rows of a tidy table; scalars are repeated to the length of the arrays.

    Args:
        metric: Stable metric name, documented in the README.
        scope: One of `SCOPES`.
        value: The numbers.
        **columns: Key columns, metric parameters, `low`, `high`, `num_tokens`.
    """
    data: dict[str, Any] = {"metric": metric, "scope": scope, "value": value, **columns}
    lengths = {len(column) for column in data.values() if np.ndim(column) > 0}
    if len(lengths) > 1:
        raise ValueError(f"Columns of {metric} differ in length: {sorted(lengths)}.")
    return pd.DataFrame(data, index=range(lengths.pop() if lengths else 1))


def stacked(parts: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of many small parts; much faster than a table for each.

    Args:
        parts: The columns of each part: numbers, strings or arrays of one length; None and what
            a part does not have is null.
    """
    parts = list(parts)
    lengths = [max([1, *(len(c) for c in part.values() if np.ndim(c) > 0)]) for part in parts]
    columns = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.get(name) for part in parts]
        is_text = any(isinstance(value, str) for value in values)
        null, dtype = (None, object) if is_text else (np.nan, np.float64)
        columns[name] = np.concatenate(
            [
                np.broadcast_to(np.asarray(null if value is None else value, dtype), length)
                for value, length in zip(values, lengths, strict=True)
            ]
        )
    return pd.DataFrame(columns)


def layer_rows(
    metric: str,
    scope: Scope,
    layers: Sequence[int],
    draws: NDArray[Any],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    pool: Callable[..., NDArray[Any]] | None = np.mean,
    **columns: Any,
) -> pd.DataFrame:
    """A metric of every layer, and pooled over the layers, with bootstrap intervals.

    Args:
        metric: Metric name.
        scope: The sequences: `layer` and `model` rows for the whole trace, `group` rows for one.
        layers: [L] layers.
        draws: [1 + B, L] the metric, then its bootstrap replicates; [1, L] for no interval.
        bounds: Range of the metric.
        pool: Makes the value of all layers from those of each (`np.mean`, `np.sum`).
        **columns: Further columns of every row.
    """
    layer = pd.array(layers, dtype="Int64")
    if pool is not None:
        draws = np.column_stack([draws, pool(draws, axis=1)])
        layer = pd.array([*layers, pd.NA], dtype="Int64")
    low, high = basic_interval(draws[0], draws[1:], bounds=bounds)
    names = np.where(layer.isna(), "model", "layer") if scope.group is None else "group"
    return rows(
        metric, "layer", draws[0], layer=layer, low=low, high=high,
        group=scope.group, num_tokens=scope.num_tokens, **columns,
    ).assign(scope=names)  # fmt: skip


def select(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """Rows with these values in these columns; None asks for null."""
    kept = np.full(len(table), True)
    for name, value in wanted.items():
        column = table[name] if name in table else pd.Series(None, index=table.index)
        kept &= (column.isna() if value is None else column == value).fillna(False).to_numpy(bool)
    return table[kept]


def single(table: pd.DataFrame, metric: str, scope: str = "model", **wanted: Any) -> float:
    """The value of the only row of a metric and scope; NaN if there is none."""
    values = select(table, metric=metric, scope=scope, **wanted)["value"]
    return float(values.iloc[0]) if len(values) == 1 else np.nan


def largest(table: pd.DataFrame) -> pd.Series:
    """The row with the largest value; NaN is none."""
    return table.iloc[int(table["value"].fillna(-np.inf).to_numpy().argmax())]


def each_trace(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """What to add to the name of a trace's own picture, and the trace's rows."""
    traces = list(dict.fromkeys(table["trace"]))
    for trace in traces:
        yield f"_{trace}" if len(traces) > 1 else "", table[table["trace"] == trace]


def tidy(parts: Sequence[pd.DataFrame], *, trace: str, step: int | None = None) -> pd.DataFrame:
    """One table of all parts: key columns first, then parameters, then values."""
    return typed([part.assign(trace=trace, step=step) for part in parts])


def typed(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table with the columns in their order and of their types."""
    table = pd.concat([part.dropna(axis=1, how="all") for part in parts], ignore_index=True)
    for name in (*KEY_COLUMNS, *VALUE_COLUMNS):
        if name not in table:
            table[name] = None
    parameters = sorted(set(table.columns) - set(KEY_COLUMNS) - set(VALUE_COLUMNS))
    table = table[[*KEY_COLUMNS, *parameters, *VALUE_COLUMNS]]
    types: dict[str, str] = dict.fromkeys(INTEGER_COLUMNS, "Int64")
    types |= dict.fromkeys(("value", "low", "high"), "float64")
    types |= dict.fromkeys(("trace", "metric", "scope", "group", "group_b"), "string")
    return table.astype(types)


def choose(only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[str]:
    """Names of the analyses to run.

    Raises:
        RequestError: A name that is not an analysis, or nothing is left.
    """
    known = registry.names("analyses")
    for name in (*only, *skip):
        if name not in known:
            raise RequestError(registry.unknown("analyses", name, known))
    chosen = [name for name in (only or known) if name not in skip]
    if not chosen:
        raise RequestError("--only and --skip leave no analysis to run.")
    return chosen


def run(
    traces: Sequence[TraceStore],
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    options: Options | None = None,
) -> Results:
    """Run analyses over traces; every column of a trace is read once.

    Returns:
        One table per analysis with the rows of all traces.
    """
    options = options or Options()
    results = Results()
    tables: dict[str, list[pd.DataFrame]] = {}
    reasons: dict[str, dict[str, list[str]]] = {}
    analyses = {name: registry.load("analyses", name).ANALYSIS for name in choose(only, skip)}
    for i, trace in enumerate(traces):
        own = replace(options, reference=traces[0] if i else options.reference)
        states: dict[str, State] = {}
        columns: set[str] = set()
        for name, analysis in analyses.items():
            needed = analysis.columns(trace, own)
            if isinstance(needed, str):
                compared = replace(own, reference=trace)
                if len(traces) > 1 and i == 0 and analysis.columns(trace, compared) != needed:
                    continue  # it only compares others with this trace
                reasons.setdefault(name, {}).setdefault(needed, []).append(trace.name)
                continue
            columns.update(needed)
            states[name] = analysis.start(trace, own)
        if columns:
            with console.progress(f"Reading {trace.name}", trace.num_tokens, "tokens") as meter:
                for batch in trace.batches(columns):
                    for state in states.values():
                        state.update(batch)
                    meter.advance(batch.num_tokens)
        for name, state in states.items():
            limits = [*results.limits.get(name, ()), *analyses[name].limits(trace, state)]
            results.limits[name] = tuple(dict.fromkeys(limits))
            table = tidy([state.table()], trace=trace.name, step=trace.step)
            tables.setdefault(name, []).append(table)
    for name, found in reasons.items():
        results.skipped[name] = " ".join(
            reason if len(names) == len(traces) else f"{', '.join(names)}: {reason}"
            for reason, names in found.items()
        )
    for name, parts in tables.items():
        table = pd.concat(parts, ignore_index=True)
        more = analyses[name].across(table) if len(parts) > 1 else None
        results.tables[name] = table if more is None else typed([table, more])
    return results
