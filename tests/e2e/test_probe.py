"""`moetools probe` as a process of its own: killed and resumed, and on the embedded checkpoint."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import save_byte_tokenizer, write_rows
from tiny_models import save_tiny

from moetools import cli

MOETOOLS = [sys.executable, "-m", "moetools.cli"]


@pytest.mark.slow
def test_kill_and_resume(capsys, tmp_path, parallel_rows):
    save_tiny("olmoe", tmp_path / "model", num_hidden_layers=4, vocab_size=258)
    save_byte_tokenizer(tmp_path / "model")
    data = write_rows(tmp_path / "texts.jsonl", parallel_rows)
    items = write_rows(
        tmp_path / "items.jsonl",
        [{"question": "All", "choices": [" human", " beings"], "answer": n % 2} for n in range(6)],
    )
    command = [
        "probe", tmp_path / "model", "--data", data, "--tasks", items, "--device", "cpu",
        "--quiet", "--max-tokens", 600, "--seeds", 2,
    ]  # fmt: skip
    command = [str(argument) for argument in command]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    with subprocess.Popen([*MOETOOLS, *command, "--out", str(torn)]) as process:
        while not (torn / "documents" / "layer-01.parquet").exists():
            time.sleep(0.01)
            assert process.poll() is None
        process.kill()
    assert not (torn / "probe.json").exists()
    assert cli.run([*command, "--out", str(torn)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.run([*command, "--out", str(torn), "--resume"]) == 0
    assert cli.run([*command, "--out", str(whole)]) == 0
    pd.testing.assert_frame_equal(
        pd.read_parquet(torn / "probe.parquet"), pd.read_parquet(whole / "probe.parquet")
    )
    assert {p.name for p in torn.iterdir()} == {p.name for p in whole.iterdir()}
    assert not list(torn.rglob("*.part"))


@pytest.mark.slow
def test_the_embedded_checkpoint(tmp_path):
    out = tmp_path / "probe"
    done = subprocess.run(
        [*MOETOOLS, "probe", "demo", "--data", "demo", "--max-tokens", "900", "--layers", "6:7",
         "--seeds", "1", "--together", "deep-half", "--out", str(out), "--device", "cpu"],
        check=False, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "demo on cpu in float32" in done.stdout
    assert "All probed layers of the deeper half changed together" in done.stdout
    assert "Loading demo (float32, cpu)" in done.stderr
    found = json.loads((out / "probe.json").read_text(encoding="utf-8"))
    assert len(found["results"]) == 3 * 5
    together = [each for each in found["results"] if each["probe"] == "deep-half"]
    assert {each["layers"] for each in together} == {"6, 7"}
    single = {(e["layers"], e["operator"]): e for e in found["results"] if e["layer"] is not None}
    for each in together:
        # what two layers lose together is more than one loses alone
        assert each["kl"] > single["7", each["operator"]]["kl"]
