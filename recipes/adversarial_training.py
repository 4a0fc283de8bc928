"""Adversarial training: the loss of the worst inputs nearby, found anew in every step.

Madry et al. 2018, eq. 2.1: the outer loop lowers over the weights what an inner loop, projected gradient ascent, has
raised over the inputs. Fields make of it TRADES (Zhang et al. 2019, eq. 5), MART (Wang et al. 2020, eq. 11), FGSM with
a random start (Wong et al. 2020), and with `--attack_steps 0` standard training. "Free" adversarial training (Shafahi
et al. 2019), whose updates share one backward pass with the attack, is another order of operations and not here.

    python -m recipes.adversarial_training                            # digits, L-inf
    python -m recipes.adversarial_training --preset digits-l2
    python -m recipes.adversarial_training --loss trades --beta 6
    python -m recipes.adversarial_training --preset fashion-mnist --data_root DIR
    python -m recipes.adversarial_training attack --run_dir RUN_DIR --out attack.png
    python -m recipes.adversarial_training evaluate --run_dir RUN_DIR --attack_steps 100 --restarts 20
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, nll_loss
from torch.optim import AdamW, Optimizer
from torch.utils.data import TensorDataset

from lightning_custom import schedules
from lightning_custom.adversarial import frozen
from lightning_custom.attacks import Ball, Norm, pgd, pgd_with_restarts, square_search
from lightning_custom.checkpoint import Checkpointer, load_module
from lightning_custom.cli import command_line
from lightning_custom.config import RunConfig, refuse_unread, require_at_least, with_run_dir
from lightning_custom.confusion import ConfusionMatrix
from lightning_custom.data import Batches, evaluation_batches, require_map_style, value_range
from lightning_custom.datasets import Images, load_images, split
from lightning_custom.distributed import mean_gradients_, take_share
from lightning_custom.errors import ConfigError
from lightning_custom.evaluation import evaluating
from lightning_custom.events import png_bytes
from lightning_custom.launch import launch
from lightning_custom.layers import require_trainable
from lightning_custom.loop import due, hash_seed, seed_step
from lightning_custom.metrics import MetricLogger, is_logged
from lightning_custom.networks import ConvClassifier
from lightning_custom.output_file import require_ending, write_file
from lightning_custom.pictures import captioned, image_grid
from lightning_custom.precision import Bare, bare, unwrap
from lightning_custom.progress import Progress
from lightning_custom.run import complete_already, config_of_run


@dataclass(frozen=True, kw_only=True)
class AdversarialTrainingConfig(RunConfig):
    """Settings of the loop, and of the data and network that the command line builds."""

    steps: int = 400
    """Optimizer updates, each after an attack on its batch."""
    validate_every: int = 100
    """Steps between two validations; 0: only at the end."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; 0: only at the end or when stopped."""
    log_every: int = 50
    """Steps between two rows of metrics."""
    loss: Literal["madry", "trades", "mart"] = "madry"
    """Cross-entropy of the perturbed inputs alone, or with the divergence from the clean ones."""
    beta: float = 6.0
    """Weight of that divergence in trades and mart."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: float = 0.1
    """Its largest norm, pixels being in [0, 1]."""
    eps_warmup: int = 0
    """Steps over which eps grows from 0 in training."""
    attack_steps: int = 7
    """Gradient steps of the attack in training; 0: none, standard training."""
    step_size: float = 0.35
    """Length of each, as a share of eps; 1.25 with a single step is FGSM with a random start."""
    val_attack_steps: int = 20
    """Gradient steps of the attack at validation, from one random start."""
    test_attack_steps: int = 50
    """Gradient steps of the attack on the test set."""
    test_restarts: int = 10
    """Random starts of the attack on the test set."""
    test_queries: int = 500
    """Queries of the search without gradients on the test set; 0: no search."""
    batch_size: int = 64
    """Samples of an update, over all processes."""
    lr: float = 3e-3
    """Highest learning rate (AdamW)."""
    weight_decay: float = 0.01
    """Weight decay."""
    schedule: Literal["constant", "one_cycle"] = "one_cycle"
    """Learning rate over the run."""
    threads: int | None = 1
    """CPU threads of each process: one is enough for the small images of the default, and never waits for another."""
    width: int = 16
    """Channels of the network's first layer, a multiple of 8."""
    data: Literal["digits", "fashion-mnist", "mnist", "cifar10"] = "digits"
    """Data set: digits comes with scikit-learn, the others are read from data_root."""
    data_root: str | None = None
    """Directory in torchvision's layout (FashionMNIST/raw, MNIST/raw, cifar-10-batches-py)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, {"batch_size": 1, "beta": 0, "eps": 0, "eps_warmup": 0, "attack_steps": 0})
        require_at_least(self, {"step_size": 0, "val_attack_steps": 1, "test_attack_steps": 1, "test_restarts": 1})
        require_at_least(self, {"test_queries": 0, "lr": 0, "weight_decay": 0, "width": 8})
        refuse_unread(
            self,
            {
                "beta": self.loss == "madry" and "madry has no divergence to weigh; use loss trades or mart",
                "eps_warmup": not self.attack_steps and "attack_steps is 0; use more, or set eps_warmup to 0",
            },
        )
        if self.loss != "madry" and not self.attack_steps:
            raise ConfigError(
                f"attack_steps: 0, but {self.loss} compares with attacked inputs; use madry, or more steps"
            )
        if self.width % 8:
            raise ConfigError(f"width: {self.width}; the network normalises groups of channels, give a multiple of 8")


PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "digits-l2": {"norm": "l2", "eps": 0.5},
    "digits-fgsm": {"attack_steps": 1, "step_size": 1.25},
    "fashion-mnist": {
        "data": "fashion-mnist", "eps": 0.1, "steps": 2000, "batch_size": 128, "validate_every": 500,
        "checkpoint_every": 500, "test_restarts": 2, "test_queries": 0, "threads": None,
    },
}  # fmt: skip


@dataclass
class AdversarialTrainingState:
    """What changes while training; a checkpoint is exactly these fields."""

    model: nn.Module
    optimizer: Optimizer
    batches: Batches
    confusion: ConfusionMatrix
    metrics: MetricLogger
    step: int = 0
    """Optimizer updates done."""


def train(
    fabric: Fabric,
    config: AdversarialTrainingConfig,
    *,
    model: nn.Module,
    dataset: Any,
    num_classes: int,
    val_data: Any = None,
    optimizer: Callable[[Any], Optimizer] | None = None,
) -> AdversarialTrainingState:
    """Train ``model(inputs) -> logits [B, K]`` on (input, label) pairs, or on an iterable of batches of them.

    Inputs lie in [0, 1]; a model that wants them normalised does it itself, so that eps keeps its meaning.
    ``optimizer`` makes an optimizer from parameters; ``val_data`` is map-style.
    """
    config, schedule = with_run_dir(fabric, config), schedules.named(config.schedule, config.lr, config.steps)
    require_unit_box(dataset, val_data)
    if val_data is not None:
        require_map_style("val_data", val_data)
    refuse_unread(config, {"weight_decay": optimizer is not None and "the optimizer is your own; set it there"})
    make_optimizer = optimizer or (lambda parameters: AdamW(parameters, config.lr, weight_decay=config.weight_decay))
    require_trainable("model", model)
    model = fabric.setup_module(model)
    classify = bare(fabric, model)
    state = AdversarialTrainingState(
        model=model,
        optimizer=cast("Optimizer", fabric.setup_optimizers(make_optimizer(model.parameters()))),
        batches=Batches(fabric, dataset, batch_size=config.batch_size, seed=config.seed),
        confusion=ConfusionMatrix(num_classes, fabric),
        metrics=MetricLogger(
            fabric,
            config.run_dir,
            hyperparameters=config,
            headline=["val/robust_accuracy", "val/accuracy"],
            layout={
                "accuracy": ["val/accuracy", "val/robust_accuracy", "train/robust_accuracy"],
                "loss": ["train/loss"],
            },
        ),
    )
    shown_as = "train/robust_" if config.attack_steps else "train/"

    with (
        Checkpointer(
            fabric, config, best="val/robust_accuracy", mode="max", steps_fixed=reads_steps(config)
        ) as checkpointer,
        Progress(fabric, config.steps) as progress,
    ):
        checkpointer.restore(state)

        while state.step < config.steps:
            rng = seed_step(config.seed, state.step, fabric)
            schedules.set_learning_rate(state.optimizer, schedule, state.step)
            inputs, labels = next(state.batches)
            inputs = at_least_as_wide(inputs, model)
            if state.step == 0:  # what can be looked at of an iterable
                require_unit_box(TensorDataset(inputs))

            # Inner maximisation: the worst inputs in the ball, for the weights as they are.
            ball = Ball(config.norm, config.eps * min(1.0, (state.step + 1) / max(config.eps_warmup, 1)))
            with evaluating(model), frozen(model):
                perturbed = attacked(fabric, config, classify, inputs, labels, ball, rng.shared)

            # Outer minimisation: the weights' gradient there.
            state.optimizer.zero_grad()
            loss, logits = outer_loss(config, classify, inputs, perturbed, labels)
            fabric.backward(loss)
            mean_gradients_(fabric, model)
            state.optimizer.step()

            state.step += 1
            state.confusion.update(logits.detach(), labels)
            state.metrics.update({"train/loss": loss})
            progress.show(state.step)
            if due(state.step, config.log_every, last=config.steps):
                known = {"lr": schedule(state.step - 1), "eps": ball.eps, **state.confusion.flush(shown_as)}
                progress.report(state.step, state.metrics.flush(state.step, known))
            validation: dict[str, float] = {}
            if due(state.step, config.validate_every, last=config.steps):
                validation = validate(fabric, config, state, val_data)
                progress.report(state.step, state.metrics.record(state.step, validation))
            if checkpointer.due(state.step) or checkpointer.is_best(validation):
                checkpointer.save(state, validation)
            if checkpointer.stop_requested:
                break
    return state


def reads_steps(config: AdversarialTrainingConfig) -> bool:
    """Whether a schedule depends on the run's length."""
    return config.schedule != "constant"


def attacked(
    fabric: Fabric,
    config: AdversarialTrainingConfig,
    classify: Bare,
    inputs: Tensor,
    labels: Tensor,
    ball: Ball,
    draw: torch.Generator,
) -> Tensor:
    """The batch as PGD leaves it, from random starts that are drawn for the batch of all processes."""
    if config.attack_steps == 0:
        return inputs
    clean = log_softmax(classify(inputs), dim=1) if config.loss == "trades" else None

    def losses(points: Tensor) -> Tensor:
        if clean is None:
            return cross_entropy(classify(points), labels, reduction="none")
        return divergence(clean, log_softmax(classify(points), dim=1))

    start = take_share(ball.start((len(inputs) * fabric.world_size, *inputs.shape[1:]), draw), fabric)
    return pgd(losses, inputs, ball, steps=config.attack_steps, step_size=config.step_size * ball.eps, start=start)


def outer_loss(
    config: AdversarialTrainingConfig, classify: Bare, inputs: Tensor, perturbed: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss that the weights are to lower, and the logits of the perturbed inputs ``[B, K]``."""
    if config.loss == "madry":
        logits: Tensor = classify(perturbed)
        return cross_entropy(logits, labels), logits
    logits, clean_logits = classify(torch.cat([perturbed, inputs])).chunk(2)
    log_p, clean_log_p = log_softmax(logits, dim=1), log_softmax(clean_logits, dim=1)
    apart = divergence(clean_log_p, log_p)
    if config.loss == "trades":
        return nll_loss(clean_log_p, labels) + config.beta * apart.mean(), logits
    # MART: also lower the best wrong class, and let clean samples that are wrong count for more.
    is_label = torch.zeros_like(log_p, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), True)
    wrong = log_p.exp().masked_fill(is_label, 0).amax(1)
    unsure = 1 - clean_log_p.gather(1, labels.unsqueeze(1)).squeeze(1).exp()
    boosted = nll_loss(log_p, labels) - torch.log1p(1e-4 - wrong).mean()
    return boosted + config.beta * (apart * unsure).mean(), logits


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each sample, ``[B]``."""
    return kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def at_least_as_wide(inputs: Tensor, model: nn.Module) -> Tensor:
    """Inputs in the model's dtype where that is wider: in half precision the steps of an attack would be rounded."""
    return inputs.to(torch.promote_types(inputs.dtype, next(model.parameters()).dtype))


def require_unit_box(*datasets: Any) -> None:
    """:class:`ConfigError` where inputs of a map-style data set are outside [0, 1], to which attacks are clipped."""
    for dataset in datasets:
        least, most = value_range(dataset) or (0, 1)
        if least < 0 or most > 1:
            raise ConfigError(
                f"dataset: inputs from {least:.3g} to {most:.3g}; scale them to [0, 1], and normalise inside the model"
            )


def validate(
    fabric: Fabric, config: AdversarialTrainingConfig, state: AdversarialTrainingState, data: Any
) -> dict[str, float]:
    """Scores clean and under attack, and a picture of the first samples."""
    if data is None:
        return {}
    scores, shown = evaluate(fabric, config, state.model, data, state.confusion.num_classes, "val/")
    if shown.dim() == 5 and shown.shape[2] in (1, 3):
        grid = image_grid(shown.flatten(0, 1), shown.shape[1], scale=max(1, 32 // shown.shape[-1]))
        state.metrics.image(state.step, "samples", grid)
    return scores


def evaluate(
    fabric: Fabric,
    config: AdversarialTrainingConfig,
    model: nn.Module,
    data: Any,
    num_classes: int,
    prefix: str,
    *,
    steps: int | None = None,
    restarts: int = 1,
    queries: int = 0,
) -> tuple[dict[str, float], Tensor]:
    """Scores over every sample of ``data`` once: clean, under PGD, and with ``queries`` under the search too.

    Also this process's first ten samples ``[3, 10, ...]``: clean, as PGD leaves them, and the difference tenfold.
    """
    steps, ball = steps or config.val_attack_steps, Ball(config.norm, config.eps)
    classify, step_size = bare(fabric, model), 2.5 * ball.eps / steps
    clean, robust, searched = (ConfusionMatrix(num_classes, fabric) for _ in range(3))
    shown: list[Tensor] = []
    with evaluating(model), frozen(model):
        for inputs, labels in evaluation_batches(fabric, data, batch_size=500):
            inputs = at_least_as_wide(inputs, model)
            draws = [torch.Generator().manual_seed(hash_seed(config.seed, "evaluation", kind)) for kind in range(2)]
            clean.update(classify(inputs), labels)
            perturbed = pgd_with_restarts(
                classify, inputs, labels, ball, steps=steps, step_size=step_size, restarts=restarts, generator=draws[0]
            )
            robust.update(classify(perturbed), labels)
            shown = shown or [side_by_side(inputs[:10], perturbed[:10])]
            if queries:
                found = square_search(classify, inputs, labels, ball, queries=queries, generator=draws[1])
                searched.update(classify(found), labels)
    scores = {**clean.compute().scores(prefix), **robust.compute().scores(f"{prefix}robust_")}
    return scores | ({f"{prefix}search_accuracy": searched.compute().accuracy} if queries else {}), shown[0]


def side_by_side(inputs: Tensor, perturbed: Tensor) -> Tensor:
    """Clean, perturbed, and the perturbation tenfold around grey, ``[3, B, ...]`` in [0, 1]."""
    return torch.stack([inputs, perturbed, (0.5 + 10 * (perturbed - inputs)).clamp(0, 1)]).float()


def main(config: AdversarialTrainingConfig) -> str:
    """Train on a real data set, attack the best checkpoint on the test set once, and print what came out."""
    fabric = launch(config)
    data, val_data, test_data = load_data(config)
    config = with_run_dir(fabric, config)
    started = time.perf_counter()
    state = train(
        fabric,
        config,
        model=network(config, data),
        dataset=data.dataset(),
        num_classes=data.num_classes,
        val_data=val_data.dataset(),
    )
    if state.step == config.steps:
        summary(fabric, config, state, test_data, time.perf_counter() - started)
    return str(config.run_dir)


def load_data(config: AdversarialTrainingConfig) -> tuple[Images, Images, Images]:
    """Parts to train on, to validate on, and to test on, in [0, 1]; of digits a fixed fifth is the test."""
    data = load_images(config.data, config.data_root)
    if config.data == "digits":
        data, test = split(data, 0.2)
    else:
        test = load_images(config.data, config.data_root, train=False)
    rest, val = split(data, 0.1 if config.data == "digits" else 1000 / len(data.labels), seed=1)
    rest, val, test = (part._replace(images=(part.images + 1) / 2) for part in (rest, val, test))
    return rest, val, test


def network(config: AdversarialTrainingConfig, data: Images) -> nn.Module:
    """The network for the data, with weights from the seed."""
    torch.manual_seed(config.seed)
    return ConvClassifier(data.images.shape[1], data.images.shape[2], data.num_classes, config.width)


def summary(
    fabric: Fabric,
    config: AdversarialTrainingConfig,
    state: AdversarialTrainingState,
    test_data: Images,
    seconds: float,
) -> None:
    """Attack the best checkpoint on the test set and print the result, and how to look at it."""
    run_dir = Path(str(config.run_dir))
    steps = state.step - state.metrics.resumed_from
    # A run that was stopped in its test has its steps, and not yet its scores.
    if steps == 0 and (state.step == 0 or is_logged(run_dir, state.step, "test/accuracy")):
        if fabric.global_rank == 0:
            print(complete_already(config, state.step, steps_fixed=reads_steps(config)))
        return
    unwrap(state.model).load_state_dict(load_module(str(config.run_dir), "model"))
    started = time.perf_counter()
    scores = scores_on_test(fabric, config, state.model, test_data)
    state.metrics.record(state.step, scores)
    if fabric.global_rank == 0:
        print(
            f"\n{result_line(config, scores)}\n"
            f"{steps * config.batch_size / seconds:,.0f} images/s   {seconds:.1f} s training, "
            f"{time.perf_counter() - started:.1f} s test\n"
            f"run: {config.run_dir}\n"
            f"look: tensorboard --logdir {config.run_dir}\n"
            f"attack: python -m recipes.adversarial_training attack --run_dir {config.run_dir} --out attack.png",
            flush=True,
        )


def scores_on_test(
    fabric: Fabric, config: AdversarialTrainingConfig, model: nn.Module, data: Images
) -> dict[str, float]:
    """Scores clean, and under the attacks that the config has for the test set."""
    scores, _ = evaluate(
        fabric, config, model, data.dataset(), data.num_classes, "test/",
        steps=config.test_attack_steps, restarts=config.test_restarts, queries=config.test_queries,
    )  # fmt: skip
    return scores


def result_line(config: AdversarialTrainingConfig, scores: dict[str, float]) -> str:
    """What :func:`scores_on_test` found, in one line."""
    pgd_name = f"PGD-{config.test_attack_steps} from {config.test_restarts} starts"
    searched = scores.get("test/search_accuracy")
    search = "" if searched is None else f"   under {config.test_queries} queries {searched:.2%}"
    return (
        f"test accuracy {scores['test/accuracy']:.2%}   "
        f"under {pgd_name}, {config.norm} eps {config.eps:g}: {scores['test/robust_accuracy']:.2%}{search}"
    )


@dataclass(frozen=True, kw_only=True)
class AttackConfig:
    """Draw test samples clean, attacked, and the perturbation tenfold, with what the run's model takes them for."""

    run_dir: str
    """Directory of the run."""
    count: int = 10
    """Number of samples."""
    out: str = "attack.png"
    """PNG file to write."""
    which: Literal["best", "last"] = "best"
    """Checkpoint to take."""
    eps: float | None = None
    """Largest norm of the perturbation; none: the run's."""
    attack_steps: int = 50
    """Gradient steps of the attack, from one random start."""
    seed: int = 0
    """Seed of the start."""

    def __post_init__(self) -> None:
        require_at_least(self, {"count": 1, "eps": 0, "attack_steps": 1})


def attack(request: AttackConfig) -> None:
    """Write the picture that ``request`` asks for."""
    require_ending(Path(request.out), (".png",))
    config = config_of_run(AdversarialTrainingConfig, request.run_dir)
    _, _, data = load_data(config)
    model = network(config, data)
    model.load_state_dict(load_module(request.run_dir, "model", which=request.which))
    inputs, labels = data.images[: request.count], data.labels[: request.count]
    ball = Ball(config.norm, config.eps if request.eps is None else request.eps)
    draw = torch.Generator().manual_seed(request.seed)
    with evaluating(model), frozen(model):
        perturbed = pgd_with_restarts(
            model, inputs, labels, ball, steps=request.attack_steps, step_size=2.5 * ball.eps / request.attack_steps,
            restarts=1, generator=draw,
        )  # fmt: skip
        before, after = (model(points).argmax(1) for points in (inputs, perturbed))
    captions = [[str(int(k)) for k in part] for part in (before, after)] + [[""] * len(labels)]
    rows = side_by_side(inputs, perturbed).flatten(0, 1)
    tiles = captioned(rows, [caption for row in captions for caption in row], scale=max(1, 64 // rows.shape[-1]))
    write_file(Path(request.out), png_bytes(image_grid(tiles, len(labels))))
    right, kept = int((before == labels).sum()), int((after == labels).sum())
    print(f"{len(labels)} samples, {right} right before and {kept} after the attack: {request.out}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a run's best or last checkpoint on the test set, clean and under an attack of any strength."""

    run_dir: str
    """Directory of the run."""
    which: Literal["best", "last"] = "best"
    """Checkpoint to take."""
    norm: Norm | None = None
    """Norm of the perturbation; none: the run's, like the next four."""
    eps: float | None = None
    """Its largest norm."""
    attack_steps: int | None = None
    """Gradient steps of the attack."""
    restarts: int | None = None
    """Random starts of the attack."""
    queries: int | None = None
    """Queries of the search without gradients; 0: no search."""
    seed: int | None = None
    """Seed of the starts and the search; none: that of the run's own test."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto."""

    def __post_init__(self) -> None:
        require_at_least(self, {"eps": 0, "attack_steps": 1, "restarts": 1, "queries": 0, "seed": 0})


def score(request: EvaluateConfig) -> None:
    """Print the scores that ``request`` asks for."""
    asked = {
        "norm": request.norm, "eps": request.eps, "test_attack_steps": request.attack_steps,
        "test_restarts": request.restarts, "test_queries": request.queries, "seed": request.seed,
    }  # fmt: skip
    changes = {name: value for name, value in asked.items() if value is not None}
    here: dict[str, Any] = {"accelerator": request.accelerator, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    config = config_of_run(AdversarialTrainingConfig, request.run_dir, **changes, **here)
    fabric, (_, _, data) = launch(config), load_data(config)
    model = network(config, data)
    model.load_state_dict(load_module(request.run_dir, "model", which=request.which))
    print(result_line(config, scores_on_test(fabric, config, fabric.setup_module(model), data)))


if __name__ == "__main__":
    sys.exit(
        command_line(
            AdversarialTrainingConfig,
            main,
            presets=PRESETS,
            verbs={"attack": (AttackConfig, attack), "evaluate": (EvaluateConfig, score)},
            description=__doc__,
        )
    )
