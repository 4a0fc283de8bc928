"""What is logged of the episodes that end."""

from collections.abc import Sequence

import torch
from lightning.fabric import Fabric

from lightning_custom.distributed import sum_over_processes
from lightning_custom.environments.vector import Episode
from lightning_custom.metrics import MetricLogger


def log_episodes(fabric: Fabric, metrics: MetricLogger, episodes: Sequence[Episode]) -> None:
    """Add the returns and lengths of ``episodes`` to the log's means, if any ended on any process; all call this."""
    number = torch.tensor(len(episodes), device=fabric.device)
    if int(sum_over_processes(fabric, number)):
        returns = [episode.episodic_return for episode in episodes]
        lengths: list[float] = [episode.length for episode in episodes]
        for tag, found in (("charts/episodic_return", returns), ("charts/episodic_length", lengths)):
            metrics.update({tag: sum(found) / max(len(found), 1)}, weight=len(found))
