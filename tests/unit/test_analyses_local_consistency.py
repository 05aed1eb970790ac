import numpy as np
import pandas as pd
import pytest
from oracles import locality as oracle
from synthetic import random_ids, write_trace

from moetools import analysis
from moetools.analyses import local_consistency
from moetools.analysis import Options, select, single
from moetools.cache_curves import FORESIGHT, SHARED
from moetools.registry import load

NAME = "local_consistency"
LENGTHS = [9, 3, 30, 18, 21, 12, 40, 5, 26, 33]
GROUPS = ["a", "b", "a", "b", None, "a", "b", "a", "b", "a"]


def run(trace, **options):
    return analysis.run([trace], only=[NAME], options=Options(**options)).tables[NAME]


def findings(table):
    return [f.text for f in load("analyses", NAME).ANALYSIS.findings(table)]


def sequences(ids, chosen=lambda group: True):
    """Tokens of the chosen sequences as lists of experts; dropped ones demand nothing."""
    ends = np.cumsum([0, *LENGTHS])
    return [
        [[e for e in token if e >= 0] for token in ids[ends[i] : ends[i + 1]].tolist()]
        for i in range(len(LENGTHS))
        if chosen(GROUPS[i])
    ]


def srp(routed, window):
    """SRP of `(sequences, E)` of some layers by the definition."""
    counts = [
        f
        for tokens, num_experts in routed
        for row in oracle.window_counts(tokens, num_experts, window)
        for f in row
    ]
    return float(max(oracle.f1_at(alpha, counts, window) for alpha in range(window + 1)))


def hit_rate(routed, size, policy, *, window=1, strict=False, cold=True):
    hits = requests = 0
    for tokens, _ in routed:
        for sequence in tokens:
            cache = oracle.Cache(sequence, size, policy, window=window, strict=strict)
            hits += cache.num_hits + (cache.num_cold if cold else 0)
            requests += sum(map(len, sequence))
    return hits / requests


@pytest.fixture(scope="module")
def routed():
    """Selections of three layers; the last has another E and k, the second drops a token."""
    rng = np.random.default_rng(0)
    num_tokens = sum(LENGTHS)
    ids = {name: random_ids(rng, num_tokens, 6, 2) for name in ("01", "02")}
    ids["01"] = np.repeat(ids["01"], 3, axis=0)[:num_tokens]
    ids["02"][4] = -1
    ids["04"] = random_ids(rng, num_tokens, 8, 3)
    return ids


@pytest.fixture(scope="module")
def table(routed, tmp_path_factory):
    trace = write_trace(
        tmp_path_factory.mktemp("trace") / "t", routed, LENGTHS,
        num_experts={"01": 6, "02": 6, "04": 8}, groups=GROUPS, row_group_tokens=40, num_parts=2,
    )  # fmt: skip
    return run(trace)


@pytest.mark.parametrize("window", [4, 16])
def test_srp_of_every_scope(table, routed, window):
    size = {"01": 6, "02": 6, "04": 8}
    every = {name: (sequences(ids), size[name]) for name, ids in routed.items()}
    for name, (tokens, num_experts) in every.items():
        found = single(table, "srp", "layer", layer=int(name), m=window)
        assert found == pytest.approx(srp([(tokens, num_experts)], window))
        for e in range(num_experts):
            only = [[[0] if e in token else [] for token in s] for s in tokens]
            found = single(table, "srp", "expert", layer=int(name), expert=e, m=window)
            assert found == pytest.approx(srp([(only, 1)], window))
    assert single(table, "srp", m=window) == pytest.approx(srp(every.values(), window))
    for group in "ab":
        own = [
            (sequences(ids, lambda g, group=group: g == group), size[name])
            for name, ids in routed.items()
        ]
        for layer, part in zip((1, 2, 4), own, strict=True):
            found = single(table, "srp", "group", group=group, layer=layer, m=window)
            assert found == pytest.approx(srp([part], window))
        found = single(table, "srp", "group", group=group, layer=None, m=window)
        assert found == pytest.approx(srp(own, window))


def test_windows_longer_than_every_sequence_are_null(table):
    found = select(table, metric="srp", m=256)
    assert len(found)
    assert found["value"].isna().all()
    assert (found["num_tokens"] == 0).all()
    assert (select(table, metric="srp", scope="model", m=16)["num_tokens"] == 168).all()


@pytest.mark.parametrize("accounting", ["paper", "strict"])
@pytest.mark.parametrize(
    ("policy", "m"), [("lru", None), ("lfu", None), ("belady", None), ("sch", 4)]
)
def test_caches_of_every_scope(table, routed, policy, m, accounting):
    strict = accounting == "strict"
    metric = "sch_cache" if policy == "sch" else policy
    wanted = {"metric": metric, "m": m, "accounting": accounting, "pool": "layer", "cold": "hit"}
    every = [(sequences(ids), None) for ids in routed.values()]
    options = {"window": m or 1, "strict": strict}
    for layer, part in zip((1, 2, 4), every, strict=True):
        curve = select(table, scope="layer", layer=layer, **wanted)
        smallest = (3 if layer == 4 else 2) if strict else 1
        assert curve["cache_size"].tolist() == list(range(smallest, 9 if layer == 4 else 7))
        for size, value in zip(curve["cache_size"], curve["value"], strict=True):
            assert value == pytest.approx(hit_rate([part], size, policy, **options))
    for cold in (True, False):
        curve = select(table, scope="model", **{**wanted, "cold": "hit" if cold else "miss"})
        for size, value in zip(curve["cache_size"], curve["value"], strict=True):
            assert value == pytest.approx(hit_rate(every, size, policy, cold=cold, **options))
    own = [(sequences(ids, lambda g: g == "a"), None) for ids in routed.values()]
    curve = select(table, scope="group", group="a", **wanted)
    assert len(curve) == (6 if strict else 8)
    for size, value in zip(curve["cache_size"], curve["value"], strict=True):
        assert value == pytest.approx(hit_rate(own, size, policy, **options))


def test_hit_rates_of_experts(table, routed):
    for accounting in ("paper", "strict"):
        caches = [
            oracle.Cache(tokens, 3, "lfu", strict=accounting == "strict")
            for tokens in sequences(routed["02"])
        ]
        for e in range(6):
            served = sum(c.hits.get(e, 0) + c.cold.get(e, 0) for c in caches)
            requests = int((routed["02"] == e).sum())
            found = single(
                table, "lfu", "expert", layer=2, expert=e, cache_size=3, accounting=accounting
            )
            assert found == pytest.approx(served / requests)


def test_shared_cache(table, routed):
    """All layers of a token are looked up together, in one cache."""
    start = {"01": 0, "02": 6, "04": 12}
    together = np.concatenate(
        [np.where(ids < 0, -1, ids + start[name]) for name, ids in routed.items()], axis=1
    )
    every = [(sequences(together), 20)]
    for policy, metric, m in (("sch", "sch_cache", 16), ("lru", "lru", None)):
        for accounting in ("paper", "strict"):
            curve = select(
                table, metric=metric, scope="model", pool="shared", m=m, accounting=accounting
            )
            first = 9 if accounting == "strict" else 3
            assert curve["cache_size"].tolist() == [*range(first, 20, 3), 20]
            for size, value in zip(curve["cache_size"], curve["value"], strict=True):
                strict = accounting == "strict"
                expected = hit_rate(every, int(size), policy, window=m or 1, strict=strict)
                assert value == pytest.approx(expected)


def test_best_sets_of_windows(table, routed):
    counts = oracle.window_counts(sequences(routed["04"]), 8, 4)
    curve = select(table, metric="sch_window", scope="layer", layer=4, m=4)
    assert curve["value"].tolist() == pytest.approx(
        [float(oracle.sch_window(counts, size)) for size in range(1, 9)]
    )
    assert curve["rho"].tolist() == pytest.approx([size / 3 for size in range(1, 9)])


def test_chance_levels(table):
    assert single(table, "srp_chance_uniform", "layer", layer=1, m=16) == pytest.approx(
        float(local_consistency.locality.chance_performance(16, [2 / 6]).srp)
    )
    for name in ("uniform", "skewed"):
        value, chance = (single(table, metric, m=16) for metric in ("srp", f"srp_chance_{name}"))
        found = single(table, f"srp_adjusted_{name}", m=16)
        assert found == pytest.approx((value - chance) / (1 - chance))
    uniform, skewed = (
        single(table, f"srp_chance_{name}", "layer", layer=1, m=16)
        for name in ("uniform", "skewed")
    )
    assert uniform < skewed


def test_intervals(table, routed, tmp_path):
    scopes = table[table["scope"].isin(("model", "group", "layer"))]
    rated = scopes[scopes["metric"].isin(("srp", "lru", "sch_cache", "sch_window"))]
    rated = rated.dropna(subset="value")
    assert rated["low"].notna().all()
    assert (rated["low"] <= rated["value"]).all()
    assert (rated["value"] <= rated["high"]).all()
    experts = select(table, metric="srp", scope="expert")
    assert experts["low"].isna().all()
    trace = write_trace(
        tmp_path / "t", routed, LENGTHS, num_experts={"01": 6, "02": 6, "04": 8}, groups=GROUPS
    )
    asked = select(run(trace, expert_intervals=True), metric="srp", scope="expert", m=4)
    pd.testing.assert_series_equal(
        asked["value"].reset_index(drop=True),
        select(experts, m=4)["value"].reset_index(drop=True),
    )
    assert asked["low"].notna().all()


def test_long_traces_are_sampled(routed, tmp_path, monkeypatch):
    """Every n-th sequence: the numbers are those of a trace of these sequences alone."""
    num_experts = {"01": 6, "02": 6, "04": 8}
    trace = write_trace(tmp_path / "t", routed, LENGTHS, num_experts=num_experts)
    # Slots times requests of one token: 6 * 2 + 6 * 2 + 8 * 3 = 48, and shared 20 * 7 = 140.
    monkeypatch.setattr(local_consistency, "MAX_STEPS", sum(LENGTHS) * 48 // 2)
    assert local_consistency.strides(trace) == (2, 6)
    own, shared = local_consistency.limits(trace, local_consistency.start(trace, Options()))
    assert "sch_cache" in own
    assert "one sequence in 2" in own
    assert "one sequence in 6" in shared
    table = run(trace)
    sch = select(table, metric="sch_cache", pool="layer")
    assert set(sch["num_tokens"]) == {sum(LENGTHS[::2])}
    assert set(select(table, pool="shared")["num_tokens"]) == {LENGTHS[0] + LENGTHS[6]}
    assert set(select(table, metric="lru", pool="layer")["num_tokens"]) == {sum(LENGTHS)}
    ends = np.cumsum([0, *LENGTHS])
    kept = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in range(0, 10, 2)])
    part = write_trace(
        tmp_path / "part",
        {name: ids[kept] for name, ids in routed.items()},
        LENGTHS[::2],
        num_experts=num_experts,
    )
    monkeypatch.undo()
    alone = select(run(part), metric="sch_cache", pool="layer")
    assert sch["value"].tolist() == pytest.approx(alone["value"].tolist())


def test_curves_name_every_metric_once():
    assert len(set(SHARED)) == len(SHARED)
    assert len(set(FORESIGHT)) == len(FORESIGHT)


def test_findings_of_a_steady_router(tmp_path):
    """Experts change every 20 tokens: consistency in words, and a small cache is enough."""
    rng = np.random.default_rng(1)
    lengths = [100] * 12
    held = np.repeat(random_ids(rng, 60, 16, 2), 20, axis=0)
    loose = random_ids(rng, 1200, 16, 2)
    groups = ["calm", "busy"] * 6
    calm = np.repeat([group == "calm" for group in groups], lengths)[:, None]
    ids = {"00": held, "01": np.where(calm, held, loose), "02": held}
    table = run(write_trace(tmp_path / "t", ids, lengths, num_experts=16, groups=groups))
    steady, group, cache, knee = findings(table)
    assert steady.startswith("The router keeps its experts from token to token")
    assert f"SRP is {single(table, 'srp', m=16):.2f}, by chance 0.32" in steady
    assert "least in layer 1" in steady
    assert "higher in calm (SRP" in group
    assert "than in busy" in group
    size = int(single(table, "cache_size_for", policy="lru", served=0.9))
    assert cache.startswith(f"An LRU cache of {size} of 16 experts per layer serves 90 %")
    rates = select(
        table, metric="lru", scope="model", pool="layer", accounting="strict", cold="hit"
    )
    reached = rates[rates["value"] >= 0.9]
    assert size == int(reached["cache_size"].min())
    assert f"{int(single(table, 'cache_knee', policy='lru'))} experts per layer" in knee


def test_findings_of_a_random_router(tmp_path):
    rng = np.random.default_rng(2)
    ids = {"00": random_ids(rng, 4000, 16, 2)}
    table = run(write_trace(tmp_path / "t", ids, [400] * 10, num_experts=16))
    first, *_, bend = findings(table)
    assert first.startswith("The router does not keep its experts")
    assert bend.startswith("The LRU curve has no knee")
    assert select(table, metric="cache_knee", scope="model", policy="lru")["value"].isna().all()
    assert select(table, pool="shared").empty
