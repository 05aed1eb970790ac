import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import save_byte_tokenizer, save_tiny_checkpoint, write_rows
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

import moetools
from moetools.batching import load_tokenizer
from moetools.errors import MachineError, RoutingError, TraceError
from moetools.trace_store import TraceStore
from moetools.tracing import TraceOptions, record, row_bytes

KEEP = ("logits", "inputs", "outputs", "predictions", "nll")


def read(path):
    """All rows of both tables, as arrays by column."""
    store = TraceStore(path)
    batches = list(store.batches(store.columns - {"id", "group", "phase"}))
    tokens = {n: np.concatenate([b.tokens[n] for b in batches]) for n in batches[0].tokens}
    sequences = {n: np.concatenate([b.sequences[n] for b in batches]) for n in batches[0].sequences}
    return store, tokens, sequences


def assert_same(one, other):
    """Two traces hold the same rows, bit for bit."""
    for table in ("tokens", "sequences"):
        parts = sorted(path.name for path in (one / table).iterdir())
        assert parts == sorted(path.name for path in (other / table).iterdir())
        for part in parts:
            assert pq.read_table(one / table / part).equals(pq.read_table(other / table / part))


@pytest.fixture(scope="module")
def full(tmp_path_factory, tiny_checkpoint, parallel_texts):
    """A trace with everything kept, of many small batches."""
    out = tmp_path_factory.mktemp("full") / "trace"
    moetools.trace(
        tiny_checkpoint,
        data=str(parallel_texts),
        out=out,
        group_column="lang",
        id_column="id",
        sequence_length=40,
        batch_tokens=128,
        part_tokens=300,
        keep=KEEP,
        device="cpu",
    )
    return out


@pytest.fixture(scope="module")
def truth(full, tiny_checkpoint):
    """What the model does with each sequence alone, by transformers' own outputs."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    _, tokens, _ = read(full)
    found = []
    for number in range(tokens["sequence"].max() + 1):
        ids = torch.from_numpy(tokens["token_id"][tokens["sequence"] == number]).long()
        with torch.no_grad():
            output = model(ids[None], labels=ids[None], output_router_logits=True)
            loss = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[1:])
        found.append((ids, output.logits[0].argmax(-1), loss, output.router_logits))
    return found


def test_tokens_are_those_of_the_texts(full, tiny_checkpoint, parallel_rows):
    store, tokens, _ = read(full)
    tokenizer = load_tokenizer(tiny_checkpoint)
    sequences = store.sequences(["text", "id", "group", "num_tokens"]).to_pylist()
    text = {}
    for number, sequence in enumerate(sequences):
        rows = tokens["sequence"] == number
        assert rows.sum() == sequence["num_tokens"]
        assert np.array_equal(tokens["position"][rows], np.arange(rows.sum()))
        key = (sequence["id"], sequence["group"])
        text[key] = [*text.get(key, []), *tokens["token_id"][rows]]
    assert {key: tokenizer.decode(ids) for key, ids in text.items()} == {
        (row["id"], row["lang"]): row["text"] for row in parallel_rows
    }
    for sequence in sequences:
        row = parallel_rows[sequence["text"]]
        assert (sequence["id"], sequence["group"]) == (row["id"], row["lang"])
    assert len(sequences) > len(parallel_rows), "some texts are cut"
    count = f"{store.num_tokens:,}".replace(",", " ")
    assert store.manifest.coverage == f"2 of 2 routers, {count} of {count} tokens"
    assert np.all(np.diff(tokens["sequence"]) >= 0), "sequences are in the order of the data"
    assert len(list((full / "tokens").iterdir())) > 2, "the run has several parts"


def test_selections_weights_and_margins_are_the_models(full, truth):
    _, tokens, _ = read(full)
    for layer in range(2):
        logits = torch.cat([each[3][layer] for each in truth])
        probs = logits.softmax(-1)
        weights, index = probs.topk(3, dim=-1)
        decided = (weights[:, 1] - weights[:, 2] > 1e-5) & (weights[:, 0] - weights[:, 1] > 1e-5)
        assert decided.float().mean() > 0.99
        assert np.array_equal(
            tokens[f"experts.{layer:02}"][decided], index[decided, :2].numpy().astype(np.uint8)
        )
        assert np.allclose(tokens[f"weights.{layer:02}"], weights[:, :2], atol=1e-3)
        margin = (weights[:, 1] - weights[:, 2]).numpy()
        assert np.allclose(tokens[f"margin.{layer:02}"], margin, rtol=1 / 30, atol=1e-5)
        assert np.allclose(tokens[f"logits.{layer:02}"], logits, atol=1e-4)


def test_sequence_means_are_those_of_the_probabilities(full, truth):
    _, _, sequences = read(full)
    for number, (ids, _, loss, router_logits) in enumerate(truth):
        for layer in range(2):
            probs = router_logits[layer].softmax(-1).double()
            even = torch.arange(len(ids))[:, None] % 2 == 0
            expected = {
                "probs": probs.mean(0),
                "probs_even": (probs * even).mean(0),
                "probs_odd": (probs * ~even).mean(0),
                "logprob": probs.log().mean(0),
                "entropy": -(probs * probs.log()).sum(-1).mean(),
            }
            for family, values in expected.items():
                stored = sequences[f"{family}.{layer:02}"][number]
                assert np.allclose(stored, values, atol=1e-4), family
        assert sequences["nll"][number] == pytest.approx(loss.item(), abs=1e-4)


def test_predictions_inputs_and_outputs_are_the_models(full, truth, tiny_checkpoint):
    _, tokens, _ = read(full)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    expected = torch.cat([each[1] for each in truth]).numpy()
    assert (tokens["predictions"] == expected).mean() > 0.99
    for layer in range(2):
        mlp = model.model.layers[layer].mlp
        inputs = torch.from_numpy(tokens[f"inputs.{layer:02}"]).float()
        logits = inputs @ mlp.gate.weight.T
        assert np.allclose(tokens[f"logits.{layer:02}"], logits.detach(), atol=0.02)
        index = torch.from_numpy(tokens[f"experts.{layer:02}"].astype(np.int64))
        weights = torch.from_numpy(tokens[f"weights.{layer:02}"]).float()
        with torch.no_grad():
            ones = torch.ones(len(inputs), 1)
            one, two = (mlp.experts(inputs, index[:, k : k + 1], ones) for k in range(2))
            total = mlp.experts(inputs, index, weights)
        expected = {
            "norms": torch.stack([one.norm(dim=-1), two.norm(dim=-1)], dim=1),
            "peaks": torch.stack([one.abs().amax(dim=-1), two.abs().amax(dim=-1)], dim=1),
            "shares": torch.stack(
                [
                    (weights[:, k] * (part * total).sum(dim=-1)) / total.square().sum(dim=-1)
                    for k, part in enumerate((one, two))
                ],
                dim=1,
            ),
        }
        for family, values in expected.items():
            stored = tokens[f"{family}.{layer:02}"]
            assert np.allclose(stored, values, rtol=0.03, atol=0.02), family
        assert np.allclose(tokens[f"shares.{layer:02}"].sum(axis=1), 1, atol=1e-3)
        a, b = (weights[:, k] * expected["norms"][:, k] for k in range(2))
        cosines = [
            torch.cosine_similarity(one, two),
            torch.cosine_similarity(one, total),
            a / (a.square() + b.square()).sqrt(),
        ]
        stored = tokens[f"collinearity.{layer:02}"]
        assert np.allclose(stored, torch.stack(cosines, dim=1), atol=0.02)


def test_batches_do_not_change_the_result(full, tmp_path, tiny_checkpoint, parallel_texts):
    moetools.trace(
        tiny_checkpoint,
        data=str(parallel_texts),
        out=tmp_path / "one",
        group_column="lang",
        id_column="id",
        sequence_length=40,
        batch_tokens=1,
        keep=KEEP,
        device="cpu",
    )
    _, tokens, sequences = read(full)
    _, alone, alone_sequences = read(tmp_path / "one")
    for name, values in tokens.items():
        if name.startswith(("experts", "predictions")):
            assert (values == alone[name]).mean() > 0.995, name
        elif name.startswith(("norms", "peaks", "shares", "collinearity")):
            assert np.isclose(values, alone[name], rtol=0.01).mean() > 0.99, name
        else:
            assert np.allclose(values, alone[name], rtol=0.04, atol=1e-3), name
    for name, values in sequences.items():
        assert np.allclose(values, alone_sequences[name], atol=1e-4), name


def test_a_repeated_trace_is_the_same_bit_for_bit(tiny_trace, tmp_path, tiny_checkpoint):
    manifest = TraceStore(tiny_trace).manifest
    moetools.trace(
        tiny_checkpoint,
        data=manifest.data["sources"],
        out=tmp_path / "again",
        group_column="lang",
        id_column="id",
        batch_tokens=256,
        part_tokens=400,
        device="cpu",
    )
    assert_same(tiny_trace, tmp_path / "again")


def options_of(trace, out, **changes):
    manifest = TraceStore(trace, partial=True).manifest
    return replace(
        TraceOptions(
            model=manifest.model,
            data=tuple(manifest.data["sources"]),
            out=out,
            group_column="lang",
            id_column="id",
            batch_tokens=256,
            part_tokens=400,
            device="cpu",
        ),
        **changes,
    )


def test_missing_parts_are_recorded_on_resume(tiny_trace, tmp_path):
    out = tmp_path / "torn"
    record(options_of(tiny_trace, out))
    for part in ("tokens/part-00001.parquet", "sequences/part-00002.parquet"):
        (out / part).unlink()
    marker = json.loads((out / ".moetools.json").read_text())
    (out / ".moetools.json").write_text(json.dumps({**marker, "complete": False}))
    run = record(options_of(tiny_trace, out, resume=True))
    sizes = [pq.read_metadata(out / f"tokens/part-0000{part}.parquet").num_rows for part in (1, 2)]
    assert run.num_tokens == sum(sizes)
    assert_same(tiny_trace, out)


def test_resume_of_a_complete_trace_does_nothing(tiny_trace, tmp_path):
    out = tmp_path / "whole"
    record(options_of(tiny_trace, out))
    before = (out / "manifest.json").read_bytes()
    assert record(options_of(tiny_trace, out, resume=True)).num_tokens == 0
    assert (out / "manifest.json").read_bytes() == before
    assert_same(tiny_trace, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 16}, r"sequence_length 128 -> 16"),
        ({"batch_tokens": 64}, "batch_tokens 256 -> 64"),
        ({"keep": ("norms",)}, "keep"),
        ({"max_tokens": 300}, "the texts or their tokens"),
        ({"dtype": "bfloat16"}, "dtype float32 -> bfloat16"),
    ],
)
def test_resume_with_other_options_says_what_differs(tiny_trace, tmp_path, changes, message):
    out = tmp_path / "trace"
    record(options_of(tiny_trace, out))
    with pytest.raises(TraceError, match=message):
        record(options_of(tiny_trace, out, resume=True, **changes))
    assert_same(tiny_trace, out)


def test_resume_with_another_model_or_text_says_so(tiny_trace, tmp_path, parallel_rows):
    out = tmp_path / "trace"
    record(options_of(tiny_trace, out))
    other = save_tiny_checkpoint(tmp_path / "other", seed=1)
    with pytest.raises(TraceError, match="routers"):
        record(options_of(tiny_trace, out, resume=True, model=str(other)))
    data = write_rows(
        tmp_path / "other.jsonl", [{**row, "text": row["text"].upper()} for row in parallel_rows]
    )
    with pytest.raises(TraceError, match="the texts or their tokens"):
        record(options_of(tiny_trace, out, resume=True, data=(str(data),)))


def test_keep_tokens_keeps_a_sample(full, tmp_path, tiny_checkpoint, parallel_texts):
    moetools.trace(
        tiny_checkpoint,
        data=str(parallel_texts),
        out=tmp_path / "sampled",
        group_column="lang",
        id_column="id",
        sequence_length=40,
        batch_tokens=128,
        part_tokens=300,
        keep=KEEP,
        keep_tokens=100,
        seed=3,
        device="cpu",
    )
    _, tokens, _ = read(full)
    _, sampled, _ = read(tmp_path / "sampled")
    kept = ~np.isnan(sampled["logits.00"][:, 0])
    assert kept.sum() == 100
    for family in ("logits", "inputs", "norms", "shares", "collinearity"):
        for layer in ("00", "01"):
            name = f"{family}.{layer}"
            assert np.array_equal(sampled[name][kept], tokens[name][kept])
            assert np.isnan(sampled[name][~kept]).all()
    assert np.array_equal(sampled["experts.00"], tokens["experts.00"])


@pytest.mark.parametrize("top_k", [2, 4, 8])
def test_a_default_trace_takes_at_most_2_6_bytes_per_selection(tmp_path, top_k, parallel_rows):
    path = tmp_path / "model"
    save_tiny(
        "olmoe", path, num_hidden_layers=8, num_experts=64, num_experts_per_tok=top_k,
        vocab_size=258,
    )  # fmt: skip
    save_byte_tokenizer(path)
    rows = [{"text": f"{n} {row['text']} {row['lang']}"} for n in range(2) for row in parallel_rows]
    store = moetools.trace(
        path, data=str(write_rows(tmp_path / "texts.jsonl", rows)), out=tmp_path / "trace"
    )
    size = sum(file.stat().st_size for file in (tmp_path / "trace" / "tokens").iterdir())
    assert store.num_tokens > 3000
    assert size <= 2.6 * top_k * store.num_tokens * 8


def test_wide_rows_make_smaller_parts(tmp_path, tiny_checkpoint, parallel_texts, monkeypatch):
    store = moetools.trace(
        tiny_checkpoint, data=str(parallel_texts), out=tmp_path / "narrow", max_tokens=50
    )
    assert store.manifest.plan["part_tokens"] == 1 << 14
    monkeypatch.setattr("moetools.tracing.PART_BYTES", 100 * row_bytes(store.manifest))
    store = moetools.trace(
        tiny_checkpoint, data=str(parallel_texts), out=tmp_path / "wide", max_tokens=50
    )
    assert 100 <= store.manifest.plan["part_tokens"] < 125


def test_nan_stops_the_run_and_names_layer_and_sequence(tmp_path, parallel_texts):
    path = save_tiny_checkpoint(tmp_path / "broken")
    poison(path, "model.layers.1.mlp.gate.weight")
    with pytest.raises(RoutingError, match=r"layer 1 \(router 01\), sequence \d+ \(id item-\d+\)"):
        moetools.trace(path, data=str(parallel_texts), out=tmp_path / "trace", id_column="id",
                       group_column="lang")  # fmt: skip
    assert not (tmp_path / "trace").exists()


def poison(path, key):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    tensors[key][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_allow_nan_records_and_notes(tmp_path, parallel_texts):
    path = save_tiny_checkpoint(tmp_path / "broken")
    poison(path, "model.layers.1.mlp.gate.weight")
    run = record(
        TraceOptions(
            model=str(path), data=(str(parallel_texts),), out=tmp_path / "trace", allow_nan=True
        )
    )
    _, tokens, _ = read(tmp_path / "trace")
    assert np.isnan(tokens["weights.01"]).any(axis=1).sum() == run.num_nan_tokens > 0
    assert not np.isnan(tokens["weights.00"]).any()
    assert str(run.num_nan_tokens) in run.store.manifest.notes[0]


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_model_larger_than_memory_is_traced_from_disk(
    tmp_path, parallel_texts, family, monkeypatch, capsys
):
    pytest.importorskip("accelerate")
    path = tmp_path / "model"
    save_tiny(family, path, vocab_size=258)
    save_byte_tokenizer(path)

    def trace(name):
        options = {"data": str(parallel_texts), "max_tokens": 300, "device": "cpu"}
        return moetools.trace(path, out=tmp_path / name, dtype="float32", **options)

    whole = trace("whole")
    size = (path / "model.safetensors").stat().st_size
    monkeypatch.setattr("moetools.opening.usable_memory", lambda device: size / 2)
    capsys.readouterr()
    spread = trace("spread")
    assert "spreads the model over devices, memory and disk" in capsys.readouterr().err
    assert spread.routers == whole.routers
    assert_same(whole.path, spread.path)
    assert not (spread.path / "offload").exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError, match="pip install accelerate"):
        trace("refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jetmoe", "qwen3_next"])
def test_other_families_are_recorded(tmp_path, parallel_texts, family):
    path = tmp_path / "model"
    save_tiny(family, path, vocab_size=258)
    save_byte_tokenizer(path)
    store = moetools.trace(
        path, data=str(parallel_texts), out=tmp_path / "trace", max_tokens=300, device="cpu"
    )
    assert store.num_tokens == 300
    assert all(router.rule is not None for router in store.routers)
    for router in store.routers:
        for ids in store.selections(router.name):
            assert ids.max() < router.num_experts
            assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    weights = next(iter(store.batches([f"weights.{store.routers[0].name}"]))).tokens
    assert all((np.diff(values, axis=1) <= 0).all() for values in weights.values())
