"""How much each expert contributes, by several scores, and super experts.

T tokens, S sequences, K selected per token, E routed experts, R bootstrap replicates.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.compiling import compiled

Array = NDArray[Any]

FIELDS = ("count", "weight", "with_norm", "norm", "weighted_norm", "with_share", "share")
"""What is summed over the tokens that select an expert."""

MIN_EXPERTS = 200
"""Below so many experts in all a 99.5 % percentile says nothing."""
PERCENTILE = 99.5
FRACTION = 10
EARLY = 0.75
"""Share of the layers, from the first, that may form massive activations."""


@compiled
def add_scores(
    ids: Array,
    weights: NDArray[np.float32],
    norms: NDArray[np.float32],
    peaks: NDArray[np.float32],
    shares: NDArray[np.float32],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums: NDArray[np.float64],
    maxima: NDArray[np.float64],
) -> None:
    """Add what selected experts contributed to one row for each sequence.

    An id at or above E is no expert; NaN is not counted.

    Args:
        ids: [T, K] selected experts.
        weights: [T, K] what their outputs are multiplied with.
        norms: [T, K] length of each output before weighting; [0, K] if not recorded.
        peaks: [T, K] its largest channel in absolute value; [0, K] if not recorded.
        shares: [T, K] its share of the layer's output; [0, K] if not recorded.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the row of `sums` and `maxima` that each sequence adds to.
        sums: [rows, 2, E, fields], changed in place; by first token or not, fields as `FIELDS`.
        maxima: [rows, 2, E], changed in place: the largest peak.
    """
    num_experts = sums.shape[2]
    for s in range(len(rows)):
        for t in range(offsets[s], offsets[s + 1]):
            later = 0 if t == offsets[s] else 1
            into, largest = sums[rows[s], later], maxima[rows[s], later]
            for i in range(ids.shape[1]):
                e = ids[t, i]
                if e >= num_experts:
                    continue
                into[e, 0] += 1
                into[e, 1] += weights[t, i]
                if len(norms) and not np.isnan(norms[t, i]):
                    into[e, 2] += 1
                    into[e, 3] += norms[t, i]
                    into[e, 4] += np.float64(weights[t, i]) * norms[t, i]
                if len(shares) and not np.isnan(shares[t, i]):
                    into[e, 5] += 1
                    into[e, 6] += shares[t, i]
                if len(peaks) and peaks[t, i] > largest[e]:
                    largest[e] = peaks[t, i]


def scores(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """[..., E] scores of sums [..., E, fields]; 0 for an expert without data.

    Source:
        REAP, arXiv 2510.13999, and its code for the EAN scores.
    """
    count, weight, with_norm, norm, weighted, with_share, share = np.moveaxis(sums, -1, 0)
    return {
        "selections": count,
        "gate_mass": weight,
        "gate_mean": mean(weight, count),
        "ean_sum": norm,
        "ean_mean": mean(norm, with_norm),
        "weighted_ean_sum": weighted,
        "reap": mean(weighted, with_norm),
        "output_share": mean(share, with_share),
    }


def mean(total: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient; 0 where nothing was counted."""
    found = np.zeros(np.broadcast_shapes(total.shape, count.shape))
    np.divide(total, count, out=found, where=count > 0)
    return found


def drawn_maxima(maxima: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """[1 + R, E] largest of all cells [cells, E], then of the cells in every draw [R, cells]."""
    drawn = [maxima[weight > 0].max(axis=0, initial=0) for weight in weights]
    return np.stack([maxima.max(axis=0, initial=0), *drawn])


def rank_correlation(
    ranks: NDArray[np.float64], others: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[...] Spearman's correlation from unit ranks [..., E]; NaN where all experts are tied."""
    flat = ~(ranks.any(axis=-1) & others.any(axis=-1))
    return np.where(flat, np.nan, (ranks * others).sum(axis=-1))


def num_covering(counts: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """[...] fewest experts that hold a share of the counts [..., E]; NaN without counts."""
    ordered = -np.sort(-counts, axis=-1)
    total = ordered.sum(axis=-1, keepdims=True)
    below = np.cumsum(ordered, axis=-1) < share * total * (1 - 1e-12)
    return np.where(total[..., 0] > 0, below.sum(axis=-1) + 1.0, np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class SuperExperts:
    """Experts whose output is far larger than that of all others.

    Attributes:
        percentile: The 99.5 % percentile of the largest outputs in the early layers.
        tenth: A tenth of the largest of them.
        experts: (layer, expert, largest output), largest first: those above both. The rule names
            at least the largest one.
        gap: The least of them over the largest of the others; NaN without others.
    """

    percentile: float
    tenth: float
    experts: tuple[tuple[int, int, float], ...]
    gap: float


def super_experts(
    maxima: Mapping[int, NDArray[np.float64]], num_layers: int
) -> SuperExperts | None:
    """Find super experts among the early layers.

    Args:
        maxima: By layer: [E] largest output of each expert, 0 without data.
        num_layers: Decoder blocks of the model.

    Returns:
        None with fewer than 200 experts in all: a percentile would say nothing.

    Source:
        Super Experts, arXiv 2507.23279. Layers that form massive activations are not looked for:
        as in the authors' code they are the first 75 %; a tenth of the largest is not rounded, and
        shared experts, which a trace does not hold, are left out.
    """
    if sum(len(values) for values in maxima.values()) < MIN_EXPERTS:
        return None
    early = {layer: values for layer, values in maxima.items() if layer < EARLY * num_layers}
    everything = np.concatenate([*early.values(), np.zeros(0)])
    if not everything.any():
        return None
    percentile = float(np.percentile(everything, PERCENTILE))
    tenth = float(everything.max() / FRACTION)
    found = [
        (layer, int(expert), float(values[expert]))
        for layer, values in early.items()
        for expert in np.flatnonzero((values > percentile) & (values > tenth))
    ]
    found.sort(key=lambda each: -each[2])
    others = np.sort(everything)[: len(everything) - len(found)]
    return SuperExperts(
        percentile=percentile,
        tenth=tenth,
        experts=tuple(found),
        gap=found[-1][2] / float(others[-1]) if found and others.any() else np.nan,
    )
