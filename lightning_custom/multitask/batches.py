"""Batches of several tasks that have each a data set of their own."""

from bisect import bisect
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal

from lightning.fabric import Fabric

from lightning_custom.data import Batches
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed

Sampling = Literal["cycle", "shortest", "proportional", "temperature", "ratios"]


class TaskBatches:
    """Endless batches ``{task: batch}`` for tasks with data sets of different lengths; one field of a state.

    ``sampling`` says which tasks a step has:

    - ``cycle``: all; each begins its own data anew when it is through.
    - ``shortest``: all; each begins anew when the shortest is through, with other samples of the longer ones.
    - ``proportional``: one, drawn by the sizes of the data sets.
    - ``temperature``: one, drawn by the sizes to the power of ``1 / temperature`` (Arivazhagan et al. 2019): 1 is
      proportional, infinity is even.
    - ``ratios``: one, drawn by the ``ratios`` of the tasks, which need not sum to 1.

    Which one is drawn is a function of (seed, step), and batch k of a task one of (seed, task, k), so that a run
    resumes to the bit and is the same on any number of processes. ``sources`` and ``options`` are those of
    :class:`~lightning_custom.data.Batches`; by size can be drawn only what has one. ``batch_size`` is global, the
    same for all tasks or by task.
    """

    def __init__(
        self,
        fabric: Fabric,
        sources: Mapping[str, Any],
        *,
        batch_size: int | Mapping[str, int],
        seed: int,
        sampling: Sampling = "cycle",
        temperature: float = 1.0,
        ratios: Mapping[str, float] | None = None,
        **options: Any,
    ) -> None:
        sizes = batch_size if isinstance(batch_size, Mapping) else dict.fromkeys(sources, batch_size)
        _require_each("batch_size", sizes, sources)
        self.position = 0
        """Steps whose batches have been handed out."""
        self.probabilities = _probabilities(sampling, sources, temperature, ratios)
        """Of each task to be drawn; none where every step has all."""
        self._seed = seed
        # By name, so that the order of the mapping changes nothing.
        self._drawn = sorted(self.probabilities or {})
        self._bounds = list(accumulate((self.probabilities or {})[task] for task in self._drawn))
        shortest = _pass_sizes(sources, sizes) if sampling == "shortest" else {}
        self._batches = {
            task: Batches(
                fabric,
                source,
                batch_size=sizes[task],
                seed=hash_seed(seed, task),
                pass_size=shortest.get(task),
                **options,
            )
            for task, source in sources.items()
        }

    def tasks_of(self, step: int) -> list[str]:
        """The tasks that step ``step``, counted from 0, has a batch of."""
        if self.probabilities is None:
            return list(self._batches)
        number = hash_seed(self._seed, step, "task") / 2**32
        return [self._drawn[bisect(self._bounds, number)]]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The batches of the next step, by task."""
        batches = {task: next(self._batches[task]) for task in self.tasks_of(self.position)}
        self.position += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """How many steps, and how many batches of each task, have been handed out."""
        return {
            "position": self.position,
            "tasks": {task: batches.state_dict() for task, batches in self._batches.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position."""
        self.position = state_dict["position"]
        for task, batches in self._batches.items():
            batches.load_state_dict(state_dict["tasks"][task])

    def item_state_dict(self) -> dict[str, Any]:
        """The own state of each task's iterable, of this process."""
        return {
            f"{task}/{process}": item
            for task, batches in self._batches.items()
            for process, item in batches.item_state_dict().items()
        }

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Give the iterables their states back."""
        parts: dict[str, dict[str, Any]] = {task: {} for task in self._batches}
        for name, item in items.items():
            task, _, process = name.rpartition("/")
            parts[task][process] = item
        for task, batches in self._batches.items():
            batches.load_item_state_dict(parts[task])


def _probabilities(
    sampling: Sampling, sources: Mapping[str, Any], temperature: float, ratios: Mapping[str, float] | None
) -> dict[str, float] | None:
    if sampling in ("cycle", "shortest"):
        return None
    if sampling == "ratios":
        shares = dict(ratios or {})
        _require_each("ratios", shares, sources)
    elif sampling in ("proportional", "temperature"):
        if not temperature > 0:
            raise ConfigError(f"temperature: {temperature}; give a number above 0")
        power = 1 / temperature if sampling == "temperature" else 1.0
        sizes = _lengths(sources)
        # Relative to the largest, for small temperatures not to overflow.
        shares = {task: (size / max(sizes.values())) ** power for task, size in sizes.items()}
    else:
        raise ConfigError(f"sampling: {sampling!r}; choose cycle, shortest, proportional, temperature or ratios")
    if min(shares.values()) < 0 or not sum(shares.values()) > 0:
        raise ConfigError(f"ratios: {shares}; give numbers of at least 0, one of them above")
    return {task: share / sum(shares.values()) for task, share in shares.items()}


def _pass_sizes(sources: Mapping[str, Any], batch_sizes: Mapping[str, int]) -> dict[str, int]:
    """Samples of each task that are read while the task that ends first is read once."""
    lengths = _lengths(sources)
    return {
        task: max(1, min(lengths[other] * batch_sizes[task] // batch_sizes[other] for other in sources))
        for task in sources
    }


def _lengths(sources: Mapping[str, Any]) -> dict[str, int]:
    without = [task for task, source in sources.items() if not hasattr(source, "__len__")]
    if without:
        raise ConfigError(f"sampling: the data of task {without[0]!r} has no length; use cycle or ratios")
    return {task: len(source) for task, source in sources.items()}


def _require_each(field: str, given: Mapping[str, Any], sources: Mapping[str, Any]) -> None:
    if not sources or given.keys() != sources.keys():
        raise ConfigError(f"{field}: given for {', '.join(given) or 'none'}; the tasks are {', '.join(sources)}")
