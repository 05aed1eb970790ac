import json
import struct
from math import prod

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moetools import cli
from moetools.checkpoint import Checkpoint
from moetools.errors import ArchitectureError, CheckpointError
from moetools.inspection import inspect_checkpoint, without_numbers

ITEM_SIZE = {"BF16": 2, "F8_E4M3": 1, "F32": 4, "U8": 1}


def save_sparse(folder, config, tensors):
    """A checkpoint of any size that takes no disk space: the header is real, all bytes are holes.

    Args:
        folder: Folder to make.
        config: Contents of config.json.
        tensors: Key -> (dtype, shape).
    """
    header, end = {}, 0
    for key, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * ITEM_SIZE[dtype]
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder


def mlp(prefix, width, hidden):
    names = {"gate_proj": [width, hidden], "up_proj": [width, hidden], "down_proj": [hidden, width]}
    return {f"{prefix}.{name}.weight": ("BF16", shape) for name, shape in names.items()}


@pytest.fixture
def olmoe_1b_7b(tmp_path):
    """The shapes of allenai/OLMoE-1B-7B."""
    hidden, vocabulary = 2048, 50304
    tensors = {
        "model.embed_tokens.weight": ("BF16", [vocabulary, hidden]),
        "lm_head.weight": ("BF16", [vocabulary, hidden]),
        "model.norm.weight": ("BF16", [hidden]),
    }
    for layer in range(16):
        block = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{norm}.weight"] = ("BF16", [hidden])
        for norm in ("q_norm", "k_norm"):
            tensors[f"{block}.self_attn.{norm}.weight"] = ("BF16", [hidden])
        for name in "qkvo":
            tensors[f"{block}.self_attn.{name}_proj.weight"] = ("BF16", [hidden, hidden])
        tensors[f"{block}.mlp.gate.weight"] = ("BF16", [64, hidden])
        for expert in range(64):
            tensors |= mlp(f"{block}.mlp.experts.{expert}", 1024, hidden)
    config = {
        "model_type": "olmoe", "num_hidden_layers": 16, "hidden_size": hidden,
        "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
        "vocab_size": vocabulary, "num_attention_heads": 16, "num_key_value_heads": 16,
    }  # fmt: skip
    return save_sparse(tmp_path / "olmoe", config, tensors)


@pytest.fixture
def deep(tmp_path):
    """58 MoE layers of 256 experts, a dense layer before and a multi-token one behind them."""
    hidden = 8
    tensors = {
        "model.embed_tokens.weight": ("BF16", [16, hidden]),
        "lm_head.weight": ("BF16", [16, hidden]),
        **mlp("model.layers.0.mlp", 4, hidden),
    }
    for layer in range(1, 60):
        block = f"model.layers.{layer}.mlp"
        tensors[f"{block}.gate.weight"] = ("BF16", [256, hidden])
        tensors[f"{block}.gate.e_score_correction_bias"] = ("F32", [256])
        for expert in range(256):
            tensors |= mlp(f"{block}.experts.{expert}", 4, hidden)
        tensors |= mlp(f"{block}.shared_experts", 4, hidden)
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 59, "hidden_size": hidden,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 4,
        "intermediate_size": 4, "first_k_dense_replace": 1, "vocab_size": 16, "n_group": 8,
        "topk_group": 4, "num_attention_heads": 2, "num_key_value_heads": 2,
        "auto_map": {"AutoConfig": "code.C"},
    }  # fmt: skip
    return save_sparse(tmp_path / "deep", config, tensors)


def inspect_json(model, capsys):
    assert cli.run(["inspect", str(model), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_numbers_of_a_released_model(olmoe_1b_7b, capsys):
    found = inspect_json(olmoe_1b_7b, capsys)
    parameters = found["parameters"]
    assert parameters["total"] == 6_919_161_856
    assert parameters["active"] == 1_282_017_280
    assert parameters["embeddings"] == 2 * 50304 * 2048
    assert parameters["routed_experts"] == 16 * 64 * 3 * 1024 * 2048
    assert parameters["routers"] == 16 * 64 * 2048
    assert found["bytes_by_dtype"] == {"BF16": 2 * 6_919_161_856}
    assert found["num_bytes"] == (olmoe_1b_7b / "model.safetensors").stat().st_size
    assert found["trace_size"]["tokens"] == pytest.approx(2.6 * 8 * 16 * 1e6)
    assert found["trace_size"]["inputs"] == 16 * 2048 * 2 * 1_000_000
    assert [router["layer"] for router in found["routers"]] == list(range(16))
    assert {(r["num_experts"], r["top_k"]) for r in found["routers"]} == {(64, 8)}
    assert found["routers"][3]["keys"] == ["model.layers.3.mlp.gate.weight"]
    abilities = {ability["name"]: ability["works"] for ability in found["abilities"]}
    assert abilities["trace"] == abilities["load"] == "yes"


def test_human_output_is_80_columns_wide_when_piped(olmoe_1b_7b, capsys):
    assert cli.run(["inspect", str(olmoe_1b_7b)]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for expected in (
        "16 of 16",
        "top 8 of 64 experts",
        "model.layers.{layer}.mlp.gate.weight  BF16 [64, 2048]",
        "6,919,161,856 (6.92 billion)",
        "at most 333 MB",
        "13.8 GB in 1 file",
    ):
        assert expected in shown


def test_a_deep_model_takes_one_screen(deep, capsys):
    assert cli.run(["inspect", str(deep)]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 80
    assert "58 routers" in shown
    assert "58 of 59" in shown
    assert "correction bias, for the selection alone" in shown
    assert "1 shared expert" in shown
    words = shown.replace(",", " ").split()
    assert all(str(layer) in words for layer in range(1, 59))
    assert "brings code of its own; it is not run" in " ".join(shown.split())


def test_multi_token_layers_are_listed_and_not_counted_as_active(deep):
    found = inspect_checkpoint(Checkpoint.open(str(deep)))
    assert set(found.ignored_routers) == {
        "model.layers.59.mlp.gate.weight",
        "model.layers.59.mlp.gate.e_score_correction_bias",
    }
    expert = 3 * 4 * 8
    router = 256 * 8 + 256
    assert found.parameters.multi_token == 257 * expert + router
    assert found.parameters.active == (2 * 16 * 8 + expert + 58 * (router + (8 + 1) * expert))


@pytest.mark.parametrize(
    ("family", "layout", "pattern"),
    [
        (
            "mixtral",
            "per expert",
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        ),
        ("granitemoe", "stacked", "model.layers.{layer}.block_sparse_moe.input_linear.weight"),
        ("llama4_text", "stacked", "model.layers.{layer}.feed_forward.experts.gate_up_proj"),
        ("dbrx", "stacked", "transformer.blocks.{layer}.ffn.experts.mlp.w1"),
        ("jetmoe", "stacked", "model.layers.{layer}.self_attention.experts.input_linear.weight"),
        ("gpt_oss", "stacked", "model.layers.{layer}.mlp.experts.gate_up_proj_bias"),
    ],
)
def test_experts_of_every_layout_are_counted(tmp_path, family, layout, pattern):
    model = save_tiny(family, tmp_path)
    found = inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    patterns = {experts.pattern: experts for experts in found.experts}
    assert patterns[pattern].layout == layout
    by_name = dict(model.named_parameters())
    experts = {
        name: parameter.numel()
        for name, parameter in by_name.items()
        if ".experts." in name or "_linear." in name
        if "router" not in name
    }
    assert found.parameters.routed_experts == sum(experts.values())
    assert found.parameters.total == sum(parameter.numel() for parameter in by_name.values())
    share = found.routers[0].top_k / found.routers[0].num_experts
    inactive = found.parameters.total - found.parameters.active
    assert inactive == sum(experts.values()) * (1 - share)


def test_a_checkpoint_without_tokenizer_cannot_be_traced(tmp_path, capsys):
    save_tiny("olmoe", tmp_path)
    abilities = inspect_json(tmp_path, capsys)["abilities"]
    assert abilities[0]["works"] == "no"
    assert "no tokenizer" in abilities[0]["reason"]


def test_refused_families_are_described_with_the_reason(tmp_path, capsys):
    save_tiny("gpt_oss", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_json(tmp_path, capsys)
    assert len(found["routers"]) == config["num_hidden_layers"]
    assert found["abilities"][0]["works"] == "no"
    assert "MXFP4" in found["abilities"][0]["reason"]


def test_encoder_decoders_are_described_with_the_reason(tmp_path, capsys):
    tensors = {
        "shared.weight": ("BF16", [8, 4]),
        "encoder.block.1.layer.1.mlp.router.classifier.weight": ("BF16", [2, 4]),
        "encoder.block.1.layer.1.mlp.experts.expert_0.wi.weight": ("BF16", [4, 4]),
    }
    folder = save_sparse(tmp_path / "switch", {"model_type": "switch_transformers"}, tensors)
    found = inspect_json(folder, capsys)
    assert found["routers"] == []
    assert found["trace_size"] is None
    assert found["parameters"]["total"] == 32 + 8 + 16
    assert "encoder-decoder" in found["abilities"][0]["reason"]
    assert cli.run(["inspect", str(folder)]) == 0


def test_quantised_weights_are_counted_unpacked_and_said_to_be_untested(tmp_path):
    tensors = {"model.embed_tokens.weight": ("BF16", [16, 128])}
    for name, dtype, shape in (
        ("gate.weight", "BF16", [2, 128]),
        ("experts.0.up_proj.weight", "F8_E4M3", [128, 128]),
        ("experts.0.up_proj.weight_scale_inv", "F32", [1, 1]),
        ("experts.1.up_proj.weight", "F8_E4M3", [128, 128]),
        ("experts.1.up_proj.weight_scale_inv", "F32", [1, 1]),
    ):
        tensors[f"model.layers.0.mlp.{name}"] = (dtype, shape)
    config = {
        "model_type": "olmoe", "num_hidden_layers": 1, "hidden_size": 128, "num_experts": 2,
        "num_experts_per_tok": 1, "vocab_size": 16, "intermediate_size": 128,
        "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip
    folder = save_sparse(tmp_path / "fp8", config, tensors)
    found = inspect_checkpoint(Checkpoint.open(str(folder)))
    assert found.parameters.total == 16 * 128 + 2 * 128 + 2 * 128 * 128
    assert found.parameters.active == found.parameters.total - 128 * 128
    assert found.abilities[0].works == "untested"


def change_tensor(folder, key, tensor):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    assert key in tensors
    save_file({**tensors, key: tensor}, path, {"format": "pt"})


def test_a_router_that_does_not_fit_its_config(tmp_path, capsys):
    save_tiny("olmoe", tmp_path)
    key = "model.layers.1.mlp.gate.weight"
    change_tensor(tmp_path, key, torch.zeros(9, 32))
    with pytest.raises(ArchitectureError, match=key.replace(".", r"\.")):
        inspect_checkpoint(Checkpoint.open(str(tmp_path)))
    capsys.readouterr()
    assert cli.run(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tensor_that_does_not_fit_its_config(tmp_path):
    save_tiny("olmoe", tmp_path)
    change_tensor(tmp_path, "model.norm.weight", torch.zeros(33))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[33\], expected"):
        inspect_checkpoint(Checkpoint.open(str(tmp_path)))


@pytest.mark.parametrize("model", ["no-such-folder", "demo/../nowhere/at/all"])
def test_bad_models_are_one_line(model, capsys):
    assert cli.run(["inspect", model]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.layers.12.mlp.gate.weight", "model.layers.{layer}.mlp.gate.weight"),
        ("a.layers.3.mlp.experts.17.w1.weight", "a.layers.{layer}.mlp.experts.{expert}.w1.weight"),
        (
            "e.block.1.layer.1.mlp.experts.expert_3.wi",
            "e.block.{layer}.layer.1.mlp.experts.{expert}.wi",
        ),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_patterns_of_keys(key, expected):
    assert without_numbers(key) == expected
