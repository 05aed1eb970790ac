"""Experts read from disk against the model that transformers loads itself, family by family."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moetools.architectures import find_routers, get_tensor
from moetools.checkpoint import Checkpoint
from moetools.errors import ArchitectureError
from moetools.experts import OTHER_INPUT, ExpertReader, own_output
from moetools.loading import load_model

MODEL_TYPES = tiny_models.moe_model_types()
CHOSEN = (
    "olmoe", "mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v3", "deepseek_v4", "gpt_oss",
    "llama4_text", "granitemoe", "phimoe", "dbrx", "aria_text", "longcat_flash", "nemotron_h",
    "ernie4_5_vl_moe", "inkling_text", "step3p7", "hunyuan_v1_moe", "lfm2_moe", "minimax_m2",
)  # fmt: skip
"""Every layout on disk and in memory, and every activation that is not the usual one."""

READS_ANOTHER = ("gemma4", "gemma4_text", "muse_spark", "zaya")
"""Families whose router and experts do not read the same vector."""


@dataclass(frozen=True)
class Case:
    path: Path
    model: PreTrainedModel
    reader: ExpertReader


@pytest.fixture(scope="module", params=CHOSEN)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        tiny_models.save_tiny(request.param, Path(folder))
        model = load_model(folder, dtype=torch.float32, device="cpu")
        yield Case(Path(folder), model, ExpertReader(Checkpoint.open(folder)))


def inputs_of(model: PreTrainedModel, *paths: str) -> list[Tensor]:
    """The first float tensor that each module was called with."""
    seen: dict[str, Tensor] = {}

    def keep(path: str):
        def hook(module: nn.Module, args, kwargs) -> None:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            first = next(each for each in tensors if each.is_floating_point())
            seen.setdefault(path, first.detach().reshape(-1, first.shape[-1]).clone())

        return hook

    handles = [
        model.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True)
        for path in paths
    ]
    with torch.no_grad():
        model(input_ids=torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(0)))
    for handle in handles:
        handle.remove()
    return [seen[path] for path in paths]


def test_every_expert_gives_the_outputs_of_the_loaded_model(case):
    generator = torch.Generator().manual_seed(1)
    assert case.reader.routers
    for layer in case.reader.layers():
        module = case.model.get_submodule(case.reader.routers[layer.name].experts_module)
        inputs = 3 * torch.randn(5, layer.router_weight.shape[1], generator=generator)
        for expert in range(layer.num_experts):
            expected = own_output(module, module.state_dict(), expert, inputs)
            first, hidden = layer.experts.hidden(expert, inputs)
            torch.testing.assert_close(layer.experts.output(expert, hidden), expected)
            torch.testing.assert_close(first, neurons_applied(layer, expert, inputs))


def neurons_applied(layer, expert: int, inputs: Tensor) -> Tensor:
    gate_bias, up_bias = layer.experts.gate_bias, layer.experts.up_bias
    bias = up_bias if layer.experts.gate is None else gate_bias
    return inputs @ layer.neurons(expert).T + (0 if bias is None else bias[expert])


def test_router_rows_are_those_of_the_loaded_model(case):
    for name, spec in case.reader.routers.items():
        layer = case.reader.read(name)
        weight = get_tensor(case.model, spec.weight_name)
        torch.testing.assert_close(layer.router_weight, weight[: layer.num_experts].float())
        assert layer.layer == spec.layer
        correction = get_tensor(case.model, spec.correction_bias_name)
        if correction is not None and spec.correction_bias_key is not None:
            expected = correction.float().reshape(-1)[: layer.num_experts]
            torch.testing.assert_close(layer.correction_bias, expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_router_and_experts_read_the_same_vector_unless_refused(model_type):
    model = tiny_models.tiny_model(model_type)
    if model_type in READS_ANOTHER:
        return
    assert model_type not in OTHER_INPUT
    spec = find_routers(model, None).routers[-1]
    of_router, of_experts = inputs_of(model, spec.module, spec.experts_module)
    if model_type.startswith("llama4"):  # every expert gets every token times its score
        summed = of_experts.view(-1, *of_router.shape).sum(dim=0)
        of_experts = nn.functional.normalize(summed, dim=1) * of_router.norm(dim=1, keepdim=True)
    torch.testing.assert_close(of_router, of_experts)


@pytest.mark.parametrize("model_type", READS_ANOTHER)
def test_families_whose_experts_read_another_vector_are_refused(model_type, tmp_path):
    tiny_models.save_tiny(model_type, tmp_path)
    with pytest.raises(ArchitectureError, match=f"'{model_type}' (read another|are stored)"):
        list(ExpertReader(Checkpoint.open(str(tmp_path))).layers())


def test_all_families_are_named():
    assert set(CHOSEN) <= set(MODEL_TYPES)
    assert set(READS_ANOTHER) <= set(MODEL_TYPES)
