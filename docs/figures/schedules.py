"""Draw the schedules: ``python docs/figures/schedules.py`` writes schedules.png beside this file."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot

from lightning_custom.schedules import (
    Constant,
    Cosine,
    Cyclical,
    Exponential,
    Join,
    Linear,
    OneCycle,
    Schedule,
    StepDecay,
    WarmRestarts,
    with_warmup,
)

STEPS = 1000
PANELS: dict[str, dict[str, Schedule]] = {
    "Constant, Linear": {"Constant(1)": Constant(1), "Linear(1, 0.1, 800)": Linear(1, 0.1, 800)},
    "Cosine": {
        "Cosine(1, 1000)": Cosine(1, 1000),
        "Cosine(1, 600, minimum=0.1)": Cosine(1, 600, minimum=0.1),
    },
    "with_warmup": {
        "with_warmup(Cosine(1, 900), 100)": with_warmup(Cosine(1, 900), 100),
        "with_warmup(Constant(0.5), 300)": with_warmup(Constant(0.5), 300),
    },
    "StepDecay, Exponential": {
        "StepDecay(1, 250, 0.4)": StepDecay(1, 250, 0.4),
        "Exponential(1, 0.995)": Exponential(1, 0.995),
    },
    "Cyclical": {
        "triangular": Cyclical(0.1, 1, 75, 175),
        "triangular2": Cyclical(0.1, 1, 75, 175, mode="triangular2"),
        "exp_range, factor=0.998": Cyclical(0.1, 1, 75, 175, mode="exp_range", factor=0.998),
    },
    "OneCycle": {
        "cosine": OneCycle(1, 1000),
        "linear": OneCycle(1, 1000, anneal="linear"),
        "three_phase=True": OneCycle(1, 1000, three_phase=True, start_divisor=5),
    },
    "WarmRestarts": {
        "WarmRestarts(1, 250)": WarmRestarts(1, 250),
        "WarmRestarts(1, 140, 2)": WarmRestarts(1, 140, 2),
    },
    "Join": {
        "Join((Linear, Constant, Exponential),\n     (150, 500))": Join(
            (Linear(0, 1, 150), Constant(1), Exponential(1, 0.995)), (150, 500)
        ),
    },
}


def draw(path: Path) -> None:
    """Write the picture to ``path``."""
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 5.6), sharex=True, sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes.flat, PANELS.items(), strict=True):
        for (name, schedule), style in zip(curves.items(), ("-", "--", ":"), strict=False):
            axis.plot([schedule(step) for step in range(STEPS)], style, label=name)
        axis.set_title(title)
        axis.set_ylim(-0.03, 1.45)
        axis.set_yticks([0, 0.5, 1])
        axis.legend(loc="upper right", fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step")
    figure.supylabel("learning rate")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
