"""Counts of (token id, expert) pairs in bounded memory, exact for a sample of ids if need be."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


class PairCounts:
    """How often each expert was chosen for each token id.

    When the distinct pairs outgrow the budget, only ids whose hash is a multiple of a power of two
    are kept, with exact counts, and the power doubles as needed. Which ids are kept depends on the
    data and the budget alone, not on the order or the cutting of the data.

    Args:
        num_experts: E.
        max_pairs: Distinct pairs that may be kept.
    """

    def __init__(self, num_experts: int, max_pairs: int) -> None:
        self.num_experts, self.max_pairs = num_experts, max_pairs
        self.sample = 1
        self._keys = np.empty(0, dtype=np.int64)
        self._counts = np.empty(0, dtype=np.int64)
        self._waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._num_waiting = 0

    def add(self, token_id: NDArray[Any], expert: NDArray[Any]) -> None:
        """Count one pair per token.

        Args:
            token_id: [T]; negative ids are left out.
            expert: [T]; at or above E, a dropped token, left out.
        """
        token_id = token_id.astype(np.int64)
        keep = (token_id >= 0) & (expert < self.num_experts)
        if self.sample > 1:
            keep &= self._sampled(token_id)
        keys = np.sort(token_id[keep] * self.num_experts + expert[keep])
        first = _first_of_run(keys)
        self._wait(keys[first], np.diff(first, append=len(keys)))

    def merge(self, other: Self) -> None:
        """Add the counts of another part."""
        self._settle()
        other._settle()
        self.sample = max(self.sample, other.sample)
        self._wait(other._keys, other._counts)
        self._settle()

    def table(self, min_count: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The counted ids, and the experts chosen for them.

        Args:
            min_count: Occurrences below which an id is left out.

        Returns:
            [V] ids and [V, E] counts.
        """
        self._settle()
        ids, index = np.unique(self._keys // self.num_experts, return_inverse=True)
        occurrences = np.bincount(index, self._counts, minlength=len(ids))
        row = np.cumsum(occurrences >= min_count) - 1
        keep = occurrences[index] >= min_count
        counts = np.zeros((int((occurrences >= min_count).sum()), self.num_experts), dtype=np.int64)
        counts[row[index[keep]], self._keys[keep] % self.num_experts] = self._counts[keep]
        return ids[occurrences >= min_count], counts

    def expert_totals(self) -> NDArray[np.int64]:
        """[E] how often each expert was counted, over all ids that are kept."""
        self._settle()
        totals = np.bincount(
            self._keys % self.num_experts, self._counts, minlength=self.num_experts
        )
        return totals.astype(np.int64)

    def _sampled(self, token_id: NDArray[np.int64]) -> NDArray[np.bool_]:
        mixed = token_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        sampled: NDArray[np.bool_] = (mixed >> np.uint64(32)) % np.uint64(self.sample) == 0
        return sampled

    def _wait(self, keys: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        self._waiting.append((keys, counts))
        self._num_waiting += len(keys)
        if self._num_waiting > max(len(self._keys), 1 << 16):
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        parts = [(self._keys, self._counts), *self._waiting]
        self._waiting, self._num_waiting = [], 0
        keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        first = _first_of_run(keys[order])
        self._keys = keys[order][first]
        self._counts = np.add.reduceat(counts[order], first) if len(first) else counts
        self._thin()
        while len(self._keys) > self.max_pairs:
            self.sample *= 2
            self._thin()

    def _thin(self) -> None:
        keep = self._sampled(self._keys // self.num_experts)
        self._keys, self._counts = self._keys[keep], self._counts[keep]


def _first_of_run(ordered: NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions where a sorted array takes a new value."""
    if not len(ordered):
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
