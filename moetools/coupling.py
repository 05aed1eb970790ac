"""Whether each router row still describes its expert: statistics, and their null.

Every statistic is read off a matrix whose entry [e, f] holds router row e against expert f. The
null is the same statistic with the experts dealt to the rows at random (`permutations`): it keeps
all rows and all experts, and breaks only which belongs to which.

E routed experts, D neurons of each, d hidden size, N tokens, B permutations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetools.intervals import block_of

if TYPE_CHECKING:
    from torch import Tensor

    from moetools.experts import LayerExperts

NUM_PERMUTATIONS = 200
DIRECTIONS = (1, 8, 32)
ALPHAS = (0.5, 1.0, 2.0)
EXACT_SIZE = 512
"""Experts with at most so many neurons or channels get exact singular vectors."""
OVERSAMPLED = 16
POWER_ITERATIONS = 4

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """Router rows against experts, weights alone: matrices [E, E] of row e and expert f.

    Attributes:
        alignment: d times the mean squared cosine of the row with the expert's neurons; 1 at
            random.
        signed: Mean cosine.
        energy: By m: share of the row's squared length in the neurons' top m right singular
            vectors; m / d at random.
        gain: Length of the neurons' values for the row, `||W_f r_e||`.
    """

    alignment: Array
    signed: Array
    energy: Mapping[int, Array]
    gain: Array


def measure(
    rows: Mapping[str, "Tensor"],
    neurons: Callable[[int], "Tensor"],
    experts: NDArray[np.int64],
) -> dict[str, Geometry]:
    """Compare router rows with experts, one expert in memory at a time.

    Args:
        rows: Variants of the router rows by name: [E, d] float32, none of them zero.
        neurons: Gives the neurons [D, d] float32 of an expert.
        experts: [E] the expert of each row.
    """
    import torch

    size, hidden_size = next(iter(rows.values())).shape
    both = torch.cat(list(rows.values())).double()
    lengths = both.norm(dim=1)
    units = (both / lengths[:, None]).float()
    alignment, signed, gain = np.empty((3, len(both), size))
    energy: dict[int, Array] = {}
    for f, expert in enumerate(experts):
        weight = neurons(int(expert))
        values = (weight @ units.T).double()  # [D, variants * E]
        gain[:, f] = (values.norm(dim=0) * lengths).numpy()
        of_neurons = weight.double().norm(dim=1, keepdim=True)
        cosines = (values / of_neurons)[of_neurons[:, 0] > 0]
        alignment[:, f] = (cosines.square().mean(dim=0) * hidden_size).numpy()
        signed[:, f] = cosines.mean(dim=0).numpy()
        wanted = [m for m in DIRECTIONS if m <= min(len(weight), hidden_size - 1)]
        directions = top_directions(weight, max(wanted))
        shares = (directions @ units.T).double().square().cumsum(dim=0)
        for m in wanted:
            energy.setdefault(m, np.empty((len(both), size)))[:, f] = shares[m - 1].numpy()
    parts = {name: slice(i * size, (i + 1) * size) for i, name in enumerate(rows)}
    return {
        name: Geometry(
            alignment=alignment[part],
            signed=signed[part],
            energy={m: shares[part] for m, shares in energy.items()},
            gain=gain[part],
        )
        for name, part in parts.items()
    }


def top_directions(weight: "Tensor", count: int) -> "Tensor":
    """[count, d] the right singular vectors of [D, d] with the largest singular values.

    Source:
        Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, for large matrices; the range
        is found with 16 more vectors and 4 power iterations.
    """
    import torch

    if min(weight.shape) <= EXACT_SIZE:
        exact = weight.double()
        if len(weight) > weight.shape[1]:
            found: Tensor = torch.linalg.eigh(exact.T @ exact)[1][:, -count:].flip(1).T
        else:
            left = torch.linalg.eigh(exact @ exact.T)[1][:, -count:].flip(1)
            found = torch.linalg.qr(exact.T @ left)[0].T
        return found.float()
    generator = torch.Generator().manual_seed(0)
    width = min(count + OVERSAMPLED, *weight.shape)
    basis = torch.linalg.qr(weight.T @ torch.randn(len(weight), width, generator=generator))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])[0]
    _, _, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    found = right[:count] @ basis.T
    return found


def activations(layer: "LayerExperts", inputs: "Tensor") -> dict[str, Array]:
    """How strongly every expert answers to every token: [N, E] each.

    Args:
        layer: A router with its experts.
        inputs: [N, d] float32, what the router saw.

    Returns:
        Lengths of: the neurons' values (`gate`), what the down projection gets (`hidden`), and the
        expert's output before weighting (`output`).
    """
    found = {name: np.empty((len(inputs), layer.num_experts)) for name in ACTIVATIONS}
    for expert in range(layer.num_experts):
        first, hidden = layer.experts.hidden(expert, inputs)
        output = layer.experts.output(expert, hidden)
        for name, values in zip(ACTIVATIONS, (first, hidden, output), strict=True):
            found[name][:, expert] = values.double().norm(dim=1).numpy()
    return found


ACTIVATIONS = ("gate", "hidden", "output")


def row_similarity(rows: Array) -> tuple[float, float]:
    """Mean and largest |cosine| of two different rows [E, d]."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = np.abs(units @ units.T)[np.triu_indices(len(rows), 1)]
    return float(pairs.mean()), float(pairs.max())


def noise_bounds(rows: Array) -> Array:
    """[E] how far a row may be scaled coordinate by coordinate and stay nearest to itself.

    Source:
        ERC, arXiv 2512.23447: min over f of ||r_e - r_f|| / (2 ||r_e||).
    """
    lengths = np.linalg.norm(rows, axis=1)
    products = rows @ rows.T
    squared = lengths[:, None] ** 2 + lengths[None, :] ** 2 - 2 * products
    np.fill_diagonal(squared, np.inf)
    return np.asarray(np.sqrt(np.maximum(squared.min(axis=1), 0)) / (2 * lengths))


def erc_loss(gain: Array, alpha: float) -> float:
    """Expert-router coupling loss of the gains [E, E] of row i and expert j.

    Source:
        ERC, arXiv 2512.23447, without the noise, as its table on trained checkpoints.
    """
    own = alpha * np.diagonal(gain)[:, None]
    excess = np.maximum(gain - own, 0) + np.maximum(gain.T - own, 0)
    np.fill_diagonal(excess, 0)
    return float(excess.sum() / len(gain) ** 2)


def erc_threshold(gain: Array) -> float:
    """The smallest alpha with no loss; NaN where a row does not move its own expert."""
    own = np.diagonal(gain)
    other = np.maximum(gain, gain.T)
    np.fill_diagonal(other, 0)
    return float((other.max(axis=1) / own).max()) if (own > 0).all() else np.nan


def erc_violations(gain: Array) -> tuple[float, float]:
    """Share of pairs where a row moves another expert, or another row this one, as much or more."""
    own = np.diagonal(gain)[:, None]
    others = ~np.eye(len(gain), dtype=bool)
    return float((gain >= own)[others].mean()), float((own <= gain.T)[others].mean())


def permutations(size: int, *, seed: int, count: int = NUM_PERMUTATIONS) -> NDArray[np.int64]:
    """[B, E] random orders of the experts."""
    generator = np.random.default_rng(seed)
    return generator.permuted(np.tile(np.arange(size), (count, 1)), axis=1)


def matched(matrix: Array, orders: NDArray[np.int64]) -> Array:
    """[1 + B] mean of the entries [e, e], then of [e, order[e]] for every order."""
    rows = np.arange(len(matrix))
    return np.concatenate([[np.diagonal(matrix).mean()], matrix[rows, orders].mean(axis=1)])


def permuted(
    statistic: Callable[[Array], Any], matrix: Array, orders: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[1 + B, ...] any statistic of a matrix, then with its columns in every order."""
    return np.array([statistic(matrix), *(statistic(matrix[:, order]) for order in orders)])


def p_value(draws: Array, *, less: bool = False) -> Array:
    """How often the permutations do as well: [...] for draws [1 + B, ...], 1 / (B + 1) at least.

    Args:
        draws: The statistic, then its null.
        less: Coupling makes the statistic smaller.
    """
    value, null = (-draws[0], -draws[1:]) if less else (draws[0], draws[1:])
    slack = 1e-12 * np.maximum(np.abs(value), 1e-300)
    p = (1 + (null >= value - slack).sum(axis=0)) / (1 + len(null))
    return np.where(np.isfinite(draws[0]), p, np.nan)


def row_ranks(matrix: Array) -> Array:
    """[E, E] place of every entry in its row, 1 the largest; ties share the mean of theirs."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(-matrix, axis=1))


def row_deviations(matrix: Array) -> Array:
    """[E, E] standard deviations (of the row's other entries) above the row's other entries."""
    size = matrix.shape[1]
    others = size - 1
    mean = (matrix.sum(axis=1, keepdims=True) - matrix) / others
    squares = (matrix**2).sum(axis=1, keepdims=True) - matrix**2
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.sqrt(np.maximum(squares - others * mean**2, 0) / (others - 1))
        found = (matrix - mean) / spread
    return np.where(np.isfinite(found), found, np.nan)


def unit_ranks(values: NDArray[Any], axis: int) -> Array:
    """Ranks along an axis (ties share the mean), centred and of length 1; 0 where all are tied.

    The product of two, summed over the axis, is Spearman's correlation.
    """
    from scipy.stats import rankdata

    ranks = np.asarray(rankdata(values, axis=axis), dtype=np.float64)
    ranks -= ranks.mean(axis=axis, keepdims=True)
    lengths = np.linalg.norm(ranks, axis=axis, keepdims=True)
    return ranks / np.where(lengths > 0, lengths, 1.0)


def percentiles(values: NDArray[Any]) -> Array:
    """[N, E] share of the other experts that answer less than this one; 0.5 on average."""
    from scipy.stats import rankdata

    return np.asarray((rankdata(values, axis=1) - 1) / max(values.shape[1] - 1, 1))


def selected(index: NDArray[Any], num_experts: int) -> Array:
    """[N, E] 1 where an expert is among the selection [N, K]."""
    found = np.zeros((len(index), num_experts))
    rows, places = np.nonzero(index < num_experts)
    found[rows, index[rows, places]] = 1
    return found


class TokenSample:
    """A bounded random sample of tokens: those whose sequence and position hash lowest.

    It does not depend on how the tokens were cut into batches and parts, nor on their order.

    Args:
        limit: Tokens kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._bound = np.iinfo(np.int64).max
        self._parts: list[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]] = []

    def add(
        self,
        sequence: NDArray[Any],
        position: NDArray[Any],
        columns: Mapping[str, NDArray[Any]],
        kept: NDArray[np.bool_],
    ) -> None:
        """Offer tokens.

        Args:
            sequence: [T] number of each token's sequence.
            position: [T] its position there.
            columns: What to keep of a token: [T, ...] by name.
            kept: [T] tokens that may be drawn.
        """
        rows = np.flatnonzero(kept)
        token = (sequence[rows].astype(np.uint64) << np.uint64(32)) + position[rows].astype(
            np.uint64
        )
        keys = block_of(token, 1 << 62)
        chosen = keys < self._bound
        rows, keys = rows[chosen], keys[chosen]
        if len(rows) > self.limit:
            best = np.argpartition(keys, self.limit - 1)[: self.limit]
            rows, keys = rows[best], keys[best]
        values = {name: column[rows] for name, column in columns.items()}
        values |= {"sequence": sequence[rows], "position": position[rows]}
        self._append(keys, values)

    def merge(self, other: "TokenSample") -> None:
        """Add the sample of another part of the same trace."""
        for keys, values in other._parts:
            self._append(keys, values)

    def tokens(self) -> dict[str, NDArray[Any]]:
        """The columns of the sampled tokens, lowest hash first; also `sequence`, `position`."""
        self._shrink()
        return self._parts[0][1] if self._parts else {}

    def _append(self, keys: NDArray[np.int64], values: dict[str, NDArray[Any]]) -> None:
        if len(keys):
            self._parts.append((keys, values))
        if sum(len(keys) for keys, _ in self._parts) > 2 * self.limit:
            self._shrink()

    def _shrink(self) -> None:
        if not self._parts:
            return
        keys = np.concatenate([keys for keys, _ in self._parts])
        order = np.argsort(keys, kind="stable")[: self.limit]
        names = self._parts[0][1]
        joined = {
            name: np.concatenate([values[name] for _, values in self._parts])[order]
            for name in names
        }
        self._parts = [(keys[order], joined)]
        if len(order) == self.limit:
            self._bound = int(keys[order[-1]])
