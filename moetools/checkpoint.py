"""Open a checkpoint: headers and `config.json` first, single tensors when asked for.

A checkpoint is a local folder of safetensors, a model on the Hugging Face hub (`org/name` or
`org/name@revision`), or `demo`, the one that ships inside the package. Opening validates it:
whatever would make a later step fail or read wrong weights is refused here, in one line.
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load

from moetools.console import some
from moetools.errors import CheckpointError
from moetools.hub import HubRepository
from moetools.safetensors_format import TensorInfo, parse_header, read_header

__all__ = ["Checkpoint", "TensorInfo"]

logger = logging.getLogger(__name__)

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DEMO = Path(__file__).parent / "demo" / "checkpoint"

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")
PICKLES = re.compile(r"[^/]*\.(bin|pt|pth|ckpt)")
ROUTED = re.compile(r"expert|moe|router")
"""Occurs in the keys of every mixture-of-experts checkpoint, and in no dense one."""

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip
DOWNLOADED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""Small files that a download carries; never pickles."""

OTHER_WEIGHTS = (
    "*.safetensors", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx",
    "*.onnx_data", "*.tflite", "original/*",
)  # fmt: skip
"""What a whole download leaves out beside the weights that the index names."""

HASH_CHUNK = 16 * 1024 * 1024


class Source(Protocol):
    """Where the files of a checkpoint lie; `name` is the checkpoint as the user typed it."""

    name: str

    def where(self, name: str) -> str:
        """A file in the user's words, for messages."""

    def file(self, name: str) -> Path | None:
        """A small file as a local path; None where there is none."""

    def cached(self, name: str) -> Path | None:
        """A file that is on this machine; None otherwise."""

    def names(self) -> list[str] | None:
        """All file names; None when they cannot be listed."""

    def header(self, name: str) -> tuple[bytes, int]:
        """JSON header and total size in bytes of a safetensors file."""

    def read(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of a file, and its size."""


class LocalFolder:
    """Files of a folder on this machine."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    def where(self, name: str) -> str:
        """The file's path as the user would type it."""
        return f"{self.name.rstrip('/')}/{name}"

    def file(self, name: str) -> Path | None:
        """The file, or None."""
        path = self.path / name
        return path if path.is_file() else None

    cached = file

    def names(self) -> list[str]:
        """Names of the files in the folder itself."""
        return sorted(path.name for path in self.path.iterdir() if path.is_file())

    def header(self, name: str) -> tuple[bytes, int]:
        """JSON header and total size in bytes of a safetensors file."""
        return _file_header(self.path / name, self.where(name))

    def read(self, name: str, begin: int, end: int) -> tuple[bytes, int]:
        """Bytes [begin, end) of a file, and its size."""
        return _read_file(self.path / name, begin, end)


class Checkpoint:
    """A validated checkpoint whose weights have not been read.

    Attributes:
        name: The model as the user typed it.
        path: Its folder; None for a hub model that is not (completely) downloaded.
        revision: Commit of a hub model, else None.
        config_dict: `config.json` as it is.
        tensors: Every tensor by its key on disk.
        shard_sizes: Bytes of every weight file.
        trust_remote_code: Whether the user allowed code of the checkpoint to run.
    """

    def __init__(
        self,
        *,
        name: str,
        source: Source,
        config_dict: dict[str, Any],
        tensors: Mapping[str, TensorInfo],
        shard_sizes: Mapping[str, int],
        trust_remote_code: bool,
    ) -> None:
        """Use `Checkpoint.open`."""
        self.name = name
        self.config_dict = config_dict
        self.tensors = MappingProxyType(dict(tensors))
        self.shard_sizes = MappingProxyType(dict(shard_sizes))
        self.trust_remote_code = trust_remote_code
        self.revision = source.commit if isinstance(source, HubRepository) else None
        self._source = source
        self._hashes: dict[str, str] = {}

    @classmethod
    def open(cls, model: str, *, trust_remote_code: bool = False) -> "Checkpoint":
        """Open a local folder, a hub id or `demo`; reads headers and `config.json` only.

        Raises:
            CheckpointError: There is no such checkpoint, it is damaged or incomplete, it holds
                pickled weights only, is dense, or needs code that was not allowed to run.
        """
        source = _locate(model)
        config_dict = _read_config(source)
        tensors, shard_sizes = _read_tensors(source)
        _check_is_moe(source, config_dict, tensors)
        _check_model_type(source, config_dict, trust_remote_code)
        return cls(
            name=model,
            source=source,
            config_dict=config_dict,
            tensors=tensors,
            shard_sizes=shard_sizes,
            trust_remote_code=trust_remote_code,
        )

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.tensors)} tensors)"

    @property
    def path(self) -> Path | None:
        """Folder of the checkpoint; None while its weights are not on this machine."""
        if isinstance(self._source, LocalFolder):
            return self._source.path
        assert isinstance(self._source, HubRepository)
        shards = [self._source.cached(shard) for shard in self.shard_sizes]
        return self._source.snapshot if all(shards) else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all weight files."""
        return sum(self.shard_sizes.values())

    @property
    def model_type(self) -> str:
        """`model_type` of `config.json`."""
        return str(self.config_dict["model_type"])

    def config(self) -> Any:
        """The configuration as a transformers object, built without remote code unless allowed.

        Raises:
            CheckpointError: transformers does not accept the configuration.
        """
        from transformers import AutoConfig

        folder = self._source.file(CONFIG)
        assert folder is not None
        try:
            return AutoConfig.from_pretrained(
                str(folder.parent), trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # every family validates its fields in its own way
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{self._source.where(CONFIG)}: transformers does not accept it: {reason}"
            ) from error

    def shard_path(self, shard: str) -> Path | None:
        """A weight file on this machine; None for one of the hub that is not downloaded."""
        return self._source.cached(shard)

    def read(self, shard: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a weight file, by a ranged read from the hub where it must be."""
        path = self._source.cached(shard)
        content, _ = (
            self._source.read(shard, begin, end) if path is None else _read_file(path, begin, end)
        )
        return content

    def file(self, name: str) -> Path | None:
        """A small file of the top folder, fetched from the hub; None where there is none."""
        return self._source.file(name)

    def file_names(self) -> list[str] | None:
        """Names of the files in the top folder; None for a hub model that cannot be asked."""
        names = self._source.names()
        return None if names is None else sorted(name for name in names if "/" not in name)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor, from the file or by a byte range from the hub.

        Raises:
            KeyError: The checkpoint has no such key.
        """
        info = self.tensors[key]
        shard = self._source.cached(info.shard)
        if shard is not None:
            with safe_open(shard, framework="pt") as tensors:
                loaded: torch.Tensor = tensors.get_tensor(key)
                return loaded
        data = self.read(info.shard, info.begin, info.end)
        header = json.dumps(
            {key: {"dtype": info.dtype, "shape": info.shape, "data_offsets": [0, len(data)]}}
        ).encode()
        fetched: torch.Tensor = load(len(header).to_bytes(8, "little") + header + data)[key]
        return fetched

    def check_shapes(self, state: Mapping[str, torch.Tensor]) -> None:
        """Compare the tensors that a model has under the same name on disk.

        Args:
            state: State dict of the model that `config.json` describes; may be on the meta device.

        Raises:
            CheckpointError: A shape differs: `config.json` belongs to another checkpoint.
        """
        wrong = [
            f"{key} has shape {list(info.shape)}, expected {list(state[key].shape)}"
            for key, info in self.tensors.items()
            if key in state and info.shape != tuple(state[key].shape)
        ]
        if wrong and "quantization_config" not in self.config_dict:
            raise CheckpointError(
                f"{self.name} does not fit its config.json: {some(wrong)}. Use the config.json "
                "that belongs to these weights."
            )

    def fingerprint(self, keys: Iterable[str]) -> dict[str, str]:
        """Sha256 (hexadecimal) of the raw bytes of each tensor, as they lie on disk.

        Each is read once, when it is first asked for.

        Raises:
            KeyError: The checkpoint has no such key.
        """
        keys = tuple(keys)
        for key in keys:
            if key not in self._hashes:
                self._hashes[key] = self._sha256(self.tensors[key])
        return {key: self._hashes[key] for key in keys}

    def has_tokenizer(self) -> bool | None:
        """Whether a tokenizer lies beside the weights, by file name; None if it cannot be seen."""
        if any(self._source.cached(name) for name in TOKENIZER_FILES):
            return True
        names = self._source.names()
        return None if names is None else bool(set(names).intersection(TOKENIZER_FILES))

    def local_path(self) -> Path:
        """Folder with all weights and the tokenizer; downloads a hub model if it must.

        Only safetensors, JSON and tokenizer files are fetched, and Python files where remote code
        was allowed.

        Raises:
            CheckpointError: The hub cannot be reached and the cache is incomplete.
        """
        if isinstance(self._source, LocalFolder):
            return self._source.path
        assert isinstance(self._source, HubRepository)
        code = ["*.py"] if self.trust_remote_code else []
        folder = self._source.download([*self.shard_sizes, *DOWNLOADED, *code])
        missing = [shard for shard in self.shard_sizes if not (folder / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.name}: {some(missing)} not in the hub cache. "
                f"Run `hf download {self._source.repo_id}` where there is a network."
            )
        return folder

    def whole_path(self, *, other_weights: bool = False) -> Path:
        """As `local_path`, with every other file of the repository that is no weight file.

        Args:
            other_weights: Fetch weight files that the index does not name as well.
        """
        folder = self.local_path()
        if isinstance(self._source, HubRepository):
            ignore = [] if other_weights else list(OTHER_WEIGHTS)
            self._source.download(["*"], ignore=ignore)
            self._source.download(["moetools/*"], ignore=())
        return folder

    def _sha256(self, info: TensorInfo) -> str:
        digest = hashlib.sha256()
        for begin in range(info.begin, info.end, HASH_CHUNK):
            digest.update(self.read(info.shard, begin, min(begin + HASH_CHUNK, info.end)))
        return digest.hexdigest()


def _locate(model: str) -> Source:
    """Find out what the user means by MODEL."""
    if model == "demo":
        if not DEMO.is_dir():
            raise CheckpointError(f"{DEMO} is missing: install moetools again to get the demo.")
        return LocalFolder(DEMO, "demo")
    path = Path(model).expanduser()
    if path.is_dir():
        return LocalFolder(path, model)
    if path.exists():
        raise CheckpointError(f"{model} is a file. Pass the folder that holds config.json.")
    hub_id = HUB_ID.fullmatch(model)
    if hub_id is None or model.startswith((".", "~")):
        hint = _similar_folder(path) or "Pass a folder, a hub id (org/name), or `demo`."
        raise CheckpointError(f"{model}: no such folder. {hint}")
    try:
        return HubRepository(hub_id["repo"], hub_id["revision"])
    except CheckpointError as error:
        hint = _similar_folder(path)
        raise CheckpointError(f"{error} {hint}".strip()) from error


def _similar_folder(path: Path) -> str:
    """A question for a mistyped path; empty where nothing beside it looks like it."""
    if not path.parent.is_dir():
        return ""
    folders = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    close = difflib.get_close_matches(path.name, folders, n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else ""


def _read_config(source: Source) -> dict[str, Any]:
    path = source.file(CONFIG)
    if path is None:
        names = source.names() or []
        missing = [CONFIG]
        if not any(name.endswith(".safetensors") for name in names):
            missing.append("weights (*.safetensors)")
        raise CheckpointError(
            f"{source.name} is not a checkpoint folder: {' and '.join(missing)} missing."
        )
    config = _read_json(source, path)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{source.where(CONFIG)} names no model_type.")
    return config


def _read_json(source: Source, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{source.where(path.name)} is not valid JSON ({error}). Repair it or download it "
            "again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{source.where(path.name)} must hold a JSON object.")
    return content


def _read_tensors(source: Source) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Read the header of every weight file and hold them against the index."""
    alone = source.cached(SINGLE) is not None and source.cached(INDEX) is None
    index = None if alone else source.file(INDEX)
    weight_map = _weight_map(source, index) if index is not None else {}
    shards = sorted(set(weight_map.values())) or [SINGLE]
    if shards != [SINGLE] and source.cached(SINGLE) is not None:
        raise CheckpointError(
            f"{source.name} holds two sets of weights, {SINGLE} and the files that {INDEX} "
            "names. Remove the one that is not meant."
        )
    by_shard, sizes = _read_headers(source, shards)
    tensors: dict[str, TensorInfo] = {}
    twice: list[str] = []
    for header in by_shard:
        twice += sorted(header.keys() & tensors.keys())
        tensors |= header
    if twice:
        raise CheckpointError(
            f"{source.name}: {some(twice)} found twice, in different weight files. "
            "Keep one of them."
        )
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise CheckpointError(
            f"{source.where(INDEX)} names {some(absent)}, not found in {weight_map[absent[0]]}. "
            "Download the checkpoint again."
        )
    elsewhere = [key for key, shard in weight_map.items() if tensors[key].shard != shard]
    if elsewhere:
        raise CheckpointError(
            f"{source.where(INDEX)}: {some(elsewhere)} found in {tensors[elsewhere[0]].shard}, "
            f"the index says {weight_map[elsewhere[0]]}. Download the checkpoint again."
        )
    unlisted = sorted(tensors.keys() - weight_map.keys()) if index is not None else []
    if unlisted:
        logger.warning("%s does not name %s, found in its files", INDEX, some(unlisted))
    return tensors, sizes


def _weight_map(source: Source, index: Path) -> dict[str, str]:
    weight_map = _read_json(source, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{source.where(INDEX)} has no weight_map. Download it again.")
    return {str(key): str(shard) for key, shard in weight_map.items()}


def _read_headers(
    source: Source, shards: list[str]
) -> tuple[list[dict[str, TensorInfo]], dict[str, int]]:
    """Headers of all shards, several at a time (on the hub each one is a request)."""

    def read(shard: str) -> tuple[bytes, int] | None:
        cached = source.cached(shard)
        try:
            if cached is not None:
                return _file_header(cached, source.where(shard))
            return source.header(shard)
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(max_workers=8) as pool:
        headers = dict(zip(shards, pool.map(read, shards), strict=True))
    missing = [shard for shard, header in headers.items() if header is None]
    if missing == [SINGLE]:
        raise CheckpointError(_explain_no_weights(source))
    if missing:
        raise CheckpointError(
            f"{source.where(INDEX)} names {some(missing)}, which is not there. Download what is "
            "missing."
        )
    tensors = []
    sizes = {}
    for shard, found in headers.items():
        assert found is not None
        header, sizes[shard] = found
        tensors.append(parse_header(header, sizes[shard], shard, source.where(shard)))
    return tensors, sizes


def _explain_no_weights(source: Source) -> str:
    """Why there is neither `model.safetensors` nor its index."""
    names = source.names() or []
    pickles = [name for name in names if PICKLES.fullmatch(name) and "training" not in name]
    loose = [name for name in names if re.fullmatch(r"[^/]*\.safetensors", name)]
    if loose:
        return (
            f"{source.name} holds {some(loose)} but no {INDEX} that says which tensor lies "
            "where. Download the index too."
        )
    if pickles:
        return (
            f"{source.name} holds pickled weights only ({some(pickles)}); opening them can "
            "run any code, so they are refused. Convert them where you trust the file: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)."
        )
    ggufs = [name for name in names if name.endswith(".gguf")]
    found = f" ({some(ggufs)} cannot be read)" if ggufs else ""
    return f"{source.name} is not a checkpoint folder: {SINGLE} or {INDEX} is missing{found}."


def _check_is_moe(
    source: Source, config_dict: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    if not any(ROUTED.search(key) for key in tensors):
        raise CheckpointError(
            f"{source.name} is a dense model (model_type {config_dict['model_type']!r}): no "
            "expert or router among its tensors, so there is no routing to record."
        )


def _check_model_type(source: Source, config_dict: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse what the installed transformers cannot build, or only with code of the checkpoint.

    A checkpoint that brings code for a family that transformers has (most DeepSeek releases) is
    read with transformers' own code.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from moetools.architectures import refusal

    if config_dict["model_type"] in CONFIG_MAPPING_NAMES:
        return  # a known family that cannot be recorded can still be inspected
    reason = refusal(config_dict, trust_remote_code=trust_remote_code)
    if reason is not None:
        raise CheckpointError(f"{source.where(CONFIG)}: {reason}.")


def _file_header(path: Path, where: str) -> tuple[bytes, int]:
    return read_header(lambda begin, end: _read_file(path, begin, end), where)


def _read_file(path: Path, begin: int, end: int) -> tuple[bytes, int]:
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin), path.stat().st_size
