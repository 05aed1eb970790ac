"""Properties of the congestion game's equilibrium and of the fit of gamma."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moetools.congestion import (
    disequilibrium,
    equilibrium,
    fit_gamma,
    fit_temperature,
    l1,
    shares,
    softmax,
)
from moetools.congestion_types import types_equilibrium

untimed = settings(deadline=None)
QUALITIES = st.integers(2, 40).flatmap(
    lambda size: arrays(np.float64, size, elements=st.floats(-8, 8))
)
GAMMAS = st.one_of(st.floats(0, 1e4), st.floats(0, 50))


@untimed
@given(QUALITIES, st.one_of(GAMMAS, st.floats(-0.99, 0)))
def test_equilibrium_solves_its_equation(quality, gamma):
    load = equilibrium(quality, gamma)
    assert load.sum() == pytest.approx(1, abs=1e-12)
    assert (load > 0).all()
    residual = np.log(load) + gamma * load - quality
    assert np.ptp(residual) < 1e-10
    assert disequilibrium(quality, gamma, load) < 1e-10


@untimed
@given(QUALITIES, GAMMAS, st.floats(-50, 50), st.randoms())
def test_equilibrium_keeps_order_and_names_and_ignores_constants(quality, gamma, constant, random):
    load = equilibrium(quality, gamma)
    order = np.argsort(quality)
    assert (np.diff(load[order]) >= -1e-12).all()
    np.testing.assert_allclose(equilibrium(quality + constant, gamma), load, atol=1e-11)
    names = list(range(len(quality)))
    random.shuffle(names)
    np.testing.assert_allclose(equilibrium(quality[names], gamma), load[names], atol=1e-12)


@untimed
@given(QUALITIES, GAMMAS, st.floats(0, 100))
def test_congestion_flattens_the_load(quality, gamma, more):
    load, flatter = equilibrium(quality, gamma), equilibrium(quality, gamma + more)
    assert flatter.max() <= load.max() + 1e-12
    assert -(flatter @ np.log(flatter)) >= -(load @ np.log(load)) - 1e-10


@untimed
@given(QUALITIES, st.floats(0, 1500), st.integers(0, 2**32 - 1))
def test_noise_free_fit_returns_what_was_planted(quality, gamma, seed):
    assume(np.ptp(quality) > 0.1)
    load = equilibrium(quality, gamma)
    found = fit_gamma(quality, load)
    np.testing.assert_allclose(equilibrium(quality, found), load, atol=1e-9)
    start = np.random.default_rng(seed).uniform(0, 100)
    assert fit_gamma(quality, load, start=start) == pytest.approx(found, rel=1e-6, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.float64, 12, elements=st.floats(-3, 3)),
    arrays(np.int64, 12, elements=st.integers(0, 500)),
    st.floats(0, 2000),
)
def test_searching_from_a_start_equals_the_grid(quality, counts, start):
    assume(np.ptp(quality) > 0.1)
    assume(counts.sum() > 0)
    load = shares(counts)
    grid, near = fit_gamma(quality, load), fit_gamma(quality, load, start=start)
    some = load > 0

    def loss(gamma):
        return -(load[some] @ np.log(equilibrium(quality, gamma)[some]))

    assert loss(near) == pytest.approx(loss(grid), abs=1e-9)
    assert loss(grid) <= min(loss(gamma) for gamma in (0, 1, 10, 100, 2000)) + 1e-12


@untimed
@given(QUALITIES, st.floats(0.05, 20))
def test_temperatures_are_recovered(quality, temperature):
    assume(np.ptp(quality) > 0.1)
    found = fit_temperature(quality, softmax(quality / temperature))
    np.testing.assert_allclose(softmax(quality / found), softmax(quality / temperature), atol=1e-7)


@untimed
@given(QUALITIES, st.floats(0, 200), st.integers(1, 6))
def test_equal_types_are_one_type(quality, gamma, num_types):
    weight = np.full(num_types, 1 / num_types)
    _, load = types_equilibrium(np.tile(quality, (num_types, 1)), weight, gamma)
    assert l1(load, equilibrium(quality, gamma)) < 1e-8
