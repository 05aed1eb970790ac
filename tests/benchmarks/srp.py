"""SRP of a large trace against copying its one-hot array, on one core.

python tests/benchmarks/srp.py [--tokens 1000000 --layers 16 --experts 64 --top-k 8]

Target: counting all windows of m = 4, 16, 64 and 256 tokens takes at most 4 times as long as
copying the one-hot array [layers, tokens, experts] of uint8 once for each m, in less than 2 GB.
Both run layer by layer and are timed by the processor time of the process; the copy is timed
both into a new array, as a program would make it, and into one that is already there.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

WINDOWS = (4, 16, 64, 256)
SEQUENCE_LENGTH = 512
KEEP = 0.7


def sticky_ids(num_tokens: int, num_experts: int, top_k: int, *, seed: int = 0) -> np.ndarray:
    """[T, K] experts; each expert's score is kept from the token before with some probability."""
    rng = np.random.default_rng(seed)
    score = rng.random((num_tokens, num_experts), dtype=np.float32)
    keep = rng.random((num_tokens, num_experts), dtype=np.float32) < KEEP
    for t in range(1, num_tokens):
        score[t] = np.where(keep[t], score[t - 1], score[t])
    return np.argpartition(-score, top_k, axis=1)[:, :top_k].astype(np.uint8)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    return parser.parse_args()


def main() -> None:
    from moetools.locality import Selections, segment_performance, window_counts

    options = arguments()
    num_tokens = options.tokens // SEQUENCE_LENGTH * SEQUENCE_LENGTH
    offsets = np.arange(0, num_tokens + 1, SEQUENCE_LENGTH)
    base = np.resize(
        sticky_ids(1 << 15, options.experts, options.top_k), (num_tokens, options.top_k)
    )
    warm = Selections.of(base[:SEQUENCE_LENGTH], offsets[:2], options.experts)
    window_counts(warm, 4)

    one_hot = np.zeros((num_tokens, options.experts), np.uint8)
    np.put_along_axis(one_hot, base.astype(np.int64), 1, axis=1)
    target = one_hot.copy()
    fresh = into = counting = 0.0
    rng = np.random.default_rng(1)
    for layer in range(options.layers):
        for _ in WINDOWS:
            started = time.process_time()
            made = one_hot.copy()
            fresh += time.process_time() - started
            del made
            started = time.process_time()
            np.copyto(target, one_hot)
            into += time.process_time() - started
        ids = rng.permutation(options.experts).astype(np.uint8)[base]
        started = time.process_time()
        selections = Selections.of(ids, offsets, options.experts)
        best = [
            segment_performance(window_counts(selections, m).sequences.sum(axis=0)) for m in WINDOWS
        ]
        counting += time.process_time() - started
        if not layer:
            values = ", ".join(
                f"SRP({m}) {found.srp:.3f}" for m, found in zip(WINDOWS, best, strict=True)
            )
            print(f"layer 0: {values}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{num_tokens:,} tokens x {options.layers} layers x {options.experts} experts, "
        f"k = {options.top_k}: SRP of m = 4, 16, 64, 256 {counting:.2f} s;\n"
        f"copying the one-hot array 4 times: {fresh:.2f} s into new arrays, {into:.2f} s in place\n"
        f"ratio {counting / fresh:.2f} and {counting / into:.2f} (target: at most 4); "
        f"peak {peak:.2f} GB (target: under 2)"
    )


if __name__ == "__main__":
    main()
