"""An edit as one small safetensors file that travels without the checkpoint.

It holds the changed tensors under their keys, changed small files as `file:NAME` and attachments as
`attachment:NAME`; its metadata hold a JSON document (`moetools`) with the edit's record and the
sha256 of everything before and after, and the sha256 of that document.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from moetools.edit_plan import EditPlan
from moetools.files import atomic_file
from moetools.provenance import plain_record, sha256
from moetools.safetensors_format import TensorLayout, aligned
from moetools.shards import TensorFile, tensor_layout

FORMAT = 1
PLACEHOLDER = "0" * 64
"""Stands for a hash that is not known yet, which has the same length."""


class PatchWriter:
    """Writes a patch while the tensors of its plan are produced."""

    def __init__(self, plan: EditPlan, path: Path, part: Path, source: Path) -> None:
        """Use `PatchWriter.open`."""
        self.path = path
        tensors = plan.checkpoint.tensors
        small = {f"file:{name}": content for name, content in plan.files.items()}
        small |= {f"attachment:{name}": content for name, content in plan.attachments.items()}
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
                name: {"before": _file_hash(source / name), "after": sha256(content)}
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
    def open(cls, plan: EditPlan, path: Path, source: Path) -> Iterator[Self]:
        """A patch that takes its place when every tensor was added.

        Args:
            plan: The edit.
            path: The patch file.
            source: Folder of the checkpoint.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            writer = cls(plan, path, part, source)
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


def _file_hash(path: Path) -> str | None:
    return sha256(path.read_bytes()) if path.is_file() else None
