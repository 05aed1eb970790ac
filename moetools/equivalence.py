"""Whether two arms are equal within a stated margin, different, or neither can be said.

A report that says "no difference" because a test found none confuses absence of evidence with
evidence of absence. Two one-sided tests turn the burden of proof around: the arms are equivalent
when both "worse by the margin or more" and "better by the margin or more" are rejected.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Verdict = Literal["equivalent", "different", "undecided"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalence:
    """What the paired differences of two arms say about their mean.

    Attributes:
        difference: Mean of the differences, each cluster counted once.
        low: Lower end of the interval of both tests, 90 % at the default level; NaN with fewer
            than two clusters.
        high: Its upper end. The arms are equivalent exactly where it lies within the margin.
        p_lower: P value of "the difference is -margin or less".
        p_upper: P value of "the difference is margin or more".
        p_zero: Two-sided p value of "the difference is 0".
        margin: Largest difference that counts as none, in the unit of the differences.
        num: Clusters, the units that count as independent.
        error: Standard error of the difference; NaN with fewer than two clusters.
        df: Degrees of freedom of the tests.
        level: Level of every test.
        verdict: `equivalent` where both one-sided tests reject; else `different` where the
            two-sided test rejects 0; else `undecided`.
    """

    difference: float
    low: float
    high: float
    p_lower: float
    p_upper: float
    p_zero: float
    margin: float
    num: int
    error: float
    df: float
    level: float
    verdict: Verdict

    @property
    def differs(self) -> bool:
        """Whether 0 is rejected, as it may be for equivalent arms too: a small difference."""
        return self.p_zero < self.level

    def interval(self, coverage: float = 0.95) -> tuple[float, float]:
        """Interval of the difference; at 95 % without 0 where a level of 5 % rejects 0."""
        from scipy.special import stdtrit

        half = float(stdtrit(self.df, (1 + coverage) / 2)) * self.error
        return self.difference - half, self.difference + half

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        if math.isnan(self.p_zero):
            return f"Undecided: {self.num} independent unit is not enough for a test."
        confidence = f"{1 - 2 * self.level:.0%} interval {self.low:.3g} to {self.high:.3g}"
        found = f"{self.difference:.3g} ({confidence}, n = {self.num})"
        if self.verdict == "equivalent":
            small = ", a small difference but not 0" if self.differs else ""
            return f"Equivalent within {self.margin:.3g}: {found}{small}."
        if self.verdict == "different":
            return f"Different: {found}."
        return f"Undecided: {found} shows neither a difference nor one below {self.margin:.3g}."


def tost_paired(
    differences: ArrayLike,
    *,
    margin: float,
    clusters: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.05,
    extra_variance: float = 0.0,
    extra_df: int = 1,
) -> Equivalence:
    """Two one-sided paired t tests of a mean difference against a margin.

    Differences of one cluster (the tokens or texts of a document) are not independent: they are
    averaged first, and every cluster counts once. For a mean in which clusters count by their
    size give `ratio_values` instead.

    Args:
        differences: [N] arm B minus arm A of each pair.
        margin: Largest difference that counts as none; above 0.
        clusters: [N] labels; None where every difference stands for itself.
        level: Level of each test.
        extra_variance: Variance of the mean that the clusters do not show, as of a random draw
            that all of them share; it adds to theirs.
        extra_df: Degrees of freedom that it was estimated with.

    Raises:
        ValueError: No differences, some that are not finite, other labels than differences, or a
            margin, level or variance out of range.
    Source:
        Satterthwaite 1946, Biometrics Bull. 2, 110, for the degrees of freedom of both variances.
        Schuirmann 1987, J. Pharmacokinet. Biopharm. 15, 657: a mean is equivalent at level a
        where its 1 - 2a interval lies within the margin.
    """
    from scipy.special import stdtr, stdtrit

    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("differences: expected one or more finite numbers")
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"margin {margin}: expected a number above 0")
    if not 0 < level < 0.5:
        raise ValueError(f"level {level}: expected a number between 0 and 0.5")
    if not (extra_variance >= 0 and math.isfinite(extra_variance) and extra_df >= 1):
        raise ValueError(f"extra variance {extra_variance} with {extra_df} degrees of freedom")
    if clusters is not None:
        values = _cluster_means(values, np.asarray(clusters))
    num, mean = len(values), float(values.mean())
    if num < 2:
        nan = math.nan
        return Equivalence(
            difference=mean, low=nan, high=nan, p_lower=nan, p_upper=nan, p_zero=nan,
            margin=margin, num=num, error=nan, df=nan, level=level, verdict="undecided",
        )  # fmt: skip
    constant = bool((values == values[0]).all())
    mean = float(values[0]) if constant else mean
    own_variance = 0.0 if constant else float(values.var(ddof=1)) / num
    variance, df = own_variance + extra_variance, num - 1.0
    if extra_variance > 0:
        own, extra = own_variance / variance, extra_variance / variance
        df = 1 / (own**2 / (num - 1) + extra**2 / extra_df)
    error = math.sqrt(variance)
    half = float(stdtrit(df, 1 - level)) * error

    def p_below(distance: float) -> float:
        """P value of "the mean is `distance` or more below what it was found to be"."""
        if error > 0:
            return float(stdtr(df, -distance / error))
        return 0.0 if distance > 0 else 1.0

    p_lower, p_upper = p_below(mean + margin), p_below(margin - mean)
    p_zero = min(1.0, 2 * p_below(abs(mean)))
    verdict: Verdict = "undecided"
    if max(p_lower, p_upper) < level:
        verdict = "equivalent"
    elif p_zero < level:
        verdict = "different"
    return Equivalence(
        difference=mean, low=mean - half, high=mean + half, p_lower=p_lower, p_upper=p_upper,
        p_zero=p_zero, margin=margin, num=num, error=error, df=df, level=level, verdict=verdict,
    )  # fmt: skip


def ratio_values(sums: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    """Values [N] whose mean is sum(sums) / sum(counts) and whose spread is that of the ratio.

    A mean per token over documents of different lengths is a ratio of two sums; these are its
    linearised contributions, one a document, ready for a paired test.

    Args:
        sums: [N] sum of each cluster.
        counts: [N] its size, above 0.

    Source:
        Cochran, Sampling Techniques, eq. 2.46.
    """
    total, size = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    ratio = total.sum() / size.sum()
    values: NDArray[np.float64] = ratio + (total - ratio * size) / size.mean()
    return values


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """P values [N] corrected so that the chance of any false rejection stays below the level.

    NaN, a test that was not made, stays NaN and does not count.

    Raises:
        ValueError: A p value below 0 or above 1.
    Source:
        Holm 1979, Scand. J. Statist. 6, 65.
    """
    values = np.asarray(p_values, dtype=np.float64)
    if ((values < 0) | (values > 1)).any():
        raise ValueError("p values lie between 0 and 1")
    made = np.flatnonzero(~np.isnan(values))
    order = made[np.argsort(values[made], kind="stable")]
    corrected = np.full(values.shape, np.nan)
    factors = len(order) - np.arange(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1.0)
    return corrected


def _cluster_means(values: NDArray[np.float64], clusters: NDArray[Any]) -> NDArray[np.float64]:
    if clusters.shape != values.shape:
        raise ValueError(f"{len(values)} differences with {clusters.size} cluster labels")
    _, number = np.unique(clusters, return_inverse=True)
    means: NDArray[np.float64] = np.bincount(number, weights=values) / np.bincount(number)
    return means
