import numpy as np
import pytest

from moetools.token_counts import PairCounts


def dense(counts, min_count=1):
    ids, table = counts.table(min_count)
    return dict(zip(ids.tolist(), table.tolist(), strict=True))


def test_counts_by_hand():
    counts = PairCounts(3, max_pairs=100)
    counts.add(np.array([7, 7, -1, 2]), np.array([0, 2, 1, 1], dtype=np.uint8))
    counts.add(np.array([7, 5]), np.array([2, 255], dtype=np.uint8))
    assert dense(counts) == {7: [1, 0, 2], 2: [0, 1, 0]}
    assert dense(counts, min_count=2) == {7: [1, 0, 2]}
    assert counts.expert_totals().tolist() == [1, 1, 2]


def test_nothing_counted():
    ids, table = PairCounts(4, max_pairs=10).table(20)
    assert ids.shape == (0,)
    assert table.shape == (0, 4)


@pytest.mark.parametrize("max_pairs", [10_000, 300])
def test_cutting_and_order_change_nothing(max_pairs):
    rng = np.random.default_rng(0)
    ids, experts = rng.integers(0, 400, 4000), rng.integers(0, 5, 4000)

    def counted(pieces, order=slice(None)):
        counts = PairCounts(5, max_pairs)
        for piece in np.array_split(np.arange(4000)[order], pieces):
            counts.add(ids[piece], experts[piece])
        return counts

    whole = counted(1)
    halves = [PairCounts(5, max_pairs), PairCounts(5, max_pairs)]
    for i, half in enumerate(halves):
        half.add(ids[i::2], experts[i::2])
    halves[0].merge(halves[1])
    tables = [dense(c) for c in (whole, counted(13), counted(4, slice(None, None, -1)), halves[0])]
    assert tables[1:] == tables[:1] * 3

    kept = tables[0]
    exact = {
        i: np.bincount(experts[ids == i], minlength=5).tolist() for i in np.unique(ids).tolist()
    }
    assert kept == {i: exact[i] for i in kept}
    if max_pairs == 10_000:
        assert whole.sample == 1
        assert len(kept) == 400
    else:
        assert whole.sample > 1
        assert 20 < len(kept) < 400 / whole.sample * 1.5
        assert sum(np.count_nonzero(row) for row in kept.values()) <= max_pairs
