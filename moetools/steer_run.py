"""Find the experts of a task, promote them, and write that into a checkpoint or a file.

    find       on target and generic texts: which experts the task selects more often
    choose     a strength on development items, if several were given
    measure    what the hook does on texts and items that nothing was found on
    fold       the hook's constant form into router tensors, held against the hook
    write      a checkpoint, a patch, an intervention file; the checkpoint is loaded again

N tokens, D documents, E experts, R steered experts of a router.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from moetools.architectures import RouterSpec
from moetools.edits import steer as edit
from moetools.errors import ArchitectureError, OutputError, RequestError
from moetools.files import check_output
from moetools.interventions import (
    RouterIntervention,
    cannot_steer,
    fingerprinted,
    steered,
    write_intervention,
)
from moetools.opening import OpenedModel, open_model
from moetools.patches import write_patch
from moetools.probe_plan import parse_layers
from moetools.reporting.steer_tables import markdown
from moetools.steer_data import Corpus, Tasks, evaluation, read_corpora, read_tasks
from moetools.steer_fold import (
    Fidelity,
    FoldTarget,
    fit_directions,
    fold_target,
    folded_values,
    loss_difference,
    make_folds,
    measure,
    variations,
)
from moetools.steer_items import Arms, pooled
from moetools.steer_options import SteerOptions, check_options, pick_routers
from moetools.steer_passes import FitRecording, NativePass, SteerPasses, TextPass, flips, replaced
from moetools.steering import (
    Experts,
    expert_delta,
    pick_experts,
    selection_frequencies,
    set_agreement,
    split_half_floor,
)
from moetools.tracing import local_inputs
from moetools.writing import (
    KIND,
    WriteOptions,
    WrittenCheckpoint,
    check_destination,
    write_checkpoint,
)

INPUT_BYTES = 1 << 32
"""Memory for router inputs that a direction is fitted on."""
STEER_JSON, REPORT = "steer.json", "report.md"
ITEMS, INTERVENTION = "items.parquet", "intervention.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class SteerRun:
    """A finished steering run.

    Attributes:
        document: Everything that was found and measured, as plain values.
        intervention: The hook; None where no strength was chosen.
        items: One row per held-out item with what every arm made of it; None without tasks.
    """

    document: dict[str, Any]
    intervention: RouterIntervention | None
    items: pd.DataFrame | None

    @property
    def refusal(self) -> str | None:
        """Why weights were not written although they were asked for; None where they were."""
        found: str | None = self.document.get("refused")
        return found


def steer(
    model: str | Path,
    *,
    target: str | Sequence[str],
    generic: str | Sequence[str],
    layers: str,
    strength: float | Sequence[float] = (),
    **options: Any,
) -> SteerRun:
    """Promote the experts of a task, as `moetools steer` does.

    Args:
        model: Checkpoint folder, hub id `org/name[@revision]`, or `demo`.
        target: DATA of the task, one or several.
        generic: DATA that it is compared with.
        layers: `A:B`, both included.
        strength: One, or several to choose from.
        **options: Any other field of `SteerOptions`.

    Raises:
        MoEToolsError: The input or the request is wrong.
    """
    for name in ("out", "patch", "save_intervention"):
        if options.get(name) is not None:
            options[name] = Path(options[name])
    run = run_steer(
        SteerOptions(
            model=str(model),
            target=_several(target),
            generic=_several(generic),
            layers=layers,
            strengths=tuple(strength) if isinstance(strength, Sequence) else (strength,),
            **options,
        )
    )
    if run.refusal is not None:
        raise RequestError(run.refusal)
    return run


def run_steer(options: SteerOptions) -> SteerRun:
    """Find experts and, where asked for, choose, measure, fold and write.

    Weights that would not do what the hook does are not written; `SteerRun.refusal` says so.

    Raises:
        MoEToolsError: The input or the request is wrong; nothing is left behind.
    """
    check_options(options)
    check_outputs(options)
    opened = open_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        purpose="steered",
    )
    if options.out is not None:
        check_destination(opened.checkpoint, options.out, _write_options(options))
    specs = pick_routers(opened.routers, opened.text_config.num_hidden_layers, options)
    for spec in specs:
        reason = cannot_steer(spec)
        if reason is not None:
            raise ArchitectureError(f"Layer {spec.layer} cannot be steered: {reason}.")
    tasks = read_tasks(options)
    length = opened.sequence_length(options.sequence_length)
    corpora = read_corpora(options, opened.tokenizer, length)
    run = _Run(options, opened, specs, corpora, tasks)
    with opened.load() as model:
        run.measure(model)
    run.write()
    return SteerRun(document=run.document, intervention=run.intervention, items=run.items)


def check_outputs(options: SteerOptions) -> None:
    """Refuse places that cannot be written, before anything is read.

    Raises:
        OutputError: One of them.
    """
    inputs = local_inputs(options.model, (*options.target, *options.generic))
    if options.tasks is not None:
        inputs += local_inputs(options.tasks, ())
    if options.out is not None:
        check_output(options.out, kind=KIND, overwrite=options.overwrite, inputs=inputs)
    folders = [(Path(options.model).expanduser(), "the checkpoint")]
    if options.out is not None:
        folders.append((options.out, "--out"))
    files = (("--save-intervention", options.save_intervention), ("--patch", options.patch))
    for flag, path in files:
        if path is not None:
            _check_file(flag, path, folders, inputs, overwrite=options.overwrite)
    if options.patch is not None and options.patch == options.save_intervention:
        raise OutputError(f"--patch and --save-intervention name the same file, {options.patch}.")


def _check_file(
    flag: str,
    path: Path,
    folders: Sequence[tuple[Path, str]],
    inputs: Sequence[Path],
    *,
    overwrite: bool,
) -> None:
    real = Path(os.path.abspath(path)).resolve()
    if path.is_dir():
        raise OutputError(f"{flag} {path} is a folder. Name a file.")
    for folder, what in folders:
        if Path(os.path.abspath(folder)).resolve() in real.parents:
            raise OutputError(f"{flag} {path} lies inside {what}, {folder}. Name a file elsewhere.")
    if real in [each.resolve() for each in inputs]:
        raise OutputError(f"{flag} {path} is an input of this run. Name another file.")
    if not real.parent.is_dir():
        raise OutputError(f"{flag} {path}: there is no folder {path.parent}. Make it first.")
    if path.exists() and not overwrite:
        raise OutputError(f"{flag} {path} exists. Name a new file, or add --overwrite.")


class _Run:
    """One run, step by step; `document` fills up on the way."""

    def __init__(
        self,
        options: SteerOptions,
        opened: OpenedModel,
        specs: tuple[RouterSpec, ...],
        corpora: tuple[Corpus, Corpus],
        tasks: Tasks | None,
    ) -> None:
        self.options = options
        self.opened = opened
        self.specs = specs
        self.tasks = tasks
        self.fit_texts = evaluation(corpora, held_out=False)
        self.held_out = evaluation(corpora, held_out=True)
        self.num_target = len(corpora[0].part(held_out=False))
        predicted = np.array([row.num_scored for row in self.held_out.rows])
        self.num_predicted = self.held_out.per_document(predicted)
        self.intervention: RouterIntervention | None = None
        self.items: pd.DataFrame | None = None
        self.fidelity: Fidelity | None = None
        self._folds: list[edit.Fold] = []
        self._held_items: Arms | None = None
        self._folded: TextPass | None = None
        self.document = self._started(corpora)

    def measure(self, model: Any) -> None:
        """Everything that needs the model."""
        options = self.options
        passes = SteerPasses(
            model, self.specs, device=self.opened.device, batch_tokens=options.batch_tokens
        )
        for texts in (self.fit_texts, self.held_out):
            passes.plan(texts)
        recording = passes.fit(self.fit_texts, self._sampled())
        promote, demote = self._find(recording)
        hooks = {strength: self._hook(strength, promote, demote) for strength in options.tried}
        chosen = [spec for spec in self.specs if spec.name in {**promote, **demote}]
        targets: dict[str, FoldTarget] = {}
        directions: dict[str, Tensor] = {}
        if options.changes_weights:
            targets = {spec.name: fold_target(spec, passes) for spec in chosen}
            directions = fit_directions(targets, recording, seed=options.seed)
        native = passes.predict(self.held_out, hooks, directions)
        self._note_predictions(hooks, native)
        if not options.writes and self.tasks is None:
            return
        if self._refused(variations(chosen, native)):
            return
        strength = self._choose(model, passes, hooks)
        if strength == 0:
            return
        made = hooks[strength]
        with steered(model, self.opened, made, rules=passes.rules):
            hook = passes.again(self.held_out, "Steering with the hook")
        self._note_hook(made, native, hook)
        values: dict[str, Tensor] = {}
        if options.changes_weights:
            self._folds = make_folds(self.specs, targets, directions, recording, made)
            values = folded_values(self.opened.checkpoint, self._folds, targets)
            with replaced(model, values):
                self._folded = passes.again(self.held_out, "Trying the folded weights")
            self.fidelity = measure(
                self.specs, targets, native, hook, self._folded, self.num_predicted
            )
            self._note_folds(self.fidelity)
            if self._refused(self.fidelity.objections):
                return
        self.intervention = made
        if self.tasks is not None:
            self._measure_items(model, passes, made, values)

    def _refused(self, objections: Sequence[str]) -> bool:
        """Whether something is wrong that was not accepted with `--force`."""
        if objections and not self.options.force:
            others = len(objections) - 1
            more = f" (and {others} more)" if others else ""
            self.document["refused"] = (
                f"Not written: {objections[0]}{more}. Keep the hook with --save-intervention, "
                "leave the layer out of --layers, or write anyway with --force."
            )
            return True
        return False

    def write(self) -> None:
        """Write what was asked for; a checkpoint is loaded again and compared."""
        options, made = self.options, self.intervention
        if made is None:
            return
        if options.changes_weights:
            self._write_weights(made)
        if options.save_intervention is not None:
            write_intervention(options.save_intervention, made)
            self._note_written("intervention", options.save_intervention)

    def _write_weights(self, made: RouterIntervention) -> None:
        options = self.options
        assert self.fidelity is not None
        plan = edit.plan(
            self.opened.checkpoint,
            self._folds,
            parameters=self._parameters(made),
            metrics={"fidelity": self.fidelity.to_json()},
            seed=options.seed,
            attachments=self._attachments(made),
        )
        if options.out is None:
            assert options.patch is not None
            write_patch(plan, options.patch, overwrite=options.overwrite)
            self._note_written("patch", options.patch)
            return
        written = write_checkpoint(plan, options.out, options=_write_options(options))
        self._note_written("checkpoint", options.out)
        if options.patch is not None:
            self._note_written("patch", options.patch)
        self._note_checkpoint(written)
        self.document["loaded_again"] = self._load_again(options.out)

    def _started(self, corpora: Sequence[Corpus]) -> dict[str, Any]:
        options, opened = self.options, self.opened
        return {
            "format": 1,
            "model": options.model,
            "revision": opened.checkpoint.revision,
            "family": opened.checkpoint.model_type,
            "dtype": opened.dtype_name,
            "device": opened.device.type,
            "layers": [spec.layer for spec in self.specs],
            "layers_without_router": sorted(
                parse_layers(options.layers) - {spec.layer for spec in self.specs}
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
                    "num_tokens": corpus.num_tokens(held_out=False),
                    "num_held_out_tokens": corpus.num_tokens(held_out=True),
                }
                for corpus in corpora
            ],
            "written": {},
        }

    def _sampled(self) -> NDArray[np.bool_]:
        """[N] tokens whose router inputs are kept, for the directions of folds."""
        num_tokens = self.fit_texts.num_tokens
        kept = np.zeros(num_tokens, dtype=np.bool_)
        if self.options.changes_weights:
            width = self.opened.text_config.hidden_size * self.opened.dtype.itemsize
            limit = min(num_tokens, INPUT_BYTES // (width * len(self.specs)))
            generator = np.random.default_rng(self.options.seed)
            kept[generator.permutation(num_tokens)[:limit]] = True
        return kept

    def _find(self, recording: FitRecording) -> tuple[Experts, Experts]:
        """Experts to promote and to demote, by router.

        Raises:
            RequestError: None, all of a router, or more than hard steering can handle.
        """
        options, texts, split = self.options, self.fit_texts, self.num_target
        labels = texts.document
        delta, floor = {}, {}
        for spec in self.specs:
            of_rows = selection_frequencies(
                recording.ids[spec.name], texts.starts, spec.num_experts
            )
            target, generic = of_rows[:split], of_rows[split:]
            delta[spec.name] = expert_delta(target, generic)
            floor[spec.name] = split_half_floor(
                target,
                generic,
                seed=options.seed,
                target_texts=labels[:split],
                generic_texts=labels[split:],
            )
        sign = -1 if options.deactivate else 1
        top_k = {spec.name: spec.top_k for spec in self.specs}
        tau: Any = options.tau
        chosen = pick_experts(
            {name: sign * each for name, each in delta.items()}, tau=tau, floor=floor, top_k=top_k
        )
        self.document["identification"] = [
            {
                "router": spec.name,
                "layer": spec.layer,
                "num_experts": spec.num_experts,
                "top_k": spec.top_k,
                "floor": floor[spec.name],
                "largest_delta": float((sign * delta[spec.name]).max()) * sign,
                "experts": [
                    {"expert": expert, "delta": float(delta[spec.name][expert])}
                    for expert in chosen.get(spec.name, ())
                ],
            }
            for spec in self.specs
        ]
        self._check_numbers(chosen)
        return ({}, chosen) if options.deactivate else (chosen, {})

    def _check_numbers(self, chosen: Experts) -> None:
        for spec in self.specs:
            number = len(chosen.get(spec.name, ()))
            if self.options.deactivate and number > spec.num_experts - spec.top_k:
                raise RequestError(
                    f"--tau {self.options.tau} demotes {number} of the {spec.num_experts} experts "
                    f"of layer {spec.layer}, where a token selects {spec.top_k}. Choose a larger "
                    "one, or auto."
                )
            if self.options.mode == "hard" and not self.options.deactivate and number > spec.top_k:
                raise RequestError(
                    f"--mode hard: --tau {self.options.tau} selects {number} experts of layer "
                    f"{spec.layer}, where a token selects {spec.top_k}: more derail the model. "
                    "Choose a larger --tau, or auto."
                )

    def _hook(self, strength: float, promote: Experts, demote: Experts) -> RouterIntervention:
        made = RouterIntervention(
            mode="hard" if self.options.mode == "hard" else "soft",
            strength=strength,
            promote=promote,
            demote=demote,
            seed=self.options.seed,
        )
        return fingerprinted(made, self.opened.checkpoint, self.opened.routers)

    def _note_predictions(
        self, hooks: Mapping[float, RouterIntervention], native: NativePass
    ) -> None:
        """What each strength should change, by router and expert."""
        self.document["num_held_out_tokens"] = self.held_out.num_tokens
        self.document["predicted"] = [
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
            for spec in self.specs
            if spec.name in found.flips
        ]

    def _note_hook(self, made: RouterIntervention, native: NativePass, hook: TextPass) -> None:
        """What the hook changed, beside what was predicted."""
        predicted = native.predictions[made.strength]
        rows = []
        for spec in self.specs:
            before, after = native.index[spec.name], hook.index[spec.name]
            moved = flips(before, after, made, spec.name).mean(axis=0)
            changed = float((~set_agreement(before, after)).double().mean())
            rows.append(
                {
                    "layer": spec.layer,
                    "router": spec.name,
                    "changed_predicted": predicted.changed.get(spec.name),
                    "changed_measured": changed,
                    "experts": [
                        {"expert": expert, "predicted": float(was), "measured": float(now)}
                        for expert, was, now in zip(
                            made.experts(spec.name),
                            predicted.flips.get(spec.name, ()),
                            moved,
                            strict=True,
                        )
                    ],
                }
            )
        self.document["strength"] = made.strength
        self.document["measured"] = {
            "layers": rows,
            "num_tokens": self.held_out.num_tokens,
            **_overall(rows),
            "loss": asdict(loss_difference(hook.nll, native.nll, self.num_predicted)),
        }

    def _note_folds(self, fidelity: Fidelity) -> None:
        """What was folded where, and how close that is to the hook."""
        self.document["fold"] = [
            {
                "layer": fold.layer,
                "kind": fold.kind,
                "key": fold.key,
                "offsets": {str(expert): offset for expert, offset in fold.offsets.items()},
                "meaning": edit.PROMOTION[fold.kind],
            }
            for fold in self._folds
        ]
        self.document["fidelity"] = fidelity.to_json()

    def _choose(
        self, model: Any, passes: SteerPasses, hooks: Mapping[float, RouterIntervention]
    ) -> float:
        """The strength with the best development accuracy; 0, no steering, is a candidate.

        One strength alone is not chosen but taken. Of equal ones the smallest wins.
        """
        if self.tasks is None:
            return next(iter(hooks))
        tasks = self.tasks
        self.document["tasks"] = {
            "data": self.options.tasks,
            "how": tasks.how,
            "num_dev_items": len(tasks.dev),
            "num_test_items": len(tasks.test),
        }
        if len(hooks) == 1:
            return next(iter(hooks))
        arms = Arms(tasks.dev, self.opened, batch_tokens=self.options.batch_tokens)
        names = {0.0: "no steering"} | {strength: f"strength {strength:g}" for strength in hooks}
        arms.add(names[0.0], model)
        for strength, made in hooks.items():
            with steered(model, self.opened, made, rules=passes.rules):
                arms.add(names[strength], model)
        accuracy = {strength: arms.accuracy(name) for strength, name in names.items()}
        chosen = max(sorted(accuracy), key=lambda strength: accuracy[strength])
        changes = {
            strength: pooled(arms.compare(names[0.0], name, seed=self.options.seed))
            for strength, name in names.items()
        }
        self.document["sweep"] = {
            "chosen": chosen,
            "criterion": "accuracy on the development items, mean over their groups",
            "strengths": [
                {
                    "strength": strength,
                    "accuracy": accuracy[strength],
                    "gained": changes[strength]["gained"],
                    "lost": changes[strength]["lost"],
                }
                for strength in names
            ],
        }
        self.document["strength"] = chosen
        return chosen

    def _measure_items(
        self,
        model: Any,
        passes: SteerPasses,
        made: RouterIntervention,
        values: Mapping[str, Tensor],
    ) -> None:
        """Hold the arms against each other on the held-out items."""
        assert self.tasks is not None
        arms = Arms(self.tasks.test, self.opened, batch_tokens=self.options.batch_tokens)
        arms.add("base", model)
        with steered(model, self.opened, made, rules=passes.rules):
            arms.add("hook", model)
        pairs = [("base", "hook")]
        if values:
            with replaced(model, values):
                arms.add("folded", model)
            pairs += [("base", "folded"), ("hook", "folded")]
        self.document["items"] = [
            arms.compare(first, second, seed=self.options.seed) for first, second in pairs
        ]
        self.items = arms.table()
        self._held_items = arms

    def _parameters(self, made: RouterIntervention) -> dict[str, Any]:
        options = self.options
        return {
            "mode": made.mode,
            "strength": made.strength,
            "layers": self.document["layers"],
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
            "fold": self.document["fold"],
        }

    def _attachments(self, made: RouterIntervention) -> dict[str, bytes]:
        files = {
            STEER_JSON: _json_bytes(self.document),
            REPORT: markdown(self.document).encode(),
            INTERVENTION: _json_bytes(made.to_json()),
        }
        if self.items is not None:
            buffer = io.BytesIO()
            self.items.to_parquet(buffer, index=False)
            files[ITEMS] = buffer.getvalue()
        return files

    def _note_written(self, what: str, path: Path) -> None:
        self.document["written"][what] = str(path)

    def _note_checkpoint(self, written: WrittenCheckpoint) -> None:
        self.document["checkpoint"] = {
            "changed": list(written.changed),
            "rounded_away": list(written.rounded_away),
            "left_out": dict(written.left_out),
            "num_bytes": written.num_bytes,
            "notes": list(written.notes),
        }

    def _load_again(self, out: Path) -> dict[str, Any]:
        """Hold the written checkpoint against the folded weights that were tried."""
        again = open_model(
            str(out),
            device=self.options.device,
            dtype=self.opened.dtype_name,
            trust_remote_code=self.options.trust_remote_code,
        )
        assert self._folded is not None
        with again.load() as model:
            passes = SteerPasses(
                model,
                self.specs,
                device=again.device,
                batch_tokens=self.options.batch_tokens,
            )
            found = passes.again(self.held_out, "Running the written checkpoint")
            difference = np.abs(found.nll - self._folded.nll).sum() / self.num_predicted.sum()
            result: dict[str, Any] = {"loss_difference": float(difference)}
            if self._held_items is not None:
                self._held_items.add("written", model)
                found_items = self._held_items.compare("folded", "written", seed=self.options.seed)
                names = ("differing_items", "num_items", "loglik_apart")
                result |= {name: found_items[name] for name in names}
        return result


def _write_options(options: SteerOptions) -> WriteOptions:
    return WriteOptions(
        overwrite=options.overwrite,
        link=options.link,
        carry_all=options.carry_all,
        keep_originals=options.keep_originals,
        patch=options.patch,
    )


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


def _json_bytes(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _several(data: str | Sequence[str]) -> tuple[str, ...]:
    return (data,) if isinstance(data, str) else tuple(data)
