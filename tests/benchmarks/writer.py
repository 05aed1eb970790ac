"""Writing an edited checkpoint against `cp` and `sync` of the same bytes.

    python tests/benchmarks/writer.py FOLDER          # needs 13 GB of disk there

A sharded checkpoint of 4 GB random bytes, with a router of 1 MB changed in every second shard.
Copying and writing alternate, each first in turn, after the page cache was dropped (as root) or
with the input read once beforehand (else). `cp` runs with `--reflink=never` where the file system
cannot share blocks anyway, so that both move the same bytes, and is followed by `sync` of its
output. Target: the median of the paired ratios at most 1.1, verification apart, and a peak of
memory under 300 MB beyond the changed tensors.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

NUM_SHARDS, SHARD_BYTES, ROUTER_BYTES = 8, 500_000_000, 1 << 20
ROUNDS = 5
RATIO = 1.1
MEGABYTES = 300

WRITE = """
import json, os, resource, sys, time
from pathlib import Path
from moetools import console
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.writing import write_checkpoint
console.settings.quiet = True
source, out = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint = Checkpoint.open(str(source))
keys = [key for key in checkpoint.tensors if key.endswith("mlp.gate.weight")]
changes = {
    key: TensorChange(
        dtype="BF16", shape=checkpoint.tensors[key].shape,
        read=lambda size=checkpoint.tensors[key].num_bytes: os.urandom(size),
    )
    for key in keys[::2]
}
record = EditRecord(method="benchmark", parameters={}, model=str(source), version="1")
plan = EditPlan(checkpoint=checkpoint, changes=changes, record=record)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.monotonic()
written = write_checkpoint(plan, out)
seconds = time.monotonic() - begin
print(json.dumps({
    "seconds": seconds, "write": written.write_seconds, "verify": written.verify_seconds,
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
    "changed": sum(checkpoint.tensors[key].num_bytes for key in changes),
}))
"""


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


def write(source: Path, target: Path) -> dict[str, float]:
    """What a process of its own measured."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(source), str(target)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)


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
    ratios, peaks = [], []
    for number in range(ROUNDS):
        seconds, result, cache = 0.0, {}, ""
        for turn in ("copy", "write") if number % 2 == 0 else ("write", "copy"):
            cache = settle(source)
            if turn == "copy":
                seconds = copy(source, copied)
            else:
                result = write(source, written)
            shutil.rmtree(copied if turn == "copy" else written)
        ratios.append(result["write"] / seconds)
        peaks.append((result["peak"] * 1024 - result["changed"]) / 1e6)
        print(
            f"{cache} cache: cp + sync {seconds:.2f} s, write {result['write']:.2f} s, "
            f"ratio {ratios[-1]:.3f}, verify {result['verify']:.3f} s, "
            f"peak {peaks[-1]:+.0f} MB beyond {result['changed'] / 1e6:.1f} MB changed",
            flush=True,
        )
    ratio, peak = statistics.median(ratios), max(peaks)
    print(f"median ratio {ratio:.3f} (target {RATIO}), peak {peak:.0f} MB (target {MEGABYTES})")
    return 0 if ratio <= RATIO and peak < MEGABYTES else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
