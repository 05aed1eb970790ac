"""What must hold of any two routings of the same tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_ids

from moetools import drift

NUM_TOKENS = 40


def metrics(ids_a, ids_b, weights_a, weights_b, num_experts):
    sums = np.zeros((1, len(drift.SUMS)))
    drift.compare_selections(
        ids_a.astype(np.uint16), ids_b.astype(np.uint16), weights_a.astype(np.float32),
        weights_b.astype(np.float32), num_experts, np.array([0, len(ids_a)]),
        np.zeros(1, np.int64), sums,
    )  # fmt: skip
    loads = [
        np.bincount(ids.ravel(), minlength=num_experts).astype(float) for ids in (ids_a, ids_b)
    ]
    found = drift.selection_metrics(sums[0], *loads)
    return {name: float(value) for name, value in found.items()}


@st.composite
def routings(draw):
    num_experts = draw(st.integers(1, 20))
    top_k = draw(st.integers(1, num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = [random_ids(rng, NUM_TOKENS, num_experts, top_k) for _ in range(2)]
    weights = [rng.random((NUM_TOKENS, top_k)) + 0.01 for _ in range(2)]
    return num_experts, top_k, ids, weights, rng


@settings(max_examples=60)
@given(routings())
def test_bounds_and_symmetry(routing):
    num_experts, top_k, (ids_a, ids_b), (weights_a, weights_b), _ = routing
    forth = metrics(ids_a, ids_b, weights_a, weights_b, num_experts)
    back = metrics(ids_b, ids_a, weights_b, weights_a, num_experts)
    for name, value in forth.items():
        expected = -back[name] if name == "load_entropy_change" else back[name]
        assert value == pytest.approx(expected, abs=1e-6), name
    assert forth["exact_set"] <= forth["jaccard"] <= forth["overlap_at_k"] <= 1
    assert 0 <= forth["load_js"] <= forth["load_tv"] + 1e-12
    assert forth["load_tv"] <= 1 - forth["overlap_at_k"] + 1e-12
    assert forth["weighted_overlap"] <= 1 + 1e-6
    if top_k == 1:
        assert forth["exact_set"] == forth["jaccard"] == forth["top1_agreement"]


@settings(max_examples=60)
@given(routings())
def test_names_of_experts_play_no_part(routing):
    num_experts, _, ids, weights, rng = routing
    order = rng.permutation(num_experts)
    one = metrics(*ids, *weights, num_experts)
    other = metrics(order[ids[0]], order[ids[1]], *weights, num_experts)
    assert one == pytest.approx(other, abs=1e-9)


@settings(max_examples=60)
@given(routings())
def test_equal_routings(routing):
    num_experts, _, (ids, _), (weights, _), rng = routing
    place = np.argsort(rng.random(ids.shape), axis=1)
    shuffled = np.take_along_axis(ids, place, axis=1)
    found = metrics(ids, shuffled, weights, np.take_along_axis(weights, place, axis=1), num_experts)
    assert found["overlap_at_k"] == found["jaccard"] == found["exact_set"] == 1
    assert found["weighted_overlap"] == pytest.approx(1)
    assert found["load_js"] == found["load_tv"] == 0


@settings(max_examples=40)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=30).filter(any))
def test_deciles_share_everything_out_equally(counts):
    shares = drift.decile_shares(np.array(counts)) * counts
    assert shares.sum(axis=0) == pytest.approx(counts)
    assert shares.sum(axis=1) == pytest.approx(sum(counts) / 10)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(2, 10))
def test_matching_undoes_a_permutation(seed, num_experts, width):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((num_experts, width + num_experts))
    order = rng.permutation(num_experts)
    matched = drift.match_experts(weight, weight[order] + 1e-3 * rng.standard_normal(weight.shape))
    assert order[matched].tolist() == list(range(num_experts))
