"""Several types of tokens that share one congestion (`moetools.congestion` has one type).

Tokens of type c, a share w_c of all, value expert e at q_ce; all pay for the total load m:

    p_c = softmax(beta * q_c - gamma * m),        m = sum over c of w_c * p_c.                  (1)

The cost of an expert is the same for all types, so contrasts across types tell beta apart from
gamma, which one load cannot. Types are clusters of tokens with similar logits. Shapes: C types, E
experts.

Source: moetools, after the abstract of C. Mouzouni, arXiv:2604.04230.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.congestion import (
    LARGEST_GAMMA,
    MAX_ITERATIONS,
    MIN_SPREAD,
    centred,
    equilibrium,
    fit_gamma,
    fit_temperature,
    l1,
    shares,
    softmax,
)

Array = NDArray[Any]
Floats = NDArray[np.float64]

LARGEST_BETA = 1000.0
NUM_FOLDS = 10
MAX_KMEANS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TypesFit:
    """Several types of tokens that share one congestion.

    Attributes:
        beta: Weight of the quality, from contrasts across types, which are free of congestion.
        slope: gamma as the slope of the experts' common cost on their load: biased low.
        gamma: gamma of the constrained fit, beta fixed.
    """

    beta: float
    slope: float
    gamma: float


def types_equilibrium(
    quality: Array, weight: Array, gamma: float, *, beta: float = 1.0
) -> tuple[Floats, Floats]:
    """Equilibrium of several types of tokens with one congestion.

    p_c = softmax(beta * q_c - gamma * m), m = sum over types of weight_c * p_c: unique for gamma
    at least 0. By Newton's method with backtracking.

    Args:
        quality: [C, E] q of each type, finite.
        weight: [C] share of the tokens of each type.
        gamma: At least 0.
        beta: Weight of the quality.

    Returns:
        [C, E] choices of each type, and [E] the total load.
    """
    if gamma < 0:
        raise ValueError("The equilibrium of types is unique for gamma at least 0.")
    scores = beta * np.asarray(quality, dtype=np.float64)
    weight = np.asarray(weight, dtype=np.float64)
    start = weight @ softmax(scores / (1 + gamma / scores.shape[1]))
    choices, load, _ = _settle_types(scores, weight, float(gamma), start)
    return choices, load


def fit_types(quality: Array, counts: Array, weight: Array | None = None) -> TypesFit:
    """Separate the weight of quality from congestion, from the selections of several types.

    First log p_ce = beta * q_ce + a_c - eta_e, a model with an effect of each type and each expert,
    by maximum likelihood; the slope of eta on the load starts the search for the gamma whose
    equilibrium, beta fixed, has the largest likelihood.

    Args:
        quality: [C, E] q of each type, finite.
        counts: [C, E] selections.
        weight: [C] share of each type; by default that of its selections.

    Returns:
        NaN for what the selections do not tell: fewer than two types or experts, or qualities
        without contrast across types.
    """
    quality, counts = np.asarray(quality, float), np.asarray(counts, float)
    kept_types, kept = counts.sum(axis=1) > 0, counts.sum(axis=0) > 0
    quality, counts = quality[kept_types][:, kept], counts[kept_types][:, kept]
    nothing = TypesFit(beta=np.nan, slope=np.nan, gamma=np.nan)
    if min(counts.shape) < 2:
        return nothing
    contrast = quality - quality.mean(axis=1, keepdims=True) - quality.mean(axis=0)
    if np.ptp(contrast) < MIN_SPREAD:
        return nothing
    weight = counts.sum(axis=1) if weight is None else np.asarray(weight, float)[kept_types]
    weight = weight / weight.sum()
    beta, cost = _fit_effects(quality, counts)
    load = counts.sum(axis=0) / counts.sum()
    spread = load - load.mean()
    if not np.isfinite(beta) or (spread**2).sum() < 1e-16:
        return TypesFit(beta=beta, slope=np.nan, gamma=np.nan)
    slope = float(spread @ cost / (spread**2).sum())
    gamma = _fit_types_gamma(beta * quality, counts, weight, max(slope, 0.0))
    return TypesFit(beta=beta, slope=slope, gamma=gamma)


@dataclass(frozen=True, kw_only=True, slots=True)
class TypeSums:
    """Sums over the sampled tokens of each batch and type.

    Attributes:
        tokens: [batches, C].
        counts: [batches, C, E] selections.
        probs: [batches, C, E] probabilities.
    """

    tokens: Floats
    counts: Floats
    probs: Floats

    def of(self, kept: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
        """Quality [C, E], selections [C, E] and weights [C] of the types in these batches."""
        tokens, counts, probs = (
            each[kept].sum(axis=0) for each in (self.tokens, self.counts, self.probs)
        )
        some = tokens > 0
        quality = np.log(probs[some] / tokens[some, None])
        return quality, counts[some], tokens[some] / tokens.sum()

    def load(self, kept: NDArray[np.bool_]) -> Floats:
        """[E] share of the selections in these batches."""
        return shares(self.counts[kept].sum(axis=(0, 1)))

    def distance(self, train: NDArray[np.bool_], test: NDArray[np.bool_]) -> float:
        """L1 of the load of some batches from what the types of others predict."""
        quality, counts, weight = self.of(train)
        fit = fit_types(quality, counts, weight)
        if not np.isfinite(fit.gamma):
            return float("nan")
        _, load = types_equilibrium(quality, weight, fit.gamma, beta=fit.beta)
        return float(l1(self.load(test), load))

    def distances_of_one(
        self, train: NDArray[np.bool_], test: NDArray[np.bool_]
    ) -> tuple[float, float]:
        """The same from one type for all tokens: its equilibrium, its temperature."""
        quality = centred(np.log(self.probs[train].sum(axis=(0, 1))))
        own, other = self.load(train), self.load(test)
        scaled = softmax(quality / fit_temperature(quality, own))
        return float(l1(other, equilibrium(quality, fit_gamma(quality, own)))), float(
            l1(other, scaled)
        )


def clustered(
    features: Array,
    batch: NDArray[np.int64],
    probs: Array,
    ids: Array,
    *,
    num_types: int,
    num_batches: int,
    seed: int,
) -> TypeSums:
    """Tokens of one layer in k-means clusters, summed.

    Args:
        features: [T, D] what makes tokens alike.
        batch: [T] batch of each token.
        probs: [T, E] router probabilities.
        ids: [T, K] selected experts; at or above E, a dropped token.
        num_types: C.
        num_batches: Number of batches.
        seed: Of k-means.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    num_experts = probs.shape[1]
    means = KMeans(n_clusters=num_types, n_init=1, max_iter=MAX_KMEANS, random_state=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Number of distinct clusters", ConvergenceWarning)
        cluster = means.fit_predict(features)
    cell = batch * num_types + cluster
    num_cells = num_batches * num_types
    flat = (cell[:, None] * num_experts + ids.astype(np.int64))[ids < num_experts]
    summed = np.zeros((num_cells, num_experts))
    np.add.at(summed, cell, probs)
    shape = (num_batches, num_types)
    return TypeSums(
        tokens=np.bincount(cell, minlength=num_cells).reshape(shape).astype(np.float64),
        counts=np.bincount(flat, minlength=summed.size).reshape(*shape, -1).astype(np.float64),
        probs=summed.reshape(*shape, -1),
    )


def half_of(occupied: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[batches] 0 or 1: batches with tokens, dealt in turn."""
    return np.asarray((np.cumsum(occupied) - 1) % 2)


def compare_types(candidates: Sequence[TypeSums], occupied: NDArray[np.bool_]) -> dict[str, Floats]:
    """How well loads of unseen batches follow from several types, against one type.

    Half of the batches predicts the other half, both ways; the number of types is chosen within
    the predicting half, which is cut once more for it.

    Args:
        candidates: The same tokens in different numbers of types.
        occupied: [batches] which batches hold tokens.

    Returns:
        [1 + folds] each, the data and then without each fold of batches, for a jackknife: `count`
        (C that is best over both halves), `share` (C / E), `beta`, `gamma`; `l1`, `l1_single` and
        `l1_softmax` (one type: its equilibrium, its temperature); `gain` over the former,
        `gain_over_softmax` over the latter. Empty with fewer than eight batches.
    """
    rank = np.cumsum(occupied) - 1
    num_folds = min(NUM_FOLDS, int(rank[-1] + 1) // 4)
    if num_folds < 2 or not candidates:
        return {}
    half, quarter, fold = half_of(occupied), rank // 2 % 2, rank // 2 % num_folds
    chosen = []
    totals = np.zeros(len(candidates))
    for side in (0, 1):
        train = half == side
        inner = np.array(
            [
                sum(types.distance(train & (quarter == i), train & (quarter != i)) for i in (0, 1))
                for types in candidates
            ]
        )
        inner = np.where(np.isfinite(inner), inner, np.inf)
        chosen.append(candidates[int(inner.argmin())])
        totals += inner
    best = candidates[int(totals.argmin())]

    def metrics(kept: NDArray[np.bool_]) -> list[Any]:
        fit = fit_types(*best.of(kept))
        pairs = [(kept & (half == side), kept & (half != side)) for side in (0, 1)]
        several = np.mean(
            [types.distance(*pair) for types, pair in zip(chosen, pairs, strict=True)]
        )
        one, scaled = np.mean([best.distances_of_one(*pair) for pair in pairs], axis=0)
        num_types, num_experts = best.counts.shape[1:]
        return [
            num_types, num_types / num_experts, fit.beta, fit.gamma, several, one, scaled,
            1 - several / one, 1 - several / scaled,
        ]  # fmt: skip

    everything = np.full(len(occupied), True)
    draws = [metrics(everything), *(metrics(fold != i) for i in range(num_folds))]
    names = (
        "count", "share", "beta", "gamma", "l1", "l1_single", "l1_softmax", "gain",
        "gain_over_softmax",
    )  # fmt: skip
    return {
        name: np.array(values) for name, values in zip(names, zip(*draws, strict=True), strict=True)
    }


def _settle_types(
    scores: Floats, weight: Floats, gamma: float, load: Floats
) -> tuple[Floats, Floats, Floats]:
    """Newton's method on F(m) = m - sum of weight_c * softmax(scores_c - gamma * m).

    Returns:
        Choices [C, E], the load [E] and the sum of weight_c * (diag(p_c) - p_c p_c') [E, E].
    """

    def settled(load: Floats) -> tuple[Floats, Floats, float]:
        choices = _choices(scores - gamma * load)
        miss = load - weight @ choices
        return choices, miss, float(np.abs(miss).sum())

    choices, miss, size = settled(load)
    for _ in range(MAX_ITERATIONS):
        covariance = -(choices.T * weight) @ choices
        covariance.flat[:: len(load) + 1] += weight @ choices
        if size <= 1e-13:
            break
        jacobian = gamma * covariance
        jacobian.flat[:: len(load) + 1] += 1
        step = np.linalg.solve(jacobian, miss)
        length = 1.0
        while length > 1e-8:
            tried = settled(load - length * step)
            if tried[2] < size:
                break
            length /= 2
        else:
            break
        load = load - length * step
        choices, miss, size = tried
    return choices, weight @ choices, covariance


def _choices(scores: Floats) -> Floats:
    """Softmax of finite scores [C, E]."""
    choices = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(choices / choices.sum(axis=1, keepdims=True))


def _fit_effects(quality: Floats, counts: Floats) -> tuple[float, Floats]:
    """The beta and cost [E] of log p_ce = beta * q_ce + a_c - cost_e, by Newton's method."""
    num_experts = counts.shape[1]
    sizes, total = counts.sum(axis=1), counts.sum()
    ridge = 2e-9 * total
    parameters, step, likelihood = np.zeros(num_experts + 1), np.zeros(num_experts + 1), -np.inf
    parameters[0] = 1.0
    for _ in range(MAX_ITERATIONS):
        tried = parameters + step
        choices = _choices(tried[0] * quality - tried[1:])
        value = (counts * np.log(np.maximum(choices, 1e-300))).sum()
        value -= ridge / 2 * (tried[1:] ** 2).sum()
        if value < likelihood and np.abs(step).max() > 1e-9:
            step = step / 2
            continue
        gained, parameters, likelihood = value - likelihood, tried, value
        if gained <= 1e-13 * abs(value):
            break
        expected = choices * sizes[:, None]
        gradient = np.concatenate(
            [
                [(quality * (counts - expected)).sum()],
                (expected - counts).sum(axis=0) - ridge * parameters[1:],
            ]
        )
        spread = quality - (choices * quality).sum(axis=1, keepdims=True)
        information = np.empty((num_experts + 1, num_experts + 1))
        information[1:, 1:] = np.diag(expected.sum(axis=0) + ridge) - choices.T @ expected
        information[0, 1:] = information[1:, 0] = -(expected * spread).sum(axis=0)
        information[0, 0] = (expected * spread**2).sum() + 1e-12 * total
        step = np.linalg.solve(information, gradient)
        step *= min(1.0, 5 / np.abs(step).max())
    beta = float(parameters[0])
    return (beta if abs(beta) < LARGEST_BETA else np.nan), parameters[1:] - parameters[1:].mean()


def _fit_types_gamma(scores: Floats, counts: Floats, weight: Floats, start: float) -> float:
    """The gamma of the largest likelihood: Fisher scoring, or a root of the gradient by Brent."""
    from scipy.optimize import brentq

    load = counts.sum(axis=0) / counts.sum()
    sizes = counts.sum(axis=1, keepdims=True)

    def slope(gamma: float) -> tuple[float, float]:
        nonlocal load
        choices, load, covariance = _settle_types(scores, weight, gamma, load)
        jacobian = gamma * covariance
        jacobian.flat[:: len(load) + 1] += 1
        cost = load - gamma * np.linalg.solve(jacobian, covariance @ load)
        change = cost - choices @ cost[:, None]
        information = (sizes * choices * change**2).sum()
        return float((sizes * choices - counts).sum(axis=0) @ cost), float(information)

    gamma = min(start, LARGEST_GAMMA)
    for _ in range(15):
        gradient, information = slope(gamma)
        limit = 1 + gamma
        step = np.clip(gradient / max(information, 1e-300), -limit, limit)
        following = float(np.clip(gamma + step, 0, LARGEST_GAMMA))
        moved, gamma = abs(following - gamma), following
        if moved <= 1e-7 * (1 + gamma):
            return gamma
    if slope(0.0)[0] <= 0:
        return 0.0
    if slope(LARGEST_GAMMA)[0] >= 0:
        return LARGEST_GAMMA
    return float(brentq(lambda gamma: slope(gamma)[0], 0, LARGEST_GAMMA, xtol=1e-6))
