import numpy as np
import pytest
from scipy import stats
from synthetic import random_probs, top_k_of, write_trace

from moetools import analysis
from moetools.analysis import select, single


def run(trace):
    return analysis.run([trace], only=["entropy"]).tables["entropy"]


def trace_of(path, probs, lengths, top_k=1, groups=None):
    ids = {"04": top_k_of(probs, top_k)}
    return write_trace(
        path, ids, lengths, num_experts=probs.shape[1], probs={"04": probs}, groups=groups
    )


def test_entropies_are_those_of_scipy(tmp_path):
    rng = np.random.default_rng(0)
    lengths = [5, 30, 1, 14]
    probs = random_probs(rng, 50, 6, scale=2)
    groups = ["a", "b", "a", "b"]
    table = run(trace_of(tmp_path / "t", probs, lengths, top_k=2, groups=groups))
    parts = np.split(probs, np.cumsum(lengths)[:-1])
    token = stats.entropy(probs, axis=1).mean()
    sequence = np.average([stats.entropy(part.mean(axis=0)) for part in parts], weights=lengths)
    mean = stats.entropy(probs.mean(axis=0))
    load = stats.entropy(np.bincount(top_k_of(probs, 2).ravel(), minlength=6))
    for metric, expected in (
        ("token_entropy", token),
        ("sequence_entropy", sequence),
        ("mean_entropy", mean),
        ("load_entropy", load),
        ("within_sequence_information", sequence - token),
        ("between_sequence_information", mean - sequence),
        ("token_entropy_relative", token / np.log(6)),
    ):
        assert single(table, metric) == pytest.approx(expected, abs=1e-6), metric
        assert single(table, metric, "layer", layer=4) == single(table, metric)
    of_a = stats.entropy(np.concatenate([parts[0], parts[2]]).mean(axis=0))
    assert single(table, "mean_entropy", "group", group="a", layer=4) == pytest.approx(of_a)


def test_sure_routers_of_one_expert_a_text(tmp_path):
    probs = np.repeat(np.eye(4), 10, axis=0)
    table = run(trace_of(tmp_path / "t", probs, [10] * 4))
    assert single(table, "token_entropy") == pytest.approx(0, abs=1e-6)
    assert single(table, "between_sequence_information") == pytest.approx(np.log(4))
    assert single(table, "between_sequence_floor") == pytest.approx(0, abs=1e-6)
    assert single(table, "load_entropy_relative") == pytest.approx(1)


def test_equal_texts_are_at_the_floor(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 60, 150)
    probs = random_probs(rng, int(lengths.sum()), 16)
    table = run(trace_of(tmp_path / "t", probs, lengths))
    between = single(table, "between_sequence_information")
    assert between > 0.005
    assert between == pytest.approx(single(table, "between_sequence_floor"), rel=0.15)


def test_without_a_rule_only_the_load(tmp_path):
    trace = write_trace(tmp_path / "t", {"00": np.array([[0], [1], [1], [1]])}, [4], num_experts=2)
    table = run(trace)
    assert set(table["metric"]) == {"load_entropy", "load_entropy_relative"}
    assert single(table, "load_entropy") == pytest.approx(stats.entropy([1, 3]))


def test_model_is_the_mean_over_layers(tmp_path):
    rng = np.random.default_rng(0)
    probs = {name: random_probs(rng, 60, 5, scale=s) for name, s in (("01", 1), ("02", 3))}
    ids = {name: top_k_of(p, 2) for name, p in probs.items()}
    table = run(write_trace(tmp_path / "t", ids, [20] * 3, num_experts=5, probs=probs))
    layers = select(table, metric="token_entropy", scope="layer")["value"]
    assert len(layers) == 2
    assert single(table, "token_entropy") == pytest.approx(layers.mean())
