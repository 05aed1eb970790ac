import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moetools.checkpoint import Checkpoint
from moetools.errors import ArchitectureError
from moetools.experts import ExpertReader, candidates, is_equal, is_gated, normal_form


def change_tensors(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(path, **fields):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_the_embedded_checkpoint_is_read_layer_by_layer():
    checkpoint = Checkpoint.open("demo")
    reader = ExpertReader(checkpoint)
    assert list(reader.routers) == [f"{layer:02}" for layer in range(8)]
    layer = reader.read("03")
    assert (layer.name, layer.layer, layer.num_experts) == ("03", 3, 32)
    assert layer.experts.up.shape == (32, 40, 128)
    assert layer.experts.down.shape == (32, 128, 40)
    on_disk = checkpoint.tensor("model.layers.3.mlp.experts.5.gate_proj.weight")
    assert layer.experts.gate is not None
    assert layer.experts.gate.dtype == on_disk.dtype
    torch.testing.assert_close(layer.neurons(5), on_disk.float())
    assert layer.router_bias is None
    assert layer.correction_bias is None


def test_one_layer_is_read_without_the_others(tmp_path, monkeypatch):
    save_tiny("mixtral", tmp_path)
    checkpoint = Checkpoint.open(str(tmp_path))
    reader = ExpertReader(checkpoint)
    read = []
    original = Checkpoint.tensor
    monkeypatch.setattr(
        Checkpoint, "tensor", lambda self, key: read.append(key) or original(self, key)
    )
    reader.read("01")
    assert read
    assert all(key.startswith("model.layers.1.block_sparse_moe.") for key in read)


def test_half_precision_is_close_enough_and_kept(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    layer = ExpertReader(Checkpoint.open(str(tmp_path))).read("00")
    assert layer.experts.down.dtype == torch.bfloat16
    assert layer.router_weight.dtype == torch.float32


def test_fused_and_single_experts_on_disk_are_the_same(tmp_path):
    model = save_tiny("qwen3_moe", tmp_path / "single")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    single, fused = (ExpertReader(Checkpoint.open(str(tmp_path / n))) for n in ("single", "fused"))
    assert any(".experts.3." in key for key in Checkpoint.open(str(tmp_path / "single")).tensors)
    assert not any(".experts.3." in key for key in Checkpoint.open(str(tmp_path / "fused")).tensors)
    for name in single.routers:
        one, other = single.read(name), fused.read(name)
        torch.testing.assert_close(one.experts.gate, other.experts.gate)
        torch.testing.assert_close(one.experts.down, other.experts.down)


def test_dead_experts_do_not_look_like_a_wrong_layout(tmp_path):
    save_tiny("olmoe", tmp_path)

    def kill(tensors):
        for key in tensors:
            if ".experts.0." in key:
                tensors[key].zero_()

    change_tensors(tmp_path, kill)
    layer = ExpertReader(Checkpoint.open(str(tmp_path))).read("00")
    assert not layer.neurons(0).any()


def test_a_wrong_layout_is_noticed(tmp_path):
    module = save_tiny("gpt_oss", tmp_path).model.layers[0].mlp.experts
    tensors = dict(module.state_dict())
    assert normal_form(module, tensors) is not None
    module.is_concatenated = True
    (wrong,) = candidates(module, tensors)
    assert not is_gated(wrong)
    assert normal_form(module, tensors) is None
    assert normal_form(module, {"weight": torch.zeros(2, 2)}) is None


def test_other_weights_are_noticed(tmp_path):
    module = save_tiny("llama4_text", tmp_path).model.layers[0].feed_forward.experts
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = normal_form(module, tensors)
    assert found is not None
    assert is_equal(found, module, tensors)
    tensors["down_proj"][-1] += 0.1
    assert not is_equal(found, module, module.state_dict())


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_quantised_checkpoints_are_refused(method, tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ArchitectureError, match=rf"quantised \({method}\)"):
        ExpertReader(Checkpoint.open(str(tmp_path)))


def test_quantised_tensors_are_refused_whatever_the_config_says(tmp_path):
    save_tiny("olmoe", tmp_path)
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    change_tensors(
        tmp_path, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e4m3fn)})
    )
    reader = ExpertReader(Checkpoint.open(str(tmp_path)))
    reader.read("00")
    with pytest.raises(ArchitectureError, match=r"experts\.3.*quantised \(F8_E4M3\)"):
        reader.read("01")


def test_missing_experts_are_an_error(tmp_path):
    save_tiny("olmoe", tmp_path)
    change_tensors(
        tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.down_proj.weight")
    )
    reader = ExpertReader(Checkpoint.open(str(tmp_path)))
    with pytest.raises(ArchitectureError, match=r"does not hold model\.layers\.1\.mlp\.experts"):
        reader.read("01")
