import numpy as np
import pytest

from moetools.intervals import (
    NUM_BLOCKS,
    Cells,
    basic_interval,
    block_of,
    jackknife_interval,
    replicate_weights,
)


def test_blocks_do_not_depend_on_company_or_order():
    numbers = np.arange(1000, dtype=np.int32)
    blocks = block_of(numbers)
    assert (block_of(numbers[::-1])[::-1] == blocks).all()
    assert (block_of(numbers[17:18]) == blocks[17]).all()
    assert blocks.min() >= 0
    assert blocks.max() < NUM_BLOCKS
    assert len(np.unique(blocks)) > 0.95 * NUM_BLOCKS


def test_weights_draw_as_many_occupied_blocks_of_each_stratum():
    occupied = np.zeros((3, 7), dtype=bool)
    occupied[0, :5] = True
    occupied[2, 3] = True
    weights = replicate_weights(occupied, num_replicates=50)
    assert weights.shape == (50, 3, 7)
    assert (weights[:, ~occupied] == 0).all()
    assert (weights.sum(axis=2) == [5, 0, 1]).all()
    assert weights[:, 0, :5].std() > 0


def test_one_block_has_no_interval():
    occupied = np.array([True, False])
    weights = replicate_weights(occupied)
    low, high = basic_interval(np.array([3.0]), weights @ np.array([[3.0], [0.0]]))
    assert np.isnan(low).all()
    assert np.isnan(high).all()
    assert np.isnan(jackknife_interval(1.0, np.array([1.0]))).all()
    assert np.isnan(basic_interval(np.ones(2), np.empty((0, 2)))).all()


def test_basic_interval_by_hand():
    replicates = np.arange(101.0)[:, None] + [0.0, 1000.0]
    low, high = basic_interval(np.array([60.0, 1050.0]), replicates, level=0.9)
    assert low.tolist() == [120 - 95, 2100 - 1095]
    assert high.tolist() == [120 - 5, 2100 - 1005]
    low, high = basic_interval(60.0, replicates[:, 0], level=0.9, bounds=(30, 100))
    assert (float(low), float(high)) == (30, 100)


def test_unknown_replicates_are_left_out():
    replicates = np.array([[1.0, np.nan], [2.0, np.nan], [np.nan, np.nan], [3.0, 1.0]])
    low, high = basic_interval(np.array([2.0, 1.0]), replicates)
    only = basic_interval(np.array([2.0]), replicates[[0, 1, 3], :1])
    assert (low[0], high[0]) == (only[0][0], only[1][0])
    assert np.isnan(low[1])
    assert np.isnan(high[1])


def test_jackknife_of_a_mean_is_the_t_interval():
    from scipy import stats

    values = np.random.default_rng(0).normal(size=12)
    leave_one_out = (values.sum() - values) / 11
    low, high = jackknife_interval(values.mean(), leave_one_out)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    np.testing.assert_allclose((low, high), expected)


@pytest.mark.parametrize("num_sequences", [60, 1000])
def test_intervals_cover_the_truth(num_sequences):
    """Ratio of sums over sequences of unequal length, truth 0.3."""
    rng = np.random.default_rng(1)
    covered = []
    for trial in range(150):
        lengths = rng.integers(5, 200, num_sequences)
        own = rng.beta(3, 7, num_sequences)
        hits = rng.binomial(lengths, own)
        cells = Cells(())
        place = cells.add(
            np.arange(num_sequences, dtype=np.int32),
            np.full(num_sequences, -1, dtype=np.int32),
            lengths,
        )
        sums = np.zeros((len(cells), 2))
        np.add.at(sums, place, np.stack([hits, lengths], axis=1))
        (scope,) = cells.scopes(seed=trial)
        draws = scope.draws(sums)
        ratio = draws[:, 0] / draws[:, 1]
        low, high = basic_interval(ratio[0], ratio[1:])
        covered.append(low <= 0.3 <= high)
    assert 0.88 <= np.mean(covered) <= 0.99


def test_group_blocks_are_drawn_within_their_group():
    cells = Cells(("a", "b", "empty"))
    sequence = np.arange(100, dtype=np.int32)
    group = np.where(sequence < 60, 0, np.where(sequence < 90, 1, -1)).astype(np.int32)
    place = cells.add(sequence, group, np.full(100, 10))
    of_group = np.zeros((len(cells), 3), dtype=np.int64)
    np.add.at(of_group, place, np.eye(3, dtype=np.int64)[group])
    scopes = list(cells.scopes())
    assert [(scope.group, scope.num_tokens) for scope in scopes] == [
        (None, 1000),
        ("a", 600),
        ("b", 300),
    ]
    whole, first, second = (scope.draws(of_group) for scope in scopes)
    assert whole.shape == (1001, 3)
    assert whole[0].tolist() == [60, 30, 10]
    assert (whole[1:].min(axis=0) > 0).all()
    assert (first[:, 1:] == 0).all()
    assert (second[:, [0, 2]] == 0).all()
    assert first[1:, 0].std() > 0
    assert second[1:, 1].mean() == pytest.approx(30, rel=0.05)


def test_merged_cells_equal_whole_ones():
    sequence = np.arange(30, dtype=np.int32)
    group = (sequence % 3 - 1).astype(np.int32)
    lengths = np.arange(30) + 1
    whole, left, right = Cells(("a", "b")), Cells(("a", "b")), Cells(("a", "b"))
    whole.add(sequence, group, lengths)
    left.add(sequence[:11], group[:11], lengths[:11])
    right.add(sequence[11:], group[11:], lengths[11:])
    left.merge(right)
    assert (left.num_tokens == whole.num_tokens).all()


def test_many_groups_have_fewer_blocks():
    assert Cells(()).num_blocks == NUM_BLOCKS
    assert len(Cells([f"g{i}" for i in range(49)])) == 50 * 20
