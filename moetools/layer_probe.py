"""What the learned routing of each layer is worth: change it, and see how much worse a model gets.

The model runs once as it is, which gives the routes of every probed router. Then, layer by layer,
every operator and seed runs it again from that layer on. A set of layers is changed at once, with
selections made of what the unchanged model selected in each of them.

N tokens of the evaluation data, D documents, K experts per token, E experts, V vocabulary.
"""

import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moetools import console
from moetools.batching import (
    TokenSequence,
    fingerprint,
    make_sequences,
    tokenise,
)
from moetools.checkpoint import Checkpoint
from moetools.errors import DataError, OutputError
from moetools.files import OutputFolder, atomic_file, check_output, output_folder, write_json
from moetools.items import Item, read_items
from moetools.opening import open_model
from moetools.probe_passes import Passes, ProbeData, task_evaluation, text_evaluation
from moetools.probe_plan import Job, ProbeOptions, check_options, plan_jobs
from moetools.probe_results import Native, probe_results
from moetools.probing import (
    OPERATORS,
)
from moetools.scoring import ScoredRow, choice_rows
from moetools.texts import read_texts
from moetools.tracing import OFFLOAD, local_inputs

STARTED = "started.json"
NATIVE = "native.json"
DOCUMENTS = "documents"
ITEMS = "items"
PICTURE = "probe.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeRun:
    """A finished probe.

    Attributes:
        summary: What was probed on what, as plain values.
        results: One row per layer or set of layers, operator and weight policy; see
            `moetools.probe_results`.
        native: The unchanged model on the same data.
    """

    summary: dict[str, Any]
    results: pd.DataFrame
    native: Native

    def to_json(self) -> dict[str, Any]:
        """The summary with the results as `records`; null where there is no value."""
        rows = self.results.astype(object).where(self.results.notna(), None)
        return {**self.summary, "results": rows.to_dict("records")}


def probe(
    model: str | Path, *, data: str | Sequence[str], out: str | Path | None = None, **options: Any
) -> ProbeRun:
    """Measure what the learned routing of each layer is worth, as `moetools probe` does.

    Args:
        model: Checkpoint folder, hub id `org/name[@revision]`, or `demo`.
        data: One or several `[GROUP=]DATA`.
        out: Folder to write; None writes nothing.
        **options: Any other field of `ProbeOptions`.

    Raises:
        MoEToolsError: The input or the request is wrong.
    """
    sources = (data,) if isinstance(data, str) else tuple(data)
    out = None if out is None else Path(out)
    return run_probe(ProbeOptions(model=str(model), data=sources, out=out, **options))


def run_probe(options: ProbeOptions) -> ProbeRun:
    """Probe a model.

    Raises:
        MoEToolsError: The input or the request is wrong; nothing is left behind, or what is left
            can be resumed.
    """
    check_options(options)
    claim: dict[str, Any] = {
        "kind": "probe",
        "overwrite": options.overwrite,
        "resume": options.resume,
        "resumable": True,
        "inputs": _inputs(options),
    }
    if options.out is not None:
        check_output(options.out, **claim)
    opened = open_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        purpose="probed",
    )
    tokenizer, device = opened.tokenizer, opened.device
    jobs, notes = plan_jobs(opened.routers, opened.text_config.num_hidden_layers, options)
    length = opened.sequence_length(options.sequence_length)
    sequences = _sequences(options.data, tokenizer, length, options)
    calibration = []
    if options.calibration:
        calibration = _sequences(options.calibration, tokenizer, length, options)
    items: list[Item] = []
    rows: list[ScoredRow] = []
    if options.tasks is not None:
        items = read_items(options.tasks)
        rows = choice_rows(items, tokenizer, limit=opened.num_positions)
    data = ProbeData(
        texts=text_evaluation(sequences),
        tasks=task_evaluation(items, rows),
        items=items,
        calibration=text_evaluation(calibration),
    )
    summary = _summary(options, opened.checkpoint, sequences, data, opened.dtype_name, device.type)
    started = _started(options, summary, sequences, calibration, data)
    output = nullcontext() if options.out is None else output_folder(options.out, **claim)
    with output as folder:
        store = _Store(folder, started)
        missing = [job for job in jobs if not store.has(job)]
        missing.sort(key=lambda job: job.first)
        if missing:
            scratch = None if folder is None else folder.path / OFFLOAD
            with opened.load(scratch=scratch) as model:
                run = Passes(model, options, data, missing, device)
                store.begin({"notes": [*notes, *run.prepare()], **run.native_values()})
                with console.progress("Probing", run.num_tokens, "tokens") as meter:
                    for job in missing:
                        store.add(job, *run.probe(job, meter))
                store.note(run.notes)
        native = store.native()
        results = probe_results(*store.tables(jobs), native)
        summary |= {
            "native_nll": native.nll_per_token,
            "native_accuracy": native.accuracy,
            "margin_nll": native.margin,
            "notes": store.begun["notes"],
        }
        finished = ProbeRun(summary=summary, results=_with_layer(results), native=native)
        if folder is not None:
            _write(folder.path, finished)
    return finished


def _inputs(options: ProbeOptions) -> list[Path]:
    found = local_inputs(options.model, (*options.data, *options.calibration))
    return found if options.tasks is None else [*found, options.tasks]


def _sequences(
    data: tuple[str, ...], tokenizer: Any, sequence_length: int, options: ProbeOptions
) -> list[TokenSequence]:
    texts = read_texts(
        data,
        text_column=options.text_column,
        group_column=options.group_column,
        count_tokens=lambda texts: sum(map(len, tokenise(texts, tokenizer))),
        hub_tokens=options.max_tokens,
    ).texts
    return make_sequences(
        texts, tokenizer, sequence_length=sequence_length, max_tokens=options.max_tokens
    )


class _Store:
    """Results of finished jobs, in a folder or, without one, in memory.

    Raises:
        OutputError: The folder holds a run that was started differently.
    """

    def __init__(self, folder: OutputFolder | None, started: dict[str, Any]) -> None:
        self._path = None if folder is None else folder.path
        self._memory: dict[str, tuple[pd.DataFrame, pd.DataFrame | None]] = {}
        self.begun: dict[str, Any] = {}
        if self._path is None:
            return
        file = self._path / STARTED
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            differing = [name for name in started if before.get(name) != started[name]]
            if differing:
                raise OutputError(
                    f"--resume: {self._path} was started with another "
                    f"{', '.join(differing)}. Use the same options, model and data, or start "
                    "again with --overwrite."
                )
        else:
            write_json(file, started)
        native = self._path / NATIVE
        if native.exists():
            self.begun = json.loads(native.read_text(encoding="utf-8"))

    def has(self, job: Job) -> bool:
        """Whether a job is finished."""
        return self._path is not None and (self._path / DOCUMENTS / job.file).exists()

    def begin(self, values: dict[str, Any]) -> None:
        """Keep what the unchanged model did; a resumed run keeps what it was first."""
        if not self.begun:
            self.begun = values
            self._save()

    def note(self, notes: Sequence[str]) -> None:
        """Add notes."""
        self.begun["notes"] += [note for note in notes if note not in self.begun["notes"]]
        self._save()

    def add(self, job: Job, documents: pd.DataFrame, items: pd.DataFrame | None) -> None:
        """Keep the tables of a job."""
        if self._path is None:
            self._memory[job.file] = documents, items
            return
        if items is not None:
            _write_table(self._path / ITEMS / job.file, items)
        _write_table(self._path / DOCUMENTS / job.file, documents)

    def tables(self, jobs: Sequence[Job]) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Tables of all jobs, in their order."""
        found = [self._job_tables(job) for job in jobs]
        items = [each for _, each in found if each is not None]
        documents = [each for each, _ in found if len(each)]
        return pd.concat(documents), pd.concat(items) if items else None

    def native(self) -> Native:
        """What the unchanged model did."""
        correct = self.begun["correct"]
        return Native(
            nll=np.array(self.begun["nll"]),
            num_predicted=np.array(self.begun["num_predicted"]),
            correct=None if correct is None else np.array(correct, dtype=np.bool_),
        )

    def _job_tables(self, job: Job) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        if self._path is None:
            return self._memory[job.file]
        items = self._path / ITEMS / job.file
        return (
            pd.read_parquet(self._path / DOCUMENTS / job.file),
            pd.read_parquet(items) if items.exists() else None,
        )

    def _save(self) -> None:
        if self._path is not None:
            write_json(self._path / NATIVE, self.begun)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as part:
        table.to_parquet(part, index=False)


def _with_layer(results: pd.DataFrame) -> pd.DataFrame:
    """The results with the layer as a number, where it is one."""
    single = results["probe"] == "layer"
    layer = pd.to_numeric(results["layers"].where(single), errors="coerce").astype("Int64")
    results.insert(1, "layer", layer)
    return results


def _summary(
    options: ProbeOptions,
    checkpoint: Checkpoint,
    sequences: Sequence[TokenSequence],
    data: ProbeData,
    dtype: str,
    device: str,
) -> dict[str, Any]:
    predicted = sum(row.num_scored for row in data.texts.rows)
    if not predicted:
        raise DataError("The texts have one token each, so there is nothing to predict.")
    usage = "the evaluation data itself"
    if options.calibration:
        usage = f"{data.calibration.num_tokens:,} tokens of {' '.join(options.calibration)}"
    return {
        "format": 1,
        "model": options.model,
        "revision": checkpoint.revision,
        "family": checkpoint.model_type,
        "dtype": dtype,
        "device": device,
        "data": list(options.data),
        "num_tokens": data.texts.num_tokens,
        "num_predicted": predicted,
        "num_sequences": len(sequences),
        "num_documents": data.texts.num_documents,
        "tasks": None if options.tasks is None else str(options.tasks),
        "num_items": len(data.items),
        "usage_from": usage,
        "operators": {name: OPERATORS[name].meaning for name in options.operators},
        "seeds": options.seeds,
        "seed": options.seed,
    }


def _started(
    options: ProbeOptions,
    summary: dict[str, Any],
    sequences: Sequence[TokenSequence],
    calibration: Sequence[TokenSequence],
    data: ProbeData,
) -> dict[str, Any]:
    """Everything that decides the results."""
    names = ("layers", "together", "weights", "respect_groups", "most_used", "batch_tokens")
    tasks = [TokenSequence(token_ids=row.token_ids) for row in data.tasks.rows]
    return {
        **{name: value for name, value in summary.items() if name != "usage_from"},
        **{name: _plain(getattr(options, name)) for name in names},
        "texts": fingerprint(sequences),
        "calibration": fingerprint(calibration),
        "items": fingerprint(tasks),
        "version": importlib.metadata.version("moetools"),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _write(path: Path, run: ProbeRun) -> None:
    from moetools.reporting.probe_picture import probe_picture

    _write_table(path / "probe.parquet", run.results)
    write_json(path / "probe.json", run.to_json())
    figure = probe_picture(run.results, margin=run.native.margin)
    with atomic_file(path / PICTURE) as part:
        figure.savefig(part, format="png", dpi=160)
