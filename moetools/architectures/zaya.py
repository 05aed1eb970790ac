"""Zaya: an MLP as router, with one class more than experts that skips the experts."""

import torch
from torch import Tensor

from moetools.architectures._spec import Architecture, RouterCall, RouterSpec


def read(spec: RouterSpec, call: RouterCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Selection with the skip class as expert E - 1.

    The router hands a skipped selection on as expert 0 with weight 0, which no softmax of finite
    logits returns for a real selection.
    """
    _, top_k_index, top_k_weights = call.experts_args
    skipped = (top_k_index == 0) & (top_k_weights == 0)
    return (
        torch.where(skipped, spec.num_experts - 1, top_k_index),
        top_k_weights,
        call.router_output[0],
    )


ARCHITECTURE = Architecture(
    model_types=("zaya",),
    source="transformers/models/zaya/modeling_zaya.py, ZayaRouter",
    num_skip_classes=1,
    weight="router_mlp.out_proj.weight",
    read=read,
)
