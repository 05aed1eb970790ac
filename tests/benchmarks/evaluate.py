"""What a shared context saves: items per second against whole rows, in turns on the same items.

    python tests/benchmarks/evaluate.py            # 48 items of the demo, float32 on the CPU
    python tests/benchmarks/evaluate.py 300 cuda   # all of them on a GPU

Items have four choices of one or two tokens after about 107 tokens of context. Both ways must agree
to 1e-4 nats in float32. Target: at least twice as many items per second.
"""

import sys
import time

import numpy as np
import torch

from moetools import console
from moetools.items import read_items
from moetools.opening import open_model
from moetools.scoring import choice_logliks, choice_rows

RATIO = 2.0
ROUNDS = 3


def main(num_items: int, device: str) -> int:
    console.settings.quiet = True
    items = read_items("demo", max_items=num_items)
    num_choices = [len(item.choices) for item in items]
    opened = open_model("demo", device=device, dtype="float32")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with opened.load() as model:
        rows = choice_rows(items, opened.tokenizer)
        values = {}
        for number in range(ROUNDS):
            for share in (number % 2 == 0, number % 2 == 1):
                start = time.perf_counter()
                found = choice_logliks(model, rows, num_choices, batch_tokens=2048, share=share)
                seconds[share].append(time.perf_counter() - start)
                values[share] = found.values
                assert found.shared == share, found.reason
    rates = {share: len(items) / min(each) for share, each in seconds.items()}
    difference = np.abs(values[True] - values[False]).max()
    ratio = rates[True] / rates[False]
    print(
        f"shared {rates[True]:.1f} items/s, whole rows {rates[False]:.1f} items/s: {ratio:.2f} "
        f"times; largest difference {difference:.1e} nats"
    )
    return 0 if ratio >= RATIO and difference <= 1e-4 else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    sys.exit(main(int(wanted[0]) if wanted else 48, wanted[1] if len(wanted) > 1 else "cpu"))
