import hashlib
import json
import os
import shutil
import stat

import pytest
import torch
from raw_checkpoints import CONFIG, INDEX, raw, read_raw, read_shard, tree, write_raw
from safetensors import safe_open
from safetensors.torch import load_file

import moetools
from moetools import writing
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.errors import CheckpointError, MachineError, OutputError
from moetools.patches import write_patch
from moetools.provenance import PROVENANCE, read_edits
from moetools.writing import WriteOptions, summary, write_checkpoint

GATE = "model.layers.{}.mlp.gate.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINGLE = "model.safetensors"
SHARDS = {
    FIRST: {
        GATE.format(0): raw("BF16", (4, 8), 64, 1),
        "model.layers.0.mlp.experts.gate_up_proj": raw("F32", (4, 6, 8), 768, 2),
        "model.layers.0.mlp.gate.bias": raw("F32", (4,), 16, 3),
    },
    SECOND: {
        GATE.format(1): raw("BF16", (4, 8), 64, 4),
        "model.layers.1.mlp.experts.0.up_proj.weight": raw("F8_E4M3", (3, 8), 24, 5),
        "model.layers.1.mlp.experts.0.up_proj.weight_scale_inv": raw("F8_E8M0", (3,), 3, 6),
        "model.layers.1.mlp.experts.packed": raw("Q4_K_X", (3, 5), 11, 7),
        "model.layers.1.mlp.experts.down_blocks": raw("F4", (4, 6), 12, 8),
        "model.empty": raw("F32", (0, 4), 0, 9),
    },
}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def record(**parameters):
    return EditRecord(
        method="test", parameters=parameters, metrics={"a": 0.1}, model="org/base", version="1"
    )


def change(tensor):
    dtype, shape, content = tensor
    return TensorChange(dtype=dtype, shape=shape, read=lambda: content)


def plan(folder, changes, **more):
    """A plan with raw tensors."""
    return EditPlan(
        checkpoint=Checkpoint.open(str(folder)),
        changes={key: change(tensor) for key, tensor in changes.items()},
        record=record(),
        **more,
    )


def other(tensor, seed=99):
    dtype, shape, content = tensor
    return raw(dtype, shape, len(content), seed)


@pytest.fixture
def sharded(tmp_path):
    return write_raw(tmp_path / "sharded", SHARDS)


@pytest.fixture
def single(tmp_path):
    both = {key: tensor for tensors in SHARDS.values() for key, tensor in tensors.items()}
    return write_raw(tmp_path / "single", {SINGLE: both})


def write(folder, changes, out, options=None, **more):
    return write_checkpoint(plan(folder, changes, **more), out, options=options)


@pytest.mark.parametrize("key", [key for tensors in SHARDS.values() for key in tensors])
@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_only_the_planned_bytes_change(tmp_path, request, layout, key):
    folder = request.getfixturevalue(layout)
    before = read_raw(folder)
    new = other(before[key])
    written = write(folder, {key: new}, tmp_path / "out")
    assert read_raw(tmp_path / "out") == {**before, key: new}
    for shard in folder.glob("*.safetensors"):
        old, now = shard.read_bytes(), (tmp_path / "out" / shard.name).read_bytes()
        position = old.find(before[key][2]) if key in read_shard(shard)[1] else len(old)
        length = len(new[2])
        assert len(old) == len(now)
        assert old[:position] == now[:position]
        assert old[position + length :] == now[position + length :]
    assert (written.changed, written.rounded_away) == (
        ((key,), ()) if before[key][2] else ((), (key,))
    )
    assert set(os.listdir(tmp_path / "out")) == {
        *os.listdir(folder), "moetools.json", "moetools", ".moetools.json",
    }  # fmt: skip


def test_an_edit_is_recorded(tmp_path, sharded):
    key, old = GATE.format(1), SHARDS[SECOND][GATE.format(1)]
    new = other(old)
    out = tmp_path / "out"
    written = write(sharded, {key: new}, out, attachments={"report.json": b"{}"})
    (edit,) = json.loads((out / "moetools.json").read_text())["edits"]
    assert edit["method"] == "test"
    assert edit["model"] == "org/base"
    assert edit["metrics"] == {"a": 0.1}
    assert edit["tensors"] == {
        key: {"before": sha256(old[2]), "after": sha256(new[2])},
    }
    assert edit["undo"] == "moetools/undo-1.bin"
    assert (out / "moetools/edit-1/report.json").read_bytes() == b"{}"
    _, undo = read_shard(out / "moetools/undo-1.bin")
    assert undo == {f"tensor:{key}": old}
    assert written.num_bytes >= sum(path.stat().st_size for path in sharded.iterdir())
    assert "1 tensor changed" in summary(written)[0]


def test_the_same_plan_writes_the_same_bytes(tmp_path, sharded):
    changes = {GATE.format(1): other(SHARDS[SECOND][GATE.format(1)])}
    for name in ("a", "b"):
        write(sharded, changes, tmp_path / name)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_what_rounds_away_is_said(tmp_path, sharded, capsys):
    key = GATE.format(0)
    written = write(sharded, {key: SHARDS[FIRST][key]}, tmp_path / "out")
    assert written.changed == ()
    assert written.rounded_away == (key,)
    assert "Nothing changed: 1 of 1 planned tensors rounded away" in " ".join(summary(written))
    (edit,) = json.loads((tmp_path / "out/moetools.json").read_text())["edits"]
    assert edit["tensors"] == {}
    assert edit["rounded_away"] == [key]


@pytest.mark.parametrize("layout", ["sharded", "single"])
def test_a_tensor_of_another_shape_rewrites_its_shard_alone(tmp_path, request, layout):
    folder = request.getfixturevalue(layout)
    before = read_raw(folder)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    new = raw("F32", (3, 6, 8), 576, 20)
    write(folder, {key: new}, tmp_path / "out")
    after = read_raw(tmp_path / "out")
    assert after == {**before, key: new}
    assert list(after) == list(before), "the order stays"
    shard = FIRST if layout == "sharded" else SINGLE
    old_header, new_header = (
        json.loads(read_shard(path / shard)[0]) for path in (folder, tmp_path / "out")
    )
    assert list(old_header) == list(new_header)
    assert old_header["__metadata__"] == new_header["__metadata__"]
    if layout == "sharded":
        assert (folder / SECOND).read_bytes() == (tmp_path / "out" / SECOND).read_bytes()
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        old_index = json.loads((folder / INDEX).read_text())
        assert index["weight_map"] == old_index["weight_map"]
        assert index["metadata"]["total_size"] == old_index["metadata"]["total_size"] - 6 * 8 * 4
    Checkpoint.open(str(tmp_path / "out"))


def test_another_dtype_never_leaves_a_tensor_where_it_cannot_be_read(tmp_path):
    tensors = {
        "model.experts.a": raw("F32", (3,), 12, 1),
        "model.experts.b": raw("F32", (2,), 8, 2),
        "model.experts.c": raw("BF16", (2,), 4, 3),
    }
    folder = write_raw(tmp_path / "in", {SINGLE: tensors})
    new = raw("F8_E4M3", (3,), 3, 4)
    write(folder, {"model.experts.a": new}, tmp_path / "out")
    _, after = read_shard(tmp_path / "out" / SINGLE)
    assert after == {**tensors, "model.experts.a": new}
    assert list(after) == ["model.experts.b", "model.experts.c", "model.experts.a"]
    loaded = load_file(tmp_path / "out" / SINGLE)
    assert loaded["model.experts.a"].dtype == torch.float8_e4m3fn


def test_the_index_counts_elements(tmp_path, sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["metadata"]["total_parameters"] = 1000
    (sharded / INDEX).write_text(json.dumps(index))
    write(sharded, {"model.layers.0.mlp.gate.bias": raw("BF16", (8,), 16, 20)}, tmp_path / "out")
    expected = {**index, "metadata": {**index["metadata"], "total_parameters": 1004}}
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == expected
    moetools.revert(tmp_path / "out", out=tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sharded)


def test_an_index_without_counts_stays_as_it_is(tmp_path, sharded):
    index = json.loads((sharded / INDEX).read_text())
    (sharded / INDEX).write_text(json.dumps({"weight_map": index["weight_map"]}))
    write(sharded, {"model.layers.0.mlp.gate.bias": raw("F32", (8,), 32, 20)}, tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == (sharded / INDEX).read_bytes()


def test_new_tensors_go_to_a_shard_of_their_own(tmp_path, sharded):
    new = {
        "model.new.small": raw("F8_E4M3", (3,), 3, 20),
        "model.new.bias": raw("F32", (4,), 16, 21),
    }
    write(sharded, new, tmp_path / "out")
    for shard in SHARDS:
        assert (sharded / shard).read_bytes() == (tmp_path / "out" / shard).read_bytes()
    added = "model-added-1.safetensors"
    assert read_shard(tmp_path / "out" / added)[1] == new
    with safe_open(tmp_path / "out" / added, framework="pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert set(tensors.keys()) == set(new)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    old = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"] == {**old["weight_map"], **dict.fromkeys(new, added)}
    assert index["metadata"]["total_size"] == old["metadata"]["total_size"] + 19
    opened = Checkpoint.open(str(tmp_path / "out"))
    assert opened.tensors.keys() == {*read_raw(sharded), *new}


@pytest.mark.parametrize("has_index", [False, True])
def test_new_tensors_of_a_single_file_are_appended_to_it(tmp_path, has_index):
    tensors = SHARDS[FIRST]
    folder = write_raw(tmp_path / "in", {SINGLE: tensors}, index=has_index)
    new = {"model.new.bias": raw("F32", (4,), 16, 21)}
    write(folder, new, tmp_path / "out")
    _, after = read_shard(tmp_path / "out" / SINGLE)
    assert after == tensors | new
    assert list(after) == [*tensors, *new]
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == [SINGLE]
    Checkpoint.open(str(tmp_path / "out"))
    if has_index:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"]["model.new.bias"] == SINGLE


def test_tensors_are_produced_once_and_one_at_a_time(tmp_path, sharded):
    made = []

    def produce(key, content):
        made.append(key)
        return content

    checkpoint = Checkpoint.open(str(sharded))
    keys = [GATE.format(1), GATE.format(0)]
    changes = {
        key: TensorChange(dtype="BF16", shape=(4, 8), read=lambda key=key: produce(key, bytes(64)))
        for key in keys
    }
    edit = EditPlan(checkpoint=checkpoint, changes=changes, record=record())
    options = WriteOptions(patch=tmp_path / "patch")
    write_checkpoint(edit, tmp_path / "out", options=options)
    assert sorted(made) == sorted(keys)


def test_an_empty_plan_is_a_copy(tmp_path, sharded):
    written = write(sharded, {}, tmp_path / "out")
    copied = tree(tmp_path / "out", without=("moetools", ".moetools.json"))
    assert copied == tree(sharded)
    assert (written.changed, written.rounded_away) == ((), ())


def test_small_files_change_with_the_edit(tmp_path, sharded):
    config = json.dumps({**CONFIG, "num_experts": 3}).encode()
    files = {"config.json": config, "chat/extra.json": b"[]"}
    written = write(sharded, {}, tmp_path / "out", files=files)
    assert (tmp_path / "out/config.json").read_bytes() == config
    assert (tmp_path / "out/chat/extra.json").read_bytes() == b"[]"
    assert set(written.files) == set(files)
    (edit,) = json.loads((tmp_path / "out/moetools.json").read_text())["edits"]
    assert edit["files"]["chat/extra.json"] == {"before": None, "after": sha256(b"[]")}


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../x", "", INDEX, "moetools.json", "moetools/x", FIRST, "x.safetensors"],
)
def test_plans_that_overreach_are_refused(tmp_path, sharded, name):
    with pytest.raises(ValueError, match=r"name of a file inside|written by moetools"):
        write(sharded, {}, tmp_path / "out", files={name: b""})
    assert os.listdir(tmp_path) == ["sharded"]


def test_plans_of_another_size_are_refused(tmp_path, sharded):
    with pytest.raises(ValueError, match="expected 64 bytes, the plan made 3"):
        write(sharded, {GATE.format(0): ("BF16", (4, 8), b"abc")}, tmp_path / "out")
    key = "model.layers.1.mlp.experts.packed"
    with pytest.raises(ValueError, match="expected 11 bytes"):
        write(sharded, {key: ("Q4_K_X", (3, 5), b"abc")}, tmp_path / "out")
    unwritable = EditPlan(
        checkpoint=Checkpoint.open(str(sharded)), changes={}, record=record(a=float("nan"))
    )
    with pytest.raises(ValueError, match="Out of range float"):
        write_checkpoint(unwritable, tmp_path / "out")
    assert os.listdir(tmp_path) == ["sharded"]


WEIGHTS = (
    "consolidated.safetensors", "model.Q4.gguf", "pytorch_model.bin", "sub/adapter.safetensors",
    "training.pt", "pytorch_model.bin.index.json",
)  # fmt: skip
FOLDERS = ("original/", ".git/", ".cache/")
KEPT = ("modeling_x.py", "chat_template.jinja", "sub/notes.txt", "empty/", "sub/")


@pytest.fixture
def crowded(sharded):
    """A checkpoint with weights in other forms, code and sub-folders."""
    for name in (*WEIGHTS, *KEPT, *(f"{folder}params.json" for folder in FOLDERS)):
        path = sharded / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir(exist_ok=True) if name.endswith("/") else path.write_text(name)
    (sharded / "broken.txt").symlink_to("nowhere")
    (sharded / "sub" / "loop").symlink_to(sharded)
    return sharded


def test_other_weights_are_left_out_and_listed(tmp_path, crowded):
    written = write(crowded, {}, tmp_path / "out")
    found = tree(tmp_path / "out")
    assert set(written.left_out) == {*WEIGHTS, *FOLDERS, "broken.txt", "sub/loop/"}
    assert not [name for name in found if name.startswith((*WEIGHTS[:4], *FOLDERS))]
    assert all(name in found for name in KEPT)
    assert found["modeling_x.py"] == b"modeling_x.py"
    text = " ".join(summary(written))
    assert all(name in text for name in ("consolidated.safetensors", "original/", ".git"))


def test_carry_all_keeps_them_but_never_loose_safetensors(tmp_path, crowded):
    written = write(crowded, {}, tmp_path / "out", WriteOptions(carry_all=True))
    assert set(written.left_out) == {"consolidated.safetensors", "broken.txt", "sub/loop/"}
    found = tree(tmp_path / "out")
    for name in {*WEIGHTS, "original/params.json"} - {"consolidated.safetensors"}:
        assert found[name] == (crowded / name).read_bytes()
    assert set((tmp_path / "out").glob("*.safetensors")) == {
        tmp_path / "out" / FIRST, tmp_path / "out" / SECOND,
    }  # fmt: skip


def scribble(folder, without=()):
    """Write into every file of a folder, in place."""
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in without:
            with path.open("r+b") as file:
                file.write(b"changed")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A model in the hub's cache: files are links to blobs, all of them read-only."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "hub" / "models--org--moe"
    plain = write_raw(tmp_path / "plain", SHARDS)
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for path in plain.iterdir():
        blob = root / "blobs" / sha256(path.read_bytes())
        shutil.copy(path, blob)
        blob.chmod(0o444)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


def test_an_output_shares_nothing_with_the_input(tmp_path, hub_cache):
    before = tree(hub_cache)
    snapshot = next((hub_cache / "snapshots").iterdir())
    write(snapshot, {GATE.format(0): other(SHARDS[FIRST][GATE.format(0)])}, tmp_path / "out")
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_nlink == 1
        assert os.stat(path).st_mode & stat.S_IWUSR
    scribble(tmp_path / "out")
    assert tree(hub_cache) == before


def test_link_shares_untouched_shards_only(tmp_path, sharded):
    before = tree(sharded)
    key = GATE.format(0)
    written = write(
        sharded, {key: other(SHARDS[FIRST][key])}, tmp_path / "out", WriteOptions(link=True)
    )
    assert written.linked == (SECOND,)
    assert any("changes the input too" in note for note in written.notes)
    (edit,) = json.loads((tmp_path / "out/moetools.json").read_text())["edits"]
    assert edit["linked"] == [SECOND]
    shared = {
        path.name
        for path in (tmp_path / "out").iterdir()
        if (sharded / path.name).is_file() and os.path.samefile(path, sharded / path.name)
    }
    assert shared == {SECOND}
    scribble(tmp_path / "out", without=(SECOND,))
    assert tree(sharded) == before


def test_link_copies_where_it_cannot_link(tmp_path, sharded, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    written = write(sharded, {}, tmp_path / "out", WriteOptions(link=True))
    assert written.linked == ()
    assert written.notes == (
        "Weight files are copied: they cannot be linked (Invalid cross-device link).",
    )
    assert (tmp_path / "out" / SECOND).stat().st_nlink == 1


def test_a_read_only_source_works(tmp_path, sharded):
    for path in sharded.iterdir():
        path.chmod(0o444)
    sharded.chmod(0o555)
    try:
        write(sharded, {GATE.format(0): other(SHARDS[FIRST][GATE.format(0)])}, tmp_path / "out")
    finally:
        sharded.chmod(0o755)
    scribble(tmp_path / "out")


def test_where_an_output_may_not_lie(tmp_path, sharded):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(sharded / SECOND, outside / SECOND)
    (sharded / SECOND).symlink_to(outside / SECOND)
    for out, message in (
        (sharded, "is or contains the input"),
        (sharded / "out", "lies inside the input"),
        (tmp_path, "is or contains the input"),
        (outside, "was not written by moetools"),
    ):
        with pytest.raises(OutputError, match=message):
            write(sharded, {}, out, WriteOptions(overwrite=True))
    (outside / ".moetools.json").write_text('{"kind": "checkpoint", "complete": true}')
    with pytest.raises(OutputError, match="contains the input"):
        write(sharded, {}, outside, WriteOptions(overwrite=True))
    assert (outside / SECOND).is_file()


def test_an_output_is_replaced_only_when_asked(tmp_path, sharded):
    out = tmp_path / "out"
    write(sharded, {}, out)
    with pytest.raises(OutputError, match="Name a new folder, or replace it with --overwrite"):
        write(sharded, {}, out)
    (out / "mine.txt").write_text("x")
    write(sharded, {}, out, WriteOptions(overwrite=True))
    assert not (out / "mine.txt").exists()


def test_where_a_patch_may_not_lie(tmp_path, sharded):
    out = tmp_path / "out"
    for patch, message in (
        (out / "patch", "lies inside --out"),
        (sharded / "patch", "lies inside the input"),
        (tmp_path, "is a folder"),
        (out, "is --out"),
        (sharded / "config.json", "lies inside the input"),
        (tmp_path / "data", "is the input"),
    ):
        with pytest.raises(OutputError, match=message):
            write_checkpoint(
                plan(sharded, {}),
                out,
                options=WriteOptions(patch=patch, overwrite=True),
                inputs=[tmp_path / "data"],
            )
    (tmp_path / "patch").write_text("mine")
    with pytest.raises(OutputError, match=r"exists\. Name a new file"):
        write(sharded, {}, out, WriteOptions(patch=tmp_path / "patch"))
    assert (tmp_path / "patch").read_text() == "mine"
    assert not out.exists()
    write(sharded, {}, out, WriteOptions(patch=tmp_path / "patch", overwrite=True))


def test_a_patch_has_one_writer(tmp_path, sharded):
    key, patch = GATE.format(0), tmp_path / "patch"
    first, second = (raw("BF16", (4, 8), 64, seed) for seed in (50, 51))
    options = WriteOptions(patch=patch, overwrite=True)

    def write_another_meanwhile():
        with pytest.raises(OutputError, match=r"--patch .* is being written by another"):
            write(sharded, {key: second}, tmp_path / "second", options)
        with pytest.raises(OutputError, match=r"--patch .* is being written by another"):
            write_patch(plan(sharded, {key: second}), patch, overwrite=True)
        return first[2]

    slow = TensorChange(dtype="BF16", shape=(4, 8), read=write_another_meanwhile)
    edit = EditPlan(checkpoint=Checkpoint.open(str(sharded)), changes={key: slow}, record=record())
    write_checkpoint(edit, tmp_path / "first", options=options)
    assert sorted(os.listdir(tmp_path)) == ["first", "patch", "sharded"]
    moetools.apply(sharded, patch, out=tmp_path / "applied")
    assert read_raw(tmp_path / "applied")[key] == first


def test_a_patch_that_appeared_meanwhile_is_not_replaced(tmp_path, sharded, monkeypatch):
    patch = tmp_path / "patch"
    local_path = Checkpoint.whole_path

    def appear(self, **options):
        patch.write_text("mine")
        return local_path(self, **options)

    monkeypatch.setattr(Checkpoint, "whole_path", appear)
    with pytest.raises(OutputError, match=r"exists\. Name a new file"):
        write(sharded, {}, tmp_path / "out", WriteOptions(patch=patch))
    assert patch.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["patch", "sharded"]


def test_a_failure_leaves_nothing(tmp_path, sharded):
    def fail():
        raise KeyboardInterrupt

    checkpoint = Checkpoint.open(str(sharded))
    changes = {GATE.format(1): TensorChange(dtype="BF16", shape=(4, 8), read=fail)}
    edit = EditPlan(checkpoint=checkpoint, changes=changes, record=record())
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(edit, tmp_path / "out", options=WriteOptions(patch=tmp_path / "patch"))
    assert os.listdir(tmp_path) == ["sharded"]


def test_a_source_that_changes_meanwhile_is_refused(tmp_path, sharded):
    edit = plan(sharded, {})
    with (sharded / SECOND).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match="changed while it was being edited"):
        write_checkpoint(edit, tmp_path / "out")
    assert os.listdir(tmp_path) == ["sharded"]


def test_what_was_not_written_is_found(tmp_path, sharded, monkeypatch):
    produce = writing.FolderBuilder._produce
    monkeypatch.setattr(
        writing.FolderBuilder, "_produce", lambda self, key: bytes(len(produce(self, key)))
    )
    key = GATE.format(0)
    with pytest.raises(MachineError, match=r"is not what was written\. Check the disk"):
        write(sharded, {key: other(SHARDS[FIRST][key])}, tmp_path / "out")
    assert os.listdir(tmp_path) == ["sharded"]


def test_an_index_that_points_outside_is_refused(tmp_path, sharded):
    outside = tmp_path / "elsewhere.safetensors"
    shutil.move(sharded / SECOND, outside)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {
        key: "../elsewhere.safetensors" if shard == SECOND else shard
        for key, shard in index["weight_map"].items()
    }
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        write(sharded, {}, tmp_path / "out")


def test_damaged_provenance_is_refused(tmp_path, sharded):
    for text, message in (
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": 2, "edits": []}', "has format 2, expected 1"),
        ('{"format": 1, "edits": 3}', "is damaged"),
    ):
        (sharded / "moetools.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            write(sharded, {}, tmp_path / "out")
    (sharded / "moetools.json").unlink()
    (sharded / "moetools").mkdir()
    (sharded / "moetools/undo-1.bin").write_text("x")
    with pytest.raises(CheckpointError, match="names no edit 1"):
        write(sharded, {}, tmp_path / "out")


def test_a_flipped_bit_of_the_provenance_is_found_wherever_it_is(tmp_path, sharded):
    new = {GATE.format(1): raw("F16", (2, 8), 32, 20), "model.new": raw("F32", (4,), 16, 21)}
    files = {"README.md": b"x", "new/extra.json": b"{}"}
    write(sharded, new, tmp_path / "one", files=files, attachments={"report.json": b"{}"})
    write(tmp_path / "one", {}, tmp_path / "two")
    path = tmp_path / "two" / PROVENANCE
    content = path.read_bytes()
    assert len(read_edits(tmp_path / "two", "model")) == 2
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"\Amodel/moetools\.json [^\n]+\Z"):
            read_edits(tmp_path / "two", "model")


def test_an_edit_that_was_changed_by_hand_is_refused(tmp_path, sharded):
    write(sharded, {}, tmp_path / "out", files={"new/extra.json": b"{}"})
    path = tmp_path / "out" / PROVENANCE
    document = json.loads(path.read_text())
    assert document["edits"][0]["new_folders"] == ["moetools", "new"]
    document["edits"][0]["new_folders"] = ["new"]
    path.write_text(json.dumps(document))
    for call in (
        lambda: moetools.revert(tmp_path / "out", out=tmp_path / "x"),
        lambda: write(tmp_path / "out", {}, tmp_path / "x"),
    ):
        with pytest.raises(
            CheckpointError, match=r"moetools\.json is damaged \(edit 1 is not what"
        ):
            call()
    assert sorted(os.listdir(tmp_path)) == ["out", "sharded"]
