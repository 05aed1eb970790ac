import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from moetools import cli, tensor_diff
from moetools.architectures import REFUSED
from moetools.checkpoint import Checkpoint
from moetools.comparing import CompareOptions, diff_checkpoints
from moetools.errors import CheckpointError
from moetools.tensor_diff import diff_tensors, group, pattern

ROUTERS = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def copied(tmp_path, tiny_checkpoint):
    """A real copy of the tiny checkpoint, its tensors changed by a function."""

    def make(name, change=lambda tensors: None):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def compared(a, b):
    return diff_tensors(Checkpoint.open(str(a)), Checkpoint.open(str(b)))


def moetools(capsys, *arguments):
    code = cli.run(["diff", *map(str, arguments), "--quiet"])
    return code, *capsys.readouterr()


def test_one_changed_element_is_found(tiny_checkpoint, copied):
    def change(tensors):
        tensors[EXPERT][2, 5] += 0.5

    found = compared(tiny_checkpoint, copied("b", change))
    (each,) = found.differences
    assert (each.key, each.kind, each.num_changed_elements) == (EXPERT, "changed", 1)
    assert each.largest == pytest.approx(0.5)
    norm = float(load_file(tiny_checkpoint / "model.safetensors")[EXPERT].norm())
    assert each.change == pytest.approx(0.5 / norm, rel=1e-6)
    assert found.num_identical == len(Checkpoint.open(str(tiny_checkpoint)).tensors) - 1
    assert found.files == ()


def test_nothing_is_read_of_one_file_under_two_names(tiny_checkpoint, tmp_path, monkeypatch):
    linked = tmp_path / "linked"
    shutil.copytree(tiny_checkpoint, linked, copy_function=os.link)
    monkeypatch.setattr(tensor_diff._Reader, "_fill", lambda *_: pytest.fail("read a file"))
    assert not compared(tiny_checkpoint, linked).differs


def test_bytes_of_a_dtype_that_torch_does_not_have(tmp_path):
    def write(name, last):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "olmoe"}')
        header = json.dumps(
            {
                "expert.blocks": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]},
                "expert.new": {"dtype": "Q3", "shape": [3], "data_offsets": [8, 11]},
            }
        ).encode()
        content = bytes([*range(8), 1, 2, last])
        (folder / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + content
        )
        return folder

    found = compared(write("a", 3), write("b", 9))
    assert found.num_identical == 1
    (each,) = found.differences
    assert (each.key, each.num_changed_bytes) == ("expert.new", 1)
    assert each.num_changed_elements is each.change is None


def test_tensors_without_elements_of_another_dtype(capsys, tmp_path, tiny_checkpoint, copied):
    def empty(dtype):
        return lambda tensors: tensors.update(empty=torch.zeros(0, 3, dtype=dtype))

    a, b = copied("a", empty(torch.float32)), copied("b", empty(torch.bfloat16))
    (each,) = compared(a, b).differences
    assert (each.key, each.num_changed_elements, each.changed_elements) == ("empty", 0, None)
    assert each.changed_bytes is None
    code, shown, _ = moetools(capsys, a, b)
    assert (code, "empty" in shown) == (0, True)
    code, shown, _ = moetools(capsys, a, b, "--json")
    (each,) = json.loads(shown)["tensors"]["differences"]
    assert (each["num_changed_elements"], each["changed_elements"]) == (0, None)


def test_small_files(tiny_checkpoint, copied):
    other = copied("b")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    (other / "moetools.json").write_text("{}")
    (other / ".moetools.json").write_text('{"kind": "checkpoint", "complete": true}')
    (other / "tokenizer.json").unlink()
    found = compared(tiny_checkpoint, other)
    assert not found.differs
    assert {each.name: each.kind for each in found.files} == {
        "config.json": "changed",
        "moetools.json": "added",
        "tokenizer.json": "removed",
    }


def test_a_file_that_shrinks_while_it_is_read(tiny_checkpoint, copied):
    other = copied("b")
    opened = Checkpoint.open(str(other))
    with (other / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        diff_tensors(Checkpoint.open(str(tiny_checkpoint)), opened)


def test_patterns():
    keys = [f"model.layers.{layer}.experts.{e}.w1" for layer in (0, 1, 2, 5) for e in (3, 4)]
    assert pattern(keys) == "model.layers.{0-2,5}.experts.{3-4}.w1"
    assert pattern(keys[:1]) == keys[0]
    assert pattern([f"h.{n}.w" for n in range(0, 20, 2)]) == "h.{0,2,4,...,18}.w"
    assert pattern([f"experts.expert_{n}.wi" for n in (0, 1)]) == "experts.expert_{0-1}.wi"
    assert pattern(["fc1.weight"]) == "fc1.weight"


def test_groups_are_of_one_kind(tiny_checkpoint, copied):
    def change(tensors):
        for key in ROUTERS:
            tensors[key] = tensors[key] * 2
        tensors["model.layers.0.mlp.experts.0.up_proj.weight"] *= 2
        tensors[EXPERT] = tensors[EXPERT].bfloat16()
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]

    groups = group(compared(tiny_checkpoint, copied("b", change)).differences)
    assert [(each.pattern, len(each.members)) for each in groups] == [
        ("model.layers.0.mlp.experts.0.up_proj.weight", 1),
        ("model.layers.{0-1}.mlp.gate.weight", 2),
        ("model.layers.1.mlp.experts.2.up_proj.weight", 1),
        (EXPERT, 1),
    ]
    assert [each.change for each in groups[1].members] == [pytest.approx(1)] * 2


def test_the_command_shows_and_lists_tensors(capsys, tiny_checkpoint, copied):
    def change(tensors):
        for key in ROUTERS:
            tensors[key][1] *= 1.5
        tensors["more.weight"] = torch.zeros(2, 3)

    b = copied("b", change)
    code, shown, _ = moetools(capsys, tiny_checkpoint, b, "--exit-code")
    assert code == 3
    assert max(map(len, shown.splitlines()[2:])) <= 80
    words = " ".join(shown.split())
    same = len(Checkpoint.open(str(tiny_checkpoint)).tensors) - 2
    assert f"2 changed, 1 added; {same} tensors are byte-identical" in words
    assert "changed model.layers.{0-1}.mlp.gate.weight 2 tensors, mean change" in words
    assert "64 of 512 elements differ" in words
    assert "added more.weight F32 [2, 3]" in words
    listed = " ".join(moetools(capsys, tiny_checkpoint, b, "--all")[1].split())
    assert all(f"changed {key} change" in listed for key in ROUTERS)

    document = json.loads(moetools(capsys, tiny_checkpoint, b, "--json")[1])
    assert document["differs"] is True
    differences = {each["key"]: each for each in document["tensors"]["differences"]}
    assert sorted(differences) == sorted([*ROUTERS, "more.weight"])
    assert differences["more.weight"]["a"] is None
    assert differences[ROUTERS[0]]["num_changed_elements"] == 32
    moved = {
        record["expert"]: record["value"]
        for record in document["records"]
        if (record["metric"], record["scope"], record.get("layer")) == ("row_change", "expert", 0)
    }
    assert moved == {number: pytest.approx(0.5 if number == 1 else 0) for number in range(8)}


def test_nan_is_no_difference(capsys, copied):
    def change(tensors):
        tensors[ROUTERS[0]][0, 0] = float("nan")

    code, shown, _ = moetools(capsys, copied("a", change), copied("b", change), "--exit-code")
    assert code == 0
    assert "No difference: every router tensor is the same." in shown
    code, shown, _ = moetools(capsys, copied("c"), copied("d", change), "--exit-code")
    assert code == 3
    assert "1 of 256 elements differ, 1 not finite" in " ".join(shown.split())


def test_only_the_routers(capsys, tiny_checkpoint, copied):
    def change(tensors):
        tensors[EXPERT][0] = 0

    b = copied("b", change)
    code, shown, _ = moetools(capsys, tiny_checkpoint, b, "--routers-only", "--exit-code")
    assert code == 0
    assert "Tensors on disk" not in shown
    assert moetools(capsys, tiny_checkpoint, b, "--exit-code")[0] == 3
    code, _, err = moetools(capsys, tiny_checkpoint, b, "--routers-only", "--all")
    assert (code, err.count("\n")) == (2, 1)


def test_routers_that_do_not_correspond(capsys, tiny_checkpoint, tmp_path):
    save_tiny("olmoe", tmp_path / "other", num_hidden_layers=3, vocab_size=258)
    code, shown, _ = moetools(capsys, tiny_checkpoint, tmp_path / "other", "--exit-code")
    assert code == 3
    words = " ".join(shown.split())
    assert "Routers on disk Not compared. Only" in words
    assert "has router 02" in words
    assert "added model.layers.2.mlp.gate.weight" in words
    found = diff_checkpoints(str(tiny_checkpoint), str(tmp_path / "other"))
    assert found.table.empty
    assert found.without_routers is not None
    for option in (["--match-experts"], ["--routers-only"], ["--data", "demo"]):
        assert moetools(capsys, tiny_checkpoint, tmp_path / "other", *option)[0] == 2


def test_a_family_that_cannot_be_recorded(tiny_checkpoint, copied):
    folders = [copied(name) for name in ("a", "b")]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "diffusion_gemma"}))
    found = diff_checkpoints(*map(str, folders), CompareOptions())
    assert found.tensors is not None
    assert not found.differs
    assert REFUSED["diffusion_gemma"] in (found.without_routers or "")
