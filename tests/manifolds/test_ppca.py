import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from onmanifold.data import Dataset, load_dataset
from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.manifolds import build_manifold, load_manifold, save_manifold
from onmanifold.manifolds.ppca import PPCA
from onmanifold.training.fits import ppca as fits
from onmanifold.training.fits.ppca import PPCAFit

SHAPE, PIXELS, CLASSES, LATENTS = (1, 4, 5), 20, 3, 4


def make_dataset(count=300, seed=0, dtype=torch.float32, classes=CLASSES):
    """Images of a few strong directions and weak noise, other ones in each class, far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    weights = 0.04 * torch.randn(classes, PIXELS, LATENTS, generator=generator).double()
    latents = torch.randn(count, LATENTS, 1, generator=generator).double()
    noise = 0.01 * torch.randn(count, PIXELS, generator=generator).double()
    means = 0.4 + 0.2 * torch.rand(classes, PIXELS, generator=generator).double()
    rows = means[labels] + (weights[labels] @ latents).squeeze(2) + noise
    images = rows.clamp(0.02, 0.98).view(-1, *SHAPE)
    images = (images * 255).round().to(dtype) if dtype == torch.uint8 else images.to(dtype)
    return Dataset("made", images, labels, tuple("abc"[:classes]), "made")


def fitted(dataset, **options):
    """A float64 manifold, so that what is compared is the mathematics."""
    manifold = build_manifold("ppca", CLASSES, SHAPE, seed=0, latent_size=LATENTS, **options)
    PPCAFit().solve(manifold.double(), dataset)
    return manifold


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


def rows_of(dataset):
    return dataset.batch(torch.arange(len(dataset))).images.flatten(1).double()


def covariance_of(manifold, model):
    """C = W Wᵀ + s² I."""
    basis, noise = manifold.basis[model], manifold.noise_variance[model]
    inside = (basis * (manifold.eigenvalues[model] - noise)) @ basis.T
    return inside + noise * torch.eye(PIXELS).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("conditional", [True, False])
def test_it_is_the_maximum_likelihood_estimate(dtype, conditional):
    dataset = make_dataset(dtype=dtype)
    manifold, rows = fitted(dataset, conditional=conditional), rows_of(dataset)
    for model in range(CLASSES if conditional else 1):
        chosen = rows[dataset.labels == model] if conditional else rows
        sample = np.cov(chosen.numpy(), rowvar=False, bias=True)
        values = np.linalg.eigvalsh(sample)[::-1]
        np.testing.assert_allclose(manifold.mean[model], chosen.mean(0), rtol=1e-12)
        np.testing.assert_allclose(manifold.eigenvalues[model], values[:LATENTS], rtol=1e-9)
        np.testing.assert_allclose(
            manifold.noise_variance[model], values[LATENTS:].mean(), rtol=1e-9
        )
        basis = manifold.basis[model].numpy()
        np.testing.assert_allclose(basis.T @ basis, np.eye(LATENTS), atol=1e-12)
        np.testing.assert_allclose(sample @ basis, basis * values[:LATENTS], atol=1e-12)
        assert (basis[np.abs(basis).argmax(0), range(LATENTS)] > 0).all()


def test_the_likelihood_is_that_of_the_gaussian(dataset):
    manifold = fitted(dataset)
    images, labels, _, _ = dataset.batch(torch.arange(30))
    found = manifold.log_likelihood(images.double(), labels)
    for model in range(CLASSES):
        expected = multivariate_normal(manifold.mean[model], covariance_of(manifold, model))
        chosen = labels == model
        np.testing.assert_allclose(
            found[chosen], expected.logpdf(images[chosen].flatten(1).double()), rtol=1e-9
        )


def test_no_other_parameters_are_likelier(dataset):
    manifold = fitted(dataset, conditional=False)
    images, labels, _, _ = dataset.batch(torch.arange(len(dataset)))

    def mean():
        return manifold.log_likelihood(images.double(), labels).mean().item()

    best = mean()
    # At the maximum tr(C⁻¹ S) is the number of pixels.
    volume = torch.linalg.slogdet(covariance_of(manifold, 0)).logabsdet.item()
    expected = -(PIXELS * math.log(2 * math.pi) + volume + PIXELS) / 2
    assert best == pytest.approx(expected, rel=1e-9)
    for buffer in (manifold.mean, manifold.eigenvalues, manifold.noise_variance):
        for factor in (0.97, 1.03):
            before = buffer.clone()
            buffer.mul_(factor)
            assert mean() < best
            buffer.copy_(before)


def test_it_finds_the_model_that_made_the_images():
    generator = torch.Generator().manual_seed(0)
    weight = 0.05 * torch.randn(PIXELS, LATENTS, generator=generator).double()
    latents = torch.randn(40_000, LATENTS, generator=generator).double()
    noise = 0.02 * torch.randn(40_000, PIXELS, generator=generator).double()
    images = (0.5 + latents @ weight.T + noise).float().view(-1, *SHAPE)
    dataset = Dataset("made", images, torch.zeros(40_000).long(), ("a",), "made")
    manifold = fitted(dataset, conditional=False)
    truth = weight @ weight.T + 0.02**2 * torch.eye(PIXELS)
    assert (covariance_of(manifold, 0) - truth).norm() < 0.02 * truth.norm()
    assert manifold.noise_variance.item() == pytest.approx(0.02**2, rel=0.02)


def test_the_code_is_the_posterior_mean(dataset):
    manifold = fitted(dataset)
    images, labels, _, _ = dataset.batch(torch.arange(12))
    codes = manifold.encode(images.double(), labels)
    for row, label, code in zip(images.flatten(1).double(), labels, codes, strict=True):
        noise = manifold.noise_variance[label]
        weight = manifold.basis[label] * (manifold.eigenvalues[label] - noise).sqrt()
        matrix = weight.T @ weight + noise * torch.eye(LATENTS)
        expected = torch.linalg.solve(matrix, weight.T @ (row - manifold.mean[label]))
        torch.testing.assert_close(code, torch.cat([expected, label.double()[None]]))


def test_least_squares_gives_the_orthogonal_projection(dataset):
    manifold = fitted(dataset, code="least_squares")
    images, labels, _, _ = dataset.batch(torch.arange(30))
    images = images.double()
    rebuilt = manifold.decode(manifold.encode(images, labels))
    residual = (images - rebuilt).flatten(1)
    inside = torch.einsum("bd,bdq->bq", residual, manifold.basis[labels])
    assert inside.abs().max() < 1e-12
    again = manifold.decode(manifold.encode(rebuilt, labels))
    torch.testing.assert_close(again, rebuilt, rtol=0, atol=1e-12)


def test_the_posterior_falls_short_of_the_projection(dataset):
    near, nearest = fitted(dataset), fitted(dataset, code="least_squares")
    images, labels, _, _ = dataset.batch(torch.arange(30))
    shrunk = near.encode(images.double(), labels)[:, :LATENTS]
    full = nearest.encode(images.double(), labels)[:, :LATENTS]
    factor = 1 - near.noise_variance[:, None] / near.eigenvalues
    torch.testing.assert_close(shrunk, full * factor[labels])


def test_chunks_make_no_difference(dataset, monkeypatch):
    expected = fitted(dataset)
    monkeypatch.setattr(fits, "_CHUNK", 7)
    for name, buffer in fitted(dataset).named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=1e-9, atol=1e-12)


def test_each_class_has_the_model_of_its_own_images(dataset):
    manifold = fitted(dataset)
    for label in range(CLASSES):
        alone = fitted(dataset.subset((dataset.labels == label).nonzero()[:, 0]), conditional=False)
        torch.testing.assert_close(manifold.basis[label], alone.basis[0])
        torch.testing.assert_close(manifold.noise_variance[label], alone.noise_variance[0])


def test_fewer_images_than_pixels_are_enough():
    manifold = fitted(make_dataset(count=30))
    assert bool((manifold.noise_variance > 0).all())
    assert all(bool(buffer.isfinite().all()) for buffer in manifold.buffers())


@pytest.mark.parametrize("count", [3, 3 * (LATENTS + 1)])
def test_too_few_images_are_an_error(count):
    with pytest.raises(DataError, match="class 0: its images span no more than 4 dimensions"):
        fitted(make_dataset(count=count))


def test_a_class_without_images_is_an_error(dataset):
    with pytest.raises(DataError, match="class 1 has no images"):
        fitted(dataset.subset((dataset.labels != 1).nonzero()[:, 0]))


@pytest.mark.parametrize("conditional", [True, False])
def test_gradients_to_the_code(dataset, conditional):
    manifold = fitted(dataset, conditional=conditional)
    images, labels, _, _ = dataset.batch(torch.arange(4))
    chart = manifold.chart(manifold.encode(images.double(), labels))
    assert torch.autograd.gradcheck(chart.decode, chart.latents.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_do_not_depend_on_their_batch(dataset, dtype):
    manifold = fitted(dataset).to(dtype)
    codes = manifold.sample_codes(torch.tensor([2, 0, 0, 1, 2, 2, 1]), seed=1).to(dtype)
    whole = manifold.decode(codes)
    assert whole.dtype == dtype
    assert whole.shape == (7, *SHAPE)
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-14}
    single = torch.cat([manifold.decode(code[None]) for code in codes])
    torch.testing.assert_close(single, whole, **tolerance)
    for mask in (codes[:, 1] > 0, torch.tensor([5, 1]), torch.zeros(7).bool()):
        chart = manifold.chart(codes).keep(mask)
        torch.testing.assert_close(chart.decode(chart.latents), whole[mask], **tolerance)
        assert torch.equal(chart.fixed[:, 0], codes[mask, -1])


def test_pixels_stay_between_0_and_1(dataset):
    manifold = fitted(dataset)
    images = manifold.decode(torch.tensor([[90.0, -80, 70, 60, 1]]).double())
    assert images.min() == 0
    assert images.max() == 1


def test_no_images_are_no_error(dataset):
    manifold, none = fitted(dataset), torch.zeros(0).long()
    codes = manifold.encode(torch.zeros(0, *SHAPE), none)
    assert codes.shape == (0, LATENTS + 1)
    assert manifold.decode(codes).shape == (0, *SHAPE)
    assert manifold.log_likelihood(torch.zeros(0, *SHAPE), none).shape == (0,)


def test_clothes(real_data):
    """Fashion-MNIST: the class under which an image is likeliest is mostly its own."""
    real_data("fashion_mnist")
    train, test = (load_dataset("fashion_mnist", split) for split in ("train", "test"))
    manifold = build_manifold("ppca", 10, (1, 28, 28), seed=0, latent_size=20)
    PPCAFit().solve(manifold, train.take(3000))
    images, labels, _, _ = test.batch(torch.arange(500))
    densities = [manifold.log_likelihood(images, torch.full_like(labels, k)) for k in range(10)]
    assert (torch.stack(densities).argmax(0) == labels).double().mean() > 0.7
    rebuilt = manifold.decode(manifold.encode(images, labels))
    assert (rebuilt - images).abs().mean() < 0.35 * (images - images.mean(0)).abs().mean()


def test_saved_and_loaded(dataset, tmp_path):
    manifold = fitted(dataset, code="least_squares").float()
    again = load_manifold(save_manifold(manifold, tmp_path / "ppca.safetensors"))
    assert isinstance(again, PPCA)
    assert again.code == "least_squares"
    assert again.fingerprint == manifold.fingerprint
    codes = manifold.sample_codes(torch.tensor([0, 1, 2]))
    assert torch.equal(again.decode(codes), manifold.decode(codes))


def test_what_does_not_fit_is_an_error(dataset):
    with pytest.raises(ConfigError, match="expected less than 20 pixels, found 20"):
        build_manifold("ppca", CLASSES, SHAPE, latent_size=20)
    with pytest.raises(ConfigError, match="code"):
        build_manifold("ppca", CLASSES, SHAPE, latent_size=2, code="median")
    manifold = fitted(dataset)
    with pytest.raises(InputError, match=r"expected floats \(B, 1, 4, 5\) for ppca"):
        manifold.encode(torch.zeros(2, 1, 5, 4), torch.zeros(2).long())
    with pytest.raises(InputError, match=r"found torch\.uint8"):
        manifold.encode(torch.zeros(2, *SHAPE).byte(), torch.zeros(2).long())
    with pytest.raises(InputError, match="found label 3"):
        manifold.encode(torch.zeros(1, *SHAPE), torch.tensor([3]))
    with pytest.raises(InputError, match="class from 0 to 2"):
        manifold.decode(torch.full((1, LATENTS + 1), 0.5))
    with pytest.raises(InputError, match=r"expected a float tensor \(1, 5\)"):
        manifold.decode(torch.zeros(1, LATENTS))
    with pytest.raises(InputError, match="expected a PPCA"):
        PPCAFit().solve(torch.nn.Identity(), dataset)
