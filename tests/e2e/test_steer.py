"""`moetools steer` on the embedded checkpoint, as a process of its own."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from conftest import write_rows

import moetools
from moetools.items import read_items

MOETOOLS = [sys.executable, "-m", "moetools.cli"]


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    """The items of the demo, some to find experts on, some to report on."""
    rows = [
        {
            "id": item.id, "question": item.question, "choices": list(item.choices),
            "answer": item.answer, "split": "test" if number % 5 == 0 else "dev",
        }
        for number, item in enumerate(read_items("demo"))
        if number < 60
    ]  # fmt: skip
    return write_rows(tmp_path_factory.mktemp("steer") / "items.jsonl", rows)


def steer(items, *more) -> list[str]:
    """A command line."""
    return [
        "steer", "demo", "--target", str(items), "--target-where", "split=dev",
        "--generic", "demo", "--generic-where", "lang=en", "--layers", "2:3",
        "--max-tokens", "4000", "--device", "cpu", "--tasks", str(items), *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_embedded_checkpoint(items, tmp_path):
    out, hook = tmp_path / "steered", tmp_path / "hook.json"
    command = steer(items, "--out", str(out), "--save-intervention", str(hook))
    done = subprocess.run(
        [*MOETOOLS, *command], check=False, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "olmoe on cpu in float32, layers 2, 3" in done.stdout
    assert "loaded again: loss differs by 0 nats per token, 0 of 12" in done.stdout
    report = json.loads((out / "moetools" / "edit-1" / "steer.json").read_text())
    first = report["measured"]["layers"][0]
    assert first["changed_measured"] == pytest.approx(first["changed_predicted"], abs=1e-3)
    for layer in report["fidelity"]["layers"]:
        assert layer["variation"] < 0.2
        assert layer["agreement"] > 0.9
        assert layer["agreement"] > layer["agreement_without"]
    table = pd.read_parquet(out / "moetools" / "edit-1" / "items.parquet")
    assert len(table) == 12
    assert {"prediction.base", "prediction.hook", "prediction.folded"} < set(table.columns)
    found = moetools.diff("demo", out)
    assert {each.key for each in found.tensors.differences} == {
        each["key"] for each in report["fold"]
    }
    assert json.loads(hook.read_text())["mode"] == "soft"
