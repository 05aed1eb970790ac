"""Which experts contribute most, by the scores that pruning methods use, and super experts.

For the tokens that select expert e, with g the weight that multiplies its output f. Expert scope;
`num_tokens` is how many tokens these are. An expert without any has score 0 and `num_tokens` 0:
that means no data, not useless.

- `gate_mean`: mean of g. (How often an expert is selected, and the sum of g, as shares of the
  layer, are `load_share` and `weight_share` of `load`.)
- With `trace --keep norms` or `outputs`: `ean_sum` and `ean_mean`, sum and mean of the length of f;
  `weighted_ean_sum`, sum of g times the length; `reap`, its mean, the saliency of REAP.
- With `trace --keep outputs`: `max_output`, the largest channel of f in absolute value;
  `output_share`, mean of what g f adds to the layer's routed output along that output, as a share.

`tokens` is `all`, or `not_first` without the first token of each sequence, which often has an
output of another size. The unit of lengths and channels is that of the hidden states.

- `super_expert`: `max_output` of an expert above two thresholds, `super_expert_percentile` (99.5 %
  of all largest outputs) and `super_expert_tenth` (a tenth of the largest one), in the first 75 %
  of the layers, taken for those that form massive activations; `num_super_experts`. The rule names
  the largest one in every model: `super_expert_gap` is the least of them over the largest of the
  others (6.8 in Qwen3-30B-A3B). Refused where the model has fewer than 200 experts in all.
- `score_correlation` (layer; model is the mean): Spearman's correlation over the experts between
  `score` and `score_b`. Scores also: `selections`, `gate_mass`. Experts without data are left out.
- `score_gini`: inequality of a `score` within a layer, 0 if all experts have the same.
- `num_covering`: the fewest experts that receive a `share` of 0.5, 0.9, 0.99 of the selections.

Intervals are over texts; single experts have them with `--expert-intervals`, largest outputs
none. Scores of few tokens are noisy, which lowers correlations; the interval allows for that and
may lie above the number. Feed-forward routers only.

What would fool you: every score depends on the texts; an expert that these texts do not need may be
what others need. Low scores say that removing the expert changes the layer's output little, not
that the loss stays (`moetools probe` measures that). The largest output of few tokens is too small.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import importance
from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    State,
    each_trace,
    mlp_routers,
    select,
    single,
    stacked,
)
from moetools.coupling import unit_ranks
from moetools.importance import SuperExperts
from moetools.information import gini
from moetools.intervals import Cells, Scope, basic_interval
from moetools.trace_store import TraceBatch, TraceStore

RECORDED = ("norms", "peaks", "shares")
NEEDS = {
    "ean_sum": "norms",
    "ean_mean": "norms",
    "weighted_ean_sum": "norms",
    "reap": "norms",
    "max_output": "peaks",
    "output_share": "shares",
}
"""What a score needs of the trace; the others need nothing."""
ELSEWHERE = ("selections", "gate_mass")
"""Scores whose rows are in `load`."""
COUNTED = {"norms": "with_norm", "shares": "with_share"}
SHARES = (0.5, 0.9, 0.99)
BOUNDS = {"num_covering": (1, np.inf), "score_gini": (0, 1), "score_correlation": (-1, 1)}
MAX_LISTED = 5
CLEAR_GAP = 3.0
LABELS = {
    "selections": "selections",
    "gate_mass": "gate mass",
    "gate_mean": "gate mean",
    "ean_sum": "EAN sum",
    "ean_mean": "EAN mean",
    "weighted_ean_sum": "weighted EAN",
    "reap": "REAP",
    "max_output": "max output",
    "output_share": "output share",
}


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, weights and what was kept of the experts' outputs."""
    if not mlp_routers(trace):
        return "The trace has no router of feed-forward experts."
    names = [
        f"{family}.{router.name}"
        for router in mlp_routers(trace)
        for family in ("experts", "weights", *RECORDED)
    ]
    return [name for name in names if name in trace.columns]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """Scores of the experts' outputs need them recorded."""
    if "outputs" in trace.manifest.keep:
        return ()
    if "norms" in trace.manifest.keep:
        return ("No largest outputs, hence no super experts, and no output shares: they need "
                "trace --keep outputs.",)  # fmt: skip
    return (
        "No scores of the experts' outputs (EAN, REAP, super experts): they need trace --keep "
        "outputs.",
    )


def start(trace: TraceStore, options: Options) -> "ImportanceState":
    """An empty state."""
    return ImportanceState(trace, options)


class ImportanceState:
    """Per block of texts: sums and largest outputs of every expert."""

    def __init__(self, trace: TraceStore, options: Options) -> None:
        self.routers, self.options = mlp_routers(trace), options
        self.recorded = [
            family for family in RECORDED if f"{family}.{self.routers[0].name}" in trace.columns
        ]
        known = trace.manifest.config.get("num_hidden_layers")
        self.num_layers = int(known or 1 + max(router.layer for router in self.routers))
        self.cells = Cells(())
        self.sums = {
            router.name: np.zeros((len(self.cells), 2, router.num_experts, len(importance.FIELDS)))
            for router in self.routers
        }
        self.maxima = {name: np.zeros(sums.shape[:3]) for name, sums in self.sums.items()}

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences."""
        cell = self.cells.add(batch.text, np.full_like(batch.group, -1), batch.lengths)
        for router in self.routers:
            name = router.name
            ids = batch.tokens[f"experts.{name}"]
            nothing = np.zeros((0, ids.shape[1]), dtype=np.float32)
            kept = [
                batch.tokens[f"{family}.{name}"] if family in self.recorded else nothing
                for family in RECORDED
            ]
            importance.add_scores(
                ids,
                batch.tokens[f"weights.{name}"].astype(np.float32),
                *kept,
                batch.offsets,
                cell,
                self.sums[name],
                self.maxima[name],
            )

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        for name in self.sums:
            self.sums[name] += other.sums[name]
            np.maximum(self.maxima[name], other.maxima[name], out=self.maxima[name])

    def table(self) -> pd.DataFrame:
        """All rows."""
        (scope,) = self.cells.scopes(seed=self.options.seed)
        return stacked([*self._expert_rows(scope), *self._layer_rows(scope), *self._super_rows()])

    def _available(self, scores: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
        return {
            name: values
            for name, values in scores.items()
            if name not in NEEDS or NEEDS[name] in self.recorded
        }

    def _scores(self, scope: Scope, name: str, tokens: str) -> dict[str, NDArray[np.float64]]:
        """[1 + R, E] each score of one router and its replicates."""
        first = 1 if tokens == "not_first" else 0
        found = importance.scores(scope.draws(self.sums[name][:, first:].sum(axis=1)))
        maxima = self.maxima[name][:, first:].max(axis=1)
        found["max_output"] = importance.drawn_maxima(maxima[scope.cells], scope.weights)
        return self._available(found)

    def _expert_rows(self, scope: Scope) -> Iterator[dict[str, Any]]:
        for router in self.routers:
            totals = self.sums[router.name].sum(axis=0)
            for tokens, part in (("all", totals.sum(axis=0)), ("not_first", totals[1])):
                counted = dict(zip(importance.FIELDS, part.T, strict=True))
                found = self._scores(scope, router.name, tokens)
                for score, draws in found.items():
                    if score in ELSEWHERE:
                        continue
                    row = {
                        "metric": score,
                        "scope": "expert",
                        "layer": router.layer,
                        "expert": np.arange(router.num_experts),
                        "value": draws[0],
                        "tokens": tokens,
                        "num_tokens": counted[COUNTED.get(NEEDS.get(score, ""), "count")],
                    }
                    if self.options.expert_intervals and score != "max_output":
                        row["low"], row["high"] = basic_interval(draws[0], draws[1:])
                    yield row

    def _layer_rows(self, scope: Scope) -> Iterator[dict[str, Any]]:
        """What summarises a layer, and its mean over the layers."""
        drawn: dict[tuple[tuple[str, Any], ...], list[NDArray[np.float64]]] = {}
        for router in self.routers:
            for key, draws in self._summaries(scope, router.name):
                drawn.setdefault(key, []).append(draws)
        layers = [router.layer for router in self.routers]
        for key, of_layers in drawn.items():
            draws = np.stack(of_layers, axis=1)
            known = np.isfinite(draws[0])
            pooled = draws[:, known].mean(axis=1) if known.any() else draws[:, 0]
            draws = np.column_stack([draws, pooled])
            low, high = basic_interval(draws[0], draws[1:], bounds=BOUNDS[dict(key)["metric"]])
            place = {**dict(key), "num_tokens": scope.num_tokens}
            yield {
                **place, "scope": "layer", "layer": np.array(layers), "value": draws[0, :-1],
                "low": low[:-1], "high": high[:-1],
            }  # fmt: skip
            yield {
                **place, "scope": "model", "value": draws[0, -1], "low": low[-1], "high": high[-1],
            }  # fmt: skip

    def _summaries(
        self, scope: Scope, name: str
    ) -> Iterator[tuple[tuple[tuple[str, Any], ...], NDArray[np.float64]]]:
        """Metric and parameters of each summary of a router, with its draws [1 + R]."""
        found = self._scores(scope, name, "all")
        seen = np.flatnonzero(found["selections"][0] > 0)
        for share in SHARES:
            yield (
                (("metric", "num_covering"), ("share", share)),
                importance.num_covering(found["selections"], share),
            )
        for score, draws in found.items():
            if score not in ELSEWHERE and score != "output_share":
                yield (("metric", "score_gini"), ("score", score)), gini(draws)
        ranks = {score: unit_ranks(draws[:, seen], 1) for score, draws in found.items()}
        for one, other in combinations(ranks, 2):
            yield (
                (("metric", "score_correlation"), ("score", one), ("score_b", other)),
                importance.rank_correlation(ranks[one], ranks[other]),
            )

    def _super_rows(self) -> Iterator[dict[str, Any]]:
        found = self._super_experts()
        if found is None:
            return
        place = {"scope": "model", "num_tokens": int(self.cells.num_tokens.sum())}
        yield {"metric": "num_super_experts", "value": len(found.experts), **place}
        yield {"metric": "super_expert_percentile", "value": found.percentile, **place}
        yield {"metric": "super_expert_tenth", "value": found.tenth, **place}
        yield {"metric": "super_expert_gap", "value": found.gap, **place}
        for layer, expert, value in found.experts:
            yield {
                **place, "metric": "super_expert", "scope": "expert", "layer": layer,
                "expert": expert, "value": value,
            }  # fmt: skip

    def _super_experts(self) -> SuperExperts | None:
        if "peaks" not in self.recorded:
            return None
        maxima = {r.layer: self.maxima[r.name].max(axis=(0, 1)) for r in self.routers}
        return importance.super_experts(maxima, self.num_layers)


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """REAP saliency, agreement of the scores, and largest outputs."""
    from moetools.reporting import charts, style

    for suffix, one in each_trace(table):
        saliency = select(one, metric="reap", scope="expert", tokens="all")
        if saliency.empty:
            continue
        values, layers, _ = charts.matrix(saliency)
        figure, axes = style.subplots(height=charts.heatmap_height(len(layers)))
        with np.errstate(divide="ignore", invalid="ignore"):
            levels = np.log2(values / np.nanmean(np.where(values > 0, values, np.nan), 1)[:, None])
        levels[~np.isfinite(levels)] = np.nan
        style.heatmap(axes[0, 0], levels, rows=layers, center=0, label="REAP / mean (log2)")
        axes[0, 0].set(xlabel="expert", ylabel="layer")
        yield Picture(
            name=f"reap_by_expert{suffix}",
            caption=(
                "REAP saliency of each expert, weight times output length averaged over the tokens "
                "that select it, on a logarithmic scale around the mean of its layer. Light grey: "
                "no data."
            ),
            figure=figure,
        )
        yield from largest_outputs(one, suffix)
    for suffix, one in each_trace(table):
        pairs = select(one, metric="score_correlation", scope="model")
        names = [name for name in LABELS if name in {*pairs["score"], *pairs["score_b"]}]
        if len(names) < 3:
            continue
        matrix = np.eye(len(names))
        for first, second, value in zip(
            pairs["score"], pairs["score_b"], pairs["value"], strict=True
        ):
            i, j = names.index(first), names.index(second)
            matrix[i, j] = matrix[j, i] = value
        figure, axes = style.subplots(height=3.2)
        labels = [LABELS[name] for name in names]
        style.heatmap(
            axes[0, 0], matrix, rows=labels, columns=labels, center=0, vmin=-1, vmax=1,
            label="rank correlation",
        )  # fmt: skip
        yield Picture(
            name=f"score_agreement{suffix}",
            caption=(
                "Whether two scores put the experts of a layer in the same order: Spearman's "
                "correlation over the experts, mean over layers."
            ),
            figure=figure,
        )


def largest_outputs(table: pd.DataFrame, suffix: str) -> Iterator[Picture]:
    """The largest output of every expert by layer, with the thresholds of super experts."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    from moetools.reporting import style

    peaks = select(table, metric="max_output", scope="expert", tokens="all")
    peaks = peaks[peaks["value"] > 0]
    if peaks.empty:
        return
    figure, axes = style.subplots(height=2.8)
    panel = axes[0, 0]
    panel.plot(peaks["layer"].to_numpy(int), peaks["value"], ".", color=style.COLORS[0], alpha=0.5)
    found = select(table, metric="super_expert", scope="expert")
    panel.plot(found["layer"].to_numpy(int), found["value"], "o", color=style.COLORS[1])
    for metric, line in (("super_expert_percentile", "--"), ("super_expert_tenth", ":")):
        threshold = single(table, metric)
        if np.isfinite(threshold):
            panel.axhline(threshold, ls=line, color="#888888", label=metric.split("_")[-1])
    panel.set_yscale("log")
    panel.set(xlabel="layer", ylabel="largest channel of an output")
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.yaxis.set_minor_formatter(NullFormatter())
    yield Picture(
        name=f"largest_outputs{suffix}",
        caption=(
            "Largest channel of each expert's output, one dot for each expert. Orange: super "
            "experts, above both thresholds (dashed: 99.5 % of all, dotted: a tenth of the "
            "largest) in the first 75 % of the layers."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Super experts, how far the scores agree, and how many experts do most of the work."""
    yield from super_findings(table)
    pairs = select(table, metric="score_correlation", scope="model").dropna(subset=["value"])
    for one, other in (("selections", "reap"), ("selections", "gate_mass")):
        pair = pairs[(pairs["score"] == one) & (pairs["score_b"] == other)]
        if len(pair):
            value = float(pair["value"].iloc[0])
            yield Finding(
                text=(
                    f"{LABELS[one].capitalize()} and {LABELS[other]} order the experts of a layer "
                    f"with a rank correlation of {value:.2f} on average"
                    + ("." if value > 0.7 else ": a ranking by one is not one by the other.")
                ),
                weight=float(np.clip(0.6 - 0.6 * value, 0, 0.8)),
                metric="score_correlation",
            )
            break
    covering = select(table, metric="num_covering", scope="model", share=0.9)
    if len(covering) and np.isfinite(covering["value"].iloc[0]):
        experts = select(table, metric="gate_mean", scope="expert", tokens="all")
        size = len(experts) / experts["layer"].nunique()
        yield Finding(
            text=(
                f"On average over layers {covering['value'].iloc[0]:.1f} of {size:.0f} experts "
                "receive 90 % of the selections."
            ),
            weight=0.1,
            metric="num_covering",
        )


def super_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Super experts, or the largest outputs where the rule says nothing."""
    peaks = select(table, metric="max_output", scope="expert", tokens="all")
    if peaks.empty:
        return
    found = select(table, metric="super_expert", scope="expert")
    shown = (found if len(found) else peaks).nlargest(MAX_LISTED, "value")
    listed = ", ".join(
        f"layer {layer} expert {expert} ({value:.3g})"
        for layer, expert, value in zip(
            shown["layer"], shown["expert"], shown["value"], strict=True
        )
    )
    if found.empty:
        text = f"The largest outputs are {listed}."
        if len(peaks) < importance.MIN_EXPERTS:
            text = (
                f"{len(peaks)} experts are too few to call one a super expert "
                f"({importance.MIN_EXPERTS} are needed); the largest outputs are {listed}."
            )
        yield Finding(text=text, weight=0.1, metric="max_output")
        return
    gap = single(table, "super_expert_gap")
    clear = gap >= CLEAR_GAP
    verdict = (
        "do not prune, merge or freeze them"
        if clear
        else f"the rule names one in every model, and below a factor of {CLEAR_GAP:g} says little"
    )
    next_one = f" The next one is smaller by a factor of {gap:.1f}: {verdict}."
    percentile, tenth = (single(table, f"super_expert_{name}") for name in ("percentile", "tenth"))
    yield Finding(
        text=(
            f"{len(found)} super expert{'s' if len(found) > 1 else ''} by the published rule "
            f"(largest output above {percentile:.3g} and {tenth:.3g}): {listed}."
            f"{next_one if np.isfinite(gap) else ''}"
        ),
        weight=1.0 if clear else 0.2,
        metric="super_expert",
    )


ANALYSIS = Analysis(
    title="Importance",
    source="REAP: arXiv 2510.13999. Super experts: arXiv 2507.23279. Output share: moetools.",
    about=(
        "Which experts contribute most, by the scores that pruning and freezing methods use: how "
        "much they are weighted, how long their outputs are, and both. The scores need not agree. "
        "A low score is no permission to remove an expert, and one without data says nothing."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
