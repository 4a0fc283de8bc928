"""One step again: the same bits, the run untouched, and the first module that is not finite by name."""

import hashlib

import pytest
import torch
from torch import nn

from lightning_custom.config import with_run_dir
from lightning_custom.errors import ConfigError, NonFiniteError
from lightning_custom.replay import FiniteGuard, replay_folder
from lightning_custom.storage import read_tensors, saved_steps, step_folder
from lightning_custom.testing import first_difference, single_process
from tests.library.counting_loop import CountingConfig, run


def contents(folder):
    """Every file under ``folder`` by its bytes and its time of change."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of 6 steps with the checkpoints of steps 2, 3, 4 and 6."""
    folder = tmp_path_factory.mktemp("original") / "run"
    for step, every in ((3, 0), (6, 2)):
        run(single_process(), CountingConfig(run_dir=str(folder), stop_at=step, checkpoint_every=every, keep=9))
    assert saved_steps(folder / "checkpoints") == [3, 4, 6]
    return folder


@pytest.mark.parametrize("step, begins", [(1, []), (3, []), (4, [3]), (5, [4]), (6, [4])])
def test_a_replay_begins_at_the_newest_checkpoint_before_its_step(original, step, begins):
    folder = replay_folder(original, step)
    assert saved_steps(folder / "checkpoints") == begins
    assert (folder / "config.yaml").read_bytes() == (original / "config.yaml").read_bytes()


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_replayed_step_ends_in_the_bits_of_the_run_and_leaves_the_run_alone(original, step):
    before = contents(original)
    config = with_run_dir(single_process(), CountingConfig(run_dir=str(original), replay_step=step))
    assert run(single_process(), config).step == step
    assert contents(original) == before
    states = [
        read_tensors(step_folder(folder / "checkpoints", step) / "state.pt")
        for folder in (original, type(original)(config.run_dir))
    ]
    assert first_difference(*states) is None


def test_the_folder_of_a_replay_is_decided_once(original):
    config = with_run_dir(single_process(), CountingConfig(run_dir=str(original), replay_step=5))
    assert config.run_dir != str(original)
    assert with_run_dir(single_process(), config) == config


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_that_the_run_has_not_is_refused(original, step):
    with pytest.raises(ConfigError, match=f"replay_step: {step}; the run has steps 1 to 6"):
        with_run_dir(single_process(), CountingConfig(run_dir=str(original), replay_step=step))


def test_a_replay_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        replay_folder(tmp_path, 3)
    with pytest.raises(ConfigError, match="give --run_dir"):
        with_run_dir(single_process(), CountingConfig(replay_step=3))


# The guard


class Recurrent(nn.Module):
    """Its first part puts out a tuple."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(2, 3)
        self.head = nn.Linear(3, 1)

    def forward(self, inputs):
        return self.head(self.memory(inputs)[0])


def deep():
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 1))


@pytest.mark.parametrize(
    "model, broken, message",
    [
        (deep(), "0", r"the output of net\.0 \(Linear\)"),
        (deep(), "1.0", r"the output of net\.1\.0 \(Linear\)"),
        (deep(), "2", r"the output of net\.2 \(Linear\)"),
        (nn.Linear(2, 1), "", r"the output of net \(Linear\)"),
        (Recurrent(), "memory", r"the output of net\.memory \(LSTM\)"),
    ],
)
def test_the_first_module_whose_output_is_not_finite_is_named(model, broken, message):
    next(model.get_submodule(broken).parameters()).data.view(-1)[0] = float("nan")
    guard = FiniteGuard({"net": model})
    with pytest.raises(NonFiniteError, match=f"^{message} is the first that is not finite$"):
        model(torch.ones(2, 2))
    guard.remove()
    assert model(torch.ones(2, 2)).isnan().any()


def test_a_gradient_that_is_not_finite_is_named_where_outputs_are_finite():
    model = deep()
    model[2].weight.data.fill_(0.0)
    model[2].bias.data.fill_(0.0)
    FiniteGuard({"net": model})
    loss = model(torch.ones(2, 2)).sum().sqrt()
    with pytest.raises(NonFiniteError, match=r"^the gradient of net\.2\.(weight|bias) is the first"):
        loss.backward()


def test_a_finite_step_passes_and_leaves_its_gradients():
    guarded, plain = deep(), deep()
    plain.load_state_dict(guarded.state_dict())
    FiniteGuard({"net": guarded})
    for model in (guarded, plain):
        model(torch.ones(2, 2)).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(guarded.parameters(), plain.parameters(), strict=True))


def test_modules_may_be_called_inside_torch_func():
    model = nn.Linear(2, 1)
    FiniteGuard({"net": model})
    parameters = dict(model.named_parameters())

    def output(parameters, sample):
        return torch.func.functional_call(model, parameters, sample).squeeze()

    per_sample = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))(parameters, torch.ones(4, 2))
    assert torch.equal(per_sample["weight"], torch.ones(4, 1, 2))


def test_a_replay_of_a_run_whose_config_changed_in_the_past_is_refused(original):
    config = with_run_dir(single_process(), CountingConfig(run_dir=str(original), replay_step=5, lr=9.0))
    with pytest.raises(ConfigError, match=r"another config: lr \(0\.1 -> 9\.0\)"):
        run(single_process(), config)
