"""Edits undone and made again: `revert`, `apply`, and everything that they refuse."""

import json
import os
import shutil

import pytest
from raw_checkpoints import CONFIG, raw, tree, write_raw
from safetensors import safe_open

import moetools
from moetools import cli, writing
from moetools.checkpoint import Checkpoint
from moetools.edit_plan import EditPlan, EditRecord, TensorChange
from moetools.errors import EditError, MoEToolsError, OutputError
from moetools.patches import Patch, write_patch
from moetools.writing import WriteOptions, write_checkpoint

GATE = "model.layers.0.mlp.gate.weight"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
PACKED = "model.layers.1.mlp.experts.packed"
NEW = "model.layers.0.mlp.gate.bias"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {
    FIRST: {GATE: raw("BF16", (4, 8), 64, 1), EXPERTS: raw("F32", (4, 6, 8), 768, 2)},
    SECOND: {"lm_head.weight": raw("F32", (3,), 12, 3), PACKED: raw("Q4_K_X", (3, 5), 11, 4)},
}
EDITS = {
    "same shape": {GATE: raw("BF16", (4, 8), 64, 11), PACKED: raw("Q4_K_X", (3, 5), 11, 12)},
    "other shape": {EXPERTS: raw("F32", (2, 6, 8), 384, 13), GATE: raw("F16", (2, 8), 32, 14)},
    "other packing": {PACKED: raw("Q3_K_X", (3, 5), 9, 15)},
    "new tensor": {NEW: raw("F32", (4,), 16, 16)},
    "all at once": {
        NEW: raw("F32", (4,), 16, 17),
        GATE: raw("F8_E4M3", (3, 3), 9, 18),
        PACKED: raw("Q4_K_X", (3, 5), 11, 19),
    },
    "nothing": {},
}
FILES = {"config.json": json.dumps({**CONFIG, "num_experts": 3}).encode(), "new/extra.json": b"[]"}
ATTACHED = {"report.json": b"{}", "deep/state.npz": b"123"}


@pytest.fixture(params=["sharded", "single"])
def folder(request, tmp_path):
    both = SHARDS[FIRST] | SHARDS[SECOND]
    shards = SHARDS if request.param == "sharded" else {"model.safetensors": both}
    path = write_raw(tmp_path / "in", shards)
    (path / "code").mkdir()
    (path / "code" / "model.py").write_text("pass")
    (path / "empty").mkdir()
    return path


@pytest.fixture
def sharded(tmp_path):
    return write_raw(tmp_path / "in", SHARDS)


def plan(folder, changes, *, method="test", files=None, attachments=None):
    record = EditRecord(
        method=method, parameters={"a": (1, 0.1)}, model=str(folder), revision="abc", version="1"
    )
    return EditPlan(
        checkpoint=Checkpoint.open(str(folder)),
        changes={
            key: TensorChange(dtype=dtype, shape=shape, read=lambda content=content: content)
            for key, (dtype, shape, content) in changes.items()
        },
        files=files or {},
        attachments=attachments or {},
        record=record,
    )


@pytest.mark.parametrize("name", EDITS)
def test_revert_gives_back_the_input(tmp_path, folder, name):
    before = tree(folder)
    edit = plan(folder, EDITS[name], files=FILES, attachments=ATTACHED)
    written = write_checkpoint(edit, tmp_path / "out")
    assert tree(folder) == before
    assert written.undo == tmp_path / "out/moetools/undo-1.bin"
    reverted = moetools.revert(tmp_path / "out", out=tmp_path / "back")
    assert tree(tmp_path / "back") == before
    assert set(reverted.changed) == set(EDITS[name])


@pytest.mark.parametrize("name", EDITS)
def test_apply_equals_the_edit(tmp_path, folder, name):
    edit = plan(folder, EDITS[name], files=FILES, attachments=ATTACHED)
    write_checkpoint(edit, tmp_path / "out", options=WriteOptions(patch=tmp_path / "with"))
    write_patch(edit, tmp_path / "alone")
    assert (tmp_path / "with").read_bytes() == (tmp_path / "alone").read_bytes()
    written = moetools.apply(folder, tmp_path / "with", out=tmp_path / "applied")
    assert tree(tmp_path / "applied") == tree(tmp_path / "out")
    assert set(written.changed) == set(EDITS[name])


def test_edits_add_up_and_are_undone_one_by_one(tmp_path, folder):
    stages = [folder]
    for number, name in enumerate(("other shape", "new tensor", "same shape")):
        out = tmp_path / f"edit-{number}"
        changes = (
            EDITS[name]
            if number < 2
            else {GATE: raw("F16", (2, 8), 32, 30), NEW: raw("F32", (4,), 16, 31)}
        )
        patch = WriteOptions(patch=tmp_path / f"patch-{number}")
        edit = plan(stages[-1], changes, method=name, attachments=ATTACHED)
        assert write_checkpoint(edit, out, options=patch).number == number + 1
        applied = moetools.apply(
            stages[-1], patch.patch, out=tmp_path / "applied", options=WriteOptions(overwrite=True)
        )
        assert tree(applied.path) == tree(out)
        stages.append(out)
    edits = json.loads((stages[-1] / "moetools.json").read_text())["edits"]
    assert [edit["method"] for edit in edits] == ["other shape", "new tensor", "same shape"]
    for number, stage in reversed(list(enumerate(stages[:-1]))):
        back = tmp_path / f"back-{number}"
        moetools.revert(stages[number + 1], out=back)
        assert tree(back) == tree(stage)


def test_what_was_not_carried_is_not_given_back_but_listed(tmp_path, sharded):
    (sharded / "pytorch_model.bin").write_text("old")
    write_checkpoint(plan(sharded, EDITS["new tensor"]), tmp_path / "out")
    written = moetools.revert(tmp_path / "out", out=tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sharded, without=("pytorch_model.bin",))
    assert list(written.left_out) == ["pytorch_model.bin"]


def test_carried_weights_are_given_back(tmp_path, sharded):
    (sharded / "pytorch_model.bin").write_text("old")
    options = WriteOptions(carry_all=True, link=True)
    write_checkpoint(plan(sharded, EDITS["new tensor"]), tmp_path / "out", options=options)
    moetools.revert(tmp_path / "out", out=tmp_path / "back")
    assert tree(tmp_path / "back") == tree(sharded)


@pytest.mark.parametrize("name", EDITS)
def test_large_originals_are_kept_only_when_asked(tmp_path, folder, monkeypatch, name):
    monkeypatch.setattr(writing, "UNDO_LIMIT", -1)
    edit = plan(folder, EDITS[name], files=FILES, attachments=ATTACHED)
    written = write_checkpoint(edit, tmp_path / "out")
    assert written.undo is None
    assert any("were not kept" in note for note in written.notes)
    assert not (tmp_path / "out/moetools/undo-1.bin").exists()
    with pytest.raises(EditError, match=r"were not kept .* --base MODEL"):
        moetools.revert(tmp_path / "out", out=tmp_path / "back")
    moetools.revert(tmp_path / "out", out=tmp_path / "back", base=folder)
    assert tree(tmp_path / "back") == tree(folder)
    kept = write_checkpoint(edit, tmp_path / "kept", options=WriteOptions(keep_originals=True))
    assert kept.undo is not None


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))


def offset_of(path, content):
    return path.read_bytes().index(content)


@pytest.fixture
def edited(tmp_path, sharded):
    """Input, output of an edit, and its patch."""
    edit = plan(sharded, EDITS["all at once"], files=FILES, attachments=ATTACHED)
    out, patch = tmp_path / "out", tmp_path / "edit.patch"
    write_checkpoint(edit, out, options=WriteOptions(patch=patch))
    return sharded, out, patch


def refused(call, tmp_path, *parts):
    """One clear line, and nothing left behind."""
    before = set(os.listdir(tmp_path))
    with pytest.raises(MoEToolsError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert set(os.listdir(tmp_path)) == before


def test_reverts_that_are_refused(tmp_path, edited):
    folder, out, _ = edited

    def revert(model=out, **options):
        return lambda: moetools.revert(model, **{"out": tmp_path / "back", **options})

    refused(revert(folder), tmp_path, "has no edit to revert", "moetools.json")
    refused(revert(out=out / "back"), tmp_path, "lies inside the input")
    refused(revert(out=tmp_path), tmp_path, "is or contains the input")
    refused(revert(out=folder, base=folder, overwrite=True), tmp_path, "is or contains the input")
    undo = out / "moetools/undo-1.bin"
    content = undo.read_bytes()
    undo.write_bytes(content[:-5])
    refused(revert(), tmp_path, "undo-1.bin is damaged or cut off", "--base")
    for position in (offset_of(undo, SHARDS[FIRST][GATE][2]), offset_of(undo, b'"lm_head')):
        undo.write_bytes(content)
        flip(undo, position)
        refused(revert(), tmp_path, "undo-1.bin", "not what the edit replaced", "--base MODEL")
    undo.unlink()
    refused(revert(), tmp_path, "undo-1.bin, which holds the originals, is missing", "--base")
    wrong = write_raw(
        tmp_path / "wrong", {FIRST: {GATE: raw("BF16", (4, 8), 64, 77)}, SECOND: SHARDS[SECOND]}
    )
    refused(revert(base=wrong), tmp_path, "wrong: model.layers.0.mlp.gate.weight", "not the input")
    refused(revert(base=tmp_path / "none"), tmp_path, "none")
    moetools.revert(out, out=tmp_path / "back", base=folder)
    assert tree(tmp_path / "back") == tree(folder)
    refused(revert(base=folder), tmp_path, "--out")
    undo.write_bytes(content)
    flip(out / SECOND, offset_of(out / SECOND, EDITS["all at once"][PACKED][2]))
    refused(revert(out=tmp_path / "b"), tmp_path, PACKED, "changed after its last edit", "Restore")


@pytest.mark.parametrize("entry", [{}, {"tensors": 3}, {"tensors": {"a": {}}}])
def test_a_damaged_entry_is_refused(tmp_path, edited, entry):
    _, out, _ = edited
    (out / "moetools.json").write_text(json.dumps({"format": 1, "edits": [entry]}))
    call = lambda: moetools.revert(out, out=tmp_path / "back")  # noqa: E731
    refused(call, tmp_path, "moetools.json is damaged")


def test_patches_that_are_refused(tmp_path, edited):
    folder, out, patch = edited

    def apply(model=folder, path=patch, to=tmp_path / "applied", **options):
        return lambda: moetools.apply(model, path, out=to, options=WriteOptions(**options))

    refused(apply(path=tmp_path / "none"), tmp_path, "none: no such file")
    refused(apply(path=tmp_path), tmp_path, "no such file")
    refused(apply(path=folder / FIRST), tmp_path, "no patch", "--patch wrote")
    refused(apply(path=folder / "config.json"), tmp_path, "--patch wrote")
    refused(apply(to=folder), tmp_path, "is or contains the input")
    refused(apply(to=folder / "x"), tmp_path, "lies inside the input")
    refused(apply(to=out), tmp_path, "exists")
    refused(apply(model=out), tmp_path, "has the edit of", "already")
    inside = out / "edit.patch"
    shutil.copy(patch, inside)
    refused(apply(path=inside, to=out, overwrite=True), tmp_path, "contains the input")
    wrong = write_raw(
        tmp_path / "wrong",
        {
            **SHARDS,
            SECOND: {
                "lm_head.weight": SHARDS[SECOND]["lm_head.weight"],
                PACKED: raw("Q4_K_X", (3, 5), 11, 70),
            },
        },
    )
    refused(
        apply(model=wrong), tmp_path, "another checkpoint", PACKED, f"Apply it to {folder} at abc"
    )
    lacking = write_raw(tmp_path / "lacking", {FIRST: SHARDS[FIRST]}, index=True)
    refused(apply(model=lacking), tmp_path, "another checkpoint", PACKED, "is missing")
    other_config = tmp_path / "config"
    shutil.copytree(folder, other_config)
    (other_config / "config.json").write_text(json.dumps({**CONFIG, "x": 1}))
    refused(apply(model=other_config), tmp_path, "another checkpoint: config.json")


def test_a_damaged_patch_is_refused_wherever_it_is_damaged(tmp_path, edited):
    folder, _, patch = edited
    content = patch.read_bytes()
    for position in (*range(0, len(content), 37), len(content) - 1):
        patch.write_bytes(content)
        flip(patch, position)
        refused(lambda: moetools.apply(folder, patch, out=tmp_path / "x"), tmp_path, str(patch))
    patch.write_bytes(content[:-1])
    refused(lambda: moetools.apply(folder, patch, out=tmp_path / "x"), tmp_path, "truncated")
    patch.write_bytes(content[:20])
    refused(lambda: moetools.apply(folder, patch, out=tmp_path / "x"), tmp_path, str(patch))
    patch.write_bytes(b"")
    refused(lambda: moetools.apply(folder, patch, out=tmp_path / "x"), tmp_path, str(patch))


def test_a_patch_is_a_safetensors_file(tmp_path, sharded):
    write_patch(plan(sharded, {GATE: EDITS["same shape"][GATE]}), tmp_path / "p")
    with safe_open(tmp_path / "p", framework="np") as tensors:
        assert list(tensors.keys()) == [GATE]
        assert json.loads(tensors.metadata()["moetools"])["record"]["method"] == "test"
    with pytest.raises(OutputError, match="exists"):
        write_patch(plan(sharded, {}), tmp_path / "p")
    assert Patch(tmp_path / "p").record.parameters == {"a": [1, 0.1]}


def test_the_commands(tmp_path, edited, capsys):
    folder, out, patch = edited
    back, applied = tmp_path / "back", tmp_path / "applied"
    assert cli.run(["revert", str(out), "--out", str(back)]) == 0
    shown = capsys.readouterr().out
    assert "3 tensors restored" in shown
    assert tree(back) == tree(folder)
    assert cli.run(["apply", str(folder), str(patch), "--out", str(applied), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document["changed"]) == set(EDITS["all at once"])
    assert tree(applied) == tree(out)
    for arguments in (
        ["revert", str(folder), "--out", str(tmp_path / "x")],
        ["apply", str(out), str(patch), "--out", str(tmp_path / "x")],
        ["revert", str(out), "--out", str(back)],
    ):
        assert cli.run(arguments) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("Error: ")
        assert shown.err.count("\n") == 1
