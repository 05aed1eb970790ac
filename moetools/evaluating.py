"""Evaluate a model on items and texts, alone or against another.

Items are multiple choice by log-likelihood; of texts the loss is measured. Both arms of a
comparison get the same batches, and everything between them is paired.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from moetools import console, harness
from moetools.batching import TokenSequence, make_sequences, tokenise
from moetools.errors import CheckpointError, DataError, RequestError
from moetools.files import atomic_file, check_output, output_folder, write_json
from moetools.interventions import RouterIntervention, check_fits, read_intervention, steered
from moetools.item_statistics import (
    ItemComparison,
    Sample,
    accuracy_table,
    compare_items,
    compare_nll,
    nll_table,
)
from moetools.items import Item, read_items
from moetools.opening import BATCH_TOKENS, OpenedModel, open_model
from moetools.routing_ties import RoutingTies
from moetools.scoring import (
    ItemScore,
    ScoredRow,
    choice_logliks,
    choice_rows,
    item_scores,
    text_nll,
)
from moetools.shared_context import LOGITS_PER_BATCH
from moetools.texts import HUB_TOKENS, Text, read_texts, split_group
from moetools.tracing import local_inputs

ARMS = ("model", "against")
TIE = 2e-4
"""Two choices closer than that, in nats, are in an order that rounding may turn around."""
BATCH_TOLERANCE = 1e-4
NORMALISATION = "log-likelihood of a choice divided by the number of its tokens"
DEFINITIONS = {
    "accuracy": "share of items whose right choice has the largest log-likelihood, a sum over its "
    "tokens",
    "accuracy_per_token": f"the same by {NORMALISATION}",
    "nll": "mean negative log-likelihood of a token in nats. Texts are cut into pieces of at most "
    "--sequence-length tokens; the first token of every piece is not predicted",
    "routing_ties": "float32: items and texts with a token for which a router's last selected "
    "expert and its next one are closer than rounding (32 units in the last place of the largest "
    "logit): another batch size may exchange the two, and change a log-likelihood by more than "
    "1e-4",
    "perplexity": "exp(nll)",
    "low, high": "95 % interval: percentiles of 2000 bootstrap samples of units; a unit is an "
    "item or text, or all of one id where groups share ids. Units are drawn once for all groups "
    "and both arms. Too narrow with fewer than about 20 units, or ten changed items",
    "mean": "of the groups, each counting the same",
    "pooled": "over all items or tokens",
    "chance": "mean of 1 / number of choices",
    "label_prior": "what ignoring the question gets: the offered choice that is most often right "
    "where it is offered, in the other items of the group. Below chance where labels are exactly "
    "balanced, as to leave an item out makes its own label the rarest",
    "mde": "smallest difference that a two-sided 5 % test finds with 80 % power: from a fixed "
    "number such as chance, 2.80 standard errors; between arms, given the share of items on which "
    "they disagree (Connor 1987) and the design effect of shared ids",
    "value_a, value_b": "of the second model (--against), and of MODEL",
    "difference": "value_b - value_a, what MODEL has more: above 0 is better in accuracy, worse in "
    "nll",
    "gained, lost": "items that MODEL alone gets right, and that the second model alone does",
    "mcnemar_p": "exact McNemar test, as if items were independent; where groups share ids the "
    "interval holds for pooled values and this does not",
    "verdict": "two one-sided paired t tests over units against the margin, 5 % each",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What was asked for; the options of `moetools evaluate`.

    Attributes:
        model: Checkpoint folder, hub id or `demo`.
        tasks: `[GROUP=]FILE` of multiple-choice items.
        data: `[GROUP=]DATA` of texts whose loss is measured.
        lm_eval: Tasks for lm-evaluation-harness, by name or as YAML files.
        against: Second model.
        intervention: File with a router intervention on the model.
        against_intervention: The same on the second.
        text_column: Column of a text.
        group_column: Column of what to compare.
        id_column: Column of ids; equal ids of different groups are translations.
        where: `COLUMN=VALUE` each: items to keep.
        max_items: Items of each group at most.
        max_tokens: Tokens of texts at most; None takes all of files and 1 M of a hub data set.
        sequence_length: Longer texts are cut; None for 512 or what the model takes.
        margin: Largest difference in accuracy that counts as none, a fraction.
        nll_margin: Largest difference in loss that counts as none, nats per token.
        batch_tokens: Tokens of a batch; None chooses by device.
        device: `auto`, `cpu`, `cuda[:n]` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        seed: Of the bootstrap.
        trust_remote_code: Run code that comes with a checkpoint.
        out: Folder to write.
        overwrite: Replace a folder that moetools wrote.
    """

    model: str
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    lm_eval: tuple[str, ...] = ()
    against: str | None = None
    intervention: str | Path | None = None
    against_intervention: str | Path | None = None
    text_column: str = "text"
    group_column: str | None = None
    id_column: str | None = None
    where: tuple[str, ...] = ()
    max_items: int | None = None
    max_tokens: int | None = None
    sequence_length: int | None = None
    margin: float | None = None
    nll_margin: float | None = None
    batch_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    out: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
        summary: What was evaluated on what, as plain values; notes, ties and flips by rounding.
        results: One row per arm, metric and scope: `arm` (`model` or `against`), `source` (`tasks`,
            `data` or `lm-eval`) and the columns of `accuracy_table` and `nll_table`.
        comparison: One row per metric and scope, of `compare_items` and `compare_nll`: `value_a`
            is of `against`, `value_b` of `model`, `difference` what `model` has more, `gained` and
            `lost` are items that `model` alone and `against` alone gets right. None without a
            second model.
        items: One row per arm, item and choice; None without tasks.
        texts: One row per arm and text; None without data.
    """

    summary: dict[str, Any]
    results: pd.DataFrame
    comparison: pd.DataFrame | None
    items: pd.DataFrame | None
    texts: pd.DataFrame | None

    def to_json(self) -> dict[str, Any]:
        """Everything but the tables of items and texts; null where there is no value."""
        comparison = None if self.comparison is None else _records(self.comparison)
        return {**self.summary, "results": _records(self.results), "comparison": comparison}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Arm:
    """One of the two things that are compared."""

    name: str
    model: str
    opened: OpenedModel
    intervention: RouterIntervention | None
    file: str | None

    @property
    def title(self) -> str:
        return self.model if self.file is None else f"{self.model} with {self.file}"

    def steered(self, model: Any) -> AbstractContextManager[Any]:
        """The model with its intervention, if it has one."""
        if self.intervention is None:
            return nullcontext()
        return steered(model, self.opened, self.intervention)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What goes through every arm; `vocab_size` as in `choice_logliks`."""

    items: Sequence[Item]
    rows: Sequence[ScoredRow]
    texts: Sequence[Text]
    sequences: Sequence[TokenSequence]
    batch_tokens: int
    vocab_size: int | None
    seed: int
    lm_eval: tuple[str, ...]

    def num_tokens(self, passes: int) -> int:
        """Tokens of one arm, if choices go through the model `passes` times."""
        choices = sum(len(row.token_ids) for row in self.rows)
        return passes * choices + sum(len(sequence.token_ids) for sequence in self.sequences)


@dataclass(kw_only=True, slots=True)
class _Outcome:
    """What one arm did."""

    scores: list[ItemScore] = field(default_factory=list)
    flips: dict[str, list[int]] | None = None
    tied_items: list[int] = field(default_factory=list)
    tied_texts: list[int] = field(default_factory=list)
    shared: bool = False
    reason: str | None = None
    by_batch: float = 0.0
    nll: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    num_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    harness: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: str | Path,
    *,
    tasks: str | Path | Sequence[str | Path] = (),
    data: str | Path | Sequence[str | Path] = (),
    against: str | Path | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a model, as `moetools evaluate` does.

    Args:
        model: Checkpoint folder, hub id `org/name[@revision]`, or `demo`.
        tasks: One or several `[GROUP=]FILE` of items.
        data: One or several `[GROUP=]DATA` of texts.
        against: A second model on the same batches.
        out: Folder to write; None writes nothing.
        **options: Any other field of `EvaluateOptions`.

    Raises:
        MoEToolsError: The input or the request is wrong.
    """
    for name in ("where", "lm_eval"):
        if name in options:
            options[name] = _several(options[name])
    return run_evaluation(
        EvaluateOptions(
            model=str(model),
            tasks=_several(tasks),
            data=_several(data),
            against=None if against is None else str(against),
            out=None if out is None else Path(out),
            **options,
        )
    )


def run_evaluation(options: EvaluateOptions) -> Evaluation:
    """Evaluate a model.

    Raises:
        MoEToolsError: The input or the request is wrong; nothing is left behind.
    """
    _check(options)
    claim: dict[str, Any] = {
        "kind": "evaluation",
        "overwrite": options.overwrite,
        "inputs": _inputs(options),
    }
    if options.out is not None:
        check_output(options.out, **claim)
    items: list[Item] = []
    if options.tasks:
        items = read_items(
            options.tasks,
            group_column=options.group_column,
            id_column=options.id_column,
            where=options.where,
            max_items=options.max_items,
        )
    arms = _arms(options)
    work = _work(options, arms, items)
    outcomes = _run(arms, work)
    finished = _finish(options, arms, work, outcomes)
    if options.out is not None:
        with output_folder(options.out, **claim) as folder:
            _write(folder.path, finished)
    return finished


def _several(names: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    return (str(names),) if isinstance(names, str | Path) else tuple(map(str, names))


def _check(options: EvaluateOptions) -> None:
    if not (options.tasks or options.data or options.lm_eval):
        raise RequestError(
            "Nothing to evaluate on. Pass --tasks FILE (multiple choice), --data DATA (loss on "
            "texts) or --lm-eval TASKS."
        )
    if options.where and not options.tasks:
        raise RequestError("--where chooses items of --tasks, and there are none.")
    if options.max_items is not None and options.max_items < 1:
        raise RequestError(f"--max-items {options.max_items}: expected 1 or more.")
    if options.batch_tokens is not None and options.batch_tokens < 1:
        raise RequestError(f"--batch-tokens {options.batch_tokens}: expected 1 or more.")
    second = {
        "--against-intervention": options.against_intervention,
        "--margin": options.margin,
        "--nll-margin": options.nll_margin,
    }
    for name, value in second.items():
        if value is not None and options.against is None:
            raise RequestError(f"{name} is about a second model. Name it: --against MODEL.")
    for name, margin in (("--margin", options.margin), ("--nll-margin", options.nll_margin)):
        if margin is not None and not margin > 0:
            raise RequestError(f"{name} {margin}: expected a number above 0.")
    if options.margin is not None and options.margin >= 1:
        raise RequestError(
            f"--margin {options.margin}: expected a fraction below 1; 0.02 is two points."
        )
    if options.margin is not None and not options.tasks:
        raise RequestError("--margin is about accuracies. Pass --tasks, or use --nll-margin.")
    if options.nll_margin is not None and not options.data:
        raise RequestError("--nll-margin is about the loss on texts. Pass --data.")
    if options.lm_eval:
        harness.check_installed()


def _inputs(options: EvaluateOptions) -> list[Path]:
    tasks = [split_group(task, "--tasks")[1] for task in options.tasks]
    files = [options.against, options.intervention, options.against_intervention, *tasks]
    named = [Path(name).expanduser() for name in files if name is not None]
    return [
        *local_inputs(options.model, options.data),
        *(path for path in named if path.exists()),
    ]


def _arms(options: EvaluateOptions) -> list[_Arm]:
    wanted = [(options.model, options.intervention)]
    if options.against is not None:
        wanted.append((options.against, options.against_intervention))
    interventions = [None if file is None else read_intervention(file) for _, file in wanted]
    opened: dict[str, OpenedModel] = {}
    arms = []
    for name, (model, file), intervention in zip(ARMS, wanted, interventions, strict=False):
        if model not in opened:
            opened[model] = open_model(
                model,
                device=options.device,
                dtype=options.dtype,
                trust_remote_code=options.trust_remote_code,
                purpose="evaluated",
            )
        if intervention is not None:
            check_fits(intervention, opened[model].checkpoint, opened[model].routers)
        arms.append(
            _Arm(
                name=name,
                model=model,
                opened=opened[model],
                intervention=intervention,
                file=None if file is None else str(file),
            )
        )
    dtypes = [arm.opened.dtype_name for arm in arms]
    if len(set(dtypes)) > 1:
        raise RequestError(
            f"--dtype auto means {dtypes[0]} for {arms[0].model} and {dtypes[1]} for "
            f"{arms[1].model}. Choose one for both."
        )
    return arms


def _work(options: EvaluateOptions, arms: Sequence[_Arm], items: Sequence[Item]) -> _Work:
    """Tokens of everything, which have to be the same in both arms."""
    first = arms[0].opened
    limits = [arm.opened.num_positions for arm in arms]
    limit = min((each for each in limits if each is not None), default=None)
    rows = choice_rows(items, first.tokenizer, limit=limit) if items else []
    texts: tuple[Text, ...] = ()
    sequences: list[TokenSequence] = []
    if options.data:
        length = min(arm.opened.sequence_length(options.sequence_length) for arm in arms)
        texts = read_texts(
            options.data,
            text_column=options.text_column,
            group_column=options.group_column,
            id_column=options.id_column,
            count_tokens=lambda texts: sum(map(len, tokenise(texts, first.tokenizer))),
            hub_tokens=options.max_tokens or HUB_TOKENS,
        ).texts
        sequences = make_sequences(
            texts, first.tokenizer, sequence_length=length, max_tokens=options.max_tokens
        )
        if all(len(sequence.token_ids) == 1 for sequence in sequences):
            raise DataError("The texts have one token each, so there is nothing to predict.")
    for arm in arms[1:]:
        _check_tokens(arm, arms[0], items, rows, texts)
    kinds = {(arm.opened.checkpoint.model_type, arm.opened.text_config.vocab_size) for arm in arms}
    return _Work(
        items=items,
        rows=rows,
        texts=texts,
        sequences=sequences,
        batch_tokens=options.batch_tokens or BATCH_TOKENS[first.device.type],
        vocab_size=max(size for _, size in kinds) if len(kinds) > 1 else None,
        seed=options.seed,
        lm_eval=options.lm_eval,
    )


def _check_tokens(
    arm: _Arm,
    first: _Arm,
    items: Sequence[Item],
    rows: Sequence[ScoredRow],
    texts: Sequence[Text],
) -> None:
    if arm.opened is first.opened:
        return
    where = None
    if items:
        others = choice_rows(items, arm.opened.tokenizer)
        places = [item.where for item in items for _ in item.choices]
        for place, row, other in zip(places, rows, others, strict=True):
            if not np.array_equal(row.token_ids, other.token_ids):
                where = place
                break
    if where is None and texts:
        pairs = zip(
            tokenise([text.text for text in texts], first.opened.tokenizer),
            tokenise([text.text for text in texts], arm.opened.tokenizer),
            strict=True,
        )
        different = (not np.array_equal(one, other) for one, other in pairs)
        where = next(
            (text.where for text, each in zip(texts, different, strict=True) if each), None
        )
    if where is not None:
        raise RequestError(
            f"--against {arm.model}: its tokenizer makes other tokens of {where} than that of "
            f"{first.model}, so the two cannot share batches, and losses per token do not "
            "compare. Evaluate them apart."
        )


def _run(arms: Sequence[_Arm], work: _Work) -> list[_Outcome]:
    """Run every arm, all of them in the same way."""
    outcomes = [_Outcome() for _ in arms]
    for share in (True, False):
        outcomes = _run_arms(arms, work, share=share)
        if len({outcome.shared for outcome in outcomes}) == 1:
            break
        reason = next(outcome.reason for outcome in outcomes if not outcome.shared)
        for outcome in outcomes:
            outcome.reason = reason
    return outcomes


def _run_arms(arms: Sequence[_Arm], work: _Work, *, share: bool) -> list[_Outcome]:
    outcomes = []
    for name, opened in {arm.model: arm.opened for arm in arms}.items():
        with opened.load() as model:
            for arm in (arm for arm in arms if arm.model == name):
                total = work.num_tokens(2 if _is_rounded(opened) else 1)
                watched = () if _is_rounded(opened) else opened.routers
                with (
                    arm.steered(model),
                    RoutingTies(model, watched) as ties,
                    console.progress(f"Evaluating {arm.title}", total, "tokens") as meter,
                ):
                    outcomes.append(_run_arm(arm, model, work, share, ties, meter.advance))
    return outcomes


def _run_arm(
    arm: _Arm,
    model: Any,
    work: _Work,
    share: bool,
    ties: RoutingTies,
    advance: Callable[[int], None],
) -> _Outcome:
    outcome = _Outcome()
    if work.items:
        scores, outcome.shared, outcome.reason, outcome.by_batch = _score(
            arm, model, work, share, ties, work.batch_tokens, advance
        )
        outcome.scores = scores
        item = np.repeat(np.arange(len(work.items)), [len(each.choices) for each in work.items])
        outcome.tied_items = np.unique(item[ties.take()]).tolist()
        if _is_rounded(arm.opened):
            largest = work.vocab_size or arm.opened.text_config.vocab_size
            half = max(1, min(work.batch_tokens, LOGITS_PER_BATCH // largest) // 2)
            again, *_ = _score(arm, model, work, outcome.shared, ties, half, advance)
            outcome.flips = {
                "accuracy": [
                    number
                    for number, (one, other) in enumerate(zip(scores, again, strict=True))
                    if one.prediction != other.prediction
                ],
                "accuracy_per_token": [
                    number
                    for number, (one, other) in enumerate(zip(scores, again, strict=True))
                    if one.prediction_per_token != other.prediction_per_token
                ],
            }
    if work.sequences:
        sums, counts = text_nll(
            model,
            [sequence.token_ids for sequence in work.sequences],
            batch_tokens=work.batch_tokens,
            vocab_size=work.vocab_size,
            watch=ties.watch,
            advance=advance,
        )
        _check_finite(sums, "texts", arm)
        of_text = [work.sequences[number].text for number in ties.take()]
        outcome.tied_texts = sorted({text for text in of_text if text is not None})
        outcome.nll, outcome.num_tokens = _by_text(work, sums), _by_text(work, counts)
    if work.lm_eval:
        found = harness.run(
            model,
            arm.opened.tokenizer,
            work.lm_eval,
            batch_size=max(1, work.batch_tokens // arm.opened.sequence_length(None)),
            seed=work.seed,
        )
        outcome.harness = harness.metrics(found)
    return outcome


def _score(
    arm: _Arm,
    model: Any,
    work: _Work,
    share: bool,
    ties: RoutingTies,
    batch_tokens: int,
    advance: Callable[[int], None],
) -> tuple[list[ItemScore], bool, str | None, float]:
    found = choice_logliks(
        model,
        work.rows,
        [len(item.choices) for item in work.items],
        batch_tokens=batch_tokens,
        share=share,
        vocab_size=work.vocab_size,
        watch=ties.watch,
        advance=advance,
    )
    _check_finite(found.values, "choices", arm)
    scores = item_scores(work.items, work.rows, found.values)
    return scores, found.shared, found.reason, found.by_batch


def _check_finite(values: NDArray[np.float64], what: str, arm: _Arm) -> None:
    wrong = int((~np.isfinite(values)).sum())
    if wrong:
        raise CheckpointError(
            f"{arm.title}: the log-likelihoods of {wrong:,} of {len(values):,} {what} are not "
            "finite. The checkpoint or its --dtype is broken."
        )


def _is_rounded(opened: OpenedModel) -> bool:
    """Whether the dtype has 16 bits, so that the batch size turns some answers around."""
    return opened.dtype != torch.float32


def _by_text(work: _Work, values: NDArray[Any]) -> NDArray[Any]:
    """Sums over the sequences of each text that is used, in the order of the texts."""
    numbers = np.array([sequence.text for sequence in work.sequences])
    sums = np.zeros(len(work.texts), dtype=values.dtype)
    np.add.at(sums, numbers, values)
    return sums


def _finish(
    options: EvaluateOptions, arms: Sequence[_Arm], work: _Work, outcomes: Sequence[_Outcome]
) -> Evaluation:
    results: list[pd.DataFrame] = []
    comparison: list[pd.DataFrame] = []
    paired: ItemComparison | None = None
    items = texts = None
    if work.items:
        scores = [outcome.scores for outcome in outcomes]
        for arm, of_arm in zip(arms, scores, strict=True):
            table = accuracy_table(work.items, of_arm, seed=options.seed)
            results.append(_labelled(table, arm, "tasks"))
        if len(arms) > 1:
            paired = compare_items(
                scores[1], scores[0], work.items, seed=options.seed, margin=options.margin
            )
            comparison.append(paired.table)
        items = pd.concat(
            _item_rows(arm, work, of_arm) for arm, of_arm in zip(arms, scores, strict=True)
        )
    if work.sequences:
        used = np.flatnonzero(outcomes[0].num_tokens > 0)
        kept = [work.texts[number] for number in used.tolist()]
        sample = Sample(
            [text.group for text in kept], [text.id for text in kept], seed=options.seed
        )
        losses = [(outcome.nll[used], outcome.num_tokens[used]) for outcome in outcomes]
        for arm, (nll, counts) in zip(arms, losses, strict=True):
            results.append(_labelled(nll_table(sample, nll, counts), arm, "data"))
        if len(arms) > 1:
            nlls = [nll for nll, _ in losses]
            comparison.append(
                compare_nll(sample, nlls[1], nlls[0], losses[0][1], margin=options.nll_margin)
            )
        texts = pd.concat(
            _text_rows(arm, used, kept, nll, counts)
            for arm, (nll, counts) in zip(arms, losses, strict=True)
        )
    for arm, outcome in zip(arms, outcomes, strict=True):
        if outcome.harness:
            results.append(_labelled(pd.DataFrame(outcome.harness), arm, "lm-eval"))
    return Evaluation(
        summary=_summary(options, arms, work, outcomes, paired),
        results=pd.concat(results, ignore_index=True),
        comparison=pd.concat(comparison, ignore_index=True) if comparison else None,
        items=items,
        texts=texts,
    )


def _labelled(table: pd.DataFrame, arm: _Arm, source: str) -> pd.DataFrame:
    table.insert(0, "arm", arm.name)
    table.insert(1, "source", source)
    return table


def _item_rows(arm: _Arm, work: _Work, scores: Sequence[ItemScore]) -> pd.DataFrame:
    """One row per item and choice."""
    rows = iter(work.rows)
    return pd.DataFrame(
        {
            "arm": arm.name,
            "item": number,
            "group": item.group,
            "id": item.id,
            "where": item.where,
            "choice": place,
            "text": text,
            "is_answer": place == item.answer,
            "num_tokens": next(rows).num_scored,
            "loglik": score.loglik[place],
            "loglik_per_token": score.loglik_per_token[place],
            "predicted": place == score.prediction,
            "predicted_per_token": place == score.prediction_per_token,
        }
        for number, (item, score) in enumerate(zip(work.items, scores, strict=True))
        for place, text in enumerate(item.choices)
    )


def _text_rows(
    arm: _Arm,
    numbers: NDArray[np.int64],
    texts: Sequence[Text],
    nll: NDArray[np.float64],
    num_tokens: NDArray[np.int64],
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": arm.name,
            "text": numbers,
            "group": [text.group for text in texts],
            "id": [text.id for text in texts],
            "where": [text.where for text in texts],
            "num_tokens": num_tokens,
            "nll": nll,
        }
    )


def _summary(
    options: EvaluateOptions,
    arms: Sequence[_Arm],
    work: _Work,
    outcomes: Sequence[_Outcome],
    paired: ItemComparison | None,
) -> dict[str, Any]:
    first = arms[0].opened
    return {
        "format": 1,
        "arms": {
            arm.name: {
                "model": arm.model,
                "revision": arm.opened.checkpoint.revision,
                "intervention": arm.file,
                "ties": _ties(work.items, outcome.scores),
                "routing_ties": None
                if _is_rounded(arm.opened)
                else {
                    "items": _named(work.items, outcome.tied_items),
                    "texts": [
                        {"text": number, "id": text.id, "group": text.group, "where": text.where}
                        for number in outcome.tied_texts
                        for text in [work.texts[number]]
                    ],
                },
                "flips_by_rounding": None
                if outcome.flips is None
                else {
                    metric: _named(work.items, numbers) for metric, numbers in outcome.flips.items()
                },
            }
            for arm, outcome in zip(arms, outcomes, strict=True)
        },
        "dtype": first.dtype_name,
        "device": first.device.type,
        "tasks": list(options.tasks),
        "where": list(options.where),
        "data": list(options.data),
        "lm_eval": list(options.lm_eval),
        "num_items": len(work.items),
        "num_choices": len(work.rows),
        "num_texts": int((outcomes[0].num_tokens > 0).sum()),
        "num_predicted": int(outcomes[0].num_tokens.sum()),
        "batch_tokens": work.batch_tokens,
        "shared_context": outcomes[0].shared if work.items else None,
        "seed": options.seed,
        "gained": None if paired is None else _all_named(work.items, paired.gained),
        "lost": None if paired is None else _all_named(work.items, paired.lost),
        "notes": _notes(arms, work, outcomes),
        "definitions": DEFINITIONS,
        "version": importlib.metadata.version("moetools"),
    }


def _notes(arms: Sequence[_Arm], work: _Work, outcomes: Sequence[_Outcome]) -> list[str]:
    notes = []
    reason = next((outcome.reason for outcome in outcomes if outcome.reason), None)
    if reason is not None:
        notes.append(f"every choice went through the model with its whole context: {reason}")
    for arm, outcome in zip(arms, outcomes, strict=True):
        if not _is_rounded(arm.opened) and outcome.by_batch > BATCH_TOLERANCE:
            notes.append(
                f"{arm.title}: log-likelihoods depend on what else is in the batch, by "
                f"{outcome.by_batch:.2g} nats in the items that were checked"
            )
    if work.items:
        values = [item.columns.get("id") for item in work.items]
        if all(item.id is None for item in work.items) and None not in values:
            notes.append("column 'id' does not tell the items apart, so every row is its own unit")
    return notes


def _ties(items: Sequence[Item], scores: Sequence[ItemScore]) -> dict[str, list[dict[str, Any]]]:
    """Items whose two best choices are too close to call, by metric."""
    found: dict[str, list[dict[str, Any]]] = {"accuracy": [], "accuracy_per_token": []}
    for number, score in enumerate(scores):
        for metric, values in zip(found, (score.loglik, score.loglik_per_token), strict=True):
            best, second = sorted(values, reverse=True)[:2]
            if best - second < TIE:
                found[metric].append({**_name(items, number), "gap": best - second})
    return found


def _all_named(
    items: Sequence[Item], numbers: dict[str, list[int]]
) -> dict[str, list[dict[str, Any]]]:
    return {metric: _named(items, each) for metric, each in numbers.items()}


def _named(items: Sequence[Item], numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [_name(items, number) for number in numbers]


def _name(items: Sequence[Item], number: int) -> dict[str, Any]:
    item = items[number]
    return {"item": number, "id": item.id, "group": item.group, "where": item.where}


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.astype(object).where(table.notna(), None).to_dict("records")  # type: ignore[assignment]
    return rows


def _write(path: Path, run: Evaluation) -> None:
    for name, table in (("items", run.items), ("texts", run.texts)):
        if table is not None:
            with atomic_file(path / f"{name}.parquet") as part:
                table.to_parquet(part, index=False)
    write_json(path / "evaluate.json", run.to_json())
