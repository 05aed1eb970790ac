"""Two one-sided tests and Holm's correction: hand cases, an independent oracle, coverage."""

import numpy as np
import pytest
from scipy import stats

from moetools.equivalence import holm, ratio_values, tost_paired


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("num", [2, 3, 10, 200])
@pytest.mark.parametrize("mean", [-0.3, 0.0, 0.04, 0.2])
def test_p_values_and_interval_equal_those_of_t_tests(generator, num, mean):
    differences = generator.normal(mean, 0.1, num)
    found = tost_paired(differences, margin=0.1)
    above = stats.ttest_1samp(differences, -0.1, alternative="greater")
    below = stats.ttest_1samp(differences, 0.1, alternative="less")
    two_sided = stats.ttest_1samp(differences, 0.0)
    assert found.p_lower == pytest.approx(above.pvalue, rel=1e-9)
    assert found.p_upper == pytest.approx(below.pvalue, rel=1e-9)
    assert found.p_zero == pytest.approx(two_sided.pvalue, rel=1e-9)
    low, high = two_sided.confidence_interval(0.90)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.num == num
    inside = low > -0.1 and high < 0.1
    assert (found.verdict == "equivalent") == inside


def test_verdicts():
    near = tost_paired([0.01, -0.01, 0.02, -0.02, 0.0, 0.01], margin=0.1)
    far = tost_paired([0.5, 0.55, 0.45, 0.5, 0.52, 0.49], margin=0.1)
    wide = tost_paired([1.0, -1.2, 0.7, -0.4, 0.1, -0.3], margin=0.1)
    assert [near.verdict, far.verdict, wide.verdict] == ["equivalent", "different", "undecided"]
    assert not near.differs
    assert far.differs
    assert near.sentence.startswith("Equivalent within 0.1: ")
    assert "not 0" not in near.sentence
    assert far.sentence.startswith("Different: 0.502 (90% interval ")
    assert wide.sentence.startswith("Undecided: ")


def test_a_small_difference_that_is_not_zero_is_equivalent_and_says_so():
    found = tost_paired([0.02, 0.021, 0.019, 0.02, 0.0205], margin=0.1)
    assert found.verdict == "equivalent"
    assert found.differs
    assert found.sentence.endswith("a small difference but not 0.")


def test_differences_without_spread():
    assert tost_paired([0.0] * 5, margin=0.1).verdict == "equivalent"
    assert not tost_paired([0.0] * 5, margin=0.1).differs
    assert tost_paired([0.05] * 5, margin=0.1).differs
    assert tost_paired([0.3] * 5, margin=0.1).verdict == "different"
    on_the_margin = tost_paired([0.1] * 5, margin=0.1)
    assert (on_the_margin.verdict, on_the_margin.p_upper) == ("different", 1.0)


def test_one_cluster_decides_nothing():
    found = tost_paired([0.1, 0.2, 0.3], margin=1.0, clusters=["a", "a", "a"])
    assert found.verdict == "undecided"
    assert found.num == 1
    assert np.isnan(found.low)
    assert found.sentence == "Undecided: 1 independent unit is not enough for a test."


def test_clusters_count_once(generator):
    means = generator.normal(0, 1, 8)
    labels = np.repeat(np.arange(8), 50)
    found = tost_paired(np.repeat(means, 50), margin=0.5, clusters=labels)
    alone = tost_paired(means, margin=0.5)
    assert found.num == 8
    assert found.difference == pytest.approx(alone.difference)
    assert found.p_upper == pytest.approx(alone.p_upper)


def test_coverage_and_levels(generator):
    """90 % intervals cover in 90 % of runs; at the margin 5 % are called equivalent."""
    runs = 4000
    clusters = np.repeat(np.arange(12), 5)
    covered = equivalent = 0
    for _ in range(runs):
        noise = np.repeat(generator.normal(0, 1, 12), 5) + generator.normal(0, 1, 60)
        found = tost_paired(1.5 + noise, margin=1.5, clusters=clusters)
        covered += found.low <= 1.5 <= found.high
        equivalent += found.verdict == "equivalent"
    assert covered / runs == pytest.approx(0.90, abs=0.015)
    assert equivalent / runs == pytest.approx(0.05, abs=0.011)


def test_extra_variance_adds_to_that_of_the_clusters(generator):
    differences = generator.normal(0.2, 0.1, 10)
    own = differences.var(ddof=1) / 10
    alone = tost_paired(differences, margin=0.1)
    assert (alone.error, alone.df) == (pytest.approx(np.sqrt(own)), 9)
    assert alone.interval(0.90) == pytest.approx((alone.low, alone.high))
    equal = tost_paired(differences, margin=0.1, extra_variance=own, extra_df=9)
    assert (equal.error, equal.df) == (pytest.approx(np.sqrt(2 * own)), pytest.approx(18))
    most = tost_paired(differences, margin=0.1, extra_variance=1e6 * own, extra_df=4)
    assert most.df == pytest.approx(4, rel=1e-4)
    t = most.difference / most.error
    assert most.p_zero == pytest.approx(2 * stats.t.sf(t, most.df))
    assert most.interval() == pytest.approx(
        stats.t.interval(0.95, most.df, most.difference, most.error)
    )
    without_spread = tost_paired([0.3] * 5, margin=0.1, extra_variance=0.01, extra_df=4)
    assert (without_spread.error, without_spread.df) == pytest.approx((0.1, 4))


def test_a_draw_that_all_clusters_share_is_no_difference(generator):
    runs, draws = 4000, 5
    differ = equivalent = 0
    for _ in range(runs):
        shared = generator.normal(0, 1, draws)
        noise = shared.mean() + generator.normal(0, 1, 30)
        extra = {"extra_variance": shared.var(ddof=1) / draws, "extra_df": draws - 1}
        differ += tost_paired(noise, margin=2, **extra).differs
        equivalent += tost_paired(2 + noise, margin=2, **extra).verdict == "equivalent"
    assert 0.04 < differ / runs < 0.07
    assert 0.03 < equivalent / runs < 0.07


def test_no_difference_is_called_different_in_one_of_twenty(generator):
    runs = 4000
    found = [tost_paired(generator.normal(0, 1, 6), margin=0.01) for _ in range(runs)]
    assert np.mean([each.differs for each in found]) == pytest.approx(0.05, abs=0.011)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"differences": [], "margin": 1}, "finite"),
        ({"differences": [1.0, np.nan], "margin": 1}, "finite"),
        ({"differences": [1.0, 2.0], "margin": 0}, "margin"),
        ({"differences": [1.0, 2.0], "margin": np.inf}, "margin"),
        ({"differences": [1.0, 2.0], "margin": 1, "level": 0.5}, "level"),
        ({"differences": [1.0, 2.0], "margin": 1, "clusters": ["a"]}, "labels"),
        ({"differences": [1.0, 2.0], "margin": 1, "extra_variance": -1}, "extra variance"),
        ({"differences": [1.0, 2.0], "margin": 1, "extra_df": 0}, "extra variance"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tost_paired(arguments.pop("differences"), **arguments)


def test_ratio_values_have_the_mean_and_the_spread_of_the_ratio(generator):
    counts = generator.integers(5, 100, 2000)
    sums = counts * generator.normal(0.3, 0.5, 2000)
    values = ratio_values(sums, counts)
    assert values.mean() == pytest.approx(sums.sum() / counts.sum())
    rows = generator.integers(0, 2000, (500, 2000))
    bootstrap = sums[rows].sum(axis=1) / counts[rows].sum(axis=1)
    assert values.std(ddof=1) / np.sqrt(2000) == pytest.approx(bootstrap.std(), rel=0.1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.1])


def test_holm_leaves_out_tests_that_were_not_made():
    np.testing.assert_allclose(holm([0.02, np.nan, 0.03]), [0.04, np.nan, 0.04])


def test_holm_keeps_false_rejections_below_the_level(generator):
    p_values = generator.random((4000, 10))
    p_values[:, :5] *= 1e-6
    false = [(holm(each)[5:] < 0.05).any() for each in p_values]
    assert 0.03 < np.mean(false) <= 0.058
