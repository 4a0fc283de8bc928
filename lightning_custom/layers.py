"""Parts of a network, by the names of their parameters."""

from collections.abc import Sequence

from torch import nn

from lightning_custom.errors import ConfigError


def head_of(module: nn.Module) -> str:
    """The beginning of the names of the last layer's parameters: of ``model.head``, or of the last layer with any."""
    if hasattr(module, "head"):
        return "head."
    return f"{[name for name, part in module.named_modules() if list(part.parameters(recurse=False))][-1]}."


def freeze_(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Keep the parameters whose names begin with one of ``prefixes`` as they are."""
    for prefix in prefixes:
        found = [parameter for name, parameter in module.named_parameters() if name.startswith(prefix)]
        if not found:
            raise ConfigError(f"frozen: no parameter's name begins with {prefix!r}; see model.named_parameters()")
        for parameter in found:
            parameter.requires_grad_(False)
