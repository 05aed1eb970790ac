import json

import numpy as np
import pytest
import torch
from conftest import save_byte_tokenizer, save_tiny_checkpoint
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from tiny_models import save_tiny

import moetools
from moetools import analysis
from moetools.analysis import Options, select, single
from moetools.checkpoint import Checkpoint
from moetools.errors import CheckpointError
from moetools.experts import ExpertReader
from moetools.registry import load
from moetools.reporting import style

ANALYSIS = load("analyses", "coupling").ANALYSIS
SIZE = {"num_experts": 16, "hidden_size": 64, "intermediate_size": 8}
GATE = "model.layers.{}.mlp.gate.weight"
NEURONS = "model.layers.{}.mlp.experts.{}.gate_proj.weight"


def edit(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


def plant(tensors):
    """The first neuron of every expert is its router row."""
    for layer in range(2):
        for e in range(SIZE["num_experts"]):
            for key in (NEURONS, NEURONS.replace("gate_proj", "up_proj")):
                tensors[key.format(layer, e)][0] = 2 * tensors[GATE.format(layer)][e]


def record(checkpoint, out, texts, **options):
    return moetools.trace(
        checkpoint, data=str(texts), out=out, group_column="lang", device="cpu",
        **{"keep": ("inputs",), "dtype": "float32", **options},
    )  # fmt: skip


def run(trace, *models, **options):
    opened = tuple(Checkpoint.open(str(model)) for model in models)
    return analysis.run([trace], only=["coupling"], options=Options(models=opened, **options))


def table_of(trace, model):
    return run(trace, model).tables["coupling"]


def of_model(table, metric, **wanted):
    return single(table, metric, **wanted)


def texts(table):
    return " ".join(finding.text for finding in ANALYSIS.findings(table))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("random") / "model", **SIZE)


@pytest.fixture(scope="module")
def random_trace(random_model, parallel_texts):
    return record(random_model, random_model.parent / "trace", parallel_texts)


@pytest.fixture(scope="module")
def random_table(random_model, random_trace):
    return table_of(random_trace, random_model)


@pytest.fixture(scope="module")
def planted_model(tmp_path_factory):
    path = save_tiny_checkpoint(tmp_path_factory.mktemp("planted") / "model", **SIZE)
    return edit(path, plant)


@pytest.fixture(scope="module")
def planted_trace(planted_model, parallel_texts):
    return record(planted_model, planted_model.parent / "trace", parallel_texts)


@pytest.fixture(scope="module")
def planted_table(planted_model, planted_trace):
    return table_of(planted_trace, planted_model)


def test_a_planted_coupling_beats_its_null_through_the_whole_path(
    planted_model, planted_trace, tmp_path
):
    written = moetools.report(
        planted_trace.path, out=tmp_path / "report", only=["coupling"], models=[str(planted_model)]
    )
    table = written.results.tables["coupling"]
    assert (select(table, metric="alignment_rank", scope="expert")["value"] == 1).all()
    for metric in ("alignment", "alignment_z", "alignment_top1", "alignment_mrr"):
        for gauge in ("raw", "centred"):
            assert of_model(table, f"{metric}_p", gauge=gauge) < 0.005
            null = select(table, metric=f"{metric}_null", scope="model", gauge=gauge).iloc[0]
            assert of_model(table, metric, gauge=gauge) > null["high"]
            assert null["low"] <= null["value"] <= null["high"]
    erc = {"alpha": 1.0, "form": "scale_free", "gauge": "centred"}
    assert of_model(table, "erc_p", **erc) < 0.005
    for activation in ("hidden", "output"):
        where = {"activation": activation, "tokens": "all"}
        assert of_model(table, "score_agreement_p", **where) < 0.005
        assert of_model(table, "selected_activation_p", **where) < 0.005
    assert "belong together" in texts(table)
    assert (tmp_path / "report" / "report.html").is_file()


def test_random_experts_do_not_look_coupled(random_table):
    """No statistic that looks at the experts is far from its null; those on centroids are."""
    for metric in ("alignment", "signed_alignment"):
        null = select(random_table, metric=f"{metric}_null", scope="model", gauge="centred")
        value = of_model(random_table, metric, gauge="centred")
        spread = null["high"].iloc[0] - null["low"].iloc[0]
        assert abs(value - null["value"].iloc[0]) < spread
    own = select(random_table, metric="alignment", scope="layer", gauge="raw")
    assert own["value"].between(0.7, 1.3).all()
    assert "None of" in texts(random_table)
    assert of_model(random_table, "centroid_alignment_p", gauge="centred", tokens="all") < 0.005


def answers(trace, model, name):
    """Logits and activations of all experts on all tokens, token by token."""
    layer = ExpertReader(Checkpoint.open(str(model))).read(name)
    batches = list(trace.batches([f"inputs.{name}", f"experts.{name}"]))
    inputs = np.concatenate([batch.tokens[f"inputs.{name}"] for batch in batches])
    index = np.concatenate([batch.tokens[f"experts.{name}"] for batch in batches])
    x = torch.from_numpy(inputs.astype(np.float32))
    logits = (x @ layer.router_weight.T).numpy()
    gate, up, down = (getattr(layer.experts, which) for which in ("gate", "up", "down"))
    found = {"gate": [], "hidden": [], "output": []}
    for e in range(layer.num_experts):
        first = x @ gate[e].T
        hidden = torch.nn.functional.silu(first) * (x @ up[e].T)
        for which, values in zip(found, (first, hidden, hidden @ down[e].T), strict=True):
            found[which].append(values.norm(dim=1).numpy())
    return logits, {which: np.stack(values, 1) for which, values in found.items()}, index, inputs


def test_agreement_against_loops(planted_model, planted_trace, planted_table):
    logits, found, index, _ = answers(planted_trace, planted_model, "01")
    for activation in ("hidden", "output"):
        values = found[activation]
        where = {"layer": 1, "activation": activation, "tokens": "all"}
        within = [spearmanr(*pair).statistic for pair in zip(logits, values, strict=True)]
        row = select(planted_table, metric="score_agreement", scope="layer", **where).iloc[0]
        assert row["value"] == pytest.approx(np.mean(within), abs=1e-4)
        assert row["num_tokens"] == len(logits)
        assert row["low"] < row["value"] < row["high"]
        below = [
            (values[t] < values[t, e]).sum() / (values.shape[1] - 1)
            for t in range(len(values))
            for e in index[t]
        ]
        row = select(planted_table, metric="selected_activation", scope="layer", **where)
        assert row["value"].tolist() == pytest.approx([np.mean(below)], abs=1e-4)
        along = [spearmanr(*pair).statistic for pair in zip(logits.T, values.T, strict=True)]
        row = select(
            planted_table, metric="expert_score_agreement", scope="layer", gauge="raw", **where
        )
        assert row["value"].tolist() == pytest.approx([np.mean(along)], abs=1e-4)


def test_centroids_against_loops(planted_model, planted_trace, planted_table):
    _, _, index, inputs = answers(planted_trace, planted_model, "00")
    rows = Checkpoint.open(str(planted_model)).tensor(GATE.format(0)).double().numpy()
    inputs = inputs.astype(np.float64)
    own, others = [], []
    for e in range(16):
        for f in range(16):
            centroid = inputs[(index == f).any(axis=1)].mean(axis=0)
            cosine = rows[e] @ centroid / np.linalg.norm(rows[e]) / np.linalg.norm(centroid)
            (own if e == f else others).append(cosine)
    where = {"scope": "layer", "layer": 0, "tokens": "all"}
    row = select(planted_table, metric="centroid_alignment", gauge="raw", **where).iloc[0]
    assert row["value"] == pytest.approx(np.mean(own) - np.mean(others), rel=1e-5)
    assert row["low"] < row["high"]
    overlap = select(planted_table, metric="centroid_overlap", **where).iloc[0]
    assert (
        overlap["value"]
        > select(planted_table, metric="centroid_overlap_null", **where)["high"].iloc[0]
    )


def test_a_common_vector_changes_no_centred_number(planted_model, tmp_path, parallel_texts):
    common = 2 * torch.randn(64, generator=torch.Generator().manual_seed(3))

    def shift(tensors):
        plant(tensors)
        for layer in range(2):
            tensors[GATE.format(layer)] += common

    shifted = edit(save_tiny_checkpoint(tmp_path / "shifted", **SIZE), shift)

    def unshift(tensors):
        for layer in range(2):
            tensors[GATE.format(layer)] -= common

    table = table_of(record(shifted, tmp_path / "one", parallel_texts), shifted)
    back = edit(shifted, unshift)
    other = table_of(record(back, tmp_path / "two", parallel_texts), back)
    merged = table.merge(
        other, on=[c for c in table if c not in ("value", "low", "high", "num_tokens", "trace")]
    )
    merged = merged[~merged["metric"].str.endswith(("_p", "_null", "_top1"))]
    centred = merged[
        (merged["gauge"] == "centred") | merged["metric"].str.startswith(("score", "selected_"))
    ]
    assert len(centred) > 50
    np.testing.assert_allclose(centred["value_x"], centred["value_y"], rtol=2e-2, atol=2e-3)
    raw = merged[(merged["gauge"] == "raw") & (merged["metric"] == "row_similarity")]
    assert (raw["value_x"] > raw["value_y"] + 0.2).all()


@pytest.mark.parametrize(
    ("model_type", "layers", "gauges"),
    [
        ("qwen3_moe", [0, 1, 2], {"raw", "centred"}),
        ("gpt_oss", [0, 1, 2], {"raw", "centred"}),
        ("deepseek_v3", [1, 2], {"raw"}),
        ("llama4_text", [0, 1, 2], {"raw"}),
        ("longcat_flash", [0, 1], {"raw", "centred"}),
    ],
)
def test_families(model_type, layers, gauges, tmp_path, parallel_texts):
    save_tiny(model_type, tmp_path / "model", vocab_size=258)
    save_byte_tokenizer(tmp_path / "model")
    trace = record(tmp_path / "model", tmp_path / "trace", parallel_texts, max_sequences=8)
    table = table_of(trace, tmp_path / "model")
    found = select(table, metric="alignment", scope="layer")
    assert sorted(set(found["layer"])) == layers
    assert set(found["gauge"]) == gauges
    agreement = select(table, metric="score_agreement", scope="layer", tokens="all")
    assert sorted(set(agreement["layer"])) == layers
    assert agreement["value"].notna().all()
    assert (agreement["num_tokens"] > 100).all()
    experts = select(table, metric="expert_norm", scope="expert", layer=layers[-1])
    assert experts["expert"].tolist() == list(range(8))


def test_without_inputs_the_weights_still_speak(planted_model, tmp_path, parallel_texts):
    trace = record(planted_model, tmp_path / "trace", parallel_texts, keep=())
    results = run(trace, planted_model)
    assert "--keep inputs" in results.limits["coupling"][0]
    table = results.tables["coupling"]
    assert not table["metric"].str.contains("agreement|centroid|selected").any()
    assert (table["num_tokens"] == 0).all()
    assert of_model(table, "alignment_p", gauge="centred") < 0.005
    with style.applied():
        assert len(list(ANALYSIS.plots(table))) == 2


def test_a_model_is_needed_and_must_be_the_traced_one(
    planted_trace, random_model, planted_model, tmp_path, parallel_texts
):
    assert "--model" in run(planted_trace).skipped["coupling"]
    other = save_tiny_checkpoint(tmp_path / "other", seed=1, **SIZE)
    reason = run(planted_trace, other).skipped["coupling"]
    assert "hashes differ" in reason
    assert reason.endswith(".")
    assert "coupling" in run(planted_trace, other, planted_model).tables


def test_quantised_and_dense_models_are_refused(planted_trace, planted_model, tmp_path):
    config = json.loads((planted_model / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "model.safetensors").symlink_to(planted_model / "model.safetensors")
    config["quantization_config"] = {"quant_method": "fp8"}
    (quantised / "config.json").write_text(json.dumps(config))
    assert "quantised (fp8)" in run(planted_trace, quantised).skipped["coupling"]
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file({"model.embed_tokens.weight": torch.zeros(4, 2)}, dense / "model.safetensors")
    (dense / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="dense model"):
        moetools.report(
            planted_trace.path, out=tmp_path / "report", only=["coupling"], models=[str(dense)]
        )


def test_a_zero_row_is_left_out_and_counted(tmp_path, parallel_texts):
    def silence(tensors):
        plant(tensors)
        tensors[GATE.format(1)][5] = 0

    model = edit(save_tiny_checkpoint(tmp_path / "model", **SIZE), silence)
    table = table_of(record(model, tmp_path / "trace", parallel_texts), model)
    assert single(table, "num_zero_rows") == 1
    ranks = select(table, metric="alignment_rank", scope="expert", layer=1, gauge="raw")
    assert ranks["expert"].tolist() == [e for e in range(16) if e != 5]
    assert (ranks["value"] == 1).all()
    matched = table[table["metric"].str.fullmatch("alignment|erc|score_agreement")]
    assert matched["value"].notna().all()


def test_the_sample_is_bounded_and_independent_of_parts(
    planted_model, planted_trace, tmp_path, parallel_texts, monkeypatch
):
    monkeypatch.setattr(load("analyses", "coupling"), "MAX_TOKENS", 200)
    other = record(
        planted_model, tmp_path / "parts", parallel_texts, part_tokens=150, batch_tokens=100
    )
    left, right = (table_of(trace, planted_model) for trace in (planted_trace, other))
    assert left["num_tokens"].max() == 200
    assert (left["num_tokens"] == right["num_tokens"]).all()
    tokens = left["num_tokens"] > 0
    difference = (left["value"] - right["value"])[tokens].abs()
    assert difference.median() < 1e-6
    assert difference.max() < 0.02


def test_first_tokens_are_left_out_in_the_second_variant(planted_trace, planted_table):
    counts = {
        which: select(planted_table, metric="centroid_overlap", scope="model", tokens=which)[
            "num_tokens"
        ].iloc[0]
        for which in ("all", "not_first")
    }
    assert counts["all"] - counts["not_first"] == planted_trace.num_sequences


def test_two_traces_are_drawn_together(planted_table, random_table):
    import pandas as pd

    both = pd.concat([planted_table.assign(trace="a"), random_table.assign(trace="b")])
    with style.applied():
        pictures = list(ANALYSIS.plots(both))
    assert [picture.name for picture in pictures] == ["coupling_by_layer", "coupling_effects"]
