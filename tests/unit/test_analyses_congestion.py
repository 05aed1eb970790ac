from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import random_probs, top_k_of, write_trace

from moetools import analysis
from moetools.analyses.congestion import (
    ANALYSIS,
    LayerSums,
    aux_loss_coefficient,
    tabulate,
)
from moetools.analysis import Options, select, single
from moetools.congestion import equilibrium, fit_gamma, gamma_error, softmax

E = 16
QUALITY = np.random.default_rng(7).normal(0, 0.7, E)


def planted_trace(path, gammas, *, num_sequences=120, length=200, seed=0, **columns):
    """Every token of a layer has the probabilities softmax(q); the load is an equilibrium."""
    rng = np.random.default_rng(seed)
    num_tokens = num_sequences * length
    names = [f"{layer:02}" for layer in range(len(gammas))]
    ids = {
        name: rng.choice(E, size=(num_tokens, 1), p=equilibrium(QUALITY, gamma))
        for name, gamma in zip(names, gammas, strict=True)
    }
    probs = dict.fromkeys(names, np.tile(softmax(QUALITY), (num_tokens, 1)))
    weights = {name: np.exp(0.5 * QUALITY)[ids[name]] / 4 for name in names}
    norms = {name: np.exp(0.5 * QUALITY)[ids[name]] for name in names}
    return write_trace(
        path,
        ids,
        [length] * num_sequences,
        num_experts=E,
        probs=probs,
        weights=weights,
        kept={"norms": norms},
        **columns,
    )


def run(*traces):
    return analysis.run(traces, only=["congestion"])


def row_of(table, metric, scope="model", **wanted):
    found = select(table, metric=metric, scope=scope, **wanted)
    assert len(found) == 1, (metric, wanted)
    return found.iloc[0]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    gammas = (0.0, 4.0, 9.0, 30.0)
    results = run(planted_trace(tmp_path_factory.mktemp("trace") / "t", gammas))
    return gammas, results.tables["congestion"], results.limits["congestion"]


def test_planted_gamma_is_recovered_through_a_trace(planted):
    gammas, table, _ = planted
    for layer, gamma in enumerate(gammas):
        row = row_of(table, "gamma_eff", "layer", layer=layer, quality="q1")
        error = gamma_error(QUALITY, gamma, 24_000)
        assert row["value"] == pytest.approx(gamma, abs=4 * error)
        assert row["low"] - error <= gamma <= row["high"] + error
        if gamma:
            assert row["high"] - row["low"] == pytest.approx(4 * error, rel=0.5)
            assert single(table, "l1_mfg", "layer", layer=layer, quality="q1") < 0.04
    mean = row_of(table, "gamma_eff", quality="q1")
    of_layers = select(table, metric="gamma_eff", scope="layer", quality="q1")
    assert mean["value"] == pytest.approx(of_layers["value"].mean())
    assert mean["low"] < mean["value"] < mean["high"]
    assert mean["high"] - mean["low"] < (of_layers["high"] - of_layers["low"]).max()


def test_without_congestion_the_interval_touches_zero(planted):
    row = row_of(planted[1], "gamma_eff", "layer", layer=0, quality="q1")
    assert row["low"] == 0
    assert row["high"] < 1
    assert single(planted[1], "temperature", "layer", layer=0, quality="q1") == pytest.approx(
        1, abs=0.05
    )


def test_every_quality_is_fitted_on_its_own_scale(planted):
    gammas, table, _ = planted
    for layer, gamma in enumerate(gammas):
        values = {
            quality: single(table, "gamma_eff", "layer", layer=layer, quality=quality)
            for quality in ("q1", "q2", "q3", "q4")
        }
        assert values["q2"] == pytest.approx(values["q1"], abs=1e-3)
        assert values["q4"] == pytest.approx(values["q1"], rel=0.02, abs=0.05)
        load = equilibrium(QUALITY, gamma)
        assert values["q3"] == pytest.approx(float(fit_gamma(QUALITY / 2, load)), abs=1.5)
    assert row_of(table, "estimator_agreement", quality="q1", quality_b="q4")["value"] > 0.99
    assert len(select(table, metric="estimator_agreement")) == 6


def test_soft_null_is_zero_under_q1(planted):
    soft = select(planted[1], metric="gamma_soft", quality="q1")
    assert (soft["value"].abs() < 1e-6).all()
    halved = select(planted[1], metric="gamma_soft", quality="q3", scope="layer")
    assert (halved["value"] == 0).all()


def test_balance_of_load_and_preference(planted):
    gammas, table, _ = planted
    for layer, gamma in enumerate(gammas):
        expected = E * equilibrium(QUALITY, gamma).max()
        assert single(table, "b_load", "layer", layer=layer) == pytest.approx(expected, rel=0.06)
        preferred = single(table, "b_quality", "layer", layer=layer, quality="q1")
        assert preferred == pytest.approx(E * softmax(QUALITY).max(), rel=1e-5)
    experts = select(table, scope="expert", layer=2)
    fitted = single(table, "gamma_eff", "layer", layer=2, quality="q1")
    for metric, expected in (
        ("preferred_share", softmax(QUALITY)),
        ("equilibrium_share", equilibrium(QUALITY, fitted)),
    ):
        found = select(experts, metric=metric).sort_values("expert")["value"]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_game_and_temperature_predict_alike(planted):
    table = planted[1]
    for layer in range(4):
        mfg = row_of(table, "heldout_l1_mfg", "layer", layer=layer)
        scaled = row_of(table, "heldout_l1_softmax", "layer", layer=layer)
        assert abs(mfg["value"] - scaled["value"]) < 0.02
        assert mfg["low"] <= mfg["value"] <= mfg["high"]
        assert mfg["value"] < 0.06


def test_scope_of_the_game(planted):
    gammas, table, _ = planted
    at_bound = [
        single(table, "out_of_scope_bound", "layer", layer=layer) for layer in range(len(gammas))
    ]
    assert at_bound[1:] == [0, 0, 0]
    for layer in range(1, 4):
        assert single(table, "out_of_scope", "layer", layer=layer) == 0
        epsilon, floor = (
            single(table, name, "layer", layer=layer) for name in ("epsilon", "epsilon_floor")
        )
        assert 0.3 < epsilon / floor < 3
    assert single(table, "top_k_share") == 1 / E
    assert single(table, "max_selection_rate", "layer", layer=0) == pytest.approx(
        softmax(QUALITY).max(), rel=0.05
    )


def test_a_load_out_of_equilibrium_is_out_of_scope():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(2000, equilibrium(-QUALITY, 2.0), size=50).astype(float)
    counts[:, 3] = 0
    table = tabulate([layer_of(counts, QUALITY)], np.full(50, 2000))
    assert single(table, "out_of_scope") == 1
    assert single(table, "out_of_scope_epsilon") == 1
    assert single(table, "out_of_scope_bound") == 1
    assert single(table, "out_of_scope_dead") == 1
    assert np.isnan(single(table, "temperature", quality="q1"))


def layer_of(counts, quality, *, layer=0, top_k=1, **sums):
    probs = counts.sum(axis=1, keepdims=True) / top_k * softmax(quality)
    return LayerSums(layer=layer, top_k=top_k, sums={"selections": counts, "probs": probs, **sums})


def test_unused_experts_have_no_weight_and_are_dropped():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(2000, equilibrium(QUALITY, 9.0), size=50).astype(float)
    counts[:, 5] = 0
    gate = counts * np.exp(QUALITY)
    table = tabulate([layer_of(counts, QUALITY, gate=gate)], np.full(50, 2000))
    assert single(table, "dropped_experts", quality="q3") == 1
    assert single(table, "dropped_experts", quality="q1") == 0
    assert single(table, "gamma_eff", quality="q3") == pytest.approx(9, rel=0.25)


def test_contributions_of_sampled_tokens_are_enough(tmp_path):
    """Norms of every third token give the same q4, over the selections that have one."""
    rng = np.random.default_rng(0)
    ids = rng.choice(E, size=(9000, 1), p=equilibrium(QUALITY, 9.0))
    probs = np.tile(softmax(QUALITY), (9000, 1))
    norms = np.exp(QUALITY)[ids]
    sampled = np.where(np.arange(9000)[:, None] % 3 == 0, norms, np.nan)
    found = [
        run(
            write_trace(
                tmp_path / name,
                {"00": ids},
                [100] * 90,
                num_experts=E,
                probs={"00": probs},
                weights={"00": np.ones((9000, 1))},
                kept={"norms": {"00": kept}},
            )
        ).tables["congestion"]
        for name, kept in (("whole", norms), ("sampled", sampled))
    ]
    whole, some = (row_of(table, "gamma_eff", quality="q4") for table in found)
    assert some["value"] == pytest.approx(whole["value"], abs=0.01)
    assert whole["value"] == pytest.approx(9, rel=0.2)


def test_equal_weights_tell_no_gamma():
    counts = np.random.default_rng(0).multinomial(500, softmax(QUALITY), size=50).astype(float)
    table = tabulate([layer_of(counts, QUALITY, gate=counts)], np.full(50, 500))
    assert np.isnan(single(table, "gamma_eff", quality="q3"))
    assert np.isfinite(single(table, "gamma_eff", quality="q1"))


def test_explicit_part():
    counts = np.random.default_rng(0).multinomial(500, np.full(64, 1 / 64), size=50).astype(float)
    layers = [layer_of(counts, np.random.default_rng(1).normal(0, 0.5, 64), top_k=8)]
    table = tabulate(layers, np.full(50, 500), coefficient=0.01)
    assert single(table, "gamma_explicit", convention="sum_k") == pytest.approx(5.12)
    assert single(table, "gamma_explicit", convention="sum_1") == pytest.approx(0.64)
    whole = row_of(table, "gamma_eff", quality="q1")
    for convention, explicit in (("sum_k", 5.12), ("sum_1", 0.64)):
        rest = row_of(table, "gamma_implicit", convention=convention)
        assert rest["value"] == pytest.approx(whole["value"] - explicit)
        assert rest["low"] == pytest.approx(whole["low"] - explicit)
    assert "gamma_explicit" not in set(tabulate(layers, np.full(50, 500))["metric"])


def test_coefficient_of_the_config(tmp_path):
    assert aux_loss_coefficient({"router_aux_loss_coef": 0.01}) == 0.01
    assert aux_loss_coefficient({"text_config": {"aux_loss_alpha": 0.001}}) == 0.001
    assert aux_loss_coefficient({"ffn_config": {"moe_loss_weight": 0.05}, "x": 1}) == 0.05
    assert aux_loss_coefficient({"hidden_size": 8, "router_aux_loss_coef": None}) is None
    trace = planted_trace(tmp_path / "t", (4.0,), num_sequences=20, length=20)
    assert "no coefficient" in " ".join(ANALYSIS.limits(trace, ANALYSIS.start(trace, Options())))
    trace.manifest = replace(trace.manifest, config={"router_aux_loss_coef": 0.5})
    results = run(trace)
    assert "no coefficient" not in " ".join(results.limits["congestion"])
    assert single(results.tables["congestion"], "gamma_explicit", convention="sum_1") == 0.5 * E


def test_limits_name_what_to_keep(tmp_path, planted):
    said = " ".join(planted[2])
    assert "--keep logits" in said
    assert "--keep norms" not in said
    probs = random_probs(np.random.default_rng(0), 60, 4)
    plain = write_trace(
        tmp_path / "plain", {"00": top_k_of(probs, 2)}, [20] * 3, num_experts=4, probs={"00": probs}
    )
    assert "--keep norms" in " ".join(ANALYSIS.limits(plain, ANALYSIS.start(plain, Options())))
    unknown = write_trace(tmp_path / "u", {"00": top_k_of(probs, 2)}, [20] * 3, num_experts=4)
    assert "scoring rule is known" in run(plain, unknown).skipped["congestion"]


def trace_of_logits(path, logits, *, top_k):
    return write_trace(
        path,
        {"00": np.argsort(-logits, axis=1)[:, :top_k]},
        [100] * (len(logits) // 100),
        num_experts=E,
        probs={"00": softmax(logits)},
        logits={"00": logits},
    )


def noisy_trace(path, *, spread, top_k, types=None, biased=False, num_tokens=12_000, seed=0):
    """Logits are the mean logit plus noise, and the preference of the token's type."""
    rng = np.random.default_rng(seed)
    logits = QUALITY + rng.normal(0, spread, (num_tokens, E))
    if types is not None:
        logits += types[rng.integers(len(types), size=num_tokens)]
    trace = trace_of_logits(path, logits, top_k=top_k)
    if biased:
        rule = {"score_function": "sigmoid", "bias_on": "scores"}
        router = replace(trace.routers[0], rule=rule)
        trace.manifest = replace(trace.manifest, routers=(router,))
    return trace


def test_null_of_independent_logits_is_gamma_itself(tmp_path):
    table = run(noisy_trace(tmp_path / "t", spread=2.0, top_k=4)).tables["congestion"]
    own = row_of(table, "gamma_eff", quality="q1")
    null = row_of(table, "gamma_null")
    assert null["low"] < own["value"] + 1
    assert null["value"] == pytest.approx(own["value"], abs=1.5)
    assert null["low"] <= own["high"]
    assert own["low"] <= null["high"]
    temperature = single(table, "temperature", quality="q1")
    assert single(table, "temperature_null") == pytest.approx(temperature, abs=0.1)


def test_null_differs_where_logits_are_coupled(tmp_path):
    """Each token has one expert that it wants, some experts more often: preferences are the load.

    Resampled for each expert separately, a third of the tokens want none and spread out.
    """
    rng = np.random.default_rng(0)
    wanted = rng.choice(E, size=12_000, p=softmax(QUALITY))
    logits = rng.normal(0, 0.5, (12_000, E)) + 12 * np.eye(E)[wanted]
    table = run(trace_of_logits(tmp_path / "t", logits, top_k=1)).tables["congestion"]
    own, null = row_of(table, "gamma_eff", quality="q1"), row_of(table, "gamma_null")
    assert own["low"] == 0
    assert null["low"] > own["high"]
    texts = [finding.text for finding in ANALYSIS.findings(table)]
    assert any("sharper in 1" in text and "resampled" in text for text in texts)


def test_types_of_tokens_are_found(tmp_path):
    rng = np.random.default_rng(3)
    trace = noisy_trace(tmp_path / "t", spread=0.3, top_k=1, types=rng.normal(0, 2, (4, E)))
    table = run(trace).tables["congestion"]
    assert single(table, "types_count") >= 4
    assert single(table, "types_share") == single(table, "types_count") / E
    row = row_of(table, "types_gain")
    assert row["low"] < row["value"] < row["high"]
    assert row["num_tokens"] == 8192
    assert single(table, "types_l1") < single(table, "types_l1_single")
    expected = 1 - single(table, "types_l1") / single(table, "types_l1_softmax")
    assert single(table, "types_gain_over_softmax") == pytest.approx(expected)


def test_biased_rules_have_no_null(tmp_path):
    results = run(noisy_trace(tmp_path / "t", spread=1.0, top_k=2, biased=True, num_tokens=3000))
    assert "correction bias" in " ".join(results.limits["congestion"])
    metrics = set(results.tables["congestion"]["metric"])
    assert "gamma_null" not in metrics
    assert "types_gain" in metrics


def trajectory(gammas, *, scale=None, selections=4000, layers=3):
    """Tables of checkpoints whose loads are equilibria, with steps 0, 100, 200, ..."""
    rng = np.random.default_rng(0)
    parts = []
    for i, gamma in enumerate(gammas):
        quality = QUALITY * (scale[i] if scale else 1)
        tables = []
        for layer in range(layers):
            load = equilibrium(quality, gamma * (1 + 0.2 * layer))
            counts = rng.multinomial(selections, load, size=50).astype(float)
            gate = counts * np.exp(quality)
            tables.append(layer_of(counts, quality, layer=layer, gate=gate))
        table = tabulate(tables, np.full(50, selections))
        parts.append(analysis.tidy([table], trace=f"step{100 * i}", step=100 * i))
    table = pd.concat(parts, ignore_index=True)
    return analysis.typed([table, ANALYSIS.across(table)])


def test_phases_of_a_planted_run():
    table = trajectory([2.0, 9.0, 20.0, 12.0, 5.0])
    surge = row_of(table, "surge", quality="q1")
    assert (surge["trace"], surge["step"], surge["from_step"]) == ("step200", 200, 0)
    assert surge["value"] == pytest.approx(18 * 1.2, rel=0.15)
    assert 0 < surge["low"] < surge["value"] < surge["high"]
    fall = row_of(table, "relaxation", quality="q1")
    assert (fall["trace"], fall["from_step"]) == ("step400", 200)
    assert fall["high"] < 0
    for name in ("surge", "relaxation"):
        for layer in (0, 1, 2):
            assert (
                row_of(table, f"{name}_resolved", "layer", layer=layer, quality="q3")["value"] == 1
            )
    agreement = row_of(table, "estimator_agreement_steps", quality="q1", quality_b="q3")
    assert agreement["value"] > 0.99
    assert agreement["step"] == 400
    keys = [c for c in table.columns if c not in ("value", "low", "high", "num_tokens")]
    assert not table.duplicated(keys).any()
    texts = [f.text for f in ANALYSIS.findings_across(table)]
    assert texts[0].startswith("From step 0 to 400: the busiest expert's load over the mean (B)")
    assert any(
        "Surge of gamma_eff from step 0 to 200: +" in t and ", resolved." in t for t in texts
    )
    pictures = {picture.name for picture in ANALYSIS.plots(table)}
    assert pictures == {"gamma_by_layer", "load_against_preference_step400", "trajectory"}


def test_noise_is_no_phase():
    table = trajectory([6.0] * 4, selections=200)
    for name in ("surge", "relaxation"):
        assert row_of(table, f"{name}_resolved", quality="q1")["value"] == 0
        row = row_of(table, name, quality="q1")
        assert row["value"] == 0 or row["low"] < 0 < row["high"]
    steady = row_of(table, "stabilisation")
    assert row_of(table, "stabilisation_resolved")["value"] == 1
    assert (steady["from_step"], steady["step"]) == (0, 300)
    texts = [finding.text for finding in ANALYSIS.findings_across(table)]
    assert any("not resolved" in text for text in texts)
    assert any(
        "Stabilisation of B from step 0 to 300: the 95 % intervals all overlap." in text
        for text in texts
    )


def test_gamma_and_b_can_part():
    """Preferences spread while gamma rises: the load stays as it is, B_q does not."""
    table = trajectory([2.0, 26.0], scale=[0.8, 2.0])
    b, b_q = (
        select(table, metric=metric, scope="model", quality=quality)["value"].to_numpy()
        for metric, quality in (("b_load", None), ("b_quality", "q1"))
    )
    assert abs(np.log(b[1] / b[0])) < 0.25
    assert b_q[1] / b_q[0] > 1.5


def test_without_steps_there_is_no_trajectory(tmp_path):
    traces = [
        planted_trace(tmp_path / name, (4.0, 9.0), num_sequences=30, length=30) for name in "ab"
    ]
    table = run(*traces).tables["congestion"]
    assert not table["metric"].isin(["surge", "estimator_agreement_steps"]).any()


def test_findings_say_what_gamma_is_not(planted):
    _, table, _ = planted
    texts = [finding.text for finding in ANALYSIS.findings(table)]
    assert texts[0].startswith("gamma_eff (as defined by moetools) is ")
    assert "A frozen router has no congestion" in texts[0]
    assert any("adds nothing to a temperature" in text for text in texts)


def test_phases_at_the_upper_bound_are_not_resolved():
    """The second checkpoint prefers what it does not select: gamma is 2000."""
    rng = np.random.default_rng(0)
    parts = []
    for i, load in enumerate((equilibrium(QUALITY, 5.0), equilibrium(-QUALITY, 5.0))):
        counts = rng.multinomial(4000, load, size=50).astype(float)
        table = tabulate([layer_of(counts, QUALITY)], np.full(50, 4000))
        assert single(table, "at_upper_bound", quality="q1") == i
        parts.append(analysis.tidy([table], trace=f"step{i}", step=i))
    table = pd.concat(parts, ignore_index=True)
    table = analysis.typed([table, ANALYSIS.across(table)])
    surge = row_of(table, "surge", quality="q1")
    assert surge["low"] > 0
    assert row_of(table, "surge_resolved", quality="q1")["value"] == 0
    texts = [finding.text for finding in ANALYSIS.findings_across(table)]
    assert any("upper bound in some layer" in text for text in texts)
