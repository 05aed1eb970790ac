"""Names of tensors in memory and on disk, through transformers' own conversion rules."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

EXPERT = re.compile(r"\.experts\.\d+\.")
"""Tensors of one expert: many, and never a router's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyMap:
    """Which keys on disk load into which tensors of a model, as `from_pretrained` decides it.

    Attributes:
        disk: Name in memory -> keys on disk. Tensors of single experts are left out.
        shapes: Shape of every key on disk.
        unused: Keys on disk that load into no tensor of the model.
        converted: Keys on disk whose tensors change shape on loading.
    """

    disk: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    unused: tuple[str, ...] = ()
    converted: frozenset[str] = frozenset()


def map_keys(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]] | None) -> KeyMap:
    """Keys of a checkpoint; without one, the model's own names."""
    state: dict[str, Tensor] = model.state_dict()
    if shapes is None:
        own = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return KeyMap(disk={name: (name,) for name in own}, shapes=own)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    disk: dict[str, tuple[str, ...]] = defaultdict(tuple)
    unused, converted = [], set()
    for key in sorted(shapes):
        if EXPERT.search(key):
            continue
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, converter = key, None
        if converter is not None:
            converted.add(key)
        if name in state:
            disk[name] += (key,)
        else:
            unused.append(key)
    return KeyMap(
        disk=dict(disk), shapes=shapes, unused=tuple(unused), converted=frozenset(converted)
    )
