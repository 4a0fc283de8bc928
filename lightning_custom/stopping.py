"""Stop when a signal, a time limit or a step says so: at the same step on every process."""

import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_OUT_OF_TIME = -1


def ignore_stop_signals() -> None:
    """Leave stopping to the parent process; call it first in a worker of data or environments."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Stopper:
    """Turns the first stop signal into a request that all processes see after the same step.

    With several processes each step starts a reduction of the flag over a CPU group and the next step reads it,
    so that nothing waits for the device; with one process the flag is read. The first signal puts the handlers of
    before back, so that a second ends the process at once, even inside a long call of C code. Handlers are installed
    in the main thread only, and restored by :meth:`close` at the latest.
    """

    def __init__(self, fabric: Fabric, max_seconds: float | None = None) -> None:
        self.agreed = 0
        """0: go on; a signal's number, or -1 for the time limit: stop."""
        self._received = 0
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self._previous: dict[int, Any] = {}
        self._group = dist.new_group(backend="gloo") if fabric.world_size > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        self._restore_handlers()

    def poll(self) -> int:
        """Read what processes agreed on at the last step and start agreeing anew; call once a step, on all."""
        request = self._received or (
            _OUT_OF_TIME if self._deadline is not None and time.monotonic() >= self._deadline else 0
        )
        if self._group is None:
            self.agreed = request
        elif not self.agreed:
            if self._pending is not None:
                work, flag = self._pending
                work.wait()
                self.agreed = _decode(int(flag))
            self._pending = None if self.agreed else self._start(request)
        return self.agreed

    def _start(self, request: int) -> tuple[Any, torch.Tensor]:
        # MAX picks a signal, which has an exit status, over the time limit (1), over nothing (0).
        flag = torch.tensor(request + 1 if request > 0 else int(request == _OUT_OF_TIME))
        return dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag

    def finish(self) -> None:
        """Complete the agreement that is under way; only where every process comes here."""
        if self._pending is not None:
            self._pending[0].wait()
            self._pending = None

    def close(self) -> None:
        """Put back the signal handlers that were there before."""
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._previous = {}


def _decode(flag: int) -> int:
    return {0: 0, 1: _OUT_OF_TIME}.get(flag, flag - 1)
