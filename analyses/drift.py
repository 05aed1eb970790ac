"""How the routing of the same texts differs from that of the first trace.

A is the first trace of a report (or the A of `moetools diff A B`), B the one it is compared with;
both hold the same tokens. Means over tokens:

- `overlap_at_k`: the share of A's experts of a token that B selects too.
  `overlap_chance`: what two routings with these loads would share if they knew nothing of each
  other, the floor under it.
- `jaccard`: experts that both select over experts that either does. `exact_set`: share of tokens
  with equal sets. `top1_agreement`: share of tokens whose expert of largest weight is the same.
- `weighted_overlap`: sum over experts of the smaller of both weights; the weights of a token sum
  to 1.
- `overlap_by_margin`, `exact_by_margin` with the parameter `decile`: `overlap_at_k` and
  `exact_set` of the tenth of the tokens with the smallest (1) to the largest (10) margin in A,
  where A's margins were recorded. Low deciles are near ties, which any rounding can turn.

Of the share of selections that each expert gets:

- `load_js`: Jensen-Shannon divergence, base 2, 0 to 1. `load_l1`: sum of absolute differences.
  `load_tv`: half of it, the share of selections that would have to move.
- `load_entropy_change`: entropy of B's load minus that of A's, in nats.

Where probabilities or losses were recorded in both:

- `token_entropy_change`: mean entropy of the probabilities of a token, B minus A, in nats.
- `nll_change`: mean negative log-likelihood of a token, B minus A, in nats, and over that of A
  `nll_change_relative`. `nll_difference_p`: p value of no change. `nll_equivalence_p`: the larger
  p value of two one-sided tests of a change of `nll_margin` (0.5 % of A's) or more; below 0.05
  the losses are equivalent.

Scopes: `layer`, `model` (mean over layers), `group` with and without a layer. Feed-forward routers
only; tokens that both drop are left out.

What would fool you: the same model does not agree with itself when it runs with another batch
size, dtype or kernel. `moetools diff A B --floor A2` prints that agreement beside every number.
Experts have no order across models: in models that were not trained from one another, or whose
experts were permuted, the overlap is near chance however alike they are.
"""

from collections.abc import Iterator, Sequence
from typing import Self

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
    mlp_routers,
    rows,
    select,
    single,
)
from moetools.drift import (
    MARGIN_SUMS,
    NUM_DECILES,
    NUM_MARGINS,
    SUMS,
    compare_by_margin,
    compare_selections,
    decile_shares,
    margin_bins,
    selection_metrics,
)
from moetools.equivalence import ratio_values, tost_paired
from moetools.expert_counts import count_selections
from moetools.intervals import Cells, Scope, basic_interval
from moetools.paired_traces import PairedReader, same_tokens
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

BOUNDS = {
    "load_l1": (0.0, 2.0),
    "load_entropy_change": (-np.inf, np.inf),
    "token_entropy_change": (-np.inf, np.inf),
}
NLL_MARGIN = 0.005
LEVEL = 0.05


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, weights, and entropies and losses where both traces have them."""
    reference = options.reference
    if reference is None:
        return (
            "It compares a trace with another one of the same texts: name two traces, or use "
            "`moetools diff A B`."
        )
    reason = _routers_differ(trace, reference)
    if reason is not None:
        return reason
    if not same_tokens(trace, reference):
        return (
            f"Its tokens are not those of {reference.name}: trace the same texts with both models, "
            "with the same --sequence-length and limits."
        )
    return _columns(trace, reference)


def _routers_differ(trace: TraceStore, reference: TraceStore) -> str | None:
    """Why routers cannot be compared, if they cannot."""
    own, others = ({r.name: r for r in mlp_routers(each)} for each in (trace, reference))
    if not own or not others:
        return "The trace has no router of feed-forward experts."
    alone = sorted(own.keys() ^ others.keys())
    if alone:
        where = trace.name if alone[0] in own else reference.name
        return f"Only {where} has router {alone[0]}: there is nothing to compare it with."
    for name, router in own.items():
        if router.num_experts != others[name].num_experts:
            return (
                f"Router {name} has {router.num_experts} experts, in {reference.name} "
                f"{others[name].num_experts}: their selections cannot be compared."
            )
    return None


def _columns(trace: TraceStore, reference: TraceStore) -> list[str]:
    """What is read of both traces."""
    families = ("experts", "weights", "entropy")
    names = [f"{family}.{router.name}" for router in mlp_routers(trace) for family in families]
    return [name for name in ("nll", *names) if name in trace.columns & reference.columns]


def start(trace: TraceStore, options: Options) -> "DriftState":
    """An empty state."""
    assert options.reference is not None
    return DriftState(trace, options.reference, options)


class DriftState:
    """Per cell: sums of comparisons and both loads; per block: comparisons by margin."""

    def __init__(self, trace: TraceStore, reference: TraceStore, options: Options) -> None:
        names = _columns(trace, reference)
        self.routers: list[TracedRouter] = mlp_routers(trace)
        margins = [f"margin.{router.name}" for router in self.routers]
        margins = [name for name in margins if name in reference.columns]
        self.reader = PairedReader(reference, [*names, *margins])
        self.top_k = {router.name: reference.router(router.name).top_k for router in self.routers}
        self.options = options
        self.cells, self.blocks = Cells(trace.groups), Cells(())
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.loads: dict[str, NDArray[np.int64]] = {}
        self.by_margin: dict[str, NDArray[np.uint32]] = {}
        self.entropies: dict[str, NDArray[np.float64]] = {}
        size = len(self.cells)
        for router in self.routers:
            name = router.name
            self.sums[name] = np.zeros((size, len(SUMS)))
            self.loads[name] = np.zeros((2, size, router.num_experts), dtype=np.int64)
            if f"margin.{name}" in margins:
                shape = (len(self.blocks), NUM_MARGINS, len(MARGIN_SUMS))
                self.by_margin[name] = np.zeros(shape, dtype=np.uint32)
            if f"entropy.{name}" in names:
                self.entropies[name] = np.zeros((size, 2))
        self.losses = np.zeros((size, 3)) if "nll" in names else None

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences, and the same ones of the reference."""
        pair = self.reader.matching(batch)
        cell = self.cells.add(batch.text, batch.group, batch.lengths)
        block = self.blocks.add(batch.text, np.full_like(batch.group, -1), batch.lengths)
        for router in self.routers:
            name, num_experts = router.name, router.num_experts
            ids_a, ids_b = (each.tokens[f"experts.{name}"] for each in (pair, batch))
            weights_a, weights_b = (
                each.tokens[f"weights.{name}"].astype(np.float32) for each in (pair, batch)
            )
            compare_selections(
                ids_a, ids_b, weights_a, weights_b, num_experts, batch.offsets, cell,
                self.sums[name],
            )  # fmt: skip
            for ids, load in zip((ids_a, ids_b), self.loads[name], strict=True):
                count_selections(ids, batch.offsets, cell, load)
            if name in self.by_margin:
                bins = margin_bins(pair.tokens[f"margin.{name}"])
                compare_by_margin(
                    ids_a, ids_b, bins, num_experts, batch.offsets, block, self.by_margin[name]
                )
            if name in self.entropies:
                column = f"entropy.{name}"
                both = np.stack([pair.sequences[column], batch.sequences[column]], axis=1)
                np.add.at(self.entropies[name], cell, both * batch.lengths[:, None])
        if self.losses is not None:
            np.add.at(self.losses, cell, loss_sums(pair, batch))

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        self.blocks.merge(other.blocks)
        for name in self.sums:
            self.sums[name] += other.sums[name]
            self.loads[name] += other.loads[name]
        for name in self.by_margin:
            self.by_margin[name] += other.by_margin[name]
        for name in self.entropies:
            self.entropies[name] += other.entropies[name]
        if self.losses is not None and other.losses is not None:
            self.losses += other.losses

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.concat([*self._rows(), *self._margin_rows()], ignore_index=True)

    def _rows(self) -> Iterator[pd.DataFrame]:
        for scope in self.cells.scopes(seed=self.options.seed):
            values: dict[str, list[NDArray[np.float64]]] = {}
            layers: dict[str, list[int]] = {}
            for router in self.routers:
                name = router.name
                load_a, load_b = (scope.draws(load) for load in self.loads[name])
                found = selection_metrics(scope.draws(self.sums[name]), load_a, load_b)
                if name in self.entropies:
                    sums = scope.draws(self.entropies[name])
                    tokens = scope.draws(self.cells.num_tokens[:, None])[:, 0]
                    found["token_entropy_change"] = (sums[:, 1] - sums[:, 0]) / tokens
                for metric, draws in found.items():
                    values.setdefault(metric, []).append(draws)
                    layers.setdefault(metric, []).append(router.layer)
            for metric, of_layers in values.items():
                draws = np.stack(of_layers, axis=1)
                bounds = BOUNDS.get(metric, (0.0, 1.0))
                yield layer_rows(metric, scope, layers[metric], draws, bounds=bounds)
            if self.losses is not None:
                yield from loss_rows(self.losses, scope)

    def _margin_rows(self) -> Iterator[pd.DataFrame]:
        """Overlap by tenths of the tokens, in the order of their margin."""
        scope = next(self.blocks.scopes(seed=self.options.seed))
        layers: list[int] = []
        values: list[NDArray[np.float64]] = []
        for router in self.routers:
            by_margin = self.by_margin.get(router.name)
            if by_margin is None or not by_margin[..., 0].any():
                continue
            shares = decile_shares(by_margin[..., 0].sum(axis=0))
            sums = np.einsum("dn,bnm->bdm", shares, by_margin.astype(np.float64))
            draws = scope.draws(sums)
            with np.errstate(divide="ignore", invalid="ignore"):
                draws = draws[..., 1:] / draws[..., :1]
            draws[..., 0] /= self.top_k[router.name]
            values.append(draws)
            layers.append(router.layer)
        if not layers:
            return
        for i, metric in enumerate(("overlap_by_margin", "exact_by_margin")):
            for decile in range(NUM_DECILES):
                draws = np.stack([each[:, decile, i] for each in values], axis=1)
                yield layer_rows(metric, scope, layers, draws, bounds=(0.0, 1.0), decile=decile + 1)


def loss_sums(pair: TraceBatch, batch: TraceBatch) -> NDArray[np.float64]:
    """[S, 3] predicted tokens of each sequence, and times them the losses of A and B."""
    losses = np.stack([pair.sequences["nll"], batch.sequences["nll"]], axis=1).astype(np.float64)
    predicted = np.where(np.isfinite(losses).all(axis=1), batch.lengths - 1, 0)
    return np.column_stack(
        [predicted, np.where(predicted[:, None], losses, 0) * predicted[:, None]]
    )


def loss_rows(losses: NDArray[np.float64], scope: Scope) -> Iterator[pd.DataFrame]:
    """Change of the loss of some sequences, with tests; nothing without predicted tokens.

    Args:
        losses: [cells, 3] made by `loss_sums`.
        scope: The sequences.
    """
    blocks = losses[scope.cells]
    blocks = blocks[blocks[:, 0] > 0]
    if not len(blocks):
        return
    draws = scope.draws(losses)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss_a, loss_b = (draws[:, 1:] / draws[:, :1]).T
        changes = {"nll_change": loss_b - loss_a, "nll_change_relative": loss_b / loss_a - 1}
    kind = "model" if scope.group is None else "group"
    common = {"group": scope.group, "num_tokens": scope.num_tokens}
    for metric, values in changes.items():
        low, high = basic_interval(values[0], values[1:])
        yield rows(metric, kind, values[0], low=low, high=high, **common)
    margin = NLL_MARGIN * loss_a[0]
    if not margin > 0:
        return
    yield rows("nll_margin", kind, margin, **common)
    differences = ratio_values(blocks[:, 2] - blocks[:, 1], blocks[:, 0])
    test = tost_paired(differences, margin=margin, level=LEVEL)
    yield rows("nll_difference_p", kind, test.p_zero, **common)
    yield rows("nll_equivalence_p", kind, max(test.p_lower, test.p_upper), **common)


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Overlap by layer and by margin, and the shift of the load."""
    from moetools.reporting import charts, style

    figure, axes = style.subplots(1, 2, height=2.8)
    left, right = axes[0]
    charts.lines_by_layer(left, _layers(table, "overlap_at_k"), label="same experts")
    if table["trace"].nunique() == 1:
        charts.lines_by_layer(
            left, _layers(table, "exact_set"), label="same set", color=style.COLORS[1]
        )
    chance = {"ls": ":", "marker": ""}
    charts.lines_by_layer(left, _layers(table, "overlap_chance"), label="chance", **chance)
    left.set(ylabel="share", ylim=(0, 1.02))
    left.legend(loc="best")
    charts.lines_by_layer(right, _layers(table, "load_tv"))
    right.set(ylabel="load that moved")
    right.set_ylim(bottom=0)
    if table["trace"].nunique() > 1:
        right.legend()
    yield Picture(
        name="drift_by_layer",
        caption=(
            "Left: share of the first trace's experts that are selected again, by layer with 95 % "
            "intervals; dotted: what unrelated routings with these loads would share. Right: share "
            "of all selections that would have to move between experts to give equal loads."
        ),
        figure=figure,
    )
    for ending, own in each_trace(table):
        deciles = select(own, metric="overlap_by_margin", scope="layer")
        if deciles.empty:
            continue
        values, layers, names = charts.matrix(deciles, columns="decile")
        figure, axes = style.subplots(1, 1, height=charts.heatmap_height(len(layers)))
        style.heatmap(
            axes[0, 0], values, rows=layers, columns=[int(n) for n in names],
            label="same experts", vmax=1.0,
        )  # fmt: skip
        axes[0, 0].set(xlabel="tenth of the tokens, smallest margin first", ylabel="layer")
        yield Picture(
            name=f"drift_by_margin{ending}",
            caption=(
                "Share of experts selected again, by how narrowly the first trace selected them: "
                "on the left near ties, which rounding alone can turn, on the right clear choices."
            ),
            figure=figure,
        )


def _layers(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    return select(table, metric=metric, scope="layer")


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """How much of the routing is left, where it changed most, and what that did to the loss."""
    overlap, chance = single(table, "overlap_at_k"), single(table, "overlap_chance")
    if not np.isfinite([overlap, chance]).all():
        return
    exact, moved = single(table, "exact_set"), single(table, "load_tv")
    layers = _layers(table, "overlap_at_k").sort_values("value")
    least = ""
    if len(layers) > 1 and layers.iloc[0]["value"] < layers.iloc[-1]["value"]:
        least = f", least in layer {layers.iloc[0]['layer']} ({layers.iloc[0]['value']:.0%})"
    yield Finding(
        text=(
            f"Of the experts that the first trace selects for a token, {overlap:.1%} are selected "
            f"here too{least}; unrelated routings with these loads would share {chance:.1%}. The "
            f"whole set is the same for {exact:.1%} of the tokens, and {moved:.1%} of the load "
            "moved."
        ),
        weight=float(np.clip(3 * (1 - overlap), 0.1, 1)),
        metric="overlap_at_k",
    )
    first, last = (single(table, "overlap_by_margin", decile=decile) for decile in (1, NUM_DECILES))
    if np.isfinite([first, last]).all() and overlap < 1:
        yield Finding(
            text=(
                f"Of the tenth of the tokens that were selected most narrowly {first:.1%} of the "
                f"experts stay, of the tenth selected most clearly {last:.1%}."
            ),
            weight=float(np.clip(1 - last, 0.1, 0.9)),
            metric="overlap_by_margin",
        )
    change, p_equal = single(table, "nll_change"), single(table, "nll_equivalence_p")
    if np.isfinite([change, p_equal]).all():
        yield Finding(
            text=loss_sentence(table),
            weight=0.2 if p_equal < LEVEL else 0.6,
            metric="nll_change",
        )


def loss_sentence(table: pd.DataFrame) -> str:
    """The change of the loss in words, with the verdict of its tests."""
    change, margin = single(table, "nll_change"), single(table, "nll_margin")
    p_equal, p_zero = single(table, "nll_equivalence_p"), single(table, "nll_difference_p")
    verdict = "undecided: neither a difference nor equality is shown"
    if p_equal < LEVEL:
        verdict = "equivalent"
    elif p_zero < LEVEL:
        verdict = "different"
    return (
        f"The loss changed by {change:+.4f} nats a token "
        f"({single(table, 'nll_change_relative'):+.2%}); {verdict} (within {margin:.4f} nats, "
        f"0.5 % of the loss: {p_text(p_equal)}; no change: {p_text(p_zero)})."
    )


def p_text(p: float) -> str:
    """A p value as text."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


ANALYSIS = Analysis(
    title="Drift",
    source="Overlap and load shift: moetools; equivalence: Schuirmann 1987",
    about=(
        "How the routing of the same texts differs from that of the first trace: which share of a "
        "token's experts stays, by layer and by how narrow the choice was, and how the load moved. "
        "The same model with another batch size already differs a little: see `moetools diff "
        "--floor`."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
)
