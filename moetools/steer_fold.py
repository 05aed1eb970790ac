"""Fold steering into router tensors, and measure how close that comes to the hook.

A fold is refused where it does not do what the hook does: where u.x varies too much, where it
selects another set than the hook too often, or where leaving the weights alone selects the hook's
set as often.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moetools.architectures import RouterSpec
from moetools.checkpoint import Checkpoint
from moetools.edits.steer import Fold, FoldKind, folded_tensor
from moetools.equivalence import ratio_values, tost_paired
from moetools.errors import RequestError
from moetools.interventions import RouterIntervention
from moetools.steer_passes import FitRecording, NativePass, SteerPasses, TextPass
from moetools.steering import fold_direction, pick_ridge, set_agreement

MAX_VARIATION = 0.2
MIN_AGREEMENT = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldTarget:
    """Which tensor of a router takes the fold.

    Attributes:
        kind: What it is.
        key: On disk.
        name: In the model.
    """

    kind: FoldKind
    key: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFidelity:
    """How close a folded router comes to the hook, on held-out tokens.

    Attributes:
        router, layer: Which router.
        kind: Which tensor took the fold; None where no expert of it was chosen.
        mean, std: Of u.x; None unless a weight took it.
        variation: std / |mean|.
        agreement: Share of the tokens for which the folded model selects the hook's set.
        agreement_without: The same for the unchanged model.
        num_tokens: Held-out tokens.
    """

    router: str
    layer: int
    kind: FoldKind | None
    mean: float | None
    std: float | None
    variation: float | None
    agreement: float
    agreement_without: float
    num_tokens: int

    @property
    def objection(self) -> str | None:
        """What is wrong with the fold, with the number; None where nothing is."""
        if self.kind is None:
            return None
        where = f"layer {self.layer}"
        if self.variation is not None and self.variation > MAX_VARIATION:
            return _too_variable(self.layer, self.variation)
        if self.agreement < MIN_AGREEMENT:
            return (
                f"{where}: the folded router selects the hook's set for {self.agreement:.1%} of "
                f"the tokens, below {MIN_AGREEMENT:.0%}"
            )
        if self.agreement <= self.agreement_without < 1 or self.agreement < self.agreement_without:
            return (
                f"{where}: the folded router selects the hook's set for {self.agreement:.1%} of "
                f"the tokens, no better than the {self.agreement_without:.1%} without an edit"
            )
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDifference:
    """Negative log-likelihood of one arm minus another on the held-out texts.

    Attributes:
        value: Nats per predicted token.
        low, high: 95 % interval over texts; None with fewer than two.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How close the folded model comes to the hook.

    Attributes:
        layers: Every router of the steered layers.
        loss: Folded minus hook.
        folded_loss: Folded minus unchanged.
    """

    layers: tuple[LayerFidelity, ...]
    loss: LossDifference
    folded_loss: LossDifference

    @property
    def objections(self) -> list[str]:
        """What is wrong, by layer."""
        return [each for each in (layer.objection for layer in self.layers) if each is not None]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        layers = [{**asdict(each), "objection": each.objection} for each in self.layers]
        return {
            "layers": layers,
            "loss": asdict(self.loss),
            "folded_loss": asdict(self.folded_loss),
            "max_variation": MAX_VARIATION,
            "min_agreement": MIN_AGREEMENT,
        }


def fold_target(spec: RouterSpec, passes: SteerPasses) -> FoldTarget:
    """The tensor of a router that takes the fold: a bias if it has one that selects."""
    if spec.bias_key is not None:
        name = spec.weight_name.removesuffix("weight") + "bias"
        return FoldTarget(kind="logit bias", key=spec.bias_key, name=name)
    if spec.correction_bias_key is not None and passes.adds_bias(spec):
        return FoldTarget(
            kind="selection bias",
            key=spec.correction_bias_key,
            name=required_name(spec.correction_bias_name),
        )
    return FoldTarget(kind="weight", key=spec.weight_key, name=spec.weight_name)


def fit_directions(
    targets: Mapping[str, FoldTarget], recording: FitRecording, *, seed: int
) -> dict[str, Tensor]:
    """Router -> [H] u with u.x close to 1, for the routers whose weight takes the fold.

    Raises:
        RequestError: The logits of a router are not its weight times its inputs.
    """
    directions = {}
    for name, target in targets.items():
        if target.kind != "weight":
            continue
        if not recording.is_linear[name]:
            raise RequestError(
                f"Router {name} transforms its inputs before its weight, so steering cannot be "
                "folded into it. Use --save-intervention instead of writing weights."
            )
        inputs = recording.inputs[name]
        directions[name] = fold_direction(inputs, pick_ridge(inputs, seed=seed))
    return directions


def make_folds(
    specs: Sequence[RouterSpec],
    targets: Mapping[str, FoldTarget],
    directions: Mapping[str, Tensor],
    recording: FitRecording,
    intervention: RouterIntervention,
) -> list[Fold]:
    """The constant form of soft steering: strength times the mean spread for chosen experts."""
    folds = []
    for spec in specs:
        if spec.name not in targets:
            continue
        target = targets[spec.name]
        spreads = recording.mean_spread
        if target.kind == "selection bias":
            spreads = recording.mean_score_spread
        step = intervention.strength * spreads[spec.name]
        folds.append(
            Fold(
                router=spec.name,
                layer=spec.layer,
                kind=target.kind,
                key=target.key,
                offsets={
                    **dict.fromkeys(intervention.promote.get(spec.name, ()), step),
                    **dict.fromkeys(intervention.demote.get(spec.name, ()), -step),
                },
                direction=directions.get(spec.name),
            )
        )
    return folds


def folded_values(
    checkpoint: Checkpoint, folds: Sequence[Fold], targets: Mapping[str, FoldTarget]
) -> dict[str, Tensor]:
    """Name in the model -> folded tensor, rounded as it will be on disk."""
    return {targets[fold.router].name: folded_tensor(checkpoint, fold) for fold in folds}


def variations(specs: Sequence[RouterSpec], native: NativePass) -> list[str]:
    """What is wrong with the directions of folds, before a strength is chosen."""
    found = []
    for spec in specs:
        if spec.name in native.products:
            variation = _quality(native.products[spec.name])[2]
            if variation > MAX_VARIATION:
                found.append(_too_variable(spec.layer, variation))
    return found


def _too_variable(layer: int, variation: float) -> str:
    return (
        f"layer {layer}: the coefficient of variation of u.x is {variation:.2f}, above "
        f"{MAX_VARIATION:g}"
    )


def _quality(products: Tensor) -> tuple[float, float, float]:
    """Mean, standard deviation and coefficient of variation of u.x."""
    mean, std = float(products.mean()), float(products.std(correction=0))
    return mean, std, std / max(abs(mean), 1e-12)


def measure(
    specs: Sequence[RouterSpec],
    targets: Mapping[str, FoldTarget],
    native: NativePass,
    hook: TextPass,
    folded: TextPass,
    num_predicted: NDArray[np.float64],
) -> Fidelity:
    """Hold the folded model against the hook.

    Args:
        specs: The routers of the steered layers.
        targets: Of those with chosen experts.
        native: The unchanged model.
        hook: The model with the hook.
        folded: The model with folded tensors.
        num_predicted: [D] predicted tokens of each document.
    """
    layers = []
    for spec in specs:
        products = native.products.get(spec.name)
        mean = std = variation = None
        if products is not None:
            mean, std, variation = _quality(products)
        agreement, without = (
            float(set_agreement(each.index[spec.name], hook.index[spec.name]).double().mean())
            for each in (folded, native)
        )
        layers.append(
            LayerFidelity(
                router=spec.name,
                layer=spec.layer,
                kind=targets[spec.name].kind if spec.name in targets else None,
                mean=mean,
                std=std,
                variation=variation,
                agreement=agreement,
                agreement_without=without,
                num_tokens=len(hook.index[spec.name]),
            )
        )
    return Fidelity(
        layers=tuple(layers),
        loss=loss_difference(folded.nll, hook.nll, num_predicted),
        folded_loss=loss_difference(folded.nll, native.nll, num_predicted),
    )


def loss_difference(
    nll: NDArray[np.float64], other: NDArray[np.float64], num_predicted: NDArray[np.float64]
) -> LossDifference:
    """Mean difference per predicted token, with its interval over documents.

    Args:
        nll: [D] sums in nats.
        other: [D] what is taken off.
        num_predicted: [D] predicted tokens; documents without any do not count.
    """
    some = num_predicted > 0
    test = tost_paired(ratio_values((nll - other)[some], num_predicted[some]), margin=1.0)
    low, high = test.interval()
    ends = [None if np.isnan(end) else float(end) for end in (low, high)]
    return LossDifference(value=float(test.difference), low=ends[0], high=ends[1])


def required_name(name: str | None) -> str:
    """The name.

    Raises:
        ValueError: It is None.
    """
    if name is None:
        raise ValueError("a router with a selection bias on disk has it in memory, too")
    return name
