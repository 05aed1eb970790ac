"""Operators, weight policies, interventions and runs from a later layer, on real tiny models."""

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import tiny_model

from moetools.architectures import find_routers
from moetools.errors import ArchitectureError, RequestError
from moetools.hooks import RouterRecorder
from moetools.probing import (
    OPERATORS,
    Change,
    Choice,
    Intervention,
    Rerun,
    Router,
    Routes,
    cannot_change,
    gumbel_log_rates,
    inclusion_probabilities,
    make_change,
    operator,
    refusal,
    relabelled,
    shuffled_within,
)
from moetools.routing import identify_rule

FAMILIES = ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"]
TOKENS = torch.randint(3, 90, (3, 13), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(3, 13, dtype=torch.long)
MASK[1, 9:] = 0
MASK[2, 5:] = 0
ROWS = MASK.reshape(-1).nonzero()[:, 0]


class Tiny:
    """A tiny model with padded input, its routers and what they did."""

    def __init__(self, family, **changes):
        self.model = tiny_model(family, **changes)
        self.specs = find_routers(self.model, None).routers
        with (
            torch.no_grad(),
            RouterRecorder(self.model, self.specs, keep=frozenset({"logits"})) as recorder,
        ):
            recorder.begin(num_tokens=TOKENS.numel(), mask=MASK)
            self.logits = self.forward()
            self.routings = recorder.take()

    def forward(self):
        with torch.no_grad():
            return self.model(input_ids=TOKENS, attention_mask=MASK, use_cache=False).logits

    def changed(self, changes, watched=()):
        with Intervention(self.model, self.specs) as intervention:
            intervention.begin(changes, rows=ROWS, watched=watched)
            return self.forward(), dict(intervention.outputs)

    def native(self, name):
        routing = self.routings[name]
        return Change(index=routing.top_k_index, weights=routing.top_k_weights)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request):
    return Tiny(request.param)


@pytest.fixture(scope="module")
def olmoe():
    return Tiny("olmoe")


def test_native_selections_are_bit_identical(tiny):
    logits, _ = tiny.changed({spec.name: tiny.native(spec.name) for spec in tiny.specs})
    assert torch.equal(logits, tiny.logits)


def test_skip_equals_weights_of_zero_and_zeroed_experts(tiny):
    spec = tiny.specs[-1]
    width = tiny.model.config.hidden_size
    skipped, outputs = tiny.changed({spec.name: Change(output=torch.zeros(width))}, [spec.name])
    assert not torch.equal(skipped, tiny.logits)
    assert not outputs[spec.name].any()
    native = tiny.native(spec.name)
    weightless = Change(index=native.index, weights=torch.zeros_like(native.weights))
    assert torch.equal(skipped[MASK.bool()], tiny.changed({spec.name: weightless})[0][MASK.bool()])
    experts = tiny.model.get_submodule(spec.experts_module)
    kept = {name: each.detach().clone() for name, each in experts.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                if name.startswith("down_proj"):
                    parameter.zero_()
        assert torch.allclose(tiny.forward(), skipped, atol=1e-6)
    finally:
        with torch.no_grad():
            for name, parameter in experts.named_parameters():
                parameter.copy_(kept[name])


def test_an_output_is_put_in_place_of_every_token_s(olmoe):
    spec = olmoe.specs[1]
    vector = torch.arange(32.0)
    _, outputs = olmoe.changed({spec.name: Change(output=vector)}, [spec.name])
    assert torch.equal(outputs[spec.name], vector.expand(len(ROWS), -1))


def test_relabelled_and_back_is_native(tiny):
    spec = tiny.specs[0]
    routes = Routes(
        index=tiny.routings[spec.name].top_k_index, weights=tiny.routings[spec.name].top_k_weights
    )
    labels = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    once = relabelled(routes, labels)
    back = relabelled(once, labels.argsort())
    changed, _ = tiny.changed({spec.name: Change(index=once.index, weights=once.weights)})
    assert not torch.equal(changed, tiny.logits)
    logits, _ = tiny.changed({spec.name: Change(index=back.index, weights=back.weights)})
    assert torch.equal(logits, tiny.logits)


def test_padding_keeps_its_route_and_touches_no_other_token(olmoe):
    spec = olmoe.specs[0]
    other = Change(
        index=(olmoe.native(spec.name).index + 1) % 8, weights=olmoe.native(spec.name).weights
    )
    padded, _ = olmoe.changed({spec.name: other})
    with Intervention(olmoe.model, olmoe.specs) as intervention, torch.no_grad():
        intervention.begin({spec.name: other.rows(torch.arange(13))}, rows=torch.arange(13))
        alone = olmoe.model(input_ids=TOKENS[:1], use_cache=False).logits
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_a_run_from_the_changed_layer_equals_a_full_pass(tiny):
    rerun = Rerun(tiny.model, tiny.specs)
    for spec in tiny.specs:
        with rerun.keeping(spec.layer):
            tiny.forward()
        state = rerun.kept(spec.layer)
        with rerun.starting_at(spec.layer, state):
            assert torch.equal(tiny.forward(), tiny.logits)
        change = Change(
            index=(tiny.native(spec.name).index + 3) % 8, weights=tiny.native(spec.name).weights
        )
        full, _ = tiny.changed({spec.name: change})
        for _ in range(2):
            with rerun.starting_at(spec.layer, state):
                again, _ = tiny.changed({spec.name: change})
            assert torch.equal(full, again)
        assert not torch.equal(full, tiny.logits)
    assert torch.equal(tiny.forward(), tiny.logits)


def test_layers_below_do_not_run(olmoe):
    rerun = Rerun(olmoe.model, olmoe.specs)
    with rerun.keeping(2):
        olmoe.forward()
    ran = []
    handles = [
        block.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, block in enumerate(rerun.blocks)
    ]
    with rerun.starting_at(2, rerun.kept(2)):
        olmoe.forward()
    olmoe.forward()
    for handle in handles:
        handle.remove()
    assert ran == [2, 0, 1, 2]


def test_nothing_is_kept_for_the_first_layer(olmoe):
    rerun = Rerun(olmoe.model, olmoe.specs)
    with rerun.keeping(0):
        olmoe.forward()
    assert rerun.kept(0) is None
    with rerun.starting_at(0, None):
        assert torch.equal(olmoe.forward(), olmoe.logits)


def test_hooks_are_gone_after_the_block(olmoe):
    spec = olmoe.specs[0]
    with Intervention(olmoe.model, olmoe.specs) as intervention:
        intervention.begin({spec.name: Change(output=torch.ones(32))}, rows=ROWS)
    assert torch.equal(olmoe.forward(), olmoe.logits)


@pytest.mark.parametrize("family", ["jetmoe", "llama4_text", "zaya"])
def test_families_that_do_not_hand_over_a_selection_are_refused(family):
    spec = find_routers(tiny_model(family), None).routers[0]
    assert "the selection cannot be replaced" in cannot_change(spec)


def test_a_router_that_selects_all_is_refused():
    spec = find_routers(tiny_model("mixtral", num_experts_per_tok=8), None).routers[0]
    assert cannot_change(spec) == "every token uses all 8 experts, so there is nothing to choose"


def test_experts_that_are_called_otherwise_are_an_error():
    specs = find_routers(tiny_model("llama4_text"), None).routers
    model = tiny_model("llama4_text")
    change = Change(index=torch.zeros(39, 1, dtype=torch.long), weights=torch.ones(39, 1))
    with Intervention(model, specs) as intervention, torch.no_grad():
        intervention.begin({specs[0].name: change}, rows=torch.arange(39))
        with pytest.raises(ArchitectureError, match="1 arguments"):
            model(input_ids=TOKENS)


# Operators, on routes that need no model.

NUM_TOKENS, NUM_EXPERTS, TOP_K = 20_000, 12, 3


@pytest.fixture(scope="module")
def skewed(olmoe):
    """A router of 12 experts, top 3, whose usage is far from even."""
    spec = _spec(olmoe, NUM_EXPERTS, TOP_K)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    logits += torch.linspace(-1.5, 1.5, NUM_EXPERTS)
    weights, index = logits.softmax(dim=-1).topk(TOP_K)
    order = torch.rand(weights.shape, generator=generator).argsort(dim=-1)
    weights, index = weights.gather(-1, order), index.gather(-1, order)
    rule = identify_rule(logits, index, weights, spec)
    usage = torch.bincount(index.flatten(), minlength=NUM_EXPERTS) / NUM_TOKENS
    router = Router(spec=spec, rule=rule, usage=usage, mean_output=torch.zeros(4))
    return router, Routes(index=index, weights=weights, logits=logits)


def _spec(tiny, num_experts, top_k):
    from dataclasses import replace

    return replace(tiny.specs[0], num_experts=num_experts, top_k=top_k)


def change(skewed, name, policy="carry", seed=(0, 3, 0), ids=None, **choice):
    router, routes = skewed
    ids = np.zeros(len(routes.index), dtype=np.int32) if ids is None else ids
    return make_change(name, policy, router, routes, ids, seed=seed, choice=Choice(**choice))


SELECTING = [name for name, each in OPERATORS.items() if each.keys is not None]


@pytest.mark.parametrize("name", SELECTING)
def test_selections_are_distinct_and_keep_the_mass(skewed, name):
    _, routes = skewed
    found = change(skewed, name)
    assert found.index.shape == (NUM_TOKENS, TOP_K)
    assert (found.index.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert torch.equal(found.weights, routes.weights.sort(dim=-1, descending=True).values)


def test_uniform_hits_every_expert_equally(skewed):
    index = change(skewed, "uniform").index
    counts = torch.bincount(index.flatten(), minlength=NUM_EXPERTS).numpy()
    # without replacement the counts vary less than multinomial ones, by (E - K) / (E - 1)
    expected = NUM_TOKENS * TOP_K / NUM_EXPERTS
    spread = (1 - TOP_K / NUM_EXPERTS) * NUM_EXPERTS / (NUM_EXPERTS - 1)
    statistic = ((counts - expected) ** 2).sum() / expected / spread
    assert stats.chi2.sf(statistic, NUM_EXPERTS - 1) > 1e-3
    first = torch.bincount(index[:, 0], minlength=NUM_EXPERTS).numpy()
    assert stats.chisquare(first).pvalue > 1e-3


def test_uniform_overlaps_the_native_set_by_chance(skewed):
    _, routes = skewed
    found = change(skewed, "uniform").index
    overlap = (found[:, :, None] == routes.index[:, None]).any(dim=-1).float().mean()
    assert overlap == pytest.approx(TOP_K / NUM_EXPERTS, abs=0.01)


def test_disjoint_and_next_avoid_the_native_set(skewed):
    _, routes = skewed
    for name in ("disjoint", "next-k"):
        found = change(skewed, name).index
        assert not (found[:, :, None] == routes.index[:, None]).any()


def test_frequency_reproduces_the_usage(skewed):
    router, _ = skewed
    index = torch.cat([change(skewed, "frequency", seed=(0, 3, s)).index for s in range(3)])
    found = torch.bincount(index.flatten(), minlength=NUM_EXPERTS) / len(index)
    error = (router.usage * (1 - router.usage) / len(index)).sqrt()
    assert ((found - router.usage).abs() / error).max() < 4
    assert router.usage.max() / router.usage.min() > 20


def test_gumbel_rates_by_hand():
    assert gumbel_log_rates(np.array([0.5, 0.3, 0.2]), 1) == pytest.approx(
        np.log([0.5, 0.3, 0.2]) - np.log([0.5, 0.3, 0.2]).mean(), abs=1e-3
    )
    even = gumbel_log_rates(np.full(6, 1 / 3), 2)
    assert even == pytest.approx(np.full(6, even[0]), abs=1e-4)
    assert gumbel_log_rates(np.array([1.0, 0.0, 1.0]), 2).tolist() == [0, -np.inf, 0]


def test_inclusion_probabilities_by_enumeration():
    rates = np.array([0.5, 0.25, 0.15, 0.1])
    expected = np.zeros(4)
    for first in range(4):
        for second in set(range(4)) - {first}:
            chance = rates[first] * rates[second] / (1 - rates[first])
            expected[[first, second]] += chance
    assert inclusion_probabilities(np.log(rates), 2) == pytest.approx(expected, abs=1e-6)


def test_shuffled_keeps_routes_whole(skewed):
    _, routes = skewed
    found = change(skewed, "shuffled")

    def rows(index, weights):
        both = torch.cat([index.double(), weights.double()], dim=-1).numpy()
        return both[np.lexsort(both.T)]

    assert np.array_equal(rows(found.index, found.weights), rows(routes.index, routes.weights))
    assert (found.index == routes.index).all(dim=-1).float().mean() < 0.2


def test_shuffled_same_id_stays_among_equal_tokens(skewed):
    _, routes = skewed
    ids = np.random.default_rng(0).integers(0, 500, NUM_TOKENS).astype(np.int32)
    tagged = Routes(index=routes.index, weights=torch.from_numpy(ids)[:, None].float())
    found = change((skewed[0], tagged), "shuffled-same-id", ids=ids)
    assert np.array_equal(found.weights[:, 0].numpy(), ids)
    assert not torch.equal(found.index, routes.index)


def test_shuffles_are_permutations_within_labels():
    labels = np.array([2, 0, 2, 1, 0, 2])
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        source = shuffled_within(labels, generator)
        assert sorted(source) == list(range(6))
        assert (labels[source] == labels).all()
        seen.add(tuple(source))
    assert len(seen) == 6 * 2


def test_bottom_and_next_by_hand(olmoe):
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    spec = _spec(olmoe, 6, 2)
    weights, index = logits.softmax(dim=-1).topk(2)
    rule = identify_rule(logits, index, weights, spec)
    router = Router(spec=spec, rule=rule, usage=torch.ones(6), mean_output=torch.zeros(1))
    given = router, Routes(index=index, weights=weights, logits=logits)
    assert change(given, "bottom-k").index.tolist() == [[4, 5]]
    assert change(given, "next-k").index.tolist() == [[2, 3]]
    own = change(given, "bottom-k", "own").weights
    assert torch.allclose(own, logits.softmax(dim=-1)[:, 4:])
    equal = change(given, "bottom-k", "equal").weights
    assert torch.allclose(equal, weights.mean().expand(1, 2))


def test_static_and_restricted_follow_the_usage(skewed):
    router, _ = skewed
    best = router.usage.argsort(descending=True)
    assert torch.equal(change(skewed, "static").index, best[:3].expand(NUM_TOKENS, -1))
    found = change(skewed, "restricted", most_used=5).index
    assert set(found.unique().tolist()) == set(best[:5].tolist())


def test_permuted_is_one_relabelling_with_each_expert_s_weight(skewed):
    _, routes = skewed
    found = change(skewed, "permuted")
    pairs = torch.stack([routes.index.flatten(), found.index.flatten()]).unique(dim=1)
    assert pairs.shape == (2, NUM_EXPERTS)
    assert torch.equal(found.weights, routes.weights)


@pytest.mark.parametrize("name", [name for name, each in OPERATORS.items() if each.random])
def test_seeds_decide_random_operators(skewed, name):
    ids = np.zeros(NUM_TOKENS, dtype=np.int32)
    one, same, other = (change(skewed, name, seed=(0, 3, s), ids=ids) for s in (0, 0, 1))
    assert torch.equal(one.index, same.index)
    assert not torch.equal(one.index, other.index)


@pytest.mark.parametrize("name", ["uniform", "disjoint", "restricted", "frequency"])
def test_draws_of_the_first_tokens_do_not_depend_on_later_ones(skewed, name):
    router, routes = skewed
    fewer = Routes(index=routes.index[:9000], weights=routes.weights[:9000], logits=None)
    whole, part = change(skewed, name), change((router, fewer), name)
    assert torch.equal(whole.index[:9000], part.index)


def test_groups_are_respected_on_demand():
    tiny = Tiny("deepseek_v3")
    spec = tiny.specs[0]
    routing = tiny.routings[spec.name]
    bias = tiny.model.get_submodule(spec.module).e_score_correction_bias
    rule = identify_rule(
        routing.router_logits, routing.top_k_index, routing.top_k_weights, spec, bias
    )
    assert rule.n_group == 2
    router = Router(
        spec=spec, rule=rule, correction_bias=bias, usage=torch.ones(8), mean_output=torch.ones(1)
    )
    routes = Routes(
        index=routing.top_k_index, weights=routing.top_k_weights, logits=routing.router_logits
    )
    given = router, routes
    native = routes.index // 4
    assert (native == native[:, :1]).all()
    for name in ("uniform", "disjoint", "bottom-k", "next-k"):
        inside = change(given, name, respect_groups=True).index // 4
        assert torch.equal(inside, native), name
    assert not torch.equal(change(given, "uniform").index // 4, native)
    lowest = change(given, "bottom-k").index
    scores = router.scores(routes.logits)
    assert torch.allclose(scores.gather(-1, lowest).amin(-1), scores.amin(-1))


def test_too_few_experts_in_the_allowed_groups(olmoe):
    tiny = Tiny("deepseek_v3", num_experts_per_tok=3)
    spec = tiny.specs[0]
    routing = tiny.routings[spec.name]
    bias = tiny.model.get_submodule(spec.module).e_score_correction_bias
    rule = identify_rule(
        routing.router_logits, routing.top_k_index, routing.top_k_weights, spec, bias
    )
    router = Router(
        spec=spec, rule=rule, correction_bias=bias, usage=torch.ones(8), mean_output=torch.ones(1)
    )
    routes = Routes(
        index=routing.top_k_index, weights=routing.top_k_weights, logits=routing.router_logits
    )
    with pytest.raises(RequestError, match="fewer than 3 experts"):
        change((router, routes), "disjoint", respect_groups=True)


def test_refusals_name_their_reason(skewed):
    from dataclasses import replace

    router, _ = skewed
    unknown = replace(router, rule=None)
    assert "bottom-k reads the router's scores" in refusal("bottom-k", "carry", unknown, Choice())
    assert "'own'" in refusal("uniform", "own", unknown, Choice())
    assert "--respect-groups" in refusal("uniform", "carry", unknown, Choice(respect_groups=True))
    for name in ("uniform", "shuffled", "frequency", "static", "permuted", "skip", "mean"):
        assert refusal(name, "carry", unknown, Choice()) is None
    crowded = replace(router, spec=replace(router.spec, top_k=7))
    assert refusal("disjoint", "carry", crowded, Choice()) == (
        "disjoint needs 14 experts, and there are 12"
    )
    assert "fewer than the 3" in refusal("restricted", "carry", router, Choice(most_used=2))


def test_unknown_operators_name_the_nearest():
    with pytest.raises(RequestError, match="Did you mean 'shuffled'"):
        operator("shufled")
