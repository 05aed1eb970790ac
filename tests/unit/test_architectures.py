"""Which tensors on disk are routers, and what is refused; names and shapes only."""

import re
from typing import Any

import pytest
import tiny_models
from transformers import GPT2Config, LlamaConfig

from moetools.architectures import RouterDiscovery, find_routers, refusal
from moetools.errors import ArchitectureError
from moetools.loading import empty_model

Shapes = dict[str, tuple[int, ...]]


def discover(model_type: str, **more: tuple[int, ...]) -> RouterDiscovery:
    """Routers of a tiny model whose names in memory are also those on disk."""
    model = empty_model(tiny_models.tiny_config(model_type))
    return find_routers(model, {**own_shapes(model), **more})


def own_shapes(model: Any) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_multi_token_prediction_layers_are_listed_with_the_reason() -> None:
    layer_beyond = "model.layers.3.mlp.gate.weight"
    discovery = discover(
        "deepseek_v3",
        **{
            layer_beyond: (8, 32),
            "model.layers.3.mlp.gate.e_score_correction_bias": (8,),
            "model.layers.3.mlp.experts.0.up_proj.weight": (16, 32),
            "model.layers.3.self_attn.o_proj.weight": (32, 32),
        },
    )
    assert [spec.name for spec in discovery.routers] == ["01", "02"]
    assert set(discovery.ignored) == {
        layer_beyond,
        "model.layers.3.mlp.gate.e_score_correction_bias",
    }
    assert "MTP" in discovery.ignored[layer_beyond]


def test_mtp_prefix_is_listed_too() -> None:
    discovery = discover("qwen3_next", **{"mtp.layers.0.mlp.gate.weight": (8, 32)})
    assert list(discovery.ignored) == ["mtp.layers.0.mlp.gate.weight"]


def test_router_tensor_that_nothing_reads_is_an_error() -> None:
    """The dense first layer of the model owns a router on disk: recording would miss it."""
    with pytest.raises(ArchitectureError, match=r"model\.layers\.0\.mlp\.gate\.weight"):
        discover("deepseek_v3", **{"model.layers.0.mlp.gate.weight": (8, 32)})


def test_unread_tensor_beside_experts_is_an_error_under_any_router_name() -> None:
    more: Shapes = {
        "model.blocks.0.moe.experts.0.up.weight": (16, 32),
        "model.blocks.0.moe.router_weight": (8, 32),
    }
    with pytest.raises(ArchitectureError, match="router_weight"):
        discover("olmoe", **more)


def test_missing_router_weight_is_an_error() -> None:
    model = empty_model(tiny_models.tiny_config("olmoe"))
    shapes = own_shapes(model)
    del shapes["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ArchitectureError, match=r"no tensor for .*layers\.1\.mlp\.gate\.weight"):
        find_routers(model, shapes)


def test_router_of_another_shape_is_an_error() -> None:
    with pytest.raises(ArchitectureError, match=r"has shape \[16, 32\].*\[8, 32\]"):
        discover("olmoe", **{"model.layers.1.mlp.gate.weight": (16, 32)})


@pytest.mark.parametrize("config", [LlamaConfig, GPT2Config])
def test_dense_model_is_refused(config: Any) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    model = empty_model(config(vocab_size=16, intermediate_size=8, **small))
    with pytest.raises(ArchitectureError, match="has no MoE layers"):
        find_routers(model, own_shapes(model))


def test_layers_are_decoder_blocks_not_the_nth_moe_layer() -> None:
    """The first block of this model is dense; its second block is 01."""
    assert [spec.name for spec in discover("deepseek_v3").routers] == ["01", "02"]
    assert [spec.layer for spec in discover("deepseek_v3").routers] == [1, 2]


def test_gate_of_a_shared_expert_is_not_a_router() -> None:
    discovery = discover("qwen2_moe")
    keys = [key for spec in discovery.routers for key in spec.keys]
    assert not any("shared_expert_gate" in key for key in keys)
    assert {spec.num_shared_experts for spec in discovery.routers} == {1}


def test_gates_of_linear_attention_are_not_routers() -> None:
    discovery = discover("qwen3_next")
    assert {spec.module.rpartition(".")[0] for spec in discovery.routers} == {
        f"model.layers.{layer}.mlp" for layer in range(4)
    }


def test_attention_experts_have_a_name_of_their_own() -> None:
    routers = discover("jetmoe").routers
    assert [spec.name for spec in routers[:2]] == ["00", "00.attention"]
    assert [spec.kind for spec in routers[:2]] == ["mlp", "attention"]


def test_classes_without_weights_are_counted() -> None:
    """Identity experts and the skip class are choices of the router; shared experts are not."""
    assert {spec.num_experts for spec in discover("longcat_flash").routers} == {8 + 2}
    assert {spec.num_experts for spec in discover("zaya").routers} == {8 + 1}
    assert {spec.num_experts for spec in discover("inkling_text").routers} == {8}


def test_more_experts_than_the_router_scores_is_refused() -> None:
    model = empty_model(tiny_models.tiny_config("olmoe"))
    block = model.get_submodule("model.layers.0.mlp")
    other = empty_model(tiny_models.tiny_config("olmoe", num_experts=16))
    block.experts = other.get_submodule("model.layers.0.mlp.experts")
    with pytest.raises(ArchitectureError, match=r"scores 8 classes.*16 experts"):
        find_routers(model, None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "olmoe"}, None),
        ({"model_type": "mixtrall"}, "Did you mean 'mixtral'?"),
        ({"model_type": "mixtrall", "auto_map": {"AutoModel": "x"}}, "--trust-remote-code"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "switch_transformers"}, "capacity"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"model_type": "gpt_oss"}, None),
        ({}, "names no model_type"),
    ],
)
def test_refusal_from_the_config_alone(config: dict[str, Any], reason: str | None) -> None:
    told = refusal(config)
    assert (told is None) if reason is None else (told is not None and reason in told)


def test_remote_code_is_not_refused_with_the_flag() -> None:
    config = {"model_type": "grok", "auto_map": {"AutoModelForCausalLM": "modeling.Grok"}}
    assert refusal(config, trust_remote_code=True) is None
    assert refusal(tiny_models.tiny_config("olmoe")) is None


def test_every_family_file_is_described() -> None:
    """A file of the folder says where it was read from and for which model types it stands."""
    for spec in discover("llama4_text").routers:
        assert re.fullmatch(r"moetools\.architectures\.llama4", spec.reader or "")
