import numpy as np

from moetools.token_sample import TokenSample


def offered(sample, sequence, position, kept=None):
    kept = np.full(len(sequence), True) if kept is None else kept
    values = {"x": sequence * 1000 + position}
    sample.add(np.asarray(sequence), np.asarray(position), values, kept)


def test_the_sample_does_not_depend_on_how_tokens_come():
    sequence, position = np.divmod(np.arange(5000), 50)
    whole = TokenSample(300)
    offered(whole, sequence, position)
    other = TokenSample(300)
    for rows in np.array_split(np.random.default_rng(0).permutation(5000), 37):
        part = TokenSample(300)
        offered(part, sequence[rows], position[rows])
        other.merge(part)
    one, two = whole.tokens(), other.tokens()
    assert len(one["x"]) == 300
    for name in ("x", "sequence", "position"):
        np.testing.assert_array_equal(one[name], two[name])
    assert (one["x"] == one["sequence"] * 1000 + one["position"]).all()
    assert len(np.unique(one["sequence"])) > 80


def test_tokens_that_were_not_kept_are_not_drawn():
    sample = TokenSample(10)
    assert sample.tokens() == {}
    position = np.arange(40)
    offered(sample, np.zeros(40, int), position, kept=position % 2 == 0)
    offered(sample, np.ones(3, int), np.arange(3), kept=np.zeros(3, bool))
    found = sample.tokens()
    assert len(found["x"]) == 10
    assert (found["position"] % 2 == 0).all()


def test_length_is_bounded():
    sample = TokenSample(64)
    assert len(sample) == 0
    sample.merge(TokenSample(64))
    assert len(sample) == 0
    for first in range(0, 300, 100):
        offered(sample, np.zeros(100, int), np.arange(first, first + 100))
        assert len(sample) == 64
