"""What an edit makes of a checkpoint: changed tensors by their key on disk, and a record of it.

An edit is pure: checkpoint and data in, `EditPlan` out. Only `moetools.writing` writes
checkpoints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from moetools.checkpoint import Checkpoint
from moetools.safetensors_format import TORCH_DTYPES

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorChange:
    """One tensor of the new checkpoint, produced when it is written.

    Attributes:
        dtype: Name in a safetensors header, such as `BF16`.
        shape: As on disk.
        read: The raw bytes, little-endian and row by row, as they will lie on disk.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes]

    @classmethod
    def of(cls, make: Callable[[], Tensor], *, dtype: str, shape: tuple[int, ...]) -> Self:
        """A change whose values torch can hold.

        Args:
            make: The tensor, of any floating or whole type; cast to `dtype` when written.
            dtype: Name in a safetensors header; usually that of the tensor it replaces.
            shape: Shape of what `make` returns.

        Raises:
            ValueError: torch has no such dtype, or (when written) the shape differs.
        """
        if dtype not in TORCH_DTYPES:
            raise ValueError(f"torch has no dtype {dtype}: give the bytes themselves")

        def read() -> Bytes:
            tensor = make().detach()
            if tuple(tensor.shape) != shape:
                raise ValueError(f"expected a tensor of shape {shape}, got {tuple(tensor.shape)}")
            return tensor_bytes(tensor.to(TORCH_DTYPES[dtype]))

        return cls(dtype=dtype, shape=shape, read=read)


@dataclass(frozen=True, kw_only=True, slots=True)
class EditRecord:
    """What was done, as it is kept beside the weights.

    Attributes:
        method: Name of the edit, such as `steer`.
        parameters: What decides the result, as plain JSON values.
        seed: Of everything random in it; None where nothing is.
        metrics: What the edit measured, as plain JSON values.
        model: The checkpoint that was edited, as the user named it.
        revision: Its commit on the hub.
        version: Of moetools.
    """

    method: str
    parameters: Mapping[str, Any]
    seed: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    model: str
    revision: str | None = None
    version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EditPlan:
    """A new checkpoint, described by how it differs from another.

    Attributes:
        checkpoint: What is edited.
        changes: Key on disk -> the tensor that takes its place, or is added under that key.
        files: Small files of the folder that change with it, such as `config.json`, by name.
        attachments: Files to keep with the provenance in `moetools/edit-N/`, by name.
        record: What was done.
    """

    checkpoint: Checkpoint
    changes: Mapping[str, TensorChange]
    files: Mapping[str, bytes] = field(default_factory=dict)
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    record: EditRecord


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie in a safetensors file."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw: Any = flat.view(torch.uint8).numpy()
    return memoryview(raw)


def has_equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits: NaN equals itself, -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))
