"""Bootstrap intervals over blocks of whole sequences, in bounded memory.

Every sequence belongs to one of at most `NUM_BLOCKS` blocks. An analysis keeps its additive
counts per block; a replicate draws blocks with replacement and adds their counts up. The same
draws serve all layers and groups of an analysis.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_BLOCKS = 200
NUM_REPLICATES = 1000


def block_of(sequence: NDArray[np.int32]) -> NDArray[np.int64]:
    """[S] block of each sequence: a hash of its number, so that order and length play no part."""
    with np.errstate(over="ignore"):
        x = sequence.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) % np.uint64(NUM_BLOCKS)).astype(np.int64)


def replicate_weights(
    occupied: NDArray[np.bool_], *, seed: int = 0, num_replicates: int = NUM_REPLICATES
) -> NDArray[np.float64]:
    """How often each block is drawn in each replicate.

    Args:
        occupied: [NUM_BLOCKS] whether a block holds any sequence; empty ones are never drawn.
        seed: Seed of the draws.
        num_replicates: Number of replicates B.

    Returns:
        [B, NUM_BLOCKS]; rows sum to the number of occupied blocks.
    """
    count = int(occupied.sum())
    weights = np.zeros((num_replicates, len(occupied)))
    if count:
        draws = np.random.default_rng(seed).multinomial(
            count, np.full(count, 1 / count), size=num_replicates
        )
        weights[:, occupied] = draws
    return weights


def basic_interval(
    value: NDArray[Any] | float, replicates: NDArray[Any], *, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Basic bootstrap interval, `[2x - q_high, 2x - q_low]`, over the first axis.

    Args:
        value: [...] the estimate x on the whole data.
        replicates: [B, ...] the estimate on each replicate; NaN ones are left out.
        level: Coverage.

    Returns:
        Lower and upper ends, [...]; NaN where fewer than two replicates are finite.
    """
    tail = (1 - level) / 2
    replicates = np.asarray(replicates, dtype=np.float64)
    enough = np.isfinite(replicates).sum(axis=0) >= 2
    safe = np.where(enough, replicates, 0.0)
    q_low, q_high = np.nanquantile(safe, [tail, 1 - tail], axis=0)
    value = np.asarray(value, dtype=np.float64)
    low = np.where(enough, 2 * value - q_high, np.nan)
    high = np.where(enough, 2 * value - q_low, np.nan)
    return low, high
