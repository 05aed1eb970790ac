"""Copies and rewrites of single weight files: every byte that is not to change stays.

Where the file system can, a file with changed tensors shares the blocks of the input's and only
those tensors are written over; else it is streamed once, with their new bytes in the stream. Where
a tensor changes its shape or dtype the stream gets another header.
"""

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from moetools.edit_plan import Bytes, TensorChange
from moetools.errors import MachineError
from moetools.safetensors_format import (
    DTYPE_BITS,
    TensorInfo,
    TensorLayout,
    aligned,
    encode_header,
    is_aligned,
    parse_header,
    read_header,
)

Advance = Callable[[int], None]
"""Told the number of bytes that were written."""
Produce = Callable[[str], Bytes]
"""The new bytes of a tensor, by its key."""

CHUNK = 16 * 1024 * 1024
SMALL_CHUNK = 128 * 1024
"""Where bytes pass through this process: larger buffers leave the processor's caches."""
FICLONE = 0x40049409
"""The request of Linux that lets a file share the blocks of another (`linux/fs.h`)."""
NO_KERNEL_COPY = (
    errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF,
)  # fmt: skip


def copy_file(source: Path, target: Path, advance: Advance) -> None:
    """Copy the bytes of a file; its blocks are shared where the file system can (reflink)."""
    if clone_file(source, target):
        advance(target.stat().st_size)
        return
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        copy_range(reader, writer, 0, os.fstat(reader.fileno()).st_size, advance)


def clone_file(source: Path, target: Path) -> bool:
    """Make a copy that shares the blocks of a file; False, and no copy, where it is impossible."""
    if sys.platform != "linux":
        return False
    import fcntl

    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        try:
            fcntl.ioctl(writer.fileno(), FICLONE, reader.fileno())
        except OSError:
            target.unlink()
            return False
    return True


def can_clone(source: Path, folder: Path) -> bool:
    """Whether copies of `source` into `folder` take no space."""
    probe = folder / ".clone"
    cloned = clone_file(source, probe)
    probe.unlink(missing_ok=True)
    return cloned


def copy_range(
    reader: IO[bytes], writer: IO[bytes], begin: int, end: int, advance: Advance
) -> None:
    """Copy bytes [begin, end) to where the writer stands; both files are unbuffered.

    Raises:
        MachineError: The file that is read ends before `end`.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(reader.fileno(), begin, end - begin, os.POSIX_FADV_SEQUENTIAL)
    in_kernel = hasattr(os, "copy_file_range")
    buffer = memoryview(bytearray(0))
    while begin < end:
        count = min(CHUNK, end - begin)
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(reader.fileno(), writer.fileno(), count, begin)
            except OSError as error:
                if error.errno not in NO_KERNEL_COPY:
                    raise
            in_kernel = done > 0
        if not done:
            buffer = buffer if len(buffer) else memoryview(bytearray(SMALL_CHUNK))
            reader.seek(begin)
            done = reader.readinto(buffer[: min(count, SMALL_CHUNK)])  # type: ignore[attr-defined]
            write_all(writer, buffer[:done])
        if not done:
            raise MachineError(f"{reader.name} became shorter while it was read.")
        begin += done
        advance(done)


def write_all(writer: IO[bytes], content: Bytes) -> None:
    """Write to an unbuffered file, however many calls it takes."""
    rest = memoryview(content)
    while len(rest):
        rest = rest[writer.write(rest) :]


def replace_tensors(path: Path, tensors: Sequence[TensorInfo], produce: Produce) -> None:
    """Write other bytes of the same length over tensors of a file."""
    with path.open("rb+", buffering=0) as file:
        for tensor in tensors:
            content = produce(tensor.key)
            file.seek(tensor.begin)
            write_all(file, content)


def rewrite(
    source: Path,
    target: Path,
    header: bytes,
    size: int,
    old: Mapping[str, TensorInfo],
    changed: frozenset[str],
    produce: Produce,
    advance: Advance,
) -> None:
    """Stream a weight file into one with other tensors, and perhaps another header.

    Args:
        source: The file as it was.
        target: A new file.
        header: JSON header of the new file.
        size: Bytes of the new file.
        old: Tensors of the source.
        changed: Keys whose bytes come from `produce`; all others are copied.
        produce: Bytes of a changed tensor.
        advance: Told what was written.
    """
    with source.open("rb", buffering=0) as reader, target.open("xb", buffering=0) as writer:
        write_all(writer, len(header).to_bytes(8, "little") + header)
        begin = end = 0  # a run of unchanged bytes of the source that was not copied yet
        for key in parse_header(header, size, target.name, target.name):
            if key not in changed and old[key].begin == end:
                end = old[key].end
                continue
            copy_range(reader, writer, begin, end, advance)
            begin = end = 0
            if key in changed:
                content = produce(key)
                write_all(writer, content)
                advance(len(content))
            else:
                begin, end = old[key].begin, old[key].end
        copy_range(reader, writer, begin, end, advance)


def edited_header(
    header: bytes, old: Mapping[str, TensorInfo], changed: Mapping[str, TensorLayout]
) -> tuple[bytes, int]:
    """Header and size of a file in which tensors were replaced, and new ones added at its end.

    The order stays unless a tensor would newly come to lie where its dtype cannot be read in place.
    """
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", {})
    before = [
        TensorLayout(key=key, dtype=info.dtype, shape=info.shape, num_bytes=info.num_bytes)
        for key, info in old.items()
    ]
    layout = [changed.get(tensor.key, tensor) for tensor in before]
    layout += [tensor for key, tensor in changed.items() if key not in old]
    if is_aligned(before):
        layout = aligned(layout)
    new = encode_header(layout, metadata, names=entries)
    return new, 8 + len(new) + sum(tensor.num_bytes for tensor in layout)


def file_header(path: Path, where: str) -> tuple[bytes, int]:
    """JSON header and size in bytes of a safetensors file on this machine."""

    def read(begin: int, end: int) -> tuple[bytes, int]:
        return read_range(path, begin, end), path.stat().st_size

    return read_header(read, where)


def read_range(path: Path, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file."""
    with path.open("rb") as file:
        file.seek(begin)
        return file.read(end - begin)


def hash_range(path: Path, begin: int, end: int) -> str:
    """Sha256 (hexadecimal) of bytes [begin, end) of a file."""
    digest = hashlib.sha256()
    for position in range(begin, end, CHUNK):
        digest.update(read_range(path, position, min(position + CHUNK, end)))
    return digest.hexdigest()


def tensor_layout(key: str, change: TensorChange, old: TensorInfo | None) -> TensorLayout:
    """Size of a planned tensor; one of a dtype without known size is produced to learn it."""
    shape = tuple(change.shape)
    bits = DTYPE_BITS.get(change.dtype)
    if bits is not None:
        num_bytes = math.prod(shape) * bits // 8
    elif old is not None and (old.dtype, old.shape) == (change.dtype, shape):
        num_bytes = old.num_bytes
    else:
        num_bytes = len(memoryview(change.read()).cast("B"))
    return TensorLayout(key=key, dtype=change.dtype, shape=shape, num_bytes=num_bytes)


class TensorFile:
    """A new safetensors file whose tensors are written in any order.

    Attributes:
        path: The file.
        num_bytes: Its size.
    """

    def __init__(
        self, path: Path, tensors: Sequence[TensorLayout], metadata: Mapping[str, str]
    ) -> None:
        """Write the header; the size of every tensor is known beforehand."""
        self.path = path
        self._layout = list(tensors)
        header = encode_header(self._layout, metadata)
        self._header_bytes = len(header)
        self._begin: dict[str, int] = {}
        position = 8 + len(header)
        for tensor in self._layout:
            self._begin[tensor.key] = position
            position += tensor.num_bytes
        self.num_bytes = position
        self._file = path.open("xb", buffering=0)
        write_all(self._file, len(header).to_bytes(8, "little") + header)
        self._file.truncate(position)

    def write(self, key: str, content: Bytes, offset: int = 0) -> None:
        """Write bytes of a tensor, from its byte `offset` on."""
        self._file.seek(self._begin[key] + offset)
        write_all(self._file, content)

    def set_metadata(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata by others of the same length."""
        header = encode_header(self._layout, metadata)
        assert len(header) == self._header_bytes
        self._file.seek(8)
        write_all(self._file, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
