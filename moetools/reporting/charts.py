"""Charts that several analyses draw from their tidy tables."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moetools.reporting import style


def lines_by_layer(axes: Axes, rows: pd.DataFrame, *, label: str = "", **options: Any) -> None:
    """One line of values by layer for each trace, with its interval as a band.

    Args:
        axes: Where to draw.
        rows: Rows of one metric with a layer.
        label: What the line is called, before the trace's name if there are several.
        **options: Passed to `Axes.plot`; a `color` stands for all traces, which are then named
            once.
    """
    traces = list(dict.fromkeys(rows["trace"]))
    for i, trace in enumerate(traces):
        line = rows[rows["trace"] == trace].sort_values("layer")
        drawn = {"color": style.COLORS[i % len(style.COLORS)], "marker": "o", **options}
        name = label
        if len(traces) > 1:
            for_all = "color" in options
            name = (label if i == 0 else "") if for_all else " ".join([label, trace]).strip()
        x = line["layer"].to_numpy(int)
        axes.plot(x, line["value"].to_numpy(float), label=name or None, **drawn)
        low, high = line["low"].to_numpy(float), line["high"].to_numpy(float)
        axes.fill_between(x, low, high, color=drawn["color"], alpha=0.2, lw=0)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def matrix(
    rows: pd.DataFrame, *, index: str = "layer", columns: str = "expert"
) -> tuple[NDArray[np.float64], list[Any], list[Any]]:
    """Values of one metric as a matrix, NaN where missing, and the names of both sides."""
    wide = rows.pivot_table(index=index, columns=columns, values="value", dropna=False)
    return wide.to_numpy(float), list(wide.index), list(wide.columns)


def heatmap_height(num_rows: int) -> float:
    """Inches for a heat map with so many rows."""
    return float(np.clip(0.7 + 0.16 * num_rows, 1.8, 7.0))
