import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import mutual_info_score, normalized_mutual_info_score

from moetools.information import entropy, gini, mutual_information, normalised_mutual_information


def test_entropy_is_that_of_scipy(rng):
    counts = rng.integers(0, 9, (5, 4, 7))
    np.testing.assert_allclose(entropy(counts), stats.entropy(counts, axis=-1))
    assert entropy(np.array([0, 5, 0])) == 0
    assert entropy(np.ones(8)) == pytest.approx(np.log(8))
    assert np.isnan(entropy(np.zeros(3)))


def test_mutual_information_is_that_of_sklearn(rng):
    a = rng.integers(0, 6, 500)
    b = np.where(rng.random(500) < 0.4, a, rng.integers(0, 4, 500))
    joint = np.zeros((6, 6))
    np.add.at(joint, (a, b), 1)
    assert mutual_information(joint) == pytest.approx(mutual_info_score(a, b))
    assert normalised_mutual_information(joint) == pytest.approx(
        normalized_mutual_info_score(a, b, average_method="geometric")
    )


def test_equal_indices_have_all_the_information():
    assert normalised_mutual_information(np.diag([3, 5, 9])) == pytest.approx(1)
    assert mutual_information(np.outer([1, 2], [3, 4, 5])) == pytest.approx(0, abs=1e-12)
    assert np.isnan(normalised_mutual_information(np.array([[4, 0], [0, 0]])))


def test_gini_is_half_the_relative_mean_difference(rng):
    x = rng.random(30)
    expected = np.abs(x[:, None] - x).mean() / (2 * x.mean())
    assert gini(x) == pytest.approx(expected)
    assert gini(np.ones(5)) == pytest.approx(0)
    assert gini(np.eye(8)[3]) == pytest.approx(7 / 8)
    assert np.isnan(gini(np.zeros(3)))


@pytest.fixture
def rng():
    return np.random.default_rng(0)
