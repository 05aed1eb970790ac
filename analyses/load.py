"""How evenly a router spreads its tokens over the experts.

Metrics (`layer`; `model` = mean over layers, sum for the `num_` counts; `group` with and without a
layer):

- `load_max_over_mean`: share of the busiest expert over the mean share, 1 to E.
- `load_cv`: standard deviation of the shares (ddof 0) over their mean; 0 is even.
- `load_gini`: Gini coefficient of the shares, 0 (even) to 1 - 1/E.
- `effective_num_experts`: exp of the entropy of the shares, 1 to E: as many equally used experts
  would be as varied.
- `num_dead_experts`: never selected in these tokens. `num_cold_experts`: less than a tenth of the
  mean share, dead ones included. Counts, without interval.
- `load_cv_floor`, `load_gini_floor`: what a router that selects at random would show with as many
  independent tokens. `load_cv_noise`: the same from the differences between blocks of texts,
  hence with the likeness of tokens in one text. A `load_cv` near these says nothing.
- `load_balance` (model and group): 100 times the standard deviation (ddof 1) of the activation
  frequency over all layers and experts.

Expert scope, for the whole trace and for each group: `load_share`, selections of the expert over
all selections of its layer (mean 1/E), and `weight_share`, the same of the weights that multiply
the experts' outputs.

Routers of another kind than the feed-forward ones have the kind before the metric
(`attention_load_cv`), layer and expert scope only.

What would fool you: few tokens, or few texts (shares follow the topic); a dead expert in a small
trace is only an expert not seen yet.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    each_trace,
    layer_rows,
    router_columns,
    rows,
    select,
    single,
)
from moetools.expert_counts import count_selections, sum_weights
from moetools.information import entropy, gini
from moetools.intervals import Cells, Scope, basic_interval
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

COLD = 0.1
MAX_LISTED = 8
BOUNDS = {
    "load_max_over_mean": (1, np.inf),
    "load_cv": (0, np.inf),
    "load_gini": (0, 1),
    "effective_num_experts": (1, np.inf),
}


def start(trace: TraceStore, options: Options) -> "LoadState":
    """An empty state."""
    return LoadState(trace.routers, trace.groups, options)


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections and weights."""
    return router_columns(trace, "experts") + router_columns(trace, "weights")


class LoadState:
    """Selections per cell, sums of weights per group."""

    def __init__(
        self, routers: Sequence[TracedRouter], groups: Sequence[str], options: Options
    ) -> None:
        self.routers, self.options = routers, options
        self.cells = Cells(groups)
        self.counts = {
            router.name: np.zeros((len(self.cells), router.num_experts), dtype=np.int64)
            for router in routers
        }
        self.weights = {
            router.name: np.zeros((len(groups) + 1, router.num_experts)) for router in routers
        }

    def update(self, batch: TraceBatch) -> None:
        """Count the selections of whole sequences."""
        cell = self.cells.add(batch.text, batch.group, batch.lengths)
        group = cell // self.cells.num_blocks
        for router in self.routers:
            ids = batch.tokens[f"experts.{router.name}"]
            count_selections(ids, batch.offsets, cell, self.counts[router.name])
            weights = batch.tokens[f"weights.{router.name}"].astype(np.float32)
            sum_weights(ids, weights, batch.offsets, group, self.weights[router.name])

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        for name in self.counts:
            self.counts[name] += other.counts[name]
            self.weights[name] += other.weights[name]

    def table(self) -> pd.DataFrame:
        """All rows."""
        kinds = dict.fromkeys(router.kind for router in self.routers)
        return pd.concat(
            [
                part
                for scope in self.cells.scopes(seed=self.options.seed)
                for kind in kinds
                for part in self._scope_rows(scope, kind)
            ],
            ignore_index=True,
        )

    def _scope_rows(self, scope: Scope, kind: str) -> Iterator[pd.DataFrame]:
        routers = [router for router in self.routers if router.kind == kind]
        layers = [router.layer for router in routers]
        prefix, is_mlp = ("", True) if kind == "mlp" else (f"{kind}_", False)
        found: dict[str, list[NDArray[np.float64]]] = {}
        tokens = scope.draws(self.cells.num_tokens)[:, None]
        moments, num_experts = np.zeros((2, len(tokens))), 0
        for router in routers:
            counts = scope.draws(self.counts[router.name])
            for name, value in (unevenness(counts) | floors(counts, router.top_k)).items():
                found.setdefault(name, []).append(value)
            frequency = counts / tokens
            moments += frequency.sum(axis=1), (frequency**2).sum(axis=1)
            num_experts += router.num_experts
            yield from self._expert_rows(scope, router, counts, prefix)
        for name, values in found.items():
            pool = np.sum if name.startswith("num_") else np.mean
            yield layer_rows(
                prefix + name,
                scope,
                layers,
                np.stack(values, axis=1),
                bounds=BOUNDS.get(name, (-np.inf, np.inf)),
                pool=pool if is_mlp else None,
            )
        if is_mlp:
            variance = (moments[1] - moments[0] ** 2 / num_experts) / (num_experts - 1)
            balance = 100 * np.sqrt(np.maximum(variance, 0))
            low, high = basic_interval(balance[0], balance[1:], bounds=(0, np.inf))
            yield rows(
                "load_balance", "model" if scope.group is None else "group", balance[0],
                low=low, high=high, group=scope.group, num_tokens=scope.num_tokens,
            )  # fmt: skip

    def _expert_rows(
        self,
        scope: Scope,
        router: TracedRouter,
        counts: NDArray[np.float64],
        prefix: str,
    ) -> Iterator[pd.DataFrame]:
        place = {
            "layer": router.layer,
            "expert": np.arange(router.num_experts),
            "group": scope.group,
            "num_tokens": scope.num_tokens,
        }
        shares, interval = share(counts), {}
        if self.options.expert_intervals:
            low, high = basic_interval(shares[0], shares[1:], bounds=(0, 1))
            interval = {"low": low, "high": high}
        yield rows(f"{prefix}load_share", "expert", shares[0], **place, **interval)
        weights = self.weights[router.name]
        chosen = (
            weights.sum(axis=0)
            if scope.group is None
            else weights[self.cells.groups.index(scope.group)]
        )
        yield rows(f"{prefix}weight_share", "expert", share(chosen), **place)


def share(counts: NDArray[Any]) -> NDArray[np.float64]:
    """[..., E] counts as shares of their sum; NaN where it is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(counts / counts.sum(axis=-1, keepdims=True), dtype=np.float64)


def unevenness(counts: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """[...] metrics of selections [..., E] that have an interval."""
    shares, num_experts = share(counts), counts.shape[-1]
    return {
        "load_max_over_mean": shares.max(axis=-1) * num_experts,
        "load_cv": shares.std(axis=-1) * num_experts,
        "load_gini": gini(counts),
        "effective_num_experts": np.exp(entropy(counts)),
    }


def floors(counts: NDArray[np.float64], top_k: int) -> dict[str, NDArray[np.float64]]:
    """Numbers of unused experts, and what chance alone would show: [1] each.

    Args:
        counts: [1 + B, E] selections and bootstrap replicates of them.
        top_k: Experts that one token selects.
    """
    total, num_experts = counts[:1], counts.shape[1]
    num_selections = total.sum(axis=1)
    with np.errstate(divide="ignore"):
        floor = np.sqrt((num_experts - top_k) / num_selections)
    return {
        "num_dead_experts": (total == 0).sum(axis=1),
        "num_cold_experts": (total * num_experts < COLD * num_selections).sum(axis=1),
        "load_cv_floor": floor,
        "load_gini_floor": floor / np.sqrt(np.pi),
        "load_cv_noise": num_experts * np.sqrt(share(counts[1:]).var(axis=0).mean(keepdims=True)),
    }


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Shares of all experts, and unevenness by layer."""
    from moetools.reporting import charts, style

    for suffix, one in each_trace(table):
        shares = select(one, metric="load_share", scope="expert", group=None)
        if shares.empty:
            continue
        values, layers, _ = charts.matrix(shares)
        ratio = values * np.isfinite(values).sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            levels = np.log2(ratio)
        figure, axes = style.subplots(height=charts.heatmap_height(len(layers)))
        style.heatmap(
            axes[0, 0], np.maximum(levels, -5), rows=layers, center=0, vmin=-3, vmax=3,
            label="load over mean (log2)",
        )  # fmt: skip
        axes[0, 0].set(xlabel="expert", ylabel="layer")
        yield Picture(
            name=f"load_by_expert{suffix}",
            caption=(
                "How often each expert is selected, on a logarithmic scale around the mean of its "
                "layer: +1 is twice the mean, -1 half of it. Light grey: the layer has no such "
                "expert."
            ),
            figure=figure,
        )
    figure, axes = style.subplots(1, 2, height=2.6)
    for panel, metric, label in (
        (axes[0, 0], "load_cv", "coefficient of variation"),
        (axes[0, 1], "effective_num_experts", "effective number of experts"),
    ):
        charts.lines_by_layer(panel, select(table, metric=metric, scope="layer"))
        panel.set_ylabel(label)
        panel.set_ylim(0, 1.08 * panel.dataLim.ymax)
    noise = select(table, metric="load_cv_noise", scope="layer")
    charts.lines_by_layer(axes[0, 0], noise, label="noise", ls=":", marker="", color="#888888")
    axes[0, 0].legend()
    if table["trace"].nunique() > 1:
        axes[0, 1].legend()
    yield Picture(
        name="load_by_layer",
        caption=(
            "Unevenness of the load by layer with 95 % intervals. Left: 0 is even; near the dotted "
            "line it is not more than texts differ by accident. Right: as many equally used "
            "experts would be as varied."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Dead experts, the most uneven layer, and how many experts are in use."""
    shares = select(table, metric="load_share", scope="expert", group=None)
    if shares.empty:
        return
    num_tokens = int(shares["num_tokens"].iloc[0])
    yield from dead_findings(shares, num_tokens)
    per_layer = {
        int(layer): select(shares, layer=layer)["value"].to_numpy(float)
        for layer in shares["layer"].unique()
    }
    layer, values = max(per_layer.items(), key=lambda item: np.sort(item[1])[-1] * len(item[1]))
    size = max(1, len(values) // 16)
    top = float(np.sort(values)[-size:].sum())
    yield Finding(
        text=(
            f"Layer {layer} is the most uneven: {top:.0%} of its selections go to {size} of "
            f"{len(values)} experts (evenly it would be {size / len(values):.0%})."
        ),
        weight=float(np.clip((top * len(values) / size - 1) / 8, 0, 1)),
        metric="load_share",
    )
    cv, noise = single(table, "load_cv"), single(table, "load_cv_noise")
    effective = single(table, "effective_num_experts")
    mean_experts = float(np.mean([len(values) for values in per_layer.values()]))
    known = np.isfinite(noise)
    within = known and cv < 2 * noise
    yield Finding(
        text=(
            f"On average over layers the load is as varied as {effective:.1f} equally used experts "
            f"of {mean_experts:.0f}; its coefficient of variation is {cv:.2f}"
            + (f", of which differences between texts explain up to {noise:.2f}." if known else ".")
        ),
        weight=0.0 if within else float(np.clip(1.5 * (1 - effective / mean_experts), 0, 1)),
        metric="effective_num_experts",
    )


def dead_findings(shares: pd.DataFrame, num_tokens: int) -> Iterator[Finding]:
    """Experts that were never selected, or that all were."""
    dead = shares[shares["value"] == 0]
    if dead.empty:
        text = f"Every one of {len(shares)} experts was selected in {num_tokens:,} tokens."
        yield Finding(text=text, weight=0.0, metric="num_dead_experts")
        return
    layers = [str(layer) for layer in sorted(dead["layer"].unique())]
    where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
    if len(layers) > MAX_LISTED:
        where = f"in {len(layers)} layers"
    yield Finding(
        text=(
            f"{len(dead)} of {len(shares)} experts {'was' if len(dead) == 1 else 'were'} never "
            f"selected in {num_tokens:,} tokens ({where})."
        ),
        weight=float(np.clip(0.5 + 5 * len(dead) / len(shares), 0, 1)),
        metric="num_dead_experts",
    )


ANALYSIS = Analysis(
    title="Load",
    source="Load balance: Liang et al., arXiv 2505.16056, section 4. The rest: moetools.",
    about=(
        "How evenly the router spreads tokens over the experts of a layer. An even load uses all "
        "parameters; a concentrated one means that a few experts decide. With few tokens every "
        "router looks uneven: compare with the floor. A dead expert is one not selected in these "
        "tokens, other texts may still need it."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
)
