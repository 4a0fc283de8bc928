import numpy as np
import pytest
import torch
from PIL import Image

from lightning_custom import image_data
from lightning_custom.datasets import Images, digits
from lightning_custom.errors import ConfigError
from lightning_custom.image_data import at_size, image_classifier, image_shapes, load_image_data, turned
from lightning_custom.stacked import StackedExtractor
from lightning_custom.testing import single_process


def some(channels, size):
    images = torch.rand(5, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Images(images, torch.arange(5), 5)


def test_the_data_s_own_size_leaves_it_alone():
    data = some(1, 8)
    assert at_size(data, 0) is data
    assert at_size(data, 8) is data


@pytest.mark.parametrize("size, before", [(32, 2), (31, 1), (29, 0)])
def test_a_grey_image_a_little_too_small_gets_a_black_frame(size, before):
    data = some(1, 28)
    images = at_size(data, size).images
    assert images.shape == (5, 1, size, size)
    inside = images[:, :, before : before + 28, before : before + 28]
    assert torch.equal(inside, data.images)
    assert images.sum() == pytest.approx(data.images.sum().item() - 5 * (size**2 - 28**2), rel=1e-5)


@pytest.mark.parametrize("channels, size, to", [(3, 28, 32), (1, 28, 33), (1, 28, 14), (3, 32, 64)])
def test_any_other_image_is_resized_as_pillow_does(channels, size, to):
    data = some(channels, size)
    images = at_size(data, to).images
    assert images.shape == (5, channels, to, to)
    grey = Image.fromarray(data.images[0, 0].numpy())
    expected = np.array(grey.resize((to, to), Image.Resampling.BILINEAR))
    torch.testing.assert_close(images[0, 0], torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_names_choose_the_data(tmp_path, monkeypatch):
    assert torch.equal(load_image_data("digits", None).images, digits().images)
    assert load_image_data("digits", None, 16).images.shape == (1797, 1, 16, 16)
    Image.new("L", (50, 50), 3).save(tmp_path / "a.png")
    assert load_image_data("folder", str(tmp_path)).images.shape == (1, 1, 32, 32)
    assert load_image_data("folder", str(tmp_path), 20).images.shape == (1, 1, 20, 20)
    asked = []
    monkeypatch.setattr(image_data, "load_images", lambda *words: asked.append(words) or some(1, 28))
    found = load_image_data("stacked-fashion-mnist", "here", 32)
    assert (found.images.shape, found.num_classes) == ((5, 3, 32, 32), 125)
    assert load_image_data("mnist", "here").images.shape == (5, 1, 28, 28)
    assert asked == [("fashion-mnist", "here"), ("mnist", "here")]
    with pytest.raises(ConfigError, match="image_size: 3; give at least 4, or 0 for the data's own"):
        load_image_data("digits", None, 3)


@pytest.mark.parametrize("size", [0, 36])
@pytest.mark.parametrize("name", ["digits", "mnist", "fashion-mnist", "cifar10", "stacked-mnist", "folder"])
def test_the_shape_is_known_without_the_data(name, size, tmp_path, monkeypatch):
    read = {"digits": (1, 8), "cifar10": (3, 32)}
    monkeypatch.setattr(image_data, "load_images", lambda name, root: some(*read.get(name, (1, 28))))
    for mode in ("L", "RGB"):
        Image.new(mode, (5, 7)).save(tmp_path / "image.png")
        assert tuple(load_image_data(name, str(tmp_path), size).images.shape[1:]) in image_shapes(name, size)


def test_what_is_fitted_measures_the_data(monkeypatch):
    fitted = []
    monkeypatch.setattr(image_data, "fit_extractor", lambda fabric, data: fitted.append(data) or torch.nn.Identity())
    plain, colour = some(1, 8), some(3, 8)
    image_classifier(single_process(), "mnist", plain)
    stack = image_classifier(single_process(), "stacked-mnist", colour._replace(num_classes=125))
    image_classifier(single_process(), "folder", plain._replace(num_classes=1))
    assert fitted[0] is plain
    assert isinstance(stack, StackedExtractor)
    assert (fitted[1].images.shape, fitted[1].num_classes) == ((5, 1, 8, 8), 5)
    assert (len(fitted[2].images), fitted[2].num_classes) == (20, 4)


def test_images_are_turned_by_quarters():
    data = some(1, 3)
    found = turned(data)
    for turns in range(4):
        part = found.images[found.labels == turns]
        assert torch.equal(part, torch.from_numpy(np.rot90(data.images.numpy(), turns, (2, 3)).copy()))
