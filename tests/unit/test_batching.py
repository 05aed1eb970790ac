import numpy as np
import pytest
from conftest import save_byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from moetools.batching import (
    TokenSequence,
    cut,
    fingerprint,
    load_tokenizer,
    make_sequences,
    plan_parts,
    tokenise,
)
from moetools.errors import CheckpointError, RequestError
from moetools.texts import Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(
        folder, chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    return load_tokenizer(folder)


def decoded(tokenizer, sequences):
    return [tokenizer.decode(each.token_ids) for each in sequences]


@given(st.integers(1, 200), st.integers(1, 64))
def test_cutting_drops_nothing(length, sequence_length):
    pieces = cut(np.arange(length, dtype=np.int32), sequence_length)
    assert np.array_equal(np.concatenate(pieces), np.arange(length))
    assert all(len(piece) == sequence_length for piece in pieces[:-1])
    assert 1 <= len(pieces[-1]) <= sequence_length


def test_long_texts_become_consecutive_sequences(tokenizer):
    texts = [Text(text="abcdefg", group="x", id="1"), Text(text="hi", group="y", id="1")]
    sequences = make_sequences(texts, tokenizer, sequence_length=3)
    assert decoded(tokenizer, sequences) == ["abc", "def", "g", "hi"]
    assert [(each.group, each.id) for each in sequences] == [("x", "1")] * 3 + [("y", "1")]


def test_pack_joins_within_a_group_and_drops_nothing(tokenizer):
    texts = [Text(text=t, group=g) for t, g in (("ab", "x"), ("cd", "y"), ("e", "x"), ("f", "y"))]
    sequences = make_sequences(texts, tokenizer, sequence_length=4, pack=True)
    assert decoded(tokenizer, sequences) == ["ab<eos>e", "<eos>", "cd<eos>f", "<eos>"]
    assert [each.group for each in sequences] == ["x", "x", "y", "y"]


@pytest.mark.parametrize("pack", [False, True])
def test_limits_treat_groups_alike(tokenizer, pack):
    texts = [Text(text=f"{g}{n}", group=g) for g in "xy" for n in range(9)]
    sequences = make_sequences(texts, tokenizer, sequence_length=2, pack=pack, max_sequences=4)
    assert [each.group for each in sequences] == ["x", "x", "y", "y"]
    sequences = make_sequences(texts, tokenizer, sequence_length=2, pack=pack, max_tokens=7)
    assert sum(len(each.token_ids) for each in sequences) == 7


def test_limits_keep_translations_together(tokenizer):
    texts = [
        Text(text=f"{g}{n}", group=g, id=str(n))
        for g, order in (("x", (0, 1, 2)), ("y", (2, 1, 0)))
        for n in order
    ]
    sequences = make_sequences(texts, tokenizer, sequence_length=8, max_sequences=4)
    assert [each.id for each in sequences] == ["0", "1", "1", "0"]


def test_chat_template_wraps_texts(tokenizer, tmp_path):
    assert tokenizer.decode(tokenise(["hi"], tokenizer, chat_template=True)[0]) == "[hi]"
    save_byte_tokenizer(tmp_path)
    with pytest.raises(RequestError, match="no chat template"):
        tokenise(["hi"], load_tokenizer(tmp_path), chat_template=True)


def test_a_missing_tokenizer_is_an_error_of_the_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 90), st.integers(1, 200)
)
def test_a_plan_visits_every_sequence_once(lengths, batch_tokens, part_tokens):
    parts = plan_parts(lengths, batch_tokens=batch_tokens, part_tokens=part_tokens)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == len(lengths)
    for part in parts:
        visited = sorted(number for batch in part.batches for number in batch)
        assert visited == list(range(part.first, part.last))
        assert sum(lengths[part.first : part.last - 1]) < part_tokens, "a part ends when it is full"
        for batch in part.batches:
            longest = max(lengths[number] for number in batch)
            assert len(batch) == 1 or len(batch) * longest <= batch_tokens
        widths = [max(lengths[number] for number in batch) for batch in part.batches]
        assert widths == sorted(widths, reverse=True)


def test_the_fingerprint_covers_tokens_borders_groups_and_ids():
    def of(*tokens, **fields):
        return fingerprint(
            [TokenSequence(token_ids=np.array(t, np.int32), **fields) for t in tokens]
        )

    assert of([1, 2], [3]) == of([1, 2], [3])
    others = {of([1, 2, 3]), of([1], [2, 3]), of([1, 2], [4]), of([1, 2], [3], group="x")}
    assert len({of([1, 2], [3]), of([1, 2], [3], id="x"), *others}) == 6
