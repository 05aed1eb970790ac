"""Find the routers of an instantiated model, and their tensors on disk."""

import importlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import moetools.architectures
from moetools.architectures._keys import KeyMap
from moetools.architectures._spec import (
    Architecture,
    RouterDiscovery,
    RouterModules,
    RouterSpec,
)
from moetools.errors import ArchitectureError

OTHER_MODALITY = re.compile(r"vision|visual|audio|image|video|talker|sam_model")
"""In the path of towers, and of experts, that text tokens never reach."""

ROUTER_NAMES = ("gate", "router")
CORRECTION_BIAS = re.compile(r"(correction_bias|expert_bias|balancing_biases)$")
EXPERT_SCALE = "per_expert_scale"
SHARED_EXPERTS = re.compile(r"shared_(expert|experts|mlp)$")
ROUTER_LIKE = re.compile(r"(^|\.)(gate|router|gating|classifier)(\.|$)")
MULTI_TOKEN = re.compile(r"(^|\.)(mtp|nextn|eh_proj|mtp_\w+)(\.|$)")


def architectures() -> dict[str, tuple[str, Architecture]]:
    """`model_type` -> (file, how it differs), for the families that have a file."""
    found = {}
    for entry in pkgutil.iter_modules(moetools.architectures.__path__):
        if not entry.name.startswith("_"):
            module = importlib.import_module(f"moetools.architectures.{entry.name}")
            found.update(
                dict.fromkeys(module.ARCHITECTURE.model_types, (entry.name, module.ARCHITECTURE))
            )
    return found


def find_routers(
    model: PreTrainedModel, tensor_shapes: Mapping[str, tuple[int, ...]] | None
) -> RouterDiscovery:
    """Routers of a model and their tensors on disk; nothing is read but names and shapes.

    Args:
        model: Any causal language model, also on the meta device.
        tensor_shapes: Every key of the checkpoint with its shape. None for a model that has no
            checkpoint: keys are then the model's own names.

    Raises:
        ArchitectureError: No MoE layers; experts whose router cannot be told; a router tensor on
            disk that no router of the model reads, or the other way round.
    """
    if tensor_shapes is None:
        tensor_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        disk, unused = {name: [name] for name in tensor_shapes}, []
    else:
        keys = KeyMap(model, tensor_shapes)
        disk, unused = keys.disk, keys.unused
    routers: list[RouterSpec] = []
    ignored: dict[str, str] = {}
    files = architectures()
    for modules, config in router_modules(model, files):
        reader, architecture = files.get(
            config.model_type, (None, Architecture(model_types=(), source=""))
        )
        names = router_tensors(model, modules)
        if OTHER_MODALITY.search(modules.block):
            reason = "a router of another modality: no text token reaches it"
            ignored.update({key: reason for name in names for key in disk.get(name, [])})
            continue
        routers.append(
            describe(model, modules, config, reader, architecture, names, disk, tensor_shapes)
        )
    if not routers:
        raise ArchitectureError(
            f"{type(model).__name__} has no MoE layers: there is no router to look at. "
            "moetools needs a Mixture-of-Experts checkpoint."
        )
    routers.sort(key=lambda spec: spec.name)
    duplicates = {spec.name for spec in routers if [r.name for r in routers].count(spec.name) > 1}
    if duplicates:
        raise ArchitectureError(
            f"{type(model).__name__}: two routers in decoder block {min(duplicates)} cannot be "
            "told apart; this family needs a description of its own."
        )
    ignored.update(unused_router_tensors(model, routers, unused, tensor_shapes))
    return RouterDiscovery(routers=tuple(routers), ignored=ignored)


def router_modules(
    model: PreTrainedModel, files: Mapping[str, tuple[str, Architecture]]
) -> Iterator[tuple[RouterModules, PretrainedConfig]]:
    """Every router with the config of the innermost model that it belongs to."""
    inner = {
        path: part for path, part in model.named_modules() if isinstance(part, PreTrainedModel)
    }
    for path, part in inner.items():
        nested = tuple(f"{other}." for other in inner if other != path and len(other) > len(path))
        _, architecture = files.get(part.config.model_type, (None, None))
        find = architecture.find if architecture and architecture.find else experts_beside_routers
        for modules in find(path, part):
            if not modules.block.startswith(nested):
                yield modules, part.config


def experts_beside_routers(path: str, model: nn.Module) -> Iterator[RouterModules]:
    """Modules that own stacked experts and, beside them, one router."""
    for name, module in model.named_modules(prefix=path):
        experts = getattr(module, "experts", None)
        if not isinstance(experts, nn.Module) or next(experts.parameters(), None) is None:
            continue
        beside = [
            child for child in ROUTER_NAMES if isinstance(getattr(module, child, None), nn.Module)
        ]
        if len(beside) != 1:
            raise ArchitectureError(
                f"{name}: expected one router (`gate` or `router`) beside `experts`, found "
                f"{len(beside)}; this family needs a description of its own."
            )
        yield RouterModules(block=name, router=f"{name}.{beside[0]}", experts=f"{name}.experts")


def router_tensors(model: PreTrainedModel, modules: RouterModules) -> dict[str, Tensor]:
    """Saved tensors of a router by name: all below its module, and a correction bias beside it."""
    tensors = {
        f"{modules.router}.{name}": tensor
        for name, tensor in model.get_submodule(modules.router).state_dict().items()
    }
    block = model.get_submodule(modules.block)
    for name, tensor in [
        *block.named_parameters(recurse=False),
        *block.named_buffers(recurse=False),
    ]:
        if CORRECTION_BIAS.search(name):
            tensors[f"{modules.block}.{name}"] = tensor
    return tensors


def describe(
    model: PreTrainedModel,
    modules: RouterModules,
    config: PretrainedConfig,
    reader: str | None,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    disk: Mapping[str, list[str]],
    tensor_shapes: Mapping[str, tuple[int, ...]],
) -> RouterSpec:
    """The spec of one router."""
    router, block = model.get_submodule(modules.router), model.get_submodule(modules.block)
    weight_name = only_matrix(modules.router, tensors, architecture.weight)
    num_classes = int(tensors[weight_name].shape[0])
    num_experts = architecture.num_experts(router) if architecture.num_experts else num_classes
    check_experts(modules, model, num_experts)
    vectors = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dim() <= 2
        and tensor.numel() in (num_experts, num_classes)
        and name != weight_name
    }
    correction = next((name for name in vectors if CORRECTION_BIAS.search(name)), None)
    bias = next((n for n in vectors if n == weight_name.removesuffix("weight") + "bias"), None)
    scale = next((name for name in vectors if name.endswith(EXPERT_SCALE)), None)
    layer = layer_index(modules.block)
    top_k = first(("top_k", "moe_topk"), router, block) or first(TOP_K_FIELDS, config)
    if not isinstance(top_k, int):
        raise ArchitectureError(f"{modules.router}: cannot tell how many experts a token selects.")
    if weight_name not in disk:
        raise ArchitectureError(
            f"The checkpoint has no tensor for the router weight {weight_name}; "
            "the checkpoint is incomplete or of another family than its config says."
        )
    for name, tensor in tensors.items():
        for key in disk.get(name, []):
            if tensor_shapes[key] != tuple(tensor.shape) and len(disk[name]) == 1:
                raise ArchitectureError(
                    f"{key} has shape {list(tensor_shapes[key])}, the model expects "
                    f"{list(tensor.shape)}; the checkpoint does not fit its config.json."
                )
    return RouterSpec(
        name=f"{layer:02d}" if modules.kind == "mlp" else f"{layer:02d}.{modules.kind}",
        layer=layer,
        kind=modules.kind,
        module=f"{modules.router}.{architecture.logits}" if architecture.logits else modules.router,
        experts_module=modules.experts,
        tap=architecture.tap,
        reader=reader if architecture.read else None,
        weight_name=weight_name,
        weight_key=disk[weight_name][0],
        bias_key=disk[bias][0] if bias in disk else None,
        correction_bias_name=correction,
        correction_bias_key=disk[correction][0] if correction in disk else None,
        expert_scale_name=scale,
        keys=tuple(key for name in tensors for key in disk.get(name, [])),
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared_experts(model, modules, config),
        score_function=first(("scoring_func", "expert_selection_fn"), config),
        norm_topk_prob=first(("norm_topk_prob", "moe_renormalize"), router, config),
        routed_scaling_factor=first(SCALE_FIELDS, router, config),
        n_group=first(("num_group", "n_group"), router, config),
        topk_group=first(("topk_group",), router, config),
        jitter_eps=first(("router_jitter_noise",), router),
    )


TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
SCALE_FIELDS = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
SHARED_FIELDS = (
    "n_shared_experts",
    "num_shared_experts",
    "moe_num_shared_experts",
    "num_shared_expert",
)


def first(names: tuple[str, ...], *owners: Any) -> Any:
    """The first attribute that one of the owners has and that is not None."""
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if value is not None:
                return value
    return None


def only_matrix(router: str, tensors: Mapping[str, Tensor], given: str | None) -> str:
    """Name of the router weight: the one floating-point matrix below the router module."""
    if given is not None:
        return f"{router}.{given}"
    matrices = [
        name
        for name, tensor in tensors.items()
        if tensor.dim() == 2 and tensor.shape[0] > 1 and tensor.is_floating_point()
    ]
    if len(matrices) != 1:
        raise ArchitectureError(
            f"{router}: expected one weight matrix [experts, hidden size], found {len(matrices)}; "
            "this family needs a description of its own."
        )
    return matrices[0]


def check_experts(modules: RouterModules, model: PreTrainedModel, num_experts: int) -> None:
    """Refuse a module that is called a router but scores fewer classes than there are experts."""
    stacked = {
        int(parameter.shape[0])
        for parameter in model.get_submodule(modules.experts).parameters()
        if parameter.dim() == 3
    }
    if stacked and min(stacked) > num_experts:
        raise ArchitectureError(
            f"{modules.router} scores {num_experts} classes, but {modules.experts} holds "
            f"{min(stacked)} experts: it is not their router."
        )


def layer_index(path: str) -> int:
    """Decoder block of a module: the first number in its path."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    if not numbers:
        raise ArchitectureError(f"{path}: cannot tell the decoder block it belongs to.")
    return int(numbers[0])


def num_shared_experts(model: PreTrainedModel, modules: RouterModules, config: Any) -> int:
    """Experts that see every token, as the config counts them, else the modules found."""
    owners = [
        model.get_submodule(modules.block),
        model.get_submodule(modules.block.rpartition(".")[0]),
    ]
    if not any(SHARED_EXPERTS.search(n) for owner in owners for n, _ in owner.named_children()):
        return 0
    count = first(SHARED_FIELDS, config)
    return count if isinstance(count, int) and count > 0 else 1


def unused_router_tensors(
    model: PreTrainedModel,
    routers: list[RouterSpec],
    unused: list[str],
    tensor_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Router tensors on disk that the model does not read, with the reason.

    Raises:
        ArchitectureError: There is no known reason.
    """
    suffixes = {re.sub(r"^.*?\.\d+\.", "", key) for spec in routers for key in spec.keys}
    shapes = {tensor_shapes[spec.weight_key] for spec in routers}
    num_layers = model.config.get_text_config().num_hidden_layers
    reasons: dict[str, str] = {}
    unexplained = []
    for key in unused:
        known_name = any(key == suffix or key.endswith(f".{suffix}") for suffix in suffixes)
        router_shape = tensor_shapes[key] in shapes and ROUTER_LIKE.search(key)
        if not known_name and not router_shape:
            continue
        numbers = [int(part) for part in key.split(".") if part.isdecimal()]
        if MULTI_TOKEN.search(key) or (numbers and numbers[0] >= num_layers):
            reasons[key] = "multi-token prediction: transformers does not build this layer"
        elif OTHER_MODALITY.search(key):
            reasons[key] = "a router of another modality: no text token reaches it"
        else:
            unexplained.append(key)
    if unexplained:
        raise ArchitectureError(
            f"{len(unexplained)} router tensors on disk are read by no router of "
            f"{type(model).__name__}, the first is {unexplained[0]}: recording would miss them."
        )
    return reasons
