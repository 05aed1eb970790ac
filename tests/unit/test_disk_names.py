import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers.core_model_loading import ConversionOps, WeightConverter

from moetools.architectures._keys import Source
from moetools.checkpoint import Checkpoint
from moetools.disk_names import DiskNames, disk_changes
from moetools.edit_plan import tensor_bytes
from moetools.errors import ArchitectureError

FUSED = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"
ROUTER = "model.layers.1.mlp.gate.weight"
PARTS = "model.layers.1.mlp.experts"


@pytest.fixture
def model(tmp_path):
    """A saved OLMoE of 8 experts: one file for each on disk, two tensors of a layer in memory."""
    return save_tiny("olmoe", tmp_path)


def opened(path):
    return Checkpoint.open(str(path))


def changed_on_disk(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_one_expert_of_a_fused_tensor_is_its_own_tensors_on_disk(tmp_path, model):
    new = model.state_dict()[FUSED].clone()
    new[3, 0, 0] += 1
    changes = disk_changes(opened(tmp_path), {FUSED: new})
    (key,) = changes
    assert key == f"{PARTS}.3.gate_proj.weight"
    intermediate = new.shape[1] // 2
    assert bytes(changes[key].read()) == bytes(tensor_bytes(new[3, :intermediate]))
    new[3, -1, 0] += 1
    assert sorted(disk_changes(opened(tmp_path), {FUSED: new})) == [
        f"{PARTS}.3.gate_proj.weight",
        f"{PARTS}.3.up_proj.weight",
    ]


def test_nothing_changes_without_a_change(tmp_path, model):
    state = model.state_dict()
    assert disk_changes(opened(tmp_path), state) == {}


def test_values_are_cast_to_the_dtype_on_disk(tmp_path, model):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    old = model.state_dict()[ROUTER].float()
    assert disk_changes(opened(tmp_path), {ROUTER: old * (1 + 1e-5)}) == {}
    (change,) = disk_changes(opened(tmp_path), {ROUTER: old * 1.1}).values()
    assert change.dtype == "BF16"
    assert bytes(change.read()) == bytes(tensor_bytes((old * 1.1).bfloat16()))


def test_a_tensor_is_made_once_to_look_and_once_to_write(tmp_path, model):
    made = []

    def maker(name):
        def make():
            made.append(name)
            return model.state_dict()[name] + 1

        return make

    names = (FUSED, DOWN, ROUTER)
    changes = disk_changes(opened(tmp_path), {name: maker(name) for name in names})
    assert made == list(names)
    assert len(changes) == 3 * 8 + 1
    for key in sorted(changes):  # experts alternate between both tensors
        changes[key].read()
    assert sorted(made[3:]) == sorted(names)


def test_a_tied_tensor_is_one(tmp_path):
    model = save_tiny("olmoe", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in opened(tmp_path).tensors
    new = model.state_dict()["lm_head.weight"] + 1
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert list(disk_changes(opened(tmp_path), {name: new})) == ["model.embed_tokens.weight"]
    both = {"lm_head.weight": new, "model.embed_tokens.weight": new}
    with pytest.raises(ValueError, match="are tied: they are one tensor"):
        disk_changes(opened(tmp_path), both)
    changed_on_disk(tmp_path, lambda t: t.update({"lm_head.weight": new.clone()}))
    assert sorted(disk_changes(opened(tmp_path), {"lm_head.weight": new + 1})) == sorted(both)


def test_names_and_shapes_that_the_model_does_not_have(tmp_path, model):
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM has no tensor model\.layers\.9"):
        disk_changes(opened(tmp_path), {"model.layers.9.mlp.gate.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"has shape .* got"):
        disk_changes(opened(tmp_path), {ROUTER: torch.zeros(3, 3)})


def test_experts_with_scales_are_refused_and_routers_are_not(tmp_path, model):
    key = f"{PARTS}.3.up_proj.weight"

    def quantise(tensors):
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.ones(1, 1)

    changed_on_disk(tmp_path, quantise)
    state = model.state_dict()
    with pytest.raises(ArchitectureError, match=r"3\.up_proj\.weight is quantised \(F8_E4M3\)"):
        disk_changes(opened(tmp_path), {FUSED: state[FUSED] + 1})
    assert list(disk_changes(opened(tmp_path), {ROUTER: state[ROUTER] + 1})) == [ROUTER]


def test_packed_experts_are_refused(tmp_path):
    model = save_tiny("gpt_oss", tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"

    def pack(tensors):
        del tensors[name]
        tensors[f"{name}_blocks"] = torch.zeros(8, 48, 1, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(8, 48, 1, dtype=torch.uint8)

    changed_on_disk(tmp_path, pack)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ArchitectureError, match="cannot be changed: it is stored quantised"):
        disk_changes(opened(tmp_path), {name: model.state_dict()[name]})


def test_what_is_not_stored_is_refused(tmp_path, model):
    changed_on_disk(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ArchitectureError, match="no tensor on disk is loaded into it"):
        disk_changes(opened(tmp_path), {"lm_head.weight": model.state_dict()["lm_head.weight"]})


def test_one_tensor_from_two_files_is_refused(tmp_path, model):
    new = model.state_dict()[FUSED]
    changed_on_disk(tmp_path, lambda tensors: tensors.update({FUSED: new.clone()}))
    with pytest.raises(ArchitectureError, match="several tensors on disk are loaded into it"):
        disk_changes(opened(tmp_path), {FUSED: new + 1})


class Doubling(ConversionOps):
    """An operation whose reverse is not its inverse."""

    def __init__(self, reversible):
        self.reversible = reversible

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        (values,) = input_dict.values()
        return {target_patterns[0]: [2 * values[0]]}

    @property
    def reverse_op(self):
        if not self.reversible:
            raise NotImplementedError("there is none")
        return self


@pytest.mark.parametrize("reversible", [True, False])
def test_a_conversion_without_an_exact_way_back_is_refused(tmp_path, model, reversible):
    names = DiskNames(opened(tmp_path))
    pattern = "model.norm.weight"
    converter = WeightConverter(pattern, pattern, operations=[Doubling(reversible)])
    names.sources[pattern] = [Source(key=pattern, converter=converter, pattern=pattern)]
    assert torch.equal(names.load(pattern)[pattern], 2 * model.state_dict()[pattern])
    reason = "would not be loaded as it was given" if reversible else "there is none"
    with pytest.raises(ArchitectureError, match=f"cannot be taken back .*{reason}"):
        names.changes({pattern: model.state_dict()[pattern] + 1})
