"""Local routing consistency of plain expert ids: window counts, SRP, and expert caches.

`Selections` holds the ids [T, K] that T tokens select, in the order in which they are served, and
the sequences they belong to. No window and no cache ever spans two sequences. The compiled
functions release the interpreter lock, so that several routers can be worked on in threads.

Shapes: T tokens, S sequences, E experts, K selected per token, m tokens per window, C cache slots.

Source: Liang et al., arXiv:2505.16056. Chance levels and the stack algorithm are ours.
"""

from dataclasses import dataclass
from math import lgamma
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moetools.compiling import compiled

POLICIES = ("lru", "lfu", "belady", "sch")
"""Replacement policies by the experts they keep: the most recently used, the most often used so
far in the sequence, those used again soonest, and the most often used in the window ahead."""

_LRU, _LFU, _BELADY = range(3)
_COUNT_BITS = 36
_COUNT = 1 << _COUNT_BITS
_DEMANDED = 1 << 62

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selections:
    """What a router selects, in the types of the compiled functions.

    Attributes:
        ids: [T, K] uint16; `num_experts` where nothing is selected (a dropped token).
        offsets: [S + 1] int64; tokens of the i-th sequence are `offsets[i]:offsets[i + 1]`.
        num_experts: E.
    """

    ids: NDArray[np.uint16]
    offsets: Counts
    num_experts: int

    @classmethod
    def of(cls, ids: NDArray[Any], offsets: ArrayLike, num_experts: int) -> Self:
        """Check plain arrays.

        Args:
            ids: [T, K] integers; anything outside 0..E-1 selects nothing.
            offsets: [S + 1] sequences.
            num_experts: E, at most 65 535.

        Raises:
            ValueError: A token selects an expert twice, or there are too many experts.
        """
        if num_experts > np.iinfo(np.uint16).max:
            raise ValueError(f"{num_experts} experts are more than the supported 65535.")
        plain = ids.astype(f"u{ids.dtype.itemsize}", copy=False)  # negative ones become large
        if num_experts <= np.iinfo(plain.dtype).max:
            plain = np.minimum(plain, num_experts)
        plain = np.ascontiguousarray(plain, dtype=np.uint16)
        token = int(_first_repeat(plain, num_experts))
        if token >= 0:
            raise ValueError(f"Token {token} selects an expert twice: {ids[token].tolist()}.")
        return cls(
            ids=plain,
            offsets=np.ascontiguousarray(offsets, dtype=np.int64),
            num_experts=num_experts,
        )

    @property
    def lengths(self) -> Counts:
        """[S] tokens of each sequence."""
        return np.diff(self.offsets)

    def take(self, kept: NDArray[np.bool_]) -> Self:
        """Some of the sequences; `kept` is [S]."""
        return type(self)(
            ids=self.ids[np.repeat(kept, self.lengths)],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[kept])]),
            num_experts=self.num_experts,
        )


def pool(parts: list[Selections]) -> Selections:
    """Several routers over the same tokens as one router with all their experts.

    Args:
        parts: Selections of equal tokens and sequences; the experts of the first come first.
    """
    num_experts = sum(part.num_experts for part in parts)
    shifted = []
    start = 0
    for part in parts:
        ids = part.ids.astype(np.int64)
        shifted.append(np.where(ids < part.num_experts, ids + start, num_experts))
        start += part.num_experts
    return Selections.of(np.concatenate(shifted, axis=1), parts[0].offsets, num_experts)


@compiled
def _first_repeat(ids, num_experts):  # type: ignore[no-untyped-def]
    last_token = np.full(num_experts, -1, np.int64)
    for t in range(ids.shape[0]):
        for i in range(ids.shape[1]):
            e = ids[t, i]
            if e < num_experts:
                if last_token[e] == t:
                    return t
                last_token[e] = t
    return -1


# Windows


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowCounts:
    """How often experts are selected within windows of m tokens.

    Attributes:
        experts: [G, E, m + 1] windows of each group of sequences in which each expert is selected
            at least 0, 1, ..., m times.
        sequences: [S, m + 1] the same for each sequence, added up over the experts.
    """

    experts: Counts
    sequences: Counts


def window_counts(
    selections: Selections, window: int, *, group: NDArray[Any] | None = None
) -> WindowCounts:
    """Count selections in every window of consecutive tokens (stride 1).

    Cost O(T K), whatever the window: the counts of a window differ from those of the window
    before by the token that leaves and the token that enters, and each such change holds for all
    windows still to come.

    Args:
        selections: Sequences shorter than the window have no windows.
        window: m, at least 1.
        group: [S] number of each sequence's group, from 0; one group if absent.
    """
    num_windows = np.maximum(selections.lengths - window + 1, 0)
    groups = np.zeros(len(num_windows), np.int64) if group is None else group.astype(np.int64)
    num_groups = int(groups.max(initial=0)) + 1
    experts = np.zeros((num_groups, selections.num_experts, window + 1), np.int64)
    sequences = np.zeros((len(num_windows), window + 1), np.int64)
    _count_windows(selections.ids, selections.offsets, groups, window, experts, sequences)
    np.add.at(experts[:, :, 0], groups, num_windows[:, None])
    sequences[:, 0] = num_windows * selections.num_experts
    return WindowCounts(experts=experts, sequences=sequences)


@compiled
def _count_windows(ids, offsets, groups, window, experts, sequences):  # type: ignore[no-untyped-def]
    num_experts = experts.shape[1]
    top_k = ids.shape[1]
    counts = np.zeros(num_experts, np.uint32)
    for s in range(len(offsets) - 1):
        first, last = offsets[s], offsets[s + 1]
        num_windows = last - first - window + 1
        if num_windows <= 0:
            continue
        of_expert = experts[groups[s]]
        of_sequence = sequences[s]
        counts[:] = 0
        for t in range(first, last):
            remaining = min(num_windows, last - t)
            if t >= first + window:
                for i in range(top_k):
                    e = ids[t - window, i]
                    if e < num_experts:
                        c = counts[e]
                        counts[e] = c - np.uint32(1)
                        of_expert[e, c] -= remaining
                        of_sequence[c] -= remaining
            for i in range(top_k):
                e = ids[t, i]
                if e < num_experts:
                    c = counts[e] + np.uint32(1)
                    counts[e] = c
                    of_expert[e, c] += remaining
                    of_sequence[c] += remaining


def window_ranks(selections: Selections, window: int) -> Counts:
    """Selections that fall on the most used expert of each window, on the second, and so on.

    The first C entries add up to what the best fixed set of C experts per window serves
    (SCH-window). Cost O(T K): a change of a count by one changes one entry of the sorted counts.

    Returns:
        [S, E] sums over the windows of each sequence.
    """
    ranks = np.zeros((len(selections.lengths), selections.num_experts), np.int64)
    _rank_windows(selections.ids, selections.offsets, window, ranks)
    return ranks


@compiled
def _rank_windows(ids, offsets, window, ranks):  # type: ignore[no-untyped-def]
    num_experts = ranks.shape[1]
    top_k = ids.shape[1]
    counts = np.zeros(num_experts, np.uint32)
    reached = np.zeros(window + 1, np.uint32)  # experts selected at least c times in the window
    for s in range(len(offsets) - 1):
        first, last = offsets[s], offsets[s + 1]
        num_windows = last - first - window + 1
        if num_windows <= 0:
            continue
        of_sequence = ranks[s]
        counts[:] = 0
        reached[:] = 0
        for t in range(first, last):
            remaining = min(num_windows, last - t)
            if t >= first + window:
                for i in range(top_k):
                    e = ids[t - window, i]
                    if e < num_experts:
                        c = counts[e]
                        counts[e] = c - np.uint32(1)
                        rank = reached[c] - np.uint32(1)
                        reached[c] = rank
                        of_sequence[rank] -= remaining
            for i in range(top_k):
                e = ids[t, i]
                if e < num_experts:
                    c = counts[e] + np.uint32(1)
                    counts[e] = c
                    rank = reached[c]
                    reached[c] = rank + np.uint32(1)
                    of_sequence[rank] += remaining


@dataclass(frozen=True, kw_only=True, slots=True)
class Performance:
    """The best segment routing; NaN where there is no window.

    Attributes:
        srp: F1 of the best segment router, 0 to 1.
        rho_hat: Experts it switches on per expert that is selected.
        alpha: Its threshold: an expert is on for a window that selects it at least alpha times.
    """

    srp: Floats
    rho_hat: Floats
    alpha: Counts


def segment_performance(at_least: NDArray[Any]) -> Performance:
    """Segment routing best performance (SRP) and the size of its segment router.

    A segment router switches an expert on or off for all m tokens of a window. SRP is the best F1
    over all such routers, every (token, expert) of every window being one decision. It is reached
    by a threshold alpha on the counts; of several, the largest is taken (smallest rho_hat).

    Args:
        at_least: [..., m + 1] how many (window, expert) pairs have a count of at least
            0, 1, ..., m; add up over experts, layers and sequences first. Probabilities serve
            as well.

    Source:
        Liang et al., arXiv:2505.16056, section 3; alpha = ceil(m SRP / 2) is one maximiser.
    """
    at_least = np.asarray(at_least)
    window = at_least.shape[-1] - 1
    above = np.zeros_like(at_least)
    above[..., :-1] = np.cumsum(at_least[..., :0:-1], axis=-1)[..., ::-1]
    positives = above[..., :1]
    caught = np.arange(window + 1) * at_least + above
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * caught / (window * at_least + positives)
        alpha = window - np.argmax(np.nan_to_num(f1)[..., ::-1], axis=-1)
        srp = np.take_along_axis(f1, alpha[..., None], axis=-1)[..., 0]
        rho_hat = (
            window
            * np.take_along_axis(at_least, alpha[..., None], axis=-1)[..., 0]
            / positives[..., 0]
        )
    nothing = positives[..., 0] == 0
    undefined = at_least[..., 0] == 0
    return Performance(
        srp=np.where(undefined, np.nan, np.where(nothing, 0.0, srp)),
        rho_hat=np.where(undefined, np.nan, np.where(nothing, 0.0, rho_hat)),
        alpha=np.where(nothing, window, alpha),
    )


def chance_performance(window: int, rates: ArrayLike) -> Performance:
    """SRP of tokens that choose experts independently of one another.

    Args:
        window: m.
        rates: [..., N] how often each of N experts is selected, 0 to 1. One rate k / E is the
            uniform null; the observed rates are the skewed null, which also explains what a
            static imbalance of the experts gives.
    """
    rates = np.asarray(rates, dtype=np.float64)
    counts = np.arange(window + 1)
    ways = np.array([lgamma(window + 1) - lgamma(c + 1) - lgamma(window - c + 1) for c in counts])
    with np.errstate(divide="ignore", invalid="ignore"):
        chosen = np.where(counts == 0, 0.0, counts * np.log(rates[..., None]))
        other = np.where(counts == window, 0.0, (window - counts) * np.log1p(-rates[..., None]))
    mass = np.exp(ways + chosen + other).mean(axis=-2)
    return segment_performance(np.cumsum(mass[..., ::-1], axis=-1)[..., ::-1])


def adjusted(srp: ArrayLike, chance: ArrayLike) -> Floats:
    """SRP above chance, as a share of what is possible above chance; NaN where chance is 1."""
    srp, chance = np.asarray(srp, dtype=np.float64), np.asarray(chance, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (srp - chance) / (1 - chance), np.nan)


# Caches


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHits:
    """Hits by the smallest cache that has them; entry C - 1 belongs to C slots.

    The cumulative sum over the last axis is the number of hits of every cache size.

    Attributes:
        sequences: [S, E] hits in each sequence.
        experts: [E, E] hits of each expert's requests, all sequences together.
    """

    sequences: Counts
    experts: Counts


def cache_hits(
    selections: Selections, policy: str, *, window: int = 1, strict: bool = False
) -> CacheHits:
    """Hits of a cache of every size, each sequence starting with an empty one; no cold fills.

    All experts of a token are looked up in the cache as it stands before the token, then served
    in order; a missing one is always loaded, in place of the resident of least priority. The
    priority never depends on the cache size, so a cache holds what any smaller one holds, and one
    pass over a stack yields every size (Mattson et al., 1970). That includes LFU, whose uses are
    counted whether or not they hit.

    Args:
        selections: What is requested.
        policy: One of `POLICIES`.
        window: m of `sch`: it keeps the experts used most often by the not yet served part of
            the m tokens from the current one on.
        strict: Never evict an expert that the current token demands, as a real system must;
            meant for C >= K, where LRU is the same either way. Without it a hit may be credited
            that is evicted before it is served (the published accounting).

    Raises:
        ValueError: Unknown policy.

    Source:
        SCH: Liang et al., arXiv:2505.16056v3, section 3 and the authors' code.
    """
    if policy not in POLICIES:
        raise ValueError(f"Unknown policy '{policy}'. Known: {', '.join(POLICIES)}")
    num_experts = selections.num_experts
    sequences = np.zeros((len(selections.lengths), num_experts), np.int64)
    experts = np.zeros((num_experts, num_experts), np.int64)
    _stack_pass(
        selections.ids, selections.offsets, POLICIES.index(policy), window, strict,
        sequences, experts,
    )  # fmt: skip
    return CacheHits(sequences=sequences, experts=experts)


@compiled
def _stack_pass(ids, offsets, policy, window, strict, sequences, experts):  # type: ignore[no-untyped-def]
    num_experts = experts.shape[0]
    top_k = ids.shape[1]
    longest = np.max(offsets[1:] - offsets[:-1]) if len(offsets) > 1 else 0
    next_use = np.zeros(longest * top_k if policy == _BELADY else 0, np.int64)
    last_use = np.zeros(num_experts, np.int64)
    key = np.zeros(num_experts, np.int64)  # larger stays
    stack = np.zeros(num_experts + 1, np.uint16)  # the first C are in a cache of C slots
    place = np.zeros(num_experts, np.int64)
    for s in range(len(offsets) - 1):
        first, last = offsets[s], offsets[s + 1]
        of_sequence = sequences[s]
        key[:] = 0
        place[:] = -1
        size = 0
        if policy == _BELADY:
            end = (last - first) * top_k
            last_use[:] = end
            for t in range(last - 1, first - 1, -1):
                for i in range(top_k - 1, -1, -1):
                    e = ids[t, i]
                    if e < num_experts:
                        clock = (t - first) * top_k + i
                        next_use[clock] = last_use[e]
                        last_use[e] = clock
        elif policy > _BELADY:
            for t in range(first, min(last, first + window - 1)):
                for i in range(top_k):
                    e = ids[t, i]
                    if e < num_experts:
                        key[e] += _COUNT
        for t in range(first, last):
            if policy > _BELADY and t + window <= last:
                for i in range(top_k):
                    e = ids[t + window - 1, i]
                    if e < num_experts:
                        key[e] += _COUNT
            if strict:
                for i in range(top_k):
                    e = ids[t, i]
                    if e < num_experts:
                        key[e] |= _DEMANDED
            else:
                for p in range(size):
                    place[stack[p]] = p
                for i in range(top_k):
                    e = ids[t, i]
                    if e < num_experts and place[e] >= 0:
                        of_sequence[place[e]] += 1
                        experts[e, place[e]] += 1
            for i in range(top_k):
                e = ids[t, i]
                if e >= num_experts:
                    continue
                # Serve e: it moves to the top, and at each place below, of what was there and
                # what was pushed down, the larger key stays. stack[size] is a sentinel.
                stack[size] = e
                p = 0
                if stack[0] != e:
                    down = stack[0]
                    down_key = key[down]
                    stack[0] = e
                    p = 1
                    there = stack[p]
                    while there != e:
                        there_key = key[there]
                        stays = there_key > down_key
                        stack[p] = there if stays else down
                        down = down if stays else there
                        down_key = min(down_key, there_key)
                        p += 1
                        there = stack[p]
                    stack[p] = down
                if p == size:
                    size += 1
                elif strict:
                    of_sequence[p] += 1
                    experts[e, p] += 1
                clock = (t - first) * top_k + i
                if policy == _LRU:
                    key[e] = (key[e] & _DEMANDED) | (clock + 1)
                elif policy == _LFU:
                    key[e] = (((key[e] >> _COUNT_BITS) + 1) << _COUNT_BITS) | (clock + 1)
                elif policy == _BELADY:
                    key[e] = (key[e] & _DEMANDED) | (_COUNT - next_use[clock])
                else:
                    key[e] = (((key[e] >> _COUNT_BITS) - 1) << _COUNT_BITS) | (clock + 1)
            if strict:
                for i in range(top_k):
                    e = ids[t, i]
                    if e < num_experts:
                        key[e] &= ~_DEMANDED


def cold_fills(selections: Selections) -> CacheHits:
    """First requests of a sequence that still find a free slot, by the smallest such cache.

    An expert requested for the first time finds a free slot if fewer than C distinct experts were
    requested before it. This holds for every policy; published hit rates count these as hits.
    """
    num_experts = selections.num_experts
    sequences = np.zeros((len(selections.lengths), num_experts), np.int64)
    experts = np.zeros((num_experts, num_experts), np.int64)
    _fill(selections.ids, selections.offsets, sequences, experts)
    return CacheHits(sequences=sequences, experts=experts)


@compiled
def _fill(ids, offsets, sequences, experts):  # type: ignore[no-untyped-def]
    num_experts = experts.shape[0]
    last_sequence = np.full(num_experts, -1, np.int64)
    for s in range(len(offsets) - 1):
        distinct = 0
        for t in range(offsets[s], offsets[s + 1]):
            for i in range(ids.shape[1]):
                e = ids[t, i]
                if e < num_experts and last_sequence[e] != s:
                    last_sequence[e] = s
                    sequences[s, distinct] += 1
                    experts[e, distinct] += 1
                    distinct += 1


def knee(rate: ArrayLike, *, least: float = 0.02) -> int | None:
    """Where a rising curve bends: the index that lies highest above the chord of its ends.

    Args:
        rate: [N] hit rates of evenly spaced cache sizes.
        least: A curve that nowhere rises higher above its chord has no knee.
    """
    rate = np.asarray(rate, dtype=np.float64)
    above = rate - np.linspace(rate[0], rate[-1], len(rate))
    return int(above.argmax()) if above.max() > least else None
