"""Log-likelihood of choices and texts: against the model itself, one row at a time."""

import numpy as np
import pytest
import torch
from conftest import save_byte_tokenizer
from tiny_models import tiny_model

from moetools.batching import load_tokenizer
from moetools.errors import DataError
from moetools.items import Item
from moetools.scoring import (
    ScoredRow,
    choice_rows,
    item_scores,
    score_choices,
    text_nll,
)

ITEMS = [
    Item(question="The sky is", choices=(" blue", " green and very loud"), answer=0),
    Item(question="Two and two", choices=(" are four", " x", " are five"), answer=0),
    Item(question="A much longer question, to be padded around", choices=("!", "?"), answer=1),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe", vocab_size=258)


def naive_loglik(model, tokenizer, question, choice):
    """One row, no padding, one token after the other; bytes do not merge."""
    context = tokenizer(question)["input_ids"]
    tokens = context + tokenizer(choice)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    return sum(
        torch.log(torch.softmax(logits[place - 1], dim=-1))[tokens[place]].item()
        for place in range(len(context), len(tokens))
    )


def test_choices_score_what_the_model_says(model, tokenizer):
    for item, score in zip(ITEMS, score_choices(model, tokenizer, ITEMS), strict=True):
        expected = [naive_loglik(model, tokenizer, item.question, c) for c in item.choices]
        per_token = [value / len(c) for value, c in zip(expected, item.choices, strict=True)]
        assert score.loglik == pytest.approx(expected, abs=1e-4)
        assert score.loglik_per_token == pytest.approx(per_token, abs=1e-4)
        assert score.prediction == np.argmax(expected)
        assert score.prediction_per_token == np.argmax(per_token)
        assert score.correct == (score.prediction == item.answer)
        assert score.correct_per_token == (score.prediction_per_token == item.answer)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_scores_do_not_depend_on_the_batch(family, tokenizer):
    model = tiny_model(family, vocab_size=258)
    alone = score_choices(model, tokenizer, ITEMS, batch_tokens=1)
    together = score_choices(model, tokenizer, ITEMS, batch_tokens=10_000)
    for one, other in zip(alone, together, strict=True):
        assert one.loglik == pytest.approx(other.loglik, abs=1e-4)


def test_texts_score_what_the_model_says(model):
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 250, length).astype(np.int32) for length in (9, 2, 30, 1)]
    nll, counts = text_nll(model, texts, batch_tokens=64)
    assert counts.tolist() == [8, 1, 29, 0]
    assert nll[3] == 0
    for text, found in zip(texts[:3], nll, strict=False):
        ids = torch.from_numpy(text.astype(np.int64))[None]
        with torch.no_grad():
            loss = model(ids, labels=ids).loss
        assert found / (len(text) - 1) == pytest.approx(loss.item(), abs=1e-5)
    alone, _ = text_nll(model, texts, batch_tokens=1)
    np.testing.assert_allclose(nll, alone, atol=1e-4)


def test_a_token_across_the_border_is_scored_in_every_choice():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("abcd")}
    merging = Tokenizer(models.BPE(vocab={**letters, "bc": 4}, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    items = [Item(question="ab", choices=("cd", "dd"), answer=0)]
    merged, apart = choice_rows(items, tokenizer)
    assert (merged.token_ids.tolist(), merged.start) == ([0, 4, 3], 1)
    assert (apart.token_ids.tolist(), apart.start) == ([0, 1, 3, 3], 1)
    sums = item_scores(items, [merged, apart], np.array([-2.0, -2.1]))[0]
    assert sums.loglik_per_token == pytest.approx((-2 / 2, -2.1 / 3))
    assert (sums.prediction, sums.prediction_per_token) == (0, 1)
    swallowed = Item(question="b", choices=("d", "c"), answer=0, where="q row 1")
    with pytest.raises(DataError, match="q row 1: the choice 'c' has no token of its own"):
        choice_rows([swallowed], tokenizer)


def test_choices_are_ordered_by_the_probability_of_the_whole_text(model):
    """Of a tokenizer that merges the space at the end of a question with one choice alone."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"A": 0, ":": 1, " ": 2, "y": 3, "1": 4, " y": 5}
    merging = Tokenizer(models.BPE(vocab=vocab, merges=[(" ", "y")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging)
    item = Item(question="A: ", choices=("y", "1", "11"), answer=0)
    rows = choice_rows([item], tokenizer)
    assert [row.token_ids.tolist() for row in rows] == [[0, 1, 5], [0, 1, 2, 4], [0, 1, 2, 4, 4]]
    assert [row.start for row in rows] == [2, 2, 2]
    (score,) = score_choices(model, tokenizer, [item])
    whole, _ = text_nll(model, [row.token_ids for row in rows])
    context, _ = text_nll(model, [rows[0].token_ids[:2]])
    assert score.loglik == pytest.approx(context - whole, abs=1e-4)


def test_equal_choices_take_the_first():
    items = [Item(question="a", choices=("b", "b"), answer=1)]
    score = item_scores(items, [_row(2), _row(2)], np.array([-1.0, -1.0]))[0]
    assert (score.prediction, score.correct) == (0, False)


def _row(length):
    return ScoredRow(token_ids=np.zeros(length, dtype=np.int32))


def test_rows_that_cannot_be_scored(tokenizer):
    item = Item(question="abcde", choices=("fghi", "x"), answer=0, where="q row 3")
    with pytest.raises(DataError, match=r"q row 3: 9 tokens .* the model has 8 positions"):
        choice_rows([item], tokenizer, limit=8)
