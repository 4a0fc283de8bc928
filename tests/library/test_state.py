import copy
import enum
import pickle
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torchmetrics import MeanMetric

from lightning_custom.ema import EMA
from lightning_custom.state import capture, capture_items, components, mismatches, modules, restore_, to_plain
from lightning_custom.testing import first_difference


class Counter:
    """Has both a shared state and items of its own."""

    def __init__(self, count: int, items: dict[str, float]) -> None:
        self.count, self.items = count, items

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def item_state_dict(self) -> dict[str, Any]:
        return dict(self.items)

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        self.items = dict(items)


@dataclass
class FullState:
    network: nn.Module
    optimizer: Any
    schedule: Any
    average: EMA
    heads: dict[str, nn.Module]
    workers: list[Any]
    generator: torch.Generator
    weights: Tensor
    counter: Counter
    history: dict[str, Any] = field(default_factory=dict)
    best: float = 1.0
    name: str = "first"
    shape: tuple[int, ...] = (1, 2)
    step: int = 0


def full_state(seed: int) -> FullState:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = Adam(network.parameters(), lr=0.01 * (seed + 1))
    state = FullState(
        network,
        optimizer,
        StepLR(optimizer, 2),
        EMA(network, half_life=5.0),
        {"a.b": nn.Linear(1, 1), "c": nn.Linear(1, 2)},
        [nn.Linear(2, 2), {"seen": seed, 7: seed + 0.5}],
        torch.Generator().manual_seed(seed),
        torch.randn(3),
        Counter(seed, {f"item-{seed}": float(seed)}),
        {f"score-{seed}": [1.0, torch.ones(seed + 1)]},
        step=seed,
    )
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state.schedule.step()
    state.average.update_(batch_size=1, samples_seen=100)
    return state


def everything(state: Any) -> dict[str, Any]:
    return copy.deepcopy({"shared": capture(state), "items": capture_items(state)})


def test_keys_are_flat_and_values_plain():
    captured = capture(full_state(0))
    expected = {
        *(f"network.{key}" for key in full_state(0).network.state_dict()),
        "optimizer", "schedule", "average", "heads.a.b.weight", "heads.a.b.bias", "heads.c.weight", "heads.c.bias",
        "workers.0.weight", "workers.0.bias", "workers.1", "generator", "weights", "counter", "history", "best", "name",
        "shape", "step",
    }  # fmt: skip
    assert captured.keys() == expected
    assert captured["shape"] == (1, 2)
    assert captured["optimizer"]["class"] == "Adam"
    assert capture_items(full_state(0)) == {"counter": {"item-0": 0.0}}


def test_a_restored_state_equals_the_captured_one_in_every_part():
    source, target = full_state(1), full_state(2)
    taken = everything(source)
    assert first_difference(taken, everything(target)) is not None
    assert mismatches(target, taken["shared"], taken["items"]) == []
    weight, weights = target.network[0].weight, target.weights
    restore_(target, taken["shared"], taken["items"])
    assert first_difference(taken, everything(target)) is None
    assert target.network[0].weight is weight, "live tensors are filled, not replaced"
    assert target.weights is weights
    assert target.workers[1] == {"seen": 1, 7: 1.5}
    assert torch.equal(torch.randn(3, generator=source.generator), torch.randn(3, generator=target.generator))


def test_a_restored_state_does_not_share_memory_with_what_was_captured():
    source, target = full_state(1), full_state(2)
    taken = everything(source)
    restore_(target, taken["shared"], taken["items"])
    target.network[0].weight.data.zero_()
    target.weights.zero_()
    assert source.network[0].weight.abs().sum() > 0
    assert source.weights.abs().sum() > 0
    assert taken["shared"]["network.0.weight"].abs().sum() > 0


def test_fabrics_wrappers_leave_no_mark():
    fabric = Fabric(accelerator="cpu", devices=1)

    @dataclass
    class Pair:
        network: Any
        optimizer: Any

    def pair(wrap: bool) -> Pair:
        torch.manual_seed(0)
        network: Any = nn.Linear(2, 1)
        optimizer: Any = SGD(network.parameters(), lr=0.1, momentum=0.9)
        if wrap:
            network, optimizer = fabric.setup(network, optimizer)
        return Pair(network, optimizer)

    assert first_difference(capture(pair(True)), capture(pair(False))) is None
    assert mismatches(pair(True), capture(pair(False)), {}) == []


def test_modules_are_found_by_name():
    state = full_state(0)
    assert list(modules(state)) == ["network", "heads.a.b", "heads.c", "workers.0"]
    assert components(state)["workers.1"] is state.workers[1]


def test_entries_of_a_plain_dict_may_come_and_go():
    source, target = full_state(1), full_state(2)
    source.history = {"new": 1}
    target.history = {}
    taken = everything(source)
    assert mismatches(target, taken["shared"], taken["items"]) == []
    restore_(target, taken["shared"], taken["items"])
    assert target.history == {"new": 1}


def test_tensors_in_plain_containers_return_to_their_device():
    @dataclass
    class Sums:
        sums: Any

    on_meta = Sums({"a": torch.zeros(2, device="meta"), "b": [torch.zeros(1), torch.zeros(1, device="meta")]})
    restore_(on_meta, {"sums": {"a": torch.ones(2), "b": [torch.ones(1)] * 3}}, {})
    devices = [on_meta.sums["a"].device.type, *(entry.device.type for entry in on_meta.sums["b"])]
    assert devices == ["meta", "cpu", "meta", "cpu"]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda shared, items: shared.pop("network.0.weight"), "network.0.weight is missing from the checkpoint"),
        (lambda shared, items: shared.update(other=1), "other is not in the state"),
        (lambda shared, items: items.clear(), "counter is missing from the checkpoint"),
        (lambda shared, items: items.update(other={}), "other is not in the state"),
        (
            lambda shared, items: shared.update({"network.0.weight": torch.zeros(4, 9)}),
            "network.0.weight has shape (4, 9), the state's has (4, 3)",
        ),
        (
            lambda shared, items: shared.update(weights=torch.zeros(3, dtype=torch.float16)),
            "weights is torch.float16, the state's is torch.float32",
        ),
        (lambda shared, items: shared.update(weights=1.0), "weights is a float, the state's is a Tensor"),
        (
            lambda shared, items: shared["optimizer"].update({"class": "SGD"}),
            "optimizer is of SGD, the state's is of Adam",
        ),
        (lambda shared, items: shared.update(optimizer={}), "optimizer is not an optimizer's state"),
        (
            lambda shared, items: shared["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
            "optimizer.state.0.exp_avg has shape (1,), the state's has (4, 3)",
        ),
        (lambda shared, items: shared["counter"].update(more=1), "counter: only one of checkpoint and state has more"),
        (
            lambda shared, items: shared["average"].update({"0.weight": torch.zeros(1)}),
            "average.0.weight has shape (1,), the state's has (4, 3)",
        ),
    ],
)
def test_a_mismatch_is_one_line_that_names_it(change, words):
    state = full_state(1)
    taken = everything(state)
    change(taken["shared"], taken["items"])
    assert mismatches(state, taken["shared"], taken["items"]) == [words]


def test_numpy_becomes_plain():
    plain = to_plain({"a": np.arange(3), "b": np.float64(1.5), "c": (np.int32(2), [np.True_])}, "x")
    assert torch.equal(plain["a"], torch.arange(3))
    assert (plain["b"], plain["c"]) == (1.5, (2, [True]))
    assert [type(plain["b"]), type(plain["c"][0]), type(plain["c"][1][0])] == [float, int, bool]


class Phase(enum.IntEnum):
    WARM = 3


class Word(str, enum.Enum):  # noqa: UP042  # whose str() is not its value
    WARM = "warm"


def test_what_is_plain_is_read_by_the_safe_loader(tmp_path):
    value = {
        np.int64(1): np.float64(0.1),
        Phase.WARM: Phase.WARM,
        "size": torch.Size([1]),
        "name": np.str_("x"),
        "word": Word.WARM,
    }
    torch.save(to_plain(value, "x"), tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True) == {
        1: 0.1,
        3: 3,
        "size": (1,),
        "name": "x",
        "word": "warm",
    }
    torch.save(value, tmp_path / "as-it-is.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "as-it-is.pt", weights_only=True)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: None, nn.ReLU])
def test_what_is_not_plain_is_named_with_its_place(value):
    with pytest.raises(TypeError, match=r"^state\.a\.1: a \w+ cannot be in a checkpoint; keep tensors, numbers"):
        to_plain({"a": [0, value]}, "state")


def test_a_bare_metric_is_refused_since_it_would_store_nothing():
    @dataclass
    class WithMetric:
        accuracy: nn.Module
        step: int = 0

    with pytest.raises(TypeError, match="accuracy: a torchmetrics metric stores nothing by itself; wrap it in Metric"):
        capture(WithMetric(MeanMetric()))
