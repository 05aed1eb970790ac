"""An edit as one small safetensors file that travels without the checkpoint.

It holds the changed tensors under their keys, changed small files as `file:NAME` and attachments as
`attachment:NAME`; its metadata hold a JSON document (`moetools`) with the edit's record and the
sha256 of everything before and after, and the sha256 of that document.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, TensorChange
from moetools.errors import EditError, MoEToolsError, OutputError
from moetools.files import atomic_file, locked
from moetools.provenance import plain_record, record_of, sha256
from moetools.safetensors_format import TensorInfo, TensorLayout, aligned, parse_header
from moetools.shards import TensorFile, file_header, hash_range, read_range, tensor_layout

FORMAT = 1
FILE, ATTACHMENT = "file:", "attachment:"
"""What the names of small files begin with."""
PLACEHOLDER = "0" * 64
"""Stands for a hash that is not known yet, which has the same length."""


class Patch:
    """A patch file whose contents are what was written.

    Attributes:
        path: The file.
        record: Of the edit.
        tensors: Key -> sha256 `before` (null for a new tensor) and `after`, `dtype` and `shape`.
        files: Small files that change -> sha256 `before` and `after`.
        attachments: Files that the edit keeps with it -> sha256.
    """

    def __init__(self, path: Path) -> None:
        """Read the header and compare everything with its hashes.

        Raises:
            EditError: There is no such file, it is no patch, or it is damaged.
        """
        self.path = path
        if not path.is_file():
            raise EditError(f"{path}: no such file. Name a patch that --patch wrote.")
        header, size = self._header()
        self._infos = parse_header(header, size, path.name, str(path))
        document = self._document(json.loads(header).get("__metadata__") or {})
        self.record = record_of(document["record"])
        self.tensors: Mapping[str, dict[str, Any]] = document["tensors"]
        self.files: Mapping[str, dict[str, Any]] = document["files"]
        self.attachments: Mapping[str, str] = document["attachments"]
        self._check()

    def plan(self, checkpoint: Checkpoint) -> EditPlan:
        """The edit for a checkpoint.

        Raises:
            EditError: The patch was made for another checkpoint.
        """
        self._check_fits(checkpoint)
        return EditPlan(
            checkpoint=checkpoint,
            changes={
                key: TensorChange(
                    dtype=entry["dtype"],
                    shape=tuple(entry["shape"]),
                    read=partial(self._read, key),
                )
                for key, entry in self.tensors.items()
            },
            files={name: self._read(FILE + name) for name in self.files},
            attachments={name: self._read(ATTACHMENT + name) for name in self.attachments},
            record=self.record,
        )

    def _read(self, key: str) -> bytes:
        info = self._infos[key]
        return read_range(self.path, info.begin, info.end)

    def _header(self) -> tuple[bytes, int]:
        try:
            return file_header(self.path, str(self.path))
        except MoEToolsError as error:
            raise EditError(f"{error} Expected a patch that --patch wrote.") from error

    def _document(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        text = metadata.get("moetools")
        if text is None:
            raise EditError(
                f"{self.path} is a safetensors file, but no patch: it says nothing about an edit. "
                "Name a file that --patch wrote."
            )
        if sha256(text.encode()) != metadata.get("sha256"):
            raise self._damaged("its description")
        document: dict[str, Any] = json.loads(text)
        if document["format"] != FORMAT:
            raise EditError(
                f"{self.path} has format {document['format']}, expected {FORMAT}: it was written "
                "by another version of moetools. Use that version."
            )
        return document

    def _check(self) -> None:
        """Compare every byte with the hashes of the description."""
        expected = {key: entry["after"] for key, entry in self.tensors.items()}
        expected |= {FILE + name: entry["after"] for name, entry in self.files.items()}
        expected |= {ATTACHMENT + name: sha256 for name, sha256 in self.attachments.items()}
        if expected.keys() != self._infos.keys():
            raise self._damaged("its list of tensors")
        for key, sha in expected.items():
            info = self._infos[key]
            if hash_range(self.path, info.begin, info.end) != sha or not self._is_described(info):
                raise self._damaged(key)

    def _is_described(self, info: TensorInfo) -> bool:
        small = {"dtype": "U8", "shape": [info.num_bytes]}
        entry = self.tensors.get(info.key, small)
        return (info.dtype, list(info.shape)) == (entry["dtype"], entry["shape"])

    def _damaged(self, part: str) -> EditError:
        return EditError(f"{self.path} is damaged: {part} is not what was written. Copy it again.")

    def _check_fits(self, checkpoint: Checkpoint) -> None:
        known = [key for key in self.tensors if key in checkpoint.tensors]
        found: dict[str, str | None] = dict.fromkeys(self.tensors)
        found |= checkpoint.fingerprint(known)
        wrong = [key for key, entry in self.tensors.items() if found[key] != entry["before"]]
        for name, entry in self.files.items():
            found[name] = _file_hash(checkpoint.file(name))
            if found[name] != entry["before"]:
                wrong.append(name)
        if not wrong:
            return
        after = {name: entry["after"] for name, entry in {**self.tensors, **self.files}.items()}
        if all(found[name] == sha for name, sha in after.items()):
            raise EditError(
                f"{checkpoint.name} has the edit of {self.path} already: every tensor is what the "
                "patch would make of it."
            )
        at = f" at {self.record.revision}" if self.record.revision else ""
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        what = "differs from" if found[wrong[0]] else "is missing, unlike in"
        raise EditError(
            f"{self.path} was made for another checkpoint: {wrong[0]} of {checkpoint.name}{more} "
            f"{what} the one that it changes. Apply it to {self.record.model}{at}, or make the "
            f"edit again on {checkpoint.name}."
        )


class PatchWriter:
    """Writes a patch while the tensors of its plan are produced."""

    def __init__(self, plan: EditPlan, path: Path, part: Path) -> None:
        """Use `PatchWriter.open`."""
        self.path = path
        tensors = plan.checkpoint.tensors
        small = {FILE + name: content for name, content in plan.files.items()}
        small |= {ATTACHMENT + name: content for name, content in plan.attachments.items()}
        layout = [
            tensor_layout(key, change, tensors.get(key)) for key, change in plan.changes.items()
        ] + [
            TensorLayout(key=key, dtype="U8", shape=(len(content),), num_bytes=len(content))
            for key, content in small.items()
        ]
        self._document: dict[str, Any] = {
            "format": FORMAT,
            "record": plain_record(plan.record),
            "tensors": {
                key: {
                    "before": PLACEHOLDER if key in tensors else None,
                    "after": PLACEHOLDER,
                    "dtype": change.dtype,
                    "shape": list(change.shape),
                }
                for key, change in plan.changes.items()
            },
            "files": {
                name: {"before": _file_hash(plan.checkpoint.file(name)), "after": sha256(content)}
                for name, content in plan.files.items()
            },
            "attachments": {name: sha256(content) for name, content in plan.attachments.items()},
        }
        part.unlink(missing_ok=True)
        self._file = TensorFile(part, aligned(layout), self._metadata())
        self.num_bytes = self._file.num_bytes
        for key, content in small.items():
            self._file.write(key, content)

    @classmethod
    @contextmanager
    def open(cls, plan: EditPlan, path: Path, *, overwrite: bool = False) -> Iterator[Self]:
        """A patch that takes its place when every tensor was added.

        Args:
            plan: The edit.
            path: The patch file.
            overwrite: Replace an existing file.

        Raises:
            OutputError: The file exists and was not to be replaced, cannot be written, or is
                being written by another process.
        """
        with locked(path, "--patch", "file"), atomic_file(path) as part:
            check_replaceable(path, overwrite=overwrite)
            writer = cls(plan, path, part)
            with writer._file:
                yield writer
                writer._file.set_metadata(writer._metadata())

    def add(self, key: str, content: memoryview, *, before: str | None, after: str) -> None:
        """Write one changed tensor, with the sha256 of what it replaces and of itself."""
        self._document["tensors"][key] |= {"before": before, "after": after}
        self._file.write(key, content)

    def _metadata(self) -> dict[str, str]:
        text = json.dumps(self._document, allow_nan=False, ensure_ascii=False)
        return {"moetools": text, "sha256": sha256(text.encode())}


def check_replaceable(path: Path, *, overwrite: bool) -> None:
    """Refuse a patch file that is there already.

    Raises:
        OutputError: It exists and was not to be replaced.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"--patch {path} exists. Name a new file, or add --overwrite.")


def _file_hash(path: Path | None) -> str | None:
    return None if path is None else sha256(path.read_bytes())


def write_patch(plan: EditPlan, path: Path, *, overwrite: bool = False) -> None:
    """Write an edit as a patch file, without writing the checkpoint.

    Raises:
        OutputError: The file exists and was not to be replaced, cannot be written, or is being
            written by another process.
    """
    tensors = plan.checkpoint.tensors
    with PatchWriter.open(plan, path, overwrite=overwrite) as writer:
        for key, change in plan.changes.items():
            content = memoryview(change.read()).cast("B")
            before = plan.checkpoint.fingerprint([key])[key] if key in tensors else None
            writer.add(key, content, before=before, after=sha256(content))
