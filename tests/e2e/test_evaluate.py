"""`moetools evaluate` as a process, on the embedded checkpoint, and with router interventions."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import write_rows
from safetensors.torch import load_file, save_file

import moetools
from moetools import cli
from moetools.checkpoint import DEMO
from moetools.interventions import RouterIntervention, fingerprinted, write_intervention
from moetools.items import read_items
from moetools.opening import open_model
from moetools.scoring import choice_logliks, choice_rows

MOETOOLS = [sys.executable, "-m", "moetools.cli"]


@pytest.fixture(scope="module")
def intervention(tmp_path_factory, tiny_checkpoint):
    """A file that promotes two experts of each layer of the tiny checkpoint."""
    wanted = RouterIntervention(
        mode="soft", strength=1.0, promote={"00": (1, 2), "01": (3, 4)}, model=str(tiny_checkpoint)
    )
    path = tmp_path_factory.mktemp("intervention") / "steer.json"
    opened = open_model(str(tiny_checkpoint), device="cpu")
    write_intervention(path, fingerprinted(wanted, opened.checkpoint, opened.routers))
    return path


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    rows = [
        {"question": f"Item {number}:", "choices": [" a", " bc", " def"], "answer": number % 3}
        for number in range(12)
    ]
    return write_rows(tmp_path_factory.mktemp("items") / "items.jsonl", rows)


def test_an_intervention_is_compared_with_none(
    tiny_checkpoint, items, parallel_texts, intervention
):
    """Either side can have it, and the two differ by sign alone."""
    common = {"tasks": items, "data": parallel_texts, "against": tiny_checkpoint, "device": "cpu"}
    first = moetools.evaluate(tiny_checkpoint, intervention=intervention, **common)
    second = moetools.evaluate(tiny_checkpoint, against_intervention=intervention, **common)
    assert first.summary["arms"]["model"]["intervention"] == str(intervention)
    assert first.summary["shared_context"]
    nll = [run.comparison.set_index("metric").loc["nll", "difference"] for run in (first, second)]
    assert abs(nll[0]) > 1e-3
    assert nll[0] == pytest.approx(-nll[1])
    plain = moetools.evaluate(tiny_checkpoint, tasks=items, device="cpu").items["loglik"]
    of_second = second.items[second.items["arm"] == "model"]["loglik"]
    np.testing.assert_allclose(of_second, plain, atol=1e-4)
    changed = first.items[first.items["arm"] == "model"]["loglik"]
    assert (np.abs(changed.to_numpy() - plain.to_numpy()) > 1e-3).any()


def test_an_intervention_for_another_checkpoint_is_refused(capsys, items, intervention):
    code = cli.run(
        ["evaluate", "demo", "--tasks", str(items), "--intervention", str(intervention), "--quiet"]
    )
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_embedded_checkpoint(tmp_path):
    done = subprocess.run(
        [*MOETOOLS, "evaluate", "demo", "--tasks", "demo", "--max-items", "60", "--data", "demo",
         "--max-tokens", "2000", "--out", str(tmp_path / "out"), "--device", "cpu"],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "60 items, each context scored once" in done.stdout
    written = json.loads((tmp_path / "out" / "evaluate.json").read_text())
    accuracy = next(row for row in written["results"] if row["metric"] == "accuracy")
    assert accuracy["low"] > 0.6 > accuracy["chance"] == 0.25


@pytest.mark.slow
def test_batch_size_moves_no_item_of_the_demo():
    """In float32, whole rows or shared contexts: |difference| of 1e-4 nats at most, no flip."""
    items = read_items("demo", max_items=60)
    num_choices = [len(item.choices) for item in items]
    opened = open_model("demo", device="cpu", dtype="float32")
    with opened.load() as model:
        rows = choice_rows(items, opened.tokenizer)
        runs = [
            choice_logliks(model, rows, num_choices, batch_tokens=size, share=share).values
            for size, share in ((2048, False), (512, False), (4096, True), (700, True))
        ]
    starts = np.cumsum([0, *num_choices[:-1]])
    for run in runs[1:]:
        np.testing.assert_allclose(run, runs[0], atol=1e-4)
        for first, size in zip(starts, num_choices, strict=True):
            before, after = runs[0][first : first + size], run[first : first + size]
            gap = np.diff(np.sort(before))[-1]
            assert before.argmax() == after.argmax() or gap < 2e-4


@pytest.mark.slow
def test_what_the_batch_size_moves_in_the_demo_is_listed():
    runs = [
        moetools.evaluate("demo", tasks="demo", max_items=12, device="cpu", dtype="float32",
                          batch_tokens=size)
        for size in (1, 2048)
    ]  # fmt: skip
    moved = (runs[0].items["loglik"] - runs[1].items["loglik"]).abs() > 1e-4
    listed = {
        each["item"]
        for run in runs
        for each in run.summary["arms"]["model"]["routing_ties"]["items"]
    }
    assert set(runs[0].items["item"][moved]) <= listed
    assert len(listed) <= 4


@pytest.mark.slow
def test_the_demo_beats_a_damaged_copy(tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(DEMO, damaged)
    tensors = load_file(damaged / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("self_attn.o_proj.weight"):
            tensor.zero_()
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    found = moetools.evaluate(
        "demo", tasks="demo", data="demo", max_items=40, max_tokens=2000, against=damaged,
        device="cpu",
    )  # fmt: skip
    rows = found.comparison[found.comparison["scope"] == "pooled"].set_index("metric")
    assert rows.loc["accuracy", "low"] > 0
    assert rows.loc["nll", "high"] < 0
    assert rows.loc["accuracy", "value_b"] > rows.loc["accuracy", "value_a"]
    assert rows.loc["accuracy", "gained"] > rows.loc["accuracy", "lost"]
