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
from moetools.intervals import basic_interval

Array = NDArray[Any]
Floats = NDArray[np.float64]

LOWEST_GAMMA = -1 + 1e-6
"""Above -1 the equilibrium is unique."""
LARGEST_GAMMA = 2000.0
SMALLEST_GAMMA = 1e-9
"""Below, a fit is rounding."""
NUM_GRID = 60
LARGEST_SCALE = 1000.0
MAX_ITERATIONS = 200
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
    found = np.empty(len(quality))
    _fit_scale(quality, load, found)
    return (1 / found).reshape(shape)


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


def bootstrap_interval(
    value: Array | float, replicates: Array, *, bounds: tuple[float, float] = (0.0, LARGEST_GAMMA)
) -> tuple[Floats, Floats]:
    """95 % interval of a fit that has bounds: the basic bootstrap, percentiles at a bound.

    Qualities that are themselves estimated push gamma up, and once more in every replicate: the
    basic interval takes that back, percentiles would double it.

    Args:
        value: [...] the fit to the data.
        replicates: [B, ...] fits to its replicates.
        bounds: Of the fit.

    Returns:
        Lower and upper ends, [...]; NaN below two finite replicates.
    """
    value = np.asarray(value, dtype=np.float64)
    ends = basic_interval(value, replicates, bounds=bounds)
    at_bound = (value <= bounds[0]) | (value >= bounds[1])
    low, high = np.where(at_bound, percentile_interval(replicates), ends)
    return low, high


def percentile_interval(replicates: Array) -> tuple[Floats, Floats]:
    """95 % percentile interval over the first axis [B, ...]; NaN below two finite replicates."""
    replicates = np.asarray(replicates, dtype=np.float64)
    finite = np.isfinite(replicates)
    enough = finite.sum(axis=0) >= 2
    if not enough.any():
        return np.full(enough.shape, np.nan), np.full(enough.shape, np.nan)
    safe = np.where(enough, np.where(finite, replicates, np.nan), 0.0)
    low, high = np.where(enough, np.nanquantile(safe, [0.025, 0.975], axis=0), np.nan)
    return low, high


def pearson(x: Array, y: Array) -> Floats:
    """Correlation over the last axis of [..., N], where both are finite; NaN below three places."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    count = both.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        x, y = (
            np.where(both, each - (np.where(both, each, 0).sum(axis=-1) / count)[..., None], 0)
            for each in (x, y)
        )
        size = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
        known = (count >= 3) & (np.abs(x).max(axis=-1) > 1e-12) & (np.abs(y).max(axis=-1) > 1e-12)
        return np.asarray(np.where(known, (x * y).sum(axis=-1) / size, np.nan))


def qualities(
    selections: Array,
    probs: Array,
    logprob: Array | None = None,
    gate: Array | None = None,
    contribution: Array | None = None,
    contributing: Array | None = None,
) -> dict[str, Floats]:
    """Estimates of the experts' qualities from sums over tokens [..., E], centred.

    Args:
        selections: How often each expert was selected.
        probs: Sums of probabilities over all tokens.
        logprob: Sums of their logarithms.
        gate: Sums of routing weights over the tokens that selected the expert.
        contribution: The same of the norm of what it adds: weight times norm of its output.
        contributing: How many selections that sum is over; all by default.

    Returns:
        `q1` log of the mean probability, `q2` mean log probability, `q3` log of the mean weight,
        `q4` log of the mean contribution; those that have their sums. -inf where unknown.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {"q1": np.log(probs)}
        if logprob is not None:
            found["q2"] = logprob / np.sum(probs, axis=-1, keepdims=True)
        if gate is not None:
            found["q3"] = np.log(gate / selections)
        if contribution is not None:
            counts = selections if contributing is None else contributing
            found["q4"] = np.log(contribution / counts)
    return {name: centred(quality) for name, quality in found.items()}


def fits(quality: Array, counts: Array) -> dict[str, Floats]:
    """What is fitted to one load, for the data and its replicates.

    Args:
        quality: [1 + B, E] q, the data first.
        counts: [1 + B, E] selections.

    Returns:
        [1 + B] each: `gamma_eff`; `temperature` T and `gamma_temperature` = E * (T - 1).
    """
    temperature = fit_temperature(quality, counts)
    return {
        "gamma_eff": fit_near(quality, counts),
        "temperature": temperature,
        "gamma_temperature": quality.shape[-1] * (temperature - 1),
    }


def distances(quality: Array, counts: Array) -> dict[str, Floats]:
    """How far a load is from its fits, and how uneven both sides are.

    Args:
        quality: [1 + B, E] q, the data first.
        counts: [1 + B, E] selections.

    Returns:
        [1 + B] each: `l1_mfg` from the equilibrium of gamma_eff, `l1_softmax` from the best
        softmax(q / T); `b_quality`, the largest over the mean of softmax(q).
    """
    load = shares(counts, np.isfinite(quality))
    scaled = softmax(quality / fit_temperature(quality, load)[:, None])
    return {
        "l1_mfg": l1(load, equilibrium(quality, fit_near(quality, load))),
        "l1_softmax": l1(load, scaled),
        "b_quality": largest_over_mean(softmax(quality)),
    }


def fit_near(quality: Array, load: Array) -> Floats:
    """`fit_gamma` of the data and its replicates [1 + B, E], these from the gamma of the data."""
    value = fit_gamma(quality[0], load[0])
    return np.append(value, fit_gamma(quality[1:], load[1:], start=value))


def held_out(quality: Array, counts: Array) -> dict[str, Floats]:
    """L1 of loads that are predicted from the other half of the data, both ways, averaged.

    Args:
        quality: [2, 1 + B, E] q of each half.
        counts: [2, 1 + B, E] selections of each half.

    Returns:
        [1 + B] each: `mfg`, the equilibrium of the other half's gamma, and `softmax`, of its
        temperature.
    """
    known = np.isfinite(quality)
    load = shares(counts, known)
    found: dict[str, list[Floats]] = {"mfg": [], "softmax": []}
    for q, own, other in ((quality[0], load[0], load[1]), (quality[1], load[1], load[0])):
        found["mfg"].append(l1(other, equilibrium(q, fit_near(q, own))))
        found["softmax"].append(l1(other, softmax(q / fit_temperature(q, own)[:, None])))
    return {name: np.mean(values, axis=0) for name, values in found.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase of a trajectory, from one checkpoint to another.

    Attributes:
        name: `surge`, `stabilisation` or `relaxation`.
        first: Index of its first checkpoint.
        last: Index of its last checkpoint.
        resolved: Whether intervals, not the eye, tell it.
    """

    name: str
    first: int
    last: int
    resolved: bool


def phases(gamma: Array, low: Array, high: Array, b_low: Array, b_high: Array) -> list[Phase]:
    """The three phases of gamma over the checkpoints of one run.

    Surge: the increasing run that ends at the largest gamma. Relaxation: of the decreasing runs
    after it the one that falls most. Both are resolved where the 95 % intervals of their ends do
    not overlap. Stabilisation: the longest run of checkpoints whose intervals of B all overlap,
    resolved from three checkpoints on.

    Args:
        gamma: [N] by step.
        low: [N] lower ends of its intervals; NaN resolves nothing.
        high: [N] upper ends.
        b_low: [N] lower ends of the intervals of B.
        b_high: [N] upper ends.

    Returns:
        One of each; a phase that is not there at all has first = last.
    """
    gamma = np.asarray(gamma, dtype=np.float64)
    if not np.isfinite(gamma).all() or not len(gamma):
        return []
    peak = int(gamma.argmax())
    first = peak
    while first > 0 and gamma[first - 1] < gamma[first]:
        first -= 1
    fall = (peak, peak)
    start = peak
    for i in range(peak, len(gamma)):
        if i > start and gamma[i] >= gamma[i - 1]:
            start = i
        if gamma[start] - gamma[i] > gamma[fall[0]] - gamma[fall[1]]:
            fall = (start, i)
    steady = (0, 0)
    for i in range(len(gamma)):
        for j in range(i, len(gamma)):
            if not np.max(b_low[i : j + 1]) <= np.min(b_high[i : j + 1]):
                break
            if j - i > steady[1] - steady[0]:
                steady = (i, j)
    return [
        Phase(name="surge", first=first, last=peak, resolved=bool(low[peak] > high[first])),
        Phase(
            name="stabilisation",
            first=steady[0],
            last=steady[1],
            resolved=steady[1] - steady[0] >= 2,
        ),
        Phase(
            name="relaxation",
            first=fall[0],
            last=fall[1],
            resolved=bool(high[fall[1]] < low[fall[0]]),
        ),
    ]


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
        if abs(found[r]) < SMALLEST_GAMMA:
            found[r] = 0.0


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


@compiled
def _fit_scale(quality: Floats, load: Floats, found: Floats) -> None:
    """1 / T of rows [R, E]: the mean quality under softmax(scale * q) grows with the scale.

    Newton's method inside a bracket; NaN where even the smallest scale gives too large a mean.
    """
    share = np.empty(quality.shape[1])
    for r in range(len(quality)):
        q, m = quality[r], load[r]
        found[r] = np.nan
        if _undetermined(q, m):
            continue
        wanted = 0.0
        for e in range(len(q)):
            if m[e] > 0:
                wanted += m[e] * q[e]
        low, high = 1 / LARGEST_SCALE, LARGEST_SCALE
        if _mean_quality(q, low, share)[0] >= wanted:
            continue
        if _mean_quality(q, high, share)[0] <= wanted:
            found[r] = high
            continue
        scale = 1.0
        for _ in range(MAX_ITERATIONS):
            mean, spread = _mean_quality(q, scale, share)
            if mean > wanted:
                high = scale
            else:
                low = scale
            following = scale - (mean - wanted) / spread if spread > 0 else np.inf
            if not low < following < high:
                following = np.sqrt(low * high)
            moved = abs(following - scale)
            scale = following
            if moved <= 1e-12 * scale:
                break
        found[r] = scale


@compiled
def _mean_quality(quality: Floats, scale: float, share: Floats) -> tuple[float, float]:
    """Mean and variance of the quality under softmax(scale * q)."""
    top = -np.inf
    for e in range(len(quality)):
        top = max(top, quality[e])
    total = 0.0
    mean = 0.0
    for e in range(len(quality)):
        share[e] = np.exp(scale * (quality[e] - top))
        if quality[e] > -np.inf:
            total += share[e]
            mean += share[e] * quality[e]
    mean /= total
    spread = 0.0
    for e in range(len(quality)):
        if quality[e] > -np.inf:
            spread += share[e] * (quality[e] - mean) ** 2
    return mean, spread / total


def _varied(quality: Floats) -> NDArray[np.bool_]:
    """Whether the qualities of rows [R, E] differ, so that a load says something about gamma."""
    known = np.isfinite(quality)
    highest = np.max(quality, axis=1, where=known, initial=-np.inf)
    lowest = np.min(quality, axis=1, where=known, initial=np.inf)
    return np.asarray(highest - lowest > MIN_SPREAD)
