"""Local routing consistency: do the same few experts serve a run of tokens, and what cache fits?

Metrics (fractions; `m`, `cache_size` and the like are columns):

- `srp` (`m`): segment routing best performance, the best F1 of switching each expert on or off for
  all m tokens of a window, over all windows; one threshold for all experts of the scope.
- `rho_hat` (`m`): experts that this best segment router switches on, per expert selected.
- `srp_chance_uniform`, `srp_chance_skewed` (`m`): SRP of tokens that choose independently, each
  expert at rate k / E, or each at its own rate.
- `srp_adjusted_uniform`, `srp_adjusted_skewed` (`m`): (SRP - chance) / (1 - chance): all structure,
  and structure beyond a static imbalance of the experts. Their intervals take chance as known.
- `sch_window` (`m`, `cache_size`, `rho`, `pool`): share of selections within the best fixed set of
  `cache_size` experts of each window.
- `sch_cache` (`m`, `cache_size`, `rho`, `pool`, `accounting`, `cold`): hit rate of a cache that
  keeps the experts used most within the m tokens ahead.
- `lru`, `lfu`, `belady` (`cache_size`, `rho`, `pool`, `accounting`, `cold`): hit rates of caches
  that keep the most recently used experts, the most often used so far, those used again soonest.
- `cold_fills` (`cache_size`, `rho`, `pool`): share of requests that fill a free slot.
- `cache_knee` (`policy`): slots per layer after which more bring less than average; null where the
  curve does not bend.
- `cache_size_for` (`policy`, `served`): slots per layer that serve this share of the requests. Both
  by strict accounting, free slots filled for free, for the model and each layer.

Scopes: model, group, layer within each, expert (whole trace; all but the `sch` metrics). `rho` is
`cache_size` / k (the largest k, if layers differ). `pool` is `layer` (each layer has its own cache;
the model's number is over the requests of all layers) or `shared` (one cache of `cache_size` slots
for all layers). `accounting` is `paper` (an expert found before a token is a hit even if another
expert of the token displaces it before it is served) or `strict` (never drop an expert that the
current token needs; from k slots on). `cold` is `hit` (filling a free slot is free) or, for the
model, `miss`. Caches start empty with every sequence, and rates are over all requests, where the
papers average over sequences of equal length. What would take too long is simulated on every n-th
sequence: `num_tokens` says on how many tokens. Metrics of attention routers start with `attention_`
and have layer and expert scope only.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import locality
from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    State,
    each_trace,
    router_columns,
    select,
    single,
    stacked,
)
from moetools.cache_curves import (
    COLD,
    FORESIGHT,
    PRACTICAL,
    SHARED,
    WINDOWS,
    CacheState,
    Curve,
    advice,
    curve_rows,
)
from moetools.intervals import Cells, Scope, basic_interval, block_of, replicate_weights
from moetools.reporting import style
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

EXPERT_BYTES = 256 << 20
"""Memory for the windows of single experts by block, where their intervals are asked for."""
EXPERT_ROWS = 500_000
"""Cache rows of experts; where every cache size would make more, sizes are multiples of k."""
MAX_STEPS = 1 << 31
"""Slots times requests that one `sch_cache` or shared cache goes through; longer traces are
sampled."""

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Part = dict[str, Any]


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections of every router."""
    return router_columns(trace, "experts")


def start(trace: TraceStore, options: Options) -> "ConsistencyState":
    """An empty state."""
    return ConsistencyState(trace.routers, trace.groups, options, strides=strides(trace))


def strides(trace: TraceStore) -> tuple[int, int]:
    """`sch_cache` and the shared cache are simulated on every so many-th sequence."""
    each = sum(router.num_experts * router.top_k for router in trace.routers)
    routers = mlp(trace.routers)
    shared = sum(r.num_experts for r in routers) * sum(r.top_k for r in routers)
    own, pooled = (max(1, -(-trace.num_tokens * steps // MAX_STEPS)) for steps in (each, shared))
    return own, pooled


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """What is sampled."""
    names = ("sch_cache", "The cache that all layers share")
    return [
        f"{name} is simulated on one sequence in {stride}, to save time."
        for name, stride in zip(names, strides(trace), strict=True)
        if stride > 1
    ]


def mlp(routers: Sequence[TracedRouter]) -> list[TracedRouter]:
    """The routers that model-wide numbers are made of."""
    return [router for router in routers if router.kind == "mlp"]


class WindowState:
    """Counts of windows of one router and one m: by cell, by expert, and by group and expert."""

    def __init__(
        self, window: int, num_experts: int, *, num_cells: int, num_strata: int, num_blocks: int
    ) -> None:
        self.window = window
        self.cells = np.zeros((num_cells, window + 1), np.int64)
        self.experts = np.zeros((num_blocks, num_experts, window + 1), np.int64)
        self.selected = np.zeros((num_strata, num_experts), np.int64)
        self.num_windows = np.zeros(num_strata, np.int64)

    def add(
        self, selections: locality.Selections, cell: Counts, stratum: Counts, block: Counts
    ) -> None:
        """Count the windows of whole sequences."""
        both = stratum * len(self.experts) + block
        present, group = np.unique(both, return_inverse=True)
        found = locality.window_counts(selections, self.window, group=group)
        np.add.at(self.cells, cell, found.sequences)
        np.add.at(self.experts, present % len(self.experts), found.experts)
        strata = present // len(self.experts)
        np.add.at(self.selected, strata, found.experts[:, :, 1:].sum(axis=2))
        np.add.at(self.num_windows, strata, found.experts[:, 0, 0])

    def rates(self, stratum: int | None) -> Floats:
        """[E] how often each expert is selected by the tokens of windows; NaN without windows."""
        chosen = slice(None) if stratum is None else slice(stratum, stratum + 1)
        with np.errstate(invalid="ignore"):
            rates: Floats = self.selected[chosen].sum(axis=0) / (
                self.window * self.num_windows[chosen].sum()
            )
        return rates

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells += other.cells
        self.experts += other.experts
        self.selected += other.selected
        self.num_windows += other.num_windows


class ConsistencyState:
    """Windows and caches of every router, and the cache that they share."""

    def __init__(
        self,
        routers: Sequence[TracedRouter],
        groups: Sequence[str],
        options: Options,
        *,
        strides: tuple[int, int] = (1, 1),
    ) -> None:
        self.routers, self.options = routers, options
        self.cells = Cells(groups)
        self.window_tokens = np.zeros((len(WINDOWS), len(self.cells)), np.int64)
        row_bytes = 8 * sum(WINDOWS) * sum(router.num_experts for router in routers)
        self.num_expert_blocks = (
            min(self.cells.num_blocks, max(20, EXPERT_BYTES // row_bytes))
            if options.expert_intervals
            else 1
        )
        self.windows = {
            router.name: [
                WindowState(
                    window,
                    router.num_experts,
                    num_cells=len(self.cells),
                    num_strata=len(groups) + 1,
                    num_blocks=self.num_expert_blocks,
                )
                for window in WINDOWS
            ]
            for router in routers
        }
        self.caches = {
            router.name: CacheState(PRACTICAL, len(self.cells), router.num_experts)
            for router in routers
        }
        self.foresight = {
            router.name: CacheState(
                FORESIGHT, len(self.cells), router.num_experts, stride=strides[0]
            )
            for router in routers
        }
        pooled = mlp(routers)
        self.shared = CacheState(
            SHARED if len(pooled) > 1 else (),
            len(self.cells),
            sum(router.num_experts for router in pooled),
            slots=max(1, len(pooled)),
            stride=strides[1],
        )
        self.expert_blocks = np.zeros(self.num_expert_blocks, np.bool_)

    def update(self, batch: TraceBatch) -> None:
        """Take in whole sequences; routers and caches are worked on in threads."""
        cell = self.cells.add(batch.text, batch.group, batch.lengths)
        stratum = cell // self.cells.num_blocks
        block = block_of(batch.text, self.num_expert_blocks)
        self.expert_blocks[block] = True
        for i, window in enumerate(WINDOWS):
            np.add.at(
                self.window_tokens[i], cell, np.where(batch.lengths >= window, batch.lengths, 0)
            )
        selected = {
            router.name: locality.Selections.of(
                batch.tokens[f"experts.{router.name}"], batch.offsets, router.num_experts
            )
            for router in self.routers
        }
        work: list[partial[None]] = []
        for name, selections in selected.items():
            for state in self.windows[name]:
                work.append(partial(state.add, selections, cell, stratum, block))
            for caches in (self.caches[name], self.foresight[name]):
                work += caches.work(selections, batch, cell)
        if self.shared.hits:
            pooled = locality.pool([selected[router.name] for router in mlp(self.routers)])
            work += self.shared.work(pooled, batch, cell)
        with ThreadPoolExecutor(os.cpu_count()) as executor:
            for done in [executor.submit(piece) for piece in work]:
                done.result()

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        self.window_tokens += other.window_tokens
        self.expert_blocks |= other.expert_blocks
        for router in self.routers:
            self.caches[router.name].merge(other.caches[router.name])
            self.foresight[router.name].merge(other.foresight[router.name])
            for mine, theirs in zip(
                self.windows[router.name], other.windows[router.name], strict=True
            ):
                mine.merge(theirs)
        self.shared.merge(other.shared)

    def table(self) -> pd.DataFrame:
        """All rows."""
        table = stacked(self._parts())
        return pd.concat([table, stacked(advice(table))], ignore_index=True)

    def _parts(self) -> Iterator[Part]:
        for scope in self.cells.scopes(seed=self.options.seed):
            for kind in dict.fromkeys(router.kind for router in self.routers):
                routers = [router for router in self.routers if router.kind == kind]
                prefix = "" if kind == "mlp" else f"{kind}_"
                yield from self._window_parts(scope, routers, prefix)
                for states in (self.caches, self.foresight):
                    yield from cache_parts(scope, routers, states, prefix)
                if scope.group is None:
                    for router in routers:
                        yield from self._expert_window_parts(router, prefix)
                    yield from self._expert_cache_parts(routers, prefix)
            if scope.group is None and self.shared.hits:
                yield from curve_rows(
                    {curve: scope.draws(hits) for curve, hits in self.shared.hits.items()},
                    self.shared.sizes,
                    top_k=sum(router.top_k for router in mlp(self.routers)),
                    scope="model",
                    pool="shared",
                    num_tokens=int(self.shared.num_tokens.sum()),
                )

    def _window_parts(
        self, scope: Scope, routers: Sequence[TracedRouter], prefix: str
    ) -> Iterator[Part]:
        stratum = None if scope.group is None else self.cells.groups.index(scope.group)
        names = [name_of(scope, "layer")] * len(routers)
        layers: list[float] = [router.layer for router in routers]
        if not prefix:
            names.append(name_of(scope, "model"))
            layers.append(np.nan)
        for i, window in enumerate(WINDOWS):
            states = [self.windows[router.name][i] for router in routers]
            best = [locality.segment_performance(scope.draws(state.cells)) for state in states]
            rates = [state.rates(stratum) for state in states]
            uniform = [np.full(r.num_experts, r.top_k / r.num_experts) for r in routers]
            if not prefix:
                total = np.sum([state.cells for state in states], axis=0)
                best.append(locality.segment_performance(scope.draws(total)))
                rates.append(np.concatenate(rates))
                uniform.append(np.concatenate(uniform))
            srp = np.stack([found.srp for found in best], axis=1)
            rho_hat = np.stack([found.rho_hat for found in best], axis=1)
            metrics: dict[str, tuple[Floats, tuple[float, float]]] = {
                "srp": (srp, (0, 1)),
                "rho_hat": (rho_hat, (0, np.inf)),
            }
            for name, null in (("uniform", uniform), ("skewed", rates)):
                chance = np.array([locality.chance_performance(window, r).srp for r in null])
                metrics[f"srp_chance_{name}"] = (chance[None], (0, 1))
                metrics[f"srp_adjusted_{name}"] = (locality.adjusted(srp, chance), (-np.inf, 1))
            for name, (values, bounds) in metrics.items():
                low, high = basic_interval(values[0], values[1:], bounds=bounds)
                yield {
                    "metric": prefix + name,
                    "scope": np.array(names, object),
                    "layer": layers,
                    "group": scope.group,
                    "m": window,
                    "value": values[0],
                    "low": low,
                    "high": high,
                    "num_tokens": int(self.window_tokens[i, scope.cells].sum()),
                }

    def _expert_window_parts(self, router: TracedRouter, prefix: str) -> Iterator[Part]:
        weights = np.zeros((0, self.num_expert_blocks))
        if self.options.expert_intervals:
            weights = replicate_weights(self.expert_blocks, seed=self.options.seed)
        for i, state in enumerate(self.windows[router.name]):
            place = {
                "scope": "expert",
                "layer": router.layer,
                "expert": np.arange(router.num_experts),
                "m": state.window,
                "num_tokens": int(self.window_tokens[i].sum()),
            }
            best = locality.segment_performance(state.experts.sum(axis=0))
            replicates = [
                locality.segment_performance(np.tensordot(weights, state.experts[:, e], axes=1))
                for e in range(router.num_experts)
            ]
            for name, most in (("srp", 1), ("rho_hat", np.inf)):
                value: Floats = getattr(best, name)
                drawn = np.stack([getattr(found, name) for found in replicates], axis=1)
                low, high = basic_interval(value, drawn, bounds=(0, most))
                yield {"metric": prefix + name, "value": value, "low": low, "high": high, **place}
            rates = state.rates(None)
            uniform = np.full_like(rates, router.top_k / router.num_experts)
            for name, null in (("uniform", uniform), ("skewed", rates)):
                chance = locality.chance_performance(state.window, null[:, None]).srp
                above = locality.adjusted(best.srp, chance)
                yield {"metric": f"{prefix}srp_chance_{name}", "value": chance, **place}
                yield {"metric": f"{prefix}srp_adjusted_{name}", "value": above, **place}

    def _expert_cache_parts(self, routers: Sequence[TracedRouter], prefix: str) -> Iterator[Part]:
        policies = [curve for curve in PRACTICAL if curve.accounting]
        num_rows = len(policies) * sum(router.num_experts**2 for router in routers)
        for router in routers:
            step = router.top_k if num_rows > EXPERT_ROWS else 1
            sizes = np.arange(step, router.num_experts + 1, step)
            hits = self.caches[router.name].experts
            for curve in policies:
                kept = sizes[sizes >= router.top_k] if curve.accounting == "strict" else sizes
                # With as many slots as experts everything is served: hits and cold fills.
                served = (hits[curve] + hits[COLD]).cumsum(axis=1)
                with np.errstate(invalid="ignore"):
                    value = served[:, kept - 1] / served[:, -1:]
                yield {
                    "metric": prefix + curve.metric,
                    "scope": "expert",
                    "layer": router.layer,
                    "expert": np.repeat(np.arange(router.num_experts), len(kept)),
                    "cache_size": np.tile(kept, router.num_experts),
                    "rho": np.tile(kept / router.top_k, router.num_experts),
                    "accounting": curve.accounting,
                    "cold": "hit",
                    "pool": "layer",
                    "value": value.reshape(-1),
                    "num_tokens": int(self.caches[router.name].num_tokens.sum()),
                }


def name_of(scope: Scope, name: str) -> str:
    """What the rows' `scope` is: `group` for all that belongs to one."""
    return name if scope.group is None else "group"


def cache_parts(
    scope: Scope, routers: Sequence[TracedRouter], states: Mapping[str, CacheState], prefix: str
) -> Iterator[Part]:
    """Caches of every layer, and of all layers together, from states by router name."""
    num_tokens = int(states[routers[0].name].num_tokens[scope.cells].sum())
    if scope.group is None:
        for router in routers:
            state = states[router.name]
            yield from curve_rows(
                {curve: scope.draws(hits) for curve, hits in state.hits.items()},
                state.sizes,
                top_k=router.top_k,
                prefix=prefix,
                scope="layer",
                layer=router.layer,
                pool="layer",
                num_tokens=num_tokens,
            )
    if not prefix:
        largest = max(router.num_experts for router in routers)
        total: dict[Curve, Counts] = {}
        for router in routers:
            for curve, hits in states[router.name].hits.items():
                padding = ((0, 0), (0, largest - router.num_experts))
                total[curve] = total.get(curve, 0) + np.pad(hits, padding)
        yield from curve_rows(
            {curve: scope.draws(hits) for curve, hits in total.items()},
            np.arange(1, largest + 1),
            top_k=max(router.top_k for router in routers),
            cold_miss=scope.group is None,
            scope=name_of(scope, "model"),
            group=scope.group,
            pool="layer",
            num_tokens=num_tokens,
        )


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """SRP by layer, cache curves, groups, and experts."""
    yield from srp_by_layer(table)
    for suffix, one in each_trace(table):
        yield from cache_curves(one, suffix)
        yield from srp_by_group(one, suffix)
        yield from srp_by_expert(one, suffix)


def srp_by_layer(table: pd.DataFrame) -> Iterator[Picture]:
    """One panel for each window; chance is shaded."""
    layers = select(table, scope="layer")
    srp = select(layers, metric="srp").dropna(subset="value")
    if srp.empty:
        return
    windows = sorted(srp["m"].unique())
    figure, axes = style.subplots(1, len(windows), height=2.8, sharey=True)
    for panel, m in zip(axes[0], windows, strict=True):
        for i, (trace, line) in enumerate(select(srp, m=m).groupby("trace", sort=False)):
            color = style.COLORS[i % len(style.COLORS)]
            x = line["layer"].to_numpy(int)
            panel.plot(x, line["value"], "o-", color=color, label=trace)
            panel.fill_between(x, line["low"], line["high"], color=color, alpha=0.25, lw=0)
            own = select(layers, metric="srp_chance_skewed", m=m, trace=trace)
            panel.plot(own["layer"].to_numpy(int), own["value"], ":", color=color, lw=1)
        chance = select(layers, metric="srp_chance_uniform", m=m, trace=srp["trace"].iloc[0])
        panel.fill_between(
            chance["layer"].to_numpy(int), 0, chance["value"], color="#dddddd", lw=0, zorder=0
        )
        panel.set(title=f"windows of {int(m)} tokens", xlabel="layer", ylim=(0, 1))
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("SRP")
    if srp["trace"].nunique() > 1:
        axes[0, -1].legend()
    yield Picture(
        name="srp_by_layer",
        caption=(
            "How well one fixed set of experts for each window stands in for the router (1: it "
            "always would). Grey: what tokens that choose at random reach; dotted: the same with "
            "each expert's own frequency. Bands: 95 % intervals."
        ),
        figure=figure,
    )


def cache_curves(table: pd.DataFrame, suffix: str) -> Iterator[Picture]:
    """Hit rates by cache size with the knee, and the size that each layer needs."""
    curves = select(table, scope="model", pool="layer", accounting="strict", cold="hit")
    size = single(table, "cache_size_for", policy="lru", served=0.9)
    if np.isnan(size):
        return
    figure, axes = style.subplots(1, 2, height=3.2, width_ratios=(3, 2))
    left, right = axes[0]
    shown: tuple[tuple[str, int | None, str], ...] = (
        ("belady", None, "Belady (knows the future)"),
        ("sch_cache", 16, "SCH (knows 16 tokens ahead)"),
        ("lru", None, "LRU (least recently used goes)"),
        ("lfu", None, "LFU (least often used goes)"),
    )
    for color, (metric, m, label) in zip(style.COLORS, shown, strict=False):
        line = select(curves, metric=metric, m=m)
        left.plot(line["cache_size"], line["value"], color=color, label=label)
        left.fill_between(
            line["cache_size"].to_numpy(float), line["low"], line["high"],
            color=color, alpha=0.2, lw=0,
        )  # fmt: skip
    knee = single(table, "cache_knee", policy="lru")
    marked, name = (size, "90 % of requests") if np.isnan(knee) else (knee, "the knee")
    rate = single(curves, "lru", cache_size=marked)
    left.plot([marked], [rate], "o", color=style.COLORS[2], ms=7)
    left.axvline(marked, color="#999999", lw=0.8, ls="--", zorder=0)
    left.annotate(
        f"{name}: {int(marked)} experts, {rate:.0%}", (marked, rate),
        xytext=(8, -14), textcoords="offset points",
    )  # fmt: skip
    left.set(xlabel="experts kept per layer", ylabel="requests served", ylim=(0, 1.02))
    left.legend(loc="lower right")
    needed = select(table, metric="cache_size_for", scope="layer", served=0.9)
    for color, (policy, label) in zip(
        (style.COLORS[2], style.COLORS[0]), (("lru", "LRU"), ("belady", "Belady")), strict=True
    ):
        line = select(needed, policy=policy)
        right.plot(line["layer"].to_numpy(int), line["value"], "o-", color=color, label=label)
    right.set(xlabel="layer", title="experts to keep for 90 % of requests")
    right.set_ylim(bottom=0)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    yield Picture(
        name=f"cache_curves{suffix}",
        caption=(
            f"A cache of {int(marked)} experts per layer serves {rate:.0%} of requests (LRU, at "
            f"{name}). Every sequence starts with an empty cache; filling a free slot costs "
            "nothing; an expert that the current token needs is never dropped."
        ),
        figure=figure,
    )


def srp_by_group(table: pd.DataFrame, suffix: str) -> Iterator[Picture]:
    """SRP of every group in windows of 16 tokens."""
    groups = select(table, metric="srp", scope="group", layer=None, m=16).dropna(subset="value")
    if len(groups) < 2:
        return
    groups = groups.sort_values("value")
    figure, axes = style.subplots(height=1.0 + 0.2 * min(len(groups), 60))
    panel = axes[0, 0]
    y = np.arange(len(groups))
    panel.hlines(y, groups["low"].to_numpy(float), groups["high"].to_numpy(float), lw=2)
    panel.plot(groups["value"], y, "o", label="SRP")
    chance = select(table, metric="srp_chance_skewed", scope="group", layer=None, m=16)
    own = chance.set_index("group")["value"].reindex(groups["group"])
    panel.plot(own, y, "|", color="#999999", ms=8, label="chance, own frequencies")
    style.name_ticks(panel, "y", list(groups["group"]))
    panel.set(xlabel="SRP, windows of 16 tokens", ylim=(-0.6, len(groups) - 0.4))
    panel.legend(loc="lower right")
    yield Picture(
        name=f"srp_by_group{suffix}",
        caption=(
            "Local consistency of each group over all layers, with 95 % intervals. Groups whose "
            "intervals overlap are not distinguished by this trace."
        ),
        figure=figure,
    )


def srp_by_expert(table: pd.DataFrame, suffix: str) -> Iterator[Picture]:
    """Layer by expert, windows of 16 tokens."""
    experts = select(table, metric="srp", scope="expert", m=16).dropna(subset="value")
    if experts.empty:
        return
    matrix = experts.pivot(index="layer", columns="expert", values="value")
    chance = select(table, metric="srp_chance_uniform", scope="model", m=16)["value"]
    figure, axes = style.subplots(height=min(6.0, 1.2 + 0.14 * len(matrix)))
    style.heatmap(
        axes[0, 0], matrix.to_numpy(float), rows=[int(layer) for layer in matrix.index], label="SRP"
    )
    axes[0, 0].set(xlabel="expert", ylabel="layer")
    at_chance = f" Random choice gives {chance.iloc[0]:.2f}." if len(chance) else ""
    yield Picture(
        name=f"srp_by_expert{suffix}",
        caption=(
            "How steadily each expert is used: SRP of the single expert in windows of 16 tokens."
            f"{at_chance} Experts that are hardly used stay near 0."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Consistency against chance, and what cache to build."""
    yield from consistency_findings(table)
    yield from cache_findings(table)


def consistency_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Whether the router keeps its experts, where, and for which group."""
    srp, chance, total, beyond = (
        single(table, name, m=16)
        for name in ("srp", "srp_chance_uniform", "srp_adjusted_uniform", "srp_adjusted_skewed")
    )
    if np.isnan(srp):
        return
    layers = select(table, metric="srp", scope="layer", m=16)
    layers = layers.sort_values("value", ascending=False)
    steady = total > 0.02
    text = (
        f"The router {'keeps its experts' if steady else 'does not keep its experts'} from token "
        f"to token: in windows of 16 tokens SRP is {srp:.2f}, by chance {chance:.2f}"
    )
    if steady and len(layers) > 2:
        first, last = layers.iloc[0], layers.iloc[-1]
        text += (
            f"; most in layer {first['layer']} ({first['value']:.2f}), least in layer "
            f"{last['layer']} ({last['value']:.2f})"
        )
    yield Finding(text=f"{text}.", weight=min(1.0, 2 * total) if steady else 0.8, metric="srp")
    if steady and beyond < 0.5 * total:
        yield Finding(
            text=(
                f"{1 - max(beyond, 0.0) / total:.0%} of that consistency is only that some experts "
                "are busier than others everywhere."
            ),
            weight=0.6,
            metric="srp_adjusted_skewed",
        )
    groups = select(table, metric="srp", scope="group", layer=None, m=16).sort_values("value")
    groups = groups.dropna(subset="value")
    if len(groups) > 1:
        least, most = groups.iloc[0], groups.iloc[-1]
        apart = bool(most["low"] > least["high"])
        floors = select(table, metric="srp_chance_skewed", scope="group", layer=None, m=16)
        own = floors.set_index("group")["value"]
        beyond = most["value"] - least["value"] - (own[most["group"]] - own[least["group"]])
        yield Finding(
            text=(
                f"Local consistency is {'higher' if apart else 'about as high'} in {most['group']} "
                f"(SRP {most['value']:.2f}) {'than' if apart else 'as'} in {least['group']} "
                f"({least['value']:.2f}), windows of 16 tokens; how often each group uses each "
                f"expert explains {own[most['group']]:.2f} and {own[least['group']]:.2f} of it."
            ),
            weight=min(1.0, max(0.1, 8 * float(beyond))) if apart else 0.1,
            metric="srp",
        )


def cache_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Sizes of a cache, in words."""
    sizes = select(table, metric="cache_size_for", scope="model")
    curves = select(table, scope="model", pool="layer", accounting="strict", cold="hit")
    if sizes.empty:
        return
    num_experts = int(curves["cache_size"].max())

    def size(policy: str, served: float) -> int:
        return int(single(sizes, "cache_size_for", policy=policy, served=served))

    def rate(policy: str, slots: int) -> float:
        return single(curves, policy, cache_size=slots)

    needed = size("lru", 0.9)
    yield Finding(
        text=(
            f"An LRU cache of {needed} of {num_experts} experts per layer serves 90 % of requests "
            f"(80 %: {size('lru', 0.8)}, 95 %: {size('lru', 0.95)}); with perfect foresight "
            f"{size('belady', 0.9)} would do."
        ),
        weight=max(0.1, 1 - needed / num_experts),
        metric="lru",
    )
    knee = single(table, "cache_knee", policy="lru")
    bend = (
        "The LRU curve has no knee: each further expert kept brings about as much as the last."
        if np.isnan(knee)
        else f"The knee of the LRU curve is at {int(knee)} experts per layer: "
        f"{rate('lru', int(knee)):.0%} of requests (Belady {rate('belady', int(knee)):.0%})."
    )
    yield Finding(text=bend, weight=0.3, metric="cache_knee")


ANALYSIS = Analysis(
    title="Local routing consistency",
    source=(
        "Liang et al., arXiv 2505.16056 (ICLR 2026). Chance levels, strict accounting: moetools."
    ),
    about=(
        "Whether the same few experts serve a run of tokens, and so how large an expert cache must "
        "be. SRP is how well one fixed set of experts per window could stand in for the router; "
        "compare it with its chance level, which depends on how many experts a token selects. "
        "Caches start empty with every sequence and know nothing of the next, so short texts say "
        "little about a cache that stays warm."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
