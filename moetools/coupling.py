"""Whether each router row still describes its expert: statistics, and their null.

Every statistic is read off a matrix whose entry [e, f] holds router row e against expert f. The
null is the same statistic with the experts dealt to the rows at random (`permutations`): it keeps
all rows and all experts, and breaks only which belongs to which.

E routed experts, D neurons of each, d hidden size, N tokens, B permutations.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moetools.intervals import NUM_BLOCKS, block_of, replicate_weights

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
NUM_FOLDS = 20
"""Parts of the texts whose means are kept apart."""

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

    Approximate where both sides are above 512: of a flat spectrum, the worst case, the 32 found
    hold 95 % of the energy of the true ones.

    Source:
        Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4, for large matrices; the range
        is found with 16 more vectors and 4 power iterations.
    """
    import torch

    found: Tensor
    if min(weight.shape) <= EXACT_SIZE:
        if len(weight) > weight.shape[1]:
            found = torch.linalg.eigh(weight.T @ weight)[1][:, -count:].flip(1).T
        else:
            left = torch.linalg.eigh(weight @ weight.T)[1][:, -count:].flip(1)
            found = torch.linalg.qr(weight.T @ left)[0].T
        return found.contiguous()
    generator = torch.Generator().manual_seed(0)
    width = min(count + OVERSAMPLED, *weight.shape)
    basis = torch.linalg.qr(weight.T @ torch.randn(len(weight), width, generator=generator))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(weight.T @ torch.linalg.qr(weight @ basis)[0])[0]
    _, _, right = torch.linalg.svd(weight @ basis, full_matrices=False)
    found = right[:count] @ basis.T
    return found.contiguous()


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


def permutations(
    size: int, *, seed: Sequence[int], count: int = NUM_PERMUTATIONS
) -> NDArray[np.int64]:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistic:
    """One number about the match of rows and experts in one layer.

    Attributes:
        metric: Its name.
        draws: [1 + B] the number, then the same with the experts dealt to the rows at random.
        less: Coupling makes it smaller.
        replicates: [R] bootstrap replicates over texts; empty for weights.
        num_tokens: Tokens that it rests on; 0 for weights.
        parameters: What it is computed from, where there is a choice.
    """

    metric: str
    draws: Array
    less: bool = False
    replicates: Array = field(default_factory=lambda: np.empty(0))
    num_tokens: int = 0
    parameters: Mapping[str, Any] = field(default_factory=dict)


def weight_statistics(
    geometry: Geometry, orders: NDArray[np.int64], gauge: str
) -> Iterator[Statistic]:
    """Statistics of one layer that need no token.

    Args:
        geometry: Rows against experts.
        orders: [B, E] permutations.
        gauge: What was done to the rows.
    """
    places = row_ranks(geometry.alignment)
    for metric, matrix in (
        ("alignment", geometry.alignment),
        ("alignment_z", row_deviations(geometry.alignment)),
        ("alignment_top1", (places == 1).astype(np.float64)),
        ("alignment_mrr", 1 / places),
        ("signed_alignment", geometry.signed),
    ):
        yield Statistic(metric=metric, draws=matched(matrix, orders), parameters={"gauge": gauge})
    for m, shares in geometry.energy.items():
        yield Statistic(
            metric="singular_energy",
            draws=matched(shares, orders),
            parameters={"gauge": gauge, "directions": m},
        )
    scale = matched(geometry.gain, orders)
    for alpha in ALPHAS:
        losses = permuted(functools.partial(erc_loss, alpha=alpha), geometry.gain, orders)
        for form, values in (("raw", losses), ("scale_free", losses / scale)):
            yield Statistic(
                metric="erc",
                draws=values,
                less=True,
                parameters={"gauge": gauge, "alpha": alpha, "form": form},
            )
    violations = permuted(erc_violations, geometry.gain, orders)
    for metric, values in (
        ("erc_alpha_star", permuted(erc_threshold, geometry.gain, orders)),
        ("erc_row_violations", violations[:, 0]),
        ("erc_column_violations", violations[:, 1]),
    ):
        yield Statistic(metric=metric, draws=values, less=True, parameters={"gauge": gauge})


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """Bootstrap draws of whole texts, for some tokens.

    Attributes:
        block: [N] block of texts that each token belongs to.
        weights: [1 + R, number of blocks] how often a block counts: once, then in every draw.
    """

    block: NDArray[np.int64]
    weights: Array

    @classmethod
    def of(cls, text: NDArray[Any], *, seed: int) -> "Draws":
        """Draws of the blocks that these texts fall in; NaN where they are fewer than two."""
        block = block_of(text, NUM_BLOCKS)
        drawn = replicate_weights(np.bincount(block, minlength=NUM_BLOCKS) > 0, seed=seed)
        weights = np.vstack([np.ones(NUM_BLOCKS), drawn])
        return cls(block=block, weights=weights)

    def sums(self, values: Array) -> Array:
        """[1 + R, ...] sums of [N, ...] over all tokens, then over the tokens of every draw."""
        flat = values.reshape(len(values), -1)
        of_blocks = np.stack(
            [np.bincount(self.block, column, minlength=NUM_BLOCKS) for column in flat.T], axis=1
        )
        drawn = self.weights @ of_blocks
        return drawn.reshape(len(drawn), *values.shape[1:])


def agreement_statistics(
    scores: Mapping[str, Array],
    answers: Mapping[str, Array],
    chosen: Array,
    bootstrap: Draws,
    orders: NDArray[np.int64],
) -> Iterator[Statistic]:
    """Whether the experts that a token scores high are those that answer strongly to it.

    Args:
        scores: [N, E] router logits by gauge; the first is raw.
        answers: [N, E] activations by name (`activations`).
        chosen: [N, E] selections (`selected`).
        bootstrap: Draws of these tokens.
        orders: [B, E] permutations.
    """
    num_tokens, num_experts = next(iter(scores.values())).shape
    within = unit_ranks(next(iter(scores.values())), 1)
    across = {gauge: unit_ranks(logits, 0) for gauge, logits in scores.items()}
    for name, values in answers.items():
        ranks, places = unit_ranks(values, 1), percentiles(values)
        per_token = np.stack([(within * ranks).sum(axis=1), np.ones(num_tokens)], axis=1)
        sums = bootstrap.sums(per_token)
        yield Statistic(
            metric="score_agreement",
            draws=matched(within.T @ ranks, orders) * num_experts / num_tokens,
            replicates=ratio(sums[1:, 0], sums[1:, 1]),
            num_tokens=num_tokens,
            parameters={"activation": name},
        )
        per_token = np.stack([(chosen * places).sum(axis=1), chosen.sum(axis=1)], axis=1)
        sums = bootstrap.sums(per_token)
        yield Statistic(
            metric="selected_activation",
            draws=ratio(matched(chosen.T @ places, orders) * num_experts, chosen.sum()),
            replicates=ratio(sums[1:, 0], sums[1:, 1]),
            num_tokens=num_tokens,
            parameters={"activation": name},
        )
        along = unit_ranks(values, 0)
        for gauge, score in across.items():
            parts = np.stack([score * along, score**2, along**2, score, along], axis=1)
            yield Statistic(
                metric="expert_score_agreement",
                draws=matched(score.T @ along, orders),
                replicates=drawn_correlations(bootstrap, parts),
                num_tokens=num_tokens,
                parameters={"activation": name, "gauge": gauge},
            )


def drawn_correlations(bootstrap: Draws, parts: Array) -> Array:
    """[R] mean over experts of the correlation of two columns, on bootstrap draws.

    Args:
        bootstrap: Draws of the tokens.
        parts: [N, 5, E] product, squares and values of both columns.
    """
    product, square, square_b, value, value_b = np.moveaxis(bootstrap.sums(parts)[1:], 1, 0)
    count = bootstrap.sums(np.ones((len(parts), 1)))[1:]
    covariance = product - value * value_b / count
    spread = (square - value**2 / count) * (square_b - value_b**2 / count)
    return np.asarray(ratio(covariance, np.sqrt(np.maximum(spread, 0))).mean(axis=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Centroids:
    """Sums of the inputs that select each expert, in folds of the texts.

    Attributes:
        fold: [N] fold of each token.
        sums: [F, E, d].
        weights: [1 + R, F] bootstrap draws of the folds, the first takes each once.
    """

    fold: NDArray[np.int64]
    sums: Array
    weights: Array

    @classmethod
    def of(cls, inputs: Array, chosen: Array, text: NDArray[Any], *, seed: int) -> "Centroids":
        """Sum inputs [N, d] over selections [N, E], by the fold of each token's text [N]."""
        fold = block_of(text, NUM_FOLDS)
        sums = np.stack([chosen[fold == b].T @ inputs[fold == b] for b in range(NUM_FOLDS)])
        drawn = replicate_weights(np.bincount(fold, minlength=NUM_FOLDS) > 0, seed=seed)
        return cls(fold=fold, sums=sums, weights=np.vstack([np.ones(NUM_FOLDS), drawn]))


def centroid_alignment(
    rows: Mapping[str, Array], centroids: Centroids, num_tokens: int, seed: Sequence[int]
) -> Iterator[Statistic]:
    """Whether a row points to the mean of the tokens that select its expert.

    Experts that no token selects are left out.

    Args:
        rows: [E, d] router rows by gauge.
        centroids: Sums of the tokens' inputs.
        num_tokens: How many tokens these are.
        seed: Seed of the permutations.
    """
    seen = np.flatnonzero(np.linalg.norm(centroids.sums.sum(axis=0), axis=1) > 0)
    if len(seen) < 2:
        return
    parts = centroids.sums[:, seen]
    weights = centroids.weights
    orders = permutations(len(seen), seed=seed)
    squares = np.einsum("bed,ced->ebc", parts, parts, optimize=True)
    squared = np.stack([((weights @ of_expert) * weights).sum(axis=1) for of_expert in squares], 1)
    lengths = np.sqrt(np.maximum(squared, 0))  # [1 + R, E]
    for gauge, all_rows in rows.items():
        units = all_rows[seen] / np.linalg.norm(all_rows[seen], axis=1, keepdims=True)
        products = np.stack([units @ part.T for part in parts])  # [F, E, E]
        own = weights @ np.diagonal(products, axis1=1, axis2=2)  # [1 + R, E]
        columns = weights @ products.sum(axis=1)
        size = len(seen)
        matching = ratio(own, lengths).sum(axis=1)
        others = ratio(columns, lengths).sum(axis=1) - matching
        yield Statistic(
            metric="centroid_alignment",
            draws=permuted(contrast, ratio(products.sum(axis=0), lengths[0]), orders),
            replicates=(matching / size - others / (size * (size - 1)))[1:],
            num_tokens=num_tokens,
            parameters={"gauge": gauge},
        )


def centroid_overlap(
    inputs: Array,
    index: NDArray[np.int64],
    centroids: Centroids,
    bootstrap: Draws,
    seed: Sequence[int],
) -> Iterator[Statistic]:
    """How much of a token's selection lies among the experts with the nearest means.

    Each token is held against means over the other half of the texts; nothing where one half
    is empty.

    Args:
        inputs: [N, d] what the router saw.
        index: [N, K] selected experts; E or more is none.
        centroids: Sums of these inputs.
        bootstrap: Draws of these tokens.
        seed: Seed of the permutations.
    """
    num_experts = centroids.sums.shape[1]
    chosen = selected(index, num_experts)
    predicted = np.zeros_like(chosen)
    for half in range(2):
        own = np.flatnonzero(centroids.fold % 2 == half)
        means = centroids.sums[1 - half :: 2].sum(axis=0)
        if not len(own) or not means.any():
            return
        cosines = ratio(inputs[own] @ means.T, np.linalg.norm(means, axis=1))
        order = np.argsort(-np.nan_to_num(cosines, nan=-np.inf), axis=1)
        predicted[own[:, None], order[:, : index.shape[1]]] = 1
    hits = np.stack([(predicted * chosen).sum(axis=1), chosen.sum(axis=1)], axis=1)
    sums = bootstrap.sums(hits)
    orders = permutations(num_experts, seed=seed)
    yield Statistic(
        metric="centroid_overlap",
        draws=ratio(matched(chosen.T @ predicted, orders) * num_experts, chosen.sum()),
        replicates=ratio(sums[1:, 0], sums[1:, 1]),
        num_tokens=len(chosen),
    )


def contrast(matrix: Array) -> float:
    """Mean of the entries [e, e] minus the mean of all others."""
    size = len(matrix)
    own = np.trace(matrix)
    return float(own / size - (matrix.sum() - own) / (size * (size - 1)))


def ratio(above: Any, below: Any) -> NDArray[np.float64]:
    """Quotient; NaN where the divisor is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), below)
    found = np.full(above.shape, np.nan)
    np.divide(above, below, out=found, where=below != 0)
    return found
