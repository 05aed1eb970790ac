"""lm-evaluation-harness, the extra `moetools[lm-eval]`: the same scores, item by item."""

import importlib.util

import pytest
from conftest import write_rows

import moetools
from moetools import harness
from moetools.errors import DataError, RequestError
from moetools.items import DEMO, read_items
from moetools.opening import open_model
from moetools.scoring import choice_rows, item_scores, score_rows

NUM_ITEMS = 24
TASK = """
task: sections
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
with_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs moetools[lm-eval]"
)
without_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed"
)
ignoring_its_warnings = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of the harness on the first items of the demo."""
    folder = tmp_path_factory.mktemp("harness")
    items = read_items("demo", max_items=NUM_ITEMS)
    rows = [
        {"question": item.question, "choices": item.choices, "answer": item.answer}
        for item in items
    ]
    file = write_rows(folder / "items.jsonl", rows)
    path = folder / "sections.yaml"
    path.write_text(TASK.format(file=file), encoding="utf-8")
    return path


@with_harness
@ignoring_its_warnings
@pytest.mark.slow
def test_the_harness_agrees_item_by_item(task):
    items = read_items("demo", max_items=NUM_ITEMS)
    opened = open_model("demo", device="cpu")
    with opened.load() as model:
        rows = choice_rows(items, opened.tokenizer)
        scores = item_scores(items, rows, score_rows(model, rows))
        found = harness.run(model, opened.tokenizer, [str(task)], batch_size=8, seed=0)
    samples = sorted(found["samples"]["sections"], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(items)
    for item, score, sample in zip(items, scores, samples, strict=True):
        assert sample["doc"]["question"] == item.question
        theirs = [loglik for loglik, _ in sample["filtered_resps"]]
        assert score.loglik == pytest.approx(theirs, abs=1e-3)
        assert score.correct == bool(sample["acc"])
    (row,) = harness.metrics(found)
    assert row["value"] == sum(score.correct for score in scores) / len(items)
    assert (row["metric"], row["group"], row["num_items"]) == ("acc", "sections", NUM_ITEMS)


@with_harness
@ignoring_its_warnings
@pytest.mark.slow
def test_its_results_are_in_the_same_table(task):
    found = moetools.evaluate("demo", tasks="demo", lm_eval=task, device="cpu", max_items=NUM_ITEMS)
    by_source = found.results.set_index(["source", "metric"])["value"]
    assert by_source["lm-eval", "acc"] == pytest.approx(by_source["tasks", "accuracy"])
    assert found.to_json()["lm_eval"] == [str(task)]


@with_harness
@ignoring_its_warnings
def test_bad_tasks_are_one_line(tmp_path):
    opened = open_model("demo", device="cpu")
    with opened.load() as model:

        def run(task):
            return harness.run(model, opened.tokenizer, [task], batch_size=1, seed=0)

        with pytest.raises(RequestError, match=r"no such task\. Did you mean 'hellaswag'"):
            run("helaswag")
        with pytest.raises(RequestError, match="no such file"):
            run(str(tmp_path / "none.yaml"))
        with pytest.raises(DataError, match="--lm-eval hellaswag: "):
            run("hellaswag")


@without_harness
def test_a_missing_harness_is_named_with_its_remedy():
    with pytest.raises(RequestError, match=r"pip install 'moetools\[lm-eval\]'"):
        moetools.evaluate("demo", lm_eval="hellaswag")


def test_metrics_of_results():
    found = {
        "results": {"task": {"alias": "task", "acc,none": 0.5, "acc_stderr,none": 0.1,
                             "f1,strict": 0.25, "f1_stderr,strict": "N/A"}},
        "n-samples": {"task": {"original": 4, "effective": 3}},
    }  # fmt: skip
    accuracy, f1 = harness.metrics(found)
    assert (accuracy["metric"], accuracy["value"], accuracy["num_items"]) == ("acc", 0.5, 3)
    assert accuracy["low"] == pytest.approx(0.5 - 1.96 * 0.1, abs=1e-4)
    assert (f1["metric"], f1["value"]) == ("f1 (strict)", 0.25)
    assert f1["low"] != f1["low"]


def test_the_demo_items_are_those_of_its_file():
    assert [item.id for item in read_items("demo")] == [item.id for item in read_items(DEMO)]
