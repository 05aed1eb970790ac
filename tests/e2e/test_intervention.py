"""`moetools trace --intervention` and what reads such a trace, through the command line."""

import json

import pytest
from conftest import save_tiny_checkpoint

from moetools import cli
from moetools.interventions import RouterIntervention, fingerprinted, write_intervention
from moetools.opening import open_model


def moetools(capsys, *arguments):
    """Exit code, stdout and stderr of one command."""
    code = cli.run([*map(str, arguments), "--quiet"])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def intervention(tmp_path_factory, tiny_checkpoint):
    """A file that promotes one expert of the first layer."""
    opened = open_model(str(tiny_checkpoint), device="cpu")
    made = RouterIntervention(mode="soft", strength=1.0, promote={"00": (3,)})
    path = tmp_path_factory.mktemp("interventions") / "steer.json"
    write_intervention(path, fingerprinted(made, opened.checkpoint, opened.routers))
    return path


def test_a_steered_trace_is_told_from_others(
    capsys, tmp_path, tiny_checkpoint, tiny_trace, parallel_texts, intervention
):
    out = tmp_path / "steered"
    data = ("--data", parallel_texts, "--group-column", "lang", "--id-column", "id")
    code, shown, _ = moetools(
        capsys, "trace", tiny_checkpoint, *data, "--out", out, "--intervention", intervention
    )
    assert code == 0
    assert f"{tiny_checkpoint}, steered" in " ".join(shown.split())
    assert "Steered: soft 1, 1 expert promoted in routers 00." in shown
    code, shown, _ = moetools(capsys, "diff", tiny_trace, out, "--json")
    found = json.loads(shown)
    assert (code, found["a"]["intervention"], found["differs"]) == (0, None, True)
    assert found["b"]["intervention"] == json.loads(intervention.read_text())
    code, shown, _ = moetools(capsys, "diff", tiny_trace, out)
    assert (code, shown.count(", steered,")) == (0, 1)
    code, _, err = moetools(capsys, "diff", out, out, "--floor", tiny_trace)
    assert code == 2
    assert "under another --intervention" in err
    report = tmp_path / "report"
    arguments = ("report", tiny_trace, out, "--out", report, "--only", "load")
    code, shown, _ = moetools(capsys, *arguments)
    assert (code, shown.count(", steered")) == (0, 1)
    assert "steered" in (report / "report.html").read_text(encoding="utf-8")


def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    capsys, tmp_path, tiny_checkpoint, parallel_texts, intervention
):
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    document = json.loads(intervention.read_text())
    for name, change in (
        ("expert", {"promote": {"00": [99]}}),
        ("router", {"promote": {"40": [1]}}),
        ("field", {"lambda": 1}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**document, **change}))
    for model, file, message in (
        (other, intervention, "has other weights"),
        (tiny_checkpoint, tmp_path / "expert.json", "experts 0 to 7"),
        (tiny_checkpoint, tmp_path / "router.json", "routers 00 to 01"),
        (tiny_checkpoint, tmp_path / "field.json", "unknown fields: lambda"),
        (tiny_checkpoint, tmp_path / "none.json", "No such file"),
        (tiny_checkpoint, parallel_texts, "it is not JSON"),
    ):
        out = tmp_path / "out"
        code, shown, err = moetools(
            capsys, "trace", model, "--data", parallel_texts, "--out", out, "--intervention", file
        )
        assert (code, shown) == (2, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert message in err
        assert not out.exists()
