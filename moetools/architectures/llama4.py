"""Llama 4: the experts receive every token once per expert, already multiplied by its score."""

import torch
from torch import Tensor

from moetools.architectures._spec import Architecture, RouterCall, RouterSpec


def read(spec: RouterSpec, call: RouterCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Selection of one call: the experts whose score is not zero.

    The router returns the scores [T, E], zero for experts that were not selected, and the logits.
    """
    scores, router_logits = call.router_output
    top_k_weights, top_k_index = torch.topk(scores, spec.top_k, dim=-1)
    return top_k_index, top_k_weights, router_logits


ARCHITECTURE = Architecture(
    model_types=("llama4", "llama4_text"),
    source="transformers/models/llama4/modeling_llama4.py, Llama4Router and Llama4TextMoe",
    tap="router",
    read=read,
)
