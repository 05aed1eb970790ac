"""What a checkpoint holds and what can be done with it, from headers and `config.json` alone."""

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import transformers

from moetools import registry
from moetools.analysis import Options
from moetools.architectures import RouterDiscovery, RouterSpec, find_routers, refusal
from moetools.architectures._discovery import MULTI_TOKEN, OTHER_MODALITY
from moetools.checkpoint import Checkpoint, TensorInfo
from moetools.errors import ArchitectureError
from moetools.loading import empty_model
from moetools.trace_store import (
    OUTPUT_STATISTICS,
    TracedRouter,
    TraceManifest,
    TraceStore,
    TraceWriter,
    sequence_schema,
    token_schema,
)

BYTES_PER_SELECTION = 2.6
"""Upper bound for one selected expert of one token in the token table (id, weight, margin)."""

EXPERT_NUMBER = re.compile(r"(?<=\.)(?:expert_)?(\d+)(?=\.)")
EXPERTS = re.compile(r"(^|\.)experts\.")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
SCALES = re.compile(r"(scale|scales|scale_inv|zeros|zero_point|absmax|g_idx|quant_map|_shape)$")

Verdict = Literal["yes", "no", "untested"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """Tensors of routed experts that differ only by layer and expert.

    Attributes:
        pattern: Their keys, with `{layer}` and `{expert}` in place of the numbers.
        layout: `per expert`, one tensor each, or `stacked`, all experts of a layer in one tensor.
        dtype, shape: Of one tensor.
        num_tensors: How many there are.
    """

    pattern: str
    layout: Literal["per expert", "stacked"]
    dtype: str
    shape: tuple[int, ...]
    num_tensors: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Counts of parameters; packed formats are counted unpacked, their scales are not counted.

    Attributes:
        total: All on disk.
        active: Used for one text token: all but unselected experts, and what is not of this model
            (`multi_token`, `other_modalities`).
        embeddings: Input embedding and, where it is a tensor of its own, the language-model head;
            part of `active`.
        routed_experts: All routed experts together.
        routers: All tensors of the routers.
        multi_token: Multi-token-prediction layers, which transformers does not build.
        other_modalities: Vision, audio and other towers.
    """

    total: int
    active: int
    embeddings: int
    routed_experts: int
    routers: int
    multi_token: int
    other_modalities: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceSize:
    """Bytes of a trace: what the options add, for one million tokens, and the sequence table.

    Attributes:
        tokens: The token table as written by default, an upper bound.
        logits, inputs, norms, outputs: Added by `--keep` of that name, before compression.
        sequence: One row of the sequence table, before compression.
    """

    tokens: int
    logits: int
    inputs: int
    norms: int
    outputs: int
    sequence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Ability:
    """Whether a command or an analysis works on this checkpoint, and why (not)."""

    name: str
    works: Verdict
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Everything `moetools inspect` shows; `trace_size` is None where there are no routers."""

    model: str
    revision: str | None
    model_type: str
    model_class: str
    transformers: str
    num_layers: int | None
    hidden_size: int | None
    routers: tuple[RouterSpec, ...]
    router_tensors: Mapping[str, TensorInfo]
    ignored_routers: Mapping[str, str]
    experts: tuple[Experts, ...]
    parameters: Parameters
    num_bytes: int
    num_files: int
    bytes_by_dtype: Mapping[str, int]
    trace_size: TraceSize | None
    abilities: tuple[Ability, ...]
    notes: tuple[str, ...]


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Describe a checkpoint without reading weights.

    A checkpoint that cannot be traced is described all the same, with the reason.

    Raises:
        ArchitectureError: The routers cannot be told, or their tensors do not fit the config.
        CheckpointError: Tensors do not fit the config.
    """
    config = checkpoint.config()
    refused = refusal(checkpoint.config_dict, trust_remote_code=checkpoint.trust_remote_code)
    model_class, discovery = "", RouterDiscovery(routers=(), ignored={})
    embedding_keys: list[str] = []
    num_stacked: dict[RouterSpec, int] = {}
    try:
        model = empty_model(config, trust_remote_code=checkpoint.trust_remote_code)
        model_class = type(model).__name__
        shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
        discovery = find_routers(model, shapes)
        checkpoint.check_shapes(model.state_dict())
        embedding_keys = _embedding_keys(model, checkpoint.tensors)
        num_stacked = {router: _num_stacked(model, router) for router in discovery.routers}
    except ArchitectureError:
        if refused is None:
            raise
    text = config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", None)
    hidden_size = getattr(text, "hidden_size", None)
    by_router = _routed_experts(num_stacked, checkpoint.tensors)
    bytes_by_dtype: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        bytes_by_dtype[info.dtype] += info.num_bytes
    keys = [key for router in discovery.routers for key in router.keys]
    return Inspection(
        model=checkpoint.name,
        revision=checkpoint.revision,
        model_type=checkpoint.model_type,
        model_class=model_class,
        transformers=transformers.__version__,
        num_layers=num_layers,
        hidden_size=hidden_size,
        routers=discovery.routers,
        router_tensors={key: checkpoint.tensors[key] for key in keys},
        ignored_routers=discovery.ignored,
        experts=_expert_patterns(by_router.values()),
        parameters=_count(
            checkpoint, discovery, by_router, num_stacked, embedding_keys, num_layers
        ),
        num_bytes=checkpoint.num_bytes,
        num_files=len(checkpoint.shard_sizes),
        bytes_by_dtype=dict(bytes_by_dtype),
        trace_size=_trace_size(discovery.routers, hidden_size),
        abilities=_abilities(checkpoint, discovery.routers, hidden_size, refused),
        notes=_notes(checkpoint),
    )


def spell_layers(routers: Iterable[RouterSpec]) -> str:
    """Layers of some routers, every one named: `0, 1, 2`."""
    return ", ".join(str(router.layer) for router in routers)


def without_numbers(key: str) -> str:
    """A key with `{layer}` for its first number and `{expert}` for the one after `experts`."""
    head, experts, tail = key.partition("experts.")
    if experts:
        tail = EXPERT_NUMBER.sub("{expert}", f".{tail}", count=1)[1:]
    return NUMBER.sub("{layer}", head, count=1) + experts + tail


def _num_stacked(model: Any, router: RouterSpec) -> int:
    """Experts of a router that have weights; a router may also score identity experts."""
    if router.tap == "router":
        return router.num_experts
    parameters = model.get_submodule(router.experts_module).parameters()
    stacked = [parameter.shape[0] for parameter in parameters if parameter.dim() == 3]
    return min(stacked, default=router.num_experts)


def _routed_experts(
    routers: Mapping[RouterSpec, int], tensors: Mapping[str, TensorInfo]
) -> dict[str, list[TensorInfo]]:
    """Tensors of the routed experts by router name.

    An expert tensor belongs to the router of its layer whose key shares the longest beginning
    with it (a layer of JetMoE has two).

    Args:
        routers: The number of experts that have weights, for each router.
        tensors: Every tensor on disk.
    """
    by_layer: dict[str, list[RouterSpec]] = defaultdict(list)
    for router in routers:
        by_layer[_layer_prefix(router.weight_key)].append(router)
    own = {key for router in routers for key in router.keys}
    found: dict[str, list[TensorInfo]] = defaultdict(list)
    for key, info in tensors.items():
        beside = by_layer.get(_layer_prefix(key), [])
        if not beside or key in own:
            continue
        router = max(beside, key=lambda router: len(_common(router.weight_key, key)))
        if _is_expert(info, router, routers[router]):
            found[router.name].append(info)
    return found


def _is_expert(info: TensorInfo, router: RouterSpec, num_stacked: int) -> bool:
    """Whether a tensor of the router's layer holds weights of its experts.

    Either its key names one expert, or its first dimension counts the experts, below `experts` or
    in the block of the router.
    """
    if EXPERTS.search(info.key):
        number = _expert_number(info.key)
        if number is not None:
            return number < router.num_experts
        return bool(info.shape) and info.shape[0] % num_stacked == 0
    block = _layer_prefix(info.key) + "."
    same_block = _component(info.key, block) == _component(router.weight_key, block)
    return same_block and len(info.shape) == 3 and info.shape[0] == num_stacked


def _component(key: str, prefix: str) -> str:
    return key.removeprefix(prefix).partition(".")[0]


def _layer_prefix(key: str) -> str:
    number = NUMBER.search(key)
    return key[: number.end()] if number else ""


def _expert_number(key: str) -> int | None:
    number = EXPERT_NUMBER.match(key, key.find("experts.") + 8) if "experts." in key else None
    return int(number[1]) if number else None


def _common(a: str, b: str) -> str:
    length = next((i for i, pair in enumerate(zip(a, b, strict=False)) if len(set(pair)) > 1), None)
    return a[:length]


def _expert_patterns(experts: Iterable[list[TensorInfo]]) -> tuple[Experts, ...]:
    kinds: dict[tuple[str, str, tuple[int, ...], bool], int] = defaultdict(int)
    for tensors in experts:
        for info in tensors:
            single = _expert_number(info.key) is not None
            kinds[without_numbers(info.key), info.dtype, info.shape, single] += 1
    return tuple(
        Experts(
            pattern=pattern,
            layout="per expert" if single else "stacked",
            dtype=dtype,
            shape=shape,
            num_tensors=count,
        )
        for (pattern, dtype, shape, single), count in kinds.items()
    )


def _embedding_keys(model: Any, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Keys of the input embedding and the language-model head: the two matrices of one shape."""
    shape = tuple(model.get_input_embeddings().weight.shape)
    return [
        key
        for key, info in tensors.items()
        if info.shape == shape and NUMBER.search(key) is None and not OTHER_MODALITY.search(key)
    ]


def _count(
    checkpoint: Checkpoint,
    discovery: RouterDiscovery,
    by_router: Mapping[str, list[TensorInfo]],
    num_stacked: Mapping[RouterSpec, int],
    embedding_keys: list[str],
    num_layers: int | None,
) -> Parameters:
    count = _parameter_counter(checkpoint.config_dict)
    everything = {key: count(info) for key, info in checkpoint.tensors.items()}
    multi_token = other = 0
    for key, parameters in everything.items():
        if OTHER_MODALITY.search(key) or _expert_of_other_modality(key, discovery.routers):
            other += parameters
        elif MULTI_TOKEN.search(key) or _beyond(key, discovery.routers, num_layers):
            multi_token += parameters
    routed = inactive = 0
    for router in discovery.routers:
        size = sum(everything[info.key] for info in by_router.get(router.name, []))
        numbers_on_disk = {_expert_number(info.key) for info in by_router.get(router.name, [])}
        num_experts = len(numbers_on_disk - {None}) or num_stacked[router]
        routed += size
        inactive += size - size // num_experts * min(router.top_k, num_experts)
    total = sum(everything.values())
    return Parameters(
        total=total,
        active=total - inactive - multi_token - other,
        embeddings=sum(everything[key] for key in embedding_keys),
        routed_experts=routed,
        routers=sum(everything[key] for router in discovery.routers for key in router.keys),
        multi_token=multi_token,
        other_modalities=other,
    )


def _expert_of_other_modality(key: str, routers: tuple[RouterSpec, ...]) -> bool:
    """Whether an expert has a number that no router of text scores (vision experts of Ernie)."""
    number = _expert_number(key)
    scored = max((router.num_experts for router in routers), default=None)
    return number is not None and scored is not None and number >= scored


def _beyond(key: str, routers: tuple[RouterSpec, ...], num_layers: int | None) -> bool:
    """Whether a key names a decoder block that the config does not count."""
    number = NUMBER.search(key)
    if number is None or num_layers is None or int(number[0]) < num_layers:
        return False
    stems = {_layer_prefix(router.weight_key).rpartition(".")[0] for router in routers}
    return _layer_prefix(key).rpartition(".")[0] in stems


def _parameter_counter(config_dict: Mapping[str, Any]) -> Callable[[TensorInfo], int]:
    """How many parameters a tensor holds: packed ones unpacked, scales and tables none."""
    quantization = config_dict.get("quantization_config") or {}
    bits = _bits(quantization)

    def count(info: TensorInfo) -> int:
        if quantization and SCALES.search(info.key):
            return 0
        if info.dtype.startswith(("F", "BF", "C")):
            return info.num_elements
        return info.num_bytes * 8 // bits if bits else 0

    return count


def _bits(quantization: Mapping[str, Any]) -> int | None:
    """Bits of a packed weight, where the quantisation stores weights as integers."""
    if quantization.get("quant_method") == "mxfp4" or quantization.get("load_in_4bit"):
        return 4
    if quantization.get("load_in_8bit"):
        return 8
    groups = quantization.get("config_groups") or {}
    for group in groups.values():
        return int(group["weights"]["num_bits"])
    bits = quantization.get("bits")
    return int(bits) if bits else None


def _expected_manifest(
    routers: Iterable[RouterSpec], hidden_size: int | None, keep: tuple[str, ...] = ()
) -> TraceManifest:
    """Manifest of a trace of two groups, with the rule found."""
    return TraceManifest(
        model="",
        routers=tuple(
            TracedRouter(
                name=router.name,
                layer=router.layer,
                kind=router.kind,
                num_experts=router.num_experts,
                top_k=router.top_k,
                rule={},
            )
            for router in routers
        ),
        num_sequences=0,
        num_tokens=0,
        groups=("a", "b"),
        hidden_size=hidden_size,
        keep=keep,
    )


def _trace_size(routers: tuple[RouterSpec, ...], hidden_size: int | None) -> TraceSize | None:
    if not routers:
        return None
    keep = ("logits", "outputs") if hidden_size is None else ("logits", "inputs", "outputs")
    manifest = _expected_manifest(routers, hidden_size, keep)
    kept = dict.fromkeys(("logits", "inputs", "norms", "outputs"), 0)
    for column in token_schema(manifest):
        family = column.name.partition(".")[0]
        if family in kept:
            kept[family] += _row_bytes(column)
        if family in OUTPUT_STATISTICS:
            kept["outputs"] += _row_bytes(column)
    selections = sum(router.top_k for router in routers)
    return TraceSize(
        tokens=math.ceil(selections * BYTES_PER_SELECTION * 1e6),
        sequence=sum(_row_bytes(c) for c in sequence_schema(manifest) if "." in c.name),
        **{name: size * 1_000_000 for name, size in kept.items()},
    )


def _row_bytes(column: pa.Field) -> int:
    is_list = pa.types.is_fixed_size_list(column.type)
    leaf = column.type.value_type if is_list else column.type
    return int(leaf.bit_width // 8 * (column.type.list_size if is_list else 1))


def _abilities(
    checkpoint: Checkpoint,
    routers: tuple[RouterSpec, ...],
    hidden_size: int | None,
    refused: str | None,
) -> tuple[Ability, ...]:
    trace = _tracing(checkpoint, routers, refused)
    if trace.works == "no":
        return (trace, Ability(name="report", works="no", reason="there would be no trace"))
    analyses = []
    with tempfile.TemporaryDirectory() as folder:
        TraceWriter(Path(folder), _expected_manifest(routers, hidden_size)).finish()
        expected = TraceStore(Path(folder))
        for name in registry.names("analyses"):
            columns = registry.load("analyses", name).ANALYSIS.columns(expected, Options())
            if isinstance(columns, str):
                by_option = "--" in columns  # the reason says which option makes it work
                works = trace.works if by_option else "no"
                analyses.append(Ability(name=name, works=works, reason=columns))
            else:
                reason = _needs(columns)
                analyses.append(Ability(name=name, works=trace.works, reason=reason))
    return (trace, *analyses)


def _tracing(
    checkpoint: Checkpoint, routers: tuple[RouterSpec, ...], refused: str | None
) -> Ability:
    if refused is not None:
        return Ability(name="trace", works="no", reason=refused)
    tokenizer = checkpoint.has_tokenizer()
    if tokenizer is False:
        reason = "no tokenizer lies beside the weights; copy the tokenizer files of this model"
        return Ability(name="trace", works="no", reason=reason)
    method = (checkpoint.config_dict.get("quantization_config") or {}).get("quant_method")
    if method is not None:
        reason = (
            f"the weights are quantised ({method}): transformers needs the package for it, mostly "
            "a GPU; recording stops if a kernel replaces the experts' call"
        )
        return Ability(name="trace", works="untested", reason=reason)
    reason = f"all {len(routers)} routers were found; every pass checks that each one is recorded"
    return Ability(name="trace", works="yes", reason=reason)


def _needs(columns: Iterable[str]) -> str:
    """What an analysis reads, in words."""
    families = {column.partition(".")[0] for column in columns}
    probabilities = families & {"probs", "probs_even", "probs_odd", "logprob", "entropy", "margin"}
    return (
        "needs probabilities: works if tracing finds the scoring rule"
        if probabilities
        else "from selections"
    )


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    notes = []
    if "auto_map" in checkpoint.config_dict and not checkpoint.trust_remote_code:
        notes.append(
            "The checkpoint brings code of its own; it is not run, transformers' own code for "
            f"{checkpoint.model_type} is used."
        )
    if checkpoint.has_tokenizer() is None:
        notes.append("Offline: whether the model has a tokenizer cannot be seen.")
    return tuple(notes)
