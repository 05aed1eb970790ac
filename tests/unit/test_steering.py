"""The maths of steering on cases that are worked out by hand, and on data with a known answer."""

import math

import numpy as np
import pytest
import torch

from moetools.errors import RequestError
from moetools.steering import (
    constant,
    entered,
    expert_delta,
    flip_strength,
    fold_direction,
    fold_into_bias,
    folded_weight,
    hard,
    hard_noise,
    pick_experts,
    pick_ridge,
    predicted_flip_rate,
    selection_frequencies,
    set_agreement,
    soft,
    split_half_floor,
    spread,
)

Z = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def top2(logits):
    return sorted(logits.topk(2).indices[0].tolist())


def test_soft_by_hand():
    assert spread(Z).item() == pytest.approx(1.118034, abs=1e-6)
    half = soft(Z, [2], [], 0.5)
    assert half[0, 2].item() == pytest.approx(0.559017, abs=1e-6)
    assert top2(half) == [0, 1]
    full = soft(Z, [2], [], 1.0)
    assert full[0, 2].item() == pytest.approx(1.118034, abs=1e-6)
    assert top2(full) == [0, 2]
    assert torch.equal(full[0, [0, 1, 3]], Z[0, [0, 1, 3]])
    assert torch.equal(soft(Z, [], [2], -1.0), full)
    assert flip_strength(Z, [2], 2).item() == pytest.approx(0.894427, abs=1e-6)


def test_hard_by_hand():
    noise = hard_noise(4, scale=1e-6, seed=[0])
    steered = hard(Z, [3], [], noise)
    assert top2(steered) == [0, 3]
    gates = steered.softmax(dim=-1)[0]
    assert abs(gates[0] - gates[3]).item() < 1e-5
    assert steered[0, 3].item() == pytest.approx(2 + noise[0, 3].item(), abs=3e-7)
    exactly = hard(Z, [3], [1])
    assert exactly.tolist() == [[2.0, -1.0, 0.0, 2.0]]


def test_hard_noise_belongs_to_the_best_expert_and_the_promoted_one():
    noise = hard_noise(4, scale=1.0, seed=[7])
    logits = torch.zeros(2, 4)
    logits[0, 1] = logits[1, 2] = 4.0
    steered = hard(logits, [3], [0], noise)
    assert torch.equal(steered[:, 3], 4 + noise[[1, 2], 3])
    assert torch.equal(steered[:, 0], -noise[[1, 2], 0])
    assert torch.equal(hard(logits[1:], [3], [0], noise), steered[1:])
    assert torch.equal(noise, hard_noise(4, scale=1.0, seed=[7]))
    assert not torch.equal(noise, hard_noise(4, scale=1.0, seed=[8]))
    large = hard_noise(400, scale=1e-6, seed=[0])
    assert large.std().item() == pytest.approx(1e-6, rel=0.01)


def test_hard_with_k_promoted_lets_noise_choose_among_them_and_the_best():
    """K of K + 1 logits that tie but for the noise: the best expert stays where one is below."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 64, generator=generator)
    before = logits.topk(2).indices
    after = hard(logits, [3, 5], [], hard_noise(64, scale=1e-6, seed=[0])).topk(2).indices
    outside = (before[:, 0] != 3) & (before[:, 0] != 5)
    kept_best = (after == before[:, :1]).any(dim=-1)[outside].float().mean().item()
    assert kept_best == pytest.approx(0.75, abs=0.06)  # 1 - 2^-K, over 62 draws of pairs


@pytest.mark.parametrize(
    ("logits", "targets", "top_k", "expected"),
    [
        ([2.0, 1.0, 0.0, -1.0], [0], 2, [0.0]),
        ([2.0, 1.0, 0.0, -1.0], [3], 1, [3 / 1.118034]),
        # both rise: 1 passes expert 0 first, and then holds the only place
        ([2.0, 1.0, 0.0, -1.0], [1, 2], 1, [1 / 1.118034, math.inf]),
        ([2.0, 1.0, 0.0, -1.0], [2, 1], 1, [math.inf, 1 / 1.118034]),
        # 1 is in and stays above 2: of two places, 2 must pass expert 0
        ([2.0, 1.0, 0.0, -1.0], [1, 2], 2, [0.0, 2 / 1.118034]),
        # fewer others than places left
        ([2.0, 1.0, 0.0, -1.0], [1, 2, 3], 3, [0.0, 0.0, 3 / 1.118034]),
        ([1.0, 0.0], [0, 1], 2, [0.0, 0.0]),
        # no strength moves equal logits
        ([1.0, 1.0, 1.0], [0], 1, [math.inf]),
    ],
)  # fmt: skip
def test_flip_strength_by_hand(logits, targets, top_k, expected):
    found = flip_strength(torch.tensor([logits]), targets, top_k)[0].tolist()
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_tie_has_not_entered():
    tied = torch.tensor([[1.0, 1.0, 0.0]])
    strength = flip_strength(tied, [1], 1)
    assert 0 < strength.item() < 1e-30
    assert predicted_flip_rate(strength, 0.0).tolist() == [0.0]
    assert predicted_flip_rate(strength, 1e-6).tolist() == [1.0]
    at_the_tie = flip_strength(Z.double(), [2], 2)
    assert predicted_flip_rate(at_the_tie, at_the_tie.item()).tolist() == [0.0]
    assert predicted_flip_rate(at_the_tie, at_the_tie.item() * (1 + 1e-12)).tolist() == [1.0]


def test_frequencies_and_delta_by_hand():
    ids = np.array([[0, 1], [0, 2], [0, 1], [0, 3], [1, 2], [1, 2]])
    frequencies = selection_frequencies(ids, np.array([0, 4, 6]), 4)
    assert frequencies.tolist() == [[1, 0.5, 0.25, 0.25], [0, 1, 1, 0]]
    delta = expert_delta(frequencies[:1], frequencies[1:])
    assert delta.tolist() == [1, -0.5, -0.75, 0.25]
    assert pick(delta, 0.3) == {"00": (0,)}
    assert pick(-delta, 0.3) == {"00": (2, 1)}
    assert pick(delta, 0.2) == {"00": (0, 3)}


def test_sequences_count_alike_whatever_their_length():
    ids = np.array([[0]] * 9 + [[1]])
    frequencies = selection_frequencies(ids, np.array([0, 9, 10]), 2)
    assert frequencies.mean(axis=0).tolist() == [0.5, 0.5]


def test_a_dropped_token_counts_in_the_length():
    frequencies = selection_frequencies(np.array([[0], [2]]), np.array([0, 2]), 2)
    assert frequencies.tolist() == [[0.5, 0]]


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        selection_frequencies(np.array([[0]]), np.array([0, 1, 1]), 2)


def pick(delta, tau, floor=0.0, top_k=2):
    return pick_experts({"00": delta}, tau=tau, floor={"00": floor}, top_k={"00": top_k})


def test_auto_takes_at_most_k_above_the_floor():
    delta = np.array([0.4, 0.1, 0.3, 0.2, -1.0])
    assert pick(delta, "auto", floor=0.05) == {"00": (0, 2)}
    assert pick(delta, "auto", floor=0.05, top_k=3) == {"00": (0, 2, 3)}
    assert pick(delta, "auto", floor=0.3) == {"00": (0,)}
    assert pick(delta, 0.05) == {"00": (0, 2, 3, 1)}


def test_a_router_without_experts_is_left_out():
    picked = pick_experts(
        {"00": np.array([0.1, -0.1]), "01": np.array([0.5, -0.5])}, tau=0.2, floor={}, top_k={}
    )
    assert picked == {"01": (0,)}


@pytest.mark.parametrize(
    ("delta", "tau", "message"),
    [
        ([0.1, -0.1], 0.2, r"No expert has a delta above --tau 0.2; the largest is 0.1000"),
        ([0.1, -0.1], "auto", r"above the split-half floor of its router; the largest is 0.1000"),
        ([0.0, 0.0], 0.2, "the same texts"),
        ([0.0, 0.0], "auto", "the same texts"),
        ([0.1, 0.1], 0.05, "selects all 2 experts of router 00"),
        ([0.1, -0.1], 0.0, "above 0, or auto"),
        ([0.1, -0.1], -0.2, "above 0, or auto"),
        ([0.1, -0.1], math.nan, "above 0, or auto"),
    ],
)
def test_what_selects_nothing_or_everything_is_refused(delta, tau, message):
    with pytest.raises(RequestError, match=message):
        pick(np.array(delta), tau, floor=0.5)


class TestSplitHalfFloor:
    def draw(self, generator, num_texts, probabilities, tokens=50):
        ids = generator.choice(len(probabilities), size=(num_texts * tokens, 1), p=probabilities)
        return selection_frequencies(ids, np.arange(num_texts + 1) * tokens, len(probabilities))

    def test_no_difference_passes_it_as_often_as_the_level_says(self):
        """Both corpora from one distribution: the largest |delta| exceeds the floor in 5 %."""
        generator = np.random.default_rng(0)
        even = np.full(16, 1 / 16)
        above = []
        for seed in range(300):
            target, generic = self.draw(generator, 40, even), self.draw(generator, 60, even)
            floor = split_half_floor(target, generic, seed=seed, num_splits=100)
            above.append(np.abs(expert_delta(target, generic)).max() > floor)
        assert 0.02 < np.mean(above) < 0.09

    def test_texts_stay_in_one_half(self):
        """Sequences of a text that are alike count once: the floor is that of the texts."""
        generator = np.random.default_rng(1)
        texts = generator.random((12, 4))
        generic = np.zeros((12, 4))
        alone = split_half_floor(texts, generic, seed=0)
        repeated = np.repeat(texts, 5, axis=0)
        labels = np.repeat(np.arange(12), 5)
        together = split_half_floor(repeated, generic, seed=0, target_texts=labels)
        assert together == pytest.approx(alone)
        assert split_half_floor(repeated, generic, seed=0) < 0.7 * alone

    def test_it_is_the_same_for_the_same_seed(self):
        generator = np.random.default_rng(2)
        target, generic = generator.random((7, 4)), generator.random((8, 4))
        first = split_half_floor(target, generic, seed=3)
        assert split_half_floor(target, generic, seed=3) == first
        assert split_half_floor(target, generic, seed=4) != first

    def test_one_text_is_refused(self):
        with pytest.raises(RequestError, match="The generic data has 1 text"):
            split_half_floor(np.ones((2, 4)), np.ones((1, 4)), seed=0)
        with pytest.raises(RequestError, match="The target data has 1 text"):
            split_half_floor(
                np.ones((2, 4)), np.ones((2, 4)), seed=0, target_texts=np.array(["a", "a"])
            )


def test_entered_and_agreement():
    before = torch.tensor([[0, 1], [0, 1], [2, 3]])
    after = torch.tensor([[1, 0], [0, 2], [3, 2]])
    assert set_agreement(before, after).tolist() == [True, False, True]
    assert entered(before, after, [2, 1]).tolist() == [[False] * 2, [True, False], [False] * 2]
    assert entered(after, before, [2, 1]).tolist() == [[False] * 2, [False, True], [False] * 2]


def test_constant_form_by_hand():
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0], [4.0, 2.0, 0.0, -2.0]])
    assert constant(scores, {2: 0.5, 0: -1.0}).tolist() == [[1, 1, 0.5, -1], [3, 2, 0.5, -2]]
    assert constant(scores, {}) is not scores


def variation(direction, inputs):
    """Coefficient of variation of u . x."""
    products = inputs.double() @ direction
    return (products.std(correction=0) / products.mean().abs()).item()


class TestDirection:
    def inputs(self, noise):
        generator = torch.Generator().manual_seed(0)
        common = torch.randn(1, 24, generator=generator)
        return common + noise * torch.randn(4000, 24, generator=generator)

    def test_inputs_with_a_common_part_have_one(self):
        inputs = self.inputs(0.3)
        direction = fold_direction(inputs[:2000], 1e-4)
        assert direction.dtype == torch.float64
        products = inputs[2000:].double() @ direction
        assert products.mean().item() == pytest.approx(1, abs=0.02)
        assert variation(direction, inputs[2000:]) < 0.1

    def test_inputs_without_one_have_none(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4000, 24, generator=generator)
        direction = fold_direction(inputs[:2000], pick_ridge(inputs[:2000], seed=0))
        assert variation(direction, inputs[2000:]) > 1

    def test_it_minimises(self):
        """Against least squares with the ridge as further rows."""
        inputs, ridge = self.inputs(1.0)[:300], 0.01
        x = inputs.double().numpy()
        scale = math.sqrt(len(x) * ridge * (x * x).mean())
        rows = np.concatenate([x, scale * np.eye(24)])
        wanted = np.linalg.lstsq(rows, np.r_[np.ones(len(x)), np.zeros(24)], rcond=None)[0]
        np.testing.assert_allclose(fold_direction(inputs, ridge).numpy(), wanted, atol=1e-10)

    def test_the_ridge_is_picked_on_tokens_that_are_left_out(self):
        """With fewer tokens than channels the least ridge fits them all and nothing else."""
        generator = torch.Generator().manual_seed(3)
        inputs = torch.randn(1, 100, generator=generator) + torch.randn(
            5000, 100, generator=generator
        )
        few, fresh = inputs[:60], inputs[60:]
        picked = variation(fold_direction(few, pick_ridge(few, seed=0)), fresh)
        least = variation(fold_direction(few, 1e-6), fresh)
        assert picked < 0.9 * least

    def test_what_has_no_answer_is_refused(self):
        with pytest.raises(ValueError, match="all zero"):
            fold_direction(torch.zeros(4, 2), 0.1)
        with pytest.raises(ValueError, match="above 0"):
            fold_direction(torch.ones(4, 2), 0.0)


def test_folded_weight_adds_the_offset_along_the_direction():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 6, generator=generator)
    x = torch.randn(3, 6, generator=generator).double()
    direction = fold_direction(x, 1e-9)
    folded = folded_weight(weight, direction, {1: 0.5, 4: -2.0})
    assert torch.equal(folded[[0, 2, 3]], weight[[0, 2, 3]])
    change = x @ (folded.double() - weight.double()).T
    torch.testing.assert_close(change[:, 1], torch.full((3,), 0.5).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(change[:, 4], torch.full((3,), -2.0).double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folding_rounds_once_and_leaves_its_input(dtype):
    weight, bias = torch.ones(3, 2, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    folded = folded_weight(weight, torch.tensor([1.0, 0.0]), {0: 1e-3})
    moved = fold_into_bias(bias, {0: 1e-3})
    assert folded.dtype == moved.dtype == dtype
    assert moved.shape == bias.shape
    assert torch.equal(folded[0, :1], torch.tensor([1.001], dtype=torch.float64).to(dtype))
    assert torch.equal(moved[0, :1], folded[0, :1])
    assert weight.eq(1).all()
    assert bias.eq(1).all()
