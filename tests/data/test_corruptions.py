import colorsys
import hashlib
import os
import subprocess
import sys
from io import BytesIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from onmanifold.data import CORRUPTIONS, Dataset, corrupt, corrupted, corruptions, load_dataset
from onmanifold.data import corruption_definitions as definitions
from onmanifold.data import corruption_kernels as kernels
from onmanifold.data.corruption_textures import frost_sheet, plasma
from onmanifold.foundation.errors import ConfigError, DataError, InputError

SEVERITIES = range(1, 6)
FIXED = ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
SIZES = [(1, 28, 28), (3, 32, 32), (1, 64, 48), (3, 64, 48), (1, 96, 96), (3, 96, 96)]


# From make_cifar_c.py and imagenet_c/corruptions.py of the paper's authors: severities 1 to 5 of CIFAR-10-C and of
# ImageNet-C.
PUBLISHED = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": ((500, 250, 100, 75, 50), (60, 25, 12, 5, 3)),
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "frost": (
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),
}


def parameters(name, side):
    return PUBLISHED[name][side > 64]


def pictures(count, channels=3, height=32, width=32):
    """Smooth colours, and edges where they turn: somewhat like photographs, the same for every size."""
    generator = np.random.default_rng(3)
    noise = generator.normal(size=(count, channels, height, width))
    smooth = ndimage.gaussian_filter(noise, (0, 0, height / 9, width / 9))
    fine = ndimage.gaussian_filter(noise, (0, 0, height / 40, width / 40))
    smooth, fine = smooth / smooth.std(), fine / fine.std()
    images = 0.45 + 0.12 * smooth + 0.04 * fine + 0.2 * (smooth > 0.4) - 0.15 * (smooth < -0.8)
    return torch.from_numpy(np.rint(255 * images.clip(0.05, 0.95)) / 255).float()


def flat(value, count=4, channels=3, side=32):
    return torch.full((count, channels, side, side), value)


def levels(images):
    return (255 * images).round().to(torch.uint8)


def test_the_names_stand_in_the_order_of_the_paper():
    expected = (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness"),
        *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    assert tuple(CORRUPTIONS) == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_parameters_are_the_published_ones(name):
    assert definitions.DEFINITIONS[name][1:] == PUBLISHED[name]


def test_the_longer_side_chooses_the_parameters():
    grey = torch.full((1, 1, 64, 65), 0.4)
    assert float(corrupt(grey, "brightness", 5).mean()) == pytest.approx(0.9, abs=1 / 255)
    grey = grey[..., :64]
    assert float(corrupt(grey, "brightness", 5).mean()) == pytest.approx(0.7, abs=1 / 255)


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_images_stay_images(name, shape):
    images = pictures(2, *shape)
    before = images.clone()
    for severity in (1, 5):
        result = corrupt(images, name, severity)
        assert result.shape == images.shape
        assert result.dtype == torch.float32
        assert 0 <= result.min() <= result.max() <= 1
        assert torch.equal(levels(result).float() / 255, result)
        assert (result - images).flatten(1).abs().amax(1).min() > 1.5 / 255
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_sample_depends_on_its_index_and_the_seed_alone(name, monkeypatch):
    images, indices = pictures(7), torch.tensor([40, 3, 7, 11, 12, 10**9, 0])
    whole = corrupt(images, name, 4, 5, indices)
    order = torch.tensor([6, 2, 0])
    assert torch.equal(corrupt(images[order], name, 4, 5, indices[order]), whole[order])
    assert torch.equal(corrupt(images[3:4], name, 4, 5, indices[3:4]), whole[3:4])
    monkeypatch.setattr(corruptions, "_PORTION", 2 * images[0].numel())
    assert torch.equal(corrupt(images, name, 4, 5, indices), whole)
    wide = images.double()
    assert torch.equal(levels(corrupt(wide, name, 4, 5, indices)), levels(whole))
    # The same picture elsewhere, or under another seed, is corrupted otherwise where there is chance.
    twice = corrupt(images[:1].repeat(2, 1, 1, 1), name, 4, 5)
    again = corrupt(images, name, 4, 6, indices)
    assert torch.equal(twice[0], twice[1]) == (name in FIXED)
    assert torch.equal(again, whole) == (name in FIXED)


def test_another_process_makes_the_same():
    code = (
        "import torch, hashlib; from onmanifold.data import CORRUPTIONS, corrupt\n"
        "images = torch.linspace(0, 1, 2 * 28 * 28).view(2, 1, 28, 28)\n"
        "made = torch.stack([corrupt(images, name, 3, 1) for name in CORRUPTIONS])\n"
        "print(hashlib.sha256(made.numpy().tobytes()).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "5", "OMP_NUM_THREADS": "2"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    images = torch.linspace(0, 1, 2 * 28 * 28).view(2, 1, 28, 28)
    made = torch.stack([corrupt(images, name, 3, 1) for name in CORRUPTIONS])
    assert other.stdout.strip() == hashlib.sha256(made.numpy().tobytes()).hexdigest()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_images_come_back_to_their_device():
    images = pictures(3)
    result = corrupt(images.cuda(), "fog", 3, indices=torch.arange(3).cuda())
    assert result.is_cuda
    assert torch.equal(result.cpu(), corrupt(images, "fog", 3))


def test_images_are_rounded_first_and_cut_to_8_bits():
    images = pictures(2)
    assert torch.equal(corrupt(images + 0.001, "contrast", 3), corrupt(images, "contrast", 3))
    # 100 and 200 about their mean of 150 at 0.75 of the contrast: 112.5 and 187.5, cut to 112 and 187.
    halves = torch.full((1, 1, 16, 16), 100 / 255)
    halves[..., 8:] = 200 / 255
    assert levels(corrupt(halves, "contrast", 1)).unique().tolist() == [112, 187]


# Of the official parameters these four do not move an image further away step by step.
OTHERWISE = ("glass_blur", "motion_blur", "frost", "elastic_transform")


def distances(name, images):
    return [float((corrupt(images, name, s) - images).abs().mean()) for s in SEVERITIES]


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name not in OTHERWISE])
def test_each_severity_moves_images_further(name):
    found = distances(name, pictures(48))
    assert all(low < high for low, high in pairwise(found)), found


def test_more_passes_of_glass_move_images_further():
    found = distances("glass_blur", pictures(48))
    assert max(found[:3]) < min(found[3:])


def test_longer_motion_moves_images_further():
    one, two, three, four, five = distances("motion_blur", pictures(200))
    assert one < two < three < five
    # Both have a deviation of 2 pixels; where the line ends makes no difference.
    assert four == pytest.approx(three, rel=0.06)


def test_frost_hides_more_of_the_image():
    images = pictures(64)
    hidden = [1 - correlation(corrupt(images, "frost", s), images) for s in SEVERITIES]
    assert hidden == sorted(hidden)
    assert hidden[4] > 2 * hidden[0] > 0.02


def correlation(one, two):
    pairs = zip(one.flatten(1).numpy(), two.flatten(1).numpy(), strict=True)
    return np.mean([np.corrcoef(*pair)[0, 1] for pair in pairs])


def test_elastic_severities_bend_images_more():
    # Of a linear ramp an affine map makes a linear ramp; what is left over was bent.
    rows, columns = np.mgrid[:32, :32]
    ramp = torch.from_numpy((0.2 + (rows + columns) * 0.6 / 62)[None, None]).float()
    inside = (slice(10, 22), slice(10, 22))
    plane = np.stack([rows[inside], columns[inside], np.ones((12, 12))], 2).reshape(-1, 3)
    bent = []
    for severity in SEVERITIES:
        made = corrupt(ramp.repeat(40, 1, 1, 1), "elastic_transform", severity)
        values = made[:, 0, 10:22, 10:22].reshape(40, -1).double().numpy().T
        rest = values - plane @ np.linalg.lstsq(plane, values, rcond=None)[0]
        bent.append(255 * rest.std())
    # At the first severity there is only the affine map, and at the second hardly more: rounding is left over.
    assert max(bent[:2]) < 0.4 < 0.5 < bent[2] < bent[3] < bent[4]


@pytest.mark.parametrize("side", [32, 96])
def test_gaussian_noise_has_its_deviation(side):
    expected = parameters("gaussian_noise", side)
    for severity in (1, 2) if side > 64 else SEVERITIES:
        grey = flat(0.5, 8, 3, side)
        noise = corrupt(grey, "gaussian_noise", severity) - grey
        assert float(noise.std()) == pytest.approx(expected[severity - 1], rel=0.02)
        assert abs(float(noise.mean()) + 0.5 / 255) < 3e-3  # cut, not rounded


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("value", [40 / 255, 120 / 255])
def test_shot_noise_is_poisson(side, value):
    photons = parameters("shot_noise", side)
    for severity in SEVERITIES if side < 64 else (1, 2):
        noisy = corrupt(flat(value, 8, 3, side), "shot_noise", severity).double()
        assert float(noisy.var()) == pytest.approx(value / photons[severity - 1], rel=0.05)
        assert float(noisy.mean()) == pytest.approx(value - 0.5 / 255, abs=3e-3)


def test_poisson_counts_invert_the_distribution_function():
    chances = np.random.default_rng(0).random((256, 50))
    rates = np.arange(256)[:, None].repeat(50, 1)
    for scale in (500, 3):
        expected = stats.poisson.ppf(chances, rates / 255 * scale)
        assert np.array_equal(kernels.poisson(rates, scale, chances), np.maximum(expected, 0))
    assert not kernels.poisson(np.zeros(9, dtype=np.int64), 60, np.linspace(0, 0.999, 9)).any()


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulses_are_black_and_white_in_equal_shares(side, severity):
    images = flat(102 / 255, 8, 3, side)
    found = levels(corrupt(images, "impulse_noise", severity))
    share = parameters("impulse_noise", side)[severity - 1]
    tolerance = 4 * (share / found.numel()) ** 0.5
    assert set(found.unique().tolist()) == {0, 102, 255}
    for value in (0, 255):
        assert abs(float((found == value).double().mean()) - share / 2) < tolerance


@pytest.mark.parametrize("disk", [(0.3, 0.4), (1, 0.2), (1.5, 0.1), (3, 0.1), (10, 0.5)])
def test_defocus_filters_with_a_disk(disk):
    weights = kernels.disk(*disk)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    assert np.allclose(weights, weights.T)
    assert np.allclose(weights, weights[::-1])
    # The blur of the edge moves a little outside and leaves the middle.
    assert (weights > 0.5 * weights.max()).sum() == {0.3: 1, 1: 5, 1.5: 9, 3: 29, 10: 317}[disk[0]]
    images = pictures(2, 3, 40, 36).numpy()
    expected = ndimage.correlate(images, weights[None, None], mode="mirror")
    assert np.allclose(kernels.correlate(images, weights), expected, atol=1e-5)


@pytest.mark.parametrize(("reach", "passes"), [(1, 1), (1, 2), (2, 3), (4, 2)])
def test_glass_copies_neighbours_one_after_the_other(reach, passes):
    generator = np.random.default_rng(reach)
    images = generator.random((3, 2, 21, 17), dtype=np.float32)
    offsets = generator.integers(-reach, reach, (3, 2, passes, 21, 17))
    expected = images.copy()
    for sample in range(3):
        for number in range(passes):
            for row in range(21 - reach, reach, -1):
                for column in range(17 - reach, reach, -1):
                    down, right = offsets[sample, :, number, row, column]
                    near = expected[sample, :, row + down, column + right].copy()
                    expected[sample, :, row, column] = near
    assert np.array_equal(kernels.local_shuffle(images, offsets), expected)


def test_motion_blur_draws_a_dot_out_to_half_a_gaussian():
    dot = np.zeros((2, 1, 31, 31), dtype=np.float32)
    dot[:, :, 15, 15] = 1
    angles = np.array([0, 90], dtype=np.float32)
    right, down = kernels.motion_blur(dot, angles, 6, 2.0)[:, 0]
    weights = np.exp(-(np.arange(13) ** 2) / 8)
    assert np.allclose(right[15, 15:2:-1], weights / weights.sum(), atol=1e-5)
    assert np.allclose(down, right.T)
    assert np.count_nonzero(right.sum(1)) == 1


def test_motion_blur_leaves_an_even_image():
    for severity in SEVERITIES:
        images = flat(77 / 255, 3, 1, 28)
        assert torch.equal(corrupt(images, "motion_blur", severity), images)


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.06, 1.25, 1.3, 2.25, 4.5])
def test_zooming_is_that_of_scipy(factor):
    images = pictures(2, 3, 32, 45).numpy()
    crops = [int(np.ceil(side / factor)) for side in (32, 45)]
    top, left = (32 - crops[0]) // 2, (45 - crops[1]) // 2
    middle = images[:, :, top : top + crops[0], left : left + crops[1]]
    larger = ndimage.zoom(middle, (1, 1, factor, factor), order=1)
    top, left = (larger.shape[2] - 32) // 2, (larger.shape[3] - 45) // 2
    expected = larger[:, :, top : top + 32, left : left + 45]
    assert np.allclose(kernels.zoomed(images, (factor,)), expected, atol=1e-5)


def test_zoom_blur_is_the_mean_of_the_image_and_its_zooms():
    images = pictures(2)
    steps = np.arange(1, 1.26, 0.01).tolist()  # rounding decides whether 1.26 is among them
    total = images.numpy() + sum(kernels.zoomed(images.numpy(), (step,)) for step in steps)
    found = corrupt(images, "zoom_blur", 5)
    assert np.allclose(found, total / (len(steps) + 1) - 0.5 / 255, atol=0.52 / 255)


def test_snow_falls_alike_when_turned_and_whitens():
    black = corrupt(flat(0.0), "snow", 5)
    assert torch.allclose(black, black.flip(2, 3), atol=1.5 / 255)
    assert float(black.min()) >= 25 / 255  # (1 − 0.8) · 0.5 of white everywhere
    assert float(black.std(dim=(1, 2, 3)).min()) > 0.03
    # Only the largest numbers become flakes: at the first severity most of the sky stays clear.
    clear = levels(corrupt(flat(0.0), "snow", 1)) == 6  # (1 − 0.95) · 0.5 of white
    assert 0.6 < float(clear.double().mean()) < 0.98
    images = pictures(8)
    assert (corrupt(images, "snow", 3) - images).min() > -0.06


@pytest.mark.parametrize("side", [32, 96])
def test_snow_falls_more_down_than_aside(side):
    black = corrupt(flat(0.0, 30, 1, side), "snow", 2)
    assert 1.5 * black.diff(dim=2).abs().mean() < black.diff(dim=3).abs().mean()


@pytest.mark.parametrize("side", [32, 96])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_mixes_image_and_ice(side, severity):
    image, ice = parameters("frost", side)[severity - 1]
    black = corrupt(flat(0.0, 20, 3, side), "frost", severity)
    grey = corrupt(flat(0.4, 20, 3, side), "frost", severity)
    free = grey < 1
    assert torch.allclose((grey - black)[free], torch.tensor(0.4 * image), atol=1.5 / 255)
    assert float(black.mean()) == pytest.approx(ice * frost_sheet(side <= 64).mean(), rel=0.2)
    assert float(black.std(dim=(1, 2, 3)).min()) > 0.05 * ice
    # Ice is blue-white.
    red, green, blue = black.mean(dim=(0, 2, 3)).tolist()
    assert red < green < blue < 1.25 * red


@pytest.mark.parametrize("side", [28, 32, 64, 128])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_reaches_from_the_thinnest_to_the_thickest(side, severity):
    density, _ = parameters("fog", side)[severity - 1]
    value = 200 / 255
    foggy = corrupt(flat(value, 3, 1, side), "fog", severity)
    if side == 28:  # cut from 32, so that the ends may lie outside
        assert foggy.max() <= value
        return
    assert foggy.amax((1, 2, 3)).tolist() == pytest.approx([value] * 3, abs=1.01 / 255)
    thinnest = value**2 / (value + density)
    assert foggy.amin((1, 2, 3)).tolist() == pytest.approx([thinnest] * 3, abs=1.01 / 255)


def test_plasma_takes_the_mean_of_four_neighbours_and_disturbs_it():
    chances = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    field, step, scale = np.zeros((8, 8)), 8, 1.0
    while step > 1:
        half = step // 2
        places = [(r, c) for r in range(0, 8, half) for c in range(0, 8, half)]
        middles = [(r, c) for r, c in places if r % step and c % step]
        sides = [(r, c) for r, c in places if bool(r % step) != bool(c % step)]
        around = {
            **dict.fromkeys(middles, ((half, half), (half, -half), (-half, half), (-half, -half))),
            **dict.fromkeys(sides, ((half, 0), (-half, 0), (0, half), (0, -half))),
        }
        for (row, column), moves in around.items():
            near = [field[(row + down) % 8, (column + right) % 8] for down, right in moves]
            field[row, column] = np.mean(near) + scale * (2 * chances[0, row, column] - 1)
        step, scale = half, scale / 1.7**2
    expected = (field - field.min()) / (field.max() - field.min())
    assert np.allclose(plasma(chances, 1.7)[0], expected)


def test_plasma_is_periodic_and_smoother_where_it_decays_faster():
    chances = np.random.default_rng(0).random((6, 64, 64), dtype=np.float32)
    rough, smooth = plasma(chances, 1.4), plasma(chances, 3)
    for fields in (rough, smooth):
        assert np.allclose((fields.min((1, 2)), fields.max((1, 2))), [[0], [1]])
    inside, seam = np.abs(np.diff(smooth, axis=1)).mean(), np.abs(smooth[:, 0] - smooth[:, -1])
    assert seam.mean() < 3 * inside
    assert 2 * inside < np.abs(np.diff(rough, axis=1)).mean()


def test_brightness_shifts_the_value_of_hsv():
    images = pictures(1, 3, 16, 16)
    images[0, :, 0, 0] = 0
    for severity in SEVERITIES:
        shift = parameters("brightness", 16)[severity - 1]
        found = corrupt(images, "brightness", severity)[0].flatten(1).T.tolist()
        for pixel, clean in zip(found, images[0].flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*clean)
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + shift, 1))
            assert pixel == pytest.approx(expected, abs=1.01 / 255)
    grey = images[:, :1]
    shifted = (grey + 0.3).clamp(max=1)
    assert torch.allclose(corrupt(grey, "brightness", 5), shifted, atol=1.01 / 255)


@pytest.mark.parametrize("side", [32, 96])
def test_contrast_pulls_each_channel_to_its_mean(side):
    images = pictures(3, 3, side, side)
    means = images.mean((2, 3), keepdim=True)
    for severity in SEVERITIES:
        expected = means + parameters("contrast", side)[severity - 1] * (images - means)
        found = corrupt(images, "contrast", severity)
        assert torch.allclose(found, expected - 0.5 / 255, atol=0.51 / 255)


def test_elastic_displacements_are_smoothed_as_scipy_smooths():
    fields = np.random.default_rng(0).random((2, 20, 28), dtype=np.float32)
    for deviation in (0.9, 6.4, 40.0):
        expected = ndimage.gaussian_filter(
            fields.astype(float), (0, deviation, deviation), mode="reflect", truncate=3
        )
        assert np.allclose(kernels.smooth_field(fields, deviation), expected)


@pytest.mark.parametrize("about_pixels", [True, False])
def test_warps_sample_as_scipy_samples(about_pixels):
    images = pictures(2, 1, 20, 28).numpy()
    generator = np.random.default_rng(0)
    rows = generator.uniform(-15, 35, (2, 20, 28))
    columns = generator.uniform(-20, 45, (2, 20, 28))
    mode = "mirror" if about_pixels else "reflect"
    expected = [
        ndimage.map_coordinates(image[0].astype(float), place, order=1, mode=mode)
        for image, *place in zip(images, rows, columns, strict=True)
    ]
    found = kernels.warped(images, rows, columns, about_pixels=about_pixels)
    assert np.allclose(found[:, 0], expected, atol=1e-4)


def test_the_affine_map_moves_the_triangle_as_asked():
    # All corners moved alike: the image is moved by whole pixels.
    moves = np.broadcast_to(np.array([2.0, -1.0]), (1, 3, 2))
    rows, columns = definitions._moved_triangle(32, 48, moves)
    down, right = np.mgrid[:32, :48]
    assert np.allclose(rows[0], down + 1)
    assert np.allclose(columns[0], right - 2)


def test_pixels_are_blocks_of_the_mean():
    images = pictures(3, 3, 128, 96)
    found = levels(corrupt(images, "pixelate", 2)).float()
    blocks = found.view(3, 3, 64, 2, 48, 2)
    assert torch.equal(blocks.amax((3, 5)), blocks.amin((3, 5)))
    means = (255 * images).view(3, 3, 64, 2, 48, 2).mean((3, 5))
    assert (blocks[:, :, :, 0, :, 0] - means).abs().max() <= 1  # Pillow rounds twice


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 96, 96)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_that_of_pillow(shape, severity):
    (image,) = pictures(1, *shape)
    pixels = levels(image).permute(1, 2, 0).numpy().squeeze()
    file = BytesIO()
    quality = parameters("jpeg_compression", shape[1])[severity - 1]
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    expected = np.asarray(Image.open(file))
    found = levels(corrupt(image[None], "jpeg_compression", severity))[0]
    assert np.array_equal(found.permute(1, 2, 0).numpy().squeeze(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "gausian_noise"}, "Did you mean 'gaussian_noise'"),
        ({"name": None}, "unknown name None"),
        ({"severity": 0}, "severity: expected 1, 2, 3, 4 or 5, found 0"),
        ({"severity": 6}, "found 6"),
        ({"severity": True}, "found True"),
        ({"severity": 2.0}, "found 2.0"),
        ({"name": ["fog"]}, "unknown name"),
        ({"images": torch.rand(3, 2, 32, 32)}, "1 or 3 channels"),
        ({"images": torch.rand(3, 3, 32, 15)}, "at least 16"),
        ({"images": 255 * torch.rand(3, 3, 32, 32)}, "divide by 255"),
        ({"images": torch.zeros(3, 3, 32, 32, dtype=torch.uint8)}, "floating-point"),
        ({"indices": torch.arange(2)}, r"indices: expected int64 of shape \(3,\)"),
        ({"indices": torch.arange(3.0)}, "indices"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"images": torch.rand(3, 3, 32, 32), "name": "fog", "severity": 1} | changes
    with pytest.raises(InputError, match=message):
        corrupt(**arguments)


def test_no_images_are_no_error():
    assert corrupt(torch.zeros(0, 3, 32, 32), "fog", 1).shape == (0, 3, 32, 32)


def make_dataset(count=6, **changes):
    fields = {
        "name": "toy",
        "images": levels(pictures(count)),
        "labels": torch.arange(count) % 3,
        "classes": tuple("abc"),
        "fingerprint": "toy",
        "codes": torch.rand(count, 2),
        "indices": torch.arange(100, 100 + count),
    }
    return Dataset(**fields | changes)


def test_a_corrupted_dataset_corrupts_what_it_gives():
    clean = make_dataset()
    foggy = corrupted(clean, "fog", 3, seed=2)
    everything = torch.arange(6)
    expected = corrupt(clean.batch(everything).images, "fog", 3, 2, clean.indices)
    batch = foggy.batch(everything)
    assert torch.equal(batch.images, expected)
    assert torch.equal(batch.labels, clean.labels)
    assert torch.equal(batch.indices, clean.indices)
    assert batch.codes is None
    assert torch.equal(foggy.batch(torch.tensor([4, 1])).images, expected[[4, 1]])
    assert torch.equal(
        foggy.subset(torch.tensor([5, 2])).batch(torch.arange(2)).images, expected[[5, 2]]
    )
    assert torch.equal(foggy.take(2).to("cpu").batch(torch.arange(2)).images, expected[:2])
    assert torch.equal(clean.batch(everything).images, clean.images.float() / 255)
    assert clean.codes is not None


def test_corruptions_follow_one_another():
    clean = make_dataset(2)
    both = corrupted(corrupted(clean, "fog", 3), "pixelate", 5)
    foggy = corrupt(clean.batch(torch.arange(2)).images, "fog", 3, 0, clean.indices)
    assert torch.equal(both.batch(torch.arange(2)).images, corrupt(foggy, "pixelate", 5))


def test_every_corruption_of_a_dataset_has_a_fingerprint_of_its_own():
    clean, other = make_dataset(), make_dataset(fingerprint="other")
    sets = [clean, other, corrupted(clean, "fog", 1), corrupted(other, "fog", 1)]
    sets += [
        corrupted(clean, "fog", 2),
        corrupted(clean, "frost", 1),
        corrupted(clean, "fog", 1, 1),
    ]
    sets += [corrupted(corrupted(clean, "fog", 1), "fog", 1)]
    assert len({data.fingerprint for data in sets}) == len(sets)
    assert corrupted(clean, "fog", 1).fingerprint == sets[2].fingerprint
    with pytest.raises(InputError, match="severity"):
        corrupted(clean, "fog", 7)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ONMANIFOLD_DATA", str(tmp_path))
    return tmp_path


def write_official(folder, name="cifar10_c", corruption="fog", count=4, classes=10):
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (5 * count, 32, 32, 3), dtype=np.uint8)
    labels = np.tile(generator.integers(0, classes, count, dtype=np.uint8), 5)
    np.save(place / f"{corruption}.npy", images)
    np.save(place / "labels.npy", labels)
    return images, labels


@pytest.mark.parametrize(
    ("name", "place", "corruption", "classes"),
    [
        ("cifar10_c", "cifar10_c", "fog", 10),
        ("cifar10_c", "cifar10_c/CIFAR-10-C", "speckle_noise", 10),
        ("cifar100_c", "cifar100_c", "fog", 100),
    ],
)
def test_official_files_hold_severity_after_severity(folder, name, place, corruption, classes):
    images, labels = write_official(folder, place, corruption, classes=classes)
    fingerprints = set()
    for severity in SEVERITIES:
        data = load_dataset(name, corruption=corruption, severity=severity)
        part = slice(4 * (severity - 1), 4 * severity)
        assert data.images.dtype == torch.uint8
        assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), images[part])
        assert data.labels.tolist() == labels[part].tolist()
        assert (data.num_classes, data.indices.tolist()) == (classes, [0, 1, 2, 3])
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 5


@pytest.mark.parametrize("missing", ["fog.npy", "labels.npy"])
def test_a_missing_official_file_says_which_where_and_how(folder, missing):
    write_official(folder)
    (folder / "cifar10_c" / missing).unlink()
    with pytest.raises(DataError) as caught:
        load_dataset("cifar10_c", corruption="fog", severity=1)
    message = str(caught.value)
    assert str(folder / "cifar10_c" / missing) in message
    assert "https://zenodo.org/records/2535967" in message
    assert "ONMANIFOLD_DATA" in message


@pytest.mark.parametrize("damaged", ["fog.npy", "labels.npy"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_official_file_is_a_data_error(folder, damaged, share):
    write_official(folder)
    file = folder / "cifar10_c" / damaged
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{damaged} is not a NumPy file, or is truncated"):
        load_dataset("cifar10_c", corruption="fog", severity=1)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("fog.npy", np.zeros((20, 3, 32, 32), np.uint8), "32, 32, 3"),
        ("fog.npy", np.zeros((20, 32, 32, 3), np.float32), "uint8"),
        ("fog.npy", np.zeros((19, 32, 32, 3), np.uint8), "found 19 in all"),
        ("fog.npy", np.array([{}], dtype=object), "fog.npy is not a NumPy file"),
        ("labels.npy", np.zeros(19, np.uint8), "expected 20 whole numbers"),
        ("labels.npy", np.zeros(20, np.float32), "float32"),
        ("labels.npy", np.full(20, 10, np.uint8), "labels 10 to 10, expected 0 to 9"),
    ],
)
def test_foreign_official_files_are_data_errors(folder, file, array, message):
    write_official(folder)
    np.save(folder / "cifar10_c" / file, array)
    with pytest.raises(DataError, match=message):
        load_dataset("cifar10_c", corruption="fog", severity=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"corruption": "fogg", "severity": 1}, "Did you mean 'fog'"),
        ({"corruption": "fog", "severity": 6}, "severity: expected 1, 2, 3, 4 or 5, found 6"),
        ({"corruption": "fog"}, "'severity' is missing"),
        ({"split": "train", "corruption": "fog", "severity": 1}, "expected 'test'"),
    ],
)
def test_wrong_options_of_official_files_are_named(folder, options, message):
    write_official(folder)
    with pytest.raises(ConfigError, match=message):
        load_dataset("cifar10_c", **options)
