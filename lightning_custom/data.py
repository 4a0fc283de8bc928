"""Batches whose k-th is a function of (seed, k): resumable anywhere, the same for any number of processes."""

import atexit
import math
import random
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from lightning_custom.distributed import process_item, share
from lightning_custom.errors import ConfigError
from lightning_custom.loop import hash_seed
from lightning_custom.precision import narrowed
from lightning_custom.stopping import ignore_stop_signals


class Batches:
    """Endless training batches, on the device; one field of a state, so that a resumed run reads on.

    Numbers of float64, as NumPy makes them, come in torch's default dtype, float32, but in a run in ``64-true``.

    ``source`` is one of

    - a map-style dataset: batch k holds the samples at positions ``k * batch_size`` onwards of one endless
      sequence of shuffled passes, cut by process. Every batch is full and no sample is left out. Nothing but k is
      stored, and prefetching workers cannot shift it. A :class:`~torch.utils.data.TensorDataset` is indexed at once.
    - an iterable of batches (each process its own part). One with ``state_dict`` and ``load_state_dict`` is stored
      and restored; any other is read forward to its place on resume, with a warning. An iterable that ends is
      begun again. Batch k is drawn with the default generators seeded by (seed, k, process), so that a shuffling
      ``DataLoader`` read forward shuffles as before.

    ``batch_size`` is global, over all processes. ``seed_samples`` seeds the default generators by (seed, pass, index)
    for each sample of a map-style dataset, so that random augmentation inside the dataset depends on neither workers
    nor processes; False saves about 40 microseconds a sample. ``pass_size`` ends each pass over a map-style dataset
    after so many samples, whichever its order begins with; none: after all.
    """

    def __init__(
        self,
        fabric: Fabric,
        source: Any,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        seed_samples: bool = True,
        pass_size: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        multiprocessing_context: str | None = None,
    ) -> None:
        self.position = 0
        """Batches handed out so far."""
        self._fabric, self._seed = fabric, seed
        self._source = source
        self._is_map = hasattr(source, "__getitem__") and isinstance(source, Sized)
        self._iterator: Iterator[Any] | None = None
        self._in_place = False
        self._num_workers, self._multiprocessing_context = num_workers, multiprocessing_context
        self._collate = collate or default_collate
        if self._is_map:
            if len(source) == 0:
                raise ConfigError("dataset: it is empty; give one with at least one sample")
            share(batch_size, fabric, "batch_size")
            in_memory = num_workers == 0 and _is_plain(source, collate)
            seed_samples = seed_samples and type(source) is not TensorDataset
            self._dataset: Any = SeededSamples(source, seed) if seed_samples else source
            self._order = GlobalOrder(
                len(source), batch_size, seed, fabric.global_rank, fabric.world_size, pass_size=pass_size
            )
            self._tensors: tuple[Tensor, ...] | None = narrowed(fabric, source.tensors) if in_memory else None
            self._in_place = in_memory and all(tensor.device == fabric.device for tensor in source.tensors)

    def __iter__(self) -> Iterator[Any]:
        return self

    @property
    def passes(self) -> float:
        """How often a map-style dataset has been handed out, by all processes; of an iterable nan."""
        return self.position * self._order.batch_size / self._order.pass_size if self._is_map else math.nan

    def __next__(self) -> Any:
        """The next batch; its position counts as handed out."""
        batch = self._next_of_dataset() if self._is_map else self._next_of_iterable(self.position)
        self.position += 1
        # Fabric's walk through a batch takes up to 20 microseconds even where nothing has to move.
        return batch if self._in_place else move_data_to_device(batch, self._fabric.device)

    def _next_of_dataset(self) -> Any:
        if self._tensors is not None:
            index = self._order.index(self.position)
            # Several times as fast as tensor[index] where a sample is large.
            return [tensor.index_select(0, index.to(tensor.device)) for tensor in self._tensors]
        if self._iterator is None:
            loader = DataLoader(
                self._dataset,
                batch_sampler=_BatchesFrom(self._order, self.position, isinstance(self._dataset, SeededSamples)),
                collate_fn=self._collate,
                pin_memory=self._fabric.device.type == "cuda",
                worker_init_fn=_start_worker,
                # Fabric's own loader draws its base seed from the default generator.
                generator=torch.Generator(),
                num_workers=self._num_workers,
                multiprocessing_context=self._multiprocessing_context,
            )
            self._iterator = iter(loader)
            if self._num_workers:
                atexit.register(_end_workers, weakref.ref(self._iterator))
        return narrowed(self._fabric, next(self._iterator))

    def _next_of_iterable(self, position: int) -> Any:
        with _seeded(hash_seed(self._seed, position, "iterable", self._fabric.global_rank)):
            return narrowed(self._fabric, self._pull())

    def _pull(self) -> Any:
        for _ in range(2):
            if self._iterator is None:
                self._iterator = iter(self._source)
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = None
        raise ConfigError("dataset: the iterable yields nothing; give one with at least one batch")

    @property
    def _stored_source(self) -> Any:
        return None if self._is_map or not hasattr(self._source, "load_state_dict") else self._source

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been handed out."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a position; an iterable without a state of its own is read forward to it."""
        self.position, self._iterator = state_dict["position"], None
        if not self._is_map and self._stored_source is None and self.position:
            warnings.warn(
                f"dataset: a {type(self._source).__name__} has no state_dict; reading {self.position} batches forward",
                stacklevel=2,
            )
            for position in range(self.position):
                self._next_of_iterable(position)

    def item_state_dict(self) -> dict[str, Any]:
        """The iterable's own state, of this process."""
        if self._stored_source is None:
            return {}
        return {process_item(self._fabric): self._stored_source.state_dict()}

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Give the iterable its state back; it must resume on the same number of processes."""
        if self._stored_source is None:
            return
        if len(items) != self._fabric.world_size:
            raise ConfigError(
                f"devices: the data's state is of {len(items)} processes and cannot be divided among "
                f"{self._fabric.world_size}; resume on {len(items)}"
            )
        self._source.load_state_dict(items[process_item(self._fabric)])


class GlobalOrder:
    """Which samples batch k holds: an endless sequence of passes, each shuffled by ``(seed, pass)``."""

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        pass_size: int | None = None,
    ) -> None:
        if pass_size is not None and not 1 <= pass_size <= size:
            raise ConfigError(f"pass_size: {pass_size} of {size} samples; give 1 to {size}")
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.pass_size = pass_size or size
        self._part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._passes: dict[int, Tensor] = {}

    def batch(self, k: int) -> tuple[Tensor, Tensor]:
        """This process's part of batch k: the pass that each sample is of, and its index."""
        parts = self._parts(k)
        passes = torch.cat([torch.full_like(index, number) for number, index in parts])
        return passes, torch.cat([index for _, index in parts])

    def index(self, k: int) -> Tensor:
        """This process's part of batch k: the index of each sample."""
        parts = self._parts(k)
        return parts[0][1] if len(parts) == 1 else torch.cat([index for _, index in parts])

    def _parts(self, k: int) -> list[tuple[int, Tensor]]:
        """Which indices of which passes make this process's part of batch k; plain numbers, as every step asks."""
        start, stop = k * self.batch_size + self._part.start, k * self.batch_size + self._part.stop
        numbers = range(start // self.pass_size, (stop - 1) // self.pass_size + 1)
        self._passes = {number: self._pass(number) for number in numbers}
        return [
            (number, self._passes[number][max(start - number * self.pass_size, 0) : stop - number * self.pass_size])
            for number in numbers
        ]

    def _pass(self, number: int) -> Tensor:
        known = self._passes.get(number)
        if known is not None:
            return known
        generator = torch.Generator().manual_seed(hash_seed(self.seed, number, "order"))
        return torch.randperm(self.size, generator=generator)[: self.pass_size]


class _BatchesFrom(Sampler[list[Any]]):
    """The batches of an order from position k on, as DataLoader wants them."""

    def __init__(self, order: GlobalOrder, start: int, with_pass: bool) -> None:
        self._order, self._start, self._with_pass = order, start, with_pass

    def __iter__(self) -> Iterator[list[Any]]:
        k = self._start
        while True:
            passes, index = self._order.batch(k)
            yield (list(zip(passes.tolist(), index.tolist(), strict=True)) if self._with_pass else index.tolist())
            k += 1


class SeededSamples(Dataset[Any]):
    """A map-style dataset whose random augmentation is a function of (seed, pass, index).

    Indexed by ``(pass, index)``. The default generators of torch, NumPy and :mod:`random` are seeded for each sample
    and put back afterwards, at about 40 microseconds a sample.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        pass_number, index = key
        with _seeded(hash_seed(self.seed, pass_number, index, "sample")):
            return self.dataset[index]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block the CPU's default generators start from ``seed``; afterwards they are as before."""
    before = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def evaluation_batches(
    fabric: Fabric, dataset: Any, *, batch_size: int, collate: Callable[[list[Any]], Any] | None = None
) -> Iterable[Any]:
    """Every sample of a map-style dataset once, on the device, in order, nothing padded or left out.

    Numbers are of the dtypes of :class:`Batches`.

    Each process gets its part of each batch, so that all have the same number of batches and a model may communicate
    within one (FSDP). ``batch_size`` is global and the most; batches are of about equal size. Their parts may differ
    by a sample, so weigh means by it.
    """
    size, rank, processes = len(dataset), fabric.global_rank, fabric.world_size
    batches = -(-size // batch_size)
    for k in range(batches):
        start, stop = k * size // batches, (k + 1) * size // batches
        index = range(start + rank * (stop - start) // processes, start + (rank + 1) * (stop - start) // processes)
        if _is_plain(dataset, collate):
            batch: Any = [tensor[index.start : index.stop] for tensor in dataset.tensors]
        else:
            # A batch of fewer samples than processes: some get none, in tensors of the right shape.
            batch = (collate or default_collate)([dataset[i] for i in index or [start]])
            batch = batch if index else apply_to_collection(batch, Tensor, lambda tensor: tensor[:0])
        yield move_data_to_device(narrowed(fabric, batch), fabric.device)


def require_map_style(field: str, data: Any) -> None:
    """:class:`ConfigError` for data that cannot be indexed, which is better heard before a run than after it."""
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        hint = ", such as its own dataset" if isinstance(data, DataLoader) else ""
        raise ConfigError(f"{field}: a {type(data).__name__} cannot be indexed; give a map-style data set{hint}")


def value_range(dataset: Any, *, part: int = 0, looked_at: int = 100) -> tuple[float, float] | None:
    """The smallest and the largest number among a map-style data set's inputs, or another ``part`` of its samples.

    None where it cannot be indexed, or samples have no such part.

    Of all inputs of a ``TensorDataset``, and of ``looked_at`` evenly spread ones of another; of a ``DataLoader`` those
    of its data set.
    """
    dataset = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if isinstance(dataset, TensorDataset):
        inputs = list(dataset.tensors[part : part + 1])
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        places = sorted({round(i) for i in np.linspace(0, len(dataset) - 1, min(looked_at, len(dataset)))})
        items = [dataset[place] for place in places]
        samples = [item if isinstance(item, (tuple, list)) else (item,) for item in items]
        inputs = [torch.as_tensor(sample[part]) for sample in samples if part < len(sample)]
    else:
        return None
    inputs = [part for part in inputs if part.numel()]
    if not inputs:
        return None
    return min(float(part.min()) for part in inputs), max(float(part.max()) for part in inputs)


def sample_and_label(fabric: Fabric, batch: Any, batch_size: int, num_classes: int) -> tuple[Tensor, ...]:
    """The samples ``[B, ...]``, and unless ``num_classes`` is 0 the labels ``[B]``, out of this process's batch.

    :class:`ConfigError` for another size than its share of ``batch_size``, which what is drawn for the whole batch and
    cut by process relies on, and where there are no labels.
    """
    found = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    if len(found[0]) * fabric.world_size != batch_size:
        raise ConfigError(
            f"batch_size: {batch_size} over {fabric.world_size} processes, but the dataset yields batches of "
            f"{len(found[0])}; set it to the size of all processes' batches, and drop a last smaller one"
        )
    if num_classes and len(found) < 2:
        raise ConfigError(f"num_classes: {num_classes}, but the dataset has no labels; set it to 0")
    return found[:2] if num_classes else found[:1]


def _is_plain(dataset: Any, collate: Callable[[list[Any]], Any] | None) -> bool:
    # A subclass may augment; both containers are lists, as default_collate makes them.
    return type(dataset) is TensorDataset and collate is None


def _start_worker(worker: int) -> None:
    ignore_stop_signals()


def _end_workers(iterator: Any) -> None:
    # At exit multiprocessing would end them by a signal, which they ignore, and wait for them for ever.
    if iterator() is not None:
        iterator()._shutdown_workers()
