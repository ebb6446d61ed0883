import math

import pytest
import torch

import onmanifold as om
from onmanifold.data import load_dataset
from onmanifold.data.fonts import embedded_folder
from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.manifolds import FontsManifold, fonts_manifold
from onmanifold.manifolds.fonts import RANGES

EMBEDDED = str(embedded_folder())


def test_the_identity_gives_the_letter(manifold):
    identity = torch.tensor([0, 0, 0, 0, 1, 0], dtype=torch.float64)
    latents = (identity - manifold.centres) / manifold.half_ranges
    code = torch.cat([latents, torch.tensor([3.0, 7.0], dtype=torch.float64)])
    expected = manifold.prototypes[3, 7].double() / 255
    torch.testing.assert_close(manifold.decode(code[None])[0, 0], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "half_ranges", "scale"),
    [
        ("hard", (0.2, 0.2, 0.5, 0.5, 0.2, math.pi / 2), 0.95),
        ("moderate", (0.2, 0.2, 0.4, 0.4, 0.15, math.pi / 3), 1.0),
        ("easy", (0.1, 0.1, 0.2, 0.2, 0.1, math.pi / 6), 1.0),
    ],
)
def test_latents_are_positions_in_the_ranges(variant, half_ranges, scale):
    manifold = fonts_manifold(embedded_folder(), variant)
    centre = torch.tensor([0, 0, 0, 0, scale, 0], dtype=torch.float64)
    for latent in (-1.0, 0.0, 1.0):
        found = manifold.parameters_of(torch.full((1, 6), latent, dtype=torch.float64))
        expected = centre + latent * torch.tensor(half_ranges, dtype=torch.float64)
        torch.testing.assert_close(found[0], expected)


def test_images_are_in_the_unit_interval(manifold, draw):
    images = manifold.decode(draw(500))
    assert images.shape == (500, 1, 28, 28)
    assert images.dtype == torch.float32
    assert images.min() == 0
    assert 0.99 < images.max() <= 1


def test_gradients(manifold, draw):
    codes = draw(4, dtype=torch.float64)
    chart = manifold.chart(codes)
    latents = chart.latents.clone().requires_grad_()
    assert torch.autograd.gradcheck(chart.decode, latents)
    whole = codes.clone().requires_grad_()
    manifold.decode(whole).square().sum().backward()
    assert bool((whole.grad[:, :6] != 0).any(0).all())
    assert bool((whole.grad[:, 6:] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_is_its_samples(manifold, draw, dtype):
    codes = draw(50, dtype=dtype)
    whole = manifold.decode(codes)
    for size in (1, 7):
        parts = [manifold.decode(part) for part in codes.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    chart = manifold.chart(codes)
    mask = torch.arange(50) % 3 == 0
    kept = chart.keep(mask)
    assert torch.equal(kept.decode(kept.latents), whole[mask])
    assert torch.equal(chart.keep(mask.nonzero().squeeze(1)).latents, codes[mask, :6])


@pytest.mark.parametrize(
    ("column", "value"), [(6, -1.0), (6, 1000.0), (7, 10.0), (7, 2.5), (0, float("nan"))]
)
def test_impossible_codes_are_refused(manifold, draw, column, value):
    codes = draw(3)
    codes[1, column] = value
    with pytest.raises(InputError, match="codes"):
        manifold.decode(codes)


def test_codes_of_the_wrong_shape_are_refused(manifold, draw):
    with pytest.raises(InputError, match=r"codes: expected a float tensor \(3, 8\)"):
        manifold.decode(draw(3)[:, :7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prototypes": torch.zeros(2, 10, 28, 28)}, "prototypes"),
        ({"prototypes": torch.zeros(0, 10, 28, 28, dtype=torch.uint8)}, "prototypes"),
        ({"ranges": RANGES["hard"][:5]}, "ranges"),
        ({"ranges": ((1.0, 0.0),) * 6}, "ranges"),
        ({"font_names": ("one",)}, "font_names"),
    ],
)
def test_wrong_arguments_are_named(manifold, changes, message):
    with pytest.raises(InputError, match=message):
        FontsManifold(**{"prototypes": manifold.prototypes} | changes)


def test_the_fingerprint_says_what_determines_the_images(manifold):
    again = FontsManifold(manifold.prototypes.clone(), RANGES["hard"], manifold.font_names)
    easy = FontsManifold(manifold.prototypes, RANGES["easy"])
    fewer = FontsManifold(manifold.prototypes[1:])
    assert again.fingerprint == manifold.fingerprint
    assert len({manifold.fingerprint, easy.fingerprint, fewer.fingerprint}) == 3


@pytest.mark.parametrize("options", [{}, {"variant": "easy"}, {"distinct_fonts": True, "seed": 5}])
def test_the_images_of_the_dataset_are_the_decoded_codes(options):
    data = load_dataset("fonts", "train", size=300, folder=EMBEDDED, **options)
    manifold = fonts_manifold(EMBEDDED, options.get("variant", "hard"))
    assert torch.equal(manifold.decode(data.codes), data.images)
    assert torch.equal(manifold.decode(data.codes[7:8]), data.images[7:8])
    assert torch.equal(data.codes[:, 7].long(), data.labels)
    assert data.labels.bincount().tolist() == [30] * 10
    assert data.codes[:, :6].abs().max() <= 1
    assert data.images.dtype == data.codes.dtype == torch.float32
    assert data.classes == tuple("ABCDEFGHIJ")


def test_the_dataset_is_a_function_of_its_options():
    def load(**options):
        return load_dataset(
            "fonts", **{"split": "train", "size": 200, "folder": EMBEDDED} | options
        )

    first = load()
    assert torch.equal(first.images, load().images)
    assert first.fingerprint == load().fingerprint
    assert torch.equal(load(size=500).codes[:200], first.codes)
    others = [
        load(seed=1),
        load(size=201),
        load(split="test"),
        load(variant="easy"),
        load(distinct_fonts=True),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 6
    for other in (others[0], others[2]):
        assert not bool((other.codes[:, None, :6] == first.codes[None, :, :6]).all(2).any())


def test_the_defaults():
    assert len(load_dataset("fonts", "test", folder=EMBEDDED)) == 2000


@pytest.mark.parametrize("seed", [0, 1])
def test_train_and_test_share_no_transformation_whatever_the_seeds(seed):
    # Even and odd multiples of 2**-23: disjoint by construction, not by luck.
    for split, rest in (("train", 0), ("test", 1)):
        codes = load_dataset("fonts", split, size=1000, seed=seed, folder=EMBEDDED).codes
        steps = (codes[:, 0].double() + 1) * 2**23
        assert torch.equal(steps, steps.round())
        assert bool((steps.long() % 2 == rest).all())


def test_with_distinct_fonts_they_share_no_font(manifold):
    def fonts_of(split):
        data = load_dataset("fonts", split, size=2000, distinct_fonts=True, folder=EMBEDDED)
        return set(data.codes[:, 6].long().tolist())

    train, test = fonts_of("train"), fonts_of("test")
    assert not train & test
    assert train | test == set(range(manifold.num_fonts))
    assert len(test) == round(0.2 * manifold.num_fonts)
    shared = load_dataset("fonts", "test", size=2000, folder=EMBEDDED)
    assert set(shared.codes[:, 6].long().tolist()) == train | test


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 0}, ConfigError, "at least 1"),
        ({"variant": "hrad"}, ConfigError, "hard"),
        ({"sizes": 3}, ConfigError, "Did you mean 'size'"),
        ({"folder": "/absent"}, DataError, "does not exist"),
    ],
)
def test_wrong_options_are_explained(options, error, message):
    with pytest.raises(error, match=message):
        load_dataset("fonts", "train", **options)


def test_the_code_of_an_image_can_be_found(manifold, draw):
    codes = draw(6, seed=1)
    images = manifold.decode(codes)
    found = manifold.encode(images, codes[:, 7].long())
    distances = (manifold.decode(found) - images).flatten(1).norm(dim=1)
    assert torch.equal(found[:, 7], codes[:, 7])
    assert found[:, :6].abs().max() <= 1
    assert distances.median() < 0.5


def test_an_attack_without_codes_searches_them():
    manifold = fonts_manifold(embedded_folder())
    codes = torch.zeros(2, 8)
    codes[:, -1] = torch.tensor([0.0, 3.0])
    images, labels = manifold.decode(codes), codes[:, -1].long()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    attack = om.PGD(om.LatentBall(manifold, radius=0.1), steps=2, early_stop=False)
    result = attack(model, images, labels)
    assert result.images.shape == images.shape
    alone = manifold.encode(images[1:], labels[1:])
    assert torch.equal(alone, manifold.encode(images, labels)[1:])
