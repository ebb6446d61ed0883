"""The unforeseen attacks as threat models: fog, snow, Gabor, elastic, JPEG; their presets, and UAR."""

import io
import math

import pytest
import torch
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn, idctn
from torch import nn

from onmanifold.attacks import FGSM, PGD
from onmanifold.evaluation.unseen import CIFAR10, DMAT, IMAGENET100, uar, unseen_attacks
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import THREATS
from onmanifold.threats import JPEG, Elastic, Fog, Gabor, Snow
from onmanifold.threats.effects import Filters, content_keys
from onmanifold.threats.elastic import displaced, smoothing
from onmanifold.threats.fog import plasma
from onmanifold.threats.gabor import gabor_kernels
from onmanifold.threats.jpeg import CHROMA_TABLE, LUMA_TABLE, planes, waves
from onmanifold.threats.snow import intensities

MAKERS = {
    "fog": lambda factor=1.0: Fog(0.5 * factor),
    "snow": lambda factor=1.0: Snow(0.5 * factor),
    "gabor": lambda factor=1.0: Gabor(0.05 * factor),
    "elastic": lambda factor=1.0: Elastic(0.7 * factor),
    "jpeg_linf": lambda factor=1.0: JPEG("linf", 0.3 * factor),
    "jpeg_l2": lambda factor=1.0: JPEG("l2", 4.0 * factor),
    "jpeg_l1": lambda factor=1.0: JPEG("l1", 40.0 * factor),
}
ZERO_IS_THE_IMAGE = ("gabor", "elastic", "jpeg_linf", "jpeg_l2", "jpeg_l1")
SHAPES = [(1, 28, 28), (3, 28, 28), (3, 32, 32), (1, 64, 48), (3, 48, 64), (3, 33, 30)]


@pytest.fixture(params=list(MAKERS))
def name(request):
    return request.param


@pytest.fixture
def make(name):
    return MAKERS[name]


def batch(count, shape=(3, 32, 32), dtype=torch.float64, edge=True):
    """Images with some pixels at 0 and 1; with ``edge`` off all are inside (0.3, 0.7)."""
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, *shape, generator=generator, dtype=torch.float64)
    images = (1.2 * images - 0.1).clamp(0, 1) if edge else 0.3 + 0.4 * images
    return images.to(dtype)


def around(threat, images):
    return threat.around(images, torch.zeros(len(images), dtype=torch.int64))


def start(region, count, seed=0):
    return region.random("uniform", seed, torch.arange(count))


def taken(variables, mask):
    return {key: tensor[mask] for key, tensor in variables.items()}


def test_they_are_registered_by_name():
    for registered in ("fog", "snow", "gabor", "elastic", "jpeg"):
        built = THREATS.build({"type": registered, "radius": 0.25})
        assert built.radius == 0.25


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_radius_0_is_exactly_the_identity(make, shape, dtype):
    images = batch(3, shape, dtype)
    region = around(make(0.0), images)
    for variables in (region.zero(), region.project(start(region, 3))):
        assert torch.equal(region.render(variables), images)


def test_zero_variables_are_exactly_the_image_where_it_is_promised(name, make):
    images = batch(3, dtype=torch.float32)
    region = around(make(), images)
    same = torch.equal(region.render(region.zero()), images)
    assert same == (name in ZERO_IS_THE_IMAGE)


@pytest.mark.parametrize("shape", SHAPES)
def test_images_keep_shape_dtype_and_range_and_are_changed(make, shape):
    for dtype in (torch.float32, torch.float64):
        images = batch(4, shape, dtype)
        for factor in (0.3, 1.0, 60.0):
            region = around(make(factor), images)
            rendered = region.render(region.project(start(region, 4)))
            assert rendered.shape == images.shape
            assert rendered.dtype == dtype
            assert rendered.min() >= -1e-6
            assert rendered.max() <= 1 + 1e-6
            change = (rendered - images).abs().flatten(1).mean(1)
            assert (change > 1e-3).all()


def test_a_sample_is_the_same_in_any_batch_and_order(make):
    images = batch(7)
    whole = around(make(), images)
    variables = start(whole, 7)
    together = whole.render(variables)
    for rows in ([3], [6, 0], [5, 4, 3, 2, 1, 0, 6]):
        some = around(make(), images[rows]).render(taken(variables, rows))
        torch.testing.assert_close(some, together[rows], rtol=0, atol=1e-12)
    # Nor does it matter what the others look like, or in which memory format they come.
    others = torch.cat([images[2:3], torch.zeros_like(images[:1]), torch.ones_like(images[:1])])
    others = others.contiguous(memory_format=torch.channels_last)
    some = around(make(), others).render(taken(variables, [2, 0, 1]))
    torch.testing.assert_close(some[0], together[2], rtol=0, atol=1e-12)


def test_kept_samples_see_the_same_region(make):
    images = batch(6)
    radii = torch.linspace(0.2, 1.2, 6, dtype=torch.float64)
    region = around(make(radii), images)
    variables = start(region, 6)
    mask = torch.tensor([False, True, True, False, False, True])
    kept = region.keep(mask)
    few = taken(variables, mask)
    expected = region.render(variables)[mask]
    torch.testing.assert_close(kept.render(few), expected, rtol=0, atol=1e-12)
    again = kept.keep(torch.tensor([False, False, True]))
    last = again.render(taken(few, [2]))
    torch.testing.assert_close(last, expected[2:], rtol=0, atol=1e-12)
    alone = around(make(radii[5].item()), images[5:])
    torch.testing.assert_close(alone.render(taken(few, [2])), last, rtol=0, atol=1e-12)


def test_float32_and_float64_agree(make):
    images = batch(5, dtype=torch.float32)
    narrow, wide = around(make(), images), around(make(), images.double())
    variables = start(wide, 5)
    found = narrow.render({key: tensor.float() for key, tensor in variables.items()})
    torch.testing.assert_close(found.double(), wide.render(variables), rtol=0, atol=1e-5)


def test_one_radius_per_sample_is_checked(make):
    with pytest.raises(InputError, match="radius: found 3 values for 4 samples"):
        around(make(torch.ones(3)), batch(4))
    with pytest.raises(InputError, match="radius: expected a number >= 0"):
        make(-1.0)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 33)])
def test_gradients_through_render(make, shape):
    # Away from 0 and 1, where images are clipped.
    region = around(make(), batch(2, shape, edge=False))
    variables = start(region, 2, seed=1)
    (key,) = variables

    def render(tensor):
        return region.render({key: tensor})

    leaf = (0.9 * variables[key]).requires_grad_()
    assert torch.autograd.gradcheck(render, leaf, eps=1e-7, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_at_zero_are_finite_and_point_somewhere(make, dtype):
    for images in (batch(3, dtype=dtype), torch.zeros(3, 3, 32, 32, dtype=dtype)):
        region = around(make(), images)
        leaves = {key: tensor.requires_grad_() for key, tensor in region.zero().items()}
        weights = torch.linspace(-1, 2, images.numel(), dtype=dtype).view_as(images)
        # Even on a black image, but where nothing can be seen to move.
        values = (region.render(leaves) * weights).sum()
        (gradient,) = torch.autograd.grad(values, list(leaves.values()))
        assert gradient.isfinite().all()
        if images.any():
            assert (gradient.flatten(1).abs().amax(1) > 0).all()


def blob_net(dtype):
    """Which of two patterns is in the middle of an image."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(8, 8, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * 15 * 15, 5),
        )
    # Logits of a trained net's size.
    net[-1].weight.data *= 8
    return net.to(dtype).eval()


def test_pgd_raises_the_loss(make):
    net, images = blob_net(torch.float64), batch(8)
    labels = net(images).argmax(1)
    attack = PGD(make(), steps=8, early_stop=False)
    result = attack(net, images, labels, seed=3)
    region = make().around(images, labels)
    criterion = nn.CrossEntropyLoss(reduction="none")
    begin = criterion(net(region.render(start(region, 8, seed=3))), labels)
    end = criterion(net(result.images), labels)
    assert (end > begin).all()
    assert end.mean() > 1.1 * begin.mean()
    one = attack(net, images[5:6], labels[5:6], seed=3, indices=torch.tensor([5]))
    torch.testing.assert_close(one.images[0], result.images[5], rtol=0, atol=1e-9)
    quick = FGSM(make(), early_stop=False)(net, images.float().double(), labels)
    assert quick.objective.isfinite().all()


def test_content_keys_know_the_image_alone():
    images = batch(50)
    keys = content_keys(images)
    assert len(keys.unique()) == 50
    assert torch.equal(content_keys(images.float()), keys)
    assert torch.equal(content_keys(images[[7, 2]]), keys[[7, 2]])
    # On the border between two levels of 255, where float32 and float64 would round apart.
    border = ((torch.arange(256, dtype=torch.float64) + 0.5) / 255 - 1e-11).view(1, 1, 16, 16)
    assert torch.equal(content_keys(border.float()), content_keys(border))
    moved = images.clone()
    moved[0, 1, 4, 4] += 1 / 255 if moved[0, 1, 4, 4] < 0.5 else -1 / 255
    assert content_keys(moved)[0] != keys[0]
    assert torch.equal(content_keys(moved)[1:], keys[1:])


def test_filters_are_convolutions():
    generator = torch.Generator().manual_seed(0)
    kernels = torch.rand(2, 5, 5, generator=generator, dtype=torch.float64)
    values = torch.rand(2, 9, 12, generator=generator, dtype=torch.float64)
    found = Filters.of(kernels, 9, 12)(values)
    for row in range(2):
        expected = ndimage.convolve(values[row].numpy(), kernels[row].numpy(), mode="constant")
        torch.testing.assert_close(found[row], torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_plasma_is_the_diamond_square_recursion():
    generator = torch.Generator().manual_seed(2)
    terms = torch.rand(3, 63, generator=generator, dtype=torch.float64)
    found = plasma(terms, 8, decay=2.5)
    assert torch.equal(plasma(terms[1:2], 8, 2.5)[0], found[1])

    grid, used = torch.zeros(8, 8, dtype=torch.float64), 0
    for level, step in enumerate((8, 4, 2)):
        half, count = step // 2, 8 // step
        own = terms[0, used : used + 3 * count**2].view(3, count, count) * 2.5**-level
        used += 3 * count**2

        def around_it(row, place, offsets):
            return sum(grid[(row + r) % 8, (place + c) % 8] for r, c in offsets) / 4

        corners = [(a * half, b * half) for a in (-1, 1) for b in (-1, 1)]
        sides = [(half, 0), (-half, 0), (0, half), (0, -half)]
        cells = [(i, j) for i in range(count) for j in range(count)]
        for i, j in cells:
            row, place = i * step + half, j * step + half
            grid[row, place] = around_it(row, place, corners) + own[0, i, j]
        for i, j in cells:
            row, place = i * step, j * step
            grid[row, place + half] = around_it(row, place + half, sides) + own[1, i, j]
            grid[row + half, place] = around_it(row + half, place, sides) + own[2, i, j]
    torch.testing.assert_close(found[0], grid, rtol=0, atol=1e-12)


def test_fog_is_a_mean_of_image_and_a_full_range_of_fog():
    images = batch(3)
    region = around(Fog(0.6), images)
    fog = (region.render(start(region, 3)) * 1.6 - images) / 0.6
    torch.testing.assert_close(fog[:, 0], fog[:, 2], rtol=0, atol=1e-12)
    torch.testing.assert_close(fog.amin((1, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(fog.amax((1, 2, 3)), torch.ones(3).double(), rtol=0, atol=1e-12)
    flat = (region.render(region.zero()) * 1.6 - images) / 0.6
    torch.testing.assert_close(flat, torch.full_like(flat, 0.5), rtol=0, atol=1e-12)


def test_snow_keeps_to_its_budget_and_only_brightens():
    full = intensities(torch.ones(1, 7, 5, 4, dtype=torch.float64))
    torch.testing.assert_close(full, torch.full_like(full, 0.2))
    generator = torch.Generator().manual_seed(0)
    many = 2 * torch.rand(50, 7, 16, 16, generator=generator, dtype=torch.float64) - 1
    blocks = nn.functional.avg_pool2d(intensities(many).mean(1), 2)
    assert blocks.max() <= 0.2 + 1e-12
    # Uniform variables give a mean of (1 - e^-5) / 5, before dense blocks are dimmed.
    assert torch.exp((many - 1) / 0.4).mean() == pytest.approx((1 - math.exp(-5)) / 5, abs=0.002)
    images = batch(4)
    region = around(Snow(0.4), images)
    assert (region.render(start(region, 4)) >= images - 1e-12).all()


def test_a_flake_is_a_streak_of_its_radius():
    image = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    region = around(Snow(0.3), image)
    region.images = image  # without the white sky
    none = torch.full_like(region.zero()["flakes"], -9.0)
    one = none.clone()
    # Half the intensity has a sixteenth of the effect.
    one[0, 2, 3, 3] = 1 + 0.4 * math.log(0.5)
    faint = region.render({"flakes": one})[0, 0]
    assert faint.max().item() == pytest.approx(1 - math.exp(-0.3 / 16), rel=1e-6)
    # Alone in its block of 28 a full flake has a mean of 1/28, below the budget.
    one[0, 2, 3, 3] = 1.0
    seen = region.render({"flakes": one})[0, 0]
    assert region.render({"flakes": none}).max() < 1e-8
    assert seen.max().item() == pytest.approx(1 - math.exp(-0.3), rel=1e-6)
    row, place = divmod(int(seen.argmax()), 28)
    assert row // 4 == place // 4 == 3
    assert ((seen > 0.01).nonzero() - torch.tensor([row, place])).abs().max() <= 2


def test_snow_whitens_grey_and_colour_alike():
    grey = batch(2, (1, 28, 28))
    for radius, share in ((0.5, 0.5), (4.0, 1.0)):
        one = around(Snow(radius), grey).images
        three = around(Snow(radius), grey.expand(-1, 3, -1, -1)).images
        pale = 0.75 * grey + 0.25 * torch.maximum(grey, 1.5 * grey + 0.5)
        expected = (grey + share * (pale - grey)).clamp(0, 1)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(three, expected.expand(-1, 3, -1, -1), rtol=0, atol=1e-6)


def test_gabor_kernels_follow_the_formula():
    deviation, frequency, angle = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 4.0, 0.7))
    (found,) = gabor_kernels(deviation, frequency, angle, torch.tensor([3]))
    expected = torch.zeros(23, 23, dtype=torch.float64)
    for row in range(23):
        for place in range(23):
            y, x = row / 22 - 0.5, place / 22 - 0.5
            envelope = math.exp(-(x * x + y * y) / (2 * 0.2**2))
            for turn in (0.7, 0.7 + math.pi / 3, 0.7 + 2 * math.pi / 3):
                wave = math.cos(8 * math.pi * (x * math.cos(turn) + y * math.sin(turn)))
                expected[row, place] += envelope * wave
    torch.testing.assert_close(found, expected / expected.norm(), rtol=0, atol=1e-12)


def test_gabor_noise_moves_no_pixel_by_more_than_its_radius():
    images = batch(20, edge=False)
    region = around(Gabor(0.1), images)
    variables = start(region, 20)
    assert (variables["gabor"] != 0).double().mean().item() == pytest.approx(1 / 14, abs=0.01)
    noise = (region.render(variables) - images) / 0.1
    assert noise.abs().max() < 1
    torch.testing.assert_close(noise[:, 0], noise[:, 1], rtol=0, atol=1e-12)
    # Of unit variance before tanh.
    variance = torch.atanh(noise[:, 0]).square().mean((1, 2))
    torch.testing.assert_close(variance, torch.ones(20).double(), rtol=0, atol=0.02)


def test_layouts_differ_between_images_and_seeds():
    images = batch(2)
    for threat in (Gabor, Snow):
        regions = [around(threat(0.3, seed=seed), images) for seed in (0, 1)]
        filters = [region.kernels if threat is Gabor else region.streaks for region in regions]
        assert not torch.allclose(filters[0].spectra[0], filters[0].spectra[1])
        assert not torch.allclose(filters[0].spectra, filters[1].spectra)


def test_flow_is_smoothed_with_mirrored_ends():
    generator = torch.Generator().manual_seed(0)
    flow = torch.rand(11, 30, generator=generator, dtype=torch.float64)
    found = smoothing(11, 1.3, flow) @ flow @ smoothing(30, 1.3, flow).T
    expected = ndimage.gaussian_filter(flow.numpy(), 1.3, mode="mirror", truncate=6 / 1.3)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(smoothing(9, 0.0, flow), torch.eye(9, dtype=torch.float64))


def test_displaced_is_grid_sample_with_aligned_corners():
    images, generator = batch(3, (2, 9, 13)), torch.Generator().manual_seed(0)
    flow = 6 * torch.rand(3, 2, 9, 13, generator=generator, dtype=torch.float64) - 3
    rows = torch.arange(9).view(1, 9, 1) + flow[:, 0]
    columns = torch.arange(13).view(1, 1, 13) + flow[:, 1]
    grid = torch.stack([2 * columns / 12 - 1, 2 * rows / 8 - 1], 3)
    expected = nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=True)
    torch.testing.assert_close(displaced(images, flow), expected, rtol=0, atol=1e-12)


def test_the_jpeg_tables_are_those_of_quality_50():
    written = io.BytesIO()
    Image.new("RGB", (16, 16)).save(written, "JPEG", quality=50)
    tables = Image.open(written).quantization
    for place, table in enumerate((LUMA_TABLE, CHROMA_TABLE)):
        assert list(tables[place]) == [step for row in table for step in row]


def test_jpeg_waves_are_the_inverse_cosine_transform_of_quantised_coefficients():
    generator = torch.Generator().manual_seed(0)
    coefficients = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    for table in (LUMA_TABLE, CHROMA_TABLE):
        block = (coefficients.flatten() @ waves(table)).view(8, 8)
        steps = torch.tensor(table, dtype=torch.float64)
        expected = idctn((coefficients * steps).numpy(), norm="ortho") / 255
        torch.testing.assert_close(block, torch.from_numpy(expected), rtol=0, atol=1e-12)
        back = torch.from_numpy(dctn(255 * block.numpy(), norm="ortho")) / steps
        torch.testing.assert_close(back, coefficients, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 28, 28), (3, 32, 48), (1, 28, 20)])
def test_jpeg_coefficients_act_on_their_own_block_and_plane(shape):
    images = torch.full((1, *shape), 0.5, dtype=torch.float64)
    region = around(JPEG("linf", 1.0), images)
    luma, *chroma = planes(images)
    rows, columns = -(-shape[1] // 8), -(-shape[2] // 8)
    if shape[0] == 3:
        rows, columns = rows + rows % 2, columns + columns % 2
    assert (luma.rows, luma.columns) == (rows, columns)
    assert region.zero()["coefficients"].shape == (
        1,
        rows * columns * 64 * shape[0] // 2 if shape[0] == 3 else rows * columns * 64,
    )
    changed = region.zero()
    block = columns + 1
    changed["coefficients"][0, 64 * block] = 1.0  # the constant of the block in row 1, column 1
    change = region.render(changed) - images
    expected = torch.zeros_like(change)
    expected[:, :, 8:16, 8:16] = 16 / 8 / 255
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)
    if not chroma:
        return
    blue = region.zero()
    blue["coefficients"][0, luma.coefficients] = 1.0
    change = (region.render(blue) - images)[0, :, 3, 3] * 255 * 8 / 17
    torch.testing.assert_close(change, torch.tensor([0.0, -0.344136, 1.772]).double())
    assert ((region.render(blue) - images)[0, 2].abs() > 1e-9).sum() == 16 * 16


def test_jpeg_l1_caps_a_coefficient_and_others_do_not():
    for norm, limit, expected in (("l1", None, 2.0), ("l1", 5.0, 5.0), ("l2", None, 40.0)):
        region = around(JPEG(norm, 40.0, limit), batch(1))
        far = region.zero()
        far["coefficients"][0, 3] = 1e3
        assert region.project(far)["coefficients"].max().item() == pytest.approx(expected)
    with pytest.raises(InputError, match="expected 1 or 3 channels, found 2"):
        around(JPEG(), batch(1, (2, 32, 32)))


@pytest.mark.parametrize(
    ("threat", "fields", "message"),
    [
        (Fog, {"decay": 0.5}, "decay: expected"),
        (Snow, {"blur": 4}, "blur: expected an odd"),
        (Gabor, {"density": 0.0}, "density: expected"),
        (Elastic, {"deviation": -1.0}, "deviation: expected"),
        (JPEG, {"limit": -2.0}, "limit: expected"),
        (JPEG, {"norm": "l3"}, "norm: .*found 'l3'"),
    ],
)
def test_wrong_fields_are_named(threat, fields, message):
    with pytest.raises(InputError, match=message):
        threat(**fields)


@pytest.mark.parametrize(
    ("preset", "shape", "count"),
    [("cifar10", (3, 32, 32), 42), ("imagenet100", (3, 224, 224), 60), ("dmat", (1, 28, 28), 7)],
)
def test_presets_have_all_levels_and_steps(preset, shape, count):
    attacks = unseen_attacks(preset, shape, steps=50, restarts=2)
    assert len(attacks) == count
    for attack_name, attack in attacks.items():
        assert attack.steps == 50
        assert attack.restarts == 2
        drawn = attack_name.startswith(("Fog", "Snow", "Gabor"))
        limit = 1.0 if drawn else attack.threat.radius
        assert attack.step_size == pytest.approx(limit / math.sqrt(50))


def test_strengths_are_in_units_of_the_01_image():
    cifar = unseen_attacks("cifar10", (3, 32, 32))
    assert cifar["Linf level 4"].threat.radius == pytest.approx(8 / 255)
    assert cifar["L2 level 1"].threat.radius == pytest.approx(40 / 255)
    # 0.0634766 is 195 in all, in [0, 255].
    assert cifar["L1 level 1"].threat.radius == pytest.approx(195 / 255, rel=1e-5)
    assert cifar["JPEG-L1 level 3"].threat.radius == 64
    assert cifar["Elastic level 6"].threat.radius == 8
    assert cifar["Linf level 3"].step_size == pytest.approx(0.0707 * 4 / 255, rel=1e-3)
    large = unseen_attacks("imagenet100", (3, 224, 224))
    totals = [large[f"L1 level {level}"].threat.radius for level in range(1, 7)]
    assert totals == pytest.approx([37.5, 75, 300, 600, 1200, 2400], rel=1e-5)
    assert large["Fog level 1"].threat.radius == pytest.approx(128 / 255)
    assert large["Snow level 6"].threat.radius == 8
    dmat = unseen_attacks("dmat", (3, 256, 256))
    assert dmat["L2"].threat.radius == pytest.approx(1200 / 255 / 2)
    assert dmat["Gabor"].threat.radius == pytest.approx(12.5 / 255)
    assert dmat["JPEG-L1"].threat.radius == 1024
    assert set(DMAT.calibrations) == set(dmat)


def test_strengths_scale_with_the_image():
    small, large = (unseen_attacks("cifar10", shape) for shape in ((1, 32, 32), (3, 64, 64)))
    for kind, of_grey, of_large in (
        ("Linf", 1.0, 1.0),
        ("L2", 3**-0.5, 2.0),
        ("L1", 1 / 3, 4.0),
        ("JPEG-Linf", 1.0, 1.0),
        ("JPEG-L2", (2 / 3) ** 0.5, 2.0),
        ("JPEG-L1", 2 / 3, 4.0),
        ("Elastic", 1.0, 2.0),
    ):
        attack_name = f"{kind} level 2"
        own = unseen_attacks("cifar10", (3, 32, 32))[attack_name].threat.radius
        assert small[attack_name].threat.radius == pytest.approx(of_grey * own)
        assert large[attack_name].threat.radius == pytest.approx(of_large * own)


def test_uar_is_100_where_the_accuracies_are_those_of_adversarial_training():
    for preset, name_of in ((CIFAR10, "cifar10"), (IMAGENET100, "imagenet100")):
        for kind, calibration in preset.calibrations.items():
            assert len(calibration.radii) == len(calibration.accuracies) == 6
            assert list(calibration.radii) == sorted(calibration.radii)
            own = [accuracy / 100 for accuracy in calibration.accuracies]
            assert uar(own, kind, name_of) == pytest.approx(100)
            assert uar([share / 2 for share in own], kind, name_of) == pytest.approx(50)
    # 84.6 + 82.1 + 76.2 + 66.9 + 40.1 + 12.9 = 362.8
    assert uar([1, 0, 0, 0, 0, 0], "Linf", "imagenet100") == pytest.approx(100 * 100 / 362.8)
    # 87.4 + 81.3 + 72.1 + 58.2 + 45.4 + 27.8 = 372.2
    assert uar([0.5] * 6, "Elastic", "cifar10") == pytest.approx(100 * 300 / 372.2)


def test_wrong_names_and_numbers_are_named():
    with pytest.raises(InputError, match=r"preset: unknown 'cifar'.*'cifar10'.*dmat"):
        unseen_attacks("cifar", (3, 32, 32))
    with pytest.raises(InputError, match=r"image_shape: expected \(C, H, W\)"):
        unseen_attacks("dmat", (32, 32))
    with pytest.raises(InputError, match=r"attack: unknown 'elastic'.*'Elastic'"):
        uar([0.5] * 6, "elastic", "cifar10")
    with pytest.raises(InputError, match="attack: unknown 'Fog'"):
        uar([0.5] * 6, "Fog", "cifar10")
    with pytest.raises(InputError, match="'dmat' has no calibration"):
        uar([0.5] * 6, "Fog", "dmat")
    with pytest.raises(InputError, match="expected 6, one per level, found 2"):
        uar([0.5] * 2, "Linf", "cifar10")
    with pytest.raises(InputError, match=r"expected numbers in \[0, 1\]"):
        uar([50.0] * 6, "Linf", "cifar10")
