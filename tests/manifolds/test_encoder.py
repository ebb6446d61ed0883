import pytest
import torch

from onmanifold.foundation.errors import CheckpointError, InputError
from onmanifold.manifolds.encoder import LatentEncoder, load_encoder, save_encoder, train_encoder
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.project import ProjectionConfig, project


class Generator(LearnedManifold):
    """Three latents and the class, to images; the class moves the image, not the latents."""

    name, image_shape = "generator", (1, 12, 9)

    def __init__(self, conditional=True, box=None):
        super().__init__((1, 12, 9), 2, 3, conditional)
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.nn.Parameter(torch.randn(3, 108, generator=generator) / 2)
        self.shift = torch.nn.Parameter(torch.randn(2, 108, generator=generator))
        self.box = box

    def encode(self, images, labels):
        raise NotImplementedError

    def decode(self, codes):
        labels = self.labels_of(codes) if self.conditional else torch.zeros(len(codes)).long()
        logits = codes[:, :3] @ self.weight.to(codes) + self.shift.to(codes)[labels]
        return torch.sigmoid(logits).view(-1, 1, 12, 9)


@pytest.fixture(scope="module")
def trained():
    return train_encoder(Generator(), 150, batch_size=32, width=8, learning_rate=3e-3)


@torch.no_grad()
def test_codes_are_found(trained):
    generator = Generator()
    labels = torch.arange(60) % 2
    codes = generator.sample_codes(labels, seed=123)
    images = generator.decode(codes)
    found = trained(images, labels)
    assert found.shape == codes.shape
    assert torch.equal(found[:, 3].long(), labels)
    # The variance that is left, of one: far below what guessing the mean leaves.
    assert (found - codes)[:, :3].square().mean() < 0.1
    start = ProjectionConfig(steps=0, restarts=0)
    from_mean = project(generator, images, labels=labels, config=start)
    from_encoder = project(generator, images, labels=labels, config=start, encoder=trained)
    assert from_encoder.distance.mean() < 0.5 * from_mean.distance.mean()
    assert bool((from_encoder.distance <= from_mean.distance).all())


def test_training_is_a_function_of_its_seed(trained):
    short = [train_encoder(Generator(), 2, batch_size=4, width=4, seed=seed) for seed in (0, 0, 1)]
    assert short[0].fingerprint == short[1].fingerprint != short[2].fingerprint
    assert not trained.training
    assert not any(parameter.requires_grad for parameter in trained.parameters())


def test_the_generator_is_left_as_it_was():
    generator = Generator().train()
    before = generator.fingerprint
    state = torch.random.get_rng_state()
    train_encoder(generator, 2, batch_size=4, width=4)
    assert generator.fingerprint == before
    assert generator.training
    assert generator.weight.requires_grad
    assert generator.weight.grad is None
    assert torch.equal(torch.random.get_rng_state(), state)


def test_precision_and_box():
    encoder = train_encoder(
        Generator(conditional=False, box=0.2).double(), 2, batch_size=4, width=4
    )
    images = torch.rand(5, 1, 12, 9, dtype=torch.float64)
    codes = encoder(images, torch.zeros(5, dtype=torch.int64))
    assert codes.dtype == torch.float64
    assert codes.shape == (5, 3)
    assert codes.abs().max() <= 0.2


def test_saved_and_loaded(trained, tmp_path):
    path = save_encoder(trained, tmp_path / "encoder.safetensors")
    again = load_encoder(path)
    images, labels = torch.rand(4, 1, 12, 9), torch.tensor([0, 1, 1, 0])
    assert torch.equal(again(images, labels), trained(images, labels))
    assert again.fingerprint == trained.fingerprint
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        load_encoder(path)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (1, 3, 3), (2, 64, 48)])
def test_any_size_of_image(shape):
    encoder = LatentEncoder(shape, 5, num_classes=3, width=2)
    assert encoder(torch.rand(2, *shape), torch.tensor([0, 2])).shape == (2, 6)


def test_wrong_arguments_are_explained(manifold):
    with pytest.raises(InputError, match="fonts has 2 fixed columns"):
        train_encoder(manifold, 1)
    for options in ({"steps": 0}, {"batch_size": 0}, {"width": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            train_encoder(Generator(), **options)
