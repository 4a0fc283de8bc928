"""Shifts and flips: which pixel goes where, and that the number of processes changes nothing."""

import pytest
import torch

from lightning_custom.augmentation import shift_and_flip
from lightning_custom.testing import in_processes, single_process


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=8, channels=2, height=5, width=4):
    return torch.arange(float(count * channels * height * width)).view(count, channels, height, width)


def moved(image, down, right, background):
    """``image`` with pixel (i, j) taken from (i + down, j + right)."""
    result = torch.full_like(image, background)
    height, width = image.shape[1:]
    for i in range(height):
        for j in range(width):
            if 0 <= i + down < height and 0 <= j + right < width:
                result[:, i, j] = image[:, i + down, j + right]
    return result


def candidates(image, shift, flip):
    """Everything that may become of an image, by (down, right, mirrored)."""
    offsets = range(-shift, shift + 1)
    shifted = {(down, right): moved(image, down, right, -1.0) for down in offsets for right in offsets}
    found = {(*offset, False): result for offset, result in shifted.items()}
    if flip:
        found |= {(*offset, True): result.flip(2) for offset, result in shifted.items()}
    return found


def what_happened(result, expected):
    (found,) = [key for key, other in expected.items() if torch.equal(result, other)]
    return found


def test_every_shift_and_flip_occurs_about_equally_often():
    batch = images(count=1).expand(3600, -1, -1, -1)
    results = shift_and_flip(single_process(), batch, shift=1, flip=True, background=-1.0, generator=generator())
    expected = candidates(batch[0], 1, True)
    changes = [what_happened(result, expected) for result in results]
    counts = torch.tensor([changes.count(key) for key in expected])
    # 18 kinds of change, 200 of each expected; chi squared with 17 degrees of freedom is below 40.8 in 99.9%.
    assert ((counts - 200).square() / 200).sum() < 40.8


def test_images_of_a_batch_change_each_for_itself():
    batch = images()
    results = shift_and_flip(single_process(), batch, shift=2, flip=True, background=-1.0, generator=generator())
    changes = [what_happened(one, candidates(image, 2, True)) for image, one in zip(batch, results, strict=True)]
    assert len(set(changes)) > 4


def test_without_shift_and_flip_images_stay_as_they_are():
    batch = images()
    results = shift_and_flip(single_process(), batch, shift=0, flip=False, background=-1.0, generator=generator())
    assert torch.equal(results, batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtype_and_layout_stay(dtype):
    batch = images().to(dtype)
    results = shift_and_flip(single_process(), batch, shift=1, flip=True, background=-1.0, generator=generator())
    assert (results.dtype, results.is_contiguous()) == (dtype, True)


def changed_part(fabric):
    part = images().chunk(fabric.world_size)[fabric.global_rank]
    shared = generator()
    result = shift_and_flip(fabric, part, shift=2, flip=True, background=-1.0, generator=shared)
    return {"images": result, "next": torch.rand(1, generator=shared)}


@pytest.mark.distributed
def test_two_processes_change_their_parts_as_one_process_the_whole():
    first, second = in_processes(changed_part, 2)
    whole = changed_part(single_process())
    assert torch.equal(torch.cat([first["images"], second["images"]]), whole["images"])
    assert first["next"] == second["next"] == whole["next"]
