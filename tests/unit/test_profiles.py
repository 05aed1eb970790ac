import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon
from synthetic import random_ids, random_probs

from moetools.intervals import basic_interval, replicate_weights
from moetools.profiles import (
    ItemSample,
    chance_jaccard,
    correlation,
    divergence,
    divergence_beyond_halves,
    item_hash,
    item_means,
    length_allowance,
    mean_between_items,
    mean_jaccard,
    overlap,
    ratio_of_draws,
    sequence_frequencies,
    skewed_jaccard,
)


def scalar_divergence(a, b):
    """The definition, number by number."""

    def entropy(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    middle = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
    own = (entropy(a) + entropy(b)) / 2
    room = math.log(len(a)) - own
    return max(entropy(middle) - own, 0) / max(room, 1e-6)


def scalar_jaccard(ids):
    sets = [set(row) for row in ids.tolist()]
    pairs = [len(a & b) / len(a | b) for a, b in combinations(sets, 2)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(
    ("a", "b", "distance", "expected"),
    [
        ((1, 0), (0, 1), 0.693147, 1),
        ((1, 0), (0.5, 0.5), 0.215762, 0.622556),
        ((0.7, 0.3), (0.3, 0.7), 0.082283, 1),
        ((0.5, 0.5, 0, 0), (0, 0, 0.5, 0.5), 0.693147, 1),
        ((1, 0, 0, 0), (0, 1, 0, 0), 0.693147, 0.5),
        ((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4), 0.106440, 1),
        ((0.5, 0.5), (0.5, 0.5), 0, 0),
    ],
)
def test_divergence_by_hand(a, b, distance, expected):
    assert jensenshannon(a, b) ** 2 == pytest.approx(distance, abs=1e-6)
    assert divergence(np.array(a), np.array(b)) == pytest.approx(expected, abs=1e-6)
    assert scalar_divergence(a, b) == pytest.approx(expected, abs=1e-6)


def test_divergence_of_a_corpus_is_the_mean_of_its_sentences():
    a, b = np.array([(0.9, 0.1), (0.5, 0.5)]), np.array([(0.5, 0.5), (0.5, 0.5)])
    assert divergence(a, b).mean() == pytest.approx(0.276444, abs=1e-6)


def test_divergence_is_that_of_scipy_and_of_scalars():
    rng = np.random.default_rng(0)
    a, b = random_probs(rng, 40, 7, scale=2), random_probs(rng, 40, 7, scale=0.5)
    a[:10, :3] = 0
    found = divergence(a * 3, b * 5)
    for i in range(40):
        p, q = a[i] / a[i].sum(), b[i]
        assert found[i] == pytest.approx(scalar_divergence(p, q), rel=1e-9)
        room = np.log(7) - (stats.entropy(p) + stats.entropy(q)) / 2
        assert found[i] == pytest.approx(jensenshannon(p, q) ** 2 / room, rel=1e-9)


def test_divergence_of_nothing_is_unknown():
    assert np.isnan(divergence(np.zeros(3), np.ones(3)))


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_unrelated_profiles_near_uniform_are_half_way(num_tokens):
    rng = np.random.default_rng(1)
    ids = random_ids(rng, 300 * num_tokens, 64, 8)
    profiles = sequence_frequencies(ids, num_tokens * np.arange(301), 64)
    assert divergence(profiles[::2], profiles[1::2]).mean() == pytest.approx(0.515, abs=0.025)


def test_jaccard_by_hand():
    ids = np.array([[0, 1], [0, 2], [0, 1]])
    found = mean_jaccard(ids, np.array([0, 3]), 4, sequence=np.array([0]))
    assert found == pytest.approx([5 / 9])


@pytest.mark.parametrize(("num_experts", "top_k"), [(9, 3), (64, 8), (65, 2), (200, 5), (4, 4)])
def test_jaccard_is_that_of_sets(num_experts, top_k):
    rng = np.random.default_rng(2)
    ids = random_ids(rng, 75, num_experts, top_k)
    offsets = np.array([0, 40, 41, 43, 75])
    found = mean_jaccard(ids.astype(np.uint8), offsets, num_experts, sequence=np.arange(4))
    expected = [scalar_jaccard(ids[a:b]) if b - a > 1 else np.nan for a, b in ((0, 40), (40, 41))]
    expected += [scalar_jaccard(ids[41:43]), scalar_jaccard(ids[43:])]
    assert found == pytest.approx(expected, nan_ok=True)


def test_jaccard_leaves_dropped_tokens_out():
    ids = np.array([[0, 1], [255, 255], [0, 2], [0, 1]], np.uint8)
    found = mean_jaccard(ids, np.array([0, 4]), 4, sequence=np.array([0]))
    assert found == pytest.approx([5 / 9])
    dropped = np.full((3, 2), 255, np.uint8)
    assert np.isnan(mean_jaccard(dropped, np.array([0, 3]), 4, sequence=np.array([0])))


def test_jaccard_of_long_sequences_is_estimated_alike_wherever_they_stand():
    rng = np.random.default_rng(3)
    ids = np.concatenate([random_ids(rng, 700, 8, 2), random_ids(rng, 800, 5, 2)])
    alone = mean_jaccard(ids, np.array([0, 1500]), 8, sequence=np.array([17]))
    among = np.concatenate([ids[:10], ids, ids[:5]])
    offsets = np.array([0, 10, 1510, 1515])
    found = mean_jaccard(among, offsets, 8, sequence=np.array([3, 17, 4]))
    assert found[1] == alone[0]
    assert alone[0] == pytest.approx(scalar_jaccard(ids), abs=0.005)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"),
    [(128, 8, 0.0343), (64, 8, 0.0705), (16, 2, 0.0861), (32, 4, 0.0750)],
)
def test_chance_levels(num_experts, top_k, expected):
    assert chance_jaccard(num_experts, top_k) == pytest.approx(expected, abs=5e-5)
    even = skewed_jaccard(np.full(num_experts, 0.3), top_k)
    assert even == pytest.approx(expected, abs=2e-4)


def test_skewed_chance_of_one_selected_is_the_sum_of_squares():
    frequencies = np.array([0.5, 0.25, 0.15, 0.1, 0])
    found = skewed_jaccard(frequencies, 1)
    assert found == pytest.approx((frequencies**2).sum())
    assert np.isnan(skewed_jaccard(np.zeros(4), 2))


def test_skewed_chance_is_what_independent_tokens_of_these_frequencies_show():
    rng = np.random.default_rng(4)
    scores = np.linspace(-1, 1, 12) + rng.gumbel(size=(4000, 12))
    ids = np.argsort(-scores, axis=1)[:, :3]
    frequencies = np.bincount(ids.ravel(), minlength=12)
    assert skewed_jaccard(frequencies, 3) == pytest.approx(scalar_jaccard(ids[:400]), abs=0.007)


def test_frequencies_and_specialised_experts_by_hand():
    ids = np.array([[0, 1], [0, 2], [0, 1], [0, 3], [1, 2], [1, 2]])
    frequency = sequence_frequencies(ids, np.array([0, 4, 6]), 4)
    assert frequency.tolist() == [[1, 0.5, 0.25, 0.25], [0, 1, 1, 0]]
    delta = frequency[0] - frequency[1]
    assert delta.tolist() == [1, -0.5, -0.75, 0.25]
    assert np.flatnonzero(delta > 0.3).tolist() == [0]


def test_frequencies_leave_dropped_selections_out():
    ids = np.array([[0, 1], [255, 255]], np.uint8)
    assert sequence_frequencies(ids, np.array([0, 2]), 3).tolist() == [[0.5, 0.5, 0]]


def mask(size, *members):
    return np.isin(np.arange(size), members)


def test_overlap_is_hypergeometric():
    a, b = mask(16, 0, 1, 2, 3), mask(16, 2, 3, 4)
    found = overlap([a], [b])
    chance = stats.hypergeom(16, 4, 3)
    assert (found.shared, found.expected) == (2, 0.75)
    assert found.p_fewer == pytest.approx(chance.cdf(2))
    assert found.p_more == pytest.approx(chance.sf(1))


def test_overlap_adds_up_over_layers():
    rng = np.random.default_rng(5)
    a, b = [mask(8, 0, 1, 2), mask(6, 0), mask(6)], [mask(8, 2, 5), mask(6, 0, 1, 2), mask(6, 1)]
    found = overlap(a, b)
    assert (found.shared, found.expected) == (2, 6 / 8 + 3 / 6)
    drawn = rng.hypergeometric(3, 5, 2, 40_000) + rng.hypergeometric(1, 5, 3, 40_000)
    assert found.p_more == pytest.approx((drawn >= 2).mean(), abs=0.01)
    assert found.p_fewer == pytest.approx((drawn <= 2).mean(), abs=0.01)


def test_overlap_of_an_empty_set_says_nothing():
    found = overlap([mask(8)], [mask(8, 1)])
    assert (found.shared, found.expected) == (0, 0)
    assert np.isnan(found.p_fewer)
    assert np.isnan(found.p_more)


def test_correlation_is_that_of_scipy():
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=14), rng.normal(size=(14, 3))
    y[:, 0] -= 2 * x
    y[:, 2] = 4
    found = correlation(x, y)
    for i in (0, 1):
        expected = stats.pearsonr(x, y[:, i])
        interval = expected.confidence_interval()
        assert found.r[i] == pytest.approx(expected.statistic)
        assert (found.low[i], found.high[i]) == pytest.approx((interval.low, interval.high))
        assert found.p[i] == pytest.approx(expected.pvalue, abs=0.02)
    assert np.isnan([found.r[2], found.low[2], found.high[2], found.p[2]]).all()
    assert found.p[0] <= found.p_largest <= 2.2 * found.p[0]


def test_interval_of_a_correlation_of_fourteen():
    x = np.arange(14.0)
    noise = np.sin(3 * x)
    x, noise = (v - v.mean() for v in (x, noise))
    noise -= x * (x @ noise) / (x @ x)
    y = -0.6 * x / np.linalg.norm(x) + 0.8 * noise / np.linalg.norm(noise)
    found = correlation(x, y[:, None])
    assert found.r[0] == pytest.approx(-0.6)
    assert (found.low[0], found.high[0]) == pytest.approx((-0.86, -0.10), abs=0.005)


def test_permutations_of_few_groups_are_exact():
    found = correlation(np.arange(4.0), np.arange(4.0)[:, None])
    assert found.r[0] == pytest.approx(1)
    assert found.p[0] == pytest.approx(2 / 24)
    assert found.p_largest == pytest.approx(2 / 24)
    with pytest.raises(ValueError, match="3 groups"):
        correlation(np.arange(3.0), np.ones((3, 1)))


def test_correlation_of_ranks_is_that_of_scipy():
    rng = np.random.default_rng(7)
    x, y = np.exp(3 * rng.normal(size=12)), rng.normal(size=(12, 1))
    x[3] = x[4]
    found = correlation(x, y, ranks=True)
    expected = stats.spearmanr(x, y[:, 0])
    assert found.r[0] == pytest.approx(expected.statistic)
    assert found.p[0] == pytest.approx(expected.pvalue, abs=0.02)


def test_means_over_items_leave_missing_values_out():
    values = np.array([[1, np.nan, 5], [2, np.nan, np.nan], [6, np.nan, np.nan]])
    found = item_means(values, np.array([[0, 2.0, 1], [3, 0, 0]]))
    expected = [[3, np.nan, 5], [10 / 3, np.nan, np.nan], [1, np.nan, np.nan]]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("num", [2, 3, 7])
def test_mean_between_few_items_is_over_all_pairs(num):
    rng = np.random.default_rng(8)
    profiles = random_probs(rng, num, 5, scale=2)
    weights = rng.multinomial(num, np.full(num, 1 / num), size=3).astype(float)
    found = mean_between_items(lambda partner: divergence(profiles, profiles[partner]), weights)
    pairs = list(combinations(range(num), 2))
    distance = np.array([divergence(profiles[i], profiles[j]) for i, j in pairs])
    assert found[0] == pytest.approx(distance.mean())
    if num == 2:
        assert np.isnan(found[1:]).all()
        return
    for draw, row in zip(found[1:], weights, strict=True):
        of_pair = np.array([row[i] + row[j] - 1 for i, j in pairs])
        assert draw == pytest.approx((of_pair @ distance) / len(pairs))


def test_mean_between_items_takes_one_item_for_nothing():
    assert np.isnan(mean_between_items(lambda partner: np.ones(1), np.ones((2, 1)))).all()


def test_interval_of_a_mean_between_items_is_hardly_too_wide():
    rng = np.random.default_rng(11)
    covered, widths, means = [], [], []
    for trial in range(300):
        own, noise = rng.normal(size=40), rng.normal(size=(40, 40))

        def distance(partner, own=own, noise=noise):
            return own + own[partner] + 3 * noise[np.arange(40), partner]

        weights = replicate_weights(np.ones(40, dtype=bool), seed=trial)
        draws = mean_between_items(distance, weights)
        low, high = basic_interval(draws[0], draws[1:])
        covered.append(low <= 0 <= high)
        widths.append(draws[1:].std())
        means.append(draws[0])
    assert 0.91 <= np.mean(covered) <= 0.985
    assert np.mean(widths) / np.std(means) == pytest.approx(1, abs=0.2)


def halves_of(rng, base, length, sharpness):
    """Profiles of even and odd tokens of texts whose tokens scatter around `base` [N, E]."""
    probs = random_probs_around(rng, base, length, sharpness)
    return probs[:, ::2].sum(axis=1), probs[:, 1::2].sum(axis=1)


def random_probs_around(rng, base, length, sharpness):
    logits = base[:, None] + sharpness * rng.normal(size=(len(base), length, base.shape[1]))
    scores = np.exp(logits - logits.max(axis=2, keepdims=True))
    return scores / scores.sum(axis=2, keepdims=True)


@pytest.mark.parametrize("sharpness", [0.1, 1, 3, 8])
@pytest.mark.parametrize("length", [10, 20, 40, 80, 160])
def test_texts_routed_alike_differ_by_no_more_than_lengths_may_leave(length, sharpness):
    rng = np.random.default_rng(12)
    base = rng.normal(0, 0.3, (400, 32))
    reference = halves_of(rng, base, 40, sharpness)
    found = divergence_beyond_halves(*reference, *halves_of(rng, base, length, sharpness))
    mean, error = found.mean(), found.std() / np.sqrt(len(found))
    allowance = length_allowance(40, length)
    assert -3 * error < mean < allowance + 3 * error
    if sharpness <= 1:
        assert mean < allowance / 3 + 3 * error


def test_beyond_halves_is_what_scalar_loops_give():
    rng = np.random.default_rng(13)
    a, b, c, d = (row.tolist() for row in random_probs(rng, 4, 6, scale=2))

    def entropy_of(*profiles):
        return -sum(x * math.log(x) for x in np.mean(profiles, axis=0))

    room = math.log(6) - (entropy_of(a) + entropy_of(b) + entropy_of(c) + entropy_of(d)) / 4
    apart = entropy_of(a, d) + entropy_of(b, c) - entropy_of(a, b) - entropy_of(c, d)
    found = divergence_beyond_halves(*(3 * np.array(row) for row in (a, b, c, d)))
    assert found == pytest.approx(apart / 2 / room)
    assert divergence_beyond_halves(*np.array([a, b, a, b])) == pytest.approx(0, abs=1e-12)
    apart = divergence_beyond_halves(*np.eye(4)[[0, 0, 1, 1]])
    assert apart == pytest.approx(0.5)
    assert np.isnan(divergence_beyond_halves(a, b, c, np.zeros(6)))


def test_allowance_of_lengths():
    assert length_allowance(30, 30) == 0
    found = length_allowance(np.array([10.0, 40]), np.array([20.0, 10]))
    assert found == pytest.approx([0.15 / 9, 0.15 * 0.36])


def test_interval_of_a_ratio_holds_with_small_denominators():
    rng = np.random.default_rng(9)
    covered = []
    for _ in range(400):
        centre = np.array([1.0, 0.5]) + [0.2, 0.1] * rng.normal(size=2)
        draws = centre + [0.2, 0.1] * rng.normal(size=(500, 2))
        value, low, high = ratio_of_draws(*np.vstack([centre, draws]).T)
        if np.isfinite(value):
            covered.append(low <= 2 <= high)
    assert len(covered) > 390
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_ratio_to_nothing_is_unknown():
    rng = np.random.default_rng(10)
    a, b = rng.normal(1, 0.1, 200), rng.normal(0, 0.1, 200)
    assert np.isnan(ratio_of_draws(a, b)).all()
    assert np.isnan(ratio_of_draws(a, b - 5)).all()
    value, low, high = ratio_of_draws(a, b + 4)
    assert value == a[0] / (b[0] + 4)
    assert low < value < high


def test_item_hash_is_the_same_everywhere():
    assert item_hash("article 1") == 11114138689015994036


def test_sample_is_full_only_when_something_was_left_out():
    sample = ItemSample(2, {})
    assert sample.slots(["a", "b", None, "a"]).tolist() == [0, 1, -1, 0]
    assert not sample.is_full
    sample.slots(["c"])
    assert sample.is_full
    assert len(sample) == 2
