"""`moetools diff A B`: how two checkpoints differ, or the routing of two traces."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moetools import console
from moetools.diffing import Kind, same_kind
from moetools.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    GroupColumnOption,
    IdColumnOption,
    JsonOption,
    SeedOption,
    SequenceLengthOption,
    TextColumnOption,
    TrustRemoteCodeOption,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moetools.checkpoint import TensorInfo
    from moetools.comparing import CheckpointDiff
    from moetools.paired_traces import TraceDiff
    from moetools.tensor_diff import TensorDiff, TensorGroup
    from moetools.trace_store import TraceStore

NUMBERS = (
    "change", "cosine", "largest", "num_changed_elements", "changed_elements", "num_changed_bytes",
    "changed_bytes", "num_not_finite",
)  # fmt: skip
"""Of a tensor that differs, as `--json` names them."""
MAX_GROUPS = 20
"""Patterns that are shown without `--all`."""

DIFFERENT = 3
"""Exit code of `--exit-code` where A and B differ."""

SHOWN = {
    "overlap_at_k": "overlap",
    "overlap_chance": "chance",
    "exact_set": "exact set",
    "top1_agreement": "top-1",
    "weighted_overlap": "weighted",
    "load_tv": "load moved",
}
COUNTED = ("overlap_at_k", "exact_set", "top1_agreement")

CELLS = {"router_only": "B's\nrouters", "input_only": "B's\ninputs", "total": "\nboth"}
ON_DISK = {
    "router_change": "change",
    "row_cosine": "cosine",
    "row_cosine_min": "least",
    "row_cosine_centred": "centred",
    "row_cosine_centred_min": "least",
    "bias_change": "bias",
    "correction_bias_change": "corr. bias",
}


def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="The reference: a trace, or a checkpoint or 'demo'.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it, of that kind.")],
    floor: Annotated[
        Path | None,
        typer.Option(
            "--floor",
            metavar="TRACE",
            help="Of two traces: A's model traced again with another --batch-tokens. What rounding "
            "alone changes is shown beside every number.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[GROUP=]DATA",
            help="Of two checkpoints: run both over these texts and tell a change of the routers "
            "from a change of what they read. As for trace; repeatable.",
            show_default=False,
        ),
    ] = None,
    match_experts: Annotated[
        bool,
        typer.Option(
            "--match-experts",
            help="Of two checkpoints: compare each expert of A with the one of B whose router row "
            "is like its own, for experts that were permuted.",
        ),
    ] = False,
    all_tensors: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Of two checkpoints: list every tensor that differs, not patterns of keys.",
        ),
    ] = False,
    routers_only: Annotated[
        bool,
        typer.Option(
            "--routers-only",
            help="Of two checkpoints: compare the routers and leave all other tensors unread.",
        ),
    ] = False,
    text_column: TextColumnOption = "text",
    group_column: GroupColumnOption = None,
    id_column: IdColumnOption = None,
    sequence_length: SequenceLengthOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop there; groups take turns.", show_default=False)
    ] = None,
    batch_tokens: BatchTokensOption = None,
    exit_code: Annotated[
        bool,
        typer.Option(
            "--exit-code",
            help="Exit with 3 if any token got other experts, or any tensor differs.",
        ),
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    trust_remote_code: TrustRemoteCodeOption = False,
    json: JsonOption = False,
) -> None:
    """Show how two checkpoints differ in their tensors, or two traces in their routing.

    Two checkpoints are compared byte by byte on disk, and with --data on the same texts.

    Example: moetools diff trace-before/ trace-after/ --floor trace-before-again/
    """
    kind = same_kind(a, b)
    running: dict[str, Any] = {
        "group_column": group_column,
        "id_column": id_column,
        "sequence_length": sequence_length,
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
    }
    given = {name: value for name, value in running.items() if value is not None}
    of_checkpoints = {
        "--data": bool(data),
        "--match-experts": match_experts,
        "--all": all_tensors,
        "--routers-only": routers_only,
    }
    check_options(kind, floor=floor, of_checkpoints=of_checkpoints, running=given)
    if kind == "trace":
        from moetools.paired_traces import diff_traces

        traces = diff_traces(a, b, floor=floor, seed=seed)
        differs = traces.differs
        show(json, trace_document(traces), trace_lines(traces))
    else:
        from moetools.comparing import CompareOptions, diff_checkpoints

        options = CompareOptions(
            data=tuple(data or ()),
            text_column=text_column,
            device=device,
            dtype=dtype,
            seed=seed,
            match_experts=match_experts,
            routers_only=routers_only,
            trust_remote_code=trust_remote_code,
            **running,
        )
        checkpoints = diff_checkpoints(a, b, options)
        differs = checkpoints.differs
        show(json, checkpoint_document(checkpoints), checkpoint_lines(checkpoints, all_tensors))
    if exit_code and differs:
        raise typer.Exit(DIFFERENT)


def check_options(
    kind: Kind,
    *,
    floor: Path | None,
    of_checkpoints: dict[str, bool],
    running: dict[str, Any],
) -> None:
    """Refuse options that would do nothing.

    Args:
        kind: What is compared.
        floor: `--floor`.
        of_checkpoints: Options that only two checkpoints have, and whether each was given.
        running: Options of `--data` that were given.

    Raises:
        RequestError: An option belongs to the other kind, needs `--data`, does not fit another
            one, or is out of range.
    """
    from moetools.errors import RequestError

    wrong = [name for name, is_given in of_checkpoints.items() if is_given]
    if kind == "trace" and wrong:
        raise RequestError(f"{wrong[0]} is for two checkpoints; these are traces.")
    if of_checkpoints["--all"] and of_checkpoints["--routers-only"]:
        raise RequestError("--all lists tensors, and --routers-only leaves them unread.")
    if kind == "checkpoint" and floor is not None:
        raise RequestError(
            "--floor is for two traces; with --data two checkpoints are held against A in other "
            "batches by themselves."
        )
    for name, value in running.items():
        option = f"--{name.replace('_', '-')}"
        if not of_checkpoints["--data"]:
            raise RequestError(
                f"{option} says how to run two checkpoints over texts: name those with --data."
            )
        if isinstance(value, int) and value < 1:
            raise RequestError(f"{option} {value}: expected at least 1.")


def show(json: bool, document: dict[str, Any], lines: "Sequence[RenderableType]") -> None:
    """Print a comparison, as one JSON document or in words."""
    if json:
        console.show_json(document)
    else:
        console.show(*lines)


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
        "intervention": manifest.intervention,
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
            facts = [manifest.title, manifest.dtype, manifest.device]
            facts += [] if batch is None else [f"batches of {batch:,} tokens"]
            known = ", ".join(filter(None, facts))
            shown.append(escape(f"{name:6} {trace.path}: {known}"))
    shown += [
        Text(f"{found.b.num_tokens:,} tokens in {found.b.num_sequences:,} sequences\n"),
        _trace_table(found),
        Text(),
    ]
    return [*shown, *(Text(line) for line in trace_sentences(found))]


def _trace_table(found: "TraceDiff") -> "RenderableType":
    """One line a layer; with a floor, every number has its own beside it."""
    from rich.table import Table

    from moetools.analysis import select

    has_floor = found.floor is not None
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("layer")
    below = "\n  B  floor" if has_floor else ""
    for heading in SHOWN.values():
        has_pair = has_floor and heading != "chance"
        table.add_column(f"{heading}{below if has_pair else ''}", justify="right")
    rows = found.table[found.table["scope"].isin(["layer", "model"])]
    for layer in [*sorted(rows["layer"].dropna().unique()), None]:
        cells = []
        for metric in SHOWN:
            row = select(rows, metric=metric, layer=layer)
            numbers = [row["value"].iloc[0]]
            if has_floor and metric != "overlap_chance":
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


def trace_sentences(found: "TraceDiff") -> list[str]:
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


def checkpoint_document(found: "CheckpointDiff") -> dict[str, Any]:
    """The comparison of two checkpoints as plain values."""
    from moetools.reporting import metrics

    return {
        "kind": "checkpoints",
        "a": {"model": found.a.name, "revision": found.a.revision},
        "b": {"model": found.b.name, "revision": found.b.revision},
        "differs": found.differs,
        "tensors": None if found.tensors is None else tensor_document(found.tensors),
        "without_routers": found.without_routers,
        "run": dict(found.run) or None,
        "matching": {name: order.tolist() for name, order in found.matching.items()} or None,
        "without_cells": dict(found.reasons),
        "notes": list(found.notes),
        "records": metrics.records(found.table.drop(columns=["trace", "step"])),
    }


def tensor_document(tensors: "TensorDiff") -> dict[str, Any]:
    """Every tensor and small file that differs, as plain values."""

    def place(info: "TensorInfo | None") -> dict[str, Any] | None:
        if info is None:
            return None
        return {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "file": info.shard,
            "num_bytes": info.num_bytes,
        }

    files = tensors.files
    return {
        "num_identical": tensors.num_identical,
        "num_identical_bytes": tensors.num_identical_bytes,
        "differences": [
            {
                "key": each.key,
                "kind": each.kind,
                "a": place(each.a),
                "b": place(each.b),
                **{name: getattr(each, name) for name in NUMBERS},
            }
            for each in tensors.differences
        ],
        "files": None if files is None else {each.name: each.kind for each in files},
    }


def checkpoint_lines(found: "CheckpointDiff", all_tensors: bool = False) -> "list[RenderableType]":
    """Tensors, the routers on disk, the split where it was run, and what they say in words."""
    from rich.markup import escape
    from rich.padding import Padding
    from rich.text import Text

    shown: list[RenderableType] = [escape(f"A  {found.a.name}"), escape(f"B  {found.b.name}")]
    if found.tensors is not None:
        shown += ["", Text("Tensors on disk", style="bold")]
        shown += [
            Padding(Text(line.strip()), (0, 0, 0, len(line) - len(line.lstrip())), expand=False)
            for line in tensor_lines(found.tensors, all_tensors)
        ]
    shown += ["", Text("Routers on disk", style="bold")]
    if found.without_routers is not None:
        return [*shown, Text(f"Not compared. {found.without_routers}")]
    if found.matching:
        shown.append(Text(_matching(found)))
    shown += [_disk_table(found), "", *(Text(line) for line in disk_sentences(found))]
    if found.run:
        run = found.run
        facts = f"{run['num_tokens']:,} tokens in {run['num_sequences']:,} sequences"
        shown += [
            "",
            Text("Experts of A that stay", style="bold"),
            Text(f"{facts}, {run['dtype']} on {run['device']}\n"),
            _split_table(found),
            "",
            *(Text(line) for line in split_sentences(found)),
        ]
    return shown


def tensor_lines(tensors: "TensorDiff", all_tensors: bool = False) -> list[str]:
    """How many tensors differ, and by how much those of one pattern do.

    Args:
        tensors: All of both checkpoints compared.
        all_tensors: One entry for each tensor, not for each pattern.
    """
    from moetools.tensor_diff import TensorGroup, group

    count = tensors.num_identical
    same = f"{_many(count, 'tensor is', 'tensors are')} byte-identical"
    if not tensors.differs:
        lines = [f"No difference: {same} ({console.bytes_text(tensors.num_identical_bytes)})."]
    else:
        counts = [(kind, len(tensors.of_kind(kind))) for kind in ("changed", "added", "removed")]
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts if number)
        lines = [f"{kinds}; {same} ({console.bytes_text(tensors.num_identical_bytes)}).", ""]
        groups = group(tensors.differences)
        if all_tensors:
            groups = [
                TensorGroup(pattern=each.key, members=(each,)) for each in tensors.differences
            ]
        limit = len(groups) if all_tensors else MAX_GROUPS
        for each in groups[:limit]:
            lines += [f"{each.members[0].kind}  {each.pattern}", f"    {group_facts(each)}"]
        if len(groups) > limit:
            lines.append(
                f"... and {len(groups) - limit:,} more patterns: --all or --json lists all."
            )
        lines.append("")
    if tensors.files is None:
        lines.append("Small files were not compared: a hub model's files cannot be listed now.")
    elif tensors.files:
        names = ", ".join(f"{each.name} ({each.kind})" for each in tensors.files)
        lines.append(f"Small files that differ: {names}.")
    else:
        lines.append("Small files (config, tokenizer, ...) are the same.")
    return lines


def group_facts(group: "TensorGroup") -> str:
    """What is known of the differences of one pattern, in one line."""
    first = group.members[0]
    count = len(group.members)
    words = [] if count == 1 else [f"{count:,} tensors"]
    if first.a is None or first.b is None:
        info = first.a or first.b
        assert info is not None
        shapes = {(each.a or each.b).shape for each in group.members}  # type: ignore[union-attr]
        return ", ".join([*words, f"{info.dtype} {list(info.shape) if len(shapes) == 1 else ''}"])
    if first.a.shape != first.b.shape:
        words.append(f"shape {list(first.a.shape)} -> {list(first.b.shape)}")
    if first.a.dtype != first.b.dtype:
        words.append(f"dtype {first.a.dtype} -> {first.b.dtype}")

    def known(name: str) -> list[float]:
        values = (getattr(each, name) for each in group.members)
        return [value for value in values if value is not None]

    mean = "" if count == 1 else "mean "
    if changes := known("change"):
        words.append(f"{mean}change {sum(changes) / len(changes):.3g}")
    if cosines := known("cosine"):
        words.append(f"{'' if count == 1 else 'least '}cosine {_cosine(min(cosines))}")
    if largest := known("largest"):
        words.append(f"largest {max(largest):.3g}")
    for name, unit, size in (
        ("num_changed_elements", "elements", "num_elements"),
        ("num_changed_bytes", "bytes", "num_bytes"),
    ):
        if counts := known(name):
            total = sum(getattr(each.a, size) for each in group.members)
            words.append(f"{int(sum(counts)):,} of {total:,} {unit} differ")
            break
    if not_finite := int(sum(known("num_not_finite"))):
        words.append(f"{not_finite:,} not finite")
    return ", ".join(words)


def _cosine(value: float) -> str:
    """Four decimals; 1.0000 only of all."""
    return "0.9999" if 0.99995 <= value < 1 else f"{value:.4f}"


def _many(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _matching(found: "CheckpointDiff") -> str:
    """How many experts were renumbered."""
    moved = {
        name: sum(int(a) != b for b, a in enumerate(order))
        for name, order in found.matching.items()
    }
    total = sum(len(order) for order in found.matching.values())
    return (
        f"Experts matched by their router rows: {sum(moved.values()):,} of {total:,} have another "
        f"number in B, in {sum(count > 0 for count in moved.values())} of {len(moved)} routers."
    )


def _disk_table(found: "CheckpointDiff") -> "RenderableType":
    from rich.table import Table

    from moetools.analysis import select, single

    table = found.table
    metrics = [name for name in ON_DISK if len(select(table, metric=name))]
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("layer")
    for name in metrics:
        shown.add_column(ON_DISK[name], justify="right")
    layers = sorted(select(table, metric="router_change", scope="layer")["layer"])
    for layer in layers:
        values = [single(table, name, "layer", layer=layer) for name in metrics]
        shown.add_row(str(layer), *(_number(value) for value in values))
    shown.add_row("mean", *(_number(single(table, name)) for name in metrics))
    return shown


def disk_sentences(found: "CheckpointDiff") -> list[str]:
    """How many routers differ, and where most."""
    from moetools.analysis import largest, select, single

    layers = select(found.table, metric="num_changed_tensors", scope="layer")
    changed = int((layers["value"] > 0).sum())
    lines = ["No difference: every router tensor is the same."]
    if changed:
        most = largest(select(found.table, metric="router_change", scope="layer"))
        lines = [
            f"{changed} of {len(layers)} routers differ; their weights moved by "
            f"{single(found.table, 'router_change'):.1%} of their norm on average, most in layer "
            f"{most['layer']} ({most['value']:.1%}). Cosines of an expert's row in A and in B; "
            "centred: without the mean row, which a softmax does not see."
        ]
    if not found.run:
        lines.append("What that does to the routing of texts: add --data.")
    return lines


def _split_table(found: "CheckpointDiff") -> "RenderableType":
    """Overlap with A's own selection, by what was taken from B."""
    from rich.table import Table

    from moetools.analysis import select

    table = found.table[found.table["scope"].isin(["layer", "model"])]
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("\nlayer")
    for heading in CELLS.values():
        shown.add_column(heading, justify="right")
    for heading in ("\nfloor", "\nchance", "inter-\naction", "inputs\nchange", "experts\nchange"):
        shown.add_column(heading, justify="right")

    def number(metric: str, layer: Any, column: str = "value", **wanted: Any) -> float:
        rows = select(table, metric=metric, layer=layer, group=None, **wanted)
        return float(rows[column].iloc[0]) if len(rows) else float("nan")

    for layer in [*sorted(select(table, metric="input_change")["layer"].dropna()), None]:
        overlaps = [number("overlap_at_k", layer, cell=cell) for cell in CELLS]
        overlaps.append(number("overlap_at_k", layer, "floor", cell="total"))
        others = ("overlap_chance", "overlap_interaction", "input_change", "expert_drift")
        shown.add_row(
            "mean" if layer is None else str(layer),
            *(_number(value, counted=True) for value in overlaps),
            *(_number(number(name, layer)) for name in others),
        )
    return shown


def split_sentences(found: "CheckpointDiff") -> list[str]:
    """Which share of the change the routers and their inputs account for."""
    from moetools.analysis import select, single

    table = found.table

    def loss(cell: str) -> float:
        return 1 - single(table, "overlap_at_k", cell=cell)

    total = select(table, metric="overlap_at_k", scope="model", cell="total").iloc[0]
    both, routers, inputs = loss("total"), loss("router_only"), loss("input_only")
    if both == 0:
        lines = ["No difference: every token got the same experts in both models."]
    else:
        interval = ""
        if total["low"] == total["low"]:
            interval = f" (95 % interval {1 - total['high']:.1%} to {1 - total['low']:.1%})"
        lines = [
            f"{both:.1%} of A's experts are lost{interval}; A in other batches loses "
            f"{1 - total['floor']:.1%}."
        ]
        if routers == routers and inputs == inputs:
            lines.append(
                f"B's routers on A's inputs lose {routers:.1%}, A's routers on B's inputs "
                f"{inputs:.1%}; interaction: what both lose beyond the sum of the two, "
                f"{both - routers - inputs:+.1%}."
            )
    change = select(table, metric="input_change", scope="model").iloc[0]
    lines.append(
        f"The routers' inputs changed by {change['value']:.1%} of their norm, in other batches of "
        f"A by {change['floor']:.1%}."
    )
    drift = single(table, "expert_drift")
    if drift == drift:
        lines.append(f"On the same inputs the experts' outputs changed by {drift:.1%}.")
    inside, size = single(table, "router_change_in_span"), single(table, "span_dimension")
    if inside == inside:
        lines.append(
            f"{inside:.1%} of the routers' change acts on directions that the inputs use; they are "
            f"{size:.1%} of all directions."
        )
    return [*lines, *found.notes]
