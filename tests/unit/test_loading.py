"""Models without weights, and checkpoints loaded for recording."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel, T5Config, ViTConfig

from moetools.architectures import find_routers, refusal
from moetools.errors import ArchitectureError, CheckpointError
from moetools.loading import empty_model, load_model


def test_empty_model_has_shapes_and_no_weights() -> None:
    model = empty_model(tiny_models.tiny_config("olmoe"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not model.training


def test_text_part_of_a_multimodal_config_is_built() -> None:
    assert type(empty_model(tiny_models.tiny_config("llama4"))).__name__ == "Llama4ForCausalLM"


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()])
def test_models_that_predict_no_next_token_are_refused(config: object) -> None:
    with pytest.raises(ArchitectureError, match="no causal language model for model_type"):
        empty_model(config)


def test_loaded_model_is_the_saved_one(tmp_path: Path) -> None:
    saved = tiny_models.save_tiny("mixtral", tmp_path)
    loaded = load_model(tmp_path, dtype="auto", device="cpu")
    assert not loaded.training
    assert loaded.config._experts_implementation == "eager"
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_dtype_and_implementations_are_those_asked_for(tmp_path: Path) -> None:
    tiny_models.save_tiny("olmoe", tmp_path)
    loaded = load_model(
        tmp_path,
        dtype=torch.bfloat16,
        device="cpu",
        attention="eager",
        experts_implementation="grouped_mm",
    )
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"
    assert loaded.config._experts_implementation == "grouped_mm"


def test_missing_tensor_is_an_error(tmp_path: Path) -> None:
    tiny_models.save_tiny("olmoe", tmp_path)
    shard = tmp_path / "model.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors .*layers\.1\.self_attn\.q_proj\.weight"):
        load_model(tmp_path, dtype="auto", device="cpu")


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    model = tiny_models.save_tiny("olmoe", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(tmp_path, dtype="auto", device="cpu")


def save_fused(model_type: str, path: Path) -> PreTrainedModel:
    """A checkpoint whose experts are stacked on disk as they are in memory."""
    model = tiny_models.tiny_model(model_type)
    model.save_pretrained(path, save_original_format=False)
    return model


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "ernie4_5_moe"])
def test_stacked_experts_on_disk_are_loaded_and_their_routers_found(
    model_type: str, tmp_path: Path
) -> None:
    saved = save_fused(model_type, tmp_path)
    shapes = tiny_models.shapes_on_disk(tmp_path)
    assert any(key.endswith("experts.gate_up_proj") for key in shapes)
    routers = find_routers(empty_model(saved.config), shapes).routers
    assert all(spec.weight_key == spec.weight_name for spec in routers)
    loaded = load_model(tmp_path, dtype="auto", device="cpu")
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


REMOTE_CODE = """
from transformers import OlmoeConfig, OlmoeForCausalLM

class HouseConfig(OlmoeConfig):
    model_type = "house_moe"

class HouseForCausalLM(OlmoeForCausalLM):
    config_class = HouseConfig
"""


def test_code_of_the_checkpoint_runs_with_the_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = tmp_path / "house"
    save_fused("olmoe", folder)
    (folder / "house.py").write_text(REMOTE_CODE)
    values = json.loads((folder / "config.json").read_text())
    values["model_type"] = "house_moe"
    values["auto_map"] = {
        "AutoConfig": "house.HouseConfig",
        "AutoModelForCausalLM": "house.HouseForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(values))
    assert "--trust-remote-code" in (refusal(values) or "")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    empty = empty_model(config, trust_remote_code=True)
    found = find_routers(empty, tiny_models.shapes_on_disk(folder)).routers
    assert [spec.name for spec in found] == ["00", "01", "02"]
    loaded = load_model(folder, dtype="auto", device="cpu", trust_remote_code=True)
    assert type(loaded).__name__ == "HouseForCausalLM"


def test_truncated_weights_are_an_error(tmp_path: Path) -> None:
    tiny_models.save_tiny("olmoe", tmp_path)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_model(tmp_path, dtype="auto", device="cpu")
