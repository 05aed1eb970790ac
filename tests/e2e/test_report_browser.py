"""The page in a real browser: no errors, and the numbers of `metrics.json`."""

import json
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import synthetic

from moetools.reporting.report import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip
HOSTILE = "<script>document.title = 'broken'</script>"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


class Page(HTMLParser):
    """The numbers of a rendered page, its title, and what its script left on the root."""

    def __init__(self, text):
        super().__init__()
        self.numbers, self.root, self.title, self._open = [], {}, "", None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._open = tag
        if tag == "html":
            self.root = attributes
        if "data-metric" in attributes:
            self.numbers.append({**attributes, "text": ""})
            self._open = "number"

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "number":
            self.numbers[-1]["text"] += data
        elif self._open == "title":
            self.title += data


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report with all analyses of a trace whose group name tries to run a script."""
    folder = tmp_path_factory.mktemp("browser")
    rng = np.random.default_rng(0)
    probs = {f"{layer:02}": synthetic.random_probs(rng, 800, 8, scale=2) for layer in range(3)}
    synthetic.write_trace(
        folder / "trace",
        {name: synthetic.top_k_of(p, 2) for name, p in probs.items()},
        [40] * 20,
        num_experts=8,
        groups=["en", HOSTILE] * 10,
        probs=probs,
        token_id=rng.integers(0, 20, 800),
    )
    return report(folder / "trace", out=folder / "report")


@pytest.fixture(scope="module")
def dump(written, tmp_path_factory):
    """Renders a page and returns its document and what the browser logged."""

    def render(path):
        profile = tmp_path_factory.mktemp("profile")
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return render


@pytest.fixture(scope="module")
def rendered(dump, written):
    return dump(written.path / "report.html")


def test_page_renders_without_console_errors(rendered):
    page, logged = rendered
    assert logged == []
    assert page.root["data-ready"] == "true"
    assert page.title == "Routers of synthetic"


def test_console_errors_would_be_seen(dump, written, tmp_path):
    """The checks above can fail: a page with another script is refused by its own policy."""
    html = (written.path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "changed.html").write_text(
        html.replace('dataset.ready = "true"', 'dataset.ready = "changed"'), encoding="utf-8"
    )
    page, logged = dump(tmp_path / "changed.html")
    assert "data-ready" not in page.root
    assert any("Content Security Policy" in line for line in logged)


def test_a_click_on_a_heading_sorts_its_table(dump, written, tmp_path):
    html = (written.path / "report.html").read_text(encoding="utf-8")
    click = "for (const button of document.querySelectorAll('#load table th:nth-child(2) button'))"
    for name, clicks in (("up", "button.click();"), ("down", "button.click(); button.click();")):
        path = tmp_path / f"{name}.html"
        changed = html.replace("default-src 'none'", "img-src data:").replace("script-src", "x-src")
        path.write_text(
            changed.replace("</body>", f"<script>{click} {{ {clicks} }}</script></body>"),
            encoding="utf-8",
        )
        page, logged = dump(path)
        assert not [line for line in logged if "Uncaught" in line or "Refused" in line]
        values = [
            float(number["data-value"])
            for number in page.numbers
            if number["data-metric"] == "load_max_over_mean"
        ]
        of_layers = values[-5:-2]
        assert of_layers == sorted(of_layers, reverse=name == "down")
        assert len(set(of_layers)) == 3


def test_numbers_on_the_page_are_those_of_the_document(rendered, written):
    page, _ = rendered
    document = json.loads((written.path / "metrics.json").read_text(encoding="utf-8"))
    shown = set()
    for number in page.numbers:
        name, place = number["data-analysis"], int(number["data-record"])
        record = document["analyses"][name]["records"][place]
        shown.add((name, place))
        assert number["data-metric"] == record["metric"]
        if record["value"] is None:
            assert number["text"] == "–"
            continue
        assert float(number["data-value"]) == record["value"]
        text = float(number["text"].replace(",", ""))
        assert text == pytest.approx(record["value"], rel=0.006, abs=0.00051)
    assert {name for name, _ in shown} == set(document["analyses"])
    for name, analysis in document["analyses"].items():
        records = analysis["records"]
        on_page = {records[place]["metric"] for found, place in shown if found == name}
        assert on_page == {record["metric"] for record in records}
