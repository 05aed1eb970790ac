"""Every MoE family of transformers: routers found, recorded selections drive the output.

Each family is a tiny random model, saved and read back by its headers. What is compared with is
the model itself: the tensors on disk, the output of its router module, its logits.
"""

import functools
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import readme
import supported_families
import tiny_models
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moetools.architectures import (
    REFUSED,
    RouterDiscovery,
    RouterSpec,
    find_routers,
    get_tensor,
    refusal,
)
from moetools.hooks import RouterRecorder, Routing
from moetools.loading import empty_model, load_model
from moetools.routing import common_rules, fitting_rules, identify_rule

MODEL_TYPES = tiny_models.moe_model_types()

BY_NAME = (
    "olmoe", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe",
    "qwen3_5_moe_text", "deepseek_v2", "deepseek_v3", "gpt_oss", "phimoe", "glm4_moe", "granitemoe",
    "ernie4_5_moe", "minimax_m2", "hunyuan_v1_moe", "dots1", "lfm2_moe", "jamba", "nemotron_h",
    "llama4", "llama4_text", "dbrx", "jetmoe",
)  # fmt: skip
"""Families that must never be missing."""

UNKNOWN_RULE = {
    "deepseek_v4": ["00"],
    "inkling_mm_model": ["00", "01", "02"],
    "inkling_text": ["00", "01", "02"],
}
"""Routers whose rule is no function of the logits: a table of token ids; shared experts inside."""

RULES = {
    "olmoe": "softmax, top-2",
    "mixtral": "softmax, top-2, /sum",
    "deepseek_v2": "softmax, groups 1 of 2 (max), top-2, x1.5",
    "deepseek_v3": "sigmoid + bias on scores, groups 1 of 2 (top2_sum), top-2, /sum, x1.5",
    "gpt_oss": "top_k_softmax, top-2",
    "phimoe": "sparse_mixer, top-2",
    "ernie4_5_moe": "softmax + bias on scores, top-2, /sum",
    "mistral4": "softmax, groups 1 of 2 (top2_sum), top-2, /sum, x1.5",
    "gemma4_text": "softmax, top-2, /sum, x expert scale",
    "llama4_text": "sigmoid, top-2",
    "longcat_flash": "softmax + bias on scores, top-3, x1.5",
    "kolibri1": "sigmoid + bias on logits, top-2",
    "lfm2_moe": "sigmoid + bias on scores, top-2, /sum, x1.5",
    "jetmoe": "top_k_softmax, top-2",
    "dbrx": "softmax, top-2, /sum",
    "inkling2_text": "sigmoid + bias on scores, top-2, /sum, x8",
}

TOKENS = torch.randint(3, 90, (3, 13), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny model, its checkpoint, what was found, and one recorded forward pass."""

    model: PreTrainedModel
    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    discovery: RouterDiscovery
    logits: Tensor
    routings: Mapping[str, Routing]


@pytest.fixture(scope="module")
def checkpoints() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
    family.cache_clear()


@functools.cache
def family(model_type: str, folder: Path) -> Family:
    path = folder / model_type
    model = tiny_models.save_tiny(model_type, path)
    shapes = tiny_models.shapes_on_disk(path)
    discovery = find_routers(model, shapes)
    logits, routings = record(model, discovery.routers)
    return Family(
        model=model,
        path=path,
        shapes=shapes,
        discovery=discovery,
        logits=logits,
        routings=routings,
    )


def record(
    model: PreTrainedModel, routers: tuple[RouterSpec, ...]
) -> tuple[Tensor, dict[str, Routing]]:
    with (
        torch.no_grad(),
        RouterRecorder(model, routers, keep=frozenset({"logits", "inputs"})) as recorder,
    ):
        recorder.begin(num_tokens=TOKENS.numel())
        logits = forward(model)
        return logits, recorder.take()


def forward(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_router_tensor_on_disk_is_found(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    on_disk = router_weights_on_disk(each.shapes, each.model)
    found = {spec.weight_key for spec in each.discovery.routers}
    assert on_disk == found | (set(each.discovery.ignored) & on_disk)
    assert len(found) == len(each.discovery.routers)
    for spec in each.discovery.routers:
        assert spec.weight_key in spec.keys
        assert set(spec.keys) <= set(each.shapes)
        for key in (spec.bias_key, spec.correction_bias_key):
            assert key is None or key in spec.keys


def router_weights_on_disk(
    shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel
) -> set[str]:
    """Matrices with as many rows (or columns) as experts whose key names a router."""
    config = model.config.get_text_config()
    num_experts = {8, 9, 10, 8 + getattr(config, "n_shared_experts", 0)}
    named = re.compile(
        r"\.(gate|router|gate\.wg|router\.(layer|gate|classifier|proj)|router_mlp\.out_proj)\.weight(_1)?$"
    )
    return {
        key
        for key, shape in shapes.items()
        if named.search(key) and len(shape) == 2 and num_experts & set(shape)
    }


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_headers_and_config_are_enough(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    assert find_routers(empty_model(each.model.config), each.shapes) == each.discovery


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_recorded_selection_drives_the_output(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    with replay(each.model, each.discovery.routers, each.routings):
        assert torch.equal(forward(each.model), each.logits)
    for spec in each.discovery.routers:
        changed = {**each.routings, spec.name: another_expert(spec, each.routings[spec.name])}
        with replay(each.model, each.discovery.routers, changed):
            assert not torch.equal(forward(each.model), each.logits), spec.name


def another_expert(spec: RouterSpec, routing: Routing) -> Routing:
    """One token sent to an expert that it did not select."""
    row = int(routing.top_k_weights[:, 0].argmax())
    others = set(range(spec.num_experts - spec.num_skip_classes))
    index = routing.top_k_index.clone()
    index[row, 0] = min(others - set(index[row].tolist()))
    return Routing(top_k_index=index, top_k_weights=routing.top_k_weights)


@contextmanager
def replay(
    model: nn.Module, routers: tuple[RouterSpec, ...], routings: Mapping[str, Routing]
) -> Iterator[None]:
    """Make a model use given selections, in the form that each family hands them on."""
    with ExitStack() as hooks:
        for spec in routers:
            routing = routings[spec.name]
            family_name = (spec.reader or "").rpartition(".")[2]
            if spec.tap == "experts":
                module = model.get_submodule(spec.experts_module)
                hook = functools.partial(replace_arguments, spec, routing, family_name)
                handle = module.register_forward_pre_hook(hook)
            else:
                module = model.get_submodule(spec.module)
                hook = functools.partial(ROUTER_OUTPUTS[family_name], spec, routing)
                handle = module.register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield


def replace_arguments(
    spec: RouterSpec, routing: Routing, family_name: str, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    index = routing.top_k_index
    if family_name == "zaya":
        index = index.masked_fill(index == spec.num_experts - 1, 0)
    return args[0], index, routing.top_k_weights


def replace_scores(
    spec: RouterSpec, routing: Routing, module: nn.Module, args: Any, output: Any
) -> Any:
    scores = torch.zeros_like(output[0])
    return scores.scatter(1, routing.top_k_index, routing.top_k_weights), output[1]


def replace_order(
    spec: RouterSpec, routing: Routing, module: nn.Module, args: Any, output: Any
) -> Any:
    experts = routing.top_k_index.flatten()
    order = experts.argsort(stable=True)
    sizes = torch.bincount(experts, minlength=spec.num_experts).tolist()
    return order, order // spec.top_k, routing.top_k_weights.flatten()[order], sizes, output[4]


ROUTER_OUTPUTS = {"llama4": replace_scores, "jetmoe": replace_order}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_selection_is_the_routers_own(model_type: str, checkpoints: Path) -> None:
    """Against the ids and weights that the router module returned, read without the recorder."""
    each = family(model_type, checkpoints)
    outputs: dict[str, Any] = {}
    with ExitStack() as hooks:
        for spec in each.discovery.routers:
            path = spec.module.removesuffix(".proj") if "gemma4" in model_type else spec.module

            def keep(module: nn.Module, args: Any, output: Any, name: str = spec.name) -> None:
                outputs[name] = output

            handle = each.model.get_submodule(path).register_forward_hook(keep)
            hooks.callback(handle.remove)
        forward(each.model)
    for spec in each.discovery.routers:
        index, weights = own_selection(model_type, spec, outputs[spec.name])
        routing = each.routings[spec.name]
        assert torch.equal(routing.top_k_index, index)
        assert torch.equal(routing.top_k_weights, weights)


def own_selection(model_type: str, spec: RouterSpec, output: Any) -> tuple[Tensor, Tensor]:
    if model_type.startswith("llama4"):
        logits, index = output[1].topk(spec.top_k, dim=-1)
        return index, logits.sigmoid()
    if model_type == "jetmoe":
        logits, index = output[4].topk(spec.top_k, dim=-1)
        return index, logits.softmax(dim=-1)
    if model_type == "dbrx":
        weights, index = output.softmax(dim=-1).topk(spec.top_k, dim=-1)
        return index, weights / torch.norm(weights, p=1, dim=-1, keepdim=True)
    # their places in the tuple moved between releases of transformers
    index = next(each for each in output if not each.is_floating_point())
    weights = next(e for e in output if e.shape == index.shape and e.is_floating_point())
    if model_type == "zaya":
        index = index.masked_fill(weights == 0, spec.num_experts - 1)
    return index, weights


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_logits_are_linear_in_the_router_inputs(model_type: str, checkpoints: Path) -> None:
    """Where the router is one matrix: inputs, the tensor named on disk, and logits fit together."""
    if model_type in ("zaya", "laguna", "muse_spark"):
        pytest.skip("its logits are no linear function: an MLP, a soft cap, a multiplier")
    each = family(model_type, checkpoints)
    for spec in each.discovery.routers:
        routing = each.routings[spec.name]
        assert routing.router_logits is not None
        assert routing.router_inputs is not None
        weight = get_tensor(each.model, spec.weight_name)
        assert weight is not None
        bias = (
            get_tensor(each.model, spec.weight_name.removesuffix("weight") + "bias")
            if spec.bias_key
            else 0
        )
        linear = routing.router_inputs @ weight.T + bias
        torch.testing.assert_close(
            linear[:, : spec.num_experts], routing.router_logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rule_reproduces_the_selection(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    unknown, words = [], set()
    for spec in each.discovery.routers:
        routing = each.routings[spec.name]
        assert routing.router_logits is not None
        bias = get_tensor(each.model, spec.correction_bias_name)
        scale = get_tensor(each.model, spec.expert_scale_name)
        rule = identify_rule(
            routing.router_logits, routing.top_k_index, routing.top_k_weights, spec, bias, scale
        )
        if rule is None:
            unknown.append(spec.name)
            continue
        assert (rule.num_tokens, rule.num_ties) == (TOKENS.numel(), 0)
        words.add(rule.describe())
        index, weights = rule.select(routing.router_logits, bias, scale)
        places = index.argsort(dim=-1)
        recorded = routing.top_k_index.argsort(dim=-1)
        assert torch.equal(index.gather(1, places), routing.top_k_index.gather(1, recorded))
        torch.testing.assert_close(
            weights.gather(1, places), routing.top_k_weights.gather(1, recorded)
        )
        probabilities = rule.probabilities(routing.router_logits)
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(TOKENS.numel()))
    assert unknown == UNKNOWN_RULE.get(model_type, [])
    assert len(words) <= 1, "routers of one model follow one rule"
    if model_type in RULES:
        assert words == {RULES[model_type]}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_references_are_not_overwritten_later(model_type: str, checkpoints: Path) -> None:
    """The recorder keeps references: a model that wrote into them would change the record."""
    each = family(model_type, checkpoints)
    copies: dict[str, tuple[Tensor, ...]] = {}
    recorder = RouterRecorder(each.model, each.discovery.routers, keep=frozenset({"logits"}))
    with recorder, ExitStack() as hooks:
        for name, recording in recorder._recordings.items():

            def copy(
                module: nn.Module, args: Any, output: Any, name: str = name, kept: Any = recording
            ) -> None:
                copies[name] = (kept.index.clone(), kept.weights.clone(), kept.logits.clone())

            path = recording.spec.experts_module
            hooks.callback(each.model.get_submodule(path).register_forward_hook(copy).remove)
        recorder.begin(num_tokens=TOKENS.numel())
        forward(each.model)
        routings = recorder.take()
    for name, routing in routings.items():
        index, weights, logits = copies[name]
        assert routing.router_logits is not None
        assert torch.equal(routing.top_k_index, index)
        assert torch.equal(routing.top_k_weights, weights)
        assert torch.equal(routing.router_logits, logits)


@pytest.mark.parametrize("model_type", BY_NAME)
def test_loaded_checkpoint_routes_as_the_saved_model(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    loaded = load_model(each.path, dtype="auto", device="cpu", experts_implementation="eager")
    assert not loaded.training
    routings = record(loaded, each.discovery.routers)[1]
    for name, routing in each.routings.items():
        assert torch.equal(routings[name].top_k_index, routing.top_k_index)


@pytest.mark.parametrize("model_type", BY_NAME)
def test_one_rule_fits_all_routers_in_bfloat16(model_type: str, checkpoints: Path) -> None:
    each = family(model_type, checkpoints)
    model = load_model(each.path, dtype=torch.bfloat16, device="cpu")
    routings = record(model, each.discovery.routers)[1]
    fits = {}
    for spec in each.discovery.routers:
        routing = routings[spec.name]
        assert routing.router_logits is not None
        fits[spec.name] = fitting_rules(
            routing.router_logits,
            routing.top_k_index,
            routing.top_k_weights,
            spec,
            get_tensor(model, spec.correction_bias_name),
            get_tensor(model, spec.expert_scale_name),
        )
    rules = set(common_rules(fits).values())
    assert len(rules) == 1
    assert None not in rules


def test_named_families_are_recorded() -> None:
    assert set(BY_NAME) <= set(MODEL_TYPES)


def test_at_least_fifty_folders_are_recorded() -> None:
    folders = tiny_models.moe_folders()
    recorded = [name for name, types in folders.items() if set(types) & set(MODEL_TYPES)]
    assert len(recorded) >= 50


def test_every_family_is_recorded_or_refused_with_a_reason() -> None:
    for folder, model_types in tiny_models.moe_folders().items():
        recorded = set(model_types) & set(MODEL_TYPES)
        refused = {each for each in model_types if each in REFUSED}
        assert recorded or refused, folder


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_refused_families_say_why(model_type: str, reason: str) -> None:
    told = refusal({"model_type": model_type})
    assert told is not None
    assert reason in told
    assert model_type in told


def test_table_of_families_is_current() -> None:
    """Rows and reasons; the rules in it are held by `RULES` and by reproduction above."""
    rows = readme.section(readme.README.read_text(encoding="utf-8"), "families").splitlines()
    listed = {name for row in rows if (name := row.partition("` |")[0].removeprefix("| `")) != row}
    installed = {*MODEL_TYPES, *REFUSED}
    assert installed <= listed, "run tests/readme.py"
    for model_type in BY_NAME:
        assert supported_families.row(model_type) in rows
    for model_type, reason in REFUSED.items():
        assert f"| `{model_type}` | {reason} |" in rows
