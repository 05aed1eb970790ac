"""Statistics of items: against brute force, other implementations, and simulations of coverage."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from moetools.item_statistics import (
    Sample,
    accuracy_table,
    compare_items,
    compare_nll,
    item_sample,
    label_prior,
    mcnemar,
    nll_table,
    smallest_difference,
    unseen_share,
)
from moetools.items import Item
from moetools.scoring import ItemScore


def scores(correct, per_token=None):
    """Scores that are right or wrong as said."""
    pairs = zip(correct, correct if per_token is None else per_token, strict=True)
    return [
        ItemScore(loglik=(0.0, -1.0), loglik_per_token=(0.0, -1.0), prediction=int(not whole),
                  prediction_per_token=int(not each), correct=bool(whole),
                  correct_per_token=bool(each))
        for whole, each in pairs
    ]  # fmt: skip


def make_items(num, groups=(None,), ids=False, choices=(" a", " b")):
    return [
        Item(question="q", choices=choices, answer=0, group=group, id=str(n) if ids else None)
        for group in groups
        for n in range(num)
    ]


def the_row(table, metric="accuracy", scope="pooled", group=None):
    found = table[(table["metric"] == metric) & (table["scope"] == scope)]
    found = found if group is None else found[found["group"] == group]
    assert len(found) == 1
    return found.iloc[0]


def test_mcnemar_is_the_binomial_test():
    for gained in range(12):
        for lost in range(12):
            if gained + lost:
                expected = binomtest(gained, gained + lost).pvalue
                assert mcnemar(gained, lost) == pytest.approx(expected)
    assert mcnemar(0, 0) == 1


def test_bootstrap_is_that_of_whole_units():
    """Against a plain loop that draws ids and puts their items together."""
    generator = np.random.default_rng(1)
    items = make_items(60, groups=("en", "fr"), ids=True)
    hard = generator.normal(size=60)
    correct = np.concatenate([hard + generator.normal(size=60) * 0.5 > 0 for _ in range(2)])
    found = accuracy_table(items, scores(correct))
    both = correct.reshape(2, 60)
    draws = generator.integers(0, 60, (4000, 60))
    naive = {
        "en": both[0][draws].mean(axis=1),
        "fr": both[1][draws].mean(axis=1),
        None: both[:, draws].mean(axis=(0, 2)),
    }
    for group, replicates in naive.items():
        row = the_row(found, scope="pooled" if group is None else "group", group=group)
        assert row["low"] == pytest.approx(np.quantile(replicates, 0.025), abs=0.03)
        assert row["high"] == pytest.approx(np.quantile(replicates, 0.975), abs=0.03)
        assert row["mde"] == pytest.approx(2.8016 * replicates.std(), rel=0.08)
    pooled, mean = the_row(found), the_row(found, scope="mean")
    assert pooled["value"] == pytest.approx(correct.mean()) == mean["value"]
    assert pooled["num_units"] == 60
    assert pooled["num_items"] == 120
    assert pooled["design_effect"] > 1.3, "translations are not independent"


def test_groups_that_share_nothing_are_drawn_apart():
    """The mix of groups does not vary; units of one group are as in a sample of it alone."""
    items = [*make_items(40, ("a",)), *make_items(40, ("b",))]
    found = accuracy_table(items, scores([True] * 40 + [False] * 40))
    row = the_row(found)
    assert row["value"] == 0.5
    assert row["low"] == pytest.approx(0.5 - unseen_share(80))


def test_the_mean_of_groups_counts_them_alike():
    items = [*make_items(10, ("a",)), *make_items(30, ("b",))]
    found = accuracy_table(items, scores([True] * 10 + [False] * 30))
    assert the_row(found, scope="mean")["value"] == 0.5
    assert the_row(found)["value"] == 0.25


def test_without_variation_the_interval_is_what_could_be_unseen():
    row = the_row(accuracy_table(make_items(50), scores([True] * 50)))
    assert (row["value"], row["high"]) == (1, 1)
    exact = binomtest(50, 50).proportion_ci(0.95).low
    assert row["low"] == pytest.approx(exact, abs=1e-9)
    assert math.isnan(row["design_effect"])
    table = compare_items(
        scores([True] * 50), scores([True] * 50), make_items(50), margin=0.02
    ).table
    row = the_row(table)
    assert (row["difference"], row["mcnemar_p"]) == (0, 1)
    assert row["low"] == pytest.approx(-unseen_share(50))
    assert row["verdict"] == "undecided"
    wide = compare_items(scores([True] * 50), scores([True] * 50), make_items(50), margin=0.2)
    assert the_row(wide.table)["verdict"] == "equivalent"


def test_no_verdict_without_a_margin():
    table = compare_items(scores([1, 0, 1]), scores([1, 1, 1]), make_items(3)).table
    assert "verdict" not in table


def test_one_item_has_no_interval():
    row = the_row(accuracy_table(make_items(1), scores([True])))
    assert row["value"] == 1
    assert 0 < row["low"] < 0.1


def test_chance_is_the_mean_of_one_over_the_choices():
    items = [*make_items(3), *make_items(1, choices=(" a", " b", " c", " d"))]
    row = the_row(accuracy_table(items, scores([True, False, True, False])))
    assert row["chance"] == pytest.approx((3 * 0.5 + 0.25) / 4)


def label_items(answers, choices=(" x", " y", " z"), group=None):
    return [
        Item(question="q", choices=choices, answer=choices.index(each), group=group)
        for each in answers
    ]


def test_label_prior_leaves_the_item_out():
    credit = label_prior(label_items([" x", " x", " x", " y"]))
    np.testing.assert_allclose(credit, [1, 1, 1, 0])
    balanced = label_prior(label_items([" x", " y", " z"] * 4))
    np.testing.assert_allclose(balanced, 0)
    # Each alone with its labels: nothing is known, all choices are alike.
    alone = label_prior(label_items([" x"]) + label_items([" p"], choices=(" p", " q")))
    np.testing.assert_allclose(alone, [1 / 3, 1 / 2])


def test_label_prior_goes_by_rate_not_by_count():
    """A label that is offered seldom and then right beats one that is offered often."""
    often = label_items([" b", " c", " a", " b", " c", " a"], choices=(" a", " b", " c"))
    rare = label_items([" r", " r", " r"], choices=(" a", " r"))
    np.testing.assert_allclose(label_prior([*often, *rare])[-3:], 1)


def test_label_prior_knows_no_translation_of_the_item():
    """Labels of other groups are not used, so an item that occurs in both says nothing."""
    english, french = label_items([" x"], group="en"), label_items([" x"], group="fr")
    np.testing.assert_allclose(label_prior(english + french), 1 / 3)


@pytest.mark.parametrize("num_items", [20, 200, 1000])
def test_label_prior_on_random_labels_is_chance(num_items):
    generator = np.random.default_rng(num_items)
    answers = generator.choice([" x", " y", " z"], size=num_items)
    means = label_prior(label_items(list(answers))).mean()
    assert means == pytest.approx(1 / 3, abs=4 / math.sqrt(num_items))


def test_gained_and_lost():
    found = compare_items(
        scores([1, 1, 0, 0], [0, 0, 0, 0]), scores([1, 0, 1, 1], [0, 0, 0, 1]), make_items(4)
    )
    assert found.gained == {"accuracy": [2, 3], "accuracy_per_token": [3]}
    assert found.lost == {"accuracy": [1], "accuracy_per_token": []}
    row = the_row(found.table)
    assert (row["gained"], row["lost"], row["difference"]) == (2, 1, 0.25)
    assert row["mcnemar_p"] == pytest.approx(1.0)


def test_one_group_keeps_its_name_and_has_one_row():
    table = accuracy_table(make_items(5, ("en",)), scores([1, 0, 1, 0, 1]))
    assert table["scope"].tolist() == ["pooled", "pooled"]
    assert table["group"].tolist() == ["en", "en"]


def test_draws_depend_on_the_seed_alone():
    items, right = make_items(30), scores(np.arange(30) % 3 == 0)
    first, again = accuracy_table(items, right), accuracy_table(items, right)
    assert first.equals(again)
    assert not first.equals(accuracy_table(items, right, seed=1))


def test_loss_of_texts():
    generator = np.random.default_rng(2)
    counts = generator.integers(10, 100, 80)
    nll = counts * generator.normal(3, 0.3, 80)
    sample = Sample(["a"] * 40 + ["b"] * 40, [None] * 80)
    table = nll_table(sample, nll, counts)
    row, perplexity = the_row(table, "nll"), the_row(table, "perplexity")
    assert row["value"] == pytest.approx(nll.sum() / counts.sum())
    assert perplexity["value"] == pytest.approx(math.exp(row["value"]))
    assert perplexity["low"] == pytest.approx(math.exp(row["low"]))
    assert the_row(table, "nll", "group", "a")["num_tokens"] == counts[:40].sum()
    # A constant shift of every token is seen exactly, whatever the texts' own spread.
    shifted = compare_nll(sample, nll, nll + 0.25 * counts, counts, margin=0.3)
    pooled = the_row(shifted, "nll")
    np.testing.assert_allclose(pooled[["difference", "low", "high"]].astype(float), 0.25)
    assert pooled["verdict"] == "equivalent"


# Simulations


@pytest.mark.slow
@pytest.mark.parametrize(("num_items", "accuracy"), [(60, 0.5), (200, 0.8), (500, 0.3)])
def test_intervals_cover(num_items, accuracy):
    generator = np.random.default_rng(num_items)
    sample = item_sample(make_items(num_items))
    covered = []
    for _ in range(150):
        (found,) = sample.estimates(generator.random(num_items) < accuracy, bounds=(0, 1))
        covered.append(found.low <= accuracy <= found.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.05)


def clustered(generator, num_ids, num_groups, gain):
    """Right answers of two arms [ids, groups]; whole ids tend to change together."""
    changed = generator.random(num_ids)[:, None] < 0.3
    changed = changed & (generator.random((num_ids, num_groups)) < 0.7)
    up = generator.random((num_ids, 1)) < 0.5 + gain
    a = np.where(changed, ~up, True)
    b = np.where(changed, up, True)
    return a, b


@pytest.mark.slow
def test_intervals_of_differences_cover_where_ids_are_shared():
    generator = np.random.default_rng(3)
    items = make_items(100, groups=("a", "b", "c", "d"), ids=True)
    sample = item_sample(items)
    covered, as_if_independent = [], []
    for _ in range(150):
        a, b = clustered(generator, 100, 4, 0.0)
        difference = (b.astype(float) - a).T.reshape(-1)
        pooled = sample.estimates(difference, bounds=(-1, 1))[-1]
        covered.append(pooled.low <= 0 <= pooled.high)
        as_if_independent.append(mcnemar(int((difference > 0).sum()), int((difference < 0).sum())))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.05)
    assert np.mean(np.array(as_if_independent) < 0.05) > 0.15, "what the documentation warns of"


@pytest.mark.slow
@pytest.mark.parametrize(("num_items", "discordance"), [(200, 0.2), (500, 0.1)])
def test_the_smallest_difference_is_found_four_times_in_five(num_items, discordance):
    """Of simulated pairs of arms that differ by just that much."""
    generator = np.random.default_rng(num_items)
    effect = smallest_difference(num_items, discordance)
    sample = item_sample(make_items(num_items))
    up, down = (discordance + effect) / 2, (discordance - effect) / 2
    found = []
    for _ in range(200):
        difference = generator.choice([1.0, -1.0, 0.0], num_items, p=[up, down, 1 - up - down])
        (pooled,) = sample.estimates(difference, bounds=(-1, 1))
        found.append(not pooled.low <= 0 <= pooled.high)
    assert np.mean(found) == pytest.approx(0.8, abs=0.09)


@pytest.mark.slow
def test_the_smallest_difference_takes_clusters_into_account():
    generator = np.random.default_rng(4)
    items = make_items(150, groups=("a", "b", "c", "d"), ids=True)
    effects = []
    for _ in range(8):
        a, b = clustered(generator, 150, 4, 0.0)
        table = compare_items(scores(a.T.reshape(-1)), scores(b.T.reshape(-1)), items).table
        effects.append(the_row(table)["mde"])
    effect = float(np.mean(effects))
    assert effect > 1.3 * smallest_difference(600, 0.21)
    sample = item_sample(items)
    found = []
    for _ in range(150):
        # The mean difference is 0.3 * 0.7 * 2 * gain.
        a, b = clustered(generator, 150, 4, effect / 0.42)
        pooled = sample.estimates((b.astype(float) - a).T.reshape(-1), bounds=(-1, 1))[-1]
        found.append(not pooled.low <= 0 <= pooled.high)
    assert np.mean(found) == pytest.approx(0.8, abs=0.1)


def test_smallest_differences_at_the_ends():
    assert math.isnan(smallest_difference(3, 0.5)), "three items show nothing"
    assert smallest_difference(1000, 0.0) == pytest.approx(7.8 / 1000, rel=0.05)
    assert smallest_difference(400, 0.3) < smallest_difference(100, 0.3)
