"""How undecided a router is about a token, a text and the whole data.

With p(t) the router's probabilities for a token, H the entropy, and means over tokens:

- `token_entropy`: mean of H(p(t)). Low: the router is sure about each token.
- `sequence_entropy`: mean of H(mean of p over the token's sequence).
- `mean_entropy`: H(mean of p over all tokens of the scope). High: all experts get used.
- `within_sequence_information` = `sequence_entropy` - `token_entropy`: how much more the token
  tells about the expert than its sequence does (mutual information of token and expert within a
  sequence).
- `between_sequence_information` = `mean_entropy` - `sequence_entropy`: mutual information of
  sequence and expert. `between_sequence_floor`: what it would be if all sequences were alike, from
  the difference between the even and odd tokens of each sequence; short sequences raise both.
- `load_entropy`: entropy of the share of selections of each expert (needs no probabilities).

All in nats; the three `*_entropy` of probabilities and `load_entropy` also as `..._relative`,
divided by ln E: 0 to 1. Scopes: `layer`, `model` (mean over layers), `group` with and without a
layer. Feed-forward routers only.

What would fool you: probabilities are a softmax over all experts, or the scores over their sum for
sigmoid routers, whose entropy is high by construction; compare layers and groups, not families.
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
    State,
    layer_rows,
    mlp_routers,
    select,
    single,
)
from moetools.expert_counts import count_selections
from moetools.information import entropy
from moetools.intervals import Cells
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

FAMILIES = ("probs", "probs_even", "probs_odd", "entropy")
NUM_SCALARS = 4
LINES = ("-", "-.", "--", ":")
RELATIVE = ("token_entropy", "sequence_entropy", "mean_entropy", "load_entropy")


def start(trace: TraceStore, options: Options) -> "EntropyState":
    """An empty state."""
    return EntropyState(mlp_routers(trace), trace.groups, options)


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, and the sums of probabilities where the rule is known."""
    routers = mlp_routers(trace)
    if not routers:
        return "The trace has no router of feed-forward experts."
    needed = [f"experts.{router.name}" for router in routers]
    return needed + [
        f"{family}.{router.name}"
        for router in routers
        if router.rule is not None
        for family in FAMILIES
    ]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """Layers without probabilities."""
    layers = [str(router.layer) for router in mlp_routers(trace) if router.rule is None]
    if not layers:
        return ()
    return (
        "Only the entropy of the load for layers whose scoring rule is unknown, hence without "
        f"probabilities: {', '.join(layers)}.",
    )


class EntropyState:
    """Per cell: selections, and sums over tokens of entropies and probabilities."""

    def __init__(
        self, routers: Sequence[TracedRouter], groups: Sequence[str], options: Options
    ) -> None:
        self.routers, self.options = routers, options
        self.cells = Cells(groups)
        self.counts = {
            router.name: np.zeros((len(self.cells), router.num_experts), dtype=np.int64)
            for router in routers
        }
        self.sums = {
            router.name: np.zeros((len(self.cells), NUM_SCALARS + router.num_experts))
            for router in routers
            if router.rule is not None
        }

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences."""
        cell = self.cells.add(batch.text, batch.group, batch.lengths)
        for router in self.routers:
            name = router.name
            count_selections(
                batch.tokens[f"experts.{name}"], batch.offsets, cell, self.counts[name]
            )
            if name in self.sums:
                probs, even, odd, mean_entropy = (
                    batch.sequences[f"{family}.{name}"] for family in FAMILIES
                )
                sums = sequence_sums(probs, even, odd, mean_entropy, batch.lengths)
                np.add.at(self.sums[name], cell, sums)

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        for name in self.counts:
            self.counts[name] += other.counts[name]
        for name in self.sums:
            self.sums[name] += other.sums[name]

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.concat(list(self._rows()), ignore_index=True)

    def _rows(self) -> Iterator[pd.DataFrame]:
        for scope in self.cells.scopes(seed=self.options.seed):
            values: dict[str, list[NDArray[np.float64]]] = {}
            layers: dict[str, list[int]] = {}
            for router in self.routers:
                found = {"load_entropy": entropy(scope.draws(self.counts[router.name]))}
                if router.name in self.sums:
                    found |= metrics(scope.draws(self.sums[router.name]))
                for name in RELATIVE:
                    if name in found and router.num_experts > 1:
                        found[f"{name}_relative"] = found[name] / np.log(router.num_experts)
                for name, value in found.items():
                    values.setdefault(name, []).append(value)
                    layers.setdefault(name, []).append(router.layer)
            for name, of_layers in values.items():
                draws = np.stack(of_layers, axis=1)
                yield layer_rows(name, scope, layers[name], draws, bounds=(0, np.inf))


def sequence_sums(
    probs: NDArray[np.float32],
    even: NDArray[np.float32],
    odd: NDArray[np.float32],
    token_entropy: NDArray[np.float32],
    lengths: NDArray[np.int64],
) -> NDArray[np.float64]:
    """[S, 4 + E] what adds up over sequences.

    Args:
        probs: [S, E] mean probabilities of each sequence.
        even: [S, E] the same of its even tokens, up to a factor.
        odd: [S, E] the same of its odd tokens, up to a factor.
        token_entropy: [S] mean entropy of its tokens.
        lengths: [S] tokens of each sequence.

    Returns:
        Tokens times: mean token entropy, entropy of the sequence's mean, distance of the halves
        (Jensen-Shannon, nats); tokens of the sequences that have two halves; tokens times probs.
    """
    mean = probs.astype(np.float64)
    halves = np.stack([even, odd]).astype(np.float64)
    sizes = halves.sum(axis=2)
    two = (sizes > 0).all(axis=0)
    halves[:, two] /= sizes[:, two, None]
    distance = np.zeros(len(mean))
    distance[two] = entropy(halves[:, two].mean(axis=0)) - entropy(halves[:, two]).mean(axis=0)
    scalars = np.stack([token_entropy, entropy(mean), distance, two], axis=1)
    return np.hstack([scalars, mean]) * lengths[:, None]


def metrics(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """[...] metrics of sums [..., 4 + E] made by `sequence_sums`."""
    tokens = sums[..., NUM_SCALARS:].sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        token_entropy, sequence_entropy = sums[..., 0] / tokens, sums[..., 1] / tokens
        floor = sums[..., 2] / sums[..., 3]
    mean_entropy = entropy(sums[..., NUM_SCALARS:])
    return {
        "token_entropy": token_entropy,
        "sequence_entropy": sequence_entropy,
        "mean_entropy": mean_entropy,
        "within_sequence_information": sequence_entropy - token_entropy,
        "between_sequence_information": mean_entropy - sequence_entropy,
        "between_sequence_floor": floor,
    }


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Entropies by layer."""
    from moetools.reporting import charts, style

    token = select(table, metric="token_entropy_relative", scope="layer")
    figure, axes = style.subplots(1, 1 if token.empty else 2, height=2.8)
    left = axes[0, 0]
    several = table["trace"].nunique() > 1
    for i, (metric, label) in enumerate(
        (
            ("load_entropy_relative", "load"),
            ("mean_entropy_relative", "all texts"),
            ("sequence_entropy_relative", "one text"),
            ("token_entropy_relative", "one token"),
        )
    ):
        found = select(table, metric=metric, scope="layer")
        options = {"ls": LINES[i]} if several else {"color": style.COLORS[i]}
        charts.lines_by_layer(left, found, label=label, **options)
    left.set(ylabel="entropy / ln E", ylim=(0, 1.02))
    left.legend(ncols=2)
    caption = "Entropy of the share of selections, 1 if even, by layer with 95 % intervals."
    if not token.empty:
        right = axes[0, 1]
        between = select(table, metric="between_sequence_information", scope="layer")
        floor = select(table, metric="between_sequence_floor", scope="layer")
        charts.lines_by_layer(right, between, label="text")
        charts.lines_by_layer(right, floor, label="floor", ls=":", marker="", color="#888888")
        right.set(ylabel="information (nats)")
        right.set_ylim(bottom=0)
        right.legend()
        caption = (
            "Left: how undecided the router is about one token, one text and all texts, 1 if all "
            "experts are equally likely. Right: how much the text alone tells about the expert, "
            "and what equal texts of these lengths would show (dotted)."
        )
    yield Picture(name="entropy_by_layer", caption=caption, figure=figure)


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """How sure the router is, and what the text tells."""
    layers = select(table, metric="token_entropy", scope="layer").sort_values("value")
    if layers.empty:
        return
    relative = single(table, "token_entropy_relative")
    first, last = layers.iloc[0], layers.iloc[-1]
    range_ = (
        f", from {np.exp(first['value']):.1f} in layer {first['layer']} to "
        f"{np.exp(last['value']):.1f} in layer {last['layer']}"
    )
    yield Finding(
        text=(
            "For one token the router hesitates between "
            f"{np.exp(single(table, 'token_entropy')):.1f} experts (exp of the entropy, "
            f"{relative:.0%} of the most possible){range_ if len(layers) > 1 else ''}."
        ),
        weight=float(np.clip(2 * (relative - 0.85) / 0.15, 0, 1)) if relative > 0.85 else 0.3,
        metric="token_entropy",
    )
    between = single(table, "between_sequence_information")
    floor, total = single(table, "between_sequence_floor"), single(table, "mean_entropy")
    known = np.isfinite(floor)
    yield Finding(
        text=(
            f"Knowing the text tells {between:.2f} of {total:.2f} nats about the expert"
            + (f"; texts of these lengths would show {floor:.2f} by accident." if known else ".")
        ),
        weight=float(np.clip(4 * (between - floor) / total, 0, 1)) if known else 0.1,
        metric="between_sequence_information",
    )


ANALYSIS = Analysis(
    title="Entropy",
    source="moetools",
    about=(
        "How undecided the router is about one token, about one text and over all texts. Between "
        "the three lies what the token, and what the text, tells about the expert. Short texts "
        "make texts look different: compare with the floor."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
