"""How long a report takes and how much memory it needs, on a large synthetic trace.

python tests/benchmarks/report.py [--dir DIR] [--layers 16 --experts 64 --top-k 8]

Targets for 1 M tokens x 16 layers x 64 experts, k = 8: under 300 s and 2 GB, and no more memory at
1 M than at 0.25 M tokens. Every report runs in a process of its own; its peak memory is that of
the whole process. The trace is sticky (a token keeps its sequence's last set of experts with
probability 0.7), has sequences of 512 tokens in 4 groups, the same items in each group, token ids
that follow Zipf's law, and logits and output statistics of one token in 50: everything that an
analysis without a checkpoint or a second trace can ask for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

SEQUENCE_LENGTH = 512
PART_TOKENS = 1 << 17
SAMPLED = 0.02
NUM_GROUPS = 4
VOCABULARY = 50_000
KEEP = 0.7
CHILD = """
import json, resource, sys, time
from moetools.reporting.report import report
started = time.perf_counter()
report(sys.argv[1], out=sys.argv[2], only=sys.argv[3:], overwrite=True)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, peak / (2**30 if sys.platform == "darwin" else 2**20)]))
"""


def sticky_trace(
    path: Path, num_tokens: int, *, num_layers: int, num_experts: int, top_k: int
) -> None:
    """Write the trace part by part; experts prefer groups and sequences."""
    import pyarrow as pa
    from synthetic import softmax_rule, token_table, traced_router

    from moetools.trace_store import (
        OUTPUT_STATISTICS,
        TraceManifest,
        TraceWriter,
        fixed_size_list,
        rows_per_group,
        sequence_schema,
    )

    rng = np.random.default_rng(0)
    groups = tuple(f"group{i}" for i in range(NUM_GROUPS))
    routers = tuple(
        traced_router(f"{layer:02}", num_experts, top_k, rule=softmax_rule(top_k))
        for layer in range(num_layers)
    )
    manifest = TraceManifest(
        model="synthetic",
        routers=routers,
        num_sequences=num_tokens // SEQUENCE_LENGTH,
        num_tokens=num_tokens,
        groups=groups,
        reference_group=groups[0],
        keep=("logits", "outputs"),
        has_nll=True,
    )
    row_group_tokens = max(1, rows_per_group(manifest) // SEQUENCE_LENGTH) * SEQUENCE_LENGTH
    writer = TraceWriter(path, manifest)
    liking = 0.7 * rng.standard_normal((num_layers, NUM_GROUPS, num_experts), dtype=np.float32)
    for part, first in enumerate(range(0, num_tokens, PART_TOKENS)):
        size = min(PART_TOKENS, num_tokens - first)
        tables, sequences = [], {}
        lengths = np.full(size // SEQUENCE_LENGTH, SEQUENCE_LENGTH)
        numbers = np.arange(len(lengths), dtype=np.int32) + first // SEQUENCE_LENGTH
        renewed = rng.random(size) > KEEP
        renewed[::SEQUENCE_LENGTH] = True
        drawn = np.cumsum(renewed) - 1
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        experts, weights, margins = {}, {}, {}
        sampled = np.flatnonzero(rng.random(size) < SAMPLED)
        kept = {family: {} for family in ("logits", *OUTPUT_STATISTICS)}
        for layer, router in enumerate(routers):
            own = 0.7 * rng.standard_normal((len(lengths), num_experts), dtype=np.float32)
            logits = (own + liking[layer, numbers % NUM_GROUPS])[sequence[renewed]]
            logits += 1.5 * rng.standard_normal(logits.shape, dtype=np.float32)
            top = np.argpartition(-logits, top_k, axis=1)[:, :top_k]
            scores = np.take_along_axis(logits, top, axis=1)
            order = np.argsort(-scores, axis=1)
            probs = np.exp(logits)
            probs /= probs.sum(axis=1, keepdims=True)
            top = np.take_along_axis(top, order, axis=1)
            experts[router.name] = top[drawn]
            weights[router.name] = np.take_along_axis(probs, top, axis=1)[drawn]
            margins[router.name] = np.full(size, 0.01, dtype=np.float16)
            kept["logits"][router.name] = logits[drawn[sampled]]
            for family in OUTPUT_STATISTICS:
                width = 3 if family == "collinearity" else top_k
                kept[family][router.name] = rng.random((len(sampled), width), dtype=np.float32)
            starts = np.flatnonzero(renewed & (np.arange(size) % SEQUENCE_LENGTH == 0))
            bounds = drawn[starts]
            mean = np.add.reduceat(probs, bounds, axis=0)
            mean /= mean.sum(axis=1, keepdims=True)
            even = np.add.reduceat(probs * (np.arange(len(probs)) % 2 == 0)[:, None], bounds)
            even *= 0.5 / even.sum(axis=1, keepdims=True)
            entropy = -(probs * np.log(probs)).sum(axis=1)
            for family, values in (
                ("probs", mean),
                ("probs_even", even),
                ("probs_odd", mean - even),
                ("logprob", np.log(mean)),
            ):
                sequences[f"{family}.{router.name}"] = fixed_size_list(values)
            sequences[f"entropy.{router.name}"] = np.add.reduceat(entropy, bounds) / np.diff(
                [*bounds, len(probs)]
            )
        token_id = np.minimum(rng.zipf(1.2, size), VOCABULARY) - 1
        for begin in range(0, size, row_group_tokens):
            rows = slice(begin, min(begin + row_group_tokens, size))
            chosen = (sampled >= rows.start) & (sampled < rows.stop)
            places = sampled[chosen] - rows.start
            tables.append(
                token_table(
                    manifest,
                    lengths[sequence[rows.start] : sequence[rows.stop - 1] + 1],
                    first_sequence=int(numbers[sequence[rows.start]]),
                    experts={name: ids[rows] for name, ids in experts.items()},
                    weights={name: values[rows] for name, values in weights.items()},
                    margins={name: values[rows] for name, values in margins.items()},
                    token_id=token_id[rows],
                    kept={
                        family: {
                            name: scattered(values[chosen], places, rows.stop - rows.start)
                            for name, values in by_router.items()
                        }
                        for family, by_router in kept.items()
                    },
                )
            )
        sequences |= {
            "sequence": numbers,
            "text": numbers,
            "id": pa.array([str(i // NUM_GROUPS) for i in numbers]),
            "nll": rng.random(len(numbers), dtype=np.float32),
            "group": pa.array([groups[i % NUM_GROUPS] for i in numbers]),
            "num_tokens": lengths.astype(np.int32),
        }
        table = pa.table(sequences).select(sequence_schema(manifest).names)
        writer.write_part(part, tables, table)
    writer.finish(num_parts=part + 1, coverage="synthetic")


def scattered(values: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    """[size, N] with these rows in their places and NaN elsewhere."""
    wide = np.full((size, values.shape[1]), np.nan, dtype=np.float32)
    wide[places] = values
    return wide


def measure(trace: Path, out: Path, only: list[str]) -> tuple[float, float]:
    """Seconds and peak GiB of one report in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(trace), str(out), *only],
        check=True,
        capture_output=True,
        text=True,
    )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=Path, help="keeps the traces here")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 18, 1 << 20])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--each", action="store_true", help="also every analysis by itself")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dir or Path(temporary)
        for num_tokens in options.tokens:
            name = f"sticky-{num_tokens}-{options.layers}x{options.experts}-{options.top_k}"
            trace = folder / name
            if not (trace / "manifest.json").exists():
                started = time.perf_counter()
                sticky_trace(
                    trace,
                    num_tokens,
                    num_layers=options.layers,
                    num_experts=options.experts,
                    top_k=options.top_k,
                )
                print(f"{name}: made in {time.perf_counter() - started:.0f} s", flush=True)
            seconds, peak = measure(trace, folder / f"report-{name}", [])
            print(
                f"{num_tokens:,} tokens: report {seconds:.1f} s (target < 300), "
                f"{peak:.2f} GiB (target < 2)",
                flush=True,
            )
            if options.each:
                from moetools import registry

                for analysis in registry.names("analyses"):
                    seconds, peak = measure(trace, folder / f"report-{name}", [analysis])
                    print(f"    {analysis:20} {seconds:6.1f} s {peak:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
