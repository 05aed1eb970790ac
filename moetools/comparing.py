"""Two checkpoints compared: tensors, routers on disk, and what they select on the same texts.

The 2x2 split tells a change of the routers from a change of what they read. With W the routers and
X their inputs, every cell is compared with A's own selection, W_A on X_A:

    router_only   W_B on X_A
    input_only    W_A on X_B
    total         W_B on X_B, B's own selection

Shapes: T tokens, E routed experts, K selected per token, H hidden size.
"""

import importlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetools import console
from moetools.analysis import layer_rows, rows, typed
from moetools.architectures import Reader, RouterCall, RouterSpec, find_routers, refusal
from moetools.batching import TokenSequence, fingerprint, load_tokenizer, make_sequences, plan_parts
from moetools.checkpoint import Checkpoint
from moetools.drift import (
    SUMS,
    compare_selections,
    cosines,
    energy_in_span,
    match_experts,
    router_change,
    row_changes,
    selection_metrics,
)
from moetools.edit_plan import has_equal_bits
from moetools.errors import (
    ArchitectureError,
    MachineError,
    MoEToolsError,
    RequestError,
    RoutingError,
)
from moetools.expert_counts import count_selections
from moetools.hooks import (
    NaNRoutingError,
    RouterRecorder,
    Routing,
    expert_outputs,
    read_call,
    router_tensor,
)
from moetools.intervals import Cells, Scope
from moetools.loading import empty_model, load_model
from moetools.opening import (
    BATCH_TOKENS,
    dtype_name,
    pick_device,
    pick_dtype,
    pick_sequence_length,
    show_bars,
    switch_off_extras,
    usable_memory,
)
from moetools.routing import ScoringRule, common_rules, fitting_rules, tied_tokens
from moetools.tensor_diff import TensorDiff, diff_tensors
from moetools.texts import HUB_TOKENS, TextData, read_texts
from moetools.tracing import padded

CELLS = ("router_only", "input_only", "total")
CHECKS = ("again", "floor")
"""W_A on X_A once more as the cells compute it; A's own selection in batches of half the size."""

METRICS = (
    "overlap_at_k", "jaccard", "exact_set", "top1_agreement", "weighted_overlap", "load_js",
    "load_tv",
)  # fmt: skip
MAX_GRAM_BYTES = 1 << 30

Selection = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Experts [T, K] and weights [T, K], largest weight first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareOptions:
    """How two checkpoints run over texts; the options of `moetools diff` with `--data`.

    Attributes:
        data: `[GROUP=]DATA` each; empty compares the routers on disk alone.
        text_column: See `read_texts`.
        group_column: See `read_texts`.
        id_column: See `read_texts`.
        sequence_length: Tokens of a sequence at most; None is 512, or what the models take.
        max_tokens: Limit of the whole run.
        batch_tokens: Tokens of a batch, padding included; None chooses by device.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        seed: Of resampling.
        match_experts: Number B's experts as the likest of A.
        routers_only: Leave all other tensors unread.
        trust_remote_code: Run code that comes with a checkpoint.
    """

    data: tuple[str, ...] = ()
    text_column: str = "text"
    group_column: str | None = None
    id_column: str | None = None
    sequence_length: int | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    match_experts: bool = False
    routers_only: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointDiff:
    """How checkpoint B differs from checkpoint A.

    Attributes:
        a: The reference.
        b: What is compared with it.
        tensors: Every tensor on disk; None where only the routers were compared.
        table: Tidy rows: the routers on disk, and with data the cells of the split, with the
            numeric floor in the column `floor`; empty where the routers cannot be compared.
        without_routers: Why they cannot be compared; None where they were.
        matching: By router, for each expert of A the one of B that it is compared with; empty
            without `match_experts`.
        run: What was run over which texts; empty without data.
        reasons: By router, why its cells are missing.
        notes: What to know about these numbers, in sentences.
    """

    a: Checkpoint
    b: Checkpoint
    tensors: TensorDiff | None
    table: pd.DataFrame
    without_routers: str | None
    matching: Mapping[str, NDArray[np.int64]]
    run: Mapping[str, Any]
    reasons: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether a tensor that was compared differs, or any token got other experts."""
        if self.tensors is not None and self.tensors.differs:
            return True
        table = self.table[self.table["scope"] == "layer"]
        changed = (table["metric"] == "num_changed_tensors") & (table["value"] > 0)
        moved = (table["metric"] == "exact_set") & (table["value"] < 1)
        return bool((changed | moved).any())


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A router of A and the one of B with the same name."""

    a: RouterSpec
    b: RouterSpec

    @property
    def name(self) -> str:
        """Name of both."""
        return self.a.name


def diff_checkpoints(a: str, b: str, options: CompareOptions | None = None) -> CheckpointDiff:
    """Compare the tensors of two checkpoints, their routers, and with data what they select.

    Args:
        a: Checkpoint folder, hub id or `demo`: the reference.
        b: The one that is compared with it.
        options: What to run; nothing by default.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
        ArchitectureError: Routers cannot be found, and the request is about them.
        RequestError: The routers do not correspond, and the request is about them; or the texts
            have other tokens in B.
        MachineError: Both do not fit in memory together.
    """
    options = options or CompareOptions()
    own, other = (
        Checkpoint.open(name, trust_remote_code=options.trust_remote_code) for name in (a, b)
    )
    about_routers = bool(options.data) or options.match_experts or options.routers_only
    reason = None
    matching: dict[str, NDArray[np.int64]] = {}
    try:
        pairs = pair_routers(find(own), find(other), a, b)
        parts = on_disk(own, other, pairs, matching, match=options.match_experts)
    except MoEToolsError as error:
        if about_routers:
            raise
        pairs, parts, reason = [], [rows("router_change", "model", np.nan)[:0]], str(error)
    tensors = None if options.routers_only else diff_tensors(own, other)
    comparison = None
    if options.data:
        comparison = _Comparison(own, other, pairs, options, matching)
        comparison.run()
        parts.append(comparison.table())
    return CheckpointDiff(
        a=own,
        b=other,
        tensors=tensors,
        table=typed(parts),
        without_routers=reason,
        matching=matching,
        run={} if comparison is None else comparison.facts,
        reasons={} if comparison is None else comparison.reasons,
        notes=() if comparison is None else tuple(comparison.notes()),
    )


def on_disk(
    a: Checkpoint,
    b: Checkpoint,
    pairs: Sequence["Pair"],
    matching: dict[str, NDArray[np.int64]],
    *,
    match: bool,
) -> list[pd.DataFrame]:
    """Rows about the tensors of all routers: of each expert, each router, and of all.

    Args:
        a: The reference.
        b: The other.
        pairs: Their routers.
        matching: By router the expert of B for each of A; filled with `match`.
        match: Number B's experts as the likest of A.
    """
    parts: list[pd.DataFrame] = []
    for pair in pairs:
        weight_a, weight_b = weights_on_disk(a, b, pair)
        order = match_experts(weight_a, weight_b) if match else None
        if order is not None:
            matching[pair.name] = order
            weight_b = weight_b[order]
        values = router_change(weight_a, weight_b) | other_changes(a, b, pair, order)
        of_rows = {
            "row_change": row_changes(weight_a, weight_b),
            "row_cosine": cosines(weight_a, weight_b),
        }
        numbers = np.arange(len(weight_a))
        layer = pair.a.layer
        parts += [rows(metric, "layer", value, layer=layer) for metric, value in values.items()]
        parts += [
            rows(metric, "expert", value, layer=layer, expert=numbers)
            for metric, value in of_rows.items()
        ]
    of_layers = pd.concat(parts, ignore_index=True)
    of_layers = of_layers[of_layers["scope"] == "layer"]
    for metric in of_layers["metric"].unique():
        values_of = of_layers.loc[of_layers["metric"] == metric, "value"]
        pooled = {"num_changed_tensors": np.sum}.get(metric, np.mean)(values_of)
        parts.append(rows(metric, "model", pooled))
    return parts


def find(checkpoint: Checkpoint) -> list[RouterSpec]:
    """The routers of feed-forward experts, from headers and `config.json` alone."""
    trusted = checkpoint.trust_remote_code
    reason = refusal(checkpoint.config_dict, trust_remote_code=trusted)
    if reason is not None:
        raise ArchitectureError(f"{checkpoint.name} cannot be compared: {reason}.")
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    model = empty_model(checkpoint.config(), trust_remote_code=trusted)
    return [spec for spec in find_routers(model, shapes).routers if spec.kind == "mlp"]


def pair_routers(
    routers_a: Sequence[RouterSpec], routers_b: Sequence[RouterSpec], a: str, b: str
) -> list[Pair]:
    """Routers of equal name.

    Raises:
        RequestError: One has no counterpart, or another number of experts.
    """
    own, others = ({spec.name: spec for spec in specs} for specs in (routers_a, routers_b))
    alone = sorted(own.keys() ^ others.keys())
    if alone or not own:
        which = f"router {alone[0]}" if alone else "a router of feed-forward experts"
        where = a if alone and alone[0] in own else b
        raise RequestError(f"Only {where} has {which}: {a} and {b} cannot be compared.")
    for name, spec in own.items():
        if spec.num_experts != others[name].num_experts:
            raise RequestError(
                f"Router {name} has {spec.num_experts} experts in {a}, "
                f"{others[name].num_experts} in {b}: they cannot be compared."
            )
    return [Pair(a=spec, b=others[name]) for name, spec in own.items()]


def other_changes(
    a: Checkpoint, b: Checkpoint, pair: Pair, order: NDArray[np.int64] | None
) -> dict[str, float]:
    """Largest change of each bias of a router, and how many of its tensors differ.

    Args:
        a: The reference.
        b: The other.
        pair: A router of both.
        order: The expert of B for each of A; None for equal numbers.
    """
    found: dict[str, float] = {}
    biases = {
        "bias_change": (pair.a.bias_key, pair.b.bias_key),
        "correction_bias_change": (pair.a.correction_bias_key, pair.b.correction_bias_key),
    }
    for metric, (key_a, key_b) in biases.items():
        if key_a is not None and key_b is not None:
            change = _ordered(b.tensor(key_b), order).double() - a.tensor(key_a).double()
            found[metric] = float(change.abs().max())
    changed = sum(
        not has_equal_bits(a.tensor(key_a), _ordered(b.tensor(key_b), order))
        for key_a, key_b in zip(pair.a.keys, pair.b.keys, strict=False)
    )
    found["num_changed_tensors"] = changed + abs(len(pair.a.keys) - len(pair.b.keys))
    return found


def weights_on_disk(
    a: Checkpoint, b: Checkpoint, pair: Pair
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[E, H] router weights of both.

    Raises:
        RequestError: They have other shapes.
    """
    weights = [a.tensor(pair.a.weight_key), b.tensor(pair.b.weight_key)]
    if weights[0].shape != weights[1].shape:
        raise RequestError(
            f"Router {pair.name} is {list(weights[0].shape)} in {a.name}, "
            f"{list(weights[1].shape)} in {b.name}: they cannot be compared."
        )
    first, second = (weight.double().numpy() for weight in weights)
    return first, second


def _ordered(tensor: Tensor, order: NDArray[np.int64] | None) -> Tensor:
    """Rows of B in the order of A's experts, where they are experts."""
    if order is None or tensor.dim() == 0 or len(tensor) != len(order):
        return tensor
    return tensor[torch.from_numpy(order)]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """How a model calls a router: with hidden states of so many dimensions, and what else."""

    num_dimensions: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Side:
    """One of the two models, ready to run.

    Attributes:
        model: In evaluation mode.
        specs: Its routers by name.
        rules: Scoring rule of each, from the first batch; None where it is unknown.
    """

    def __init__(self, model: Any, specs: Sequence[RouterSpec]) -> None:
        switch_off_extras(model)
        self.model = model
        self.specs = {spec.name: spec for spec in specs}
        self.rules: dict[str, ScoringRule | None] | None = None
        self.recorder = RouterRecorder(model, specs, keep=frozenset({"logits", "inputs"}))
        self._calls: dict[str, _Call] = {}
        self._device = model.get_input_embeddings().weight.device
        self._bias = {spec.name: router_tensor(model, spec.correction_bias_name) for spec in specs}
        self._scale = {spec.name: router_tensor(model, spec.expert_scale_name) for spec in specs}

    def run(self, token_ids: Sequence[NDArray[np.int32]]) -> dict[str, Routing]:
        """Routing of some sequences, one after the other, without padding."""
        input_ids, mask = padded(token_ids)
        arguments = {"input_ids": input_ids.to(self._device), "use_cache": False}
        if not mask.all():
            arguments["attention_mask"] = mask.long().to(self._device)
        self.recorder.begin(num_tokens=mask.numel(), mask=mask)
        self.model.base_model(**arguments)
        routings = self.recorder.take()
        if self.rules is None:
            self.rules = common_rules(
                {name: self._fitting(name, routing) for name, routing in routings.items()}
            )
        return routings

    def _fitting(self, name: str, routing: Routing) -> tuple[ScoringRule, ...]:
        assert routing.router_logits is not None
        return fitting_rules(
            routing.router_logits, routing.top_k_index, routing.top_k_weights, self.specs[name],
            self._bias[name], self._scale[name],
        )  # fmt: skip

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Hooks on the routers, for as long as the model runs."""
        handles = []
        for name, spec in self.specs.items():

            def keep(
                module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                if self.recorder.recording:
                    self._calls[name] = _Call(
                        num_dimensions=args[0].dim(), args=args[1:], kwargs=kwargs
                    )

            module = self.model.get_submodule(spec.module)
            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            with self.recorder:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, name: str, routing: Routing) -> Tensor:
        """[T, E] logits of a router on the inputs of `routing`, which may be the other model's."""
        spec = self.specs[name]
        read: Reader = read_call
        if spec.reader is not None:
            read = importlib.import_module(spec.reader).read
        inputs = routing.router_inputs
        assert inputs is not None
        call = self._calls[name]
        leading = (1,) * (call.num_dimensions - 2)
        hidden_states = inputs.reshape(*leading, *inputs.shape)
        output = self.model.get_submodule(spec.module)(hidden_states, *call.args, **call.kwargs)
        of_experts = (inputs, routing.top_k_index, routing.top_k_weights)
        given = RouterCall(
            router_output=output if isinstance(output, tuple) else (output,),
            experts_args=of_experts if spec.tap == "experts" else (),
        )
        logits = read(spec, given)[2]
        assert logits is not None
        return logits

    def select(self, name: str, routing: Routing) -> Selection:
        """What a router selects on the inputs of `routing`."""
        rule = (self.rules or {})[name]
        assert rule is not None
        logits = self.logits(name, routing)
        return _selection(*rule.select(logits, self._bias[name], self._scale[name]))

    def why_not(self, name: str, routing: Routing) -> str | None:
        """Why a router cannot be asked again, from its own routing of a batch."""
        rule = (self.rules or {})[name]
        if rule is None:
            return "its scoring rule is unknown"
        own = {id(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())}
        call = self._calls[name]
        others = [each for each in (*call.args, *call.kwargs.values()) if isinstance(each, Tensor)]
        if not all(id(tensor) in own for tensor in others):
            return "it reads more than the hidden state of a token"
        logits = self.logits(name, routing)
        if tied_tokens(rule, logits, routing.top_k_index, self._bias[name]) is None:
            return "asked again on its own inputs, it selects other experts than the model did"
        return None


def _selection(top_k_index: Tensor, top_k_weights: Tensor) -> Selection:
    weights, order = top_k_weights.sort(dim=-1, descending=True, stable=True)
    return top_k_index.gather(-1, order).cpu().numpy(), weights.float().cpu().numpy()


@dataclass(slots=True)
class _Sums:
    """Additive sums of one router over the cells of the bootstrap.

    Attributes:
        load_a: [cells, E] selections of A.
        compared: By cell of the split, sums of `compare_selections`.
        loads: By cell of the split, [cells, E] selections.
        inputs: [cells, 3] tokens; relative change of the router's input, and in the floor.
        experts: [cells, 2] selections; relative change of the expert's output.
        gram: [H, H] of unit-length inputs of A; None where it is too large.
    """

    load_a: NDArray[np.int64]
    compared: dict[str, NDArray[np.float64]]
    loads: dict[str, NDArray[np.int64]]
    inputs: NDArray[np.float64]
    experts: NDArray[np.float64]
    gram: Tensor | None = None


@dataclass(slots=True)
class _ExpertDrift:
    """Compares the experts of A and B inside A's forward pass.

    Attributes:
        on: Whether it measures.
        found: By router, [rows, K] relative change of each output, padding included.
        failed: Routers whose experts cannot run with one place of K at a time.
    """

    on: bool = False
    failed: set[str] = field(default_factory=set)
    found: dict[str, Tensor] = field(default_factory=dict)


class _Comparison:
    """Both models over the same batches."""

    def __init__(
        self,
        a: Checkpoint,
        b: Checkpoint,
        pairs: Sequence[Pair],
        options: CompareOptions,
        matching: Mapping[str, NDArray[np.int64]],
    ) -> None:
        self.options, self.pairs, self.matching = options, list(pairs), matching
        self.reasons: dict[str, str] = {}
        self._checkpoints = (a, b)
        device = pick_device(options.device)
        num_parameters = sum(
            math.prod(info.shape) for each in (a, b) for info in each.tensors.values()
        )
        dtype = pick_dtype(options.dtype, device, num_parameters)
        self._check_memory(num_parameters * dtype.itemsize, device)
        show_bars(sys.stderr.isatty() and not console.settings.quiet)
        paths = [each.local_path() for each in (a, b)]
        self.sequences, groups = self._read(paths)
        batch_tokens = options.batch_tokens or BATCH_TOKENS[device.type]
        lengths = [len(sequence.token_ids) for sequence in self.sequences]
        self.num_tokens = sum(lengths)
        (part,) = plan_parts(lengths, batch_tokens=batch_tokens, part_tokens=self.num_tokens)
        self.batches = part.batches
        console.note(f"Loading {a.name} and {b.name} ({dtype_name(dtype)}, {device}) ...")
        models = [
            load_model(
                path, dtype=dtype, device=device, trust_remote_code=options.trust_remote_code
            )
            for path in paths
        ]
        self.a = _Side(models[0], [pair.a for pair in pairs])
        self.b = _Side(models[1], [pair.b for pair in pairs])
        self.groups = {name: i for i, name in enumerate(groups)}
        self.cells = Cells(groups)
        self.sums: dict[str, _Sums] = {}
        self.drift = _ExpertDrift()
        self.facts = {
            "num_tokens": self.num_tokens,
            "num_sequences": len(self.sequences),
            "groups": list(groups),
            "batch_tokens": batch_tokens,
            "dtype": dtype_name(dtype),
            "device": device.type,
        }

    def _check_memory(self, num_bytes: int, device: torch.device) -> None:
        memory = usable_memory(device)
        if num_bytes > memory:
            a, b = (each.name for each in self._checkpoints)
            raise MachineError(
                f"{a} and {b} take {num_bytes / 1e9:.1f} GB together; {device} offers "
                f"{memory / 1e9:.1f} GB. Trace each one with `moetools trace`, then run `moetools "
                "diff` on the two traces; or choose a smaller --dtype."
            )

    def _read(self, paths: Sequence[Any]) -> tuple[list[TokenSequence], tuple[str, ...]]:
        """The sequences that both models read."""
        options = self.options
        tokenizers = [
            load_tokenizer(path, trust_remote_code=options.trust_remote_code) for path in paths
        ]
        configs = [each.config().get_text_config() for each in self._checkpoints]
        length = min(pick_sequence_length(options.sequence_length, config) for config in configs)
        data: TextData = read_texts(
            options.data,
            text_column=options.text_column,
            group_column=options.group_column,
            id_column=options.id_column,
            hub_tokens=options.max_tokens or HUB_TOKENS,
        )
        of_both = [
            make_sequences(
                data.texts, tokenizer, sequence_length=length, max_tokens=options.max_tokens
            )
            for tokenizer in tokenizers
        ]
        if fingerprint(of_both[0]) != fingerprint(of_both[1]):
            a, b = (each.name for each in self._checkpoints)
            raise RequestError(
                f"{a} and {b} cut these texts into different tokens, so their routing cannot be "
                "compared token by token."
            )
        return of_both[0], data.groups

    def run(self) -> None:
        """Add up the comparisons of every batch."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self.a.recording())
            stack.enter_context(self.b.recording())
            stack.enter_context(self._expert_hooks())
            meter = stack.enter_context(console.progress("Comparing", self.num_tokens, "tokens"))
            for batch in self.batches:
                try:
                    self._add(batch)
                except NaNRoutingError as error:
                    raise RoutingError(
                        f"NaN in the logits of router {error.router}: a checkpoint or its --dtype "
                        "is broken."
                    ) from None
                meter.advance(sum(len(self.sequences[number].token_ids) for number in batch))

    def _add(self, batch: tuple[int, ...]) -> None:
        token_ids = [self.sequences[number].token_ids for number in batch]
        lengths = np.array([len(ids) for ids in token_ids])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        group = [self.sequences[number].group for number in batch]
        index = np.array([-1 if g is None else self.groups[g] for g in group], dtype=np.int32)
        texts = [self.sequences[number].text for number in batch]
        units = [n if text is None else text for n, text in zip(batch, texts, strict=True)]
        cell = self.cells.add(np.array(units, dtype=np.int32), index, lengths)
        self.drift.on = True
        routings_a = self.a.run(token_ids)
        self.drift.on = False
        routings_b = self.b.run(token_ids)
        halves = self._in_halves(token_ids)
        rows_of = padded(token_ids)[1].reshape(-1).nonzero()[:, 0]
        for pair in self.pairs:
            name = pair.name
            routing_a, routing_b = routings_a[name], routings_b[name]
            sums = self._sums(pair, routing_a, routing_b)
            own = _selection(routing_a.top_k_index, routing_a.top_k_weights)
            count_selections(own[0], offsets, cell, sums.load_a)
            cells = {
                "total": self._numbered(
                    name, _selection(routing_b.top_k_index, routing_b.top_k_weights)
                ),
                "floor": _selection(
                    torch.cat([each[name].top_k_index for each in halves])[: offsets[-1]],
                    torch.cat([each[name].top_k_weights for each in halves])[: offsets[-1]],
                ),
            }
            if name not in self.reasons:
                cells["router_only"] = self._numbered(name, self.b.select(name, routing_a))
                cells["input_only"] = self.a.select(name, routing_b)
                cells["again"] = self.a.select(name, routing_a)
            for which, (ids, weights) in cells.items():
                compare_selections(
                    own[0], ids, own[1], weights, pair.a.num_experts, offsets, cell,
                    sums.compared[which],
                )  # fmt: skip
                count_selections(ids, offsets, cell, sums.loads[which])
            self._add_inputs(
                sums, routing_a, routing_b, [each[name] for each in halves], offsets, cell
            )
            if name in self.drift.found:
                found = self.drift.found[name].cpu()[rows_of].double()
                finite = found.isfinite()
                columns = torch.stack(
                    [finite.sum(dim=1).double(), found.where(finite, 0).sum(dim=1)], dim=1
                )
                np.add.at(sums.experts, cell, _by_sequence(columns.numpy(), offsets))

    def _in_halves(self, token_ids: Sequence[NDArray[np.int32]]) -> list[dict[str, Routing]]:
        """A's routing of the sequences in two batches, or of the only one twice in one batch."""
        middle = len(token_ids) // 2
        if middle == 0:
            return [self.a.run([token_ids[0], token_ids[0]])]
        return [self.a.run(token_ids[:middle]), self.a.run(token_ids[middle:])]

    def _add_inputs(
        self,
        sums: _Sums,
        routing_a: Routing,
        routing_b: Routing,
        halves: Sequence[Routing],
        offsets: NDArray[np.int64],
        cell: NDArray[np.int64],
    ) -> None:
        """Add the change of the router's inputs, and their directions."""
        inputs = routing_a.router_inputs
        assert inputs is not None
        assert routing_b.router_inputs is not None
        x = inputs.float()
        again = torch.cat([each.router_inputs for each in halves])[: len(x)]  # type: ignore[misc]
        norms = x.norm(dim=1)
        columns = torch.stack(
            [
                norms > 0,
                _relative(routing_b.router_inputs.float() - x, norms),
                _relative(again.float() - x, norms),
            ],
            dim=1,
        )
        np.add.at(sums.inputs, cell, _by_sequence(columns.cpu().numpy(), offsets))
        if sums.gram is not None:
            unit = (x / norms.clamp_min(torch.finfo(x.dtype).tiny)[:, None]).cpu().double()
            sums.gram += unit.T @ unit

    def _numbered(self, name: str, selection: Selection) -> Selection:
        """A selection of B in the numbers of A's experts."""
        order = self.matching.get(name)
        return selection if order is None else (np.argsort(order)[selection[0]], selection[1])

    def _sums(self, pair: Pair, routing_a: Routing, routing_b: Routing) -> _Sums:
        """The sums of a router; at the first batch, whether its cells can be computed."""
        if pair.name in self.sums:
            return self.sums[pair.name]
        for side, routing, which in ((self.a, routing_a, "A"), (self.b, routing_b, "B")):
            reason = side.why_not(pair.name, routing)
            if reason is not None:
                self.reasons.setdefault(pair.name, f"in {which} {reason}")
        inputs_a, inputs_b = routing_a.router_inputs, routing_b.router_inputs
        assert inputs_a is not None
        assert inputs_b is not None
        size, width = len(self.cells), inputs_a.shape[1]
        names = (*CELLS, *CHECKS)
        fits = len(self.pairs) * width * width * 8 <= MAX_GRAM_BYTES
        loads = {name: np.zeros((size, pair.a.num_experts), dtype=np.int64) for name in names}
        self.sums[pair.name] = _Sums(
            load_a=np.zeros((size, pair.a.num_experts), dtype=np.int64),
            compared={name: np.zeros((size, len(SUMS))) for name in names},
            loads=loads,
            inputs=np.zeros((size, 3)),
            experts=np.zeros((size, 2)),
            gram=torch.zeros(width, width, dtype=torch.float64) if fits else None,
        )
        return self.sums[pair.name]

    @contextmanager
    def _expert_hooks(self) -> Iterator[None]:
        """Run B's experts beside A's, on the same inputs with A's selection."""
        handles = []
        for pair in self.pairs:
            if {pair.a.tap, pair.b.tap} == {"experts"}:
                module = self.a.model.get_submodule(pair.a.experts_module)
                hook = self._expert_hook(pair)
                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _expert_hook(self, pair: Pair) -> Any:
        other = self.b.model.get_submodule(pair.b.experts_module)
        order = self.matching.get(pair.name)

        def compare(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if not self.drift.on:
                return
            hidden_states, top_k_index = (*args, *kwargs.values())[:2]
            of_b = top_k_index
            if order is not None:
                of_b = torch.from_numpy(order).to(of_b.device)[of_b.long()].to(of_b.dtype)
            try:
                outputs = expert_outputs(module, hidden_states, top_k_index)
                change = expert_outputs(other, hidden_states, of_b) - outputs
            except ArchitectureError:
                self.drift.failed.add(pair.name)
            else:
                self.drift.found[pair.name] = change.norm(dim=-1) / outputs.norm(dim=-1)

        return compare

    def table(self) -> pd.DataFrame:
        """All rows, with the floor beside each number where there is one."""
        parts: list[pd.DataFrame] = []
        for scope in self.cells.scopes(seed=self.options.seed):
            parts += self._split_rows(scope)
            parts += self._change_rows(scope)
        parts += self._span_rows()
        return pd.concat(parts, ignore_index=True)

    def _split_rows(self, scope: Scope) -> Iterator[pd.DataFrame]:
        layers = [pair.a.layer for pair in self.pairs]
        drawn: dict[tuple[str, str], NDArray[np.float64]] = {}
        for which in (*CELLS, *CHECKS):
            of_layers = []
            for pair in self.pairs:
                sums = self.sums[pair.name]
                of_layers.append(
                    selection_metrics(
                        scope.draws(sums.compared[which]),
                        scope.draws(sums.load_a),
                        scope.draws(sums.loads[which]),
                    )
                )
            for metric in (*METRICS, "overlap_chance"):
                drawn[metric, which] = np.stack([each[metric] for each in of_layers], axis=1)
        for metric in METRICS:
            floor = drawn[metric, "floor"][0]
            beside = [*floor, floor.mean()]
            for which in (*CELLS, "again"):
                yield layer_rows(
                    metric, scope, layers, drawn[metric, which], bounds=(0, 1), cell=which,
                    floor=beside,
                )  # fmt: skip
        yield layer_rows("overlap_chance", scope, layers, drawn["overlap_chance", "total"])
        router, inputs, total = (1 - drawn["overlap_at_k", which] for which in CELLS)
        yield layer_rows("overlap_interaction", scope, layers, total - router - inputs)

    def _change_rows(self, scope: Scope) -> Iterator[pd.DataFrame]:
        layers = [pair.a.layer for pair in self.pairs]
        inputs = np.stack([scope.draws(self.sums[p.name].inputs) for p in self.pairs], axis=1)
        experts = np.stack([scope.draws(self.sums[p.name].experts) for p in self.pairs], axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            change, floor = inputs[..., 1] / inputs[..., 0], inputs[0, :, 2] / inputs[0, :, 0]
            drift = experts[..., 1] / experts[..., 0]
        bounds = (0, np.inf)
        yield layer_rows(
            "input_change", scope, layers, change, bounds=bounds, floor=[*floor, floor.mean()]
        )
        yield layer_rows("expert_drift", scope, layers, drift, bounds=bounds)

    def _span_rows(self) -> Iterator[pd.DataFrame]:
        found = []
        for pair in self.pairs:
            gram = self.sums[pair.name].gram
            if gram is None:
                return
            weight_a, weight_b = weights_on_disk(self._checkpoints[0], self._checkpoints[1], pair)
            order = self.matching.get(pair.name)
            weight_b = weight_b if order is None else weight_b[order]
            if weight_a.shape[1] != len(gram):
                return
            found.append(energy_in_span(weight_b - weight_a, gram.numpy()))
        scope = next(self.cells.scopes(seed=self.options.seed))
        layers = [pair.a.layer for pair in self.pairs]
        for metric, values in zip(
            ("router_change_in_span", "span_dimension"), zip(*found, strict=True), strict=True
        ):
            yield layer_rows(metric, scope, layers, np.array([values]), bounds=(0, 1))

    def notes(self) -> list[str]:
        """How well the cells reproduce the models, and what is missing."""
        notes = []
        tokens = mismatched = 0.0
        for sums in self.sums.values():
            again = sums.compared["again"].sum(axis=0)
            tokens += again[0]
            mismatched += again[0] - again[SUMS.index("exact")]
        if mismatched:
            notes.append(
                f"A's routers, asked again on their own inputs, select other experts in "
                f"{mismatched / tokens:.3%} of the cases, all near ties: the cells router-only and "
                "input-only carry as much rounding."
            )
        for reason in dict.fromkeys(self.reasons.values()):
            names = [name for name, each in self.reasons.items() if each == reason]
            notes.append(
                f"No cells router-only and input-only for router {', '.join(names)}: {reason}."
            )
        if self.drift.failed:
            notes.append("No change of the experts: those of this family cannot run one at a time.")
        return notes


def _relative(change: Tensor, norms: Tensor) -> Tensor:
    """[T] norm of a change over a norm; 0 where that is 0."""
    return torch.where(norms > 0, change.norm(dim=1) / norms, 0.0)


def _by_sequence(columns: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.float64]:
    """[S, N] sums of columns [T, N] over sequences."""
    return np.add.reduceat(columns.astype(np.float64), offsets[:-1], axis=0)
