"""What hand-written training loops share: clock, state, checkpoints, metrics, data, processes.

The modules own no training loop; the loops are in :mod:`recipes`, and in your own files.
"""

__version__ = "0.1.0"
