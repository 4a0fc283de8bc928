"""What the pages show is true: their code runs, their commands parse, their links and quotations lead somewhere.

A ```python block runs, after the blocks above it on the page, in one namespace and a temporary directory. With
title="x.py" it is also written to that file, behind what the page has put there before; ``<!-- not run: reason -->``
on the line before keeps a block from running. ```console blocks hold commands, one a line; ```bash blocks scripts.
"""

import dataclasses
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_custom import __main__ as runs_of_the_package
from lightning_custom import cli
from lightning_custom.config import stored_fields
from lightning_custom.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TUTORIAL = ROOT / "docs" / "tutorials" / "your-own-loop.md"

FENCE = re.compile(
    r'^(?P<before>[^\n]*)\n```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
OTHER_PROGRAMS = {"tensorboard", "ruff", "mypy", "mkdocs"}


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    code: str
    line: int
    """Lines of the page before the code."""
    is_run: bool


def blocks(page: Path, *languages: str) -> list[Block]:
    text = "\n" + page.read_text()
    return [
        Block(
            match["language"],
            match["title"],
            match["code"],
            text[: match.start("code")].count("\n") - 1,
            not match["before"].startswith("<!-- not run: "),
        )
        for match in FENCE.finditer(text)
        if match["language"] in languages
    ]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's console blocks, and what its scripts start of a recipe, as words."""
    found = []
    for block in blocks(page, "console", "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            if block.language == "console" or "-m recipes." in line:
                found += [shlex.split(part, comments=True) for part in line.split("&&")]
    return [words for words in found if words]


def pages_with(*languages: str) -> Any:
    chosen = [page for page in PAGES if blocks(page, *languages)]
    return pytest.mark.parametrize("page", chosen, ids=[str(page.relative_to(ROOT)) for page in chosen])


all_pages = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def run_blocks(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page, "python"):
        append(block, folder)
        if block.is_run:
            # Behind as many empty lines as the page has before it, so that a traceback points into the page.
            exec(compile("\n" * block.line + block.code, str(page), "exec"), module.__dict__)
    return module.__dict__


def append(block: Block, folder: Path) -> None:
    if block.title is not None:
        with (folder / block.title).open("a") as file:
            file.write(block.code)


@pages_with("python")
def test_python_blocks_run(page, folder, monkeypatch):
    run_blocks(page, folder, monkeypatch)


def test_the_tutorials_resume_test_passes(folder, monkeypatch):
    run_blocks(TUTORIAL, folder, monkeypatch)["test_resumed_run_equals_straight_run"](folder)


@pages_with("console", "bash")
def test_commands_exist(page, folder, monkeypatch):
    for block in blocks(page, "python"):
        append(block, folder)
    for words in commands(page):
        check_command(words, folder, monkeypatch)


def check_command(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = next((i for i, word in enumerate(words) if word.startswith("recipes.") and words[i - 1] == "-m"), None)
    if recipe is not None:
        parse_recipe_command(words[recipe], words[recipe + 1 :], monkeypatch)
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest_command(words, folder)
    elif words[0] == "python" and words[1].endswith(".py") and (folder / words[1]).exists():
        with monkeypatch.context() as context:
            context.setattr(sys, "argv", words[1:])
            with pytest.raises(SystemExit) as end:
                runpy.run_path(words[1], run_name="__main__")
            assert end.value.code in (0, None), f"{shlex.join(words)}: exit status {end.value.code}"
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for names in re.findall(r"\[([\w,]+)\]", words[-1]):
            assert set(names.split(",")) <= extras.keys(), f"{shlex.join(words)}: no such extra"
    elif words[:3] == ["python", "-m", "lightning_custom"]:
        runs_of_the_package._parser().parse_args(words[3:])
    elif words[:3] == ["python", "-m", "build"]:
        assert words[3:] in ([], ["--wheel"])
    elif words[:2] == ["python", "-m"]:
        module = ROOT / words[2].replace(".", "/")
        found = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
        assert found, f"{shlex.join(words)}: no {words[2]}"
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), f"{shlex.join(words)}: no {words[1]}"
    elif "/" in words[0]:
        assert (ROOT / words[0]).exists(), f"{shlex.join(words)}: no {words[0]}"
    else:
        assert words[0] in OTHER_PROGRAMS, f"{shlex.join(words)}: not a command that the pages' reader has"


def check_pytest_command(words: list[str], folder: Path) -> None:
    paths = [word for word in words[3:] if word.startswith(("test_", "tests/"))]
    for path in paths:
        assert (ROOT / path).exists() or (folder / path).exists(), f"{shlex.join(words)}: no {path}"
    if "-k" in words:
        files = [file for path in paths for file in [ROOT / path, *(ROOT / path).rglob("test_*.py")]]
        names = " ".join(str(file) + file.read_text() for file in files if file.is_file())
        for name in words[words.index("-k") + 1].split(" or "):
            assert name in names, f"{shlex.join(words)}: nothing is called {name}"


def parse_recipe_command(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config that the command line of ``module`` makes of ``words``; the recipe does not run."""
    made = []

    def only_parse(config: type, main: Callable, *, presets: Any, verbs: Any = None, description: Any = None) -> int:
        if words and words[0] in (verbs or {}):
            made.append(cli._parse_verb(verbs[words[0]][0], words[1:]))
            return 0
        if "--config" in words:
            file = Path(words[words.index("--config") + 1])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(stored_fields(config())))
        made.append(cli.parse_config(config, words, presets, description))
        return 0

    with monkeypatch.context() as context:
        context.setattr(cli, "command_line", only_parse)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / f"{module.replace('.', '/')}.py"), run_name="__main__")
    assert end.value.code == 0
    return made[0] if made else None


@all_pages
def test_links_lead_to_files_and_quotations_are_in_them(page):
    lines = ["", *prose(page).splitlines()]
    for before, line in pairwise(lines):
        for link in LINK.finditer(line):
            if link["target"].startswith(("http:", "https:", "#")):
                continue
            target = page.parent / link["target"]
            awaited = link["image"] and before.startswith("<!-- figure: ")
            assert target.exists() or awaited, f"{page}: no {link['target']}"
            quoted = re.fullmatch("`([^`]+)`", link["text"])
            if quoted and target.suffix == ".py" and target.stem != quoted[1]:
                assert quoted[1] in target.read_text(), f"{page}: {target.name} has no line {quoted[1]!r}"


SETTINGS = re.compile(r"settings of (\w+Config)")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SETTINGS.search(page.read_text())], ids=lambda page: page.stem
)
def test_settings_tables_state_the_defaults_of_the_code(page):
    config = getattr(importlib.import_module(f"recipes.{page.stem}"), SETTINGS.search(page.read_text())[1])
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page.read_text(), re.MULTILINE)
    defaults = {field.name: str(field.default) for field in dataclasses.fields(config)}
    assert rows
    assert {name: defaults.get(name) for name, _ in rows} == dict(rows)


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link["target"]).resolve() for link in LINK.finditer(index.read_text())}
    assert set((ROOT / "docs").rglob("*.md")) - linked == {index}


def test_a_block_that_fails_points_into_its_page(folder, monkeypatch):
    page = folder / "page.md"
    page.write_text(
        "text\n\n```python\nx = 1\n```\n\n<!-- not run: no -->\n```python\n1/0\n```\n\n```python\nx / 0\n```\n"
    )
    with pytest.raises(ZeroDivisionError) as failure:
        run_blocks(page, folder, monkeypatch)
    assert (str(failure.traceback[-1].path), failure.traceback[-1].lineno + 1) == (str(page), 13)


@pytest.mark.parametrize(
    "line, message",
    [
        ("python -m recipes.gan --los hinge", "--los"),
        ("python -m recipes.gan sample --run_di x", "run_di"),
        ("python -m recipes.gan --preset nope", "nope"),
    ],
)
def test_a_wrong_flag_on_a_page_is_found(line, message, folder, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        check_command(line.split(), folder, monkeypatch)


# The tutorial's own tests, and that they fail where it says so.

RESUMED, TWO_PROCESSES = "test_resumed_run_equals_straight_run", "test_two_processes_give_the_run_of_one"
AVERAGING, SEEDING = "mean_gradients_(fabric, model)", "rng = seed_step(config.seed, state.step, fabric)"
SHARED_NOISE = ", generator=rng.shared"


@pytest.mark.distributed
@pytest.mark.parametrize(
    "replaced, test, failure",
    [
        ({}, TWO_PROCESSES, None),
        ({AVERAGING: "pass"}, TWO_PROCESSES, "processes 0 and 1 differ"),
        ({SHARED_NOISE: ""}, TWO_PROCESSES, "2 processes differ from one"),
        ({SHARED_NOISE: "", SEEDING: "pass"}, RESUMED, "AssertionError: state.model"),
    ],
    ids=["as it is", "without averaging", "noise of each process's own", "randomness with a history"],
)
def test_the_tutorials_tests_find_what_it_says_they_find(replaced, test, failure, tmp_path):
    for block in blocks(TUTORIAL, "python"):
        append(block, tmp_path)
    program = (tmp_path / "denoise.py").read_text()
    for old, new in replaced.items():
        assert program.count(old) == 1
        program = program.replace(old, new)
    (tmp_path / "denoise.py").write_text(program)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"test_denoise.py::{test}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == (0 if failure is None else 1), result.stdout + result.stderr
    assert failure is None or failure in result.stdout
