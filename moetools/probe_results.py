"""From what each probe did to every document to one tidy table with intervals and verdicts.

The mean difference in negative log-likelihood per token is a ratio of two sums over documents.
Its variance is that between documents, of the mean over seeds, plus that between seeds: documents
are drawn from more of their kind, and so is what an operator draws at random. What varies by
document and seed is in both, so that intervals are rather too wide than too narrow. One seed
shows no variance between seeds; its results hold for this seed alone.

Intervals (95 %) and verdicts are of the same t tests, with a margin of half a percent of the native
value; p values of no difference are corrected over the layers that one operator was tried on
(Holm).

Shapes: S seeds, D documents, I items.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.equivalence import Equivalence, holm, ratio_values, tost_paired
from moetools.intervals import fieller_interval

NLL_MARGIN = 0.005
"""Of the native negative log-likelihood."""

ACCURACY_MARGIN = 0.005
LEVEL = 0.05

PRIOR_ITEMS = (math.sqrt(0.5), -math.sqrt(0.5))
"""Changes of two items that are added to those seen before an interval or a test is made.

They are one item of either direction with half a weight each and one that stays, as Agresti and
Min add (2005, Statistics in Medicine 24, 729). Without them no change in a handful of items would
pass for certainty that there is none.
"""

VARIANT = ["probe", "layers", "operator", "weights"]
"""What tells the rows of the results apart."""

SUMS = ["delta_nll", "kl", "agreement", "output_error", "output_cosine"]
"""Sums over the tokens of a document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Native:
    """The unchanged model on the evaluation data.

    Attributes:
        nll: [D] negative log-likelihood of each document, a sum in nats.
        num_predicted: [D] tokens that were predicted.
        correct: [I] whether each item was right; None without items.
    """

    nll: NDArray[np.float64]
    num_predicted: NDArray[np.int64]
    correct: NDArray[np.bool_] | None = None

    @property
    def nll_per_token(self) -> float:
        """Nats per predicted token."""
        return float(self.nll.sum() / self.num_predicted.sum())

    @property
    def margin(self) -> float:
        """Largest difference in nats per token that counts as none."""
        return NLL_MARGIN * self.nll_per_token

    @property
    def accuracy(self) -> float | None:
        """Share of the items that were right."""
        return None if self.correct is None else float(self.correct.mean())


def probe_results(
    documents: pd.DataFrame, items: pd.DataFrame | None, native: Native
) -> pd.DataFrame:
    """One row for each layer (or set of layers), operator and weight policy.

    Args:
        documents: One row for each of `VARIANT`, `seed` and `document`: `SUMS`, `num_predicted`
            tokens, `num_outputs` tokens whose native output is not 0, and `load_max_over_mean`.
        items: One row for each of `VARIANT`, `seed` and `item`: `correct`; None without items.
        native: The unchanged model.
    """
    of_items = {} if items is None else dict(_variants(items))
    rows = []
    values = []
    for key, variant in _variants(documents):
        found, of_key = _of_documents(variant, native)
        row = dict(zip(VARIANT, key, strict=True)) | found
        if native.correct is not None and key in of_items:
            row |= _of_items(of_items[key], native.correct)
        rows.append(row)
        values.append(of_key)
    _correct_over_layers(rows)
    _compare_with_skip(rows, values)
    return pd.DataFrame(rows)


def _variants(table: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    for key, rows in table.groupby(VARIANT, sort=False, dropna=False):
        yield tuple(part if isinstance(part, str) else None for part in key), rows


def _of_documents(
    variant: pd.DataFrame, native: Native
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Columns of one variant, and the values [S, D] that its test is of."""
    by_seed = variant.sort_values(["seed", "document"])
    num_seeds = by_seed["seed"].nunique()
    shape = (num_seeds, len(native.nll))
    sums = {name: by_seed[name].to_numpy(float).reshape(shape) for name in SUMS}
    predicted = native.num_predicted.astype(float)
    num_predicted = predicted.sum()
    values = np.stack([ratio_values(of_seed, predicted) for of_seed in sums["delta_nll"]])
    test = _tested(values, native.margin)
    low, high = test.interval(1 - LEVEL)
    outputs = by_seed["num_outputs"].to_numpy(float).reshape(shape).mean(axis=0).sum()
    load = by_seed.groupby("seed")["load_max_over_mean"].first().mean()
    row = {
        "num_seeds": num_seeds,
        "num_tokens": int(num_predicted),
        "delta_nll": float(sums["delta_nll"].mean(axis=0).sum() / num_predicted),
        "low": _number(low),
        "high": _number(high),
        "p_zero": _number(test.p_zero),
        "verdict": test.verdict,
        "differs": test.differs,
        "kl": _mean(sums["kl"], num_predicted),
        "agreement": _mean(sums["agreement"], num_predicted),
        "output_error": _mean(sums["output_error"], outputs),
        "output_cosine": _mean(sums["output_cosine"], outputs),
        "load_max_over_mean": _number(load),
    }
    return row, values


def _of_items(variant: pd.DataFrame, native_correct: NDArray[np.bool_]) -> dict[str, Any]:
    by_seed = variant.sort_values(["seed", "item"])
    correct = by_seed["correct"].to_numpy(bool).reshape(-1, len(native_correct))
    change = correct.astype(float) - native_correct
    known = np.hstack([change, np.tile(PRIOR_ITEMS, (len(change), 1))])
    test = _tested(known, ACCURACY_MARGIN)
    low, high = np.clip(test.interval(1 - LEVEL), -1, 1)
    return {
        "delta_accuracy": float(change.mean()),
        "accuracy_low": _number(low),
        "accuracy_high": _number(high),
        "accuracy_p_zero": _number(test.p_zero),
        "accuracy_verdict": test.verdict,
        "flips_to_wrong": float((change < 0).sum(axis=1).mean()),
        "flips_to_right": float((change > 0).sum(axis=1).mean()),
    }


def _tested(values: NDArray[np.float64], margin: float) -> Equivalence:
    """Test of the mean of values [S, D]."""
    num_seeds = len(values)
    between = values.mean(axis=1).var(ddof=1) / num_seeds if num_seeds > 1 else 0.0
    return tost_paired(
        values.mean(axis=0),
        margin=margin,
        level=LEVEL,
        extra_variance=between,
        extra_df=max(num_seeds - 1, 1),
    )


def _correct_over_layers(rows: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm`, for the layers that one operator with one weight policy was tried on."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["probe"], row["operator"], row["weights"]), []).append(row)
    for family in families.values():
        p_values = [math.nan if row["p_zero"] is None else row["p_zero"] for row in family]
        for row, corrected in zip(family, holm(p_values), strict=True):
            row["p_holm"] = _number(corrected)


def _compare_with_skip(
    rows: Sequence[dict[str, Any]], values: Sequence[NDArray[np.float64]]
) -> None:
    """Add `substitutability` = 1 - delta NLL / delta NLL of `skip`, or why there is none."""
    skipped = {
        (row["probe"], row["layers"]): (row, of_skip)
        for row, of_skip in zip(rows, values, strict=True)
        if row["operator"] == "skip"
    }
    for row, of_row in zip(rows, values, strict=True):
        row |= dict.fromkeys(("substitutability", "substitutability_low", "substitutability_high"))
        row["substitutability_reason"] = None
        if row["operator"] == "skip":
            continue
        if (row["probe"], row["layers"]) not in skipped:
            row["substitutability_reason"] = "skip was not probed"
            continue
        skip, of_skip = skipped[row["probe"], row["layers"]]
        if not _matters(skip):
            row["substitutability_reason"] = "skipping the layer does not significantly hurt"
            continue
        row["substitutability"] = 1 - row["delta_nll"] / skip["delta_nll"]
        low, high = _ratio_interval(of_row, of_skip.mean(axis=0))
        row["substitutability_low"], row["substitutability_high"] = (
            _number(1 - high),
            _number(1 - low),
        )


def _matters(skip: dict[str, Any]) -> bool:
    return skip["delta_nll"] > 0 and skip["p_holm"] is not None and skip["p_holm"] < LEVEL


def _ratio_interval(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64]
) -> tuple[float, float]:
    """Interval of the ratio of two means.

    Args:
        numerator: [S, D] values whose mean has the variance that `_tested` gives it.
        denominator: [D] values of the same documents without seeds.

    Returns:
        Its ends; NaN where it has none because the denominator may be 0.
    Source:
        `fieller_interval`: the ratios r at which a t test does not reject that the mean of
        numerator - r * denominator is 0. Its degrees of freedom are those at the ratio found.
    """
    from scipy.special import stdtrit

    found = numerator.mean() / denominator.mean()
    df = _tested(numerator - found * denominator, margin=1.0).df
    covariance = np.cov(numerator.mean(axis=0), denominator) / len(denominator)
    low, high = fieller_interval(
        numerator.mean(),
        denominator.mean(),
        variances=(_tested(numerator, margin=1.0).error ** 2, covariance[1, 1]),
        covariance=covariance[0, 1],
        quantile=float(stdtrit(df, 1 - LEVEL / 2)),
    )
    return float(low), float(high)


def _mean(sums: NDArray[np.float64], count: float) -> float | None:
    """Mean over seeds of a sum over documents divided by a count; None for a count of 0."""
    return _number(sums.mean(axis=0).sum() / count) if count else None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
