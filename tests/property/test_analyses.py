"""Properties of the analyses on random routing."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from synthetic import random_ids, write_trace

from moetools import analysis
from moetools.analysis import select
from moetools.information import entropy, gini, mutual_information, normalised_mutual_information
from moetools.intervals import basic_interval
from moetools.token_counts import PairCounts

untimed = settings(deadline=None)
COUNTS = arrays(np.int64, st.integers(2, 12), elements=st.integers(0, 50))


@untimed
@given(COUNTS.filter(lambda counts: counts.sum() > 0), st.integers(1, 9))
def test_unevenness_lies_between_even_and_one_hot(counts, factor):
    size = len(counts)
    assert -1e-12 <= gini(counts) <= 1 - 1 / size + 1e-12
    assert 0 <= entropy(counts) <= np.log(size) + 1e-12
    assert gini(counts * factor) == pytest.approx(gini(counts))
    assert entropy(counts * factor) == pytest.approx(entropy(counts))
    assert gini(counts[::-1]) == pytest.approx(gini(counts))
    even, one_hot = np.full(size, factor), np.eye(size)[0] * factor
    assert gini(even) == pytest.approx(0)
    assert gini(one_hot) == pytest.approx(1 - 1 / size)
    assert np.exp(entropy(even)) == pytest.approx(size)
    assert np.exp(entropy(one_hot)) == pytest.approx(1)


@untimed
@given(
    arrays(np.int64, st.tuples(st.integers(2, 6), st.integers(2, 6)), elements=st.integers(0, 9))
)
def test_information_is_symmetric_and_bounded(joint):
    if joint.sum() == 0:
        assert np.isnan(mutual_information(joint))
        return
    information = mutual_information(joint)
    assert information == pytest.approx(mutual_information(joint.T), abs=1e-9)
    bound = min(entropy(joint.sum(axis=0)), entropy(joint.sum(axis=1)))
    assert 0 <= information <= bound + 1e-9
    normalised = normalised_mutual_information(joint)
    assert np.isnan(normalised) or 0 <= normalised <= 1 + 1e-9


@untimed
@given(
    st.lists(st.tuples(st.integers(-1, 30), st.integers(0, 4)), max_size=120),
    st.integers(4, 40),
    st.integers(1, 7),
)
def test_pair_counts_do_not_depend_on_the_cutting(pairs, max_pairs, pieces):
    ids, experts = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    whole, parts = PairCounts(4, max_pairs), PairCounts(4, max_pairs)
    whole.add(ids, experts)
    for i in range(pieces):
        part = PairCounts(4, max_pairs)
        part.add(ids[i::pieces], experts[i::pieces])
        parts.merge(part)
    for one, other in zip(whole.table(), parts.table(), strict=True):
        assert (one == other).all()
    assert whole.sample == parts.sample
    exact = {(i, e) for i, e in pairs if i >= 0 and e < 4}
    if len(exact) <= max_pairs:
        assert whole.table()[1].sum() == sum(i >= 0 and e < 4 for i, e in pairs)


@untimed
@given(arrays(np.float64, (40, 3), elements=st.floats(-1e6, 1e6)), st.floats(-1e6, 1e6))
def test_intervals_are_ordered_and_move_with_the_data(replicates, shift):
    value = replicates.mean(axis=0)
    low, high = basic_interval(value, replicates)
    assert (low <= high).all()
    moved = basic_interval(value + shift, replicates + shift)
    np.testing.assert_allclose(moved, np.stack([low, high]) + shift, atol=1e-6, rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(4, 9))
def test_renaming_experts_renames_their_rows_and_changes_nothing_else(seed, top_k, num_experts):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 10).tolist()
    ids = {name: random_ids(rng, sum(lengths), num_experts, top_k) for name in ("00", "01")}
    renamed = rng.permutation(num_experts)
    token_id = rng.integers(0, 3, sum(lengths))
    tables = [
        tables_of({name: names[i] for name, i in ids.items()}, lengths, num_experts, token_id)
        for names in (np.arange(num_experts), renamed)
    ]
    for name in tables[0]:
        plain, other = (one[name] for one in tables)
        coarse = [
            table[table["scope"].isin(["model", "group", "layer"])].reset_index(drop=True)
            for table in (plain, other)
        ]
        # Owners of equally used ids, and the draws of the chance level, depend on the numbering.
        coarse = [table[~table["metric"].str.startswith("vocabulary")] for table in coarse]
        np.testing.assert_allclose(
            coarse[0]["value"].to_numpy(), coarse[1]["value"].to_numpy(), atol=1e-7
        )
    shares = [
        select(one["load"], metric="load_share", layer=1, group=None)["value"].to_numpy()
        for one in tables
    ]
    np.testing.assert_allclose(shares[1][renamed], shares[0])
    counts = np.bincount(ids["01"].ravel(), minlength=num_experts)
    np.testing.assert_allclose(shares[0], counts / counts.sum())


def tables_of(ids, lengths, num_experts, token_id):
    groups = [("a", "b")[i % 2] for i in range(len(lengths))]
    with tempfile.TemporaryDirectory() as folder:
        trace = write_trace(
            Path(folder) / "t",
            ids,
            lengths,
            num_experts=num_experts,
            groups=groups,
            token_id=token_id,
        )
        names = ["load", "entropy", "co_activation", "specialization"]
        return analysis.run([trace], only=names).tables
