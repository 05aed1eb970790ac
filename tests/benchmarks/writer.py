"""Writing an edited checkpoint against `cp` and `sync` of the same bytes.

    python tests/benchmarks/writer.py FOLDER          # needs 13 GB of disk there

A sharded checkpoint of 4 GB of random bytes, with a router of 1 MB changed in every second shard.
Copying and writing alternate, each first in turn, and both start right after the page cache was
dropped (as root) or the input was read (else): virtual machines give freed memory back after a
few seconds, and whoever starts later has to ask for it again. `cp` runs with `--reflink=never`, so
that both move the same bytes, and is followed by `sync` of its files. Target: the median of the
paired ratios at most 1.1, verification apart, and a peak of memory under 300 MB beyond the changed
tensors.
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from moetools import console
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.writing import write_checkpoint

NUM_SHARDS, SHARD_BYTES, ROUTER_BYTES = 8, 500_000_000, 1 << 20
ROUNDS = 5
RATIO = 1.1
MEGABYTES = 300


def make(folder: Path) -> Path:
    """A checkpoint of random bytes."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    weight_map = {}
    for number in range(NUM_SHARDS):
        name = f"model-{number + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        sizes = {
            f"model.layers.{number}.mlp.experts.gate_up_proj": SHARD_BYTES,
            f"model.layers.{number}.mlp.gate.weight": ROUTER_BYTES,
        }
        header, position = {}, 0
        for key, size in sizes.items():
            header[key] = {
                "dtype": "BF16", "shape": [size // 2], "data_offsets": [position, position + size],
            }  # fmt: skip
            weight_map[key] = name
            position += size
        encoded = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            while position:
                position -= file.write(os.urandom(min(position, 1 << 24)))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    subprocess.run(["sync"], check=True)
    return folder


def settle(source: Path) -> str:
    """Bring the page cache into the same state before every run."""
    subprocess.run(["sync"], check=True)
    if os.geteuid() == 0 and Path("/proc/sys/vm/drop_caches").exists():
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "cold"
    for path in source.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return "warm"


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` and `sync`."""
    begin = time.monotonic()
    reflink = ["--reflink=never"] if sys.platform == "linux" else []
    subprocess.run(["cp", "-r", *reflink, str(source), str(target)], check=True)
    paths = [str(path) for path in target.iterdir()]
    subprocess.run(["sync", *paths], check=True)
    return time.monotonic() - begin


def plan(source: Path) -> EditPlan:
    """Every second router becomes other random bytes."""
    checkpoint = Checkpoint.open(str(source))
    keys = [key for key in checkpoint.tensors if key.endswith("mlp.gate.weight")]
    changes = {
        key: TensorChange(
            dtype="BF16", shape=checkpoint.tensors[key].shape, read=lambda: os.urandom(ROUTER_BYTES)
        )
        for key in keys[::2]
    }
    record = EditRecord(method="benchmark", parameters={}, model=str(source), version="1")
    return EditPlan(checkpoint=checkpoint, changes=changes, record=record)


def peak() -> float:
    """Most memory that this process ever held, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "moetools-writer-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        return compare(make(work / "source"), work)
    finally:
        shutil.rmtree(work)


def compare(source: Path, work: Path) -> int:
    copied, written = work / "copied", work / "written"
    edit = plan(source)
    changed = len(edit.changes) * ROUTER_BYTES / 1e6
    before, ratios = peak(), []
    for number in range(ROUNDS):
        seconds = dict.fromkeys(("copy", "write", "verify"), 0.0)
        for turn in ("copy", "write") if number % 2 == 0 else ("write", "copy"):
            cache = settle(source)
            if turn == "copy":
                seconds["copy"] = copy(source, copied)
                shutil.rmtree(copied)
            else:
                begin = time.monotonic()
                result = write_checkpoint(edit, written)
                seconds["verify"] = result.verify_seconds
                seconds["write"] = time.monotonic() - begin - result.verify_seconds
                shutil.rmtree(written)
        ratios.append(seconds["write"] / seconds["copy"])
        print(
            f"{cache} cache: cp + sync {seconds['copy']:.2f} s, write {seconds['write']:.2f} s, "
            f"ratio {ratios[-1]:.3f}; verify {seconds['verify']:.3f} s",
            flush=True,
        )
    ratio, memory = statistics.median(ratios), peak() - before
    print(
        f"median ratio {ratio:.3f} (target {RATIO}); peak {memory:.0f} MB above the process before "
        f"(target {MEGABYTES}), with {changed:.1f} MB of changed tensors"
    )
    return 0 if ratio <= RATIO and memory - changed < MEGABYTES else 1


if __name__ == "__main__":
    console.settings.quiet = True
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
