"""Augmentation: which pixel goes where, what a gradient sees, and that the number of processes changes nothing."""

import pytest
import torch

from lightning_custom.augmentation import POLICIES, diff_augment, shift_and_flip
from lightning_custom.errors import ConfigError
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


def test_integers_are_flipped_and_not_shifted():
    whole = images().to(torch.uint8)
    for flip in (True, False):
        with pytest.raises(ConfigError, match=r"shift: 1, but images are torch\.uint8; give floats in "):
            shift_and_flip(single_process(), whole, shift=1, flip=flip, background=-1.0, generator=generator())
    flipped = shift_and_flip(single_process(), whole, shift=0, flip=True, background=-1.0, generator=generator())
    assert flipped.dtype == torch.uint8


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
    kinds = torch.cat([part, -part])  # as real and generated ones, for the same part of two batches
    first, second = diff_augment(fabric, kinds, POLICIES, shared, batches=2).chunk(2)
    return {"images": result, "first": first, "second": second, "next": torch.rand(1, generator=shared)}


@pytest.mark.distributed
def test_two_processes_change_their_parts_as_one_process_the_whole():
    first, second = in_processes(changed_part, 2)
    whole = changed_part(single_process())
    for kind in ("images", "first", "second"):
        assert torch.equal(torch.cat([first[kind], second[kind]]), whole[kind])
    assert first["next"] == second["next"] == whole["next"]


# DiffAugment


def augmented(batch, *policy, **options):
    return diff_augment(single_process(), batch, policy, generator(), **options)


def photographs(count=6, channels=3, height=16, width=8):
    return torch.rand(count, channels, height, width, generator=generator(1), dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("policy", [*POLICIES, "all"])
def test_at_strength_0_images_stay_as_they_are_and_at_1_they_do_not(policy):
    policy = POLICIES if policy == "all" else (policy,)
    batch = photographs()
    assert torch.equal(augmented(batch, *policy, strength=0.0), batch)
    assert not torch.equal(augmented(batch, *policy), batch)


def test_without_a_policy_nothing_is_drawn_and_the_same_tensor_comes_back():
    batch, draw = photographs(), generator()
    assert diff_augment(single_process(), batch, (), draw) is batch
    assert torch.equal(torch.rand(1, generator=draw), torch.rand(1, generator=generator()))


def test_translation_moves_by_up_to_an_eighth_of_each_side():
    batch = photographs(count=1).expand(600, -1, -1, -1)
    offsets = [(down, right) for down in range(-2, 3) for right in range(-1, 2)]
    expected = {offset: moved(batch[0], *offset, 0.0) for offset in offsets}
    found = [what_happened(result, expected) for result in augmented(batch, "translation")]
    counts = torch.tensor([found.count(offset) for offset in offsets])
    # 15 kinds of change, 40 of each expected; chi squared with 14 degrees of freedom is below 36.1 in 99.9%.
    assert ((counts - 40).square() / 40).sum() < 36.1


@pytest.mark.parametrize("height, width", [(8, 8), (10, 6)])
def test_cutout_empties_half_of_each_side_about_any_pixel(height, width):
    rows, columns = set(), set()
    for result in augmented(torch.ones(500, 1, height, width), "cutout")[:, 0]:
        empty = result == 0
        across, down = empty.any(0).nonzero().flatten(), empty.any(1).nonzero().flatten()
        assert torch.equal(empty, empty.any(1)[:, None] & empty.any(0))  # one rectangle
        assert len(down) == down[-1] - down[0] + 1
        rows.add((int(down[0]), int(down[-1])))
        columns.add((int(across[0]), int(across[-1])))
    for side, spans in ((height, rows), (width, columns)):
        size = side // 2
        firsts = range(-(size // 2), side - size % 2 - size // 2 + 1)
        assert spans == {(max(first, 0), min(first + size, side) - 1) for first in firsts}


def test_colour_changes_brightness_saturation_and_contrast_within_their_ranges():
    batch = photographs(count=400)
    result = augmented(batch, "color")
    means = result.mean((1, 2, 3)) - batch.mean((1, 2, 3))  # saturation and contrast keep the mean
    grey, grey_before = result.mean(1), batch.mean(1)  # saturation keeps the grey values
    contrast = grey.flatten(1).std(1) / grey_before.flatten(1).std(1)
    colour = (result - grey[:, None]).flatten(1).std(1) / (batch - grey_before[:, None]).flatten(1).std(1)
    for values, low, high in ((means, -0.5, 0.5), (contrast, 0.5, 1.5), (colour / contrast, 0.0, 2.0)):
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high >= values.max() > high - 0.02 * (high - low)


def test_gradients_through_every_part_are_finite_differences():
    batch = photographs(count=1, channels=2, height=4, width=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda images: augmented(images, *POLICIES), batch)
    assert torch.autograd.gradgradcheck(lambda images: augmented(images, *POLICIES).square(), batch)
    (gradient,) = torch.autograd.grad(augmented(batch, *POLICIES).sum(), batch)
    assert gradient.any()


@pytest.mark.parametrize(
    "policy, shape, text",
    [
        (("colour",), (2, 1, 4, 4), "colour is unknown; choose among color"),
        (("cutout",), (2, 5), "(2, 5) are no images"),
    ],
)
def test_an_unknown_part_or_samples_that_are_no_images_are_refused(policy, shape, text):
    with pytest.raises(ConfigError) as error:
        augmented(torch.zeros(shape), *policy)
    assert text in str(error.value)
