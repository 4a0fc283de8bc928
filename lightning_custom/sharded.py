"""Models that are sharded over processes (FSDP): gathered into the form of an unsharded one, and cut again."""

from collections.abc import Iterable
from typing import Any

from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def _torchs(function: str, *arguments: Any) -> Any:
    """What ``function`` of torch's own, for whole states, returns; it takes a tenth of a second to import."""
    from torch.distributed.checkpoint import state_dict

    full = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return getattr(state_dict, function)(*arguments, options=full)


def fully_sharded(processes: int) -> ModelParallelStrategy:
    """The strategy that shards every direct child of the model, and the model, over ``processes`` (torch's FSDP 2).

    It works on the CPU as well. Fabric's own ``fsdp`` is torch's first FSDP, which does not.
    """
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(model: nn.Module, mesh: Any) -> nn.Module:
    for child in model.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of ``module`` lies in parts on several processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all parts of a sharded one, which every process asks for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def owner(modules: Iterable[nn.Module], optimizer: Optimizer) -> nn.Module | None:
    """The sharded module among ``modules`` whose parameters ``optimizer`` updates, if any."""
    updated = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in modules:
        if is_sharded(module) and any(id(parameter) in updated for parameter in module.parameters()):
            return module
    return None


def gather_module(module: nn.Module) -> dict[str, Any]:
    """The whole state dict on the CPU of process 0, empty on the others; every process calls it."""
    content: dict[str, Any] = _torchs("get_model_state_dict", module)
    return content


def load_weights_(module: nn.Module, content: dict[str, Any]) -> None:
    """Load a whole state dict, which every process gives, into a module, sharded or not."""
    if is_sharded(module):
        _torchs("set_model_state_dict", module, dict(content))  # torch puts its parts into the dict it is given
    else:
        module.load_state_dict(content)


def gather_optimizer(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What ``optimizer.state_dict()`` would be without sharding, on process 0; every process calls it."""
    content = _torchs("get_optimizer_state_dict", module, optimizer)
    if not content:
        return {}
    names = [name for group in content["param_groups"] for name in group["params"]]
    index = {name: i for i, name in enumerate(names)}
    return {
        "state": {index[name]: entry for name, entry in content["state"].items()},
        "param_groups": optimizer.state_dict()["param_groups"],
    }


def cut_optimizer_(module: nn.Module, optimizer: Optimizer, content: dict[str, Any]) -> None:
    """Take this process's parts out of a whole optimizer state, as an unsharded optimizer stores it."""
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    names = [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in content["param_groups"]]
    named: Any = {"state": {names[i]: dict(entry) for i, entry in content["state"].items()}, "param_groups": groups}
    _torchs("set_optimizer_state_dict", module, optimizer, named)
