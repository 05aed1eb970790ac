"""Expert load as the equilibrium of a congestion game, and the congestion that fits it best.

Tokens choose among E experts of quality q; an expert that receives the share m of the load pays
off q - gamma * m; the logit choice of all tokens settles where

    m = softmax(q - gamma * m)        that is        log m + gamma * m = q + constant.         (1)

`fit_gamma` finds the gamma whose equilibrium is nearest to an observed load. Qualities are known up
to a constant; an expert of quality -inf (or NaN) plays no part. Shapes: E experts, C types of
tokens, `...` any leading dimensions, such as bootstrap replicates and layers.

Source: after C. Mouzouni, arXiv:2604.04230, of which only the abstract was available. Every
equation here is moetools' own: the result is gamma_eff as defined by moetools.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moetools.compiling import compiled

Array = NDArray[Any]
Floats = NDArray[np.float64]

LOWEST_GAMMA = -1 + 1e-6
"""Above -1 the equilibrium is unique."""
LARGEST_GAMMA = 2000.0
NUM_GRID = 60
LARGEST_SCALE = 1000.0
MAX_ITERATIONS = 200
LARGEST_BETA = 50.0
MIN_SPREAD = 1e-9


def equilibrium(quality: Array, gamma: Array | float) -> Floats:
    """The unique load in equilibrium (1).

    Args:
        quality: [..., E] q.
        gamma: [...] above -1.

    Returns:
        [..., E] shares of the load.
    """
    quality, gamma = np.asarray(quality, dtype=np.float64), np.asarray(gamma, dtype=np.float64)
    if not (gamma[np.isfinite(gamma)] > -1).all():
        raise ValueError("The equilibrium is unique only for gamma above -1.")
    shape = np.broadcast_shapes(quality.shape[:-1], gamma.shape)
    flat = _rows(np.broadcast_to(quality, (*shape, quality.shape[-1])))
    loads = np.empty_like(flat)
    _equilibria(flat, np.broadcast_to(gamma, shape).ravel().copy(), loads)
    return loads.reshape(*shape, -1)


def log_cost_equilibrium(quality: Array, gamma: Array | float) -> Floats:
    """[..., E] equilibrium where an expert costs gamma * log m: softmax(q / (1 + gamma))."""
    return softmax(np.asarray(quality) / (1 + np.asarray(gamma, dtype=np.float64))[..., None])


def softmax(quality: Array) -> Floats:
    """Softmax over the last axis; -inf and NaN have probability 0."""
    quality = np.asarray(quality, dtype=np.float64)
    known = np.isfinite(quality)
    top = np.max(quality, axis=-1, keepdims=True, where=known, initial=-np.inf)
    scores = np.exp(np.where(known, quality - np.where(np.isfinite(top), top, 0), -np.inf))
    with np.errstate(invalid="ignore"):
        return np.asarray(scores / scores.sum(axis=-1, keepdims=True))


def fit_gamma(
    quality: Array,
    load: Array,
    *,
    lower: float = 0.0,
    upper: float = LARGEST_GAMMA,
    loss: Literal["kl", "l1"] = "kl",
    start: Array | float | None = None,
) -> Floats:
    """The gamma whose equilibrium is nearest to a load.

    Under `kl`, KL(load || equilibrium), it is the maximum of the multinomial likelihood: the
    gradient's root inside the best of 60 cells, uniform in log(1 + gamma). Under `l1` the lowest of
    60 points, refined by golden section; that loss has kinks and several minima.

    Args:
        quality: [..., E] q.
        load: [..., E] selections or shares; they need not sum to one.
        lower: Smallest gamma, above -1.
        upper: Largest gamma.
        loss: What is smallest.
        start: [...] a gamma near the answer: the search of `kl` goes downhill from there instead.

    Returns:
        [...] gamma; NaN where a load is missing or all qualities are alike.
    """
    if not -1 < lower < upper:
        raise ValueError("Expected -1 < lower < upper.")
    quality, load, shape = _matched(quality, load)
    if loss == "l1":
        return _fit_l1(quality, load, lower, upper).reshape(shape)
    starts = np.full(shape, np.nan) if start is None else np.broadcast_to(start, shape)
    found = np.empty(len(quality))
    _fit_kl(quality, load, lower, upper, starts.astype(np.float64).ravel(), found)
    return found.reshape(shape)


def fit_temperature(quality: Array, load: Array) -> Floats:
    """The temperature T for which softmax(q / T) is nearest to a load, by KL(load || softmax).

    Args:
        quality: [..., E] q.
        load: [..., E] selections or shares.

    Returns:
        [...] T, 0.001 to 1000; NaN where no positive temperature helps, because the load does not
        grow with the quality.
    """
    quality, load, shape = _matched(quality, load)
    return (1 / _fit_scale(quality, load)).reshape(shape)


def gamma_error(quality: Array, gamma: float, num_selections: float) -> float:
    """Standard error of `fit_gamma` from independent selections, by the Fisher information."""
    load = equilibrium(quality, gamma)
    slope = load_slope(load, gamma)
    some = load > 0
    return float((num_selections * (slope[some] ** 2 / load[some]).sum()) ** -0.5)


def load_slope(load: Array, gamma: float) -> Floats:
    """[E] derivative of the equilibrium by gamma."""
    load = np.asarray(load, dtype=np.float64)
    weight = load / (1 + gamma * load)
    return np.asarray(-weight * (load - (weight * load).sum() / weight.sum()))


def centred(quality: Array) -> Floats:
    """Qualities [..., E] minus their mean over the experts that have one; the others -inf."""
    quality = np.asarray(quality, dtype=np.float64)
    known = np.isfinite(quality)
    count = np.maximum(known.sum(axis=-1, keepdims=True), 1)
    mean = np.where(known, quality, 0).sum(axis=-1, keepdims=True) / count
    return np.where(known, quality - mean, -np.inf)


def shares(counts: Array, known: Array | bool = True) -> Floats:
    """Counts [..., E] over their sum, of the experts that are `known`; NaN without counts."""
    counts = np.where(known, counts, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(counts / counts.sum(axis=-1, keepdims=True))


def l1(load: Array, predicted: Array) -> Floats:
    """[...] sum of absolute differences of two loads [..., E]: 0 to 2."""
    return np.asarray(np.abs(np.asarray(load) - np.asarray(predicted)).sum(axis=-1))


def largest_over_mean(load: Array) -> Floats:
    """[...] B of loads [..., E]: the largest over the mean; 1 is balanced."""
    load = np.asarray(load, dtype=np.float64)
    return np.asarray(load.shape[-1] * load.max(axis=-1))


def disequilibrium(quality: Array, gamma: Array | float, load: Array) -> Floats:
    """How far a load is from the equilibrium of a gamma: 0 exactly there.

    The mean over selections of |u - mean u|, u = q - gamma * m - log m being what a token of that
    expert gets.

    Args:
        quality: [..., E] q.
        gamma: [...].
        load: [..., E] shares.

    Returns:
        [...] nats.
    """
    quality, load = np.asarray(quality, dtype=np.float64), np.asarray(load, dtype=np.float64)
    some = (load > 0) & np.isfinite(quality)
    with np.errstate(divide="ignore", invalid="ignore"):
        payoff = quality - np.asarray(gamma)[..., None] * load - np.log(load)
    payoff = np.where(some, payoff, 0.0)
    weight = np.where(some, load, 0.0)
    mean = (weight * payoff).sum(axis=-1, keepdims=True)
    return np.asarray((weight * np.abs(payoff - mean)).sum(axis=-1))


def disequilibrium_floor(
    quality: Array,
    gamma: float,
    num_selections: int,
    *,
    lower: float = 0.0,
    num_draws: int = 50,
    seed: int = 0,
) -> float:
    """Mean `disequilibrium` of loads that are drawn from the equilibrium itself, gamma refitted.

    Args:
        quality: [E] q.
        gamma: The fit.
        num_selections: Independent selections in each draw.
        lower: Smallest gamma, as in the fit.
        num_draws: Number of draws.
        seed: Seed of the draws.

    Returns:
        Nats; NaN without a fit.
    """
    if not np.isfinite(gamma):
        return float("nan")
    expected = equilibrium(quality, gamma)
    counts = np.random.default_rng(seed).multinomial(num_selections, expected, size=num_draws)
    load = shares(counts)
    refitted = fit_gamma(quality, load, lower=lower, start=gamma)
    return float(disequilibrium(quality, refitted, load).mean())


def percentile_interval(replicates: Array) -> tuple[Floats, Floats]:
    """95 % percentile interval over the first axis [B, ...]; NaN below two finite replicates.

    For gamma, which has a boundary: it keeps the boundary inside when replicates fall on it.
    """
    replicates = np.asarray(replicates, dtype=np.float64)
    finite = np.isfinite(replicates)
    enough = finite.sum(axis=0) >= 2
    if not enough.any():
        return np.full(enough.shape, np.nan), np.full(enough.shape, np.nan)
    safe = np.where(enough, np.where(finite, replicates, np.nan), 0.0)
    low, high = np.where(enough, np.nanquantile(safe, [0.025, 0.975], axis=0), np.nan)
    return low, high


def pearson(x: Array, y: Array) -> float:
    """Correlation of two series over the places where both are finite; NaN below three of them."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3 or np.ptp(x) < 1e-12 or np.ptp(y) < 1e-12:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


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


def _rows(values: Array) -> Floats:
    return np.ascontiguousarray(values.reshape(-1, values.shape[-1]), dtype=np.float64)


def _matched(quality: Array, load: Array) -> tuple[Floats, Floats, tuple[int, ...]]:
    """Qualities and shares as [R, E], and the shape that R stands for."""
    quality, load = np.asarray(quality, np.float64), np.asarray(load, np.float64)
    if quality.shape[-1] != load.shape[-1]:
        raise ValueError("Qualities and loads are of different numbers of experts.")
    shape = np.broadcast_shapes(quality.shape, load.shape)
    quality, load = np.broadcast_to(quality, shape), np.broadcast_to(load, shape)
    quality = np.where(np.isfinite(quality), quality, -np.inf)
    return _rows(quality), _rows(shares(load, np.isfinite(quality))), shape[:-1]


@compiled
def _settle(quality: Floats, gamma: float, log_load: Floats, share: Floats, guess: float) -> float:
    """Solve (1) for one row: writes log m and m; returns the multiplier.

    Starts from the log m that is there. With a guess of the multiplier, Newton's method on all
    unknowns at once; without, and where that fails, `_settle_far`.
    """
    num_experts = len(quality)
    multiplier = guess
    for _ in range(12 if gamma > 0 and np.isfinite(guess) else 0):
        total = 0.0
        missing = 0.0
        slope = 0.0
        for e in range(num_experts):
            share[e] = np.exp(log_load[e])
            if quality[e] > -np.inf:
                weight = share[e] / (1 + gamma * share[e])
                total += share[e]
                slope += weight
                missing += weight * (log_load[e] + gamma * share[e] - quality[e] + multiplier)
        step = -(1 - total + missing) / slope
        largest = 0.0
        for e in range(num_experts):
            if quality[e] > -np.inf:
                miss = log_load[e] + gamma * share[e] - quality[e] + multiplier
                change = -(miss + step) / (1 + gamma * share[e])
                log_load[e] += change
                share[e] *= 1 + change
                largest = max(largest, abs(change))
        multiplier += step
        if largest <= 1e-8:  # what is left is of the order of its square
            return multiplier
        if not largest < 2:
            break
    multiplier = _settle_far(quality, gamma, log_load)
    for e in range(num_experts):
        share[e] = np.exp(log_load[e])
    return float(multiplier)


@compiled
def _settle_far(quality: Floats, gamma: float, log_load: Floats) -> float:
    """`_settle` from anywhere.

    Newton's method on log(sum of m) = 0 over the multiplier inside a bracket; for each multiplier,
    Newton's method on log m + gamma * m = q - multiplier.
    """
    num_experts = len(quality)
    top = -np.inf
    for e in range(num_experts):
        top = max(top, quality[e])
    if top == -np.inf:
        log_load[:] = np.nan
        return np.nan
    total = 0.0
    for e in range(num_experts):
        total += np.exp(quality[e] - top)
    normaliser = top + np.log(total)
    if gamma == 0:
        for e in range(num_experts):
            log_load[e] = quality[e] - normaliser
        return float(normaliser)
    if gamma > 0:
        low, high = normaliser - gamma - 1, normaliser
        log_gamma = np.log(gamma)
    else:
        low, high = max(normaliser, top - gamma), normaliser - gamma
        log_gamma = 0.0
    multiplier = min(max(normaliser - gamma / num_experts, low), high)
    for _ in range(MAX_ITERATIONS):
        total = 0.0
        slope = 0.0
        for e in range(num_experts):
            if quality[e] == -np.inf:
                log_load[e] = -np.inf
                continue
            target = quality[e] - multiplier
            if gamma > 0:  # convex: from above the root Newton's method falls onto it
                cap = target
                if target + log_gamma > 1:
                    cap = min(cap, np.log(target + log_gamma) - log_gamma)
                floor = -np.inf
                x = cap
            else:  # concave: from below it climbs to it
                cap = 0.0
                floor = target
                x = min(floor, cap)
            for _ in range(60):
                share = np.exp(x)
                miss = x + gamma * share - target
                step = miss / max(1 + gamma * share, 1e-12)
                x = max(min(x - step, cap), floor)
                if abs(step) <= 1e-14 * (1 + abs(x)):
                    break
            log_load[e] = x
            share = np.exp(x)
            total += share
            slope += share / max(1 + gamma * share, 1e-12)
        miss = np.log(total)
        if abs(miss) <= 1e-14:
            break
        if miss > 0:
            low = multiplier
        else:
            high = multiplier
        following = multiplier + miss * total / slope
        if not low < following < high:
            following = 0.5 * (low + high)
        if abs(following - multiplier) <= 1e-15 * (1 + abs(multiplier)):
            break
        multiplier = following
    return float(multiplier)


@compiled
def _equilibria(quality: Floats, gamma: Floats, loads: Floats) -> None:
    """Equilibria [R, E] of qualities [R, E] and gamma [R]."""
    for r in range(len(quality)):
        if not np.isfinite(gamma[r]):
            loads[r] = np.nan
            continue
        _settle_far(quality[r], gamma[r], loads[r])
        loads[r] = np.exp(loads[r])


@compiled
def _slope(
    quality: Floats, load: Floats, gamma: float, log_load: Floats, share: Floats, last: Floats
) -> tuple[float, float, float]:
    """Gradient by gamma of the cross-entropy of a load, its expected curvature, and its value.

    `log_load`, `share` and `last`, the multiplier and gamma, hold the last solution; moved along
    its tangent it is the start of this one, unless its gamma is 0 or NaN.
    """
    if last[1] > 0:
        ahead = gamma - last[1]
        mean = _mean_cost(quality, share, last[1])
        for e in range(len(quality)):
            if quality[e] > -np.inf:
                log_load[e] -= ahead * (share[e] - mean) / (1 + last[1] * share[e])
        last[0] = _settle(quality, gamma, log_load, share, last[0] - ahead * mean)
    else:
        last[0] = _settle(quality, gamma, log_load, share, np.nan)
    last[1] = gamma
    mean = _mean_cost(quality, share, gamma)
    gradient = 0.0
    curvature = 0.0
    cross_entropy = 0.0
    for e in range(len(quality)):
        if quality[e] > -np.inf:
            change = (share[e] - mean) / (1 + gamma * share[e])
            gradient += load[e] * change
            curvature += share[e] * change * change
            if load[e] > 0:
                cross_entropy -= load[e] * log_load[e]
    return gradient, curvature, cross_entropy


@compiled
def _mean_cost(quality: Floats, share: Floats, gamma: float) -> float:
    """Mean of m under weights m / (1 + gamma * m): minus the multiplier's slope by gamma."""
    first = 0.0
    second = 0.0
    for e in range(len(quality)):
        if quality[e] > -np.inf:
            weight = share[e] / (1 + gamma * share[e])
            first += weight
            second += weight * share[e]
    return second / first


@compiled
def _undetermined(quality: Floats, load: Floats) -> bool:
    """Whether a load is missing, or the qualities are alike so that every gamma fits as well."""
    lowest = np.inf
    highest = -np.inf
    for e in range(len(quality)):
        if not np.isfinite(load[e]):
            return True
        if quality[e] > -np.inf:
            lowest = min(lowest, quality[e])
            highest = max(highest, quality[e])
    return not highest - lowest > MIN_SPREAD


@compiled
def _fit_kl(
    quality: Floats, load: Floats, lower: float, upper: float, start: Floats, found: Floats
) -> None:
    """`fit_gamma` of rows [R, E]: the root of the gradient over s = log(1 + gamma)."""
    bottom, top = np.log1p(lower), np.log1p(upper)
    log_load, share = np.empty(quality.shape[1]), np.empty(quality.shape[1])
    last = np.full(2, np.nan)
    solved = -1
    for r in range(len(quality)):
        q, m = quality[r], load[r]
        if _undetermined(q, m):
            found[r] = np.nan
            continue
        if solved >= 0 and ((quality[solved] == -np.inf) != (q == -np.inf)).any():
            last[1] = np.nan
        solved = r
        if np.isfinite(start[r]):
            s = min(max(np.log1p(max(start[r], lower)), bottom), top)
            slope, curvature, _ = _slope(q, m, np.expm1(s), log_load, share, last)
            left, left_slope = s, slope
            right, right_slope = s, slope
            step = 1.1 * abs(slope) / max(curvature * np.exp(s), 1e-300)
            step = min(max(step, 1e-9), 1.0)
            while left_slope > 0 and left > bottom:
                right, right_slope = left, left_slope
                left = max(left - step, bottom)
                step *= 2
                left_slope, _, _ = _slope(q, m, np.expm1(left), log_load, share, last)
            while right_slope < 0 and right < top:
                left, left_slope = right, right_slope
                right = min(right + step, top)
                step *= 2
                right_slope, _, _ = _slope(q, m, np.expm1(right), log_load, share, last)
        else:
            best = 0
            lowest = np.inf
            cell = (top - bottom) / (NUM_GRID - 1)
            for i in range(NUM_GRID):
                _, _, value = _slope(q, m, np.expm1(bottom + cell * i), log_load, share, last)
                if value < lowest:
                    best, lowest = i, value
            last[1] = np.nan
            left = bottom + cell * max(best - 1, 0)
            right = min(bottom + cell * (best + 1), top)
            left_slope, _, _ = _slope(q, m, np.expm1(left), log_load, share, last)
            right_slope, _, _ = _slope(q, m, np.expm1(right), log_load, share, last)
        if left_slope >= 0:
            found[r] = np.expm1(left)
            continue
        if right_slope <= 0:
            found[r] = np.expm1(right)
            continue
        side = 0
        for _ in range(MAX_ITERATIONS):  # regula falsi, the stale end halved (Illinois)
            s = (left * right_slope - right * left_slope) / (right_slope - left_slope)
            if not left < s < right:
                s = 0.5 * (left + right)
            slope, _, _ = _slope(q, m, np.expm1(s), log_load, share, last)
            if slope < 0:
                moved = s - left
                left, left_slope = s, slope
                if side < 0:
                    right_slope *= 0.5
                side = -1
            else:
                moved = right - s
                right, right_slope = s, slope
                if side > 0:
                    left_slope *= 0.5
                side = 1
            if slope == 0 or min(moved, right - left) <= 1e-10:
                break
        found[r] = np.expm1(s)


def _fit_l1(quality: Floats, load: Floats, lower: float, upper: float) -> Floats:
    """`fit_gamma` of rows [R, E] by L1: the best of a grid, then golden section beside it."""

    def distance(s: Floats) -> Floats:
        return l1(load, equilibrium(quality, np.expm1(s)))

    bottom, top = np.log1p(lower), np.log1p(upper)
    grid = np.linspace(bottom, top, NUM_GRID)
    losses = np.stack([distance(np.full(len(load), s)) for s in grid])
    best = losses.argmin(axis=0)
    left, right = grid[np.maximum(best - 1, 0)], grid[np.minimum(best + 1, NUM_GRID - 1)]
    golden = (np.sqrt(5.0) - 1) / 2
    b, c = right - golden * (right - left), left + golden * (right - left)
    at_b, at_c = distance(b), distance(c)
    while (right - left).max() > 1e-10:
        falls = at_b > at_c
        left, right = np.where(falls, b, left), np.where(falls, right, c)
        b, c = right - golden * (right - left), left + golden * (right - left)
        at_b, at_c = distance(b), distance(c)
    middle = (left + right) / 2
    better = distance(middle) <= losses.min(axis=0)
    found = np.expm1(np.where(better, middle, grid[best]))
    return np.where(np.isfinite(load).all(axis=1) & _varied(quality), found, np.nan)


def _fit_scale(quality: Floats, load: Floats) -> Floats:
    """1 / T of rows [R, E]: the mean quality under softmax(scale * q) grows with the scale."""
    known = np.isfinite(quality)
    q = np.where(known, quality, 0.0)
    wanted = (np.where(known, load, 0.0) * q).sum(axis=1)
    low, high = np.full((2, len(q)), [[1 / LARGEST_SCALE], [LARGEST_SCALE]])

    def moments(scale: Floats) -> tuple[Floats, Floats]:
        probs = softmax(scale[:, None] * quality)
        mean = (probs * q).sum(axis=1)
        return mean - wanted, (probs * (q - mean[:, None]) ** 2).sum(axis=1)

    none, sharpest = moments(low)[0] >= 0, moments(high)[0] <= 0
    scale = np.ones(len(q))
    for _ in range(MAX_ITERATIONS):
        miss, spread = moments(scale)
        high, low = np.where(miss > 0, scale, high), np.where(miss > 0, low, scale)
        with np.errstate(divide="ignore", invalid="ignore"):
            following = scale - miss / spread
        inside = (low < following) & (following < high)
        following = np.where(inside, following, np.sqrt(low * high))
        done = np.abs(following - scale) <= 1e-13 * scale
        scale = following
        if (done | none | sharpest | ~np.isfinite(wanted)).all():
            break
    scale = np.where(sharpest, LARGEST_SCALE, scale)
    return np.where(none | ~np.isfinite(wanted) | ~_varied(quality), np.nan, scale)


def _varied(quality: Floats) -> NDArray[np.bool_]:
    """Whether the qualities of rows [R, E] differ, so that a load says something about gamma."""
    known = np.isfinite(quality)
    highest = np.max(quality, axis=1, where=known, initial=-np.inf)
    lowest = np.min(quality, axis=1, where=known, initial=np.inf)
    return np.asarray(highest - lowest > MIN_SPREAD)


def _settle_types(scores: Floats, weight: Floats, gamma: float, load: Floats) -> tuple[Any, ...]:
    """Newton's method on F(m) = m - sum of weight_c * softmax(scores_c - gamma * m).

    Returns:
        Choices [C, E], the load [E] and the sum of weight_c * (diag(p_c) - p_c p_c') [E, E].
    """

    def settled(load: Floats) -> tuple[Floats, Floats, float]:
        choices = softmax(scores - gamma * load)
        miss = load - weight @ choices
        return choices, miss, float(np.abs(miss).sum())

    choices, miss, size = settled(load)
    for _ in range(MAX_ITERATIONS):
        covariance = np.diag(weight @ choices) - (choices.T * weight) @ choices
        if size <= 1e-14:
            break
        step = np.linalg.solve(np.eye(len(load)) + gamma * covariance, miss)
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


def _fit_effects(quality: Floats, counts: Floats) -> tuple[float, Floats]:
    """The beta and cost [E] of log p_ce = beta * q_ce + a_c - cost_e, by Newton's method."""
    num_experts = counts.shape[1]
    sizes, total = counts.sum(axis=1), counts.sum()
    ridge = 2e-9 * total
    parameters, step, likelihood = np.zeros(num_experts + 1), np.zeros(num_experts + 1), -np.inf
    parameters[0] = 1.0
    for _ in range(MAX_ITERATIONS):
        tried = parameters + step
        choices = softmax(tried[0] * quality - tried[1:])
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
    """The gamma of the largest likelihood: the root of its gradient over s = log(1 + gamma)."""
    from scipy.optimize import brentq

    load = counts.sum(axis=0) / counts.sum()
    sizes = counts.sum(axis=1, keepdims=True)

    def slope(s: float) -> float:
        nonlocal load
        gamma = np.expm1(s)
        choices, load, covariance = _settle_types(scores, weight, gamma, load)
        slowed = np.linalg.solve(np.eye(len(load)) + gamma * covariance, covariance @ load)
        excess = (counts - sizes * choices).sum(axis=0)
        return float(float(excess @ (load - gamma * slowed)) / counts.sum())

    top = np.log1p(LARGEST_GAMMA)
    left = min(np.log1p(start), top)
    step = 0.05
    right = min(left + step, top)
    while slope(left) > 0:
        if left == 0:
            return 0.0
        left, right, step = max(left - step, 0.0), left, 2 * step
    while slope(right) < 0:
        if right == top:
            return LARGEST_GAMMA
        left, right, step = right, min(right + step, top), 2 * step
    return float(np.expm1(brentq(slope, left, right, xtol=1e-9)))
