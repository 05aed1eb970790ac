"""The worked trajectory study says what its tables say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moetools.analysis import select, single

SCRIPT = Path(__file__).parents[2] / "examples" / "trajectory_study.py"
QUALITIES = ("q1", "q2", "q3", "q4")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of the page, its text, its answers, and the tables behind it."""
    folder = tmp_path_factory.mktemp("study")
    before = os.times()
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--out", folder / "page", "--tables", folder / "tables"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    spent = os.times().children_user - before.children_user
    assert spent < 120  # seconds of one core, whatever else the machine does
    page = (folder / "page" / "README.md").read_text(encoding="utf-8")
    found = {
        question.strip(): (verdict, numbers)
        for question, verdict, numbers in re.findall(
            r"^\| (.+\?) \| \*\*(.+)\*\* \| (.+) \|$", page, re.M
        )
    }
    tables = [
        pd.read_parquet(folder / "tables" / f"{n}.parquet") for n in ("checkpoints", "traces")
    ]
    return folder / "page", page, found, *tables


def answer(found, words):
    """Verdict and numbers of the question with these words."""
    matching = [value for question, value in found.items() if words in question]
    assert len(matching) == 1, words
    return matching[0]


def by_step(table, metric, **wanted):
    return select(table, metric=metric, scope="model", **wanted).set_index("step").sort_index()


def test_page_shows_its_pictures(study):
    folder, page, found, _, _ = study
    assert len(found) >= 10
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", page)
    assert {path.name for path in folder.iterdir()} == {"README.md", *pictures}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page
    assert "as defined by moetools" in page
    assert "A frozen router has no congestion" in page


def test_every_checkpoint_has_its_line(study):
    _, page, _, table, _ = study
    section = page.split("## By step")[1].split("## Types")[0]
    lines = re.findall(r"^\| (\d+) \| (.+) \|$", section, re.M)
    steps = sorted(table["step"].unique())
    assert [int(step) for step, _ in lines] == steps
    assert len(steps) == 11
    columns = [by_step(table, "gamma_eff", quality=quality) for quality in QUALITIES]
    columns += [by_step(table, "temperature", quality="q1"), by_step(table, "b_load")]
    for step, cells in lines:
        for cell, column in zip(cells.split(" | "), columns, strict=False):
            numbers = [float(number) for number in re.findall(r"-?[\d.]+", cell)]
            expected = column.loc[int(step), ["value", "low", "high"]].to_list()
            assert numbers == pytest.approx(expected, abs=6e-3)


def test_flatness_is_what_the_intervals_say(study):
    _, _, found, table, _ = study
    gamma = by_step(table, "gamma_eff", quality="q1")
    above = int((gamma["low"] > 0).sum())
    verdict, numbers = answer(found, "flatter than the router's own preferences")
    assert verdict == ("yes" if above == len(gamma) else "no" if above == 0 else "in part")
    assert f"above 0 at {above} of {len(gamma)}" in numbers


@pytest.mark.parametrize(("name", "sign"), [("surge", 1), ("relaxation", -1)])
def test_phases_are_resolved_only_where_intervals_separate(study, name, sign):
    _, _, found, table, _ = study
    verdict, numbers = answer(found, f"({name})")
    count = 0
    for quality in QUALITIES:
        row = select(table, metric=name, scope="model", quality=quality).iloc[0]
        gamma = by_step(table, "gamma_eff", quality=quality)
        bound = by_step(table, "at_upper_bound", quality=quality)["value"]
        first, last = gamma.loc[int(row["from_step"])], gamma.loc[row["step"]]
        apart = last["low"] > first["high"] if sign > 0 else last["high"] < first["low"]
        at_bound = max(bound.loc[int(row["from_step"])], bound.loc[row["step"]]) > 0
        resolved = bool(apart and not at_bound)
        count += resolved
        said = re.search(rf"{quality}: ([^;]+?)(?:;|\.$)", numbers)[1]
        if row["from_step"] == row["step"]:
            assert said == "none"
        else:
            assert f"step {row['from_step']:.0f} to {row['step']}" in said
            assert ("not resolved" in said) != resolved
    assert numbers.startswith(f"Resolved under {count} of 4 qualities")
    assert verdict == {0: "not resolved", 4: "resolved"}.get(count, "in part")


def test_ends_are_told_apart_by_their_intervals(study):
    _, _, found, table, _ = study
    verdict, numbers = answer(found, "at the end than at the start")
    count = 0
    for quality in QUALITIES:
        temperature = by_step(table, "temperature", quality=quality)
        rises = temperature["low"].iloc[-1] > temperature["high"].iloc[0]
        count += rises
        assert ("rises" in re.search(rf"{quality}: ([^;]+)", numbers)[1]) == rises
    assert verdict == {0: "no", 4: "yes"}.get(count, "in part")


def test_plateau_and_shape(study):
    _, _, found, table, _ = study
    b = by_step(table, "b_load")
    low, high = b["low"].to_numpy(float), b["high"].to_numpy(float)
    longest = max(
        j - i
        for i in range(len(b))
        for j in range(i, len(b))
        if low[i : j + 1].max() <= high[i : j + 1].min()
    )
    assert (answer(found, "(stabilisation)")[0] == "resolved") == (longest >= 2)
    shape, _ = answer(found, "published shape")
    resolved = [answer(found, f"({name})")[0] for name in ("surge", "stabilisation", "relaxation")]
    assert (shape == "yes") == all(word == "resolved" for word in resolved)


def test_predictions_and_agreement_are_what_the_numbers_say(study):
    _, _, found, table, traces = study
    steps = select(table, metric="estimator_agreement_steps", scope="model")
    assert len(steps) == 6
    high = int((steps["value"] >= 0.89).sum())
    assert answer(found, "estimates of quality agree")[1].startswith(f"{high} of 6 pairs")
    mfg, scaled = (by_step(table, f"heldout_l1_{name}") for name in ("mfg", "softmax"))
    close = int(((mfg["value"] - scaled["value"]).abs() < 0.02).sum())
    verdict, numbers = answer(found, "better than a temperature?")
    assert f"within 0.02 of each other at {close} of 11" in numbers
    gamma = by_step(table, "gamma_eff", quality="q1")
    better = int(((mfg["high"] < scaled["low"]) & (gamma["low"] > 0)).sum())
    assert verdict == {0: "no", 11: "yes"}.get(better, "in part")
    over = by_step(traces, "types_gain_over_softmax")
    clear = int((over["low"] > 0).sum())
    assert answer(found, "several types")[0] == {0: "no", len(over): "yes"}.get(clear, "in part")
    assert len(over) == 8


def test_auxiliary_loss_and_scope(study):
    _, _, found, table, _ = study
    explicit = select(table, metric="gamma_explicit", scope="model", convention="sum_1")["value"]
    assert np.allclose(explicit, 0.01 * 32)
    last = table[table["step"] == table["step"].max()]
    verdict, numbers = answer(found, "scope of the congestion game")
    share = single(last, "out_of_scope")
    assert f"{share:.0%} of the layers are not" in numbers
    assert verdict == ("no" if share == 1 else "yes" if share == 0 else "in part")
