"""Names of tensors in memory and on disk, through transformers' own conversion rules."""

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

EXPERT = re.compile(r"\.experts\.\d+\.")
"""Tensors of one expert: many, and never a router's."""


class KeyMap:
    """Which keys on disk load into which tensors of a model, as `from_pretrained` decides it.

    Attributes:
        disk: Name in memory -> keys on disk.
        unused: Keys on disk that load into no tensor of the model.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        state: dict[str, Tensor] = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        prefix = model.base_model_prefix
        disk: dict[str, list[str]] = defaultdict(list)
        self.unused: list[str] = []
        for key in sorted(keys):
            if EXPERT.search(key):
                continue
            name, _ = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name = key
            if name in state:
                disk[name].append(key)
            else:
                self.unused.append(key)
        self.disk = dict(disk)
