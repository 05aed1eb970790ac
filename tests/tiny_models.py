"""Tiny random models of every Mixture-of-Experts family that transformers ships."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from moetools.loading import causal_lm_class

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "max_position_embeddings": 128,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "routed_scaling_factor": 1.7,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "sliding_window": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Applied where the config has the field."""

FAMILY: dict[str, dict[str, Any]] = {}
"""What a family needs beside `SMALL`."""


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A config of that family with a few layers, eight experts and a hidden size of 32."""
    config_class = CONFIG_MAPPING[model_type]
    default = config_class()
    fields = {name: value for name, value in SMALL.items() if hasattr(default, name)}
    return config_class(**{**fields, **FAMILY.get(model_type, {}), **changes})


def tiny_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model whose routers spread their selections; correction biases are not zero."""
    config = tiny_config(model_type, **changes)
    torch.manual_seed(seed)
    model = causal_lm_class(config)._from_config(config, attn_implementation="eager")
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
