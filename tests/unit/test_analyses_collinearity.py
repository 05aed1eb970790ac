import numpy as np
import pytest
import torch
from synthetic import write_trace

from moetools import analysis
from moetools.hooks import output_collinearity

COUNT = 12


def report(path, values, *, top_k=2, hidden=None):
    """Table of a trace whose tokens all have these three cosines."""
    num_tokens = len(values)
    shape = (num_tokens, top_k)
    kept = {
        "norms": {"00": np.ones(shape)},
        "peaks": {"00": np.ones(shape)},
        "shares": {"00": np.full(shape, 1 / top_k)},
        "collinearity": {"00": values},
    }
    if hidden is not None:
        kept["inputs"] = {"00": np.zeros((num_tokens, hidden))}
    trace = write_trace(
        path,
        {"00": np.tile(np.arange(top_k), (num_tokens, 1))},
        [3] * (num_tokens // 3),
        num_experts=4,
        kept=kept,
    )
    return analysis.run([trace], only=["collinearity"])


def test_parallel_orthogonal_and_opposite_parts():
    one = torch.tensor([1.0, 0.0, 0.0])
    two = torch.tensor([0.0, 2.0, 0.0])
    parts = torch.stack(
        [torch.stack([3 * one, one]), torch.stack([one, two]), torch.stack([2 * one, -one])]
    )
    weights = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.5, 0.2]])
    expected = [
        [1, 1, 3 / 10**0.5],
        [0, 1 / 5**0.5, 1 / 5**0.5],
        [-1, 1, 2 / 5**0.5],
    ]
    torch.testing.assert_close(output_collinearity(parts, weights), torch.tensor(expected))


def test_three_parts_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(5, 3, 7, generator=generator)
    weights = torch.rand(5, 3, generator=generator)
    found = output_collinearity(parts, weights)
    for t in range(5):
        cosines = [
            torch.cosine_similarity(parts[t, i], parts[t, j], dim=0)
            for i in range(3)
            for j in range(i)
        ]
        first = parts[t, weights[t].argmax()]
        norms = parts[t].norm(dim=-1)
        expected = [
            sum(cosines) / 3,
            torch.cosine_similarity(first, parts[t].sum(dim=0), dim=0),
            first.norm() / norms.square().sum().sqrt(),
        ]
        torch.testing.assert_close(found[t], torch.stack(expected))


def test_means_excess_and_chance(tmp_path):
    values = np.tile([0.5, 0.9, 0.8], (COUNT, 1))
    values[0] = np.nan
    results = report(tmp_path / "trace", values, hidden=16)
    table = results.tables["collinearity"]
    assert analysis.single(table, "output_cosine") == pytest.approx(0.5)
    assert analysis.single(table, "first_cosine_excess") == pytest.approx(0.5)
    assert analysis.single(table, "output_cosine_chance") == pytest.approx(0.25)
    assert set(table["num_tokens"]) == {COUNT - 1}


def test_one_expert_a_token_has_no_pairs(tmp_path):
    values = np.tile([np.nan, 1.0, 1.0], (COUNT, 1))
    table = report(tmp_path / "trace", values, top_k=1).tables["collinearity"]
    assert "output_cosine" not in set(table["metric"])
    assert analysis.single(table, "first_cosine") == 1


def test_says_what_to_record(tmp_path):
    trace = write_trace(tmp_path / "t", {"00": np.zeros((4, 1), int)}, [4], num_experts=2)
    skipped = analysis.run([trace], only=["collinearity"]).skipped["collinearity"]
    assert "--keep outputs" in skipped
