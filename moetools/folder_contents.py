"""What of a checkpoint folder goes along when it is edited, and what does not, with reasons.

The weights that the index names are rewritten by the writer. Every other weight file holds the
model as it was: it would be wrong beside edited weights, so it is left out and listed.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moetools.checkpoint import INDEX
from moetools.files import MARKER

WEIGHTS = (
    "safetensors", "gguf", "ggml", "bin", "pt", "pth", "ckpt", "h5", "hdf5", "msgpack", "onnx",
    "onnx_data", "tflite", "pdparams", "mlmodel", "distcp", "npz", "pkl", "pickle", "llamafile",
    "nemo",
)  # fmt: skip
"""Endings of files that hold weights, or pickles of a training run."""
WEIGHT_FILE = re.compile(rf".*\.({'|'.join(WEIGHTS)})", re.IGNORECASE)
WEIGHT_INDEX = re.compile(rf".*\.({'|'.join(WEIGHTS)})\.index\.json", re.IGNORECASE)

OLD_FORMATS = ("original",)
"""Folders that hold the whole model a second time, in the form of its makers."""
BOOKKEEPING = (".git", ".cache", ".hg", ".svn")
"""Folders that describe the input's own history or download."""
PROVENANCE_FOLDER = "moetools"

OLD_WEIGHTS = "weights that the index does not name: they hold the model before the edit"
EXTRA_SHARD = "not named by the index; serving engines load every *.safetensors of the top folder"
OLD_INDEX = "names weight files that are not carried"
OLD_FORMAT = "the model before the edit, in another form"
HISTORY = "history or download state of the input"
BROKEN = "a link to nothing, or no regular file"


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderContents:
    """Files of a checkpoint folder beside its weights; names are relative, with slashes.

    Attributes:
        files: Name -> the file itself, links resolved.
        folders: Every sub-folder that goes along, empty ones too.
        left_out: Name of a file or folder -> why it does not go along.
    """

    files: dict[str, Path]
    folders: tuple[str, ...]
    left_out: dict[str, str]


def folder_contents(
    folder: Path, *, shards: Iterable[str], carry_all: bool = False
) -> FolderContents:
    """Sort the files of a checkpoint folder into those that go along and those that do not.

    Args:
        folder: The checkpoint.
        shards: Names of its weight files, which are not listed.
        carry_all: Weights that the index does not name go along as well, but never a
            `*.safetensors` of the top folder, which serving engines would load.
    """
    named = set(shards)
    files: dict[str, Path] = {}
    folders: list[str] = []
    left_out: dict[str, str] = {}

    def visit(path: Path, prefix: str, ancestors: frozenset[Path]) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            name = prefix + entry.name
            if name in named or name == MARKER:
                continue
            reason = _reason(entry, name, carry_all=carry_all)
            if reason is not None:
                left_out[name + "/" * entry.is_dir()] = reason
            elif entry.is_dir():
                real = Path(entry.path).resolve()
                if real in ancestors:
                    left_out[f"{name}/"] = "a link to a folder that holds it"
                    continue
                folders.append(name)
                visit(Path(entry.path), f"{name}/", ancestors | {real})
            else:
                files[name] = Path(entry.path).resolve()

    visit(folder, "", frozenset({folder.resolve()}))
    return FolderContents(files=files, folders=tuple(folders), left_out=left_out)


def _reason(entry: "os.DirEntry[str]", name: str, *, carry_all: bool) -> str | None:
    """Why a file or folder is left out; None if it goes along."""
    top = "/" not in name
    if entry.is_dir():
        if carry_all or not top:
            return None
        if entry.name in BOOKKEEPING:
            return HISTORY
        return OLD_FORMAT if entry.name in OLD_FORMATS else None
    if not entry.is_file():
        return BROKEN
    if top and entry.name.lower().endswith(".safetensors"):
        return EXTRA_SHARD
    if carry_all or name == INDEX or name.startswith(f"{PROVENANCE_FOLDER}/"):
        return None
    if WEIGHT_FILE.fullmatch(entry.name):
        return OLD_WEIGHTS
    return OLD_INDEX if WEIGHT_INDEX.fullmatch(entry.name) else None
