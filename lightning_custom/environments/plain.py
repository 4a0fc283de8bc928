"""Values of an environment as a checkpoint holds them, and back with the types they had.

A NumPy scalar has to come back as one: multiplied by a float32, a Python float keeps float32 and a float64 does not.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_stored(value: Any, name: str) -> Any:
    """``value`` as tensors and plain containers; ``TypeError`` names what cannot be.

    ``value`` is a number, string, bytes, a NumPy array, scalar or generator, or a list, tuple, deque or dict of these.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return _to_tensor(value, name)
    if isinstance(value, np.generic):
        return {"scalar": str(value) if isinstance(value, np.str_) else _to_tensor(np.asarray(value), name)}
    if isinstance(value, np.random.Generator):
        return {"generator": to_stored(value.bit_generator.state, name)}
    if type(value) is bytes:
        return {"bytes": torch.from_numpy(np.frombuffer(value, dtype=np.uint8).copy())}
    if type(value) in (list, tuple, deque):
        return {type(value).__name__: [to_stored(entry, f"{name}[{i}]") for i, entry in enumerate(value)]}
    if type(value) is dict:
        return {"dict": [[to_stored(key, name), to_stored(value[key], f"{name}[{key!r}]")] for key in value]}
    raise TypeError(f"{name} is a {type(value).__name__}, which is not plain")


def _to_tensor(array: np.ndarray[Any, Any], name: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:
        raise TypeError(f"{name} is an array of {array.dtype}, which is not plain") from None


def from_stored(stored: Any) -> Any:
    """The value that :func:`to_stored` made ``stored`` of; it shares no memory with it."""
    if isinstance(stored, Tensor):
        return stored.numpy().copy()
    if not isinstance(stored, dict):
        return stored
    ((kind, content),) = stored.items()
    if kind == "scalar":
        return np.str_(content) if isinstance(content, str) else content.numpy()[()]
    if kind == "generator":
        return _generator(from_stored(content))
    if kind == "bytes":
        return content.numpy().tobytes()
    if kind == "dict":
        return {from_stored(key): from_stored(value) for key, value in content}
    return _SEQUENCES[kind](map(from_stored, content))


_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "deque": deque}


def _generator(state: dict[str, Any]) -> np.random.Generator:
    bit_generator = getattr(np.random, state["bit_generator"])()
    bit_generator.state = state
    return np.random.Generator(bit_generator)
