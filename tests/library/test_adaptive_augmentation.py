"""ADA: what each change does and how often, derivatives of any order, and the controller."""

import math

import pytest
import torch

from lightning_custom.adaptive_augmentation import CATEGORIES, AdaptiveProbability, adaptive_augment, resampled
from lightning_custom.errors import ConfigError
from lightning_custom.parts import Part
from lightning_custom.testing import in_processes, single_process


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def photographs(count=6, channels=3, height=8, width=8):
    return torch.rand(count, channels, height, width, generator=generator(1), dtype=torch.float64) * 2 - 1


def augmented(batch, *categories, p=1.0, seed=0, **options):
    return adaptive_augment(single_process(), batch, categories, torch.tensor(p), generator(seed), **options)


@pytest.mark.parametrize("categories", [*((name,) for name in CATEGORIES), CATEGORIES], ids="-".join)
def test_at_p_0_images_keep_their_bits_and_at_p_1_they_do_not(categories):
    for channels in (1, 3):
        batch = photographs(channels=channels)
        assert torch.equal(augmented(batch, *categories, p=0.0), batch)
        assert (augmented(batch, *categories) != batch).any()


def test_without_categories_nothing_is_drawn():
    draw, batch = generator(), photographs()
    assert adaptive_augment(single_process(), batch, (), torch.tensor(1.0), draw) is batch
    assert torch.equal(torch.rand(1, generator=draw), torch.rand(1, generator=generator()))


def places(image):
    """The image with each of its turns and mirrorings."""
    return [torch.rot90(side, turns, (1, 2)) for side in (image, image.flip(2)) for turns in range(4)]


@pytest.mark.parametrize("p", [1.0, 0.4])
def test_blit_turns_mirrors_and_moves_by_whole_pixels_as_often_as_it_should(p):
    """On an image with a margin, moved back by its centre of mass; the eight placements have known frequencies."""
    image = torch.zeros(1, 12, 12, dtype=torch.float64)
    image[0, 4:8, 4:8] = photographs(1, 1, 4, 4)[0, 0] + 2
    count = 1000
    found = torch.zeros(8)
    moved = 0
    for result in augmented(image.expand(count, 1, 12, 12), "blit", p=p):
        inside = (result[0].abs() > 1e-6).nonzero()
        (top, left), (bottom, right) = inside.min(0).values, inside.max(0).values
        assert (bottom - top, right - left) == (3, 3)
        moved += (int(top), int(left)) != (4, 4)
        core = result[:, top : bottom + 1, left : right + 1]
        distances = torch.stack([(core - other).abs().max() for other in places(image[:, 4:8, 4:8])])
        assert distances.min() < 1e-9  # lossless
        found[distances.argmin()] += 1
    # Mirrored with p/2, each of three turns with p/4; each placement is one of the eight, once.
    turns = torch.tensor([1 - 3 * p / 4, p / 4, p / 4, p / 4])
    expected = count * torch.cat([(1 - p / 2) * turns, p / 2 * turns])
    assert ((found - expected).square() / expected).sum() < 24.3  # chi squared, 7 degrees of freedom, 99.9%
    # Up to an eighth of 12 pixels, rounded: two thirds of the numbers round to 0 or one pixel each way.
    stays = (1 / 3) ** 2
    assert moved / count == pytest.approx(p * (1 - stays), abs=0.05)


def test_resampling_reads_where_the_matrix_says_and_mirrors_beyond_the_border():
    image = torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4)
    right_by_one = torch.tensor([[[1, 0, 1.0], [0, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    columns = [1, 2, 3, 3]  # half a pixel beyond the border it comes back
    torch.testing.assert_close(resampled(image, right_by_one), image[..., columns], rtol=0, atol=1e-12)
    half = torch.tensor([[[1, 0, 0.5], [0, 1, 0], [0, 0, 1]]], dtype=torch.float64)
    torch.testing.assert_close(resampled(image, half)[..., :3], image[..., :3] + 0.5, rtol=0, atol=1e-12)


def test_a_rotation_keeps_what_is_round():
    """``exp(-r^2)`` about the middle does not change under rotations; scaling would change its width."""
    places = torch.arange(33, dtype=torch.float64) - 16
    blob = torch.exp(-(places[:, None] ** 2 + places**2) / 32)[None, None]
    angle = torch.tensor(0.7, dtype=torch.float64)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    matrix = torch.eye(3, dtype=torch.float64)[None].clone()
    matrix[0, :2, :2] = rotation
    middle = (..., slice(8, 25), slice(8, 25))  # what was mirrored at the corners turns up outside
    assert (resampled(blob, matrix) - blob)[middle].abs().max() < 0.02
    matrix[0, :2, :2] = 2 * torch.eye(2)
    assert (resampled(blob, matrix) - blob)[middle].abs().max() > 0.2


def test_geometry_scales_the_area_as_published():
    """log2 of a uniform scale is normal with deviation 0.2 at p = 1, and the stretch keeps the area."""
    places = torch.arange(48, dtype=torch.float64) - 23.5
    blob = torch.exp(-(places[:, None] ** 2 + places**2) / 32)[None, None]
    areas = augmented(blob.expand(400, 1, 48, 48), "geometry").sum((1, 2, 3)) / blob.sum()
    scales = areas.log2() / 2
    # What moves over the border, where it is mirrored, spoils the tails.
    assert scales.median().item() == pytest.approx(0, abs=0.05)
    assert (scales.quantile(0.75) - scales.quantile(0.25)).item() == pytest.approx(0.2 * 1.349, rel=0.2)


def test_colour_is_affine_in_the_pixel_and_hue_and_saturation_keep_grey():
    for seed in range(5):
        red, green, blue, black, sum_ = torch.tensor(
            [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.float64
        )
        pixels = torch.stack([red, green, blue, black, sum_], 1).view(1, 3, 1, 5)
        result = augmented(pixels, "color", seed=seed)[0, :, 0]
        basis = result[:, :3] - result[:, 3:4]
        torch.testing.assert_close(result[:, 4], result[:, 3] + basis.sum(1), rtol=0, atol=1e-9)
        # Brightness adds to all three alike; grey stays grey.
        assert result[:, 3].std() < 1e-9
        assert result[:, 4].std() < 1e-9


def test_colour_of_one_channel_is_brightness_contrast_and_negative():
    pixels = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 2).expand(4000, 1, 1, 2)
    low, high = augmented(pixels, "color")[:, 0, 0].unbind(1)
    slope = high - low
    assert (slope < 0).double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert slope.abs().log2().std().item() == pytest.approx(0.5, abs=0.03)
    assert (low / slope.abs()).std().item() == pytest.approx(0.2, abs=0.02)


def test_gradients_and_their_gradients_are_finite_differences():
    batch = photographs(count=1, height=4, width=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda images: augmented(images, *CATEGORIES), batch)
    assert torch.autograd.gradgradcheck(lambda images: augmented(images, *CATEGORIES).pow(3), batch)


def changed_part(fabric):
    part = photographs().chunk(fabric.world_size)[fabric.global_rank]
    kinds = torch.cat([part, -part])
    draw = generator()
    result = adaptive_augment(fabric, kinds, CATEGORIES, torch.tensor(0.6), draw, batches=2)
    return {"kinds": result.chunk(2), "next": torch.rand(1, generator=draw)}


@pytest.mark.distributed
def test_two_processes_change_their_parts_as_one_process_the_whole():
    whole = changed_part(single_process())
    first, second = in_processes(changed_part, 2)
    for kind in range(2):
        joined = torch.cat([first["kinds"][kind], second["kinds"][kind]])
        torch.testing.assert_close(joined, whole["kinds"][kind], rtol=0, atol=1e-12)
    assert first["next"] == second["next"] == whole["next"]


def test_parts_are_changed_as_the_whole():
    batch = photographs()
    whole = augmented(torch.cat([batch, -batch]), *CATEGORIES, p=0.6, batches=2)
    found = []
    for index in range(2):
        own = Part(index, 2).of(batch)
        found.append(augmented(torch.cat([own, -own]), *CATEGORIES, p=0.6, batches=2, part=Part(index, 2)).chunk(2))
    joined = torch.cat([found[0][0], found[1][0], found[0][1], found[1][1]])
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "categories, shape, text",
    [
        (("filter",), (2, 1, 4, 4), "filter is unknown; choose among blit, geometry, color"),
        (("blit",), (2, 5), "(2, 5) are no images"),
        (("color",), (2, 2, 4, 4), "of 1 or 3 channels"),
    ],
)
def test_an_unknown_category_or_samples_that_are_no_images_are_refused(categories, shape, text):
    with pytest.raises(ConfigError) as error:
        augmented(torch.zeros(shape), *categories)
    assert text in str(error.value)


# The controller


def steered(logits, **options):
    """p after each update on 10 real logits of the value at its place."""
    ada, found = AdaptiveProbability(single_process(), **options), []
    for logit in logits:
        ada.observe(torch.full((10,), logit))
        ada.adjust_()
        found.append(ada.p.item())
    return found


def test_p_goes_up_by_the_images_seen_over_the_speed_every_so_many_updates():
    assert steered([1.0] * 6, every=2, images=100) == pytest.approx([0, 0.2, 0.2, 0.4, 0.4, 0.6])


def test_p_goes_down_where_the_mean_sign_is_below_the_target_and_stays_within_0_and_1():
    assert steered([-1.0] * 4, start=0.5, every=1, images=50) == pytest.approx([0.3, 0.1, 0, 0])
    assert steered([1.0] * 3, start=0.7, every=1, images=50) == pytest.approx([0.9, 1, 1])


@pytest.mark.parametrize("positive, up", [(82, True), (78, False)])
def test_the_target_is_on_the_mean_sign(positive, up):
    """Of 100 logits, 80 above zero have a mean sign of 0.6."""
    ada = AdaptiveProbability(single_process(), start=0.5, every=1, images=1000)
    ada.observe(torch.cat([torch.full((positive,), 0.1), torch.full((100 - positive,), -9.0)]))
    ada.adjust_()
    assert ada.p.item() == pytest.approx(0.6 if up else 0.4)
    assert ada.r.item() == pytest.approx((2 * positive - 100) / 100)


def test_without_a_speed_p_stays():
    assert steered([1.0] * 5, start=0.3, every=1, images=0) == pytest.approx([0.3] * 5)


def test_a_state_between_two_adjustments_goes_on_as_if_never_stopped():
    ada, other = (AdaptiveProbability(single_process(), every=4, images=200) for _ in range(2))
    for number in range(6):
        ada.observe(torch.full((10,), math.cos(number)))
        ada.adjust_()
    state = ada.state_dict()
    other.load_state_dict({key: value.clone() if torch.is_tensor(value) else value for key, value in state.items()})
    for one in (ada, other):
        for _ in range(2):
            one.observe(torch.ones(10))
            one.adjust_()
    assert ada.p == other.p
    assert ada.state_dict()["updates"] == 8


def steered_on_half(fabric):
    ada = AdaptiveProbability(fabric, every=2, images=100)
    for number in range(4):
        logits = torch.tensor([1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, -1.0 + number])
        ada.observe(logits.chunk(fabric.world_size)[fabric.global_rank])
        ada.adjust_()
    return {"p": ada.p, "r": ada.r}


@pytest.mark.distributed
def test_two_processes_steer_as_one():
    assert in_processes(steered_on_half, 2) == [steered_on_half(single_process())] * 2
