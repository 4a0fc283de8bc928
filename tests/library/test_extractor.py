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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_CUSTOM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_it_classifies_what_it_was_fitted_on_and_has_a_feature_vector_for_each_image(cache):
    data = tiny()
    features, probabilities = fit_extractor(single_process(), data)(data.images)
    assert features.shape == (600, 64)
    assert (probabilities.argmax(1) == data.labels).float().mean() > 0.99
    assert torch.allclose(probabilities.sum(1), torch.ones(600))
    assert not features.requires_grad


def test_a_second_use_reads_the_cache_and_leaves_no_randomness_behind(cache, monkeypatch):
    torch.manual_seed(5)
    first = fit_extractor(single_process(), tiny())
    after_fitting = torch.rand(3)
    (path,) = cache.iterdir()
    assert path.name.startswith("extractor-")
    monkeypatch.setattr(module, "_fit", lambda *_: pytest.fail("fitted again"))
    torch.manual_seed(5)
    second = fit_extractor(single_process(), tiny())
    assert torch.equal(torch.rand(3), after_fitting)
    assert first_difference(dict(first.state_dict()), dict(second.state_dict())) is None
    other = Images(-tiny().images, tiny().labels, 3)
    assert module._cache_path(other) != module._cache_path(tiny())


def test_a_damaged_cache_is_fitted_anew_to_the_same_weights(cache):
    first = fit_extractor(single_process(), tiny())
    (path,) = cache.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="fitting the feature extractor anew"):
        again = fit_extractor(single_process(), tiny())
    assert first_difference(dict(first.state_dict()), dict(again.state_dict())) is None


def test_without_a_place_to_write_it_is_fitted_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_CUSTOM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="the feature extractor is not cached"):
        extractor = fit_extractor(single_process(), tiny())
    assert (extractor(tiny().images)[1].argmax(1) == tiny().labels).float().mean() > 0.99


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


def work(fabric):
    return dict(fit_extractor(fabric, tiny()).state_dict())


@pytest.mark.distributed
def test_all_processes_have_the_first_ones_extractor(cache):
    first, second = in_processes(work, 2)
    assert first_difference(first, second) is None
    assert len(list(cache.iterdir())) == 1


@pytest.mark.slow
def test_unseen_digits_are_recognised():
    data = digits()
    known = Images(data.images[:1400], data.labels[:1400], 10)
    _, probabilities = fit_extractor(single_process(), known)(data.images[1400:])
    assert (probabilities.argmax(1) == data.labels[1400:]).float().mean() > 0.93
