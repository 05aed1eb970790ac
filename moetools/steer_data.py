"""What a steering run reads: target and generic texts with a held-out part, and tasks.

A row of `--target` or `--generic` is a text, or a multiple-choice item, whose text is its question
with the right answer.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.batching import TokenSequence, make_sequences
from moetools.errors import DataError
from moetools.items import ITEM_COLUMNS, Item, read_items
from moetools.probe_passes import Evaluation
from moetools.scoring import ScoredRow
from moetools.steer_options import SPLIT_COLUMN, SteerOptions, parse_where
from moetools.texts import Text, open_rows

HELD_OUT = 0.25
"""Share of the texts that nothing is found or fitted on."""

CHARACTERS_PER_TOKEN = 64
"""Characters read of a source for each token asked for; texts are drawn from these."""

DEV, TEST = "dev", "test"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Sequences of target or generic texts.

    Attributes:
        name: `target` or `generic`.
        sequences: At least two.
        held_out: [S] sequences that nothing is found or fitted on.
        num_texts: Texts that they come from.
        num_given: Texts that there were; more where `max_tokens` left some out.
    """

    name: str
    sequences: tuple[TokenSequence, ...]
    held_out: NDArray[np.bool_]
    num_texts: int
    num_given: int

    def part(self, *, held_out: bool) -> list[TokenSequence]:
        """The sequences of one part."""
        return [
            sequence
            for sequence, held in zip(self.sequences, self.held_out, strict=True)
            if held == held_out
        ]

    def num_tokens(self, *, held_out: bool) -> int:
        """Tokens of one part."""
        return sum(len(sequence.token_ids) for sequence in self.part(held_out=held_out))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Multiple-choice items in two parts.

    Attributes:
        dev: To choose a strength by.
        test: To report on.
        how: How they were divided, in words.
    """

    dev: tuple[Item, ...]
    test: tuple[Item, ...]
    how: str


def read_corpora(
    options: SteerOptions, tokenizer: Any, sequence_length: int
) -> tuple[Corpus, Corpus]:
    """Target and generic texts as sequences, of a random sample of the texts.

    Raises:
        DataError: Missing or unusable data, or both are the same.
    """
    target = _read("--target", options.target, options.target_where, options)
    generic = _read("--generic", options.generic, options.generic_where, options)
    if {text.text for text in target} == {text.text for text in generic}:
        raise DataError(
            "--target and --generic hold the same texts, so no expert is special to one of them. "
            "Pass other text, such as 'demo', as --generic."
        )
    return (
        _corpus("target", target, tokenizer, sequence_length, options),
        _corpus("generic", generic, tokenizer, sequence_length, options),
    )


def evaluation(corpora: Sequence[Corpus], *, held_out: bool) -> Evaluation:
    """One part of all corpora, ready to go through a model; documents are texts."""
    parts = [(corpus.name, each) for corpus in corpora for each in corpus.part(held_out=held_out)]
    return Evaluation(
        number=0,
        rows=[ScoredRow(token_ids=sequence.token_ids) for _, sequence in parts],
        documents=[(name, sequence.text) for name, sequence in parts],
    )


def read_tasks(options: SteerOptions) -> Tasks | None:
    """The items of `--tasks` in two parts; None without any.

    Items with the same id, such as translations, are in the same half.

    Raises:
        DataError: Missing or unusable items, a part without any, or held-out items among the
            target texts.
    """
    if options.tasks is None:
        return None
    items = read_items(
        options.tasks, group_column=options.group_column, id_column=options.id_column
    )
    column = options.split_column or SPLIT_COLUMN
    if options.split_column is None and column not in items[0].columns:
        dev = [item for item in items if _in_first_half(item, options.seed)]
        test = [item for item in items if not _in_first_half(item, options.seed)]
        how = f"no column '{column}': halves by a hash of the id, seed {options.seed}"
    else:
        dev, test = (_of_part(items, column, part) for part in (DEV, TEST))
        how = f"rows whose '{column}' is {TEST}; rows whose '{column}' is {DEV} are for choosing"
    if not dev or not test:
        raise DataError(
            f"--tasks {options.tasks}: {len(items)} items are too few to divide. Add items, or "
            f"mark them {DEV} or {TEST} in a column (--split-column)."
        )
    _refuse_leak(test, options)
    return Tasks(dev=tuple(dev), test=tuple(test), how=how)


def _of_part(items: Sequence[Item], column: str, part: str) -> list[Item]:
    absent = next((item for item in items if column not in item.columns), None)
    if absent is not None:
        raise DataError(
            f"{absent.where} has no column '{column}' (--split-column). It has: "
            f"{', '.join(map(str, absent.columns))}."
        )
    found = [item for item in items if item.columns[column] == part]
    if not found:
        values = sorted({str(item.columns[column]) for item in items})[:5]
        raise DataError(
            f"--split-column {column}: no item is '{part}'; found {', '.join(values)}. Strengths "
            f"are chosen on rows with '{DEV}' and reported on rows with '{TEST}'."
        )
    return found


def _in_first_half(item: Item, seed: int) -> bool:
    label = item.question if item.id is None else item.id
    return hashlib.sha256(f"{seed} {label}".encode()).digest()[0] % 2 == 0


def _refuse_leak(test: Sequence[Item], options: SteerOptions) -> None:
    """Refuse to find experts on the answers of the items that are reported on."""
    asked = {item.question + item.choices[item.answer]: item.where for item in test}
    where = parse_where(options.target_where, "--target-where")
    found = [
        asked[text.text]
        for source in options.target
        for text in _texts("--target", source, where, options.text_column)
        if text.text in asked
    ]
    if found:
        raise DataError(
            f"--target holds {len(found)} held-out items of --tasks with their answers, the first "
            f"is {found[0]}: experts would be chosen on the test. Leave them out, with "
            f"--target-where {options.split_column or SPLIT_COLUMN}={DEV} if they have that column."
        )


def _read(
    flag: str, sources: Sequence[str], where: Sequence[str], options: SteerOptions
) -> list[Text]:
    """Texts in a random order."""
    conditions = parse_where(where, f"{flag}-where")
    found: list[Text] = []
    for source in sources:
        num_characters, before = 0, len(found)
        for text in _texts(flag, source, conditions, options.text_column):
            found.append(text)
            num_characters += len(text.text)
            if num_characters >= CHARACTERS_PER_TOKEN * options.max_tokens:
                break
        if len(found) == before:
            shown = "".join(f" {flag}-where {each}" for each in where)
            raise DataError(f"{flag} {source}{shown}: no texts in it.")
    order = np.random.default_rng(options.seed).permutation(len(found))
    return [found[number] for number in order]


def _texts(flag: str, source: str, where: Mapping[str, str], text_column: str) -> Iterator[Text]:
    for place, row in open_rows(source, flag):
        for column in where:
            if column not in row:
                raise DataError(
                    f"{place} has no column '{column}' ({flag}-where). It has: "
                    f"{', '.join(map(str, row))}."
                )
        if all(str(row[column]) == value for column, value in where.items()):
            yield _text(row, place, text_column)


def _text(row: Mapping[str, Any], place: str, text_column: str) -> Text:
    text = row.get(text_column)
    if text_column not in row:
        if not all(column in row for column in ITEM_COLUMNS):
            raise DataError(
                f"{place} has no column '{text_column}', and is no item with question, choices "
                f"and answer. It has: {', '.join(map(str, row))}."
            )
        question, choices, answer = (row[column] for column in ITEM_COLUMNS)
        try:
            text = question + choices[answer]
        except (TypeError, IndexError):
            raise DataError(
                f"{place}: 'answer' holds {answer!r}, which is no index of a choice."
            ) from None
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: expected a text, found {text!r}.")
    return Text(text=text, where=place)


def _corpus(
    name: str, texts: Sequence[Text], tokenizer: Any, sequence_length: int, options: SteerOptions
) -> Corpus:
    sequences = make_sequences(
        texts, tokenizer, sequence_length=sequence_length, max_tokens=options.max_tokens
    )
    numbers = np.array([sequence.text for sequence in sequences])
    texts_used = np.unique(numbers)
    if len(texts_used) < 4:
        raise DataError(
            f"--{name}: {len(texts_used)} texts; at least 4 are needed, to hold some out and to "
            "tell experts from chance. Divide long texts into rows, or raise --max-tokens."
        )
    generator = np.random.default_rng(options.seed)
    held = generator.permutation(texts_used)[: max(1, round(HELD_OUT * len(texts_used)))]
    return Corpus(
        name=name,
        sequences=tuple(sequences),
        held_out=np.isin(numbers, held),
        num_texts=len(texts_used),
        num_given=len(texts),
    )
