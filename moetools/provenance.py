"""What was done to a checkpoint, kept beside its weights in `moetools.json`.

    moetools.json              {"format": 1, "edits": [...]}, the oldest edit first
    moetools/undo-1.bin        the original bytes of what edit 1 changed, a safetensors file
    moetools/edit-1/           files that edit 1 keeps with it

An entry holds the edit's record; for every changed tensor the sha256 of its bytes before and after,
and dtype and shape where they changed; changed small files; files that were left out; what
`revert` needs; and the sha256 of all that. Nothing in it depends on when or where it was written.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moetools.edit_plan import EditRecord
from moetools.errors import CheckpointError
from moetools.folder_contents import PROVENANCE_FOLDER

PROVENANCE = "moetools.json"
FORMAT = 1


def undo_name(number: int) -> str:
    """File with the originals of an edit, counted from 1."""
    return f"{PROVENANCE_FOLDER}/undo-{number}.bin"


def attachments_folder(number: int) -> str:
    """Folder of the files that an edit keeps, counted from 1."""
    return f"{PROVENANCE_FOLDER}/edit-{number}"


def read_edits(folder: Path, name: str) -> list[dict[str, Any]]:
    """The edits that led to a checkpoint, the oldest first; none if it names none.

    Args:
        folder: The checkpoint.
        name: The checkpoint in the user's words, for messages.

    Raises:
        CheckpointError: The file is damaged or of another format.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        return []
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise CheckpointError(
                f"{name}/{PROVENANCE} has format {document['format']!r}, expected {FORMAT}: it was "
                "written by another version of moetools. Use that version."
            )
        return [_checked(edit, number) for number, edit in enumerate(document["edits"], 1)]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}/{PROVENANCE} is damaged ({error}). Restore it, or remove it together with "
            f"{PROVENANCE_FOLDER}/ to give up what it says about earlier edits."
        ) from error


def encode_edits(edits: list[dict[str, Any]]) -> bytes:
    """The contents of `moetools.json`."""
    document = {
        "format": FORMAT,
        "edits": [{**edit, "sha256": _entry_sha256(edit)} for edit in edits],
    }
    text = json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False)
    return f"{text}\n".encode()


def _checked(edit: dict[str, Any], number: int) -> dict[str, Any]:
    """An entry as it was before it got its sha256.

    Raises:
        ValueError: It is not what was written.
    """
    entry = dict(edit)
    if entry.pop("sha256", None) != _entry_sha256(entry):
        raise ValueError(f"edit {number} is not what was written")
    return entry


def _entry_sha256(entry: Mapping[str, Any]) -> str:
    return sha256(json.dumps(entry, allow_nan=False, sort_keys=True).encode())


def plain_record(record: EditRecord) -> dict[str, Any]:
    """A record as plain JSON values.

    Raises:
        ValueError: It holds NaN, infinity or what JSON cannot express.
    """
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    plain: dict[str, Any] = json.loads(json.dumps(values, allow_nan=False, default=_as_dict))
    return plain


def record_of(values: Mapping[str, Any]) -> EditRecord:
    """The record again from its plain values."""
    return EditRecord(**{field.name: values[field.name] for field in fields(EditRecord)})


def sha256(content: bytes | bytearray | memoryview) -> str:
    """Sha256 (hexadecimal) of bytes."""
    return hashlib.sha256(content).hexdigest()


def _as_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")
