"""Which experts prefer some groups of texts, and which own words.

Domains (needs at least two groups with tokens). The frequency of an expert in a group is the share
of the group's tokens that select it.

- `domain_specialization` (expert, `layer` and `model` = mean over experts): standard deviation
  (ddof 1) over groups of the frequency, over its mean; groups where it is at most 1e-5 are left
  out, an expert with fewer than two others is too. 0 for an expert used alike everywhere.
- `domain_specialization_floor`: what the same would be without any preference, from the spread
  between blocks of texts within each group.
- `group_information` (`layer`, `model`; nats): mutual information of the group and the selected
  expert, groups weighted by their tokens. `group_information_floor`: its expectation without any
  preference, from the same spread.
- `group_lift` (expert, by group): the expert's share of the group's selections over the mean of
  this share over groups; 1 without preference.
- `load_transfer` (`group` and `group_b`; `model` = mean over pairs): Pearson correlation over all
  experts of all layers of the two groups' frequencies. `srp_transfer`: the same of the experts'
  SRP (m = 16).
- `domain_srp_correlation` (`layer`, `model`): Pearson correlation over experts of
  `domain_specialization` and SRP (m = 16).

Vocabulary, from the first expert (largest weight) of each token and three kinds of token id, named
in the column `vocabulary`: `input`, `next` (the true next token; a sequence's last is left out)
and `predicted` (needs a trace kept with predictions). Ids that occur fewer than 20 times are left
out. An id's owner is the expert chosen most often for it, its purity that expert's share.

- `vocabulary_specialization` (expert; `layer` and `model` = mean over experts that own an id):
  mean purity of the ids that the expert owns.
- `vocabulary_floor` (`layer`; `model` = mean over layers): the same if every occurrence chose by
  the layer's shares alone, simulated. Rare ids look pure by accident, so compare with this.
- `vocabulary_num_ids` (`layer`: ids counted; expert: ids owned).
- `vocabulary_fraction` (`layer`): only where the vocabulary was too large to count: the share of
  ids that were.

Intervals by bootstrap over blocks of texts; the vocabulary and SRP have none. Feed-forward
routers only.

What would fool you: groups with few texts differ in topic, not only in what names them; the floors
see that only if a group has many sequences.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
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
    each_trace,
    largest,
    layer_rows,
    mlp_routers,
    rows,
    select,
    single,
)
from moetools.expert_counts import count_selections
from moetools.information import mutual_information
from moetools.intervals import Cells, Scope, basic_interval
from moetools.locality import Selections, segment_performance, window_counts
from moetools.token_counts import PairCounts
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

WINDOW = 16
MIN_FREQUENCY = 1e-5
MIN_OCCURRENCES = 20
MAX_PAIRS = 12_000_000
MIN_SIMULATED = 4096
MAX_SIMULATED = 2_000_000


def start(trace: TraceStore, options: Options) -> "SpecializationState":
    """An empty state."""
    return SpecializationState(
        mlp_routers(trace), trace.groups, options, has_predictions="predictions" in trace.columns
    )


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, token ids, and predictions where kept."""
    routers = mlp_routers(trace)
    if not routers:
        return "The trace has no router of feed-forward experts."
    ids = ["token_id", *(["predictions"] if "predictions" in trace.columns else [])]
    return [*ids, *(f"experts.{router.name}" for router in routers)]


def limits(trace: TraceStore, state: State) -> Sequence[str]:
    """Parts that the trace does not allow."""
    missing = []
    if len(trace.groups) < 2:
        missing.append(
            "No domain specialisation: the trace has fewer than two groups. Record one with "
            "--group-column or --data GROUP=DATA."
        )
    if "predictions" not in trace.columns:
        missing.append(
            "No vocabulary specialisation of predicted tokens: record the trace with "
            "--keep predictions."
        )
    return missing


class SpecializationState:
    """Selections per cell, windows per group, and first experts per token id."""

    def __init__(
        self,
        routers: Sequence[TracedRouter],
        groups: Sequence[str],
        options: Options,
        *,
        has_predictions: bool,
    ) -> None:
        self.routers, self.options = routers, options
        self.cells = Cells(groups)
        self.counts = [
            np.zeros((len(self.cells), router.num_experts), dtype=np.int64) for router in routers
        ]
        self.windows = [
            np.zeros((len(groups) + 1, router.num_experts, WINDOW + 1), dtype=np.int64)
            for router in routers
        ]
        names = ("input", "next", "predicted") if has_predictions else ("input", "next")
        budget = MAX_PAIRS // (len(names) * len(routers))
        self.vocabulary = {
            name: [PairCounts(router.num_experts, budget) for router in routers] for name in names
        }

    def update(self, batch: TraceBatch) -> None:
        """Count whole sequences."""
        cell = self.cells.add(batch.text, batch.group, batch.lengths)
        stratum = cell // self.cells.num_blocks
        token_id = batch.tokens["token_id"]
        following = np.append(token_id[1:], -1)
        following[batch.offsets[1:] - 1] = -1
        tokens = {"input": token_id, "next": following}
        if "predicted" in self.vocabulary:
            tokens["predicted"] = batch.tokens["predictions"]
        for i, router in enumerate(self.routers):
            ids = batch.tokens[f"experts.{router.name}"]
            count_selections(ids, batch.offsets, cell, self.counts[i])
            if len(self.cells.groups) > 1:
                selections = Selections.of(ids, batch.offsets, router.num_experts)
                found = window_counts(selections, WINDOW, group=stratum).experts
                self.windows[i][: len(found)] += found
            for name, values in tokens.items():
                self.vocabulary[name][i].add(values, ids[:, 0])

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        for i in range(len(self.routers)):
            self.counts[i] += other.counts[i]
            self.windows[i] += other.windows[i]
            for name, counts in self.vocabulary.items():
                counts[i].merge(other.vocabulary[name][i])

    def table(self) -> pd.DataFrame:
        """All rows."""
        whole = next(self.cells.scopes(seed=self.options.seed))
        return pd.concat([*self._domain_rows(whole), *self._vocabulary_rows(whole)])

    def _domain_rows(self, whole: Scope) -> Iterator[pd.DataFrame]:
        tokens = self._by_group(whole, self.cells.num_tokens[:, None])
        present = np.flatnonzero(tokens[0, :, 0] > 0)
        if len(present) < 2:
            return
        names = [self.cells.groups[i] for i in present]
        layers = [router.layer for router in self.routers]
        found: dict[str, list[NDArray[np.float64]]] = {}
        transfer, srp_transfer = Correlation(), Correlation()
        pooled, pooled_floor, pooled_srp = [], [], []
        for i, router in enumerate(self.routers):
            counts = self._by_group(whole, self.counts[i])[:, present]
            frequency = counts / tokens[:, present]
            specialization = domain_specialization(frequency)
            floor = domain_floor(frequency)
            srp = segment_performance(self.windows[i][:-1].sum(axis=0)).srp
            transfer.add(frequency)
            srp_transfer.add(segment_performance(self.windows[i][present]).srp[None])
            pooled.append(specialization)
            pooled_floor.append(floor)
            pooled_srp.append(srp)
            for name, value in (
                ("domain_specialization", mean_known(specialization)),
                ("domain_specialization_floor", mean_known(floor[None])),
                ("group_information", mutual_information(counts)),
                ("group_information_floor", information_floor(counts)[None]),
                ("domain_srp_correlation", correlation(specialization[0], srp)[None]),
            ):
                found.setdefault(name, []).append(value)
            yield from self._expert_rows(whole, router, specialization, floor, counts[0], names)
        everything = {
            "domain_specialization": mean_known(np.concatenate(pooled, axis=1)),
            "domain_specialization_floor": mean_known(np.concatenate(pooled_floor)[None]),
            "domain_srp_correlation": correlation(
                np.concatenate(pooled, axis=1)[0], np.concatenate(pooled_srp)
            )[None],
        }
        for name, values in found.items():
            draws = np.stack(values, axis=1)
            bounds = (-1, 1) if name == "domain_srp_correlation" else (0, np.inf)
            parameters = {"m": WINDOW} if name == "domain_srp_correlation" else {}
            one = everything.get(name)
            pool = np.mean if one is None else None
            yield layer_rows(name, whole, layers, draws, bounds=bounds, pool=pool, **parameters)
            if one is not None:
                low, high = basic_interval(one[0], one[1:], bounds=bounds)
                yield rows(
                    name,
                    "model",
                    one[0],
                    low=low,
                    high=high,
                    num_tokens=whole.num_tokens,
                    **parameters,
                )
        yield from transfer_rows("load_transfer", transfer.matrix(), names, whole.num_tokens)
        yield from transfer_rows(
            "srp_transfer", srp_transfer.matrix(), names, whole.num_tokens, m=WINDOW
        )

    def _by_group(self, whole: Scope, sums: NDArray[np.int64]) -> NDArray[np.float64]:
        """[1 + B, G, N] sums over the blocks of each group, then those of every replicate."""
        size = self.cells.num_blocks
        result = np.empty((len(whole.weights) + 1, len(self.cells.groups), sums.shape[1]))
        for g in range(len(self.cells.groups)):
            blocks = slice(g * size, (g + 1) * size)
            result[0, g] = sums[blocks].sum(axis=0)
            result[1:, g] = whole.weights[:, blocks] @ sums[blocks].astype(np.float64)
        return result

    def _expert_rows(
        self,
        whole: Scope,
        router: TracedRouter,
        specialization: NDArray[np.float64],
        floor: NDArray[np.float64],
        counts: NDArray[np.float64],
        groups: Sequence[str],
    ) -> Iterator[pd.DataFrame]:
        place = {
            "layer": router.layer,
            "expert": np.arange(router.num_experts),
            "num_tokens": whole.num_tokens,
        }
        interval = {}
        if self.options.expert_intervals:
            low, high = basic_interval(specialization[0], specialization[1:], bounds=(0, np.inf))
            interval = {"low": low, "high": high}
        name = "domain_specialization"
        yield rows(name, "expert", specialization[0], **place, **interval)
        yield rows(f"{name}_floor", "expert", floor, **place)
        share = counts / counts.sum(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            lift = share / share.mean(axis=0)
        for group, value in zip(groups, lift, strict=True):
            yield rows("group_lift", "expert", value, group=group, **place)

    def _vocabulary_rows(self, whole: Scope) -> Iterator[pd.DataFrame]:
        generator = np.random.default_rng(self.options.seed)
        for name, of_routers in self.vocabulary.items():
            common = {"vocabulary": name, "num_tokens": whole.num_tokens}
            purities, floors = [], []
            for router, counts in zip(self.routers, of_routers, strict=True):
                place = {"layer": router.layer, **common}
                _, table = counts.table(MIN_OCCURRENCES)
                purity, owned = owned_purity(table)
                totals = counts.expert_totals()
                chance = chance_purity(table.sum(axis=1), totals / max(totals.sum(), 1), generator)
                purities.append(purity)
                floors.append(mean_known(chance).mean())
                experts = {"expert": np.arange(router.num_experts), **place}
                yield rows("vocabulary_specialization", "expert", purity, **experts)
                yield rows("vocabulary_num_ids", "expert", owned, **experts)
                yield rows("vocabulary_specialization", "layer", mean_known(purity), **place)
                yield rows("vocabulary_floor", "layer", floors[-1], **place)
                yield rows("vocabulary_num_ids", "layer", len(table), **place)
                if counts.sample > 1:
                    yield rows("vocabulary_fraction", "layer", 1 / counts.sample, **place)
            value = mean_known(np.concatenate(purities))
            yield rows("vocabulary_specialization", "model", value, **common)
            yield rows("vocabulary_floor", "model", mean_known(np.array(floors)), **common)


def domain_specialization(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviation over groups of an expert's frequency, over its mean.

    Args:
        frequency: [..., G, E] share of each group's tokens that select each expert.

    Returns:
        [..., E]; NaN with fewer than two groups above 1e-5.
    Source:
        Liang et al., arXiv 2505.16056, section 5 and code (ddof 1, entries to 1e-5 dropped).
    """
    used = frequency > MIN_FREQUENCY
    count = used.sum(axis=-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (frequency * used).sum(axis=-2) / count
        squares = ((frequency - mean[..., None, :]) ** 2 * used).sum(axis=-2)
        result = np.sqrt(squares / (count - 1)) / mean
    return np.where(count > 1, result, np.nan)


def domain_floor(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """[E] `domain_specialization` that the spread of the draws [1 + B, G, E] alone would give."""
    noise = frequency[1:].var(axis=0).mean(axis=0)
    mean = frequency[0].mean(axis=0)
    return np.asarray(np.sqrt(noise) / np.where(mean > MIN_FREQUENCY, mean, np.nan))


def information_floor(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Expected mutual information of groups and experts without preference, to second order.

    Args:
        counts: [1 + B, G, E] selections and bootstrap replicates of them.
    """
    pooled = counts.sum(axis=1, keepdims=True)
    both = np.concatenate([counts, pooled], axis=1)
    noise = (both[1:] / both[1:].sum(axis=-1, keepdims=True)).var(axis=0)
    share = pooled[0, 0] / pooled[0, 0].sum()
    excess = noise[:, share > 0] @ (0.5 / share[share > 0])
    weight = counts[0].sum(axis=1) / counts[0].sum()
    return np.asarray(np.maximum(weight @ excess[:-1] - excess[-1], 0.0))


def owned_purity(table: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vocabulary specialisation of each expert.

    Args:
        table: [V, E] how often each expert was the first one for each token id.

    Returns:
        [E] mean purity of the ids that the expert owns, NaN without any, and [E] how many it owns.
    Source:
        Muennighoff et al., arXiv 2409.02060, eq. 8 with k = 1; Liang et al., arXiv 2505.16056.
    """
    num_experts = table.shape[1]
    owner, purity = table.argmax(axis=1), table.max(axis=1) / table.sum(axis=1)
    owned = np.bincount(owner, minlength=num_experts)
    sums = np.bincount(owner, purity, minlength=num_experts)
    return np.where(owned > 0, sums / np.maximum(owned, 1), np.nan), owned


def chance_purity(
    occurrences: NDArray[np.int64], shares: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """[R, E] `owned_purity` of ids whose occurrences choose their experts independently.

    Args:
        occurrences: [V] occurrences of each id.
        shares: [E] probability of each expert.
        generator: Draws; a sample of the ids where there are many, repeated where there are few.
    """
    limit = MAX_SIMULATED // len(shares)
    if len(occurrences) > limit:
        occurrences = generator.choice(occurrences, limit, replace=False)
    repeats = int(np.clip(MIN_SIMULATED // max(len(occurrences), 1), 1, 16))
    return np.stack(
        [owned_purity(generator.multinomial(occurrences, shares))[0] for _ in range(repeats)]
    )


class Correlation:
    """Pearson correlation between groups over the experts of all layers."""

    def __init__(self) -> None:
        self._count, self._sums, self._products = 0, np.zeros(()), np.zeros(())

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in the experts of one layer, [..., G, E]; those with NaN are left out."""
        values = values[..., np.isfinite(values).all(axis=tuple(range(values.ndim - 1)))]
        self._count += values.shape[-1]
        self._sums = self._sums + values.sum(axis=-1)
        self._products = self._products + values @ values.swapaxes(-1, -2)

    def matrix(self) -> NDArray[np.float64]:
        """[..., G, G]."""
        outer = self._sums[..., :, None] * self._sums[..., None, :]
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance = self._products - outer / self._count
            spread = np.sqrt(np.diagonal(covariance, axis1=-2, axis2=-1))
            return np.asarray(covariance / (spread[..., :, None] * spread[..., None, :]))


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlation of two arrays [N] where both are known."""
    both = Correlation()
    both.add(np.stack([a, b]))
    return np.asarray(both.matrix()[0, 1])


def transfer_rows(
    metric: str,
    matrix: NDArray[np.float64],
    groups: Sequence[str],
    num_tokens: int,
    **parameters: Any,
) -> Iterator[pd.DataFrame]:
    """Rows of correlations between groups, [1 + B, G, G], and of their mean."""
    pairs = list(combinations(range(len(groups)), 2))
    a, b = (list(side) for side in zip(*pairs, strict=True))
    draws = matrix[:, a, b]
    low, high = basic_interval(draws[0], draws[1:], bounds=(-1, 1))
    yield rows(
        metric, "group", draws[0], low=low, high=high, num_tokens=num_tokens,
        group=[groups[i] for i in a], group_b=[groups[i] for i in b], **parameters,
    )  # fmt: skip
    mean = draws.mean(axis=1)
    low, high = basic_interval(mean[0], mean[1:], bounds=(-1, 1))
    yield rows(
        metric, "model", mean[0], low=low, high=high, num_tokens=num_tokens, **parameters
    )  # fmt: skip


def mean_known(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis of the entries that are not NaN; NaN without any."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis=-1) / known.sum(axis=-1))


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Preferences of experts for groups, and purity of the ids that experts own."""
    from moetools.reporting import charts, style

    for suffix, one in each_trace(table):
        yield from group_pictures(one, suffix)
    owned = select(table, metric="vocabulary_specialization", scope="layer").dropna(subset="value")
    if owned.empty:
        return
    names = list(dict.fromkeys(owned["vocabulary"]))
    figure, axes = style.subplots(1, len(names), height=2.6, sharey=True)
    for panel, name in zip(axes[0], names, strict=True):
        charts.lines_by_layer(panel, select(owned, vocabulary=name), label="owner's share")
        floor = select(table, metric="vocabulary_floor", scope="layer", vocabulary=name)
        charts.lines_by_layer(panel, floor, label="by chance", ls=":", marker="", color="#888888")
        panel.set_title(f"{name} token")
    axes[0, 0].set_ylabel("vocabulary specialisation")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, -1].legend()
    yield Picture(
        name="vocabulary_specialization",
        caption=(
            "For ids that occur at least 20 times: the share of occurrences that go to the expert "
            "that gets most of them, averaged over experts. Dotted: what chance would give with "
            "the same loads and occurrences."
        ),
        figure=figure,
    )


def group_pictures(table: pd.DataFrame, suffix: str) -> Iterator[Picture]:
    """Domain specialisation by layer, and the groups' experts."""
    from moetools.reporting import charts, style

    layers = select(table, metric="domain_specialization", scope="layer").dropna(subset="value")
    if layers.empty:
        return
    transfer = select(table, metric="load_transfer", scope="group")
    groups = sorted({*transfer["group"], *transfer["group_b"]})
    lift = select(table, metric="group_lift", scope="expert").assign(
        expert=lambda rows_: rows_["layer"] * 100_000 + rows_["expert"]
    )
    values, names, keys = charts.matrix(lift, index="group")
    order = np.argsort(np.where(np.isfinite(values), values, 0).argmax(axis=0), kind="stable")
    with np.errstate(divide="ignore", invalid="ignore"):
        levels = np.clip(np.log2(values[:, order]), -3, 3)
    height = charts.heatmap_height(len(groups)) + 2.2
    figure, axes = style.subplots(2, 1, height=height, height_ratios=(2.2, height - 2.2))
    charts.lines_by_layer(axes[0, 0], layers, label="measured")
    floor = select(table, metric="domain_specialization_floor", scope="layer")
    charts.lines_by_layer(axes[0, 0], floor, label="by chance", ls=":", marker="", color="#888888")
    axes[0, 0].set(ylabel="domain specialisation")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend()
    style.heatmap(
        axes[1, 0], levels, rows=names, center=0, vmin=-2, vmax=2, label="share over mean (log2)"
    )
    axes[1, 0].set(xlabel=f"{len(keys)} experts of all layers, by the group that uses them most")
    yield Picture(
        name=f"domain_specialization{suffix}",
        caption=(
            "Above: how much the frequency of an expert differs between groups (standard deviation "
            "over mean), by layer, and what the differences between texts of one group would "
            "give. Below: each expert's share of a group's selections over its mean share."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Preferences for groups and for token ids."""
    yield from domain_findings(table)
    for name, meaning in (("input", "that it reads"), ("next", "that comes next")):
        found = single(table, "vocabulary_specialization", vocabulary=name)
        chance = single(table, "vocabulary_floor", vocabulary=name)
        if np.isfinite(found) and np.isfinite(chance):
            yield Finding(
                text=(
                    f"The token {meaning} is bound to an expert: its owner gets {found:.0%} of its "
                    f"occurrences, by chance {chance:.0%}."
                    if found > 1.1 * chance
                    else f"Experts hardly depend on the token {meaning}: the owner of an id gets "
                    f"{found:.0%} of its occurrences, by chance {chance:.0%}."
                ),
                weight=float(np.clip((found - chance) / (1 - chance), 0, 1)) if chance < 1 else 0.0,
                metric="vocabulary_specialization",
            )


def domain_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """How far experts prefer groups, and the strongest preference."""
    value = single(table, "domain_specialization")
    floor = single(table, "domain_specialization_floor")
    if not np.isfinite(value):
        return
    clear = not value < 1.5 * floor
    layers = select(table, metric="domain_specialization", scope="layer").dropna(subset="value")
    most = largest(layers)
    chance = f" ({floor:.2f} by chance)" if np.isfinite(floor) else ""
    yield Finding(
        text=(
            f"Experts {'prefer' if clear else 'do not clearly prefer'} some groups: the frequency "
            f"of an expert differs by {value:.0%} of its mean between groups{chance}, most in "
            f"layer {most['layer']} ({most['value']:.2f})."
        ),
        weight=float(np.clip(value - floor, 0.1, 1)) if clear and np.isfinite(floor) else 0.1,
        metric="domain_specialization",
    )
    own = select(table, metric="domain_specialization", scope="expert")
    noise = select(table, metric="domain_specialization_floor", scope="expert")
    sure = own.loc[own["value"].to_numpy() > 3 * noise["value"].to_numpy(), ["layer", "expert"]]
    lift = select(table, metric="group_lift", scope="expert").merge(sure, on=["layer", "expert"])
    if len(lift):
        best = largest(lift)
        yield Finding(
            text=(
                f"The clearest preference: expert {best['expert']} of layer {best['layer']} takes "
                f"{best['value']:.1f} times its mean share in {best['group']}."
            ),
            weight=float(np.clip((best["value"] - 1) / 8, 0, 0.9)),
            metric="group_lift",
        )


ANALYSIS = Analysis(
    title="Specialisation",
    source=(
        "Domain specialisation: Liang et al., arXiv 2505.16056. Vocabulary specialisation: "
        "Muennighoff et al., arXiv 2409.02060, eq. 8, with the first expert. Floors: moetools."
    ),
    about=(
        "Whether experts prefer some groups of texts (domains, languages) and some token ids. "
        "Small samples always look specialised: compare with the floor, which is what the same "
        "number would be without preference."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
