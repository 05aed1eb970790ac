import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from moetools.errors import OutputError
from moetools.files import MARKER, atomic_file, check_output, output_folder, write_json


def contents(folder):
    return {p.name: p.read_text() for p in folder.iterdir() if p.name != MARKER}


def write(out, text="new", **options):
    with output_folder(out, kind="report", **options) as folder:
        (folder.path / "page").write_text(text)


def fail(out, **options):
    with output_folder(out, **options) as folder:
        (folder.path / "page").write_text("half")
        raise RuntimeError


def fail_to_write(path):
    with atomic_file(path) as part:
        part.write_text("half")
        raise RuntimeError


def test_an_atomic_file_is_whole_or_untouched(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError):
        fail_to_write(path)
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, float("nan"))
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_output_appears_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with output_folder(out, kind="report") as folder:
        (folder.path / "page").write_text("new")
        assert not out.exists()
    assert contents(out) == {"page": "new"}
    assert os.listdir(out.parent) == ["out"], "no lock and nothing temporary is left"


def test_a_failure_leaves_the_old_output(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    with pytest.raises(RuntimeError):
        fail(out, kind="report", overwrite=True)
    assert contents(out) == {"page": "old"}
    write(out, "new", overwrite=True)
    assert contents(out) == {"page": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_the_last_file_gets_its_name_at_the_end_and_the_mark_can_go(tmp_path):
    out = tmp_path / "out"
    with output_folder(out, kind="report", marked=False, last="page") as folder:
        (folder.path / "page.part").write_text("new")
    assert os.listdir(out) == ["page"]
    with pytest.raises(OutputError, match="was not written by moetools"):
        check_output(out, kind="report", overwrite=True)


def test_a_resumable_output_is_continued(tmp_path):
    out = tmp_path / "out"
    claim = {"kind": "trace", "resumable": True}
    with pytest.raises(RuntimeError):
        fail(out, **claim)
    with pytest.raises(OutputError, match="Continue it with --resume"):
        check_output(out, **claim)
    with output_folder(out, resume=True, **claim) as folder:
        assert folder.resumed
        (folder.path / "part-1").write_text("done")
    assert contents(out) == {"page": "half", "part-1": "done"}
    with output_folder(out, overwrite=True, **claim) as folder:
        assert not folder.resumed
        assert contents(folder.path) == {}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("old", [True, False])
def test_a_resumable_output_that_failed_at_once_leaves_no_trace(tmp_path, old):
    out = tmp_path / "out"
    claim = {"kind": "trace", "resumable": True}
    if old:
        with output_folder(out, **claim) as folder:
            (folder.path / "part-0").write_text("old")
    with pytest.raises(RuntimeError), output_folder(out, overwrite=True, **claim):
        raise RuntimeError
    assert os.listdir(tmp_path) == (["out"] if old else [])
    assert not old or contents(out) == {"part-0": "old"}


def test_a_killed_replacement_is_undone(tmp_path):
    out, aside = tmp_path / "out", tmp_path / ".out.moetools-old"
    write(out, "old")
    os.rename(out, aside)
    with pytest.raises(OutputError, match="exists"):
        write(out)
    assert contents(out) == {"page": "old"}


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from moetools.files import output_folder

def delete(folder):
    next(Path(folder).glob(sys.argv[2])).unlink()
    os.kill(os.getpid(), signal.SIGKILL)

shutil.rmtree = delete
with output_folder(
    Path(sys.argv[1]), kind="report", overwrite=True, resumable=sys.argv[3] == "resumable"
) as folder:
    (folder.path / "page").write_text("new")
"""


def killed_while_it_deletes(out, name, *, resumable=False):
    """A run with --overwrite that is killed when it has deleted one file of a folder."""
    how = "resumable" if resumable else "at once"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), name, how])
    assert done.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("resumable", [False, True])
def test_a_replaced_output_never_comes_back(tmp_path, resumable):
    out = tmp_path / "out"
    write(out, "old", resumable=resumable)
    killed_while_it_deletes(out, "page", resumable=resumable)
    assert contents(out) == {"page": "new"}
    shutil.rmtree(out)
    write(out, "newer", resumable=resumable)
    assert contents(out) == {"page": "newer"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_stale_output_that_was_set_aside_never_comes_back(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    shutil.copytree(out, tmp_path / ".out.moetools-old")
    killed_while_it_deletes(out, "page")
    assert contents(out) == {"page": "old"}
    shutil.rmtree(out)
    write(out, "newer")
    assert contents(out) == {"page": "newer"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_kill_between_two_replacements_keeps_the_complete_output(tmp_path):
    out = tmp_path / "out"
    write(out, "old", resumable=True)
    os.rename(out, tmp_path / ".out.moetools-old")
    with pytest.raises(RuntimeError):
        fail(tmp_path / "half", kind="report", resumable=True)
    os.rename(tmp_path / "half", out)
    killed_while_it_deletes(out, MARKER, resumable=True)
    with pytest.raises(OutputError, match="exists"):
        write(out, resumable=True)
    assert contents(out) == {"page": "old"}
    assert os.listdir(tmp_path) == ["out"]


def test_only_outputs_of_the_same_kind_are_replaced(tmp_path):
    write(tmp_path / "report")
    with pytest.raises(OutputError, match="holds a report"):
        check_output(tmp_path / "report", kind="trace", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("x")
    with pytest.raises(OutputError, match="was not written by moetools"):
        write(tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        write(tmp_path / "file", overwrite=True)
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert contents(tmp_path / "empty") == {"page": "new"}


def test_dangerous_folders_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "data" / "a.txt"
    source.parent.mkdir()
    source.write_text("x")
    for out, message in (
        (source.parent, "contains the input"),
        (source, "contains the input"),
        (tmp_path, "contains the input"),
    ):
        with pytest.raises(OutputError, match=message):
            write(out, overwrite=True, inputs=[source])
    with pytest.raises(OutputError, match="lies inside the input"):
        write(source.parent / "out", inputs=[source.parent])
    link = tmp_path / "link"
    link.symlink_to(source.parent)
    with pytest.raises(OutputError, match="contains the input"):
        write(link, overwrite=True, inputs=[source])
    monkeypatch.chdir(source.parent)
    for out in (tmp_path, source.parent):
        with pytest.raises(OutputError, match="working folder"):
            write(out, overwrite=True)
    assert source.read_text() == "x"


def test_a_lock_refuses_two_writers_and_dies_with_its_process(tmp_path):
    out = tmp_path / "out"
    code = (
        "import sys; from pathlib import Path; from moetools.files import output_folder\n"
        "with output_folder(Path(sys.argv[1]), kind='report'): print('in', flush=True); input()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(OutputError, match="being written by another moetools process"):
            write(out)
    finally:
        other.kill()
        other.communicate()
    write(out)
    assert contents(out) == {"page": "new"}
    assert os.listdir(tmp_path) == ["out"]
