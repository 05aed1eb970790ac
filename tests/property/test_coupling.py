"""Identities of the coupling statistics, on arbitrary gains and rows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moetools import coupling

sizes = st.integers(2, 7)


@st.composite
def gains(draw):
    size = draw(sizes)
    return draw(hnp.arrays(np.float64, (size, size), elements=st.floats(0.1, 100)))


@st.composite
def layers(draw):
    size, neurons, hidden = draw(sizes), draw(st.integers(1, 5)), draw(st.integers(3, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (
        torch.randn(size, hidden, generator=generator),
        torch.randn(size, neurons, hidden, generator=generator),
    )


def measured(weights, **rows):
    return coupling.measure(rows, lambda e: weights[e], np.arange(len(weights)))


def naive_erc(gain, alpha):
    total = 0.0
    for i in range(len(gain)):
        for j in range(len(gain)):
            if i != j:
                total += max(gain[i, j] - alpha * gain[i, i], 0)
                total += max(gain[j, i] - alpha * gain[i, i], 0)
    return total / len(gain) ** 2


@given(gains(), st.floats(0, 4))
def test_erc_is_the_double_sum(gain, alpha):
    assert coupling.erc_loss(gain, alpha) == pytest.approx(naive_erc(gain, alpha))


@given(gains())
def test_threshold_is_where_the_loss_ends(gain):
    low, high = 0.0, 2000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if coupling.erc_loss(gain, middle) > 0 else (low, middle)
    threshold = coupling.erc_threshold(gain)
    assert threshold == pytest.approx(high, rel=1e-9)
    assert coupling.erc_loss(gain, threshold * (1 + 1e-9)) == 0
    assert coupling.erc_loss(gain, threshold * 0.999) > 0


@given(gains(), st.randoms(use_true_random=False), st.floats(0.01, 100))
def test_erc_ignores_names_and_scales_with_the_gains(gain, random, scale):
    order = list(range(len(gain)))
    random.shuffle(order)
    renamed = gain[np.ix_(order, order)]
    loss, threshold = coupling.erc_loss(gain, 1.0), coupling.erc_threshold(gain)
    assert coupling.erc_loss(renamed, 1.0) == pytest.approx(loss)
    assert coupling.erc_threshold(renamed) == pytest.approx(threshold)
    assert coupling.erc_violations(renamed) == pytest.approx(coupling.erc_violations(gain))
    assert coupling.erc_loss(scale * gain, 1.0) == pytest.approx(scale * loss)
    assert coupling.erc_threshold(scale * gain) == pytest.approx(threshold)


@given(layers(), st.randoms(use_true_random=False))
def test_geometry_ignores_names_and_the_scale_of_rows(layer, random):
    rows, weights = layer
    order = list(range(len(rows)))
    random.shuffle(order)
    found = measured(weights, raw=rows, scaled=3 * rows)
    renamed = measured(weights[order], raw=rows[order])["raw"]
    cells = np.ix_(order, order)
    for name in ("alignment", "signed", "gain"):
        expected = getattr(found["raw"], name)[cells]
        np.testing.assert_allclose(getattr(renamed, name), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found["scaled"].alignment, found["raw"].alignment, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(found["scaled"].gain, 3 * found["raw"].gain, rtol=1e-4, atol=1e-5)


@given(layers(), st.integers(0, 2**31))
def test_a_common_vector_changes_only_what_is_not_centred(layer, seed):
    rows, weights = layer
    common = 3 * torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(seed))
    found = measured(
        weights,
        raw=rows,
        shifted=rows + common,
        centred=rows - rows.mean(dim=0),
        both=(rows + common) - (rows + common).mean(dim=0),
    )
    np.testing.assert_allclose(
        found["both"].gain, found["centred"].gain, rtol=1e-3, atol=1e-3 * found["raw"].gain.max()
    )
    assert not np.allclose(found["shifted"].gain, found["raw"].gain, rtol=1e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(40, rows.shape[1], generator=generator).double()
    scores = (inputs @ rows.double().T).numpy()
    shifted = (inputs @ (rows + common).double().T).numpy()
    np.testing.assert_array_equal(  # hence score agreement within a token, and the selection
        coupling.unit_ranks(scores, 1), coupling.unit_ranks(shifted, 1)
    )
    assert not np.allclose(coupling.unit_ranks(scores, 0), coupling.unit_ranks(shifted, 0))


@given(st.integers(2, 12), st.integers(0, 1000))
def test_matched_means_average_to_the_mean_of_all_entries(size, seed):
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    orders = np.array([np.roll(np.arange(size), shift) for shift in range(size)])
    draws = coupling.matched(matrix, orders)
    assert draws[0] == draws[1] == pytest.approx(np.trace(matrix) / size)
    assert draws[1:].mean() == pytest.approx(matrix.mean())


@given(hnp.arrays(np.float64, (6, 5), elements=st.integers(0, 4)))
def test_products_of_unit_ranks_are_spearman(values):
    from scipy.stats import spearmanr

    one, two = values[:3], values[3:]
    found = (coupling.unit_ranks(one, 1) * coupling.unit_ranks(two, 1)).sum(axis=1)
    for i in range(3):
        if len(set(one[i])) == 1 or len(set(two[i])) == 1:
            assert found[i] == 0
        else:
            assert found[i] == pytest.approx(spearmanr(one[i], two[i]).statistic)
