"""Transitions of several environments, kept in files beside the checkpoints, drawn evenly or by priority."""

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from gymnasium import spaces
from lightning.fabric import Fabric
from torch import Tensor

from lightning_custom.distributed import share
from lightning_custom.environments.arrays import Array, Observations, kept_dtype
from lightning_custom.environments.vector import Environments, check_number, environment_item
from lightning_custom.errors import ConfigError
from lightning_custom.segments import Facts, Segments
from lightning_custom.storage import fsync_folder
from lightning_custom.sum_tree import SumTrees

SMALLEST_PRIORITY = 1e-6
"""Added to every temporal-difference error, so that no transition is lost for good."""


class Transitions(NamedTuple):
    """This process's part of a global batch: ``b`` transitions, as many as lie in its environments; maybe none."""

    observations: Any
    """``[b, ...]``, a tensor or a dict of tensors; float32 where the space is floating-point."""
    actions: Tensor
    """``[b, ...]``"""
    rewards: Tensor
    """``[b]`` float32: the discounted sum of up to n rewards."""
    next_observations: Any
    """What was seen after those."""
    discounts: Tensor
    """``[b]`` float32: the factor of the value of ``next_observations``; 0 where the episode terminated before."""
    weights: Tensor
    """``[b]`` float32: importance weights; 1 where all transitions are as probable."""
    positions: Tensor
    """``[b]``: their places in the global batch."""
    places: tuple[Array, Array]
    """Their environment and number, for :meth:`ReplayBuffer.update_priorities_`."""


class ReplayBuffer:
    """The last ``capacity`` transitions of all environments; this process holds those of its own.

        replay = ReplayBuffer(fabric, config.run_dir, capacity=10**6, num_envs=8, observation_space=..., ...)
        ...                                                  # a field of the state, restored with it
        replay.begin(envs.observations)                      # before the first step of this start of the program
        envs.step(actions)
        replay.add(actions, envs)
        batch = replay.sample(config.batch_size, rng.shared, n_step=3, discount=0.99)

    The batch is drawn for all processes together and each gets what lies in its environments, so that N processes
    learn from the transitions of one: sum a loss over the part, and multiply by ``world_size / batch_size``.

    On the disk each environment has two sequences that only grow (:class:`~lightning_custom.segments.Segments`): of
    observations, and of transitions, which name the place of theirs. What follows a transition is the observation
    after that place, also where an episode ended: its final observation comes in between. So none is stored twice, and
    an episode costs one observation beside its transitions; next to each other, a million of Atari's stacked frames
    would take 56 GB instead of 28. Where the next transition's place is not the next observation, another episode
    begins.

    Observations are read through memory maps; the rest of a transition, some tens of bytes, is in memory as well. A
    checkpoint has numbers, and names and checksums of files. With ``prioritised``, transitions are drawn in
    proportion to ``priority ** exponent`` (Schaul et al. 2016, proportional variant); then it has all priorities too,
    8 bytes a transition.

    Floating-point observations are kept in float32. ``capacity`` is cut to a multiple of ``num_envs``. A file has
    ``segment_size`` transitions of one environment; none: an eighth of them, a half with very many environments.
    """

    def __init__(
        self,
        fabric: Fabric,
        run_dir: str | Path | None,
        *,
        capacity: int,
        num_envs: int,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        prioritised: bool = False,
        exponent: float = 0.6,
        segment_size: int | None = None,
        folder: str = "replay",
    ) -> None:
        if run_dir is None:
            raise ConfigError("run_dir: none; give one, or call with_run_dir(fabric, config) first")
        if capacity < num_envs:
            raise ConfigError(f"capacity: {capacity}; {num_envs} environments need at least as much")
        count = share(num_envs, fabric, "num_envs")
        self._fabric, self.num_envs = fabric, num_envs
        self.indices = range(fabric.global_rank * count, (fabric.global_rank + 1) * count)
        """The environments of this process, among all."""
        self.capacity = capacity // num_envs
        """Transitions of each environment."""
        self._observation_dtype = _observation_dtype(observation_space)
        self._is_dict = isinstance(observation_space, spaces.Dict)
        action = (action_space.dtype, action_space.shape or ())
        self._transition_dtype = np.dtype(
            [("action", *action), ("reward", np.float64), ("terminated", np.bool_), ("place", np.int64)]
        )
        # One more than the capacity is kept on the disk, but each costs a draw some microseconds and a descriptor.
        size = segment_size or max(-(-self.capacity // min(max(32 // num_envs, 2), 8)), 1024)
        self._size = size
        root, names = Path(run_dir), [f"{folder}/{environment_item(index)}" for index in self.indices]
        self._observations = [Segments(root, name, "observations", self._observation_dtype, size) for name in names]
        self._transitions = [Segments(root, name, "transitions", self._transition_dtype, size) for name in names]
        # Small beside observations, and read n times as often: in memory too, by number modulo capacity.
        self._recent = np.zeros((count, self.capacity), self._transition_dtype)
        self._exponent = exponent
        self._trees = SumTrees(count, self.capacity) if prioritised else None
        self._largest = 1.0
        self._masses: Array | None = None

    @property
    def _sizes(self) -> Array:
        return np.array([transitions.count - transitions.start for transitions in self._transitions], np.float64)

    def begin(self, observations: Observations) -> None:
        """Note what the environments show; where it is what was seen last, as after an exact restore, nothing happens.

        Where environments could not be restored, another episode begins here, and the one before has no end.
        """
        for stored, record in zip(self._observations, self._observation_records(observations), strict=True):
            if stored.count == 0 or stored.take(np.array([stored.count - 1])).tobytes() != record:
                stored.append(record)

    def add(self, actions: Array, environments: Environments) -> None:
        """Keep what the step that ``environments`` have just done with ``actions`` ``[E, ...]`` brought."""
        seen = self._observation_records(environments.observations)
        ended = environments.terminated | environments.truncated
        final = self._observation_records(environments.final_observations) if ended.any() else seen
        places = [stored.count - 1 for stored in self._observations]
        rows = np.zeros(len(places), self._transition_dtype)
        rows["action"], rows["reward"], rows["terminated"] = actions, environments.rewards, environments.terminated
        rows["place"] = places
        records = _split(rows)
        added = np.flatnonzero(~environments.ignored)
        for i, observations in enumerate(self._observations):
            if ended[i]:
                observations.append(final[i])
            observations.append(seen[i])
        for i in added.tolist():
            self._recent[i, self._transitions[i].count % self.capacity] = rows[i]
            self._transitions[i].append(records[i])
        if self._trees is not None:
            numbers = np.array([self._transitions[i].count - 1 for i in added])
            self._trees.set_(added, numbers % self.capacity, np.full(len(added), self._largest**self._exponent))
        for i in added.tolist():
            self._forget(i)
        self._masses = None

    def _forget(self, i: int) -> None:
        """Let go of what is older than the capacity."""
        transitions = self._transitions[i]
        if transitions.count - transitions.start > self.capacity:
            transitions.drop_before(transitions.count - self.capacity)
            if transitions.start % self._size == 0:
                self._observations[i].drop_before(int(self._recent["place"][i, transitions.start % self.capacity]))

    def _observation_records(self, observations: Observations) -> list[bytes]:
        rows = np.empty(len(self._observations), self._observation_dtype)
        for name, array in observations.items() if isinstance(observations, dict) else [(_PLAIN, observations)]:
            rows[name] = array
        return _split(rows)

    def sample(
        self, batch_size: int, generator: torch.Generator, *, n_step: int = 1, discount: float = 0.99, beta: float = 0.0
    ) -> Transitions:
        """Draw a global batch, with replacement, by a ``generator`` that is equal on all processes.

        An n-step transition ends early where its episode does, or where the newest transition is: with the value of
        what was seen then, or without it if the episode terminated. ``beta`` is the exponent of the importance weights
        of a prioritised buffer, which are divided by the largest of the global batch.
        """
        positions, envs, numbers, probabilities = self._draw(batch_size, generator)
        window, lengths = self._follow(envs, numbers, n_step)
        factors = discount ** np.arange(n_step) * (np.arange(n_step) < lengths[:, None])
        last = window[np.arange(len(window)), lengths - 1]
        found = self._seen(envs.repeat(2), _places(window[:, 0], last))
        return Transitions(
            observations=self._tensors(found[0::2]),
            actions=self._tensor(window["action"][:, 0]),
            rewards=self._tensor((factors * window["reward"]).sum(1)),
            next_observations=self._tensors(found[1::2]),
            discounts=self._tensor(np.where(last["terminated"], 0.0, float(discount) ** lengths)),
            weights=self._tensor(self._importance(probabilities, beta)),
            positions=self._tensor(positions),
            places=(envs, numbers),
        )

    def _draw(self, batch_size: int, generator: torch.Generator) -> tuple[Array, Array, Array, Array]:
        """Positions in the batch, own environments, numbers of transitions, and probabilities ``[b]`` of one's part."""
        masses = self._all_masses()
        ends = np.cumsum(masses)
        if ends[-1] == 0:
            raise ConfigError("replay: it is empty; step the environments before the first sample")
        draws = torch.rand(batch_size, generator=generator, dtype=torch.float64).numpy()
        if self._trees is not None:
            draws = (np.arange(batch_size) + draws) / batch_size  # one of each equal part (Schaul et al. 2016, 3.3)
        sums = draws * ends[-1]
        environments = np.searchsorted(ends[:-1], sums, side="right")
        positions = np.flatnonzero((environments >= self.indices.start) & (environments < self.indices.stop))
        rest = sums[positions] - (ends - masses)[environments[positions]]
        envs = environments[positions] - self.indices.start
        starts = np.array([transitions.start for transitions in self._transitions])[envs]
        if self._trees is None:
            # Rounding may bring the difference to the size itself.
            rows = np.minimum(rest.astype(np.int64), masses[environments[positions]].astype(np.int64) - 1)
            return positions, envs, starts + rows, np.full(len(positions), 1 / ends[-1])
        leaves = self._trees.find(envs, rest)
        numbers = starts + (leaves - starts) % self.capacity
        return positions, envs, numbers, self._trees.get(envs, leaves) / ends[-1]

    def _all_masses(self) -> Array:
        """What every environment of the run weighs in a draw ``[num_envs]``; gathered once after a change."""
        if self._masses is None:
            own = self._sizes if self._trees is None else self._trees.totals()
            self._masses = self._over_processes(own)
        return self._masses

    def _over_processes(self, own: Array) -> Array:
        if self._fabric.world_size == 1:
            return own.copy()
        # MPS has no float64, and does not run in several processes.
        part = torch.from_numpy(own.copy()).to(self._fabric.device)
        parts = [torch.empty_like(part) for _ in range(self._fabric.world_size)]
        dist.all_gather(parts, part)
        return torch.cat(parts).cpu().numpy()

    def _follow(self, envs: Array, numbers: Array, n_step: int) -> tuple[Array, Array]:
        """Transitions ``[b, n]`` from each number on, and how many of them are of one episode."""
        counts = np.array([transitions.count for transitions in self._transitions])[envs]
        window = np.minimum(numbers[:, None] + np.arange(n_step), counts[:, None] - 1)
        found = self._recent[envs[:, None], window % self.capacity]
        # The newest transition stands in for those to come, at the same place as itself.
        goes_on = (np.diff(found["place"], axis=1) == 1) & ~found["terminated"][:, :-1]
        return found, 1 + np.cumprod(goes_on, axis=1, dtype=np.int64).sum(1)

    def _seen(self, envs: Array, places: Array) -> Array:
        """The observations at those places, as records ``[N]``."""
        if len(self._observations) == 1:
            return self._observations[0].take(places)
        found = np.empty(len(places), self._observation_dtype)
        for i in np.unique(envs).tolist():
            here = np.flatnonzero(envs == i)
            found[here] = self._observations[i].take(places[here])
        return found

    def _importance(self, probabilities: Array, beta: float) -> Array:
        if self._trees is None:
            return np.ones_like(probabilities)
        # Of size * probability, the size cancels.
        largest = self._over_processes(np.array([(1 / probabilities).max(initial=0.0)])).max()
        weights: Array = (1 / (probabilities * largest)) ** beta
        return weights

    def _tensors(self, records: Array) -> Any:
        found = {name: self._tensor(records[name]) for name in self._observation_dtype.names or ()}
        return found if self._is_dict else found[_PLAIN]

    def _tensor(self, array: Array) -> Tensor:
        # A copy in any case: strides within a record are no multiples of a number's size, which torch refuses.
        array = array.astype(np.float32 if array.dtype == np.float64 else array.dtype)
        return torch.from_numpy(array).to(self._fabric.device)

    def update_priorities_(self, places: tuple[Array, Array], errors: Tensor) -> None:
        """Make the absolute temporal-difference ``errors`` ``[b]`` the priorities of the transitions at ``places``.

        Every process calls it; nothing happens where the buffer is not prioritised.
        """
        if self._trees is None:
            return
        priorities = errors.detach().abs().double().cpu().numpy() + SMALLEST_PRIORITY
        envs, numbers = places
        self._trees.set_(envs, numbers % self.capacity, priorities**self._exponent)
        largest = priorities.max(initial=self._largest)
        self._largest = float(self._over_processes(np.array([largest])).max())
        self._masses = None

    def __len__(self) -> int:
        """Transitions of this process's environments."""
        return int(self._sizes.sum())

    # What a checkpoint needs

    def sync(self) -> None:
        """Bring everything to the disk."""
        for folder in {folder for sequence in self._sequences for folder in sequence.sync()}:
            fsync_folder(folder)

    @property
    def _sequences(self) -> list[Segments]:
        return [*self._observations, *self._transitions]

    def segments(self) -> Facts:
        """The files that this process's part needs, their sizes and checksums."""
        return {name: facts for sequence in self._sequences for name, facts in sequence.facts().items()}

    def keep_segments(self, names: set[str]) -> None:
        """Delete the files that hold nothing of the capacity, but for those that a checkpoint needs."""
        for sequence in self._sequences:
            sequence.keep(names)

    def resume_at(self, step: int | None) -> None:
        """Cut what is past the place in the files that was restored; None, for a fresh run, removes all."""
        for sequence in self._sequences:
            sequence.cut()

    def item_state_dict(self) -> dict[str, Any]:
        """Places, files and priorities of each environment of this process."""
        return {environment_item(index): self._item(i) for i, index in enumerate(self.indices)}

    def _item(self, i: int) -> dict[str, Any]:
        parts = {"observations": self._observations[i], "transitions": self._transitions[i]}
        item: dict[str, Any] = {
            name: {"start": part.start, "count": part.count, "files": part.facts()} for name, part in parts.items()
        }
        if self._trees is not None:
            used = min(self._transitions[i].count, self.capacity)
            item |= {"priorities": self._trees.values(i)[:used], "largest": self._largest}
        return item

    def load_item_state_dict(self, items: dict[str, Any]) -> None:
        """Go on with the transitions of ``items``, which hold every environment of the run.

        :class:`ConfigError` for another number of environments, :class:`CheckpointError` naming a file that differs.
        """
        check_number(items, self.num_envs)
        for i, index in enumerate(self.indices):
            item = items[environment_item(index)]
            for name, part in (("observations", self._observations[i]), ("transitions", self._transitions[i])):
                part.restore(item[name]["start"], item[name]["count"], item[name]["files"])
            transitions = self._transitions[i]
            numbers = np.arange(transitions.start, transitions.count)
            self._recent[i, numbers % self.capacity] = transitions.read(numbers)
            if self._trees is not None:
                self._trees.load_(i, item["priorities"].numpy())
                self._largest = item["largest"]
        self._masses = None


_PLAIN = "observation"


def _observation_dtype(space: gym.Space[Any]) -> np.dtype[Any]:
    parts = dict(space.spaces) if isinstance(space, spaces.Dict) else {_PLAIN: space}
    return np.dtype([(name, kept_dtype(part.dtype), part.shape or ()) for name, part in parts.items()])


def _split(rows: Array) -> list[bytes]:
    data, size = rows.tobytes(), rows.dtype.itemsize
    return [data[start : start + size] for start in range(0, len(data), size)]


def _places(first: Array, last: Array) -> Array:
    """Of each transition the place of its observation, and of the one after its last step, ``[2b]``."""
    return np.stack([first["place"], last["place"] + 1], axis=1).ravel()


def check_learning_starts(learning_starts: int, env_steps: int) -> None:
    """:class:`ConfigError` where a run of so many steps of all environments would end before its first update."""
    if 0 < env_steps <= learning_starts:
        raise ConfigError(
            f"learning_starts: {learning_starts}, but the run has {env_steps} environment steps and would make no "
            "update; lower it, or give more steps"
        )
