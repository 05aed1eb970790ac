"""Inkling: the router also scores the shared experts, in the last rows of its weight."""

from torch import nn

from moetools.architectures._spec import Architecture


def num_experts(router: nn.Module) -> int:
    """Classes of the router without the shared experts."""
    return int(router.num_experts)  # type: ignore[arg-type]


ARCHITECTURE = Architecture(
    model_types=("inkling_text",),
    source="transformers/models/inkling/modeling_inkling.py, InklingTopkRouter",
    num_experts=num_experts,
)
