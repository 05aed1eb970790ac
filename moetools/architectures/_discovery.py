"""Find the routers of an instantiated model, and their tensors on disk."""

import importlib
import pkgutil
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import moetools.architectures
from moetools.architectures._keys import KeyMap, map_keys
from moetools.architectures._spec import (
    Architecture,
    RouterDiscovery,
    RouterModules,
    RouterSpec,
)
from moetools.errors import ArchitectureError

USUAL = Architecture(model_types=(), source="experts(hidden_states, top_k_index, top_k_weights)")

ROUTER_NAMES = ("gate", "router")
CORRECTION_BIAS = re.compile(r"(correction_bias|expert_bias|balancing_biases)$")
EXPERT_SCALE = "per_expert_scale"
SHARED_EXPERTS = re.compile(r"shared_(expert|experts|mlp)$")

OTHER_MODALITY = re.compile(r"vision|visual|audio|image|video|talker|sam_model")
"""In the path of towers, and of experts, that text tokens never reach."""

MULTI_TOKEN = re.compile(r"(^|\.)(mtp|nextn)")
BESIDE_EXPERTS = re.compile(r"(gate|router)(?!_(up_)?proj)")
"""How the name of a tensor begins that lies beside the experts and looks like a router's."""

TOP_K = ("top_k", "moe_topk")
TOP_K_FIELDS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
SCALE_FIELDS = ("routed_scaling_factor", "route_scale", "router_scaling_factor")
SHARED_FIELDS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

OF_OTHER_MODALITY = "belongs to another modality: no text token reaches it"
OF_MULTI_TOKEN = "predicts several tokens ahead (MTP): transformers does not build this layer"


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
    keys = map_keys(model, tensor_shapes)
    routers: list[RouterSpec] = []
    ignored: dict[str, str] = {}
    for modules, config, architecture in router_modules(model):
        tensors = router_tensors(model, modules)
        if OTHER_MODALITY.search(modules.block):
            on_disk = [key for name in tensors for key in keys.disk.get(name, ())]
            ignored.update(dict.fromkeys(on_disk, OF_OTHER_MODALITY))
        else:
            routers.append(describe(model, modules, config, architecture, tensors, keys))
    if not routers:
        raise ArchitectureError(
            f"{type(model).__name__} has no MoE layers, so there is no router to look at. "
            "moetools needs a Mixture-of-Experts checkpoint."
        )
    routers.sort(key=lambda spec: spec.name)
    names = [spec.name for spec in routers]
    if len(set(names)) < len(names):
        raise ArchitectureError(
            f"{type(model).__name__}: two routers in decoder block "
            f"{next(name for name in names if names.count(name) > 1)} cannot be told apart; this "
            "family needs a description of its own."
        )
    ignored.update(unused_router_tensors(model, routers, keys))
    return RouterDiscovery(routers=tuple(routers), ignored=ignored)


def get_tensor(model: nn.Module, name: str | None) -> Tensor | None:
    """A parameter or buffer by its full name; None for None."""
    if name is None:
        return None
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def described_families() -> dict[str, Architecture]:
    """`model_type` -> how it differs, for the families that have a file."""
    found: dict[str, Architecture] = {}
    for entry in pkgutil.iter_modules(moetools.architectures.__path__):
        if not entry.name.startswith("_"):
            module = importlib.import_module(f"moetools.architectures.{entry.name}")
            found.update(dict.fromkeys(module.ARCHITECTURE.model_types, module.ARCHITECTURE))
    return found


def router_modules(
    model: PreTrainedModel,
) -> Iterator[tuple[RouterModules, PretrainedConfig, Architecture]]:
    """Every router with the config of the innermost model that it belongs to."""
    families = described_families()
    inner = {
        path: part for path, part in model.named_modules() if isinstance(part, PreTrainedModel)
    }
    for path, part in inner.items():
        deeper = tuple(f"{other}." for other in inner if len(other) > len(path))
        architecture = families.get(part.config.model_type, USUAL)
        find = architecture.find or experts_beside_routers
        for modules in find(path, part):
            if not modules.block.startswith(deeper):
                yield modules, part.config, architecture


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
    beside = [*block.named_parameters(recurse=False), *block.named_buffers(recurse=False)]
    for name, tensor in beside:
        if CORRECTION_BIAS.search(name):
            tensors[f"{modules.block}.{name}"] = tensor
    return tensors


def describe(
    model: PreTrainedModel,
    modules: RouterModules,
    config: PretrainedConfig,
    architecture: Architecture,
    tensors: Mapping[str, Tensor],
    keys: KeyMap,
) -> RouterSpec:
    """The spec of one router."""
    router, block = model.get_submodule(modules.router), model.get_submodule(modules.block)
    weight = only_matrix(modules.router, tensors, architecture.weight)
    num_experts = int(tensors[weight].shape[0])
    if architecture.num_experts is not None:
        num_experts = architecture.num_experts(router)
    check_experts(modules, model, num_experts)
    check_disk(weight, tensors, keys)
    vectors = [name for name, each in tensors.items() if each.numel() == num_experts]
    bias = weight.removesuffix("weight") + "bias"
    correction = next((name for name in vectors if CORRECTION_BIAS.search(name)), None)
    expert_scale = next((name for name in vectors if name.endswith(EXPERT_SCALE)), None)
    top_k = first(TOP_K, router, block) or first(TOP_K_FIELDS, config)
    if not isinstance(top_k, int):
        raise ArchitectureError(f"{modules.router}: cannot tell how many experts a token selects.")
    layer = layer_index(modules.block)
    return RouterSpec(
        name=f"{layer:02d}" if modules.kind == "mlp" else f"{layer:02d}.{modules.kind}",
        layer=layer,
        kind=modules.kind,
        module=f"{modules.router}.{architecture.logits}" if architecture.logits else modules.router,
        experts_module=modules.experts,
        tap=architecture.tap,
        reader=architecture.read.__module__ if architecture.read else None,
        weight_name=weight,
        weight_key=keys.disk[weight][0],
        bias_key=key_of(bias, keys) if bias in vectors else None,
        correction_bias_name=correction,
        correction_bias_key=key_of(correction, keys),
        expert_scale_name=expert_scale,
        keys=tuple(key for name in tensors for key in keys.disk.get(name, ())),
        num_experts=num_experts,
        num_skip_classes=architecture.num_skip_classes,
        top_k=top_k,
        num_shared_experts=num_shared_experts(model, modules, config),
        score_function=first(("scoring_func", "expert_selection_fn"), config),
        norm_topk_prob=first(("norm_topk_prob", "moe_renormalize"), router, config),
        routed_scaling_factor=first(SCALE_FIELDS, router, config),
        n_group=first(("num_group", "n_group"), router, config),
        topk_group=first(("topk_group",), router, config),
        jitter_eps=first(("router_jitter_noise",), router),
    )


def first(names: Sequence[str], *owners: Any) -> Any:
    """The first attribute that one of the owners has and that is not None."""
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if value is not None), None)


def key_of(name: str | None, keys: KeyMap) -> str | None:
    """Key on disk of a tensor, None where the checkpoint has none."""
    found = keys.disk.get(name, ()) if name is not None else ()
    return found[0] if found else None


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
    stacked = [
        int(parameter.shape[0])
        for parameter in model.get_submodule(modules.experts).parameters()
        if parameter.dim() == 3
    ]
    if stacked and min(stacked) > num_experts:
        raise ArchitectureError(
            f"{modules.router} scores {num_experts} classes, but {modules.experts} holds "
            f"{min(stacked)} experts: it is not their router."
        )


def check_disk(weight: str, tensors: Mapping[str, Tensor], keys: KeyMap) -> None:
    """Refuse a checkpoint without the router weight, or with router tensors of another shape."""
    if weight not in keys.disk:
        raise ArchitectureError(
            f"The checkpoint has no tensor for the router weight {weight}: it is incomplete, or of "
            "another family than its config.json says."
        )
    for name, tensor in tensors.items():
        for key in keys.disk.get(name, ()):
            if key not in keys.converted and keys.shapes[key] != tuple(tensor.shape):
                raise ArchitectureError(
                    f"{key} has shape {list(keys.shapes[key])}, but config.json describes "
                    f"{list(tensor.shape)}."
                )


def layer_index(path: str) -> int:
    """Decoder block of a module: the first number in its path."""
    numbers = [part for part in path.split(".") if part.isdecimal()]
    if not numbers:
        raise ArchitectureError(f"{path}: cannot tell the decoder block it belongs to.")
    return int(numbers[0])


def num_shared_experts(model: PreTrainedModel, modules: RouterModules, config: Any) -> int:
    """Experts that see every token, as the config counts them, else the modules found."""
    paths = (modules.block, modules.block.rpartition(".")[0])
    children = [name for path in paths for name, _ in model.get_submodule(path).named_children()]
    if not any(SHARED_EXPERTS.search(name) for name in children):
        return 0
    count = first(SHARED_FIELDS, config)
    return count if isinstance(count, int) and count > 0 else 1


def lies_beside(key: str, blocks: Collection[str]) -> bool:
    """Whether a tensor lies beside the experts of one of the blocks and is named as a router's."""
    parts = key.split(".")
    return any(
        ".".join(parts[:length]) in blocks and BESIDE_EXPERTS.match(parts[length]) is not None
        for length in range(1, len(parts))
    )


def unused_router_tensors(
    model: PreTrainedModel, routers: Sequence[RouterSpec], keys: KeyMap
) -> dict[str, str]:
    """Router tensors on disk that the model does not read, with the reason.

    Raises:
        ArchitectureError: There is no known reason.
    """
    endings = tuple({re.sub(r"^.*?\.\d+\.", ".", key) for spec in routers for key in spec.keys})
    blocks = {key.partition(".experts.")[0] for key in keys.shapes if ".experts." in key}
    num_layers = model.config.get_text_config().num_hidden_layers
    reasons: dict[str, str] = {}
    unexplained = []
    for key in keys.unused:
        if not f".{key}".endswith(endings) and not lies_beside(key, blocks):
            continue
        number = next((int(part) for part in key.split(".") if part.isdecimal()), -1)
        if OTHER_MODALITY.search(key):
            reasons[key] = OF_OTHER_MODALITY
        elif MULTI_TOKEN.search(key) or number >= num_layers:
            reasons[key] = OF_MULTI_TOKEN
        else:
            unexplained.append(key)
    if unexplained:
        raise ArchitectureError(
            f"{len(unexplained)} router tensors on disk are read by no router of "
            f"{type(model).__name__}, the first is {unexplained[0]}: recording would miss them."
        )
    return reasons
