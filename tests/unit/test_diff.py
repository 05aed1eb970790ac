"""`moetools diff` through the command line: what it prints, and every input that it refuses."""

import json

import numpy as np
import pytest
from conftest import save_tiny_checkpoint
from synthetic import random_probs, top_k_of, write_trace

from moetools import cli
from moetools.paired_traces import diff_traces
from moetools.trace_store import MANIFEST, TraceStore

E, K = 8, 2
LENGTHS = np.random.default_rng(5).integers(5, 60, 30).tolist()


def moetools(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = cli.run([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def refused(capsys):
    """Run `diff`, expect exit code 2 and a single line, and return that line."""

    def run(*arguments):
        code, out, err = moetools(capsys, "diff", *arguments, "--quiet")
        assert code == 2, err
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        return err

    return run


def write(path, *, seed=0, noise=0.0, num_experts=E, lengths=LENGTHS, **options):
    rng = np.random.default_rng(seed)
    probs = {name: random_probs(rng, sum(lengths), num_experts, scale=2.0) for name in ("00", "02")}
    noisy = {
        name: values * np.exp(noise * np.random.default_rng(1).standard_normal(values.shape))
        for name, values in probs.items()
    }
    noisy = {name: values / values.sum(axis=1, keepdims=True) for name, values in noisy.items()}
    ids = {name: top_k_of(values, K) for name, values in noisy.items()}
    return write_trace(
        path, ids, lengths, num_experts=num_experts, probs=noisy, **options
    ).path  # fmt: skip


def change_manifest(path, **changes):
    file = path / MANIFEST
    document = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**document, **changes}), encoding="utf-8")


@pytest.fixture
def traces(tmp_path):
    """A, B, and A recorded again with a little noise."""
    return (
        write(tmp_path / "a"),
        write(tmp_path / "b", noise=0.5),
        write(tmp_path / "again", noise=0.01),
    )


def test_two_traces(capsys, traces):
    a, b, _ = traces
    code, shown, err = moetools(capsys, "diff", a, b, "--quiet")
    assert code == 0, err
    assert max(map(len, shown.splitlines()[3:])) <= 80
    lines = [line.split() for line in shown.splitlines()]
    table = next(i for i, line in enumerate(lines) if line[:2] == ["layer", "overlap"])
    assert [line[0] for line in lines[table + 1 : table + 4]] == ["0", "2", "mean"]
    assert "unrelated routings with these loads would share" in " ".join(shown.split())
    assert "No floor was given." in shown
    overlap = float(lines[table + 1][1])
    values = [
        np.concatenate(list(TraceStore(path).selections("00"))).astype(int) for path in (a, b)
    ]
    same = (values[0][:, :, None] == values[1][:, None, :]).sum() / values[0].size
    assert overlap == pytest.approx(same, abs=6e-4)


def test_the_floor_stands_beside_every_number(capsys, traces):
    a, b, again = traces
    code, shown, _ = moetools(capsys, "diff", a, b, "--floor", again, "--quiet")
    assert code == 0
    assert max(map(len, shown.splitlines()[4:])) <= 80
    row = next(line.split() for line in shown.splitlines() if line.startswith("mean"))
    numbers = [float(text) for text in row[1:]]
    assert len(numbers) == 11
    del numbers[2]  # the chance level has no floor
    for value, floor in zip(numbers[0:8:2], numbers[1:8:2], strict=True):
        assert value < floor < 1
    assert numbers[8] > numbers[9]
    assert "A, recorded again, selects 99" in shown
    assert "No floor" not in shown
    assert "it shows no rounding" in " ".join(shown.split())


def test_json_has_every_number_with_its_floor(capsys, traces):
    a, b, again = traces
    code, shown, _ = moetools(capsys, "diff", a, b, "--floor", again, "--json", "--quiet")
    document = json.loads(shown)
    assert code == 0
    assert document["kind"] == "traces"
    assert document["differs"] is True
    assert document["a"]["trace"] == str(a)
    overlaps = [record for record in document["records"] if record["metric"] == "overlap_at_k"]
    assert {record["scope"] for record in overlaps} == {"layer", "model"}
    for record in overlaps:
        assert record["low"] < record["value"] < record["high"] < record["floor"] < 1
    floors = {
        (record["metric"], record.get("layer"), record.get("decile")): record["floor"]
        for record in document["records"]
    }
    alone = diff_traces(a, again).table
    for row in alone.itertuples():
        key = tuple(None if value != value else value for value in (row.decile,))
        layer = None if row.scope != "layer" else int(row.layer)
        assert floors[row.metric, layer, *key] == pytest.approx(row.value)


def test_exit_code_is_about_any_difference(capsys, traces):
    a, b, _ = traces
    assert moetools(capsys, "diff", a, b, "--exit-code", "--quiet")[0] == 3
    code, shown, _ = moetools(capsys, "diff", a, a, "--exit-code", "--quiet")
    assert code == 0
    assert "No difference: every token got the same experts" in shown


def test_one_token_is_a_difference(tmp_path):
    ids = np.tile([0, 1], (2000, 1))
    other = ids.copy()
    other[1234] = [0, 2]
    a, b = (
        write_trace(tmp_path / name, {"00": selected}, [2000], num_experts=4).path
        for name, selected in (("a", ids), ("b", other))
    )
    assert diff_traces(a, b).differs
    assert not diff_traces(a, a).differs


def test_notes_on_how_they_were_recorded(capsys, traces):
    a, b, _ = traces
    change_manifest(b, dtype="bfloat16", engine="vllm")
    shown = " ".join(moetools(capsys, "diff", a, b, "--quiet")[1].split())
    assert "with engine transformers, B with vllm: part of the difference can come from" in shown
    assert "B with bfloat16" in shown


def test_fewer_texts_are_compared_with_their_own(capsys, tmp_path):
    probs = random_probs(np.random.default_rng(0), sum(LENGTHS), E)
    ids = {"00": top_k_of(probs, K)}
    a = write_trace(tmp_path / "a", ids, LENGTHS, num_experts=E).path
    first = {"00": ids["00"][: sum(LENGTHS[:-1])]}
    b = write_trace(tmp_path / "b", first, LENGTHS[:-1], num_experts=E).path
    code, shown, _ = moetools(capsys, "diff", a, b, "--quiet")
    assert code == 0
    assert "Compared are the 29 sequences of B; A has 30." in shown


def test_traces_that_cannot_be_compared(refused, tmp_path, traces):
    a, *_ = traces
    shorter = write(tmp_path / "shorter", lengths=LENGTHS[:-1])
    assert "a cannot be compared. Its tokens are not those of shorter: trace" in refused(shorter, a)
    wider = write(tmp_path / "wider", num_experts=9)
    assert "Router 00 has 9 experts, in a 8" in refused(a, wider)
    change_manifest(shorter, complete=False)
    assert "shorter is incomplete. Finish it" in refused(a, shorter)
    assert "incomplete" in refused(shorter, a)
    (wider / "tokens" / "part-00000.parquet").unlink()
    assert "part-00000.parquet is missing" in refused(a, wider)


def test_a_floor_of_another_model(refused, tmp_path, traces):
    a, b, again = traces
    document = json.loads((b / MANIFEST).read_text(encoding="utf-8"))
    document["routers"][0]["sha256"] = {"router.weight": "ab"}
    (b / MANIFEST).write_text(json.dumps(document), encoding="utf-8")
    line = refused(a, again, "--floor", b)
    assert f"--floor {b}: router 00 is not that of {a}. Record the model of" in line


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory):
    """Like `tiny_checkpoint`, with other random weights."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoints") / "other", seed=1)


def test_two_checkpoints_on_disk(capsys, tiny_checkpoint, other_checkpoint):
    code, shown, _ = moetools(capsys, "diff", tiny_checkpoint, other_checkpoint, "--quiet")
    assert code == 0
    assert max(map(len, shown.splitlines()[2:])) <= 80
    assert "2 of 2 routers differ; their weights moved by" in shown
    assert "add --data" in shown
    rows = [line.split() for line in shown.splitlines()]
    mean = next(row for row in rows if row[:1] == ["mean"])
    assert float(mean[1]) > 1
    assert abs(float(mean[2])) < 0.2


def test_two_checkpoints_on_texts(capsys, tiny_checkpoint, other_checkpoint, parallel_texts):
    arguments = (
        "diff", tiny_checkpoint, other_checkpoint, "--data", parallel_texts, "--max-tokens", 300,
        "--group-column", "lang", "--device", "cpu", "--quiet",
    )  # fmt: skip
    code, shown, err = moetools(capsys, *arguments)
    assert code == 0, err
    assert max(map(len, shown.splitlines()[2:])) <= 80
    words = " ".join(shown.split())
    assert "300 tokens in" in words
    assert "of A's experts are lost" in words
    assert "B's routers on A's inputs lose" in words
    document = json.loads(moetools(capsys, *arguments, "--json")[1])
    assert document["kind"] == "checkpoints"
    assert document["run"]["num_tokens"] == 300
    cells = {record.get("cell") for record in document["records"]}
    assert {"router_only", "input_only", "total"} <= cells
    split = [r for r in document["records"] if r["metric"] == "overlap_at_k" and "cell" in r]
    assert all("floor" in record for record in split)
    scopes = {(record["scope"], record.get("group")) for record in split}
    assert scopes >= {("model", None), ("layer", None), ("group", "de")}


def test_exit_code_and_matching_of_checkpoints(capsys, tiny_checkpoint, other_checkpoint):
    same = ("diff", tiny_checkpoint, tiny_checkpoint, "--exit-code", "--quiet")
    code, shown, _ = moetools(capsys, *same)
    assert code == 0
    assert "No difference: every router tensor is the same." in shown
    different = ("diff", tiny_checkpoint, other_checkpoint, "--exit-code", "--quiet")
    assert moetools(capsys, *different)[0] == 3
    code, shown, _ = moetools(capsys, *different, "--match-experts", "--json")
    assert code == 3
    matching = json.loads(shown)["matching"]
    assert sorted(matching) == ["00", "01"]
    assert all(sorted(order) == list(range(8)) for order in matching.values())
    shown = moetools(capsys, *different, "--match-experts")[1]
    assert "Experts matched by their router rows:" in shown


def test_requests_that_make_no_sense(refused, tmp_path, traces, tiny_checkpoint):
    a, b, _ = traces
    assert "is a trace and" in refused(a, tiny_checkpoint)
    assert "Compare two of a kind" in refused(tiny_checkpoint, a)
    assert f"{tmp_path / 'nothing'}: no such folder" in refused(a, tmp_path / "nothing")
    assert "no such folder" in refused(tiny_checkpoint, tmp_path / "nothing")
    assert "--data is for two checkpoints" in refused(a, b, "--data", "demo")
    assert "--match-experts is for two checkpoints" in refused(a, b, "--match-experts")
    assert "--floor is for two traces" in refused(tiny_checkpoint, tiny_checkpoint, "--floor", a)
    assert "--batch-tokens says how to run" in refused(a, b, "--batch-tokens", 5)
    assert "--max-tokens says how to run" in refused(
        tiny_checkpoint, tiny_checkpoint, "--max-tokens", 5
    )
    pair = (tiny_checkpoint, tiny_checkpoint, "--data")
    assert "missing.jsonl" in refused(*pair, tmp_path / "missing.jsonl")
    assert "--device warp: expected" in refused(*pair, "demo", "--device", "warp")
    assert "--dtype int1: expected" in refused(*pair, "demo", "--dtype", "int1")
    line = refused(*pair, "demo", "--max-tokens", 0)
    assert "--max-tokens 0: expected at least 1" in line
