"""Pictures of samples."""

from torch import Tensor


def image_grid(images: Tensor, columns: int, *, scale: int = 1, padding: int = 1) -> Tensor:
    """One picture ``[C, H, W]`` of ``[N, C, h, w]`` images in rows of ``columns``, each pixel ``scale`` wide.

    >>> image_grid(torch.zeros(6, 1, 8, 8), columns=3).shape
    torch.Size([1, 19, 28])
    """
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    height, width = height * scale, width * scale
    grid = images.new_zeros((channels, rows * (height + padding) + padding, columns * (width + padding) + padding))
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        grid[:, top : top + height, left : left + width] = image
    return grid
