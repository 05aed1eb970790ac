"""Tiny random models of every Mixture-of-Experts family that transformers ships."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from moetools.architectures import REFUSED
from moetools.loading import causal_lm_class, text_config

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "moe_hidden_size": 24,
    "projector_hidden_size": 32,
    "out_hidden_size": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "ffn_hidden_size": 24,
    "num_hidden_layers": 3,
    "n_layers": 3,
    "num_attention_heads": 4,
    "n_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Applied where the config has the field."""

TOWER: dict[str, Any] = {
    "depth": 1,
    "num_hidden_layers": 1,
    "encoder_layers": 1,
    "hidden_size": 32,
    "d_model": 32,
    "intermediate_size": 32,
    "encoder_ffn_dim": 32,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_heads": 2,
    "out_hidden_size": 32,
    "output_dim": 32,
    "mlp_dim": 32,
    "output_channels": 8,
    "downsample_hidden_size": 8,
    "num_position_embeddings": 16,
    "mel_vocab_size": 8,
    "image_size": 28,
    "patch_size": 14,
}
"""The same for the towers of other modalities."""

FAMILY: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "dots3_note": {
        "vision_config": {
            "num_hidden_layers": 2,
            "mlp_layer_types": ["dense", "sparse"],
            "adapter_in_dim": 32,
            "adapter_out_dim": 32,
        },
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {
        "num_hidden_layers": 2,
        "head_dim": 16,
        "shared_experts_intermediate_size": 16,
    },
    "dots1": {"n_shared_experts": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 96,
        "global_head_dim": 8,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
    },
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        },
    },
    "glm5_next_text": {
        "num_hidden_layers": 4,
        "qk_rope_head_dim": 0,
        "index_kpool": 4,
    },
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2, "moe_topk": 3},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "muse_spark_audio": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 16, 16]},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},
    "step3p5": {"mlp_layer_types": ["dense", "sparse", "sparse"], "share_expert_dim": 16},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "bailing_hybrid": {"num_hidden_layers": 4, "layer_group_size": 2},
    "kimi_linear": {"num_hidden_layers": 5},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [16, 12],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside `SMALL`."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of that family with a few layers, eight experts and a hidden size of 32."""
    return shrink(CONFIG_MAPPING[model_type](), SMALL, changes)


def shrink(
    default: PreTrainedConfig, small: dict[str, Any], changes: dict[str, Any]
) -> PreTrainedConfig:
    """The config again with small numbers, in its own fields and in those of its parts."""
    names = inspect.signature(type(default)).parameters
    fields = {name: value for name, value in small.items() if name in names}
    fields.update(FAMILY.get(default.model_type, {}))
    fields.update(changes)
    for name in default.sub_configs:
        part = getattr(default, name)
        if part is not None:
            is_text = name in ("text_config", "thinker_config", "ffn_config", "attn_config")
            fields[name] = shrink(part, SMALL if is_text else TOWER, fields.get(name, {}))
    return type(default)(**fields)


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose routers spread their selections; correction biases are not zero."""
    config = tiny_config(model_type, **changes)
    model_class = causal_lm_class(config)
    torch.manual_seed(seed)
    model = model_class._from_config(
        text_config(model_class, config),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    randomise(model, seed)
    return model.eval()


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights large enough that no two experts, tokens or layers look alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or tensor.dim() == 0:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if "bias" in name:
                tensor.copy_(noise * 0.1)
            elif tensor.dim() >= 2:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)


def save_tiny(model_type: str, path: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Save a tiny model as a checkpoint folder."""
    model = tiny_model(model_type, seed, **changes)
    model.save_pretrained(path)
    return model


def moe_folders() -> dict[str, list[str]]:
    """Folder of transformers whose modelling code has experts -> its `model_type`s."""
    models = Path(transformers.__file__).parent / "models"
    folders: dict[str, list[str]] = {
        path.parent.name: []
        for path in sorted(models.glob("*/modeling_*.py"))
        if re.search(r"self\.experts\b|ParallelExperts", path.read_text())
    }
    for model_type in CONFIG_MAPPING:
        folder = model_type_to_module_name(model_type)
        if folder in folders:
            folders[folder].append(model_type)
    return folders


def moe_model_types() -> list[str]:
    """Every MoE `model_type` of transformers that has a language model and is not refused."""
    language_models = {
        *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    }
    return sorted(
        model_type
        for model_types in moe_folders().values()
        for model_type in model_types
        if model_type in language_models and model_type not in REFUSED
    )


def shapes_on_disk(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, from the headers."""
    shapes = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        shapes.update({key: tuple(entry["shape"]) for key, entry in header.items()})
    return shapes
