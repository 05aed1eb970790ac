"""`inspect` and `Checkpoint` against a loopback hub, then offline from its cache."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from hub_server import HubServer
from safetensors.torch import save_file
from tiny_models import save_tiny

from moetools.checkpoint import Checkpoint
from moetools.inspection import inspect_checkpoint

pytestmark = pytest.mark.slow

KEY = "model.layers.0.mlp.gate.weight"
ONLINE = {"HF_HUB_OFFLINE": "0"}
OFFLINE = {"HF_HUB_OFFLINE": "1"}

READ_ONE_TENSOR = f"""
import json
from moetools.checkpoint import Checkpoint
opened = Checkpoint.open("org/sharded")
print(json.dumps({{
    "path": opened.path and str(opened.path),
    "sum": opened.tensor({KEY!r}).double().sum().item(),
    "sha256": opened.fingerprint([{KEY!r}])[{KEY!r}],
}}))
"""
DOWNLOAD = """
from moetools.checkpoint import Checkpoint
opened = Checkpoint.open("org/sharded")
print(sorted(path.name for path in opened.local_path().iterdir()))
assert opened.path == opened.local_path()
"""
BAD_MODELS = """
import sys
from moetools import cli
for model in sys.argv[1:]:
    print(model, cli.run(["inspect", model]), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    wide = {"vocab_size": 40_000}
    save_tiny("olmoe", root / "models/org/single", **wide)
    model = save_tiny("olmoe", root / "unused", **wide)
    sharded = root / "models/org/sharded"
    model.save_pretrained(sharded, max_shard_size="3MB")
    (sharded / "tokenizer.json").write_text("{}")
    (sharded / "pytorch_model.bin").write_bytes(b"pickle")
    (sharded / "original").mkdir()
    save_file({"a": torch.ones(1)}, sharded / "original" / "model.safetensors")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    gated = root / "models/org/gated"
    gated.mkdir()
    (gated / ".gated").touch()
    pickled = root / "models/org/pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "olmoe"}')
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    (root / "models/org/empty").mkdir()
    with HubServer(root) as server:
        yield server


def run(hub, cache, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=hub.environment(cache, **environment),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cache.parent,
    )


def inspect(hub, cache, model, **environment):
    done = run(hub, cache, "-m", "moetools.cli", "inspect", model, "--json", **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["single", "sharded"])
def test_inspect_reads_headers_only_and_then_works_offline(hub, tmp_path, name):
    before = hub.bytes_sent(".safetensors")
    online = inspect(hub, tmp_path / "cache", f"org/{name}", **ONLINE)
    sent = hub.bytes_sent(".safetensors") - before
    folder = hub.root / "models/org" / name
    shards = list(folder.glob("*.safetensors"))
    assert online["num_bytes"] == sum(shard.stat().st_size for shard in shards)
    assert 0 < sent <= 65_536 * len(shards) < online["num_bytes"] / 10
    assert online["revision"] == hub.commit(folder, "main")

    asked = len(hub.requests)
    offline = inspect(hub, tmp_path / "cache", f"org/{name}", **OFFLINE)
    assert len(hub.requests) == asked
    assert offline["parameters"] == online["parameters"]
    assert offline["routers"] == online["routers"]

    local = inspect_checkpoint(Checkpoint.open(str(folder)))
    assert [asdict(router) for router in local.routers] == [
        {**router, "keys": tuple(router["keys"])} for router in online["routers"]
    ]
    assert asdict(local.parameters) == online["parameters"]


def test_tensors_are_the_same_by_range_and_downloaded(hub, tmp_path):
    cache = tmp_path / "cache"
    before = hub.bytes_sent(".safetensors")
    remote = run(hub, cache, "-c", READ_ONE_TENSOR)
    assert remote.returncode == 0, remote.stderr
    shards = list((hub.root / "models/org/sharded").glob("*.safetensors"))
    assert hub.bytes_sent(".safetensors") - before < 65_536 * len(shards) + 10_000

    downloaded = run(hub, cache, "-c", DOWNLOAD)
    assert downloaded.returncode == 0, downloaded.stderr
    names = downloaded.stdout
    assert "tokenizer.json" in names
    assert all(shard.name in names for shard in shards)
    assert "original" not in names
    assert ".bin" not in names

    offline = run(hub, cache, "-c", READ_ONE_TENSOR, **OFFLINE)
    assert offline.returncode == 0, offline.stderr
    was, now = json.loads(remote.stdout), json.loads(offline.stdout)
    assert was.pop("path") is None
    assert now.pop("path") is not None
    assert was == now


def test_what_the_hub_refuses_is_one_line(hub, tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "sharded-v2").mkdir()
    models = {
        "org/absent": "no such folder here and no such model on the hub",
        "org/sharded-v3": "Did you mean org/sharded-v2?",
        "org/single@v9": "org/single@v9: the repository has no such revision",
        "org/gated": "org/gated is gated: accept its terms",
        "org/pickled": "org/pickled holds pickled weights only (pytorch_model.bin)",
        "org/empty": "has no config.json",
    }
    done = run(hub, tmp_path / "cache", "-c", BAD_MODELS, *models)
    lines = done.stderr.splitlines()
    assert len(lines) == 2 * len(models), done.stderr
    for (model, expected), message, code in zip(
        models.items(), lines[::2], lines[1::2], strict=True
    ):
        assert message.startswith("Error: ")
        assert expected in message
        assert code == f"{model} 2"


def test_offline_and_not_cached(hub, tmp_path):
    done = run(hub, tmp_path / "cache", "-m", "moetools.cli", "inspect", "org/single", **OFFLINE)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set. Run `hf download org/single`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hub_that_does_not_answer(tmp_path):
    server = HubServer(tmp_path)
    nowhere = server.environment(tmp_path / "cache")
    server._server.server_close()
    done = subprocess.run(
        [sys.executable, "-m", "moetools.cli", "inspect", "org/single"],
        env=nowhere, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be reached. Run `hf download org/single`" in done.stderr
    assert done.stderr.count("\n") == 1
