"""The maths of router steering: which experts belong to a task, and what promoting them does.

Nothing here reads a file or runs a model. T tokens, S sequences, E experts of a router, K selected
per token, R promoted or demoted experts, H channels.

Source: Bandarkar et al., "Multilingual Routing in Mixture-of-Experts", arXiv 2510.04694, eq. 3 to 5
(frequencies, soft and hard interventions). The flip strength, the split-half floor and the constant
form that can be written into weights are ours.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetools.errors import RequestError
from moetools.expert_counts import count_selections

Experts = Mapping[str, tuple[int, ...]]
"""Router name -> expert numbers."""

Offsets = Mapping[int, float]
"""Expert number -> what is added to its logit or selection score."""

NUM_SPLITS = 200
FLOOR_LEVEL = 0.95
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def selection_frequencies(
    ids: NDArray[Any], offsets: NDArray[np.int64], num_experts: int
) -> NDArray[np.float64]:
    """[S, E] share of each sequence's tokens that select each expert; a row sums to K.

    Args:
        ids: [T, K] selected experts; a number of E or more is a dropped selection.
        offsets: [S + 1] where each sequence starts.
        num_experts: E.

    Raises:
        ValueError: A sequence has no tokens.
    """
    lengths = np.diff(offsets)
    if (lengths < 1).any():
        raise ValueError("a sequence without tokens has no frequencies")
    counts = np.zeros((len(lengths), num_experts), dtype=np.int64)
    count_selections(ids, offsets, np.arange(len(lengths)), counts)
    return counts / lengths[:, None]


def expert_delta(target: NDArray[np.float64], generic: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E] mean frequency in the target minus that in the generic sequences; sums to 0.

    Each sequence counts alike, whatever its length.

    Args:
        target: [S, E] `selection_frequencies`.
        generic: [S', E].
    """
    delta: NDArray[np.float64] = target.mean(axis=0) - generic.mean(axis=0)
    return delta


def split_half_floor(
    target: NDArray[np.float64],
    generic: NDArray[np.float64],
    *,
    seed: int,
    target_texts: NDArray[Any] | None = None,
    generic_texts: NDArray[Any] | None = None,
    num_splits: int = NUM_SPLITS,
    level: float = FLOOR_LEVEL,
) -> float:
    """How large the largest |delta| of a router gets by the choice of texts alone.

    The texts of each corpus are divided at random into two halves, many times. Half the difference
    between the means of the two halves varies as much as the mean of the whole corpus does; added
    up for both corpora it is a delta that has the noise of the real one and no signal. The floor
    is the quantile `level`, over the divisions, of its largest absolute value over the experts.

    Args:
        target: [S, E] `selection_frequencies`.
        generic: [S', E].
        seed: Of the divisions.
        target_texts: [S] text of each sequence, which stays in one half; None where each sequence
            is a text.
        generic_texts: [S'] the same.
        num_splits: Divisions.
        level: Share of the divisions that stay below the floor.

    Raises:
        RequestError: A corpus has fewer than two texts.
    """
    generator = np.random.default_rng(seed)
    noise = _half_differences(target, target_texts, "target", generator, num_splits)
    noise += _half_differences(generic, generic_texts, "generic", generator, num_splits)
    return float(np.quantile(np.abs(noise).max(axis=1), level))


def _half_differences(
    frequencies: NDArray[np.float64],
    texts: NDArray[Any] | None,
    corpus: str,
    generator: np.random.Generator,
    num_splits: int,
) -> NDArray[np.float64]:
    """[splits, E] half the difference between the means of two random halves."""
    labels = np.arange(len(frequencies)) if texts is None else texts
    number = np.unique(labels, return_inverse=True)[1].reshape(-1)
    num_texts = int(number.max(initial=-1)) + 1
    if num_texts < 2:
        raise RequestError(
            f"The {corpus} data has {num_texts} text, which cannot be divided to see how much "
            "varies by chance. Give it more texts."
        )
    ranks = generator.permuted(np.tile(np.arange(num_texts), (num_splits, 1)), axis=1)
    first = (ranks < (num_texts + 1) // 2)[:, number].astype(np.float64)
    second = 1 - first
    means = [(half @ frequencies) / half.sum(axis=1, keepdims=True) for half in (first, second)]
    difference: NDArray[np.float64] = (means[0] - means[1]) / 2
    return difference


def pick_experts(
    delta: Mapping[str, NDArray[np.float64]],
    *,
    tau: float | Literal["auto"],
    floor: Mapping[str, float],
    top_k: Mapping[str, int],
) -> dict[str, tuple[int, ...]]:
    """The experts of each router that the target selects more often, largest delta first.

    Those to demote are picked from the negated delta.

    Args:
        delta: Router name -> [E] `expert_delta`.
        tau: All experts with a delta above it; `auto` takes at most K per router, those with the
            largest delta above the floor.
        floor: Router name -> `split_half_floor`; read by `auto` alone.
        top_k: Router name -> K; read by `auto` alone.

    Returns:
        Routers with at least one expert.

    Raises:
        RequestError: `tau` is not above 0, selects nothing, or selects all experts of a router; or
            delta is 0 everywhere.
    """
    if tau != "auto" and not tau > 0:
        raise RequestError(f"--tau {tau}: expected a number above 0, or auto.")
    if not any(each.any() for each in delta.values()):
        raise RequestError(
            "Target and generic data select every expert equally often: they are the same texts, "
            "or route alike. Choose other data."
        )
    picked = {}
    for name, of_router in delta.items():
        above = of_router > (floor[name] if tau == "auto" else tau)
        order = np.argsort(-of_router, kind="stable")
        chosen = [int(expert) for expert in order if above[expert]]
        if tau == "auto":
            chosen = chosen[: top_k[name]]
        if len(chosen) == len(of_router):
            raise RequestError(
                f"--tau {tau} selects all {len(of_router)} experts of router {name}: promoting all "
                "changes nothing. Choose a larger one."
            )
        if chosen:
            picked[name] = tuple(chosen)
    if not picked:
        largest = max(float(each.max()) for each in delta.values())
        above_what = "the split-half floor of its router" if tau == "auto" else f"--tau {tau}"
        raise RequestError(
            f"No expert has a delta above {above_what}; the largest is {largest:.4f}. Choose other "
            "layers or data, or a smaller --tau."
        )
    return picked


def spread(logits: Tensor) -> Tensor:
    """[T, 1] standard deviation over the E logits of each token, divided by E (ddof 0)."""
    return logits.std(dim=-1, correction=0, keepdim=True)


def soft(logits: Tensor, promote: Sequence[int], demote: Sequence[int], strength: float) -> Tensor:
    """Logits [T, E] with `strength` spreads added for promoted experts, taken off for demoted.

    Args:
        logits: [T, E].
        promote: Expert numbers.
        demote: Expert numbers, none of them promoted.
        strength: In standard deviations of a token's logits.

    Source:
        arXiv 2510.04694, eq. 4.
    """
    step = strength * spread(logits)
    changed = logits.clone()
    changed[..., list(promote)] += step
    changed[..., list(demote)] -= step
    return changed


def hard(
    logits: Tensor,
    promote: Sequence[int],
    demote: Sequence[int],
    noise: Tensor | None = None,
) -> Tensor:
    """Logits [T, E] with promoted experts at the largest, demoted at the smallest logit.

    Args:
        logits: [T, E].
        promote: Expert numbers.
        demote: Expert numbers, none of them promoted.
        noise: [E, E] what is added to the largest, or taken off the smallest logit: row i for
            tokens whose best expert is i, column e for expert e; None for none.

    Source:
        arXiv 2510.04694, eq. 5, where the noise is drawn anew for every token; see `hard_noise`.
    """
    best = logits.max(dim=-1, keepdim=True)
    changed = logits.clone()
    of_token = torch.zeros_like(logits) if noise is None else noise[best.indices[..., 0]]
    up, down = list(promote), list(demote)
    changed[..., up] = best.values + of_token[..., up]
    changed[..., down] = logits.amin(dim=-1, keepdim=True) - of_token[..., down]
    return changed


def hard_noise(num_experts: int, *, scale: float, seed: Sequence[int]) -> Tensor:
    """[E, E] float32, normal: what breaks the ties of `hard`.

    Source:
        arXiv 2510.04694 draws N(0, 1e-6) for every token. Here a draw belongs to a pair of the
        token's own best expert and the promoted one, so that a token's selection depends neither on
        its batch nor on the order of the texts. 1e-6 is taken as the standard deviation. Where
        |z| exceeds 16 it rounds away in float32.
    """
    drawn = np.random.default_rng(list(seed)).normal(0, scale, (num_experts, num_experts))
    return torch.from_numpy(drawn).float()


def constant(scores: Tensor, offsets: Offsets) -> Tensor:
    """Logits or selection scores [T, E] with the same amount added for every token."""
    changed = scores.clone()
    for expert, offset in offsets.items():
        changed[..., expert] += offset
    return changed


def flip_strength(logits: Tensor, targets: Sequence[int], top_k: int) -> Tensor:
    """[T, R] the strength of `soft` above which each target is among the K best.

    0 where it is already; infinite where no strength brings it in. All targets rise together: with
    r targets ranked above target k, it enters when it passes the (K - r)-th largest logit of the
    others. A tie does not count as entered: a target that ties for the last place has the smallest
    positive number. Of targets that tie, the one that is named first ranks above.

    Args:
        logits: [T, E] that the router selects by (or any increasing function is taken of, the
            same for all experts).
        targets: Promoted experts.
        top_k: K.
    """
    num_experts = logits.shape[-1]
    wanted = logits[:, list(targets)]
    keep = torch.ones(num_experts, dtype=torch.bool, device=logits.device)
    keep[list(targets)] = False
    others = logits[:, keep].sort(dim=-1, descending=True).values
    order = wanted.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(len(targets), device=logits.device).expand_as(order)
    )
    place = top_k - rank  # 1 is the largest of the others
    within = (place >= 1) & (place <= others.shape[-1])
    if others.shape[-1]:
        rival = others.gather(-1, (place - 1).clamp(0, others.shape[-1] - 1))
    else:
        rival = torch.full_like(wanted, -math.inf)
    gap = rival - wanted
    strength = gap / spread(logits)
    strength = strength.clamp_min(torch.finfo(logits.dtype).tiny)
    strength = torch.where(spread(logits) > 0, strength, math.inf)
    strength = torch.where(gap < 0, 0.0, strength)
    strength = torch.where(within, strength, 0.0)
    return torch.where(place < 1, math.inf, strength)


def predicted_flip_rate(flip_strengths: Tensor, strength: float) -> Tensor:
    """[R] share of the tokens that each target enters by `soft` with this strength.

    Exact for one steered layer; what earlier steered layers change is not in it.

    Args:
        flip_strengths: [T, R] `flip_strength`.
        strength: At least 0.
    """
    return ((flip_strengths > 0) & (flip_strengths < strength)).double().mean(dim=0)


def entered(before: Tensor, after: Tensor, experts: Sequence[int]) -> Tensor:
    """[T, R] whether each expert is selected after, and was not before.

    With `before` and `after` exchanged, whether it has left.

    Args:
        before: [T, K] selections.
        after: [T, K'] selections of the same tokens.
        experts: R numbers.
    """
    numbers = torch.tensor(list(experts), device=before.device)
    was = (before.unsqueeze(-1) == numbers).any(dim=1)
    now = (after.unsqueeze(-1) == numbers).any(dim=1)
    return now & ~was


def set_agreement(one: Tensor, other: Tensor) -> Tensor:
    """[T] whether two selections [T, K] are the same set."""
    return (one.sort(dim=-1).values == other.sort(dim=-1).values).all(dim=-1)


def fold_direction(inputs: Tensor, ridge: float) -> Tensor:
    """[H] float64: the direction u whose product with router inputs is closest to 1.

    Minimises mean (u . x - 1)^2 + ridge * d * |u|^2 with d the mean square of a channel.

    Args:
        inputs: [T, H].
        ridge: Relative to d; above 0, so that the solution is unique.

    Raises:
        ValueError: The inputs are all zero, or the ridge is not above 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge {ridge}: expected a number above 0")
    return _solved(*_normal_equations(inputs), ridge)


def _normal_equations(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """[H, H] mean of x x^T and [H] mean of x, over inputs [T, H]."""
    x = inputs.double()
    return x.T @ x / len(x), x.mean(dim=0)


def _solved(gram: Tensor, mean: Tensor, ridge: float) -> Tensor:
    scale = gram.diagonal().mean()
    if not scale > 0:
        raise ValueError("router inputs are all zero")
    direction: Tensor = torch.linalg.solve(
        gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype), mean
    )
    return direction


def pick_ridge(inputs: Tensor, *, seed: int, ridges: Sequence[float] = RIDGES) -> float:
    """The ridge whose direction has the least mean (u . x - 1)^2 on a fifth of the tokens left out.

    Args:
        inputs: [T, H], T at least 5.
        seed: Of the division.
        ridges: To choose from.
    """
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    held, used = inputs[order[: len(order) // 5]].double(), inputs[order[len(order) // 5 :]]
    normal = _normal_equations(used)
    errors = [float((held @ _solved(*normal, each) - 1).square().mean()) for each in ridges]
    return ridges[int(np.argmin(errors))]


def folded_weight(weight: Tensor, direction: Tensor, offsets: Offsets) -> Tensor:
    """Router weight [E, H] whose logits have about the offsets added: W + sum offset_e e u^T.

    Computed in float64 and rounded once, to the weight's dtype.
    """
    changed = weight.to(torch.float64, copy=True)
    for expert, offset in offsets.items():
        changed[expert] += offset * direction.double()
    return changed.to(weight.dtype)


def fold_into_bias(bias: Tensor, offsets: Offsets) -> Tensor:
    """A bias of E elements, of any shape, with the offsets added; rounded once, to its dtype."""
    changed = bias.to(torch.float64, copy=True).reshape(-1)
    for expert, offset in offsets.items():
        changed[expert] += offset
    return changed.reshape(bias.shape).to(bias.dtype)
