import numpy as np
import pytest
import torch
from PIL import Image

from lightning_custom.errors import ConfigError
from lightning_custom.networks import MLPGenerator
from lightning_custom.sampling import SampleConfig, sampler, spherical_path, truncated_latents, write_samples


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_threshold_cuts_the_normal_distribution_and_keeps_what_lies_within():
    latents, cut = truncated_latents(2000, 4, draw()), truncated_latents(2000, 4, draw(), threshold=1.0)
    assert cut.abs().max() <= 1
    within = latents.abs() <= 1
    assert torch.equal(cut[within], latents[within])
    # The deviation of a normal number between -1 and 1.
    assert cut.std().item() == pytest.approx(0.5396, abs=0.01)


def test_psi_moves_the_first_linear_layers_output_towards_its_mean_over_latents_of_the_class():
    torch.manual_seed(0)
    generator = MLPGenerator(4, 3, (1, 8, 8), 16)
    first, label = generator.layers[0], torch.eye(3)[[1] * 20_000]
    latents, nearer = truncated_latents(20_000, 4, draw()), truncated_latents(20_000, 4, draw(), psi=0.3)
    whole, truncated = (first(torch.cat([part, label], 1)) for part in (latents, nearer))
    mean = whole.mean(0)
    torch.testing.assert_close(truncated, mean + 0.3 * (whole - mean), atol=0.05, rtol=0)


def test_a_spherical_path_keeps_its_ends_its_length_and_its_pace():
    first, last = torch.randn(5, 16, generator=draw()), torch.randn(5, 16, generator=draw(1))
    last *= first.norm(dim=1, keepdim=True) / last.norm(dim=1, keepdim=True)
    path = spherical_path(first, last, 7)
    torch.testing.assert_close(path[:, 0], first)
    torch.testing.assert_close(path[:, -1], last)
    lengths = path.norm(dim=2)
    torch.testing.assert_close(lengths, lengths[:, :1].expand(5, 7))
    strides = (path[:, 1:] - path[:, :-1]).norm(dim=2)
    torch.testing.assert_close(strides, strides[:, :1].expand(5, 6))
    # The straight line goes through lengths that never occur.
    assert ((first + last) / 2).norm(dim=1).max() < lengths.min()


def test_a_path_from_a_latent_to_itself_stays():
    latent = torch.randn(2, 8, generator=draw())
    torch.testing.assert_close(spherical_path(latent, latent, 3), latent[:, None].expand(2, 3, 8))


def test_a_sampler_gives_what_the_generator_gives_in_its_own_precision():
    torch.manual_seed(0)
    generator = MLPGenerator(4, 3, (1, 8, 8), 16).double()
    latents, labels = torch.randn(7, 4), torch.arange(7) % 3
    images = sampler(generator, conditional=True, device=torch.device("cpu"))(latents, labels)
    assert images.dtype == torch.float32
    assert torch.equal(images, generator(latents.double(), labels).float())


@pytest.mark.parametrize("channels", [1, 3])
def test_files_hold_the_pixels(channels, tmp_path):
    images = torch.rand(5, channels, 8, 8, generator=draw()) * 2 - 1
    labels = torch.tensor([3, 1, 4, 1, 5])
    pixels = ((images + 1) / 2 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for ending in ("png", "npy", "npz"):
        write_samples(tmp_path / f"out.{ending}", images, labels, columns=3)
    assert np.array_equal(np.load(tmp_path / "out.npy"), pixels)
    with np.load(tmp_path / "out.npz") as both:
        assert np.array_equal(both["images"], pixels)
        assert both["labels"].tolist() == [3, 1, 4, 1, 5]
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape[:2] == (2 * 65 + 1, 3 * 65 + 1)
    shown = picture[66::8, 1::8][:8, :8].reshape(8, 8, channels)  # the fourth image begins the second row
    assert np.array_equal(shown, pixels[3])


def test_a_file_of_another_kind_or_out_of_reach_is_refused(tmp_path):
    images, labels = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"does not end in .png or .npy or .npz"):
        write_samples(tmp_path / "out.gif", images, labels, 1)
    with pytest.raises(ConfigError, match="out: cannot write"):
        write_samples(tmp_path / "nowhere" / "out.npy", images, labels, 1)


def test_a_request_makes_a_column_a_class_one_class_or_rows_of_paths():
    _, labels, columns = SampleConfig(run_dir="", count=7).inputs(4, 3)
    assert (labels.tolist(), columns) == ([0, 1, 2, 0, 1, 2, 0], 3)
    _, labels, columns = SampleConfig(run_dir="", count=7, label=2).inputs(4, 3)
    assert (labels.tolist(), columns) == ([2] * 7, 3)
    latents, labels, columns = SampleConfig(run_dir="", count=2, interpolate=5).inputs(4, 3)
    assert (len(latents), labels.tolist(), columns) == (10, [0] * 5 + [1] * 5, 5)
    ends = truncated_latents(4, 4, draw())
    torch.testing.assert_close(latents[[0, 5, 4, 9]], ends)
    _, labels, columns = SampleConfig(run_dir="", count=9).inputs(4, 0)
    assert (labels.tolist(), columns) == ([0] * 9, 3)


@pytest.mark.parametrize("fields, text", [({"psi": -1.0}, "psi: -1.0"), ({"interpolate": -2}, "interpolate: -2")])
def test_what_no_request_can_mean_is_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        SampleConfig(run_dir="", **fields)
    with pytest.raises(ConfigError, match="label: 3; the run has 3 classes"):
        SampleConfig(run_dir="", label=3).inputs(4, 3)
