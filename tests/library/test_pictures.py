import math

import pytest
import torch

from lightning_custom.errors import ConfigError
from lightning_custom.pictures import CURVE_COLOURS, _ticks, cosine_picture, curves_picture, image_grid


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


X = torch.linspace(-5, 5, 101)
LEVELS = {"low": torch.full_like(X, -1), "middle": torch.zeros_like(X), "high": torch.ones_like(X)}
INK = (70, 70, 70)
PLOT_LEFT = 42
LEGEND_ROWS = 20
"""Of a legend of one row."""


def places(picture, colour):
    """Rows and columns, ``[N, 2]``, where the picture has exactly this colour."""
    wanted = torch.tensor(colour).view(3, 1, 1)
    return ((picture * 255).round().int() == wanted).all(0).nonzero().double()


def curve_places(picture, number, legend=LEGEND_ROWS):
    found = places(picture, CURVE_COLOURS[number])
    return found[found[:, 0] > legend]


def test_curves_stand_in_their_colours_at_their_heights():
    picture = curves_picture(X, LEVELS)
    assert picture.shape == (3, 320, 480)
    assert picture.dtype == torch.float32
    assert (picture.min() >= 0, picture.max()) == (True, 1)
    rows = []
    for number in range(3):
        found = curve_places(picture, number)
        assert found[:, 0].max() - found[:, 0].min() <= 1  # level, and two pixels thick
        assert found[:, 1].min() < PLOT_LEFT + 3
        assert found[:, 1].max() > 480 - 13
        rows.append(found[:, 0].mean())
    assert rows[0] - rows[1] == pytest.approx(rows[1] - rows[2], abs=1)
    assert rows[0] > rows[2] + 200  # up is up, and the plot is used


def test_a_line_runs_from_corner_to_corner():
    picture = curves_picture(X, {"up": X, "down": -X}, size=(400, 400))
    found = curve_places(picture, 1)
    row, column = found.T
    slope = torch.corrcoef(torch.stack([row, column]))[0, 1]
    assert slope > 0.999
    assert (column.min(), column.max()) == (pytest.approx(PLOT_LEFT, abs=3), pytest.approx(389, abs=3))
    up = curve_places(picture, 0)
    assert torch.corrcoef(up.T)[0, 1] < -0.999
    # They cross in the middle, where the later is on top.
    middle = (column.min() + column.max()) / 2
    near = found[(column - middle).abs() < 3]
    assert near[:, 0].mean() == pytest.approx(row.mean(), abs=1)
    assert ((up[:, 1] - middle).abs() > 1).all()


def test_points_are_dots_at_their_places_above_the_curves():
    empty = curves_picture(X, LEVELS)
    picture = curves_picture(X, LEVELS, (torch.tensor([-2.5, 2.5]), torch.tensor([0.0, 0.0])))
    changed = (picture != empty).any(0).nonzero().double()
    middle = curve_places(empty, 1)
    height, left, right = middle[:, 0].mean().item(), middle[:, 1].min().item(), middle[:, 1].max().item()
    for share in (0.25, 0.75):
        column = left + share * (right - left)
        dot = changed[(changed[:, 1] - column).abs() < 20]
        assert dot.mean(0).tolist() == pytest.approx([height, column], abs=1)
        assert (dot.max(0).values - dot.min(0).values).tolist() == pytest.approx([10, 10], abs=2)
        core = places(picture, INK)
        assert ((core - dot.mean(0)).abs() < 2).all(1).sum() >= 9
    assert len(changed) == sum(((changed[:, 1] - left - s * (right - left)).abs() < 20).sum() for s in (0.25, 0.75))


def test_points_alone_set_the_range_where_they_reach_further():
    near = curves_picture(X, LEVELS)
    far = curves_picture(X, LEVELS, (torch.zeros(1), torch.full((1,), 9.0)))
    height = [curve_places(p, 0)[:, 0].mean() - curve_places(p, 2)[:, 0].mean() for p in (near, far)]
    assert height[1] / height[0] == pytest.approx(2 / 10, abs=0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_curve_is_left_out_where_it_is_not_finite_and_spoils_no_range(bad):
    curves = LEVELS | {"middle": torch.where(X.abs() < 2, bad, 0.0)}
    picture, whole = curves_picture(X, curves), curves_picture(X, LEVELS)
    assert torch.equal(curve_places(picture, 0), curve_places(whole, 0))
    found, all_columns = curve_places(picture, 1), curve_places(whole, 1)[:, 1]
    share = (found[:, 1] - all_columns.min()) / (all_columns.max() - all_columns.min())
    assert ((share < 0.31) | (share > 0.69)).all()
    assert (share < 0.29).any()
    assert (share > 0.71).any()
    nothing = curves_picture(X, {"all": torch.full_like(X, bad)})
    assert len(curve_places(nothing, 0)) == 0


def test_the_legend_names_curves_in_order_and_wraps():
    picture = curves_picture(X, LEVELS)
    starts = []
    for number in range(3):
        found = places(picture, CURVE_COLOURS[number])
        found = found[found[:, 0] <= LEGEND_ROWS]
        assert found[:, 0].mean() == pytest.approx(12, abs=1)
        assert found[:, 1].max() - found[:, 1].min() == pytest.approx(16, abs=2)
        starts.append(found[:, 1].min())
    assert starts == sorted(starts)
    assert starts[0] == pytest.approx(PLOT_LEFT, abs=1)
    long = curves_picture(X, {f"{name} of a curve with a long name": curve for name, curve in LEVELS.items()})
    rows = [places(long, colour)[:, 0].min().item() for colour in CURVE_COLOURS[:3]]
    assert rows[0] == rows[1] == rows[2] - 16
    assert curve_places(long, 2, legend=LEGEND_ROWS + 16)[:, 0].min() > curve_places(picture, 2)[:, 0].min()


def test_pictures_make_a_grid():
    pictures = torch.stack([curves_picture(X, {"one": scale * X}, size=(120, 90)) for scale in (1.0, -1.0)])
    grid = image_grid(pictures, columns=2, padding=0)
    assert grid.shape == (3, 90, 240)
    assert torch.equal(grid[:, :, 120:], pictures[1])


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (-5, 5, [-4, -2, 0, 2, 4]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.35, 0.42, [-0.2, 0, 0.2, 0.4]),
        (1e-20, 6e-20, [1e-20, 2e-20, 3e-20, 4e-20, 5e-20, 6e-20]),
        (1e20, 4e20, [1e20, 1.5e20, 2e20, 2.5e20, 3e20, 3.5e20, 4e20]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert _ticks(low, high, 6) == expected


def test_a_name_too_long_for_the_legend_loses_its_beginning():
    x, y = torch.arange(4.0), torch.arange(4.0)
    end = "a name of which the end tells it from others"
    for beginning in ("runs/" * 20, "others/" * 30):
        picture = curves_picture(x, {beginning + end: y})
        edge = picture[:, :LEGEND_ROWS, -8:]
        assert torch.equal(edge, torch.ones_like(edge)), "written over the edge"
        assert (picture[:, :LEGEND_ROWS, 250:] < 0.5).sum() > 100
    short = curves_picture(x, {"a": y})
    assert (short[:, :LEGEND_ROWS, 100:] == 1).all()


def test_level_curves_and_points_alone_have_a_range():
    for level in (0.0, 7.0, 1e30):
        found = curve_places(curves_picture(X, {"level": torch.full_like(X, level)}), 0)
        assert found[:, 0].mean() == pytest.approx((LEGEND_ROWS + 298) / 2, abs=8)
    assert len(places(curves_picture(X, {}, (torch.zeros(1), torch.zeros(1))), INK)) > 20


def test_curves_of_another_length_are_refused():
    with pytest.raises(ConfigError, match="curves: 100 values over 101 places; give one value a place"):
        curves_picture(X, {"short": X[1:]})


def test_cosines_are_coloured_by_sign_and_size_with_the_number_in_the_middle():
    cosines = torch.tensor([[1.0, -0.5, 0.0], [-1.0, 0.5, math.nan]])
    picture = cosine_picture(cosines, cell=40)
    assert picture.shape == (3, 80, 120)
    corners = (255 * picture[:, 2::40, 2::40]).round().int().permute(1, 2, 0).tolist()
    blue, orange, white = [0, 114, 178], [213, 94, 0], [255, 255, 255]
    half = [[pytest.approx((one + 255) / 2, abs=0.5) for one in colour] for colour in (orange, blue)]
    assert corners == [[blue, half[0], white], [orange, half[1], [226, 226, 226]]]
    cells = picture.unfold(1, 40, 40).unfold(2, 40, 40).flatten(3).permute(1, 2, 3, 0)
    for row in cells:
        for cell in row:
            assert len(torch.unique(cell, dim=0)) > 2  # shade, border and ink
