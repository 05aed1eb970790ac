"""Scoring rules: hand cases, and that a rule is found again from what it selected."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetools.architectures import RouterSpec
from moetools.routing import ScoringRule, common_rules, identify_rule

LOGITS = torch.tensor([[2.0, 0.0, 1.0, -1.0]])


def spec(top_k: int = 2, num_experts: int = 16, **changes: Any) -> RouterSpec:
    values: dict[str, Any] = {
        "name": "00",
        "layer": 0,
        "kind": "mlp",
        "module": "gate",
        "experts_module": "experts",
        "tap": "experts",
        "reader": None,
        "weight_name": "gate.weight",
        "weight_key": "gate.weight",
        "bias_key": None,
        "correction_bias_name": None,
        "correction_bias_key": None,
        "expert_scale_name": None,
        "keys": ("gate.weight",),
        "num_experts": num_experts,
        "num_skip_classes": 0,
        "top_k": top_k,
        "num_shared_experts": 0,
        "score_function": None,
        "norm_topk_prob": None,
        "routed_scaling_factor": None,
        "n_group": None,
        "topk_group": None,
        "jitter_eps": None,
    }
    return RouterSpec(**{**values, **changes})


def random_logits(num_tokens: int = 64, num_experts: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def softmax(*logits: float) -> list[float]:
    total = sum(math.exp(each) for each in logits)
    return [math.exp(each) / total for each in logits]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def weights_of(rule: ScoringRule, **tensors: Tensor) -> tuple[list[int], list[float]]:
    index, weights = rule.select(LOGITS, **tensors)
    return index[0].tolist(), weights[0].tolist()


def test_softmax_of_all_is_not_normalised() -> None:
    index, weights = weights_of(ScoringRule(top_k=2, score_function="softmax"))
    assert index == [0, 2]
    assert weights == pytest.approx([softmax(2, 0, 1, -1)[place] for place in (0, 2)])


def test_softmax_normalised_equals_softmax_of_the_selected() -> None:
    normalised = ScoringRule(top_k=2, score_function="softmax", normalize_p=1.0)
    selected = ScoringRule(top_k=2, score_function="top_k_softmax")
    assert weights_of(normalised)[1] == pytest.approx(softmax(2, 1))
    assert weights_of(selected)[1] == pytest.approx(softmax(2, 1))


def test_correction_bias_selects_but_does_not_weigh() -> None:
    rule = ScoringRule(top_k=2, score_function="sigmoid", bias_on="scores", scale=3.0)
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0])
    index, weights = weights_of(rule, correction_bias=bias)
    assert index == [3, 0]
    assert weights == pytest.approx([3 * sigmoid(-1), 3 * sigmoid(2)])


def test_bias_on_logits_can_select_differently_from_bias_on_scores() -> None:
    bias = torch.tensor([0.0, 0.0, -0.4, 1.0])
    on_scores = ScoringRule(top_k=2, score_function="sigmoid", bias_on="scores")
    on_logits = ScoringRule(top_k=2, score_function="sigmoid", bias_on="logits")
    assert weights_of(on_scores, correction_bias=bias)[0] == [3, 0]
    assert weights_of(on_logits, correction_bias=bias)[0] == [0, 2]


@pytest.mark.parametrize(("group_score", "group"), [("max", [0, 1]), ("top2_sum", [2, 3])])
def test_experts_of_excluded_groups_are_never_selected(group_score: Any, group: list[int]) -> None:
    logits = torch.tensor([[4.0, -4.0, 3.0, 3.0]])
    rule = ScoringRule(
        top_k=2, score_function="sigmoid", n_group=2, topk_group=1, group_score=group_score
    )
    assert sorted(rule.select(logits)[0][0].tolist()) == group
    assert rule.selection_scores(logits)[0].isinf().sum() == 2


def test_excluded_experts_at_zero_beat_negative_scores() -> None:
    bias = torch.tensor([-0.9, -0.95, -0.9, -2.0])
    rule = ScoringRule(
        top_k=2,
        score_function="sigmoid",
        bias_on="scores",
        n_group=2,
        topk_group=1,
        group_score="max",
        excluded="zero",
    )
    index, _ = rule.select(LOGITS, bias)
    assert set(index[0].tolist()) & {2, 3}
    assert not rule.selection_scores(LOGITS, bias).isinf().any()


def test_p_norm_and_expert_scale() -> None:
    rule = ScoringRule(top_k=2, score_function="sigmoid", normalize_p=2.0, uses_expert_scale=True)
    _, weights = weights_of(rule, expert_scale=torch.tensor([1.0, 1.0, 10.0, 1.0]))
    norm = math.hypot(sigmoid(2), sigmoid(1))
    assert weights == pytest.approx([sigmoid(2) / norm, 10 * sigmoid(1) / norm])


def test_square_root_of_softplus() -> None:
    _, weights = weights_of(ScoringRule(top_k=1, score_function="sqrt_softplus"))
    assert weights == pytest.approx([math.sqrt(math.log(1 + math.exp(2)))])


def test_sparse_mixer_equals_the_models_own_function() -> None:
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    logits = random_logits()
    rule = ScoringRule(top_k=2, score_function="sparse_mixer", jitter_eps=0.01)
    index, weights = rule.select(logits)
    expected_weights, expected_index = sparsemixer(logits, 0.01, training=False, top_k=2)
    assert torch.equal(index, expected_index)
    assert torch.equal(weights, expected_weights)


def test_skip_class_weighs_nothing() -> None:
    rule = ScoringRule(top_k=2, score_function="softmax", num_skip_classes=2)
    index, weights = rule.select(LOGITS)
    assert index[0].tolist() == [0, 2]
    assert weights[0, 0] > 0
    assert weights[0, 1] == 0


def test_probabilities_ignore_bias_and_groups() -> None:
    softmaxed = ScoringRule(top_k=2, score_function="top_k_softmax").probabilities(LOGITS)
    assert softmaxed[0].tolist() == pytest.approx(softmax(2, 0, 1, -1))
    rule = ScoringRule(top_k=1, score_function="sigmoid", bias_on="scores", n_group=2, topk_group=1)
    total = sum(sigmoid(each) for each in (2, 0, 1, -1))
    assert rule.probabilities(LOGITS)[0].tolist() == pytest.approx(
        [sigmoid(each) / total for each in (2, 0, 1, -1)]
    )


def test_margin_is_the_gap_at_the_border_of_the_selection() -> None:
    rule = ScoringRule(top_k=2, score_function="sigmoid", bias_on="scores")
    bias = torch.tensor([0.0, 0.0, 0.0, 1.0])
    best = rule.selection_scores(LOGITS, bias).topk(3).values[0]
    assert float(best[1] - best[2]) == pytest.approx(sigmoid(2) - sigmoid(1))


def test_missing_tensors_are_a_library_error() -> None:
    with pytest.raises(ValueError, match="correction_bias"):
        ScoringRule(top_k=1, score_function="sigmoid", bias_on="scores").select(LOGITS)
    with pytest.raises(ValueError, match="expert_scale"):
        ScoringRule(top_k=1, score_function="sigmoid", uses_expert_scale=True).select(LOGITS)


def test_rule_survives_json() -> None:
    rule = ScoringRule(
        top_k=2, score_function="sigmoid", n_group=4, topk_group=2, num_tokens=64, num_ties=1
    )
    again = ScoringRule.from_json(json.loads(json.dumps(rule.to_json())))
    assert again == rule
    assert again.num_ties == 1
    with pytest.raises(ValueError, match="temperature"):
        ScoringRule.from_json({**rule.to_json(), "temperature": 1.0})


RULES = st.builds(
    ScoringRule,
    top_k=st.integers(1, 4),
    score_function=st.sampled_from(["softmax", "top_k_softmax", "sigmoid", "sqrt_softplus"]),
    bias_on=st.sampled_from([None, "scores"]),
    n_group=st.sampled_from([1, 4]),
    topk_group=st.just(2),
    group_score=st.sampled_from(["max", "top2_sum"]),
    scale=st.sampled_from([1.0, 2.5]),
    uses_expert_scale=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(rule=RULES, normalize=st.booleans(), half=st.booleans(), seed=st.integers(0, 999))
def test_rule_is_found_from_what_it_selected(
    rule: ScoringRule, normalize: bool, half: bool, seed: int
) -> None:
    if rule.score_function != "top_k_softmax":
        rule = replace(rule, normalize_p=1.0 if normalize else None)
    elif rule.bias_on or rule.n_group > 1:
        return
    generator = torch.Generator().manual_seed(seed)
    bias = 0.2 * torch.randn(16, generator=generator) if rule.bias_on else None
    expert_scale = 1 + torch.rand(16, generator=generator) if rule.uses_expert_scale else None
    logits = random_logits(seed=seed)
    logits = logits.bfloat16() if half else logits
    index, weights = rule.select(logits, bias, expert_scale)
    weights = weights.to(logits.dtype)
    groups = {"n_group": 4, "topk_group": 2} if rule.n_group > 1 else {}
    found = identify_rule(
        logits,
        index.flip(-1),
        weights.flip(-1),
        spec(top_k=rule.top_k, routed_scaling_factor=2.5, **groups),
        bias,
        expert_scale,
    )
    assert found is not None
    assert found.num_tokens == 64
    again, again_weights = found.select(logits, bias, expert_scale)
    if found.num_ties == 0 and not half:
        assert torch.equal(again.sort().values, index.sort().values)
        order, other = again.argsort(), index.argsort()
        torch.testing.assert_close(
            again_weights.gather(1, order), weights.gather(1, other), rtol=1e-5, atol=1e-6
        )
    assert found.uses_expert_scale == rule.uses_expert_scale
    assert found.bias_on == rule.bias_on


def test_ties_within_rounding_are_counted() -> None:
    logits = torch.zeros(3, 4)
    logits[:, 0] = 1.0
    logits[2, 3] = 0.5
    index = torch.tensor([[0, 1], [0, 3], [0, 3]])
    weights = logits.softmax(dim=-1).gather(1, index)
    found = identify_rule(logits, index, weights, spec(num_experts=4))
    assert found is not None
    assert found.score_function == "softmax"
    assert found.num_ties == 0, "equal scores are no difference: either expert is the best"
    logits[1, 3] -= 1e-7
    found = identify_rule(logits, index, logits.softmax(-1).gather(1, index), spec(num_experts=4))
    assert found is not None
    assert found.num_ties == 1


def test_routers_of_a_model_share_the_rule_that_fits_them_together() -> None:
    """In a low precision, chance alone tells two equal rules apart on a single router."""
    normalised = ScoringRule(top_k=2, score_function="softmax", normalize_p=1.0, num_exact=64)
    selected = ScoringRule(top_k=2, score_function="top_k_softmax", num_exact=64)
    other = ScoringRule(top_k=2, score_function="sigmoid", num_exact=64)
    fits = {
        "00": (normalised, selected),
        "01": (selected, replace(normalised, num_exact=63)),
        "02": (other,),
        "03": (),
    }
    assert common_rules(fits) == {"00": selected, "01": selected, "02": other, "03": None}


def test_no_rule_fits_a_selection_that_logits_do_not_make() -> None:
    logits = random_logits()
    index = torch.stack([torch.arange(64) % 16, (torch.arange(64) + 1) % 16], dim=-1)
    assert identify_rule(logits, index, logits.softmax(-1).gather(1, index), spec()) is None


def test_no_rule_fits_weights_that_scores_do_not_make() -> None:
    logits = random_logits()
    index = logits.topk(2).indices
    weights = torch.rand(64, 2, generator=torch.Generator().manual_seed(1))
    assert identify_rule(logits, index, weights, spec()) is None


def test_one_wrong_token_is_enough_to_refuse_a_rule() -> None:
    logits = random_logits()
    weights, index = logits.softmax(-1).topk(2)
    assert identify_rule(logits, index, weights, spec()) is not None
    wrong = index.clone()
    wrong[5, 1] = logits[5].argmin()
    assert identify_rule(logits, wrong, weights, spec()) is None


def test_nan_and_empty_batches_have_no_rule() -> None:
    logits = random_logits()
    weights, index = logits.softmax(-1).topk(2)
    assert identify_rule(logits[:0], index[:0], weights[:0], spec()) is None
    assert identify_rule(logits * torch.nan, index, weights, spec()) is None


def test_named_factor_is_preferred_to_the_fitted_one() -> None:
    logits = random_logits()
    weights, index = logits.sigmoid().topk(2)
    found = identify_rule(logits, index, weights * 2.826, spec(routed_scaling_factor=2.826))
    assert found is not None
    assert found.scale == 2.826
    unnamed = identify_rule(logits, index, weights * 2.826, spec())
    assert unnamed is not None
    assert unnamed.scale == pytest.approx(2.826)


def test_nearest_named_factor_wins() -> None:
    logits = random_logits().bfloat16()
    weights, index = logits.float().sigmoid().topk(2)
    weights = (weights * 1.02).bfloat16()
    found = identify_rule(logits, index, weights, spec(routed_scaling_factor=1.02))
    assert found is not None
    assert found.scale == 1.02
