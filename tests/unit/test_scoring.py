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
    choice_logliks,
    choice_rows,
    item_scores,
    score_choices,
    text_nll,
)
from moetools.shared_context import LOGITS_PER_BATCH, plan_contexts, score_shared

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


def varied_items(num_items=10):
    """Questions and choices of many lengths; some choices are a single token."""
    generator = np.random.default_rng(5)

    def words(length):
        return "".join(chr(97 + letter) for letter in generator.integers(0, 26, length))

    return [
        Item(
            question=words(generator.integers(3, 50)),
            choices=tuple(
                " " * (number % 2) + words(generator.integers(1, 8))
                for _ in range(generator.integers(2, 5))
            ),
            answer=0,
        )
        for number in range(num_items)
    ]


def logliks(model, tokenizer, items, **options):
    rows = choice_rows(items, tokenizer)
    return choice_logliks(model, rows, [len(item.choices) for item in items], **options)


@pytest.mark.parametrize(
    "family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "gemma4_text", "mimo_v2_flash"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_shared_context_scores_what_whole_rows_do(family, tokenizer):
    """In batches of any size; some of these families have sliding windows or latent attention."""
    model, items = tiny_model(family, vocab_size=258), varied_items()
    whole = logliks(model, tokenizer, items, batch_tokens=1, share=False)
    for batch_tokens in (1, 120, 10_000):
        shared = logliks(model, tokenizer, items, batch_tokens=batch_tokens)
        assert shared.shared
        assert shared.reason is None
        np.testing.assert_allclose(shared.values, whole.values, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe", "jamba", "minimax", "zaya"])
@pytest.mark.filterwarnings("ignore")
def test_families_with_other_state_fall_back_to_whole_rows(family, tokenizer):
    model, items = tiny_model(family, vocab_size=258), varied_items(4)
    whole = logliks(model, tokenizer, items, batch_tokens=200, share=False)
    shared = logliks(model, tokenizer, items, batch_tokens=200)
    assert not shared.shared
    assert "state as" in shared.reason
    np.testing.assert_array_equal(shared.values, whole.values)


def test_a_cache_that_lies_is_found_out(tokenizer):
    """A model whose answer depends on how much goes through it at once."""
    model, items = tiny_model("olmoe", vocab_size=258), varied_items(4)

    def shift(module, args, kwargs, output):
        if kwargs.get("past_key_values") is not None:
            output.logits[..., 97] += 1.0

    handle = model.register_forward_hook(shift, with_kwargs=True)
    found = logliks(model, tokenizer, items, batch_tokens=200)
    handle.remove()
    assert not found.shared
    assert "changes log-likelihoods by" in found.reason


def test_contexts_go_through_the_model_once(model, tokenizer):
    """Tokens that the model sees: each context and each choice but its last token, padding out."""
    items = [Item(question="abcdefgh" * 4, choices=(" xy", " zw", " uv"), answer=0)] * 3
    seen = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    rows = choice_rows(items, tokenizer)
    groups = [rows[0:3], rows[3:6], rows[6:9]]
    score_shared(model, groups, batch_tokens=10_000)
    handle.remove()
    assert seen == [3 * 32, 9 * 2]


def test_scores_that_depend_on_the_batch_are_measured(model, tokenizer):
    """As with capacity limits, or ties in sparse attention."""
    items = varied_items(12)
    assert logliks(model, tokenizer, items, batch_tokens=400).by_batch < 1e-4

    def crowded(module, args, output):
        output.logits[..., 97] += 0.01 * len(output.logits)

    handle = model.register_forward_hook(crowded)
    found = logliks(model, tokenizer, items, batch_tokens=10_000)
    handle.remove()
    assert found.by_batch > 1e-3


def test_a_model_that_returns_router_logits_is_scored(model, tokenizer):
    items = varied_items(4)
    expected = logliks(model, tokenizer, items, batch_tokens=256)
    model.config.output_router_logits = True
    try:
        found = logliks(model, tokenizer, items, batch_tokens=256)
        text_nll(model, [np.arange(5, dtype=np.int32), np.arange(9, dtype=np.int32)])
    finally:
        model.config.output_router_logits = False
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.shared


def test_batches_can_be_planned_for_another_vocabulary(model, tokenizer):
    rows = choice_rows(varied_items(6), tokenizer)
    groups = [rows[first : first + 4] for first in range(0, len(rows), 4)]
    whole = plan_contexts(model, groups, batch_tokens=10**6)
    assert len(whole) == 1
    longest = max(group[0].start for group in groups)
    limited = plan_contexts(
        model, groups, batch_tokens=10**6, vocab_size=LOGITS_PER_BATCH // longest
    )
    assert len(limited) > 1
    assert limited == plan_contexts(model, groups, batch_tokens=longest)
