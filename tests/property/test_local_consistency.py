"""Window counts, SRP and caches against brute force, and the properties of the definitions."""

from math import ceil

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import locality as oracle

from moetools.locality import (
    POLICIES,
    Selections,
    cache_hits,
    cold_fills,
    segment_performance,
    window_counts,
    window_ranks,
)

modest = settings(deadline=None, max_examples=60)


@st.composite
def routings(draw, *, max_tokens=14, max_experts=6, max_sequences=3, top_k=None):
    """Sequences of tokens with K distinct experts each, and E."""
    num_experts = draw(st.integers(1, max_experts))
    k = top_k or draw(st.integers(1, num_experts))
    token = st.permutations(range(num_experts)).map(lambda order: order[:k])
    sequence = st.lists(token, min_size=1, max_size=max_tokens)
    return draw(st.lists(sequence, min_size=1, max_size=max_sequences)), num_experts


def packed(sequences, num_experts):
    ids = np.array([token for tokens in sequences for token in tokens])
    offsets = np.cumsum([0, *map(len, sequences)])
    return Selections.of(ids, offsets, num_experts)


def srp_of(sequences, num_experts, window):
    counts = window_counts(packed(sequences, num_experts), window)
    return segment_performance(counts.sequences.sum(axis=0))


@modest
@given(routings(), st.integers(1, 9))
def test_window_counts(routing, window):
    sequences, num_experts = routing
    group = np.arange(len(sequences)) % 2
    selections = packed(sequences, num_experts)
    found = window_counts(selections, window, group=group)
    ranks = window_ranks(selections, window)
    for s, tokens in enumerate(sequences):
        counts = np.array(oracle.window_counts([tokens], num_experts, window))
        counts = counts.reshape(-1, num_experts)
        at_least = [(counts >= c).sum() for c in range(window + 1)]
        assert found.sequences[s].tolist() == at_least
        assert ranks[s].tolist() == (-np.sort(-counts, axis=1)).sum(axis=0).tolist()
    for g in set(group.tolist()):
        of_group = [tokens for tokens, own in zip(sequences, group, strict=True) if own == g]
        counts = np.array(oracle.window_counts(of_group, num_experts, window))
        counts = counts.reshape(-1, num_experts)
        expected = [(counts >= c).sum(axis=0) for c in range(window + 1)]
        assert found.experts[g].T.tolist() == np.array(expected).tolist()


@modest
@given(st.integers(1, 6).flatmap(
    lambda m: st.tuples(st.just(m), st.lists(st.integers(0, m), min_size=1, max_size=10))
))  # fmt: skip
def test_srp_is_the_best_of_all_segment_routers(case):
    window, counts = case
    at_least = np.array([sum(f >= c for f in counts) for c in range(window + 1)])
    found = segment_performance(at_least)
    best = oracle.srp_by_enumeration(counts, window)
    assert float(found.srp) == float(best)
    if not best:
        assert found.rho_hat == 0
        return
    tied = [a for a in range(window + 1) if oracle.f1_at(a, counts, window) == best]
    assert int(found.alpha) == max(tied)
    assert oracle.f1_at(ceil(window * best / 2), counts, window) == best
    switched_on = sum(f >= max(tied) for f in counts)
    assert found.rho_hat == pytest.approx(window * switched_on / sum(counts))
    below = [f for f in counts if 2 * f < window * best]
    above = [f for f in counts if 2 * f > window * best]
    assert tied == list(range(max(below, default=-1) + 1, min(above) + 1))
    assert (best == 1) == all(f in (0, window) for f in counts)


@modest
@given(routings(), st.integers(1, 6), st.randoms(use_true_random=False))
def test_srp_does_not_depend_on_names_and_order(routing, window, random):
    sequences, num_experts = routing
    assume(max(map(len, sequences)) >= window)
    found = srp_of(sequences, num_experts, window)
    share = len(sequences[0][0]) / num_experts
    assert 2 * share / (1 + share) <= found.srp + 1e-12
    assert found.srp <= 1
    names = random.sample(range(num_experts), num_experts)
    variants = {
        "renamed": [[[names[e] for e in token] for token in tokens] for tokens in sequences],
        "shuffled": random.sample(sequences, len(sequences)),
        "doubled": sequences * 2,
        "reversed": [tokens[::-1] for tokens in sequences],
    }
    for name, variant in variants.items():
        assert srp_of(variant, num_experts, window) == found, name


@modest
@given(routings(), st.integers(1, 6))
def test_srp_of_a_union_lies_between(routing, window):
    """The mediant bound: a layer between its experts, sequences together between each."""
    sequences, num_experts = routing
    assume(max(map(len, sequences)) >= window)
    counts = window_counts(packed(sequences, num_experts), window)
    for parts in (counts.experts[0], counts.sequences):
        used = parts[parts[:, 1] > 0]
        each = segment_performance(used).srp
        together = segment_performance(parts[parts[:, 0] > 0][used_rows(parts)].sum(axis=0)).srp
        assert each.min() - 1e-12 <= together <= each.max() + 1e-12


def used_rows(parts):
    return parts[parts[:, 0] > 0][:, 1] > 0


@modest
@given(routings(), st.integers(1, 6))
def test_window_sets_are_segment_routers(routing, window):
    sequences, num_experts = routing
    assume(max(map(len, sequences)) >= window)
    counts = oracle.window_counts(sequences, num_experts, window)
    ranks = window_ranks(packed(sequences, num_experts), window).sum(axis=0)
    rates = np.cumsum(ranks) / ranks.sum()
    top_k = len(sequences[0][0])
    srp = srp_of(sequences, num_experts, window).srp
    for size, rate in enumerate(rates, 1):
        assert rate == pytest.approx(float(oracle.sch_window(counts, size)))
        assert 2 * rate / (1 + size / top_k) <= srp + 1e-12
    assert rates[-1] == 1
    assert (np.diff(rates) >= 0).all()


@settings(deadline=None, max_examples=150)
@given(
    routings(max_tokens=25, max_experts=8, max_sequences=2),
    st.sampled_from(POLICIES),
    st.integers(1, 30),
    st.booleans(),
)
def test_caches_of_every_size(routing, policy, window, strict):
    sequences, num_experts = routing
    selections = packed(sequences, num_experts)
    found = cache_hits(selections, policy, window=window, strict=strict)
    cold = cold_fills(selections)
    hits, fills = found.sequences.cumsum(axis=1), cold.sequences.cumsum(axis=1)
    of_expert, fills_of_expert = found.experts.cumsum(axis=1), cold.experts.cumsum(axis=1)
    top_k = len(sequences[0][0])
    for size in range(top_k if strict else 1, num_experts + 1):
        caches = [
            oracle.Cache(tokens, size, policy, window=window, strict=strict) for tokens in sequences
        ]
        assert hits[:, size - 1].tolist() == [cache.num_hits for cache in caches]
        assert fills[:, size - 1].tolist() == [cache.num_cold for cache in caches]
        for e in range(num_experts):
            assert of_expert[e, size - 1] == sum(cache.hits.get(e, 0) for cache in caches)
            assert fills_of_expert[e, size - 1] == sum(cache.cold.get(e, 0) for cache in caches)
    num_requests = np.array([len(tokens) * top_k for tokens in sequences])
    assert (hits[:, -1] + fills[:, -1] == num_requests).all()


@modest
@given(routings(max_tokens=25, max_experts=8), st.booleans())
def test_sch_of_one_token_is_lru(routing, strict):
    selections = packed(*routing)
    sch = cache_hits(selections, "sch", window=1, strict=strict).sequences
    lru = cache_hits(selections, "lru", strict=strict).sequences
    if strict:
        top_k = len(routing[0][0][0])
        sch, lru = (hits.cumsum(axis=1)[:, top_k - 1 :] for hits in (sch, lru))
    assert sch.tolist() == lru.tolist()


@modest
@given(routings(max_tokens=25, max_experts=8), st.integers(1, 8))
def test_foresight_beats_every_policy(routing, window):
    """Under strict accounting from k slots on; with one expert per token also the published one."""
    sequences, num_experts = routing
    selections, top_k = packed(sequences, num_experts), len(sequences[0][0])
    for strict in (True, False) if top_k == 1 else (True,):
        curves = {
            policy: cache_hits(selections, policy, window=window, strict=strict)
            .sequences.cumsum(axis=1)[:, top_k - 1 :]
            for policy in POLICIES
        }  # fmt: skip
        for policy in POLICIES:
            assert (curves["belady"] >= curves[policy]).all(), policy


@modest
@given(routings(max_tokens=25, max_experts=8))
def test_lru_is_the_same_by_both_accountings(routing):
    """Most recently used experts are those of the current token first, protected or not."""
    selections, top_k = packed(*routing), len(routing[0][0][0])
    paper, strict = (
        cache_hits(selections, "lru", strict=strict).sequences.cumsum(axis=1)[:, top_k - 1 :]
        for strict in (False, True)
    )
    assert paper.tolist() == strict.tolist()
