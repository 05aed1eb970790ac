import numpy as np
import pytest
import torch
from scipy import stats

from moetools import coupling

E, D, H = 16, 24, 48


def random_layer(seed, *, size=E, neurons=D, hidden=H):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, hidden, generator=generator)
    weights = torch.randn(size, neurons, hidden, generator=generator) * hidden**-0.5
    return rows, weights


def measured(rows, weights, **variants):
    variants = {"raw": rows, **variants}
    return coupling.measure(variants, lambda e: weights[e], np.arange(len(weights)))


def test_geometry_against_loops():
    rows, weights = random_layer(0, size=3)
    found = measured(rows, weights)["raw"]
    for e in range(3):
        unit = rows[e].double() / rows[e].double().norm()
        for f in range(3):
            cosines = []
            for n in range(D):
                neuron = weights[f, n].double()
                cosines.append(float(neuron @ unit / neuron.norm()))
            assert found.alignment[e, f] == pytest.approx(H * np.mean(np.square(cosines)), rel=1e-5)
            assert found.signed[e, f] == pytest.approx(np.mean(cosines), abs=1e-6)
            gain = float((weights[f].double() @ rows[e].double()).norm())
            assert found.gain[e, f] == pytest.approx(gain, rel=1e-5)
            right = np.linalg.svd(weights[f].double().numpy())[2]
            for m in (1, 8):
                energy = float(((right[:m] @ unit.numpy()) ** 2).sum())
                assert found.energy[m][e, f] == pytest.approx(energy, rel=1e-4)
    assert set(found.energy) == {1, 8}


@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (700, 600)])
def test_top_directions_are_singular_vectors(shape):
    generator = torch.Generator().manual_seed(0)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator))[0] for n in shape)
    spectrum = 0.9 ** torch.arange(size)
    weight = left * spectrum @ right.T
    found = coupling.top_directions(weight, 8)
    assert found.shape == (8, shape[1])
    torch.testing.assert_close(found @ found.T, torch.eye(8), rtol=0, atol=1e-4)
    agreement = (found * right[:, :8].T).sum(dim=1).abs()
    torch.testing.assert_close(agreement, torch.ones(8), rtol=0, atol=1e-3)


def test_dead_neurons_are_left_out():
    rows, weights = random_layer(0, size=4)
    alone = measured(rows, weights)["raw"]
    padded = torch.cat([weights, torch.zeros(4, 5, H)], dim=1)
    found = measured(rows, padded)["raw"]
    np.testing.assert_allclose(found.alignment, alone.alignment, rtol=1e-5)
    np.testing.assert_allclose(found.gain, alone.gain, rtol=1e-5)


def test_planted_coupling_is_found():
    for seed in range(5):
        rows, weights = random_layer(seed, neurons=8, hidden=64)
        assert 64 / np.sqrt(2 * 8) > 5
        weights[:, 0] = 0.1 * rows
        found = measured(rows, weights)["raw"].alignment
        orders = coupling.permutations(E, seed=seed)
        assert (np.diagonal(coupling.row_ranks(found)) == 1).all()
        for matrix in (found, coupling.row_deviations(found), 1 / coupling.row_ranks(found)):
            assert coupling.p_value(coupling.matched(matrix, orders)) < 0.005


def test_random_weights_show_nothing():
    """The alignment is 1 within its error, and the p-value uniform over seeds."""
    means, p = [], []
    for seed in range(200):
        rows, weights = random_layer(seed, neurons=8, hidden=32)
        found = measured(rows, weights)["raw"].alignment
        draws = coupling.matched(found, coupling.permutations(E, seed=seed))
        means.append(draws[0])
        p.append(float(coupling.p_value(draws)))
    error = np.std(means) / np.sqrt(len(means))
    assert abs(np.mean(means) - 1) < 4 * error
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_erc_p_is_small_for_coupled_and_uniform_for_random_rows():
    orders = coupling.permutations(E, seed=0)
    rows, weights = random_layer(0, neurons=8, hidden=64)
    weights[:, 0] = 0.2 * rows
    gain = measured(rows, weights)["raw"].gain
    for statistic in (lambda m: coupling.erc_loss(m, 1.0), coupling.erc_threshold):
        assert coupling.p_value(coupling.permuted(statistic, gain, orders), less=True) < 0.01
    p = []
    for seed in range(100):
        gain = measured(*random_layer(seed, neurons=8, hidden=32))["raw"].gain
        draws = coupling.permuted(lambda m: coupling.erc_loss(m, 1.0), gain, orders)
        p.append(float(coupling.p_value(draws, less=True)))
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_noise_within_the_bound_keeps_the_row_nearest_to_itself():
    generator = np.random.default_rng(0)
    broken = 0
    for _ in range(20):
        rows = generator.standard_normal((6, 3))
        bound = coupling.noise_bounds(rows)
        for factor in (1.0, 2.0):
            noise = generator.uniform(-1, 1, (500, 6, 3)) * bound[:, None] * factor
            signs = generator.choice([-1, 1], (500, 6, 3)) * bound[:, None] * factor
            for moves in (noise, signs):
                moved = rows * (1 + moves)
                distance = np.linalg.norm(moved[:, :, None] - rows, axis=-1)
                own = distance[:, np.arange(6), np.arange(6)]
                distance[:, np.arange(6), np.arange(6)] = np.inf
                nearest = (own < distance.min(axis=2)).all()
                assert nearest or factor == 2
                broken += not nearest
    assert broken > 0


def test_similarity_by_hand():
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert coupling.row_similarity(rows) == pytest.approx((1 / 3, 1.0))
    assert coupling.noise_bounds(np.array([[1.0, 0.0], [0.0, 1.0]])) == pytest.approx(2**0.5 / 2)
    assert coupling.noise_bounds(np.ones((2, 2))) == pytest.approx(0, abs=1e-7)


def test_places_and_deviations_by_hand():
    matrix = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0], [0.0, 4.0, 2.0]])
    assert coupling.row_ranks(matrix).tolist() == [[1, 3, 2], [1.5, 1.5, 3], [3, 1, 2]]
    assert coupling.row_deviations(matrix)[0, 0] == pytest.approx((3 - 1.5) / (2 * 0.25) ** 0.5)
    assert coupling.row_deviations(matrix)[2, 2] == pytest.approx(0)
    assert np.isnan(coupling.row_deviations(np.ones((2, 2)))).all()


def test_percentiles_and_selections_by_hand():
    assert coupling.percentiles(np.array([[5.0, 7.0, 1.0]])).tolist() == [[0.5, 1.0, 0.0]]
    assert coupling.percentiles(np.array([[2.0, 2.0, 2.0]])).tolist() == [[0.5] * 3]
    found = coupling.selected(np.array([[2, 0], [255, 255]], dtype=np.uint8), 3)
    assert found.tolist() == [[1, 0, 1], [0, 0, 0]]


def test_p_values_by_hand():
    draws = np.array([3.0, *np.arange(19) % 3])
    assert coupling.p_value(draws) == 1 / 20
    assert coupling.p_value(draws, less=True) == 1
    assert coupling.p_value(np.ones(20)) == 1
    assert np.isnan(coupling.p_value(np.array([np.nan, 1.0, 2.0])))
