"""How long the coupling statistics of one layer take, and how much memory.

python tests/benchmarks/coupling.py [--experts 64 --hidden 2048 --intermediate 1024 --tokens 1024]

Random bfloat16 weights; 64 experts of 1024 are OLMoE-1B-7B, 256 of 2048 with a hidden size of 7168
DeepSeek-V3. Reading from disk is not included.
"""

import argparse
import resource
import sys
import time

import numpy as np
import torch

from moetools import coupling
from moetools.experts import LayerExperts, Projections


def random_layer(num_experts: int, hidden: int, intermediate: int) -> LayerExperts:
    """A layer of gated experts."""
    torch.manual_seed(0)
    shape = (num_experts, intermediate, hidden)
    gate, up = (torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for _ in range(2))
    down = torch.empty(num_experts, hidden, intermediate, dtype=torch.bfloat16).normal_(0, 0.02)
    return LayerExperts(
        name="00",
        layer=0,
        router_weight=torch.randn(num_experts, hidden),
        router_bias=None,
        correction_bias=None,
        experts=Projections(
            gate=gate,
            up=up,
            down=down,
            activation=lambda gate, up: torch.nn.functional.silu(gate) * up,
        ),
    )


def main() -> None:
    """Print seconds of each step and the peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    layer = random_layer(options.experts, options.hidden, options.intermediate)
    rows = {"raw": layer.router_weight, "centred": layer.router_weight - 0.1}
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        print(f"{name:>12}  {time.perf_counter() - started:7.1f} s", flush=True)
        started = time.perf_counter()

    geometry = coupling.measure(rows, layer.neurons, np.arange(options.experts))
    lap("geometry")
    orders = coupling.permutations(options.experts, seed=(0,))
    for gauge, found in geometry.items():
        list(coupling.weight_statistics(found, orders, gauge))
    lap("permutations")
    inputs = torch.randn(options.tokens, options.hidden)
    answers = coupling.activations(layer, inputs)
    lap("experts")
    scores = {name: (inputs @ each.T).double().numpy() for name, each in rows.items()}
    index = np.argsort(-scores["raw"], axis=1)[:, :8]
    chosen = coupling.selected(index, options.experts)
    sequence = np.arange(options.tokens) // 8
    bootstrap = coupling.Draws.of(sequence, seed=0)
    list(coupling.agreement_statistics(scores, answers, chosen, bootstrap, orders))
    double = inputs.double().numpy()
    centroids = coupling.Centroids.of(double, chosen, sequence, seed=0)
    numpy_rows = {name: each.double().numpy() for name, each in rows.items()}
    list(coupling.centroid_alignment(numpy_rows, centroids, options.tokens, (0,)))
    list(coupling.centroid_overlap(double, index, centroids, bootstrap, (0,)))
    lap("tokens")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{'peak':>12}  {peak / (2**30 if sys.platform == 'darwin' else 2**20):7.2f} GiB")


if __name__ == "__main__":
    main()
