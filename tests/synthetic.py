"""Synthetic traces for tests, written through the real `TraceWriter`.

Shapes: T tokens, S sequences, E routed experts, K selected per token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moetools.trace_store import (
    TracedRouter,
    TraceManifest,
    TraceStore,
    TraceWriter,
    fixed_size_list,
    sequence_schema,
    token_schema,
)

Array = NDArray[Any]


def softmax_rule(top_k: int) -> dict[str, Any]:
    """The scoring rule of a softmax router without renormalisation, as manifests store it."""
    return {"score_function": "softmax", "top_k": top_k}


def write_trace(
    path: Path,
    ids_by_router: Mapping[str, Array],
    lengths: Sequence[int],
    *,
    num_experts: int | Mapping[str, int],
    groups: Sequence[str | None] | None = None,
    ids: Sequence[str | None] | None = None,
    texts: Sequence[int] | None = None,
    token_id: Array | None = None,
    probs: Mapping[str, Array] | None = None,
    weights: Mapping[str, Array] | None = None,
    logits: Mapping[str, Array] | None = None,
    kept: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
    predictions: Array | None = None,
    nll: Array | None = None,
    reference_group: str | None = None,
    row_group_tokens: int = 1 << 16,
    num_parts: int = 1,
    complete: bool = True,
) -> TraceStore:
    """Write a trace and open it.

    Args:
        path: The trace folder, made if it is not there.
        ids_by_router: [T, K] selected experts by router name, largest weight first; a row that
            starts with -1 is a dropped token. A name is the column suffix: `07`, `07.attention`,
            `encoder.07`.
        lengths: [S] tokens of each sequence; they sum to T.
        num_experts: E of all routers, or by router name.
        groups: [S] group of each sequence.
        ids: [S] id of each sequence; default their numbers.
        texts: [S] number of the text that each is a part of; default their numbers.
        token_id: [T]; default 0, 1, 2, ... within each sequence.
        probs: [T, E] router probabilities by router name. Without them the rule is unknown and
            the trace has no columns that need it.
        weights: [T, K] by router name; default the probabilities of the selected experts, else
            1 / K.
        logits: [T, E] by router name; all routers or none.
        kept: By family and router name: `inputs` [T, H], `norms` [T, K], or all of
            `OUTPUT_STATISTICS`; all routers or none.
        predictions: [T] predicted token ids.
        nll: [S] nats.
        reference_group: Name of one group.
        row_group_tokens: Tokens of a row group, that is of a batch: whole sequences, at least one.
        num_parts: Files of each table; sequences are dealt to them in order.
        complete: False leaves the manifest unfinished.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    num_tokens = int(lengths.sum())
    routers = tuple(
        traced_router(
            name,
            num_experts if isinstance(num_experts, int) else num_experts[name],
            np.shape(selected)[1],
            rule=softmax_rule(np.shape(selected)[1]) if name in (probs or {}) else None,
        )
        for name, selected in ids_by_router.items()
    )
    for router in routers:
        assert np.shape(ids_by_router[router.name]) == (num_tokens, router.top_k), router.name
    kept = dict(kept) | ({} if logits is None else {"logits": logits})
    keep = [name for name in ("logits", "inputs", "norms") if name in kept]
    keep += ["outputs"] if "peaks" in kept else []
    keep += [] if predictions is None else ["predictions"]
    inputs = kept.get("inputs")
    manifest = TraceManifest(
        model="synthetic",
        routers=routers,
        num_sequences=len(lengths),
        num_tokens=num_tokens,
        groups=tuple(sorted({g for g in groups or () if g is not None})),
        reference_group=reference_group,
        keep=tuple(keep),
        hidden_size=None if inputs is None else np.shape(next(iter(inputs.values())))[1],
        has_nll=nll is not None,
    )
    writer = TraceWriter(path, manifest)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    for part, chosen in enumerate(np.array_split(np.arange(len(lengths)), num_parts)):
        tables, sequence_parts = [], []
        for first, last in row_groups(lengths[chosen], row_group_tokens):
            some = chosen[first:last]
            rows = slice(ends[some[0]], ends[some[-1] + 1])
            cut = {
                name: {router: np.asarray(values)[rows] for router, values in by_router.items()}
                for name, by_router in (
                    ("experts", ids_by_router),
                    ("weights", weights or {}),
                    ("probs", probs or {}),
                )
            }
            cut_kept = {
                family: {router: np.asarray(values)[rows] for router, values in by_router.items()}
                for family, by_router in kept.items()
            }
            tables.append(
                token_table(
                    manifest,
                    lengths[some],
                    first_sequence=int(some[0]),
                    token_id=None if token_id is None else np.asarray(token_id)[rows],
                    predictions=None if predictions is None else np.asarray(predictions)[rows],
                    kept=cut_kept,
                    **cut,
                )
            )
            sequence_parts.append(
                sequence_table(
                    manifest,
                    lengths[some],
                    first_sequence=int(some[0]),
                    groups=None if groups is None else [groups[i] for i in some],
                    ids=None if ids is None else [ids[i] for i in some],
                    texts=None if texts is None else [texts[i] for i in some],
                    probs=cut["probs"],
                    nll=None if nll is None else np.asarray(nll)[some],
                )
            )
        writer.write_part(part, tables, pa.concat_tables(sequence_parts))
    if complete:
        writer.finish(num_parts=num_parts, coverage="synthetic")
    return TraceStore(path, partial=not complete)


def traced_router(
    name: str, num_experts: int, top_k: int, *, rule: dict[str, Any] | None = None
) -> TracedRouter:
    """The router that a column suffix names."""
    parts = name.split(".")
    kinds = [part for part in parts if not part.isdigit() and part not in ("encoder", "decoder")]
    return TracedRouter(
        name=name,
        layer=int(next(part for part in parts if part.isdigit())),
        kind=kinds[0] if kinds else "mlp",
        num_experts=num_experts,
        top_k=top_k,
        rule=rule,
    )


def row_groups(lengths: Array, row_group_tokens: int) -> list[tuple[int, int]]:
    """Runs `(first, last)` of whole sequences that hold at most so many tokens."""
    runs, first, count = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and count + length > row_group_tokens:
            runs.append((first, i))
            first, count = i, 0
        count += int(length)
    return [*runs, (first, len(lengths))]


def token_table(
    manifest: TraceManifest,
    lengths: Array,
    *,
    experts: Mapping[str, Array],
    weights: Mapping[str, Array],
    probs: Mapping[str, Array] = MappingProxyType({}),
    margins: Mapping[str, Array] = MappingProxyType({}),
    kept: Mapping[str, Mapping[str, Array]] = MappingProxyType({}),
    first_sequence: int = 0,
    token_id: Array | None = None,
    predictions: Array | None = None,
) -> pa.Table:
    """Token rows of consecutive whole sequences."""
    num_tokens = int(np.sum(lengths))
    position = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    columns: dict[str, Any] = {
        "sequence": np.repeat(np.arange(len(lengths), dtype=np.int32) + first_sequence, lengths),
        "position": position,
        "token_id": position if token_id is None else np.asarray(token_id, dtype=np.int32),
        "phase": pa.DictionaryArray.from_arrays(
            pa.array(np.zeros(num_tokens, dtype=np.int8)), pa.array(["prefill"])
        ),
    }
    if predictions is not None:
        columns["predictions"] = np.asarray(predictions, dtype=np.int32)
    for router in manifest.routers:
        name, selected = router.name, np.asarray(experts[router.name])
        dropped = selected[:, 0] < 0
        stored = np.where(selected < 0, 0, selected).astype(router.id_dtype)
        weight = weights.get(name)
        if weight is None and name in probs:
            weight = np.take_along_axis(probs[name], stored.astype(np.int64), axis=1)
        if weight is None:
            weight = np.full(stored.shape, 1 / router.top_k)
        mask = dropped if dropped.any() else None
        columns[f"experts.{name}"] = fixed_size_list(stored, mask=mask)
        columns[f"weights.{name}"] = fixed_size_list(weight.astype(np.float16), mask=mask)
        if name in margins:
            columns[f"margin.{name}"] = margins[name]
        elif name in probs:
            ordered = -np.sort(-probs[name], axis=1)
            below = min(router.top_k, router.num_experts - 1)
            columns[f"margin.{name}"] = (ordered[:, router.top_k - 1] - ordered[:, below]).astype(
                np.float16
            )
        for family, values in kept.items():
            dtype = np.float16 if family == "inputs" else np.float32
            columns[f"{family}.{name}"] = fixed_size_list(np.asarray(values[name], dtype=dtype))
    return pa.table(columns).select(token_schema(manifest).names)


def sequence_table(
    manifest: TraceManifest,
    lengths: Array,
    *,
    probs: Mapping[str, Array],
    first_sequence: int = 0,
    groups: Sequence[str | None] | None = None,
    ids: Sequence[str | None] | None = None,
    texts: Sequence[int] | None = None,
    nll: Array | None = None,
) -> pa.Table:
    """Sequence rows: per router the means over each sequence's tokens."""
    numbers = np.arange(len(lengths), dtype=np.int32) + first_sequence
    columns: dict[str, Any] = {
        "sequence": numbers,
        "text": numbers if texts is None else np.asarray(texts, dtype=np.int32),
        "id": pa.array([str(i) for i in numbers] if ids is None else ids, pa.string()),
        "group": pa.array([None] * len(lengths) if groups is None else groups, pa.string()),
        "num_tokens": np.asarray(lengths, dtype=np.int32),
    }
    if nll is not None:
        columns["nll"] = np.asarray(nll, dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    even = np.concatenate([np.arange(length) % 2 == 0 for length in lengths])
    for router in manifest.routers:
        if router.name not in probs:
            continue
        p = np.asarray(probs[router.name], dtype=np.float64)
        log_p = np.log(np.maximum(p, np.finfo(np.float32).tiny))
        sums = {
            "probs": p,
            "probs_even": p * even[:, None],
            "probs_odd": p * ~even[:, None],
            "logprob": log_p,
        }
        for family, values in sums.items():
            mean = np.add.reduceat(values, starts, axis=0) / np.asarray(lengths)[:, None]
            columns[f"{family}.{router.name}"] = fixed_size_list(mean.astype(np.float32))
        entropy = np.add.reduceat(-(p * log_p).sum(axis=1), starts) / np.asarray(lengths)
        columns[f"entropy.{router.name}"] = entropy.astype(np.float32)
    return pa.table(columns).select(sequence_schema(manifest).names)


def random_ids(
    rng: np.random.Generator, num_tokens: int, num_experts: int, top_k: int
) -> NDArray[np.int64]:
    """[T, K] distinct experts, uniformly at random."""
    return np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :top_k]


def random_probs(
    rng: np.random.Generator, num_tokens: int, num_experts: int, *, scale: float = 1.0
) -> NDArray[np.float64]:
    """[T, E] softmax of normal logits."""
    scores = np.exp(scale * rng.standard_normal((num_tokens, num_experts)))
    return scores / scores.sum(axis=1, keepdims=True)


def top_k_of(probs: Array, top_k: int) -> NDArray[np.int64]:
    """[T, K] experts of the largest probabilities, largest first."""
    return np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
