"""Numbers of which one is drawn in proportion to its size, in logarithmic time."""

from typing import Any

import numpy as np

from lightning_custom.environments.arrays import Array

# NumPy's calls cost more than what they do here: few levels of wide nodes are several times as fast as a binary tree.
FAN = 64


class SumTrees:
    """``trees`` trees of ``leaves`` numbers, at first 0, each node of which holds the sum of the 64 below it.

    Every operation takes several (tree, leaf) pairs at once. A node is always computed from all below it, so that sums
    do not drift, and depend on the leaves alone.
    """

    def __init__(self, trees: int, leaves: int) -> None:
        self.leaves = leaves
        sizes = [-(-leaves // FAN)]
        while sizes[0] > 1:
            sizes.insert(0, -(-sizes[0] // FAN))
        # From the root's children to the leaves, [trees, nodes above, 64] each.
        self._levels: list[np.ndarray[Any, np.dtype[np.float64]]] = [np.zeros((trees, size, FAN)) for size in sizes]
        self._changed: list[tuple[Array, Array]] = []

    def totals(self) -> Array:
        """The sum of each tree ``[trees]``."""
        self._add_up()
        totals: Array = self._levels[0][:, 0].sum(-1)
        return totals

    def get(self, trees: Array, leaves: Array) -> Array:
        """The numbers at those places."""
        values: Array = self._levels[-1][trees, leaves // FAN, leaves % FAN]
        return values

    def set_(self, trees: Array, leaves: Array, values: Array) -> None:
        """Replace the numbers at those places; of a place that is named twice the last counts."""
        self._levels[-1][trees, leaves // FAN, leaves % FAN] = values
        self._changed.append((trees, leaves))

    def _add_up(self) -> None:
        """Compute the nodes above what has changed."""
        if not self._changed:
            return
        trees, nodes = (np.concatenate(part) for part in zip(*self._changed, strict=True))
        self._changed.clear()
        for above, below in zip(self._levels[-2::-1], self._levels[:0:-1], strict=True):
            nodes = nodes // FAN
            above[trees, nodes // FAN, nodes % FAN] = below[trees, nodes].sum(-1)

    def find(self, trees: Array, sums: Array) -> Array:
        """For each of ``sums`` in [0, total) the first leaf up to which, itself included, more than that is summed.

        A leaf of 0 is never found, whatever the rounding, unless all are.
        """
        self._add_up()
        nodes, rest = np.zeros_like(trees), sums
        rows = np.arange(len(trees))
        for level in self._levels:
            below = level[trees, nodes]
            ends = below.cumsum(-1)
            last = FAN - 1 - (below[:, ::-1] > 0).argmax(-1)
            chosen = np.minimum((ends <= rest[:, None]).sum(-1), last)
            rest = rest - (ends[rows, chosen] - below[rows, chosen])
            nodes = nodes * FAN + chosen
        return nodes

    def values(self, tree: int) -> Array:
        """The leaves of one tree, copied."""
        values: Array = self._levels[-1][tree].ravel()[: self.leaves].copy()
        return values

    def load_(self, tree: int, values: Array) -> None:
        """Replace the first leaves of one tree by ``values``, the others by 0."""
        self._levels[-1][tree] = np.pad(values, (0, self._levels[-1][tree].size - len(values))).reshape(-1, FAN)
        for above, below in zip(self._levels[-2::-1], self._levels[:0:-1], strict=True):
            sums = below[tree].sum(-1)
            above[tree] = np.pad(sums, (0, above[tree].size - len(sums))).reshape(-1, FAN)
