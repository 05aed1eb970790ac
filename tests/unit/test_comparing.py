"""Two checkpoints over the same texts: planted changes land in their cell of the 2x2 split."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import save_byte_tokenizer, save_tiny_checkpoint, write_rows
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moetools import drift
from moetools.analysis import select, single
from moetools.checkpoint import Checkpoint
from moetools.comparing import CompareOptions, diff_checkpoints, find
from moetools.errors import MachineError, RequestError
from moetools.hooks import RouterRecorder
from moetools.loading import load_model

ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
CELLS = ("router_only", "input_only", "total")


@pytest.fixture(scope="module")
def texts(tmp_path_factory, parallel_rows):
    return write_rows(tmp_path_factory.mktemp("texts") / "a.jsonl", parallel_rows[:12])


@pytest.fixture
def edited(tmp_path, tiny_checkpoint):
    """A copy of the tiny checkpoint with some tensors changed."""

    def make(name, change):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder)
        file = folder / "model.safetensors"
        tensors = {key: change(key, tensor.clone()) for key, tensor in load_file(file).items()}
        save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata={"format": "pt"})
        return folder

    return make


def noise(wanted, scale=0.3, seed=0):
    """Adds normal noise to the tensors whose key `wanted` accepts, relative to their spread."""

    def change(key, tensor):
        if not wanted(key):
            return tensor
        generator = torch.Generator().manual_seed(seed)
        return tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return change


def compared(a, b, texts, **options):
    return diff_checkpoints(
        str(a), str(b), CompareOptions(data=(str(texts),), device="cpu", **options)
    )


def overlaps(found):
    """Overlap by cell: [layer 0, layer 1]."""
    rows = select(found.table, metric="overlap_at_k", scope="layer")
    return {
        cell: select(rows, cell=cell).sort_values("layer")["value"].tolist()
        for cell in (*CELLS, "again")
    }


def test_a_checkpoint_against_itself(tiny_checkpoint, texts):
    found = compared(tiny_checkpoint, tiny_checkpoint, texts, group_column="lang")
    assert all(values == [1, 1] for values in overlaps(found).values())
    assert single(found.table, "overlap_interaction") == 0
    assert single(found.table, "input_change") == single(found.table, "expert_drift") == 0
    assert single(found.table, "load_js", cell="total") == 0
    assert single(found.table, "router_change") == 0
    assert single(found.table, "row_cosine_min") == 1
    assert not found.differs
    assert not found.reasons
    assert found.notes == ()
    groups = select(found.table, metric="overlap_at_k", scope="group", cell="total")
    assert set(groups["group"]) == {"de", "en", "fr"}
    floor = select(found.table, metric="overlap_at_k", scope="model", cell="total")["floor"]
    assert floor.item() == pytest.approx(1, abs=0.01)


def test_a_changed_router_is_router_only(tiny_checkpoint, texts, edited):
    found = compared(tiny_checkpoint, edited("b", noise(lambda key: key == ROUTERS[1])), texts)
    by_cell = overlaps(found)
    assert by_cell["router_only"][0] == by_cell["input_only"][0] == by_cell["total"][0] == 1
    assert by_cell["input_only"][1] == 1
    assert by_cell["router_only"][1] == by_cell["total"][1] < 0.95
    assert single(found.table, "overlap_interaction", "layer", layer=1) == pytest.approx(0)
    assert single(found.table, "expert_drift") == 0
    assert single(found.table, "router_change", "layer", layer=0) == 0
    assert single(found.table, "router_change", "layer", layer=1) == pytest.approx(0.3, rel=0.2)
    assert single(found.table, "num_changed_tensors") == 1
    assert found.differs


@pytest.mark.parametrize("where", ["layers.0.mlp.experts", "layers.1.self_attn"])
def test_what_feeds_a_router_is_input_only(tiny_checkpoint, texts, edited, where):
    found = compared(tiny_checkpoint, edited("b", noise(lambda key: where in key)), texts)
    by_cell = overlaps(found)
    assert all(by_cell[cell][0] == 1 for cell in CELLS)
    assert by_cell["router_only"][1] == 1
    assert by_cell["input_only"][1] == by_cell["total"][1] < 0.99
    assert single(found.table, "input_change", "layer", layer=0) == 0
    assert single(found.table, "input_change", "layer", layer=1) > 0.01
    in_experts = "experts" in where
    assert (single(found.table, "expert_drift", "layer", layer=0) > 0.1) == in_experts
    assert single(found.table, "expert_drift", "layer", layer=1) == 0
    assert found.differs
    assert single(found.table, "num_changed_tensors") == 0


def test_changed_embeddings_reach_every_router(tiny_checkpoint, texts, edited):
    found = compared(tiny_checkpoint, edited("b", noise(lambda key: "embed" in key)), texts)
    by_cell = overlaps(found)
    assert by_cell["router_only"] == [1, 1]
    assert max(by_cell["input_only"]) < 0.99
    assert by_cell["input_only"] == by_cell["total"]


def test_both_changes_and_their_interaction(tiny_checkpoint, texts, edited):
    wanted = noise(lambda key: key in ROUTERS or "embed" in key)
    found = compared(tiny_checkpoint, edited("b", wanted), texts)
    by_cell = overlaps(found)
    for layer in (0, 1):
        losses = {cell: 1 - by_cell[cell][layer] for cell in CELLS}
        assert min(losses.values()) > 0.01
        interaction = losses["total"] - losses["router_only"] - losses["input_only"]
        assert single(found.table, "overlap_interaction", "layer", layer=layer) == pytest.approx(
            interaction
        )


def test_more_noise_on_the_router_less_overlap(tiny_checkpoint, texts, edited):
    values = [
        overlaps(
            compared(
                tiny_checkpoint,
                edited(str(scale), noise(lambda key: key == ROUTERS[0], scale)),
                texts,
            )
        )["router_only"][0]
        for scale in (0.01, 0.1, 0.5, 2.0)
    ]
    assert all(np.diff(values) < 0)
    assert values[0] > 0.97


def recorded(path, token_ids):
    """What the routers of a checkpoint did with one sequence."""
    model = load_model(path, dtype=torch.float32, device="cpu")
    specs = find(Checkpoint.open(str(path)))
    with (
        torch.inference_mode(),
        RouterRecorder(model, specs, keep=frozenset({"inputs", "logits"})) as recorder,
    ):
        recorder.begin(num_tokens=len(token_ids))
        model(torch.tensor(token_ids)[None])
        return recorder.take()


def test_cells_against_products_of_recorded_inputs_and_weights(tiny_checkpoint, tmp_path, edited):
    text = "All human beings are born free and equal in dignity and rights."
    data = write_rows(tmp_path / "one.jsonl", [{"text": text}])
    b = edited("b", noise(lambda key: "gate.weight" in key or "embed" in key, 0.2))
    found = compared(tiny_checkpoint, b, data)
    document = json.loads((tiny_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    assert document["model"]["type"] == "BPE"
    from transformers import AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(tiny_checkpoint)(text)["input_ids"]
    of_a, of_b = recorded(tiny_checkpoint, token_ids), recorded(b, token_ids)
    weights = [load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, b)]
    for layer, name in enumerate(("00", "01")):
        own = [set(row.tolist()) for row in of_a[name].top_k_index]
        for cell, inputs, weight in (
            ("router_only", of_a, weights[1]),
            ("input_only", of_b, weights[0]),
            ("total", of_b, weights[1]),
        ):
            logits = inputs[name].router_inputs @ weight[ROUTERS[layer]].float().T
            other = [set(row.tolist()) for row in logits.topk(2).indices]
            shares = [len(x & y) / 2 for x, y in zip(own, other, strict=True)]
            assert single(
                found.table, "overlap_at_k", "layer", layer=layer, cell=cell
            ) == pytest.approx(np.mean(shares)), (layer, cell)


def test_a_change_that_no_input_sees(tmp_path, texts, tiny_checkpoint, edited):
    data = write_rows(tmp_path / "short.jsonl", [{"text": "All human beings"}])
    from transformers import AutoTokenizer

    token_ids = AutoTokenizer.from_pretrained(tiny_checkpoint)("All human beings")["input_ids"]
    x = recorded(tiny_checkpoint, token_ids)["00"].router_inputs.double()
    _, _, vectors = torch.linalg.svd(x, full_matrices=True)
    outside = vectors[len(x) :]

    def change(key, tensor):
        if key != ROUTERS[0]:
            return tensor
        moved = tensor.double() + torch.randn(len(tensor), len(outside)).double() @ outside
        return moved.to(tensor.dtype)

    found = compared(tiny_checkpoint, edited("b", change), data)
    assert overlaps(found)["router_only"][0] == 1
    assert single(found.table, "router_change", "layer", layer=0) > 0.5
    assert single(found.table, "router_change_in_span", "layer", layer=0) < 1e-6
    assert 0 < single(found.table, "span_dimension", "layer", layer=0) <= len(x) / 32


def test_permuted_experts_are_matched(tiny_checkpoint, texts, edited):
    orders = {layer: np.random.default_rng(layer).permutation(8) for layer in (0, 1)}

    def change(key, tensor):
        parts = key.split(".")
        if "mlp" not in parts:
            return tensor
        order = orders[int(parts[2])]
        if "gate" in parts:
            return tensor[torch.from_numpy(order)]
        assert "experts" in parts
        source = [*parts]
        source[5] = str(order[int(parts[5])])
        return original[".".join(source)].clone()

    original = load_file(tiny_checkpoint / "model.safetensors")
    b = edited("b", change)
    plain = compared(tiny_checkpoint, b, texts)
    matched = compared(tiny_checkpoint, b, texts, match_experts=True)
    assert single(plain.table, "overlap_at_k", cell="total") < 0.6
    assert single(plain.table, "input_change") < 1e-5
    assert plain.matching == {}
    for layer, name in enumerate(("00", "01")):
        assert orders[layer][matched.matching[name]].tolist() == list(range(8))
    assert min(overlaps(matched)["total"]) > 0.99
    assert min(overlaps(matched)["router_only"]) == 1
    assert single(matched.table, "expert_drift") < 1e-5
    assert single(matched.table, "router_change") == 0
    assert single(plain.table, "router_change") > 0.5


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", "llama4_text", "longcat_flash", "minimax_m2"]
)
def test_other_families_reproduce_their_own_selection(family, tmp_path, texts):
    save_tiny(family, tmp_path / family, vocab_size=258)
    save_byte_tokenizer(tmp_path / family)
    found = compared(tmp_path / family, tmp_path / family, texts, max_tokens=200)
    rows = select(found.table, metric="overlap_at_k", scope="layer")
    for cell in (*CELLS, "again"):
        assert (select(rows, cell=cell)["value"] == 1).all()
    drifts = select(found.table, metric="expert_drift", scope="layer")["value"]
    if family in ("llama4_text", "longcat_flash"):
        assert drifts.isna().all()
    else:
        assert (drifts == 0).all()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("inkling_text", "its scoring rule is unknown"),
        ("zaya", "it reads more than the hidden state of a token"),
    ],
)
def test_routers_that_cannot_be_asked_again(family, reason, tmp_path, texts):
    save_tiny(family, tmp_path / family, vocab_size=258)
    save_byte_tokenizer(tmp_path / family)
    found = compared(tmp_path / family, tmp_path / family, texts, max_tokens=200)
    assert set(found.reasons.values()) == {f"in A {reason}"}
    assert any(reason in note for note in found.notes)
    assert single(found.table, "overlap_at_k", cell="total") == 1
    assert np.isnan(single(found.table, "overlap_at_k", cell="router_only"))
    assert np.isnan(single(found.table, "overlap_interaction"))


def test_checkpoints_that_cannot_be_compared(tmp_path, tiny_checkpoint, texts, monkeypatch):
    def refused(b, error=RequestError, **options):
        with pytest.raises(error) as caught:
            compared(tiny_checkpoint, b, texts, **options)
        return str(caught.value)

    experts = save_tiny_checkpoint(tmp_path / "experts", num_experts=4)
    assert "Router 00 has 8 experts in" in refused(experts)
    layers = save_tiny_checkpoint(tmp_path / "layers", num_hidden_layers=3)
    assert f"Only {layers} has router 02" in refused(layers)
    wide = save_tiny_checkpoint(tmp_path / "wide", hidden_size=64)
    assert "Router 00 is [8, 32] in" in refused(wide)
    other = save_tiny_checkpoint(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "cut these texts into different tokens" in refused(other)
    monkeypatch.setattr("moetools.comparing.usable_memory", lambda device: 1e5)
    line = refused(tiny_checkpoint, MachineError)
    assert "together; cpu offers 0.0 GB. Trace each one with `moetools trace`" in line


def test_row_cosines_of_scaled_centred_and_zero_rows():
    a = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = drift.router_change(a, 2 * a)
    assert found["router_change"] == pytest.approx(1)
    assert found["row_cosine"] == pytest.approx(1)
    shifted = drift.router_change(a, a + np.array([5.0, 5, 5]))
    assert shifted["row_cosine"] < 0.7
    assert shifted["row_cosine_centred_min"] == pytest.approx(1)
    assert np.isnan(drift.router_change(0 * a, a)["router_change"])
    assert np.isnan(drift.router_change(0 * a, 0 * a)["row_cosine"])


def test_energy_in_the_span_of_the_inputs():
    gram = np.diag([100.0, 50, 1e-9, 0])
    inside, outside = np.array([[1.0, 2, 0, 0]]), np.array([[0, 0, 1.0, 1]])
    assert drift.energy_in_span(inside, gram) == (pytest.approx(1), 0.5)
    assert drift.energy_in_span(outside, gram) == (pytest.approx(0), 0.5)
    assert drift.energy_in_span(inside + outside, gram)[0] == pytest.approx(5 / 7)
    assert np.isnan(drift.energy_in_span(0 * inside, gram)[0])
