"""`moetools inspect MODEL`: what a checkpoint holds and what works on it, without its weights."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from moetools import console
from moetools.options import JsonOption, ModelArgument, TrustRemoteCodeOption

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from moetools.architectures import RouterSpec
    from moetools.inspection import Inspection, Parameters, TraceSize

DECLARED = {
    "score_function": "score function",
    "norm_topk_prob": "weights renormalised",
    "routed_scaling_factor": "weights scaled by",
    "n_group": "expert groups",
    "topk_group": "groups per token",
    "jitter_eps": "jitter",
}
"""Fields of a router that the config may declare, in words."""


def inspect(
    model: ModelArgument,
    json: JsonOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
) -> None:
    """Show routers, experts, sizes and what works, from headers and config.json alone.

    No weights are downloaded: of a hub model, the headers of its files are read by byte ranges.

    Example: moetools inspect allenai/OLMoE-1B-7B-0125
    """
    from moetools.checkpoint import Checkpoint
    from moetools.inspection import inspect_checkpoint

    checkpoint = Checkpoint.open(model, trust_remote_code=trust_remote_code)
    inspection = inspect_checkpoint(checkpoint)
    if json:
        console.show_json(asdict(inspection))
    else:
        console.show(*render(inspection))


def render(inspection: "Inspection") -> "list[RenderableType]":
    """Sections of the human output, from the model to what works on it."""
    sections = [("Model", _model(inspection)), ("Routers", _routers(inspection))]
    if inspection.experts:
        sections.append(("Experts on disk", _experts(inspection)))
    sections.append(("Parameters", _parameters(inspection.parameters)))
    if inspection.trace_size is not None:
        sections.append(("Trace size", _trace_size(inspection.trace_size)))
    sections.append(("What works", _abilities(inspection)))
    shown: list[RenderableType] = []
    for title, table in sections:
        shown += [f"\n[bold]{title}[/bold]", table]
    return [*shown, *(f"\nNote: {note}" for note in inspection.notes)]


def _model(inspection: "Inspection") -> "Table":
    table = _pairs()
    name = inspection.model
    table.add_row("name", f"{name} at {inspection.revision}" if inspection.revision else name)
    table.add_row("family", " ".join(filter(None, (inspection.model_type, _built_as(inspection)))))
    layers = {router.layer for router in inspection.routers}
    of_all = f" of {inspection.num_layers}" if inspection.num_layers is not None else ""
    table.add_row("MoE layers", f"{len(layers)}{of_all}")
    if inspection.hidden_size is not None:
        table.add_row("hidden size", f"{inspection.hidden_size:,}")
    dtypes = ", ".join(
        f"{dtype}: {console.bytes_text(size)}" for dtype, size in inspection.bytes_by_dtype.items()
    )
    files = "1 file" if inspection.num_files == 1 else f"{inspection.num_files} files"
    table.add_row("on disk", f"{console.bytes_text(inspection.num_bytes)} in {files} ({dtypes})")
    return table


def _built_as(inspection: "Inspection") -> str:
    if not inspection.model_class:
        return ""
    return f"({inspection.model_class} of transformers {inspection.transformers})"


def _routers(inspection: "Inspection") -> "Table":
    """Routers that differ only by their layer are one entry."""
    from moetools.inspection import spell_layers, without_numbers

    table = _pairs()
    if not inspection.routers:
        table.add_row("none", "transformers builds no causal language model of this checkpoint")
    groups: dict[tuple[object, ...], list[RouterSpec]] = {}
    for router in inspection.routers:
        tensors = [
            (without_numbers(key), inspection.router_tensors[key].dtype,
             inspection.router_tensors[key].shape)
            for key in router.keys
        ]  # fmt: skip
        declared = [getattr(router, name) for name in DECLARED]
        selection = (router.kind, router.num_experts, router.top_k, router.num_shared_experts)
        groups.setdefault((*selection, *declared, *tensors), []).append(router)
    for routers in groups.values():
        one = routers[0]
        kind = "" if one.kind == "mlp" else f"{one.kind} "
        table.add_row(
            f"{len(routers)} {kind}router{'s' if len(routers) > 1 else ''}",
            f"top {one.top_k} of {one.num_experts} experts, {_shared(one.num_shared_experts)}",
        )
        table.add_row("  layers", spell_layers(routers))
        table.add_row("  declared", _declared(one))
        table.add_row("  biases", _biases(one))
        for key in one.keys:
            info = inspection.router_tensors[key]
            table.add_row("  key", f"{without_numbers(key)}  {info.dtype} {list(info.shape)}")
    if inspection.routers:
        table.add_row("rule", "found by reproduction when tracing; the config only declares")
    if inspection.ignored_routers:
        table.add_row("not recorded", _ignored(inspection))
    return table


def _shared(count: int) -> str:
    return {0: "no shared expert", 1: "1 shared expert"}.get(count, f"{count} shared experts")


def _declared(router: "RouterSpec") -> str:
    found = {words: getattr(router, name) for name, words in DECLARED.items()}
    texts = [
        f"{words} {str(value).lower() if isinstance(value, bool) else value}"
        for words, value in found.items()
        if value is not None
    ]
    return ", ".join(texts) or "nothing"


def _biases(router: "RouterSpec") -> str:
    found = []
    if router.bias_key is not None:
        found.append("added to the logits")
    if router.correction_bias_name is not None:
        found.append("correction bias, for the selection alone")
    return "; ".join(found) or "none"


def _ignored(inspection: "Inspection") -> str:
    reasons: dict[str, list[str]] = {}
    for key, reason in inspection.ignored_routers.items():
        reasons.setdefault(reason, []).append(key)
    return "\n".join(
        f"{', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}: {reason}"
        for reason, keys in reasons.items()
    )


def _experts(inspection: "Inspection") -> "Table":
    """Tensors below their common beginning, which ends at the number of the expert."""
    table = _pairs()
    shown = ""
    for experts in inspection.experts:
        beginning, marker, rest = experts.pattern.rpartition("{expert}.")
        if not marker:
            beginning, marker, rest = experts.pattern.rpartition("experts.")
        if beginning + marker != shown:
            shown = beginning + marker
            table.add_row(experts.layout, shown)
        shape = f"{experts.dtype} {list(experts.shape)} x {experts.num_tensors:,}"
        table.add_row("", f"  {rest}  {shape}")
    return table


def _parameters(parameters: "Parameters") -> "Table":
    table = _pairs()
    without = parameters.active - parameters.embeddings
    table.add_row("total", _count(parameters.total))
    if parameters.multi_token:
        built = parameters.total - parameters.multi_token
        table.add_row("  of the model", _count(built))
        table.add_row(
            "  multi-token", f"{_count(parameters.multi_token)}, predict ahead, not built"
        )
    table.add_row(
        "active per token",
        f"{_count(parameters.active)}, {_short(without)} without embeddings",
    )
    table.add_row("routed experts", _count(parameters.routed_experts))
    table.add_row("routers", _count(parameters.routers))
    if parameters.other_modalities:
        table.add_row("vision, audio", f"{_count(parameters.other_modalities)}, not active in text")
    return table


def _trace_size(size: "TraceSize") -> "Table":
    table = _pairs()
    table.add_row("1 M tokens", f"at most {console.bytes_text(size.tokens)} (ids and weights)")
    table.add_row("--keep logits", f"+ {console.bytes_text(size.logits)} before compression")
    if size.inputs:
        table.add_row("--keep inputs", f"+ {console.bytes_text(size.inputs)} before compression")
    table.add_row("--keep norms", f"+ {console.bytes_text(size.norms)} before compression")
    table.add_row("--keep outputs", f"+ {console.bytes_text(size.outputs)} before compression")
    sequences = console.bytes_text(1000 * size.sequence)
    table.add_row("1,000 sequences", f"+ {sequences} before compression")
    return table


def _abilities(inspection: "Inspection") -> "Table":
    table = _pairs()
    table.add_column(overflow="fold")
    for ability in inspection.abilities:
        table.add_row(ability.name, ability.works, ability.reason)
    return table


def _pairs() -> "Table":
    """A borderless table of names and values that wraps long values."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=16, no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _count(number: int) -> str:
    return f"{number:,} ({_short(number)})" if number >= 1_000_000 else f"{number:,}"


def _short(number: int) -> str:
    for size, name in ((10**12, "trillion"), (10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:,}"
