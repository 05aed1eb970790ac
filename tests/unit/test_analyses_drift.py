"""The analysis `drift`: what it compares, what it refuses, and planted changes."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from synthetic import random_ids, random_probs, top_k_of, write_trace

from moetools import analysis
from moetools.analysis import Options, registry, select, single
from moetools.reporting import style

E, K = 8, 2
DRIFT = registry.load("analyses", "drift").ANALYSIS
LENGTHS = np.random.default_rng(5).integers(5, 60, 40).tolist()
NUM_TOKENS = sum(LENGTHS)
LAYERS = ("00", "01", "03")


def scores(seed=0):
    rng = np.random.default_rng(seed)
    return {name: random_probs(rng, NUM_TOKENS, E, scale=2.0) for name in LAYERS}


def write(path, probs, *, lengths=LENGTHS, top_k=K, num_experts=E, **options):
    ids = {name: top_k_of(values, top_k) for name, values in probs.items()}
    groups = [("de", "en")[i % 2] for i in range(len(lengths))]
    return write_trace(
        path, ids, lengths, num_experts=num_experts, probs=probs, groups=groups, **options
    )


def drift_of(trace, reference, **options):
    results = analysis.run([trace], only=["drift"], options=Options(reference=reference, **options))
    return results.tables["drift"]


def reason(trace, reference):
    found = DRIFT.columns(trace, Options(reference=reference))
    assert isinstance(found, str)
    assert found.endswith(".")
    return found


def noisy(probs, scale, seed=1):
    rng = np.random.default_rng(seed)
    return {
        name: softmax(np.log(values) + scale * rng.standard_normal(values.shape), axis=1)
        for name, values in probs.items()
    }


def test_a_trace_against_itself(tmp_path):
    a = write(tmp_path / "a", scores(), nll=np.linspace(2, 3, len(LENGTHS)))
    b = write(
        tmp_path / "b", scores(), nll=np.linspace(2, 3, len(LENGTHS)), row_group_tokens=100,
        num_parts=3,
    )  # fmt: skip
    table = drift_of(b, a)
    ones = ("overlap_at_k", "jaccard", "exact_set", "top1_agreement", "overlap_by_margin")
    for metric in (*ones, "weighted_overlap", "exact_by_margin"):
        assert select(table, metric=metric)["value"].to_numpy() == pytest.approx(1), metric
    changes = ("load_js", "load_l1", "load_tv", "load_entropy_change", "token_entropy_change")
    for metric in (*changes, "nll_change", "nll_change_relative"):
        assert select(table, metric=metric)["value"].to_numpy() == pytest.approx(0, abs=1e-12)
    assert single(table, "nll_equivalence_p") < 1e-6
    assert single(table, "nll_difference_p") == 1
    assert single(table, "overlap_chance") < 0.5
    texts = [finding.text for finding in DRIFT.findings(table)]
    assert any("equivalent (within" in text for text in texts)


def test_scopes_and_intervals(tmp_path):
    probs = scores()
    table = drift_of(write(tmp_path / "b", noisy(probs, 0.5)), write(tmp_path / "a", probs))
    overlap = select(table, metric="overlap_at_k")
    assert sorted(select(overlap, scope="layer")["layer"]) == [0, 1, 3]
    assert set(select(overlap, scope="group")["group"]) == {"de", "en"}
    assert single(table, "overlap_at_k") == pytest.approx(
        select(overlap, scope="layer")["value"].mean()
    )
    assert ((overlap["low"] < overlap["value"]) & (overlap["value"] < overlap["high"])).all()
    assert (select(overlap, scope="model")["num_tokens"] == NUM_TOKENS).all()


def test_values_equal_those_of_each_token(tmp_path):
    probs, other = scores(), scores(9)
    table = drift_of(write(tmp_path / "b", other), write(tmp_path / "a", probs))
    for layer, name in ((0, "00"), (3, "03")):
        a, b = (top_k_of(p[name], K) for p in (probs, other))
        same = (a[:, :, None] == b[:, None, :]).sum(axis=(1, 2))
        assert single(table, "overlap_at_k", "layer", layer=layer, group=None) == pytest.approx(
            same.mean() / K
        )
        assert single(table, "exact_set", "layer", layer=layer) == pytest.approx((same == K).mean())
        loads = [np.bincount(ids.ravel(), minlength=E) / ids.size for ids in (a, b)]
        assert single(table, "load_tv", "layer", layer=layer) == pytest.approx(
            abs(loads[0] - loads[1]).sum() / 2
        )
        entropies = [-(p[name] * np.log(p[name])).sum(axis=1).mean() for p in (probs, other)]
        assert single(table, "token_entropy_change", "layer", layer=layer) == pytest.approx(
            entropies[1] - entropies[0], abs=1e-5
        )


def test_more_noise_less_overlap_and_near_ties_first(tmp_path):
    probs = scores()
    a = write(tmp_path / "a", probs)
    tables = [
        drift_of(write(tmp_path / f"b{i}", noisy(probs, scale)), a)
        for i, scale in enumerate((0.02, 0.1, 0.5, 2.0))
    ]
    overlaps = [single(table, "overlap_at_k") for table in tables]
    assert all(np.diff(overlaps) < 0)
    assert overlaps[0] > 0.97
    chance = single(tables[-1], "overlap_chance")
    assert overlaps[-1] > chance
    by_margin = select(tables[1], metric="overlap_by_margin", scope="model").sort_values("decile")
    assert by_margin["decile"].tolist() == list(range(1, 11))
    assert by_margin["value"].iloc[0] < 0.85
    assert by_margin["value"].iloc[-1] == 1
    assert by_margin["value"].mean() == pytest.approx(overlaps[1], abs=1e-6)


def test_unrelated_routing_is_at_chance(tmp_path):
    table = drift_of(write(tmp_path / "b", scores(1)), write(tmp_path / "a", scores(0)))
    overlap, chance = single(table, "overlap_at_k"), single(table, "overlap_chance")
    assert chance == pytest.approx(K / E, abs=0.01)
    assert overlap == pytest.approx(chance, abs=0.03)


def test_a_changed_layer_stands_out(tmp_path):
    probs = scores()
    changed = probs | {"01": noisy(probs, 1.0)["01"]}
    table = drift_of(write(tmp_path / "b", changed), write(tmp_path / "a", probs))
    layers = select(table, metric="overlap_at_k", scope="layer").set_index("layer")["value"]
    assert layers[0] == layers[3] == 1
    assert layers[1] < 0.8
    assert "least in layer 1" in next(iter(DRIFT.findings(table))).text


def test_losses_that_differ_and_losses_that_do_not(tmp_path):
    rng = np.random.default_rng(0)
    base = 2 + rng.random(len(LENGTHS))
    a = write(tmp_path / "a", scores(), nll=base)
    same = drift_of(write(tmp_path / "s", scores(), nll=base + 0.001), a)
    worse = drift_of(write(tmp_path / "w", scores(), nll=base + 0.1 + 0.01 * rng.random(40)), a)
    unclear = drift_of(write(tmp_path / "u", scores(), nll=base + rng.normal(0, 0.2, 40)), a)
    assert single(same, "nll_change") == pytest.approx(0.001, abs=1e-6)
    texts = [list(DRIFT.findings(table))[-1].text for table in (same, worse, unclear)]
    for text, verdict in zip(texts, ("equivalent", "different", "undecided"), strict=True):
        assert f"; {verdict}" in text
    predicted = np.array(LENGTHS) - 1
    mean = (base * predicted).sum() / predicted.sum()
    assert single(same, "nll_margin") == pytest.approx(0.005 * mean, rel=1e-6)


def test_without_rules_or_losses(tmp_path):
    ids = random_ids(np.random.default_rng(0), NUM_TOKENS, E, K)
    a, b = (
        write_trace(tmp_path / name, {"00": ids}, LENGTHS, num_experts=E) for name in ("a", "b")
    )
    table = drift_of(b, a)
    metrics = set(table["metric"])
    assert "overlap_at_k" in metrics
    assert not {"overlap_by_margin", "token_entropy_change", "nll_change"} & metrics


def test_reasons(tmp_path):
    a = write(tmp_path / "a", scores())
    assert "moetools diff A B" in reason(a, None)
    shorter = {name: values[: NUM_TOKENS - LENGTHS[-1]] for name, values in scores().items()}
    short = write(tmp_path / "short", shorter, lengths=LENGTHS[:-1])
    assert "Its tokens are not those of short" in reason(a, short)
    tokens = write(tmp_path / "tokens", scores(), token_id=np.arange(NUM_TOKENS))
    assert "Its tokens are not those of tokens" in reason(a, tokens)
    fewer = write(tmp_path / "fewer", {"00": scores()["00"]})
    assert "Only a has router 01" in reason(a, fewer)
    assert "Only a has router 01" in reason(fewer, a)
    wide = np.hstack([scores()["00"], scores()["00"]]) / 2
    wider = write(
        tmp_path / "wider",
        scores() | {"00": wide},
        num_experts={"00": 16} | dict.fromkeys(LAYERS[1:], E),
    )
    assert "Router 00 has 8 experts, in wider 16" in reason(a, wider)


def test_another_top_k_is_compared(tmp_path):
    table = drift_of(write(tmp_path / "b", scores(), top_k=3), write(tmp_path / "a", scores()))
    assert single(table, "overlap_at_k") == 1
    assert single(table, "jaccard") == pytest.approx(2 / 3)
    assert single(table, "exact_set") == 0


def test_a_report_compares_with_the_first_trace(tmp_path):
    probs = scores()
    traces = [write(tmp_path / "a", probs)]
    traces += [write(tmp_path / f"b{i}", noisy(probs, i / 2)) for i in (1, 2)]
    results = analysis.run(traces, only=["drift"])
    table = results.tables["drift"]
    assert set(table["trace"]) == {"b1", "b2"}
    assert results.skipped == {}
    with style.applied():
        names = [picture.name for picture in DRIFT.plots(table)]
    assert names == ["drift_by_layer", "drift_by_margin_b1", "drift_by_margin_b2"]


def test_parts_in_any_order(tmp_path):
    probs = scores()
    a = write(tmp_path / "a", probs, row_group_tokens=90, nll=np.linspace(1, 2, len(LENGTHS)))
    b = write(
        tmp_path / "b", noisy(probs, 0.5), row_group_tokens=70, nll=np.linspace(2, 1, len(LENGTHS))
    )
    options = Options(reference=a)
    batches = list(b.batches(DRIFT.columns(b, options)))
    assert len(batches) > 6

    def fed(parts):
        state = DRIFT.start(b, options)
        for part in parts:
            state.update(part)
        return state

    whole = fed(batches)
    merged = fed(batches[5:])
    merged.merge(fed(batches[:2][::-1]))
    merged.merge(fed(batches[2:5]))
    one, other = (analysis.tidy([state.table()], trace="b") for state in (whole, merged))
    for table in (other, analysis.tidy([whole.table()], trace="b")):
        pd.testing.assert_frame_equal(one, table, rtol=1e-9, atol=1e-9)
