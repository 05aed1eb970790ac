"""Compiled counting of selected experts, batch by batch, over whole sequences.

An id at or above the number of experts marks a dropped token and is not counted. Shapes: T tokens,
S sequences, K selected per token, E routed experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.compiling import compiled

Array = NDArray[Any]


@compiled
def count_selections(
    ids: Array, offsets: NDArray[np.int64], rows: NDArray[np.int64], counts: NDArray[np.int64]
) -> None:
    """Add selections to one row of counts per sequence.

    Args:
        ids: [T, K] selected experts.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the row of `counts` that each sequence adds to.
        counts: [rows, E], changed in place.
    """
    num_experts = counts.shape[1]
    for s in range(len(rows)):
        row = counts[rows[s]]
        for t in range(offsets[s], offsets[s + 1]):
            for i in range(ids.shape[1]):
                if ids[t, i] < num_experts:
                    row[ids[t, i]] += 1


@compiled
def sum_weights(
    ids: Array,
    weights: NDArray[np.float32],
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    sums: NDArray[np.float64],
) -> None:
    """Add the weights [T, K] of selections to one row of sums per sequence (`count_selections`)."""
    num_experts = sums.shape[1]
    for s in range(len(rows)):
        row = sums[rows[s]]
        for t in range(offsets[s], offsets[s + 1]):
            for i in range(ids.shape[1]):
                if ids[t, i] < num_experts:
                    row[ids[t, i]] += weights[t, i]


@compiled
def count_pairs(
    ids: Array, offsets: NDArray[np.int64], rows: NDArray[np.int64], pairs: NDArray[np.uint32]
) -> None:
    """Count which experts are selected together by a token.

    Args:
        ids: [T, K] selected experts.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the table that each sequence adds to.
        pairs: [rows, E, E], changed in place; only entries [:, e, f] with e < f.
    """
    num_experts = pairs.shape[1]
    for s in range(len(rows)):
        table = pairs[rows[s]]
        for t in range(offsets[s], offsets[s + 1]):
            for i in range(ids.shape[1]):
                a = ids[t, i]
                if a >= num_experts:
                    continue
                for j in range(i):
                    b = ids[t, j]
                    if b < num_experts:
                        table[min(a, b), max(a, b)] += 1


@compiled
def count_joint(
    ids: Array,
    ids_b: Array,
    shift: int,
    offsets: NDArray[np.int64],
    rows: NDArray[np.int64],
    joint: NDArray[np.uint32],
) -> None:
    """Count which experts of two routers are selected at two positions of a sequence.

    Args:
        ids: [T, K] selections of the first router.
        ids_b: [T, K'] selections of the second router.
        shift: Tokens from the position of the first to that of the second, at least 0.
        offsets: [S + 1] where each sequence starts.
        rows: [S] the table that each sequence adds to.
        joint: [rows, E, E'], changed in place; a pair of positions adds K * K' counts.
    """
    num_experts, num_experts_b = joint.shape[1], joint.shape[2]
    for s in range(len(rows)):
        table = joint[rows[s]]
        for t in range(offsets[s], offsets[s + 1] - shift):
            for i in range(ids.shape[1]):
                if ids[t, i] >= num_experts:
                    continue
                row = table[ids[t, i]]
                for j in range(ids_b.shape[1]):
                    if ids_b[t + shift, j] < num_experts_b:
                        row[ids_b[t + shift, j]] += 1
