import numpy as np
import pandas as pd
import pytest
from synthetic import random_ids, write_trace

from moetools import analysis
from moetools.analysis import Options, select, single
from moetools.registry import load


def run(trace, **options):
    return analysis.run([trace], only=["load"], options=Options(**options)).tables["load"]


def findings(table):
    return [f.text for f in load("analyses", "load").ANALYSIS.findings(table)]


@pytest.fixture
def by_hand(tmp_path):
    """Two layers, four experts: layer 0 selects 0,1 | 0,1 | 0,2 | 0,1, layer 1 is even."""
    ids = {
        "00": np.array([[0, 1], [1, 0], [0, 2], [0, 1]]),
        "01": np.array([[0, 1], [2, 3], [1, 2], [3, 0]]),
    }
    weights = {"00": np.array([[0.75, 0.25]] * 4), "01": np.full((4, 2), 0.5)}
    return run(
        write_trace(tmp_path / "t", ids, [1, 3], num_experts=4, weights=weights, groups=["a", "b"])
    )


def test_shares_by_hand(by_hand):
    shares = select(by_hand, metric="load_share", layer=0, group=None)["value"]
    assert shares.tolist() == [4 / 8, 3 / 8, 1 / 8, 0]
    weights = select(by_hand, metric="weight_share", layer=0, group=None)["value"]
    assert weights.tolist() == pytest.approx([(3 * 0.75 + 0.25) / 4, 1.25 / 4, 0.25 / 4, 0])
    assert select(by_hand, metric="load_share", layer=0, group="a")["value"].tolist() == [
        0.5, 0.5, 0, 0,
    ]  # fmt: skip
    assert select(by_hand, metric="load_share", group="b")["num_tokens"].eq(3).all()


def test_unevenness_by_hand(by_hand):
    shares = np.array([4, 3, 1, 0]) / 8
    layer = {"scope": "layer", "layer": 0}
    assert single(by_hand, "load_max_over_mean", **layer) == 2
    assert single(by_hand, "load_cv", **layer) == pytest.approx(shares.std() / shares.mean())
    assert single(by_hand, "load_gini", **layer) == pytest.approx(
        np.abs(shares[:, None] - shares).mean() / (2 * shares.mean())
    )
    entropy = -(shares[:3] * np.log(shares[:3])).sum()
    assert single(by_hand, "effective_num_experts", **layer) == pytest.approx(np.exp(entropy))
    assert single(by_hand, "num_dead_experts", **layer) == 1
    assert single(by_hand, "num_cold_experts", **layer) == 1
    assert single(by_hand, "num_dead_experts") == 1
    assert single(by_hand, "num_dead_experts", "group", group="a", layer=None) == 4
    even = {"scope": "layer", "layer": 1}
    assert single(by_hand, "load_cv", **even) == pytest.approx(0, abs=1e-12)
    assert single(by_hand, "effective_num_experts", **even) == pytest.approx(4)
    cv = single(by_hand, "load_cv", **layer)
    assert single(by_hand, "load_cv") == pytest.approx(cv / 2)


def test_load_balance_is_the_spread_of_the_activation_frequency(by_hand):
    frequency = pd.Series([4 / 4, 3 / 4, 1 / 4, 0, 0.5, 0.5, 0.5, 0.5])
    assert single(by_hand, "load_balance") == pytest.approx(100 * frequency.std())


def test_attention_routers_have_their_own_names(tmp_path):
    rng = np.random.default_rng(0)
    ids = {"00": random_ids(rng, 50, 4, 2), "00.attention": np.zeros((50, 1), int)}
    table = run(write_trace(tmp_path / "t", ids, [25, 25], num_experts=4))
    assert single(table, "attention_load_max_over_mean", "layer", layer=0) == 4
    assert single(table, "load_max_over_mean", "layer", layer=0) < 4
    assert select(table, metric="attention_load_cv", scope="model").empty


def test_dropped_tokens_select_nothing(tmp_path):
    ids = {"00": np.array([[0], [-1], [1], [-1]])}
    table = run(write_trace(tmp_path / "t", ids, [4], num_experts=2))
    assert select(table, metric="load_share")["value"].tolist() == [0.5, 0.5]
    assert single(table, "load_balance") == 0


def test_random_routers_are_at_the_floor(tmp_path):
    """Independent tokens: the measured CV, the analytic floor and the block noise agree."""
    rng = np.random.default_rng(0)
    ids = {f"{layer:02}": random_ids(rng, 8000, 32, 4) for layer in range(4)}
    table = run(write_trace(tmp_path / "t", ids, [40] * 200, num_experts=32))
    floor = single(table, "load_cv_floor")
    assert floor == pytest.approx(np.sqrt((1 - 4 / 32) / (8000 * 4 / 32)))
    assert single(table, "load_cv") == pytest.approx(floor, rel=0.25)
    assert single(table, "load_cv_noise") == pytest.approx(floor, rel=0.25)
    assert single(table, "load_gini") == pytest.approx(single(table, "load_gini_floor"), rel=0.25)


def test_texts_with_one_topic_raise_the_noise_not_the_floor(tmp_path):
    rng = np.random.default_rng(0)
    ids = {"00": np.repeat(random_ids(rng, 200, 32, 4), 40, axis=0)}
    table = run(write_trace(tmp_path / "t", ids, [40] * 200, num_experts=32))
    assert single(table, "load_cv_floor") < 0.05
    assert single(table, "load_cv") == pytest.approx(single(table, "load_cv_noise"), rel=0.3)


def test_intervals_of_experts_on_request(tmp_path):
    rng = np.random.default_rng(0)
    trace = write_trace(
        tmp_path / "t", {"00": random_ids(rng, 300, 4, 1)}, [3] * 100, num_experts=4
    )
    share = select(run(trace, expert_intervals=True), metric="load_share")
    assert ((share["low"] < 0.25) & (share["high"] > 0.25)).sum() >= 3
    assert select(run(trace), metric="load_share")["low"].isna().all()


def test_findings_name_dead_experts_and_the_busiest_layer(tmp_path):
    rng = np.random.default_rng(0)
    skewed = np.where(rng.random((1000, 1)) < 0.6, 5, rng.integers(0, 31, (1000, 1)))
    ids = {"00": random_ids(rng, 1000, 32, 1), "03": skewed}
    texts = findings(run(write_trace(tmp_path / "t", ids, [10] * 100, num_experts=32)))
    assert "1 of 64 experts was never selected in 1,000 tokens (layer 3)." in texts
    (uneven,) = (text for text in texts if text.startswith("Layer 3 is the most uneven"))
    assert "to 2 of 32 experts (evenly it would be 6%)" in uneven
