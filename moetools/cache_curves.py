"""Hit rates of expert caches by cache size: additive state, and rows of a tidy table.

The cumulative sum of `hits` over the sizes is the number of requests that a cache serves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import locality
from moetools.intervals import basic_interval
from moetools.trace_store import TraceBatch

WINDOWS = (4, 16, 64, 256)
"""Tokens of a window, m."""
ACCOUNTINGS = ("paper", "strict")
ADVICE = ("lru", "belady")
SERVED = (0.8, 0.9, 0.95)

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A share of requests served, by cache size, with the parameters of its metric."""

    metric: str
    m: int | None = None
    accounting: str | None = None

    def hits(self, selections: locality.Selections) -> tuple[Counts, Counts | None]:
        """Requests of each sequence [S, E], and of each expert, by the size that serves them."""
        if self.metric == "sch_window":
            return locality.window_ranks(selections, self.m or 1), None
        if self.metric == "cold_fills":
            found = locality.cold_fills(selections)
        else:
            policy = self.metric.removesuffix("_cache")
            strict = self.accounting == "strict"
            found = locality.cache_hits(selections, policy, window=self.m or 1, strict=strict)
        return found.sequences, found.experts


COLD = Curve(metric="cold_fills")
LRU = Curve(metric="lru", accounting="paper")
LRU_STRICT = Curve(metric="lru", accounting="strict")
"""From k slots on the same as `LRU`, so it is never simulated."""
OTHER = tuple(Curve(metric=p, accounting=a) for a in ACCOUNTINGS for p in ("lfu", "belady"))
BEST_SETS = tuple(Curve(metric="sch_window", m=m) for m in WINDOWS)
SCH = tuple(Curve(metric="sch_cache", m=m, accounting=a) for a in ACCOUNTINGS for m in WINDOWS)
PRACTICAL = (COLD, LRU, LRU_STRICT, *OTHER, *BEST_SETS)
FORESIGHT = (COLD, *SCH)
SHARED = (COLD, LRU, LRU_STRICT, *BEST_SETS, *SCH)


class CacheState:
    """Hits by cell and cache size, for some curves of one cache.

    Args:
        curves: What is simulated; none for an empty state.
        num_cells: Cells of the trace.
        num_experts: E.
        slots: Cache sizes are multiples of this.
        stride: Only every so many-th sequence is simulated.
    """

    def __init__(
        self,
        curves: Sequence[Curve],
        num_cells: int,
        num_experts: int,
        *,
        slots: int = 1,
        stride: int = 1,
    ) -> None:
        self.stride = stride
        self.starts = np.arange(0, num_experts, slots)
        self.sizes = np.minimum(self.starts + slots, num_experts)
        self.num_tokens = np.zeros(num_cells, np.int64)
        self._hits = {
            curve: np.zeros((num_cells, len(self.sizes)), np.int64)
            for curve in curves
            if curve != LRU_STRICT
        }
        self._experts = {
            curve: np.zeros((num_experts, num_experts), np.int64)
            for curve in self._hits
            if slots == 1 and curve in PRACTICAL and curve not in BEST_SETS
        }
        self._curves = tuple(curves)

    @property
    def hits(self) -> dict[Curve, Counts]:
        """[cells, N] requests by the smallest of N sizes that serves them."""
        return {c: self._hits[LRU if c == LRU_STRICT else c] for c in self._curves}

    @property
    def experts(self) -> dict[Curve, Counts]:
        """[E, E] the same by expert, of the curves that know it."""
        return {
            c: self._experts[LRU if c == LRU_STRICT else c]
            for c in self._curves
            if c == LRU_STRICT or c in self._experts
        }

    def work(
        self, selections: locality.Selections, batch: TraceBatch, cell: Counts
    ) -> list[partial[None]]:
        """What is to be done for a batch; the pieces may run at the same time.

        Args:
            selections: What the batch requests.
            batch: Its sequences.
            cell: [S] the cell of each.
        """
        sampled = batch.sequence % self.stride == 0
        if not sampled.any():
            return []
        np.add.at(self.num_tokens, cell[sampled], batch.lengths[sampled])
        if not sampled.all():
            selections = selections.take(sampled)
        return [partial(self._add, curve, selections, cell[sampled]) for curve in self._hits]

    def _add(self, curve: Curve, selections: locality.Selections, cell: Counts) -> None:
        sequences, experts = curve.hits(selections)
        np.add.at(self._hits[curve], cell, np.add.reduceat(sequences, self.starts, axis=1))
        if curve in self._experts and experts is not None:
            self._experts[curve] += experts

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.num_tokens += other.num_tokens
        for mine, theirs in ((self._hits, other._hits), (self._experts, other._experts)):
            for curve in mine:
                mine[curve] += theirs[curve]


def curve_rows(
    draws: Mapping[Curve, Floats],
    sizes: Counts,
    *,
    top_k: int,
    cold_miss: bool = False,
    prefix: str = "",
    **columns: Any,
) -> Iterator[dict[str, Any]]:
    """Parts of a table (`stacked`): hit rates by cache size.

    Args:
        draws: [1 + B, N] requests by the smallest of N sizes that serves them, and replicates.
        sizes: [N] cache sizes.
        top_k: Requests of a token; strict accounting needs as many slots.
        cold_miss: Also give rates with the filling of free slots as misses.
        prefix: Goes before metric names.
        **columns: Further columns.
    """
    cold = draws[COLD].cumsum(axis=1)
    requests = cold[:, -1:] + next(
        hits.sum(axis=1, keepdims=True) for curve, hits in draws.items() if curve.accounting
    )
    for curve, hits in draws.items():
        served = hits.cumsum(axis=1)
        kept = np.full(len(sizes), True)
        choices: dict[str | None, Floats] = {None: served}
        total = requests
        if curve in BEST_SETS:
            total = served[:, -1:]
        elif curve.accounting:
            choices = {"hit": served + cold}
            if cold_miss:
                choices["miss"] = served
            if curve.accounting == "strict":
                kept = sizes >= top_k
        elif LRU not in draws:
            continue
        for name, numerator in choices.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                rate = (numerator / total)[:, kept]
            low, high = basic_interval(rate[0], rate[1:], bounds=(0, 1))
            yield {
                "metric": prefix + curve.metric,
                "value": rate[0],
                "low": low,
                "high": high,
                "m": curve.m,
                "accounting": curve.accounting,
                "cold": name,
                "cache_size": sizes[kept],
                "rho": sizes[kept] / top_k,
                **columns,
            }


def advice(curves: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Parts of a table: the cache to build for each layer and the model, from all curves."""
    chosen = curves[
        curves["metric"].isin(ADVICE)
        & curves["scope"].isin(("model", "layer"))
        & (curves["accounting"] == "strict")
        & (curves["cold"] == "hit")
        & (curves["pool"] == "layer")
    ]
    for (policy, scope, layer), curve in chosen.groupby(["metric", "scope", "layer"], dropna=False):
        sizes, rate = curve["cache_size"].to_numpy(), curve["value"].to_numpy()
        if np.isnan(rate).any():
            continue
        place = {
            "scope": scope,
            "layer": layer,
            "policy": policy,
            "accounting": "strict",
            "cold": "hit",
            "pool": "layer",
            "num_tokens": curve["num_tokens"].iloc[0],
        }
        knee = locality.knee(rate)
        yield {"metric": "cache_knee", "value": None if knee is None else sizes[knee], **place}
        needed = [sizes[np.argmax(rate >= served)] for served in SERVED]
        yield {"metric": "cache_size_for", "value": needed, "served": SERVED, **place}
