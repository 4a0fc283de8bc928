import pytest
import torch

from lightning_custom.pictures import image_grid


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("scale", [1, 2])
def test_every_image_stands_at_its_place_between_black_lines(padding, scale):
    images = torch.rand(5, 3, 2, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    grid = image_grid(images, columns=2, scale=scale, padding=padding)
    height, width = 2 * scale, 4 * scale
    assert grid.shape == (3, 3 * height + 4 * padding, 2 * width + 3 * padding)
    rest = grid.clone()
    for i, image in enumerate(images):
        top, left = padding + i // 2 * (height + padding), padding + i % 2 * (width + padding)
        part = grid[:, top : top + height, left : left + width]
        for row in range(scale):
            for column in range(scale):
                assert torch.equal(part[:, row::scale, column::scale], image)
        rest[:, top : top + height, left : left + width] = 0
    assert rest.abs().sum() == 0


def test_a_single_image_without_padding_is_itself():
    image = torch.rand(1, 1, 8, 8)
    assert torch.equal(image_grid(image, columns=1, padding=0), image[0])
