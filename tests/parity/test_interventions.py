"""Steering on every MoE family of transformers: hooks against a model whose weights say the same.

Each family is a tiny random model. An intervention that changes nothing must give the model's own
selections and output; one that exchanges logits must give those of a copy whose router weight has
its rows exchanged.
"""

import copy
import functools
from dataclasses import dataclass

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moetools.architectures import RouterSpec, find_routers, get_tensor
from moetools.errors import ArchitectureError
from moetools.hooks import RouterRecorder, Routing
from moetools.interventions import (
    RouterIntervention,
    SteeredRouter,
    Steering,
    cannot_steer,
    find_rules,
    steered_routers,
)

MODEL_TYPES = tiny_models.moe_model_types()

TOKENS = torch.randint(3, 90, (3, 13), generator=torch.Generator().manual_seed(1))

NOTHING = RouterIntervention(mode="constant")

REFUSED = {
    "deepseek_v4": "scoring rule is unknown",
    "inkling_mm_model": "scoring rule is unknown",
    "inkling_text": "scoring rule is unknown",
    "jetmoe": "experts are not called with",
    "llama4": "experts are not called with",
    "llama4_text": "experts are not called with",
    "zaya": "experts are not called with",
}
"""Families with a router that cannot be steered, and why."""


@functools.cache
def family(model_type: str) -> tuple[PreTrainedModel, tuple[RouterSpec, ...], tuple]:
    """A tiny model, all its routers, and those that can be steered, under no intervention."""
    model = tiny_models.tiny_model(model_type)
    routers = find_routers(model, None).routers
    rules = find_rules(model, routers)
    steered = tuple(
        SteeredRouter.of(
            NOTHING,
            spec,
            rules[spec.name],
            correction_bias=get_tensor(model, spec.correction_bias_name),
            expert_scale=get_tensor(model, spec.expert_scale_name),
        )
        for spec in routers
        if cannot_steer(spec) is None and rules[spec.name] is not None
    )
    return model, routers, steered


@torch.no_grad()
def run(
    model: PreTrainedModel, routers: tuple[RouterSpec, ...]
) -> tuple[dict[str, Routing], Tensor]:
    with RouterRecorder(model, routers, keep=frozenset({"logits"})) as recorder:
        recorder.begin(num_tokens=TOKENS.numel())
        logits = model(input_ids=TOKENS, use_cache=False).logits
        return recorder.take(), logits


def by_expert(routing: Routing, num_experts: int) -> Tensor:
    """[T, E] weights, 0 where an expert is not selected: whatever the order of the K."""
    dense = torch.zeros(len(routing.top_k_index), num_experts)
    return dense.scatter_(-1, routing.top_k_index, routing.top_k_weights.float())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_that_stay_give_the_models_own_selection_and_output(model_type):
    model, routers, steered = family(model_type)
    if not steered:
        assert model_type in REFUSED
        return
    native, output = run(model, routers)
    with Steering(model, steered):
        again, steered_output = run(model, routers)
    for router in steered:
        name, width = router.spec.name, router.spec.num_experts
        torch.testing.assert_close(
            by_expert(again[name], width), by_expert(native[name], width), rtol=1e-5, atol=1e-6
        )
        assert torch.equal(again[name].router_logits, native[name].router_logits.float())
    torch.testing.assert_close(steered_output, output, rtol=1e-4, atol=1e-5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged(SteeredRouter):
    """The logits of the experts in reverse order, except those that select none."""

    def logits(self, router_logits: Tensor) -> Tensor:
        return router_logits.float().flip(-1)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_exchanged_logits_are_an_exchanged_weight(model_type):
    model, routers, steered = family(model_type)
    if not steered:
        assert model_type in REFUSED
        return
    exchanged = tuple(
        Exchanged(
            spec=each.spec, rule=each.rule, correction_bias=each.correction_bias,
            expert_scale=each.expert_scale, intervention=each.intervention, noise=None,
        )
        for each in steered
    )  # fmt: skip
    other = copy.deepcopy(model)
    with torch.no_grad():
        for each in steered:
            names = [each.spec.weight_name]
            if each.spec.bias_key is not None:
                names.append(each.spec.weight_name.removesuffix("weight") + "bias")
            for name in names:
                tensor = get_tensor(other, name)
                tensor.copy_(tensor.flip(0))
    wanted, wanted_output = run(other, routers)
    unsteered = run(model, routers)[1]
    with Steering(model, exchanged):
        found, output = run(model, routers)
    assert (unsteered - wanted_output).abs().max() > 1e-3
    for each in steered:
        name, width = each.spec.name, each.spec.num_experts
        torch.testing.assert_close(
            by_expert(found[name], width), by_expert(wanted[name], width), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            found[name].router_logits, wanted[name].router_logits.float(), rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(output, wanted_output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_refusals_are_those_that_are_known(model_type):
    model, routers, steered = family(model_type)
    left = [spec for spec in routers if spec.name not in {each.spec.name for each in steered}]
    assert bool(left) == (model_type in REFUSED)
    rules = dict.fromkeys([spec.name for spec in left])
    for spec in left:
        made = RouterIntervention(mode="soft", strength=0.5, promote={spec.name: (0,)})
        with pytest.raises(ArchitectureError, match=REFUSED[model_type]) as error:
            steered_routers(model, routers, made, rules)
        assert f"Router {spec.name} cannot be steered" in str(error.value)
