"""Compare callables by running them in turn, so that what else the machine does hits all of them alike.

A B C A B C ... in many short rounds. A ratio is taken within each round, between neighbours in time, and its median
over the rounds is the result: one slow round moves neither.
"""

import contextlib
import io
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

Contender = Callable[[], float]
"""Does one round's work and returns the seconds that a step of it took."""


@dataclass(frozen=True)
class Result:
    """One contender against the first of its comparison."""

    name: str
    seconds: float
    """Median seconds a step."""
    ratio: float
    """Median over rounds of its time by the first's."""
    ratio_quartiles: tuple[float, float]
    """Half of the rounds have a ratio between these."""
    extra_seconds: float
    """Median over rounds of its time less the first's."""
    target: float | None = None
    """What the ratio should not exceed."""


def interleave(
    contenders: Mapping[str, Contender], rounds: int, *, targets: Mapping[str, float] | None = None
) -> list[Result]:
    """Run the contenders in turn for ``rounds`` rounds after one that does not count; the first is the reference."""
    if rounds < 2:
        raise ValueError(f"rounds: {rounds}; quartiles need at least 2")
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-1, rounds):
        for name, contender in contenders.items():
            seconds = contender()
            if number >= 0:
                times[name].append(seconds)
    reference = next(iter(times.values()))
    return [_result(name, own, reference, (targets or {}).get(name)) for name, own in times.items()]


def _result(name: str, times: Sequence[float], reference: Sequence[float], target: float | None) -> Result:
    ratios = [own / first for own, first in zip(times, reference, strict=True)]
    lower, _, upper = quantiles(ratios, n=4, method="inclusive")
    extra = median(own - first for own, first in zip(times, reference, strict=True))
    return Result(name, median(times), median(ratios), (lower, upper), extra, target)


def stopwatch(work: Callable[[], object], steps: int, clock: Callable[[], float]) -> Contender:
    """A contender that times ``work``, which does ``steps`` steps, on ``clock``."""

    def contender() -> float:
        started = clock()
        work()
        return (clock() - started) / steps

    return contender


def table(title: str, results: Sequence[Result]) -> str:
    """The results as lines of text, the reference first."""
    lines = [f"{title:<50} {'ms/step':>9} {'ratio':>7} {'quartiles':>13} {'extra us':>9}  target"]
    for result in results:
        lower, upper = result.ratio_quartiles
        target = "" if result.target is None else f"{result.target:.2f} {_verdict(result)}"
        line = (
            f"  {result.name:<48} {result.seconds * 1e3:9.3f} {result.ratio:7.3f} "
            f"{f'{lower:.3f}-{upper:.3f}':>13} {result.extra_seconds * 1e6:9.1f}  {target}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _verdict(result: Result) -> str:
    return "met" if result.target is None or result.ratio <= result.target else "MISSED"


def machine() -> str:
    """What the figures were taken on, in a line."""
    load = f", load {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{_processor()}, {os.cpu_count()} CPUs{load}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    )


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing within the block, yet pay for a progress bar as on a terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(_Terminal()):
        yield
