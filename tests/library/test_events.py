import io

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from lightning_custom.events import PATTERN, EventFile, image_value, png_bytes, scalar_value


def write(folder, steps, tag="a"):
    events = EventFile(folder)
    for step in steps:
        events.write(step, [scalar_value(tag, float(step))])
    return events


def points(folder, tag="a"):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_events_are_read_back_by_tensorboard(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert points(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_every_event_is_with_the_operating_system_when_write_returns(tmp_path):
    events = EventFile(tmp_path)
    for step in (1, 2):
        events.write(step, [scalar_value("a", 0.0)])
        assert len(points(tmp_path)) == step


def test_a_cut_leaves_one_file_with_what_is_not_past_it(tmp_path):
    write(tmp_path, range(1, 8))
    events = EventFile(tmp_path)
    events.cut(4)
    assert points(tmp_path) == [(i, float(i)) for i in range(1, 5)]
    events.write(5, [scalar_value("a", 50.0)])
    assert points(tmp_path)[-1] == (5, 50.0)
    assert len(list(tmp_path.glob(PATTERN))) == 1


def test_a_cut_keeps_the_time_of_every_event(tmp_path):
    write(tmp_path, [1, 2])

    def times():
        (path,) = tmp_path.glob(PATTERN)
        return [event.wall_time for event in EventFileLoader(str(path)).Load() if event.HasField("summary")]

    before = times()
    EventFile(tmp_path).cut(2)
    assert times() == before


def test_cutting_everything_leaves_nothing(tmp_path):
    write(tmp_path, [1, 2])
    EventFile(tmp_path).cut(None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", [1, 5, 20])
def test_a_record_cut_short_by_a_crash_ends_the_file(tmp_path, missing):
    write(tmp_path, [1, 2, 3])
    (path,) = tmp_path.glob(PATTERN)
    path.write_bytes(path.read_bytes()[:-missing])
    events = EventFile(tmp_path)
    events.cut(10)
    events.write(3, [scalar_value("a", 30.0)])
    assert points(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_crash_between_copying_and_deleting_doubles_nothing(tmp_path):
    """The old file is put back beside the cut one, as if it had not been deleted yet."""
    write(tmp_path, [1, 2, 3])
    (old,) = tmp_path.glob(PATTERN)
    content = old.read_bytes()
    EventFile(tmp_path).cut(2)
    for name in (old.name, "events.out.tfevents.0.a.1.0000", "events.out.tfevents.9999999999.z.9.0000"):
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes(content)
        EventFile(tmp_path).cut(2)
        assert points(tmp_path) == [(1, 1.0), (2, 2.0)], name


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_lossless(channels, tmp_path):
    pixels = torch.randint(0, 256, (channels, 5, 7), generator=torch.Generator().manual_seed(0))
    decoded = Image.open(io.BytesIO(png_bytes(pixels / 255)))
    assert decoded.size == (7, 5)
    array = torch.tensor(np.asarray(decoded)).view(5, 7, channels).permute(2, 0, 1)
    assert torch.equal(array, pixels)
    EventFile(tmp_path).write(1, [image_value("samples", pixels / 255)])
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (image,) = accumulator.Images("samples")
    assert (image.width, image.height) == (7, 5)
    assert image.encoded_image_string == png_bytes(pixels / 255)


def test_values_outside_the_range_are_clipped():
    decoded = Image.open(io.BytesIO(png_bytes(torch.tensor([[[-1.0, 0.5, 2.0]]]))))
    assert list(decoded.tobytes()) == [0, 128, 255]
