"""What is known about one router, and what a family may say when it differs from the others."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSpec:
    """One router: where it is in memory and on disk, and what its modules and config say.

    Attributes:
        name: Decoder block and, where a block has more than one router, which: `07`,
            `07.attention`. Columns of a trace are named by it (`experts.07`).
        layer: Index of the decoder block, counted from 0.
        kind: `mlp`, or `attention` where the experts are attention projections.
        module: Path of the module whose output holds the router logits.
        experts_module: Path of the module that is called once with the selection.
        tap: Whether the selection is read from the call of `experts_module`, or from the output
            of `module`.
        reader: Module of `moetools.architectures` that reads the selection; None for the usual call
            `experts(hidden_states, top_k_index, top_k_weights)`.
        weight_name: Parameter of the model that holds the router weight [E, H].
        weight_key: Key of that tensor in the checkpoint.
        bias_key: Key of the bias that is added to the logits, if there is one.
        correction_bias_name: Tensor of the model that is added for the selection alone.
        correction_bias_key: Key of that tensor in the checkpoint.
        expert_scale_name: Tensor [E] of the model that multiplies the selected weights.
        keys: Every key in the checkpoint that belongs to this router.
        num_experts: Classes of the router, E. May exceed the experts that hold weights (identity
            experts), never counts shared experts.
        num_skip_classes: Classes among them, the last ones, that select no expert; weight 0.
        top_k: Experts per token, K.
        num_shared_experts: Experts that see every token; they are never recorded.
        score_function, norm_topk_prob, routed_scaling_factor, n_group, topk_group, jitter_eps: What
            the modules and the config say, None where they are silent. The rule in use is found by
            `identify_rule`.
    """

    name: str
    layer: int
    kind: Literal["mlp", "attention"]
    module: str
    experts_module: str
    tap: Literal["experts", "router"]
    reader: str | None
    weight_name: str
    weight_key: str
    bias_key: str | None
    correction_bias_name: str | None
    correction_bias_key: str | None
    expert_scale_name: str | None
    keys: tuple[str, ...]
    num_experts: int
    num_skip_classes: int
    top_k: int
    num_shared_experts: int
    score_function: str | None
    norm_topk_prob: bool | None
    routed_scaling_factor: float | None
    n_group: int | None
    topk_group: int | None
    jitter_eps: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterDiscovery:
    """Routers of a model, and the router tensors on disk that are left alone.

    Attributes:
        routers: In the order of the layers.
        ignored: Key on disk -> why no router of the model reads it.
    """

    routers: tuple[RouterSpec, ...]
    ignored: Mapping[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterModules:
    """Paths of the modules that make up one router.

    Attributes:
        block: Module that owns the router and the experts.
        router: Module that owns the router's tensors.
        experts: Module that is called with the selection.
        kind: As in `RouterSpec`.
    """

    block: str
    router: str
    experts: str
    kind: Literal["mlp", "attention"] = "mlp"


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterCall:
    """What one router and its experts exchanged in one forward pass.

    Attributes:
        router_output: Tensors that the router module returned.
        experts_args: Arguments of the experts' call; empty where the router itself is the tap.
    """

    router_output: tuple[Any, ...]
    experts_args: tuple[Any, ...]


Reader = Callable[[RouterSpec, RouterCall], tuple[Tensor, Tensor, Tensor | None]]
"""Reads `(top_k_index, top_k_weights, router_logits)` of one call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """How a family differs from `experts(hidden_states, top_k_index, top_k_weights)`.

    Attributes:
        model_types: `model_type` of the configs it applies to.
        source: Modelling code that it was read from.
        find: Yields the routers below one model; None where the usual search finds them.
        weight: Path of the router weight below the router module, where it is not the only matrix.
        logits: Submodule of the router that returns the logits, where the router itself does not.
        tap: As in `RouterSpec`.
        num_experts: Classes of the router, where that is not the weight's first dimension.
        num_skip_classes: As in `RouterSpec`.
        read: Reads the selection of a call, where the usual reader does not.
    """

    model_types: tuple[str, ...]
    source: str
    find: Callable[[str, nn.Module], Iterator[RouterModules]] | None = None
    weight: str | None = None
    logits: str | None = None
    tap: Literal["experts", "router"] = "experts"
    num_experts: Callable[[nn.Module], int] | None = None
    num_skip_classes: int = 0
    read: Reader | None = None
