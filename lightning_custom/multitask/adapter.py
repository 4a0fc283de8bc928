"""Aggregators of TorchJD, an optional extra, for methods that this package lacks; see :mod:`.aggregator`."""

import torch
from torch import Tensor, nn

from lightning_custom.errors import ConfigError


class TorchJD:
    """The aggregator ``name`` of ``torchjd.aggregation``, made with ``options``.

    Such as Krum and TrimmedMean, which outvote outlying gradients, or FairGrad. One direction and no weights to log.
    What it draws at random comes from the step's generator. One that remembers something between steps has no state to
    put into a checkpoint, and is refused: a resumed run would not be the same. :class:`ConfigError` for that, for a
    name that there is not, and where TorchJD or what the aggregator needs is not installed.

        TorchJD("Krum", n_byzantine=1)
    """

    def __init__(self, name: str, **options: object) -> None:
        try:
            from torchjd import aggregation
        except ImportError as error:
            raise ConfigError("method: torchjd is not installed; pip install torchjd") from error
        kind = getattr(aggregation, name, None)
        if not (isinstance(kind, type) and issubclass(kind, aggregation.Aggregator)):
            raise ConfigError(f"method_options: name {name!r} is no aggregator of torchjd; see torchjd.aggregation")
        try:
            self._aggregate: nn.Module = kind(**options)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"method_options: {name} of torchjd: {' '.join(str(error).split())}") from error
        # What its own interface calls a state can be reset, and is not in its state_dict.
        if any(hasattr(module, "reset") for module in self._aggregate.modules()):
            raise ConfigError(
                f"method_options: {name} of torchjd has a state that it cannot save, so that no run of it resumes; "
                "use a method of this package"
            )

    def direction(self, jacobian: Tensor, generator: torch.Generator) -> Tensor:
        """The direction ``[P]``."""
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.random.fork_rng([jacobian.device] if jacobian.is_cuda else []):
            torch.manual_seed(seed)
            found: Tensor = self._aggregate(jacobian)
        return found
