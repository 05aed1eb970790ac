from itertools import combinations

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from synthetic import random_ids, write_trace

from moetools import analysis
from moetools.analysis import select, single
from moetools.registry import load

module = load("analyses", "co_activation")


def run(path, ids, lengths, num_experts):
    trace = write_trace(path, ids, lengths, num_experts=num_experts)
    return analysis.run([trace], only=["co_activation"]).tables["co_activation"]


def test_expected_pairs_of_even_loads_and_of_their_own_margins():
    counts = 10.0 * (1 - np.eye(5))
    np.testing.assert_allclose(module.expected_pairs(counts), counts)
    factors = np.array([5.0, 1.0, 2.0, 0.0, 3.0])
    independent = np.outer(factors, factors) * (1 - np.eye(5))
    np.testing.assert_allclose(module.expected_pairs(independent), independent, atol=1e-6)


def test_expected_pairs_keep_the_loads():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 50, (7, 7)).astype(float)
    counts = np.triu(counts, 1) + np.triu(counts, 1).T
    expected = module.expected_pairs(counts)
    np.testing.assert_allclose(expected.sum(axis=1), counts.sum(axis=1), rtol=1e-5)
    assert (np.diag(expected) == 0).all()
    assert (module.expected_pairs(np.zeros((3, 3))) == 0).all()


def test_pairs_by_hand(tmp_path):
    """Sets 01 and 23 only: each pair is three times as frequent as its loads explain."""
    ids = np.array([[0, 1], [3, 2]] * 60)
    table = run(tmp_path / "t", {"00": ids}, [12] * 10, 4)
    pairs = select(table, metric="pair_lift")
    assert list(zip(pairs["expert"], pairs["expert_b"], strict=True)) == [
        (0, 1), (2, 3), (0, 2), (0, 3), (1, 2), (1, 3),
    ][: len(pairs)]  # fmt: skip
    assert pairs["value"].tolist()[:2] == pytest.approx([3, 3])
    assert select(table, metric="pair_share")["value"].tolist()[:2] == [0.5, 0.5]
    assert select(table, metric="pair_npmi")["value"].tolist()[:2] == pytest.approx(
        [np.log(3) / np.log(2)] * 2
    )
    assert single(table, "pair_divergence") == pytest.approx(np.log(3))
    assert single(table, "pair_deviation") == pytest.approx((2 * 40 + 4 * 20) / 120)


def test_counts_equal_a_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    a, b = random_ids(rng, 120, 6, 3), random_ids(rng, 120, 5, 2)
    trace = write_trace(
        tmp_path / "t", {"00": a, "01": b}, [50, 1, 69], num_experts={"00": 6, "01": 5}
    )
    state = module.ANALYSIS.start(trace, analysis.Options())
    for batch in trace.batches(module.ANALYSIS.columns(trace, analysis.Options())):
        state.update(batch)
    pairs, joint, shifted = np.zeros((6, 6)), np.zeros((6, 5)), np.zeros((6, 5))
    for t in range(120):
        for e, f in combinations(sorted(a[t]), 2):
            pairs[e, f] += 1
        joint[np.ix_(a[t], b[t])] += 1
        if t not in (49, 50, 119):
            shifted[np.ix_(a[t], b[t + 1])] += 1
    assert (state.pairs[0].sum(axis=0) == pairs).all()
    assert (state.joint[0].sum(axis=0) == joint).all()
    assert (state.next_token[0][0] == shifted).all()


def test_single_selections_have_the_usual_normalised_information(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 8, 600)
    b = np.where(rng.random(600) < 0.5, a, rng.integers(0, 8, 600))
    ids = {"01": a[:, None], "05": b[:, None], "06": b[:, None]}
    table = run(tmp_path / "t", ids, [60] * 10, 8)
    nmi = select(table, metric="layer_nmi", scope="layer")
    assert list(zip(nmi["layer"], nmi["layer_b"], strict=True)) == [(1, 5), (5, 6)]
    expected = normalized_mutual_info_score(a, b, average_method="geometric")
    assert nmi["value"].tolist() == pytest.approx([expected, 1])
    assert (nmi["low"] < nmi["value"]).tolist() == [True, False]
    assert single(table, "layer_nmi") == pytest.approx((expected + 1) / 2)
    assert select(table, metric="layer_nmi_ceiling")["value"].tolist() == pytest.approx([1] * 3)
    assert select(table, metric="pair_divergence").empty


def test_unrelated_random_sets_are_at_the_floors(tmp_path):
    rng = np.random.default_rng(0)
    ids = {f"{layer:02}": random_ids(rng, 6000, 16, 4) for layer in range(8)}
    table = run(tmp_path / "t", ids, [60] * 100, 16)
    for metric in ("layer_nmi", "pair_divergence"):
        floor = single(table, f"{metric}_floor")
        assert single(table, metric) == pytest.approx(floor, rel=0.1), metric
    next_token = single(table, "layer_nmi_next_token")
    assert next_token == pytest.approx(single(table, "layer_nmi_floor"), rel=0.1)


def test_equal_layers_reach_the_ceiling(tmp_path):
    rng = np.random.default_rng(0)
    ids = random_ids(rng, 500, 8, 3)
    table = run(tmp_path / "t", {"00": ids, "01": ids}, [50] * 10, 8)
    ceiling = single(table, "layer_nmi_ceiling")
    assert single(table, "layer_nmi") == pytest.approx(ceiling)
    assert 0 < ceiling < 1
    assert single(table, "layer_nmi_next_token") < 0.1 * ceiling


def test_many_experts_have_fewer_blocks(tmp_path):
    few = write_trace(tmp_path / "few", {"00": np.zeros((1, 1), int)}, [1], num_experts=8)
    assert module.num_blocks(few.routers) == module.MAX_BLOCKS
    assert module.num_blocks(few.routers * 10_000_000) == 5
