"""A sample of a trace's tokens that does not depend on how the trace is cut."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moetools.intervals import block_of
from moetools.trace_store import TraceBatch


def token_places(batch: TraceBatch) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[T] number of each token's sequence, and [T] its position there."""
    position = np.arange(batch.num_tokens) - np.repeat(batch.offsets[:-1], batch.lengths)
    return np.repeat(batch.sequence, batch.lengths), position


class TokenSample:
    """A bounded random sample of tokens: those whose sequence and position hash lowest.

    It does not depend on how the tokens were cut into batches and parts, nor on their order.

    Args:
        limit: Tokens kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bound = np.iinfo(np.int64).max
        self._parts: list[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = []

    def add(
        self,
        sequence: NDArray[Any],
        position: NDArray[Any],
        columns: Mapping[str, NDArray[Any]],
        kept: NDArray[np.bool_],
    ) -> None:
        """Offer tokens.

        Args:
            sequence: [T] number of each token's sequence.
            position: [T] its position there.
            columns: What to keep of a token: [T, ...] by name.
            kept: [T] tokens that may be drawn.
        """
        rows = np.flatnonzero(kept)
        token = (sequence[rows].astype(np.uint64) << np.uint64(32)) + position[rows].astype(
            np.uint64
        )
        keys = block_of(token, 1 << 62)
        chosen = keys < self._bound
        rows, keys = rows[chosen], keys[chosen]
        if len(rows) > self.limit:
            best = np.argpartition(keys, self.limit - 1)[: self.limit]
            rows, keys = rows[best], keys[best]
        values = {name: column[rows] for name, column in columns.items()}
        values |= {"sequence": sequence[rows], "position": position[rows]}
        self._append(keys, values)

    def merge(self, other: Self) -> None:
        """Add the sample of another part of the same trace."""
        for keys, values in other._parts:
            self._append(keys, values)

    def __len__(self) -> int:
        return min(self.limit, sum(len(keys) for keys, _ in self._parts))

    def tokens(self) -> dict[str, NDArray[Any]]:
        """The columns of the sampled tokens, lowest hash first; also `sequence`, `position`."""
        self._shrink()
        return self._parts[0][1] if self._parts else {}

    def _append(self, keys: NDArray[np.int64], values: dict[str, NDArray[Any]]) -> None:
        if len(keys):
            self._parts.append((keys, values))
        if sum(len(of_part) for of_part, _ in self._parts) > 2 * self.limit:
            self._shrink()

    def _shrink(self) -> None:
        if not self._parts:
            return
        keys = np.concatenate([keys for keys, _ in self._parts])
        order = np.argsort(keys, kind="stable")[: self.limit]
        names = self._parts[0][1]
        joined = {
            name: np.concatenate([values[name] for _, values in self._parts])[order]
            for name in names
        }
        self._parts = [(keys[order], joined)]
        if len(order) == self.limit:
            self._bound = int(keys[order[-1]])
