"""Whether the same content is routed alike in different languages, and which experts differ.

Groups are languages; texts of different groups with the same id are translations of each other.
An item is a text in all its languages; its profile in one language is the mean of the router's
probabilities over the tokens of the text. The reference is the trace's reference group.

Divergence of two profiles a and b over E experts (H entropy, M their mean):
D = (H(M) - (H(a) + H(b)) / 2) / (ln E - (H(a) + H(b)) / 2): 0 equal, 1 if M is uniform. Two
unrelated profiles have D near 0.5 where the router is nearly balanced, from noise alone: read
every D against the two floors of its layer.

- `divergence` (`group` with and without layer; `layer` and `model` = mean over languages): mean
  over items of D between the reference and the language.
- `divergence_floor_half` (`layer`, `model`): D between the even and the odd tokens of the same
  reference text; `group` with and without layer: of the language's own text.
  `divergence_floor_other`: D between the even tokens of one reference text and the odd tokens of
  another.
- `divergence_excess` (scopes of `divergence`): mean over items of D between the even tokens in one
  language and the odd tokens in the other, both ways, minus the mean of those between the halves
  of each of the two texts, all over one denominator, so that their noise cancels. Above 0: the
  language is routed differently beyond noise. `divergence_excess_other` (`layer`, `model`): the
  same between two texts of the reference.
- `divergence_excess_allowance` (`group`, `model`): what unequal lengths alone may leave in the
  former, which errs upwards: 0.15 ((m - n) / (m + n))^2 for texts of m and n tokens, mean over
  items; 0.017 for twice, 0.054 for four times the tokens. It bounds what simulations of equal
  routing left; routers far from one-hot left at most a third of it from 40 tokens on. Findings
  claim only what exceeds it.
- `divergence_ratio` = `divergence_excess` / `divergence_excess_other`: 0 as alike as two halves of
  a text, 1 as different as another text. Null where the latter is not clearly above 0 (intervals
  by Fieller's method); without layer, the ratio of the means over layers.
- `divergence_u`, `divergence_excess_u` (`end` is `first` or `last`; `group` and `model`): the
  first, or last, quarter of the layers minus the middle ones. Both above 0 is a U.
- `divergence_pair` (pair, `layer` null for the mean over layers): D of every two languages.
- `num_items` (`group`): items of the language that the reference has too, of those kept.
- `profile_entropy` (nats; `group` with and without layer): mean of H over the profiles of single
  sequences. That of single tokens is `token_entropy` of the analysis `entropy`.
- `consistency` (`group` with and without layer): mean Jaccard similarity of the experts selected
  by two tokens of a sequence, over all pairs of tokens (of 1,024 tokens drawn from longer ones),
  then over sequences. `consistency_chance_uniform` (`layer`, `model`): the same of independent
  uniform sets. `consistency_chance_skewed`: of independent sets with the experts' frequencies in
  this language, simulated.
- `frequency_delta` (expert, for each group): mean over sequences of the share of tokens that
  select the expert, minus the same of the reference; -1 to 1, sums to 0 over a layer.
- `num_language_experts` (`tau`; `group` with and without layer): experts with a `frequency_delta`
  above tau; for groups that share no item with the reference (tasks, domains)
  `num_task_experts`. `num_multilingual_experts` (`layer`, `model`): above tau in any language.
  Without layer: summed over layers. `num_language_experts_floor` (`layer`, `model`): the same
  between two halves of the reference's texts.
- `expert_overlap`, `expert_overlap_expected`, `expert_overlap_p_fewer`, `expert_overlap_p_more`
  (`tau`; `group`: task experts that are multilingual experts too; without tasks pair: experts that
  two languages share): number, expectation for random sets of these sizes (hypergeometric, layer
  by layer), and the probabilities that random sets share as few or fewer, or as many or more.
- `score` (`group`; `score_source`): `given` (`--scores`), or `measured`: minus the nats of an item,
  mean over the items that all languages have (trace kept with nll).
- `divergence_score_r` (`correlation` is `pearson` or `spearman`; `layer`; `model` = of the mean
  over layers): correlation over languages of `divergence` and `score`, the reference left out,
  with an interval by Fisher's z. `divergence_score_p`: two-sided permutation p-value.
  `divergence_score_p_largest` (`model`): of the largest |r| of all layers.
  `divergence_score_num_groups`: languages. With at least 4.

Intervals resample items, the same in all languages; those of `divergence_floor_other` and
`divergence_excess_other`, over pairs of items, are up to a third too wide. Items are kept up to
2,048 by a hash of their id (fewer where groups, layers and experts are many); `num_tokens` says on
how many tokens a number rests. Feed-forward routers only.

What would fool you: a tokenizer that cuts one language into more tokens, and special tokens that
all share, move D without any meaning. `divergence` is of whole texts and hence lies a little below
what its floors, of halves, would suggest, the more so the more tokens a language takes: that bias
is gone from `divergence_excess` up to its allowance, but not from `divergence`, its U, the pairs
and the correlation with the score. A score that goes with length goes with both. With 17 languages
an r of 0.48 is the least that chance alone rarely gives.
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
    each_trace,
    layer_rows,
    mlp_routers,
    rows,
    select,
    single,
    stacked,
)
from moetools.information import entropy
from moetools.intervals import Cells, Scope, basic_interval, block_of, replicate_weights
from moetools.profiles import (
    MAX_TOKENS,
    MIN_CORRELATED,
    Floats,
    ItemSample,
    chance_jaccard,
    correlation,
    divergence,
    divergence_beyond_halves,
    divergence_of_normalised,
    item_hash,
    item_means,
    length_allowance,
    mean_between_items,
    mean_jaccard,
    normalised,
    overlap,
    ratio_of_draws,
    sequence_frequencies,
    skewed_jaccard,
)
from moetools.trace_store import TraceBatch, TracedRouter, TraceStore

FAMILIES = ("probs", "probs_even", "probs_odd")
HALVES = FAMILIES[1:]
TAUS = (0.1, 0.2, 0.3, 0.4, 0.5)
MAX_ITEMS = 2048
MAX_NUMBERS = 32_000_000
"""Probabilities of items that are kept, 8 bytes each."""
MAX_PAIR_WORK = 4e8
"""Probabilities that the divergences of all pairs of languages may touch."""
MAX_PAIR_ROWS = 50_000
MAX_OVERLAPS = 2000
"""Pairs of languages whose experts are compared."""
MAX_SIMILARITIES = 1.2e10
"""Words of 64 experts that the consistency may compare: about 10 s."""
SAMPLE = 1 << 20
MAX_LABELS = 40
ENDS = ("first", "last")
CORRELATIONS = ("pearson", "spearman")


def start(trace: TraceStore, options: Options) -> "MultilingualState":
    """An empty state."""
    return MultilingualState(trace, options)


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """Selections, ids, and the sums of probabilities where the rule is known."""
    routers = mlp_routers(trace)
    if not routers:
        return "The trace has no router of feed-forward experts."
    if not trace.groups:
        return (
            "The trace has no groups to compare. Record one with --group-column or "
            "--data GROUP=DATA, and --id-column for translations."
        )
    needed = ["id", *(["nll"] if trace.manifest.has_nll else [])]
    needed += [f"experts.{router.name}" for router in routers]
    return needed + [
        f"{family}.{router.name}"
        for router in routers
        if router.rule is not None
        for family in FAMILIES
    ]


def limits(trace: TraceStore, state: "MultilingualState") -> Sequence[str]:
    """Parts that the trace does not allow, and what rests on a sample."""
    found = []
    routers = mlp_routers(trace)
    reference = reference_of(trace)
    if reference is None:
        found.append(
            "No divergence from a reference and no specialised experts: the trace names no "
            "reference group. Record it with --reference-group."
        )
    unknown = [str(router.layer) for router in routers if router.rule is None]
    if unknown:
        found.append(
            "No divergence and no entropy of profiles for layers whose scoring rule is unknown, "
            f"hence without probabilities: {', '.join(unknown)}."
        )
    present = state.items.sums["tokens"] > 0
    shared = present[present.sum(axis=1) > 1]
    languages = shared.any(axis=0)
    if reference is not None:
        languages = shared[shared[:, reference]].any(axis=0)
        languages[reference] = False
    if not languages.any():
        found.append(
            "No divergence: no text of one group is a translation of a text of "
            f"{'another' if reference is None else 'the reference'}. Record the trace with "
            "--id-column."
        )
    elif reference is not None and languages.sum() < MIN_CORRELATED:
        found.append(
            f"No correlation of divergence with a score: it takes {MIN_CORRELATED} languages "
            f"besides the reference, the trace has {languages.sum()}."
        )
    elif reference is not None and not trace.manifest.has_nll and not state.options.scores:
        found.append(
            "The score of each language was not measured: record the trace with --keep nll, or "
            "give scores with --scores."
        )
    unknown_groups = sorted(set(state.options.scores) - set(trace.groups))
    if unknown_groups:
        found.append(f"--scores names groups that the trace lacks: {', '.join(unknown_groups)}.")
    if reference is not None and state.options.scores:
        scored = set(state.options.scores) & set(trace.groups) - {trace.groups[reference]}
        if len(scored) < MIN_CORRELATED:
            found.append(
                f"No correlation with the given scores: it takes {MIN_CORRELATED} languages "
                f"besides the reference, --scores has {len(scored)}."
            )
    if state.items.is_full:
        found.append(f"Divergence on {state.items.capacity:,} ids, chosen by a hash.")
    num_pairs = len(trace.groups) * (len(trace.groups) - 1) // 2
    if num_pairs > MAX_OVERLAPS:
        found.append(
            f"No overlap of the experts of every two languages: {num_pairs:,} pairs are more than "
            f"{MAX_OVERLAPS:,}."
        )
    fraction = consistency_fraction(trace)
    if fraction < 1:
        found.append(f"Consistency on {fraction:.1%} of the sequences, chosen by a hash.")
    return found


def reference_of(trace: TraceStore) -> int | None:
    """Index of the group that the others are compared with; None if the trace has none."""
    name = trace.manifest.reference_group
    return trace.groups.index(name) if name in trace.groups else None


def num_items(routers: Sequence[TracedRouter], num_groups: int) -> int:
    """Items whose profiles are kept."""
    of_item = (
        2 * num_groups * sum(router.num_experts for router in routers if router.rule is not None)
    )
    return max(2, min(MAX_ITEMS, MAX_NUMBERS // max(1, of_item)))


def consistency_fraction(trace: TraceStore) -> float:
    """Share of the sequences whose consistency is computed, so that it takes bounded time."""
    length = trace.num_tokens / max(1, trace.num_sequences)
    pairs = trace.num_sequences * min(length, MAX_TOKENS) ** 2 / 2
    words = sum(-(-router.num_experts // 64) for router in mlp_routers(trace))
    return min(1.0, MAX_SIMILARITIES / max(1.0, pairs * words))


class MultilingualState:
    """Profiles of a sample of items, and per cell sums over sequences."""

    def __init__(self, trace: TraceStore, options: Options) -> None:
        self.routers, self.options = mlp_routers(trace), options
        self.groups, self.has_nll = trace.groups, trace.manifest.has_nll
        self.reference = reference_of(trace)
        self.sampled = int(SAMPLE * consistency_fraction(trace))
        self.known = [router for router in self.routers if router.rule is not None]
        shapes: dict[str, tuple[int, ...]] = {"tokens": (len(self.groups),)}
        if self.has_nll:
            shapes["nats"] = (len(self.groups),)
        for router in self.known:
            for half in HALVES:
                shapes[f"{half}.{router.name}"] = (len(self.groups), router.num_experts)
        self.items = ItemSample(num_items(self.routers, len(self.groups)), shapes)
        self.cells = Cells(self.groups)
        self.num_sequences = np.zeros(len(self.cells))
        self.num_compared = np.zeros(len(self.cells), dtype=np.int64)
        """Tokens of the sequences whose consistency is computed."""
        self.frequency = [np.zeros((len(self.cells), r.num_experts)) for r in self.routers]
        self.consistency = [np.zeros((len(self.cells), 2)) for _ in self.routers]
        self.entropy = [np.zeros(len(self.cells)) for _ in self.known]

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences."""
        ids = batch.sequences["id"]
        unit = np.array(
            [number if item is None else item_hash(item) & 0x7FFFFFFF
             for number, item in zip(batch.text.tolist(), ids, strict=True)],
            dtype=np.int32,
        )  # fmt: skip
        cell = self.cells.add(unit, batch.group, batch.lengths)
        np.add.at(self.num_sequences, cell, 1)
        compared = block_of(batch.sequence, SAMPLE) < self.sampled
        np.add.at(self.num_compared, cell[compared], batch.lengths[compared])
        tokens = np.repeat(compared, batch.lengths)
        offsets = np.concatenate([[0], np.cumsum(batch.lengths[compared])])
        for i, router in enumerate(self.routers):
            selected = batch.tokens[f"experts.{router.name}"]
            found = sequence_frequencies(selected, batch.offsets, router.num_experts)
            np.add.at(self.frequency[i], cell, found)
            similarity = mean_jaccard(
                selected if compared.all() else selected[tokens],
                offsets,
                router.num_experts,
                sequence=batch.sequence[compared],
                seed=self.options.seed,
            )
            known = np.isfinite(similarity)
            sums = np.stack([similarity[known], np.ones(int(known.sum()))], axis=1)
            np.add.at(self.consistency[i], cell[compared][known], sums)
        for i, router in enumerate(self.known):
            np.add.at(self.entropy[i], cell, entropy(batch.sequences[f"probs.{router.name}"]))
        self._add_items(batch)

    def _add_items(self, batch: TraceBatch) -> None:
        slot = self.items.slots(batch.sequences["id"])
        kept = np.flatnonzero((slot >= 0) & (batch.group >= 0))
        slot, group, lengths = slot[kept], batch.group[kept], batch.lengths[kept]
        sums = self.items.sums
        np.add.at(sums["tokens"], (slot, group), lengths)
        if self.has_nll:
            nats = np.where(lengths > 1, batch.sequences["nll"][kept] * (lengths - 1.0), 0)
            np.add.at(sums["nats"], (slot, group), nats)
        for router in self.known:
            for half in HALVES:
                name = f"{half}.{router.name}"
                np.add.at(sums[name], (slot, group), batch.sequences[name][kept] * lengths[:, None])

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.items.merge(other.items)
        self.cells.merge(other.cells)
        self.num_sequences += other.num_sequences
        self.num_compared += other.num_compared
        for mine, theirs in (
            (self.frequency, other.frequency),
            (self.consistency, other.consistency),
            (self.entropy, other.entropy),
        ):
            for sums, added in zip(mine, theirs, strict=True):
                sums += added

    def table(self) -> pd.DataFrame:
        """All rows."""
        order = self.items.in_order()
        tokens = self.items.sums["tokens"][order]
        scopes = self._scopes()
        parts = [*self._sequence_rows(scopes)]
        shared = self._shared(tokens)
        if self.reference is not None:
            languages = np.flatnonzero(shared[self.reference]).tolist()
            if languages and self.known:
                parts += self._divergence_rows(order, tokens, languages)
            if len(scopes) > 1 and self.reference in scopes:
                parts += self._expert_rows(scopes, languages)
        if shared.any() and self.known:
            parts += self._pair_rows(order, tokens, shared)
        return pd.concat(parts, ignore_index=True)

    def _scopes(self) -> dict[int, Scope]:
        """The groups that have tokens; every draw takes the same blocks of ids in each."""
        size = self.cells.num_blocks
        tokens = self.cells.num_tokens.reshape(-1, size)[: len(self.groups)]
        occupied: NDArray[np.bool_] = tokens > 0
        some: NDArray[np.bool_] = np.any(occupied, axis=0)
        weights = replicate_weights(some, seed=self.options.seed)
        nothing = np.full_like(weights, np.nan)
        scopes = {}
        for g in np.flatnonzero(occupied.any(axis=1)):
            cells = slice(g * size, (g + 1) * size)
            scopes[int(g)] = Scope(
                group=self.groups[g],
                num_tokens=int(self.cells.num_tokens[cells].sum()),
                cells=cells,
                weights=weights if occupied[g].sum() > 1 else nothing,
            )
        return scopes

    @staticmethod
    def _shared(tokens: Floats) -> NDArray[np.bool_]:
        """[G, G] whether two groups have items in common."""
        present = (tokens > 0).astype(np.float64)
        shared = present.T @ present > 0
        np.fill_diagonal(shared, False)
        return np.asarray(shared)

    # Entropy and consistency

    def _sequence_rows(self, scopes: dict[int, Scope]) -> Iterator[pd.DataFrame]:
        layers = [router.layer for router in self.routers]
        chance = np.array([[chance_jaccard(r.num_experts, r.top_k) for r in self.routers]])
        yield layer_rows(
            "consistency_chance_uniform", scope_of(None, int(self.num_compared.sum())),
            layers, chance,
        )  # fmt: skip
        for scope in scopes.values():
            count = scope.draws(self.num_sequences)
            if self.known:
                with np.errstate(divide="ignore", invalid="ignore"):
                    draws = [scope.draws(sums) / count for sums in self.entropy]
                yield layer_rows(
                    "profile_entropy",
                    scope,
                    [router.layer for router in self.known],
                    np.stack(draws, axis=1),
                    bounds=(0, np.inf),
                )
            similar = np.stack([scope.draws(sums) for sums in self.consistency], axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                consistency = similar[..., 0] / similar[..., 1]
            compared = scope_of(scope.group, int(self.num_compared[scope.cells].sum()))
            yield layer_rows("consistency", compared, layers, consistency, bounds=(0, 1))
            skewed = [
                skewed_jaccard(sums[scope.cells].sum(axis=0), r.top_k, seed=self.options.seed)
                for r, sums in zip(self.routers, self.frequency, strict=True)
            ]
            yield layer_rows("consistency_chance_skewed", scope, layers, np.array([skewed]))

    # Divergence

    def _profiles(self, router: TracedRouter, order: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """[N, G, E] even and odd tokens; their sum is the profile, 0 where a group has no item."""
        even, odd = (self.items.sums[f"{half}.{router.name}"][order] for half in HALVES)
        return even, odd

    def _divergence_rows(
        self, order: NDArray[np.int64], tokens: Floats, languages: Sequence[int]
    ) -> Iterator[pd.DataFrame]:
        assert self.reference is not None
        common = (tokens[:, languages] > 0).any(axis=1) & (tokens[:, self.reference] > 0)
        order, tokens = order[common], tokens[common]
        weights = replicate_weights(np.ones(len(order), dtype=bool), seed=self.options.seed)
        values, beyond, halves, between = [], [], [], []
        for router in self.known:
            even, odd = self._profiles(router, order)
            our_even, our_odd = even[:, [self.reference]], odd[:, [self.reference]]
            distance = divergence(our_even + our_odd, (even + odd)[:, languages])
            values.append(item_means(distance, weights))
            excess = divergence_beyond_halves(
                our_even, our_odd, even[:, languages], odd[:, languages]
            )
            beyond.append(item_means(excess, weights))
            own = divergence(even, odd)[:, [self.reference, *languages]]
            halves.append(item_means(own, weights))
            two = np.isfinite(own[:, 0])
            between.append(self._between_texts(our_even[two, 0], our_odd[two, 0], weights[:, two]))
        # [1 + B, languages, L] thrice, the reference first in `half`, and [1 + B, 2, L]
        value, excess, half, apart = (
            np.stack(draws, axis=2) for draws in (values, beyond, halves, between)
        )
        layers = [router.layer for router in self.known]
        of_reference = scope_of(None, int(tokens[:, self.reference].sum()))
        for name, draws, least in (
            ("divergence_floor_half", half[:, 0], 0),
            ("divergence_floor_other", apart[:, 0], 0),
            ("divergence_excess_other", apart[:, 1], -1),
        ):
            yield layer_rows(name, of_reference, layers, draws, bounds=(least, 1))
        both = (tokens[:, languages] > 0) & (tokens[:, [self.reference]] > 0)
        counted = tokens[:, [self.reference]] + tokens[:, languages]
        used = [int(counted[both[:, i], i].sum()) for i in range(len(languages))]
        everything = int(tokens[:, [self.reference, *languages]].sum())
        scopes = [scope_of(self.groups[g], n) for g, n in zip(languages, used, strict=True)]
        for i, scope in enumerate(scopes):
            yield rows(
                "num_items", "group", int(both[:, i].sum()), group=scope.group,
                num_tokens=scope.num_tokens,
            )  # fmt: skip
            own_tokens = scope_of(scope.group, int(tokens[both[:, i], languages[i]].sum()))
            yield layer_rows(
                "divergence_floor_half", own_tokens, layers, half[:, 1 + i], bounds=(0, 1)
            )
        scopes.append(scope_of(None, everything))
        allowed = length_allowance(tokens[:, [self.reference]], tokens[:, languages])
        allowed = item_means(np.where(both, allowed, np.nan), np.empty((0, len(order))))[0]
        for scope, bound in zip(scopes, [*allowed, allowed.mean()], strict=True):
            yield rows(
                "divergence_excess_allowance", "model" if scope.group is None else "group", bound,
                group=scope.group, num_tokens=scope.num_tokens,
            )  # fmt: skip
        for name, draws, least in (("divergence", value, 0), ("divergence_excess", excess, -1)):
            draws = with_mean(draws, axis=1)
            for i, scope in enumerate(scopes):
                yield layer_rows(name, scope, layers, draws[:, i], bounds=(least, 1))
                if len(layers) >= 3:
                    yield bend_rows(f"{name}_u", scope, draws[:, i])
        ratio, low, high = ratio_of_draws(
            with_mean(with_mean(excess, axis=1), axis=2), with_mean(apart[:, 1:], axis=2)
        )
        layer = pd.array([*layers, pd.NA], dtype="Int64")
        for i, scope in enumerate(scopes):
            names = np.where(layer.isna(), "model", "layer") if scope.group is None else "group"
            yield rows(
                "divergence_ratio", "layer", ratio[i], layer=layer, low=low[i], high=high[i],
                group=scope.group, num_tokens=scope.num_tokens,
            ).assign(scope=names)  # fmt: skip
        yield from self._score_rows(order, tokens, weights, languages, value[0], layers)

    @staticmethod
    def _between_texts(even: Floats, odd: Floats, weights: Floats) -> Floats:
        """[1 + B, 2] divergence of halves of different texts, and the same beyond their halves."""

        def apart(partner: NDArray[np.int64]) -> Floats:
            return divergence(even, odd[partner])

        def beyond(partner: NDArray[np.int64]) -> Floats:
            return divergence_beyond_halves(even, odd, even[partner], odd[partner])

        return np.stack([mean_between_items(f, weights) for f in (apart, beyond)], axis=1)

    def _pair_rows(
        self, order: NDArray[np.int64], tokens: Floats, shared: NDArray[np.bool_]
    ) -> Iterator[pd.DataFrame]:
        pairs = [pair for pair in combinations(range(len(self.groups)), 2) if shared[pair]]
        order = order[(tokens > 0).sum(axis=1) > 1]
        num_experts = sum(router.num_experts for router in self.known)
        order = order[: max(2, int(MAX_PAIR_WORK / (len(pairs) * num_experts)))]
        tokens = self.items.sums["tokens"][order]
        weights = replicate_weights(np.ones(len(order), dtype=bool), seed=self.options.seed)
        one, other = np.array(pairs).T
        both = (tokens[:, one] > 0) & (tokens[:, other] > 0)
        place: dict[str, Any] = {
            "group": np.array(self.groups, dtype=object)[one],
            "group_b": np.array(self.groups, dtype=object)[other],
            "num_tokens": ((tokens[:, one] + tokens[:, other]) * both).sum(axis=0).astype(int),
        }
        total = np.zeros((1 + len(weights), len(pairs)))
        for router in self.known:
            profiles = normalised(np.add(*self._profiles(router, order)))
            own = entropy(profiles)
            distance = np.empty((len(order), len(pairs)))
            for g in np.unique(one):
                which = one == g
                distance[:, which] = divergence_of_normalised(
                    profiles[:, [g]], profiles[:, other[which]], own[:, [g]], own[:, other[which]]
                )
            draws = item_means(distance, weights)
            total += draws / len(self.known)
            if len(pairs) * len(self.known) <= MAX_PAIR_ROWS:
                low, high = basic_interval(draws[0], draws[1:], bounds=(0, 1))
                yield rows(
                    "divergence_pair", "pair", draws[0], low=low, high=high, layer=router.layer,
                    **place,
                )  # fmt: skip
        low, high = basic_interval(total[0], total[1:], bounds=(0, 1))
        yield rows("divergence_pair", "pair", total[0], low=low, high=high, **place)

    # Scores

    def _score_rows(
        self,
        order: NDArray[np.int64],
        tokens: Floats,
        weights: Floats,
        languages: Sequence[int],
        value: Floats,
        layers: Sequence[int],
    ) -> Iterator[pd.DataFrame]:
        assert self.reference is not None
        scored = [self.reference, *languages]
        names = [self.groups[g] for g in scored]
        num_tokens = int(tokens[:, scored].sum())
        everywhere: NDArray[np.bool_] = np.all(tokens[:, scored] > 0, axis=1)
        if self.options.scores:
            source, low, high = "given", None, None
            score = np.array([self.options.scores.get(name, np.nan) for name in names])
        elif self.has_nll and everywhere.any():
            source = "measured"
            nats = np.where(everywhere[:, None], self.items.sums["nats"][order][:, scored], np.nan)
            draws = item_means(-nats, weights)
            score, (low, high) = draws[0], basic_interval(draws[0], draws[1:])
            num_tokens = int(tokens[everywhere][:, scored].sum())
        else:
            return
        yield rows(
            "score", "group", score, group=names, low=low, high=high, score_source=source,
            num_tokens=num_tokens,
        ).dropna(subset="value")  # fmt: skip
        known = np.isfinite(score[1:]) & np.isfinite(value).all(axis=1)
        if known.sum() < MIN_CORRELATED:
            return
        mean = value[known].mean(axis=1, keepdims=True)
        common: dict[str, Any] = {"score_source": source, "num_tokens": num_tokens}
        for name in CORRELATIONS:
            found, whole = (
                correlation(
                    score[1:][known], values, ranks=name == "spearman", seed=self.options.seed
                )
                for values in (value[known], mean)
            )
            for scope, layer, one in (("layer", layers, found), ("model", None, whole)):
                place = {"layer": layer, "correlation": name, **common}
                yield rows("divergence_score_r", scope, one.r, low=one.low, high=one.high, **place)
                yield rows("divergence_score_p", scope, one.p, **place)
            yield rows(
                "divergence_score_p_largest", "model", found.p_largest, correlation=name, **common
            )
        yield rows("divergence_score_num_groups", "model", int(known.sum()), **common)

    # Specialised experts

    def _expert_rows(
        self, scopes: dict[int, Scope], languages: Sequence[int]
    ) -> Iterator[pd.DataFrame]:
        assert self.reference is not None
        reference = scopes[self.reference]
        others = {g: scope for g, scope in scopes.items() if g != self.reference}
        tasks = [g for g in others if g not in languages] if languages else []
        base = self._frequency_draws(reference)
        deltas: dict[int, list[Floats]] = {}
        parts: list[dict[str, Any]] = []
        for g, scope in others.items():
            changes = [
                draws - of_base
                for draws, of_base in zip(self._frequency_draws(scope), base, strict=True)
            ]
            deltas[g] = [change[0] for change in changes]
            for router, change in zip(self.routers, changes, strict=True):
                low, high = basic_interval(change[0], change[1:], bounds=(-1, 1))
                parts.append(
                    {
                        "metric": "frequency_delta", "scope": "expert", "value": change[0],
                        "low": low, "high": high, "layer": router.layer,
                        "expert": np.arange(router.num_experts), "group": scope.group,
                        "num_tokens": scope.num_tokens,
                    }
                )  # fmt: skip
        halves = self._half_deltas(reference)
        for tau in TAUS:
            sets = {g: [delta > tau for delta in of_group] for g, of_group in deltas.items()}
            parts += (part | {"tau": tau} for part in self._set_parts(sets, scopes, tasks))
            num_tokens = sum(scope.num_tokens for scope in scopes.values())
            yield from self._overlap_rows(tau, sets, tasks, num_tokens)
            if np.isfinite(halves[0]).all():
                floor = [((h > tau).sum() + (h < -tau).sum()) / 2 for h in halves]
                half = scope_of(None, reference.num_tokens)
                for part in self._count_parts("num_language_experts_floor", half, floor):
                    parts.append(part | {"tau": tau})
        yield stacked(parts)

    def _frequency_draws(self, scope: Scope) -> list[Floats]:
        """[1 + B, E] mean frequencies of each router."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if not self.options.expert_intervals:
                count = self.num_sequences[scope.cells].sum()
                return [sums[scope.cells].sum(axis=0)[None] / count for sums in self.frequency]
            draws = scope.draws(self.num_sequences)[:, None]
            return [scope.draws(sums) / draws for sums in self.frequency]

    def _half_deltas(self, reference: Scope) -> list[Floats]:
        """[E] difference between two halves of the reference's blocks, for each router."""
        count = self.num_sequences[reference.cells]
        half = np.cumsum(count > 0) % 2 == 1
        with np.errstate(divide="ignore", invalid="ignore"):
            return [
                sums[reference.cells][half].sum(axis=0) / count[half].sum()
                - sums[reference.cells][~half].sum(axis=0) / count[~half].sum()
                for sums in self.frequency
            ]

    def _set_parts(
        self,
        sets: dict[int, list[NDArray[np.bool_]]],
        scopes: dict[int, Scope],
        tasks: Sequence[int],
    ) -> Iterator[dict[str, Any]]:
        """Numbers of specialised experts, for `stacked`.

        Args:
            sets: [E] whether each expert is special, for each group and router.
            scopes: The groups.
            tasks: The groups that are no languages.
        """
        assert self.reference is not None
        languages = [g for g in sets if g not in tasks]
        for g, found in sets.items():
            name = "num_task_experts" if g in tasks else "num_language_experts"
            yield from self._count_parts(name, scopes[g], [one.sum() for one in found])
        if languages:
            whole = scope_of(None, sum(scopes[g].num_tokens for g in (self.reference, *languages)))
            counts = [one.sum() for one in self._any_of(sets, languages)]
            yield from self._count_parts("num_multilingual_experts", whole, counts)

    def _overlap_rows(
        self,
        tau: float,
        sets: dict[int, list[NDArray[np.bool_]]],
        tasks: Sequence[int],
        num_tokens: int,
    ) -> Iterator[pd.DataFrame]:
        """Experts of tasks that are multilingual ones too; else those that languages share."""
        languages = [g for g in sets if g not in tasks]
        names = np.array(self.groups, dtype=object)
        if tasks and languages:
            every = self._any_of(sets, languages)
            found = [overlap(sets[g], every) for g in tasks]
            place: dict[str, Any] = {"scope": "group", "group": names[list(tasks)]}
        else:
            pairs = list(combinations(languages, 2))
            if not 0 < len(pairs) <= MAX_OVERLAPS:
                return
            found = [overlap(sets[one], sets[other]) for one, other in pairs]
            one, other = np.array(pairs).T
            place = {"scope": "pair", "group": names[one], "group_b": names[other]}
        for suffix, value in (
            ("", [of.shared for of in found]),
            ("_expected", [of.expected for of in found]),
            ("_p_fewer", [of.p_fewer for of in found]),
            ("_p_more", [of.p_more for of in found]),
        ):
            yield rows(
                f"expert_overlap{suffix}", value=np.array(value, float), tau=tau,
                num_tokens=num_tokens, **place,
            )  # fmt: skip

    def _any_of(
        self, sets: dict[int, list[NDArray[np.bool_]]], groups: Sequence[int]
    ) -> list[NDArray[np.bool_]]:
        """[E] the experts that are special to any of these groups, for each router."""
        return [
            np.logical_or.reduce([sets[g][i] for g in groups]) for i in range(len(self.routers))
        ]

    def _count_parts(
        self, metric: str, scope: Scope, counts: Sequence[float]
    ) -> Iterator[dict[str, Any]]:
        """A count of each layer, and of all."""
        common = {"metric": metric, "group": scope.group, "num_tokens": scope.num_tokens}
        own = None if scope.group is None else "group"
        layers = np.array([router.layer for router in self.routers])
        yield {"scope": own or "layer", "layer": layers, "value": np.array(counts, float), **common}
        yield {"scope": own or "model", "value": float(sum(counts)), **common}


def scope_of(group: str | None, num_tokens: int) -> Scope:
    """A scope that only names its rows."""
    return Scope(group=group, num_tokens=num_tokens, cells=slice(0), weights=np.zeros((0, 0)))


def with_mean(values: Floats, axis: int) -> Floats:
    """Values with their mean over an axis as its last entry."""
    return np.concatenate([values, values.mean(axis=axis, keepdims=True)], axis=axis)


def bend_rows(metric: str, scope: Scope, draws: Floats) -> pd.DataFrame:
    """How far both ends lie above the middle.

    Args:
        metric: Metric name.
        scope: The group, or all.
        draws: [1 + B, L] of a metric.
    """
    bend = np.stack(bends(draws), axis=1)
    low, high = basic_interval(bend[0], bend[1:], bounds=(-1, 1))
    return rows(
        metric, "model" if scope.group is None else "group", bend[0], end=list(ENDS),
        low=low, high=high, group=scope.group, num_tokens=scope.num_tokens,
    )  # fmt: skip


def bends(draws: Floats) -> tuple[Floats, Floats]:
    """How far the first, and the last, quarter of the layers lie above the middle ones.

    Args:
        draws: [..., L] at least three layers.

    Returns:
        [...] for each end.
    """
    num_layers = draws.shape[-1]
    quarter = max(1, num_layers // 4)
    middle = draws[..., quarter : num_layers - quarter].mean(axis=-1)
    first, last = draws[..., :quarter], draws[..., num_layers - quarter :]
    return first.mean(axis=-1) - middle, last.mean(axis=-1) - middle


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Divergence by layer, between languages, against the score; experts and consistency."""
    for suffix, found in each_trace(table):
        if len(select(found, metric="divergence", scope="model", layer=None)):
            yield divergence_picture(found, suffix)
        if "divergence_pair" in set(found["metric"]):
            yield pair_picture(found, suffix)
        if "divergence_score_r" in set(found["metric"]):
            yield score_picture(found, suffix)
        yield expert_picture(found, suffix)


def line_colors(num: int) -> list[Any]:
    """Colours of so many lines, ordered ones where there are many."""
    import matplotlib

    from moetools.reporting import style

    if num <= len(style.COLORS):
        return list(style.COLORS[:num])
    return list(matplotlib.colormaps["viridis_r"](np.linspace(0.08, 1, num)))


def line_labels(groups: Sequence[str]) -> list[str]:
    """What the lines of groups are called: all, or the first and the last of very many."""
    from moetools.reporting import style

    middle = range(MAX_LABELS // 2, len(groups) - MAX_LABELS // 2)
    return ["" if i in middle else style.shorten(group, 14) for i, group in enumerate(groups)]


def divergence_picture(table: pd.DataFrame, suffix: str) -> Picture:
    """One line for each language, floors shaded; beside it halves compared with halves."""
    from moetools.reporting import charts, style

    figure, axes = style.subplots(1, 2, height=3.6)
    left, right = axes[0]
    floors = {
        name: select(table, metric=f"divergence_{name}", scope="layer").sort_values("layer")
        for name in ("floor_half", "floor_other", "excess_other")
    }
    x = floors["floor_half"]["layer"].to_numpy(int)
    half, other, beyond = (floor["value"].to_numpy(float) for floor in floors.values())
    left.fill_between(x, 0, half, color="#b4b4b4", lw=0, label="halves of one text")
    for axis, base, top in ((left, half, np.fmax(half, other)), (right, 0 * x, np.fmax(0, beyond))):
        axis.fill_between(x, base, top, color="#e2e2e2", lw=0, label="of different texts")
    order = select(table, metric="divergence", scope="group", layer=None)
    order = order.sort_values("value", ascending=False)
    groups, colors = list(order["group"]), line_colors(len(order))[::-1]
    lines = [
        (axis, select(table, metric=metric, scope="group").dropna(subset=["layer"]))
        for axis, metric in ((left, "divergence"), (right, "divergence_excess"))
    ]
    for group, label, color in zip(groups, line_labels(groups), colors, strict=True):
        for axis, found in lines:
            line = found[found["group"] == group]
            charts.lines_by_layer(
                axis, line.assign(trace=""),
                label=label, color=color, ms=2.5, lw=1.2,
            )  # fmt: skip
    left.set(ylabel="divergence from the reference")
    left.set_ylim(bottom=0)
    right.set(ylabel="beyond the halves of both texts")
    right.axhline(0, color="#888888", lw=0.8)
    allowance = single(table, "divergence_excess_allowance")
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", ncols=-(-len(names) // 22), fontsize=7)
    caption = (
        "How differently the same text is routed in each language and in the reference, by layer, "
        "with 95 % intervals. Dark: what the even and odd tokens of one reference text differ by; "
        "light: up to what halves of different texts do. Halves are noisier than whole texts, "
        "so on the right halves are compared with halves of both texts: above 0 is beyond noise, "
        "but for what unequal lengths leave"
        + (f", up to {allowance:.3f} on average." if allowance >= 0.0005 else ".")
    )
    return Picture(name=f"divergence_by_layer{suffix}", caption=caption, figure=figure)


def pair_picture(table: pd.DataFrame, suffix: str) -> Picture:
    """Divergence of every two languages, in the layers where it is smallest."""
    from moetools.reporting import style

    pairs = select(table, metric="divergence_pair", scope="pair")
    layers = flattest(table)
    chosen = pairs[pairs["layer"].isin(layers)] if layers else pairs[pairs["layer"].isna()]
    found = chosen.groupby(["group", "group_b"])[["value"]].mean().reset_index()
    names = neighbours(found)
    place = {name: i for i, name in enumerate(names)}
    matrix = np.full((len(names), len(names)), np.nan)
    one, other = (found[column].map(place).to_numpy(int) for column in ("group", "group_b"))
    matrix[one, other] = matrix[other, one] = found["value"]
    figure, axes = style.subplots(height=float(np.clip(1.4 + 0.24 * len(names), 2.5, 8)))
    style.heatmap(axes[0, 0], matrix, rows=names, columns=names, label="divergence")
    where = f"in layers {spelled(layers)}, where it is smallest" if layers else "over all layers"
    caption = (
        f"How differently the same text is routed in every two languages, {where}. Languages that "
        "are routed alike are put side by side."
    )
    return Picture(name=f"divergence_of_pairs{suffix}", caption=caption, figure=figure)


def flattest(table: pd.DataFrame) -> list[int]:
    """Half of the layers, one after another, with the smallest divergence; if any has pairs."""
    pairs = select(table, metric="divergence_pair").dropna(subset=["layer"])
    value = select(table, metric="divergence", scope="layer") if len(pairs) else pairs
    value = value if len(value) else pairs
    of_layer = value.groupby("layer")["value"].mean().sort_index()
    size = -(-len(of_layer) // 2)
    sums = np.convolve(of_layer.to_numpy(float), np.ones(size), mode="valid") if size else [0]
    first = int(np.nan_to_num(sums, nan=np.inf).argmin())
    return [int(layer) for layer in of_layer.index[first : first + size]]


def neighbours(pairs: pd.DataFrame) -> list[str]:
    """Groups in an order that puts those with small values side by side."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    names = sorted({*pairs["group"], *pairs["group_b"]})
    condensed = pd.Series(np.nan, index=pd.MultiIndex.from_tuples(combinations(names, 2)))
    condensed.update(pairs.set_index(["group", "group_b"])["value"].astype(float))
    farthest = condensed.max()
    if len(names) < 3 or pd.isna(farthest):
        return names
    tree = linkage(condensed.fillna(farthest), method="average", optimal_ordering=True)
    return [names[i] for i in leaves_list(tree)]


def spelled(layers: Sequence[int]) -> str:
    """Layers as words: `2, 3 and 4`."""
    texts = [str(layer) for layer in layers]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def score_picture(table: pd.DataFrame, suffix: str) -> Picture:
    """Correlation of divergence and score by layer, and over the mean of all layers."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    from moetools.reporting import charts, style

    figure, axes = style.subplots(1, 2, height=3.0)
    left, right = axes[0]
    correlations = select(table, metric="divergence_score_r", scope="layer")
    for name, options in zip(CORRELATIONS, ({}, {"ls": ":", "color": "#888888"}), strict=True):
        line = select(correlations, correlation=name).assign(trace="")
        charts.lines_by_layer(left, line, label=name.capitalize(), **options)
    left.legend()
    left.axhline(0, color="#888888", lw=0.8)
    left.set(ylabel="correlation over languages", ylim=(-1, 1))
    measured = len(select(table, metric="score", score_source="measured")) > 0
    score = select(table, metric="score", scope="group").set_index("group")["value"]
    score = -score if measured else score
    means = select(table, metric="divergence", scope="group", layer=None)
    value = means.set_index("group")["value"]
    for group in value.index.intersection(score.index):
        right.plot(score[group], value[group], "o", color=style.COLORS[0])
        right.annotate(
            style.shorten(group, 10), (score[group], value[group]), fontsize=7,
            xytext=(3, 3), textcoords="offset points",
        )  # fmt: skip
    right.set(
        xlabel="nats of a text (log)" if measured else "score", ylabel="divergence, all layers"
    )
    if measured:
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        right.xaxis.set_minor_formatter(NullFormatter())
    count = single(table, "divergence_score_num_groups")
    caption = (
        f"Left: correlation of divergence and score over {count:.0f} languages, by layer, with "
        "95 % intervals. Right: each language. The score is "
        + ("minus the nats that the model needs for the same texts." if measured else "as given.")
    )
    return Picture(name=f"divergence_and_score{suffix}", caption=caption, figure=figure)


def expert_picture(table: pd.DataFrame, suffix: str) -> Picture:
    """Specialised experts and consistency by layer."""
    from moetools.reporting import charts, style

    counts = select(table, metric="num_multilingual_experts", scope="layer")
    figure, axes = style.subplots(1, 1 if counts.empty else 2, height=3.0)
    right = axes[0, -1]
    consistency = select(table, metric="consistency", scope="group")
    order = consistency[consistency["layer"].isna()].sort_values("value", ascending=False)
    groups, colors = list(order["group"]), line_colors(len(order))[::-1]
    for group, label, color in zip(groups, line_labels(groups), colors, strict=True):
        of_group = consistency[(consistency["group"] == group) & consistency["layer"].notna()]
        charts.lines_by_layer(
            right, of_group.assign(trace=""), label=label, color=color, ms=2.5, lw=1.2
        )  # fmt: skip
    chance = select(table, metric="consistency_chance_uniform", scope="layer")
    charts.lines_by_layer(
        right, chance.assign(trace=""), label="uniform chance", color="#888888", ls=":", marker=""
    )
    skewed = select(table, metric="consistency_chance_skewed", scope="group")
    mean = skewed.dropna(subset=["layer"]).groupby("layer", as_index=False)["value"].mean()
    charts.lines_by_layer(
        right,
        mean.assign(trace="", low=np.nan, high=np.nan),
        label="own frequencies, mean",
        color="#444444",
        ls="--",
        marker="",
    )
    right.set(ylabel="consistency within a text")
    right.set_ylim(bottom=0)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", ncols=-(-len(names) // 19), fontsize=7)
    caption = (
        "How alike the experts of two tokens of one text are (Jaccard), one line a language, and "
        "what the experts' own frequencies explain (dashed)."
    )
    if not counts.empty:
        left = axes[0, 0]
        floor = select(table, metric="num_language_experts_floor", scope="layer")
        for tau, color in zip(TAUS, line_colors(len(TAUS)), strict=True):
            charts.lines_by_layer(
                left, select(counts, tau=tau).assign(trace=""), label=f"{tau}", color=color
            )
            charts.lines_by_layer(
                left, select(floor, tau=tau).assign(trace=""), color=color, ls=":", marker=""
            )
        left.set(ylabel="experts above tau in any language")
        left.set_ylim(0, 1.25 * max(1.0, float(counts["value"].max())))
        left.legend(title="tau", fontsize=7, ncols=len(TAUS), loc="upper left")
        caption = (
            "Left: experts selected more often than in the reference, by more than tau, in any "
            "language; dotted: between two halves of the reference. Right: " + caption
        )
    return Picture(name=f"language_experts{suffix}", caption=caption, figure=figure)


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """The U, the floors, the languages that differ, the score, the experts."""
    if len(select(table, metric="divergence", scope="model", layer=None)):
        yield from bend_findings(table)
        yield from language_findings(table)
    yield from score_findings(table)
    yield from expert_findings(table)


def interval(row: pd.Series, digits: int = 3) -> str:
    """A value with its interval, where there is one."""
    text = f"{row['value']:.{digits}f}"
    if pd.isna(row["low"]) or pd.isna(row["high"]):
        return text
    return f"{text} ({row['low']:.{digits}f} to {row['high']:.{digits}f})"


def bend_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Whether the middle layers differ less than the ends."""
    found = select(table, metric="divergence_u", scope="model")
    beyond = select(table, metric="divergence_excess_u", scope="model")
    if found["low"].isna().any() or len(found) != len(ENDS):
        return
    first, last = (select(found, end=end).iloc[0] for end in ENDS)
    numbers = (
        f"middle layers lie {interval(first)} below the first and {interval(last)} below the last "
        "quarter of the layers"
    )
    above = [row["low"] > 0 for row in (first, last)]
    allowance = single(table, "divergence_excess_allowance")
    beyond_floor = [select(beyond, end=end).iloc[0]["low"] > allowance for end in ENDS]
    if all(above):
        text = f"Languages are routed most alike in the middle (a U): the {numbers}"
        text += "." if all(beyond_floor) else ", but beyond the floor of each layer no U is left."
    elif any(above):
        text = f"No U of divergence, one end alone rises: the {numbers}."
    else:
        text = f"No U of divergence: the {numbers}."
    of_group = select(table, metric="divergence_u", scope="group")
    both = (of_group["low"] > 0).groupby(of_group["group"]).all()
    if len(both) > 1:
        text += f" Each on its own, {int(both.sum())} of {len(both)} languages rise at both ends."
    weight = (0.7 if all(beyond_floor) else 0.4) if all(above) else 0.3
    yield Finding(text=text, weight=weight, metric="divergence_u")


def language_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Which languages differ, and whether beyond the halves of a text."""
    value = select(table, metric="divergence", scope="group", layer=None)
    value = value.sort_values("value", ascending=False)
    most, least = value.iloc[0], value.iloc[-1]
    floor = single(table, "divergence_floor_half")
    ratio = select(table, metric="divergence_ratio", scope="model", layer=None).iloc[0]
    text = (
        f"{most['group']} is routed most differently from the reference, "
        f"divergence {interval(most)}"
    )
    if len(value) > 1:
        text += f", {least['group']} least, {interval(least)}"
    if np.isfinite(floor):
        text += f"; halves of one text differ by {floor:.3f}"
    if np.isfinite(ratio["value"]):
        text += (
            ". Beyond that noise, another language counts "
            f"{interval(ratio, 1)} times as much as another text of the reference"
        )
    distance = float(ratio["value"]) if np.isfinite(ratio["value"]) else 0.0
    yield Finding(
        text=f"{text}.", weight=float(np.clip(distance / 2, 0.2, 0.8)), metric="divergence"
    )
    excess = select(table, metric="divergence_excess", scope="group")
    tested = excess[excess["layer"].notna()].dropna(subset=["low"])
    if tested.empty:
        return
    above = beyond_allowance(table, tested)
    below = sorted(set(tested["group"]) - set(tested[above]["group"]))
    text = (
        f"Divergence exceeds that of the halves of a text in {int(above.sum())} of {len(tested)} "
        "combinations of language and layer"
    )
    if (tested["group"].map(allowances(table)) >= 0.0005).any():
        text += ", by more than unequal lengths may leave"
    if below:
        shown = spelled_names(below)
        text += f"; {shown} {'does' if len(below) == 1 else 'do'} so in no layer"
    yield Finding(text=f"{text}.", weight=0.4, metric="divergence_excess")


def allowances(table: pd.DataFrame) -> "pd.Series[float]":
    """What unequal lengths may leave in the excess of each language, by its name."""
    found = select(table, metric="divergence_excess_allowance", scope="group")
    return found.set_index("group")["value"].astype(float)


def beyond_allowance(table: pd.DataFrame, excess: pd.DataFrame) -> "pd.Series[bool]":
    """Which of these rows of `divergence_excess` are above 0 whatever the lengths."""
    return excess["low"].astype(float) > excess["group"].map(allowances(table))


def spelled_names(names: Sequence[str], most: int = 4) -> str:
    """Names as words, the first few of many."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def score_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """Whether the languages that differ are those with low scores."""
    pearson, ranks = (select(table, correlation=name) for name in CORRELATIONS)
    found = select(pearson, metric="divergence_score_r", scope="model")
    if found.empty or not np.isfinite(found["value"].iloc[0]):
        return
    row, p = found.iloc[0], single(pearson, "divergence_score_p")
    count = single(table, "divergence_score_num_groups")
    of_score = "the score" if row["score_source"] == "given" else "the likelihood of the same texts"
    text = f"Over {count:.0f} languages divergence and {of_score} "
    text += "correlate" if p < 0.05 else "do not clearly correlate"
    rho, p_ranks = single(ranks, "divergence_score_r"), single(ranks, "divergence_score_p")
    text += (
        f": r = {interval(row, 2)}, permutation p = {p:.2g}; by ranks {rho:.2f}, p = {p_ranks:.2g}"
    )
    layers = select(pearson, metric="divergence_score_r", scope="layer").dropna(subset=["value"])
    if len(layers) > 1:
        strongest = layers.iloc[int(layers["value"].abs().to_numpy(float).argmax())]
        largest = single(pearson, "divergence_score_p_largest")
        text += (
            f"; strongest in layer {strongest['layer']}, r = {strongest['value']:.2f}, p = "
            f"{largest:.2g} for the best of {len(layers)} layers"
        )
    weight = 0.6 if p < 0.05 and p_ranks < 0.05 else 0.35
    yield Finding(text=f"{text}.", weight=weight, metric="divergence_score_r")


def expert_findings(table: pd.DataFrame) -> Iterator[Finding]:
    """How many experts belong to languages, and their overlap with those of tasks."""
    counts = select(table, metric="num_multilingual_experts", scope="model")
    if counts.empty:
        return
    found = counts[counts["value"] > 0]
    tau = float(found["tau"].max()) if len(found) else min(TAUS)
    tau = min(tau, 0.3)
    count = single(table, "num_multilingual_experts", tau=tau)
    floor = single(table, "num_language_experts_floor", tau=tau)
    deltas = select(table, metric="frequency_delta")
    total = len(deltas[["layer", "expert"]].drop_duplicates())
    text = (
        f"{count:.0f} of {total} experts are selected by {tau:.0%} more of the tokens in some "
        "language than in the reference"
    )
    if np.isfinite(floor):
        text += f" ({floor:.1f} between two halves of the reference)"
    tasks = select(table, metric="expert_overlap", scope="group", tau=tau)
    for _, row in tasks.iterrows():
        group = row["group"]
        shared, expected, p = (
            single(table, f"expert_overlap{suffix}", "group", tau=tau, group=group)
            for suffix in ("", "_expected", "_p_fewer")
        )
        text += f"; {shared:.0f} of them are experts of {group} too, {expected:.1f} by chance"
        text += f" (p = {p:.2g} for so few)" if np.isfinite(p) else ""
    weight = 0.5 if np.isfinite(floor) and count > 2 * floor + 1 else 0.2
    yield Finding(text=f"{text}.", weight=weight, metric="num_multilingual_experts")


ANALYSIS = Analysis(
    title="Languages",
    source=(
        "Bandarkar et al., arXiv 2510.04694, eq. 1-3 (divergence, entropy and consistency, "
        "specialised experts). Floors, ratio, chance levels, tests: moetools."
    ),
    about=(
        "Whether the same content is routed alike in different languages, layer by layer, and "
        "which experts some languages have for themselves. Divergence means nothing without its "
        "two floors: halves of one text, and different texts. Tokenizers that cut languages "
        "differently move it too."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
    limits=limits,
)
