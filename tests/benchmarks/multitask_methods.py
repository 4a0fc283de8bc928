"""Every method of ``recipes.multitask`` on one protocol: test accuracy by task, and Delta-m over the tasks alone.

    python -m tests.benchmarks.multitask_methods --out methods.jsonl                 # digits, 3 seeds
    python -m tests.benchmarks.multitask_methods --preset multi-fashion --data_root DIR --steps 1200 --batch_size 64 \\
        --rates 0.001 0.003 0.01 0.03 --out fashion.jsonl

    python -m tests.benchmarks.multitask_methods --times                             # milliseconds a step

The learning rate is the best for equal weighting among a few, by the validation accuracy of seed 0, and then
everyone's. Checkpoints are chosen on validation, tested once. A line is written after each run; runs that are there
are not repeated, so that it goes on where it was stopped. Prints a table.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from statistics import mean, median
from typing import Any, get_args

import torch

from lightning_custom.checkpoint import read_best
from lightning_custom.datasets import Images
from lightning_custom.errors import ConfigError, NonFiniteError, SolverError
from lightning_custom.metrics import STEPS_PER_SECOND, read_rows
from lightning_custom.multitask.conflict import delta_m
from lightning_custom.multitask.methods import Method
from lightning_custom.testing import single_process
from recipes import multitask
from tests.benchmarks.interleave import interleave, machine, quiet, table

RATES = (1e-3, 3e-3, 1e-2)
ALONE = tuple(f"only {task}" for task in multitask.TASKS)
# Static weights are what one sets them to, and torchjd is any of a library's.
METHODS = (*ALONE, *(method for method in get_args(Method) if method not in ("static", "torchjd")))


def run(preset: str, method: str, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Train once; the best checkpoint's validation and test accuracy by task."""
    chosen = {"only": method.removeprefix("only "), "method": "equal"} if method in ALONE else {"method": method}
    with tempfile.TemporaryDirectory() as folder:
        config = multitask.MultitaskConfig(
            **multitask.PRESETS[preset] | fields | chosen | {"seed": seed, "run_dir": folder, "accelerator": "cpu"}
        )
        fabric, (train, val, test) = single_process(), multitask.load_data(config)
        torch.set_num_threads(1)
        trunk, heads = multitask.networks(config, train)
        losses = dict.fromkeys(heads, multitask.sample_entropies)
        state = multitask.train(
            fabric,
            config,
            trunk=trunk,
            heads=heads,
            data=multitask.dataset(config, train),
            losses=losses,
            val_data=multitask.dataset(config, val),
        )
        multitask.load_best_(config, state)
        found = {"best": (read_best(Path(folder)) or {}).get("step")}
        for name, part in (("val", val), ("test", test)):
            scores = multitask.evaluate(fabric, state, multitask.dataset(config, part), losses, "")
            found[name] = {task: scores[f"accuracy/{task}"] for task in heads}
        return found


@cache
def train_data(name: str, data_root: str | None) -> Images:
    """What to train on, read once for all that are timed."""
    return multitask.load_data(multitask.MultitaskConfig(data=name, data_root=data_root))[0]


def step_seconds(preset: str, method: str, fields: dict[str, Any], steps: int = 60) -> float:
    """Seconds of a step of the recipe, everything around it included: the median of parts of ten."""
    chosen = {"only": method.removeprefix("only "), "method": "equal"} if method in ALONE else {"method": method}
    shell = {"steps": steps, "log_every": 10, "validate_every": 0, "checkpoint_every": 0, "accelerator": "cpu"}
    with tempfile.TemporaryDirectory() as folder, quiet():
        config = multitask.MultitaskConfig(
            **multitask.PRESETS[preset] | fields | chosen | shell | {"schedule": "constant", "run_dir": folder}
        )
        torch.set_num_threads(1)
        data = train_data(config.data, config.data_root)
        trunk, heads = multitask.networks(config, data)
        losses = dict.fromkeys(heads, multitask.sample_entropies)
        dataset = multitask.dataset(config, data)
        multitask.train(single_process(), config, trunk=trunk, heads=heads, data=dataset, losses=losses)
        rates = [line[STEPS_PER_SECOND] for line in read_rows(folder) if STEPS_PER_SECOND in line]
    return 1 / median(rates[1:])


def times(preset: str, methods: list[str], fields: dict[str, Any], rounds: int) -> str:
    """A table of every method's step, in interleaved rounds, beside that of equal weighting."""
    order = ["equal", *(method for method in methods if method != "equal")]
    contenders = {method: partial(step_seconds, preset, method, fields) for method in order}
    return table(f"{preset}, milliseconds a step, one thread", interleave(contenders, rounds))


def tuned_rate(preset: str, fields: dict[str, Any], lines: "Lines", rates: Sequence[float] = RATES) -> float:
    """The one of ``rates`` with which equal weighting validates best at seed 0."""
    accuracy = {}
    for lr in rates:
        found = lines.get(preset, "equal", 0, {**fields, "lr": lr})
        accuracy[lr] = mean(found["val"].values())
    return max(accuracy, key=accuracy.__getitem__)


class Lines:
    """Results in a file, a line a run; what is not there is run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        self._known = {json.dumps(line["run"]): line for line in map(json.loads, text.splitlines())}

    def get(self, preset: str, method: str, seed: int, fields: dict[str, Any]) -> dict[str, Any]:
        """The result of a run."""
        key = [preset, method, seed, {name: fields[name] for name in sorted(fields) if name != "data_root"}]
        if json.dumps(key) not in self._known:
            try:
                line = {"run": key, **run(preset, method, seed, fields)}
            except (ConfigError, NonFiniteError, SolverError) as error:  # a method that gives up is a result
                line = {"run": key, "error": str(error)}
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            self._known[json.dumps(key)] = line
        return self._known[json.dumps(key)]


def row(method: str, found: list[dict[str, Any]], alone: dict[str, float]) -> tuple[float, str]:
    """Mean Delta-m over seeds, and the line of the table."""
    failed = [one["error"] for one in found if "error" in one]
    if failed:
        return float("-inf"), f"| `{method}` | | | gave up on {len(failed)} of {len(found)} seeds | {failed[0]} |"
    tasks = [method.removeprefix("only ")] if method in ALONE else list(multitask.TASKS)
    means = {task: mean(one["test"][task] for one in found) for task in tasks}
    cells = [f"{means[task]:.2%}" if task in means else "" for task in multitask.TASKS]
    if method in ALONE:
        return float("inf"), f"| {method} | {' | '.join(cells)} | | |"
    deltas = [delta_m(one["test"], alone, higher_is_better=True) for one in found]
    spread = f"{min(deltas):+.2f} to {max(deltas):+.2f}" if len(deltas) > 1 else ""
    return mean(deltas), f"| `{method}` | {' | '.join(cells)} | {mean(deltas):+.2f} | {spread} |"


def main() -> None:
    """Run what is missing and print the table, best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="digits", choices=list(multitask.PRESETS))
    parser.add_argument("--data_root")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to search")
    parser.add_argument("--lr", type=float, help="leave out the search")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--times", action="store_true", help="time a step of each in place of training")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    words = parser.parse_args()
    budget = {"steps": words.steps, "batch_size": words.batch_size}
    fields = {"data_root": words.data_root, **{name: value for name, value in budget.items() if value is not None}}
    if words.times:
        print(times(words.preset, list(words.methods), fields, words.rounds))
        print(machine())
        return
    if words.out is None:
        parser.error("--out is needed")
    lines = Lines(words.out)
    fields["lr"] = words.lr or tuned_rate(words.preset, fields, lines, words.rates)
    found = {method: [] for method in dict.fromkeys((*ALONE, *words.methods))}
    for seed in range(words.seeds):
        for method in found:
            found[method].append(lines.get(words.preset, method, seed, fields))
    alone = {
        task: mean(one["test"][task] for one in found[name]) for name, task in zip(ALONE, multitask.TASKS, strict=True)
    }
    print(f"learning rate {fields['lr']}, {words.seeds} seeds\n")
    print("| method | left | right | Delta-m, % | over seeds |\n|---|---|---|---|---|")
    for _, text in sorted((row(method, runs, alone) for method, runs in found.items()), reverse=True):
        print(text)


if __name__ == "__main__":
    main()
