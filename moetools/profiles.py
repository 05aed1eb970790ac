"""Routing profiles of texts: how far apart they are, how consistent, which experts they prefer.

A routing profile is the mean of a router's probabilities over the tokens of a text. Profiles need
not be normalised here: every function divides by their sum. Entropies are in nats.

Shapes: S sequences, T tokens, E experts, K selected per token, N items, L layers.

Source: Bandarkar et al., arXiv:2510.04694, eq. 1-3. The exact mean Jaccard similarity, its chance
levels, the test of overlap, the sample of items and what lies beyond halves are ours.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import permutations
from math import comb, factorial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from moetools.compiling import compiled
from moetools.information import entropy
from moetools.intervals import fieller_interval

MIN_ROOM = 1e-6
"""Nats that two profiles must be below uniform; what is closer counts as this."""
LENGTH_ALLOWANCE = 0.15
MAX_TOKENS = 1024
"""Tokens of one sequence that are compared with each other; of longer ones as many are drawn."""
NUM_SETS = 1024
NUM_PERMUTATIONS = 10_000
MIN_CORRELATED = 4
NORMAL_975 = 1.959963984540054

Array = NDArray[Any]
Floats = NDArray[np.float64]


# Divergence


def normalised(profile: Array) -> Floats:
    """[..., E] profiles that sum to 1; NaN where they sum to 0."""
    profile = np.asarray(profile, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(profile / profile.sum(axis=-1, keepdims=True))


def divergence(a: Array, b: Array) -> Floats:
    """Entropy-normalised Jensen-Shannon divergence of routing profiles.

    The Jensen-Shannon divergence over what it would be if the mean of the two were uniform, so
    that layers of different sharpness can be compared.

    Args:
        a: [..., E] non-negative.
        b: [..., E], broadcast against `a`.

    Returns:
        [...] 0 (equal) to 1 (the mean of the two is uniform); NaN where a profile sums to 0.
    Source:
        Bandarkar et al., arXiv:2510.04694, eq. 2 and 6-8; the denominator is at least `MIN_ROOM`.
    """
    a, b = normalised(a), normalised(b)
    return divergence_of_normalised(a, b, entropy(a), entropy(b))


def divergence_of_normalised(a: Floats, b: Floats, entropy_a: Floats, entropy_b: Floats) -> Floats:
    """`divergence` of profiles that sum to 1, whose entropies are known."""
    own = (entropy_a + entropy_b) / 2
    distance = np.maximum(entropy((a + b) / 2) - own, 0)
    room = np.maximum(np.log(a.shape[-1]) - own, MIN_ROOM)
    return np.asarray(np.minimum(distance / room, 1))


def divergence_beyond_halves(a_even: Array, a_odd: Array, b_even: Array, b_odd: Array) -> Floats:
    """How much farther apart two texts are than the halves of each.

    `divergence` between the even half of one and the odd half of the other, both ways, minus the
    mean of those between the halves of each text, all over one denominator. With it the entropies
    of the halves cancel, and so does their noise up to the third order, also where one text is
    longer. Differences of `divergence` itself do not, as each divides by its own noise.

    Args:
        a_even: [..., E] non-negative, half of the tokens of a text.
        a_odd: [..., E] the other half.
        b_even: [..., E] half of the other text, broadcast against the first.
        b_odd: [..., E] its other half.

    Returns:
        [...] -1 to 1; 0 on average where two texts of a length are routed alike. NaN where a half
        sums to 0.
    """
    halves = [normalised(half) for half in (a_even, a_odd, b_even, b_odd)]
    a_even, a_odd, b_even, b_odd = halves
    crossed = entropy((a_even + b_odd) / 2) + entropy((a_odd + b_even) / 2)
    within = entropy((a_even + a_odd) / 2) + entropy((b_even + b_odd) / 2)
    own = (entropy(a_even) + entropy(a_odd) + entropy(b_even) + entropy(b_odd)) / 4
    room = np.maximum(np.log(a_even.shape[-1]) - own, MIN_ROOM)
    return np.asarray(np.clip((crossed - within) / 2 / room, -1, 1))


def length_allowance(a: Array, b: Array) -> Floats:
    """What `divergence_beyond_halves` may be above 0 because one text is longer, at most.

    The noise of the fourth order and above does not cancel: entropies fall faster than by their
    quadratic terms where a text has few tokens and the router is sharp. The square of the relative
    difference of the lengths is how that grows, `LENGTH_ALLOWANCE` bounds it in simulations of
    equally routed texts (8 to 128 experts, 10 to 160 tokens, nearly uniform to nearly one-hot).

    Args:
        a: [...] tokens of a text.
        b: [...] tokens of the other.

    Returns:
        [...] 0 for equal lengths; NaN where both are 0.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(LENGTH_ALLOWANCE * ((a - b) / (a + b)) ** 2)


# Consistency


def mean_jaccard(
    ids: Array,
    offsets: NDArray[np.int64],
    num_experts: int,
    *,
    sequence: NDArray[np.integer[Any]],
    seed: int = 0,
) -> Floats:
    """Mean Jaccard similarity of the selected sets, over all pairs of tokens of a sequence.

    Args:
        ids: [T, K] distinct selected experts; a token with an id of E or more is left out.
        offsets: [S + 1] where each sequence starts.
        num_experts: E.
        sequence: [S] number of each sequence: draws `MAX_TOKENS` tokens of a longer one.
        seed: Seed of these draws.

    Returns:
        [S] 0 to 1; NaN with fewer than two tokens.
    """
    sets = bit_sets(np.ascontiguousarray(ids), num_experts, -(-num_experts // 64))
    result = np.empty(len(offsets) - 1)
    table = jaccard_by_overlap(ids.shape[1])
    for s, number in enumerate(sequence):
        of_sequence = sets[:, offsets[s] : offsets[s + 1]]
        if of_sequence.shape[1] > MAX_TOKENS:
            drawn = np.random.default_rng((seed, int(number))).permutation(of_sequence.shape[1])
            of_sequence = of_sequence[:, drawn[:MAX_TOKENS]]
        complete = of_sequence[:, of_sequence.any(axis=0)]
        result[s] = _mean_over_pairs(np.ascontiguousarray(complete), table)
    return result


def jaccard_by_overlap(top_k: int) -> Floats:
    """[K + 1] Jaccard similarity of two sets of K by how many elements they share."""
    shared = np.arange(top_k + 1)
    return shared / (2 * top_k - shared)


def chance_jaccard(num_experts: int, top_k: int) -> float:
    """Expected Jaccard similarity of two independent uniform sets of `top_k` experts."""
    pmf = _overlap_pmf(num_experts, top_k, top_k)
    return float(pmf @ jaccard_by_overlap(top_k)[: len(pmf)])


def skewed_jaccard(frequencies: Array, top_k: int, *, seed: int = 0) -> float:
    """Expected Jaccard similarity of independent sets in which experts have their own frequencies.

    By simulation: all pairs of `NUM_SETS` sets of `top_k` experts, drawn by systematic sampling in
    random order, which meets the frequencies and is uniform where they are equal. The mean number
    of shared experts is known, which corrects most of the error of the simulation.

    Args:
        frequencies: [E] how often each expert is selected, up to a factor.
        top_k: K.
        seed: Seed of the draws.
    """
    frequencies = np.asarray(frequencies, dtype=np.float64)
    num_experts, total = len(frequencies), frequencies.sum()
    if not total > 0:
        return np.nan
    generator = np.random.default_rng(seed)
    order = generator.permuted(np.tile(np.arange(num_experts), (NUM_SETS, 1)), axis=1)
    start = generator.random((NUM_SETS, 1))
    reached = np.cumsum((frequencies * (top_k / total))[order], axis=1) + start
    reached[:, -1] = top_k + start[:, 0]
    steps = np.diff(np.floor(np.hstack([start, reached])), axis=1) > 0
    ids = np.sort(np.where(steps, order, num_experts), axis=1)[:, :top_k]
    sets = bit_sets(ids, num_experts, -(-num_experts // 64))
    shared, jaccard = np.arange(top_k + 1.0), jaccard_by_overlap(top_k)
    mean_shared, mean_square, mean, mean_product = (
        _mean_over_pairs(sets, table) for table in (shared, shared**2, jaccard, jaccard * shared)
    )
    variance = mean_square - mean_shared**2
    slope = (mean_product - mean * mean_shared) / variance if variance > 1e-12 else 0.0
    expected_shared = ((frequencies * (top_k / total)) ** 2).sum()
    return float(np.clip(mean - slope * (mean_shared - expected_shared), 0, 1))


@compiled
def bit_sets(ids: Array, num_experts: int, num_words: int) -> NDArray[np.uint64]:
    """[num_words, T] the selected experts of each token as bits; none if an id is E or more."""
    sets = np.zeros((num_words, ids.shape[0]), np.uint64)
    for t in range(ids.shape[0]):
        complete = True
        for i in range(ids.shape[1]):
            complete &= ids[t, i] < num_experts
        if complete:
            for i in range(ids.shape[1]):
                e = np.int64(ids[t, i])
                sets[e >> 6, t] |= np.uint64(1) << np.uint64(e & 63)
    return sets


@compiled
def _mean_over_pairs(sets: NDArray[np.uint64], by_overlap: Floats) -> float:
    num_words, num_tokens = sets.shape
    if num_tokens < 2:
        return np.nan
    total = 0.0
    overlap = np.zeros(num_tokens, np.uint64)
    for t in range(1, num_tokens):
        for u in range(t):
            overlap[u] = 0
        for word in range(num_words):
            own, others = sets[word, t], sets[word]
            for u in range(t):
                # number of bits in common, in parallel within a word
                x = own & others[u]
                x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
                x = (x & np.uint64(0x3333333333333333)) + (
                    (x >> np.uint64(2)) & np.uint64(0x3333333333333333)
                )
                x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
                overlap[u] += (x * np.uint64(0x0101010101010101)) >> np.uint64(56)
        even = odd = 0.0  # two sums, so that one addition need not wait for the other
        for u in range(1, t, 2):
            even += by_overlap[overlap[u - 1]]
            odd += by_overlap[overlap[u]]
        if t % 2:
            even += by_overlap[overlap[t - 1]]
        total += even + odd
    return total / (num_tokens * (num_tokens - 1) / 2)  # type: ignore[no-any-return]


# Specialised experts


@compiled
def sequence_frequencies(ids: Array, offsets: NDArray[np.int64], num_experts: int) -> Floats:
    """[S, E] share of each sequence's tokens that select each expert; a sequence sums to K.

    Args:
        ids: [T, K] selected experts; ids of E or more are not counted.
        offsets: [S + 1] where each sequence starts.
        num_experts: E.
    """
    num_sequences = len(offsets) - 1
    result = np.zeros((num_sequences, num_experts))
    for s in range(num_sequences):
        length = max(1, offsets[s + 1] - offsets[s])
        for t in range(offsets[s], offsets[s + 1]):
            for i in range(ids.shape[1]):
                if ids[t, i] < num_experts:
                    result[s, ids[t, i]] += 1
        for e in range(num_experts):
            result[s, e] /= length
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How many experts two sets share, against sets of the same sizes drawn at random.

    Attributes:
        shared: Experts in both, over all layers.
        expected: What random sets share on average.
        p_fewer: Probability that random sets share as few or fewer; NaN if a set is empty in
            every layer.
        p_more: Probability that they share as many or more.
    """

    shared: int
    expected: float
    p_fewer: float
    p_more: float


def overlap(a: Sequence[NDArray[np.bool_]], b: Sequence[NDArray[np.bool_]]) -> Overlap:
    """Compare two sets of experts layer by layer.

    Args:
        a: [E] whether each expert is in the first set, for each layer.
        b: The same of the second.

    Returns:
        The overlap summed over layers; chance is hypergeometric and independent between layers.
    """
    pmf, expected, shared, possible = np.ones(1), 0.0, 0, False
    for in_a, in_b in zip(a, b, strict=True):
        size_a, size_b = int(in_a.sum()), int(in_b.sum())
        expected += size_a * size_b / len(in_a)
        shared += int((in_a & in_b).sum())
        if size_a and size_b:
            possible = True
            pmf = np.convolve(pmf, _overlap_pmf(len(in_a), size_a, size_b))
    return Overlap(
        shared=shared,
        expected=expected,
        p_fewer=min(float(pmf[: shared + 1].sum()), 1.0) if possible else np.nan,
        p_more=min(float(pmf[shared:].sum()), 1.0) if possible else np.nan,
    )


@cache
def _overlap_pmf(num_experts: int, size_a: int, size_b: int) -> Floats:
    """[1 + smaller size] probability that random sets of these sizes share 0, 1, ... experts."""
    total = comb(num_experts, size_b)
    return np.array(
        [
            comb(size_a, shared) * comb(num_experts - size_a, size_b - shared) / total
            for shared in range(min(size_a, size_b) + 1)
        ]
    )


# Correlation


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation:
    """Correlations of one variable with several others, over a few groups.

    Attributes:
        r: [L].
        low: [L] lower end of the 95 % interval by Fisher's z.
        high: [L] upper end.
        p: [L] two-sided permutation p-value of each.
        p_largest: Probability of a largest |r| like that found, by the same permutations: holds
            for the best of the L.
    """

    r: Floats
    low: Floats
    high: Floats
    p: Floats
    p_largest: float


def correlation(x: Array, y: Array, *, ranks: bool = False, seed: int = 0) -> Correlation:
    """Correlate a score of each group with its values.

    Args:
        x: [N] at least `MIN_CORRELATED`.
        y: [N, L].
        ranks: Spearman's correlation, of ranks, which a few extreme groups do not decide.
        seed: Seed of the permutations; up to seven groups all are tried.

    Raises:
        ValueError: Too few groups.
    """
    num = len(x)
    if num < MIN_CORRELATED:
        raise ValueError(f"A correlation of {num} groups has no interval; {MIN_CORRELATED} do.")
    if ranks:
        x, y = rankdata(x), rankdata(y, axis=0)
    x, y = _standardised(np.asarray(x)[:, None])[:, 0], _standardised(np.asarray(y))
    r = np.clip(x @ y, -1, 1)
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    half = NORMAL_975 / np.sqrt(num - 3)
    if factorial(num) <= NUM_PERMUTATIONS:
        orders = np.array(list(permutations(range(num))))
        added = 0
    else:
        generator = np.random.default_rng(seed)
        orders = generator.permuted(np.tile(np.arange(num), (NUM_PERMUTATIONS, 1)), axis=1)
        added = 1  # the order found is one of those possible
    permuted = np.abs(x[orders] @ y)
    reached = permuted >= np.abs(r) - 1e-9
    known = np.isfinite(r)
    p = np.where(known, (reached.sum(axis=0) + added) / (len(orders) + added), np.nan)
    p_largest = np.nan
    if known.any():
        best = permuted[:, known].max(axis=1) >= np.abs(r[known]).max() - 1e-9
        p_largest = float((best.sum() + added) / (len(orders) + added))
    return Correlation(r=r, low=np.tanh(z - half), high=np.tanh(z + half), p=p, p_largest=p_largest)


def _standardised(values: Array) -> Floats:
    """[N, L] columns with mean 0 and norm 1; NaN where a column is constant."""
    centred = values.astype(np.float64) - values.mean(axis=0)
    norm = np.sqrt((centred**2).sum(axis=0))
    flat = norm <= 1e-12 * np.abs(values).max(axis=0, initial=0)
    return np.asarray(centred / np.where(flat, np.nan, norm))


# A bounded sample of items


def item_hash(item: str) -> int:
    """A number of 64 bits that is the same on every machine."""
    return int.from_bytes(blake2b(item.encode(), digest_size=8).digest(), "little")


class ItemSample:
    """Additive sums of the items (ids) with the smallest hashes, at most `capacity` of them.

    Which items are kept depends on the items alone, not on their order or on how they were dealt
    to parts: an item that is among the smallest in the end was so from its first sequence on.

    Args:
        capacity: Items kept.
        shapes: Shape of each array of sums, for one item.
    """

    def __init__(self, capacity: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.capacity = capacity
        self.sums = {name: np.zeros((capacity, *shape)) for name, shape in shapes.items()}
        self.is_full = False
        self._slots: dict[str, int] = {}
        self._largest: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._slots)

    def slots(self, items: Iterable[str | None]) -> NDArray[np.int64]:
        """[S] row of `sums` of each item, -1 where it is not kept; admits new ones."""
        items = list(items)
        for item in dict.fromkeys(items):
            if item is not None and item not in self._slots:
                self._admit(item)
        return np.array(
            [-1 if item is None else self._slots.get(item, -1) for item in items], dtype=np.int64
        )

    def merge(self, other: Self) -> None:
        """Add the sums of another part of the same data."""
        theirs = list(other._slots)
        mine = self.slots(theirs)
        self.is_full |= other.is_full
        source = np.array([other._slots[item] for item in theirs], dtype=np.int64)
        for name, sums in self.sums.items():
            sums[mine[mine >= 0]] += other.sums[name][source[mine >= 0]]

    def in_order(self) -> NDArray[np.int64]:
        """Rows of `sums` that hold an item, by hash."""
        ordered = sorted(self._largest, key=lambda entry: (-entry[0], entry[1]))
        return np.array([self._slots[item] for _, item in ordered], dtype=np.int64)

    def _admit(self, item: str) -> None:
        entry = (-item_hash(item), item)
        if len(self._slots) < self.capacity:
            self._slots[item] = len(self._slots)
            heapq.heappush(self._largest, entry)
            return
        self.is_full = True
        _, dropped = heapq.heappushpop(self._largest, entry)
        if dropped != item:
            slot = self._slots.pop(dropped)
            for sums in self.sums.values():
                sums[slot] = 0
            self._slots[item] = slot


def item_means(values: Floats, weights: Floats) -> Floats:
    """Means over items and over bootstrap draws of them.

    Args:
        values: [N, P]; NaN where an item has no value.
        weights: [B, N] how often each draw takes each item.

    Returns:
        [1 + B, P] the mean, then that of each draw; NaN where no item has a value, draws also
        where only one has.
    """
    known = np.isfinite(values)
    everyone = np.vstack([np.ones(len(values)), weights])
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (everyone @ np.where(known, values, 0)) / (everyone @ known.astype(np.float64))
    means[1:, known.sum(axis=0) < 2] = np.nan
    return np.asarray(means)


def mean_between_items(
    distance: Callable[[NDArray[np.int64]], Floats], weights: Floats, max_partners: int = 16
) -> Floats:
    """Mean of a distance between different items, and over bootstrap draws of the items.

    Args:
        distance: Of each of the N items and a partner, whose numbers [N] it is given.
        weights: [B, N] how often each draw takes each item. A draw moves the mean by what each
            item's own pairs add to it: to count a pair by the product of its two weights would
            count the noise of single pairs three times, this counts it twice.
        max_partners: Each item is compared with so many that follow it in the list, or with all.

    Returns:
        [1 + B]; NaN with fewer than two items, draws also with two.
    """
    num = weights.shape[1]
    numbers, steps = np.arange(num), range(1, min(max_partners, num // 2) + 1)
    if not steps:
        return np.full(1 + len(weights), np.nan)
    of_item = np.zeros(num)
    for step in steps:
        found = distance(np.roll(numbers, -step))
        of_item += (found + np.roll(found, step)) / (2 * len(steps))
    mean = of_item.mean()
    moved = mean + (weights - 1) @ (2 * (of_item - mean)) / num
    return np.concatenate([[mean], moved if num > 2 else np.full(len(weights), np.nan)])


def ratio_of_draws(numerator: Floats, denominator: Floats) -> tuple[Floats, Floats, Floats]:
    """A ratio of two estimates with its interval (`fieller_interval`).

    Args:
        numerator: [1 + B, ...] the estimate, then bootstrap draws of it.
        denominator: [1 + B, ...] the same draws of the other, broadcast against the numerator.

    Returns:
        [...] the ratio and the ends of its 95 % interval; NaN unless the denominator is clearly
        above zero.
    """
    move_a, move_b = numerator[1:] - numerator[1:].mean(axis=0), denominator[1:]
    move_b = move_b - move_b.mean(axis=0)
    freedom = max(1, len(move_a) - 1)
    low, high = fieller_interval(
        numerator[0],
        denominator[0],
        variances=((move_a**2).sum(axis=0) / freedom, (move_b**2).sum(axis=0) / freedom),
        covariance=(move_a * move_b).sum(axis=0) / freedom,
        quantile=NORMAL_975,
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.where(np.isnan(low), np.nan, numerator[0] / denominator[0])
    return value, low, high
