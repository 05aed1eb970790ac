"""A sample of a trace's tokens that does not depend on how the trace is cut."""

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moetools.trace_store import TraceBatch


def token_keys(batch: TraceBatch) -> NDArray[np.uint64]:
    """[T] hash of each token's sequence and position."""
    position = np.arange(batch.num_tokens) - np.repeat(batch.offsets[:-1], batch.lengths)
    x = np.repeat(batch.sequence.astype(np.uint64), batch.lengths) << np.uint64(32)
    x = (x | position.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class TokenSample:
    """Tokens of one router with logits: those with the smallest hashes.

    Args:
        size: Tokens that are kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: list[tuple[NDArray[Any], ...]] = []
        self._num_tokens = 0
        self._limit = np.iinfo(np.uint64).max

    def add(
        self,
        key: NDArray[np.uint64],
        batch: NDArray[np.int64],
        logits: NDArray[np.float32],
        ids: NDArray[Any],
    ) -> None:
        """Take in tokens; those without logits are left out.

        Args:
            key: [T] hashes.
            batch: [T] batch of each token.
            logits: [T, E].
            ids: [T, K] selected experts.
        """
        kept = np.flatnonzero(key <= self._limit)
        kept = kept[np.isfinite(logits[kept, 0])]
        if len(kept) > self.size:
            kept = kept[np.argpartition(key[kept], self.size)[: self.size]]
        self._take(key[kept], batch[kept], logits[kept], ids[kept])

    def merge(self, other: Self) -> None:
        """Add the tokens of another part."""
        if other._parts:
            self._take(*other.tokens())

    def tokens(self) -> tuple[NDArray[Any], ...]:
        """Keys [n], batches [n], logits [n, E] and selections [n, K], in the order of the keys."""
        columns = [np.concatenate(column) for column in zip(*self._parts, strict=True)]
        order = np.argsort(columns[0], kind="stable")[: self.size]
        return tuple(column[order] for column in columns)

    def __len__(self) -> int:
        return min(self._num_tokens, self.size)

    def _take(self, *part: NDArray[Any]) -> None:
        self._parts.append(part)
        self._num_tokens += len(part[0])
        if self._num_tokens > 2 * self.size:
            self._parts = [self.tokens()]
            self._num_tokens = len(self._parts[0][0])
            self._limit = self._parts[0][0][-1]
