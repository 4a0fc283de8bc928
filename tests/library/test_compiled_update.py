"""A compiled update is the update of the lines that it stands for, and leaves the same checkpoint."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from lightning_custom import compiled_gradient
from lightning_custom.compiled_update import CompiledUpdate
from lightning_custom.distributed import mean_gradients_
from lightning_custom.errors import ConfigError
from lightning_custom.flat_adam import FlatAdam, flattened
from lightning_custom.gradients import clip_norm_
from lightning_custom.precision import bare, unwrap
from lightning_custom.state import unwrap_optimizer
from lightning_custom.testing import first_difference, in_processes, largest_difference, single_process

MAX_NORM, UPDATES = 0.05, 4


def set_up(fabric, **options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    module, optimizer = fabric.setup(module, FlatAdam(module.parameters(), 0.01, **options))
    flattened(optimizer)
    return module, optimizer


def compiled(fabric, loss, module, optimizer, **options):
    return CompiledUpdate(fabric, loss, module, unwrap_optimizer(optimizer), **options)


def batch(number, share=slice(None)):
    draw = torch.Generator().manual_seed(number)
    return [torch.randn(6, width, generator=draw, dtype=torch.float64)[share] for width in (3, 2)]


def loss(forward, inputs, targets):
    total = mse_loss(forward(inputs), targets)
    return total, {"loss": total.detach()}


def eager(fabric, module, optimizer, number, max_norm=MAX_NORM, share=slice(None)):
    optimizer.zero_grad()
    total, values = loss(bare(fabric, module), *batch(number, share))
    fabric.backward(total)
    mean_gradients_(fabric, module)
    if max_norm:
        clip_norm_([unwrap_optimizer(optimizer).vector], max_norm)
    optimizer.step()
    return values


def states(module, optimizer):
    return {"module": unwrap(module).state_dict(), "optimizer": unwrap_optimizer(optimizer).state_dict()["state"]}


@pytest.fixture
def recorded(monkeypatch):
    """What would be compiled is run as it was recorded, which spares the compiler's half a minute."""
    monkeypatch.setattr(compiled_gradient, "compile_graph", lambda record, examples: record)


@pytest.mark.parametrize("max_norm", [0.0, MAX_NORM, 1e3])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_those_of_the_lines_that_it_stands_for(recorded, max_norm, weight_decay):
    fabric = single_process("64-true")
    one, other = (set_up(fabric, weight_decay=weight_decay) for _ in range(2))
    update = compiled(fabric, loss, *other, max_norm=max_norm)
    for number in range(UPDATES):
        expected = eager(fabric, *one, number, max_norm)
        assert update(*batch(number))["loss"] == pytest.approx(float(expected["loss"]), rel=1e-12)
    assert largest_difference(states(*one), states(*other)) < 1e-12
    begun, _ = set_up(fabric)
    assert largest_difference(unwrap(begun).state_dict(), unwrap(one[0]).state_dict()) > 0.01


def test_the_clip_is_felt(recorded):
    fabric = single_process("64-true")
    clipped, free = (set_up(fabric, eps=1.0) for _ in range(2))  # with a large eps Adam sees the gradient's scale
    for agent, max_norm in ((clipped, MAX_NORM), (free, 0.0)):
        compiled(fabric, loss, *agent, max_norm=max_norm)(*batch(0))
    assert largest_difference(states(*clipped), states(*free)) > 1e-4


def test_a_run_goes_on_from_the_checkpoint_of_the_other_kind(recorded):
    """Two eager updates, two compiled, two eager: as six eager."""
    fabric = single_process("64-true")
    straight = set_up(fabric)
    for number in range(6):
        eager(fabric, *straight, number)
    kinds = [eager, None, eager]
    saved = None
    for part, kind in enumerate(kinds):
        module, optimizer = set_up(fabric)
        if saved is not None:
            unwrap(module).load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        update = compiled(fabric, loss, module, optimizer, max_norm=MAX_NORM) if kind is None else None
        for number in (2 * part, 2 * part + 1):
            update(*batch(number)) if update is not None else eager(fabric, module, optimizer, number)
        saved = deepcopy((unwrap(module).state_dict(), unwrap_optimizer(optimizer).state_dict()))
    assert largest_difference(states(*straight), states(module, optimizer)) < 1e-12


def test_weights_loaded_after_it_was_made_are_the_ones_that_are_updated(recorded):
    fabric = single_process("64-true")
    one, other = set_up(fabric), set_up(fabric)
    eager(fabric, *one, 7)
    update = compiled(fabric, loss, *other, max_norm=MAX_NORM)
    unwrap(other[0]).load_state_dict(unwrap(one[0]).state_dict())
    other[1].load_state_dict(deepcopy(unwrap_optimizer(one[1]).state_dict()))
    eager(fabric, *one, 8)
    update(*batch(8))
    assert largest_difference(states(*one), states(*other)) < 1e-12


def two_updates(fabric, share):
    module, optimizer = set_up(fabric)
    update = compiled(fabric, loss, module, optimizer, max_norm=MAX_NORM)
    own = share[fabric.global_rank] if fabric.world_size > 1 else slice(None)
    for number in range(2):
        update(*batch(number, own))
    return states(module, optimizer)


def two_recorded_updates(fabric, share):
    compiled_gradient.compile_graph = lambda record, examples: record  # this process is for this test alone
    return two_updates(fabric, share)


@pytest.mark.distributed
def test_two_processes_make_the_update_of_one(recorded):
    share = [slice(0, 3), slice(3, 6)]
    first, second = in_processes(two_recorded_updates, 2, share, precision="64-true")
    assert first_difference(first, second) is None
    assert largest_difference(first, two_updates(single_process("64-true"), share)) < 1e-12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of what it imports to compile
def test_a_compiled_update_is_compiled_and_the_eager_one():
    fabric, calls = single_process("64-true"), []

    def counted(forward, *given):
        calls.append(1)
        return loss(forward, *given)

    one, other = set_up(fabric), set_up(fabric)
    update = compiled(fabric, counted, *other, max_norm=MAX_NORM)
    for number in range(UPDATES):
        eager(fabric, *one, number)
        update(*batch(number))
    assert len(calls) == 1  # when it was recorded; no Python of the loss since
    assert largest_difference(states(*one), states(*other)) < 1e-12


def test_parameters_that_the_optimizer_lacks_are_refused():
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = flattened(FlatAdam(module[0].parameters()))
    with pytest.raises(ConfigError, match="compile: needs one optimizer with all parameters, none frozen; leave"):
        CompiledUpdate(single_process(), loss, single_process().setup(module), optimizer)
