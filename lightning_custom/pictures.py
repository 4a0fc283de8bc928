"""Pictures of samples, counts and curves."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_custom.errors import ConfigError


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


def captioned(images: Tensor, captions: Sequence[str], *, scale: int = 1) -> Tensor:
    """Pictures ``[N, C, H, W]`` of ``[N, C, h, w]`` images in [0, 1], each pixel ``scale`` wide, with words below.

    >>> captioned(torch.zeros(2, 1, 8, 8), ["cat", "dog"], scale=4).shape
    torch.Size([2, 1, 46, 32])
    """
    from PIL import Image, ImageDraw

    images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    count, channels, _, width = images.shape
    words = images.new_zeros(count, 1, 14, width)
    for i, caption in enumerate(captions):
        strip = Image.new("L", (width, 14))
        ImageDraw.Draw(strip).text((width / 2, 7), caption, fill=255, anchor="mm")
        words[i, 0] = torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(14, width) / 255
    return torch.cat([images, words.expand(-1, channels, -1, -1)], dim=2)


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


CURVE_COLOURS = (
    (60, 60, 60), (213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233),
)  # fmt: skip
"""Colours of curves in their order, also apart for colour-blind readers (Okabe and Ito 2008, with a grey for black)."""

_WHITE, _GRID, _INK = (255, 255, 255), (226, 226, 226), (70, 70, 70)
_OVERSAMPLING = 4


def curves_picture(
    x: Tensor,
    curves: Mapping[str, Tensor],
    points: tuple[Tensor, Tensor] | None = None,
    *,
    size: tuple[int, int] = (480, 320),
) -> Tensor:
    """A picture ``[3, H, W]`` in [0, 1] of curves over ``x [P]``, with axes and a legend above; ``size`` is (W, H).

    Each curve is ``[P]``; the first is drawn undermost. ``points`` are x and y, each ``[N]``, drawn as dots. The range
    is that of all finite values; a curve is left out where it is not finite. Several pictures of one size make one
    with ``image_grid(torch.stack(pictures), columns=2)``.
    """
    from PIL import Image, ImageDraw

    width, height = (_OVERSAMPLING * side for side in size)
    picture = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(picture)
    top = _draw_legend(draw, list(curves), width)
    dots = [] if points is None else _pairs(*points)
    lines = [_pairs(x, curve) for curve in curves.values()]
    shown = [pair for pairs in (*lines, dots) for pair in pairs if _is_finite(pair)]
    plot = _Plot(draw, (42 * _OVERSAMPLING, top, width - 10 * _OVERSAMPLING, height - 22 * _OVERSAMPLING), shown)
    plot.axes()
    for number, line in enumerate(lines):
        plot.line(line, CURVE_COLOURS[number % len(CURVE_COLOURS)])
    plot.dots(dots)
    pixels = torch.frombuffer(bytearray(picture.reduce(_OVERSAMPLING).tobytes()), dtype=torch.uint8)
    return pixels.view(size[1], size[0], 3).permute(2, 0, 1).float() / 255


class _Plot:
    """A rectangle of the picture in which data has coordinates."""

    def __init__(self, draw: Any, box: tuple[int, int, int, int], shown: list[tuple[float, float]]) -> None:
        self._draw, self._box = draw, box
        self._x_range = _range([x for x, _ in shown], margin=0)
        self._y_range = _range([y for _, y in shown], margin=0.06)

    def _at(self, pair: tuple[float, float]) -> tuple[float, float]:
        left, top, right, bottom = self._box
        (x_low, x_high), (y_low, y_high) = self._x_range, self._y_range
        across, up = (pair[0] - x_low) / (x_high - x_low), (pair[1] - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    def axes(self) -> None:
        left, top, right, bottom = self._box
        font = _font()
        for x in _ticks(*self._x_range, 6):
            place, _ = self._at((x, 0))
            self._draw.line((place, top, place, bottom), fill=_GRID, width=_OVERSAMPLING)
            self._draw.text((place, bottom + 5 * _OVERSAMPLING), f"{x:g}", fill=_INK, font=font, anchor="mt")
        for y in _ticks(*self._y_range, 5):
            _, place = self._at((0, y))
            self._draw.line((left, place, right, place), fill=_GRID, width=_OVERSAMPLING)
            self._draw.text((left - 5 * _OVERSAMPLING, place), f"{y:g}", fill=_INK, font=font, anchor="rm")
        self._draw.rectangle(self._box, outline=(160, 160, 160), width=_OVERSAMPLING)

    def line(self, pairs: list[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        piece: list[tuple[float, float]] = []
        for pair in [*pairs, (math.nan, math.nan)]:
            if _is_finite(pair):
                piece.append(self._at(pair))
            else:
                if len(piece) > 1:
                    self._draw.line(piece, fill=colour, width=2 * _OVERSAMPLING, joint="curve")
                piece = []

    def dots(self, pairs: list[tuple[float, float]]) -> None:
        for x, y in map(self._at, filter(_is_finite, pairs)):
            for radius, colour in ((5 * _OVERSAMPLING, _WHITE), (4 * _OVERSAMPLING, _INK)):
                self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_legend(draw: Any, names: list[str], width: int) -> int:
    """The names beside their colours, in rows from the top; returns where the rest may begin."""
    font = _font()
    left, row = 42 * _OVERSAMPLING, 12 * _OVERSAMPLING
    room = width - (42 + 22 + 10) * _OVERSAMPLING
    for number, name in enumerate(names):
        while font.getlength(name) > room:  # runs differ in the end of their names
            name = f"..{name.removeprefix('..')[1:]}"
        entry = round(22 * _OVERSAMPLING + font.getlength(name) + 14 * _OVERSAMPLING)
        if left + entry > width and left > 42 * _OVERSAMPLING:
            left, row = 42 * _OVERSAMPLING, row + 16 * _OVERSAMPLING
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        draw.line((left, row, left + 16 * _OVERSAMPLING, row), fill=colour, width=3 * _OVERSAMPLING)
        draw.text((left + 22 * _OVERSAMPLING, row), name, fill=_INK, font=font, anchor="lm")
        left += entry
    return row + (12 if names else -2) * _OVERSAMPLING


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(11 * _OVERSAMPLING)


def _pairs(x: Tensor, y: Tensor) -> list[tuple[float, float]]:
    if x.numel() != y.numel():
        raise ConfigError(f"curves: {y.numel()} values over {x.numel()} places; give one value a place")
    return list(zip(x.flatten().tolist(), y.flatten().tolist(), strict=True))


def _is_finite(pair: tuple[float, float]) -> bool:
    return math.isfinite(pair[0]) and math.isfinite(pair[1])


def _range(values: list[float], margin: float) -> tuple[float, float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - max(1, abs(low)), high + max(1, abs(high))
    return low - margin * (high - low), high + margin * (high - low)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """At most about ``count`` round numbers from ``low`` to ``high``: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def cosine_picture(cosines: Tensor, *, cell: int = 48) -> Tensor:
    """A picture ``[3, H, W]`` in [0, 1] of cosines ``[T, T]``: -1 orange, 0 white, 1 blue, the numbers written in.

    What is not finite is grey.
    """
    from PIL import Image, ImageDraw

    rows, columns = cosines.shape
    picture = Image.new("RGB", (columns * cell, rows * cell))
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(cosines.tolist()):
        for j, cosine in enumerate(row):
            left, top = j * cell, i * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=_diverging(cosine))
            ink = _WHITE if abs(cosine) > 0.6 else _INK
            draw.text((left + cell / 2, top + cell / 2), f"{cosine:+.2f}", fill=ink, anchor="mm")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(rows * cell, columns * cell, 3).permute(2, 0, 1).float() / 255


def _diverging(value: float) -> tuple[int, int, int]:
    """White at 0, towards two of the colours of curves, which colour-blind readers tell apart."""
    if not math.isfinite(value):
        return _GRID
    share, end = min(abs(value), 1.0), CURVE_COLOURS[1 if value < 0 else 2]
    red, green, blue = (round(255 + share * (colour - 255)) for colour in end)
    return red, green, blue
