"""Properties of steering that hold for any logits, and scalar loops that it must agree with."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import steering as oracle

from moetools.architectures import RouterSpec
from moetools.interventions import RouterIntervention, SteeredRouter
from moetools.routing import ScoringRule
from moetools.steering import (
    entered,
    expert_delta,
    flip_strength,
    hard,
    pick_experts,
    predicted_flip_rate,
    selection_frequencies,
    set_agreement,
    soft,
    spread,
)


@st.composite
def steering(draw):
    """Logits [T, E] float64, targets, and K; without ties, except where grids are drawn."""
    num_experts = draw(st.integers(3, 9))
    num_tokens = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 2**32 - 1))
    logits = np.random.default_rng(seed).normal(size=(num_tokens, num_experts))
    if draw(st.booleans()):
        logits = np.round(logits)
    targets = draw(st.lists(st.integers(0, num_experts - 1), min_size=1, unique=True))
    return torch.from_numpy(logits), targets, draw(st.integers(1, num_experts - 1))


STRENGTHS = st.floats(0, 1, width=32)


@given(steering(), STRENGTHS)
def test_soft_is_what_scalar_loops_give(case, strength):
    logits, targets, _ = case
    promote, demote = targets[::2], targets[1::2]
    found = soft(logits, promote, demote, strength)
    for row, steered in zip(logits.tolist(), found.tolist(), strict=True):
        assert steered == pytest.approx(oracle.soft(row, promote, demote, strength), abs=1e-12)


@given(steering())
def test_flip_strength_is_where_a_target_enters(case):
    """By bisection, on logits without ties between targets (they rank by order there)."""
    logits, targets, top_k = case
    found = flip_strength(logits, targets, top_k)
    for row, of_row in zip(logits.tolist(), found.tolist(), strict=True):
        wanted = [row[target] for target in targets]
        if len(set(wanted)) < len(wanted) or len(set(row)) == 1:
            continue
        for target, strength in zip(targets, of_row, strict=True):
            expected = oracle.flip_strength(row, targets, target, top_k)
            assert strength == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(steering(), STRENGTHS)
def test_flip_rate_is_the_measured_change(case, strength):
    logits, targets, top_k = case
    strengths = flip_strength(logits, targets, top_k)
    ordered = logits.sort(dim=-1).values
    assume((ordered[:, 1:] - ordered[:, :-1] > 1e-6).all())
    assume(((strengths - strength).abs() > 1e-6).all())
    before, after = (
        logits.topk(top_k).indices,
        soft(logits, targets, [], strength).topk(top_k).indices,
    )
    measured = entered(before, after, targets).double().mean(dim=0)
    assert torch.equal(predicted_flip_rate(strengths, strength), measured)


@given(steering(), STRENGTHS, STRENGTHS)
def test_flip_rate_does_not_fall(case, one, other):
    strengths = flip_strength(*case)
    low, high = sorted((one, other))
    assert (predicted_flip_rate(strengths, low) <= predicted_flip_rate(strengths, high)).all()


@given(steering(), st.floats(-1, 1, width=32))
def test_nothing_changes_without_strength_or_experts(case, strength):
    logits, targets, _ = case
    assert torch.equal(soft(logits, targets, [], 0.0), logits)
    assert torch.equal(soft(logits, [], targets, 0.0), logits)
    assert torch.equal(soft(logits, [], [], strength), logits)
    assert torch.equal(hard(logits, [], []), logits)


@given(steering(), st.floats(-1, 1, width=32), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_soft_commutes_with_a_power_of_two_to_the_bit(case, strength, factor):
    logits, targets, _ = case
    assert torch.equal(
        soft(logits * factor, targets, [], strength), soft(logits, targets, [], strength) * factor
    )


@given(steering(), st.floats(-1, 1, width=32), st.floats(0.1, 10), st.floats(-10, 10))
def test_soft_commutes_with_affine_changes(case, strength, factor, shift):
    logits, targets, _ = case
    torch.testing.assert_close(
        soft(logits * factor + shift, targets, [], strength),
        soft(logits, targets, [], strength) * factor + shift,
        rtol=1e-10,
        atol=1e-10,
    )


@given(steering(), STRENGTHS)
def test_soft_never_lowers_a_target(case, strength):
    logits, targets, _ = case
    steered = soft(logits, targets, [], strength)
    for target in targets:
        above = (logits > logits[:, target, None]).sum(dim=-1)
        assert ((steered > steered[:, target, None]).sum(dim=-1) <= above).all()


@given(steering(), st.floats(-1, 1, width=32), st.floats(-5, 5, width=32))
def test_selection_stays_when_all_logits_move(case, strength, shift):
    logits, targets, top_k = case
    steered = soft(logits, targets, [], strength)
    ordered = steered.sort(dim=-1).values
    assume((ordered[:, 1:] - ordered[:, :-1] > 1e-6).all())
    moved = soft(logits + shift, targets, [], strength)
    assert set_agreement(steered.topk(top_k).indices, moved.topk(top_k).indices).all()


@given(steering())
def test_hard_puts_targets_first_and_demoted_last(case):
    logits, targets, top_k = case
    targets = targets[:top_k]
    steered = hard(logits, targets, [])
    assert (steered[:, targets] == logits.amax(dim=-1, keepdim=True)).all()
    lowered = hard(logits, [], targets)
    assert (lowered[:, targets] == logits.amin(dim=-1, keepdim=True)).all()
    others = [expert for expert in range(logits.shape[1]) if expert not in targets]
    assert torch.equal(steered[:, others], logits[:, others])
    above = torch.full((logits.shape[1],) * 2, 1e-6).double()
    selected = hard(logits, targets, [], above).topk(top_k).indices
    assert all((selected == target).any(dim=-1).all() for target in targets)


@st.composite
def corpora(draw):
    """Two corpora of sequences of tokens of selected experts, and E."""
    num_experts = draw(st.integers(2, 6))
    top_k = draw(st.integers(1, num_experts))
    token = st.permutations(range(num_experts)).map(lambda order: list(order[:top_k]))
    corpus = st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4)
    return draw(corpus), draw(corpus), num_experts, top_k


def frequencies(corpus, num_experts):
    offsets = np.cumsum([0, *map(len, corpus)])
    return selection_frequencies(np.array([t for s in corpus for t in s]), offsets, num_experts)


@given(corpora())
def test_delta_is_what_scalar_loops_give(case):
    target, generic, num_experts, top_k = case
    of_target, of_generic = frequencies(target, num_experts), frequencies(generic, num_experts)
    np.testing.assert_allclose(of_target.sum(axis=1), top_k, atol=1e-12)
    delta = expert_delta(of_target, of_generic)
    np.testing.assert_allclose(delta, oracle.delta(target, generic, num_experts), atol=1e-12)
    assert delta.sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(expert_delta(of_generic, of_target), -delta, atol=1e-12)


TAUS = st.floats(0.001, 0.999)


@given(st.lists(st.floats(-1, 1), max_size=8), TAUS, TAUS)
def test_the_set_shrinks_in_tau(values, one, other):
    """Beside an expert that every tau takes, and one that none takes."""
    delta = np.array([1.0, -1.0, *values])
    high, low = (
        set(pick_experts({"00": delta}, tau=tau, floor={}, top_k={})["00"])
        for tau in sorted((one, other), reverse=True)
    )
    assert high <= low
    assert high == set(np.flatnonzero(delta > max(one, other)))


RULES = {
    "softmax": ScoringRule(top_k=2, score_function="softmax", normalize_p=1.0),
    "sigmoid": ScoringRule(top_k=2, score_function="sigmoid", bias_on="scores", normalize_p=1.0),
    "grouped": ScoringRule(
        top_k=2, score_function="sigmoid", bias_on="scores", n_group=2, topk_group=1,
        group_score="top2_sum", scale=2.5,
    ),
    "top_k_softmax": ScoringRule(top_k=2, score_function="top_k_softmax"),
}  # fmt: skip


def spec(num_experts=8, top_k=2):
    return RouterSpec(
        name="03", layer=3, kind="mlp", module="gate", experts_module="experts", tap="experts",
        reader=None, weight_name="gate.weight", weight_key="gate.weight", bias_key=None,
        correction_bias_name=None, correction_bias_key=None, expert_scale_name=None, keys=(),
        num_experts=num_experts, num_skip_classes=0, top_k=top_k, num_shared_experts=0,
        score_function=None, norm_topk_prob=None, routed_scaling_factor=None, n_group=None,
        topk_group=None, jitter_eps=None,
    )  # fmt: skip


def routed(rule, intervention, logits, bias):
    bias = bias if rule.bias_on else None
    return SteeredRouter.of(intervention, spec(), rule, correction_bias=bias).route(logits)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@given(seed=st.integers(0, 2**32 - 1), strength=st.floats(-1, 1, width=32))
def test_a_router_selects_by_its_rule_from_changed_logits(rule, seed, strength):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 8, generator=generator)
    bias = 0.1 * torch.randn(8, generator=generator)
    made = RouterIntervention(
        mode="soft", strength=strength, promote={"03": (1, 6)}, demote={"03": (0,)}
    )
    found = routed(rule, made, logits, bias)
    wanted = soft(logits, [1, 6], [0], strength)
    index, weights = rule.select(wanted, bias if rule.bias_on else None)
    assert torch.equal(found.router_logits, wanted)
    assert torch.equal(found.top_k_index, index)
    assert torch.equal(found.top_k_weights, weights)


@pytest.mark.parametrize("name", ["sigmoid", "grouped"])
@given(seed=st.integers(0, 2**32 - 1))
def test_offsets_on_a_selection_bias_leave_logits_and_weights_alone(name, seed):
    rule, generator = RULES[name], torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 8, generator=generator)
    bias = 0.1 * torch.randn(8, generator=generator)
    made = RouterIntervention(mode="constant", offsets={"03": {1: 0.25, 6: -0.5}})
    found = routed(rule, made, logits, bias)
    moved = bias.clone()
    moved[1] += 0.25
    moved[6] -= 0.5
    assert torch.equal(found.router_logits, logits)
    assert torch.equal(found.top_k_index, rule.select(logits, moved)[0])
    assert torch.equal(found.top_k_weights, rule.weights(logits, found.top_k_index))


@pytest.mark.parametrize("name", ["softmax", "top_k_softmax"])
def test_offsets_without_a_selection_bias_change_the_logits(name):
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    made = RouterIntervention(mode="constant", offsets={"03": {1: 3.0}})
    found = routed(RULES[name], made, logits, None)
    assert torch.equal(found.router_logits[:, 1], logits[:, 1] + 3)
    assert (found.top_k_index == 1).any(dim=-1).all()


@given(steering())
def test_spread_is_the_population_standard_deviation(case):
    logits = case[0]
    expected = [oracle.spread(row) for row in logits.tolist()]
    assert spread(logits)[:, 0].tolist() == pytest.approx(expected, abs=1e-12)
    assert not math.isnan(float(spread(logits[:, :1]).sum()))
