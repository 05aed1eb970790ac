"""Statistics of items, for any answers, groups and ids."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moetools.item_statistics import accuracy_table, compare_items, label_prior
from moetools.items import Item
from moetools.scoring import ItemScore


def score(prediction, answer):
    loglik = tuple(0.0 if place == prediction else -1.0 for place in range(3))
    return ItemScore(
        loglik=loglik, loglik_per_token=loglik, prediction=prediction,
        prediction_per_token=prediction, correct=prediction == answer,
        correct_per_token=prediction == answer,
    )  # fmt: skip


@st.composite
def answered(draw):
    """Items of up to three groups, some with shared ids, and two arms' scores of them."""
    labels = st.integers(0, 2)
    keys = draw(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), min_size=1, max_size=25,
                 unique=True)
    )  # fmt: skip
    named = draw(st.booleans())
    items = [
        Item(question="q", choices=(" x", " y", " z"), answer=draw(labels), group=group,
             id=str(number) if named else None)
        for group, number in keys
    ]  # fmt: skip
    arms = [[score(draw(labels), item.answer) for item in items] for _ in range(2)]
    return items, *arms


@settings(max_examples=25)
@given(answered())
def test_differences_change_sign_with_the_arms(case):
    items, a, b = case
    there, back = compare_items(a, b, items), compare_items(b, a, items)
    np.testing.assert_allclose(there.table["difference"], -back.table["difference"], atol=1e-12)
    assert there.gained == back.lost
    for name in ("mcnemar_p", "mde"):
        np.testing.assert_allclose(
            there.table[name].astype(float), back.table[name].astype(float), atol=1e-9
        )
    accuracies = [accuracy_table(items, arm)["value"].to_numpy() for arm in (a, b)]
    np.testing.assert_allclose(there.table["value_a"], accuracies[0])
    np.testing.assert_allclose(there.table["difference"], accuracies[1] - accuracies[0], atol=1e-12)


@settings(max_examples=25)
@given(answered())
def test_intervals_hold_their_value_and_stay_in_range(case):
    items, a, _ = case
    table = accuracy_table(items, a)
    known = table[table["low"].notna()]
    assert (known["low"] <= known["high"]).all()
    assert known[["low", "high", "value"]].stack().between(0, 1).all()
    assert (table["num_units"] <= table["num_items"]).all()


@settings(max_examples=25)
@given(answered(), st.randoms())
def test_the_order_of_items_does_not_matter(case, random):
    items, a, _ = case
    order = list(range(len(items)))
    random.shuffle(order)
    shuffled = [items[place] for place in order]
    np.testing.assert_allclose(label_prior(shuffled), label_prior(items)[order])
    before = accuracy_table(items, a)
    after = accuracy_table(shuffled, [a[place] for place in order])
    names = ["value", "chance", "label_prior", "num_items", "num_units"]
    np.testing.assert_allclose(after[names].astype(float), before[names].astype(float))
