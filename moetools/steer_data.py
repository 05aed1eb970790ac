"""The texts of a steering run: target and generic, each with a part that is held out.

A row of `--target` or `--generic` is a text, or a multiple-choice item, whose text is its question
with the right answer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.batching import TokenSequence, make_sequences, tokenise
from moetools.errors import DataError, RequestError
from moetools.scoring import Item, ScoredRow
from moetools.steer_options import SPLIT_COLUMN, SteerOptions, parse_where
from moetools.texts import DEMO, Text, read_rows, read_texts, split_group

HELD_OUT = 0.25
ITEM_COLUMNS = ("question", "choices", "answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Sequences of target or generic texts.

    Attributes:
        name: `target` or `generic`.
        sequences: At least two.
        held_out: [S] sequences that nothing is found or fitted on.
        by_text: Whether whole texts are held out, not sequences of a few long ones.
        num_texts: Texts that they come from.
    """

    name: str
    sequences: tuple[TokenSequence, ...]
    held_out: NDArray[np.bool_]
    by_text: bool
    num_texts: int

    def rows(self, *, held_out: bool) -> list[ScoredRow]:
        """The sequences of one part."""
        return [
            ScoredRow(token_ids=sequence.token_ids)
            for sequence, held in zip(self.sequences, self.held_out, strict=True)
            if held == held_out
        ]

    def texts(self, *, held_out: bool) -> list[int]:
        """Number of the text of each sequence of one part."""
        return [
            sequence.text or 0
            for sequence, held in zip(self.sequences, self.held_out, strict=True)
            if held == held_out
        ]

    def num_tokens(self, *, held_out: bool) -> int:
        """Tokens of one part."""
        return sum(len(row.token_ids) for row in self.rows(held_out=held_out))


def read_corpora(
    options: SteerOptions, tokenizer: Any, sequence_length: int
) -> tuple[Corpus, Corpus]:
    """Target and generic texts as sequences.

    Raises:
        DataError: Missing or unusable data, or both are the same.
    """
    target = _read("--target", options.target, options.target_where, options, tokenizer)
    generic = _read("--generic", options.generic, options.generic_where, options, tokenizer)
    if {text.text for text in target} == {text.text for text in generic}:
        raise DataError(
            "--target and --generic hold the same texts, so no expert is special to one of them. "
            "Pass general text, such as 'demo' or a file of your own, as --generic."
        )
    return tuple(  # type: ignore[return-value]
        _corpus(name, texts, tokenizer, sequence_length, options)
        for name, texts in (("target", target), ("generic", generic))
    )


def shared_items(items: Sequence[Item], options: SteerOptions) -> list[str]:
    """Held-out items whose question with the right answer is among the target texts."""
    asked = {_item_text(item.question, item.choices, item.answer): item.where for item in items}
    where = parse_where(options.target_where, "--target-where")
    texts = _texts("--target", options.target, where, options.text_column)
    return [asked[text.text] for text in texts if text.text in asked]


def split_column(options: SteerOptions) -> str | None:
    """The column that says which items are `dev` and which are `test`; None without one.

    Raises:
        DataError: There is no such column where one was asked for.
    """
    assert options.tasks is not None
    path = Path(options.tasks).expanduser()
    first = next(read_rows(path), None) if path.exists() else None
    if first is None:
        return options.split_column
    where, row = first
    wanted = options.split_column or SPLIT_COLUMN
    if wanted in row:
        return wanted
    if options.split_column is not None:
        raise DataError(f"{where} has no column '{wanted}'. It has: {', '.join(map(str, row))}.")
    return None


def in_first_half(label: str, seed: int) -> bool:
    """Whether an item belongs to the development half: a hash of its id, the same everywhere."""
    return hashlib.sha256(f"{seed} {label}".encode()).digest()[0] % 2 == 0


def _read(
    flag: str, sources: Sequence[str], where: Sequence[str], options: SteerOptions, tokenizer: Any
) -> list[Text]:
    wanted = parse_where(where, f"{flag}-where")

    def count_tokens(texts: list[str]) -> int:
        return sum(map(len, tokenise(texts, tokenizer)))

    found = _texts(
        flag, sources, wanted, options.text_column, count_tokens=count_tokens,
        hub_tokens=options.max_tokens,
    )  # fmt: skip
    if not found:
        shown = " ".join([*sources, *(f"{flag}-where {each}" for each in where)])
        raise DataError(f"{flag} {shown}: no texts in it.")
    return found


def _texts(
    flag: str,
    sources: Sequence[str],
    where: Mapping[str, str],
    text_column: str,
    **hub: Any,
) -> list[Text]:
    """Texts of files, of the demo (whose columns are lang, id, text) or of hub data sets."""
    found: list[Text] = []
    for item in sources:
        _, source = split_group(item)
        path = DEMO if source == "demo" else Path(source).expanduser()
        if path.exists():
            found += [
                _text(row, place, text_column)
                for place, row in read_rows(path)
                if _fits(row, place, where, flag)
            ]
            continue
        if where:
            raise RequestError(
                f"{flag}-where needs a file or folder; {source} is none. Name a configuration or "
                "split of a hub data set instead: org/name:config@split."
            )
        try:
            found += read_texts([source], text_column=text_column, **hub).texts
        except DataError as error:
            raise DataError(str(error).replace("--data", flag)) from error
    return found


def _fits(row: Mapping[str, Any], place: str, where: Mapping[str, str], flag: str) -> bool:
    for column in where:
        if column not in row:
            raise DataError(
                f"{flag}-where: {place} has no column '{column}'. It has: "
                f"{', '.join(map(str, row))}."
            )
    return all(str(row[column]) == value for column, value in where.items())


def _text(row: Mapping[str, Any], place: str, text_column: str) -> Text:
    if text_column not in row and all(column in row for column in ITEM_COLUMNS):
        text = _item_text(*(row[column] for column in ITEM_COLUMNS))
    elif text_column in row:
        text = row[text_column]
    else:
        raise DataError(
            f"{place} has no column '{text_column}', and is no item with question, choices and "
            f"answer. It has: {', '.join(map(str, row))}."
        )
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}: expected a text, found {text!r}.")
    return Text(text=text, where=place)


def _item_text(question: Any, choices: Any, answer: Any) -> Any:
    try:
        return question + choices[answer]
    except (TypeError, IndexError, KeyError):
        return None


def _corpus(
    name: str, texts: Sequence[Text], tokenizer: Any, sequence_length: int, options: SteerOptions
) -> Corpus:
    sequences = make_sequences(
        texts, tokenizer, sequence_length=sequence_length, max_tokens=options.max_tokens
    )
    numbers = np.array([sequence.text for sequence in sequences])
    by_text = len(np.unique(numbers)) >= 4
    units = numbers if by_text else np.arange(len(sequences))
    unique = np.unique(units)
    if len(unique) < 2:
        raise DataError(
            f"--{name}: one sequence of text, so nothing can be held out. Add texts, or set a "
            "smaller --sequence-length."
        )
    generator = np.random.default_rng(options.seed)
    chosen = generator.permutation(unique)[: max(1, round(HELD_OUT * len(unique)))]
    return Corpus(
        name=name,
        sequences=tuple(sequences),
        held_out=np.isin(units, chosen),
        by_text=by_text,
        num_texts=len(np.unique(numbers)),
    )
