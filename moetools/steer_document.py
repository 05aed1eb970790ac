"""What a steering run found, as plain values: the document of `--json` and of its report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.architectures import RouterSpec
from moetools.checkpoint import Checkpoint
from moetools.edits.steer import PROMOTION, Fold, stored_offsets
from moetools.interventions import RouterIntervention
from moetools.opening import OpenedModel
from moetools.probe_plan import parse_layers
from moetools.steer_data import Corpus
from moetools.steer_fold import loss_difference
from moetools.steer_options import SteerOptions
from moetools.steer_passes import NativePass, TextPass, flips
from moetools.steering import Offsets, set_agreement
from moetools.writing import WrittenCheckpoint


def setting(
    options: SteerOptions,
    opened: OpenedModel,
    specs: Sequence[RouterSpec],
    corpora: Sequence[Corpus],
) -> dict[str, Any]:
    """What is steered, and on what."""
    return {
        "format": 1,
        "model": options.model,
        "revision": opened.checkpoint.revision,
        "family": opened.checkpoint.model_type,
        "dtype": opened.dtype_name,
        "device": opened.device.type,
        "layers": [spec.layer for spec in specs],
        "layers_without_router": sorted(
            parse_layers(options.layers) - {spec.layer for spec in specs}
        ),
        "ignored_routers": dict(opened.discovery.ignored),
        "mode": options.mode,
        "deactivate": options.deactivate,
        "tau": options.tau,
        "strengths": list(options.tried),
        "seed": options.seed,
        "texts": [
            {
                "corpus": corpus.name,
                "data": list(getattr(options, corpus.name)),
                "where": list(getattr(options, f"{corpus.name}_where")),
                "num_texts": corpus.num_texts,
                "num_texts_given": corpus.num_given,
                "num_tokens": corpus.num_tokens(held_out=False),
                "num_held_out_tokens": corpus.num_tokens(held_out=True),
            }
            for corpus in corpora
        ],
        "written": {},
    }


def predictions(
    specs: Sequence[RouterSpec],
    hooks: Mapping[float, RouterIntervention],
    native: NativePass,
) -> list[dict[str, Any]]:
    """What each strength should change, by router and expert."""
    return [
        {
            "strength": strength,
            "layer": spec.layer,
            "changed": found.changed[spec.name],
            "flips": [
                {"expert": expert, "rate": float(rate)}
                for expert, rate in zip(
                    hooks[strength].experts(spec.name), found.flips[spec.name], strict=True
                )
            ],
        }
        for strength, found in native.predictions.items()
        for spec in specs
        if spec.name in found.flips
    ]


def hook_effect(
    specs: Sequence[RouterSpec],
    made: RouterIntervention,
    native: NativePass,
    hook: TextPass,
    num_predicted: NDArray[np.float64],
) -> dict[str, Any]:
    """What the hook changed on the held-out texts, beside what was predicted."""
    predicted = native.predictions[made.strength]
    rows = []
    for spec in specs:
        before, after = native.index[spec.name], hook.index[spec.name]
        moved = flips(before, after, made, spec.name).mean(axis=0)
        rates = predicted.flips.get(spec.name, ())
        rows.append(
            {
                "layer": spec.layer,
                "router": spec.name,
                "changed_predicted": predicted.changed.get(spec.name),
                "changed_measured": float((~set_agreement(before, after)).double().mean()),
                "experts": [
                    {"expert": expert, "predicted": float(was), "measured": float(now)}
                    for expert, was, now in zip(made.experts(spec.name), rates, moved, strict=True)
                ],
            }
        )
    return {
        "layers": rows,
        "num_tokens": len(next(iter(hook.index.values()))),
        **_overall(rows),
        "loss": asdict(loss_difference(hook.nll, native.nll, num_predicted)),
    }


def _overall(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over the steered routers and their experts."""
    steered_rows = [row for row in rows if row["experts"]]
    experts = [expert for row in steered_rows for expert in row["experts"]]
    return {
        "flip_rate_predicted": float(np.mean([each["predicted"] for each in experts])),
        "flip_rate_measured": float(np.mean([each["measured"] for each in experts])),
        "changed_predicted": float(np.mean([row["changed_predicted"] for row in steered_rows])),
        "changed_measured": float(np.mean([row["changed_measured"] for row in steered_rows])),
    }


def folded(checkpoint: Checkpoint, folds: Sequence[Fold]) -> list[dict[str, Any]]:
    """Which tensor takes what: `offsets` before rounding, `offsets_stored` after it.

    `offsets_stored` is None for weights; experts in `rounded_away` keep what they had.
    """
    rows = []
    for fold in folds:
        stored = stored_offsets(checkpoint, fold)
        rows.append(
            {
                "layer": fold.layer,
                "kind": fold.kind,
                "key": fold.key,
                "stored_dtype": checkpoint.tensors[fold.key].dtype,
                "offsets": _by_expert(fold.offsets),
                "offsets_stored": None if stored.offsets is None else _by_expert(stored.offsets),
                "rounded_away": list(stored.rounded_away),
                "meaning": PROMOTION[fold.kind],
            }
        )
    return rows


def _by_expert(offsets: Offsets) -> dict[str, float]:
    return {str(expert): offset for expert, offset in offsets.items()}


def parameters(
    options: SteerOptions, made: RouterIntervention, document: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the edit."""
    return {
        "mode": made.mode,
        "strength": made.strength,
        "layers": document["layers"],
        "tau": options.tau,
        "deactivate": options.deactivate,
        "promote": {name: list(each) for name, each in made.promote.items()},
        "demote": {name: list(each) for name, each in made.demote.items()},
        "target": list(options.target),
        "target_where": list(options.target_where),
        "generic": list(options.generic),
        "generic_where": list(options.generic_where),
        "tasks": options.tasks,
        "max_tokens": options.max_tokens,
        "forced": options.force,
        "fold": document["fold"],
    }


def checkpoint(written: WrittenCheckpoint) -> dict[str, Any]:
    """What was written."""
    return {
        "changed": list(written.changed),
        "rounded_away": list(written.rounded_away),
        "left_out": dict(written.left_out),
        "num_bytes": written.num_bytes,
        "notes": list(written.notes),
    }
