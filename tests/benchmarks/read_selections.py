"""How fast selections are read: `TraceStore.selections` against pyarrow reading that column.

    python tests/benchmarks/read_selections.py

One router (64 experts, top-8) of a trace of 1 M tokens with four routers. Both read row group by
row group; pyarrow stops at its own array. Target: at least 0.8 times the speed.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moetools.trace_store import (
    TracedRouter,
    TraceManifest,
    TraceStore,
    TraceWriter,
    fixed_size_list,
    token_schema,
)

NUM_TOKENS = 1 << 20
LENGTH = 512
SHARE = 0.8


def write(path: Path) -> TraceStore:
    """A trace whose selections change slowly, as those of real text do."""
    generator = np.random.default_rng(0)
    routers = tuple(
        TracedRouter(name=f"{layer:02}", layer=layer, kind="mlp", num_experts=64, top_k=8)
        for layer in range(4)
    )
    part_tokens = 1 << 16
    num_parts = NUM_TOKENS // part_tokens
    manifest = TraceManifest(
        model="synthetic",
        routers=routers,
        num_sequences=NUM_TOKENS // LENGTH,
        num_tokens=NUM_TOKENS,
    )
    writer = TraceWriter(path, manifest)
    per_part = part_tokens // LENGTH
    for part in range(num_parts):
        columns = {
            "sequence": np.repeat(np.arange(per_part, dtype=np.int32) + part * per_part, LENGTH),
            "position": np.tile(np.arange(LENGTH, dtype=np.int32), per_part),
            "token_id": generator.integers(0, 50000, part_tokens).astype(np.int32),
            "phase": pa.array(["prefill"] * part_tokens).dictionary_encode(),
        }
        for router in routers:
            scores = generator.random((part_tokens, 64), dtype=np.float32)
            scores[1:] += 2 * scores[:-1]
            ids = np.argsort(-scores, axis=1)[:, :8].astype(np.uint8)
            weights = generator.random((part_tokens, 8)).astype(np.float16)
            columns[f"experts.{router.name}"] = fixed_size_list(ids)
            columns[f"weights.{router.name}"] = fixed_size_list(weights)
        sequences = {
            "sequence": np.arange(per_part, dtype=np.int32) + part * per_part,
            "id": pa.nulls(per_part, pa.string()),
            "group": pa.nulls(per_part, pa.string()),
            "num_tokens": np.full(per_part, LENGTH, dtype=np.int32),
        }
        table = pa.table(columns).select(token_schema(manifest).names)
        writer.write_part(part, [table], pa.table(sequences))
    writer.finish(num_parts=num_parts)
    return TraceStore(path)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        store = write(Path(name) / "trace")
        paths = sorted((store.path / "tokens").iterdir())
        ours, theirs = [], []
        for _ in range(7):
            begin = time.perf_counter()
            total = sum(len(ids) for ids in TraceStore(store.path).selections("02"))
            ours.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            for path in paths:
                file = pq.ParquetFile(path, memory_map=True)
                for group in range(file.num_row_groups):
                    total -= file.read_row_group(group, columns=["experts.02"]).num_rows
            theirs.append(time.perf_counter() - begin)
            assert total == 0
    speed = statistics.median(t / o for o, t in zip(ours, theirs, strict=True))
    rate = NUM_TOKENS / statistics.median(ours)
    print(f"selections of one router: {rate:,.0f} tokens/s")
    print(f"speed / speed of pyarrow: {speed:.2f} (target: at least {SHARE})")
    return 0 if speed >= SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
