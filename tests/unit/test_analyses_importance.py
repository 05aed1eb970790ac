import numpy as np
import pytest
from scipy.stats import spearmanr
from synthetic import random_ids, write_trace

from moetools import analysis
from moetools.analysis import Options, select, single
from moetools.registry import load
from moetools.reporting import style

ANALYSIS = load("analyses", "importance").ANALYSIS
LAYERS, E, K = 5, 50, 2


def make(path, *, keep="outputs", num_experts=E, plant=None, unused=0, num_parts=1, rows=1 << 16):
    rng = np.random.default_rng(0)
    lengths = [20] * 30
    num_tokens = sum(lengths)
    names = [f"{layer:02}" for layer in range(LAYERS)]
    ids = {n: random_ids(rng, num_tokens, num_experts - unused, K) for n in names}
    length = rng.uniform(1, 3, num_experts)
    weights = {n: np.sort(rng.uniform(0.1, 0.9, (num_tokens, K)))[:, ::-1] for n in names}
    norms = {n: length[ids[n]] * rng.uniform(0.9, 1.1, (num_tokens, K)) for n in names}
    peaks = {n: norms[n] / 2 for n in names}
    if plant is not None:
        layer, expert = plant
        peaks[names[layer]] = np.where(
            ids[names[layer]] == expert, 100 * peaks[names[layer]], peaks[names[layer]]
        )
    kept = {"norms": norms}
    if keep == "outputs":
        kept |= {
            "peaks": peaks,
            "shares": {n: weights[n] / 2 for n in names},
            "collinearity": {n: np.zeros((num_tokens, 3)) for n in names},
        }
    trace = write_trace(
        path, ids, lengths, num_experts=num_experts, weights=weights,
        kept={} if keep is None else kept, num_parts=num_parts, row_group_tokens=rows,
    )  # fmt: skip
    return trace, ids, weights, norms


def run(trace, **options):
    return analysis.run([trace], only=["importance"], options=Options(**options))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Table, selections, weights and norms of the usual trace."""
    trace, *recorded = make(tmp_path_factory.mktemp("plain") / "t")
    return run(trace, expert_intervals=True).tables["importance"], *recorded


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    trace, *_ = make(tmp_path_factory.mktemp("planted") / "t", plant=(1, 33))
    return run(trace).tables["importance"]


def texts(table):
    return " ".join(finding.text for finding in ANALYSIS.findings(table))


def test_reap_and_ean_against_a_loop(plain):
    table, ids, weights, norms = plain
    for layer in (0, 3):
        name = f"{layer:02}"
        stored = weights[name].astype(np.float16).astype(float)
        for e in (0, 17, E - 1):
            pairs = [(t, i) for t, i in np.argwhere(ids[name] == e)]
            length = [norms[name][t, i] for t, i in pairs]
            weighted = [stored[t, i] * norms[name][t, i] for t, i in pairs]
            for metric, expected in (
                ("ean_sum", np.sum(length)),
                ("ean_mean", np.mean(length)),
                ("weighted_ean_sum", np.sum(weighted)),
                ("reap", np.mean(weighted)),
                ("max_output", max(length) / 2),
                ("gate_mean", np.mean([stored[t, i] for t, i in pairs])),
            ):
                row = select(
                    table, metric=metric, scope="expert", layer=layer, expert=e, tokens="all"
                )
                assert row["value"].tolist() == pytest.approx([expected], rel=1e-5)
                assert row["num_tokens"].tolist() == [len(pairs)]


def test_first_tokens_can_be_left_out(plain):
    table, ids, _, norms = plain
    later = np.arange(len(ids["02"])) % 20 > 0
    row = select(table, metric="ean_sum", scope="expert", layer=2, expert=4, tokens="not_first")
    expected = norms["02"][(ids["02"] == 4) & later[:, None]].sum()
    assert row["value"].tolist() == pytest.approx([expected], rel=1e-5)


def test_experts_without_data_have_no_tokens_and_no_say(tmp_path):
    trace, *_ = make(tmp_path / "t", unused=3)
    table = run(trace).tables["importance"]
    unused = select(table, metric="reap", scope="expert", layer=1, tokens="all").iloc[-3:]
    assert unused["value"].tolist() == [0, 0, 0]
    assert unused["num_tokens"].tolist() == [0, 0, 0]
    pair = {"score": "ean_mean", "score_b": "reap", "layer": 1}
    seen = {
        name: select(table, metric=name, scope="expert", layer=1, tokens="all")["value"].iloc[:-3]
        for name in ("ean_mean", "reap")
    }
    expected = spearmanr(*seen.values()).statistic
    found = select(table, metric="score_correlation", scope="layer", **pair)["value"]
    assert found.tolist() == pytest.approx([expected])


def test_correlation_and_inequality_have_intervals(plain):
    table = plain[0]
    pair = select(
        table, metric="score_correlation", scope="model", score="ean_mean", score_b="reap"
    ).iloc[0]
    assert 0.5 < pair["value"] < pair["high"] <= 1
    assert pair["low"] < pair["high"]
    unrelated = select(
        table, metric="score_correlation", scope="model", score="selections", score_b="ean_mean"
    )
    assert abs(unrelated["value"].iloc[0]) < 0.2
    gini = select(table, metric="score_gini", scope="layer", score="ean_mean")
    assert gini["layer"].tolist() == list(range(LAYERS))
    assert gini["value"].between(0.1, 0.3).all()
    covering = select(table, metric="num_covering", scope="layer", layer=0)["value"].tolist()
    assert covering == sorted(covering)
    assert covering[-1] <= E


def test_single_experts_have_intervals_on_request(plain, planted):
    assert select(planted, metric="reap")["low"].isna().all()
    reap = select(plain[0], metric="reap")
    assert ((reap["low"] <= reap["value"]) & (reap["value"] <= reap["high"])).mean() > 0.95
    assert select(plain[0], metric="max_output")["low"].isna().all()


def test_a_planted_super_expert_is_the_only_one_and_named(planted):
    table = planted
    found = select(table, metric="super_expert", scope="expert")
    assert found[["layer", "expert"]].to_numpy().tolist() == [[1, 33]]
    assert single(table, "num_super_experts") == 1
    assert "1 super expert " in texts(table)
    assert "layer 1 expert 33" in texts(table)
    assert "do not prune" in texts(table)
    assert max(f.weight for f in ANALYSIS.findings(table)) == 1


def test_without_an_outlier_the_rule_is_not_believed(plain):
    table = plain[0]
    assert single(table, "super_expert_gap") < 1.5
    assert "says little" in texts(table)
    assert "do not prune" not in texts(table)


def test_a_late_outlier_is_no_super_expert(tmp_path):
    trace, *_ = make(tmp_path / "t", plant=(4, 33))
    found = select(run(trace).tables["importance"], metric="super_expert")
    assert (found["layer"] < 4).all()


def test_with_few_experts_the_largest_outputs_are_named(tmp_path):
    trace, *_ = make(tmp_path / "t", num_experts=20, plant=(1, 3))
    table = run(trace).tables["importance"]
    assert select(table, metric="super_expert").empty
    assert np.isnan(single(table, "super_expert_percentile"))
    assert "100 experts are too few" in texts(table)
    assert "layer 1 expert 3 (" in texts(table)


def test_what_was_not_kept_is_said(tmp_path):
    trace, *_ = make(tmp_path / "none", keep=None)
    results = run(trace)
    assert "--keep outputs" in results.limits["importance"][0]
    assert "REAP" in results.limits["importance"][0]
    metrics = set(results.tables["importance"]["metric"])
    assert metrics == {"gate_mean", "num_covering", "score_gini", "score_correlation"}
    trace, *_ = make(tmp_path / "norms", keep="norms")
    results = run(trace)
    assert "super experts" in results.limits["importance"][0]
    assert {"reap", "ean_sum"} <= set(results.tables["importance"]["metric"])
    assert "max_output" not in set(results.tables["importance"]["metric"])
    trace, *_ = make(tmp_path / "all")
    assert not ANALYSIS.limits(trace, ANALYSIS.start(trace, Options()))


def test_pictures_show_scores_and_outliers(tmp_path):
    trace, *_ = make(tmp_path / "t", plant=(1, 33))
    other, *_ = make(tmp_path / "u", keep=None)
    table = analysis.run([trace, other], only=["importance"]).tables["importance"]
    with style.applied():
        names = [picture.name for picture in ANALYSIS.plots(table)]
    assert "reap_by_expert_t" in names
    assert "largest_outputs_t" in names
    assert "reap_by_expert_u" not in names
    assert {"score_agreement_t", "score_agreement_u"} <= set(names)


def test_batches_and_parts_change_nothing(tmp_path):
    one, *_ = make(tmp_path / "one")
    two, *_ = make(tmp_path / "two", num_parts=4, rows=40)
    left, right = (run(trace).tables["importance"]["value"].to_numpy(float) for trace in (one, two))
    np.testing.assert_allclose(left, right, rtol=1e-9)
