"""Which experts work together: within a layer, and from one layer to the next.

Within a layer (top-k of at least 2), pairs of experts selected by the same token are compared with
what the same loads would give without any preference. A token selects k distinct experts, so the
product of the loads is not that: expected counts are those of quasi-independence,
a_e * a_f for e != f and nothing on the diagonal, fitted to the experts' own pair counts.

- `pair_divergence` (nats per pair): Kullback-Leibler divergence of the observed from the expected
  pairs; 0 without preference. `pair_divergence_floor`: its expectation when every token draws its
  set at random, with as many independent tokens and even loads.
- `pair_deviation`: mean over expected pairs of |lift - 1|.
- pair scope, the `NUM_STRONGEST` pairs of each layer by normalised pointwise mutual information,
  among those expected at least `MIN_EXPECTED` times: `pair_npmi` = ln lift / -ln share (-1 to 1),
  `pair_lift` = observed / expected, `pair_share` = tokens that select both / tokens.

From layer to layer (rows carry `layer` and `layer_b`, the next layer with a router): the joint
distribution of an expert of each layer, where a token gives weight 1 / (k * k') to each of its
k * k' pairs.

- `layer_nmi`: mutual information over the geometric mean of the two entropies, 0 to 1. For k = 1
  it is the usual normalised mutual information; for k > 1 even equal selections stay below 1, see
  `layer_nmi_ceiling`.
- `layer_nmi_ceiling`: the same of the layer with itself, what equal selections would give.
- `layer_nmi_next_token`: the same with the next token's selection in the next layer. It keeps what
  both owe to the text; what `layer_nmi` has above it belongs to the token.
- `layer_nmi_floor`: expectation for unrelated layers, from as many independent tokens and even
  loads.

`model` rows are means over layers. Intervals leave out one of at most `MAX_BLOCKS` blocks of
sequences at a time (fewer where layers times experts squared is large); pairs have none.
Feed-forward routers only.

What would fool you: topics. Two experts of one topic are selected together although neither needs
the other, in one layer and across layers. Rare pairs have a high lift by accident.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    State,
    largest,
    mlp_routers,
    rows,
    select,
    single,
)
from moetools.expert_counts import count_joint, count_pairs
from moetools.information import entropy, normalised_mutual_information
from moetools.intervals import block_of, jackknife_interval
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

MAX_BLOCKS = 20
MAX_ENTRIES = 1 << 25
NUM_STRONGEST = 20
MIN_EXPECTED = 10
MIN_EXCESS = 0.02


def start(trace: TraceStore, options: Options) -> "CoActivationState":
    """An empty state."""
    return CoActivationState(mlp_routers(trace))


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections."""
    routers = mlp_routers(trace)
    if not routers:
        return "The trace has no router of feed-forward experts."
    if len(routers) == 1 and routers[0].top_k == 1:
        return "One layer that selects one expert a token has no pairs."
    return [f"experts.{router.name}" for router in routers]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """Layers that select one expert."""
    layers = [str(router.layer) for router in mlp_routers(trace) if router.top_k == 1]
    if not layers:
        return ()
    return (f"No pairs within layers that select one expert a token: {', '.join(layers)}.",)


class CoActivationState:
    """Counts of pairs per block of texts."""

    def __init__(self, routers: Sequence[TracedRouter]) -> None:
        self.routers = routers
        self.num_blocks = num_blocks(routers)
        self.num_tokens = np.zeros(self.num_blocks, dtype=np.int64)
        self.pairs = [
            np.zeros((self.num_blocks, router.num_experts, router.num_experts), dtype=np.uint32)
            for router in routers
        ]
        self.joint = [
            np.zeros((self.num_blocks, a.num_experts, b.num_experts), dtype=np.uint32)
            for a, b in pairwise(routers)
        ]
        self.next_token = [
            np.zeros((1, a.num_experts, b.num_experts), dtype=np.uint32)
            for a, b in pairwise(routers)
        ]

    def update(self, batch: TraceBatch) -> None:
        """Count the pairs of whole sequences."""
        block = block_of(batch.text, self.num_blocks)
        np.add.at(self.num_tokens, block, batch.lengths)
        ids = [batch.tokens[f"experts.{router.name}"] for router in self.routers]
        for selected, pairs in zip(ids, self.pairs, strict=True):
            count_pairs(selected, batch.offsets, block, pairs)
        for i, (a, b) in enumerate(pairwise(ids)):
            count_joint(a, b, 0, batch.offsets, block, self.joint[i])
            count_joint(a, b, 1, batch.offsets, np.zeros_like(block), self.next_token[i])

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.num_tokens += other.num_tokens
        for mine, theirs in zip(
            (*self.pairs, *self.joint, *self.next_token),
            (*other.pairs, *other.joint, *other.next_token),
            strict=True,
        ):
            mine += theirs

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.concat([*self._within(), *self._between()], ignore_index=True)

    def _within(self) -> Iterator[pd.DataFrame]:
        chosen = [i for i, router in enumerate(self.routers) if router.top_k > 1]
        found: dict[str, list[Any]] = {}
        layers = [self.routers[i].layer for i in chosen]
        for i in chosen:
            router = self.routers[i]
            counts = self._leave_one_out(self.pairs[i])
            counts = counts + counts.swapaxes(1, 2)
            expected = np.stack([expected_pairs(table) for table in counts])
            found.setdefault("pair_divergence", []).append(divergence(counts, expected))
            found.setdefault("pair_deviation", []).append(deviation(counts, expected))
            floor = divergence_floor(router, counts[0].sum() / 2)
            found.setdefault("pair_divergence_floor", []).append(np.array([floor]))
            yield from self._pair_rows(router, counts[0], expected[0])
        for name, values in found.items():
            yield from self._layer_rows(name, np.stack(values, axis=1), layer=layers)

    def _pair_rows(
        self, router: TracedRouter, counts: NDArray[Any], expected: NDArray[Any]
    ) -> Iterator[pd.DataFrame]:
        a, b = np.triu_indices(router.num_experts, 1)
        observed, chance = counts[a, b], expected[a, b]
        num_tokens = counts.sum() / (router.top_k * (router.top_k - 1))
        npmi = normalised_pmi(observed, chance, num_tokens)
        npmi[chance < MIN_EXPECTED] = -np.inf
        strongest = np.argsort(-npmi, kind="stable")[:NUM_STRONGEST]
        strongest = strongest[np.isfinite(npmi[strongest])]
        place = {
            "layer": router.layer,
            "expert": a[strongest],
            "layer_b": router.layer,
            "expert_b": b[strongest],
            "num_tokens": int(self.num_tokens.sum()),
        }
        yield rows("pair_npmi", "pair", npmi[strongest], **place)
        yield rows("pair_lift", "pair", observed[strongest] / chance[strongest], **place)
        yield rows("pair_share", "pair", observed[strongest] / num_tokens, **place)

    def _between(self) -> Iterator[pd.DataFrame]:
        if len(self.routers) == 1:
            return
        found: dict[str, list[Any]] = {}
        steps = list(pairwise(self.routers))
        for i, (router, router_b) in enumerate(steps):
            joint = self._leave_one_out(self.joint[i])
            own = self.pairs[i].sum(axis=0, dtype=np.int64)
            for name, value in (
                ("layer_nmi", normalised_mutual_information(joint)),
                ("layer_nmi_ceiling", [self_nmi(own, joint[0].sum(axis=1), router, router_b)]),
                ("layer_nmi_next_token", normalised_mutual_information(self.next_token[i])),
                ("layer_nmi_floor", [nmi_floor(router, router_b, joint[0])]),
            ):
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            yield from self._layer_rows(
                name,
                np.stack(values, axis=1),
                layer=[a.layer for a, _ in steps],
                layer_b=[b.layer for _, b in steps],
            )

    def _leave_one_out(self, counts: NDArray[np.uint32]) -> NDArray[np.float64]:
        """[1 + N, E, E'] the sum over blocks, then without each block that has tokens."""
        total = counts.sum(axis=0, dtype=np.float64)
        return np.stack([total, *(total - counts[i] for i in np.flatnonzero(self.num_tokens))])

    def _layer_rows(
        self, metric: str, draws: NDArray[np.float64], **place: Sequence[int]
    ) -> Iterator[pd.DataFrame]:
        num_tokens = int(self.num_tokens.sum())
        for scope, values, columns_ in (
            ("layer", draws, place),
            ("model", draws.mean(axis=1, keepdims=True), {}),
        ):
            low, high = jackknife_interval(values[0], values[1:], bounds=(0, np.inf))
            yield rows(
                metric, scope, values[0], low=low, high=high, num_tokens=num_tokens, **columns_
            )


def num_blocks(routers: Sequence[TracedRouter]) -> int:
    """Blocks of texts: at most 20, fewer so that a table a block stays in `MAX_ENTRIES`."""
    entries = sum(router.num_experts**2 for router in routers)
    return int(np.clip(MAX_ENTRIES // entries, 5, MAX_BLOCKS))


def expected_pairs(counts: NDArray[np.float64], *, num_iterations: int = 100) -> NDArray[Any]:
    """Pair counts expected from the experts' loads alone: quasi-independence.

    Args:
        counts: [E, E] symmetric observed pair counts, zero diagonal.
        num_iterations: Limit of the fit.

    Returns:
        [E, E] with entries a_e * a_f off the diagonal and the row sums of `counts`.
    Source:
        Bishop, Fienberg and Holland, Discrete Multivariate Analysis, ch. 5 (incomplete tables).
    """
    margin = counts.sum(axis=1)
    total = margin.sum()
    if total == 0:
        return np.zeros_like(counts)
    factor = margin / np.sqrt(total)
    for _ in range(num_iterations):
        # The geometric mean of old and new settles where plain substitution oscillates.
        rest = factor.sum() - factor
        new = np.sqrt(factor * np.divide(margin, rest, out=np.zeros_like(rest), where=rest > 0))
        settled = np.abs(new - factor).max() <= 1e-9 * new.max()
        factor = new
        if settled:
            break
    expected = np.outer(factor, factor)
    np.fill_diagonal(expected, 0)
    return expected


def divergence(counts: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """[...] Kullback-Leibler divergence, nats per pair, of [..., E, E] from the expected counts."""
    present = counts > 0
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=present & (expected > 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        result = (counts * np.log(ratio)).sum(axis=(-2, -1)) / counts.sum(axis=(-2, -1))
    return np.asarray(np.maximum(result, 0.0))


def deviation(counts: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
    """[...] mean of |lift - 1| over expected pairs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(counts - expected).sum(axis=(-2, -1)) / expected.sum(axis=(-2, -1))
    return np.asarray(distance)


def divergence_floor(router: TracedRouter, num_pairs: float) -> float:
    """Expected `pair_divergence` of random sets, to second order.

    The part of the pair counts that the loads do not fix has E (E - 3) / 2 dimensions, each with
    the variance of the degree-two part of the Johnson scheme.
    """
    E, K = router.num_experts, router.top_k
    if E < 4 or num_pairs == 0:
        return 0.0
    return float(E * (E - K) * (E - K - 1) / (4 * (E - 2) * num_pairs))


def normalised_pmi(
    observed: NDArray[Any], expected: NDArray[Any], num_tokens: float
) -> NDArray[np.float64]:
    """ln(observed / expected) / -ln(observed / tokens): 1 for experts never seen apart."""
    result = np.full(len(observed), -np.inf)
    usable = (observed > 0) & (observed < num_tokens) & (expected > 0)
    lift = observed[usable] / expected[usable]
    result[usable] = np.log(lift) / -np.log(observed[usable] / num_tokens)
    return result


def self_nmi(
    pairs: NDArray[Any], load: NDArray[np.float64], router: TracedRouter, router_b: TracedRouter
) -> float:
    """Normalised mutual information of a layer's selections with themselves.

    Args:
        pairs: [E, E] pair counts, upper triangle.
        load: [E] `router_b.top_k` times the selections of each expert.
        router: The layer.
        router_b: The next layer.
    """
    joint = pairs + pairs.T + np.diag(load / router_b.top_k)
    return float(normalised_mutual_information(joint))


def nmi_floor(router: TracedRouter, router_b: TracedRouter, joint: NDArray[np.float64]) -> float:
    """Expected `layer_nmi` of unrelated random sets, to second order (k = 1: Miller-Madow)."""
    excess = (router.num_experts - router.top_k) * (router_b.num_experts - router_b.top_k)
    scale = np.sqrt(entropy(joint.sum(axis=1)) * entropy(joint.sum(axis=0)))
    return float(excess / (2 * joint.sum() * scale)) if joint.sum() and scale > 0 else np.nan


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Dependence within layers, and from layer to layer."""
    from moetools.reporting import charts, style

    panels = [
        (metric, floors, label)
        for metric, floors, label in (
            ("pair_divergence", (("pair_divergence_floor", ":", "chance"),), "divergence (nats)"),
            (
                "layer_nmi",
                (
                    ("layer_nmi_next_token", "--", "next token"),
                    ("layer_nmi_ceiling", "-.", "equal selections"),
                    ("layer_nmi_floor", ":", "chance"),
                ),
                "normalised mutual information",
            ),
        )
        if len(select(table, metric=metric, scope="layer"))
    ]
    if not panels:
        return
    figure, axes = style.subplots(1, len(panels), height=2.8)
    for panel, (metric, floors, label) in zip(axes[0], panels, strict=True):
        found = select(table, metric=metric, scope="layer")
        charts.lines_by_layer(panel, found, label="same token")
        for name, dashes, meaning in floors:
            floor = select(table, metric=name, scope="layer")
            charts.lines_by_layer(
                panel, floor, label=meaning, ls=dashes, marker="", color="#888888"
            )
        within = metric == "pair_divergence"
        panel.set(title="within a layer" if within else "a layer and the next", ylabel=label)
        panel.set_ylim(bottom=0)
        panel.legend()
    yield Picture(
        name="co_activation_by_layer",
        caption=(
            "Within a layer: how far pairs of experts selected together are from what the loads "
            "alone would give. Between layers: how much a layer's selection tells about the next "
            "layer's, beside what the next token's tells (what both owe to the text). Bands: 95 % "
            "intervals."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """The strongest pair, and the strongest link between layers."""
    pairs = select(table, metric="pair_npmi", scope="pair")
    if len(pairs):
        best = largest(pairs)
        place = {name: best[name] for name in ("layer", "expert", "expert_b")}
        lift = single(table, "pair_lift", "pair", **place)
        share = single(table, "pair_share", "pair", **place)
        yield Finding(
            text=(
                f"In layer {best['layer']}, experts {best['expert']} and {best['expert_b']} are "
                f"selected together {lift:.1f} times as often as their loads explain "
                f"({share:.1%} of tokens)."
            ),
            weight=float(np.clip(best["value"], 0, 1)),
            metric="pair_lift",
        )
    links = select(table, metric="layer_nmi", scope="layer").dropna(subset="value")
    if len(links):
        best = largest(links)
        place = {"layer": best["layer"], "layer_b": best["layer_b"]}
        other = single(table, "layer_nmi_next_token", "layer", **place)
        ceiling = single(table, "layer_nmi_ceiling", "layer", **place)
        excess = (best["value"] - other) / ceiling
        yield Finding(
            text=(
                f"Layer {best['layer']}'s selection tells most about the next layer's "
                f"({best['layer_b']}): normalised mutual information {best['value']:.3f}, where "
                f"equal selections would give {ceiling:.2f}. "
                + (
                    f"The next token's selection there gives only {other:.3f}."
                    if excess > MIN_EXCESS
                    else "The next token's tells as much, so both only follow the text."
                )
            ),
            weight=float(np.clip(2 * excess, 0, 1)) if np.isfinite(excess) else 0.1,
            metric="layer_nmi",
        )


ANALYSIS = Analysis(
    title="Co-activation",
    source=(
        "Expected pairs: quasi-independence (Bishop, Fienberg and Holland). Normalised pointwise "
        "mutual information: Bouma 2009. The rest: moetools."
    ),
    about=(
        "Which experts are selected together, and how far a layer's selection tells the next "
        "layer's. Both rise when texts differ in topic, without one expert needing the other: "
        "compare with the floors and with the next token."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
