"""Families that are refused, and why."""

import difflib
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

ENCODER_DECODER = (
    "an encoder-decoder: experts have a capacity per sequence and drop what exceeds it, so a "
    "token's routing depends on its neighbours and on padding"
)

REFUSED: dict[str, str] = {
    "switch_transformers": ENCODER_DECODER,
    "nllb-moe": ENCODER_DECODER,
    "diffusion_gemma": (
        "a block-diffusion model: it routes every token anew in each denoising step, so a token "
        "has no single selection"
    ),
    "qwen3_omni_moe": (
        "a speech pipeline of three models without a common forward pass; its text model is "
        "recorded from a checkpoint of 'qwen3_omni_moe_thinker'"
    ),
    "openai_privacy_filter": "a token classifier, not a language model",
    "vitpose_backbone": (
        "an image backbone, not a language model; its experts are picked by the data set"
    ),
}
"""`model_type` -> reason, for families of transformers whose routers cannot be recorded exactly."""


def refusal(
    config: Mapping[str, Any] | PretrainedConfig, *, trust_remote_code: bool = False
) -> str | None:
    """Why a checkpoint cannot be recorded, from its config alone; None when nothing speaks against.

    Whether a family that is not refused has MoE layers at all is told by `find_routers`.

    Args:
        config: The contents of `config.json`, or the config object.
        trust_remote_code: Code that the checkpoint brings along may run.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    model_type = values.get("model_type")
    if not model_type:
        return "config.json names no model_type: it does not describe a transformers model"
    if model_type in REFUSED:
        return f"model_type '{model_type}' is {REFUSED[model_type]}"
    if model_type not in CONFIG_MAPPING:
        return None if trust_remote_code and values.get("auto_map") else unknown(model_type, values)
    if values.get("is_encoder_decoder"):
        return f"model_type '{model_type}' is an encoder-decoder: only decoders are recorded"
    quantization = values.get("quantization_config") or {}
    if quantization.get("quant_method") == "mxfp4":
        return (
            "its weights are MXFP4: the kernels for them replace the MoE block and never call the "
            "router, so nothing could be recorded. Convert it to bfloat16 first"
        )
    return None


def unknown(model_type: str, values: Mapping[str, Any]) -> str:
    """Reason for a `model_type` that transformers does not know."""
    if values.get("auto_map"):
        return (
            f"model_type '{model_type}' is not part of transformers; the checkpoint brings its own "
            "code. `--trust-remote-code` runs that code"
        )
    close = difflib.get_close_matches(model_type, CONFIG_MAPPING.keys(), n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return f"transformers knows no model_type '{model_type}'.{hint}"
