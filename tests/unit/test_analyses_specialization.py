import numpy as np
import pandas as pd
import pytest
from synthetic import write_trace

from moetools import analysis
from moetools.analysis import Options, select, single
from moetools.registry import load

module = load("analyses", "specialization")


def run(path, ids, lengths, num_experts, *, expert_intervals=False, **options):
    trace = write_trace(path, ids, lengths, num_experts=num_experts, **options)
    chosen = Options(expert_intervals=expert_intervals)
    return analysis.run([trace], only=["specialization"], options=chosen).tables["specialization"]


def test_domain_specialization_is_that_of_pandas():
    frequency = np.array([[0.5, 0.2, 0.0], [0.1, 0.2, 0.3], [0.4, 0.2, 1e-6]])
    frame = pd.DataFrame(frequency).where(lambda f: f > 1e-5)
    expected = (frame.std(ddof=1) / frame.mean()).to_numpy()
    found = module.domain_specialization(frequency)
    np.testing.assert_allclose(found, expected)
    assert np.isnan(found[2])


def test_domains_by_hand(tmp_path):
    """Group a uses experts 0 and 1 evenly, group b only expert 1, expert 2 is never used."""
    ids = {"00": np.array([[0], [1], [0], [1], [1], [1]])}
    table = run(tmp_path / "t", ids, [2, 2, 1, 1], 3, groups=["a", "a", "b", "b"])
    experts = select(table, metric="domain_specialization", scope="expert")["value"]
    assert np.isnan(experts.iloc[[0, 2]]).all()
    assert experts.iloc[1] == pytest.approx(np.std([0.5, 1], ddof=1) / 0.75)
    assert single(table, "domain_specialization") == pytest.approx(experts.iloc[1])
    joint = np.array([[2, 2], [0, 2]]) / 6
    margins = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    information = sum(p * np.log(p / q) for p, q in zip(joint.flat, margins.flat, strict=True) if p)
    assert single(table, "group_information") == pytest.approx(information)
    lift = select(table, metric="group_lift", group="b")["value"]
    assert lift.tolist()[:2] == pytest.approx([0, 1 / 0.75])
    assert np.isnan(lift.iloc[2])
    transfer = np.corrcoef([0.5, 0.5, 0], [0, 1, 0])[0, 1]
    assert single(table, "load_transfer", "group", group="a", group_b="b") == pytest.approx(
        transfer
    )
    assert single(table, "load_transfer") == pytest.approx(transfer)


def test_groups_without_preference_are_at_the_floors(tmp_path):
    rng = np.random.default_rng(0)
    num_sequences = 300
    topic = np.repeat(rng.integers(0, 8, num_sequences), 20)
    ids = np.where(rng.random(6000) < 0.5, topic, rng.integers(0, 8, 6000))[:, None]
    groups = [("a", "b", "c")[i % 3] for i in range(num_sequences)]
    table = run(tmp_path / "t", {"00": ids}, [20] * num_sequences, 8, groups=groups)
    for metric, tolerance in (("domain_specialization", 0.35), ("group_information", 0.5)):
        floor = single(table, f"{metric}_floor")
        assert single(table, metric) == pytest.approx(floor, rel=tolerance), metric
    # Independent tokens would have a floor that is several times lower.
    assert single(table, "group_information_floor") > 2 * (2 * 7) / (2 * 6000)


def test_groups_with_experts_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    groups = [("a", "b")[i % 2] for i in range(60)]
    of_token = np.repeat(np.arange(60) % 2, 20)
    ids = (2 * of_token + rng.integers(0, 2, 1200))[:, None]
    table = run(tmp_path / "t", {"00": ids}, [20] * 60, 4, groups=groups, expert_intervals=True)
    assert single(table, "group_information") == pytest.approx(np.log(2))
    assert single(table, "load_transfer") < -0.9
    assert select(table, metric="group_lift", group="a")["value"].tolist() == pytest.approx(
        [2, 2, 0, 0]
    )


def test_correlation_leaves_out_what_is_unknown():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=20), rng.normal(size=20)
    assert module.correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    a[3], b[7] = np.nan, np.nan
    frame = pd.DataFrame({"a": a, "b": b}).dropna()
    assert module.correlation(a, b) == pytest.approx(frame["a"].corr(frame["b"]))


def test_experts_that_hold_texts_of_one_group(tmp_path):
    """Experts 0 and 1 hold whole texts, of a or b; the others alternate alike in c and d."""
    rng = np.random.default_rng(0)
    groups = [("a", "b", "c", "d")[i % 4] for i in range(80)]
    exchanged = {0: 1, 1: 0}
    kind = np.repeat([exchanged.get(i, i % 4) for i in range(80)], 32)
    ids = np.where(kind < 2, kind, rng.integers(2, 6, 2560))[:, None]
    table = run(tmp_path / "t", {"00": ids}, [32] * 80, 6, groups=groups)
    correlation = select(table, metric="domain_srp_correlation")
    assert (correlation["value"] > 0.9).all()
    assert correlation["m"].tolist() == [16, 16]
    transfer = select(table, metric="srp_transfer", group="c", group_b="d")["value"].iloc[0]
    assert transfer > 0.9


def test_vocabulary_by_hand(tmp_path):
    """Id 1: 15 of 20 to expert 0; id 2: 21 of 21 to expert 2; id 3 occurs 19 times."""
    ids = np.array([0] * 15 + [1] * 5 + [2] * 21 + [1] * 19)
    token_id = np.array([1] * 20 + [2] * 21 + [3] * 19)
    second = (ids + 1) % 3
    table = run(
        tmp_path / "t",
        {"07": np.stack([ids, second], axis=1)},
        [60],
        3,
        token_id=token_id,
        predictions=np.full(60, 4),
    )
    of_input = select(table, vocabulary="input", layer=7)
    purity = select(of_input, metric="vocabulary_specialization", scope="expert")["value"]
    assert purity.tolist()[::2] == [0.75, 1.0]
    assert np.isnan(purity.iloc[1])
    owned = select(of_input, metric="vocabulary_num_ids", scope="expert")["value"]
    assert owned.tolist() == [1, 0, 1]
    assert single(of_input, "vocabulary_specialization", "layer") == 0.875
    assert single(of_input, "vocabulary_num_ids", "layer") == 2
    predicted = select(table, vocabulary="predicted")
    assert single(predicted, "vocabulary_specialization") == pytest.approx(24 / 60)
    # The next token of the first 19 is id 1, so that id falls below 20 occurrences.
    following = select(table, vocabulary="next", metric="vocabulary_num_ids", scope="layer")
    assert following["value"].tolist() == [1]


def test_next_tokens_stay_within_their_sequence(tmp_path):
    ids = np.array([[0]] * 20 + [[1]] * 20)
    token_id = np.array([5, 6] * 20)
    table = run(tmp_path / "t", {"00": ids}, [2] * 20, 2, token_id=token_id)
    following = select(table, vocabulary="next")
    assert single(following, "vocabulary_num_ids", "layer") == 1
    assert single(following, "vocabulary_specialization") == 0.5


def test_vocabulary_of_a_router_that_ignores_tokens_is_at_the_floor(tmp_path):
    rng = np.random.default_rng(0)
    shares = np.array([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    ids = {f"{layer:02}": rng.choice(7, 9000, p=shares)[:, None] for layer in range(6)}
    token_id = np.minimum(rng.zipf(1.3, 9000), 400)
    table = run(tmp_path / "t", ids, [90] * 100, 7, token_id=token_id)
    for name in ("input", "next"):
        found = single(table, "vocabulary_specialization", vocabulary=name)
        floor = single(table, "vocabulary_floor", vocabulary=name)
        assert found == pytest.approx(floor, rel=0.1)


def test_a_router_of_token_ids_is_pure(tmp_path):
    rng = np.random.default_rng(0)
    token_id = rng.integers(0, 30, 3000)
    table = run(tmp_path / "t", {"00": (token_id % 8)[:, None]}, [30] * 100, 8, token_id=token_id)
    assert single(table, "vocabulary_specialization", vocabulary="input") == 1
    assert single(table, "vocabulary_floor", vocabulary="input") < 0.35
