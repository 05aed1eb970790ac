"""Names of tensors in memory and on disk, through transformers' own conversion rules."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

EXPERT = re.compile(r"\.experts\.\d+\.")
"""Tensors of one expert: many, and never a router's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A key on disk that loads into a tensor of a model.

    Attributes:
        key: On disk.
        converter: What it goes through, with the other sources of that tensor; None if only its
            name changes.
        pattern: Pattern of the converter that the key fits; the key without one.
    """

    key: str
    converter: WeightConverter | None
    pattern: str


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


def find_sources(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, list[Source]]:
    """Name in memory -> keys on disk, as `from_pretrained` decides it.

    A converter that makes several tensors is listed under the first of them. Names that the model
    does not have are among those found.

    Args:
        model: May be on the meta device.
        keys: On disk.
    """
    state: dict[str, Tensor] = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix = model.base_model_prefix
    sources: dict[str, list[Source]] = defaultdict(list)
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = key, None
        converter = None if pattern is None else by_pattern[pattern]
        sources[name].append(Source(key=key, converter=converter, pattern=pattern or key))
    return dict(sources)


def map_keys(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]] | None) -> KeyMap:
    """Keys of a checkpoint; without one, the model's own names."""
    state: dict[str, Tensor] = model.state_dict()
    if shapes is None:
        own = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return KeyMap(disk={name: (name,) for name in own}, shapes=own)
    sources = find_sources(model, (key for key in shapes if not EXPERT.search(key)))
    return KeyMap(
        disk={
            name: tuple(sorted(each.key for each in found))
            for name, found in sources.items()
            if name in state
        },
        shapes=shapes,
        unused=tuple(
            sorted(
                each.key for name, found in sources.items() if name not in state for each in found
            )
        ),
        converted=frozenset(
            each.key for found in sources.values() for each in found if each.converter is not None
        ),
    )
