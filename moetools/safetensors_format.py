"""The header of a safetensors file: where each tensor lies, checked before anything is read.

A file is 8 bytes (little-endian length n), n bytes of JSON, then the tensors without gaps.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from moetools.errors import CheckpointError

RangeReader = Callable[[int, int], tuple[bytes, int]]
"""Reads bytes [begin, end) of a file, fewer at its end; returns them with the file's size."""

FIRST_READ = 64 * 1024
"""Bytes asked for before the length of the header is known; enough for most shards."""

MAX_HEADER = 100_000_000
"""Longest header, in bytes, that the safetensors library accepts."""

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16,
    "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Dtypes of safetensors headers that torch holds, one number in each element."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """One tensor on disk: bytes [begin, end) of the file `shard`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def num_elements(self) -> int:
        """Number of stored elements (packed formats hold several parameters in one)."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size on disk."""
        return self.end - self.begin


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLayout:
    """One tensor of a file that is to be written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def alignment(self) -> int:
        """Bytes that its first byte must be a multiple of, as readers view the file in place."""
        return max(DTYPE_BITS.get(self.dtype, 8) // 8, 1)


def is_aligned(tensors: Iterable[TensorLayout]) -> bool:
    """Whether every tensor lies where its dtype can be read in place, one after the other."""
    position = 0
    for tensor in tensors:
        if tensor.num_bytes and position % tensor.alignment:
            return False
        position += tensor.num_bytes
    return True


def aligned(tensors: Iterable[TensorLayout]) -> list[TensorLayout]:
    """The tensors in this order, or larger dtypes first where one of them would lie askew."""
    ordered = list(tensors)
    if is_aligned(ordered):
        return ordered
    return sorted(ordered, key=lambda tensor: -tensor.alignment)


def encode_header(
    tensors: Iterable[TensorLayout],
    metadata: Mapping[str, str],
    names: Iterable[str] = (),
) -> bytes:
    """The JSON header of a file that holds these tensors one after the other.

    Args:
        tensors: In the order of their bytes.
        metadata: Of the whole file; left out when empty.
        names: Keys to mention first, in this order; the others follow in the order of their bytes.
    """
    position = 0
    entries: dict[str, Any] = {}
    for tensor in tensors:
        end = position + tensor.num_bytes
        entries[tensor.key] = {
            "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    first = {"__metadata__": dict(metadata)} if metadata else {}
    mentioned = {name: entries[name] for name in names if name in entries}
    header = json.dumps(
        first | mentioned | entries, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return header + b" " * (-len(header) % 8)


def read_header(read: RangeReader, where: str) -> tuple[bytes, int]:
    """Read the JSON header of a safetensors file.

    Args:
        read: Access to the file.
        where: The file in the user's words, for messages.

    Returns:
        The JSON bytes and the size of the whole file.

    Raises:
        CheckpointError: The file is too short or is not a safetensors file.
    """
    head, file_size = read(0, FIRST_READ)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{where} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
        )
    if len(head) < 9:
        raise CheckpointError(
            f"{where} is truncated: {file_size} bytes, less than a safetensors header. "
            "Download it again."
        )
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER or head[8:9] != b"{":
        raise CheckpointError(
            f"{where} is not a safetensors file (or is damaged): it does not begin with a header. "
            "Download it again."
        )
    if 8 + length > file_size:
        raise CheckpointError(
            f"{where} is truncated: its header alone takes {8 + length} bytes, the file has "
            f"{file_size}. Download it again."
        )
    header = head[8 : 8 + length]
    if len(header) < length:
        rest, _ = read(8 + len(header), 8 + length)
        header += rest
    return header, file_size


def parse_header(header: bytes, file_size: int, shard: str, where: str) -> dict[str, TensorInfo]:
    """Turn a JSON header into tensors by key, in the order of their bytes.

    Raises:
        CheckpointError: The header is unreadable, contradicts itself, or describes another amount
            of bytes than the file holds.
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = [
            _tensor(key, entry, shard, 8 + len(header), where) for key, entry in entries.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is damaged: its header cannot be read ({error}). Download it again."
        ) from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = 8 + len(header)
    for tensor in tensors:
        if tensor.begin != position:
            raise CheckpointError(
                f"{where} is damaged: {tensor.key} begins at byte {tensor.begin}, expected "
                f"{position}. Download it again."
            )
        position = tensor.end
    if file_size != position:
        state = "truncated" if file_size < position else "damaged"
        raise CheckpointError(
            f"{where} is {state}: its header describes {position} bytes, the file has "
            f"{file_size}. Download it again."
        )
    return {tensor.key: tensor for tensor in tensors}


def _tensor(key: str, entry: dict[str, Any], shard: str, data: int, where: str) -> TensorInfo:
    begin, end = (int(offset) for offset in entry["data_offsets"])
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    tensor = TensorInfo(
        key=key, dtype=dtype, shape=shape, shard=shard, begin=data + begin, end=data + end
    )
    bits = DTYPE_BITS.get(dtype)  # an unknown dtype is copied, never interpreted
    if bits is not None and tensor.num_elements * bits != tensor.num_bytes * 8:
        raise CheckpointError(
            f"{where} is damaged: {key} is {dtype} {list(shape)} but takes {end - begin} bytes. "
            "Download it again."
        )
    return tensor
