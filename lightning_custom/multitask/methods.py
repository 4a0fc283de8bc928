"""A weighting or an aggregator by the name that a config uses."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from lightning_custom.errors import ConfigError
from lightning_custom.multitask.adapter import TorchJD
from lightning_custom.multitask.aggregator import Aggregator
from lightning_custom.multitask.aggregators import AGGREGATORS
from lightning_custom.multitask.weighting import Weighting
from lightning_custom.multitask.weightings import WEIGHTINGS

Method = Literal[
    "equal", "static", "random", "uncertainty", "imtl-l", "geometric-mean", "scale-invariant", "dwa", "gradnorm",
    "famo", "pcgrad", "gradvac", "graddrop", "mgda", "cagrad", "upgrad", "dualproj", "imtl-g", "config", "nash-mtl",
    "aligned-mtl", "torchjd",
]  # fmt: skip
"""The weightings, which see losses, then the aggregators, which see gradients; torchjd is any of TorchJD's."""


def make_method(name: str, tasks: Sequence[str], options: Mapping[str, Any] | None = None) -> Weighting | Aggregator:
    """The weighting or aggregator ``name`` for ``tasks``, with the settings that its class takes.

    :class:`ConfigError` for a name or a setting that there is not.
    """
    options = dict(options or {})
    try:
        if name in WEIGHTINGS:
            return WEIGHTINGS[name](tasks, **options)
        if name in AGGREGATORS:
            return AGGREGATORS[name](**({"num_tasks": len(tasks)} if name == "gradvac" else {}), **options)
        if name == "torchjd":
            return TorchJD(**options)
    except TypeError as error:
        reason = str(error).partition("() ")[2] or str(error)
        raise ConfigError(f"method_options: {options} for {name}: {reason}; see the table of methods") from error
    raise ConfigError(f"method: {name!r} is unknown; there are {', '.join(get_args(Method))}")
