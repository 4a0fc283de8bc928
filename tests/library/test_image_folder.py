import numpy as np
import pytest
import torch
from PIL import Image

from lightning_custom.errors import ConfigError
from lightning_custom.image_folder import image_folder


def flat(value, size=(8, 8), mode="L"):
    return Image.new(mode, size, value)


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for name, values in {"cats": (10, 20), "ants/young": (30,), "empty": (), ".hidden": (200,)}.items():
        (tmp_path / name).mkdir(parents=True)
        for value in values:
            flat(value).save(tmp_path / name / f"{value}.png")
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    (tmp_path / "cats" / "._20.png").write_text("what another system leaves behind")
    data = image_folder(str(tmp_path), 4)
    assert data.images.shape == (3, 1, 4, 4)
    assert data.images.dtype == torch.float32
    assert data.num_classes == 2
    values = ((data.images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(zip(data.labels.tolist(), values, strict=True)) == [(0, 30), (1, 10), (1, 20)]


def test_the_first_images_are_of_all_classes_the_same_ones_each_time(tmp_path):
    for name in ("ants", "bees", "cats"):
        (tmp_path / name).mkdir()
        for value in range(40):
            flat(value).save(tmp_path / name / f"{value}.png")
    data = image_folder(str(tmp_path), 4)
    assert torch.bincount(data.labels[:40], minlength=3).min() >= 8  # sorted, all 40 would be ants
    assert torch.equal(image_folder(str(tmp_path), 4).images, data.images)


def test_images_of_any_size_and_kind_become_squares_from_their_middle(tmp_path):
    pixels = np.zeros((12, 30, 3), np.uint8)
    pixels[:, 9:21] = (255, 0, 51)  # the square in the middle
    Image.fromarray(pixels).save(tmp_path / "wide.PNG")
    flat(100, (5, 40)).save(tmp_path / "tall.bmp")
    data = image_folder(str(tmp_path), 6)
    assert data.images.shape == (2, 3, 6, 6)
    assert (data.num_classes, data.labels.tolist()) == (1, [0, 0])
    tall, wide = sorted((data.images + 1) * 127.5, key=lambda image: float(image.std()))
    torch.testing.assert_close(tall, torch.full((3, 6, 6), 100.0))  # grey, beside one in colour
    # The kernel reaches a little beyond the square's left and right side.
    torch.testing.assert_close(
        wide[:, :, 2:4], torch.tensor([255.0, 0.0, 51.0]).view(3, 1, 1).expand(3, 6, 2), atol=1.5, rtol=0
    )


def test_a_picture_of_the_size_asked_for_keeps_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    data = image_folder(str(tmp_path), 9)
    assert torch.equal(((data.images[0, 0] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels))


def test_transparent_pixels_are_black_and_sixteen_bits_keep_their_scale(tmp_path):
    clear = flat((255, 255, 255, 0), mode="RGBA")
    clear.paste((255, 255, 255, 255), (0, 0, 4, 8))
    clear.save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 128 * 257, np.uint16)).save(tmp_path / "b.png")
    deep, half = sorted(image_folder(str(tmp_path), 8).images, key=lambda image: float(image.std()))
    assert (half[:, :, :4] == 1).all()
    assert (half[:, :, 4:] == -1).all()
    torch.testing.assert_close(deep, torch.full((3, 8, 8), 128 / 127.5 - 1))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path):
    upright = flat(0)
    upright.paste(255, (0, 0, 8, 4))  # light above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.save(tmp_path / "a.png", exif=exif)
    image = image_folder(str(tmp_path), 8).images[0, 0]
    assert (image[:4] == -1).all()
    assert (image[4:] == 1).all()


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(tmp_path, damage):
    flat(5).save(tmp_path / "good.png")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.png")
    content = (tmp_path / "bad.png").read_bytes()
    (tmp_path / "bad.png").write_bytes({"cut": content[:300], "empty": b"", "text": b"no image"}[damage])
    with pytest.raises(ConfigError, match=rf"data_root: {tmp_path}/bad.png is not a readable image .*; mend or remove"):
        image_folder(str(tmp_path), 8)


def test_a_folder_without_images_or_with_two_meanings_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="data_root: none, but data folder needs one; give --data_root DIR"):
        image_folder(None, 8)
    with pytest.raises(ConfigError, match="nowhere is no folder; give one that holds images"):
        image_folder(str(tmp_path / "nowhere"), 8)
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(ConfigError, match=rf"data_root: {tmp_path} holds no images \(.bmp, .*\); give another folder"):
        image_folder(str(tmp_path), 8)
    (tmp_path / "cats").mkdir()
    flat(5).save(tmp_path / "cats" / "tom.png")
    flat(5).save(tmp_path / "loose.png")
    with pytest.raises(ConfigError, match=r"holds images both itself, such as loose.png, and in folders, such as cats"):
        image_folder(str(tmp_path), 8)
