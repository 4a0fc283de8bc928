"""What a run says on the screen: a bar on a terminal, one plain line a flush elsewhere."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from lightning.fabric import Fabric
from tqdm import tqdm


class Progress:
    """A progress bar on a terminal, refreshed at most ten times a second; plain lines in a file or a pipe."""

    def __init__(self, fabric: Fabric, steps: int, *, unit: str = "step") -> None:
        self._steps = steps
        self._speaks = fabric.global_rank == 0
        self._shown = 0
        self._bar: tqdm[Any] | None = None
        if self._speaks and sys.stderr.isatty():
            self._bar = tqdm(total=steps, unit=unit, mininterval=0.1, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def show(self, step: int) -> None:
        """Move the bar to ``step``; the first one after more than one step says where a resumed run goes on."""
        if self._shown == 0 and step > 1 and self._speaks:
            tqdm.write(f"goes on from step {step - 1}")
            if self._bar is not None:
                # Its rate counts from here.
                self._bar.initial = self._bar.n = step - 1
        self._shown = step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def report(self, step: int, row: Mapping[str, float]) -> None:
        """Say the values of a row, beside the bar or as a line; tags of three parts are left to TensorBoard."""
        text = "  ".join(f"{tag} {value:.4g}" for tag, value in row.items() if tag.count("/") < 2)
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(text.split("  ")[:3]), refresh=False)
        elif self._speaks and row:
            print(f"step {step}/{self._steps}  {text}", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
