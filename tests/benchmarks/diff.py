"""Comparing the tensors of two checkpoints: time against `cmp` of the same files, and memory.

    python tests/benchmarks/diff.py [GIGABYTES]

Two checkpoints of 4 GB (random numbers, 40 tensors in two files) are compared as they are, equal in
every byte, and with one row of a tensor changed; `cmp` reads the same files. Both sides run in
turns in one process. Target: peak memory below 300 MB beyond the interpreter with its libraries.
"""

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from moetools import console
from moetools.checkpoint import Checkpoint
from moetools.tensor_diff import diff_tensors

NUM_FILES = 2
TENSORS_OF_A_FILE = 20
WIDTH = 2048
FINITE = np.uint16(0xBFFF)
"""Bits of BF16 numbers below 2, none of them NaN."""
ROUNDS = 3
MAX_EXTRA = 300e6


def write(folder: Path, num_bytes: int) -> None:
    """A checkpoint of random BF16 numbers."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    rows = int(num_bytes / NUM_FILES / TENSORS_OF_A_FILE / WIDTH / 2)
    size = rows * WIDTH * 2
    generator = np.random.default_rng(0)
    weight_map = {}
    for file in range(NUM_FILES):
        name = f"model-{file}.safetensors"
        header = {}
        for number in range(TENSORS_OF_A_FILE):
            key = f"model.layers.{file * TENSORS_OF_A_FILE + number}.mlp.experts.down_proj"
            weight_map[key] = name
            header[key] = {
                "dtype": "BF16",
                "shape": [rows, WIDTH],
                "data_offsets": [number * size, (number + 1) * size],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for _ in range(TENSORS_OF_A_FILE):
                for begin in range(0, size, 1 << 20):
                    raw = generator.bytes(min(1 << 20, size - begin))
                    out.write((np.frombuffer(raw, dtype="<u2") & FINITE).tobytes())
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def change_row(folder: Path) -> None:
    """Flip bits of one row in the middle of the last tensor."""
    info = max(Checkpoint.open(str(folder)).tensors.values(), key=lambda i: (i.shard, i.begin))
    with (folder / info.shard).open("r+b") as file:
        begin = info.begin + info.shape[0] // 2 * WIDTH * 2
        file.seek(begin)
        row = np.frombuffer(file.read(WIDTH * 2), dtype=np.uint8)
        file.seek(begin)
        file.write((row ^ 1).tobytes())


def timed(action) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def compared(a: Path, b: Path, num_different: int) -> None:
    found = diff_tensors(Checkpoint.open(str(a)), Checkpoint.open(str(b)))
    assert len(found.differences) == num_different


def cmp(a: Path, b: Path, num_different: int) -> None:
    codes = [
        subprocess.run(["cmp", "-s", file, b / file.name], check=False).returncode
        for file in sorted(a.glob("*.safetensors"))
    ]
    assert sum(codes) == num_different


def main() -> int:
    console.settings.quiet = True
    num_bytes = int(float(sys.argv[1]) * 1e9) if len(sys.argv) > 1 else 4_000_000_000
    with tempfile.TemporaryDirectory() as name:
        a, b = Path(name) / "a", Path(name) / "b"
        write(a, num_bytes)
        shutil.copytree(a, b)
        Checkpoint.open(str(a))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for num_different, what in ((0, "equal"), (1, "one row changed")):
            if num_different:
                change_row(b)
            times = [
                (
                    timed(lambda n=num_different: cmp(a, b, n)),
                    timed(lambda n=num_different: compared(a, b, n)),
                )
                for _ in range(ROUNDS)
            ]
            of_cmp, ours = (statistics.median(column) for column in zip(*times, strict=True))
            rate = 2 * num_bytes / ours / 1e9
            print(
                f"{what}: {ours:.2f} s, {rate:.1f} GB/s of both files; cmp {of_cmp:.2f} s; "
                f"time / time of cmp: {statistics.median(o / c for c, o in times):.2f}"
            )
        extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"peak memory beyond opening: {extra / 1e6:.0f} MB (target: at most {MAX_EXTRA / 1e6:.0f})"
    )
    return 0 if extra <= MAX_EXTRA else 1


if __name__ == "__main__":
    sys.exit(main())
