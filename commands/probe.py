"""`moetools probe MODEL --data DATA`: what each layer's learned routing is worth."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetools import console
from moetools.options import (
    BatchTokensOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    GroupColumnOption,
    JsonOption,
    ModelArgument,
    OverwriteOption,
    ResumeOption,
    SeedOption,
    SequenceLengthOption,
    TextColumnOption,
    TrustRemoteCodeOption,
)

SIGNIFICANT = 0.05
SETS = {
    "layer": "One layer changed",
    "deep-half": "All probed layers of the deeper half changed together",
    "cumulative": "Layers changed together, from the top",
}

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType
    from rich.table import Table

    from moetools.layer_probe import ProbeRun


def probe(
    model: ModelArgument,
    data: DataOption,
    tasks: Annotated[
        Path | None,
        typer.Option(
            help="jsonl of items (question, choices, answer) whose accuracy is measured too.",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[GROUP=]DATA",
            help="Texts to count expert usage on, and mean outputs. Default: the evaluation data.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for probe.parquet, probe.json, probe.png and what was measured for each "
            "document.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="A:B,...",
            help="Layers A to B, both included, or single ones. Default all.",
            show_default=False,
        ),
    ] = None,
    together: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SET",
            help="Change layers at once, too: deep-half, or cumulative from the top. Repeatable.",
            show_default=False,
        ),
    ] = None,
    operators: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="What to put in place of a router's choice: uniform, disjoint, restricted, "
            "frequency, shuffled, shuffled-same-id, bottom-k, next-k, static, permuted, skip, "
            "mean, native.",
        ),
    ] = "uniform,frequency,shuffled,bottom-k,skip",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POLICY",
            help="Weights of the new experts: carry (the native ones, largest first), own (the "
            "router's for them), equal. Repeatable. Default carry.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of every random operator.")] = 5,
    respect_groups: Annotated[
        bool,
        typer.Option(
            "--respect-groups", help="Select only in the expert groups that the router allows."
        ),
    ] = False,
    most_used: Annotated[
        int | None,
        typer.Option(
            help="Experts that 'restricted' draws from. Default 8, or 2K if larger.",
            show_default=False,
        ),
    ] = None,
    text_column: TextColumnOption = "text",
    group_column: GroupColumnOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to evaluate on.")] = 10_000,
    sequence_length: SequenceLengthOption = None,
    batch_tokens: BatchTokensOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Change the routing of one layer after the other and measure how much worse the model gets.

    Example: moetools probe demo --data demo --max-tokens 4000
    """
    from moetools.layer_probe import run_probe
    from moetools.probe_plan import ProbeOptions

    console.settings.resume_hint = (
        "Nothing was kept: --out keeps what is finished, for --resume."
        if out is None
        else "Continue with the same command and --resume."
    )
    run = run_probe(
        ProbeOptions(
            model=model,
            data=tuple(data),
            tasks=tasks,
            calibration=tuple(calibration or ()),
            out=out,
            layers=layers,
            together=tuple(together or ()),
            operators=tuple(name.strip() for name in operators.split(",")),
            weights=tuple(weights or ("carry",)),
            seeds=seeds,
            respect_groups=respect_groups,
            most_used=most_used,
            text_column=text_column,
            group_column=group_column,
            max_tokens=max_tokens,
            sequence_length=sequence_length,
            batch_tokens=batch_tokens,
            device=device,
            dtype=dtype,
            seed=seed,
            trust_remote_code=trust_remote_code,
            resume=resume,
            overwrite=overwrite,
        )
    )
    if json:
        console.show_json(run.to_json())
    else:
        console.show(*render(run, out))


def render(run: "ProbeRun", out: Path | None) -> "list[RenderableType]":
    """What was probed, a table of layers and operators, and how to read it."""
    found = run.summary
    shown: list[RenderableType] = [
        f"[bold]{found['model']}[/bold] on {found['device']} in {found['dtype']}",
        f"  native     NLL {found['native_nll']:.4f} nats per token; {found['num_predicted']:,} "
        f"predicted tokens of {found['num_documents']:,} documents",
    ]
    if found["native_accuracy"] is not None:
        shown.append(
            f"  tasks      accuracy {found['native_accuracy']:.1%} of {found['num_items']:,} items"
        )
    shown += [
        f"  margin     {found['margin_nll']:.4f} nats (0.5 % of the native NLL) count as no "
        "difference",
        f"  usage      of experts, and mean outputs: from {found['usage_from']}",
        f"  seeds      {found['seeds']} of each random operator",
        *(f"  note       {note}" for note in found["notes"]),
    ]
    several = run.results["weights"].dropna().nunique() > 1
    for probes, title in SETS.items():
        results = run.results[run.results["probe"] == probes]
        if len(results):
            shown += ["", f"[bold]{title}[/bold]", _losses(results, several)]
            if found["native_accuracy"] is not None:
                shown.append(_accuracies(results, several))
    shown += [
        "dNLL      nats per token added, with its 95 % interval",
        "same      share of tokens with the same most likely next token",
        "error     relative change of the layer's routed output",
        "sub       substitutability: 1 as good as the router's choice, 0 no better than",
        "          skipping the layer, - where skipping does not significantly hurt",
        "verdict   tests over documents and seeds: equal within the margin, else worse or",
        "          better, else undecided; * not 0 after correction over the layers",
        *(f"{name:<9} {meaning}" for name, meaning in found["operators"].items()),
    ]
    return [*shown, f"Written to {out}"] if out is not None else shown


def _losses(results: "pd.DataFrame", several: bool) -> "Table":
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "dNLL": lambda row: _number(row["delta_nll"], 4, "+"),
        "95 % interval": lambda row: _interval(row["low"], row["high"], 4),
        "same": lambda row: _number(row["agreement"], 2),
        "error": lambda row: _number(row["output_error"], 2),
        "sub": lambda row: _number(row["substitutability"], 2),
        "verdict": _verdict,
    }
    if (results["probe"] != "layer").all():
        del columns["error"]
    return _table(results, several, columns)


def _accuracies(results: "pd.DataFrame", several: bool) -> "Table":
    return _table(
        results,
        several,
        {
            "accuracy": lambda row: _number(row["delta_accuracy"], 3, "+"),
            "95 % interval": lambda row: _interval(row["accuracy_low"], row["accuracy_high"], 3),
            "lost": lambda row: _number(row["flips_to_wrong"], 1),
            "won": lambda row: _number(row["flips_to_right"], 1),
            "verdict": lambda row: _words(row["accuracy_verdict"], row["delta_accuracy"] < 0),
        },
    )


def _table(
    results: "pd.DataFrame", several: bool, columns: dict[str, Callable[[dict[str, Any]], str]]
) -> "Table":
    """One row for each row of the results, in sections by layer."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("operator", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="left" if name == "verdict" else "right", no_wrap=True)
    before = None
    rows: list[dict[str, Any]] = results.to_dict("records")  # type: ignore[assignment]
    for row in rows:
        where = (row["probe"], row["layers"])
        if before not in (None, where):
            table.add_section()
        label = "" if where == before else _layers(row["layers"])
        name = f"{row['operator']}, {row['weights']}" if several else row["operator"]
        table.add_row(
            label,
            row["operator"] if not isinstance(row["weights"], str) else name,
            *(show(row) for show in columns.values()),
        )
        before = where
    return table


def _layers(text: str) -> str:
    """One layer, or the ends of several; the files spell all of them out."""
    first, *others = text.split(", ")
    return f"{first} - {others[-1]}" if others else first


def _number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def _interval(low: float | None, high: float | None, digits: int) -> str:
    shown = _number(low, digits, "+")
    return shown if shown == "-" else f"{shown} {_number(high, digits, '+')}"


def _verdict(row: dict[str, Any]) -> str:
    corrected = row["p_holm"]
    significant = corrected is not None and corrected < SIGNIFICANT
    return _words(row["verdict"], row["delta_nll"] > 0) + ("*" if significant else "")


def _words(verdict: str, worse: bool) -> str:
    if verdict == "different":
        return "worse" if worse else "better"
    return "equal" if verdict == "equivalent" else verdict
