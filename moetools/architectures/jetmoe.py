"""JetMoE: two routers per block, the second picks attention projections; both sort by expert."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moetools.architectures._spec import Architecture, RouterCall, RouterModules, RouterSpec


def find(path: str, model: nn.Module) -> Iterator[RouterModules]:
    """Every block that owns a router and the experts' two stacked projections."""
    for name, module in model.named_modules(prefix=path):
        if hasattr(module, "router") and hasattr(module, "input_linear"):
            yield RouterModules(
                block=name,
                router=f"{name}.router",
                experts=f"{name}.router",
                kind="attention" if "attention" in name else "mlp",
            )


def read(spec: RouterSpec, call: RouterCall) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undo the sorting by expert.

    The router returns the order that sorts the T·K selections by expert, the tokens and weights in
    that order, and how many selections each expert received.
    """
    order, _, sorted_weights, expert_sizes, router_logits = call.router_output
    sizes = torch.as_tensor(expert_sizes, device=order.device)
    sorted_index = torch.arange(spec.num_experts, device=order.device).repeat_interleave(sizes)
    top_k_index = torch.empty_like(order).scatter_(0, order, sorted_index)
    top_k_weights = torch.empty_like(sorted_weights).scatter_(0, order, sorted_weights)
    return top_k_index.view(-1, spec.top_k), top_k_weights.view(-1, spec.top_k), router_logits


ARCHITECTURE = Architecture(
    model_types=("jetmoe",),
    source="transformers/models/jetmoe/modeling_jetmoe.py, JetMoeTopKGating",
    find=find,
    tap="router",
    read=read,
)
