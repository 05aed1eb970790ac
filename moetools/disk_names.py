"""Tensors of a model in memory and the tensors on disk that they are loaded from, both ways.

`from_pretrained` renames tensors and fuses the experts of a layer; which keys feed which tensor is
read from the keys that are there, not from the model type. The way there is transformers' own; the
way back is the reverse of the same operations, and is only used if it gives back, through the way
there, exactly the tensor that it was given.
"""

import copy
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from moetools.architectures._keys import Source, find_sources
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import TensorChange, has_equal_bits, tensor_bytes
from moetools.errors import ArchitectureError
from moetools.loading import empty_model
from moetools.safetensors_format import TORCH_DTYPES

PLAIN_DTYPES = ("F64", "F32", "F16", "BF16")
"""Dtypes of weights that stand for themselves, without a scale in another tensor."""

KEPT_TENSORS = 2
"""Tensors in memory whose parts on disk are kept: those of one layer's experts often alternate."""

MakeTensor = Callable[[], Tensor]


def disk_changes(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor | MakeTensor]
) -> dict[str, TensorChange]:
    """What a change of tensors in memory is on disk.

    Every tensor is made once now, to find out what changes, and again when its parts are read: one
    after the other, in up to four times the memory of the largest. Tensors that are tied are one:
    the change goes to every copy of it on disk, and two names of it are refused.

    Args:
        checkpoint: What is edited.
        tensors: Name in memory -> the whole new tensor, or what makes it, of any floating dtype:
            it is cast to the dtype on disk.

    Returns:
        Key on disk -> its new tensor, of the same dtype and shape, for each whose bytes change.

    Raises:
        ArchitectureError: A tensor has no exact counterpart on disk: it is quantised, not stored,
            or its conversion cannot be reversed.
        ValueError: The model has no such tensor, or it has another shape.
    """
    return DiskNames(checkpoint).changes(tensors)


class DiskNames:
    """Which keys of a checkpoint feed which tensor of its model.

    Args:
        checkpoint: An opened checkpoint.
        model: Its model, on the meta device; built if it is not given.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel | None = None) -> None:
        self.checkpoint = checkpoint
        self.model: Any = model or empty_model(
            checkpoint.config(), trust_remote_code=checkpoint.trust_remote_code
        )
        self._state: dict[str, Tensor] = self.model.state_dict()
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        found = find_sources(self.model, checkpoint.tensors)
        self.sources = {name: sources for name, sources in found.items() if name in self._state}
        self._first = {
            member: name
            for name, sources in self.sources.items()
            for member in _members(name, sources)
        }

    def keys(self, name: str) -> list[str]:
        """Keys on disk that feed a tensor of the model, itself or under a name tied to it."""
        return [
            source.key
            for tied in self._tied(name)
            if tied in self._first
            for source in self.sources[self._first[tied]]
        ]

    def load(self, name: str) -> dict[str, Tensor]:
        """A tensor as `from_pretrained` would fill it, by name, with those made along with it.

        Empty where no key on disk feeds it.
        """
        first = self._first.get(name)
        return {} if first is None else self._forward(first, self.checkpoint.tensor)

    def changes(self, tensors: Mapping[str, Tensor | MakeTensor]) -> dict[str, TensorChange]:
        """See `disk_changes`."""
        makers: dict[str, dict[str, MakeTensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            make = functools.partial(_itself, tensor) if isinstance(tensor, Tensor) else tensor
            tied = self._tied(name)
            twice = [other for other in tied if other != name and other in tensors]
            if twice:
                raise ValueError(f"{name} and {twice[0]} are tied: they are one tensor")
            for stored in self._stored(name, tied):
                makers[self._first[stored]][stored] = make
        produced = _Produced(self, makers)
        changes = {}
        for first in makers:
            for key in produced.find_changed(first):
                info = self.checkpoint.tensors[key]
                read = functools.partial(produced.read, first, key)
                changes[key] = TensorChange(dtype=info.dtype, shape=info.shape, read=read)
        return changes

    def backward(self, first: str, makers: Mapping[str, MakeTensor]) -> dict[str, Tensor]:
        """Tensors on disk, in the dtypes there, that load into new tensors of the model.

        Args:
            first: First name of what one conversion makes.
            makers: Some of the names that it makes; the others stay as they are on disk.

        Raises:
            ArchitectureError: There is no exact way back.
            ValueError: A new tensor has another shape.
        """
        new = {}
        for name, make in makers.items():
            new[name] = make().detach().cpu()
            expected = tuple(self._state[name].shape)
            if tuple(new[name].shape) != expected:
                raise ValueError(f"{name} has shape {expected}, got {tuple(new[name].shape)}")
        sources = self.sources[first]
        converter = sources[0].converter
        if converter is None:
            parts = {sources[0].key: new[first]}
        else:
            members = _members(first, sources)
            if len(members) > len(new):
                new = self._forward(first, self.checkpoint.tensor) | new
            parts = self._reversed(first, [new[name] for name in members])
            self._check_round_trip(first, parts, new)
        for key, tensor in parts.items():
            if tensor.shape != self.checkpoint.tensors[key].shape:
                raise self._no_way_back(first, f"{key} would get another shape")
        return {key: self._cast(key, tensor) for key, tensor in parts.items()}

    def _tied(self, name: str) -> list[str]:
        """All names of the model's tensor of that name."""
        if name not in self._state:
            raise ValueError(f"{type(self.model).__name__} has no tensor {name}")
        own = self._parameters.get(name)
        if own is None:
            return [name]
        return [other for other, each in self._parameters.items() if each is own]

    def _stored(self, name: str, tied: Iterable[str]) -> list[str]:
        """The names of a tensor under which it lies on disk, in a form that can be changed."""
        stored = [each for each in tied if each in self._first]
        model = self.checkpoint.name
        quantised = self.checkpoint.config_dict.get("quantization_config")
        if not stored:
            reason = (
                "it is stored quantised" if quantised else "no tensor on disk is loaded into it"
            )
            raise ArchitectureError(f"{name} of {model} cannot be changed: {reason}.")
        for each in stored:
            sources = self.sources[self._first[each]]
            converters = {id(source.converter) for source in sources}
            if len(converters) > 1 or (sources[0].converter is None and len(sources) > 1):
                keys = ", ".join(source.key for source in sources)
                raise ArchitectureError(
                    f"{name} of {model} cannot be changed: several tensors on disk are loaded "
                    f"into it ({keys})."
                )
            for source in sources:
                dtype = self.checkpoint.tensors[source.key].dtype
                is_number = dtype in TORCH_DTYPES and not TORCH_DTYPES[dtype].is_floating_point
                is_same = is_number and TORCH_DTYPES[dtype] == self._state[each].dtype
                if dtype not in PLAIN_DTYPES and not is_same:
                    raise ArchitectureError(
                        f"{name} of {model} cannot be changed: {source.key} is quantised "
                        f"({dtype}), and its scales would have to change with it. Convert the "
                        "checkpoint to bfloat16 first."
                    )
        return stored

    def _forward(self, first: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What the sources of a tensor are converted to, by name in memory."""
        sources = self.sources[first]
        converter = copy.deepcopy(sources[0].converter)
        if converter is None:
            return {first: read(sources[0].key)}
        for source in sources:
            reading = functools.partial(read, source.key)
            converter.add_tensor(first, source.key, source.pattern, reading)
        converted = converter.convert(first, model=self.model, config=self.model.config)
        return {
            target: tensor[0] if isinstance(tensor, list) else tensor
            for target, tensor in converted.items()
        }

    def _reversed(self, first: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Tensors by key on disk, from the reverse operations of a conversion."""
        sources = self.sources[first]
        converter = sources[0].converter
        assert converter is not None
        try:
            back = converter.reverse_transform()
            parts: dict[str, Any] = {
                pattern: [tensor]
                for pattern, tensor in zip(back.source_patterns, tensors, strict=True)
            }
            for operation in back.operations:
                parts = operation.convert(
                    parts,
                    source_patterns=back.source_patterns,
                    target_patterns=back.target_patterns,
                    full_layer_name=first,
                    model=self.model,
                    config=self.model.config,
                    missing_keys=None,
                )
        except Exception as error:  # every operation fails in its own way on what it cannot undo
            reason = " ".join(str(error).split()) or type(error).__name__
            raise self._no_way_back(first, reason) from error
        found = {}
        for pattern, target in zip(converter.source_patterns, back.target_patterns, strict=True):
            keys = [source.key for source in sources if source.pattern == pattern]
            for number, key in enumerate(keys):
                part = parts.get(target.replace("*", str(number)))
                if part is not None:
                    found[key] = part[0] if isinstance(part, list) else part
        return found

    def _check_round_trip(
        self, first: str, parts: Mapping[str, Tensor], new: Mapping[str, Tensor]
    ) -> None:
        """Refuse a way back that the way there does not undo, in the dtype of the new tensors."""

        def read(key: str) -> Tensor:
            return parts[key] if key in parts else self.checkpoint.tensor(key)

        again = self._forward(first, read)
        for name, tensor in new.items():
            if name not in again or not has_equal_bits(again[name], tensor):
                raise self._no_way_back(first, f"{name} would not be loaded as it was given")

    def _cast(self, key: str, tensor: Tensor) -> Tensor:
        info = self.checkpoint.tensors[key]
        dtype = TORCH_DTYPES[info.dtype]
        if not dtype.is_floating_point and tensor.dtype != dtype:
            raise ValueError(f"{key} is {info.dtype}, got a tensor of {tensor.dtype}")
        return tensor.to(dtype).contiguous()

    def _no_way_back(self, name: str, reason: str) -> ArchitectureError:
        return ArchitectureError(
            f"{name} of {self.checkpoint.name} (model_type '{self.checkpoint.model_type}') cannot "
            f"be taken back to its tensors on disk: {reason}."
        )


class _Produced:
    """Tensors on disk made from new tensors in memory; those of the last few are kept."""

    def __init__(self, names: DiskNames, makers: Mapping[str, Mapping[str, MakeTensor]]) -> None:
        self._names, self._makers = names, makers
        self._changed: dict[str, list[str]] = {}
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def find_changed(self, first: str) -> list[str]:
        """Keys whose bytes change, in the order of the sources."""
        checkpoint = self._names.checkpoint
        parts = self._names.backward(first, self._makers[first])
        self._changed[first] = []
        for key, tensor in parts.items():
            info = checkpoint.tensors[key]
            before = checkpoint.read(info.shard, info.begin, info.end)
            if not np.array_equal(
                np.frombuffer(before, np.uint8), np.asarray(tensor_bytes(tensor))
            ):
                self._changed[first].append(key)
        return self._changed[first]

    def read(self, first: str, key: str) -> memoryview:
        """The new bytes of a key."""
        if first not in self._kept:
            while len(self._kept) >= KEPT_TENSORS:
                self._kept.popitem(last=False)
            parts = self._names.backward(first, self._makers[first])
            self._kept[first] = {key: parts[key].clone() for key in self._changed[first]}
        self._kept.move_to_end(first)
        return tensor_bytes(self._kept[first][key])


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _members(first: str, sources: list[Source]) -> list[str]:
    """Names in memory of all that one conversion makes."""
    converter = sources[0].converter
    if converter is None:
        return [first]
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]
