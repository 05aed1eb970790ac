"""`moetools diff A B`: how the routing of one trace differs from another's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetools import console
from moetools.options import JsonOption, SeedOption

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moetools.paired_traces import TraceDiff
    from moetools.trace_store import TraceStore

DIFFERENT = 3
"""Exit code of `--exit-code` where A and B differ."""

SHOWN = {
    "overlap_at_k": "overlap",
    "exact_set": "exact set",
    "top1_agreement": "top-1",
    "weighted_overlap": "weighted",
    "load_tv": "load moved",
}
COUNTED = ("overlap_at_k", "exact_set", "top1_agreement")


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Trace folder: the reference.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Trace of the same texts.")],
    floor: Annotated[
        Path | None,
        typer.Option(
            "--floor",
            metavar="TRACE",
            help="A's model traced again with another --batch-tokens: what rounding alone changes, "
            "shown beside every number.",
            show_default=False,
        ),
    ] = None,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="Exit with 3 if any token got other experts."),
    ] = False,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Show how the routing of the same texts differs between two traces.

    Example: moetools diff trace-before/ trace-after/ --floor trace-before-again/
    """
    from moetools.paired_traces import diff_traces

    found = diff_traces(a, b, floor=floor, seed=seed)
    if json:
        console.show_json(trace_document(found))
    else:
        console.show(*trace_lines(found))
    if exit_code and found.differs:
        raise typer.Exit(DIFFERENT)


def trace_document(found: "TraceDiff") -> dict[str, Any]:
    """The comparison of two traces as plain values."""
    from moetools.reporting import metrics

    return {
        "kind": "traces",
        "a": _described(found.a),
        "b": _described(found.b),
        "floor": None if found.floor is None else _described(found.floor),
        "differs": found.differs,
        "notes": list(found.notes),
        "records": metrics.records(found.table.drop(columns=["trace", "step"])),
    }


def _described(trace: "TraceStore") -> dict[str, Any]:
    manifest = trace.manifest
    return {
        "trace": str(trace.path),
        "model": manifest.model,
        "revision": manifest.revision,
        "dtype": manifest.dtype,
        "device": manifest.device,
        "engine": manifest.engine,
        "batch_tokens": manifest.plan.get("batch_tokens"),
        "num_tokens": trace.num_tokens,
        "num_sequences": trace.num_sequences,
    }


def trace_lines(found: "TraceDiff") -> "list[RenderableType]":
    """Which traces, a table by layer, and what it says in words."""
    from rich.markup import escape
    from rich.text import Text

    named = [("A", found.a), ("B", found.b), ("floor", found.floor)]
    shown: list[RenderableType] = []
    for name, trace in named:
        if trace is not None:
            manifest = trace.manifest
            batch = manifest.plan.get("batch_tokens")
            facts = [manifest.model, manifest.dtype, manifest.device]
            facts += [] if batch is None else [f"batches of {batch:,} tokens"]
            known = ", ".join(filter(None, facts))
            shown.append(escape(f"{name:6} {trace.path}: {known}"))
    shown += [
        Text(f"{found.b.num_tokens:,} tokens in {found.b.num_sequences:,} sequences\n"),
        _table(found),
        Text(),
    ]
    return [*shown, *(Text(line) for line in sentences(found))]


def _table(found: "TraceDiff") -> "RenderableType":
    """One line a layer; with a floor, every number has its own beside it."""
    from rich.table import Table

    from moetools.analysis import select

    has_floor = found.floor is not None
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer")
    below = "\n  B  floor" if has_floor else ""
    for heading in SHOWN.values():
        table.add_column(f"{heading}{below}", justify="right")
    table.add_column("chance", justify="right")
    rows = found.table[found.table["scope"].isin(["layer", "model"])]
    for layer in [*sorted(rows["layer"].dropna().unique()), None]:
        cells = []
        for metric in [*SHOWN, "overlap_chance"]:
            row = select(rows, metric=metric, layer=layer)
            numbers = [row["value"].iloc[0]]
            if has_floor and metric in SHOWN:
                numbers.append(row["floor"].iloc[0])
            counted = metric in COUNTED
            cells.append(" ".join(_number(number, counted=counted) for number in numbers))
        table.add_row("mean" if layer is None else str(layer), *cells)
    return table


def _number(value: float, *, counted: bool = False) -> str:
    """Three decimals; of what was counted, 1.000 means all."""
    if value != value:
        return "    –"
    return "0.999" if counted and 0.9995 <= value < 1 else f"{value:.3f}"


def sentences(found: "TraceDiff") -> list[str]:
    """What the numbers say, what they mean beside their floor, and what would fool the reader."""
    from moetools import registry
    from moetools.analysis import select, single

    drift = registry.load("analyses", "drift")
    table = found.table
    own = select(table, metric="overlap_at_k", scope="model").iloc[0]
    value, low, high = own[["value", "low", "high"]]
    interval = f" (95 % interval {low:.1%} to {high:.1%})" if low == low else ""
    chance = single(table, "overlap_chance")
    lines = [
        f"B selects {_share(value)} of A's experts{interval}; unrelated routings with these loads "
        f"would share {chance:.1%}."
    ]
    if found.floor is not None:
        lines.append(f"A, recorded again, selects {_share(own['floor'])} of them.")
    if not found.differs:
        lines = ["No difference: every token got the same experts in both traces."]
    first, last = (single(table, "overlap_by_margin", decile=decile) for decile in (1, 10))
    if found.differs and first == first and last == last:
        lines.append(
            f"Of the tenth of the tokens that A selected most narrowly {_share(first)} of the "
            f"experts stay, of the tenth selected most clearly {_share(last)}."
        )
    if single(table, "nll_equivalence_p") == single(table, "nll_equivalence_p"):
        lines.append(drift.loss_sentence(table))
    lines += found.notes
    if found.floor is None:
        model = found.a.manifest.model
        lines.append(
            "No floor was given. To see what rounding alone changes, record A once more: moetools "
            f"trace {model} with the same data and another --batch-tokens, and name it with "
            "--floor."
        )
    return lines


def _share(value: float) -> str:
    """A percentage that says 100 % only of all."""
    return "all" if value == 1 else f"{min(value, 0.9999):.2%}" if value > 0.999 else f"{value:.1%}"
