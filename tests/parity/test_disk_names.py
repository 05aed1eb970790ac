"""Changes in memory taken to disk and loaded again by transformers, for every family."""

import pytest
import tiny_models
import torch

from moetools.architectures import find_routers
from moetools.checkpoint import Checkpoint
from moetools.disk_names import disk_changes
from moetools.edit_plan import EditPlan, EditRecord, has_equal_bits
from moetools.loading import load_model
from moetools.writing import write_checkpoint

CHOSEN = (
    "olmoe", "mixtral", "qwen3_moe", "qwen3_5_moe", "deepseek_v3", "deepseek_v4", "gpt_oss",
    "llama4_text", "granitemoe", "phimoe", "dbrx", "aria_text", "longcat_flash", "nemotron_h",
    "ernie4_5_vl_moe", "inkling_text", "step3p7", "hunyuan_v1_moe", "lfm2_moe", "minimax_m2",
    "jetmoe", "zaya",
)  # fmt: skip
"""Every layout on disk and in memory; the other families are slow."""

OVERWRITTEN = ("balancing_biases",)
"""Ends with a number that the model sets itself after loading (zaya)."""

FAMILIES = [
    pytest.param(name, marks=[] if name in CHOSEN else pytest.mark.slow)
    for name in tiny_models.moe_model_types()
]


def loaded(path):
    return load_model(path, dtype="auto", device="cpu").state_dict()


def random_like(name, tensor, generator):
    if not tensor.is_floating_point():
        return tensor.roll(1) if tensor.dim() else tensor + 1
    changed = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    if name.endswith(OVERWRITTEN):
        changed[-1] = tensor[-1]
    return changed


def first_names(model):
    """Name of every tensor -> the first name of it: tied ones have several."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = {}
    for name, parameter in parameters.items():
        first.setdefault(id(parameter), name)
    return {
        name: first[id(parameters[name])] if name in parameters else name
        for name in model.state_dict()
    }


@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_changed_is_loaded_and_nothing_else(model_type, fused, tmp_path):
    model = tiny_models.tiny_model(model_type)
    model.save_pretrained(tmp_path / "a", save_original_format=not fused)
    checkpoint = Checkpoint.open(str(tmp_path / "a"))
    before = loaded(tmp_path / "a")
    shapes = {key: info.shape for key, info in checkpoint.tensors.items()}
    routers = {spec.weight_name for spec in find_routers(model, shapes).routers}
    assert routers <= before.keys()
    one_of = first_names(model)
    generator = torch.Generator().manual_seed(1)
    for half in (0, 1):
        new = {
            name: random_like(name, tensor, generator)
            for number, (name, tensor) in enumerate(before.items())
            if one_of[name] == name and (number % 2 == half or (half and name in routers))
        }
        changes = disk_changes(checkpoint, new)
        record = EditRecord(method="test", parameters={}, model=checkpoint.name, version="0")
        plan = EditPlan(checkpoint=checkpoint, changes=changes, record=record)
        out = tmp_path / f"b{half}"
        write_checkpoint(plan, out)
        after = loaded(out)
        expected = {name: (before | new)[one_of[name]] for name in before}
        assert [name for name in expected if not has_equal_bits(after[name], expected[name])] == []
        assert all(
            changes[key].dtype == info.dtype and changes[key].shape == info.shape
            for key, info in checkpoint.tensors.items()
            if key in changes
        )
