"""From sums over documents to verdicts: hand cases, and coverage of the intervals."""

import numpy as np
import pandas as pd
import pytest

from moetools.equivalence import holm
from moetools.probe_results import Native, probe_results

COUNTS = np.array([10, 20, 30, 40, 50, 60])
NATIVE = Native(nll=COUNTS * 2.0, num_predicted=COUNTS)


def table(delta, *, probe="layer", layers="0", operator="uniform", weights=None, counts=COUNTS):
    """Rows of one variant; `delta` [S, D] is the mean difference of each document."""
    delta = np.atleast_2d(delta)
    return pd.concat([
        pd.DataFrame({
            "probe": probe, "layers": layers, "operator": operator, "weights": weights,
            "seed": seed, "document": np.arange(len(counts)), "delta_nll": values * counts,
            "kl": 0.5 * counts, "agreement": 0.75 * counts, "output_error": 3.0 * counts,
            "output_cosine": -0.25 * counts, "num_outputs": counts, "num_predicted": counts,
            "load_max_over_mean": 1.0 + seed,
        })
        for seed, values in enumerate(delta)
    ])  # fmt: skip


def results(*tables, items=None, native=NATIVE):
    return probe_results(pd.concat(tables), items, native).set_index(["layers", "operator"])


def test_means_are_over_tokens_then_seeds():
    delta = np.array([[0.1, 0.2, 0.3, 0.1, 0.2, 0.3], [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]])
    found = results(table(delta)).iloc[0]
    assert found["delta_nll"] == pytest.approx(np.average(delta.mean(axis=0), weights=COUNTS))
    assert found["low"] < found["delta_nll"] < found["high"]
    assert (found["kl"], found["agreement"]) == (0.5, 0.75)
    assert (found["output_error"], found["output_cosine"]) == (3, -0.25)
    assert found["load_max_over_mean"] == 1.5
    assert (found["num_seeds"], found["num_tokens"]) == (2, 210)


def test_margin_is_half_a_percent_of_the_native_loss():
    assert NATIVE.margin == pytest.approx(0.01)
    noise = np.array([1, -1, 1, -1, 1, -1]) * 0.001
    found = results(
        table(0.005 + noise, layers="0"), table(0.05 + noise, layers="1"),
        table(0.01 + noise, layers="2"), table(20 * noise, layers="3"),
    )  # fmt: skip
    verdicts = found["verdict"].tolist()
    assert verdicts == ["equivalent", "different", "different", "undecided"]
    assert found["differs"].tolist() == [True, True, True, False]


def test_p_values_are_corrected_over_layers_of_one_operator():
    generator = np.random.default_rng(0)
    layers = [table(generator.normal(0.02, 0.02, 6), layers=str(i)) for i in range(4)]
    skips = [
        table(generator.normal(0.02, 0.02, 6), layers=str(i), operator="skip") for i in range(4)
    ]
    found = results(*layers, *skips).reset_index()
    for _, family in found.groupby("operator"):
        assert family["p_holm"].to_numpy() == pytest.approx(holm(family["p_zero"]))
    assert (found["p_holm"] >= found["p_zero"]).all()


def test_substitutability():
    noise = np.array([1, -1, 1, -1, 1, -1]) * 0.001
    found = results(
        table(0.1 + noise), table(0.4 - noise, operator="skip"),
        table(0.8 + noise, operator="bottom-k"), table(0 * noise, operator="native"),
        table(0.1 + noise, layers="1"), table(100 * noise, layers="1", operator="skip"),
        table(0.1 + noise, layers="2"), table(noise - 0.4, layers="2", operator="skip"),
        table(0.1 + noise, layers="3"),
    )  # fmt: skip
    uniform = found.loc[("0", "uniform")]
    assert uniform["substitutability"] == pytest.approx(0.75, abs=0.01)
    assert uniform["substitutability_low"] < 0.75 < uniform["substitutability_high"]
    assert uniform["substitutability_high"] - uniform["substitutability_low"] < 0.03
    assert found.loc[("0", "bottom-k"), "substitutability"] == pytest.approx(-1, abs=0.02)
    assert found.loc[("0", "native"), "substitutability"] == 1
    reasons = found["substitutability_reason"]
    for layer in ("1", "2"):
        assert pd.isna(found.loc[(layer, "uniform"), "substitutability"])
        assert reasons[(layer, "uniform")] == "skipping the layer does not significantly hurt"
    assert reasons[("3", "uniform")] == "skip was not probed"
    assert pd.isna(reasons[("0", "uniform")])


@pytest.mark.parametrize(
    ("num_seeds", "of_documents", "of_seeds", "of_both"),
    [(5, 0.1, 0.2, 0.1), (5, 0.5, 0.05, 0.0), (8, 0.1, 0.2, 0.0), (1, 0.5, 0.0, 0.0)],
)
def test_intervals_cover_documents_and_seeds(num_seeds, of_documents, of_seeds, of_both):
    """A true effect of 1 is covered, however few seeds it is that differ."""
    generator = np.random.default_rng(0)
    counts = generator.integers(20, 200, 40)
    native = Native(nll=counts * 2.0, num_predicted=counts)
    tables = []
    for run in range(200):
        delta = 1 + generator.normal(0, of_documents, 40)
        delta = delta + generator.normal(0, of_seeds, (num_seeds, 1))
        delta += generator.normal(0, of_both, (num_seeds, 40))
        tables.append(table(delta, layers=str(run), counts=counts))
    found = results(*tables, native=native)
    covered = ((found["low"] <= 1) & (found["high"] >= 1)).mean()
    assert 0.91 <= covered <= 0.99


def test_what_all_documents_share_in_a_seed_is_no_difference():
    """Seeds that move all documents at once, by 0 on average: one of twenty is called different."""
    generator = np.random.default_rng(0)
    tables = []
    for run in range(300):
        delta = generator.normal(0, 0.05, 6) + generator.normal(0, 0.05, (5, 1))
        tables.append(table(delta, probe=str(run), operator="permuted"))
    found = results(*tables)
    apart = (found["low"] > 0) | (found["high"] < 0)
    assert (found["verdict"] == "different").tolist() == apart.tolist()
    assert found["differs"].tolist() == apart.tolist()
    assert (found["p_holm"] < 0.05).tolist() == apart.tolist()
    assert 0.01 < apart.mean() < 0.09


def test_interval_of_substitutability_misses_on_either_side():
    """Of a true 0.5, with a skip whose effect is four times its error."""
    generator = np.random.default_rng(0)
    counts, error = np.full(40, 100), np.sqrt(40) / 4
    tables = []
    for run in range(300):
        skip = 1 + generator.normal(0, error, 40)
        delta = 0.5 + generator.normal(0, 0.5 * error, 40)
        tables.append(table(0.02 * skip, probe=str(run), operator="skip", counts=counts))
        tables.append(table(0.02 * delta, probe=str(run), operator="static", counts=counts))
    native = Native(nll=counts * 3.0, num_predicted=counts)
    found = results(*tables, native=native).loc[("0", "static")]
    known = found[found["substitutability"].notna()]
    assert len(known) > 280
    above = (known["substitutability_low"] > 0.5).mean()
    below = (known["substitutability_high"] < 0.5).mean()
    assert 0.003 < above < 0.05
    assert 0.003 < below < 0.05


def test_a_ratio_over_a_skip_that_may_be_nothing_has_no_interval():
    """Few seeds leave less certainty than the test of the skip alone, which has none."""
    noise = np.array([1, -1, 1, -1, 1, -1])
    seeds = np.array([[-1.0], [0.0], [1.0]])
    row = results(table(0.1 + seeds), table(0.1 + 0.06 * noise, operator="skip"))
    found = row.loc[("0", "uniform")]
    assert found["substitutability"] == pytest.approx(0, abs=0.2)
    assert pd.isna(found["substitutability_low"])
    assert pd.isna(found["substitutability_high"])


def test_items():
    native = Native(nll=NATIVE.nll, num_predicted=COUNTS, correct=np.arange(500) % 5 > 0)
    assert native.accuracy == 0.8
    key = {"probe": "layer", "layers": "0", "operator": "uniform", "weights": None}

    def items(correct):
        return pd.concat([
            pd.DataFrame({**key, "seed": seed, "item": np.arange(500), "correct": values})
            for seed, values in enumerate(np.atleast_2d(correct))
        ])  # fmt: skip

    same = results(table(COUNTS * 0.0), items=items(native.correct), native=native).iloc[0]
    assert same["delta_accuracy"] == 0
    assert same["accuracy_verdict"] == "equivalent"
    assert same["accuracy_low"] < 0 < same["accuracy_high"]
    flipped = np.tile(native.correct, (2, 1))
    flipped[:, :4] = ~flipped[:, :4]
    flipped[0, 100:200] = False
    found = results(table(COUNTS * 0.0), items=items(flipped), native=native).iloc[0]
    assert found["flips_to_right"] == 1
    assert found["flips_to_wrong"] == 3 + 80 / 2
    assert found["delta_accuracy"] == pytest.approx(-(3 + 40 - 1) / 500)
    assert found["accuracy_verdict"] == "undecided"
    assert found["accuracy_low"] < 0 < found["accuracy_high"]
    flipped[1, 110:210] = False
    found = results(table(COUNTS * 0.0), items=items(flipped), native=native).iloc[0]
    assert found["accuracy_verdict"] == "different"
    assert found["accuracy_high"] < 0


def test_one_document_has_no_interval():
    native = Native(nll=np.array([20.0]), num_predicted=np.array([10]))
    found = results(table([0.1], counts=np.array([10])), native=native).iloc[0]
    assert found["delta_nll"] == pytest.approx(0.1)
    assert pd.isna(found["low"])
    assert found["verdict"] == "undecided"


def test_tokens_without_output_have_no_error():
    without = table(COUNTS * 0.0)
    without[["num_outputs", "output_error", "output_cosine"]] = 0
    found = results(without).iloc[0]
    assert pd.isna(found["output_error"])
    assert pd.isna(found["output_cosine"])
