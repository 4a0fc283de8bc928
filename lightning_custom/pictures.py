"""Pictures of samples."""

import torch
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


def matrix_picture(matrix: Tensor, *, cell: int = 40) -> Tensor:
    """A picture ``[1, H, W]`` of counts ``[K, K]``: each row shaded by its shares, the counts written in."""
    from PIL import Image, ImageDraw

    shares = matrix.double() / matrix.sum(1, keepdim=True).clamp_min(1)
    rows, columns = matrix.shape
    picture = Image.new("L", (columns * cell, rows * cell))
    draw = ImageDraw.Draw(picture)
    for i in range(rows):
        for j in range(columns):
            shade = round(255 * float(shares[i, j]))
            left, top = j * cell, i * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=shade)
            ink = 0 if shade > 127 else 255
            draw.text((left + cell / 2, top + cell / 2), str(int(matrix[i, j])), fill=ink, anchor="mm")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, rows * cell, columns * cell).float() / 255
