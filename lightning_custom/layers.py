"""Parts of a network, by the names of their parameters."""

from collections.abc import Sequence

from torch import nn

from lightning_custom.errors import ConfigError


def head_of(module: nn.Module) -> str:
    """The beginning of the names of the last layer's parameters: of ``model.head``, or of the last layer with any.

    Empty for a module that is one layer.
    """
    if list(getattr(module, "head", nn.Identity()).parameters()):
        return "head."
    layers = [name for name, part in module.named_modules() if list(part.parameters(recurse=False))]
    return f"{layers[-1]}." if any(layers) else ""


def require_trainable(field: str, *networks: nn.Module) -> None:
    """:class:`ConfigError` where all parameters are frozen, or there are none, which torch says less clearly."""
    if not any(parameter.requires_grad for network in networks for parameter in network.parameters()):
        raise ConfigError(f"{field}: no parameter to train; give a network with some whose requires_grad is true")


def freeze_(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Keep the parameters whose names begin with one of ``prefixes`` as they are."""
    for prefix in prefixes:
        found = [parameter for name, parameter in module.named_parameters() if name.startswith(prefix)]
        if not found:
            raise ConfigError(f"frozen: no parameter's name begins with {prefix!r}; see model.named_parameters()")
        for parameter in found:
            parameter.requires_grad_(False)
