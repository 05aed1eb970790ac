"""Two traces of the same texts: read side by side, and compared."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import analysis
from moetools.analysis import Options, mlp_routers, select
from moetools.errors import RequestError, TraceError
from moetools.trace_store import TraceBatch, TraceStore


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceDiff:
    """How trace B differs from trace A.

    Attributes:
        a: The reference.
        b: What is compared with it.
        floor: The model of A recorded once more; None without.
        table: Rows of the analysis `drift`, and in the column `floor` the same number of the
            floor's trace against A.
        notes: What to know about these traces, in sentences.
    """

    a: TraceStore
    b: TraceStore
    floor: TraceStore | None
    table: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether any token of any router was handed to other experts."""
        exact = select(self.table, metric="exact_set", scope="layer")["value"]
        return bool((exact < 1).any())


def diff_traces(
    a: str | Path, b: str | Path, *, floor: str | Path | None = None, seed: int = 0
) -> TraceDiff:
    """Compare two traces of the same texts.

    Args:
        a: Folder of the reference.
        b: Folder of the trace that is compared with it.
        floor: Folder of a trace of A's model, recorded with another `--batch-tokens` or dtype.
        seed: Seed of resampling.

    Raises:
        TraceError: A trace is unreadable, incomplete, or of another format.
        RequestError: The traces hold other texts or other routers, or the routers of the floor
            are not those of A.
    """
    trace_a, trace_b = TraceStore(Path(a)), TraceStore(Path(b))
    table = _drift(trace_b, trace_a, seed)
    notes = _notes(trace_a, trace_b)
    trace_floor = None
    if floor is not None:
        trace_floor = TraceStore(Path(floor))
        _check_floor(trace_floor, trace_a)
        notes += _floor_notes(trace_floor, trace_a)
        found = _drift(trace_floor, trace_a, seed)
        keys = [name for name in ("metric", "scope", "layer", "group", "decile") if name in table]
        found = found[[*keys, "value"]].rename(columns={"value": "floor"})
        table = table.merge(found, on=keys, how="left", validate="one_to_one")
    return TraceDiff(a=trace_a, b=trace_b, floor=trace_floor, table=table, notes=tuple(notes))


def _drift(trace: TraceStore, reference: TraceStore, seed: int) -> pd.DataFrame:
    results = analysis.run([trace], only=["drift"], options=Options(seed=seed, reference=reference))
    if "drift" not in results.tables:
        raise RequestError(f"{trace.path} cannot be compared. {results.skipped['drift']}")
    return results.tables["drift"]


def _check_floor(floor: TraceStore, a: TraceStore) -> None:
    """The routers of the floor must be those of A."""
    own = {router.name: router.sha256 for router in mlp_routers(floor)}
    for router in mlp_routers(a):
        if own.get(router.name) != router.sha256:
            raise RequestError(
                f"--floor {floor.path}: router {router.name} is not that of {a.path}. Record the "
                f"model of {a.path} ({a.manifest.model}) again, with another --batch-tokens."
            )
    if floor.manifest.intervention != a.manifest.intervention:
        raise RequestError(
            f"--floor {floor.path}: it was recorded under another --intervention than {a.path}."
        )


def _floor_notes(floor: TraceStore, a: TraceStore) -> list[str]:
    """Why a floor may be too low."""
    numerics = [
        (each.manifest.plan.get("batch_tokens"), each.manifest.dtype, each.manifest.engine,
         each.manifest.device, each.manifest.plan.get("experts_implementation"))
        for each in (floor, a)
    ]  # fmt: skip
    if numerics[0] != numerics[1]:
        return []
    return [
        "The floor was recorded as A was, with the same --batch-tokens and dtype: it shows no "
        "rounding."
    ]


def _notes(a: TraceStore, b: TraceStore) -> list[str]:
    """How the recordings differ beside the model."""
    notes = []
    if a.num_sequences > b.num_sequences:
        notes.append(
            f"Compared are the {b.num_sequences:,} sequences of B; A has {a.num_sequences:,}."
        )
    for name in ("engine", "dtype", "device"):
        values = [getattr(each.manifest, name) for each in (a, b)]
        if values[0] != values[1]:
            notes.append(
                f"A was recorded with {name} {values[0]}, B with {values[1]}: part of the "
                "difference can come from that."
            )
    return notes


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
        text=batch.text[sequences],
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
        text=np.concatenate([piece.text for piece in pieces]),
        group=np.concatenate([piece.group for piece in pieces]),
        tokens={
            name: np.concatenate([piece.tokens[name] for piece in pieces]) for name in first.tokens
        },
        sequences={
            name: np.concatenate([piece.sequences[name] for piece in pieces])
            for name in first.sequences
        },
    )
