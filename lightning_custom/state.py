"""What a checkpoint of a state is: every field of a dataclass as tensors and plain containers under flat keys.

A state is a dataclass whose fields are modules, optimizers, tensors, generators, numbers, strings, anything with
``state_dict`` and ``load_state_dict``, and dicts or lists of these. A field whose content differs by process has
``item_state_dict`` and ``load_item_state_dict`` instead (:class:`ItemState`), or beside.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Set
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_custom.precision import unwrap
from lightning_custom.sharded import cut_optimizer_, gather_module, gather_optimizer, is_sharded, load_weights_, owner


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state of plain containers, such as a metric or an average of weights."""

    def state_dict(self) -> dict[str, Any]:
        """The state, as tensors and plain containers."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take over a state."""
        ...


@runtime_checkable
class ItemState(Protocol):
    """State that differs by process, stored by item, so that another number of processes can divide it anew."""

    def item_state_dict(self) -> dict[str, Any]:
        """This process's items, each under a name that no other process uses."""
        ...

    def load_item_state_dict(self, items: dict[str, Any], /) -> None:
        """Take one's own out of the items of all processes."""
        ...


@runtime_checkable
class SegmentState(Protocol):
    """State too large to be written anew at every save: it lies in files beside the checkpoints, which only grow."""

    def segments(self) -> dict[str, dict[str, Any]]:
        """The files that a checkpoint of now needs: path below the run's directory to ``size`` and ``sha256``.

        Both are of the beginning of the file that is used.
        """
        ...

    def keep_segments(self, names: set[str], /) -> None:
        """Delete, now or later, files that are no longer in use; not those of ``names``, which checkpoints need."""
        ...


def components(state: Any) -> dict[str, Any]:
    """The parts of ``state`` by flat name: its fields, and the entries of fields that are dicts or lists."""
    return {
        name: value
        for field in dataclasses.fields(state)
        for name, value in _parts(field.name, getattr(state, field.name))
    }


def modules(state: Any) -> dict[str, nn.Module]:
    """The modules among the parts of ``state``."""
    return {name: part for name, part in components(state).items() if isinstance(part, nn.Module)}


def _parts(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    entries: Any = ()
    if isinstance(value, dict):
        entries = value.items()
    elif isinstance(value, list):
        entries = list(enumerate(value))
    if entries and any(_is_live(entry) for _, entry in entries):
        for key, entry in entries:
            yield from _parts(f"{name}.{key}", entry)
    else:
        yield name, value


def _is_live(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_live, value.values()))
    if isinstance(value, list):
        return any(map(_is_live, value))
    return isinstance(value, (nn.Module, Optimizer, torch.Generator, Stateful, ItemState))


def capture(state: Any, *, gather: bool = True) -> dict[str, Any]:
    """The part of a checkpoint that every process shares: flat keys to tensors and plain containers.

    What is sharded is gathered on process 0, and absent on the others; with ``gather=False`` it stays in its parts.
    """
    captured: dict[str, Any] = {}
    parts = components(state)
    for name, value in parts.items():
        if isinstance(value, (Metric, MetricCollection)):
            raise TypeError(f"{name}: a torchmetrics metric stores nothing by itself; wrap it in MetricState")
        if isinstance(value, nn.Module):
            module = unwrap(value)
            content = gather_module(module) if gather and is_sharded(module) else module.state_dict()
            captured |= {f"{name}.{key}": to_plain(entry, name) for key, entry in content.items()}
        elif isinstance(value, Optimizer):
            captured[name] = to_plain(_optimizer_content(value, parts if gather else {}), name)
        elif isinstance(value, torch.Generator):
            captured[name] = value.get_state()
        elif isinstance(value, Stateful):
            captured[name] = to_plain(value.state_dict(), name)
        elif not isinstance(value, ItemState):
            captured[name] = to_plain(value, name)
    return captured


def _optimizer_content(wrapped: Optimizer, parts: dict[str, Any]) -> dict[str, Any]:
    optimizer = unwrap_optimizer(wrapped)
    sharded = owner(_raw_modules(parts), optimizer)
    content = optimizer.state_dict() if sharded is None else gather_optimizer(sharded, optimizer)
    return {"class": type(optimizer).__name__, **content}


def _raw_modules(parts: dict[str, Any]) -> list[nn.Module]:
    return [unwrap(part) for part in parts.values() if isinstance(part, nn.Module)]


def capture_items(state: Any) -> dict[str, dict[str, Any]]:
    """The part of a checkpoint that belongs to this process: component name to its items."""
    return {
        name: to_plain(value.item_state_dict(), name)
        for name, value in components(state).items()
        if isinstance(value, ItemState)
    }


def to_plain(value: Any, name: str) -> Any:
    """``value`` with NumPy's types turned to tensors and numbers; ``TypeError`` names what is not plain.

    Tensors are neither copied nor moved.
    """
    if value is None or isinstance(value, (Tensor, bool)):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    # The safe loader refuses subclasses, enumerations among them; str() of one of those is not its value.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, float)):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, bytes):
        return bytes(value)
    if isinstance(value, Mapping):
        return {to_plain(key, name): to_plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        entries = [to_plain(entry, f"{name}.{i}") for i, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    raise TypeError(
        f"{name}: a {type(value).__name__} cannot be in a checkpoint; keep tensors, numbers, strings and plain "
        "containers of them, or give the object state_dict and load_state_dict"
    )


def mismatches(state: Any, stored: Mapping[str, Any], items: Mapping[str, dict[str, Any]]) -> list[str]:
    """Why a checkpoint does not fit ``state``: keys, shapes and dtypes, a line each; empty where it fits."""
    parts, live = components(state), capture(state, gather=False)
    with_items = {name for name, part in parts.items() if isinstance(part, ItemState)}
    problems = _key_mismatches(live.keys(), stored.keys()) + _key_mismatches(with_items, items.keys())
    for name in sorted(live.keys() & stored.keys()):
        part = parts.get(name)
        if isinstance(part, Optimizer):
            problems += _optimizer_mismatches(name, live[name], stored[name])
        elif isinstance(part, dict) and isinstance(stored[name], dict):
            # Replaced as a whole, so that entries may come and go.
            for key in part.keys() & stored[name].keys():
                problems += _structure_mismatches(f"{name}.{key}", live[name][key], stored[name][key])
        else:
            problems += _structure_mismatches(name, live[name], stored[name])
    return problems


def _key_mismatches(live: Set[str], stored: Set[str]) -> list[str]:
    return [
        *(f"{name} is missing from the checkpoint" for name in sorted(live - stored)),
        *(f"{name} is not in the state" for name in sorted(stored - live)),
    ]


def _structure_mismatches(name: str, live: Any, stored: Any) -> list[str]:
    if isinstance(live, Tensor) and isinstance(stored, Tensor):
        if live.shape != stored.shape:
            return [f"{name} has shape {tuple(stored.shape)}, the state's has {tuple(live.shape)}"]
        if live.dtype != stored.dtype:
            return [f"{name} is {stored.dtype}, the state's is {live.dtype}"]
        return []
    if isinstance(live, dict) and isinstance(stored, dict):
        if live.keys() != stored.keys():
            difference = ", ".join(sorted(map(str, live.keys() ^ stored.keys())))
            return [f"{name}: only one of checkpoint and state has {difference}"]
        return [line for key in live for line in _structure_mismatches(f"{name}.{key}", live[key], stored[key])]
    if isinstance(live, Tensor) != isinstance(stored, Tensor) or isinstance(live, dict) != isinstance(stored, dict):
        return [f"{name} is a {type(stored).__name__}, the state's is a {type(live).__name__}"]
    return []


def _optimizer_mismatches(name: str, live: dict[str, Any], stored: Any) -> list[str]:
    if not isinstance(stored, dict) or not {"class", "state", "param_groups"} <= stored.keys():
        return [f"{name} is not an optimizer's state"]
    if stored["class"] != live["class"]:
        return [f"{name} is of {stored['class']}, the state's is of {live['class']}"]
    sizes = [[len(group["params"]) for group in side["param_groups"]] for side in (live, stored)]
    if sizes[0] != sizes[1]:
        return [f"{name} has parameter groups of {sizes[1]} parameters, the state's has {sizes[0]}"]
    # A fresh optimizer has no state yet; what it has must fit.
    return [
        line
        for key in live["state"].keys() & stored["state"].keys()
        for line in _structure_mismatches(f"{name}.state.{key}", live["state"][key], stored["state"][key])
    ]


def restore_(state: Any, stored: Mapping[str, Any], items: Mapping[str, dict[str, Any]]) -> None:
    """Write a checkpoint that fits (:func:`mismatches` found nothing) into the live objects of ``state``."""
    parts = components(state)
    for name, value in parts.items():
        if isinstance(value, nn.Module):
            _restore_module_(unwrap(value), name, stored)
        elif isinstance(value, Optimizer):
            _restore_optimizer_(unwrap_optimizer(value), stored[name], parts)
        elif isinstance(value, torch.Generator):
            value.set_state(stored[name])
        elif isinstance(value, Stateful):
            value.load_state_dict(stored[name])
        elif not isinstance(value, ItemState):
            _restore_plain_(state, name, value, stored[name])
        if isinstance(value, ItemState):
            value.load_item_state_dict(items.get(name, {}))


def _restore_module_(module: nn.Module, name: str, stored: Mapping[str, Any]) -> None:
    prefix = f"{name}."
    content = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    load_weights_(module, content)


def _restore_optimizer_(optimizer: Optimizer, stored: Mapping[str, Any], parts: dict[str, Any]) -> None:
    content = {key: stored[key] for key in ("state", "param_groups")}
    sharded = owner(_raw_modules(parts), optimizer)
    if sharded is None:
        optimizer.load_state_dict(content)
    else:
        cut_optimizer_(sharded, optimizer, content)


def _restore_plain_(state: Any, name: str, live: Any, value: Any) -> None:
    if isinstance(live, Tensor):
        with torch.no_grad():
            live.copy_(value)
        return
    value = _placed_like(live, value)
    field, _, path = name.partition(".")
    if path:
        _replace_entry_(getattr(state, field), path, value)
    else:
        object.__setattr__(state, field, value)


def _replace_entry_(holder: Any, path: str, value: Any) -> None:
    for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
        if path == str(key):
            holder[key] = value
        elif path.startswith(f"{key}."):
            _replace_entry_(holder[key], path.removeprefix(f"{key}."), value)


def _placed_like(live: Any, value: Any) -> Any:
    """``value`` with each tensor on the device of the one at the same place in ``live``."""
    if isinstance(value, Tensor):
        return value.to(live.device) if isinstance(live, Tensor) else value
    if isinstance(value, dict) and isinstance(live, dict):
        return {key: _placed_like(live.get(key), entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) and isinstance(live, (list, tuple)):
        lives = [*live, *[None] * len(value)]
        return type(value)(_placed_like(one, entry) for one, entry in zip(lives, value, strict=False))
    return value


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that was given to ``fabric.setup``; one that is not wrapped comes back as it is."""
    return getattr(optimizer, "optimizer", optimizer)
