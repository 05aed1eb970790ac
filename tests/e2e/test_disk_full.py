"""A full disk ends a trace with one line; after making room it is resumed and nothing is lost."""

import os
import subprocess
import sys

import pytest
from conftest import write_rows

from moetools import cli
from moetools.trace_store import TraceStore

SIZE = 320 * 1024


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 320 kB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "moetools-test", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not allow to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk, capsys, tmp_path, tiny_checkpoint, parallel_rows):
    rows = [{**row, "text": f"{n} {row['text']}"} for n in range(4) for row in parallel_rows]
    command = [
        "trace", str(tiny_checkpoint), "--data", str(write_rows(tmp_path / "texts.jsonl", rows)),
        "--part-tokens", "500", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(SIZE * 2 // 3))
    trace = small_disk / "trace"
    assert cli.run([*command, "--out", str(trace)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("Error: The disk is full")
    assert "Continue with the same command and --resume" in err
    recorded = TraceStore(trace, partial=True).num_tokens
    assert recorded > 0
    assert not list(trace.rglob("*.part"))

    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert cli.run([*command, "--out", str(trace), "--resume"]) == 0
    assert cli.run([*command, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = TraceStore(trace), TraceStore(tmp_path / "whole")
    assert resumed.manifest == whole.manifest
    for router in whole.routers:
        for one, other in zip(
            resumed.selections(router.name), whole.selections(router.name), strict=True
        ):
            assert (one == other).all()
