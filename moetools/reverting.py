"""Undo the last edit of a checkpoint: what results is the edit's input, byte for byte."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from moetools.checkpoint import CONFIG, Checkpoint
from moetools.edit_plan import TensorChange
from moetools.errors import CheckpointError, EditError
from moetools.files import check_output, output_folder
from moetools.folder_contents import FolderContents, folder_contents
from moetools.provenance import (
    PROVENANCE,
    attachments_folder,
    encode_edits,
    read_edits,
    sha256,
    undo_name,
)
from moetools.safetensors_format import parse_header
from moetools.shards import file_header, hash_range, read_range
from moetools.writing import KIND, FolderBuilder, FolderJob, WrittenCheckpoint


class Originals(Protocol):
    """Where the bytes from before an edit are found."""

    name: str
    repair: str

    def range(self, key: str) -> tuple[Path, int, int] | None:
        """File and byte range of a tensor; None if it is not there."""

    def header(self, shard: str) -> bytes | None:
        """Header of a weight file; None if it is not there."""

    def file(self, name: str) -> bytes | None:
        """A small file; None if it is not there."""


class UndoFile:
    """Originals that the edit kept."""

    def __init__(self, path: Path) -> None:
        """Read its header.

        Raises:
            EditError: The file is damaged.
        """
        self.name = str(path)
        self.repair = "It is damaged: name the input of the edit with --base MODEL."
        self._path = path
        try:
            header, size = file_header(path, str(path))
            self._infos = parse_header(header, size, path.name, str(path))
        except CheckpointError as error:
            raise EditError(
                f"{path} is damaged or cut off. Name the input of the edit with --base MODEL."
            ) from error

    def range(self, key: str) -> tuple[Path, int, int] | None:
        """Where the original of a tensor lies."""
        return self._range(f"tensor:{key}")

    def header(self, shard: str) -> bytes | None:
        """The header that a rewritten weight file had."""
        return self._read(f"header:{shard}")

    def file(self, name: str) -> bytes | None:
        """A small file as it was."""
        return self._read(f"file:{name}")

    def _range(self, name: str) -> tuple[Path, int, int] | None:
        info = self._infos.get(name)
        return None if info is None else (self._path, info.begin, info.end)

    def _read(self, name: str) -> bytes | None:
        where = self._range(name)
        return None if where is None else read_range(*where)


class BaseCheckpoint:
    """Originals in the checkpoint that was edited."""

    def __init__(self, model: str) -> None:
        """Open it."""
        self.name = model
        self.repair = "It is not the input of the edit: name that one with --base."
        self._checkpoint = Checkpoint.open(model, trust_remote_code=True)
        self.path = self._checkpoint.local_path()

    def range(self, key: str) -> tuple[Path, int, int] | None:
        """Where the tensor lies."""
        info = self._checkpoint.tensors.get(key)
        return None if info is None else (self.path / info.shard, info.begin, info.end)

    def header(self, shard: str) -> bytes | None:
        """Header of a weight file."""
        path = self.path / shard
        return file_header(path, str(path))[0] if path.is_file() else None

    def file(self, name: str) -> bytes | None:
        """A small file."""
        path = self._checkpoint.file(name)
        return None if path is None else path.read_bytes()


class Edit:
    """What `moetools.json` says about the edit that is undone.

    Attributes:
        tensors: Key -> `before` and `after`, `dtype` and `shape` where they changed.
        added: Keys that the input does not have.
        files: Small files -> `before` and `after`.
        headers: Rewritten weight file -> sha256 of the header that it had.
        new_folders: Folders that the input does not have.
        left_out: What the edit did not carry.
        undo: File with the originals; None where they were not kept.
        own_files: Files and folders that belong to the edit itself.
    """

    def __init__(self, entry: Mapping[str, Any], number: int) -> None:
        """Take an entry apart."""
        self.tensors: dict[str, dict[str, Any]] = {
            key: {"before": change["before"], "after": change["after"], **change}
            for key, change in entry["tensors"].items()
        }
        self.added = frozenset(key for key, at in self.tensors.items() if at["before"] is None)
        self.files = {
            name: (change["before"], change["after"]) for name, change in entry["files"].items()
        }
        self.headers: dict[str, str] = dict(entry["rewritten_shards"])
        self.new_folders = frozenset(entry["new_folders"])
        self.left_out: dict[str, str] = dict(entry["left_out"])
        self.undo: str | None = entry["undo"]
        self.own_files = frozenset({undo_name(number), attachments_folder(number)})

    def check_result(self, checkpoint: Checkpoint, contents: FolderContents) -> None:
        """Refuse a checkpoint that is not what the edit wrote.

        Raises:
            EditError: A changed tensor or file was changed again, or is missing.
        """
        present = [key for key in self.tensors if key in checkpoint.tensors]
        found: dict[str, str | None] = {**checkpoint.fingerprint(present)}
        expected = {key: change["after"] for key, change in self.tensors.items()}
        for name, (_, after) in self.files.items():
            expected[name] = after
            path = contents.files.get(name)
            found[name] = None if path is None else sha256(path.read_bytes())
        wrong = [name for name, after in expected.items() if found.get(name) != after]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise EditError(
                f"{checkpoint.name} was changed after its last edit: {wrong[0]}{more} is not what "
                "the edit wrote, so undoing it would not give back its input. Restore the "
                "checkpoint first."
            )

    def check_originals(self, originals: Originals) -> None:
        """Refuse originals that are not what the edit replaced.

        Raises:
            EditError: One is missing, or its hash is another.
        """
        for key, change in self.tensors.items():
            if change["before"] is not None:
                where = originals.range(key)
                found = None if where is None else hash_range(*where)
                self._compare(key, found, change["before"], originals)
        for shard, before in self.headers.items():
            header = originals.header(shard)
            found = None if header is None else sha256(header)
            self._compare(f"the header of {shard}", found, before, originals)
        for name, (before, _) in self.files.items():
            if before is not None:
                content = originals.file(name)
                found = None if content is None else sha256(content)
                self._compare(name, found, before, originals)

    def _compare(self, what: str, found: str | None, before: str, originals: Originals) -> None:
        if found != before:
            state = "is missing" if found is None else "is not what the edit replaced"
            raise EditError(f"{originals.name}: {what} {state}. {originals.repair}")


def revert(
    model: str | Path,
    *,
    out: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> WrittenCheckpoint:
    """Write the checkpoint as it was before its last edit.

    Files that the edit did not carry cannot be given back; they are listed.

    Args:
        model: The edited checkpoint.
        out: The new folder. If no earlier edit is left it holds nothing of moetools.
        base: The input of the edit, where the edit did not keep the originals.
        overwrite: Replace a checkpoint that moetools wrote.

    Raises:
        EditError: The checkpoint has no edit, was changed after it, or the originals are missing
            or not those of before the edit.
        MoEToolsError: The output may not be written, or a checkpoint is refused.
    """
    out = Path(os.path.abspath(out))
    checkpoint = Checkpoint.open(str(model), trust_remote_code=True)  # none of it is run here
    source = checkpoint.whole_path(other_weights=True)
    edits = read_edits(source, checkpoint.name)
    if not edits:
        raise EditError(
            f"{model} has no edit to revert: it has no {PROVENANCE}, so moetools did not write it."
        )
    inputs = [source] if base is None or not Path(base).exists() else [source, Path(base)]
    check_output(out, kind=KIND, overwrite=overwrite, inputs=inputs)
    contents = folder_contents(source, shards=checkpoint.shard_sizes, carry_all=True)
    number = len(edits)
    edit = Edit(edits[-1], number)
    edit.check_result(checkpoint, contents)
    originals = _originals(edit, checkpoint, source, base)
    edit.check_originals(originals)
    job = _job(edit, originals, checkpoint, source, contents)
    with output_folder(
        out,
        kind=KIND,
        overwrite=overwrite,
        marked=number > 1,
        last=CONFIG,
        inputs=[*inputs, *job.inputs],
    ) as folder:
        builder = FolderBuilder(job, folder.path)
        builder.check_space(more=0)
        builder.write_weights()
        builder.write_files()
        if number > 1:
            builder.write_small(PROVENANCE, encode_edits(edits[:-1]))
        builder.finish()
        num_bytes = builder.num_bytes
    return WrittenCheckpoint(
        path=out,
        number=None,
        changed=(*builder.changed, *sorted(edit.added)),
        added=(),
        rounded_away=(),
        files=tuple(edit.files),
        left_out=edit.left_out,
        linked=(),
        undo=None,
        patch=None,
        num_bytes=num_bytes,
        write_seconds=builder.write_seconds,
        verify_seconds=builder.verify_seconds,
        notes=(),
    )


def _originals(
    edit: Edit, checkpoint: Checkpoint, source: Path, base: str | Path | None
) -> Originals:
    """The input where it is named, else what the edit kept."""
    if base is not None:
        return BaseCheckpoint(str(base))
    if edit.undo is None:
        raise EditError(
            f"{checkpoint.name}: the originals of its last edit were not kept (they are large). "
            "Name the input of the edit with --base MODEL."
        )
    path = source / edit.undo
    if not path.is_file():
        raise EditError(
            f"{checkpoint.name}/{edit.undo}, which holds the originals, is missing. Name the "
            "input of the edit with --base MODEL."
        )
    return UndoFile(path)


def _job(
    edit: Edit,
    originals: Originals,
    checkpoint: Checkpoint,
    source: Path,
    contents: FolderContents,
) -> FolderJob:
    """The folder as it was before the edit."""
    changes = {}
    for key, change in edit.tensors.items():
        where = originals.range(key)
        if key in edit.added or where is None:
            continue
        info = checkpoint.tensors[key]
        dtype, _ = change.get("dtype", (info.dtype, None))
        shape, _ = change.get("shape", (info.shape, None))
        changes[key] = TensorChange(
            dtype=dtype, shape=tuple(shape), read=partial(read_range, *where)
        )
    headers = {shard: originals.header(shard) for shard in edit.headers}
    files = {
        name: originals.file(name) for name, (before, _) in edit.files.items() if before is not None
    }
    removed = {*edit.own_files, *(name for name, (before, _) in edit.files.items() if not before)}
    return FolderJob(
        checkpoint=checkpoint,
        source=source,
        contents=contents,
        changes=changes,
        files={name: content for name, content in files.items() if content is not None},
        removed=edit.added,
        removed_files=frozenset(removed),
        removed_folders=edit.new_folders,
        headers={name: header for name, header in headers.items() if header is not None},
    )
