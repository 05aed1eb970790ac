"""Whether the experts of a token add the same thing, or different things.

Recorded by `moetools trace --keep outputs`. For every token, with f_i the outputs of its selected
experts, w_i their weights and y the sum of all w_i f_i:

- `output_cosine`: mean cosine of two of the outputs (not for top-1). 0: the experts write in
  unrelated directions. 1: they all write the same, so that one of them would do.
  `output_cosine_chance`: its root mean square for unrelated outputs, 1 / sqrt(hidden size), where
  the hidden size is known: single pairs this close to 0 say nothing.
- `first_cosine`: cosine of y with the part of the expert with the largest weight.
  `first_cosine_orthogonal`: what it would be if all outputs were orthogonal and as long as they
  are. Only what lies above that is agreement; the rest is that one weight is larger.
- `first_cosine_excess` = (`first_cosine` - `first_cosine_orthogonal`) / (1 -
  `first_cosine_orthogonal`), of the means: 0 if orthogonal, 1 if the first expert's direction is
  the direction of all.

Means over tokens; scopes `layer`, `model` (mean over layers) and `group`. Feed-forward routers.

What would fool you: outputs share a direction when all experts write a common offset (a massive
activation, a bias), which says nothing about redundancy of knowledge; look at the layers where the
cosine jumps. Collinear outputs are necessary for dropping an expert, not sufficient: the length
counts as well (`moetools probe` measures what is lost).
"""

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moetools.analysis import (
    Analysis,
    Finding,
    Options,
    Picture,
    layer_rows,
    mlp_routers,
    select,
    single,
)
from moetools.intervals import Cells
from moetools.trace_store import TraceBatch, TraceStore

METRICS = ("output_cosine", "first_cosine", "first_cosine_orthogonal")


def columns(trace: TraceStore, options: Options) -> Sequence[str] | str:
    """The statistics of the experts' outputs."""
    names = [f"collinearity.{router.name}" for router in mlp_routers(trace)]
    if not names or names[0] not in trace.columns:
        return "It needs the outputs of the experts: record the trace with --keep outputs."
    return names


def start(trace: TraceStore, options: Options) -> "CollinearityState":
    """An empty state."""
    return CollinearityState(trace, options)


class CollinearityState:
    """Per cell and router: sums of the three cosines and how many tokens have them."""

    def __init__(self, trace: TraceStore, options: Options) -> None:
        self.routers, self.options = mlp_routers(trace), options
        self.hidden_size = trace.manifest.hidden_size
        self.cells = Cells(trace.groups)
        self.num_tokens = np.zeros_like(self.cells.num_tokens)
        self.sums = {
            router.name: np.zeros((len(self.cells), 2, len(METRICS))) for router in self.routers
        }

    def update(self, batch: TraceBatch) -> None:
        """Add whole sequences."""
        cell = np.repeat(self.cells.add(batch.text, batch.group, batch.lengths), batch.lengths)
        for i, router in enumerate(self.routers):
            values = batch.tokens[f"collinearity.{router.name}"]
            there = np.isfinite(values)
            both = np.stack([np.where(there, values, 0), there], axis=1)
            for part in range(2):
                for metric in range(len(METRICS)):
                    self.sums[router.name][:, part, metric] += np.bincount(
                        cell, both[:, part, metric], minlength=len(self.cells)
                    )
            if i == 0:
                self.num_tokens += np.bincount(cell[there[:, 1]], minlength=len(self.cells))

    def merge(self, other: Self) -> None:
        """Add another part."""
        self.cells.merge(other.cells)
        self.num_tokens += other.num_tokens
        for name, sums in other.sums.items():
            self.sums[name] += sums

    def table(self) -> pd.DataFrame:
        """All rows."""
        return pd.concat(list(self._rows()), ignore_index=True)

    def _rows(self) -> Iterator[pd.DataFrame]:
        layers = [router.layer for router in self.routers]
        for scope in self.cells.scopes(seed=self.options.seed):
            count = int(self.num_tokens[scope.cells].sum())
            draws = np.stack([scope.draws(self.sums[r.name]) for r in self.routers], axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                means = draws[:, :, 0] / draws[:, :, 1]
            found = {name: means[:, :, i] for i, name in enumerate(METRICS)}
            found["first_cosine_excess"] = excess(means[:, :, 1], means[:, :, 2])
            for name, values in found.items():
                if np.isfinite(values[0]).any():
                    bounds = (-np.inf, 1.0) if name == "first_cosine_excess" else (-1.0, 1.0)
                    table = layer_rows(name, scope, layers, values, bounds=bounds)
                    yield table.assign(num_tokens=count)
            if scope.group is None and self.hidden_size and np.isfinite(means[0, :, 0]).any():
                chance = np.full((1, len(layers)), self.hidden_size**-0.5)
                table = layer_rows("output_cosine_chance", scope, layers, chance)
                yield table.assign(num_tokens=count)


def excess(cosine: NDArray[np.float64], orthogonal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the way from orthogonal outputs to parallel ones; NaN where both are the same."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(orthogonal < 1 - 1e-9, (cosine - orthogonal) / (1 - orthogonal), np.nan)


def plots(table: pd.DataFrame) -> Iterator[Picture]:
    """Both cosines by layer with their nulls."""
    from moetools.reporting import charts, style

    pairs = select(table, metric="output_cosine", scope="layer")
    figure, axes = style.subplots(1, 1 if pairs.empty else 2, height=2.8)
    left = axes[0, 0]
    charts.lines_by_layer(left, select(table, metric="first_cosine", scope="layer"), label="sum")
    orthogonal = select(table, metric="first_cosine_orthogonal", scope="layer")
    grey = {"ls": ":", "marker": "", "color": "#888888"}
    charts.lines_by_layer(left, orthogonal, label="if orthogonal", **grey)
    left.set(ylabel="cosine of first and sum")
    left.legend()
    if not pairs.empty:
        right = axes[0, 1]
        charts.lines_by_layer(right, pairs, label="pairs")
        chance = select(table, metric="output_cosine_chance", scope="layer")
        charts.lines_by_layer(right, chance, label="chance", **grey)
        right.axhline(0, color="#cccccc", lw=0.8)
        right.set(ylabel="cosine of two outputs")
        right.legend()
    yield Picture(
        name="collinearity_by_layer",
        caption=(
            "Left: cosine of a token's routed output with the part of its first expert, and what "
            "it would be if the outputs were orthogonal (dotted). Right, for top-2 and more: mean "
            "cosine of two of its experts' outputs; dotted, the size of the cosine of unrelated "
            "directions."
        ),
        figure=figure,
    )


def findings(table: pd.DataFrame) -> Iterator[Finding]:
    """How much the experts of a token agree."""
    cosine = single(table, "output_cosine")
    if not np.isfinite(cosine):
        return
    layers = select(table, metric="output_cosine", scope="layer").sort_values("value")
    first, last = layers.iloc[0], layers.iloc[-1]
    agreement = single(table, "first_cosine_excess")
    yield Finding(
        text=(
            f"Two experts of a token write with a mean cosine of {cosine:.2f}"
            + (
                f" (from {first['value']:.2f} in layer {first['layer']} to {last['value']:.2f} in "
                f"layer {last['layer']})"
                if len(layers) > 1
                else ""
            )
            + (
                f"; the first expert's direction covers {agreement:.0%} of the way from "
                "orthogonal outputs to equal ones."
                if np.isfinite(agreement)
                else "."
            )
        ),
        weight=float(np.clip(1.5 * abs(cosine), 0, 1)),
        metric="output_cosine",
    )


ANALYSIS = Analysis(
    title="Collinearity of expert outputs",
    source=(
        "Redundancy diagnostic after “Equifinality in Mixture of Experts”, arXiv 2604.14419, "
        "between the experts of one layer; nulls by moetools."
    ),
    about=(
        "Whether a token's experts write the same direction into the residual stream or different "
        "ones. Compare with the dotted nulls: a large first weight alone makes the sum look like "
        "its first part."
    ),
    columns=columns,
    start=start,
    plots=plots,
    findings=findings,
)
