"""Operators on random routers of any size."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moetools.probing import (
    OPERATORS,
    Choice,
    Router,
    Routes,
    gumbel_log_rates,
    inclusion_probabilities,
    make_change,
    refusal,
    shuffled_within,
)
from moetools.routing import ScoringRule

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 12).flatmap(
    lambda num_experts: st.tuples(st.just(num_experts), st.integers(1, num_experts - 1))
)
SELECTING = sorted(name for name, each in OPERATORS.items() if each.keys is not None)


def random_router(num_experts, top_k, seed, num_tokens=40):
    """A router with a softmax over all, renormalised, and what it did."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    logits = torch.randn(num_tokens, num_experts, generator=generator) * 2
    rule = ScoringRule(top_k=top_k, score_function="softmax", normalize_p=1.0)
    index, weights = rule.select(logits)
    usage = torch.bincount(index.flatten(), minlength=num_experts) / num_tokens
    spec = SimpleNamespace(name="00", num_experts=num_experts, top_k=top_k)
    router = Router(spec=spec, rule=rule, usage=usage, mean_output=torch.zeros(1))
    return router, Routes(index=index, weights=weights, logits=logits)


def changed(name, router, routes, seed, policy="carry", choice=Choice()):  # noqa: B008
    ids = np.arange(len(routes.index), dtype=np.int32) % 3
    return make_change(name, policy, router, routes, ids, seed=(seed,), choice=choice)


@given(SIZES, SEEDS, st.sampled_from(SELECTING), st.sampled_from(["carry", "own", "equal"]))
def test_selections_are_k_distinct_experts_with_the_native_mass(sizes, seed, name, policy):
    num_experts, top_k = sizes
    router, routes = random_router(num_experts, top_k, seed)
    assume(refusal(name, policy, router, Choice()) is None)
    found = changed(name, router, routes, seed, policy)
    assert found.index.shape == found.weights.shape == routes.index.shape
    assert found.index.min() >= 0
    assert found.index.max() < num_experts
    assert (found.index.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert torch.allclose(found.weights.sum(-1), routes.weights.sum(-1), atol=1e-5)


@given(SIZES, SEEDS)
def test_bottom_and_next_are_ranks(sizes, seed):
    num_experts, top_k = sizes
    router, routes = random_router(num_experts, top_k, seed)
    ranked = routes.logits.argsort(dim=-1, descending=True, stable=True)
    bottom = changed("bottom-k", router, routes, seed).index
    assert torch.equal(bottom, ranked[:, num_experts - top_k :])
    if 2 * top_k <= num_experts:
        assert torch.equal(
            changed("next-k", router, routes, seed).index, ranked[:, top_k : 2 * top_k]
        )


@given(SIZES, SEEDS, st.sampled_from(["shuffled", "shuffled-same-id", "permuted"]))
def test_whole_routes_keep_the_load(sizes, seed, name):
    num_experts, top_k = sizes
    router, routes = random_router(num_experts, top_k, seed)
    found = changed(name, router, routes, seed)

    def load(index):
        counts = torch.bincount(index.flatten(), minlength=num_experts)
        return counts.sort().values if name == "permuted" else counts

    assert torch.equal(load(found.index), load(routes.index))
    assert torch.equal(found.weights.flatten().sort()[0], routes.weights.flatten().sort()[0])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), SEEDS)
def test_shuffles_stay_within_labels(labels, seed):
    labels = np.array(labels)
    source = shuffled_within(labels, np.random.default_rng(seed))
    assert sorted(source) == list(range(len(labels)))
    assert (labels[source] == labels).all()


@given(SIZES, SEEDS, st.floats(0.1, 20))
def test_gumbel_rates_give_the_inclusion_that_was_asked_for(sizes, seed, evenness):
    num_experts, top_k = sizes
    generator = np.random.default_rng(seed)
    rates = np.log(generator.gamma(evenness, size=num_experts) + 1e-3)
    wanted = inclusion_probabilities(rates, top_k)
    assert wanted.sum() == pytest.approx(top_k, abs=1e-4)
    assume(wanted.max() < 0.999)
    solved = gumbel_log_rates(wanted, top_k)
    assert inclusion_probabilities(solved, top_k) == pytest.approx(wanted, abs=2e-4)


@given(SIZES, SEEDS, st.integers(1, 12))
def test_restricted_draws_from_the_most_used(sizes, seed, most_used):
    num_experts, top_k = sizes
    router, routes = random_router(num_experts, top_k, seed)
    choice = Choice(most_used=most_used)
    assume(refusal("restricted", "carry", router, choice) is None)
    found = changed("restricted", router, routes, seed, choice=choice).index
    used = set(found.unique().tolist())
    assert len(used) <= most_used
    least = min(router.usage[expert] for expert in used)
    assert (router.usage > least).sum() < most_used
