"""From what each probe did to every document to one tidy table with intervals and verdicts.

The mean difference in negative log-likelihood per token is a ratio of two sums over documents.
Intervals resample documents, then seeds. Verdicts are paired t tests over documents, of the mean
over seeds, with a margin of half a percent of the native value; p values of no difference are
corrected over the layers that one operator was tried on (Holm).

Shapes: S seeds, D documents, I items, B bootstrap replicates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.equivalence import Equivalence, holm, ratio_values, tost_paired
from moetools.intervals import NUM_REPLICATES, basic_interval, replicate_weights

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
    documents: pd.DataFrame, items: pd.DataFrame | None, native: Native, *, seed: int = 0
) -> pd.DataFrame:
    """One row for each layer (or set of layers), operator and weight policy.

    Args:
        documents: One row for each of `VARIANT`, `seed` and `document`: `SUMS`, `num_predicted`
            tokens, `num_outputs` tokens whose native output is not 0, and `load_max_over_mean`.
        items: One row for each of `VARIANT`, `seed` and `item`: `correct`; None without items.
        native: The unchanged model.
        seed: Of the bootstrap.
    """
    draws = _Draws(len(native.nll), seed)
    of_items = {} if items is None else dict(_variants(items))
    item_draws = None
    if native.correct is not None:
        item_draws = _Draws(len(native.correct) + len(PRIOR_ITEMS), seed)
    rows = []
    for key, variant in _variants(documents):
        row = dict(zip(VARIANT, key, strict=True)) | _of_documents(variant, native, draws)
        if item_draws is not None and key in of_items:
            assert native.correct is not None
            row |= _of_items(of_items[key], native.correct, item_draws)
        rows.append(row)
    _correct_over_layers(rows)
    _compare_with_skip(rows)
    return pd.DataFrame([{k: v for k, v in row.items() if k != "replicates"} for row in rows])


class _Draws:
    """Bootstrap draws of documents or items, then of seeds; the same for every variant."""

    def __init__(self, count: int, seed: int) -> None:
        self.seed = seed
        self.weights = replicate_weights(np.ones(count, dtype=np.bool_), seed=seed)  # [B, D]

    def means(self, sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """[B] mean over drawn seeds and documents of sums [S, D] over counts [D]."""
        num_seeds = len(sums)
        generator = np.random.default_rng((self.seed, num_seeds))
        seeds = generator.multinomial(
            num_seeds, np.full(num_seeds, 1 / num_seeds), size=NUM_REPLICATES
        )
        by_seed = self.weights @ sums.T
        means: NDArray[np.float64] = (by_seed * seeds).sum(axis=1) / num_seeds
        return means / (self.weights @ counts)


def _variants(table: pd.DataFrame) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    for key, rows in table.groupby(VARIANT, sort=False, dropna=False):
        yield tuple(part if isinstance(part, str) else None for part in key), rows


def _of_documents(variant: pd.DataFrame, native: Native, draws: _Draws) -> dict[str, Any]:
    by_seed = variant.sort_values(["seed", "document"])
    num_seeds = by_seed["seed"].nunique()
    shape = (num_seeds, len(native.nll))
    sums = {name: by_seed[name].to_numpy(float).reshape(shape) for name in SUMS}
    predicted = native.num_predicted.astype(float)
    num_predicted = predicted.sum()
    delta = float(sums["delta_nll"].mean(axis=0).sum() / num_predicted)
    replicates = draws.means(sums["delta_nll"], predicted)
    low, high = basic_interval(delta, replicates)
    test = tost_paired(
        ratio_values(sums["delta_nll"].mean(axis=0), predicted), margin=native.margin, level=LEVEL
    )
    outputs = by_seed["num_outputs"].to_numpy(float).reshape(shape).mean(axis=0).sum()
    load = by_seed.groupby("seed")["load_max_over_mean"].first().mean()
    return {
        "num_seeds": num_seeds,
        "num_tokens": int(num_predicted),
        "delta_nll": delta,
        "low": _number(low),
        "high": _number(high),
        **_tested(test),
        "kl": _mean(sums["kl"], num_predicted),
        "agreement": _mean(sums["agreement"], num_predicted),
        "output_error": _mean(sums["output_error"], outputs),
        "output_cosine": _mean(sums["output_cosine"], outputs),
        "load_max_over_mean": _number(load),
        "replicates": replicates,
    }


def _of_items(
    variant: pd.DataFrame, native_correct: NDArray[np.bool_], draws: _Draws
) -> dict[str, Any]:
    by_seed = variant.sort_values(["seed", "item"])
    correct = by_seed["correct"].to_numpy(bool).reshape(-1, len(native_correct))
    change = correct.astype(float) - native_correct
    known = np.hstack([change, np.tile(PRIOR_ITEMS, (len(change), 1))])
    ones = np.ones(known.shape[1])
    low, high = basic_interval(known.mean(), draws.means(known, ones), bounds=(-1, 1))
    test = tost_paired(known.mean(axis=0), margin=ACCURACY_MARGIN, level=LEVEL)
    return {
        "delta_accuracy": float(change.mean()),
        "accuracy_low": _number(low),
        "accuracy_high": _number(high),
        "accuracy_p_zero": _number(test.p_zero),
        "accuracy_verdict": test.verdict,
        "flips_to_wrong": float((change < 0).sum(axis=1).mean()),
        "flips_to_right": float((change > 0).sum(axis=1).mean()),
    }


def _tested(test: Equivalence) -> dict[str, Any]:
    return {"p_zero": _number(test.p_zero), "verdict": test.verdict, "differs": test.differs}


def _correct_over_layers(rows: Sequence[dict[str, Any]]) -> None:
    """Add `p_holm`, for the layers that one operator with one weight policy was tried on."""
    families: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["probe"], row["operator"], row["weights"]), []).append(row)
    for family in families.values():
        p_values = [math.nan if row["p_zero"] is None else row["p_zero"] for row in family]
        for row, corrected in zip(family, holm(p_values), strict=True):
            row["p_holm"] = _number(corrected)


def _compare_with_skip(rows: Sequence[dict[str, Any]]) -> None:
    """Add `substitutability` = 1 - delta NLL / delta NLL of `skip`, or why there is none."""
    skipped = {(row["probe"], row["layers"]): row for row in rows if row["operator"] == "skip"}
    for row in rows:
        row |= dict.fromkeys(("substitutability", "substitutability_low", "substitutability_high"))
        row["substitutability_reason"] = None
        if row["operator"] == "skip":
            continue
        skip = skipped.get((row["probe"], row["layers"]))
        if skip is None:
            row["substitutability_reason"] = "skip was not probed"
        elif not _matters(skip):
            row["substitutability_reason"] = "skipping the layer does not significantly hurt"
        else:
            value = 1 - row["delta_nll"] / skip["delta_nll"]
            with np.errstate(divide="ignore", invalid="ignore"):
                replicates = 1 - row["replicates"] / skip["replicates"]
            replicates = np.where(skip["replicates"] > 0, replicates, np.nan)
            low, high = basic_interval(value, replicates)
            row["substitutability"] = value
            row["substitutability_low"], row["substitutability_high"] = _number(low), _number(high)


def _matters(skip: dict[str, Any]) -> bool:
    return skip["delta_nll"] > 0 and skip["p_holm"] is not None and skip["p_holm"] < LEVEL


def _mean(sums: NDArray[np.float64], count: float) -> float | None:
    """Mean over seeds of a sum over documents divided by a count; None for a count of 0."""
    return _number(sums.mean(axis=0).sum() / count) if count else None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
