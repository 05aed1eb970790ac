import numpy as np
import pytest

from moetools.congestion import equilibrium, softmax
from moetools.congestion_types import (
    TypeSums,
    clustered,
    compare_types,
    fit_types,
    types_equilibrium,
)

M = 64


def planted_types(rng, gamma, beta, *, num_types=16, num_selections=10**6, common=False):
    quality = rng.normal(0, 0.5, (num_types, M))
    if common:
        quality += rng.normal(0, 0.5, M)
    weight = np.full(num_types, 1 / num_types)
    choices, _ = types_equilibrium(quality, weight, gamma, beta=beta)
    counts = np.stack([rng.multinomial(num_selections // num_types, p) for p in choices])
    return quality, counts


@pytest.mark.parametrize(
    ("gamma", "beta", "slope", "constrained", "sd"),
    [(38.0, 1.0, 36.9, 37.6, 1.0), (9.0, 1.0, 8.5, 8.9, 0.7), (27.0, 0.7, 25.3, 26.6, 1.4)],
)
def test_types_separate_beta_and_gamma(gamma, beta, slope, constrained, sd):
    rng = np.random.default_rng(0)
    fits = [fit_types(*planted_types(rng, gamma, beta)) for _ in range(10)]
    betas, slopes, gammas = (
        np.array([getattr(fit, name) for fit in fits]) for name in ("beta", "slope", "gamma")
    )
    assert np.abs(betas - beta).max() < 0.008
    assert betas.mean() == pytest.approx(beta, abs=0.003)
    assert slopes.mean() < gammas.mean()
    standard_error = np.hypot(sd, sd) / np.sqrt(10)
    assert slopes.mean() == pytest.approx(slope, abs=4 * standard_error)
    assert gammas.mean() == pytest.approx(constrained, abs=4 * standard_error)
    assert gammas.mean() == pytest.approx(gamma, abs=4 * sd / np.sqrt(10) + 0.02 * gamma)


def test_types_with_a_common_quality_are_sharper():
    rng = np.random.default_rng(0)
    fits = [fit_types(*planted_types(rng, 38.0, 1.0, common=True)) for _ in range(6)]
    gammas = np.array([fit.gamma for fit in fits])
    slopes = np.array([fit.slope for fit in fits])
    assert gammas.mean() == pytest.approx(38, abs=0.6)
    assert slopes.mean() == pytest.approx(37.8, abs=0.6)


def test_types_that_are_alike_are_one_type():
    quality = np.random.default_rng(0).normal(0, 0.5, M)
    choices, load = types_equilibrium(np.tile(quality, (5, 1)), np.full(5, 0.2), 14.0)
    np.testing.assert_allclose(load, equilibrium(quality, 14.0), atol=1e-12)
    np.testing.assert_allclose(choices, np.tile(load, (5, 1)), atol=1e-12)
    assert np.isnan(fit_types(np.tile(quality, (5, 1)), np.tile(load, (5, 1))).beta)


@pytest.mark.parametrize("gamma", [0.0, 9.0, 500.0])
def test_types_settle(gamma):
    rng = np.random.default_rng(1)
    quality, weight = rng.normal(0, 1, (7, 20)), rng.dirichlet(np.ones(7))
    choices, load = types_equilibrium(quality, weight, gamma)
    np.testing.assert_allclose(choices, softmax(quality - gamma * load), atol=1e-12)
    np.testing.assert_allclose(load, weight @ choices, atol=1e-12)
    with pytest.raises(ValueError, match="at least 0"):
        types_equilibrium(quality, weight, -0.5)


def test_types_without_selections_or_contrast_tell_nothing():
    fit = fit_types(np.zeros((3, 4)), np.ones((3, 4)))
    assert np.isnan([fit.beta, fit.slope, fit.gamma]).all()
    rng = np.random.default_rng(0)
    quality, counts = planted_types(rng, 9.0, 1.0, num_types=4)
    dead = counts.copy()
    dead[:, 5] = 0
    dead = np.vstack([dead, np.zeros(M, int)])
    fit = fit_types(np.vstack([quality, np.zeros(M)]), dead)
    assert fit.beta == pytest.approx(1, abs=0.02)


def sums_of(rng, quality, weight, gamma, beta, *, num_batches=40, tokens_of_batch=4000):
    """Batches of tokens whose types choose as in the equilibrium."""
    choices, _ = types_equilibrium(quality, weight, gamma, beta=beta)
    tokens = rng.multinomial(tokens_of_batch, weight, size=num_batches).astype(float)
    counts = np.stack(
        [[rng.multinomial(int(n), p) for n, p in zip(row, choices, strict=True)] for row in tokens]
    )
    return TypeSums(
        tokens=tokens, counts=counts.astype(float), probs=tokens[..., None] * softmax(quality)
    )


def test_types_predict_unseen_loads_better_where_there_are_types():
    rng = np.random.default_rng(0)
    quality, weight = rng.normal(0, 1, (8, 24)), rng.dirichlet(np.full(8, 5.0))
    planted = sums_of(rng, quality, weight, 20.0, 2.0)
    found = compare_types([planted], np.full(40, True))
    assert all(len(values) == 11 for values in found.values())
    assert found["count"][0] == 8
    assert found["share"][0] == pytest.approx(1 / 3)
    assert found["beta"][0] == pytest.approx(2, abs=0.05)
    assert found["gamma"][0] == pytest.approx(20, rel=0.1)
    assert found["gain"][0] > 0.5
    assert found["gain_over_softmax"][0] > 0.5
    assert found["gain"][0] == pytest.approx(1 - found["l1"][0] / found["l1_single"][0])


def test_types_gain_nothing_where_there_are_none():
    """Without contrast between types beta is noise, and so is what it predicts."""
    rng = np.random.default_rng(0)
    quality = np.tile(rng.normal(0, 0.5, 24), (4, 1)) + rng.normal(0, 1e-3, (4, 24))
    found = compare_types([sums_of(rng, quality, np.full(4, 0.25), 9.0, 1.0)], np.full(40, True))
    assert found["gain"][0] < 0.1


def test_the_number_of_types_is_chosen_without_the_test_half():
    """Of two candidates the one with the true types wins in both halves."""
    rng = np.random.default_rng(0)
    quality, weight = rng.normal(0, 1, (8, 24)), np.full(8, 1 / 8)
    true = sums_of(rng, quality, weight, 20.0, 2.0)
    merged = TypeSums(
        **{
            name: np.stack([getattr(true, name)[:, i::2].sum(axis=1) for i in (0, 1)], axis=1)
            for name in ("tokens", "counts", "probs")
        }
    )
    found = compare_types([merged, true], np.full(40, True))
    assert found["count"][0] == 8
    alone = compare_types([merged], np.full(40, True))
    assert found["l1"][0] < alone["l1"][0]


def test_too_few_batches_are_not_compared():
    rng = np.random.default_rng(0)
    sums = sums_of(rng, rng.normal(0, 1, (3, 6)), np.full(3, 1 / 3), 1.0, 1.0, num_batches=7)
    assert compare_types([sums], np.full(7, True)) == {}
    assert compare_types([], np.full(40, True)) == {}


def test_clusters_add_up_to_the_tokens():
    rng = np.random.default_rng(0)
    center = rng.integers(0, 3, 300)
    features = 10 * np.eye(5)[center] + rng.normal(0, 0.1, (300, 5))
    probs = softmax(features)
    ids = np.argsort(-features, axis=1)[:, :2]
    ids[7] = 255
    batch = rng.integers(0, 4, 300)
    sums = clustered(features, batch, probs, ids, num_types=3, num_batches=4, seed=0)
    assert sums.tokens.sum() == 300
    assert sorted(sums.tokens.sum(axis=0)) == sorted(np.bincount(center))
    assert sums.counts.sum() == 2 * 299
    np.testing.assert_allclose(sums.probs.sum(axis=(0, 1)), probs.sum(axis=0))
    np.testing.assert_array_equal(sums.tokens.sum(axis=1), np.bincount(batch, minlength=4))
    same = clustered(np.zeros((300, 5)), batch, probs, ids, num_types=3, num_batches=4, seed=0)
    assert same.tokens.sum(axis=0).max() == 300
