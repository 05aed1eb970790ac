"""`report` with what stands beside the traces: training steps, scores, checkpoints."""

import json
import shutil

import numpy as np
import pytest
import synthetic
from conftest import save_tiny_checkpoint

from moetools import cli

E, K = 8, 2


def write(path, seed=0, groups=("de", "en", "es", "fr", "it"), **options):
    rng = np.random.default_rng(seed)
    count = 6 * len(groups)
    probs = {f"{layer:02}": synthetic.random_probs(rng, count * 20, E) for layer in range(2)}
    return synthetic.write_trace(
        path,
        {name: synthetic.top_k_of(p, K) for name, p in probs.items()},
        [20] * count,
        num_experts=E,
        groups=list(groups) * 6,
        ids=[f"item {i // len(groups)}" for i in range(count)],
        reference_group="en",
        probs=probs,
        **options,
    )


def run(capsys, *arguments):
    code = cli.run(["report", *map(str, arguments), "--quiet"])
    return code, *capsys.readouterr()


def error_of(capsys, *arguments):
    """The one line of a refused command."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    return err


def test_traces_of_a_run_by_the_number_in_their_name(capsys, tmp_path):
    steps = [tmp_path / f"step{step:05}" for step in (300, 20, 1000)]
    for seed, path in enumerate(steps):
        write(path, seed)
    out = tmp_path / "r"
    code, shown, err = run(
        capsys, *steps, "--step-from", "name", "--only", "congestion", "--out", out
    )
    assert code == 0, err
    assert "From step 20 to 1000: the busiest expert's load" in " ".join(shown.split())
    document = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    assert [trace["name"] for trace in document["traces"]] == [
        "step00020",
        "step00300",
        "step01000",
    ]
    records = document["analyses"]["congestion"]["records"]
    assert {record["step"] for record in records} == {20, 300, 1000}
    assert {"surge", "stabilisation", "relaxation"} <= {record["metric"] for record in records}
    assert "All traces" in (out / "report.html").read_text(encoding="utf-8")


def test_steps_of_the_traced_models(capsys, tmp_path):
    trace = write(tmp_path / "a").path
    manifest = json.loads((trace / "manifest.json").read_text(encoding="utf-8"))
    (trace / "manifest.json").write_text(json.dumps({**manifest, "model": "org/model-step250"}))
    code, shown, err = run(
        capsys,
        trace,
        "--step-from",
        "manifest",
        "--only",
        "load",
        "--out",
        tmp_path / "r",
        "--json",
    )
    assert code == 0, err
    records = json.loads(shown)["analyses"]["load"]["records"]
    assert {record["step"] for record in records} == {250}


def test_steps_that_are_not_told(capsys, tmp_path):
    trace = write(tmp_path / "final").path
    out = tmp_path / "r"
    assert "has no number in 'final'" in error_of(
        capsys, trace, "--step-from", "name", "--out", out
    )
    assert "expected name or manifest" in error_of(
        capsys, trace, "--step-from", "date", "--out", out
    )
    assert not out.exists()


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_scores_of_languages(capsys, tmp_path, suffix):
    trace = write(tmp_path / "trace").path
    scores = {"de": 0.5, "es": 0.6, "fr": 0.7, "it": 0.9, "xx": 0.1}
    file = tmp_path / f"scores.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(scores))
    else:
        lines = [f"{group},{score}" for group, score in scores.items()]
        file.write_text("\n".join(["group,score", *lines]))
    code, shown, err = run(
        capsys, trace, "--scores", file, "--only", "multilingual", "--out", tmp_path / "r", "--json"
    )
    assert code == 0, err
    analysis = json.loads(shown)["analyses"]["multilingual"]
    found = [r for r in analysis["records"] if r["metric"] == "divergence_score_r"]
    assert {r["score_source"] for r in found} == {"given"}
    assert any("lacks: xx" in limit for limit in analysis["limits"])


def test_too_few_scores_are_said(capsys, tmp_path):
    trace = write(tmp_path / "trace").path
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"de": 0.5, "en": 1}))
    code, shown, _ = run(
        capsys, trace, "--scores", file, "--only", "multilingual", "--out", tmp_path / "r", "--json"
    )
    assert code == 0
    limits = json.loads(shown)["analyses"]["multilingual"]["limits"]
    assert any("takes 4 languages besides the reference, --scores has 1" in each for each in limits)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a json object"),
        ('{"de": "good"}', "expected a json object"),
        ('{"de": NaN}', "no finite number for de"),
        ("{}", "no finite number for any group"),
    ],
)
def test_scores_that_are_none(capsys, tmp_path, text, message):
    trace = write(tmp_path / "trace").path
    file = tmp_path / "scores.json"
    file.write_text(text)
    assert message in error_of(capsys, trace, "--scores", file, "--out", tmp_path / "r")


def test_scores_without_a_file(capsys, tmp_path):
    trace = write(tmp_path / "trace").path
    message = error_of(capsys, trace, "--scores", tmp_path / "no.json", "--out", tmp_path / "r")
    assert "cannot be read: No such file" in message


def test_another_checkpoint_is_refused(capsys, tmp_path, tiny_trace):
    other = save_tiny_checkpoint(tmp_path / "other", num_experts=16)
    message = error_of(capsys, tiny_trace, "--model", other, "--out", tmp_path / "r")
    assert "are not those that were traced" in message
    shutil.rmtree(other)
    assert str(other) in error_of(capsys, tiny_trace, "--model", other, "--out", tmp_path / "r")
