"""Tests for one's own loop: that it resumes to the bit, and that several processes give the run of one.

Both take ``run(fabric, config) -> state``, a function at the top of a module, and a config with small numbers.
"""

import dataclasses
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.config import C
from lightning_custom.distributed import ExplicitStrategy
from lightning_custom.launch import make_deterministic
from lightning_custom.metrics import ROWS, read_rows
from lightning_custom.precision import FullDouble
from lightning_custom.state import capture, capture_items, to_plain

Loop = Callable[[Fabric, C], Any]


def single_process(precision: str = "32-true") -> Fabric:
    """A Fabric on the CPU with one process."""
    make_deterministic(True)
    plugins: Any = {"plugins": [FullDouble()]} if precision == "64-true" else {"precision": precision}
    return Fabric(accelerator="cpu", devices=1, **plugins)


def in_processes(
    function: Callable[..., Any], processes: int, *arguments: Any, precision: str = "32-true"
) -> list[Any]:
    """``function(fabric, *arguments)`` on each of ``processes`` CPU processes; their results in order of rank.

    The function must be importable, its results tensors and plain containers. A failure of any raises here.
    """
    plugins: Any = {"plugins": [FullDouble()]} if precision == "64-true" else {"precision": precision}
    multiprocessing.set_forkserver_preload(["lightning.fabric", "lightning_custom.testing"])
    strategy = ExplicitStrategy(start_method="forkserver")
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy, **plugins)
    with tempfile.TemporaryDirectory() as folder:
        fabric.launch(_run_and_keep, function, folder, arguments)  # type: ignore[arg-type]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run_and_keep(fabric: Fabric, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    make_deterministic(True)
    fabric.barrier()  # process 0 must not end, and its store with it, before all have connected
    result = to_plain(function(fabric, *arguments), "result")
    torch.save(result, Path(folder) / f"{fabric.global_rank}.pt")


def assert_resumes_exactly(
    run: "Loop[C]", config: C, *, stop_at: int, folder: str | Path, precision: str = "32-true"
) -> None:
    """``run`` stopped after ``stop_at`` and started again equals one that never stopped: every bit, every row."""
    folder = Path(folder)
    _require_unused(folder / "straight", folder / "resumed")
    straight = run(single_process(precision), dataclasses.replace(config, run_dir=str(folder / "straight")))
    resumed_config = dataclasses.replace(config, run_dir=str(folder / "resumed"))
    stopped = run(single_process(precision), dataclasses.replace(resumed_config, stop_at=stop_at))
    assert stopped.step == stop_at, f"the run did not stop at {stop_at} but at {stopped.step}"
    resumed = run(single_process(precision), resumed_config)
    assert_states_equal(straight, resumed)
    assert_rows_equal(folder / "straight", folder / "resumed")


def _require_unused(*run_dirs: Path) -> None:
    """A run left by an earlier test would be gone on with, and prove nothing."""
    used = [run_dir for run_dir in run_dirs if run_dir.exists()]
    assert not used, f"folder: {used[0].parent} holds {used[0].name}, of an earlier test; give an empty one"


def assert_states_equal(expected: Any, actual: Any) -> None:
    """Every entry of two states is equal, tensors to the bit, what belongs to this process included."""
    for part in (capture, capture_items):
        difference = first_difference(part(expected), part(actual))
        assert difference is None, difference


def assert_rows_equal(expected: Path, actual: Path) -> None:
    """Two runs wrote the same rows of metrics, but for the ``time/*`` tags; both, or neither, wrote some."""
    exists = [(folder / ROWS).exists() for folder in (expected, actual)]
    assert exists[0] == exists[1], f"only one of {expected} and {actual} has {ROWS}"
    if exists[0]:
        rows = [_without_times(read_rows(folder)) for folder in (expected, actual)]
        for i, (one, other) in enumerate(zip(*rows, strict=False)):
            assert one == other, f"row {i}: {one} and {other}"
        assert len(rows[0]) == len(rows[1]), f"{len(rows[0])} and {len(rows[1])} rows"


def _without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {tag: value for tag, value in row.items() if not tag.startswith("time/") and tag != "charts/SPS"}
        for row in rows
    ]


def first_difference(expected: Any, actual: Any, name: str = "state") -> str | None:
    """Where two plain containers differ first, tensors compared to the bit; None where they do not."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            return f"{name}: {tuple(expected.shape)} {expected.dtype} and {tuple(actual.shape)} {actual.dtype}"
        same = torch.equal(_bits(expected), _bits(actual))
        return None if same else f"{name}: differs by up to {_distance(expected, actual):.3g}"
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if expected.keys() != actual.keys():
            return f"{name}: only one has {sorted(map(str, expected.keys() ^ actual.keys()))}"
        pairs = [(f"{name}.{key}", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        if len(expected) != len(actual):
            return f"{name}: {len(expected)} and {len(actual)} entries"
        pairs = [(f"{name}.{i}", one, other) for i, (one, other) in enumerate(zip(expected, actual, strict=True))]
    else:
        return None if expected == actual else f"{name}: {expected!r} and {actual!r}"
    found = (first_difference(one, other, key) for key, one, other in pairs)
    return next((difference for difference in found if difference is not None), None)


def _bits(tensor: Tensor) -> Tensor:
    # A copy, because the stride of an empty or expanded tensor may be 0.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _distance(expected: Tensor, actual: Tensor) -> float:
    return float((expected.detach().double() - actual.detach().double()).abs().max())


def assert_world_size_invariant(
    run: "Loop[C]", config: C, *, folder: str | Path, processes: int = 2, tolerance: float = 1e-9
) -> None:
    """``processes`` processes in float64 reach the parameters of one, within ``tolerance``, and agree to the bit."""
    _require_unused(*(Path(folder) / f"processes-{number}" for number in (1, processes)))
    one = in_processes(run_and_capture, 1, run, config, str(folder), precision="64-true")
    several = in_processes(run_and_capture, processes, run, config, str(folder), precision="64-true")
    for rank, captured in enumerate(several):
        difference = first_difference(several[0], captured)
        assert difference is None, f"processes 0 and {rank} differ: {difference}"
    largest = largest_difference(one[0], several[0])
    assert largest <= tolerance, f"{processes} processes differ from one by {largest:.3g}"


def run_and_capture(fabric: Fabric, run: "Loop[C]", config: C, folder: str) -> dict[str, Any]:
    """The tensors of the state that ``run`` ends with; its directory is below ``folder``, by number of processes."""
    run_dir = Path(folder) / f"processes-{fabric.world_size}"
    return capture(run(fabric, dataclasses.replace(config, run_dir=str(run_dir))))


def largest_difference(expected: Any, actual: Any) -> float:
    """The largest absolute difference between floating-point tensors at the same place, optimizers' own left out.

    What is not finite in either counts as infinitely different; places that only one has are an error.
    """
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        assert expected.shape == actual.shape, f"shapes {tuple(expected.shape)} and {tuple(actual.shape)}"
        if not expected.is_floating_point() or not expected.numel():
            return 0.0
        distance = _distance(expected, actual)
        return distance if math.isfinite(distance) else math.inf
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        assert expected.keys() == actual.keys(), f"only one has {sorted(map(str, expected.keys() ^ actual.keys()))}"
        if "param_groups" in expected:
            return 0.0
        pairs = [(expected[key], actual[key]) for key in expected]
    elif isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        pairs = list(zip(expected, actual, strict=True))
    else:
        return 0.0
    return max((largest_difference(one, other) for one, other in pairs), default=0.0)
