"""Build a model without weights, or load one, ready for recording its routers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from moetools.architectures._discovery import CORRECTION_BIAS
from moetools.errors import ArchitectureError, CheckpointError


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that reads text and predicts the next token.

    Raises:
        ArchitectureError: transformers has none for this config.
    """
    for mapping in (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    ):
        if type(config) in mapping:
            model_class: type[PreTrainedModel] = mapping[type(config)]
            return model_class
    raise ArchitectureError(
        f"transformers has no causal language model for model_type '{config.model_type}'."
    )


def empty_model(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a config on the meta device: names and shapes, no weights.

    Args:
        config: Any config that transformers reads.
        trust_remote_code: Run code that the checkpoint brings along.

    Raises:
        ArchitectureError: There is no causal language model for this config.
    """
    if trust_remote_code and hasattr(config, "auto_map"):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=True).eval()
    model_class = causal_lm_class(config)
    with torch.device("meta"):
        return model_class._from_config(text_config(model_class, config)).eval()


def text_config(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that a class is built from: the text part for a text-only class."""
    text = config.get_text_config()
    return text if isinstance(text, model_class.config_class) else config


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How accelerate spreads a model over devices, memory and disk.

    Attributes:
        folder: For what lies on disk.
        max_memory: Bytes by device; None for what accelerate finds free.
    """

    folder: Path
    max_memory: dict[int | str, int] | None = None


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    trust_remote_code: bool = False,
    attention: str | None = None,
    experts_implementation: str | None = None,
    spread: Spread | None = None,
) -> PreTrainedModel:
    """Load a local checkpoint for recording: safetensors only, in evaluation mode.

    On a CPU experts run one after the other (`eager`): as fast as `grouped_mm` within 20 % either
    way, with less memory, and 5 to 80 times as fast as `batched_mm`, which copies weights for
    every selection. On other devices transformers chooses, `grouped_mm` where it can run: `eager`
    would wait for the device once per expert.

    Args:
        path: Checkpoint folder.
        dtype: A dtype, or `auto` for the checkpoint's own.
        device: Where the whole model goes.
        trust_remote_code: Run code that the checkpoint brings along.
        attention: `attn_implementation` of transformers; None for its own choice.
        experts_implementation: `eager`, `batched_mm` or `grouped_mm`; None for the choice above.
        spread: Where the parts go of a model that does not fit on the device.

    Raises:
        CheckpointError: Files are damaged, or tensors that the model needs are missing.
    """
    device = torch.device(device)
    if experts_implementation is None and device.type == "cpu":
        experts_implementation = "eager"
    options: dict[str, Any] = {
        "dtype": dtype,
        "use_safetensors": True,
        "output_loading_info": True,
        "attn_implementation": attention,
        "experts_implementation": experts_implementation,
    }
    if spread is not None:
        options |= {
            "device_map": "auto",
            "max_memory": spread.max_memory,
            "offload_folder": str(spread.folder),
        }
    options = {name: value for name, value in options.items() if value is not None}
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    try:
        if trust_remote_code and hasattr(config, "auto_map"):
            model, info = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=True, **options
            )
        else:
            model_class = causal_lm_class(config)
            options["config"] = text_config(model_class, config)
            model, info = model_class.from_pretrained(path, **options)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from error
    missing = sorted(key for key in info["missing_keys"] if not CORRECTION_BIAS.search(key))
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors of the model are not in the checkpoint, the first is "
            f"{missing[0]}."
        )
    return (model if spread is not None else model.to(device)).eval()
