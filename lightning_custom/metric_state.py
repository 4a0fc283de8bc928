"""torchmetrics in a checkpoint: sums, lists and update counts, which a metric's own ``state_dict`` leaves out."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running

from lightning_custom.distributed import divide_items, process_item
from lightning_custom.errors import ConfigError


class MetricState:
    """A torchmetrics ``Metric`` or ``MetricCollection`` as a field of a state, at any place in its accumulation.

        state.scores = MetricState(MetricCollection([...]), fabric)
        state.scores.metric.update(logits, labels)

    Every state of every metric inside, with its update count, is stored by process. On another number of processes
    the stored parts are dealt out and joined by each state's own reduction: sum, cat, max or min; with any other
    reduction :class:`ConfigError` asks for the number that stored it.
    """

    def __init__(self, metric: Metric | MetricCollection, fabric: Fabric) -> None:
        for part in metric.modules():
            if isinstance(part, (MetricTracker, MinMaxMetric, Running)):
                raise ConfigError(
                    f"metric: a {type(part).__name__} keeps part of its state outside torchmetrics' states, so it "
                    "cannot be resumed; use the metric inside it"
                )
        self.metric = metric.to(fabric.device)
        self._fabric = fabric

    def item_state_dict(self) -> dict[str, Any]:
        """The states and update counts of this process."""
        content = {
            name: {
                "updates": part._update_count,
                "states": {state: _clone(getattr(part, state)) for state in part._defaults},
            }
            for name, part in self._parts()
        }
        return {process_item(self._fabric): content}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Take over one's own states; on another number of processes, join those dealt out to this one."""
        parts = dict(self._parts())
        for stored in items.values():
            if stored.keys() != parts.keys():
                difference = ", ".join(sorted(stored.keys() ^ parts.keys()))
                raise ConfigError(f"metric: only one of checkpoint and state has {difference}; use the same metrics")
        if len(items) != self._fabric.world_size:
            for name, part in parts.items():
                _refuse_unknown_reductions(name, part, len(items), self._fabric.world_size)
        own = divide_items(self._fabric, items)
        for name, part in parts.items():
            part.reset()
            mine, everyone = [content[name] for content in own], [content[name] for content in items.values()]
            for state in part._defaults:
                values = [content["states"][state] for content in mine]
                kept = values[0] if len(values) == 1 else self._join(part, state, values, everyone)
                setattr(part, state, _moved(kept, self._fabric.device))
            updates = sum(content["updates"] for content in mine)
            # A process that got no part took part all the same: it must not warn that it was never updated.
            part._update_count = updates or int(any(content["updates"] for content in everyone))
            part._computed = None

    def _parts(self) -> Iterator[tuple[str, Metric]]:
        for module in self.metric.modules():
            if isinstance(module, MetricCollection):
                # Only the first metric of a compute group is updated; this gives the others its states.
                module.values(copy_state=False)
        for name, part in self.metric.named_modules():
            if isinstance(part, Metric):
                yield name, part

    def _join(self, part: Metric, state: str, values: Sequence[Any], everyone: Sequence[dict[str, Any]]) -> Any:
        if not values:
            return _nothing(getattr(part, state), [content["states"][state] for content in everyone])
        if isinstance(values[0], list):
            return [entry for value in values for entry in value]
        if part._reductions[state] is dim_zero_cat:
            return torch.cat([*values])
        stacked = torch.stack([*values])
        if part._reductions[state] is dim_zero_sum:
            return stacked.sum(0)
        return stacked.amax(0) if part._reductions[state] is dim_zero_max else stacked.amin(0)


def _refuse_unknown_reductions(name: str, part: Metric, stored: int, live: int) -> None:
    for state, reduction in part._reductions.items():
        if reduction not in (dim_zero_sum, dim_zero_cat, dim_zero_max, dim_zero_min):
            raise ConfigError(
                f"devices: {type(part).__name__}{f' {name!r}' if name else ''} has a state {state!r} that is neither "
                f"a sum, a list, a maximum nor a minimum; its parts of {stored} processes cannot be divided among "
                f"{live}; resume on {stored}"
            )


def _nothing(default: Any, stored: Sequence[Any]) -> Any:
    """The state of a process that has seen nothing: the default, or empty entries of the dtype of others'."""
    if not isinstance(default, list):
        return default
    # torchmetrics itself would send an empty float vector, which integer or [N, K] entries cannot be joined with.
    return next(([torch.atleast_1d(entry)[:0] for entry in entries[:1]] for entries in stored if entries), [])


def _clone(value: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return [entry.detach().clone() for entry in value] if isinstance(value, list) else value.detach().clone()


def _moved(value: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return [entry.to(device) for entry in value] if isinstance(value, list) else value.to(device)
