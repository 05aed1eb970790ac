"""Margins of selections, by logits and by other scores."""

import pytest
import torch

from moetools.routing import ScoringRule
from moetools.routing_ties import ROUTING_TIE, selection_margin

EPS = torch.finfo(torch.float32).eps


def test_margin_of_logits():
    logits = torch.tensor([[4.0, 1.0, 1.0 - EPS, -8.0], [4.0, 1.0, 0.0, -2.0], [2.0, 2.0, 1.0, 0]])
    margins = selection_margin(logits, 2)
    assert margins.tolist() == pytest.approx([EPS / 8, 0.25, 0.5])
    assert (margins < ROUTING_TIE).tolist() == [True, False, False]


def test_margin_with_a_selection_bias():
    rule = ScoringRule(top_k=1, score_function="sigmoid", bias_on="scores")
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    scores = logits[0].sigmoid()
    bias = torch.tensor([float(scores[1] - scores[0]), 0.0, 0.0])
    assert selection_margin(logits, 1)[0] == 1.0
    assert selection_margin(logits, 1, rule, bias)[0] < ROUTING_TIE


def test_margin_of_groups():
    rule = ScoringRule(
        top_k=1, score_function="sigmoid", n_group=2, topk_group=1, group_score="top2_sum"
    )
    logits = torch.tensor([[2.0, 0.0, 0.0, 2.0], [2.0, 0.0, 0.0, -2.0]])
    margins = selection_margin(logits, 1, rule)
    assert margins[0] < ROUTING_TIE < margins[1]
    kept = logits.sigmoid()[1, :2]
    assert margins[1] <= (kept[0] - kept[1]) / 2
