"""Hit rates of every cache size against a plain Python simulation, on one core.

python tests/benchmarks/caches.py [--tokens 1000000 --layers 16 --experts 64 --top-k 8]

Target: SCH-cache, LRU and Belady at every size at least 100 times as fast as the plain Python
oracle of the tests. The oracle is timed on `--oracle-tokens` tokens and every 8th size, and scaled
linearly to the whole trace; its results there are compared. Processor time of the process.
"""

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

POLICIES = (("lru", 1), ("lfu", 1), ("belady", 1), ("sch", 4), ("sch", 16), ("sch", 64))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--oracle-tokens", type=int, default=2_000)
    return parser.parse_args()


def main() -> None:
    from benchmarks.srp import SEQUENCE_LENGTH, sticky_ids
    from oracles.locality import Cache

    from moetools.locality import Selections, cache_hits

    options = arguments()
    num_timed = 1 << 15
    ids = sticky_ids(num_timed, options.experts, options.top_k)
    selections = Selections.of(ids, np.arange(0, num_timed + 1, SEQUENCE_LENGTH), options.experts)
    few = ids[: options.oracle_tokens]
    ends = [*range(0, len(few), SEQUENCE_LENGTH), len(few)]
    sequences = [few[a:b].tolist() for a, b in pairwise(ends)]
    small = Selections.of(few, ends, options.experts)
    sizes = range(8, options.experts + 1, 8)
    scale = options.tokens * options.layers
    print(
        f"{options.tokens:,} tokens x {options.layers} layers x {options.experts} experts, "
        f"k = {options.top_k}, all {options.experts} sizes; seconds, scaled linearly from "
        f"{num_timed:,} tokens (ours) and {len(few):,} (oracle)"
    )
    for policy, window in POLICIES:
        for strict in (False, True):
            found = cache_hits(small, policy, window=window, strict=strict)
            hits = found.sequences.sum(axis=0).cumsum()
            started = time.process_time()
            cache_hits(selections, policy, window=window, strict=strict)
            ours = (time.process_time() - started) * scale / num_timed
            started = time.process_time()
            for size in sizes:
                expected = sum(
                    Cache(tokens, size, policy, window=window, strict=strict).num_hits
                    for tokens in sequences
                )
                assert expected == hits[size - 1], (policy, window, strict, size)
            oracle = (time.process_time() - started) * options.experts / len(sizes)
            oracle *= scale / len(few)
            accounting = "strict" if strict else "paper"
            print(
                f"{policy:>6} {f'm={window}' if policy == 'sch' else '':5} {accounting:6} "
                f"ours {ours:6.1f}  oracle {oracle:12,.0f}  ratio {oracle / ours:10,.0f} "
                "(target: at least 100)"
            )


if __name__ == "__main__":
    main()
