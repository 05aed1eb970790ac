import json
import warnings
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import synthetic

import moetools
from moetools.analysis import Finding, rows, tidy
from moetools.errors import RequestError
from moetools.files import write_json
from moetools.reporting import headlines, metrics, page, style, tables
from moetools.reporting.report import distinct_names, open_traces, own_trace, report

HOSTILE = "<script>document.title = 'broken'</script> & $x_{1$"


def make_trace(path, *, seed=0, groups=("de", "en"), num_layers=2, num_experts=8, **options):
    """A trace of 12 texts of 20 tokens."""
    rng = np.random.default_rng(seed)
    probs = {
        f"{layer:02}": synthetic.random_probs(rng, 240, num_experts) for layer in range(num_layers)
    }
    ids = {name: synthetic.top_k_of(p, 2) for name, p in probs.items()}
    return synthetic.write_trace(
        path,
        ids,
        [20] * 12,
        num_experts=num_experts,
        groups=[groups[i % len(groups)] for i in range(12)],
        probs=probs,
        **options,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report on one trace with a hostile group name."""
    folder = tmp_path_factory.mktemp("written")
    make_trace(folder / "trace", groups=("en", HOSTILE))
    return report(folder / "trace", out=folder / "report", only=["load", "entropy"], csv=True)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text inside scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def curve_table(num_layers, num_sizes):
    sizes = np.arange(1, num_sizes + 1)
    parts = [rows("gini", "model", 0.5)]
    for layer in range(num_layers):
        parts.append(rows("lru", "layer", sizes / num_sizes, layer=layer, cache_size=sizes))
        parts.append(rows("gini", "layer", 0.1, layer=layer))
        parts.append(rows("gini", "group", 0.1, layer=layer, group="en"))
    return tidy(parts, trace="t")


def test_records_leave_out_what_does_not_apply():
    table = tidy(
        [
            rows("srp", "layer", [0.5, np.nan], layer=[0, 1], m=16, low=[0.4, np.nan]),
            rows("lru", "model", 1.0, cache_size=4, rho=1.5, accounting="strict", num_tokens=7),
        ],
        trace="t",
    )
    assert metrics.records(table) == [
        {"trace": "t", "metric": "srp", "scope": "layer", "layer": 0, "m": 16, "value": 0.5,
         "low": 0.4},
        {"trace": "t", "metric": "srp", "scope": "layer", "layer": 1, "m": 16, "value": None},
        {"trace": "t", "metric": "lru", "scope": "model", "accounting": "strict", "cache_size": 4,
         "rho": 1.5, "value": 1.0, "num_tokens": 7},
    ]  # fmt: skip


def test_thinning_keeps_a_table_that_fits():
    table = curve_table(3, 10)
    assert metrics.thinned(table, len(table)) is table


def test_thinning_drops_groups_within_layers_first():
    table = curve_table(3, 10)
    kept = metrics.thinned(table, len(table) - 1)
    assert len(kept) == len(table) - 3
    assert set(kept["scope"]) == {"model", "layer"}


def test_thinning_keeps_every_number_but_the_points_of_curves():
    table = curve_table(20, 64)
    kept = metrics.thinned(table, 400)
    assert len(kept) <= 400
    assert (kept["metric"] == "gini").sum() == 21
    sizes = set(kept["cache_size"].dropna())
    assert 64 in sizes
    assert len(sizes) == 16


def test_thinning_keeps_whole_multiples_of_the_experts_per_token():
    sizes = np.arange(1, 97)
    part = rows("lru", "layer", sizes / 96, layer=0, cache_size=sizes, rho=sizes / 6)
    kept = metrics.thinned(tidy([part], trace="t"), 20)
    assert list(kept["rho"]) == list(range(1, 17))
    assert list(metrics.thinned(kept, 10)["rho"]) == [1, 2, 4, 8, 16]
    assert list(metrics.thinned(kept, 3)["rho"]) == [1, 2, 4]


def test_thinning_without_curves_keeps_the_first_rows():
    table = tidy([rows("gini", "layer", np.zeros(50), layer=np.arange(50))], trace="t")
    assert list(metrics.thinned(table, 10)["layer"]) == list(range(10))


def test_document_of_a_large_model_is_small():
    sizes = np.arange(1, 257)
    layer, size = (axis.ravel() for axis in np.meshgrid(np.arange(58), sizes, indexing="ij"))
    parts = [
        rows(metric, "layer", size / 300, layer=layer, cache_size=size, rho=size / 8,
             accounting=accounting, low=size / 301, high=size / 299, num_tokens=10**9)
        for metric in ("lru", "lfu", "belady", "sch_cache", "sch_window")
        for accounting in ("paper", "strict")
    ]  # fmt: skip
    kept = metrics.thinned(tidy(parts, trace="t"), metrics.MAX_RECORDS)
    assert metrics.MAX_RECORDS / 3 < len(kept) <= metrics.MAX_RECORDS
    assert set(kept["layer"]) == set(range(58))
    assert len(json.dumps(metrics.records(kept))) < 2e6


def test_document_is_what_is_written(written):
    text = (written.path / "metrics.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert document == written.metrics
    assert document["format"] == 1
    assert [trace["name"] for trace in document["traces"]] == ["trace"]
    assert document["traces"][0]["num_tokens"] == 240
    assert document["traces"][0]["routers"][1]["top_k"] == 2
    assert set(document["analyses"]) == {"load", "entropy"}
    assert document["skipped"] == {}
    num_records = sum(len(part["records"]) for part in document["analyses"].values())
    assert text.count("\n") > num_records


def test_document_holds_the_numbers_of_the_tables(written):
    for name, table in written.results.tables.items():
        parquet = pd.read_parquet(written.path / "tables" / f"{name}.parquet")
        csv = pd.read_csv(written.path / "tables" / f"{name}.csv")
        assert len(parquet) == len(csv) == len(table)
        np.testing.assert_array_equal(parquet["value"], table["value"])
        np.testing.assert_allclose(csv["value"], table["value"], rtol=1e-12)
        expected = table[table["scope"].isin(metrics.SCOPES)]["value"]
        found = [record["value"] for record in written.metrics["analyses"][name]["records"]]
        assert found == [None if np.isnan(value) else value for value in expected]
        scopes = {record["scope"] for record in written.metrics["analyses"][name]["records"]}
        assert scopes <= set(metrics.SCOPES)


def test_metric_names_are_those_of_the_tables():
    assert metrics.metric_names({"x": curve_table(1, 2)}) == {"x": ["gini", "lru"]}


def test_headlines_are_found_in_the_document(written):
    found = headlines.found(written.metrics, "trace")
    wanted = {h for h in headlines.HEADLINES if h.analysis in written.results.tables}
    assert set(found) == wanted
    for headline, places in found.items():
        records = written.metrics["analyses"][headline.analysis]["records"]
        assert set(places) == {0, 1, None}
        assert all(records[i].get("layer") == layer for layer, i in places.items())


@pytest.mark.parametrize(
    ("value", "whole", "text"),
    [
        (None, False, "–"),
        (0.0, False, "0.000"),
        (0.12345, False, "0.123"),
        (-0.5, False, "-0.500"),
        (3.14159, False, "3.14"),
        (31.4159, False, "31.4"),
        (314.159, False, "314"),
        (12345.6, False, "12,346"),
        (0.000123, False, "1.2e-04"),
        (3.0, True, "3"),
        (12345.0, True, "12,345"),
    ],
)
def test_numbers_are_short(value, whole, text):
    assert tables.number(value, whole=whole) == text


def test_columns_show_the_usual_variant_of_every_metric():
    records = [
        {"metric": "srp", "value": 1, "m": m, "trace": "t", "layer": 0} for m in (4, 16, 64)
    ] + [{"metric": f"other_{i}", "value": 1} for i in range(3)]
    assert tables.main_columns(records) == [
        ("srp", (("m", 16),)),
        *((f"other_{i}", ()) for i in range(3)),
    ]


def test_columns_show_every_metric_before_any_twice():
    records = [{"metric": "srp", "value": 1, "kind": kind} for kind in "abcdefghijkl"]
    assert len(tables.main_columns(records)) == tables.MAX_COLUMNS
    records += [{"metric": f"other_{i}", "value": 1} for i in range(tables.MAX_COLUMNS - 2)]
    columns = tables.main_columns(records)
    assert len(columns) == tables.MAX_COLUMNS
    assert columns[:3] == [("srp", (("kind", "a"),)), ("srp", (("kind", "b"),)), ("other_0", ())]


def made_tables(*parts):
    document = {"analyses": {"x": {"records": metrics.records(tidy(parts, trace="t"))}}}
    return tables.section_tables("x", document)


def test_long_tables_are_cut_and_say_so():
    (shown,) = made_tables(rows("gini", "layer", np.zeros(150), layer=np.arange(150)))
    assert len(shown.rows) == tables.MAX_ROWS
    assert shown.num_left_out == 50


def test_values_of_an_axis_have_columns():
    sizes = np.arange(1, 33)
    plain, by_m, by_rho = made_tables(
        rows("gini", "model", 0.5),
        rows("srp", "model", [0.7, 0.6, 0.5], m=[4, 16, 64]),
        rows("lru", "model", sizes / 32, cache_size=sizes, rho=sizes / 2, accounting="paper"),
        rows("lru", "model", sizes / 33, cache_size=sizes, rho=sizes / 2, accounting="strict"),
    )
    assert [row[0].text for row in plain.rows] == ["gini"]
    assert by_m.columns == [("m 4",), ("m 16",), ("m 64",)]
    assert [[cell.text for cell in row] for row in by_m.rows] == [
        ["srp", "0.700", "0.600", "0.500"]
    ]
    assert len(by_rho.columns) <= tables.MAX_COLUMNS
    assert ("rho 2",) in by_rho.columns
    assert by_rho.names == ("metric", "accounting")
    assert [row[1].text for row in by_rho.rows] == ["strict", "paper"]


def test_rows_of_a_table_are_layers_pairs_of_layers_or_groups():
    shown = made_tables(
        rows("gini", "layer", [0.1, 0.2], layer=[0, 1]),
        rows("nmi", "layer", 0.3, layer=0, layer_b=1),
        rows("gini", "group", [0.4, 0.5], group=["en", "sw"], m=16),
        rows("gini", "group", 0.6, group="en", layer=0),
    )
    texts = {table.title: [[cell.text for cell in row] for row in table.rows] for table in shown}
    assert texts == {
        "By layer": [["0", "0.100"], ["1", "0.200"]],
        "From layer to layer": [["0", "1", "0.300"]],
        "By group": [["en", "0.400"], ["sw", "0.500"]],
    }
    assert shown[-1].shared == "m 16"
    assert shown[-1].columns == [("gini",)]


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        (None, "unknown"),
        ({"score_function": "softmax", "scale": 1.0, "bias_on": None}, "softmax"),
        (
            {"score_function": "sigmoid", "bias_on": "scores", "n_group": 8, "top_k": 8,
             "uses_expert_scale": True, "num_tokens": 1200},
            "sigmoid, bias_on scores, n_group 8, uses_expert_scale, found on 1,200 tokens",
        ),
    ],
)  # fmt: skip
def test_rules_are_told_in_a_line(rule, line):
    assert page.rule_line(rule) == line


def test_models_on_disk_are_called_by_their_folder():
    assert page.short_name("/data/models/tiny") == "tiny"
    assert page.short_name("org/name") == "org/name"


def test_findings_are_split_by_weight():
    found = [Finding(text=str(w), weight=w, metric="x") for w in (0.1, 0.9, 0.5)]
    unusual, usual = page.split_findings(found)
    assert [finding.weight for finding in unusual] == [0.9, 0.5]
    assert [finding.weight for finding in usual] == [0.1]


def test_page_needs_nothing_from_outside(written):
    html = (written.path / "report.html").read_text(encoding="utf-8")
    tags = Elements(html).tags
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/")), (tag, value)
    policy = next(a["content"] for tag, a in tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_page_escapes_what_users_wrote(written):
    html = (written.path / "report.html").read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "&lt;script&gt;document.title" in html
    assert [tag for tag, _ in Elements(html).tags].count("script") == 1


def test_page_links_lead_somewhere(written):
    tags = Elements((written.path / "report.html").read_text(encoding="utf-8")).tags
    ids = {attributes["id"] for _, attributes in tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in tags if tag == "a"}
    assert links
    assert links <= ids


def test_small_figures_are_drawings_and_large_ones_images():
    with style.applied():
        small, axes = style.subplots(height=2)
        axes[0, 0].plot([0, 1], [0, 1])
        large, axes = style.subplots(height=2)
        axes[0, 0].scatter(*np.random.default_rng(0).random((2, 20_000)))
        assert style.data_uri(small).startswith("data:image/svg+xml;base64,")
        assert style.data_uri(large).startswith("data:image/png;base64,")
        assert style.data_uri(small) == style.data_uri(small)


def test_any_name_can_be_drawn():
    matrix = np.array([[0.0, np.nan], [2.0, 1.0]])
    with warnings.catch_warnings(), style.applied():
        warnings.simplefilter("error")
        for names in ([HOSTILE, "日本語\nเอ"], ["$", "a" * 300]):
            figure, axes = style.subplots(height=2)
            style.heatmap(axes[0, 0], matrix, rows=names, columns=names, label=HOSTILE, center=1)
            assert style.data_uri(figure)
        figure, axes = style.subplots(height=2)
        style.heatmap(axes[0, 0], np.full((2, 3), np.nan), rows=[0, 1], center=0.5)
        assert style.data_uri(figure)


def test_crowded_ticks_are_thinned():
    with style.applied():
        _, axes = style.subplots(height=2)
        style.heatmap(axes[0, 0], np.zeros((90, 200)), rows=range(90), columns=range(200))
    assert len(axes[0, 0].get_yticks()) <= 20
    assert len(axes[0, 0].get_xticks()) <= 40
    assert axes[0, 0].get_yticklabels()[1].get_text() == str(axes[0, 0].get_yticks()[1])


def test_names_of_traces_differ(tmp_path):
    assert distinct_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert distinct_names([tmp_path / "a" / "t", tmp_path / "b" / "t"]) == ["a/t", "b/t"]


def test_pictures_of_one_trace_are_told_apart():
    assert own_trace("load_by_expert_a", ["a", "b"]) == "a"
    assert own_trace("load_by_expert_b_a", ["a", "b_a"]) == "b_a"
    assert own_trace("load_by_layer", ["a", "b"]) == ""
    assert own_trace("load_by_layer", ["layer"]) == ""


def test_engines_are_never_mixed(tmp_path):
    make_trace(tmp_path / "a")
    make_trace(tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    write_json(tmp_path / "b" / "manifest.json", {**manifest, "engine": "vllm"})
    with pytest.raises(RequestError, match=r"different engines \(.*a by transformers, .*b by vllm"):
        open_traces([tmp_path / "a", tmp_path / "b"])


def test_no_trace_and_the_same_trace_twice_are_refused(tmp_path):
    make_trace(tmp_path / "a")
    with pytest.raises(RequestError, match="at least one"):
        open_traces([])
    with pytest.raises(RequestError, match="named twice"):
        open_traces([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_traces_are_compared_side_by_side(tmp_path):
    for seed, name in enumerate(("one/t", "two/t")):
        make_trace(tmp_path / name, seed=seed)
    written = report([tmp_path / "one/t", tmp_path / "two/t"], out=tmp_path / "r", only=["load"])
    table = tables.headline_table(written.metrics, ["one/t", "two/t"])
    assert table.columns == [("one/t",), ("two/t",)]
    for row in table.rows:
        values = [
            written.metrics["analyses"][cell.analysis]["records"][cell.record]["trace"]
            for cell in row[1:]
        ]
        assert values == ["one/t", "two/t"]
    assert set(written.findings) == {"one/t", "two/t"}


def test_same_traces_give_the_same_numbers(tmp_path, written):
    trace = written.traces[0].path
    again = report(trace, out=tmp_path / "again", only=["load", "entropy"])
    assert again.metrics == written.metrics


def test_report_is_a_verb_of_the_package():
    assert moetools.report is report
    assert "report" in moetools.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        moetools.nonsense  # noqa: B018


def test_ticks_of_logarithmic_axes_are_numbers():
    with style.applied():
        figure, axes = style.subplots()
        axes[0, 0].loglog([1, 2000], [0.03, 9])
        style.data_uri(figure)
    labels = [label.get_text() for label in axes[0, 0].get_xticklabels()]
    assert "1000" in labels
    assert not any("$" in label for label in labels)
