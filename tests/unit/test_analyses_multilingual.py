import math
from itertools import combinations

import numpy as np
import pytest
from scipy import stats
from synthetic import random_probs, top_k_of, write_trace

from moetools import analysis
from moetools.analyses import multilingual
from moetools.analysis import Options, select, single
from moetools.profiles import divergence

LANGUAGES = ("en", "de", "fr", "sw", "zh")


def run(trace, **options):
    results = analysis.run([trace], only=["multilingual"], options=Options(**options))
    return results.tables["multilingual"]


def limits(trace):
    results = analysis.run([trace], only=["multilingual"])
    return " ".join(results.limits["multilingual"])


def one(table, metric, scope="model", **wanted):
    """The only row of a metric."""
    found = select(table, metric=metric, scope=scope, **wanted)
    assert len(found) == 1, (metric, len(found))
    return found.iloc[0]


def softmax(logits):
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return scores / scores.sum(axis=-1, keepdims=True)


def parallel(path, layers, *, languages=LANGUAGES, num_items=24, length=60, top_k=4, **options):
    """A trace of items in several languages.

    Args:
        layers: For each layer a function of (language index, item index, generator) that gives
            the logits [T, E] of T tokens.
    """
    rng = np.random.default_rng(0)
    places = [(i, g) for i in range(num_items) for g in range(len(languages))]
    probs = {
        f"{layer:02}": softmax(np.concatenate([logits(g, i, rng) for i, g in places]))
        for layer, logits in enumerate(layers)
    }
    defaults = {
        "groups": [languages[g] for _, g in places],
        "ids": [f"item {i}" for i, _ in places],
        "reference_group": languages[0],
    }
    return write_trace(
        path,
        {name: top_k_of(values, top_k) for name, values in probs.items()},
        [length] * len(places),
        num_experts=next(iter(probs.values())).shape[1],
        probs=probs,
        **(defaults | options),
    )


CONTENT = np.random.default_rng(1).normal(size=(100, 32))
OWN = np.random.default_rng(2).normal(size=(9, 32))


def shared(g, i, rng):
    """The experts of the text, whatever the language."""
    return CONTENT[i] + rng.normal(size=(60, 32))


def own(g, i, rng):
    """Experts of the language, and some of the text."""
    return 2 * OWN[g] + CONTENT[i] + rng.normal(size=(60, 32))


def noise(g, i, rng):
    """Nearly uniform, with little of the text."""
    return 0.008 * CONTENT[i] + 0.1 * rng.normal(size=(60, 32))


def weak(g, i, rng):
    """Nearly uniform too, but each language on its own."""
    return 0.03 * OWN[g] + noise(g, i, rng)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    layers = [own, own, shared, shared, shared, shared, own, own]
    return run(parallel(tmp_path_factory.mktemp("planted") / "t", layers))


def test_shared_experts_in_the_middle_show_the_u(planted):
    by_layer = select(planted, metric="divergence", scope="layer").set_index("layer")["value"]
    assert by_layer[[2, 3, 4, 5]].max() < 0.1 < 0.25 < by_layer[[0, 1, 6, 7]].min()
    for metric in ("divergence_u", "divergence_excess_u"):
        for end in ("first", "last"):
            assert one(planted, metric, end=end)["low"] > 0.2
            for language in LANGUAGES[1:]:
                assert one(planted, metric, "group", end=end, group=language)["low"] > 0.1
    texts = [finding.text for finding in multilingual.findings(planted)]
    assert any("most alike in the middle (a U)" in text for text in texts)


def test_the_middle_is_as_alike_as_halves_of_a_text(planted):
    excess = select(planted, metric="divergence_excess", scope="layer").set_index("layer")
    ratio = select(planted, metric="divergence_ratio", scope="layer").set_index("layer")
    for layer in range(2, 6):
        assert excess.loc[layer, "low"] < 0.005
        assert ratio.loc[layer, "value"] == pytest.approx(0, abs=0.03)
        assert ratio.loc[layer, "low"] <= 0.01
    for layer in (0, 1, 6, 7):
        assert excess.loc[layer, "low"] > 0.2
        assert ratio.loc[layer, "low"] > 1


def test_language_experts_are_where_they_were_planted(planted):
    by_layer = select(planted, metric="num_multilingual_experts", scope="layer", tau=0.3)
    by_layer = by_layer.set_index("layer")["value"]
    assert (by_layer[[2, 3, 4, 5]] == 0).all()
    assert (by_layer[[0, 1, 6, 7]] >= 6).all()
    floor = select(planted, metric="num_language_experts_floor", scope="model", tau=0.3)
    assert floor["value"].tolist() == [0]
    delta = select(planted, metric="frequency_delta", group="sw", layer=0).set_index("expert")
    expected = OWN[3] - OWN[0]
    assert stats.spearmanr(delta["value"], expected).statistic > 0.8
    total = select(planted, metric="frequency_delta").groupby(["group", "layer"])["value"].sum()
    assert total.to_numpy() == pytest.approx(np.zeros(len(total)), abs=1e-9)


def test_consistency_of_independent_tokens_is_what_their_frequencies_explain(tmp_path):
    def still(g, i, rng):
        return OWN[g] + rng.gumbel(size=(60, 32))

    table = run(parallel(tmp_path / "t", [still], num_items=10))
    for language in LANGUAGES:
        found = single(table, "consistency", "group", group=language, layer=0)
        skewed = single(table, "consistency_chance_skewed", "group", group=language, layer=0)
        assert found == pytest.approx(skewed, abs=0.005)
        assert found > single(table, "consistency_chance_uniform") + 0.01


def test_noise_is_half_way_and_the_floors_tell_it_from_languages(tmp_path):
    table = run(parallel(tmp_path / "t", [noise, weak], num_items=60, length=60))
    value = select(table, metric="divergence", scope="layer").set_index("layer")["value"]
    assert value.to_numpy() == pytest.approx([0.38, 0.47], abs=0.06)
    ratio = select(table, metric="divergence_ratio", scope="layer").set_index("layer")
    assert ratio.loc[0, "low"] < 0 < ratio.loc[0, "high"] < 0.5
    assert ratio.loc[1, "low"] > 0.5


def test_ratio_is_null_where_the_floors_cannot_be_told_apart(tmp_path):
    def nothing(g, i, rng):
        return 0.1 * rng.normal(size=(60, 32))

    table = run(parallel(tmp_path / "t", [nothing], num_items=40))
    assert single(table, "divergence") == pytest.approx(0.5, abs=0.05)
    for floor in ("half", "other"):
        assert single(table, f"divergence_floor_{floor}") == pytest.approx(0.5, abs=0.05)
    excess = one(table, "divergence_excess")
    assert excess["low"] < 0 < excess["high"]
    assert np.isnan(one(table, "divergence_ratio")["value"])


def test_languages_of_one_distribution_have_nothing_of_their_own(tmp_path):
    table = run(parallel(tmp_path / "t", [shared] * 4, num_items=40))
    ratio = one(table, "divergence_ratio")
    assert ratio["low"] < 0.01
    assert ratio["value"] == pytest.approx(0, abs=0.02)
    for metric in ("num_language_experts", "num_multilingual_experts"):
        for tau in (0.2, 0.3, 0.4, 0.5):
            assert (select(table, metric=metric, tau=tau)["value"] == 0).all()
    for end in ("first", "last"):
        bend = one(table, "divergence_excess_u", end=end)
        assert bend["low"] < 0 < bend["high"]


@pytest.mark.parametrize("sharpness", [1, 5])
def test_lengths_alone_make_no_language_different(tmp_path, sharpness):
    lengths = {"en": 40, "de": 20, "fr": 40, "sw": 80, "zh": 160}
    rng = np.random.default_rng(8)
    contents = rng.normal(0, 0.3, (60, 32))
    places = [(i, g) for i in range(60) for g in lengths]
    texts = [
        softmax(contents[i] + sharpness * rng.normal(size=(lengths[g], 32))) for i, g in places
    ]
    probs = np.concatenate(texts)
    trace = write_trace(
        tmp_path / "t", {"00": top_k_of(probs, 4)}, [len(text) for text in texts],
        num_experts=32, probs={"00": probs}, groups=[g for _, g in places],
        ids=[str(i) for i, _ in places], reference_group="en",
    )  # fmt: skip
    table = run(trace)
    for language, length in lengths.items():
        if language == "en":
            continue
        place = {"scope": "group", "group": language, "layer": 0}
        excess = one(table, "divergence_excess", **place)
        ratio = one(table, "divergence_ratio", **place)
        allowance = single(table, "divergence_excess_allowance", "group", group=language)
        assert allowance == pytest.approx(0.15 * ((length - 40) / (length + 40)) ** 2)
        assert excess["low"] < allowance
        assert excess["high"] > 0
        assert excess["value"] == pytest.approx(0, abs=0.015 if sharpness == 1 else 0.05)
        if sharpness == 1:
            assert excess["low"] < 0
            assert ratio["value"] == pytest.approx(0, abs=0.06)
            assert ratio["low"] < 0 < ratio["high"]
    halves = select(table, metric="divergence_floor_half", scope="group", layer=0)
    halves = halves.set_index("group")["value"]
    if sharpness == 1:
        assert halves["de"] > halves["fr"] > halves["sw"] > halves["zh"]
    texts = [finding.text for finding in multilingual.findings(table)]
    counted = [text for text in texts if "combinations of language and layer" in text]
    assert len(counted) == 1
    assert "in 0 of 4 combinations" in counted[0]
    assert "by more than unequal lengths may leave" in counted[0]


def scalar_entropy(p):
    return -sum(x * math.log(x) for x in p if x > 0)


def scalar_divergence(a, b):
    a, b = [x / sum(a) for x in a], [x / sum(b) for x in b]
    own_entropy = (scalar_entropy(a) + scalar_entropy(b)) / 2
    middle = scalar_entropy([(x + y) / 2 for x, y in zip(a, b, strict=True)])
    return (middle - own_entropy) / (math.log(len(a)) - own_entropy)


def test_every_number_is_that_of_scalar_loops(tmp_path):
    rng = np.random.default_rng(3)
    lengths = [7, 9, 12, 5, 8, 30]
    groups, ids = ["en", "de"] * 3, ["a", "a", "b", "b", "c", "c"]
    probs = random_probs(rng, sum(lengths), 6, scale=2)
    selected = top_k_of(probs, 2)
    trace = write_trace(
        tmp_path / "t", {"05": selected}, lengths, num_experts=6, probs={"05": probs},
        groups=groups, ids=ids, reference_group="en",
    )  # fmt: skip
    table = run(trace)
    cuts = np.cumsum(lengths)[:-1]
    places = zip(groups, ids, strict=True)
    texts = dict(zip(places, np.split(probs, cuts), strict=True))
    items = ("a", "b", "c")

    def profile(group, item, step=slice(None)):
        return texts[group, item][step].sum(axis=0).tolist()

    even, odd = slice(0, None, 2), slice(1, None, 2)
    whole = np.mean([scalar_divergence(profile("en", i), profile("de", i)) for i in items])
    half = np.mean(
        [scalar_divergence(profile("en", i, even), profile("en", i, odd)) for i in items]
    )
    own_half = np.mean(
        [scalar_divergence(profile("de", i, even), profile("de", i, odd)) for i in items]
    )

    def mixed(*halves):
        return scalar_entropy(np.mean([np.array(h) / np.sum(h) for h in halves], axis=0))

    beyond = []
    for i in items:
        a, b, c, d = (profile(g, i, step) for g in ("en", "de") for step in (even, odd))
        room = math.log(6) - (mixed(a) + mixed(b) + mixed(c) + mixed(d)) / 4
        beyond.append((mixed(a, d) + mixed(b, c) - mixed(a, b) - mixed(c, d)) / 2 / room)
    for metric, expected in (
        ("divergence", whole),
        ("divergence_floor_half", half),
        ("divergence_excess", np.mean(beyond)),
    ):
        assert single(table, metric) == pytest.approx(expected, abs=1e-6), metric
        assert single(table, metric, "layer", layer=5) == single(table, metric)
    found = one(table, "divergence_floor_half", "group", group="de", layer=5)
    assert found["value"] == pytest.approx(own_half, abs=1e-6)
    assert found["num_tokens"] == sum(lengths[1::2])
    allowance = np.mean(
        [0.15 * ((m - n) / (m + n)) ** 2 for m, n in zip(lengths[::2], lengths[1::2], strict=True)]
    )
    found = single(table, "divergence_excess_allowance", "group", group="de")
    assert found == pytest.approx(allowance)
    pair = one(table, "divergence_pair", "pair", layer=5)
    assert (pair["group"], pair["group_b"]) == ("de", "en")
    assert pair["value"] == pytest.approx(whole, abs=1e-6)
    assert pair["num_tokens"] == sum(lengths)
    other = single(table, "divergence_floor_other")
    every = [
        scalar_divergence(profile("en", i, even), profile("en", j, odd))
        for i in items
        for j in items
        if i != j
    ]
    assert min(every) <= other <= max(every)

    frequency = {}
    for group in ("en", "de"):
        parts = np.split(selected, cuts)
        mine = [part for part, name in zip(parts, groups, strict=True) if name == group]
        shares = [[np.mean((part == e).any(axis=1)) for e in range(6)] for part in mine]
        frequency[group] = np.mean(shares, axis=0)
        jaccard = [
            np.mean(
                [len({*a} & {*b}) / len({*a} | {*b}) for a, b in combinations(part.tolist(), 2)]
            )
            for part in mine
        ]
        found = single(table, "consistency", "group", group=group, layer=5)
        assert found == pytest.approx(np.mean(jaccard))
        profiles = [texts[group, i].mean(axis=0).tolist() for i in items]
        entropies = np.mean([scalar_entropy(p) for p in profiles])
        found = single(table, "profile_entropy", "group", group=group, layer=5)
        assert found == pytest.approx(entropies, abs=1e-6)
    delta = select(table, metric="frequency_delta", group="de").set_index("expert")["value"]
    expected = frequency["de"] - frequency["en"]
    assert delta.to_numpy(float) == pytest.approx(expected)
    for tau in (0.1, 0.2, 0.3):
        found = single(table, "num_language_experts", "group", group="de", tau=tau, layer=5)
        assert found == (expected > tau).sum()


def test_the_reference_in_other_clothes_has_no_divergence(tmp_path):
    rng = np.random.default_rng(4)
    texts = [random_probs(rng, n, 8) for n in (20, 33, 15, 28)]
    probs = np.concatenate([text for text in texts for _ in range(2)])
    trace = write_trace(
        tmp_path / "t", {"00": top_k_of(probs, 2)}, [len(t) for t in texts for _ in range(2)],
        num_experts=8, probs={"00": probs}, groups=["en", "en_GB"] * 4,
        ids=[str(i // 2) for i in range(8)], reference_group="en",
    )  # fmt: skip
    table = run(trace)
    assert single(table, "divergence") == pytest.approx(0, abs=1e-9)
    assert single(table, "divergence_excess") == pytest.approx(0, abs=1e-9)
    assert (select(table, metric="frequency_delta")["value"] == 0).all()


def test_texts_cut_in_sequences_are_whole_items(tmp_path):
    rng = np.random.default_rng(5)
    lengths = [10, 10, 4, 8, 8, 8]
    probs = random_probs(rng, 48, 5, scale=2)
    trace = write_trace(
        tmp_path / "t", {"00": top_k_of(probs, 1)}, lengths, num_experts=5, probs={"00": probs},
        groups=["en"] * 3 + ["fr"] * 3, ids=["a", "a", "b", "a", "a", "b"], reference_group="en",
    )  # fmt: skip
    expected = [
        divergence(probs[:20].sum(axis=0), probs[24:40].sum(axis=0)),
        divergence(probs[20:24].sum(axis=0), probs[40:].sum(axis=0)),
    ]
    table = run(trace)
    assert single(table, "divergence") == pytest.approx(np.mean(expected), abs=1e-6)
    assert single(table, "num_items", "group", group="fr") == 2


def test_names_of_experts_do_not_matter(tmp_path, planted):
    order = np.random.default_rng(6).permutation(32)
    layers = [own, own, shared, shared, shared, shared, own, own]
    moved = [lambda g, i, rng, f=f: f(g, i, rng)[:, order] for f in layers]
    table = run(parallel(tmp_path / "t", moved))
    for metric in ("divergence", "divergence_excess", "num_multilingual_experts", "consistency"):
        one_, other = (select(t, metric=metric)["value"].to_numpy(float) for t in (planted, table))
        assert other == pytest.approx(one_, abs=1e-6)


def test_intervals_cover_the_long_run(tmp_path):
    many = run(parallel(tmp_path / "many", [own], num_items=100))
    truth = single(many, "divergence", "group", group="de", layer=0)
    covered = []
    for trial in range(10):

        def moved(g, i, rng, trial=trial):
            return own(g, 10 * trial + i, rng)

        table = run(parallel(tmp_path / str(trial), [moved], num_items=10))
        row = one(table, "divergence", "group", group="de", layer=0)
        covered.append(row["low"] <= truth <= row["high"])
    assert sum(covered) >= 7


def test_measured_score_is_the_likelihood_of_the_shared_items(tmp_path):
    rng = np.random.default_rng(7)
    languages = ("en", "de", "fr", "sw", "zh", "hi")
    nll = rng.uniform(1, 3, 24 * 6).astype(np.float32)
    trace = parallel(tmp_path / "t", [own, shared, own], languages=languages, nll=nll)
    table = run(trace)
    scores = select(table, metric="score", score_source="measured").set_index("group")["value"]
    assert scores["sw"] == pytest.approx(-59 * nll.reshape(24, 6)[:, 3].mean(), rel=1e-6)
    assert single(table, "divergence_score_num_groups") == 5
    value = select(table, metric="divergence", scope="group", layer=0).set_index("group")["value"]
    expected = stats.pearsonr(value, scores[value.index])
    found = one(table, "divergence_score_r", "layer", layer=0, correlation="pearson")
    assert found["value"] == pytest.approx(expected.statistic)
    interval = expected.confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    ranks = stats.spearmanr(value, scores[value.index]).statistic
    found = single(table, "divergence_score_r", "layer", layer=0, correlation="spearman")
    assert found == pytest.approx(ranks)


def test_given_scores_come_first(tmp_path):
    scores = {"de": 0.9, "fr": 0.8, "sw": 0.2, "zh": 0.5, "xx": 0.1}
    trace = parallel(tmp_path / "t", [own], nll=np.ones(120))
    table = run(trace, scores=scores)
    found = select(table, metric="score").set_index("group")
    assert found["value"].to_dict() == {k: v for k, v in scores.items() if k != "xx"}
    assert (found["score_source"] == "given").all()
    assert single(table, "divergence_score_num_groups") == 4
    assert any("the score" in finding.text for finding in multilingual.findings(table))
    few = run(trace, scores={"de": 1.0, "fr": 0.5})
    assert "divergence_score_r" not in set(few["metric"])


def test_task_experts_are_set_against_multilingual_ones(tmp_path):
    def layer(g, i, rng):
        return (4 * OWN[8] if g == 3 else 3 * OWN[g]) + rng.normal(size=(60, 32))

    languages = ("en", "de", "fr", "math")
    ids = [f"task {i}" if g == 3 else f"text {i}" for i in range(12) for g in range(4)]
    table = run(parallel(tmp_path / "t", [layer] * 2, languages=languages, num_items=12, ids=ids))
    assert set(select(table, metric="divergence", scope="group")["group"]) == {"de", "fr"}
    assert set(select(table, metric="num_task_experts")["group"]) == {"math"}
    delta = select(table, metric="frequency_delta")
    wide = delta.pivot(index=["layer", "expert"], columns="group", values="value") > 0.3
    multilingual_set = wide["de"] | wide["fr"]
    row = one(table, "expert_overlap", "group", tau=0.3)
    assert row["group"] == "math"
    assert row["value"] == (wide["math"] & multilingual_set).sum()
    expected = sum(wide.loc[i, "math"].sum() * multilingual_set.loc[i].sum() / 32 for i in (0, 1))
    assert single(table, "expert_overlap_expected", "group", tau=0.3) == pytest.approx(expected)
    assert any("experts of math" in finding.text for finding in multilingual.findings(table))


def test_without_tasks_languages_are_set_against_each_other(planted):
    pairs = select(planted, metric="expert_overlap", scope="pair", tau=0.3)
    assert len(pairs) == 6
    shown = select(planted, metric="expert_overlap_p_more", scope="pair", tau=0.3)
    assert shown["value"].between(0, 1).all()


def test_expert_intervals_are_given_when_asked_for(tmp_path):
    trace = parallel(tmp_path / "t", [shared])
    delta = select(run(trace, expert_intervals=True), metric="frequency_delta")
    assert (delta["low"] <= delta["value"]).all()
    assert (delta["value"] <= delta["high"]).all()
    inside = (delta["low"] <= 0) & (delta["high"] >= 0)
    assert inside.mean() > 0.85
    assert select(run(trace), metric="frequency_delta")["low"].isna().all()


def test_only_pairs_without_a_reference(tmp_path):
    trace = parallel(tmp_path / "t", [own, shared], reference_group=None)
    metrics = set(run(trace)["metric"])
    assert "divergence_pair" in metrics
    assert not metrics & {"divergence", "divergence_floor_half", "frequency_delta"}
    assert "--reference-group" in limits(trace)


def test_only_single_groups_without_shared_ids(tmp_path):
    trace = parallel(tmp_path / "t", [own, shared], ids=[str(i) for i in range(120)])
    metrics = set(run(trace)["metric"])
    assert not any(metric.startswith("divergence") for metric in metrics)
    assert {"consistency", "profile_entropy", "num_multilingual_experts"} <= metrics
    assert "--id-column" in limits(trace)


def test_without_groups_there_is_nothing_to_compare(tmp_path):
    trace = parallel(tmp_path / "t", [own], groups=None, reference_group=None)
    results = analysis.run([trace], only=["multilingual"])
    assert "--group-column" in results.skipped["multilingual"]


def test_limits_name_few_languages_and_unmeasured_scores(tmp_path):
    few = parallel(tmp_path / "few", [own], languages=("en", "de", "fr"), nll=np.ones(72))
    assert "takes 4 languages" in limits(few)
    assert "divergence_score_r" not in set(run(few)["metric"])
    assert "--keep nll" in limits(parallel(tmp_path / "enough", [own]))


def test_samples_are_the_same_however_the_trace_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(multilingual, "MAX_ITEMS", 10)
    monkeypatch.setattr(multilingual, "MAX_SIMILARITIES", 60_000)
    coarse = parallel(tmp_path / "coarse", [own, shared])
    fine = parallel(tmp_path / "fine", [own, shared], row_group_tokens=1, num_parts=7)
    table = run(coarse)
    np.testing.assert_allclose(
        table["value"].to_numpy(float), run(fine)["value"].to_numpy(float), atol=1e-9
    )
    assert single(table, "num_items", "group", group="de") == 10
    assert one(table, "divergence", "group", group="de", layer=0)["num_tokens"] == 10 * 2 * 60
    compared = one(table, "consistency", "group", group="de", layer=0)["num_tokens"]
    assert 0 < compared < 24 * 60
    found = limits(coarse)
    assert "Divergence on 10 ids" in found
    assert "Consistency on" in found


def test_no_u_is_said_as_plainly(tmp_path):
    texts = [f.text for f in multilingual.findings(run(parallel(tmp_path / "t", [own] * 4)))]
    assert any(text.startswith("No U of divergence") for text in texts)
    rising = run(parallel(tmp_path / "u", [shared, shared, shared, own]))
    assert any("one end alone rises" in f.text for f in multilingual.findings(rising))


def test_experts_of_very_many_pairs_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(multilingual, "MAX_OVERLAPS", 5)
    trace = parallel(tmp_path / "t", [own])
    assert "expert_overlap" not in set(run(trace)["metric"])
    assert "10 pairs are more than 5" in limits(trace)


def test_lines_of_very_many_languages_are_named_at_both_ends():
    names = [f"language-{i:03}" for i in range(100)]
    labels = multilingual.line_labels(names)
    assert labels[:20] == names[:20]
    assert labels[-20:] == names[-20:]
    assert set(labels[20:80]) == {""}
    assert multilingual.line_labels(names[:3]) == names[:3]
