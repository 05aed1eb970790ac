"""How two routings of the same tokens differ.

A is the reference, B what it is compared with. Shapes: T tokens, E routed experts, K selected per
token, S sequences. An expert number at or above E marks a dropped token: it selected nothing.
Tokens that both dropped are not compared.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.compiling import compiled
from moetools.information import entropy

Array = NDArray[Any]

SUMS = ("tokens", "overlap", "jaccard", "exact", "top1", "weighted_tokens", "weighted")
"""What `compare_selections` adds up over tokens."""

MARGIN_SUMS = ("tokens", "overlap", "exact")
MARGIN_SHIFT = 6
NUM_MARGINS = 0x7C00 >> MARGIN_SHIFT
"""Bins of a margin: float16 with four bits after the leading one, 6 % wide, up to infinity."""

NUM_DECILES = 10


@compiled
def compare_selections(
    ids_a: Array,
    ids_b: Array,
    weights_a: NDArray[np.float32],
    weights_b: NDArray[np.float32],
    num_experts: int,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> None:
    """Compare the selections of every token, and add up by sequence.

    A token adds 1 to `tokens`; the share of A's experts that B selects too to `overlap`; common
    over all experts to `jaccard`; 1 to `exact` where both sets are equal, and to `top1` where the
    first expert is. Where both have positive weights, it adds 1 to `weighted_tokens` and to
    `weighted` the sum over experts of the smaller weight, weights of a token summing to 1. An
    expert that a token selects twice counts once.

    Args:
        ids_a: [T, K] experts of A, largest weight first.
        ids_b: [T, K'] experts of B.
        weights_a: [T, K] weights of A.
        weights_b: [T, K'] weights of B.
        num_experts: E.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the row of `sums` that each sequence adds to.
        sums: [rows, 7] in the order of `SUMS`, changed in place.
    """
    for s in range(len(rows)):
        row = sums[rows[s]]
        for t in range(offsets[s], offsets[s + 1]):
            num_a, num_b, total_a, total_b = 0, 0, 0.0, 0.0
            for j in range(ids_b.shape[1]):
                expert = ids_b[t, j]
                if expert < num_experts:
                    total_b += weights_b[t, j]
                    num_b += 1
                    for i in range(j):
                        if ids_b[t, i] == expert:
                            num_b -= 1
                            break
            for i in range(ids_a.shape[1]):
                if ids_a[t, i] < num_experts:
                    total_a += weights_a[t, i]
            common, smaller = 0, 0.0
            for i in range(ids_a.shape[1]):
                expert, is_first, weight_a = ids_a[t, i], True, 0.0
                for j in range(ids_a.shape[1]):
                    if ids_a[t, j] == expert:
                        is_first &= j >= i
                        weight_a += weights_a[t, j]
                if expert >= num_experts or not is_first:
                    continue
                num_a += 1
                is_common, weight_b = False, 0.0
                for j in range(ids_b.shape[1]):
                    if ids_b[t, j] == expert:
                        is_common = True
                        weight_b += weights_b[t, j]
                common += is_common
                if is_common and total_a > 0 and total_b > 0:
                    smaller += min(weight_a / total_a, weight_b / total_b)
            if num_a == 0 and num_b == 0:
                continue
            row[0] += 1
            row[1] += common / max(num_a, 1)
            row[2] += common / (num_a + num_b - common)
            row[3] += num_a == num_b and common == num_a
            row[4] += num_a > 0 and ids_a[t, 0] == ids_b[t, 0]
            if total_a > 0 and total_b > 0:
                row[5] += 1
                row[6] += smaller


@compiled
def compare_by_margin(
    ids_a: Array,
    ids_b: Array,
    margin_bins: NDArray[np.int64],
    num_experts: int,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums: NDArray[np.uint32],
) -> None:
    """Add up tokens, common experts and equal sets, by sequence and margin.

    Args:
        ids_a: [T, K] experts of A; tokens that A dropped are left out.
        ids_b: [T, K'] experts of B.
        margin_bins: [T] bin of A's margin; negative is left out.
        num_experts: E.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the row of `sums` that each sequence adds to.
        sums: [rows, bins, 3] in the order of `MARGIN_SUMS`, changed in place; here `overlap`
            counts experts.
    """
    for s in range(len(rows)):
        row = sums[rows[s]]
        for t in range(offsets[s], offsets[s + 1]):
            if margin_bins[t] < 0 or ids_a[t, 0] >= num_experts:
                continue
            common = 0
            for i in range(ids_a.shape[1]):
                for j in range(ids_b.shape[1]):
                    common += ids_a[t, i] == ids_b[t, j]
            cell = row[margin_bins[t]]
            cell[0] += 1
            cell[1] += common
            cell[2] += common == ids_a.shape[1] and common == ids_b.shape[1]


def margin_bins(margin: NDArray[np.float16]) -> NDArray[np.int64]:
    """[T] bin of each margin, rising with it; -1 for NaN and for negative ones."""
    bits = margin.astype(np.float16).view(np.uint16).astype(np.int64)
    bins = np.minimum(bits >> MARGIN_SHIFT, NUM_MARGINS - 1)
    return np.where(margin >= 0, np.where(margin == 0, 0, bins), -1)


def decile_shares(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Which share of each bin belongs to which tenth of what was counted.

    Args:
        counts: [N] tokens by bin, in the order of the bins.

    Returns:
        [10, N]; columns of bins that hold tokens sum to 1. Tokens of one bin count as equal: a
        bin across a border is divided in proportion.
    """
    ends = np.cumsum(counts, dtype=np.float64)
    borders = np.linspace(0, ends[-1], NUM_DECILES + 1)
    upper = np.minimum(ends, borders[1:, None])
    lower = np.maximum(ends - counts, borders[:-1, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.clip(upper - lower, 0, None) / counts
    return np.where(counts > 0, shares, 0.0)


def selection_metrics(
    sums: NDArray[np.float64], load_a: NDArray[np.float64], load_b: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Metrics of added-up comparisons; NaN where nothing was compared.

    Args:
        sums: [..., 7] made by `compare_selections`.
        load_a: [..., E] how often each expert was selected by A.
        load_b: [..., E] the same of B.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        per_token = sums[..., 1:5] / sums[..., :1]
        weighted = sums[..., 6] / sums[..., 5]
    return {
        "overlap_at_k": per_token[..., 0],
        "overlap_chance": chance_overlap(sums[..., 0], load_a, load_b),
        "jaccard": per_token[..., 1],
        "exact_set": per_token[..., 2],
        "top1_agreement": per_token[..., 3],
        "weighted_overlap": weighted,
        **load_shift(load_a, load_b),
    }


def chance_overlap(
    num_tokens: NDArray[np.float64], load_a: NDArray[np.float64], load_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Overlap of two routings with these loads that know nothing of each other, [...].

    The sum over experts of the product of the shares of tokens that select them, over the mean
    number of experts that A selects.

    Args:
        num_tokens: [...] tokens compared.
        load_a: [..., E] how often each expert was selected by A.
        load_b: [..., E] the same of B.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = (load_a * load_b).sum(axis=-1) / num_tokens / load_a.sum(axis=-1)
    return np.asarray(np.where(np.isfinite(chance), chance, np.nan))


def load_shift(
    load_a: NDArray[np.float64], load_b: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Distances between two loads [..., E], as shares of the selections."""
    with np.errstate(divide="ignore", invalid="ignore"):
        share_a = load_a / load_a.sum(axis=-1, keepdims=True)
        share_b = load_b / load_b.sum(axis=-1, keepdims=True)
    distance = np.abs(share_a - share_b).sum(axis=-1)
    entropy_a, entropy_b = entropy(share_a), entropy(share_b)
    divergence = entropy((share_a + share_b) / 2) - (entropy_a + entropy_b) / 2
    return {
        "load_js": np.clip(divergence / np.log(2), 0.0, 1.0),
        "load_l1": distance,
        "load_tv": distance / 2,
        "load_entropy_change": entropy_b - entropy_a,
    }


def router_change(weight_a: NDArray[Any], weight_b: NDArray[Any]) -> dict[str, float]:
    """How far a router's rows moved; NaN where a norm is zero.

    Softmax routers select the same with any vector added to all rows, which is what centred rows
    leave out; for sigmoid routers only the raw rows mean anything.

    Args:
        weight_a: [E, H] of A.
        weight_b: [E, H] of B, expert by expert.
    """
    raw = cosines(weight_a, weight_b)
    centred = cosines(weight_a - weight_a.mean(axis=0), weight_b - weight_b.mean(axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.linalg.norm(weight_b - weight_a) / np.linalg.norm(weight_a)
    return {
        "router_change": float(change) if np.isfinite(change) else np.nan,
        "row_cosine": float(raw.mean()),
        "row_cosine_min": float(raw.min()),
        "row_cosine_centred": float(centred.mean()),
        "row_cosine_centred_min": float(centred.min()),
    }


def row_changes(rows_a: NDArray[Any], rows_b: NDArray[Any]) -> NDArray[np.float64]:
    """[E] norm of each row's change over the row's norm in A; NaN where that is zero."""
    norms = np.linalg.norm(rows_a, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.linalg.norm(rows_b - rows_a, axis=1) / norms
    return np.asarray(np.where(norms > 0, change, np.nan))


def cosines(rows_a: NDArray[Any], rows_b: NDArray[Any]) -> NDArray[np.float64]:
    """[E] cosine of each row of A with the same row of B; 1 for equal rows, NaN for zero rows."""
    norms = np.linalg.norm(rows_a, axis=1) * np.linalg.norm(rows_b, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = (rows_a * rows_b).sum(axis=1) / norms
    cosine = np.where((rows_a == rows_b).all(axis=1) & (norms > 0), 1.0, np.clip(cosine, -1, 1))
    return np.asarray(cosine)


def match_experts(weight_a: NDArray[Any], weight_b: NDArray[Any]) -> NDArray[np.int64]:
    """[E] for each expert of A the one of B whose router row is like its own.

    The assignment with the largest sum of cosines between centred rows.

    Args:
        weight_a: [E, H] router of A.
        weight_b: [E, H] router of B.
    """
    from scipy.optimize import linear_sum_assignment

    units = []
    for weight in (weight_a, weight_b):
        centred = weight - weight.mean(axis=0)
        norms = np.linalg.norm(centred, axis=1, keepdims=True)
        units.append(centred / np.where(norms > 0, norms, 1))
    _, order = linear_sum_assignment(units[0] @ units[1].T, maximize=True)
    return np.asarray(order, dtype=np.int64)


def energy_in_span(
    change: NDArray[Any], gram: NDArray[np.float64], *, share: float = 0.99
) -> tuple[float, float]:
    """How much of a change of router rows acts on the inputs that were seen.

    Args:
        change: [E, H] difference of two routers.
        gram: [H, H] sum of the outer products of unit-length inputs.
        share: Part of the inputs' energy that their span must hold.

    Returns:
        Share of the squared norm of the change inside the span of the strongest directions, and
        the share of all directions that are in it, what a change without direction would give.
        The first is NaN without a change.
    """
    values, vectors = np.linalg.eigh(gram)
    values, vectors = np.clip(values[::-1], 0, None), vectors[:, ::-1]
    held = np.cumsum(values)
    size = min(int(np.searchsorted(held, share * held[-1])) + 1, len(values))
    total = float((change**2).sum())
    inside = float(((change @ vectors[:, :size]) ** 2).sum())
    return inside / total if total > 0 else np.nan, size / len(values)
