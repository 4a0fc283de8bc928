"""Draw returns of recipes.ppo beside those of a peer: ``python docs/figures/ppo_curves.py CURVES.jsonl --out X.png``.

The file is what ``python -m tests.benchmarks.ppo_returns`` writes; a panel a preset, a line a run.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

COLOURS = {"recipes.ppo": "#0072b2", "stable-baselines3": "#d55e00"}


def draw(source: Path, out: Path) -> None:
    """Write the picture of ``source``'s runs to ``out``."""
    runs = [json.loads(line) for line in source.read_text().splitlines()]
    presets = list(dict.fromkeys(run["preset"] for run in runs))
    size = (3.4 * len(presets), 3.0)
    figure, axes = pyplot.subplots(1, len(presets), figsize=size, squeeze=False, layout="constrained")
    for axis, preset in zip(axes[0], presets, strict=True):
        named: set[str] = set()
        for run in (run for run in runs if run["preset"] == preset):
            who = run["who"]
            label = None if who in named else who
            axis.plot(run["env_steps"], run["returns"], color=COLOURS[who], label=label, linewidth=1.4, marker=".")
            named.add(who)
        axis.set_title(preset, fontsize=10)
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.supxlabel("environment steps", fontsize=9)
    figure.supylabel("return", fontsize=9)
    figure.savefig(out, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.source, arguments.out)
