"""Which tensors of two checkpoints differ, and by how much: bytes first, numbers where they differ.

Weight files are read forward through one window each, so that checkpoints of any size are compared
in a few megabytes, from disk or by ranges from the hub. Only tensors that differ are read a second
time, for their numbers.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetools import console
from moetools.checkpoint import Checkpoint, TensorInfo
from moetools.errors import CheckpointError
from moetools.files import MARKER
from moetools.safetensors_format import DTYPE_BITS, TORCH_DTYPES

LOCAL_WINDOW = 4 * 1024 * 1024
REMOTE_WINDOW = 16 * 1024 * 1024
"""Bytes that are read at once of a file on this machine, and in one request from the hub."""

COMPARED_BYTES = 256 * 1024
"""Compared at once: both fit in a processor's cache."""
BLOCK_ELEMENTS = 128 * 1024
"""Elements that numbers are computed of at once."""

SMALL_FILES = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".py", ".md")
"""Endings of what is compared beside the weights."""

NUMBER = re.compile(r"(?<![^._])\d+(?![^.])")
MAX_RANGES = 4
"""Ranges of numbers that a pattern spells out."""

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDifference:
    """One tensor that is not the same in both checkpoints.

    Numbers need equal shapes and, where noted, equal or floating dtypes; else they are None.

    Attributes:
        key: On disk.
        a: In the reference; None where it was added.
        b: In the other; None where it was removed.
        num_changed_bytes: Bytes that differ; needs equal dtypes.
        num_changed_elements: Elements that differ: in a bit where the dtypes are equal, else in
            value. None for dtypes that pack elements into parts of a byte.
        change: Norm of the difference over the norm of A. Floating dtypes only, as stored: scales
            of a quantised tensor are tensors of their own. None where A is zero, or where squares
            are too large for float64.
        cosine: Of both, taken as vectors; None where one is zero, or as above.
        largest: Largest absolute difference of an element.
        num_not_finite: Elements that are NaN or infinite in A or B, left out of these numbers.
    """

    key: str
    a: TensorInfo | None
    b: TensorInfo | None
    num_changed_bytes: int | None = None
    num_changed_elements: int | None = None
    change: float | None = None
    cosine: float | None = None
    largest: float | None = None
    num_not_finite: int | None = None

    @property
    def kind(self) -> Literal["added", "removed", "changed"]:
        """What happened to it on the way from A to B."""
        if self.a is None:
            return "added"
        return "removed" if self.b is None else "changed"

    @property
    def changed_elements(self) -> float | None:
        """Share of the elements that differ; None where there are no elements."""
        if self.num_changed_elements is None or self.a is None or not self.a.num_elements:
            return None
        return self.num_changed_elements / self.a.num_elements

    @property
    def changed_bytes(self) -> float | None:
        """Share of the bytes that differ; None where there are no bytes."""
        if self.num_changed_bytes is None or self.a is None or not self.a.num_bytes:
            return None
        return self.num_changed_bytes / self.a.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class FileDifference:
    """A small file of the top folder that only one checkpoint has, or with other content."""

    name: str
    kind: Literal["added", "removed", "changed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorDiff:
    """All tensors of two checkpoints compared.

    Attributes:
        differences: What differs, in the order of A's files; added tensors last.
        num_identical: Tensors of equal dtype, shape and bytes.
        num_identical_bytes: Their size.
        files: Small files that differ; None where one side cannot be listed.
    """

    differences: tuple[TensorDifference, ...]
    num_identical: int
    num_identical_bytes: int
    files: tuple[FileDifference, ...] | None

    @property
    def differs(self) -> bool:
        """Whether any tensor was added, removed or changed."""
        return bool(self.differences)

    def of_kind(self, kind: str) -> list[TensorDifference]:
        """Differences of one kind."""
        return [each for each in self.differences if each.kind == kind]


def diff_tensors(a: Checkpoint, b: Checkpoint) -> TensorDiff:
    """Compare every tensor of two checkpoints, and their small files.

    Raises:
        CheckpointError: A weight file cannot be read.
    """
    readers = _Reader(a), _Reader(b)
    differences: list[TensorDifference] = []
    num_identical = num_identical_bytes = 0
    both = sum(info.num_bytes for key, info in a.tensors.items() if key in b.tensors)
    ordered = sorted(a.tensors.values(), key=lambda info: (info.shard, info.begin))
    try:
        with console.progress("Comparing tensors", both, "bytes") as meter:
            for info in ordered:
                found = compare_tensor(readers, info, b.tensors.get(info.key))
                if found is None:
                    num_identical += 1
                    num_identical_bytes += info.num_bytes
                else:
                    differences.append(found)
                if info.key in b.tensors:
                    meter.advance(info.num_bytes)
    finally:
        for reader in readers:
            reader.close()
    differences += [
        TensorDifference(key=key, a=None, b=info)
        for key, info in b.tensors.items()
        if key not in a.tensors
    ]
    return TensorDiff(
        differences=tuple(differences),
        num_identical=num_identical,
        num_identical_bytes=num_identical_bytes,
        files=diff_files(a, b),
    )


def diff_files(a: Checkpoint, b: Checkpoint) -> tuple[FileDifference, ...] | None:
    """Small files of two checkpoints that differ; None where one side cannot be listed.

    The mark that moetools leaves in its outputs is not one of them.
    """
    names = [each.file_names() for each in (a, b)]
    if names[0] is None or names[1] is None:
        return None
    own, others = ({n for n in of_one or () if n.endswith(SMALL_FILES)} for of_one in names)
    found = []
    for name in sorted((own | others) - {MARKER}):
        if name not in others:
            found.append(FileDifference(name=name, kind="removed"))
        elif name not in own:
            found.append(FileDifference(name=name, kind="added"))
        elif _content(a, name) != _content(b, name):
            found.append(FileDifference(name=name, kind="changed"))
    return tuple(found)


def _content(checkpoint: Checkpoint, name: str) -> bytes | None:
    path = checkpoint.file(name)
    return None if path is None else path.read_bytes()


class _Reader:
    """Reads the weight files of a checkpoint forward, through one window."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shard: str | None = None
        self._file: BinaryIO | None = None
        self._buffer = bytearray(LOCAL_WINDOW)
        self._window: Bytes = np.empty(0, dtype=np.uint8)
        self._begin = 0

    def identity(self, info: TensorInfo) -> tuple[int, ...] | None:
        """Equal for two tensors that are the same bytes of one file."""
        path = self._checkpoint.shard_path(info.shard)
        if path is None:
            return None
        status = path.stat()
        return status.st_dev, status.st_ino, info.begin, info.end

    def ahead(self, info: TensorInfo, offset: int) -> Bytes:
        """The bytes of a tensor from `offset` on, as many as the window holds: at least one."""
        begin = info.begin + offset
        if info.shard != self._shard or not self._begin <= begin < self._end:
            self._fill(info.shard, begin)
        return self._window[begin - self._begin : info.end - self._begin]

    def exactly(self, info: TensorInfo, offset: int, size: int) -> Bytes:
        """`size` bytes of a tensor from `offset` on; at most a window."""
        begin = info.begin + offset
        if info.shard != self._shard or not self._begin <= begin <= begin + size <= self._end:
            self._fill(info.shard, begin)
        return self._window[begin - self._begin :][:size]

    def close(self) -> None:
        """Close the open file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _end(self) -> int:
        return self._begin + len(self._window)

    def _fill(self, shard: str, begin: int) -> None:
        if shard != self._shard:
            self.close()
            path = self._checkpoint.shard_path(shard)
            self._file = None if path is None else path.open("rb", buffering=0)
            self._shard = shard
        rest = self._checkpoint.shard_sizes[shard] - begin
        content: bytes | memoryview
        if self._file is None:
            size = min(rest, REMOTE_WINDOW)
            content = self._checkpoint.read(shard, begin, begin + size)
        else:
            size = min(rest, LOCAL_WINDOW)
            content = self._read_file(self._file, begin, size)
        if len(content) != size:
            raise CheckpointError(
                f"{self._checkpoint.name}: {shard} became shorter while it was read. Compare again "
                "when nothing writes to it."
            )
        self._window, self._begin = np.frombuffer(content, dtype=np.uint8), begin

    def _read_file(self, file: BinaryIO, begin: int, size: int) -> memoryview:
        """Bytes of the open file, in one buffer that is used again and again."""
        wanted = memoryview(self._buffer)[:size]
        file.seek(begin)
        done = 0
        while done < size and (count := file.readinto(wanted[done:])):  # type: ignore[attr-defined]
            done += count
        return wanted[:done]


def compare_tensor(
    readers: tuple[_Reader, _Reader], a: TensorInfo, b: TensorInfo | None
) -> TensorDifference | None:
    """How a tensor of A differs from the one of B with its key; None where every byte is equal."""
    if b is None or a.shape != b.shape:
        return TensorDifference(key=a.key, a=a, b=b)
    if a.dtype == b.dtype and (_is_same_file(readers, a, b) or _has_equal_bytes(readers, a, b)):
        return None
    whole = all(info.dtype in TORCH_DTYPES for info in (a, b))
    floating = whole and all(TORCH_DTYPES[info.dtype].is_floating_point for info in (a, b))
    if a.dtype != b.dtype and not floating:
        return TensorDifference(key=a.key, a=a, b=b)
    sums = _Sums()
    if whole:
        for block in _blocks(readers, a, b):
            sums.add(*block, infos=(a, b), floating=floating)
    else:
        sums.changed_bytes = sum(
            _num_unequal(*block) for block in _blocks(readers, a, b, of_bytes=True)
        )
    return TensorDifference(
        key=a.key,
        a=a,
        b=b,
        num_changed_bytes=sums.changed_bytes if a.dtype == b.dtype else None,
        num_changed_elements=sums.changed if whole else None,
        **(sums.numbers() if floating else {}),
    )


def _is_same_file(readers: tuple[_Reader, _Reader], a: TensorInfo, b: TensorInfo) -> bool:
    identity = readers[0].identity(a)
    return identity is not None and identity == readers[1].identity(b)


def _has_equal_bytes(readers: tuple[_Reader, _Reader], a: TensorInfo, b: TensorInfo) -> bool:
    offset = 0
    while offset < a.num_bytes:
        ahead = readers[0].ahead(a, offset), readers[1].ahead(b, offset)
        size = min(len(ahead[0]), len(ahead[1]), COMPARED_BYTES)
        if not np.array_equal(ahead[0][:size], ahead[1][:size]):
            return False
        offset += size
    return True


def _blocks(
    readers: tuple[_Reader, _Reader], a: TensorInfo, b: TensorInfo, *, of_bytes: bool = False
) -> Iterator[tuple[Bytes, Bytes]]:
    """Both tensors from their beginning, a number of elements at a time."""
    sizes = (1, 1) if of_bytes else (DTYPE_BITS[a.dtype] // 8, DTYPE_BITS[b.dtype] // 8)
    total = a.num_bytes // sizes[0]
    for begin in range(0, total, BLOCK_ELEMENTS):
        count = min(BLOCK_ELEMENTS, total - begin)
        yield (
            readers[0].exactly(a, begin * sizes[0], count * sizes[0]),
            readers[1].exactly(b, begin * sizes[1], count * sizes[1]),
        )


def _num_unequal(a: NDArray[Any], b: NDArray[Any]) -> int:
    return int(np.count_nonzero(a != b))


@dataclass(slots=True)
class _Sums:
    """Sums over the elements of two tensors, in float64."""

    changed: int = 0
    changed_bytes: int = 0
    not_finite: int = 0
    largest: float = 0.0
    norm_a: float = 0.0
    norm_b: float = 0.0
    product: float = 0.0
    norm_change: float = 0.0

    def add(
        self, a: Bytes, b: Bytes, *, infos: tuple[TensorInfo, TensorInfo], floating: bool
    ) -> None:
        """Add one block of elements, given as bytes."""
        same_dtype = infos[0].dtype == infos[1].dtype
        is_equal = same_dtype and np.array_equal(a, b)
        if same_dtype and not is_equal:
            self.changed_bytes += _num_unequal(a, b)
            kind = f"u{DTYPE_BITS[infos[0].dtype] // 8}"
            self.changed += _num_unequal(a.copy().view(kind), b.copy().view(kind))
        if not floating:
            return
        x = _values(a, infos[0])
        y = x if is_equal else _values(b, infos[1])
        if not same_dtype:
            self.changed += int(((x != y) & ~(x.isnan() & y.isnan())).sum())
        squares = float(x @ x), float(y @ y)
        if not math.isfinite(sum(squares)):
            finite = x.isfinite() & y.isfinite()
            self.not_finite += int((~finite).sum())
            x, y = x[finite], y[finite]
            squares = float(x @ x), float(y @ y)
        self.norm_a += squares[0]
        self.norm_b += squares[1]
        self.product += squares[0] if is_equal else float(x @ y)
        if not is_equal and len(x):
            change = y - x
            self.norm_change += float(change @ change)
            self.largest = max(self.largest, float(change.abs().max()))

    def numbers(self) -> dict[str, Any]:
        """What the sums say, as fields of `TensorDifference`."""
        change = cosine = None
        if math.isfinite(self.norm_a + self.norm_b + self.norm_change):
            norm_a, norm_b = math.sqrt(self.norm_a), math.sqrt(self.norm_b)
            if norm_a > 0:
                change = math.sqrt(self.norm_change) / norm_a
            if norm_a > 0 and norm_b > 0:
                cosine = max(-1.0, min(1.0, self.product / norm_a / norm_b))
                cosine = 1.0 if self.norm_change == 0 else cosine
        return {
            "change": change,
            "cosine": cosine,
            "largest": self.largest if math.isfinite(self.largest) else None,
            "num_not_finite": self.not_finite,
        }


def _values(block: Bytes, info: TensorInfo) -> Tensor:
    return torch.from_numpy(block.copy()).view(TORCH_DTYPES[info.dtype]).double()


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorGroup:
    """Differences of one kind whose keys differ in numbers alone.

    Attributes:
        pattern: Their keys, such as `model.layers.{0-7}.mlp.gate.weight`.
        members: In the order of their keys.
    """

    pattern: str
    members: tuple[TensorDifference, ...]


def group(differences: Iterable[TensorDifference]) -> list[TensorGroup]:
    """Differences by pattern of their keys and by what happened to them, in order of appearance."""
    found: dict[tuple[Any, ...], list[TensorDifference]] = {}
    for each in differences:
        dtypes = tuple(None if info is None else info.dtype for info in (each.a, each.b))
        shapes = each.a and each.b and each.a.shape == each.b.shape
        found.setdefault((NUMBER.sub("#", each.key), dtypes, shapes), []).append(each)
    return [
        TensorGroup(pattern=pattern([each.key for each in members]), members=tuple(members))
        for members in found.values()
    ]


def pattern(keys: Sequence[str]) -> str:
    """Keys that differ in numbers alone, as one; the ranges of each place are given apart."""
    places = list(zip(*(map(int, NUMBER.findall(key)) for key in keys), strict=True))
    ranges = iter([_ranges(sorted(set(numbers))) for numbers in places])
    return NUMBER.sub(lambda _: next(ranges), keys[0])


def _ranges(numbers: Sequence[int]) -> str:
    """`{0-3,7}`, or the number alone where there is one."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    words = [str(low) if low == high else f"{low}-{high}" for low, high in spans]
    if len(words) > MAX_RANGES:
        words = [*words[: MAX_RANGES - 1], "...", words[-1]]
    return words[0] if len(numbers) == 1 else f"{{{','.join(words)}}}"
