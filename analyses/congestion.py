"""How strongly the load of the experts is flatter than the router's own preferences.

The router is read as a congestion game: an expert of quality q that receives the share m of all
selections pays off q - gamma m, and tokens choose by logit, so that m = softmax(q - gamma m).
`gamma_eff` is the gamma whose equilibrium is nearest to the observed load (KL, 0 to 2000); 0: the
load is softmax(q); large: flat. It is gamma_eff **as defined by moetools**, after the abstract of
arXiv:2604.04230, never that paper's number. Column `quality` says which estimate of q was used:
`q1` log of the mean probability (the default), `q2` mean log probability, `q3` log of the mean
weight and `q4` log of the mean contribution (weight times norm of the output, `--keep norms`) over
the tokens that selected the expert. Levels of gamma depend on q: compare layers and steps, not
estimates. Scopes: `layer` and `model` (mean over layers). Feed-forward routers whose rule is known.

By `quality`:

- `gamma_eff`, with `dropped_experts`: experts without that quality, left out of the fit, and
  `at_upper_bound`: 1 where gamma is 2000, because the load does not grow with that quality; for the
  model the share of layers, whose mean then says little.
- `temperature` T: softmax(q / T) nearest to the load; below 1 the load is sharper than q, and
  gamma_eff is 0. `gamma_temperature` = E (T - 1), nearly gamma_eff: a congestion of one type of
  tokens is a temperature in disguise. Null where the load does not grow with q.
- `l1_mfg`, `l1_softmax`: sum over experts of the distance of the load's shares from both fits, 0 to
  2. `heldout_l1_mfg`, `heldout_l1_softmax` (q1): the same where q, gamma and T come from the other
  half of the batches. They should hardly differ.
- `b_quality`: E times the largest share of softmax(q), the imbalance without congestion. `b_load`:
  E times the largest share of the load; 1 is balanced. Gamma can fall because q spreads while the
  load stays as it is: look at all three.
- `gamma_soft`: null (i), the fit with the mean probabilities as the load; 0 for q1.

By layer, with q1:

- `gamma_null`: null (ii), the fit to loads that the router's rule selects from logits resampled for
  each expert separately within each batch (`--keep logits`): what the spread of single experts and
  hard top-k selection give without any relation between experts. `temperature_null`: its
  temperature, which tells loads apart where both gammas are 0.
- `gamma_explicit`: gamma of the auxiliary loss with the config's coefficient alpha, reading units
  of loss as units of logits: alpha E k where its f sums to k (`convention` `sum_k`, as in
  transformers), alpha E where it sums to 1 (`sum_1`). `gamma_implicit` = gamma_eff minus that. A
  convention, not a measurement, and only as true as the config is about training.
- `epsilon`: mean over selections of |u - mean u|, u = q - gamma m - log m, in nats: 0 exactly in
  equilibrium; `epsilon_floor`: what independent selections from the fit show.
- `out_of_scope`: 1 if `out_of_scope_epsilon` (above 3 floors), `out_of_scope_bound` (gamma at 0 or
  2000) or `out_of_scope_dead` (over 5 % of experts unused) is 1; for the model the share of layers.
  Large samples nearly always show epsilon. `top_k_share` = k / E and `max_selection_rate`, the
  share of tokens that select the most loaded expert: the game is of one choice, a good stand-in
  for top-k only if both are small (the latter below 0.5).
- `estimator_agreement` (model): Pearson correlation over layers of gamma_eff under `quality` and
  `quality_b`; `estimator_agreement_steps` over the checkpoints of a run.
- `observed_share`, `preferred_share` (softmax(q)), `equilibrium_share`: by expert.

Several types of tokens, from at most 8192 tokens with logits (k-means of centred logits, fixed
seed; `types_count` C of 2 to 32 chosen on held-out loads; `types_share` = C / E): all types share
one congestion, p = softmax(beta q - gamma m) with q of each type. `types_beta` comes from contrasts
across types, which are free of congestion; `types_gamma` from the constrained fit. `types_gain` =
1 - L1 of the types over L1 of the equilibrium of one type, on the half of the batches that neither
the fit nor the choice of C saw (`types_l1`, `types_l1_single`); `types_gain_over_softmax`: over one
type with a temperature (`types_l1_softmax`), which like beta may sharpen. Only what is left there
is owed to the types. Their intervals leave out tenths of the batches and keep the clusters.

With `--step-from`, over the checkpoints of one run: `surge` (increasing run that ends at the
largest gamma), `relaxation` (steepest fall after it) and `stabilisation` (longest run whose
intervals of `b_load` all overlap), at the step where each ends, `from_step` being where it starts.
The value is the change of gamma_eff (of `b_load`) between both ends, low and high the smallest and
largest change that their 95 % intervals allow. `surge_resolved`, `relaxation_resolved`: 1 only
where the intervals of the ends do not overlap and no layer is at the upper bound there,
`stabilisation_resolved` from three checkpoints on; 0 means not resolved, whatever the curve looks
like.

Intervals of gamma and T resample 50 batches of whole texts 1000 times, recompute q and the load,
and refit (basic bootstrap, percentiles where the fit is at a bound); those of distances and
imbalances leave out one batch at a time. Batches that differ push gamma up a little, because q is
estimated too; the interval takes that into account, the value does not.

What would fool you: a frozen router has no congestion, because nothing at inference reacts to the
load. Gamma_eff above 0 only says that the load is flatter than the router's preferences. Tokens
that differ make it large under the mean logit, hard top-k selection makes it small; that is why q1
is the default and both nulls stand beside it. From one load only q / (1 + gamma / E) is well
determined; a free factor on q would spoil gamma.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    State,
    each_trace,
    layer_rows,
    mlp_routers,
    rows,
    select,
    single,
)
from moetools.congestion import (
    LARGEST_GAMMA,
    LARGEST_SCALE,
    bootstrap_interval,
    disequilibrium,
    disequilibrium_floor,
    distances,
    equilibrium,
    fit_near,
    fits,
    held_out,
    largest_over_mean,
    pearson,
    percentile_interval,
    phases,
    qualities,
    shares,
    softmax,
)
from moetools.congestion_types import TypeSums, clustered, compare_types, half_of
from moetools.expert_counts import count_selections, sum_weights
from moetools.intervals import Scope, block_of, jackknife_interval, replicate_weights
from moetools.token_sample import TokenSample, token_places
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

if TYPE_CHECKING:
    from moetools.routing import ScoringRule

Floats = NDArray[np.float64]

NUM_BATCHES = 50
SUMS = ("selections", "probs", "logprob", "gate", "contribution", "contributing")
"""What is added up over the tokens of a batch, by expert."""
QUALITIES = {
    "q1": "log mean probability",
    "q2": "mean log probability",
    "q3": "log mean weight",
    "q4": "log mean contribution",
}
BOUNDS = {
    "temperature": (1 / LARGEST_SCALE, LARGEST_SCALE),
    "gamma_temperature": (-np.inf, np.inf),
}
SAMPLED_TOKENS = 8192
NULL_ROUNDS = 4
TYPES = (2, 4, 8, 16, 32)
TOKENS_OF_TYPE = 20
COEFFICIENTS = (
    "router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coeff",
    "moe_loss_weight",
)  # fmt: skip
LINES = ("-", "-.", "--", ":")
PHASES = ("surge", "stabilisation", "relaxation")


def start(trace: TraceStore, options: Options) -> "CongestionState":
    """An empty state."""
    return CongestionState(
        known_routers(trace),
        options,
        with_norms={r.name for r in trace.routers if f"norms.{r.name}" in trace.columns},
        with_logits={r.name for r in trace.routers if f"logits.{r.name}" in trace.columns},
        coefficient=aux_loss_coefficient(trace.manifest.config),
    )


def known_routers(trace: TraceStore) -> list[TracedRouter]:
    """Feed-forward routers of which probabilities were recorded."""
    return [
        router
        for router in mlp_routers(trace)
        if router.rule is not None and router.num_experts > 1
    ]


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, weights and sums of probabilities; norms and logits where they were kept."""
    routers = known_routers(trace)
    if not routers:
        return (
            "It compares the load with the routers' probabilities, and the trace has no router of "
            "feed-forward experts whose scoring rule is known."
        )
    families = ("experts", "weights", "probs", "logprob", "norms", "logits")
    names = [f"{family}.{router.name}" for router in routers for family in families]
    return [name for name in names if name in trace.columns]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """What the trace did not keep, and rules that the null cannot follow."""
    found = []
    unknown = [str(r.layer) for r in mlp_routers(trace) if r.rule is None]
    if unknown:
        found.append(
            "Nothing for layers whose scoring rule is unknown, hence without probabilities: "
            f"{', '.join(unknown)}."
        )
    names = [router.name for router in known_routers(trace)]
    if not any(f"norms.{name}" in trace.columns for name in names):
        found.append(
            "No quality q4 (contributions of the experts): record the trace with --keep norms."
        )
    if not any(f"logits.{name}" in trace.columns for name in names):
        found.append("No gamma_null and no types of tokens: record the trace with --keep logits.")
    biased = [str(r.layer) for r in known_routers(trace) if (r.rule or {}).get("bias_on")]
    if biased:
        found.append(
            "No gamma_null for layers that select with a correction bias, which the trace does not "
            f"hold: {', '.join(biased)}."
        )
    if aux_loss_coefficient(trace.manifest.config) is None:
        found.append(
            "gamma_eff is not split into explicit and implicit: the config names no coefficient of "
            "an auxiliary loss."
        )
    return found


def aux_loss_coefficient(config: Mapping[str, Any]) -> float | None:
    """The coefficient of the load-balancing loss in a model's config, nested configs included."""
    for name in COEFFICIENTS:
        if isinstance(value := config.get(name), int | float):
            return float(value)
    for value in config.values():
        if isinstance(value, Mapping) and (found := aux_loss_coefficient(value)) is not None:
            return found
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSums:
    """What is known about one layer.

    Attributes:
        layer: Its number.
        top_k: K.
        sums: [batches, E] by name (`SUMS`); selections and probs at least.
        sample: Tokens with logits.
        rule: How the layer selects, where there is a sample.
    """

    layer: int
    top_k: int
    sums: Mapping[str, Floats]
    sample: TokenSample | None = None
    rule: "ScoringRule | None" = None

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.sums["selections"].shape[1])


class CongestionState:
    """Per batch of texts, router and expert: the sums; and a sample of tokens with logits."""

    def __init__(
        self,
        routers: Sequence[TracedRouter],
        options: Options,
        *,
        with_norms: set[str],
        with_logits: set[str],
        coefficient: float | None,
    ) -> None:
        self.routers, self.options, self.coefficient = routers, options, coefficient
        self.num_tokens = np.zeros(NUM_BATCHES, dtype=np.int64)
        self.counts = {r.name: np.zeros((NUM_BATCHES, r.num_experts), np.int64) for r in routers}
        self.sums = {
            router.name: {
                name: np.zeros((NUM_BATCHES, router.num_experts))
                for name in SUMS[1:]
                if not name.startswith("contribut") or router.name in with_norms
            }
            for router in routers
        }
        self.samples = {
            r.name: TokenSample(SAMPLED_TOKENS) for r in routers if r.name in with_logits
        }

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences."""
        block = block_of(batch.text, NUM_BATCHES)
        np.add.at(self.num_tokens, block, batch.lengths)
        if self.samples:
            places, text = token_places(batch), np.repeat(batch.text, batch.lengths)
        for router in self.routers:
            name, sums = router.name, self.sums[router.name]
            ids, weights = batch.tokens[f"experts.{name}"], batch.tokens[f"weights.{name}"]
            count_selections(ids, batch.offsets, block, self.counts[name])
            for family, column in (("probs", "probs"), ("logprob", "logprob")):
                means = batch.sequences[f"{column}.{name}"].astype(np.float64)
                np.add.at(sums[family], block, means * batch.lengths[:, None])
            weights = weights.astype(np.float32)
            sum_weights(ids, weights, batch.offsets, block, sums["gate"])
            if "contribution" in sums:
                norms = batch.tokens[f"norms.{name}"]
                measured = np.where(np.isfinite(norms), ids, router.dropped)
                sum_weights(measured, weights * norms, batch.offsets, block, sums["contribution"])
                ones = np.ones_like(weights)
                sum_weights(measured, ones, batch.offsets, block, sums["contributing"])
            if name in self.samples:
                logits = batch.tokens[f"logits.{name}"]
                kept = np.isfinite(logits[:, 0])
                values = {"logits": logits, "ids": ids, "text": text}
                self.samples[name].add(*places, values, kept)

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.num_tokens += other.num_tokens
        for name, counts in self.counts.items():
            counts += other.counts[name]
            for family, sums in self.sums[name].items():
                sums += other.sums[name][family]
        for name, sample in self.samples.items():
            sample.merge(other.samples[name])

    def table(self) -> pd.DataFrame:
        """All rows."""
        layers = [
            LayerSums(
                layer=router.layer,
                top_k=router.top_k,
                sums={
                    "selections": self.counts[router.name].astype(float),
                    **self.sums[router.name],
                },
                sample=self.samples.get(router.name),
                rule=scoring_rule(router) if router.name in self.samples else None,
            )
            for router in self.routers
        ]
        return tabulate(
            layers, self.num_tokens, coefficient=self.coefficient, seed=self.options.seed
        )


def scoring_rule(router: TracedRouter) -> "ScoringRule":
    """The rule of a router."""
    from moetools.routing import ScoringRule

    rule = router.rule or {}
    known = {field.name: rule[field.name] for field in fields(ScoringRule) if field.name in rule}
    return ScoringRule(**{**known, "top_k": router.top_k})


def tabulate(
    layers: Sequence[LayerSums],
    num_tokens: NDArray[np.int64],
    *,
    coefficient: float | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """All rows about one model, from sums over batches of texts.

    Args:
        layers: The layers, in order of depth.
        num_tokens: [batches] tokens of each batch; batches are what intervals resample.
        coefficient: Of the auxiliary loss.
        seed: Of the resampling.
    """
    occupied = num_tokens > 0
    scope = Scope(
        group=None,
        num_tokens=int(num_tokens.sum()),
        cells=slice(0, len(num_tokens)),
        weights=replicate_weights(occupied, seed=seed),
    )
    left_out = replace(scope, weights=1 - np.eye(len(occupied))[occupied])
    parts: list[pd.DataFrame] = []
    with np.errstate(invalid="ignore"):
        gammas, fitted = fitted_rows(layers, scope)
        parts += fitted
        parts += distance_rows(layers, left_out)
        parts += held_out_rows(layers, left_out, occupied)
    parts += explicit_rows(layers, scope, gammas["q1"], coefficient)
    parts += agreement_rows(gammas, scope)
    parts += scope_rows(layers, scope, gammas["q1"][0], seed)
    parts += expert_rows(layers, scope, gammas["q1"][0])
    parts += null_rows(layers, scope, seed)
    parts += types_rows(layers, occupied, seed)
    return pd.concat(parts, ignore_index=True)


def drawn(layer: LayerSums, scope: Scope) -> dict[str, Floats]:
    """The sums of a layer, and their replicates, by name [1 + B, E]."""
    return {name: scope.draws(sums) for name, sums in layer.sums.items()}


def fitted_rows(
    layers: Sequence[LayerSums], scope: Scope
) -> tuple[dict[str, Floats], list[pd.DataFrame]]:
    """Gamma and temperature under every quality, resampled; gamma_eff as [1 + B, L] too."""
    found: dict[tuple[str, str], list[Floats]] = {}
    depth: dict[str, list[int]] = {}
    for layer in layers:
        draws = drawn(layer, scope)
        for quality, values in qualities(**draws).items():
            depth.setdefault(quality, []).append(layer.layer)
            metrics = fits(values, draws["selections"])
            metrics["gamma_soft"] = fit_near(values, draws["probs"])
            bound = metrics["gamma_eff"][:1] > 0.999 * LARGEST_GAMMA
            metrics["at_upper_bound"] = bound.astype(np.float64)
            metrics["dropped_experts"] = (~np.isfinite(values[:1])).sum(axis=1).astype(float)
            for metric, of_layer in metrics.items():
                found.setdefault((metric, quality), []).append(of_layer)
    stacked = {key: np.stack(of_layers, axis=1) for key, of_layers in found.items()}
    parts = [
        fit_rows(
            metric,
            scope,
            depth[quality],
            draws,
            quality=quality,
            bounds=BOUNDS.get(metric, (0.0, LARGEST_GAMMA)),
        )
        for (metric, quality), draws in stacked.items()
    ]
    gammas = {
        quality: stacked["gamma_eff", quality]
        for quality in depth
        if len(depth[quality]) == len(layers)
    }
    return gammas, parts


def distance_rows(layers: Sequence[LayerSums], left_out: Scope) -> Iterator[pd.DataFrame]:
    """Distances from the fits and imbalances."""
    found: dict[tuple[str, str | None], list[Floats]] = {}
    depth: dict[str | None, list[int]] = {}
    for layer in layers:
        draws = drawn(layer, left_out)
        depth.setdefault(None, []).append(layer.layer)
        load = shares(draws["selections"])
        found.setdefault(("b_load", None), []).append(largest_over_mean(load))
        for name, values in qualities(**draws).items():
            depth.setdefault(name, []).append(layer.layer)
            for metric, of_layer in distances(values, draws["selections"]).items():
                found.setdefault((metric, name), []).append(of_layer)
    for (metric, quality), of_layers in found.items():
        draws_of = np.stack(of_layers, axis=1)
        columns = {"quality": quality, "num_tokens": left_out.num_tokens}
        yield jackknife_rows(metric, depth[quality], draws_of, **columns)


def fit_rows(
    metric: str,
    scope: Scope,
    layers: Sequence[int],
    draws: Floats,
    *,
    bounds: tuple[float, float] = (0.0, LARGEST_GAMMA),
    **columns: Any,
) -> pd.DataFrame:
    """`layer_rows` with the intervals of fits that have bounds."""
    pool = mean_of_known(draws)
    both = np.column_stack([draws, pool(draws, axis=1)])
    low, high = bootstrap_interval(both[0], both[1:], bounds=bounds)
    found = layer_rows(metric, scope, layers, draws, pool=pool, **columns)
    return found.assign(low=low, high=high)


def mean_of_known(draws: Floats) -> Callable[..., Floats]:
    """The mean over those layers whose value on the data [1 + B, L] is known."""
    known = np.isfinite(draws[0])

    def pool(values: Floats, *, axis: int) -> Floats:
        return values[:, known].mean(axis=axis) if known.any() else np.full(len(values), np.nan)

    return pool


def jackknife_rows(
    metric: str, layers: Sequence[int], draws: Floats, **columns: Any
) -> pd.DataFrame:
    """A smooth metric [1 + N, L] of all batches, and without one fold of them each."""
    draws = np.column_stack([draws, mean_of_known(draws)(draws, axis=1)])
    low, high = jackknife_interval(draws[0], draws[1:])
    return rows(
        metric, "layer", draws[0], layer=pd.array([*layers, pd.NA], dtype="Int64"), low=low,
        high=high, **columns,
    ).assign(scope=["layer"] * len(layers) + ["model"])  # fmt: skip


def value_rows(
    metric: str,
    scope: Scope,
    layers: Sequence[int],
    values: Sequence[float] | Floats,
    **columns: Any,
) -> pd.DataFrame:
    """Values of the layers and their mean, without intervals."""
    draws = np.asarray(values, dtype=float)[None]
    return layer_rows(metric, scope, layers, draws, pool=mean_of_known(draws), **columns)


def held_out_rows(
    layers: Sequence[LayerSums], left_out: Scope, occupied: NDArray[np.bool_]
) -> Iterator[pd.DataFrame]:
    """`held_out` of every layer."""
    half = half_of(occupied)
    found: dict[str, list[Floats]] = {}
    for layer in layers:
        counts, quality = [], []
        for i in (0, 1):
            kept = (half == i)[:, None]
            draws = {
                name: left_out.draws(layer.sums[name] * kept) for name in ("selections", "probs")
            }
            counts.append(draws["selections"])
            quality.append(qualities(**draws)["q1"])
        for name, values in held_out(np.stack(quality), np.stack(counts)).items():
            found.setdefault(name, []).append(values)
    for name, of_layers in found.items():
        yield jackknife_rows(
            f"heldout_l1_{name}", [layer.layer for layer in layers], np.stack(of_layers, axis=1),
            quality="q1", num_tokens=left_out.num_tokens,
        )  # fmt: skip


def explicit_rows(
    layers: Sequence[LayerSums], scope: Scope, gamma: Floats, coefficient: float | None
) -> Iterator[pd.DataFrame]:
    """Gamma of the auxiliary loss under both normalisations of its loads, and the rest."""
    if coefficient is None:
        return
    depth = [layer.layer for layer in layers]
    for convention in ("sum_k", "sum_1"):
        explicit = np.array(
            [
                coefficient * layer.num_experts * (layer.top_k if convention == "sum_k" else 1)
                for layer in layers
            ]
        )
        yield value_rows("gamma_explicit", scope, depth, explicit, convention=convention)
        rest = fit_rows("gamma_implicit", scope, depth, gamma, quality="q1", convention=convention)
        less = np.append(explicit, explicit.mean())
        yield rest.assign(**{name: rest[name] - less for name in ("value", "low", "high")})


def agreement_rows(gammas: Mapping[str, Floats], scope: Scope) -> Iterator[pd.DataFrame]:
    """Correlation over layers of gamma under each two qualities."""
    for one, other in combinations(gammas, 2):
        draws = np.array([pearson(x, y) for x, y in zip(gammas[one], gammas[other], strict=True)])
        low, high = percentile_interval(draws[1:])
        yield rows(
            "estimator_agreement", "model", draws[0], low=low, high=high, quality=one,
            quality_b=other, num_tokens=scope.num_tokens,
        )  # fmt: skip


def scope_rows(
    layers: Sequence[LayerSums], scope: Scope, gamma: Floats, seed: int
) -> Iterator[pd.DataFrame]:
    """Whether the game of one choice can describe the layers."""
    found: dict[str, list[float]] = {}
    for layer, own in zip(layers, gamma, strict=True):
        counts = layer.sums["selections"].sum(axis=0)
        quality = qualities(counts, layer.sums["probs"].sum(axis=0))["q1"]
        load = shares(counts)
        epsilon = float(disequilibrium(quality, own, load))
        floor = disequilibrium_floor(quality, float(own), int(counts.sum()), seed=seed)
        reasons = {
            "out_of_scope_epsilon": float(epsilon > 3 * floor),
            "out_of_scope_bound": float(not 1e-6 < own < LARGEST_GAMMA * 0.999),
            "out_of_scope_dead": float((counts == 0).mean() > 0.05),
        }
        for name, value in {
            "epsilon": epsilon,
            "epsilon_floor": floor,
            "top_k_share": layer.top_k / layer.num_experts,
            "max_selection_rate": float(load.max() * layer.top_k),
            **reasons,
            "out_of_scope": max(reasons.values()),
        }.items():
            found.setdefault(name, []).append(value)
    for name, values in found.items():
        yield value_rows(name, scope, [layer.layer for layer in layers], values)


def expert_rows(layers: Sequence[LayerSums], scope: Scope, gamma: Floats) -> Iterator[pd.DataFrame]:
    """Shares of the experts: observed, preferred, and in equilibrium."""
    for layer, own in zip(layers, gamma, strict=True):
        counts = layer.sums["selections"].sum(axis=0)
        quality = qualities(counts, layer.sums["probs"].sum(axis=0))["q1"]
        for name, values in (
            ("observed_share", shares(counts)),
            ("preferred_share", softmax(quality)),
            ("equilibrium_share", equilibrium(quality, own)),
        ):
            yield rows(
                name, "expert", values, layer=layer.layer, expert=np.arange(layer.num_experts),
                num_tokens=scope.num_tokens,
            )  # fmt: skip


def null_rows(layers: Sequence[LayerSums], scope: Scope, seed: int) -> Iterator[pd.DataFrame]:
    """Gamma and temperature of loads that are selected from independently resampled logits."""
    some = [
        layer
        for layer in layers
        if layer.sample and layer.rule is not None and layer.rule.bias_on is None
    ]
    found: dict[str, list[Floats]] = {}
    for layer in some:
        counts, probs = (
            scope.draws(sums) for sums in null_sums(layer, scope.weights.shape[1], seed)
        )
        with np.errstate(invalid="ignore"):
            metrics = fits(qualities(counts, probs)["q1"], counts)
        found.setdefault("gamma_null", []).append(metrics["gamma_eff"])
        found.setdefault("temperature_null", []).append(metrics["temperature"])
    for metric, of_layers in found.items():
        depth = [layer.layer for layer in some]
        bounds = BOUNDS.get(metric.removesuffix("_null"), (0.0, LARGEST_GAMMA))
        draws = np.stack(of_layers, axis=1)
        yield fit_rows(metric, scope, depth, draws, bounds=bounds, quality="q1")


def null_sums(layer: LayerSums, num_batches: int, seed: int) -> tuple[Floats, Floats]:
    """By batch [batches, E]: selections from resampled logits, and the sample's probabilities."""
    import torch

    assert layer.sample is not None
    assert layer.rule is not None
    tokens = layer.sample.tokens()
    batch, logits = block_of(tokens["text"], NUM_BATCHES), tokens["logits"]
    order = np.argsort(batch, kind="stable")
    batch, logits = batch[order], logits[order]
    size = np.bincount(batch, minlength=num_batches)
    first = np.cumsum(size) - size
    counts = np.zeros((num_batches, layer.num_experts))
    probs = np.zeros_like(counts)
    sampled = layer.rule.probabilities(torch.from_numpy(logits))
    np.add.at(probs, batch, sampled.double().numpy())
    rng = np.random.default_rng([seed, layer.layer])
    for _ in range(NULL_ROUNDS):
        drawn = (rng.random(logits.shape) * size[batch][:, None]).astype(np.int64)
        mixed = np.take_along_axis(logits, first[batch][:, None] + drawn, axis=0)
        scores = layer.rule.selection_scores(torch.from_numpy(mixed))
        chosen = scores.topk(layer.top_k, dim=-1).indices.numpy()
        flat = (batch[:, None] * layer.num_experts + chosen).ravel()
        counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
    return counts, probs


def types_rows(
    layers: Sequence[LayerSums], occupied: NDArray[np.bool_], seed: int
) -> Iterator[pd.DataFrame]:
    """The extension to several types of tokens."""
    found: dict[str, list[Floats]] = {}
    some = []
    for layer in layers:
        metrics = compare_types(layer_types(layer, len(occupied), seed), occupied)
        if metrics:
            some.append(layer)
            for name, values in metrics.items():
                found.setdefault(name, []).append(values)
    for name, of_layers in found.items():
        draws = np.stack(of_layers, axis=1)
        yield jackknife_rows(
            f"types_{name}", [layer.layer for layer in some],
            draws[:1] if name in ("count", "share") else draws,
            num_tokens=min(len(layer.sample or ()) for layer in some),
        )  # fmt: skip


def layer_types(layer: LayerSums, num_batches: int, seed: int) -> list[TypeSums]:
    """The sampled tokens of a layer in 2, 4, ... clusters of their centred logits."""
    import torch

    if not layer.sample or layer.rule is None:
        return []
    tokens = layer.sample.tokens()
    batch, logits = block_of(tokens["text"], NUM_BATCHES), tokens["logits"]
    probs = layer.rule.probabilities(torch.from_numpy(logits)).double().numpy()
    features = logits - logits.mean(axis=1, keepdims=True)
    return [
        clustered(
            features,
            batch,
            probs,
            tokens["ids"],
            num_types=num_types,
            num_batches=num_batches,
            seed=seed,
        )
        for num_types in TYPES
        if num_types * TOKENS_OF_TYPE <= len(logits)
    ]


def across(table: pd.DataFrame) -> pd.DataFrame | None:
    """Phases of a run and agreement of the qualities over its checkpoints; needs steps."""
    table = table[table["metric"].isin(("gamma_eff", "b_load", "at_upper_bound"))]
    steps = table[["trace", "step"]].drop_duplicates().sort_values("step")
    if steps["step"].isna().any() or steps["step"].duplicated().any() or len(steps) < 2:
        return None
    parts = list(phase_rows(table, steps))
    gammas = {
        quality: series(select(table, metric="gamma_eff", scope="model", quality=quality), steps)
        for quality in QUALITIES
    }
    for one, other in combinations([name for name in gammas if len(gammas[name])], 2):
        parts.append(
            rows(
                "estimator_agreement_steps", "model",
                float(pearson(*(gammas[name]["value"].to_numpy(float) for name in (one, other)))),
                quality=one, quality_b=other, from_step=int(steps["step"].iloc[0]),
                trace=steps["trace"].iloc[-1], step=int(steps["step"].iloc[-1]),
                num_tokens=gammas[one]["num_tokens"].iloc[-1],
            )
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True) if parts else None


def series(rows_of_metric: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """One row for each step in their order; empty unless every step has one."""
    ordered = rows_of_metric.sort_values("step")
    return ordered if list(ordered["trace"]) == list(steps["trace"]) else ordered.iloc[:0]


def phase_rows(table: pd.DataFrame, steps: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Surge, stabilisation and relaxation of the model and of each layer."""
    places: list[tuple[str, Any]] = [("model", None)]
    layers = select(table, metric="gamma_eff", scope="layer")["layer"].dropna().unique()
    places += [("layer", int(layer)) for layer in sorted(layers)]
    for scope, layer in places:
        at = {"scope": scope, "layer": layer}
        b = series(select(table, metric="b_load", **at), steps)
        for quality in QUALITIES:
            gamma = series(select(table, metric="gamma_eff", quality=quality, **at), steps)
            if not len(gamma) or not len(b):
                continue
            bound = series(select(table, metric="at_upper_bound", quality=quality, **at), steps)
            for phase in phases(
                *(gamma[name].to_numpy(float) for name in ("value", "low", "high")),
                *(b[name].to_numpy(float) for name in ("low", "high")),
            ):
                of_load = phase.name == "stabilisation"
                if of_load and quality != "q1":
                    continue
                ends = b if of_load else gamma
                first, last = ends.iloc[phase.first], ends.iloc[phase.last]
                moved = phase.first != phase.last
                bounded = bound["value"].iloc[[phase.first, phase.last]].max() > 0 and not of_load
                place = {
                    **at, "quality": None if of_load else quality, "trace": last["trace"],
                    "step": last["step"], "from_step": int(first["step"]),
                    "num_tokens": last["num_tokens"],
                }  # fmt: skip
                yield rows(
                    phase.name, value=last["value"] - first["value"],
                    low=last["low"] - first["high"] if moved else np.nan,
                    high=last["high"] - first["low"] if moved else np.nan, **place,
                )  # fmt: skip
                yield rows(
                    f"{phase.name}_resolved", value=float(phase.resolved and not bounded), **place
                )


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Gamma by layer with its nulls, loads against preferences, and the trajectory."""
    steps = sorted(int(step) for step in table["step"].dropna().unique())
    in_time = len(steps) > 1
    yield heat_picture(table) if in_time else gamma_picture(table)
    for suffix, of_trace in each_trace(table):
        if not in_time or (of_trace["step"] == steps[-1]).all():
            yield load_picture(of_trace, suffix)
    if in_time:
        yield trajectory_picture(table, steps)


def heat_picture(table: pd.DataFrame) -> Picture:
    """Gamma and temperature by layer and step."""
    from moetools.reporting import charts, style

    figure, axes = style.subplots(1, 2, height=3.0)
    for ax, metric, center in ((axes[0, 0], "gamma_eff", None), (axes[0, 1], "temperature", 1.0)):
        found = select(table, metric=metric, scope="layer", quality="q1")
        values, layers, steps = charts.matrix(found, columns="step")
        top = {"vmin": 0.0, "vmax": max(np.nanmax(values, initial=0), 1.0)}
        style.heatmap(
            ax, values, rows=layers, columns=steps, label=f"{metric} (q1)", center=center,
            **(top if center is None else {}),
        )  # fmt: skip
        ax.set(xlabel="step", ylabel="layer")
    return Picture(
        name="gamma_by_layer",
        caption=(
            "By layer and training step, with quality q1: gamma_eff as defined by moetools, and "
            "the temperature of the load, below 1 where the load is sharper than the router's "
            "preferences and gamma_eff is 0."
        ),
        figure=figure,
    )


def gamma_picture(table: pd.DataFrame) -> Picture:
    """Gamma with its nulls, and the temperature under every quality, by layer."""
    from moetools.reporting import charts, style

    several = table["trace"].nunique() > 1
    figure, axes = style.subplots(1, 2, height=3.0)
    left, right = axes[0]
    null = select(table, metric="gamma_null", scope="layer")
    if not null.empty:
        grey = {} if several else {"color": "#888888"}
        charts.lines_by_layer(left, null, label="gamma_null", ls="--", marker="", **grey)
    found = select(table, metric="gamma_eff", scope="layer", quality="q1")
    charts.lines_by_layer(left, found, label="gamma_eff")
    soft = select(table, metric="gamma_soft", scope="layer", quality="q1")
    charts.lines_by_layer(left, soft, label="gamma_soft", ls=":", marker="", color="#444444")
    left.set(ylabel="gamma (quality q1)")
    left.set_ylim(top=max(1.0, left.get_ylim()[1]))
    left.legend()
    null = select(table, metric="temperature_null", scope="layer")
    if not null.empty:
        grey = {} if several else {"color": "#888888"}
        charts.lines_by_layer(right, null, label="null", ls="--", marker="", **grey)
    for i, quality in enumerate(QUALITIES):
        found = select(table, metric="temperature", scope="layer", quality=quality)
        options = {"ls": LINES[i]} if several else {"color": style.COLORS[i]}
        if found["value"].notna().any():
            charts.lines_by_layer(right, found, label=quality, **options)
    right.set(ylabel="temperature T")
    right.set_yscale("log")
    right.axhline(1, color="#888888", ls=":", lw=1)
    plain_log(right.yaxis)
    right.legend(ncols=2)
    return Picture(
        name="gamma_by_layer",
        caption=(
            "Left: gamma_eff as defined by moetools, by layer with 95 % intervals: how much "
            "flatter the load is than the mean probabilities. "
            + ("Dashed: loads from logits resampled for each expert alone. " if len(null) else "")
            + "Dotted: the probabilities themselves as the load. Right: the temperature of the "
            "load under each estimate of quality: above 1 the load is flatter than the "
            "preferences, below 1 it is sharper and gamma_eff is 0."
        ),
        figure=figure,
    )


def plain_log(axis: Any) -> None:
    """Marks of a logarithmic axis at 1, 2, 5, 10, ..., written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def load_picture(table: pd.DataFrame, suffix: str) -> Picture:
    """Share of the load against softmax(q), one point an expert."""
    import matplotlib

    from moetools.reporting import style

    observed = select(table, metric="observed_share").sort_values(["layer", "expert"])
    preferred = select(table, metric="preferred_share").sort_values(["layer", "expert"])
    layers = sorted(observed["layer"].unique())
    figure, axes = style.subplots(1, 1, height=3.6)
    here = axes[0, 0]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, len(layers)))
    ends = []
    for layer, color in zip(layers, colors, strict=True):
        y = select(observed, layer=layer)["value"].to_numpy(float)
        x = select(preferred, layer=layer)["value"].to_numpy(float)
        x, y = len(x) * x, len(x) * y
        used = y > 0
        here.scatter(x[used], y[used], s=9, color=color, lw=0, label=f"layer {layer}")
        ends += [x.min(), x.max(), *(y[used].min(initial=1), y.max())]
    limits_of_both = [max(min(ends), 1e-3) / 1.1, max(ends) * 1.1]
    here.plot(limits_of_both, limits_of_both, color="#888888", lw=1, ls=":")
    here.set(
        xscale="log", yscale="log", xlim=limits_of_both, ylim=limits_of_both,
        xlabel="share of softmax(q1), times E", ylabel="share of the load, times E",
    )  # fmt: skip
    for axis in (here.xaxis, here.yaxis):
        plain_log(axis)
    here.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + len(layers) // 17)
    return Picture(
        name=f"load_against_preference{suffix}",
        caption=(
            "One point an expert: its share of the load against the router's own preference, 1 "
            "being the mean. A cloud flatter than the diagonal is what gamma_eff measures, a "
            "steeper one is a temperature below 1; unused experts are not drawn."
        ),
        figure=figure,
    )


def trajectory_picture(table: pd.DataFrame, steps: Sequence[int]) -> Picture:
    """Gamma and temperature under every quality, B and B_q over the steps."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    from moetools.reporting import style

    figure, axes = style.subplots(1, 3, height=3.0)
    left, middle, right = axes[0]
    for i, quality in enumerate(QUALITIES):
        for ax, metric in ((left, "gamma_eff"), (middle, "temperature")):
            found = select(table, metric=metric, scope="model", quality=quality)
            draw_steps(ax, found, label=quality, color=style.COLORS[i])
    b_load = select(table, metric="b_load", scope="model")
    draw_steps(right, b_load, label="B, load", color=style.COLORS[4])
    found = select(table, metric="b_quality", scope="model", quality="q1")
    draw_steps(right, found, label="B_q, softmax(q1)", color=style.COLORS[0])
    for ax in (left, middle, right):
        step_axis(ax, steps)
        ax.legend()
    left.set(ylabel="gamma_eff, mean over layers")
    left.set_yscale("symlog", linthresh=1)
    left.yaxis.set_major_locator(FixedLocator([0, 1, 10, 100, 1000]))
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_ylim(-0.2, max(1.2, left.get_ylim()[1]))
    middle.set(ylabel="temperature T, mean over layers")
    middle.set_yscale("log")
    middle.axhline(1, color="#888888", ls=":", lw=1)
    plain_log(middle.yaxis)
    right.set(ylabel="largest over mean share")
    return Picture(
        name="trajectory",
        caption=(
            "Over training, with 95 % intervals. Left: gamma_eff as defined by moetools under each "
            "estimate of quality; 0 where the load is sharper than the quality, which the "
            "temperature in the middle tells on both sides of 1. Right: imbalance of the load and "
            "of the preferences: gamma can change because either does."
        ),
        figure=figure,
    )


def draw_steps(axes: Any, found: pd.DataFrame, *, label: str, color: str) -> None:
    """A line over steps with its interval."""
    if found.empty:
        return
    line = found.sort_values("step")
    x = line["step"].to_numpy(float)
    axes.plot(x, line["value"].to_numpy(float), marker="o", label=label, color=color)
    low, high = line["low"].to_numpy(float), line["high"].to_numpy(float)
    axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def step_axis(axes: Any, steps: Sequence[int]) -> None:
    """Steps on an axis that is logarithmic from the first positive one on."""
    positive = [step for step in steps if step > 0]
    axes.set_xscale("symlog", linthresh=max(positive[0], 1) if positive else 1, linscale=0.5)
    marked: list[int] = []
    for step in steps:
        if len(marked) < 2 or step >= 1.6 * marked[-1]:
            marked.append(step)
    axes.set_xticks(marked, [str(step) for step in marked])
    axes.minorticks_off()
    axes.set_xlabel("step")


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """What gamma says about this router, and what it does not."""
    mean = select(table, metric="gamma_eff", scope="model", quality="q1")
    if mean.empty or not np.isfinite(mean["value"].iloc[0]):
        return
    row = mean.iloc[0]
    layers = select(table, metric="gamma_eff", scope="layer", quality="q1").dropna(subset="value")
    num_flat = int((layers["value"] <= 0).sum())
    temperature = select(table, metric="temperature", scope="model", quality="q1").iloc[0]
    sharper = (
        "sharper than the router's mean preferences, as hard selection makes it (temperature "
        f"{temperature['value']:.2f}{interval(temperature, digits=2)})"
    )
    if num_flat == len(layers):
        text = f"gamma_eff (as defined by moetools) is 0 in every layer: the load is {sharper}."
    else:
        text = (
            f"gamma_eff (as defined by moetools) is {row['value']:.1f}{interval(row)} over the "
            "layers: the load is flatter than the router's mean preferences"
            + (f", but not in {num_flat} of {len(layers)} layers" if num_flat else "")
            + ". A frozen router has no congestion, so that is all it says."
        )
    unusual = abs(np.log(temperature["value"])) if temperature["value"] > 0 else 0.0
    yield Finding(text=text, weight=float(np.clip(0.2 + unusual / 2, 0, 0.6)), metric="gamma_eff")
    null = select(table, metric="temperature_null", scope="layer").set_index("layer")
    own = select(table, metric="temperature", scope="layer", quality="q1").set_index("layer")
    own = own[own.index.isin(null.index)]
    if len(own):
        null = null.loc[own.index]
        above, below = (
            int((own["low"] > null["high"]).sum()),
            int((own["high"] < null["low"]).sum()),
        )
        yield Finding(
            text=(
                "Against loads selected from independently resampled logits, whose temperature is "
                f"{single(table, 'temperature_null'):.2f}, the load is flatter in {above}, sharper "
                f"in {below} and not told apart in {len(own) - above - below} of {len(own)} layers."
            ),
            weight=0.3,
            metric="temperature_null",
        )
    mfg = single(table, "heldout_l1_mfg", quality="q1")
    scaled = single(table, "heldout_l1_softmax", quality="q1")
    if np.isfinite([mfg, scaled]).all():
        if num_flat == len(layers):
            verdict = "At gamma 0 the game is no more than the preferences as they are."
        elif mfg > scaled - 0.01:
            verdict = "The game adds nothing to a temperature."
        else:
            verdict = "The game is nearer."
        yield Finding(
            text=(
                f"Loads of unseen texts are predicted with an L1 of {mfg:.3f} by the congestion "
                f"game and {scaled:.3f} by a temperature of the router's preferences. {verdict}"
            ),
            weight=0.5 if verdict == "The game is nearer." else 0.2,
            metric="heldout_l1_mfg",
        )
    for metric, against in (
        ("types_gain", "the equilibrium of one type"),
        ("types_gain_over_softmax", "a temperature for all tokens"),
    ):
        gain = select(table, metric=metric, scope="model").dropna(subset="value")
        for row in (gain.iloc[i] for i in range(len(gain))):
            clear = row["low"] > 0 or row["high"] < 0
            yield Finding(
                text=(
                    f"Several types of tokens change the L1 of held-out loads by "
                    f"{-row['value']:+.0%}{interval(row, percent=True, sign=-1)} against {against}"
                    + ("." if clear else ", which is not told apart from no change.")
                ),
                weight=0.4 if clear else 0.2,
                metric=metric,
            )
    outside = single(table, "out_of_scope")
    if outside > 0:
        reasons = {
            "the load is not in equilibrium within three floors": "out_of_scope_epsilon",
            "gamma at a bound": "out_of_scope_bound",
            "unused experts": "out_of_scope_dead",
        }
        named = [text for text, metric in reasons.items() if single(table, metric) > 0]
        yield Finding(
            text=(
                f"{outside:.0%} of the layers are outside the scope of the congestion game "
                f"({'; '.join(named)}): read gamma_eff there as a summary, not as a model."
            ),
            weight=0.2,
            metric="out_of_scope",
        )


def findings_across(table: pd.DataFrame) -> Iterator[Finding]:
    """How load and preferences moved over a training run, and its phases."""
    steps = table[["trace", "step"]].drop_duplicates().sort_values("step")
    if steps["step"].isna().any() or steps["step"].duplicated().any() or len(steps) < 2:
        return
    told = []
    for metric, quality, what in (
        ("b_load", None, "the busiest expert's load over the mean (B)"),
        ("b_quality", "q1", "the same of the router's mean preferences (B_q)"),
        ("temperature", "q1", "the temperature of the load against them"),
        ("gamma_eff", "q1", "gamma_eff (as defined by moetools)"),
    ):
        line = series(select(table, metric=metric, scope="model", quality=quality), steps)
        if len(line):
            first, last = line.iloc[0], line.iloc[-1]
            told.append(
                f"{what} from {first['value']:.2f}{interval(first, digits=2)} to "
                f"{last['value']:.2f}{interval(last, digits=2)}"
            )
    if told:
        begin, end = int(steps["step"].iloc[0]), int(steps["step"].iloc[-1])
        yield Finding(
            text=f"From step {begin} to {end}: {'; '.join(told)}.", weight=0.6, metric="b_load"
        )
    for name in PHASES:
        quality = None if name == "stabilisation" else "q1"
        for row in select(table, metric=name, scope="model", quality=quality).to_dict("records"):
            ends = select(table, metric=f"{name}_resolved", scope="model", quality=quality)
            resolved = bool((ends["value"] > 0).all())
            text = phase_sentence(name, row, resolved=resolved)
            yield Finding(text=text, weight=0.6 if resolved else 0.3, metric=name)


def phase_sentence(name: str, row: Mapping[Any, Any], *, resolved: bool) -> str:
    """One phase in words.

    Args:
        name: One of `PHASES`.
        row: Its row of the table.
        resolved: Whether intervals tell it.
    """
    of_load = name == "stabilisation"
    title = f"{name.capitalize()} of {'B' if of_load else 'gamma_eff'}"
    first, last = int(row["from_step"]), int(row["step"])
    if first == last:
        return f"{title}: none, because step {last} is an end of the curve or its only extreme."
    if of_load:
        apart = "all overlap" if resolved else "overlap, but two checkpoints make no plateau"
        return f"{title} from step {first} to {last}: the 95 % intervals {apart}."
    if resolved:
        verdict = "resolved"
    elif row["low"] < 0 < row["high"]:
        verdict = "not resolved, the 95 % intervals of its ends overlap"
    else:
        verdict = "not resolved, because gamma is at its upper bound in some layer"
    return f"{title} from step {first} to {last}: {row['value']:+.2f}{interval(row)}, {verdict}."


def interval(
    row: Mapping[Any, Any] | pd.Series, *, digits: int = 1, percent: bool = False, sign: int = 1
) -> str:
    """The interval of a row in brackets, if it has one."""
    ends = sorted([sign * row["low"], sign * row["high"]])
    if not np.isfinite(ends).all():
        return ""
    form = "{:+.0%}" if percent else f"{{:.{digits}f}}"
    return f" [{form.format(ends[0])}, {form.format(ends[1])}]"


ANALYSIS = Analysis(
    title="Congestion",
    source="moetools, after C. Mouzouni, arXiv:2604.04230 (abstract)",
    about=(
        "How much flatter the load of the experts is than the router's own preferences, read as "
        "the congestion of a game: gamma_eff as defined by moetools. 0 is not flatter. A frozen "
        "router has no congestion; compare with both nulls, and over the steps of a run."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
    across=across,
    findings_across=findings_across,
)
