import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from moetools.congestion import (
    LARGEST_GAMMA,
    LOWEST_GAMMA,
    bootstrap_interval,
    centred,
    disequilibrium,
    disequilibrium_floor,
    distances,
    equilibrium,
    fit_gamma,
    fit_temperature,
    fits,
    gamma_error,
    held_out,
    l1,
    largest_over_mean,
    load_slope,
    log_cost_equilibrium,
    pearson,
    percentile_interval,
    phases,
    shares,
    softmax,
)
from moetools.congestion import qualities as qualities_of

M = 64
ACCEPTED = (9.0, 14.0, 38.0)


def qualities(seed=0, num_experts=M, sd=0.5):
    return np.random.default_rng(seed).normal(0, sd, num_experts)


def divergence(load, predicted):
    some = load > 0
    return float((load[some] * np.log(load[some] / predicted[some])).sum())


def test_inverse_construction():
    load = np.array([0.5, 0.3, 0.2])
    quality = np.log(load) + 10 * load
    np.testing.assert_allclose(quality, [4.306853, 1.796027, 0.390562], atol=1e-6)
    np.testing.assert_allclose(equilibrium(quality, 10.0), load, atol=1e-10)
    for start in (None, 0.0, 3.0, 2000.0):
        assert fit_gamma(quality, load, start=start) == pytest.approx(10, abs=1e-6)
    assert fit_gamma(quality, load, loss="l1") == pytest.approx(10, abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0, 9.0, 38.0, 300.0, 1900.0])
def test_inverse_construction_of_any_load(gamma):
    rng = np.random.default_rng(int(gamma))
    load = rng.dirichlet(np.full(M, 0.5), size=5)
    quality = np.log(load) + gamma * load
    np.testing.assert_allclose(equilibrium(quality, gamma), load, atol=1e-10)
    np.testing.assert_allclose(fit_gamma(quality, load), gamma, atol=1e-6, rtol=1e-6)


def test_two_experts():
    gap = np.log(1.5) + 1
    assert gap == pytest.approx(1.405465, abs=1e-6)
    np.testing.assert_allclose(equilibrium([gap, 0], 5.0), [0.6, 0.4], atol=1e-12)
    found = equilibrium([1.0, 0.0], np.array([0, 1, 4, 20.0]))[:, 0]
    np.testing.assert_allclose(found, [0.731059, 0.662584, 0.583074, 0.522726], atol=1e-6)
    np.testing.assert_allclose(
        np.log(found / (1 - found)), 1 - np.array([0, 1, 4, 20]) * (2 * found - 1)
    )


def test_limits():
    quality = qualities()
    np.testing.assert_allclose(equilibrium(quality, 0.0), softmax(quality), atol=1e-15)
    np.testing.assert_allclose(equilibrium([np.log(2), 0.0], 0.0), [2 / 3, 1 / 3])
    for gamma in (-0.999, -0.5, 0.0, 3.0, 1e4):
        np.testing.assert_allclose(equilibrium(np.full(7, 1.3), gamma), 1 / 7)
    for gamma in (1e3, 1e4):
        linear = 1 / M + (quality - quality.mean()) / gamma
        assert np.abs(equilibrium(quality, gamma) - linear).max() < 100 / gamma**2


def test_logarithmic_cost_is_a_temperature():
    quality = np.array([1, 0, -0.5])
    np.testing.assert_allclose(
        log_cost_equilibrium(quality, 1.0), [0.481024, 0.291756, 0.227220], atol=1e-6
    )
    assert fit_temperature(quality, log_cost_equilibrium(quality, 1.0)) == pytest.approx(2)


def test_uniqueness_ends_at_minus_two():
    """Two equal experts: beyond -2 an uneven equilibrium solves (1) too."""
    m = 0.9
    gamma = -np.log(m / (1 - m)) / (2 * m - 1)
    assert gamma < -2
    np.testing.assert_allclose(softmax(-gamma * np.array([m, 1 - m])), [m, 1 - m])
    with pytest.raises(ValueError, match="above -1"):
        equilibrium([0.0, 0.0], gamma)
    starts = np.linspace(0.01, 0.99, 99)
    for inside in (LOWEST_GAMMA, -0.5, 5.0):
        miss = np.log(starts / (1 - starts)) + inside * (2 * starts - 1)
        assert (np.diff(miss) > 0).all()


def potential(load, quality, gamma):
    return quality @ load - gamma / 2 * load @ load - load @ np.log(load)


@pytest.mark.parametrize("num_experts", [2, 3, 4, 6])
@pytest.mark.parametrize("gamma", [-0.9, 0.0, 2.0, 30.0])
def test_equilibrium_maximises_the_potential(num_experts, gamma):
    quality = qualities(num_experts, num_experts, sd=1.0)
    best = projected_gradient(quality, gamma)
    found = equilibrium(quality, gamma)
    np.testing.assert_allclose(found, best, atol=1e-7)
    generic = minimize(
        lambda m: -potential(m, quality, gamma),
        np.full(num_experts, 1 / num_experts),
        bounds=[(1e-9, 1)] * num_experts,
        constraints={"type": "eq", "fun": lambda m: m.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert potential(found, quality, gamma) >= -generic.fun - 1e-9


def projected_gradient(quality, gamma):
    """Gradient ascent of the potential along the simplex, in the coordinates log m."""
    load = np.full(len(quality), 1 / len(quality))
    step = 0.5 / (1 + abs(gamma))
    for _ in range(20_000):
        gradient = quality - gamma * load - np.log(load)
        following = load * np.exp(step * (gradient - load @ gradient))
        following /= following.sum()
        if np.abs(following - load).max() < 1e-16:
            break
        load = following
    return load


def test_the_plain_iteration_oscillates_where_the_solver_does_not():
    quality = qualities()
    load = softmax(quality)
    for _ in range(500):
        load = softmax(quality - 100 * load)
    assert np.abs(load - softmax(quality - 100 * load)).max() > 1e-3
    settled = equilibrium(quality, 100.0)
    np.testing.assert_allclose(settled, softmax(quality - 100 * settled), atol=1e-13)


def test_slope_is_the_derivative():
    quality = qualities()
    for gamma in (0.0, 5.0, 38.0):
        step = 1e-4 * (1 + gamma)
        low = max(gamma - step, 0)
        numeric = (equilibrium(quality, gamma + step) - equilibrium(quality, low)) / (
            gamma + step - low
        )
        np.testing.assert_allclose(
            load_slope(equilibrium(quality, (gamma + step + low) / 2), (gamma + step + low) / 2),
            numeric,
            atol=1e-9,
        )
    load = equilibrium(quality, 7.0)
    covariance = np.diag(load) - np.outer(load, load)
    exact = -np.linalg.solve(np.eye(M) + 7.0 * covariance, covariance @ load)
    np.testing.assert_allclose(load_slope(load, 7.0), exact, atol=1e-14)


def oracle_gamma(quality, load):
    """Grid and Brent with scipy, on the loss as it is written."""

    def loss(s):
        return divergence(load, equilibrium(quality, np.expm1(s)))

    grid = np.linspace(0, np.log1p(LARGEST_GAMMA), 60)
    best = int(np.argmin([loss(s) for s in grid]))
    bracket = (grid[max(best - 1, 0)], grid[min(best + 1, 59)])
    found = minimize_scalar(loss, bounds=bracket, method="bounded", options={"xatol": 1e-10})
    ends = [s for s in (grid[0], grid[-1]) if loss(s) <= found.fun]
    return float(np.expm1(ends[0] if ends else found.x))


@pytest.mark.parametrize("seed", range(6))
def test_both_searches_find_the_global_minimum(seed):
    rng = np.random.default_rng(seed)
    quality = qualities(seed, 16, sd=rng.uniform(0.1, 2))
    misfit = rng.choice([0.0, 0.3, 1.0])
    true = equilibrium(quality, rng.choice([0.0, 2.0, 20.0])) * np.exp(rng.normal(0, misfit, 16))
    load = shares(rng.multinomial(5000, shares(true)))
    expected = oracle_gamma(quality, load)
    for start in (None, 0.0, 5.0, 500.0):
        found = fit_gamma(quality, load, start=start)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4), start


def test_fits_of_many_rows_equal_those_of_one():
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 0.5, (40, M))
    quality[3, :5] = -np.inf
    quality[4, 5:9] = np.nan
    quality[7] = 1.0
    load = rng.multinomial(20_000, equilibrium(qualities(), 12.0), size=40).astype(float)
    load[11] = np.nan
    together = fit_gamma(quality, load, start=4.0)
    alone = [float(fit_gamma(q, m)) for q, m in zip(quality, load, strict=True)]
    assert np.flatnonzero(np.isnan(together)).tolist() == [7, 11]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    temperatures = fit_temperature(quality, load)
    for row in (0, 3, 20):
        some = np.isfinite(quality[row])
        q, m = quality[row][some], shares(load[row][some])
        best = minimize_scalar(
            lambda s, q=q, m=m: divergence(m, softmax(q / np.exp(s))),
            bounds=(-6, 6),
            method="bounded",
            options={"xatol": 1e-10},
        )
        if np.isfinite(temperatures[row]):
            assert temperatures[row] == pytest.approx(np.exp(best.x), rel=1e-4)


def test_temperature():
    quality = qualities()
    for temperature in (0.3, 1.0, 4.0):
        assert fit_temperature(quality, softmax(quality / temperature)) == pytest.approx(
            temperature
        )
    assert np.isnan(fit_temperature(quality, softmax(-quality)))
    assert np.isnan(fit_temperature(np.zeros(5), np.arange(5)))
    assert fit_temperature([1.0, 0.0], [1.0, 0.0]) == pytest.approx(1e-3)


def test_equilibrium_is_nearly_a_temperature():
    for gamma, temperature, apart in ((14.0, 1.24, 0.013), (38.0, 1.62, 0.015)):
        quality = np.stack([qualities(seed) for seed in range(12)])
        load = equilibrium(quality, gamma)
        found = fit_temperature(quality, load)
        assert found.mean() == pytest.approx(temperature, abs=0.02)
        assert found.mean() == pytest.approx(1 + gamma / M, abs=0.05)
        distance = l1(load, softmax(quality / found[:, None]))
        assert distance.mean() == pytest.approx(apart, abs=0.004)
        assert (distance < 0.03).all()


@pytest.mark.parametrize("gamma", ACCEPTED)
def test_recovery(gamma):
    quality = qualities(1)
    load = equilibrium(quality, gamma)
    runs, num_selections = 60, 10**6
    counts = np.random.default_rng(int(gamma)).multinomial(num_selections, load, size=runs)
    error = gamma_error(quality, gamma, num_selections)
    rough = (M + gamma) ** 2 / (M * quality.std() * np.sqrt(num_selections))
    assert error == pytest.approx(rough, rel=0.25)
    found = fit_gamma(quality, counts)
    assert abs(found.mean() - gamma) < 4 * error / np.sqrt(runs)
    assert found.std(ddof=1) == pytest.approx(error, rel=0.4)
    assert fit_gamma(quality, counts, loss="l1").std(ddof=1) > found.std(ddof=1)


def batch_interval(counts, quality, rng, replicates):
    """Gamma and its interval from batches of selections [N, E]."""
    weight = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=replicates)
    value = fit_gamma(quality, counts.sum(axis=0))
    low, high = bootstrap_interval(value, fit_gamma(quality, weight @ counts, start=value))
    return float(value), float(low), float(high)


def test_intervals_cover_the_planted_gamma():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(60):
        gamma = ACCEPTED[i % 3]
        quality = rng.normal(0, 0.5, M)
        load = equilibrium(quality, gamma)
        counts = rng.multinomial(4000, load, size=50)
        _, low, high = batch_interval(counts, quality, rng, 300)
        covered += low <= gamma <= high
    assert 51 <= covered <= 60


def test_percentiles_fail_where_qualities_are_estimated():
    """Noise in q flattens the fit, in each replicate once more: basic intervals take it back."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(60):
        quality = rng.normal(0, 0.5, M)
        counts = rng.multinomial(4000, rng.dirichlet(100 * equilibrium(quality, 14.0), size=50))
        probs = rng.dirichlet(100 * softmax(quality), size=50)
        weight = rng.multinomial(50, np.full(50, 1 / 50), size=200)
        value = fit_gamma(np.log(probs.sum(axis=0)), counts.sum(axis=0))
        drawn = fit_gamma(np.log(weight @ probs), weight @ counts, start=value)
        for i, (low, high) in enumerate(
            (bootstrap_interval(value, drawn), percentile_interval(drawn))
        ):
            covered[i] += low <= 14 <= high
    assert covered[0] >= 52
    assert covered[1] < 45


def test_more_batches_narrow_the_interval():
    rng = np.random.default_rng(0)
    quality = qualities()
    load = equilibrium(quality, 14.0)
    widths = []
    for batches in (25, 400):
        _, low, high = batch_interval(rng.multinomial(2000, load, size=batches), quality, rng, 400)
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.35)


def test_controls():
    rng = np.random.default_rng(0)
    quality = qualities()
    load = equilibrium(quality, 14.0)
    for _ in range(5):
        shuffled = rng.permutation(quality)
        gamma = fit_gamma(shuffled, load)
        distance = l1(load, equilibrium(shuffled, gamma))
        assert gamma > 0.99 * LARGEST_GAMMA or distance > 0.1
    assert l1(load, equilibrium(quality, fit_gamma(quality, load))) < 1e-6
    _, low, high = batch_interval(
        rng.multinomial(4000, softmax(quality), size=50), quality, rng, 300
    )
    assert low == 0 < high < 1


def test_sharper_than_the_qualities():
    quality = qualities()
    load = equilibrium(quality, -0.8)
    assert fit_gamma(quality, load) == 0
    assert fit_gamma(quality, load, lower=LOWEST_GAMMA) == pytest.approx(-0.8, abs=1e-5)
    assert fit_temperature(quality, load) < 1


def test_freeing_beta_spoils_gamma():
    """Identifiability: one load vector tells beta / (1 + gamma / M), hardly each."""
    inflation, correlation = [], []
    for seed in range(40):
        quality, gamma = qualities(seed), 30.0
        load = equilibrium(quality, gamma)
        weight = load / (1 + gamma * load)
        by_beta = weight * (quality - weight @ quality / weight.sum())
        slopes = np.stack([by_beta, load_slope(load, gamma)])
        information = (slopes / load) @ slopes.T
        covariance = np.linalg.inv(information)
        inflation.append(np.sqrt(covariance[1, 1] * information[1, 1]))
        correlation.append(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    assert 0.975 < min(correlation) < max(correlation) < 0.996
    assert 4.5 < min(inflation) < max(inflation) < 10


@pytest.mark.parametrize(("spread", "expected"), [(0.5, 0.3), (1.0, 1.5), (2.0, 10.0)])
def test_token_heterogeneity_alone_looks_like_congestion(spread, expected):
    rng = np.random.default_rng(0)
    mean_logit = qualities()
    logits = mean_logit + rng.normal(0, spread, (40_000, M))
    probs = softmax(logits)
    load = probs.mean(axis=0)
    assert fit_gamma(logits.mean(axis=0), load) == pytest.approx(expected, rel=0.3, abs=0.15)
    assert fit_gamma(np.log(load), load) == pytest.approx(0, abs=1e-6)
    assert fit_gamma(np.log(load), rng.multinomial(200_000, load)) < 1.2


def test_hard_selection_looks_sharper():
    rng = np.random.default_rng(0)
    slopes, gammas, by_probs = [], [], []
    for spread in (0.5, 1.0, 2.0):
        mean_logit = qualities()
        logits = mean_logit + rng.normal(0, spread, (40_000, M))
        chosen = np.argpartition(-logits, 8, axis=1)[:, :8]
        counts = np.bincount(chosen.ravel(), minlength=M)
        slopes.append(np.polyfit(mean_logit, np.log(counts), 1)[0])
        gammas.append(float(fit_gamma(mean_logit, counts)))
        by_probs.append(float(fit_gamma(np.log(softmax(logits).mean(axis=0)), counts)))
    np.testing.assert_allclose(slopes, [4.0, 1.7, 0.83], rtol=0.1)
    assert gammas[:2] == [0, 0]
    assert gammas[2] == pytest.approx(14.7, abs=2.5)
    assert by_probs[2] == pytest.approx(3.8, abs=2)


def test_disequilibrium():
    quality, gamma = qualities(), 14.0
    load = equilibrium(quality, gamma)
    assert disequilibrium(quality, gamma, load) == pytest.approx(0, abs=1e-12)
    two = disequilibrium(np.array([1.0, 0.0]), 0.0, np.array([0.5, 0.5]))
    assert two == pytest.approx(0.5)
    counts = np.random.default_rng(0).multinomial(100_000, load)
    floor = disequilibrium_floor(quality, gamma, 100_000)
    fitted = fit_gamma(quality, counts)
    assert disequilibrium(quality, fitted, shares(counts)) == pytest.approx(floor, rel=0.3)
    assert disequilibrium(quality, 0.0, load) > 3 * floor
    assert disequilibrium_floor(quality, gamma, 10**7) == pytest.approx(floor / 10, rel=0.2)
    assert np.isnan(disequilibrium_floor(quality, np.nan, 100))
    unused = disequilibrium(np.array([1.0, 0.0, -np.inf]), 0.0, np.array([0.5, 0.5, 0.0]))
    assert unused == pytest.approx(0.5)


def test_small_helpers():
    np.testing.assert_allclose(centred([1.0, np.nan, 3.0]), [-1, -np.inf, 1])
    np.testing.assert_allclose(shares([1, 2, 5], np.array([True, True, False])), [1 / 3, 2 / 3, 0])
    assert np.isnan(shares(np.zeros(3))).all()
    assert largest_over_mean([0.5, 0.25, 0.25]) == pytest.approx(1.5)
    assert pearson([1, 2, 3], [2, 4, 6.5]) > 0.99
    assert np.isnan(pearson([1, 2], [3, 4]))
    assert np.isnan(pearson([1, 1, 1], [3, 4, 5]))
    low, high = percentile_interval(np.full((5, 2), [1.0, np.nan]))
    np.testing.assert_array_equal([low, high], [[1, np.nan], [1, np.nan]])
    assert np.isnan(percentile_interval(np.full((3,), np.nan))[0])
    low, high = bootstrap_interval(np.array([0.0, 3.0]), np.array([[0.0, 2.0], [4.0, 5.0]]))
    np.testing.assert_allclose([low, high], [[0.1, 1.075], [3.9, 3.925]])
    with pytest.raises(ValueError, match="different numbers"):
        fit_gamma([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="lower"):
        fit_gamma([1.0, 2.0], [1.0, 2.0], lower=-1.0)


def phases_of(gamma, half_width=0.5, b=None):
    gamma = np.array(gamma, float)
    b = np.array(b if b is not None else np.arange(len(gamma)), float)
    found = phases(gamma, gamma - half_width, gamma + half_width, b - 0.3, b + 0.3)
    return {phase.name: (phase.first, phase.last, phase.resolved) for phase in found}


def test_phases_of_a_planted_trajectory():
    found = phases_of([5, 14, 25, 38, 37, 30, 20, 9], b=[1, 2, 2.4, 2.4, 2.35, 2.3, 1.5, 1])
    assert found == {
        "surge": (0, 3, True),
        "stabilisation": (1, 5, True),
        "relaxation": (3, 7, True),
    }
    assert phases_of([14, 38, 36, 37, 27, 9])["relaxation"] == (3, 5, True)
    wide = phases_of([5, 14, 25, 38, 37, 30, 20, 9], half_width=20)
    assert not wide["surge"][2]
    assert not wide["relaxation"][2]
    assert wide["stabilisation"] == (0, 0, False)


def test_phases_that_are_not_there():
    rising = phases_of([1, 2, 3])
    assert rising["surge"] == (0, 2, True)
    assert rising["relaxation"] == (2, 2, False)
    falling = phases_of([3, 2, 1], b=[1, 1.1, 1.2])
    assert falling["surge"] == (0, 0, False)
    assert falling["relaxation"] == (0, 2, True)
    assert falling["stabilisation"] == (0, 2, True)
    assert phases_of([1, np.nan, 3]) == {}
    nowhere = phases([1, 2], [np.nan] * 2, [np.nan] * 2, [np.nan] * 2, [np.nan] * 2)
    assert not any(phase.resolved for phase in nowhere)


def test_qualities_are_logs_of_means():
    selections = np.array([4.0, 0.0, 2.0])
    probs, logprob = np.array([5.0, 3.0, 2.0]), np.array([-10.0, -20.0, -30.0])
    found = qualities_of(selections, probs, logprob, selections * 0.5, selections * [1, 1, 2])
    np.testing.assert_allclose(found["q1"], np.log(probs) - np.log(probs).mean())
    np.testing.assert_allclose(found["q2"], [1, 0, -1])
    np.testing.assert_allclose(found["q3"], [0, -np.inf, 0])
    np.testing.assert_allclose(found["q4"], [-np.log(2) / 2, -np.inf, np.log(2) / 2])
    assert set(qualities_of(selections, probs)) == {"q1"}


def test_held_out_losses_are_those_of_the_other_half():
    rng = np.random.default_rng(0)
    quality = rng.normal(0, 0.5, (2, 1, M))
    counts = np.stack([rng.multinomial(5000, equilibrium(q, 9.0)) for q in quality])
    found = held_out(quality, counts)
    expected = []
    for own, other in ((0, 1), (1, 0)):
        q = quality[own, 0]
        expected.append(l1(shares(counts[other, 0]), equilibrium(q, fit_gamma(q, counts[own, 0]))))
    assert found["mfg"] == pytest.approx(np.mean(expected))
    scaled = softmax(quality[0, 0] / fit_temperature(quality[0, 0], counts[0, 0]))
    other = softmax(quality[1, 0] / fit_temperature(quality[1, 0], counts[1, 0]))
    expected = (l1(shares(counts[1, 0]), scaled) + l1(shares(counts[0, 0]), other)) / 2
    assert found["softmax"] == pytest.approx(expected)


def test_fits_start_from_the_data():
    rng = np.random.default_rng(0)
    quality = np.tile(rng.normal(0, 0.5, M), (5, 1))
    counts = rng.multinomial(20_000, equilibrium(quality[0], 14.0), size=5)
    found = fits(quality, counts)
    np.testing.assert_allclose(found["gamma_eff"], fit_gamma(quality, counts), atol=1e-6)
    np.testing.assert_allclose(found["gamma_temperature"], M * (found["temperature"] - 1))
    found = distances(quality, counts)
    np.testing.assert_allclose(found["b_quality"], M * softmax(quality).max(axis=1))
    assert (found["l1_mfg"] < found["l1_softmax"] + 0.02).all()
