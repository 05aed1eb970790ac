"""The trace on disk: a manifest, a token table and a sequence table, in Parquet.

    manifest.json                   what was run, and whether it is complete
    tokens/part-00000.parquet       one row per token, whole sequences, in order
    sequences/part-00000.parquet    one row per sequence, in the order of the tokens

Row groups hold whole sequences, so a reader that takes one row group at a time never splits one.
Shapes: T tokens, S sequences, E routed experts, K selected per token.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moetools.errors import TraceError
from moetools.files import atomic_file, write_json

FORMAT = "moetools-trace"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ROW_GROUP_BYTES = 48 << 20
ROW_GROUP_TOKENS = 1 << 16
ZSTD_LEVEL = 3
TOKEN_COLUMNS = ("sequence", "position", "token_id", "phase")
SEQUENCE_COLUMNS = ("sequence", "text", "id", "group", "num_tokens")
OUTPUT_STATISTICS = ("norms", "peaks", "shares", "collinearity")
"""What `--keep outputs` records of the experts' outputs; `--keep norms` records the first alone."""
TOKEN_FAMILIES = (
    "experts", "weights", "margin", "logits", "inputs", *OUTPUT_STATISTICS, "predictions",
)  # fmt: skip
SEQUENCE_FAMILIES = ("probs", "probs_even", "probs_odd", "logprob", "entropy")

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TracedRouter:
    """One router of a trace; `name` is the suffix of its columns (`experts.07`)."""

    name: str
    layer: int
    kind: str
    num_experts: int
    top_k: int
    rule: dict[str, Any] | None = None
    module: str = ""
    weight_key: str = ""
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Type of stored expert ids; its largest value marks a dropped token."""
        return np.dtype(np.uint8 if self.num_experts < 256 else np.uint16)

    @property
    def dropped(self) -> int:
        """The id that a reader sees where no expert was selected (null on disk)."""
        return int(np.iinfo(self.id_dtype).max)


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceManifest:
    """What was run; everything a reader needs besides the tables."""

    model: str
    routers: tuple[TracedRouter, ...]
    num_sequences: int
    num_tokens: int
    groups: tuple[str, ...] = ()
    reference_group: str | None = None
    revision: str | None = None
    family: str = ""
    ignored_routers: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    engine: str = "transformers"
    data: dict[str, Any] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    hidden_size: int | None = None
    has_nll: bool = False
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    intervention: dict[str, Any] | None = None
    num_parts: int = 0
    coverage: str = ""
    notes: tuple[str, ...] = ()
    complete: bool = False

    @property
    def title(self) -> str:
        """The model, and whether its routers were changed while it ran."""
        return self.model if self.intervention is None else f"{self.model}, steered"

    def to_json(self) -> dict[str, Any]:
        """The document written as `manifest.json`."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, document: dict[str, Any], *, where: Path) -> "TraceManifest":
        """Read a manifest document.

        Raises:
            TraceError: Not a manifest, or of another format version.
        """
        if document.get("format") != FORMAT:
            raise TraceError(f"{where} is not the manifest of a moetools trace.")
        found = document.get("format_version")
        if found != FORMAT_VERSION:
            raise TraceError(
                f"{where} has trace format {found}; this moetools reads format {FORMAT_VERSION}. "
                "Record the trace again, or install the moetools version that wrote it."
            )
        try:
            known = {f.name: document[f.name] for f in fields(cls) if f.name in document}
            known["routers"] = tuple(TracedRouter(**router) for router in document["routers"])
            for name in ("groups", "keep", "notes"):
                known[name] = tuple(document[name])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise TraceError(f"{where} is damaged: {error}. Record the trace again.") from None


def token_schema(manifest: TraceManifest) -> pa.Schema:
    """Columns of the token table; lists are fixed-size."""
    columns = [
        pa.field("sequence", pa.int32()),
        pa.field("position", pa.int32()),
        pa.field("token_id", pa.int32()),
        pa.field("phase", pa.dictionary(pa.int8(), pa.string())),
    ]
    kept = {
        "logits": lambda router: pa.list_(pa.float32(), router.num_experts),
        "inputs": lambda router: pa.list_(pa.float16(), manifest.hidden_size),
        "norms": lambda router: pa.list_(pa.float32(), router.top_k),
        "peaks": lambda router: pa.list_(pa.float32(), router.top_k),
        "shares": lambda router: pa.list_(pa.float32(), router.top_k),
        "collinearity": lambda router: pa.list_(pa.float32(), 3),
    }
    wanted = set(manifest.keep)
    if "outputs" in wanted:
        wanted.update(OUTPUT_STATISTICS)
    for router in manifest.routers:
        ids = pa.from_numpy_dtype(router.id_dtype)
        columns += [
            pa.field(f"experts.{router.name}", pa.list_(ids, router.top_k)),
            pa.field(f"weights.{router.name}", pa.list_(pa.float16(), router.top_k)),
        ]
        if router.rule is not None:
            columns.append(pa.field(f"margin.{router.name}", pa.float16()))
        columns += [
            pa.field(f"{name}.{router.name}", kept[name](router)) for name in kept if name in wanted
        ]
    if "predictions" in manifest.keep:
        columns.append(pa.field("predictions", pa.int32()))
    return pa.schema(columns)


def sequence_schema(manifest: TraceManifest) -> pa.Schema:
    """Columns of the sequence table; per router the mean over the sequence's tokens."""
    columns = [
        pa.field("sequence", pa.int32()),
        pa.field("text", pa.int32()),
        pa.field("id", pa.string()),
        pa.field("group", pa.string()),
        pa.field("num_tokens", pa.int32()),
    ]
    if manifest.has_nll:
        columns.append(pa.field("nll", pa.float32()))
    for router in manifest.routers:
        if router.rule is None:
            continue
        for family in ("probs", "probs_even", "probs_odd", "logprob"):
            columns.append(
                pa.field(f"{family}.{router.name}", pa.list_(pa.float32(), router.num_experts))
            )
        columns.append(pa.field(f"entropy.{router.name}", pa.float32()))
    return pa.schema(columns)


def fixed_size_list(values: Array, *, mask: Array | None = None) -> pa.FixedSizeListArray:
    """A [T, N] array as a Parquet-ready column; rows where `mask` is True become null."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    nulls = None if mask is None else pa.array(mask)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=nulls)


class TraceWriter:
    """Writes the parts of one trace; a part is complete or absent.

    Args:
        path: The trace folder, already claimed by the caller.
        manifest: Written at once as incomplete; `finish` marks it complete.
    """

    def __init__(self, path: Path, manifest: TraceManifest) -> None:
        self.path = path
        self.manifest = replace(manifest, complete=False)
        self._token_schema = token_schema(manifest)
        self._sequence_schema = sequence_schema(manifest)
        for folder in ("tokens", "sequences"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        write_json(path / MANIFEST, self.manifest.to_json())

    def has_part(self, part: int) -> bool:
        """Whether both tables of a part are there; a part is written tokens first."""
        return all(path.exists() for path in _part_paths(self.path, part))

    def write_part(self, part: int, tokens: Iterable[pa.Table], sequences: pa.Table) -> None:
        """Write one part.

        Args:
            part: Its number, from 0.
            tokens: Tables of whole sequences, in order; each becomes one row group.
            sequences: One row per sequence of the part, in the same order.
        """
        tokens_path, sequences_path = _part_paths(self.path, part)
        with (
            atomic_file(tokens_path) as temporary,
            pq.ParquetWriter(
                temporary, self._token_schema, **_encodings(self._token_schema)
            ) as writer,
        ):
            for table in tokens:
                writer.write_table(table.cast(self._token_schema), row_group_size=table.num_rows)
        with atomic_file(sequences_path) as temporary:
            pq.write_table(
                sequences.cast(self._sequence_schema),
                temporary,
                **_encodings(self._sequence_schema),
            )

    def finish(self, **changes: Any) -> TraceManifest:
        """Mark the trace complete.

        Args:
            **changes: Manifest fields that are known only now (`coverage`, `num_parts`).
        """
        self.manifest = replace(self.manifest, complete=True, **changes)
        write_json(self.path / MANIFEST, self.manifest.to_json())
        return self.manifest


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """Writer options: small integers as dictionaries, floats byte-split, all compressed."""
    dictionary: list[str] = []
    byte_split: list[str] = []
    for column in schema:
        is_list = pa.types.is_fixed_size_list(column.type)
        leaf = column.type.value_type if is_list else column.type
        path = f"{column.name}.list.element" if is_list else column.name
        (byte_split if pa.types.is_floating(leaf) else dictionary).append(path)
    return {
        "compression": "zstd",
        "compression_level": ZSTD_LEVEL,
        "use_dictionary": dictionary,
        "use_byte_stream_split": byte_split,
        "write_statistics": ["sequence"],
    }


def _part_paths(path: Path, part: int) -> tuple[Path, Path]:
    name = f"part-{part:05}.parquet"
    return path / "tokens" / name, path / "sequences" / name


def row_bytes(manifest: TraceManifest) -> int:
    """Bytes that one row of the token table takes in memory."""
    total = 0
    for column in token_schema(manifest):
        is_list = pa.types.is_fixed_size_list(column.type)
        leaf = column.type.value_type if is_list else column.type
        width = 8 if pa.types.is_dictionary(leaf) else leaf.bit_width
        total += width // 8 * (column.type.list_size if is_list else 1)
    return total


def rows_per_group(manifest: TraceManifest) -> int:
    """How many tokens a row group should hold: 64 Ki, fewer where rows are wide."""
    return max(1, min(ROW_GROUP_TOKENS, ROW_GROUP_BYTES // row_bytes(manifest)))


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceBatch:
    """Whole sequences of a trace, in order.

    Attributes:
        offsets: [S + 1] int64; tokens of the i-th sequence are `offsets[i]:offsets[i + 1]`.
        sequence: [S] int32, number of each sequence.
        text: [S] int32, number of the text that it was cut from: what is independent of what.
            Its own number where texts were packed.
        group: [S] int32, index into the manifest's groups, -1 without a group.
        tokens: Token columns by name: [T] or [T, N]. Dropped selections read as
            `TracedRouter.dropped`, other nulls as NaN (floats) or -1 (integers).
        sequences: Sequence columns by name: [S] or [S, N]; ids are strings or None.
    """

    offsets: NDArray[np.int64]
    sequence: NDArray[np.int32]
    text: NDArray[np.int32]
    group: NDArray[np.int32]
    tokens: dict[str, Array]
    sequences: dict[str, Array]

    @property
    def num_tokens(self) -> int:
        """Tokens in the batch."""
        return int(self.offsets[-1])

    @property
    def num_sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.sequence)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[S] tokens of each sequence."""
        return np.diff(self.offsets)


def read_manifest(path: Path) -> TraceManifest:
    """The manifest of a trace folder, complete or not.

    Raises:
        TraceError: Not a trace, of another format version, or damaged.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise TraceError(
            f"{path} is not a trace: it has no {MANIFEST}. Record one with: moetools trace."
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TraceError(f"{file} cannot be read: {error}. Record the trace again.") from None
    if not isinstance(document, dict):
        raise TraceError(f"{file} is not the manifest of a moetools trace.")
    return TraceManifest.from_json(document, where=file)


class TraceStore:
    """A trace opened for reading.

    Args:
        path: The trace folder.
        partial: Accept an incomplete trace; only its finished parts are read.
        name: What outputs call this trace; by default its folder's name.
        step: Training step of the model, where several traces follow a run.

    Raises:
        TraceError: Not a trace, of another format version, damaged, or incomplete.
    """

    def __init__(
        self,
        path: Path,
        *,
        partial: bool = False,
        name: str | None = None,
        step: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.step = step
        self.name = name or self.path.resolve().name
        self.manifest = read_manifest(self.path)
        if not self.manifest.complete and not partial:
            raise TraceError(
                f"{path} is incomplete. Finish it by running the same trace command with "
                "--resume, or read what is there with --partial."
            )
        self._parts = [self._open_part(part) for part in self._part_numbers()]

    @property
    def routers(self) -> tuple[TracedRouter, ...]:
        """The recorded routers, in order of depth."""
        return self.manifest.routers

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, sorted; empty if the data had none."""
        return self.manifest.groups

    @cached_property
    def num_tokens(self) -> int:
        """Tokens in the parts that are read."""
        return sum(tokens.metadata.num_rows for tokens, _ in self._parts)

    @cached_property
    def num_sequences(self) -> int:
        """Sequences in the parts that are read."""
        return sum(sequences.metadata.num_rows for _, sequences in self._parts)

    @cached_property
    def columns(self) -> frozenset[str]:
        """Names of all columns of both tables."""
        return frozenset(token_schema(self.manifest).names) | frozenset(
            sequence_schema(self.manifest).names
        )

    def sequences(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The sequence table, in the order of the tokens."""
        schema = sequence_schema(self.manifest)
        wanted = schema.names if columns is None else list(columns)
        tables = [sequences.read(columns=wanted) for _, sequences in self._parts]
        if not tables:
            return pa.schema([schema.field(name) for name in wanted]).empty_table()
        return pa.concat_tables(tables)

    def selections(self, router: str) -> Iterator[Array]:
        """Selected experts of one router, [T, K] per row group, largest weight first."""
        traced = self.router(router)
        column = f"experts.{traced.name}"
        for tokens, _ in self._parts:
            for group in range(tokens.num_row_groups):
                table = tokens.read_row_group(group, columns=[column])
                yield _to_numpy(table.column(0), dropped=traced.dropped)

    def router(self, name: str) -> TracedRouter:
        """The router of that name.

        Raises:
            TraceError: No such router in this trace.
        """
        for router in self.routers:
            if router.name == name:
                return router
        known = ", ".join(router.name for router in self.routers)
        raise TraceError(f"{self.path} has no router '{name}'. Known: {known}")

    def batches(self, columns: Iterable[str]) -> Iterator[TraceBatch]:
        """Read whole sequences, row group by row group; each column is read once.

        Args:
            columns: Names of token and sequence columns; of those, the batch has arrays.
        """
        wanted = set(columns)
        missing = wanted - self.columns
        if missing:
            raise TraceError(f"{self.path} has no column {', '.join(sorted(missing))}.")
        of_tokens = [n for n in token_schema(self.manifest).names if n in wanted]
        of_sequences = [n for n in sequence_schema(self.manifest).names if n in wanted]
        dropped = {f"experts.{router.name}": router.dropped for router in self.routers}
        group_index = {name: i for i, name in enumerate(self.groups)}
        for tokens_file, sequences_file in self._parts:
            read = list(dict.fromkeys(["sequence", "text", "group", "num_tokens", *of_sequences]))
            sequences = sequences_file.read(columns=read)
            lengths = sequences.column("num_tokens").to_numpy()
            ends = np.cumsum(lengths)
            first = 0
            for row_group in range(tokens_file.num_row_groups):
                num_rows = tokens_file.metadata.row_group(row_group).num_rows
                start = ends[first - 1] if first else 0
                stop = int(np.searchsorted(ends, start + num_rows))
                if stop >= len(ends) or ends[stop] != start + num_rows:
                    raise TraceError(
                        f"{self.path}: a row group of the token table splits a sequence. The "
                        "trace is damaged; record it again."
                    )
                table = tokens_file.read_row_group(row_group, columns=of_tokens)
                part = sequences.slice(first, stop + 1 - first)
                sequence = part.column("sequence").to_numpy()
                text = _to_numpy(part.column("text"))
                yield TraceBatch(
                    offsets=np.concatenate([[0], ends[first : stop + 1] - start]),
                    sequence=sequence,
                    text=np.where(text < 0, sequence, text),
                    group=np.array(
                        [group_index.get(g, -1) for g in part.column("group").to_pylist()],
                        dtype=np.int32,
                    ),
                    tokens={
                        name: _to_numpy(table.column(name), dropped=dropped.get(name))
                        for name in of_tokens
                    },
                    sequences={name: _to_numpy(part.column(name)) for name in of_sequences},
                )
                first = stop + 1

    def _part_numbers(self) -> list[int]:
        if self.manifest.complete:
            return list(range(self.manifest.num_parts))
        return [
            int(path.stem.removeprefix("part-"))
            for path in sorted((self.path / "sequences").glob("part-*.parquet"))
            if (self.path / "tokens" / path.name).exists()
        ]

    def _open_part(self, part: int) -> tuple[pq.ParquetFile, pq.ParquetFile]:
        files = []
        schemas = (token_schema(self.manifest), sequence_schema(self.manifest))
        for path, schema in zip(_part_paths(self.path, part), schemas, strict=True):
            try:
                file = pq.ParquetFile(path)
            except FileNotFoundError:
                raise TraceError(f"{path} is missing. Record the trace again.") from None
            except (OSError, pa.ArrowInvalid) as error:
                raise TraceError(
                    f"{path} cannot be read: {error}. Record the trace again."
                ) from None
            if file.schema_arrow.names != schema.names:
                raise TraceError(
                    f"{path} does not have the columns of its manifest. Record the trace again."
                )
            files.append(file)
        return files[0], files[1]


def _to_numpy(column: pa.ChunkedArray, *, dropped: int | None = None) -> Array:
    """A column as [T] or [T, N]; nulls as `TraceBatch` says; copies only where it must."""
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if not pa.types.is_fixed_size_list(array.type):
        if array.null_count and not pa.types.is_string(array.type):
            array = array.fill_null(np.nan if pa.types.is_floating(array.type) else -1)
        return np.asarray(array.to_numpy(zero_copy_only=False))
    width = array.type.list_size
    values = array.values.slice(array.offset * width, len(array) * width)
    missing = np.nan if dropped is None else dropped
    if values.null_count:  # a null list is read with null elements
        values = values.fill_null(missing)
    matrix = np.asarray(values.to_numpy(zero_copy_only=False)).reshape(-1, width)
    if array.null_count:
        matrix = matrix.copy()
        matrix[np.asarray(array.is_null())] = missing
    return matrix
