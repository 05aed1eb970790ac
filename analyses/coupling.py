"""Whether each router row still describes its expert.

Needs the weights of the traced checkpoint (`report --model`). With r_e the router row of expert e,
w its neurons (rows of the gate projection, of the up projection without a gate), d the hidden
size. Nothing here has an absolute scale, so beside each metric X of this list stands `X_null`, the
mean and 95 % range of the same number with the experts dealt to the rows at random (200
permutations), and `X_p`, how often chance does as well (1/201 at least):

- `alignment`: d times the mean squared cosine of r_e with the neurons of its expert; 1 for random
  weights. `alignment_z`: standard deviations above the other experts. `alignment_top1`: share of
  rows whose own expert is the best aligned of all. `alignment_mrr`: mean of 1 / its place.
- `signed_alignment`: mean cosine. `singular_energy`: share of r_e (squared) in the top 1, 8 or 32
  (`directions`) right singular vectors of its expert's neurons; directions / d for random weights.
- `erc`: coupling loss of arXiv 2512.23447 at `alpha` 0.5, 1 and 2, without noise: how far a row
  moves other experts more than alpha times its own, or is moved less than others move its expert.
  0 is coupled. `form` `raw` grows with the weights, `scale_free` is divided by the mean gain of
  matching pairs. `erc_alpha_star`: the smallest alpha without loss. `erc_row_violations`,
  `erc_column_violations`: share of pairs where another expert, or another row, does as much.
- With `trace --keep inputs`, all experts run on at most 4096 tokens (`activation`: length of the
  neurons' values, of what the down projection gets, of the output). `score_agreement`: Spearman
  correlation over the experts of logit and activation, mean over tokens. `selected_activation`:
  share of the other experts that answer less than a selected one; 0.5 by chance.
  `expert_score_agreement`: correlation over tokens, mean over experts.
- `centroid_alignment`: cosine of r_e with the mean input of the tokens that select e, minus that
  with other experts' means. `centroid_overlap`: share of a token's selection among the experts
  with the nearest means of the other half of the texts.

Without null: `row_similarity` and `row_similarity_max`, mean and largest |cosine| of two rows;
`mean_row`, length of the mean row over the mean length; `noise_bound`, half the distance to the
nearest row over the row's length; `router_row_norm`, `expert_norm` and their `_sd`;
`alignment_unmatched`, the alignment with other experts; `num_zero_rows`, left out everywhere.
Expert scope: `alignment`, `alignment_rank`, `noise_bound`, `router_row_norm`, `expert_norm`.

`gauge`: adding one vector to all rows of a softmax router changes no routing but changes these
numbers; `centred` has the mean row removed and is the one to read, `raw` has not. Sigmoid routers
have no such freedom and are `raw` only. `tokens`: `all`, or `not_first`, without the first token of
each sequence, whose vectors are often huge. Layer scope, and the model as the mean over layers.
Weights alone have no sampling error, hence no interval, and `num_tokens` 0; numbers on tokens have
one over texts.

What would fool you: a number without its null. The two `centroid_` metrics compare the router with
its own selections and beat their null for every router that is a linear map; they say how well
centroids would replace it, nothing about the experts, so no headline rests on them. Agreement
within a token also follows from experts that answer strongly to everything (its null has them too).
The length of the gate's values is the same for x and -x, so `activation` `gate` is blind to a row
that equals a neuron; `hidden` is not. With fewer than 8 experts the permutations are too few for a
small p.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools import console, coupling
from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    State,
    mlp_routers,
    model_of,
    select,
    stacked,
)
from moetools.coupling import Centroids, Draws, Statistic
from moetools.errors import ArchitectureError
from moetools.intervals import basic_interval
from moetools.token_sample import TokenSample, token_places
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

if TYPE_CHECKING:
    from moetools.checkpoint import Checkpoint
    from moetools.experts import LayerExperts

Array = NDArray[np.float64]

MAX_TOKENS = 4096
MIN_TOKENS = 256
MIN_CORRELATED = 30
MAX_SAMPLE_BYTES = 1 << 30
MAX_OPERATIONS = 1e13
"""Of all experts on the sampled tokens, all layers together: minutes on a few cores."""

SHIFTABLE = ("softmax", "top_k_softmax")
"""Scores that do not change when one vector is added to all router rows."""

NAMES = {
    "alignment": "rows lie along their experts' neurons",
    "alignment_top1": "rows fit their own expert best",
    "singular_energy": "rows lie in their experts' main directions",
    "signed_alignment": "rows point the way of their experts' neurons",
    "erc": "rows move their own expert most (ERC)",
    "score_agreement": "high scores go to experts that answer strongly",
    "selected_activation": "selected experts answer more strongly than others",
}
"""What a statistic claims where it beats its null. Those on centroids do not look at experts."""
CHOSEN: dict[str, Any] = {
    "directions": 8, "alpha": 1.0, "form": "scale_free", "activation": "hidden", "tokens": "all",
}  # fmt: skip
"""The variants that pictures and findings show."""
SIGNIFICANT = 0.05
LESS = ("erc",)
"""Statistics among `NAMES` that coupling makes smaller."""


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Router inputs and selections, where inputs were kept."""
    model = model_of(trace, options)
    if isinstance(model, str):
        return model
    if not mlp_routers(trace):
        return "The trace has no router of feed-forward experts."
    try:
        for _ in read_layers(model, mlp_routers(trace)[:1]):
            pass
    except ArchitectureError as error:
        return str(error)
    return [
        f"{family}.{router.name}"
        for router in mlp_routers(trace)
        for family in ("inputs", "experts")
        if f"inputs.{router.name}" in trace.columns
    ]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """Statistics on tokens need their inputs."""
    if "inputs" in trace.manifest.keep:
        return ()
    return (
        "No statistics on tokens: they need the inputs of the routers (trace with --keep inputs "
        f"--keep-tokens {MAX_TOKENS}).",
    )


def start(trace: TraceStore, options: Options) -> "CouplingState":
    """An empty state."""
    return CouplingState(trace, options)


def read_layers(
    model: "Checkpoint", routers: Sequence[TracedRouter]
) -> Iterator[tuple[TracedRouter, "LayerExperts"]]:
    """The experts of some routers, one layer in memory at a time."""
    from moetools.experts import ExpertReader

    reader = ExpertReader(model)
    for router in routers:
        yield router, reader.read(router.name)


class CouplingState:
    """A bounded sample of the tokens; the weights are read when the table is made."""

    def __init__(self, trace: TraceStore, options: Options) -> None:
        model = model_of(trace, options)
        assert not isinstance(model, str)
        self.model, self.options = model, options
        self.routers = mlp_routers(trace)
        self.sampled = [r.name for r in self.routers if f"inputs.{r.name}" in trace.columns]
        width = 2 * (trace.manifest.hidden_size or 1) * max(len(self.sampled), 1)
        self.sample = TokenSample(min(MAX_TOKENS, MAX_SAMPLE_BYTES // width))

    def update(self, batch: TraceBatch) -> None:
        """Offer the tokens whose inputs were kept to the sample."""
        if not self.sampled:
            return
        values = {
            f"{family}.{name}": batch.tokens[f"{family}.{name}"]
            for name in self.sampled
            for family in ("inputs", "experts")
        }
        kept = ~np.isnan(values[f"inputs.{self.sampled[0]}"][:, 0])
        values["text"] = np.repeat(batch.text, batch.lengths)
        self.sample.add(*token_places(batch), values, kept)

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.sample.merge(other.sample)

    def table(self) -> pd.DataFrame:
        """All rows; reads the experts of every layer."""
        parts: list[Mapping[str, Any]] = []
        found: dict[tuple[Any, ...], list[tuple[int, Statistic]]] = defaultdict(list)
        total = sum(router.num_experts for router in self.routers)
        with console.progress(f"Comparing with {self.model.name}", total, "experts") as meter:
            for router, layer in read_layers(self.model, self.routers):
                parts += self._layer(router, layer, found)
                meter.advance(router.num_experts)
        statistics = (row for of_layers in found.values() for row in statistic_rows(of_layers))
        return stacked(with_model([*statistics, *parts]))

    def _layer(
        self,
        router: TracedRouter,
        layer: "LayerExperts",
        found: dict[tuple[Any, ...], list[tuple[int, Statistic]]],
    ) -> Iterator[Mapping[str, Any]]:
        """Rows of one layer without a null; statistics with one are added to `found`."""
        import torch

        weight = layer.router_weight
        kept = np.flatnonzero((weight.norm(dim=1) > 0).numpy())
        yield row("num_zero_rows", layer.layer, len(weight) - len(kept))
        if len(kept) < 2:
            return
        variants = {"raw": weight[torch.from_numpy(kept)]}
        if router.rule is not None and router.rule["score_function"] in SHIFTABLE:
            variants["centred"] = variants["raw"] - variants["raw"].double().mean(dim=0).float()
        geometry = coupling.measure(variants, layer.neurons, kept)
        seed = (self.options.seed, layer.layer)
        orders = coupling.permutations(len(kept), seed=seed)
        statistics: list[Statistic] = []
        router_rows = {name: each.double().numpy() for name, each in variants.items()}
        for gauge, of_rows in geometry.items():
            statistics += coupling.weight_statistics(of_rows, orders, gauge)
            yield from row_numbers(layer, gauge, router_rows[gauge], of_rows, kept)
        yield from norms(layer, kept)
        statistics += self._token_statistics(router, layer, router_rows, kept, seed)
        for each in statistics:
            key = (each.metric, *each.parameters.items())
            found[key].append((layer.layer, each))

    def _token_statistics(
        self,
        router: TracedRouter,
        layer: "LayerExperts",
        router_rows: Mapping[str, Array],
        kept: NDArray[np.int64],
        seed: tuple[int, int],
    ) -> Iterator[Statistic]:
        """Statistics on the sampled tokens, with and without the first of each sequence."""
        import torch

        sample = self.sample.tokens()
        name = router.name
        if not sample or name not in self.sampled:
            return
        place = np.full(router.num_experts + 1, len(kept))
        place[kept] = np.arange(len(kept))
        index = place[np.minimum(sample[f"experts.{name}"].astype(np.int64), router.num_experts)]
        inputs = sample[f"inputs.{name}"].astype(np.float64)
        size = self._num_dense(layer)
        dense = torch.from_numpy(inputs[:size]).float()
        answers = {
            which: values[:, kept] for which, values in coupling.activations(layer, dense).items()
        }
        bias = 0 if layer.router_bias is None else layer.router_bias.double().numpy()[kept]
        scores = {gauge: inputs[:size] @ of_rows.T + bias for gauge, of_rows in router_rows.items()}
        orders = coupling.permutations(len(kept), seed=seed)
        chosen = coupling.selected(index, len(kept))
        for which, mask in sample_variants(sample["position"]):
            text, first = sample["text"][mask], mask[:size]
            bootstrap = Draws.of(text, seed=self.options.seed)
            centroids = Centroids.of(inputs[mask], chosen[mask], text, seed=self.options.seed)
            for each in (
                *coupling.agreement_statistics(
                    {gauge: values[first] for gauge, values in scores.items()},
                    {name: values[first] for name, values in answers.items()},
                    chosen[:size][first],
                    Draws.of(sample["text"][:size][first], seed=self.options.seed),
                    orders,
                ),
                *coupling.centroid_alignment(router_rows, centroids, len(text), seed),
                *coupling.centroid_overlap(inputs[mask], index[mask], centroids, bootstrap, seed),
            ):
                yield replace(each, parameters={**each.parameters, "tokens": which})

    def _num_dense(self, layer: "LayerExperts") -> int:
        """Tokens that all experts are run on."""
        per_token = 6 * layer.experts.up.numel() * len(self.routers)
        return int(max(MIN_TOKENS, MAX_OPERATIONS // per_token))


def sample_variants(position: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """All tokens, and those that are not the first of their sequence, where there are enough."""
    for name, mask in (("all", position >= 0), ("not_first", position > 0)):
        if mask.sum() >= MIN_CORRELATED:
            yield name, mask


def row(metric: str, layer: int, value: Any, **more: Any) -> dict[str, Any]:
    """One row of weights alone."""
    scope = "expert" if "expert" in more else "layer"
    return {
        "metric": metric, "scope": scope, "layer": layer, "value": value, "num_tokens": 0, **more,
    }  # fmt: skip


def row_numbers(
    layer: "LayerExperts",
    gauge: str,
    router_rows: Array,
    geometry: coupling.Geometry,
    kept: NDArray[np.int64],
) -> Iterator[dict[str, Any]]:
    """Rows about router rows without a null."""
    number, size = layer.layer, len(kept)
    mean, largest = coupling.row_similarity(router_rows)
    bounds = coupling.noise_bounds(router_rows)
    own = np.diagonal(geometry.alignment)
    yield row("row_similarity", number, mean, gauge=gauge)
    yield row("row_similarity_max", number, largest, gauge=gauge)
    yield row("noise_bound", number, bounds.mean(), gauge=gauge)
    others = (geometry.alignment.sum() - own.sum()) / (size * (size - 1))
    yield row("alignment_unmatched", number, others, gauge=gauge)
    if gauge == "raw":
        lengths = np.linalg.norm(router_rows, axis=1)
        yield row("mean_row", number, np.linalg.norm(router_rows.mean(axis=0)) / lengths.mean())
    places = np.diagonal(coupling.row_ranks(geometry.alignment))
    for metric, values in (("alignment", own), ("alignment_rank", places), ("noise_bound", bounds)):
        yield row(metric, number, values, expert=kept, gauge=gauge)


def norms(layer: "LayerExperts", kept: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Lengths of the router rows, and Frobenius norms of the experts' neurons."""
    lengths = layer.router_weight.double().norm(dim=1).numpy()
    experts = np.array([float(layer.neurons(e).norm()) for e in range(layer.num_experts)])
    for metric, values in (("router_row_norm", lengths), ("expert_norm", experts)):
        yield row(metric, layer.layer, values[kept].mean())
        yield row(f"{metric}_sd", layer.layer, values[kept].std())
        yield row(metric, layer.layer, values, expert=np.arange(layer.num_experts))


def statistic_rows(of_layers: Sequence[tuple[int, Statistic]]) -> Iterator[dict[str, Any]]:
    """Rows of one statistic: each layer, and the mean over layers, with null and p-value."""
    layers = [layer for layer, _ in of_layers]
    first = of_layers[0][1]
    draws = np.stack([each.draws for _, each in of_layers], axis=1)
    replicates = np.stack([each.replicates for _, each in of_layers], axis=1)
    draws = np.column_stack([draws, draws.mean(axis=1)])
    replicates = np.column_stack([replicates, replicates.mean(axis=1)])
    low, high = basic_interval(draws[0], replicates)
    null_low, null_high = np.quantile(draws[1:], [0.025, 0.975], axis=0)
    p = coupling.p_value(draws, less=first.less)
    tokens = [each.num_tokens for _, each in of_layers]
    tokens.append(max(tokens))
    for i, layer in enumerate([*layers, None]):
        place = {
            "scope": "model" if layer is None else "layer",
            "layer": layer,
            "num_tokens": tokens[i],
            **first.parameters,
        }
        metric = first.metric
        yield {"metric": metric, "value": draws[0, i], "low": low[i], "high": high[i], **place}
        yield {
            "metric": f"{metric}_null", "value": draws[1:, i].mean(),
            "low": null_low[i], "high": null_high[i], **place,
        }  # fmt: skip
        yield {"metric": f"{metric}_p", "value": p[i], **place}


def with_model(parts: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """All rows, and the means over layers of those that have none yet."""
    yield from parts
    known = {part["metric"] for part in parts if part["scope"] == "model"}
    means: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for part in parts:
        if part["scope"] == "layer" and part["metric"] not in known:
            means[part["metric"], part.get("gauge")].append(part["value"])
    for (metric, gauge), values in means.items():
        pooled = np.sum(values) if metric.startswith("num_") else np.mean(values)
        yield {
            "metric": metric, "scope": "model", "gauge": gauge, "value": pooled, "num_tokens": 0,
        }  # fmt: skip


def chosen(table: pd.DataFrame, metric: str, *, scope: str = "model") -> pd.DataFrame:
    """Rows of a metric in the variant to read: centred where there is one, else raw."""
    found = select(table, metric=metric, scope=scope)
    variants = {"gauge": "centred", **CHOSEN}
    for name, wanted in variants.items():
        if name in found and (found[name] == wanted).any():
            found = found[found[name] == wanted]
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """One statistic of the model against its null.

    Attributes:
        metric: Its name.
        value: What was measured.
        low: Lower end of the null.
        high: Upper end of the null.
        p: How often chance does as well.
        effect: Standard deviations above the null; positive where rows fit their experts.
        num_layers: Layers.
        num_telling: Layers that are above their own null.
    """

    metric: str
    value: float
    low: float
    high: float
    p: float
    effect: float
    num_layers: int
    num_telling: int

    @property
    def outside(self) -> int:
        """1 where rows fit their experts better than by chance, in most layers; -1 if worse."""
        most = 2 * self.num_telling > self.num_layers
        return int(self.p < SIGNIFICANT / 2 and most) - int(self.p > 1 - SIGNIFICANT / 2)

    def __str__(self) -> str:
        return (
            f"{self.metric} {self.value:.3g}, by chance {self.low:.3g} to {self.high:.3g}; "
            f"beyond it in {self.num_telling} of {self.num_layers} layers"
        )


def effects(table: pd.DataFrame) -> list[Effect]:
    """The statistics of `NAMES` for one trace."""
    found = []
    for metric in NAMES:
        value, null, p = (chosen(table, f"{metric}{end}") for end in ("", "_null", "_p"))
        if len(value) != 1 or value["value"].isna().any() or p["value"].isna().any():
            continue
        low, middle, high = (float(null[name].iloc[0]) for name in ("low", "value", "high"))
        deviation = float(value["value"].iloc[0]) - middle
        spread = (high - low) / (2 * 1.96)
        of_layers = chosen(table, f"{metric}_p", scope="layer")
        effect = deviation / spread if spread > 0 else 0.0
        found.append(
            Effect(
                metric=metric,
                value=middle + deviation,
                low=low,
                high=high,
                p=float(p["value"].iloc[0]),
                effect=-effect if metric in LESS else effect,
                num_layers=len(of_layers),
                num_telling=int((of_layers["value"] < SIGNIFICANT / 2).sum()),
            )
        )
    return found


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """The two statistics that tell most, by layer, and how much each one tells."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from moetools.reporting import charts, style

    first = effects(table[table["trace"] == table["trace"].iloc[0]])
    shown = [each.metric for each in sorted(first, key=lambda each: -each.effect)[:2]]
    figure, axes = style.subplots(1, max(len(shown), 1), height=2.8)
    for panel, metric in zip(axes[0], shown, strict=False):
        charts.lines_by_layer(panel, chosen(table, metric, scope="layer"), label="router")
        null = chosen(table, f"{metric}_null", scope="layer")
        charts.lines_by_layer(
            panel, null, label="dealt at random", ls=":", marker="", color="#888888"
        )
        panel.set_ylabel(metric.replace("_", " "))
        panel.legend()
    yield Picture(
        name="coupling_by_layer",
        caption=(
            f"Whether {' and '.join(NAMES[metric] for metric in shown)}: the statistics that tell "
            "most about this router. Grey: the same with the experts dealt to the rows at random, "
            "95 % of 200 permutations."
        ),
        figure=figure,
    )
    figure, axes = style.subplots(height=2.8)
    panel, names = axes[0, 0], list(NAMES)
    traces = list(dict.fromkeys(table["trace"]))
    for i, trace in enumerate(traces):
        found = effects(table[table["trace"] == trace])
        height = [names.index(each.metric) for each in found]
        shift = 0.5 * (i + 0.5) / len(traces) - 0.25
        panel.plot(
            [each.effect for each in found],
            np.array(height) + shift,
            "o",
            color=style.COLORS[i % 8],
            label=trace,
        )
    panel.axvspan(-1.96, 1.96, color="#dddddd", lw=0)
    panel.set_xscale("symlog", linthresh=5)
    panel.xaxis.set_major_locator(FixedLocator([-50, -20, -10, -5, -2, 0, 2, 5, 10, 20, 50, 100]))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())
    style.name_ticks(panel, "y", [name.replace("_", " ") for name in names])
    panel.set(
        xlabel="standard deviations above rows dealt at random", ylim=(len(names) - 0.4, -0.6)
    )
    if len(traces) > 1:
        panel.legend()
    yield Picture(
        name="coupling_effects",
        caption=(
            "Which statistics tell the router from one whose rows were dealt to the experts at "
            "random: those right of the grey band (95 % of the permutations), means over layers."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """The statistic that shows the coupling best, those that do not, ERC and row similarity."""
    found = effects(table)
    telling = sorted((each for each in found if each.outside > 0), key=lambda each: -each.effect)
    if telling:
        best = telling[0]
        yield Finding(
            text=f"Router and experts belong together: {NAMES[best.metric]} ({best}).",
            weight=0.4,
            metric=best.metric,
        )
    elif found:
        smallest = min(each.p for each in found)
        yield Finding(
            text=(
                f"None of {len(found)} statistics tells this router from one whose rows were dealt "
                f"to the experts at random (smallest p = {smallest:.2g})."
            ),
            weight=0.9,
            metric=found[0].metric,
        )
    reversed_ = [each for each in found if each.outside < 0]
    if reversed_:
        yield Finding(
            text=(
                "The other way round than coupling would have it: "
                f"{'. '.join(map(str, reversed_))}."
            ),
            weight=0.7,
            metric=reversed_[0].metric,
        )
    silent = [each for each in found if each.outside == 0]
    if silent and telling:
        yield Finding(
            text=f"Tells nothing here, chance does as well: {'. '.join(map(str, silent))}.",
            weight=0.3,
            metric=silent[0].metric,
        )
    yield from erc_findings(table)


def erc_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Where other experts answer to a row as much as its own, and how alike rows are."""
    star, similar = chosen(table, "erc_alpha_star"), chosen(table, "row_similarity")
    violations = chosen(table, "erc_row_violations")
    if len(star) and star["value"].notna().all():
        yield Finding(
            text=(
                f"A router row moves another expert more than its own in "
                f"{violations['value'].iloc[0]:.0%} of the pairs; ERC would end at alpha = "
                f"{star['value'].iloc[0]:.2f} (mean over layers; below 1 is coupled)."
            ),
            weight=0.2,
            metric="erc_alpha_star",
        )
    raw = select(table, metric="row_similarity", scope="model", gauge="raw")
    shared = select(table, metric="mean_row", scope="model")
    if len(similar) and len(shared):
        yield Finding(
            text=(
                f"Two router rows have a mean |cosine| of {raw['value'].iloc[0]:.2f}, "
                f"{similar['value'].iloc[0]:.2f} without the mean row, which is "
                f"{shared['value'].iloc[0]:.0%} as long as a row."
            ),
            weight=float(np.clip(2 * raw["value"].iloc[0], 0, 0.6)),
            metric="row_similarity",
        )


ANALYSIS = Analysis(
    title="Coupling",
    source="Coupling: arXiv 2605.12476. ERC: arXiv 2512.23447. Statistics and nulls: moetools.",
    about=(
        "Whether each router row still describes its expert: from the weights, and with recorded "
        "inputs from what all experts answer to a token. Every number stands beside the same "
        "number for rows dealt to the experts at random; without a distance between the two it "
        "says nothing."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
