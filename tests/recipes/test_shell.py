"""Every recipe repeats the same shell in the same order, and imports go one way."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.name != "__init__.py")
LIBRARY = sorted((ROOT / "lightning_custom").rglob("*.py"))

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])

SHELL = [
    "with_run_dir",
    "fabric.setup",
    "with Checkpointer",
    "checkpointer.restore(state)",
    "while state.step < config.steps",
    "seed_step",
    "state.step += 1",
    "metrics.update",
    "progress.show(state.step)",
    "if due(log_every)",
    "metrics.flush(state.step)",
    "if due(validate_every)",
    "if checkpointer.due(state.step)",
    "checkpointer.save(state)",
    "if checkpointer.stop_requested",
    "break",
    "return state",
]


def train_of(source):
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    (train,) = [function for function in functions if function.name == "train"]
    return train


def shell(train):
    """The parts of the shell in ``train``, in the order of its lines, one after another of a kind counted once."""
    found = []
    for node in sorted_by_place(train):
        part = part_of_shell(node)
        if part is not None and found[-1:] != [part]:
            found.append(part)
    return found


def sorted_by_place(train):
    # A break that leaves a loop inside a step is not the shell's.
    inner = {leaf for loop in ast.walk(train) if isinstance(loop, ast.For) for leaf in ast.walk(loop)}
    nodes = [node for node in ast.walk(train) if isinstance(node, (ast.stmt, ast.Call, ast.withitem))]
    nodes = [node for node in nodes if not (isinstance(node, ast.Break) and node in inner)]
    return sorted(nodes, key=lambda node: place(node.context_expr if isinstance(node, ast.withitem) else node))


def place(node):
    return node.lineno, node.col_offset


def part_of_shell(node):
    text = ast.unparse(node)
    if isinstance(node, ast.withitem):
        return "with Checkpointer" if text.startswith("Checkpointer(fabric, config") else None
    if isinstance(node, ast.While):
        # A recipe may have a further reason to end.
        test, *_ = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
        return f"while {ast.unparse(test)}" if "state.step" in ast.unparse(test) else None
    if isinstance(node, ast.If):
        return condition(ast.unparse(node.test))
    if isinstance(node, ast.Return):
        return text
    if isinstance(node, ast.Break):
        return "break"
    if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "state.step":
        return text
    if isinstance(node, ast.Call):
        return call(ast.unparse(node.func), [ast.unparse(argument) for argument in node.args])
    return None


def condition(test):
    for every in ("log_every", "validate_every"):
        if test == f"due(state.step, config.{every}, last=config.steps)":
            return f"if due({every})"
    if test.startswith("checkpointer.due(state.step)"):
        return "if checkpointer.due(state.step)"
    return "if checkpointer.stop_requested" if test == "checkpointer.stop_requested" else None


def call(function, arguments):
    function = function.removeprefix("state.")
    first = arguments[0] if arguments else ""
    if function in ("fabric.setup", "fabric.setup_module", "fabric.setup_optimizers"):
        return "fabric.setup"
    if function in ("with_run_dir", "seed_step", "metrics.update"):
        return function
    if function in ("progress.show", "metrics.flush", "checkpointer.restore", "checkpointer.save"):
        return f"{function}({first})"
    return None


@every_recipe
def test_train_has_the_shell_in_order(path):
    assert shell(train_of(path.read_text())) == SHELL


@every_recipe
def test_seed_step_is_the_first_statement_of_the_loop(path):
    (loop,) = [
        node
        for node in ast.walk(train_of(path.read_text()))
        if isinstance(node, ast.While) and "state.step" in ast.unparse(node.test)
    ]
    first = loop.body[0]
    assert isinstance(first, (ast.Assign, ast.Expr))
    assert ast.unparse(first.value) == "seed_step(config.seed, state.step, fabric)"


@every_recipe
def test_the_step_is_counted_in_one_place(path):
    assignments = [
        ast.unparse(node)
        for node in ast.walk(train_of(path.read_text()))
        if isinstance(node, (ast.Assign, ast.AugAssign))
        and "state.step" in map(ast.unparse, [node.target] if isinstance(node, ast.AugAssign) else node.targets)
    ]
    assert assignments == ["state.step += 1"]


@pytest.mark.parametrize(
    "line, other",
    [
        ("            state.step += 1\n", ""),
        ("                break\n", "                pass\n"),
        ("        checkpointer.restore(state)\n", ""),
        ("state.step < config.steps", "state.step <= config.steps"),
        ("if due(state.step, config.log_every, last=config.steps)", "if due(state.step, config.log_every)"),
    ],
)
@every_recipe
def test_a_train_that_lost_a_line_is_noticed(path, line, other):
    source = path.read_text()
    assert line in source
    assert shell(train_of(source.replace(line, other))) != SHELL


def imported(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module


def packages(path):
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", [ROOT / "recipes" / "__init__.py", *RECIPES], ids=lambda path: path.stem)
def test_no_recipe_imports_a_recipe(path):
    assert "recipes" not in packages(path)


ALLOWED = {
    "ale_py", "gymnasium", "jsonargparse", "lightning", "lightning_custom", "lightning_utilities", "mujoco", "numpy",
    "PIL", "scipy", "sklearn", "tensorboard", "torch", "torch_fidelity", "torchjd", "torchmetrics",
    "torchvision", "tqdm", "yaml",
}  # fmt: skip


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_the_library_imports_no_recipe_and_only_its_dependencies(path):
    assert packages(path) - sys.stdlib_module_names <= ALLOWED
