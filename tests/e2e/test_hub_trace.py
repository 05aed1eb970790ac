"""A model and a data set of the hub: traced over the network, then again offline from the cache."""

import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from moetools.trace_store import TraceStore


@pytest.fixture
def hub(tmp_path, tiny_checkpoint, parallel_rows):
    model = tmp_path / "hub" / "models" / "org" / "tiny"
    shutil.copytree(tiny_checkpoint, model)
    data = tmp_path / "hub" / "datasets" / "org" / "texts"
    (data / "data").mkdir(parents=True)
    table = pa.Table.from_pylist(parallel_rows)
    pq.write_table(table, data / "data" / "test-00000-of-00001.parquet")
    with HubServer(tmp_path / "hub") as server:
        yield server


def trace(hub, tmp_path, out, *options, data="org/texts@test", **environment):
    return subprocess.run(
        [
            sys.executable, "-m", "moetools.cli", "trace", "org/tiny", "--data", data,
            "--group-column", "lang", "--id-column", "id", "--out", out, "--json", "--quiet",
            *options,
        ],
        env=hub.environment(tmp_path / "cache", **environment),
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


@pytest.mark.slow
def test_online_then_offline(hub, tmp_path):
    online = trace(hub, tmp_path, "online")
    assert online.returncode == 0, online.stderr
    document = json.loads(online.stdout)
    assert document["num_tokens"] == 1652
    assert document["stopped"] == []
    assert len(TraceStore(tmp_path / "online").manifest.revision) == 40

    num_requests = len(hub.requests)
    offline = trace(hub, tmp_path, "offline", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert len(hub.requests) == num_requests, "nothing was asked for"
    for part in ("tokens/part-00000.parquet", "sequences/part-00000.parquet"):
        assert pq.read_table(tmp_path / "online" / part).equals(
            pq.read_table(tmp_path / "offline" / part)
        )
    never = trace(hub, tmp_path, "never", data="org/other", HF_HUB_OFFLINE="1")
    assert never.returncode == 2
    assert "offline (HF_HUB_OFFLINE), and it was never read" in never.stderr


@pytest.mark.slow
def test_hub_data_that_is_not_there(hub, tmp_path):
    missing = trace(hub, tmp_path, "out", data="org/absent")
    assert missing.returncode == 2
    assert missing.stderr.startswith("Error: --data org/absent: ")
    assert missing.stderr.count("\n") == 1
    split = trace(hub, tmp_path, "out", data="org/texts@train")
    assert split.returncode == 2, split.stderr
    assert "train" in split.stderr
    assert not (tmp_path / "out").exists()
