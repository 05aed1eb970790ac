"""Checkpoints made of raw bytes, and a second reader of them that shares no code with moetools."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

CONFIG = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}
INDEX = "model.safetensors.index.json"

Raw = tuple[str, tuple[int, ...], bytes]
"""Dtype, shape and bytes of a tensor."""


def raw(dtype: str, shape: tuple[int, ...], num_bytes: int, seed: int = 0) -> Raw:
    """A tensor of random bytes."""
    return dtype, shape, np.random.default_rng(seed).bytes(num_bytes)


def write_shard(path: Path, tensors: Mapping[str, Raw], metadata: dict | None = None) -> None:
    """A safetensors file with the tensors in this order, its header padded in an own way."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for key, (dtype, shape, content) in sorted(tensors.items()):  # names in another order
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": None}
        assert content is not None
    for key, (_, _, content) in tensors.items():
        header[key]["data_offsets"] = [position, position + len(content)]
        position += len(content)
    encoded = json.dumps(header, indent=1).encode()
    encoded += b" " * (-len(encoded) % 8 + 16)
    body = b"".join(content for _, _, content in tensors.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + body)


def write_raw(
    folder: Path, shards: Mapping[str, Mapping[str, Raw]], *, index: bool | None = None
) -> Path:
    """A checkpoint folder; an index is written for more than one shard, unless told otherwise."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    for name, tensors in shards.items():
        write_shard(folder / name, tensors, {"format": "pt"})
    if len(shards) > 1 if index is None else index:
        weight_map = {key: name for name, tensors in shards.items() for key in tensors}
        size = sum(
            len(content) for tensors in shards.values() for _, _, content in tensors.values()
        )
        document = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document))
    return folder


def read_shard(path: Path) -> tuple[bytes, dict[str, Raw]]:
    """Header and tensors of a safetensors file, in the order of their bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    entries = json.loads(header)
    entries.pop("__metadata__", None)
    ordered = sorted(entries.items(), key=lambda entry: entry[1]["data_offsets"])
    position = 0
    tensors = {}
    for key, entry in ordered:
        begin, end = entry["data_offsets"]
        assert begin == position, "no gaps"
        position = end
        tensors[key] = (entry["dtype"], tuple(entry["shape"]), body[begin:end])
    assert position == len(body)
    return header, tensors


def read_raw(folder: Path) -> dict[str, Raw]:
    """Every tensor of a checkpoint folder."""
    tensors: dict[str, Raw] = {}
    for path in sorted(folder.glob("*.safetensors")):
        _, found = read_shard(path)
        assert not tensors.keys() & found.keys()
        tensors |= found
    return tensors


def tree(folder: Path, without: tuple[str, ...] = ()) -> dict[str, bytes | None]:
    """Every file of a folder with its bytes, and every sub-folder (None)."""
    found: dict[str, bytes | None] = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            found[(Path(parent) / name).relative_to(folder).as_posix() + "/"] = None
        for name in files:
            path = Path(parent) / name
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return {name: content for name, content in found.items() if not name.startswith(without)}
