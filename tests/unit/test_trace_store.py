import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from moetools.errors import TraceError
from moetools.trace_store import (
    MANIFEST,
    TracedRouter,
    TraceManifest,
    TraceStore,
    TraceWriter,
    fixed_size_list,
    row_bytes,
    rows_per_group,
    sequence_schema,
    token_schema,
)


def random_trace(path, seed=0, lengths=(5, 9, 2, 7, 1, 8), **options):
    rng = np.random.default_rng(seed)
    num_tokens = sum(lengths)
    probs = {name: synthetic.random_probs(rng, num_tokens, 8) for name in ("01", "03")}
    ids = {name: synthetic.top_k_of(values, 2) for name, values in probs.items()}
    store = synthetic.write_trace(path, ids, lengths, num_experts=8, probs=probs, **options)
    return store, ids


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9),
    row_group_tokens=st.integers(1, 30),
    num_parts=st.integers(1, 3),
)
def test_what_is_written_is_read(tmp_path_factory, lengths, row_group_tokens, num_parts):
    num_parts = min(num_parts, len(lengths))
    store, ids = random_trace(
        tmp_path_factory.mktemp("trace") / "t",
        lengths=lengths,
        row_group_tokens=row_group_tokens,
        num_parts=num_parts,
        groups=["ab"[i % 2] for i in range(len(lengths))],
    )
    assert store.num_tokens == sum(lengths)
    assert store.num_sequences == len(lengths)
    for name, selected in ids.items():
        assert np.array_equal(np.concatenate(list(store.selections(name))), selected)
    batches = list(store.batches(["experts.03", "position", "probs.03", "sequence"]))
    assert np.concatenate([b.lengths for b in batches]).tolist() == lengths
    assert np.array_equal(np.concatenate([b.tokens["experts.03"] for b in batches]), ids["03"])
    for batch in batches:
        assert [store.groups[g] for g in batch.group] == ["ab"[s % 2] for s in batch.sequence]
        assert np.array_equal(batch.tokens["sequence"], np.repeat(batch.sequence, batch.lengths))
        for start in batch.offsets[:-1]:
            assert batch.tokens["position"][start] == 0
        assert np.allclose(batch.sequences["probs.03"].sum(axis=1), 1, atol=1e-5)


def test_dropped_tokens_read_as_the_largest_id(tmp_path):
    ids = np.array([[0, 1], [-1, -1], [2, 0]])
    store = synthetic.write_trace(tmp_path / "t", {"00": ids}, [3], num_experts=3)
    (read,) = store.selections("00")
    assert read.dtype == np.uint8
    assert read.tolist() == [[0, 1], [255, 255], [2, 0]]


@pytest.mark.parametrize(("num_experts", "dtype"), [(255, "uint8"), (256, "uint16")])
def test_ids_take_the_smallest_type_with_room_for_dropped(num_experts, dtype):
    router = TracedRouter(name="00", layer=0, kind="mlp", num_experts=num_experts, top_k=1)
    assert router.id_dtype == np.dtype(dtype)
    assert router.dropped >= num_experts


def test_columns_follow_the_rule_and_what_is_kept():
    known = TracedRouter(name="00", layer=0, kind="mlp", num_experts=4, top_k=2, rule={})
    unknown = TracedRouter(name="01", layer=1, kind="mlp", num_experts=4, top_k=2)
    manifest = TraceManifest(
        model="m", routers=(known, unknown), num_sequences=1, num_tokens=1, hidden_size=6,
        keep=("inputs", "norms", "logits", "predictions"), has_nll=True,
    )  # fmt: skip
    tokens, sequences = token_schema(manifest).names, sequence_schema(manifest).names
    assert "margin.00" in tokens
    assert "margin.01" not in tokens
    assert {"inputs.01", "norms.01", "logits.01", "predictions"} <= set(tokens)
    assert {"nll", "probs.00", "entropy.00"} <= set(sequences)
    assert "probs.01" not in sequences
    assert token_schema(manifest).field("inputs.00").type == pa.list_(pa.float16(), 6)
    assert rows_per_group(manifest) == 1 << 16
    wide = TraceManifest(
        model="m", routers=(known,), num_sequences=1, num_tokens=1, hidden_size=1 << 20,
        keep=("inputs",),
    )  # fmt: skip
    assert rows_per_group(wide) == (48 << 20) // row_bytes(wide) < 30


def test_lists_are_stored_as_the_contract_says(tmp_path):
    store, _ = random_trace(tmp_path / "t")
    metadata = pq.read_metadata(store.path / "tokens" / "part-00000.parquet").row_group(0)
    columns = {
        metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)
    }
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["experts.01.list.element"].has_dictionary_page
    assert "BYTE_STREAM_SPLIT" in columns["weights.01.list.element"].encodings
    assert "BYTE_STREAM_SPLIT" in columns["margin.01"].encodings
    assert columns["sequence"].is_stats_set


def test_unknown_names_are_answered_with_the_known(tmp_path):
    store, _ = random_trace(tmp_path / "t")
    with pytest.raises(TraceError, match=r"no router .07.\. Known: 01, 03"):
        store.router("07")
    with pytest.raises(TraceError, match=r"no column logits\.01"):
        list(store.batches(["logits.01"]))


def test_an_incomplete_trace_is_refused_and_read_partially(tmp_path):
    random_trace(tmp_path / "t", num_parts=3)
    manifest = json.loads((tmp_path / "t" / MANIFEST).read_text())
    (tmp_path / "t" / MANIFEST).write_text(json.dumps({**manifest, "complete": False}))
    (tmp_path / "t" / "sequences" / "part-00002.parquet").unlink()
    with pytest.raises(TraceError, match=r"is incomplete.*--resume"):
        TraceStore(tmp_path / "t")
    store = TraceStore(tmp_path / "t", partial=True)
    assert store.num_sequences == 4
    assert sum(len(ids) for ids in store.selections("01")) == store.num_tokens == 23


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a trace"),
        ("[]", "not the manifest"),
        ('{"format": "else"}', "not the manifest"),
        ("{", "cannot be read"),
        ('{"format": "moetools-trace", "format_version": 1}', "has trace format 1"),
        ('{"format": "moetools-trace", "format_version": 2}', "is damaged"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path, content, message):
    random_trace(tmp_path / "t")
    file = tmp_path / "t" / MANIFEST
    file.unlink()
    if content is not None:
        file.write_text(content)
    with pytest.raises(TraceError, match=message):
        TraceStore(tmp_path / "t")


@pytest.mark.parametrize("table", ["tokens", "sequences"])
def test_damaged_parts_are_named(tmp_path, table):
    random_trace(tmp_path / "t")
    part = tmp_path / "t" / table / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])
    with pytest.raises(TraceError, match=r"part-00000.parquet cannot be read"):
        TraceStore(tmp_path / "t")
    pq.write_table(pa.table({"a": [1]}), part)
    with pytest.raises(TraceError, match="does not have the columns of its manifest"):
        TraceStore(tmp_path / "t")
    part.unlink()
    with pytest.raises(TraceError, match="is missing"):
        TraceStore(tmp_path / "t")


def test_a_row_group_that_splits_a_sequence_is_damage(tmp_path):
    store, _ = random_trace(tmp_path / "t")
    part = store.path / "tokens" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).cast(token_schema(store.manifest)), part, row_group_size=3)
    with pytest.raises(TraceError, match="splits a sequence"):
        list(TraceStore(store.path).batches(["experts.01"]))


def test_a_failing_part_leaves_nothing(tmp_path):
    router = TracedRouter(name="00", layer=0, kind="mlp", num_experts=4, top_k=2)
    manifest = TraceManifest(model="m", routers=(router,), num_sequences=1, num_tokens=2)
    writer = TraceWriter(tmp_path, manifest)

    def tables():
        ids = np.array([[0, 1], [2, 3]], np.uint8)
        yield pa.table(
            {
                "sequence": np.zeros(2, np.int32),
                "position": np.arange(2, dtype=np.int32),
                "token_id": np.arange(2, dtype=np.int32),
                "phase": pa.array(["prefill", "prefill"]).dictionary_encode(),
                "experts.00": fixed_size_list(ids),
                "weights.00": fixed_size_list(ids.astype(np.float16)),
            }
        )
        raise OSError("the disk went away")

    with pytest.raises(OSError, match="went away"):
        writer.write_part(0, tables(), pa.table({}))
    assert not writer.has_part(0)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [MANIFEST, "sequences", "tokens"]
