"""The wheel and the sdist hold what the tree holds, and work when installed."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAPPED = {"moetools.commands": "commands", "moetools.analyses": "analyses"}

pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the source tree"
)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def tree() -> set[str]:
    """Every Python file and data file of the product, by its installed name."""
    tracked = subprocess.run(
        ["git", "ls-files", "moetools", "commands", "analyses"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return {name if name.startswith("moetools/") else f"moetools/{name}" for name in tracked}


def test_packages_are_those_of_the_tree(project):
    folders = {"moetools"} | set(MAPPED)
    folders |= {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "moetools").rglob("__init__.py")
        if not {"commands", "analyses"} & set(path.relative_to(ROOT).parts[1:])
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders
    assert project["tool"]["setuptools"]["package-dir"] == MAPPED


def test_wheel_holds_the_tree_and_nothing_generic(distributions):
    (wheel,) = distributions.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == tree()


def test_sdist_holds_the_tree(distributions):
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    installed = {f"moetools/{n}" if n.startswith(("commands/", "analyses/")) else n for n in names}
    assert tree() <= installed
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_installed_wheel_runs_outside_the_tree(distributions, tmp_path):
    (wheel,) = distributions.glob("*.whl")
    target = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target",
         str(target), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    assert {p.name for p in target.iterdir() if "." not in p.name} <= {"moetools", "bin"}
    code = (
        "import moetools, sys; assert moetools.__path__[0].startswith(sys.argv[1]), moetools;"
        "from moetools import cli; sys.exit(cli.run(['--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in (p.stem for p in (ROOT / "commands").glob("[a-z]*.py")):
        assert name.replace("_", "-") in done.stdout
