"""Run a model over texts and record what its routers select.

The forward pass and a little arithmetic per batch happen in one thread, the writing in another.
Shapes: T tokens, S sequences, E classes of a router, K selected per token.

On a GPU models run in bfloat16. On a CPU they run in float32 where that fits into memory, with
eager experts and batches of 2,048 tokens: on an AMD EPYC core without bfloat16 instructions, two
layers of an OLMoE (hidden 1024, 64 experts, top-8) took in per second of processor time

    float32     eager 1,056   grouped_mm 1,002      tokens
    bfloat16    eager   186   grouped_mm   206      batched_mm 23

and batches of 512 and 8,192 tokens were slower (1,024 and 942). In float32 ties between experts
are rare, too. `--dtype`, `--experts-implementation` and `--batch-tokens` decide otherwise.
"""

import importlib.metadata
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetools import console
from moetools.architectures import RouterSpec
from moetools.batching import (
    Part,
    TokenSequence,
    fingerprint,
    make_sequences,
    plan_parts,
    tokenise,
)
from moetools.checkpoint import Checkpoint
from moetools.errors import RequestError, RoutingError, TraceError
from moetools.files import check_output, output_folder
from moetools.hooks import NaNRoutingError, RouterRecorder, Routing, router_tensor
from moetools.interventions import SteeredRouter, check_fits, read_intervention, steered
from moetools.opening import BATCH_TOKENS, open_model
from moetools.routing import ScoringRule, common_rules, fitting_rules
from moetools.texts import HUB_TOKENS, TextData, read_texts, split_group
from moetools.trace_store import (
    MANIFEST,
    OUTPUT_STATISTICS,
    TracedRouter,
    TraceManifest,
    TraceStore,
    TraceWriter,
    fixed_size_list,
    read_manifest,
    row_bytes,
    rows_per_group,
    sequence_schema,
    token_schema,
)

KEEPS = ("logits", "inputs", "norms", "outputs", "predictions", "nll")
SAMPLED = ("logits", "inputs", *OUTPUT_STATISTICS)
SAMPLED_KEEPS = ("logits", "inputs", "norms", "outputs")
LOGITS_PER_BATCH = 1 << 29
PART_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 16, "mps": 1 << 15}
PART_BYTES = 1 << 29
OFFLOAD = "offload"
PENDING_WRITES = 4

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceOptions:
    """What to trace and how; the options of `moetools trace`.

    Attributes:
        model: Checkpoint folder, hub id or `demo`.
        data: `[GROUP=]DATA` each.
        out: Folder of the trace.
        text_column, group_column, id_column, reference_group: See `read_texts`.
        chat_template: Wrap each text as the turn of a user.
        pack: Join short texts of a group.
        sequence_length: Tokens of a sequence at most; None is 512, or what the model takes.
        max_sequences, max_tokens: Limits of the whole run.
        batch_tokens: Tokens of a batch, padding included; None chooses by device.
        part_tokens: Tokens of a file of the trace, the most that a killed run loses; None chooses
            by device.
        keep: What to keep beside selections and weights, of `KEEPS`.
        keep_tokens: Keep logits, inputs, norms and outputs of so many tokens only, drawn at random.
        seed: Of that draw.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        intervention: File that says how the routers are steered while the model runs.
        experts_implementation: `eager`, `batched_mm` or `grouped_mm`; None as in `load_model`.
        trust_remote_code: Run code that comes with the checkpoint.
        allow_nan: Record NaN instead of stopping.
        resume: Continue an interrupted trace.
        overwrite: Replace a trace that is there.
    """

    model: str
    data: tuple[str, ...]
    out: Path
    text_column: str = "text"
    group_column: str | None = None
    id_column: str | None = None
    reference_group: str | None = None
    chat_template: bool = False
    pack: bool = False
    sequence_length: int | None = None
    max_sequences: int | None = None
    max_tokens: int | None = None
    batch_tokens: int | None = None
    part_tokens: int | None = None
    keep: tuple[str, ...] = ()
    keep_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    intervention: Path | None = None
    experts_implementation: str | None = None
    trust_remote_code: bool = False
    allow_nan: bool = False
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRun:
    """A finished trace and what this run did.

    Attributes:
        store: The whole trace.
        num_tokens: Tokens that this run recorded; fewer than the trace has after `--resume`.
        seconds: Time for these tokens, without loading the model.
        num_nan_tokens: Tokens with NaN that `--allow-nan` let pass in this run.
    """

    store: TraceStore
    num_tokens: int
    seconds: float
    num_nan_tokens: int


def trace(
    model: str | Path, *, data: str | Sequence[str], out: str | Path, **options: Any
) -> TraceStore:
    """Record the routing of a model on texts, as `moetools trace` does.

    Args:
        model: Checkpoint folder, hub id `org/name[@revision]`, or `demo`.
        data: One or several `[GROUP=]DATA`.
        out: Folder to write.
        **options: Any other field of `TraceOptions`.

    Raises:
        MoEToolsError: The input or the request is wrong.
    """
    sources = (data,) if isinstance(data, str) else tuple(data)
    return record(TraceOptions(model=str(model), data=sources, out=Path(out), **options)).store


def record(options: TraceOptions) -> TraceRun:
    """Record a trace.

    Raises:
        MoEToolsError: The input or the request is wrong; nothing is left behind, or what is left
            can be resumed.
    """
    options = _checked(options)
    intervention = None
    if options.intervention is not None:
        intervention = read_intervention(options.intervention)
    inputs = local_inputs(options.model, options.data)
    if options.intervention is not None:
        inputs.append(options.intervention)
    claim: dict[str, Any] = {
        "kind": "trace",
        "overwrite": options.overwrite,
        "resume": options.resume,
        "resumable": True,
        "inputs": inputs,
    }
    check_output(options.out, **claim)
    opened = open_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        purpose="recorded",
    )
    if intervention is not None:
        check_fits(intervention, opened.checkpoint, opened.routers)
    checkpoint, device, tokenizer = opened.checkpoint, opened.device, opened.tokenizer
    sequence_length = opened.sequence_length(options.sequence_length)
    data = _read(options, tokenizer)
    sequences = make_sequences(
        data.texts,
        tokenizer,
        sequence_length=sequence_length,
        pack=options.pack,
        chat_template=options.chat_template,
        max_sequences=options.max_sequences,
        max_tokens=options.max_tokens,
    )
    manifest = TraceManifest(
        model=options.model,
        revision=checkpoint.revision,
        family=checkpoint.model_type,
        routers=_traced_routers(opened.routers, checkpoint),
        ignored_routers=dict(opened.discovery.ignored),
        config=checkpoint.config_dict,
        num_sequences=len(sequences),
        num_tokens=sum(len(sequence.token_ids) for sequence in sequences),
        groups=data.groups,
        reference_group=data.reference_group,
        dtype=opened.dtype_name,
        device=device.type,
        data=_describe_data(options, data),
        keep=options.keep,
        hidden_size=opened.text_config.hidden_size,
        has_nll="nll" in options.keep,
        seed=options.seed,
        versions=_versions(),
        plan=_plan(options, device, sequences, sequence_length, opened.text_config.vocab_size),
        intervention=None if intervention is None else intervention.to_json(),
        notes=() if intervention is None else (f"Steered: {intervention.describe()}.",),
    )
    if options.part_tokens is None:
        manifest.plan["part_tokens"] = min(PART_TOKENS[device.type], _part_limit(manifest))
    with output_folder(options.out, **claim) as folder:
        if folder.resumed and (folder.path / MANIFEST).exists():
            manifest = _continued(folder.path, manifest)
        run = _Run(
            options=options,
            path=folder.path,
            manifest=manifest,
            sequences=sequences,
            specs=opened.routers,
        )
        if run.missing:
            with (
                opened.load(
                    experts_implementation=options.experts_implementation,
                    scratch=folder.path / OFFLOAD,
                ) as model,
                steered(model, opened, intervention) as steering,
            ):
                run.record(model, steering.routers)
        run.finish()
    return TraceRun(
        store=TraceStore(options.out),
        num_tokens=run.num_tokens,
        seconds=run.seconds,
        num_nan_tokens=run.num_nan_tokens,
    )


def _checked(options: TraceOptions) -> TraceOptions:
    """Options without contradictions."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RequestError(
            "trace runs in one process; start it without torchrun or accelerate launch."
        )
    if not options.data:
        raise RequestError("No data: name it with --data.")
    for name in options.keep:
        if name not in KEEPS:
            raise RequestError(f"--keep {name}: expected one of {', '.join(KEEPS)}.")
    for name in (
        "sequence_length", "max_sequences", "max_tokens", "batch_tokens", "part_tokens",
        "keep_tokens",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} {value}: expected at least 1.")
    if options.keep_tokens is not None and not set(SAMPLED_KEEPS) & set(options.keep):
        raise RequestError(
            "--keep-tokens limits what --keep logits, inputs, norms or outputs keep; add one of "
            "them."
        )
    if options.pack and options.id_column is not None:
        raise RequestError(
            "--pack joins texts, so --id-column cannot align them. Drop one of both."
        )
    return replace(options, keep=tuple(name for name in KEEPS if name in options.keep))


def local_inputs(model: str, data: Sequence[str]) -> list[Path]:
    """Files and folders that the run reads."""
    named = [model, *(split_group(item)[1] for item in data)]
    return [path for name in named if (path := Path(name).expanduser()).exists()]


def _read(options: TraceOptions, tokenizer: Any) -> TextData:
    def count_tokens(texts: list[str]) -> int:
        return sum(map(len, tokenise(texts, tokenizer, chat_template=options.chat_template)))

    return read_texts(
        options.data,
        text_column=options.text_column,
        group_column=options.group_column,
        id_column=options.id_column,
        reference_group=options.reference_group,
        count_tokens=count_tokens,
        hub_tokens=options.max_tokens or HUB_TOKENS,
    )


def _traced_routers(
    specs: Sequence[RouterSpec], checkpoint: Checkpoint
) -> tuple[TracedRouter, ...]:
    return tuple(
        TracedRouter(
            name=spec.name,
            layer=spec.layer,
            kind=spec.kind,
            num_experts=spec.num_experts,
            top_k=spec.top_k,
            module=spec.module,
            weight_key=spec.weight_key,
            sha256=checkpoint.fingerprint(spec.keys),
        )
        for spec in specs
    )


def _describe_data(options: TraceOptions, data: TextData) -> dict[str, Any]:
    return {
        "sources": list(options.data),
        "text_column": options.text_column,
        "group_column": options.group_column,
        "id_column": options.id_column,
        "num_texts": len(data.texts),
        "num_dropped": data.num_dropped,
        "stopped": list(data.stopped),
    }


def _versions() -> dict[str, str]:
    packages = ("moetools", "torch", "transformers", "tokenizers")
    return {package: importlib.metadata.version(package) for package in packages}


def _plan(
    options: TraceOptions,
    device: torch.device,
    sequences: Sequence[TokenSequence],
    sequence_length: int,
    vocab_size: int,
) -> dict[str, Any]:
    """Everything that decides which tokens meet in a batch and which in a file."""
    batch_tokens = BATCH_TOKENS[device.type]
    if {"nll", "predictions"} & set(options.keep):
        batch_tokens = min(batch_tokens, max(1, LOGITS_PER_BATCH // vocab_size))
    return {
        "sequence_length": sequence_length,
        "pack": options.pack,
        "chat_template": options.chat_template,
        "max_sequences": options.max_sequences,
        "max_tokens": options.max_tokens,
        "batch_tokens": options.batch_tokens or batch_tokens,
        "part_tokens": options.part_tokens,
        "keep_tokens": options.keep_tokens,
        "allow_nan": options.allow_nan,
        "experts_implementation": options.experts_implementation,
        "sha256": fingerprint(sequences),
    }


def _part_limit(manifest: TraceManifest) -> int:
    """Tokens whose rows fill `PART_BYTES` in memory."""
    sampled = manifest.plan["keep_tokens"]
    share = 1.0 if sampled is None else min(1.0, sampled / manifest.num_tokens)
    always = replace(manifest, keep=tuple(k for k in manifest.keep if k not in SAMPLED_KEEPS))
    bytes_always = row_bytes(always)
    bytes_per_token = bytes_always + share * (row_bytes(manifest) - bytes_always)
    return max(1, int(PART_BYTES / bytes_per_token))


def _continued(path: Path, manifest: TraceManifest) -> TraceManifest:
    """The manifest of the trace to continue, which must be that of the same run.

    Raises:
        TraceError: Something that decides what is recorded differs.
    """
    started = read_manifest(path)
    rules = {router.name: router.rule for router in started.routers}
    routers = tuple(replace(each, rule=rules.get(each.name)) for each in manifest.routers)
    manifest = replace(manifest, routers=routers)
    before, now = started.to_json(), manifest.to_json()
    ends = ("complete", "coverage", "notes", "num_parts")
    differing = [
        _difference(key, before[key], now[key])
        for key in now
        if key not in ends and before[key] != now[key]
    ]
    if differing:
        raise TraceError(
            f"--resume: {path} was started differently: {'; '.join(differing)}. Use the same "
            "options, model and data, or start again with --overwrite."
        )
    return replace(manifest, notes=started.notes)


def _difference(key: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        shown = ", ".join(_difference(name, before.get(name), now.get(name)) for name in names[:3])
        return f"{key} ({shown})"
    if key == "sha256":
        return "the texts or their tokens"
    was, becomes = (str(value) for value in (before, now))
    return f"{key} {was} -> {becomes}" if len(was) + len(becomes) < 100 else key


class _Run:
    """The recording of the parts that are missing."""

    def __init__(
        self,
        *,
        options: TraceOptions,
        path: Path,
        manifest: TraceManifest,
        sequences: Sequence[TokenSequence],
        specs: Sequence[RouterSpec],
    ) -> None:
        self.num_tokens = 0
        self.num_nan_tokens = 0
        self.seconds = 0.0
        self._options = options
        self._path = path
        self._manifest = manifest
        self._sequences = sequences
        self._specs = specs
        self._parts = plan_parts(
            [len(sequence.token_ids) for sequence in sequences],
            batch_tokens=manifest.plan["batch_tokens"],
            part_tokens=manifest.plan["part_tokens"],
        )
        self._writer = TraceWriter(path, manifest) if (path / MANIFEST).exists() else None
        self.missing = [
            number
            for number in range(len(self._parts))
            if self._writer is None or not self._writer.has_part(number)
        ]
        self._kept = _sampled_tokens(manifest)
        self._starts = np.cumsum([0, *(len(sequence.token_ids) for sequence in sequences)])

    def record(self, model: Any, steered_routers: Mapping[str, SteeredRouter]) -> None:
        """Run the model over the missing parts and write them."""
        self._scorers = {
            spec.name: _Scorer(model, spec, steered_routers.get(spec.name)) for spec in self._specs
        }
        if self._writer is not None:
            for router in self._manifest.routers:
                self._scorers[router.name].restore(router.rule)
        keep = frozenset({"logits", *self._manifest.keep} & {*SAMPLED_KEEPS})
        has_head = bool({"nll", "predictions"} & set(self._manifest.keep))
        self._input_device = model.get_input_embeddings().weight.device
        if self._input_device.type == "meta":
            self._input_device = torch.device(self._manifest.device)
        forward = model if has_head else model.base_model
        total = self._manifest.num_tokens
        missing = sum(self._length(self._parts[number]) for number in self.missing)
        start = time.monotonic()
        with (
            torch.inference_mode(),
            RouterRecorder(
                model, self._specs, keep=keep, allow_nan=self._options.allow_nan
            ) as recorder,
            _writing() as write,
            console.progress("Tracing", total, "tokens", done=total - missing) as meter,
        ):
            for number in self.missing:
                part = self._parts[number]
                rows: _PartRows | None = None
                for batch in part.batches:
                    results, outputs = self._run_batch(forward, recorder, batch, has_head)
                    if rows is None:
                        rows = self._part_rows(part)
                    write(rows.add, batch, results, outputs)
                    meter.advance(sum(len(self._sequences[i].token_ids) for i in batch))
                assert rows is not None
                assert self._writer is not None
                write(_write_part, self._writer, number, rows)
        self.num_tokens = missing
        self.seconds = time.monotonic() - start

    def finish(self) -> None:
        """Check that nothing is missing and mark the trace complete."""
        recorded = TraceStore(self._path, partial=True)
        planned = self._manifest.num_tokens
        if recorded.num_tokens != planned or len(recorded.routers) != len(self._specs):
            raise TraceError(
                f"{self._path} holds {recorded.num_tokens} of {planned} tokens. Record it again "
                "with --overwrite."
            )
        assert self._writer is not None
        num_routers = len(self._specs)
        notes = self._writer.manifest.notes
        if self.num_nan_tokens:
            notes = (*notes, f"NaN in {self.num_nan_tokens} tokens (--allow-nan)")
        self._writer.finish(
            num_parts=len(self._parts),
            coverage=f"{num_routers} of {num_routers} routers, {_count(recorded.num_tokens)} of "
            f"{_count(planned)} tokens",
            notes=notes,
        )

    def _length(self, part: Part) -> int:
        return int(self._starts[part.last] - self._starts[part.first])

    def _run_batch(
        self, forward: Any, recorder: RouterRecorder, batch: tuple[int, ...], has_head: bool
    ) -> tuple[dict[str, dict[str, Array]], dict[str, Array]]:
        """Results by router and, with a language-model head, its outputs."""
        lengths = [len(self._sequences[number].token_ids) for number in batch]
        input_ids, mask = padded([self._sequences[number].token_ids for number in batch])
        device = self._input_device
        arguments = {"input_ids": input_ids.to(device), "use_cache": False}
        if not mask.all():
            arguments["attention_mask"] = mask.long().to(device)
        recorder.begin(num_tokens=mask.numel(), mask=mask)
        output = forward(**arguments)
        try:
            routings = recorder.take()
        except NaNRoutingError as error:
            raise self._nan_error(error, batch, mask.shape[1]) from None
        if self._writer is None:
            self._start_writing(routings)
        if self._options.allow_nan:
            self._count_nan(routings)
        kept = None
        if self._kept is not None:
            tokens = np.concatenate([np.arange(*self._starts[i : i + 2]) for i in batch])
            kept = torch.from_numpy(np.flatnonzero(self._kept[tokens]))
        results = {
            name: self._scorers[name].results(routing, lengths, kept, self._manifest.keep)
            for name, routing in routings.items()
        }
        outputs = {}
        if has_head:
            outputs = _head_outputs(output.logits, input_ids, lengths)
        return results, outputs

    def _start_writing(self, routings: Mapping[str, Routing]) -> None:
        """Find the scoring rules on the first batch; the columns depend on them."""
        rules = common_rules(
            {name: self._scorers[name].fitting_rules(each) for name, each in routings.items()}
        )
        for name, rule in rules.items():
            self._scorers[name].rule = rule
        routers = tuple(
            replace(each, rule=None if (found := rules[each.name]) is None else found.to_json())
            for each in self._manifest.routers
        )
        self._manifest = replace(self._manifest, routers=routers)
        self._writer = TraceWriter(self._path, self._manifest)

    def _part_rows(self, part: Part) -> "_PartRows":
        first, last = self._starts[part.first], self._starts[part.last]
        return _PartRows(
            manifest=self._manifest,
            first=part.first,
            sequences=self._sequences[part.first : part.last],
            kept=None if self._kept is None else self._kept[first:last],
        )

    def _nan_error(
        self, error: NaNRoutingError, batch: tuple[int, ...], width: int
    ) -> RoutingError:
        rows = error.rows.cpu().numpy()
        number = batch[int(rows[0]) // width]
        sequence = self._sequences[number]
        layer = next(spec.layer for spec in self._specs if spec.name == error.router)
        named = f" (id {sequence.id})" if sequence.id is not None else ""
        return RoutingError(
            f"NaN in the router logits of layer {layer} (router {error.router}), sequence "
            f"{number}{named}; {len(rows)} tokens of this batch. The checkpoint or its --dtype is "
            "broken; --allow-nan records them as they are."
        )

    def _count_nan(self, routings: Mapping[str, Routing]) -> None:
        bad = torch.stack(
            [each.top_k_weights.isnan().any(dim=-1).cpu() for each in routings.values()]
        )
        self.num_nan_tokens += int(bad.any(dim=0).sum())


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _sampled_tokens(manifest: TraceManifest) -> NDArray[np.bool_] | None:
    """[T of the trace] whether the `SAMPLED` columns of a token are kept; None keeps all."""
    wanted = manifest.plan["keep_tokens"]
    if wanted is None or wanted >= manifest.num_tokens:
        return None
    generator = np.random.default_rng(manifest.seed)
    kept = np.zeros(manifest.num_tokens, dtype=np.bool_)
    kept[generator.choice(manifest.num_tokens, size=wanted, replace=False)] = True
    return kept


def padded(token_ids: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token ids [B, L], padded on the right, and the mask [B, L] of what is not padding."""
    lengths = torch.tensor([len(ids) for ids in token_ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    input_ids[mask] = torch.from_numpy(np.concatenate(token_ids).astype(np.int64))
    return input_ids, mask


def _head_outputs(logits: Tensor, input_ids: Tensor, lengths: Sequence[int]) -> dict[str, Array]:
    """Predicted tokens [T] and mean negative log-likelihood [S] in nats per predicted token."""
    predictions, nll = [], []
    for row, length in enumerate(lengths):
        of_sequence = logits[row, :length].float()
        predictions.append(of_sequence.argmax(dim=-1).cpu())
        targets = input_ids[row, 1:length].to(logits.device)
        loss = torch.nn.functional.cross_entropy(of_sequence[:-1], targets)
        nll.append(loss.item())
    return {
        "predictions": torch.cat(predictions).numpy(),
        "nll": np.array(nll, dtype=np.float32),
    }


class _Scorer:
    """Turns what one router did into what a trace stores."""

    def __init__(self, model: Any, spec: RouterSpec, steered_router: SteeredRouter | None) -> None:
        self._spec = spec
        self._steered = steered_router
        self.rule: ScoringRule | None = None
        self._bias = router_tensor(model, spec.correction_bias_name)
        if steered_router is not None:
            self._bias = steered_router.correction_bias
        self._expert_scale = router_tensor(model, spec.expert_scale_name)

    def restore(self, rule: dict[str, Any] | None) -> None:
        """Use the rule that an earlier run found."""
        self.rule = None if rule is None else ScoringRule.from_json(rule)

    def fitting_rules(self, routing: Routing) -> tuple[ScoringRule, ...]:
        """Rules that reproduce a batch; of a steered router, the one it is steered by."""
        if self._steered is not None:
            return (self._steered.rule,)
        if routing.router_logits is None:
            return ()
        return fitting_rules(
            routing.router_logits,
            routing.top_k_index,
            routing.top_k_weights,
            self._spec,
            self._bias,
            self._expert_scale,
        )

    def results(
        self, routing: Routing, lengths: Sequence[int], kept: Tensor | None, keep: Sequence[str]
    ) -> dict[str, Array]:
        """Columns by family: [T, ...] of tokens, [S, ...] of sequences.

        Args:
            routing: Rows of the sequences one after the other.
            lengths: Tokens of each sequence.
            kept: Rows whose `SAMPLED` columns are wanted; None for all.
            keep: What is kept, of `KEEPS`.
        """
        weights, order = routing.top_k_weights.sort(dim=-1, descending=True, stable=True)
        index = routing.top_k_index.gather(-1, order)
        ids = index.to(torch.uint8 if self._spec.num_experts < 256 else torch.int16)
        found = {"experts": ids, "weights": weights.half()}

        def by_weight(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.gather(-1, order)

        if self.rule is not None and routing.router_logits is not None:
            found |= self._scores(self.rule, routing.router_logits, lengths)
        sampled = {
            "logits": routing.router_logits if "logits" in keep else None,
            "inputs": routing.router_inputs,
            "norms": by_weight(routing.expert_norms),
            "peaks": by_weight(routing.expert_peaks),
            "shares": by_weight(routing.expert_shares),
            "collinearity": routing.collinearity,
        }
        for name, values in sampled.items():
            if values is not None:
                values = values if kept is None else values[kept.to(values.device)]
                found[name] = values.half() if name == "inputs" else values.float()
        return {name: values.cpu().numpy() for name, values in found.items()}

    def _scores(
        self, rule: ScoringRule, router_logits: Tensor, lengths: Sequence[int]
    ) -> dict[str, Tensor]:
        device = router_logits.device
        found = {}
        if rule.top_k < self._spec.num_experts:
            best = rule.selection_scores(router_logits, self._bias).topk(rule.top_k + 1).values
            found["margin"] = _rounded(best[:, -2] - best[:, -1])
        probs = rule.probabilities(router_logits)
        logprob = probs.clamp_min(torch.finfo(torch.float32).tiny).log()
        entropy = -(probs * logprob).sum(dim=-1, keepdim=True)
        sizes = torch.tensor(lengths, device=device)
        position = torch.cat([torch.arange(length) for length in lengths]).to(device)
        even = (position % 2 == 0)[:, None]
        columns = torch.cat([probs * even, probs * ~even, logprob, entropy], dim=-1)
        means = torch.segment_reduce(columns, "sum", lengths=sizes, axis=0) / sizes[:, None]
        width = self._spec.num_experts
        probs_even, probs_odd, mean_logprob, mean_entropy = torch.split(
            means, [width, width, width, 1], dim=-1
        )
        return found | {
            "probs": probs_even + probs_odd,
            "probs_even": probs_even,
            "probs_odd": probs_odd,
            "logprob": mean_logprob,
            "entropy": mean_entropy[:, 0],
        }


def _rounded(margin: Tensor) -> Tensor:
    """Float16 with five significant bits (within 3 %), which compress to half the bytes."""
    bits = margin.half().view(torch.int16)
    return ((bits + (1 << 5)) & ~((1 << 6) - 1)).view(torch.float16)


class _PartRows:
    """The rows of one part, filled batch by batch and written in the order of the sequences."""

    def __init__(
        self,
        *,
        manifest: TraceManifest,
        first: int,
        sequences: Sequence[TokenSequence],
        kept: NDArray[np.bool_] | None,
    ) -> None:
        self._manifest = manifest
        self._first = first
        self._sequences = sequences
        self._starts = np.cumsum([0, *(len(sequence.token_ids) for sequence in sequences)])
        self._kept = np.ones(self._starts[-1], dtype=np.bool_) if kept is None else kept
        self._kept_row = np.cumsum(self._kept) - 1
        self._columns: dict[str, Array] = {}

    def add(
        self,
        batch: Sequence[int],
        results: Mapping[str, Mapping[str, Array]],
        outputs: Mapping[str, Array],
    ) -> None:
        """Put the results of a batch in their place.

        Args:
            batch: Numbers of its sequences.
            results: Columns by router and family, rows in the order of the batch.
            outputs: Columns of the language-model head.
        """
        sequences = np.array(batch) - self._first
        tokens = np.concatenate([np.arange(*self._starts[i : i + 2]) for i in sequences])
        sampled = self._kept_row[tokens[self._kept[tokens]]]
        num_tokens, num_sequences, num_sampled = (
            int(self._starts[-1]), len(self._sequences), int(self._kept.sum())
        )  # fmt: skip
        places = {
            **dict.fromkeys(("experts", "weights", "margin", "predictions"), (num_tokens, tokens)),
            **dict.fromkeys(SAMPLED, (num_sampled, sampled)),
        }
        named = {
            f"{family}.{router}": values
            for router, families in results.items()
            for family, values in families.items()
        }
        for column, values in {**named, **outputs}.items():
            size, rows = places.get(column.split(".")[0], (num_sequences, sequences))
            if column not in self._columns:
                self._columns[column] = np.zeros((size, *values.shape[1:]), dtype=values.dtype)
            self._columns[column][rows] = values

    def token_tables(self) -> Iterator[pa.Table]:
        """Tables of whole sequences, one for each row group."""
        limit = rows_per_group(self._manifest)
        first = 0
        while first < len(self._sequences):
            end = int(np.searchsorted(self._starts, self._starts[first] + limit, side="right")) - 1
            last = max(first + 1, end)
            yield self._token_table(first, last)
            first = last

    def _token_table(self, first: int, last: int) -> pa.Table:
        begin, end = self._starts[first], self._starts[last]
        lengths = np.diff(self._starts[first : last + 1])
        sequence = np.arange(self._first + first, self._first + last, dtype=np.int32)
        columns: dict[str, Any] = {
            "sequence": np.repeat(sequence, lengths),
            "position": np.concatenate([np.arange(length, dtype=np.int32) for length in lengths]),
            "token_id": np.concatenate([each.token_ids for each in self._sequences[first:last]]),
            "phase": pa.DictionaryArray.from_arrays(
                pa.array(np.zeros(end - begin, dtype=np.int8)), pa.array(["prefill"])
            ),
        }
        for field in token_schema(self._manifest):
            family = field.name.split(".")[0]
            if field.name in columns:
                continue
            values = self._columns.get(field.name)
            if values is None:
                columns[field.name] = pa.nulls(int(end - begin), field.type)
            elif family in SAMPLED:
                columns[field.name] = self._sampled_column(values, begin, end)
            elif values.ndim == 2:
                columns[field.name] = fixed_size_list(values[begin:end])
            else:
                columns[field.name] = values[begin:end]
        return pa.table(columns).select(token_schema(self._manifest).names)

    def _sampled_column(self, values: Array, begin: int, end: int) -> pa.Array:
        kept = self._kept[begin:end]
        rows = self._kept_row[begin:end][kept]
        if kept.all():
            return fixed_size_list(values[rows])
        wide = np.zeros((end - begin, values.shape[1]), dtype=values.dtype)
        wide[kept] = values[rows]
        return fixed_size_list(wide, mask=~kept)

    def sequence_table(self) -> pa.Table:
        """One row per sequence."""
        numbers = np.arange(self._first, self._first + len(self._sequences), dtype=np.int32)
        columns: dict[str, Any] = {
            "sequence": numbers,
            "text": pa.array([sequence.text for sequence in self._sequences], pa.int32()),
            "id": pa.array([sequence.id for sequence in self._sequences], pa.string()),
            "group": pa.array([sequence.group for sequence in self._sequences], pa.string()),
            "num_tokens": np.diff(self._starts).astype(np.int32),
        }
        for name in sequence_schema(self._manifest).names:
            if name not in columns:
                values = self._columns[name]
                columns[name] = fixed_size_list(values) if values.ndim == 2 else values
        return pa.table(columns)


def _write_part(writer: TraceWriter, number: int, rows: _PartRows) -> None:
    writer.write_part(number, rows.token_tables(), rows.sequence_table())


@contextmanager
def _writing() -> Iterator[Callable[..., None]]:
    """Yield a function that runs calls in order in another thread; errors come back to the caller.

    At the end all calls have been made; after an exception those that wait are dropped.
    """
    pending: deque[Future[None]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moetools-writer")

    def write(call: Callable[..., None], *args: Any) -> None:
        while pending and (pending[0].done() or len(pending) >= PENDING_WRITES):
            pending.popleft().result()
        pending.append(pool.submit(call, *args))

    try:
        yield write
        while pending:
            pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
