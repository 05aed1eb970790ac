"""From texts to batches: tokens, sequences of bounded length, parts and batches of a run.

Nothing is dropped: a long text becomes consecutive sequences, and `pack` joins short ones.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetools.errors import CheckpointError, DataError, RequestError
from moetools.texts import Text

TOKENISED_TEXTS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """One sequence that goes through the model.

    Attributes:
        token_ids: [T] int32, at least one.
        group: Of its text.
        id: Of its text; None where texts were packed.
        text: Number of its text in the data; None where texts were packed.
    """

    token_ids: NDArray[np.int32]
    group: str | None = None
    id: str | None = None
    text: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Consecutive sequences that are recorded together.

    Attributes:
        first, last: Sequences `first` to `last - 1`.
        batches: Numbers of the sequences of each batch; longest first, so that the first batch
            needs the most memory.
    """

    first: int
    last: int
    batches: tuple[tuple[int, ...], ...]


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder.

    Raises:
        CheckpointError: There is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: no tokenizer that transformers can read ({reason}). Put the model's "
            "tokenizer files beside its weights."
        ) from None


def tokenise(
    texts: Sequence[str], tokenizer: Any, *, chat_template: bool = False
) -> list[NDArray[np.int32]]:
    """Token ids of each text, with the special tokens that the tokenizer adds.

    Args:
        texts: Any number.
        tokenizer: A transformers tokenizer.
        chat_template: Wrap each text as the turn of a user.

    Raises:
        RequestError: `chat_template`, and the tokenizer has none.
    """
    if chat_template:
        if not tokenizer.chat_template:
            raise RequestError("--chat-template: the tokenizer of this model has no chat template.")
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
            for text in texts
        ]
    encoded = tokenizer(
        list(texts),
        add_special_tokens=not chat_template,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def make_sequences(
    texts: Sequence[Text],
    tokenizer: Any,
    *,
    sequence_length: int,
    pack: bool = False,
    chat_template: bool = False,
    max_sequences: int | None = None,
    max_tokens: int | None = None,
) -> list[TokenSequence]:
    """Sequences of at most `sequence_length` tokens, in the order of the texts.

    With a limit, groups take turns and texts with equal ids stay together, so that each group
    gets as many texts as the others; the last sequence is cut to give exactly `max_tokens`.

    Args:
        texts: At least one.
        tokenizer: A transformers tokenizer.
        sequence_length: Tokens of a sequence at most.
        pack: Join the texts of a group, with an end-of-text token between them where the tokenizer
            has one, and cut the result.
        chat_template: Wrap each text as the turn of a user.
        max_sequences: Sequences at most.
        max_tokens: Tokens at most.

    Raises:
        DataError: A text has no tokens.
    """
    order = _turns(texts) if max_sequences or max_tokens else list(range(len(texts)))
    numbered: list[tuple[int, TokenSequence]] = []
    joined: dict[str | None, list[NDArray[np.int32]]] = defaultdict(list)
    num_tokens = num_sequences = 0
    for start in range(0, len(order), TOKENISED_TEXTS):
        numbers = order[start : start + TOKENISED_TEXTS]
        tokens = tokenise(
            [texts[number].text for number in numbers], tokenizer, chat_template=chat_template
        )
        for number, ids in zip(numbers, tokens, strict=True):
            text = texts[number]
            if not len(ids):
                raise DataError(f"{text.where}: the text has no tokens. Remove the row.")
            num_tokens += len(ids)
            num_sequences += not pack
            if pack:
                joined[text.group] += _ended(ids, tokenizer.eos_token_id)
                continue
            numbered += [
                (
                    number,
                    TokenSequence(token_ids=piece, group=text.group, id=text.id, text=number),
                )
                for piece in cut(ids, sequence_length)
            ]
        enough = (max_tokens and num_tokens >= max_tokens) or (
            max_sequences and num_sequences >= max_sequences
        )
        if enough:
            break
    if pack:
        packed = [
            [TokenSequence(token_ids=piece, group=group) for piece in cut(ids, sequence_length)]
            for group, pieces in joined.items()
            for ids in [np.concatenate(pieces)]
        ]
        by_turn = sorted(
            (turn, place) for place, pieces in enumerate(packed) for turn in range(len(pieces))
        )
        numbered = [(place, packed[place][turn]) for turn, place in by_turn]
    numbered = _limited(numbered, max_sequences, max_tokens)
    return [sequence for _, sequence in sorted(numbered, key=lambda pair: pair[0])]


def cut(token_ids: NDArray[np.int32], sequence_length: int) -> list[NDArray[np.int32]]:
    """Consecutive pieces of at most `sequence_length` tokens."""
    return [
        token_ids[start : start + sequence_length]
        for start in range(0, len(token_ids), sequence_length)
    ]


def _ended(ids: NDArray[np.int32], eos: int | None) -> list[NDArray[np.int32]]:
    if eos is None or ids[-1] == eos:
        return [ids]
    return [ids, np.array([eos], dtype=np.int32)]


def _turns(texts: Sequence[Text]) -> list[int]:
    """Numbers of the texts so that groups take turns and equal ids come together."""
    first_seen: dict[str, int] = {}
    seen: dict[str | None, int] = defaultdict(int)
    keys = []
    for number, text in enumerate(texts):
        if text.id is None:
            turn = seen[text.group]
            seen[text.group] += 1
        else:
            turn = first_seen.setdefault(text.id, len(first_seen))
        keys.append((turn, number))
    return [number for _, number in sorted(keys)]


def _limited(
    numbered: list[tuple[int, TokenSequence]], max_sequences: int | None, max_tokens: int | None
) -> list[tuple[int, TokenSequence]]:
    numbered = numbered[:max_sequences]
    if max_tokens is None:
        return numbered
    kept, left = [], max_tokens
    for number, sequence in numbered:
        if left <= 0:
            break
        kept.append((number, replace(sequence, token_ids=sequence.token_ids[:left])))
        left -= len(sequence.token_ids)
    return kept


def plan_parts(lengths: Sequence[int], *, batch_tokens: int, part_tokens: int) -> tuple[Part, ...]:
    """Divide a run into parts and batches; the same input always gives the same plan.

    A part ends with the sequence that fills it. Within a part sequences are batched by length, so
    that little is padded; a batch holds at most `batch_tokens` tokens, padding included, or one
    sequence.
    """
    parts, first, count = [], 0, 0
    for number, length in enumerate(lengths):
        count += length
        if count >= part_tokens or number == len(lengths) - 1:
            batches = tuple(_batches(range(first, number + 1), lengths, batch_tokens))
            parts.append(Part(first=first, last=number + 1, batches=batches))
            first, count = number + 1, 0
    return tuple(parts)


def _batches(
    numbers: range, lengths: Sequence[int], batch_tokens: int
) -> Iterator[tuple[int, ...]]:
    batch: list[int] = []
    for number in sorted(numbers, key=lambda number: (-lengths[number], number)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield tuple(batch)
            batch = []
        batch.append(number)
    yield tuple(batch)


def fingerprint(sequences: Sequence[TokenSequence]) -> str:
    """Sha256 (hexadecimal) of all tokens, lengths, groups and ids."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(f"{len(sequence.token_ids)} {sequence.group!r} {sequence.id!r}\n".encode())
        digest.update(np.ascontiguousarray(sequence.token_ids, dtype="<i4").tobytes())
    return digest.hexdigest()
