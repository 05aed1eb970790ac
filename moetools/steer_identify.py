"""Which experts a steering run promotes or demotes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.architectures import RouterSpec
from moetools.errors import RequestError
from moetools.probe_passes import Evaluation
from moetools.steer_options import SteerOptions
from moetools.steer_passes import FitRecording
from moetools.steering import (
    Experts,
    expert_delta,
    pick_experts,
    selection_frequencies,
    split_half_floor,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Identification:
    """Experts by router, and what they were chosen by.

    Attributes:
        promote, demote: Router -> experts; one of both is empty.
        delta: Router -> [E] mean frequency in target minus generic texts.
        floor: Router -> how large the largest |delta| gets by the choice of texts alone.
    """

    promote: Experts
    demote: Experts
    delta: Mapping[str, NDArray[np.float64]]
    floor: Mapping[str, float]

    def to_json(self, specs: Sequence[RouterSpec]) -> list[dict[str, Any]]:
        """One entry per router, as plain values."""
        chosen = self.demote or self.promote
        sign = -1 if self.demote else 1
        return [
            {
                "router": spec.name,
                "layer": spec.layer,
                "num_experts": spec.num_experts,
                "top_k": spec.top_k,
                "floor": self.floor[spec.name],
                "largest_delta": sign * float((sign * self.delta[spec.name]).max()),
                "experts": [
                    {"expert": expert, "delta": float(self.delta[spec.name][expert])}
                    for expert in chosen.get(spec.name, ())
                ],
            }
            for spec in specs
        ]


def identify(
    specs: Sequence[RouterSpec],
    recording: FitRecording,
    texts: Evaluation,
    num_target: int,
    options: SteerOptions,
) -> Identification:
    """Experts that the target selects more often than generic text, or less often.

    Args:
        specs: The routers of the steered layers.
        recording: Of `texts`.
        texts: Target sequences, then generic ones.
        num_target: How many of them are target sequences.
        options: What is chosen, and by what.

    Raises:
        RequestError: None, all of a router, or more than can be steered in this mode.
    """
    labels = texts.document
    delta, floor = {}, {}
    for spec in specs:
        of_rows = selection_frequencies(recording.ids[spec.name], texts.starts, spec.num_experts)
        target, generic = of_rows[:num_target], of_rows[num_target:]
        delta[spec.name] = expert_delta(target, generic)
        floor[spec.name] = split_half_floor(
            target,
            generic,
            seed=options.seed,
            target_texts=labels[:num_target],
            generic_texts=labels[num_target:],
        )
    sign = -1 if options.deactivate else 1
    chosen = pick_experts(
        {name: sign * each for name, each in delta.items()},
        tau=options.tau,
        floor=floor,
        top_k={spec.name: spec.top_k for spec in specs},
    )
    for spec in specs:
        _check_number(spec, len(chosen.get(spec.name, ())), options)
    return Identification(
        promote={} if options.deactivate else chosen,
        demote=chosen if options.deactivate else {},
        delta=delta,
        floor=floor,
    )


def _check_number(spec: RouterSpec, number: int, options: SteerOptions) -> None:
    """Refuse sets that leave a token too few experts, or more than it can select."""
    if options.deactivate and number > spec.num_experts - spec.top_k:
        raise RequestError(
            f"--tau {options.tau} demotes {number} of the {spec.num_experts} experts of layer "
            f"{spec.layer}, where a token selects {spec.top_k}. Choose a larger one, or auto."
        )
    if options.mode == "hard" and not options.deactivate and number > spec.top_k:
        raise RequestError(
            f"--mode hard: --tau {options.tau} selects {number} experts of layer {spec.layer}, "
            f"where a token selects {spec.top_k}: more derail the model. Choose a larger --tau, or "
            "auto."
        )
