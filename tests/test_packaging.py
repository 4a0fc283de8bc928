"""The wheel holds both packages whole and runs where there is no checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from lightning_custom import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = ("lightning_custom", "recipes")


def run(*words, cwd, **environment):
    result = subprocess.run(
        [*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=250, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy so that the checkout gets no build folders."""
    pytest.importorskip("build", reason="python -m build is not installed")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, cwd=source)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel and this one's dependencies, but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    own = next(folder.glob("lib/python*/site-packages"))
    dependencies = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (own / "dependencies.pth").write_text("\n".join(dependencies))
    return python


def test_the_lower_bounds_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["export"], *extras["test"]]
    bounds = {match[1]: match[2] for text in wanted if (match := re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\d.]+)", text))}
    lines = (ROOT / ".ci" / "lower-bounds.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert "torch" in bounds
    for name, bound in bounds.items():
        assert f"{pinned[name]}.".startswith(f"{bound}."), name


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_says_that_it_is_typed(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assert held == expected | {"lightning_custom/py.typed"}
    assert wheel.name.startswith(f"lightning_custom-{__version__}-py3-none-any")


@pytest.mark.slow
def test_a_recipe_of_the_wheel_trains_without_the_checkout(python, tmp_path):
    for name in PACKAGES:
        where = run(python, "-c", f"import {name}; print({name}.__file__)", cwd=tmp_path)
        assert Path(where).is_relative_to(python.parents[1])
    flags = ("--steps", 3, "--run_dir", "run", "--accelerator", "cpu")
    run(python, "-m", "recipes.classification", *flags, cwd=tmp_path)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("complete", 3)
    listed = run(python, "-m", "lightning_custom", "runs", ".", cwd=tmp_path)
    assert listed.splitlines()[1].split()[:4] == ["run", "classification", "3/3", "complete"]
