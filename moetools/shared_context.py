"""Log-likelihood of choices whose context goes through the model once.

Whole rows repeat the context for each of its choices. Here the contexts of a batch of items go
through the model first; the first token of every choice is scored on their last logits, and the
rest of the choices continue from the keys and values that the context left behind. Contexts are
padded on the left, so that distances between tokens are the true ones.

This holds for models whose only memory is attention; `moetools.scoring` checks it on some items.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moetools.batching import plan_parts

if TYPE_CHECKING:
    from moetools.scoring import ScoredRow

LOGITS_PER_BATCH = 1 << 27
CONTINUED_TOKENS = 4
"""Tokens that are kept for the continuations at once, in units of the tokens of a batch."""


Watch = Callable[[Sequence[int], Tensor], AbstractContextManager[None]]
"""Called with numbers [B] of rows and the mask [B, L] of the tokens that count, around a pass."""


def unwatched(numbers: Sequence[int], mask: Tensor) -> AbstractContextManager[None]:
    """Watch nothing."""
    return nullcontext()


def without_extras(model: Any) -> dict[str, Any]:
    """Arguments that keep a model from adding up a loss of its routers."""
    known = inspect.signature(model.forward).parameters
    return {"output_router_logits": False} if "output_router_logits" in known else {}


class NotShareableError(Exception):
    """The model cannot continue several choices from one context; the message says why."""


def plan_contexts(
    model: Any,
    groups: "Sequence[Sequence[ScoredRow]]",
    *,
    batch_tokens: int,
    vocab_size: int | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Numbers of the items of each batch, contexts of similar length together.

    Args:
        model: A causal language model.
        groups: Rows of each item.
        batch_tokens: Tokens of the contexts of a batch at most, padding included.
        vocab_size: Of logits that count as kept for every token; None asks the model.
    """
    lengths = [group[0].start for group in groups]
    most = batch_tokens
    if vocab_size is None and "logits_to_keep" not in inspect.signature(model.forward).parameters:
        vocab_size = model.config.get_text_config().vocab_size
    if vocab_size is not None:
        most = max(1, min(most, LOGITS_PER_BATCH // vocab_size))
    parts = plan_parts(lengths, batch_tokens=most, part_tokens=sum(lengths))
    return tuple(batch for part in parts for batch in part.batches)


def score_shared(
    model: Any,
    groups: "Sequence[Sequence[ScoredRow]]",
    *,
    batch_tokens: int,
    vocab_size: int | None = None,
    watch: Watch = unwatched,
) -> NDArray[np.float64]:
    """Log-likelihood of each row of a batch of items, item by item, in nats.

    Args:
        model: A causal language model in evaluation mode.
        groups: Rows of each item, the same up to their `start`.
        batch_tokens: Tokens of a batch, of which those of the continuations are a multiple.
        vocab_size: As in `plan_contexts`.
        watch: Put around every forward pass; rows are numbered item by item, and a context counts
            for the first row of its item.

    Raises:
        NotShareableError: The model has state that cannot be shared.
    """
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        firsts = np.cumsum([0, *(len(group) for group in groups[:-1])]).tolist()
        last, cache, mask = _run_contexts(
            model, [group[0] for group in groups], device, partial(watch, firsts)
        )
        rows = [row for group in groups for row in group]
        of_item = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
        first = torch.tensor([int(row.token_ids[row.start]) for row in rows], device=last.device)
        item = torch.from_numpy(of_item).to(last.device)
        values = last[item].gather(-1, first[:, None])[:, 0].double().cpu().numpy()
        longer = [number for number, row in enumerate(rows) if row.num_scored > 1]
        _check_cache(cache)
        vocab_size = vocab_size or model.config.get_text_config().vocab_size
        pieces = _pieces([rows[n] for n in longer], mask.shape[1], batch_tokens, vocab_size)
        for number, piece in enumerate(pieces):
            numbers = [longer[place] for place in piece]
            here = cache if number == len(pieces) - 1 else deepcopy(cache)
            chosen = torch.from_numpy(of_item[numbers]).to(device)
            here.batch_select_indices(chosen)
            values[numbers] += _continue(
                model, [rows[n] for n in numbers], here, mask[chosen], partial(watch, numbers)
            )
    return values


def _run_contexts(
    model: Any,
    rows: "Sequence[ScoredRow]",
    device: torch.device,
    watch: Callable[[Tensor], AbstractContextManager[None]],
) -> tuple[Tensor, Any, Tensor]:
    """Log-probabilities [B, V] after each context, what it left behind, and the mask [B, L]."""
    lengths = torch.tensor([row.start for row in rows])
    mask = torch.arange(int(lengths.max())) >= lengths.max() - lengths[:, None]
    input_ids = torch.zeros(mask.shape, dtype=torch.long)
    ids = np.concatenate([row.token_ids[: row.start] for row in rows])
    input_ids[mask] = torch.from_numpy(ids.astype(np.int64))
    arguments: dict[str, Any] = {"input_ids": input_ids.to(device), "use_cache": True}
    known = inspect.signature(model.forward).parameters
    if not mask.all():
        if "position_ids" not in known:
            raise NotShareableError("the model takes no positions")
        arguments["attention_mask"] = mask.long().to(device)
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
    if "logits_to_keep" in known:
        arguments["logits_to_keep"] = 1
    with watch(mask):
        output = model(**arguments, **without_extras(model))
    last = output.logits[:, -1].float().log_softmax(dim=-1)
    return last, getattr(output, "past_key_values", None), mask.to(device)


def _check_cache(cache: Any) -> None:
    """Refuse state that does not belong to single tokens, such as that of a recurrent layer."""
    if type(cache) is not DynamicCache:
        raise NotShareableError(f"the model keeps its state as {type(cache).__name__}")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise NotShareableError(f"the model keeps state as {type(layer).__name__}")


def _pieces(
    rows: "Sequence[ScoredRow]", context: int, batch_tokens: int, vocab_size: int
) -> list[list[int]]:
    """Rows that continue at once, by number: few enough to keep their contexts and logits."""
    if not rows:
        return []
    length = max(row.num_scored for row in rows) - 1
    by_memory = CONTINUED_TOKENS * batch_tokens // (context + length)
    by_logits = LOGITS_PER_BATCH // (length * vocab_size)
    size = max(1, min(by_memory, by_logits))
    return [list(range(start, min(start + size, len(rows)))) for start in range(0, len(rows), size)]


def _continue(
    model: Any,
    rows: "Sequence[ScoredRow]",
    cache: Any,
    context: Tensor,
    watch: Callable[[Tensor], AbstractContextManager[None]],
) -> NDArray[np.float64]:
    """Log-likelihood of all scored tokens but the first of each row.

    Args:
        model: As everywhere.
        rows: With two scored tokens or more.
        cache: Of their contexts.
        context: [rows, L] mask of the tokens of the contexts.
        watch: Put around the forward pass, with the mask of the continuations.
    """
    device = context.device
    lengths = torch.tensor([row.num_scored - 1 for row in rows])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids, targets = torch.zeros((2, *mask.shape), dtype=torch.long)
    ids = [row.token_ids[row.start :].astype(np.int64) for row in rows]
    input_ids[mask] = torch.from_numpy(np.concatenate([each[:-1] for each in ids]))
    targets[mask] = torch.from_numpy(np.concatenate([each[1:] for each in ids]))
    positions = context.sum(dim=1)[:, None] + torch.arange(mask.shape[1], device=device)
    arguments: dict[str, Any] = {"position_ids": positions, "past_key_values": cache}
    if not (context.all() and mask.all()):
        arguments["attention_mask"] = torch.cat([context, mask.to(device)], dim=1).long()
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise NotShareableError("the model takes no positions")
    arguments |= without_extras(model)
    with watch(mask):
        logits = model(input_ids=input_ids.to(device), use_cache=True, **arguments).logits
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(-1, targets[..., None].to(logprobs.device))[..., 0]
    sums: NDArray[np.float64] = (chosen.double().cpu() * mask).sum(dim=1).numpy()
    return sums
