"""Programs in processes of their own, without the seconds that imports take."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch


class Forked:
    """``sys.exit(program(*arguments))`` in a process and a process group of its own, its output in the file ``log``.

    Forked from a server that has torch and Lightning imported. ``program`` must be importable.
    """

    def __init__(self, log: Path, program: Callable[..., int], *arguments: Any) -> None:
        self.log = log
        self.log.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lightning_custom.testing", "lightning_custom.cli"])
        self.process: ForkServerProcess = context.Process(target=_become, args=(str(log), program, arguments))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.text():
            waiting = self.process.is_alive() and time.monotonic() < deadline
            assert waiting, f"no {text!r} in: {self.text()}"
            time.sleep(0.01)

    def status(self, seconds: float = 60) -> int:
        """Exit status; minus the number of the signal that killed the process."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.text()}"
        return self.process.exitcode

    def __enter__(self) -> "Forked":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, 9)
        self.process.join()


def _become(log: str, program: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(program(*arguments))
