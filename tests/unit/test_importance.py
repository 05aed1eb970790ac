import numpy as np
import pytest
from scipy.stats import spearmanr

from moetools import importance
from moetools.coupling import unit_ranks
from moetools.importance import FIELDS

E, K = 5, 2


def batch(seed, *, num_sequences=6):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, num_sequences)
    size = (int(lengths.sum()), K)
    ids = np.argsort(rng.random((size[0], E - 1)), axis=1)[:, :K].astype(np.uint8)
    ids[0] = 255
    values = {name: rng.random(size).astype(np.float32) for name in ("weights", "norms", "peaks")}
    values["shares"] = rng.standard_normal(size).astype(np.float32)
    unsampled = rng.random(size[0]) < 0.2
    for name in ("norms", "peaks", "shares"):
        values[name][unsampled] = np.nan
    return ids, values, np.concatenate([[0], np.cumsum(lengths)])


def added(ids, values, offsets, *, first=0, last=None):
    sums, maxima = np.zeros((3, 2, E, len(FIELDS))), np.zeros((3, 2, E))
    last = len(offsets) - 1 if last is None else last
    cut = slice(offsets[first], offsets[last])
    columns = (values[name][cut] for name in ("weights", "norms", "peaks", "shares"))
    rows = np.arange(first, last) % 3
    importance.add_scores(
        ids[cut], *columns, offsets[first : last + 1] - offsets[first], rows, sums, maxima
    )
    return sums, maxima


def test_scores_against_a_loop_over_pairs():
    ids, values, offsets = batch(0)
    sums, maxima = added(ids, values, offsets)
    found = importance.scores(sums.sum(axis=0)[1])
    largest = maxima.max(axis=0)[1]
    firsts = set(offsets[:-1].tolist())
    for e in range(E):
        pairs = [
            (t, i) for t in range(len(ids)) for i in range(K) if ids[t, i] == e and t not in firsts
        ]
        known = [(t, i) for t, i in pairs if not np.isnan(values["norms"][t, i])]
        weight = [values["weights"][p] for p in pairs]
        norms = [values["norms"][p] for p in known]
        weighted = [float(values["weights"][p]) * float(values["norms"][p]) for p in known]
        shares = [values["shares"][p] for p in known]
        expected = {
            "selections": len(pairs),
            "gate_mass": np.sum(weight),
            "gate_mean": np.mean(weight or [0]),
            "ean_sum": np.sum(norms),
            "ean_mean": np.mean(norms or [0]),
            "weighted_ean_sum": np.sum(weighted),
            "reap": np.mean(weighted or [0]),
            "output_share": np.mean(shares or [0]),
        }
        assert {name: found[name][e] for name in found} == pytest.approx(expected, rel=1e-5)
        assert largest[e] == max([float(values["peaks"][p]) for p in known], default=0)
    assert found["reap"][E - 1] == found["selections"][E - 1] == 0


def test_splitting_the_tokens_changes_nothing():
    ids, values, offsets = batch(1, num_sequences=9)
    whole = added(ids, values, offsets)
    parts = [added(ids, values, offsets, first=a, last=b) for a, b in ((0, 1), (1, 5), (5, 9))]
    np.testing.assert_allclose(sum(sums for sums, _ in parts), whole[0], rtol=1e-9)
    np.testing.assert_array_equal(np.max([maxima for _, maxima in parts], axis=0), whole[1])


def test_what_was_not_recorded_is_not_counted():
    ids, values, offsets = batch(2)
    nothing = dict.fromkeys(("norms", "peaks", "shares"), np.zeros((0, K), dtype=np.float32))
    sums, maxima = np.zeros((1, 2, E, len(FIELDS))), np.zeros((1, 2, E))
    rows = np.zeros(len(offsets) - 1, dtype=np.int64)
    importance.add_scores(ids, values["weights"], *nothing.values(), offsets, rows, sums, maxima)
    assert sums[..., 0].sum() == (ids < E).sum()
    assert not sums[..., 2:].any()
    assert not maxima.any()


def test_rank_correlation_is_spearman():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 5, (2, 4, 9))
    other[3] = 1
    found = importance.rank_correlation(unit_ranks(one, 1), unit_ranks(other, 1))
    expected = [spearmanr(one[i], other[i]).statistic for i in range(3)]
    assert found[:3] == pytest.approx(expected)
    assert np.isnan(found[3])


def test_covering_by_hand():
    counts = np.array([[5, 1, 4, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert importance.num_covering(counts, 0.5)[:2].tolist() == [1, 2]
    assert importance.num_covering(counts, 0.9)[:2].tolist() == [2, 4]
    assert importance.num_covering(counts, 0.99)[:2].tolist() == [3, 4]
    assert np.isnan(importance.num_covering(counts, 0.5)[2])


def test_drawn_maxima_look_at_drawn_cells_only():
    maxima = np.array([[1.0, 9.0], [5.0, 2.0]])
    found = importance.drawn_maxima(maxima, np.array([[2, 0], [0, 2], [1, 1]]))
    assert found.tolist() == [[5, 9], [1, 9], [5, 2], [5, 9]]


def layers(seed, *, num_layers=8, num_experts=32):
    rng = np.random.default_rng(seed)
    return {layer: rng.uniform(1, 3, num_experts) for layer in range(num_layers)}


def test_a_planted_super_expert_is_the_only_one():
    maxima = layers(0)
    maxima[1][7] *= 100
    found = importance.super_experts(maxima, 8)
    assert [expert[:2] for expert in found.experts] == [(1, 7)]
    assert found.gap > 30
    assert found.tenth == pytest.approx(maxima[1][7] / 10)
    early = np.concatenate([maxima[layer] for layer in range(6)])
    assert found.percentile == pytest.approx(np.percentile(early, 99.5))


def test_late_outliers_do_not_count():
    maxima = layers(0)
    maxima[6][3] *= 1000
    found = importance.super_experts(maxima, 8)
    assert all(layer < 6 for layer, _, _ in found.experts)
    assert found.gap < 1.1
    assert (
        importance.super_experts({layer: m for layer, m in maxima.items() if layer > 5}, 8) is None
    )


def test_a_tenth_of_the_largest_is_not_rounded():
    maxima = {0: np.linspace(0.1, 0.2, 400)}
    maxima[0][:4] = 5.9, 1.2, 0.58, 0.57
    found = importance.super_experts(maxima, 1)
    assert found.tenth == pytest.approx(0.59)
    assert [expert for _, expert, _ in found.experts] == [0, 1]
    assert found.gap == pytest.approx(1.2 / 0.58)


def test_few_experts_are_refused():
    maxima = layers(0, num_layers=4, num_experts=49)
    maxima[1][7] *= 100
    assert importance.super_experts(maxima, 4) is None
    assert importance.super_experts({0: np.zeros(300)}, 2) is None
