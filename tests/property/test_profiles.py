"""Properties of routing profiles, specialised experts and the sample of items."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon
from synthetic import random_ids

from moetools.profiles import (
    ItemSample,
    chance_jaccard,
    correlation,
    divergence,
    item_hash,
    mean_jaccard,
    overlap,
    sequence_frequencies,
    skewed_jaccard,
)

SIZES = st.integers(2, 12)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def two_profiles(draw):
    size = draw(SIZES)
    profiles = draw(
        arrays(
            np.float64,
            (2, size),
            elements=st.floats(0, 1, allow_subnormal=False).map(lambda x: x if x > 1e-9 else 0.0),
        )
    )
    assume((profiles.sum(axis=1) > 0).all())
    return profiles / profiles.sum(axis=1, keepdims=True)


@given(two_profiles(), st.randoms(use_true_random=False))
def test_divergence_is_a_symmetric_fraction_that_relabelling_does_not_change(profiles, random):
    a, b = profiles
    found = float(divergence(a, b))
    assert 0 <= found <= 1
    assert float(divergence(b, a)) == pytest.approx(found, abs=1e-9)
    order = list(range(len(a)))
    random.shuffle(order)
    assert float(divergence(a[order], b[order])) == pytest.approx(found, abs=1e-6)


@given(two_profiles(), st.floats(1.5, 10))
def test_divergence_does_not_depend_on_the_base_of_the_logarithm(profiles, base):
    a, b = profiles

    def entropy(p):
        return -sum(x * np.log(x) / np.log(base) for x in p if x > 0)

    room = np.log(len(a)) / np.log(base) - (entropy(a) + entropy(b)) / 2
    assume(room > 1e-3)
    expected = jensenshannon(a, b, base=base) ** 2 / room
    assert float(divergence(a, b)) == pytest.approx(expected, abs=1e-6)


@given(two_profiles())
def test_divergence_is_zero_only_of_equals(profiles):
    a, b = profiles
    assert float(divergence(a, a)) == pytest.approx(0, abs=1e-9)
    assume(np.abs(a - b).max() > 1e-3)
    assert float(divergence(a, b)) > 1e-9


@given(two_profiles())
def test_divergence_is_one_of_reflections_about_uniform(profiles):
    away = profiles[0] - profiles[0].mean()
    assume(np.abs(away).max() > 0.01)
    step = away / (np.abs(away).max() * len(away))
    uniform = np.full(len(away), 1 / len(away))
    assert float(divergence(uniform + step, uniform - step)) == pytest.approx(1, abs=1e-9)


@given(SEEDS, SIZES, st.integers(1, 4), st.integers(2, 60))
def test_jaccard_is_a_fraction_that_order_and_relabelling_do_not_change(seed, size, top_k, length):
    rng = np.random.default_rng(seed)
    top_k = min(top_k, size)
    ids = random_ids(rng, length, size, top_k)
    offsets, one = np.array([0, length]), np.zeros(1, int)
    found = mean_jaccard(ids, offsets, size, sequence=one)[0]
    assert 0 <= found <= 1
    shuffled = rng.permutation(size)[rng.permuted(rng.permutation(ids), axis=1)]
    again = mean_jaccard(shuffled, offsets, size, sequence=one)[0]
    assert again == pytest.approx(found)
    assert mean_jaccard(ids[:1].repeat(2, axis=0), np.array([0, 2]), size, sequence=one)[0] == 1


@given(SEEDS, SIZES, st.integers(1, 4))
def test_skewed_chance_is_at_least_uniform_chance(seed, size, top_k):
    top_k = min(top_k, size)
    ids = random_ids(np.random.default_rng(seed), 30, size, top_k) // 2 * 2 % size
    frequencies = np.minimum(np.bincount(ids.ravel(), minlength=size), 30)
    assume((frequencies * top_k <= frequencies.sum()).all())
    assert skewed_jaccard(frequencies, top_k) >= chance_jaccard(size, top_k) - 0.02


@given(SEEDS, SIZES, st.integers(1, 4), st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_frequencies_sum_to_k_and_their_differences_to_zero(seed, size, top_k, lengths):
    top_k = min(top_k, size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = random_ids(np.random.default_rng(seed), offsets[-1], size, top_k)
    frequency = sequence_frequencies(ids, offsets, size)
    assert frequency.sum(axis=1) == pytest.approx(np.full(len(lengths), top_k))
    delta, back = frequency[0] - frequency[1:].mean(axis=0), frequency[1:].mean(axis=0)
    back = back - frequency[0]
    assert delta.sum() == pytest.approx(0, abs=1e-9)
    assert delta == pytest.approx(-back)
    counts = [(delta > tau).sum() for tau in (0.0, 0.1, 0.2, 0.4, 0.8)]
    assert counts == sorted(counts, reverse=True)


@given(
    st.lists(
        st.integers(2, 12).flatmap(
            lambda size: st.tuples(
                arrays(np.bool_, size),
                arrays(np.bool_, size),
            )
        ),
        min_size=1,
        max_size=4,
    )
)
def test_overlap_is_symmetric_and_its_tails_cover_everything(layers):
    a, b = [one for one, _ in layers], [other for _, other in layers]
    found, back = overlap(a, b), overlap(b, a)
    assert (found.shared, found.expected) == (back.shared, back.expected)
    if np.isnan(found.p_fewer):
        assert found.shared == 0
        return
    assert found.p_fewer == pytest.approx(back.p_fewer)
    assert 1 <= found.p_fewer + found.p_more <= 2 + 1e-9
    assert 0 <= found.p_more <= 1


@given(SEEDS, st.integers(4, 9), st.floats(0.1, 50), st.floats(-100, 100))
def test_correlation_ignores_scale_and_the_order_of_groups(seed, num, factor, shift):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=num), rng.normal(size=(num, 2))
    found = correlation(x, y)
    moved = correlation(x * factor + shift, -y)
    assert moved.r == pytest.approx(-found.r, abs=1e-6)
    assert (found.low <= found.r + 1e-9).all()
    assert (found.r <= found.high + 1e-9).all()
    assert ((found.p > 0) & (found.p <= 1)).all()
    assert found.p.min() - 0.02 <= found.p_largest <= 1


@given(
    st.lists(st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(1, 9)), max_size=40),
    st.integers(1, 8),
    st.lists(st.integers(0, 40), max_size=3),
)
def test_sample_of_items_depends_on_the_items_alone(pairs, capacity, cuts):
    def fed(some):
        sample = ItemSample(capacity, {"sum": (), "row": (2,)})
        slots = sample.slots(item for item, _ in some)
        kept = slots >= 0
        values = np.array([value for _, value in some], dtype=float)[kept]
        np.add.at(sample.sums["sum"], slots[kept], values)
        np.add.at(sample.sums["row"], (slots[kept], 1), values)
        return sample

    ends = [0, *sorted(min(cut, len(pairs)) for cut in cuts), len(pairs)]
    merged = fed([])
    for first, last in pairwise(ends):
        merged.merge(fed(pairs[first:last]))
    totals = {}
    for item, value in pairs:
        totals[item] = totals.get(item, 0) + value
    wanted = sorted(totals, key=lambda item: (item_hash(item), item))[:capacity]
    for sample in (fed(pairs), fed(pairs[::-1]), merged):
        order = sample.in_order()
        assert sample.sums["sum"][order].tolist() == [totals[item] for item in wanted]
        assert sample.sums["row"][order, 1].tolist() == [totals[item] for item in wanted]
        assert sample.is_full == (len(totals) > capacity)
