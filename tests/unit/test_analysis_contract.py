"""What every file of `analyses/` must stand, whatever it computes."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import softmax
from synthetic import random_ids, random_probs, top_k_of, write_trace

from moetools import analysis, registry
from moetools.analysis import KEY_COLUMNS, SCOPES, VALUE_COLUMNS, Analysis, Options
from moetools.errors import RequestError
from moetools.reporting import style
from moetools.trace_store import TraceStore

NAMES = registry.names("analyses")
ALONE = [name for name in NAMES if name not in ("coupling", "drift")]
"""Those that need neither a checkpoint nor a second trace."""
E, K = 6, 2


def declared(name: str) -> Analysis:
    found = registry.load("analyses", name).ANALYSIS
    assert isinstance(found, Analysis)
    return found


def make(path, *, kind="plain", row_group_tokens=1 << 16, num_parts=1, seed=0) -> TraceStore:
    """A trace of the same texts whatever the seed, which decides their routing."""
    texts, rng = np.random.default_rng(0), np.random.default_rng(seed)
    lengths = [37] if kind == "single" else texts.integers(1, 50, 24).tolist()
    num_tokens = sum(lengths)
    logits = {name: rng.normal(size=(num_tokens, E)) for name in ("00", "02", "03")}
    probs = {name: softmax(values, axis=1) for name, values in logits.items()}
    ids = {name: top_k_of(values, K) for name, values in probs.items()}
    sizes = dict.fromkeys(ids, E)
    groups = [("de", "en", "fr", None)[i % 4] for i in range(len(lengths))]
    if kind == "unused":
        ids["02"] = random_ids(rng, num_tokens, E - 1, K)
    if kind == "dropped":
        ids["02"] = np.where(rng.random((num_tokens, 1)) < 0.1, -1, ids["02"])
    if kind == "attention":
        ids["02.attention"], sizes["02.attention"] = random_ids(rng, num_tokens, 4, 2), 4
    if kind == "uneven":
        ids["03"], sizes["03"] = random_ids(rng, num_tokens, 9, 3), 9
        probs["03"] = random_probs(rng, num_tokens, 9)
    if kind == "top1":
        ids = {name: values[:, :1] for name, values in ids.items()}
    kept = {}
    if kind in ("plain", "no_groups", "single"):
        selected = {name: np.take_along_axis(probs[name], ids[name], axis=1) for name in ids}
        kept = {
            "logits": logits,
            "inputs": {name: rng.normal(size=(num_tokens, 5)) for name in ids},
            "norms": {name: 1 + rng.random((num_tokens, K)) for name in ids},
            "peaks": {name: rng.random((num_tokens, K)) for name in ids},
            "shares": {
                name: values / values.sum(axis=1, keepdims=True)
                for name, values in selected.items()
            },
            "collinearity": {name: rng.random((num_tokens, 3)) for name in ids},
        }
    return write_trace(
        path,
        ids,
        lengths,
        num_experts=sizes,
        ids=[f"item {i // 4}" for i in range(len(lengths))],
        reference_group=None if kind in ("no_groups", "top1") else "en",
        kept=kept,
        nll=None if kind == "uneven" else 3 + rng.random(len(lengths)),
        groups=None if kind == "no_groups" else groups,
        token_id=texts.zipf(1.5, num_tokens) % 30,
        probs=None if kind == "no_rule" else probs,
        row_group_tokens=row_group_tokens,
        num_parts=num_parts,
    )


@pytest.fixture
def options(tmp_path) -> Options:
    """With a reference to compare with, cut like no other trace."""
    return Options(reference=make(tmp_path / "reference", row_group_tokens=100, seed=2))


def fed(name: str, trace: TraceStore, options: Options, batches=None):
    found = declared(name)
    needed = found.columns(trace, options)
    assert not isinstance(needed, str)
    state = found.start(trace, options)
    for batch in batches if batches is not None else trace.batches(needed):
        state.update(batch)
    return state


def tidy(state) -> pd.DataFrame:
    return analysis.tidy([state.table()], trace="t")


def assert_same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_declares_itself(name):
    found = declared(name)
    assert found.title
    assert found.source
    assert len(found.about.split()) > 15


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "kind",
    ["plain", "no_groups", "unused", "dropped", "attention", "uneven", "top1", "single", "no_rule"],
)
def test_table_is_tidy_on_every_kind_of_trace(name, kind, tmp_path):
    trace = make(tmp_path / "trace", kind=kind)
    reference = make(tmp_path / "reference", kind=kind, seed=2)
    results = analysis.run([trace], only=[name], options=Options(reference=reference))
    if name in results.skipped:
        assert results.skipped[name].endswith(".")
        assert name not in results.tables
        return
    table = results.tables[name]
    columns = list(table.columns)
    assert columns[: len(KEY_COLUMNS)] == list(KEY_COLUMNS)
    assert columns[-len(VALUE_COLUMNS) :] == list(VALUE_COLUMNS)
    assert set(table["scope"]) <= set(SCOPES)
    assert (table["trace"] == "trace").all()
    assert table["metric"].notna().all()
    assert table["num_tokens"].notna().all()
    assert not np.isinf(table[["value", "low", "high"]].to_numpy(float)).any()
    keys = [column for column in columns if column not in VALUE_COLUMNS]
    assert not table.duplicated(keys).any()
    within = table.dropna(subset=["low", "high"])
    assert (within["low"] <= within["high"]).all()
    if kind == "single":
        assert table["low"].isna().all()
        assert table["high"].isna().all()
    if kind == "no_groups":
        assert table["group"].isna().all()
    if kind in ("plain", "attention"):
        assert set(table.loc[table["scope"] == "layer", "layer"]) <= {0, 2, 3}
        assert table["value"].notna().any()
    found = declared(name)
    for finding in found.findings(table):
        assert 0 <= finding.weight <= 1
        assert finding.metric in set(table["metric"])
        assert finding.text.endswith(".")
        assert "nan" not in finding.text
    with style.applied():
        pictures = [(picture.name, picture.caption) for picture in found.plots(table)]
    assert len({picture for picture, _ in pictures}) == len(pictures)
    assert all(caption.endswith(".") for _, caption in pictures)


@pytest.mark.parametrize("name", ALONE)
def test_two_traces_are_drawn_together(name, tmp_path):
    traces = [make(tmp_path / "a"), make(tmp_path / "b", seed=1)]
    results = analysis.run(traces, only=[name])
    assert {"b"} <= set(results.tables[name]["trace"]) <= {"a", "b"}
    with style.applied():
        names = [picture.name for picture in declared(name).plots(results.tables[name])]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ALONE)
def test_parts_merge_to_the_whole(name, tmp_path, options):
    trace = make(tmp_path / "trace", row_group_tokens=60)
    batches = list(trace.batches(declared(name).columns(trace, options)))
    assert len(batches) > 4
    whole = tidy(fed(name, trace, options))
    merged = fed(name, trace, options, [])
    for part in (batches[:1], batches[1:3], batches[3:]):
        merged.merge(fed(name, trace, options, part))
    assert_same(tidy(merged), whole)


@pytest.mark.parametrize("name", ALONE)
def test_neither_batches_nor_asking_twice_change_the_table(name, tmp_path, options):
    coarse = make(tmp_path / "coarse")
    fine = make(tmp_path / "fine", row_group_tokens=1, num_parts=5)
    state = fed(name, coarse, options)
    table = tidy(state)
    assert_same(table, tidy(fed(name, fine, options)))
    assert_same(table, tidy(state))


@pytest.mark.parametrize("name", ["load", "co_activation"])
def test_pieces_of_one_text_are_not_independent(name, tmp_path):
    """Cutting texts into sequences leaves what does not look at sequences as it was."""
    rng = np.random.default_rng(0)
    ids = {"00": random_ids(rng, 40 * 64, E, K)}
    whole = write_trace(tmp_path / "whole", ids, [64] * 40, num_experts=E)
    cut = write_trace(
        tmp_path / "cut", ids, [8] * 320, num_experts=E, texts=[i // 8 for i in range(320)]
    )
    found = [analysis.run([trace], only=[name]).tables[name] for trace in (whole, cut)]
    keys = ["metric", "scope", "layer", "expert", "expert_b"]
    one, other = (
        table[~table["metric"].str.startswith("layer_nmi")]
        .drop(columns="trace").sort_values(keys).reset_index(drop=True)
        for table in found
    )  # fmt: skip
    pd.testing.assert_frame_equal(one, other)
    assert one["low"].notna().any()


def test_reasons_and_limits_name_what_is_missing(tmp_path):
    results = analysis.run([make(tmp_path / "trace", kind="no_rule")])
    assert "unknown" in " ".join(results.limits["entropy"])
    results = analysis.run([make(tmp_path / "other", kind="no_groups")], only=["specialization"])
    assert "--group-column" in " ".join(results.limits["specialization"])
    single = write_trace(
        tmp_path / "one", {"00": np.zeros((4, 1), int)}, [4], num_experts=2, groups=["a"]
    )
    results = analysis.run([single, make(tmp_path / "third")], only=["co_activation"])
    assert results.skipped["co_activation"].startswith("one: ")
    assert set(results.tables["co_activation"]["trace"]) == {"third"}


def test_unknown_names_are_refused():
    with pytest.raises(RequestError, match="Did you mean 'load'"):
        analysis.choose(only=["laod"])
    with pytest.raises(RequestError, match="no analysis"):
        analysis.choose(only=["load"], skip=["load"])


def test_rows_take_scalars_arrays_and_nothing():
    assert len(analysis.rows("m", "model", 1.0, group="a", layer=None)) == 1
    assert analysis.rows("m", "expert", [1.0, 2.0], layer=3)["layer"].tolist() == [3, 3]
    assert len(analysis.rows("m", "pair", np.empty(0), layer=3)) == 0
    with pytest.raises(ValueError, match="differ in length"):
        analysis.rows("m", "expert", [1.0, 2.0], expert=[1, 2, 3])
