import json
import shutil

import numpy as np
import pytest
import synthetic

from moetools import cli
from moetools.files import write_json

FAST = ["--only", "load", "--only", "entropy"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Three layers, 8 experts, top-2, 16 texts of 30 tokens in two groups."""
    path = tmp_path_factory.mktemp("traces") / "trace"
    rng = np.random.default_rng(0)
    probs = {f"{layer:02}": synthetic.random_probs(rng, 480, 8, scale=2) for layer in range(3)}
    synthetic.write_trace(
        path,
        {name: synthetic.top_k_of(p, 2) for name, p in probs.items()},
        [30] * 16,
        num_experts=8,
        groups=["en", "sw"] * 8,
        probs=probs,
        num_parts=2,
    )
    return path


def run(*arguments):
    return cli.run(["report", *map(str, arguments)])


def error_of(capsys, *arguments):
    """The one line of a refused command."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_report_writes_a_page_numbers_and_tables(trace, tmp_path, capsys):
    assert run(trace, "--out", tmp_path / "r", "--csv") == 0
    shown = capsys.readouterr().out
    document = json.loads((tmp_path / "r" / "metrics.json").read_text(encoding="utf-8"))
    assert set(document) == {"format", "traces", "analyses", "skipped"}
    names = {"load", "entropy", "co_activation"}
    assert names <= set(document["analyses"])
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    for name, analysis in document["analyses"].items():
        assert analysis["source"]
        assert analysis["records"]
        assert f'<section id="{name}"' in page
        for suffix in ("parquet", "csv"):
            assert (tmp_path / "r" / "tables" / f"{name}.{suffix}").stat().st_size
    for name, reason in document["skipped"].items():
        assert f"{name}. {reason[:20]}" in shown
    assert "; 16 sequences, 2 groups" in shown
    assert str(tmp_path / "r" / "report.html") in shown.replace("\n", "")
    assert max(map(len, shown.splitlines())) <= 80


def test_terminal_shows_the_numbers_of_every_layer(trace, tmp_path, capsys):
    assert run(trace, "--out", tmp_path / "r", *FAST) == 0
    lines = capsys.readouterr().out.splitlines()
    records = json.loads((tmp_path / "r" / "metrics.json").read_text())["analyses"]["load"]
    for layer in range(3):
        (value,) = (
            record["value"]
            for record in records["records"]
            if record["metric"] == "load_max_over_mean" and record.get("layer") == layer
            and record["scope"] == "layer"
        )  # fmt: skip
        assert any(line.split()[:2] == [str(layer), f"{value:.2f}"] for line in lines)


def test_json_is_one_document(trace, tmp_path, capsys):
    assert run(trace, "--out", tmp_path / "r", "--json", *FAST) == 0
    shown = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert {key: shown[key] for key in written} == written
    assert set(shown) - set(written) == {"findings", "report"}
    assert set(shown["findings"]) == {"trace"}


def test_only_and_skip_choose_analyses(trace, tmp_path):
    assert run(trace, "--out", tmp_path / "r", *FAST, "--skip", "load") == 0
    document = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert set(document["analyses"]) == {"entropy"}
    assert not (tmp_path / "r" / "tables" / "load.parquet").exists()


def test_expert_intervals_are_given_when_asked_for(trace, tmp_path):
    import pandas as pd

    for name, options in (("without", []), ("with", ["--expert-intervals"])):
        assert run(trace, "--out", tmp_path / name, "--only", "load", *options) == 0
    known = {
        name: pd.read_parquet(tmp_path / name / "tables/load.parquet")
        .query("scope == 'expert' and metric == 'load_share'")["low"].notna()
        for name in ("without", "with")
    }  # fmt: skip
    assert not known["without"].any()
    assert known["with"].all()


def test_seed_moves_intervals_and_not_values(trace, tmp_path):
    documents = []
    for seed in (0, 1):
        assert run(trace, "--out", tmp_path / str(seed), "--only", "load", "--seed", seed) == 0
        documents.append(json.loads((tmp_path / str(seed) / "metrics.json").read_text()))
    first, second = (document["analyses"]["load"]["records"] for document in documents)
    noisy = ("load_cv_noise",)
    assert [r["value"] for r in first if r["metric"] not in noisy] == [
        r["value"] for r in second if r["metric"] not in noisy
    ]
    assert [r.get("low") for r in first] != [r.get("low") for r in second]


def test_two_traces_are_compared(trace, tmp_path, capsys):
    shutil.copytree(trace, tmp_path / "other")
    assert run(trace, tmp_path / "other", "--out", tmp_path / "r", *FAST) == 0
    shown = capsys.readouterr().out
    assert "trace: synthetic" in shown
    assert "other: synthetic" in shown
    records = json.loads((tmp_path / "r" / "metrics.json").read_text())["analyses"]["load"]
    assert {record["trace"] for record in records["records"]} == {"trace", "other"}


def test_incomplete_trace_needs_partial(trace, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(trace, part)
    manifest = json.loads((part / "manifest.json").read_text())
    write_json(part / "manifest.json", {**manifest, "complete": False})
    (part / "tokens" / "part-00001.parquet").unlink()
    message = error_of(capsys, part, "--out", tmp_path / "r")
    assert "is incomplete" in message
    assert "--partial" in message
    assert run(part, "--out", tmp_path / "r", "--partial", *FAST) == 0
    assert "This trace is incomplete" in capsys.readouterr().out
    page = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert "its first 8 of 16 sequences" in page


def test_what_is_not_a_trace_is_refused(trace, tmp_path, capsys):
    assert "is not a trace" in error_of(capsys, tmp_path, "--out", tmp_path / "r")
    assert "is not a trace" in error_of(capsys, tmp_path / "none", "--out", tmp_path / "r")
    other = tmp_path / "other"
    shutil.copytree(trace, other)
    manifest = json.loads((other / "manifest.json").read_text())
    write_json(other / "manifest.json", {**manifest, "format_version": 99})
    assert "trace format 99" in error_of(capsys, other, "--out", tmp_path / "r")
    (other / "manifest.json").write_text("{")
    assert "cannot be read" in error_of(capsys, other, "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_unknown_analysis_is_answered_with_the_nearest(trace, tmp_path, capsys):
    for option in ("--only", "--skip"):
        message = error_of(capsys, trace, "--out", tmp_path / "r", option, "lod")
        assert "Did you mean 'load'?" in message
    message = error_of(capsys, trace, "--out", tmp_path / "r", "--only", "load", "--skip", "load")
    assert "no analysis to run" in message


def test_output_folder_rules(trace, tmp_path, capsys):
    arguments = [trace, *FAST, "--out"]
    assert run(*arguments, tmp_path / "r") == 0
    capsys.readouterr()
    assert "--overwrite" in error_of(capsys, *arguments, tmp_path / "r")
    assert run(*arguments, tmp_path / "r", "--overwrite") == 0
    capsys.readouterr()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("x")
    message = error_of(capsys, *arguments, foreign, "--overwrite")
    assert "was not written by moetools" in message
    assert (foreign / "thesis.txt").exists()
    for out in (trace, trace.parent, trace / "report"):
        assert "input" in error_of(capsys, *arguments, out, "--overwrite")


def test_size_limits_hold_for_a_large_model(tmp_path):
    """58 layers of 256 experts; caches of every size take too long here, see the unit tests."""
    rng = np.random.default_rng(0)
    num_experts, lengths = 256, [20] * 4
    ids = {
        f"{layer:02}": synthetic.random_ids(rng, sum(lengths), num_experts, 8)
        for layer in range(58)
    }
    synthetic.write_trace(tmp_path / "t", ids, lengths, num_experts=num_experts)
    assert run(tmp_path / "t", "--out", tmp_path / "r", "--skip", "local_consistency") == 0
    assert (tmp_path / "r" / "report.html").stat().st_size < 2e6
    assert (tmp_path / "r" / "metrics.json").stat().st_size < 2e6
