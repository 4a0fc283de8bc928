"""One step of a run again, from the checkpoint before it, with every module's outputs and gradients checked."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from lightning_custom import storage
from lightning_custom.errors import ConfigError, NonFiniteError
from lightning_custom.precision import unwrap
from lightning_custom.sharded import local_part

MARKER = ".replay"


def replay_folder(run_dir: Path, step: int) -> Path:
    """A new directory beside nothing of the run's, with its config and its newest checkpoint before ``step``.

    A run that goes on from it and stops at ``step`` does the same steps with the same bits, and leaves the original
    untouched. :class:`ConfigError` where ``run_dir`` holds no run.
    """
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"replay_step: {run_dir} holds no run; give the run's directory with --run_dir")
    folder = Path(tempfile.mkdtemp(prefix=f"replay-{step}-"))
    shutil.copy(run_dir / "config.yaml", folder)
    (folder / MARKER).write_text(f"{run_dir} {step}\n")
    earlier = [saved for saved in storage.saved_steps(run_dir / "checkpoints") if saved < step]
    if earlier:
        source = storage.step_folder(run_dir / "checkpoints", earlier[-1])
        shutil.copytree(source, storage.step_folder(folder / "checkpoints", earlier[-1]))
        for name in storage.read_manifest(source).get("segments", {}):
            # A copy, since the replay cuts and goes on with it.
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run_dir / name, folder / name)
    return folder


class FiniteGuard:
    """Stops at the first module whose output, or parameter whose gradient, is not finite; waits for the device.

    Meant for a replayed step, where the wait does not matter. ``modules`` are the parts of a state by name.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._handles: list[RemovableHandle] = []
        for part, module in modules.items():
            raw = unwrap(module)
            for name, layer in raw.named_modules():
                where = f"{part}.{name}" if name else part
                self._handles.append(layer.register_forward_hook(_check_output(where, type(layer).__name__)))
            for name, parameter in raw.named_parameters():
                if parameter.requires_grad:
                    hook = _check_gradient(f"{part}.{name}")
                    self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take the checks away."""
        for handle in self._handles:
            handle.remove()


def _check_output(where: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
    def check(layer: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not all(map(_is_finite, tensors)):
            raise NonFiniteError(f"the output of {where} ({kind}) is the first that is not finite")

    return check


def _check_gradient(where: str) -> Callable[[Tensor], None]:
    def check(parameter: Tensor) -> None:
        if parameter.grad is not None and not _is_finite(parameter.grad):
            raise NonFiniteError(f"the gradient of {where} is the first that is not finite")

    return check


def _is_finite(tensor: Tensor) -> bool:
    # Under torch.func a tensor has no value to ask for.
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return bool(local_part(tensor.detach()).isfinite().all())
