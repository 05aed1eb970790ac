"""Multiple-choice items under several arms: the model unchanged, steered, with new weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moetools import console
from moetools.item_statistics import compare_items, item_sample
from moetools.items import Item
from moetools.opening import OpenedModel
from moetools.scoring import BATCH_TOKENS, ItemScore, choice_logliks, choice_rows, item_scores


class Arms:
    """What every arm makes of the same items.

    Args:
        items: At least one.
        opened: Whose tokenizer reads them.
        batch_tokens: Tokens of a batch; None for the default.
    """

    def __init__(
        self, items: Sequence[Item], opened: OpenedModel, *, batch_tokens: int | None
    ) -> None:
        self.items = tuple(items)
        self.scores: dict[str, list[ItemScore]] = {}
        self._rows = choice_rows(items, opened.tokenizer, limit=opened.num_positions)
        self._batch_tokens = batch_tokens or BATCH_TOKENS

    def add(self, name: str, model: Any) -> None:
        """Score all items with the model as it is now."""
        num_tokens = sum(len(row.token_ids) for row in self._rows)
        with console.progress(f"Items, {name}", num_tokens, "tokens") as meter:
            found = choice_logliks(
                model,
                self._rows,
                [len(item.choices) for item in self.items],
                batch_tokens=self._batch_tokens,
                advance=meter.advance,
            )
        self.scores[name] = item_scores(self.items, self._rows, found.values)

    def accuracy(self, name: str) -> float:
        """Share of right items, each group counting the same."""
        means = item_sample(self.items).means([score.correct for score in self.scores[name]])
        return means[-2] if len(means) > 1 else means[0]

    def compare(self, first: str, second: str, *, seed: int) -> dict[str, Any]:
        """Accuracies of two arms, paired, by group, and how far apart single items are.

        Args:
            first: Name of an arm.
            second: Of the arm that it is taken off.
            seed: Of the bootstrap.
        """
        a, b = self.scores[first], self.scores[second]
        table = compare_items(a, b, self.items, seed=seed).table
        table = table[table["metric"] == "accuracy"].drop(columns="metric")
        pairs = list(zip(a, b, strict=True))
        apart = np.abs(np.concatenate([np.subtract(x.loglik, y.loglik) for x, y in pairs]))
        return {
            "arms": [first, second],
            "accuracy": table.astype(object).where(table.notna(), None).to_dict("records"),
            "differing_items": sum(x.prediction != y.prediction for x, y in pairs),
            "num_items": len(pairs),
            "loglik_apart": {
                "mean": float(apart.mean()),
                "median": float(np.median(apart)),
                "p95": float(np.quantile(apart, 0.95)),
                "max": float(apart.max()),
            },
        }

    def table(self) -> pd.DataFrame:
        """One row per item: prediction of every arm, and its log-likelihood of each choice."""
        columns: dict[str, Any] = {
            "where": [item.where for item in self.items],
            "id": [item.id for item in self.items],
            "group": [item.group for item in self.items],
            "answer": [item.answer for item in self.items],
        }
        for name, scores in self.scores.items():
            columns[f"prediction.{name}"] = [score.prediction for score in scores]
            columns[f"loglik.{name}"] = [list(score.loglik) for score in scores]
        return pd.DataFrame(columns)


def pooled(comparison: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of all items together."""
    rows: list[Mapping[str, Any]] = comparison["accuracy"]
    return rows[-1]
