"""kernels/ and convert/ stand at the top of the checkout and are imported as jaxpaged.kernels and jaxpaged.convert."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("kernels", "convert")


@pytest.mark.parametrize("folder", LINKED)
def test_the_link_is_relative(folder: str) -> None:
    assert os.readlink(ROOT / "jaxpaged" / folder) == f"../{folder}"


@pytest.mark.parametrize("folder", LINKED)
def test_the_link_is_committed_as_a_link(folder: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-s", f"jaxpaged/{folder}"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.startswith("120000 ")


@pytest.mark.parametrize("folder", LINKED)
def test_the_linked_folder_is_no_package_of_its_own(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_linked_module_is_the_file_at_the_top() -> None:
    module = importlib.import_module("jaxpaged.kernels.reference")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / "kernels" / "reference.py"


def sources() -> set[str]:
    """Every Python file that a user must get, named as it is imported."""
    ours = {p.relative_to(ROOT).as_posix() for p in (ROOT / "jaxpaged").glob("**/*.py")}
    linked = {f"jaxpaged/{p.relative_to(ROOT).as_posix()}" for f in LINKED for p in (ROOT / f).glob("**/*.py")}
    return ours | linked


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_source(tmp_path: Path) -> None:
    # Without arguments `build` makes the wheel from the sdist, so a link lost in the sdist would show in both.
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert {n for n in files if n.endswith(".py")} == sources()
    assert {"jaxpaged/py.typed", "jaxpaged/server/static/index.html"} <= files
    assert all(n.startswith("jaxpaged/") for n in files)

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {n.partition("/")[2] for n in archive.getnames()}
    assert sources() <= inside


def test_the_core_install_is_light() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not {"torch", "transformers", "flax"} & {d.split(">")[0].split("=")[0] for d in project["dependencies"]}
