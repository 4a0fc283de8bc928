"""TensorBoard event files that can be cut at a step and continued."""

import io
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from lightning_custom.storage import fsync_file

PATTERN = "events.out.tfevents.*"
_CUT = ".cut"


class EventFile:
    """The events of one run directory, appended by one process without a thread; open only while it writes.

    A step's values go into one event, which costs about as much as one value alone.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def write(self, step: int, values: Iterable[Any]) -> None:
        """Append one event with ``values`` (``Summary.Value`` protos) and flush it to the operating system."""
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=list(values)))
        self._append([event.SerializeToString()])

    def _append(self, records: list[bytes]) -> None:
        if self._path is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path = _new_file(self._folder)
            records = [_header(), *records]
        _append_records(self._path, records)

    def sync(self) -> None:
        """Bring what was written to the disk."""
        if self._path is not None:
            fsync_file(self._path)

    def cut(self, step: int | None) -> None:
        """Drop every event past ``step`` (all of them for None): what is left moves to a new file.

        TensorBoard's own ``purge_step`` changes nothing in its servers, and a tag that is not logged again would
        stay as a ghost. Summaries that belong to no step, such as hyperparameters, have step 0 and survive.
        """
        self.close()
        old = sorted(self._folder.glob(PATTERN))
        current = [] if step is None else _current(old)
        # Equal bytes are one record: names of one second may stand in another order than the files were made.
        kept = dict.fromkeys(record for path in current for record in _records_until(path, step or 0))
        if kept:
            path = _new_file(self._folder)
            temporary = path.with_name(f".tmp-{path.name}")
            temporary.unlink(missing_ok=True)
            _append_records(temporary, [_header(), *kept])
            self._path = temporary.rename(f"{path}{_CUT}")
        for path in old:
            path.unlink()

    def close(self) -> None:
        """Let a later write start another file."""
        self._path = None


def _current(files: list[Path]) -> list[Path]:
    # kill -9 between a cut's two halves leaves the files that the cut one replaces.
    cut = [i for i, path in enumerate(files) if path.name.endswith(_CUT)]
    return files[cut[-1] :] if cut else files


def _header() -> bytes:
    header: bytes = Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()
    return header


def _append_records(path: Path, records: Iterable[bytes]) -> None:
    with path.open("ab") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)


def _new_file(folder: Path) -> Path:
    # TensorBoard reads the files of a folder in the order of their names.
    stem = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    number = 0
    while any(folder.glob(f"{(path := folder / f'{stem}.{number:04d}').name}*")):
        number += 1
    return path


def _records_until(path: Path, step: int) -> Iterator[bytes]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader  # slow to import

    # A record that kill -9 cut short ends the file, as TensorBoard reads it.
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        if event.HasField("summary") and event.step <= step:
            yield record


def scalar_value(tag: str, value: float) -> Any:
    """One point of a curve."""
    return Summary.Value(tag=tag, simple_value=value)


def image_value(tag: str, image: Tensor) -> Any:
    """A picture from ``[C, H, W]`` with C of 1 or 3, values in [0, 1]."""
    height, width = image.shape[-2:]
    encoded = Summary.Image(
        height=height, width=width, colorspace=image.shape[0], encoded_image_string=png_bytes(image)
    )
    return Summary.Value(tag=tag, image=encoded)


def png_bytes(image: Tensor) -> bytes:
    """``[C, H, W]`` with C of 1 or 3 and values in [0, 1], as PNG."""
    from PIL import Image

    pixels = image.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    array = pixels[0].numpy() if pixels.shape[0] == 1 else pixels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def histogram_value(tag: str, values: Tensor) -> Any:
    """A histogram of all entries of ``values`` that are finite; an empty one where none is."""
    entries = values.detach().double().flatten().cpu().numpy()
    finite = entries[np.isfinite(entries)]
    if not len(finite):
        return Summary.Value(tag=tag, histo=HistogramProto())
    counts, edges = np.histogram(finite, bins=64)
    content = HistogramProto(
        min=finite.min(),
        max=finite.max(),
        num=len(finite),
        sum=finite.sum(),
        sum_squares=np.square(finite).sum(),
        bucket_limit=edges[1:],
        bucket=counts,
    )
    return Summary.Value(tag=tag, histo=content)


def layout_values(charts: Mapping[str, Sequence[str]]) -> list[Any]:
    """What fills the Custom Scalars tab: charts by title, with the tags (regular expressions) that each shows."""
    from torch.utils.tensorboard.summary import custom_scalars

    layout = {"headline": {title: ["Multiline", list(tags)] for title, tags in charts.items()}}
    return list(custom_scalars(layout).value)


def hyperparameter_values(hyperparameters: Mapping[str, Any], metrics: Iterable[str]) -> list[Any]:
    """What fills the HPARAMS tab: the settings, and the tags of the scalars to show beside them."""
    from torch.utils.tensorboard.summary import hparams

    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in hyperparameters.items()
    }
    summaries = hparams(plain, dict.fromkeys(metrics, 0.0))
    # The last of the three says that the run has ended, which it has not.
    return [value for summary in summaries[:2] for value in summary.value]
