"""Cases worked by hand, published tables, and limits of the functions on plain ids."""

from itertools import pairwise

import numpy as np
import pytest
from oracles.locality import Cache

from moetools.locality import (
    Selections,
    adjusted,
    cache_hits,
    chance_performance,
    cold_fills,
    knee,
    pool,
    segment_performance,
    window_counts,
    window_ranks,
)


def one(ids, num_experts):
    ids = np.array(ids)
    return Selections.of(ids, [0, len(ids)], num_experts)


def performance(counts, window):
    counts = np.array(counts)
    return segment_performance(np.array([(counts >= c).sum() for c in range(window + 1)]))


def rate(selections, policy, *, cold="hit", **options):
    """Hit rate of every size, exact."""
    hits = cache_hits(selections, policy, **options).sequences.sum(axis=0)
    if cold == "hit":
        hits = hits + cold_fills(selections).sequences.sum(axis=0)
    return np.cumsum(hits) / np.sum(selections.ids < selections.num_experts)


def test_one_expert_by_hand():
    selections = one([[0], [9], [0], [0]][::-1], 1)
    counts = window_counts(selections, 2)
    assert counts.experts.tolist() == [[[3, 3, 1]]]
    assert counts.sequences.tolist() == [[3, 3, 1]]
    found = segment_performance(counts.experts[0, 0])
    assert found.srp == 0.8
    assert found.alpha == 1
    assert found.rho_hat == 1.5


@pytest.mark.parametrize(
    ("counts", "srp", "alpha", "rho_hat"),
    [((4, 2), 6 / 7, 2, 8 / 6), ((0, 1, 1, 2), 0.5, 2, 1.0)],
)
def test_ties_take_the_largest_threshold(counts, srp, alpha, rho_hat):
    found = performance(counts, 4)
    assert (found.srp, found.alpha, found.rho_hat) == (srp, alpha, rho_hat)


def test_two_experts_by_hand():
    selections = one([[0], [0], [1], [0]], 2)
    counts = window_counts(selections, 2)
    assert np.diff(counts.experts[0, :, ::-1], prepend=0)[:, ::-1].tolist() == [
        [0, 2, 1],
        [1, 2, 0],
    ]
    found = segment_performance(counts.experts[0].sum(axis=0))
    assert found.srp == 0.75
    assert found.rho_hat == 10 / 6
    ranks = window_ranks(selections, 2)
    assert np.cumsum(ranks[0] / ranks.sum()).tolist() == [4 / 6, 1]


def test_sch_cache_and_lru_by_hand():
    selections = one([[0], [1], [2], [0]], 3)
    for strict in (False, True):
        assert rate(selections, "sch", window=2, strict=strict).tolist() == [1 / 4, 3 / 4, 1]
        assert rate(selections, "lru", strict=strict).tolist() == [1 / 4, 2 / 4, 1]


def test_two_experts_per_token_by_hand():
    selections = one([[0, 1], [0, 2], [0, 1], [2, 3]], 4)
    assert rate(selections, "sch", window=3)[1:].tolist() == [5 / 8, 7 / 8, 1]
    assert rate(selections, "lru")[1:].tolist() == [4 / 8, 7 / 8, 1]
    assert rate(selections, "sch", window=3, cold="miss")[1] == 3 / 8
    for policy in ("sch", "lru"):
        strict = rate(selections, policy, window=3, strict=True)
        assert strict[1:].tolist() == [4 / 8, 7 / 8, 1]
    assert rate(selections, "sch", window=3, cold="miss", strict=True)[1] == 2 / 8


CHANCE = {
    1 / 4: ((56.49, 1.05), (45.20, 2.38), (40.91, 3.04), (40.05, 3.87)),
    1 / 5: ((51.26, 0.90), (40.01, 2.01), (34.91, 3.24), (33.51, 4.58)),
    1 / 8: ((46.40, 3.31), (32.14, 2.58), (25.26, 3.26), (22.94, 5.40)),
    3 / 32: ((44.72, 3.47), (28.10, 1.97), (21.03, 4.20), (18.25, 5.67)),
    1 / 15: ((43.31, 3.62), (24.14, 4.34), (17.14, 3.80), (14.02, 6.64)),
    1 / 16: ((43.10, 3.64), (23.74, 4.23), (16.46, 3.36), (13.36, 5.40)),
}


@pytest.mark.parametrize("share", CHANCE)
def test_chance_levels(share):
    for window, (srp, rho_hat) in zip((4, 16, 64, 256), CHANCE[share], strict=True):
        found = chance_performance(window, [share])
        assert 100 * found.srp == pytest.approx(srp, abs=0.0051)
        assert found.rho_hat == pytest.approx(rho_hat, abs=0.0051)


PUBLISHED = {  # k, E, SRP at m = 4, 16, 64, 256; SCH-window at twice k slots, same m
    "Qwen3": (8, 128, (67.22, 54.14, 47.89, 43.81), (91.7, 75.6, 67.2, 61.9)),
    "OLMoE": (8, 64, (64.69, 50.91, 45.53, 42.64), (89.3, 72.9, 65.3, 61.3)),
    "Phi-3.5-MoE": (2, 16, (65.15, 51.98, 46.60, 43.78), (89.6, 74.4, 67.3, 63.6)),
    "Mixtral": (2, 8, (62.55, 49.36, 44.51, 42.47), (88.2, 73.9, 66.3, 62.3)),
    "LLaMA-MoE-v1": (4, 16, (55.78, 45.29, 41.61, 40.62), (80.8, 67.0, 60.3, 57.1)),
    "DeepSeek-V2-Lite": (6, 64, (53.21, 37.92, 30.68, 26.92), (77.9, 56.7, 45.9, 40.3)),
    "Qwen1.5-MoE": (4, 60, (47.23, 30.71, 22.50, 18.71), (69.1, 45.4, 33.5, 27.6)),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_numbers_obey_the_bounds(model):
    """SRP is above its floor, and above what the best window set of 2 k experts implies."""
    top_k, num_experts, srp, sch = PUBLISHED[model]
    share = top_k / num_experts
    assert min(srp) >= 100 * 2 * share / (1 + share)
    for above, window_set in zip(srp, sch, strict=True):
        assert 2 * window_set / (1 + 2) <= above + 0.05


def test_published_numbers_against_chance():
    """Of two models with an SRP around 50 one is at chance; another is below it."""

    def above(model, at):
        top_k, num_experts, srp, _ = PUBLISHED[model]
        chance = chance_performance((4, 16)[at], [top_k / num_experts]).srp
        return 100 * float(srp[at] / 100 - chance), float(adjusted(srp[at] / 100, chance))

    assert above("Mixtral", 1)[0] == pytest.approx(4.2, abs=0.05)
    assert above("Qwen3", 1)[0] == pytest.approx(30.4, abs=0.05)
    assert above("LLaMA-MoE-v1", 1)[1] == pytest.approx(0, abs=0.002)
    assert above("LLaMA-MoE-v1", 0)[1] < -0.01


def test_independent_tokens_are_at_chance():
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40_000, 16)), axis=1)[:, :4]
    for window in (4, 16, 64):
        counts = window_counts(Selections.of(ids, [0, 20_000, 40_000], 16), window)
        srp = segment_performance(counts.sequences.sum(axis=0)).srp
        assert srp == pytest.approx(float(chance_performance(window, [0.25]).srp), abs=0.003)


def test_skewed_chance_is_that_of_static_imbalance():
    """Experts with fixed rates of their own: at the skewed level, above the uniform one."""
    rng = np.random.default_rng(1)
    rates = np.linspace(0.02, 0.9, 8)
    chosen = rng.random((40_000, 8)) < rates
    ids = np.where(chosen, np.arange(8), 8)
    counts = window_counts(Selections.of(ids, [0, 40_000], 8), 16)
    srp = segment_performance(counts.sequences[0]).srp
    assert srp == pytest.approx(float(chance_performance(16, rates).srp), abs=0.003)
    assert srp > float(chance_performance(16, [rates.mean()]).srp) + 0.1


def test_sticky_tokens_rise_to_one():
    rng = np.random.default_rng(2)
    found = []
    for stay in (0.0, 0.5, 0.9, 1.0):
        fresh = np.argsort(rng.random((4000, 16)), axis=1)[:, :4]
        renewed = rng.random(4000) >= stay
        renewed[0] = True
        ids = fresh[np.maximum.accumulate(np.where(renewed, np.arange(4000), 0))]
        counts = window_counts(Selections.of(ids, [0, 4000], 16), 16)
        found.append(float(segment_performance(counts.sequences[0]).srp))
    assert found == sorted(found)
    assert found[-1] == 1


def test_constant_routing_is_perfect():
    selections = one([[2, 0]] * 20, 4)
    found = segment_performance(window_counts(selections, 16).sequences[0])
    assert (found.srp, found.rho_hat) == (1, 1)
    for policy in ("lru", "lfu", "belady", "sch"):
        for strict in (False, True):
            assert rate(selections, policy, window=4, strict=strict)[1:].tolist() == [1, 1, 1]


def test_windows_of_one_token_are_perfect():
    found = segment_performance(window_counts(one([[0, 3], [1, 2]], 5), 1).sequences[0])
    assert (found.srp, found.rho_hat) == (1, 1)


def test_short_sequences_have_no_windows():
    selections = Selections.of(np.array([[0], [1], [0]]), [0, 1, 3], 2)
    counts = window_counts(selections, 2)
    assert counts.sequences.tolist() == [[0, 0, 0], [2, 2, 0]]
    found = segment_performance(counts.sequences)
    assert np.isnan(found.srp).tolist() == [True, False]
    assert np.isnan(found.rho_hat).tolist() == [True, False]


def test_an_unused_expert_scores_zero():
    found = segment_performance(window_counts(one([[0]] * 4, 2), 2).experts[0])
    assert found.srp.tolist() == [1, 0]
    assert found.rho_hat.tolist() == [1, 0]


def test_dropped_tokens_demand_nothing():
    """A dropped token lengthens windows and changes no cache."""
    dropped = one([[0, 1], [255, 255], [0, 2], [7, 7], [1, 2]], 3)
    kept = one([[0, 1], [0, 2], [1, 2]], 3)
    for policy in ("lru", "lfu", "belady"):
        for strict in (False, True):
            assert (
                cache_hits(dropped, policy, strict=strict).sequences.tolist()
                == cache_hits(kept, policy, strict=strict).sequences.tolist()
            )
    assert cold_fills(dropped).sequences.tolist() == cold_fills(kept).sequences.tolist()
    assert window_counts(dropped, 5).experts[0, :, 1:].sum(axis=1).tolist() == [2, 2, 2]


def test_sequences_do_not_share_anything():
    ids = np.array([[0], [1], [2], [0], [1], [2]])
    together = Selections.of(ids, [0, 3, 6], 3)
    parts = [one(ids[:3], 3), one(ids[3:], 3)]
    for policy in ("lru", "lfu", "belady", "sch"):
        found = cache_hits(together, policy, window=3).sequences
        assert found.tolist() == [
            cache_hits(p, policy, window=3).sequences[0].tolist() for p in parts
        ]
        assert not found.any()
    assert together.take(np.array([False, True])).ids.tolist() == ids[3:].tolist()


def test_shared_pool_serves_layers_in_order():
    first = one([[0, 1], [1, 2], [9, 9]], 3)
    second = one([[1], [0], [1]], 2)
    together = pool([first, second])
    assert together.num_experts == 5
    assert together.ids.tolist() == [[0, 1, 4], [1, 2, 3], [5, 5, 4]]


def test_use_counts_give_nested_caches():
    """LFU with counts that outlive eviction: a larger cache holds what a smaller one holds."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        num_experts = int(rng.integers(2, 7))
        top_k = int(rng.integers(1, num_experts + 1))
        tokens = [rng.permutation(num_experts)[:top_k].tolist() for _ in range(15)]
        contents = [Cache(tokens, size, "lfu").contents for size in range(1, num_experts + 1)]
        for smaller, larger in pairwise(contents):
            assert all(a <= b for a, b in zip(smaller, larger, strict=True))


def test_a_repeated_expert_is_refused():
    with pytest.raises(ValueError, match=r"Token 1 selects an expert twice: \[2, 2\]"):
        one([[0, 1], [2, 2]], 3)


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="Unknown policy 'fifo'"):
        cache_hits(one([[0]], 1), "fifo")


def test_knee_of_a_bent_line():
    assert knee([0.1, 0.5, 0.8, 0.85, 0.9, 1.0]) == 2


@pytest.mark.parametrize("rate", [[0.1, 0.4, 0.7, 1.0], [0.1, 0.2, 0.3, 1.0], [1.0]])
def test_a_straight_or_hollow_line_has_no_knee(rate):
    assert knee(rate) is None
