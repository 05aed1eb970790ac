"""Two traces of the same texts, read side by side."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from moetools.errors import TraceError
from moetools.trace_store import TraceBatch, TraceStore


class PairedReader:
    """Reads, of another trace of the same texts, the sequences of a batch.

    The two traces may be cut into row groups differently. One batch of the other trace is held at
    a time; going back to earlier sequences reads it again from the start.

    Args:
        trace: The other trace.
        columns: What to read of it, as for `TraceStore.batches`.
    """

    def __init__(self, trace: TraceStore, columns: Iterable[str]) -> None:
        self._trace, self._columns = trace, tuple(columns)
        self._batches: Iterator[TraceBatch] = iter(())
        self._held: TraceBatch | None = None

    def matching(self, batch: TraceBatch) -> TraceBatch:
        """The sequences of `batch` as the other trace has them, in the same order.

        Args:
            batch: Whole sequences in ascending order, as `TraceStore.batches` yields them.

        Raises:
            TraceError: The other trace lacks one of the sequences, or has it with another length.
        """
        pieces: list[TraceBatch] = []
        found = 0
        while found < batch.num_sequences:
            held = self._holding(int(batch.sequence[found]))
            last = int(np.searchsorted(batch.sequence, held.sequence[-1], side="right"))
            wanted = batch.sequence[found:last]
            index = np.searchsorted(held.sequence, wanted)
            if (held.sequence[index] != wanted).any():
                raise self._lacks(int(wanted[(held.sequence[index] != wanted).argmax()]))
            pieces.append(_chosen(held, index))
            found = last
        pair = pieces[0] if len(pieces) == 1 else _joined(pieces)
        if not np.array_equal(pair.lengths, batch.lengths):
            number = int(batch.sequence[(pair.lengths != batch.lengths).argmax()])
            raise TraceError(
                f"{self._trace.path}: sequence {number} has another length than in the trace it "
                "is compared with. Trace the same texts with both models."
            )
        return pair

    def _holding(self, sequence: int) -> TraceBatch:
        """The batch that reaches this sequence."""
        if self._held is None or sequence < self._held.sequence[0]:
            self._batches = self._trace.batches(self._columns)
            self._held = next(self._batches, None)
        while self._held is not None and self._held.sequence[-1] < sequence:
            self._held = next(self._batches, None)
        if self._held is None:
            raise self._lacks(sequence)
        return self._held

    def _lacks(self, sequence: int) -> TraceError:
        return TraceError(
            f"{self._trace.path} has no sequence {sequence}, which the trace it is compared with "
            "has. Trace the same texts with both models."
        )


def same_tokens(trace: TraceStore, reference: TraceStore) -> bool:
    """Whether every sequence of a trace is in the reference too, with the same tokens.

    Without reading tokens where both were recorded from the same list of sequences.
    """
    columns = ["sequence", "num_tokens"]
    own, other = (each.sequences(columns) for each in (trace, reference))
    numbers, others = (t.column("sequence").to_numpy() for t in (own, other))
    place = np.searchsorted(others, numbers)
    if not len(numbers) or (place >= len(others)).any() or (others[place] != numbers).any():
        return False
    if (other.column("num_tokens").to_numpy()[place] != own.column("num_tokens").to_numpy()).any():
        return False
    plans = [each.manifest.plan.get("sha256") for each in (trace, reference)]
    if plans[0] is not None and plans[0] == plans[1]:
        return True
    reader = PairedReader(reference, ["token_id"])
    return all(
        np.array_equal(batch.tokens["token_id"], reader.matching(batch).tokens["token_id"])
        for batch in trace.batches(["token_id"])
    )


def _chosen(batch: TraceBatch, index: NDArray[np.intp]) -> TraceBatch:
    """Some sequences of a batch, without a copy where they are neighbours."""
    first, last = int(index[0]), int(index[-1]) + 1
    tokens: slice | NDArray[np.int64]
    sequences: slice | NDArray[np.intp]
    if last - first == len(index):
        sequences = slice(first, last)
        tokens = slice(int(batch.offsets[first]), int(batch.offsets[last]))
    else:
        sequences = index
        tokens = np.concatenate([np.arange(*batch.offsets[i : i + 2]) for i in index])
    return TraceBatch(
        offsets=np.concatenate([[0], np.cumsum(batch.lengths[sequences])]),
        sequence=batch.sequence[sequences],
        group=batch.group[sequences],
        tokens={name: column[tokens] for name, column in batch.tokens.items()},
        sequences={name: column[sequences] for name, column in batch.sequences.items()},
    )


def _joined(pieces: list[TraceBatch]) -> TraceBatch:
    lengths = np.concatenate([piece.lengths for piece in pieces])
    first = pieces[0]
    return TraceBatch(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        sequence=np.concatenate([piece.sequence for piece in pieces]),
        group=np.concatenate([piece.group for piece in pieces]),
        tokens={
            name: np.concatenate([piece.tokens[name] for piece in pieces]) for name in first.tokens
        },
        sequences={
            name: np.concatenate([piece.sequences[name] for piece in pieces])
            for name in first.sequences
        },
    )
