import dataclasses

import lightning
import pytest
import torch

from lightning_custom.config import RunConfig
from lightning_custom.launch import make_deterministic
from lightning_custom.machine import differences, machine_facts
from lightning_custom.testing import in_processes, single_process


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledConfig(RunConfig):
    compile: bool = False


def test_facts_are_those_of_this_machine():
    facts = machine_facts(single_process(), CompiledConfig(precision="bf16-true", compile=True))
    assert facts["torch"] == torch.__version__
    assert facts["lightning"] == lightning.__version__
    assert facts["cuda"] is None
    assert facts["device"].startswith("cpu ")
    assert facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert (facts["threads"], facts["processes"]) == (1, 1)
    assert (facts["precision"], facts["compile"], facts["deterministic"]) == ("bf16-true", True, True)


def test_equal_machines_do_not_differ():
    facts = machine_facts(single_process(), RunConfig())
    assert differences(facts, dict(facts)) == []


@pytest.mark.parametrize(
    "name, value", [("torch", "2.0"), ("threads", 64), ("cuda", "12.4"), ("processes", 8), ("cpu_capability", "VSX")]
)
def test_a_difference_is_named_with_both_sides(name, value):
    live = machine_facts(single_process(), RunConfig())
    assert differences({**live, name: value}, live) == [f"{name}: {value} -> {live[name]}"]


def test_a_fact_that_an_older_manifest_lacks_is_no_difference():
    live = machine_facts(single_process(), RunConfig())
    assert differences({"torch": live["torch"]}, live) == []


def test_determinism_is_a_fact():
    fabric = single_process()
    stored = machine_facts(fabric, RunConfig())
    make_deterministic(False)
    assert differences(stored, machine_facts(fabric, RunConfig())) == ["deterministic: True -> False"]


def count_processes(fabric):
    return machine_facts(fabric, RunConfig())["processes"]


@pytest.mark.distributed
def test_the_number_of_processes_is_a_fact():
    assert in_processes(count_processes, 2) == [2, 2]
