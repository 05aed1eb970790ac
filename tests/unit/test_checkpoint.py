import hashlib
import json
import re
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from moetools import checkpoint as checkpoint_module
from moetools.checkpoint import Checkpoint
from moetools.errors import CheckpointError

GATE = "model.layers.{}.mlp.gate.weight"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2}


def layer(number):
    generator = torch.Generator().manual_seed(number)
    return {
        GATE.format(number): torch.randn(4, 8, generator=generator).bfloat16(),
        f"model.layers.{number}.mlp.experts.0.up_proj.weight": torch.randn(3, 8),
        f"model.layers.{number}.steps": torch.arange(5),
    }


@pytest.fixture
def single(tmp_path):
    """A checkpoint of one weight file."""
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(layer(0) | layer(1), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two weight files and an index."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for number, shard in enumerate(SHARDS):
        save_file(layer(number), folder / shard, {"format": "pt"})
    write_index(folder, {key: SHARDS[n] for n in (0, 1) for key in layer(n)})
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder):
    return json.loads((folder / INDEX).read_text())["weight_map"]


def edit_header(path, change):
    """Rewrite the JSON header of a safetensors file, leaving the tensors' bytes alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def refused(model, *parts, **options):
    """Opening fails with one line that contains every part."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(model), **options)
    message = str(caught.value)
    for part in parts:
        assert part in message
    assert "\n" not in message


def test_tensors_equal_those_of_the_library(single, sharded):
    for folder in (single, sharded):
        opened = Checkpoint.open(str(folder))
        files = sorted(folder.glob("*.safetensors"))
        expected = {key: value for file in files for key, value in load_file(file).items()}
        assert set(opened.tensors) == set(expected)
        for key, value in expected.items():
            assert opened.tensors[key].shape == tuple(value.shape)
            assert torch.equal(opened.tensor(key), value)


def test_byte_ranges_are_those_of_the_file(sharded):
    opened = Checkpoint.open(str(sharded))
    info = opened.tensors[GATE.format(1)]
    assert (info.dtype, info.shape, info.shard) == ("BF16", (4, 8), SHARDS[1])
    raw = (sharded / info.shard).read_bytes()[info.begin : info.end]
    expected = opened.tensor(GATE.format(1))
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(4, 8), expected)
    assert info.num_elements * 2 == info.num_bytes == len(raw)


def test_opening_reads_headers_only(single, monkeypatch):
    expected = {"steps": torch.arange(60_000), **layer(0)}
    save_file(expected, single / "model.safetensors")
    total = 0
    read = checkpoint_module._read_file

    def counting(path, begin, end):
        nonlocal total
        data, size = read(path, begin, end)
        total += len(data)
        return data, size

    monkeypatch.setattr(checkpoint_module, "_read_file", counting)
    opened = Checkpoint.open(str(single))
    assert opened.num_bytes > 480_000
    assert total <= 65_536


def test_long_headers_are_read_whole(single):
    many = {f"model.layers.0.mlp.experts.{n}.up_proj.weight": torch.zeros(1) for n in range(1500)}
    save_file(many, single / "model.safetensors")
    assert len(Checkpoint.open(str(single)).tensors) == 1500


def test_fingerprint_is_the_hash_of_the_raw_bytes(single, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "HASH_CHUNK", 7)
    opened = Checkpoint.open(str(single))
    key = GATE.format(0)
    expected = hashlib.sha256(layer(0)[key].view(torch.uint8).numpy().tobytes()).hexdigest()
    assert opened.fingerprint([key]) == {key: expected}
    assert opened.fingerprint([GATE.format(1)])[GATE.format(1)] != expected


def test_attributes_of_a_local_checkpoint(sharded):
    opened = Checkpoint.open(f"{sharded}/")
    assert opened.path == opened.local_path() == sharded
    assert opened.revision is None
    assert opened.name == f"{sharded}/"
    assert opened.config_dict == CONFIG
    assert opened.num_bytes == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))
    assert opened.config().num_experts == 4
    assert opened.has_tokenizer() is False
    (sharded / "tokenizer.json").write_text("{}")
    assert opened.has_tokenizer() is True


def test_the_index_may_name_the_single_file(single):
    write_index(single, dict.fromkeys(Checkpoint.open(str(single)).tensors, "model.safetensors"))
    assert len(Checkpoint.open(str(single)).tensors) == 6


def test_tensors_that_the_index_does_not_name_are_reported(sharded, caplog):
    weight_map = read_index(sharded)
    del weight_map[GATE.format(0)]
    write_index(sharded, weight_map)
    assert GATE.format(0) in Checkpoint.open(str(sharded)).tensors
    assert f"does not name {GATE.format(0)}" in caplog.text


def test_demo_means_the_embedded_checkpoint(single, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "DEMO", single)
    assert Checkpoint.open("demo").path == single
    monkeypatch.setattr(checkpoint_module, "DEMO", single / "absent")
    refused("demo", "absent is missing", "install moetools again")


def test_path_typos(single):
    refused(single.parent / "singel", "no such folder", f"Did you mean {single}?")
    refused("olmoe", "no such folder", "org/name")
    refused(single / "config.json", "is a file", "Pass the folder")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("{", ["config.json is not valid JSON"]),
        ("[]", ["config.json must hold a JSON object"]),
        ("{}", ["config.json names no model_type"]),
        ('{"model_type": "olmo"}', []),
        ('{"model_type": "mixtrall"}', ["no model_type 'mixtrall'", "Did you mean 'mixtral'?"]),
        ('{"model_type": "zzzzzz"}', ["knows no model_type 'zzzzzz'."]),
        (
            '{"model_type": "zzzzzz", "auto_map": {"AutoConfig": "code.C"}}',
            ["'zzzzzz' is not part of transformers", "--trust-remote-code"],
        ),
    ],
)
def test_configs(single, content, parts):
    (single / "config.json").write_text(content)
    if parts:
        refused(single, *parts)
    else:
        Checkpoint.open(str(single))


def test_remote_code_runs_only_with_the_flag(single, monkeypatch):
    modules = str(single.parent / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    marker = single / "ran"
    (single / "code.py").write_text(
        "from transformers import PreTrainedConfig\n"
        f"open({str(marker)!r}, 'w').close()\n"
        "class C(PreTrainedConfig):\n    model_type = 'zzzzzz'\n"
    )
    config = {"model_type": "zzzzzz", "auto_map": {"AutoConfig": "code.C"}}
    (single / "config.json").write_text(json.dumps(config))
    refused(single, "--trust-remote-code")
    opened = Checkpoint.open(str(single), trust_remote_code=True)
    assert not marker.exists()
    assert type(opened.config()).__name__ == "C"
    assert marker.exists()


def test_code_beside_a_known_family_is_not_run(single):
    config = {**CONFIG, "auto_map": {"AutoConfig": "code.C"}}
    (single / "config.json").write_text(json.dumps(config))
    assert type(Checkpoint.open(str(single)).config()).__name__ == "OlmoeConfig"


def test_a_config_that_transformers_refuses_is_one_line(single):
    config = {**CONFIG, "num_hidden_layers": "many"}
    (single / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(str(single))
    with pytest.raises(CheckpointError, match="transformers does not accept it") as caught:
        opened.config()
    assert "\n" not in str(caught.value)


def test_dense_models(single):
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, single / "model.safetensors")
    refused(single, "is a dense model (model_type 'olmoe')", "no routing")


def test_folders_that_are_no_checkpoint(tmp_path, single):
    refused(tmp_path, "config.json and weights (*.safetensors) missing")
    (single / "config.json").unlink()
    refused(single, "config.json missing")


@pytest.mark.parametrize(
    ("present", "parts"),
    [
        ([], ["model.safetensors or model.safetensors.index.json is missing."]),
        (["model.gguf"], ["model.gguf cannot be read"]),
        (["pytorch_model.bin"], ["pickled weights only (pytorch_model.bin)", "save_pretrained"]),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"], ["pickled"]),
        (["training_args.bin"], ["is missing."]),
        ([SHARDS[0]], [f"holds {SHARDS[0]} but no {INDEX}"]),
    ],
)
def test_weights_that_are_missing_or_pickled(single, present, parts):
    (single / "model.safetensors").unlink()
    for name in present:
        (single / name).write_bytes(b"x")
    refused(single, *parts)


def test_an_index_that_names_absent_files(sharded):
    (sharded / SHARDS[1]).unlink()
    refused(sharded, f"{INDEX} names {SHARDS[1]}, which is not there")


def test_an_index_without_a_weight_map(sharded):
    (sharded / INDEX).write_text("{}")
    refused(sharded, "has no weight_map")


def test_an_index_that_names_keys_which_no_file_has(sharded):
    write_index(sharded, {**read_index(sharded), GATE.format(7): SHARDS[1]})
    refused(sharded, f"names {GATE.format(7)}, not found in {SHARDS[1]}")


def test_an_index_that_names_another_file_for_a_key(sharded):
    write_index(sharded, {**read_index(sharded), GATE.format(0): SHARDS[1]})
    refused(sharded, f"{GATE.format(0)} found in {SHARDS[0]}, the index says {SHARDS[1]}")


def test_a_key_found_twice(sharded):
    save_file(layer(1) | {GATE.format(0): torch.ones(4, 8)}, sharded / SHARDS[1])
    refused(sharded, f"{GATE.format(0)} found twice")


def test_two_sets_of_weights(sharded):
    save_file(layer(0), sharded / "model.safetensors")
    refused(sharded, "holds two sets of weights")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_files(single, kept):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(single, "single/model.safetensors is truncated", "Download it again")


def test_every_truncation_and_extension_is_noticed(single):
    path = single / "model.safetensors"
    content = path.read_bytes()
    for kept in range(0, len(content), 37):
        path.write_bytes(content[:kept])
        refused(single, "model.safetensors is truncated")
    path.write_bytes(content + b"\0")
    refused(single, "model.safetensors is damaged")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>not found</html>", "is not a safetensors file"),
        (b"\x05\0\0\0\0\0\0\0{1234", "is damaged: its header cannot be read"),
        (b"\xff" * 64, "is not a safetensors file"),
    ],
)
def test_files_of_another_kind(single, content, part):
    (single / "model.safetensors").write_bytes(content)
    refused(single, part)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[GATE.format(0)].update(shape=[4, 9]),
        lambda header: header[GATE.format(0)].update(dtype="F64"),
        lambda header: header[GATE.format(0)].update(data_offsets=[0, 10**9]),
        lambda header: header[GATE.format(0)].update(data_offsets=[1]),
        lambda header: header[GATE.format(0)].pop("shape"),
        lambda header: header.update({GATE.format(0): 3}),
        lambda header: header.pop(GATE.format(0)),
    ],
)
def test_headers_that_contradict_themselves(single, change):
    edit_header(single / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=re.escape("model.safetensors is ")):
        Checkpoint.open(str(single))
