"""What recipes.gan does beside losses and penalties: parts of a batch, classes, schedules, ADA, dropout."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lightning_custom import compiled_gradient
from lightning_custom.data import Batches
from lightning_custom.errors import ConfigError
from lightning_custom.metrics import read_rows
from lightning_custom.networks import MLPDiscriminator, MLPGenerator
from lightning_custom.penalties import Verdict
from lightning_custom.state import capture
from lightning_custom.testing import assert_resumes_exactly, largest_difference, single_process
from recipes import gan
from tests.recipes.cases import ADA, CASES, run_gan

CONFIG = dataclasses.replace(CASES[0].config, steps=6, log_every=1, validate_every=0, checkpoint_every=0)


def run(folder, precision="64-true", **fields):
    config = dataclasses.replace(CONFIG, run_dir=str(folder), **fields)
    return run_gan(single_process(precision), config)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gp": 1.0, "penalty_every": 2, "d_steps": 2, "g_steps": 2},
        {"loss": "hinge", "auxiliary": 1.0, "augment": ("color", "translation"), "ada": ADA, "ada_images": 100.0},
    ],
    ids=["default", "lazy", "augmented"],
)
def test_a_batch_in_parts_gives_the_updates_of_the_whole(fields, tmp_path):
    whole, parts = (capture(run(tmp_path / str(n), accumulate=n, **fields)) for n in (1, 4))
    assert largest_difference(whole, parts) < 1e-10
    rows = [read_rows(tmp_path / str(n)) for n in (1, 4)]
    for one, other in zip(*rows, strict=True):
        losses = {tag: value for tag, value in one.items() if tag.startswith(("loss/", "ada/"))}
        assert {tag: other[tag] for tag in losses} == pytest.approx(losses, rel=1e-9)


def test_an_auxiliary_classifier_adds_its_cross_entropy_on_both_kinds_and_to_the_generator():
    config = dataclasses.replace(CONFIG, loss="hinge", auxiliary=3.0)
    logits = torch.zeros(4, dtype=torch.float64)
    classes = torch.tensor([[0.0, 1], [2, 0], [0, 0], [1, 4]], dtype=torch.float64)  # two real, two generated
    label = torch.tensor([0, 1])

    def entropy(right, wrong):
        return math.log1p(math.exp(wrong - right))

    real, fake = (entropy(0, 1) + entropy(0, 2)) / 2, (entropy(0, 0) + entropy(4, 1)) / 2
    found = gan.discriminator_losses(config, gan.LOSSES["hinge"], Verdict(logits, classes), [label])
    assert found["loss/discriminator_class"].item() == pytest.approx(3 * (real + fake), rel=1e-12)

    def judge(samples, label, draw, part):
        return Verdict(logits[:2], classes[2:])

    part = next(gan.parts(1, torch.Generator()))
    named = gan.generator_losses(config, gan.LOSSES["hinge"], judge, None, None, [label], torch.Generator(), part)
    assert named["loss/generator_class"].item() == pytest.approx(3 * fake, rel=1e-12)


def test_each_networks_learning_rate_follows_its_own_schedule(tmp_path):
    state = run(
        tmp_path, g_schedule="cosine", d_schedule="linear", warmup_steps=2, g_lr=0.01, d_lr=0.02, penalty_every=3
    )
    rows = [row for row in read_rows(tmp_path) if "lr/generator" in row]
    d_lr = 0.02 * 3 / 4
    cosine = [0.01 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert [row["lr/generator"] for row in rows] == pytest.approx([0, 0.005, *cosine])
    assert [row["lr/discriminator"] for row in rows] == pytest.approx(
        [0, d_lr / 2, *(d_lr * (1 - step / 4) for step in range(4))]
    )
    assert state.d_optimizer.param_groups[0]["lr"] == rows[-1]["lr/discriminator"]


@pytest.mark.parametrize("fields, is_fixed", [({"d_schedule": "cosine"}, True), ({"decay_steps": 9}, False)])
def test_steps_are_fixed_where_a_schedule_reads_them(fields, is_fixed, tmp_path):
    fields = {"d_schedule": "linear", **fields}
    run(tmp_path, **fields)
    if is_fixed:
        with pytest.raises(ConfigError, match="steps"):
            run(tmp_path, **{**fields, "steps": 8})
    else:
        assert run(tmp_path, **{**fields, "steps": 8}).step == 8


def test_adas_probability_follows_the_discriminator_in_a_run(tmp_path):
    # 8 images a step, a change every 4: up or down by 32 / 160.
    state = run(tmp_path, loss="nonsaturating", ada=ADA, ada_start=0.5, ada_images=160.0, steps=8, ada_target=-1.0)
    rows = [row["ada/p"] for row in read_rows(tmp_path) if "ada/p" in row]
    assert rows == pytest.approx([0.5] * 3 + [0.7] * 4 + [0.9])
    assert state.ada.p.item() == rows[-1]


class Dropping(nn.Module):
    """A discriminator with dropout behind its input."""

    def __init__(self, width):
        super().__init__()
        self.dropout, self.network = nn.Dropout(0.3), MLPDiscriminator(10, (1, 8, 8), width)

    def forward(self, image, label):
        return self.network(self.dropout(image), label)


def run_with_dropout(fabric, config):
    data = gan.load_data(config)
    torch.manual_seed(config.seed)
    generator = MLPGenerator(config.latent_size, 10, (1, 8, 8), config.width)
    return gan.train(fabric, config, generator=generator, discriminator=Dropping(config.width), dataset=data.dataset())


@pytest.mark.parametrize("stop_at", [5, 10])
def test_a_run_with_ada_lazy_penalties_parts_and_dropout_resumes_to_the_bit(stop_at, tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=14, loss="nonsaturating", ada=ADA, ada_images=100.0, penalty_every=3, accumulate=2, d_steps=2,
    )  # fmt: skip
    assert_resumes_exactly(run_with_dropout, config, stop_at=stop_at, folder=tmp_path)


def test_spectral_norm_resumes_to_the_bit_only_with_its_vectors(tmp_path, monkeypatch):
    fields = {"network": "dcgan", "width": 4, "spectral_norm": True, "gp": 1.0, "steps": 8, "log_every": 4}
    config = dataclasses.replace(CONFIG, **fields)
    assert_resumes_exactly(run_gan, config, stop_at=3, folder=tmp_path / "with")
    restore = gan.Checkpointer.restore

    def forgetful(self, state):
        before = {name: buffer.clone() for name, buffer in state.discriminator.named_buffers()}
        restore(self, state)
        for name, buffer in state.discriminator.named_buffers():
            buffer.copy_(before[name])

    monkeypatch.setattr(gan.Checkpointer, "restore", forgetful)
    with pytest.raises(AssertionError, match="differs by up to"):
        assert_resumes_exactly(run_gan, config, stop_at=3, folder=tmp_path / "without")


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"ada": ADA}, "ada: the sign of a logit means nothing to r3; choose nonsaturating"),
        ({"ada_start": 0.5}, "ada_start: 0.5, but nothing is augmented; set ada, or ada_start to 0"),
        ({"decay_steps": 9}, "decay_steps: 9, but both schedules are constant; set g_schedule or d_schedule"),
        ({"auxiliary": 1.0, "num_classes": 0}, "auxiliary: 1.0, but the discriminator has no classes"),
        ({"auxiliary": 1.0, "conditioning": "concatenation"}, "is told the class already"),
        ({"loss": "nonsense"}, "loss: 'nonsense'; choose one of r3, nonsaturating"),
        ({"accumulate": 2, "loss": "relativistic-average"}, "needs the mean logit of the whole batch"),
        ({"ada_target": -2.0}, "ada_target: -2.0"),
        ({"ada_start": 5.0}, "ada_start: 5.0; it must be at most 1"),
        ({"loss": "wasserstein", "r1": 0.0, "r2": 0.0}, "loss: wasserstein needs a discriminator of bounded slope"),
    ],
)
def test_what_says_nothing_together_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        gan.GANConfig(**fields)


def test_parts_that_are_not_equal_are_refused_before_anything_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(Batches, "__next__", lambda self: pytest.fail("a batch was drawn"))
    with pytest.raises(ConfigError, match="accumulate: 3, but batch_size 8"):
        run(tmp_path, accumulate=3)


def test_spectral_norm_on_branches_that_begin_at_zero_is_refused():
    config = dataclasses.replace(CONFIG, network="residual", width=4, spectral_norm=True)
    with pytest.raises(ConfigError, match=r"spectral_norm: .*is all zeros"):
        gan.networks(config, gan.load_data(config))


def test_channels_last_is_the_layout_of_the_weights_and_changes_no_result(tmp_path):
    states = [run(tmp_path / str(last), network="dcgan", width=4, channels_last=last) for last in (False, True)]
    assert largest_difference(*(capture(state) for state in states)) < 1e-9
    kernels = [part for part in states[1].discriminator.parameters() if part.dim() == 4 and part.shape[1] > 1]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in kernels)


# Compiled


@pytest.fixture
def recorded(monkeypatch):
    """The records that would be compiled, run as they are, which spares the compiler's half a minute."""
    records = []
    monkeypatch.setattr(compiled_gradient, "compile_graph", lambda record, examples: records.append(record) or record)
    return records


COMPILED = [
    {},
    {"loss": "hinge", "r2": 0.0},
    {"loss": "lsgan", "r1": 0.0, "r2": 0.0, "num_classes": 0},
    {"network": "dcgan", "width": 4, "auxiliary": 0.5, "conditioning": "projection", "d_steps": 2},
]


@pytest.mark.parametrize("fields", COMPILED)
def test_a_compiled_run_is_the_eager_one(recorded, fields, tmp_path):
    one, other = (run(tmp_path / str(on), "64-true", compile=on, **fields) for on in (False, True))
    assert len(recorded) == 1
    assert largest_difference(capture(one), capture(other)) < 1e-9
    rows = [read_rows(tmp_path / str(on)) for on in (False, True)]
    for eager, compiled in zip(*rows, strict=True):
        losses = {tag: value for tag, value in eager.items() if tag.startswith("loss/")}
        assert {tag: compiled[tag] for tag in losses} == pytest.approx(losses, rel=1e-9)


def test_the_penalty_is_in_the_compiled_gradient(recorded, tmp_path):
    one, other = (run(tmp_path / str(r1), "64-true", compile=True, r1=r1) for r1 in (0.5, 5.0))
    assert largest_difference(one.discriminator.state_dict(), other.discriminator.state_dict()) > 1e-4


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"augment": ("color",)}, "augment"),
        ({"loss": "hinge", "ada": ("blit",), "gp": 1.0}, "ada, gp"),
        ({"accumulate": 2}, "accumulate"),
        ({"penalty_every": 4}, "penalty_every"),
        ({"spectral_norm": True}, "spectral_norm"),
        ({"loss": "relativistic-average"}, "relativistic-average"),
    ],
)
def test_what_cannot_be_recorded_once_is_refused_with_compile(fields, named):
    with pytest.raises(ConfigError, match=f"compile: .*; leave out {named}, or --compile"):
        gan.GANConfig(compile=True, **fields)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_a_run_that_is_compiled_is_the_eager_one(tmp_path, monkeypatch):
    compile_graph, graphs = compiled_gradient.compile_graph, []

    def counted(record, examples):
        graphs.append(compile_graph(record, examples))
        return graphs[-1]

    monkeypatch.setattr(compiled_gradient, "compile_graph", counted)
    one, other = (run(tmp_path / str(on), compile=on, steps=3) for on in (False, True))
    assert len(graphs) == 1
    assert largest_difference(capture(one), capture(other)) < 1e-4
