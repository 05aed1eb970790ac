"""The worked study of the embedded checkpoint says what its tables say."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from moetools import analysis
from moetools.analysis import select, single
from moetools.trace_store import TraceStore

SCRIPT = Path(__file__).parents[2] / "examples" / "multilingual_study.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Folder of the page, its table of answers, and the numbers of the same trace."""
    folder = tmp_path_factory.mktemp("study")
    finished = subprocess.run(
        [sys.executable, SCRIPT, "--out", folder / "page", "--trace", folder / "trace"],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    page = (folder / "page" / "README.md").read_text(encoding="utf-8")
    found = {
        question.strip(): (verdict, numbers)
        for question, verdict, numbers in re.findall(
            r"^\| (.+\?) \| \*\*(.+)\*\* \| (.+) \|$", page, re.M
        )
    }
    results = analysis.run([TraceStore(folder / "trace")], only=["multilingual"])
    return folder / "page", page, found, results.tables["multilingual"]


def answer(found, words):
    """Verdict and numbers of the question with these words."""
    matching = [value for question, value in found.items() if words in question]
    assert len(matching) == 1, words
    return matching[0]


def expected(count, total):
    return "yes" if count == total else "no" if count == 0 else "in part"


def test_page_shows_its_pictures(study):
    folder, page, found, _ = study
    assert len(found) >= 8
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", page)
    assert {path.name for path in folder.iterdir()} == {"README.md", *pictures}
    for name in pictures:
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert "nan" not in page


def test_every_language_has_its_line(study):
    _, page, _, table = study
    lines = re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \(([\d.]+) to ([\d.]+)\)", page, re.M)
    assert len(lines) == 17
    for group, *numbers in lines:
        row = select(table, metric="divergence", scope="group", group=group, layer=None).iloc[0]
        values = [row[name] for name in ("value", "low", "high")]
        assert [float(number) for number in numbers] == pytest.approx(values, abs=6e-4)


def test_noise_and_u_are_what_the_intervals_say(study):
    _, _, found, table = study
    excess = select(table, metric="divergence_excess", scope="group", layer=None)
    allowed = select(table, metric="divergence_excess_allowance", scope="group")
    allowed = allowed.set_index("group")["value"]
    clear = (excess.set_index("group")["low"] > allowed).sum()
    verdict, numbers = answer(found, "beyond noise")
    assert verdict == expected(clear, len(excess))
    assert numbers.startswith(f"{clear} of {len(excess)} languages")
    allowance = single(table, "divergence_excess_allowance")
    for words, metric, least in (
        ("(a U)", "divergence_u", 0),
        ("above the floor", "divergence_excess_u", allowance),
    ):
        verdict, numbers = answer(found, words)
        ends = select(table, metric=metric, scope="model")
        assert verdict == expected((ends["low"] > least).sum(), 2)
        for value in ends["value"]:
            assert f"{value:.3f}" in numbers


def test_correlations_are_what_the_p_values_say(study):
    _, _, found, table = study
    value = select(table, metric="divergence", scope="group", layer=None).set_index("group")[
        "value"
    ]
    score = select(table, metric="score").set_index("group")["value"][value.index]
    verdict, numbers = answer(found, "predicts better")
    both = [stats.pearsonr(value, score), stats.spearmanr(value, score)]
    for result in both:
        assert f"{result.statistic:.2f} (" in numbers
    p = select(table, metric="divergence_score_p", scope="model").set_index("correlation")["value"]
    assert p.to_numpy(float) == pytest.approx([result.pvalue for result in both], abs=0.03)
    if (p < 0.05).all():
        assert verdict == ("yes" if both[0].statistic < 0 else "no, the opposite")
    else:
        assert verdict == "not clear"


def test_experts_and_scripts_are_what_the_counts_say(study):
    _, _, found, table = study
    counts = select(table, metric="num_language_experts", scope="group", layer=None, tau=0.2)
    above = (counts["value"] > single(table, "num_language_experts_floor", tau=0.2)).sum()
    assert answer(found, "experts of its own")[0] == expected(above, len(counts))
    p_more = select(table, metric="expert_overlap_p_more", scope="pair", tau=0.2)["value"].dropna()
    clear = (p_more * len(p_more) < 0.05).sum()
    verdict, numbers = answer(found, "share these experts")
    assert verdict == expected(clear, len(p_more))
    assert numbers.startswith(f"{clear} of {len(p_more)} pairs")
    other_scripts = {"ar", "hi", "ja", "ko", "ru", "uk", "zh"}
    pairs = select(table, metric="divergence_pair", scope="pair", layer=None)
    across = pairs["group"].isin(other_scripts) != pairs["group_b"].isin(other_scripts)
    gap = pairs[across]["value"].mean() - pairs[~across]["value"].mean()
    verdict, numbers = answer(found, "Latin script")
    assert f"differ by {gap:.3f} more" in numbers
    p = float(re.search(r"p = ([\d.e-]+)\)", numbers)[1])
    assert verdict == ("yes" if p < 0.05 else "not clear")


def test_consistency_is_set_against_the_frequencies(study):
    _, _, found, table = study
    own = select(table, metric="consistency", scope="group", layer=None).set_index("group")
    chance = select(table, metric="consistency_chance_skewed", scope="group", layer=None)
    above = (own["low"] > chance.set_index("group")["value"][own.index]).sum()
    verdict, numbers = answer(found, "frequencies explain")
    assert verdict == expected(above, len(own))
    assert numbers.startswith(f"{above} of {len(own)} languages")
    assert np.isfinite(own["value"].to_numpy(float)).all()
