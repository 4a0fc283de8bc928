import os

import pytest
import torch

from lightning_custom import extractor as module
from lightning_custom.datasets import Images, digits
from lightning_custom.extractor import FeatureExtractor, fit_extractor
from lightning_custom.testing import first_difference, in_processes, single_process


def tiny():
    """Three classes of noisy stripes: enough to fit in a second."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 3
    images = 0.2 * torch.randn(600, 1, 8, 8, generator=generator) - 0.5
    for label in range(3):
        images[labels == label, :, label * 2 : label * 2 + 3] += 1
    return Images(images.clamp(-1, 1), labels, 3)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a cache, the extractor that filled it, and what the default generator drew after that."""
    folder = tmp_path_factory.mktemp("extractor")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_CUSTOM_CACHE", str(folder))
        torch.manual_seed(5)
        return folder, fit_extractor(single_process(), tiny()), torch.rand(3)


def test_it_classifies_what_it_was_fitted_on_and_has_a_feature_vector_for_each_image(fitted):
    data = tiny()
    features, probabilities = fitted[1](data.images)
    assert features.shape == (600, 64)
    assert (probabilities.argmax(1) == data.labels).float().mean() > 0.99
    assert torch.allclose(probabilities.sum(1), torch.ones(600))
    assert not features.requires_grad


def test_a_second_use_reads_the_cache_and_neither_leaves_randomness_behind(fitted, monkeypatch):
    folder, first, after_fitting = fitted
    monkeypatch.setenv("LIGHTNING_CUSTOM_CACHE", str(folder))
    monkeypatch.setattr(module, "_fit", lambda *_: pytest.fail("fitted again"))
    torch.manual_seed(5)
    second = fit_extractor(single_process(), tiny())
    assert torch.equal(torch.rand(3), after_fitting)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after_fitting)
    assert first_difference(dict(first.state_dict()), dict(second.state_dict())) is None


def test_other_data_is_cached_apart():
    data = tiny()
    others = Images(-data.images, data.labels, 3), Images(data.images, 2 - data.labels, 3)
    assert len({module._cache_path(images) for images in (data, *others)}) == 3


def test_a_damaged_cache_is_fitted_anew_to_the_same_weights(fitted, tmp_path, monkeypatch):
    folder, first, _ = fitted
    (path,) = folder.iterdir()
    (tmp_path / path.name).write_bytes(path.read_bytes()[:100])
    monkeypatch.setenv("LIGHTNING_CUSTOM_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match="fitting the feature extractor anew"):
        again = fit_extractor(single_process(), tiny())
    assert first_difference(dict(first.state_dict()), dict(again.state_dict())) is None
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_without_a_place_to_write_there_is_a_warning_and_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="the feature extractor is not cached"):
        module._store({"weight": torch.zeros(1)}, tmp_path / "file" / "below" / "extractor.pt")


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 28), (1, 13), (3, 32)])
def test_it_fits_images_of_other_sizes(channels, size):
    extractor = FeatureExtractor(channels, size, 4)
    features, probabilities = extractor(torch.zeros(2, channels, size, size))
    assert (features.shape, probabilities.shape) == ((2, 64), (2, 4))


def test_large_inputs_are_taken_in_parts_without_changing_the_result():
    extractor = FeatureExtractor(1, 8, 4)
    images = torch.randn(2100, 1, 8, 8)
    whole = extractor.features(images).detach()
    assert torch.allclose(extractor(images)[0], whole, atol=1e-6)


def work(fabric, cache):
    os.environ["LIGHTNING_CUSTOM_CACHE"] = cache  # a fork server keeps the environment it was started with
    return dict(fit_extractor(fabric, tiny()).state_dict())


@pytest.mark.distributed
def test_all_processes_have_the_first_ones_extractor(fitted, tmp_path):
    for state in in_processes(work, 2, str(tmp_path)):
        assert first_difference(dict(fitted[1].state_dict()), state) is None
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_unseen_digits_are_recognised():
    data = digits()
    known = Images(data.images[:1400], data.labels[:1400], 10)
    _, probabilities = fit_extractor(single_process(), known)(data.images[1400:])
    assert (probabilities.argmax(1) == data.labels[1400:]).float().mean() > 0.93
