"""`moetools diff` of a hub model that is not downloaded, against a loopback hub."""

import json
import subprocess
import sys

import pytest
from conftest import save_byte_tokenizer
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

pytestmark = pytest.mark.slow

KEY = "model.layers.1.mlp.gate.weight"


def diff(hub, tmp_path, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "moetools.cli", "diff", *map(str, arguments), "--json"],
        env=hub.environment(tmp_path / "cache", **environment),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )


def test_tensors_are_read_by_ranges_and_nothing_is_downloaded(tmp_path):
    hub_folder, local = tmp_path / "models/org/sharded", tmp_path / "local"
    model = save_tiny("olmoe", tmp_path / "single", vocab_size=40_000)
    for folder in (hub_folder, local):
        model.save_pretrained(folder, max_shard_size="3MB")
        save_byte_tokenizer(folder)
    shards = sorted(hub_folder.glob("*.safetensors"))
    assert len(shards) > 1
    changed = next(path for path in local.glob("*.safetensors") if KEY in load_file(path))
    tensors = load_file(changed)
    tensors[KEY][3] += 1
    save_file(tensors, changed, metadata={"format": "pt"})
    with HubServer(tmp_path) as hub:
        done = diff(hub, tmp_path, "org/sharded", local, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        assert [each["key"] for each in document["tensors"]["differences"]] == [KEY]
        assert document["tensors"]["differences"][0]["num_changed_elements"] == 32
        assert document["tensors"]["files"] == {}
        total = sum(path.stat().st_size for path in shards)
        assert total <= hub.bytes_sent(".safetensors") < 1.5 * total + 1_000_000
        assert not list((tmp_path / "cache").rglob("*.safetensors"))

        offline = diff(hub, tmp_path, "org/sharded", local, HF_HUB_OFFLINE="1")
        assert offline.returncode == 2
        assert offline.stderr.count("\n") == 1
