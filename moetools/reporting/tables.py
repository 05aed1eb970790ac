"""The tables of a report, made from the records of `metrics.json` and nothing else."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetools.analysis import KEY_COLUMNS, VALUE_COLUMNS
from moetools.reporting import headlines
from moetools.reporting.headlines import Headline

MAX_ROWS = 100
MAX_COLUMNS = 10
MANY_TRACES = 3
"""More than so many are the rows of a table, not its columns."""

USUAL_PARAMETERS: dict[str, Any] = {
    "m": 16, "rho": 2, "accounting": "strict", "cold": "hit", "pool": "layer", "policy": "lru",
    "served": 0.9,
}  # fmt: skip
"""Of a metric's variants, those nearest to these parameters are shown."""

AXES = ("rho", "m")
"""Parameters whose values get columns of their own where a metric has several of them."""

_NOT_PARAMETERS = frozenset((*KEY_COLUMNS, *VALUE_COLUMNS))

Metrics = Mapping[str, Any]
Record = Mapping[str, Any]
Variant = tuple[str, tuple[tuple[str, Any], ...]]
"""A metric with one choice of its parameters."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number, or a row's name; `record` is the number's place in `metrics.json`."""

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
    """A table: `names` heads the columns that name a row.

    Attributes:
        title: What it shows.
        names: Headings of the cells that name a row.
        columns: Headings of the numbers, each with the lines below it.
        rows: Cells, names first.
        shows_intervals: Whether there is room for the interval beside each number.
        num_left_out: Rows that only the file has.
        shared: Parameters of all its numbers that have them.
    """

    title: str
    names: tuple[str, ...]
    columns: Sequence[tuple[str, ...]]
    rows: list[list[Cell]]
    shows_intervals: bool = False
    num_left_out: int = 0
    shared: str = ""


def headline_table(metrics: Metrics, traces: Sequence[str]) -> Table:
    """The main numbers: of every layer for one trace, side by side for several."""
    cells = {name: number_cells(name, metrics) for name in metrics["analyses"]}
    by_trace = {trace: headlines.found(metrics, trace) for trace in traces}
    found = [h for h in headlines.HEADLINES if any(h in places for places in by_trace.values())]

    def cell(headline: Headline, trace: str, layer: int | None) -> Cell:
        place = by_trace[trace].get(headline, {}).get(layer)
        return MISSING if place is None else cells[headline.analysis][place]

    if len(traces) > MANY_TRACES:
        return Table(
            title="Main numbers of the whole model",
            names=("trace",),
            columns=[(headline.heading, headline.metric) for headline in found],
            rows=[
                [_name(trace), *(cell(headline, trace, None) for headline in found)]
                for trace in (traces if found else [])
            ],
        )
    if len(traces) > 1:
        return Table(
            title="Main numbers of the whole model",
            names=("",),
            columns=[(trace,) for trace in traces],
            rows=[
                [_name(headline.heading), *(cell(headline, trace, None) for trace in traces)]
                for headline in found
            ],
            shows_intervals=True,
        )
    places = by_trace[traces[0]].values()
    layers = sorted({layer for layers in places for layer in layers if layer is not None})
    everything: list[tuple[Cell, int | None]] = [(_name(layer), layer) for layer in layers]
    everything.append((Cell(text="all"), None))
    return Table(
        title="Main numbers by layer",
        names=("layer",),
        columns=[(headline.heading, headline.metric) for headline in found],
        rows=[
            [name, *(cell(headline, traces[0], layer) for headline in found)]
            for name, layer in (everything if found else [])
        ],
    )


def section_tables(name: str, metrics: Metrics) -> list[Table]:
    """Tables of an analysis: the whole model, by layer, from layer to layer, by group.

    Args:
        name: Name of the analysis.
        metrics: The document of `metrics.json`.
    """
    maker = _Maker(metrics["analyses"][name]["records"], number_cells(name, metrics))
    return list(maker.tables())


class _Maker:
    """Makes the tables of one analysis."""

    def __init__(self, records: Sequence[Record], cells: Sequence[Cell]) -> None:
        self.records, self.cells = records, cells
        self.traces = list(dict.fromkeys(record["trace"] for record in records))
        values: dict[tuple[str, str], set[Any]] = defaultdict(set)
        for record, axis in itertools.product(records, AXES):
            if axis in record:
                values[record["metric"], axis].add(record[axis])
        self.axis_of = {
            metric: axis
            for (metric, axis), found in sorted(values.items(), key=lambda v: -AXES.index(v[0][1]))
            if len(found) > 1
        }

    def tables(self) -> Iterator[Table]:
        model = self.where(lambda record: record["scope"] == "model")
        simple = [i for i in model if self.records[i]["metric"] not in self.axis_of]
        if simple:
            yield self.long_table("Whole model", simple)
        for axis in reversed(AXES):
            chosen = [i for i in model if self.axis_of.get(self.records[i]["metric"]) == axis]
            if chosen:
                yield self.axis_table(f"Whole model, by {axis}", chosen, axis)
        for title, belongs in (
            ("By layer", lambda r: r["scope"] == "layer" and "layer_b" not in r),
            ("From layer to layer", lambda r: r["scope"] == "layer" and "layer_b" in r),
            ("By group", lambda r: r["scope"] == "group" and "layer" not in r),
        ):
            for has_rho in (False, True):
                chosen = [i for i in self.where(belongs) if ("rho" in self.records[i]) is has_rho]
                if chosen:
                    yield self.wide_table(title, chosen)

    def where(self, belongs: Callable[[Record], bool]) -> list[int]:
        return [i for i, record in enumerate(self.records) if belongs(record)]

    def long_table(self, title: str, chosen: Sequence[int]) -> Table:
        """One row per metric, one column per trace."""
        shared = _shared([variant(self.records[i])[1] for i in chosen])
        rows: dict[Variant, dict[str, Cell]] = {}
        for i in chosen:
            rows.setdefault(variant(self.records[i]), {})[self.records[i]["trace"]] = self.cells[i]
        return _limited(
            title=title,
            names=("metric",),
            columns=[(trace,) for trace in self.traces] if len(self.traces) > 1 else [("value",)],
            rows=[
                [
                    _name(" · ".join((metric, *_spelled(_without(given, shared))))),
                    *(by_trace.get(trace, MISSING) for trace in self.traces),
                ]
                for (metric, given), by_trace in rows.items()
            ],
            shows_intervals=True,
            shared=shared,
        )

    def axis_table(self, title: str, chosen: Sequence[int], axis: str) -> Table:
        """One row per metric and its other parameters, one column per value of `axis`."""
        values = sorted({self.records[i][axis] for i in chosen})
        while len(values) > MAX_COLUMNS:
            whole = [value for value in values if float(value).is_integer()]
            values = whole if len(whole) < len(values) and len(whole) > 1 else values[1::2]
        rows: dict[tuple[str, Variant], dict[Any, Cell]] = {}
        for i in chosen:
            metric, given = variant(self.records[i])
            others = tuple((name, value) for name, value in given if name != axis)
            row = rows.setdefault((self.records[i]["trace"], (metric, others)), {})
            row[self.records[i][axis]] = self.cells[i]
        parameters = list(dict.fromkeys(name for _, (_, given) in rows for name, _ in given))
        several = len(self.traces) > 1
        ordered = sorted(rows, key=lambda key: _strangeness(key[1]))
        return _limited(
            title=title,
            names=("trace",) * several + ("metric", *parameters),
            columns=[(f"{axis} {value:g}",) for value in values],
            rows=[
                [
                    *([_name(trace)] if several else []),
                    _name(metric),
                    *(_name(dict(given).get(name)) for name in parameters),
                    *(rows[trace, (metric, given)].get(value, MISSING) for value in values),
                ]
                for trace, (metric, given) in ordered
            ],
        )

    def wide_table(self, title: str, chosen: Sequence[int]) -> Table:
        """One row per layer or group, one column per metric and choice of its parameters."""
        names = tuple(
            key
            for key in ("trace", "layer", "layer_b", "group", "group_b")
            if any(key in self.records[i] for i in chosen)
            and (key != "trace" or len(self.traces) > 1)
        )
        columns = main_columns([self.records[i] for i in chosen])
        rows: dict[tuple[Any, ...], dict[Variant, Cell]] = {}
        for i in chosen:
            if variant(self.records[i]) in columns:
                key = tuple(self.records[i].get(name) for name in names)
                rows.setdefault(key, {})[variant(self.records[i])] = self.cells[i]
        shared = _shared([given for _, given in columns])
        return _limited(
            title=title,
            names=names,
            columns=[(metric, *_spelled(_without(given, shared))) for metric, given in columns],
            rows=[
                [*map(_name, key), *(row.get(column, MISSING) for column in columns)]
                for key, row in rows.items()
            ],
            shared=shared,
        )


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


def main_columns(records: Sequence[Record]) -> list[Variant]:
    """At most `MAX_COLUMNS` columns: of each metric the variants nearest to the usual one.

    Every metric has a column before any has a second one.
    """
    variants: dict[str, list[Variant]] = defaultdict(list)
    for column in dict.fromkeys(map(variant, records)):
        variants[column[0]].append(column)
    nearest = []
    for found in variants.values():
        least = min(map(_strangeness, found))
        nearest.append([column for column in found if _strangeness(column) == least])
    turns = itertools.chain.from_iterable(itertools.zip_longest(*nearest))
    chosen = set(itertools.islice(filter(None, turns), MAX_COLUMNS))
    return [column for found in nearest for column in found if column in chosen]


def variant(record: Record) -> Variant:
    """A metric and its parameters; a cache size that `rho` tells as well is left out."""
    given = {name: value for name, value in record.items() if name not in _NOT_PARAMETERS}
    if "rho" in given:
        given.pop("cache_size", None)
    return record["metric"], tuple(given.items())


def _strangeness(column: Variant) -> int:
    """How many parameters differ from the usual ones."""
    return sum(USUAL_PARAMETERS.get(name, value) != value for name, value in column[1])


def _shared(parameters: Sequence[Sequence[tuple[str, Any]]]) -> list[tuple[str, Any]]:
    """Parameters that have one value wherever they appear."""
    values: dict[str, set[Any]] = defaultdict(set)
    for name, value in itertools.chain.from_iterable(parameters):
        values[name].add(value)
    return [(name, value) for name, (value, *more) in values.items() if not more]


def _without(
    parameters: Sequence[tuple[str, Any]], shared: Sequence[tuple[str, Any]]
) -> list[tuple[str, Any]]:
    return [parameter for parameter in parameters if parameter not in shared]


def _spelled(parameters: Sequence[tuple[str, Any]]) -> list[str]:
    return [
        f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
        for name, value in parameters
    ]


def _name(key: Any) -> Cell:
    return Cell(text="" if key is None else str(key), value=key)


def _limited(
    *,
    title: str,
    names: tuple[str, ...],
    columns: Sequence[tuple[str, ...]],
    rows: list[list[Cell]],
    shows_intervals: bool = False,
    shared: Sequence[tuple[str, Any]] = (),
) -> Table:
    return Table(
        title=title,
        names=names,
        columns=columns,
        rows=rows[:MAX_ROWS],
        shows_intervals=shows_intervals,
        num_left_out=max(0, len(rows) - MAX_ROWS),
        shared=", ".join(_spelled(shared)),
    )
