"""Whether gamma_eff is recovered, and how often its 95 % interval holds the planted gamma.

python tests/benchmarks/congestion_coverage.py [--data-sets 200 --replicates 1000]

Recovery: selections drawn from the equilibrium of a planted gamma; the mean must lie within 4
standard errors of it and the standard deviation over runs within 40 % of the Fisher error.
Coverage: data sets of 50 batches, intervals by resampling batches, gamma from 9, 14 and 38 in
turn. Target: 90 to 99 % of them hold the planted gamma. Three kinds of data sets: `independent`
selections with known qualities; `clustered`, where each batch has a load of its own around the
equilibrium; `measured`, where the qualities too are estimated, from clustered batches. `b_load`:
the same for the imbalance B, leaving out one batch at a time. `percentile`: plain
percentiles, which double the bias of estimated qualities. Exits with 1 where a target is missed.
"""

import argparse
import sys
import time

import numpy as np

from moetools.congestion import (
    bootstrap_interval,
    equilibrium,
    fit_gamma,
    fit_near,
    gamma_error,
    largest_over_mean,
    percentile_interval,
    qualities,
    shares,
    softmax,
)
from moetools.intervals import jackknife_interval

NUM_EXPERTS = 64
NUM_BATCHES = 50
GAMMAS = (9.0, 14.0, 38.0)
CONCENTRATION = 400.0
KINDS = ("independent", "clustered", "measured")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-sets", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--selections", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def recovery(rng: np.random.Generator, options: argparse.Namespace) -> bool:
    print(f"recovery: {options.runs} runs of {options.selections:,} selections, one draw of q")
    print("  gamma   loss     mean      SD  Fisher  SD/Fisher  |mean - gamma| in 4 SE")
    passed = True
    for gamma in GAMMAS:
        quality = rng.normal(0, 0.5, NUM_EXPERTS)
        counts = rng.multinomial(options.selections, equilibrium(quality, gamma), size=options.runs)
        error = gamma_error(quality, gamma, options.selections)
        for loss in ("kl", "l1"):
            found = fit_gamma(quality, counts, loss=loss)
            spread = found.std(ddof=1)
            off = abs(found.mean() - gamma) / (4 * error / np.sqrt(options.runs))
            print(
                f"  {gamma:5.0f}   {loss}   {found.mean():7.3f} {spread:7.3f} {error:7.3f} "
                f"{spread / error:10.2f} {off:12.2f}"
            )
            passed &= loss == "l1" or (off < 1 and abs(spread / error - 1) < 0.4)
    return passed


def data_set(
    rng: np.random.Generator, kind: str, gamma: float, selections: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Selections and sums of probabilities by batch [50, E], and the true load."""
    quality = rng.normal(0, 0.5, NUM_EXPERTS)
    load, probs = equilibrium(quality, gamma), np.tile(softmax(quality), (NUM_BATCHES, 1))
    loads = np.tile(load, (NUM_BATCHES, 1))
    if kind != "independent":
        loads = rng.dirichlet(CONCENTRATION * load, size=NUM_BATCHES)
    if kind == "measured":
        probs = rng.dirichlet(CONCENTRATION * softmax(quality), size=NUM_BATCHES)
    return rng.multinomial(selections // NUM_BATCHES, loads), probs, load


def coverage(rng: np.random.Generator, options: argparse.Namespace) -> bool:
    print(
        f"coverage: {options.data_sets} data sets of {NUM_BATCHES} batches and "
        f"{options.selections // 5:,} selections, {options.replicates} replicates"
    )
    print("  kind          gamma_eff  percentile   b_load   mean width   bias   seconds")
    passed = True
    for kind in KINDS:
        started = time.process_time()
        held = np.zeros((options.data_sets, 3), dtype=bool)
        widths, misses = [], []
        for i in range(options.data_sets):
            gamma = GAMMAS[i % len(GAMMAS)]
            counts, probs, load = data_set(rng, kind, gamma, options.selections // 5)
            weights = rng.multinomial(
                NUM_BATCHES, np.full(NUM_BATCHES, 1 / NUM_BATCHES), size=options.replicates
            )
            weights = np.vstack([np.ones(NUM_BATCHES), weights])
            found = fit_near(
                qualities(weights @ counts, weights @ probs)["q1"], shares(weights @ counts)
            )
            low, high = bootstrap_interval(found[0], found[1:])
            held[i, 0] = low <= gamma <= high
            widths.append(float(high - low) / gamma)
            misses.append(float(found[0]) / gamma - 1)
            low, high = percentile_interval(found[1:])
            held[i, 1] = low <= gamma <= high
            left_out = counts.sum(axis=0) - np.vstack([np.zeros_like(counts[:1]), counts])
            b = largest_over_mean(shares(left_out))
            low, high = jackknife_interval(b[0], b[1:])
            held[i, 2] = low <= NUM_EXPERTS * load.max() <= high
        share = held.mean(axis=0)
        print(
            f"  {kind:12} {share[0]:10.1%} {share[1]:11.1%} {share[2]:8.1%} "
            f"{np.mean(widths):12.1%} {np.mean(misses):+6.1%} {time.process_time() - started:7.1f}"
        )
        passed &= bool(0.9 <= share[0] <= 0.99)
    print("  (width and bias relative to gamma; target: gamma_eff 90 to 99 %)")
    return passed


def main() -> None:
    options = arguments()
    rng = np.random.default_rng(options.seed)
    passed = recovery(rng, options)
    passed &= coverage(rng, options)
    print("all targets met" if passed else "a target was missed")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
