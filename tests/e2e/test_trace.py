"""`moetools trace` through the command line: what it prints, and every input that it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import save_tiny_checkpoint, write_rows

from moetools import cli
from moetools.trace_store import MANIFEST, TraceStore


def moetools(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def refused(capsys):
    """Run `trace`, expect exit code 2 and a single line, and return that line."""

    def run(*arguments):
        code, out, err = moetools(capsys, "trace", *arguments, "--quiet")
        assert code == 2, err
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err

    return run


def test_a_trace_and_its_summary(capsys, tmp_path, tiny_checkpoint, parallel_texts):
    out = tmp_path / "trace"
    code, shown, err = moetools(
        capsys, "trace", tiny_checkpoint, "--data", parallel_texts, "--group-column", "lang",
        "--id-column", "id", "--out", out, "--keep", "nll", "--keep", "logits",
    )  # fmt: skip
    store = TraceStore(out)
    assert code == 0, err
    assert "2 of 2 routers, 1 652 of 1 652 tokens" in shown
    assert "36 sequences in 3 groups (de, en, fr; reference en)" in shown
    assert f"Next: moetools report {out}" in shown
    assert store.num_tokens == 1652
    assert {"nll", "logits.00", "logits.01"} <= store.columns
    assert "Loading" in err


def test_json_is_one_document(capsys, tmp_path, tiny_checkpoint, parallel_rows):
    data = write_rows(tmp_path / "a.jsonl", [*parallel_rows, {**parallel_rows[0], "id": "alone"}])
    code, shown, _ = moetools(
        capsys, "trace", tiny_checkpoint, "--data", data, "--group-column", "lang",
        "--id-column", "id", "--out", tmp_path / "trace", "--json", "--quiet",
    )  # fmt: skip
    document = json.loads(shown)
    assert code == 0
    assert document["num_dropped"] == 1
    assert document["num_tokens"] == 1652
    assert document["unknown_rules"] == []


def test_bad_data(refused, tmp_path, tiny_checkpoint):
    def line(rows, *options, name="a.jsonl"):
        return refused(
            tiny_checkpoint, "--data", write_rows(tmp_path / name, rows), "--out",
            tmp_path / "trace", *options,
        )  # fmt: skip

    two = [{"text": "a", "lang": "x", "id": 1}, {"text": "b", "lang": "y", "id": 2}]
    assert "no texts" in line([])
    assert "no column 'body'. It has: text, lang, id" in line(two, "--text-column", "body")
    assert "row 2: column 'text' holds 7 (int), not a string" in line([two[0], {"text": 7}])
    assert "row 2: the text is empty" in line([two[0], {"text": ""}])
    assert "No id occurs in two groups" in line(two, "--group-column", "lang", "--id-column", "id")
    twice = [two[0], two[0], two[1]]
    assert "id '1' occurs twice" in line(twice, "--group-column", "lang", "--id-column", "id")
    assert "unknown extension '.doc'" in line(two, name="a.doc")
    assert "no column 'language'" in line(two, "--group-column", "language")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "gpu"), "--device gpu: expected auto, cpu, cuda, cuda:N or mps"),
        (("--device", "cuda:99"), "--device cuda:99: torch sees"),
        (("--dtype", "int8"), "--dtype int8: expected auto, float32, bfloat16, float16"),
        (("--keep", "everything"), "--keep everything: expected one of logits, inputs"),
        (("--keep-tokens", "5"), "add one of them"),
        (("--max-tokens", "0"), "--max-tokens 0: expected at least 1"),
        (("--sequence-length", "4096"), "the model has 128 positions"),
        (("--pack", "--id-column", "id"), "Drop one of both"),
        (("--chat-template",), "no chat template"),
        (("--reference-group", "en"), "the data has no groups"),
        (("--max-tokens", "many"), "Invalid value"),
        (("--no-such-option",), "No such option"),
    ],
)
def test_bad_options(refused, tmp_path, tiny_checkpoint, parallel_texts, options, message):
    line = refused(tiny_checkpoint, "--data", parallel_texts, "--out", tmp_path / "trace", *options)
    assert message in line
    assert not (tmp_path / "trace").exists()


def test_output_folders(refused, capsys, tmp_path, tiny_checkpoint, parallel_texts):
    data = tmp_path / "in" / "texts.jsonl"
    data.parent.mkdir()
    data.write_bytes(parallel_texts.read_bytes())
    command = (tiny_checkpoint, "--data", data, "--max-tokens", 200, "--out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    assert "was not written by moetools" in refused(*command, mine)
    assert "was not written by moetools" in refused(*command, mine, "--overwrite")
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert "contains the input" in refused(*command, data.parent)
    assert "contains the input" in refused(*command, tiny_checkpoint)
    assert "is or contains the working folder" in refused(*command, ".")
    assert "contains the input" in refused(*command, data)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "is a file" in refused(*command, tmp_path / "file")

    trace = tmp_path / "trace"
    assert moetools(capsys, "trace", *command, trace)[0] == 0
    assert "exists. Name a new folder, or replace it with --overwrite" in refused(*command, trace)
    assert moetools(capsys, "trace", *command, trace, "--overwrite", "--seed", "1")[0] == 0
    assert TraceStore(trace).manifest.seed == 1
    marker = trace / ".moetools.json"
    marker.write_text('{"kind": "trace", "complete": false}', encoding="utf-8")
    assert "holds an incomplete trace. Continue it with --resume" in refused(*command, trace)
    assert "seed 1 -> 2" in refused(*command, trace, "--resume", "--seed", "2")


def test_a_failed_overwrite_leaves_the_old_trace(refused, capsys, tmp_path, parallel_texts):
    model, trace = save_tiny_checkpoint(tmp_path / "model"), tmp_path / "trace"
    command = (model, "--data", parallel_texts, "--out", trace)
    assert moetools(capsys, "trace", *command)[0] == 0
    poison(model)
    line = refused(*command, "--overwrite")
    assert "NaN in the router logits of layer 1 (router 01), sequence" in line
    assert "--allow-nan" in line
    assert TraceStore(trace).num_tokens == 1652
    code, shown, _ = moetools(capsys, "trace", *command, "--overwrite", "--allow-nan")
    assert code == 0
    assert "note       NaN in" in shown


def poison(model):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.gate.weight"][2, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_traces_that_cannot_be_read(capsys, tmp_path, tiny_checkpoint, parallel_texts):
    trace = tmp_path / "trace"
    arguments = ("trace", tiny_checkpoint, "--data", parallel_texts, "--out", trace)
    assert moetools(capsys, *arguments)[0] == 0

    def report():
        code, _, err = moetools(capsys, "report", trace, "--out", tmp_path / "report", "--quiet")
        assert code == 2, err
        assert err.count("\n") == 1
        return err

    manifest = json.loads((trace / MANIFEST).read_text(encoding="utf-8"))
    for change, message in (
        ({"complete": False}, "is incomplete"),
        ({"format_version": 99}, "has trace format 99; this moetools reads format 2"),
        ({"format": "other"}, "not the manifest of a moetools trace"),
        ({"routers": [{"name": "00"}]}, "is damaged"),
    ):
        (trace / MANIFEST).write_text(json.dumps({**manifest, **change}), encoding="utf-8")
        assert message in report()
    (trace / MANIFEST).write_text('{"format": "moet', encoding="utf-8")
    assert "cannot be read" in report()
    (trace / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    part = trace / "tokens" / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    assert "part-00000.parquet cannot be read" in report()
    part.unlink()
    assert "part-00000.parquet is missing" in report()


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "moetools.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_writers_and_an_interrupt(refused, capsys, tmp_path, tiny_checkpoint, parallel_rows):
    rows = [{**row, "text": f"{n} {row['text']}"} for n in range(50) for row in parallel_rows]
    data = write_rows(tmp_path / "long.jsonl", rows)
    trace = tmp_path / "trace"
    command = (
        tiny_checkpoint, "--data", data, "--out", trace, "--part-tokens", 300,
        "--batch-tokens", 64,
    )  # fmt: skip
    first = start("trace", *command)
    try:
        wait_for(lambda: list(trace.glob("sequences/part-*.parquet")), first)
        assert "is being written by another moetools process" in refused(*command, "--resume")
        assert "is being written by another moetools process" in refused(*command, "--overwrite")
        first.send_signal(signal.SIGINT)
        _, err = first.communicate(timeout=60)
    finally:
        first.kill()
        first.wait()
    assert first.returncode == 130, err
    last = err.strip().splitlines()[-1]
    assert last == "Interrupted. Continue with the same command and --resume."
    assert "Traceback" not in err
    done = TraceStore(trace, partial=True).num_tokens
    assert done > 0
    code, shown, _ = moetools(capsys, "trace", *command, "--resume", "--json", "--quiet")
    document = json.loads(shown)
    assert code == 0
    assert document["recorded_tokens"] == document["num_tokens"] - done


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_torchrun_is_answered(refused, tmp_path, tiny_checkpoint, parallel_texts, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refused(tiny_checkpoint, "--data", parallel_texts, "--out", tmp_path / "trace")
    assert "start it without torchrun" in line
