"""Entropy and inequality of counts, and their counterparts on joint tables. All in nats.

Every function takes unnormalised non-negative counts and works over the last axis (or the last
two, for joint tables), so that bootstrap replicates are computed in one call. Counts that sum to
zero give NaN.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def entropy(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Entropy of the distribution that counts describe.

    Args:
        counts: [..., N].

    Returns:
        [...] nats, 0 to ln N.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.log(total) - _x_log_x(counts).sum(axis=-1) / total
    return np.asarray(np.maximum(result, 0.0))


def mutual_information(joint: NDArray[Any]) -> NDArray[np.float64]:
    """Mutual information of the two indices of a joint table.

    Args:
        joint: [..., N, M] counts.

    Returns:
        [...] nats.
    """
    joint = np.asarray(joint, dtype=np.float64)
    total = joint.sum(axis=(-2, -1))
    own = _x_log_x(joint).sum(axis=(-2, -1))
    margins = _x_log_x(joint.sum(axis=-1)).sum(-1) + _x_log_x(joint.sum(axis=-2)).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.log(total) + (own - margins) / total
    return np.asarray(np.maximum(result, 0.0))


def normalised_mutual_information(joint: NDArray[Any]) -> NDArray[np.float64]:
    """Mutual information over the geometric mean of the two entropies.

    Args:
        joint: [..., N, M] counts.

    Returns:
        [...] 0 to 1; NaN where one of the entropies is zero.
    """
    joint = np.asarray(joint, dtype=np.float64)
    scale = np.sqrt(entropy(joint.sum(axis=-1)) * entropy(joint.sum(axis=-2)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(scale > 0, mutual_information(joint) / scale, np.nan)


def gini(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Gini coefficient: 0 when all N counts are equal, 1 - 1/N when one has everything.

    Args:
        counts: [..., N].
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64), axis=-1)
    size = ordered.shape[-1]
    rank = 2 * np.arange(1, size + 1) - size - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((ordered @ rank) / (size * ordered.sum(axis=-1)))


def _x_log_x(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x * np.log(np.where(x > 0, x, 1.0))
