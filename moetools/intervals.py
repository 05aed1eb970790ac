"""Intervals that resample blocks of whole texts, in bounded memory.

Every text, with all sequences that it was cut into, belongs to one block. An analysis keeps its
additive sums per block; a bootstrap replicate draws blocks with replacement and adds their sums
up, and the statistic is computed on each replicate. Groups are strata: blocks are drawn within
their group, so that every replicate has the trace's mix of groups.

With fewer than two blocks there is nothing to resample and the interval is NaN. With fewer than
about 20 texts the intervals are too narrow.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

NUM_BLOCKS = 200
NUM_REPLICATES = 1000
MAX_CELLS = 1000
MIN_BLOCKS_OF_GROUP = 20


def block_of(text: NDArray[np.integer[Any]], num_blocks: int = NUM_BLOCKS) -> NDArray[np.int64]:
    """[S] block of each text: a hash of its number, so that order and length play no part."""
    with np.errstate(over="ignore"):
        x = text.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return ((x ^ (x >> np.uint64(31))) % np.uint64(num_blocks)).astype(np.int64)


def replicate_weights(
    occupied: NDArray[np.bool_], *, seed: int = 0, num_replicates: int = NUM_REPLICATES
) -> NDArray[np.float64]:
    """How often each block is drawn in each replicate.

    Args:
        occupied: [..., N] whether a block holds any text; empty ones are never drawn. Each
            row is a stratum of its own.
        seed: Seed of the draws.
        num_replicates: Number of replicates B.

    Returns:
        [B, ..., N]; rows sum to the number of their occupied blocks. NaN where no stratum has
        two blocks.
    """
    weights = np.zeros((num_replicates, *occupied.shape))
    counts = occupied.sum(axis=-1)
    if not (counts > 1).any():
        return np.full_like(weights, np.nan)
    generator = np.random.default_rng(seed)
    for row in np.argwhere(counts > 0):
        stratum, count = tuple(row), int(counts[tuple(row)])
        draws = generator.multinomial(count, np.full(count, 1 / count), size=num_replicates)
        weights[(slice(None), *stratum, occupied[stratum])] = draws
    return weights


def basic_interval(
    value: NDArray[Any] | float,
    replicates: NDArray[Any],
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Basic bootstrap interval, `[2x - q_high, 2x - q_low]`, over the first axis.

    Args:
        value: [...] the estimate x on the whole data.
        replicates: [B, ...] the estimate on each replicate; NaN ones are left out.
        level: Coverage.
        bounds: Range of the statistic; the ends are clipped to it.

    Returns:
        Lower and upper ends, [...]; NaN where fewer than two replicates are finite.
    """
    tail = (1 - level) / 2
    value, replicates = np.asarray(value, dtype=np.float64), np.asarray(replicates)
    if len(replicates) < 2:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    finite = np.isfinite(replicates)
    enough = finite.sum(axis=0) >= 2
    safe = np.where(finite | ~enough, np.where(enough, replicates, 0.0), np.nan)
    quantile = np.quantile if not np.isnan(safe).any() else np.nanquantile
    q_low, q_high = quantile(safe, [tail, 1 - tail], axis=0)
    low = np.where(enough, np.clip(2 * value - q_high, *bounds), np.nan)
    high = np.where(enough, np.clip(2 * value - q_low, *bounds), np.nan)
    return low, high


def jackknife_interval(
    value: NDArray[Any] | float,
    leave_one_out: NDArray[Any],
    *,
    level: float = 0.95,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval from leaving out one block at a time, for smooth statistics with large states.

    Args:
        value: [...] the estimate on the whole data.
        leave_one_out: [N, ...] the estimate without each of the N blocks that hold data.
        level: Coverage, by Student's t with N - 1 degrees of freedom.
        bounds: Range of the statistic; the ends are clipped to it.

    Returns:
        Lower and upper ends, [...]; NaN with fewer than two blocks.
    Source:
        Efron and Tibshirani, An Introduction to the Bootstrap, eq. 11.5.
    """
    from scipy.special import stdtrit

    value = np.asarray(value, dtype=np.float64)
    count = len(leave_one_out)
    if count < 2:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    deviation = leave_one_out - leave_one_out.mean(axis=0)
    error = np.sqrt((count - 1) / count * (deviation**2).sum(axis=0))
    half = stdtrit(count - 1, (1 + level) / 2) * error
    return np.clip(value - half, *bounds), np.clip(value + half, *bounds)


def fieller_interval(
    numerator: NDArray[Any] | float,
    denominator: NDArray[Any] | float,
    *,
    variances: tuple[NDArray[Any] | float, NDArray[Any] | float],
    covariance: NDArray[Any] | float,
    quantile: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Interval of the ratio of two estimates, which holds for denominators near zero too.

    Args:
        numerator: [...] estimate.
        denominator: [...] estimate.
        variances: [...] of both.
        covariance: [...] of the two.
        quantile: Of the normal or t distribution, such as 1.96.

    Returns:
        Lower and upper ends, [...]; NaN unless the denominator is clearly above zero.
    Source:
        Fieller 1954, J. R. Statist. Soc. B 16, 175.
    """
    a, b = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    square = quantile**2
    first = b**2 - square * variances[1]
    second = a * b - square * covariance
    third = a**2 - square * variances[0]
    with np.errstate(invalid="ignore", divide="ignore"):
        clear = (b > 0) & (first > 0)
        root = np.sqrt(np.maximum(second**2 - first * third, 0))
        low, high = (second - root) / first, (second + root) / first
    return np.where(clear, low, np.nan), np.where(clear, high, np.nan)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scope:
    """Some of a trace's sequences, all or those of one group, and their bootstrap draws.

    Attributes:
        group: Name of the group; None for the whole trace.
        num_tokens: Tokens of these sequences.
        cells: Which cells hold them.
        weights: [B, number of those cells] bootstrap draws.
    """

    group: str | None
    num_tokens: int
    cells: slice
    weights: NDArray[np.float64]

    def draws(self, sums: NDArray[Any]) -> NDArray[np.float64]:
        """Sum of `sums` [cells, ...] over this scope: [1 + B, ...], first as it is, then drawn."""
        chosen = sums[self.cells].astype(np.float64)
        flat = chosen.reshape(len(chosen), -1)
        both = np.vstack([flat.sum(axis=0), self.weights @ flat])
        return both.reshape(len(both), *chosen.shape[1:])


class Cells:
    """The blocks of every group of one trace, numbered through: where additive sums are kept.

    At most `NUM_BLOCKS` blocks a group, fewer where groups are many; sequences without a group
    have blocks of their own, which count for the whole trace only.

    Args:
        groups: Names of the trace's groups.
    """

    def __init__(self, groups: Sequence[str]) -> None:
        self.groups = tuple(groups)
        strata = len(groups) + 1
        self.num_blocks = min(NUM_BLOCKS, max(MIN_BLOCKS_OF_GROUP, MAX_CELLS // strata))
        self.num_tokens = np.zeros(strata * self.num_blocks, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.num_tokens)

    def add(
        self,
        text: NDArray[np.int32],
        group: NDArray[np.int32],
        lengths: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Count the tokens of some sequences.

        Args:
            text: [S] numbers of the texts that the sequences were cut from.
            group: [S] index of each one's group, -1 without.
            lengths: [S] tokens of each.

        Returns:
            [S] the cell of each sequence.
        """
        stratum = np.where(group < 0, len(self.groups), group).astype(np.int64)
        cell = stratum * self.num_blocks + block_of(text, self.num_blocks)
        np.add.at(self.num_tokens, cell, lengths)
        return cell

    def merge(self, other: Self) -> None:
        """Add the tokens of another part of the same trace."""
        self.num_tokens += other.num_tokens

    def scopes(self, *, seed: int = 0) -> Iterator[Scope]:
        """The whole trace, then every group that has tokens."""
        occupied = (self.num_tokens > 0).reshape(-1, self.num_blocks)
        yield Scope(
            group=None,
            num_tokens=int(self.num_tokens.sum()),
            cells=slice(0, len(self)),
            weights=replicate_weights(occupied, seed=seed).reshape(NUM_REPLICATES, -1),
        )
        for i, group in enumerate(self.groups):
            cells = slice(i * self.num_blocks, (i + 1) * self.num_blocks)
            if not occupied[i].any():
                continue
            yield Scope(
                group=group,
                num_tokens=int(self.num_tokens[cells].sum()),
                cells=cells,
                weights=replicate_weights(occupied[i], seed=seed),
            )
