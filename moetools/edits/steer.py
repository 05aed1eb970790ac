"""Promote or demote experts in a checkpoint itself: soft steering, folded into router tensors.

The hook adds strength * s(z) to the logits of chosen experts, with s(z) the standard deviation of a
token's logits. On disk a constant takes its place, strength * mean s(z):

    logit bias       added to it; exact where s(z) is constant. Gates change as with the hook.
    selection bias   added to it, in units of the scores that the bias is added to. Experts are
                     selected more often, but their gates relative to each other stay: a
                     promotion like that of hard steering.
    weight           rows of the chosen experts move along u with u.x close to 1 for router inputs
                     x, so that the logit gains the constant. Gates change as with the hook.

Source:
    Soft steering: Bandarkar et al., "Multilingual Routing in Mixture-of-Experts", arXiv
    2510.04694, eq. 4. Folding it into weights is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

from torch import Tensor

from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.errors import RequestError
from moetools.steering import Offsets, fold_into_bias, folded_weight

FoldKind = Literal["logit bias", "selection bias", "weight"]

PROMOTION: Mapping[FoldKind, str] = {
    "logit bias": "as a logit bias: selection and gates change, as with the hook",
    "selection bias": "as a selection bias: chosen more often, gates relative to each other stay "
    "(like hard steering)",
    "weight": "along a direction of the router inputs: selection and gates change, as with "
    "the hook",
}
"""What a fold does, in words."""

FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """One tensor of one router that changes.

    Attributes:
        router: Name of the router.
        layer: Its decoder block.
        kind: Which of its tensors.
        key: Key of that tensor on disk.
        offsets: Expert -> what is added to its logit, or to its selection score.
        direction: [H] u, for a weight.
    """

    router: str
    layer: int
    kind: FoldKind
    key: str
    offsets: Offsets
    direction: Tensor | None = None


def plan(
    checkpoint: Checkpoint,
    folds: Sequence[Fold],
    *,
    parameters: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    seed: int | None = None,
    attachments: Mapping[str, bytes] | None = None,
) -> EditPlan:
    """The checkpoint with folded steering; nothing is written.

    Args:
        checkpoint: What is steered.
        folds: At least one, each with a key of its own.
        parameters: What decided them, as plain JSON values.
        metrics: What was measured, as plain JSON values.
        seed: Of what was drawn to find them.
        attachments: Files to keep with the provenance.

    Raises:
        RequestError: There is no fold, two share a tensor, or a tensor is not of a floating type.
    """
    if not folds:
        raise RequestError("Nothing to write: no expert was chosen in any layer.")
    check_stored(checkpoint, [fold.key for fold in folds])
    return EditPlan(
        checkpoint=checkpoint,
        changes={fold.key: _change(checkpoint, fold) for fold in folds},
        attachments=dict(attachments or {}),
        record=EditRecord(
            method="steer",
            parameters=parameters,
            seed=seed,
            metrics=metrics or {},
            model=checkpoint.name,
            revision=checkpoint.revision,
            version=version("moetools"),
        ),
    )


def check_stored(checkpoint: Checkpoint, keys: Sequence[str]) -> None:
    """Refuse tensors that nothing can be added to.

    Args:
        checkpoint: What is steered.
        keys: Of tensors that are to take a fold.

    Raises:
        RequestError: One is not of a floating type, or takes two folds.
    """
    for key in keys:
        if keys.count(key) > 1:
            raise RequestError(
                f"{checkpoint.name}: several layers share {key}, so they cannot be steered apart. "
                "Use --save-intervention instead of writing weights."
            )
        if checkpoint.tensors[key].dtype not in FLOATS:
            raise RequestError(
                f"{checkpoint.name}: {key} is stored as {checkpoint.tensors[key].dtype}, which a "
                "small change cannot be added to. Use --save-intervention instead of writing "
                "weights."
            )


def folded_tensor(checkpoint: Checkpoint, fold: Fold) -> Tensor:
    """The tensor with the fold, in the dtype and shape that it has on disk.

    Raises:
        ValueError: A weight without a direction, or with one of another length.
    """
    original = checkpoint.tensor(fold.key)
    if fold.kind != "weight":
        return fold_into_bias(original, fold.offsets)
    if fold.direction is None or original.shape[1:] != fold.direction.shape:
        raise ValueError(f"{fold.key}: a weight [E, H] needs a direction [H]")
    return folded_weight(original, fold.direction, fold.offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredOffsets:
    """What a fold really adds, after rounding to the dtype on disk.

    Attributes:
        offsets: Expert -> what its bias gains; None for a weight, whose rows round one by one.
        rounded_away: Experts for which nothing changes.
    """

    offsets: Offsets | None
    rounded_away: tuple[int, ...]


def stored_offsets(checkpoint: Checkpoint, fold: Fold) -> StoredOffsets:
    """What a fold really adds."""
    before, after = checkpoint.tensor(fold.key).double(), folded_tensor(checkpoint, fold).double()
    if fold.kind != "weight":
        before, after = before.reshape(-1), after.reshape(-1)
    changes = {expert: after[expert] - before[expert] for expert in fold.offsets}
    return StoredOffsets(
        offsets=None
        if fold.kind == "weight"
        else {expert: float(change) for expert, change in changes.items()},
        rounded_away=tuple(expert for expert, change in changes.items() if not change.any()),
    )


def _change(checkpoint: Checkpoint, fold: Fold) -> TensorChange:
    info = checkpoint.tensors[fold.key]
    return TensorChange.of(
        lambda: folded_tensor(checkpoint, fold), dtype=info.dtype, shape=info.shape
    )
