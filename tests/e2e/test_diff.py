"""`moetools diff` as a user runs it: the demo traced twice, and against itself on texts."""

import json
import subprocess
import sys

import pytest

import moetools
from moetools import cli


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The demo in batches of two sizes."""
    folder = tmp_path_factory.mktemp("traces")
    for name, batch_tokens in (("a", 2048), ("again", 300)):
        moetools.trace(
            "demo", data="demo", out=folder / name, max_tokens=3000, batch_tokens=batch_tokens,
            keep=("nll",), device="cpu",
        )  # fmt: skip
    return folder / "a", folder / "again"


def run(capsys, *arguments):
    """Exit code and stdout of one command."""
    code = cli.run([*map(str, arguments), "--quiet"])
    return code, capsys.readouterr().out


def test_the_same_model_twice(capsys, traces):
    a, again = traces
    code, shown = run(capsys, "diff", a, again, "--floor", again)
    assert code == 0
    assert max(map(len, shown.splitlines()[3:])) <= 80
    assert "batches of 300 tokens" in shown
    assert "; equivalent (within" in " ".join(shown.split())
    document = json.loads(run(capsys, "diff", a, again, "--json")[1])
    overlap = next(
        record["value"]
        for record in document["records"]
        if (record["metric"], record["scope"]) == ("overlap_at_k", "model")
    )
    assert overlap > 0.999


def test_the_demo_against_itself_on_texts(capsys):
    code, shown = run(
        capsys, "diff", "demo", "demo", "--data", "demo", "--max-tokens", 600, "--exit-code"
    )
    assert code == 0
    assert "No difference: every router tensor is the same." in shown
    assert "No difference: every token got the same experts in both models." in shown


def test_a_trace_and_a_checkpoint_through_the_script(traces):
    done = subprocess.run(
        [sys.executable, "-m", "moetools.cli", "diff", str(traces[0]), "demo"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "Compare two of a kind" in done.stderr
