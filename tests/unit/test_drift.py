"""Comparing two routings of the same tokens: hand cases, and a brute-force oracle."""

import numpy as np
import pytest
from synthetic import random_ids, write_trace

from moetools import drift
from moetools.errors import TraceError
from moetools.paired_traces import PairedReader, same_tokens

E = 6


def compared(ids_a, ids_b, weights_a=None, weights_b=None, num_experts=E, lengths=None):
    """Metrics over all tokens."""
    ids_a, ids_b = np.array(ids_a, np.uint8), np.array(ids_b, np.uint8)
    lengths = [len(ids_a)] if lengths is None else lengths
    weights = [
        np.full(ids.shape, 1 / ids.shape[1], np.float32) if w is None else np.array(w, np.float32)
        for ids, w in ((ids_a, weights_a), (ids_b, weights_b))
    ]
    sums = np.zeros((len(lengths), len(drift.SUMS)))
    offsets = np.cumsum([0, *lengths])
    drift.compare_selections(
        ids_a, ids_b, *weights, num_experts, offsets, np.arange(len(lengths)), sums
    )
    loads = [
        np.bincount(ids[ids < num_experts], minlength=num_experts).astype(float)
        for ids in (ids_a, ids_b)
    ]
    return drift.selection_metrics(sums.sum(axis=0), *loads)


def test_one_of_two_experts_stays():
    found = compared([[0, 1]], [[1, 2]], [[0.75, 0.25]], [[0.5, 0.5]])
    assert found["overlap_at_k"] == 0.5
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert found["exact_set"] == 0
    assert found["top1_agreement"] == 0
    assert found["weighted_overlap"] == pytest.approx(0.25)
    assert found["load_l1"] == pytest.approx(1)
    assert found["load_tv"] == pytest.approx(0.5)


def test_order_matters_for_the_first_expert_alone():
    found = compared([[0, 1], [2, 3]], [[1, 0], [2, 3]], [[3, 1], [3, 1]], [[3, 1], [3, 1]])
    assert found["overlap_at_k"] == found["jaccard"] == found["exact_set"] == 1
    assert found["top1_agreement"] == 0.5
    assert found["weighted_overlap"] == pytest.approx(0.75)
    assert found["load_js"] == found["load_tv"] == 0


def test_disjoint_loads_are_one_bit_apart():
    found = compared([[0, 1]] * 3, [[2, 3]] * 3)
    assert found["load_js"] == pytest.approx(1)
    assert found["load_tv"] == pytest.approx(1)
    assert found["load_l1"] == pytest.approx(2)
    assert found["load_entropy_change"] == pytest.approx(0)
    assert found["overlap_chance"] == 0


def test_dropped_tokens():
    both, one = compared([[0, 1], [255, 255]], [[0, 1], [255, 255]]), compared([[255]], [[0]])
    assert both["overlap_at_k"] == both["exact_set"] == both["top1_agreement"] == 1
    assert one["overlap_at_k"] == one["jaccard"] == one["exact_set"] == one["top1_agreement"] == 0
    assert np.isnan(one["weighted_overlap"])
    nothing = compared([[255]], [[255]])
    assert all(np.isnan(value) for value in nothing.values())


def test_other_numbers_of_experts_per_token():
    found = compared([[0, 1]], [[0, 1, 2]])
    assert found["overlap_at_k"] == 1
    assert found["jaccard"] == pytest.approx(2 / 3)
    assert found["exact_set"] == 0
    assert compared([[0, 1, 2]], [[0, 1]])["overlap_at_k"] == pytest.approx(2 / 3)


def test_against_sets_of_every_token():
    rng = np.random.default_rng(0)
    num_tokens, k = 300, 3
    ids_a, ids_b = (random_ids(rng, num_tokens, E, k) for _ in range(2))
    ids_a[rng.random(num_tokens) < 0.1] = 255
    ids_b[rng.random(num_tokens) < 0.1] = 255
    weights_a, weights_b = (rng.random((num_tokens, k)) for _ in range(2))
    found = compared(ids_a, ids_b, weights_a, weights_b, lengths=[100, 1, 199])
    rows = {name: [] for name in ("overlap_at_k", "jaccard", "exact_set", "top1_agreement")}
    weighted = []
    for a, b, wa, wb in zip(ids_a, ids_b, weights_a, weights_b, strict=True):
        set_a, set_b = set(a[a < E]), set(b[b < E])
        if not set_a | set_b:
            continue
        rows["overlap_at_k"].append(len(set_a & set_b) / len(set_a) if set_a else 0)
        rows["jaccard"].append(len(set_a & set_b) / len(set_a | set_b))
        rows["exact_set"].append(set_a == set_b)
        rows["top1_agreement"].append(a[0] == b[0])
        if set_a and set_b:
            dense = np.zeros((2, E))
            dense[0, a], dense[1, b] = wa / wa.sum(), wb / wb.sum()
            weighted.append(dense.min(axis=0).sum())
    for name, values in rows.items():
        assert found[name] == pytest.approx(np.mean(values)), name
    assert found["weighted_overlap"] == pytest.approx(np.mean(weighted), rel=1e-6)


def test_chance_is_what_shuffling_gives():
    rng = np.random.default_rng(1)
    skewed = np.argsort(rng.gumbel(size=(2, 20000, E)) + np.arange(E) / 2, axis=2)[..., -2:]
    found = compared(*skewed)
    assert found["overlap_chance"] == pytest.approx(found["overlap_at_k"], abs=0.01)
    assert found["overlap_chance"] > 2 / E + 0.05


def test_margins_keep_their_order():
    margin = np.array([0, 1e-7, 6e-5, 0.01, 0.5, 1, 60000, np.inf], np.float16)
    bins = drift.margin_bins(margin)
    assert (np.diff(bins) > 0).sum() >= 6
    assert bins[0] == 0
    assert bins[-1] == drift.NUM_MARGINS - 1
    assert drift.margin_bins(np.array([np.nan, -1, -0.0], np.float16)).tolist() == [-1, -1, 0]


def test_every_recorded_margin_has_a_bin_of_its_own():
    recorded = (np.arange(0, 0x7C00, 64, dtype=np.uint16)).view(np.float16)
    assert len(set(drift.margin_bins(recorded).tolist())) == len(recorded)


def test_deciles_divide_a_bin_across_a_border():
    shares = drift.decile_shares(np.array([0, 15, 5]))
    assert shares.shape == (10, 3)
    assert shares[:, 0].tolist() == [0] * 10
    assert shares[:, 1] == pytest.approx([2 / 15] * 7 + [1 / 15, 0, 0])
    assert shares[:, 2] == pytest.approx([0] * 7 + [1 / 5, 2 / 5, 2 / 5])


def test_comparisons_by_margin():
    sums = np.zeros((1, drift.NUM_MARGINS, 3), np.uint32)
    ids_a = np.array([[0, 1], [0, 1], [255, 255], [2, 3]], np.uint8)
    ids_b = np.array([[1, 0], [1, 2], [0, 1], [4, 5]], np.uint8)
    drift.compare_by_margin(
        ids_a, ids_b, np.array([3, 3, 3, -1]), E, np.array([0, 4]), np.zeros(1, np.int64), sums
    )
    assert sums[0, 3].tolist() == [2, 3, 1]
    assert sums.sum() == 6


@pytest.fixture
def two_cuts(tmp_path):
    """The same sequences, cut into row groups and files differently."""
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 30, 25).tolist()
    ids = random_ids(rng, sum(lengths), E, 2)
    token_id = rng.integers(0, 50, sum(lengths))

    def write(name, **cut):
        return write_trace(
            tmp_path / name, {"00": ids}, lengths, num_experts=E, token_id=token_id, **cut
        )

    return write("a", row_group_tokens=50), write("b", row_group_tokens=64, num_parts=3)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(None, None, 2)])
def test_paired_reader_recuts(two_cuts, order):
    a, b = two_cuts
    columns = ["experts.00", "token_id", "id"]
    for one, other in ((a, b), (b, a)):
        reader = PairedReader(other, columns)
        for batch in list(one.batches(columns))[order]:
            pair = reader.matching(batch)
            assert pair.sequence.tolist() == batch.sequence.tolist()
            assert pair.offsets.tolist() == batch.offsets.tolist()
            for name in ("experts.00", "token_id"):
                assert np.array_equal(pair.tokens[name], batch.tokens[name])
            assert pair.sequences["id"].tolist() == batch.sequences["id"].tolist()


def test_paired_reader_holds_one_batch(two_cuts):
    a, b = two_cuts
    reader = PairedReader(b, ["experts.00"])
    largest = max(batch.num_tokens for batch in b.batches(["experts.00"]))
    for batch in a.batches(["experts.00"]):
        reader.matching(batch)
        assert reader._held.num_tokens <= largest


def test_paired_reader_skips_sequences_of_the_other(tmp_path, two_cuts):
    a, _ = two_cuts
    batch = next(a.batches(["token_id"]))
    some = np.array([0, 2, 3])
    rows = np.concatenate([np.arange(*batch.offsets[i : i + 2]) for i in some])
    fewer = type(batch)(
        offsets=np.cumsum([0, *batch.lengths[some]]),
        sequence=batch.sequence[some],
        text=batch.text[some],
        group=batch.group[some],
        tokens={"token_id": batch.tokens["token_id"][rows]},
        sequences={},
    )
    pair = PairedReader(a, ["token_id"]).matching(fewer)
    assert np.array_equal(pair.tokens["token_id"], fewer.tokens["token_id"])


def test_paired_reader_names_what_is_missing(tmp_path):
    def write(name, lengths):
        return write_trace(
            tmp_path / name, {"00": np.zeros((sum(lengths), 1), int)}, lengths, num_experts=2
        )

    long, short, other = write("long", [3, 4, 5]), write("short", [3, 4]), write("o", [3, 3, 5])
    batch = next(long.batches(["token_id"]))
    with pytest.raises(TraceError, match="no sequence 2"):
        PairedReader(short, ["token_id"]).matching(batch)
    with pytest.raises(TraceError, match="sequence 1 has another length"):
        PairedReader(other, ["token_id"]).matching(batch)
    assert same_tokens(short, long)
    assert not same_tokens(long, short)
    assert not same_tokens(long, other)


def test_same_lengths_are_not_the_same_tokens(tmp_path, two_cuts):
    a, b = two_cuts
    changed = np.concatenate([batch.tokens["token_id"] for batch in a.batches(["token_id"])])
    changed[-1] += 1
    lengths = np.concatenate([batch.lengths for batch in a.batches([])])
    ids = np.zeros((len(changed), 1), int)
    c = write_trace(tmp_path / "c", {"00": ids}, lengths, num_experts=E, token_id=changed)
    assert same_tokens(a, b)
    assert not same_tokens(a, c)
