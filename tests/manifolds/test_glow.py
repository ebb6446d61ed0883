import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

from onmanifold.attacks import PGD
from onmanifold.data import load_dataset
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.foundation.registry import FITS
from onmanifold.manifolds import build_manifold
from onmanifold.manifolds.glow import Glow
from onmanifold.manifolds.glow.layers import Coupling, Mixing, Scaling, squeeze, unsqueeze
from onmanifold.threats import LatentBall
from onmanifold.training.fits import FitStep
from onmanifold.training.fits.glow import GlowFit

LABELS = torch.zeros(64, dtype=torch.int64)


def make(shape=(3, 8, 8), *, moved=0.03, dtype=torch.float64, **options):
    """A small Glow whose weights are off their starts."""
    options = {"levels": 2, "steps": 3, "width": 8, **options}
    glow = build_manifold("glow", 3, shape, seed=1, **options).to(dtype)
    glow.start(draw(shape, 64, dtype))
    # Of normal size for a flow this small; more, and the products of triangular matrices grow.
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in glow.parameters():
            weight += moved * torch.randn(weight.shape, generator=generator)
    return glow


def draw(shape, count=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(count, *shape, generator=generator, dtype=torch.float64).to(dtype)


def jacobian(glow, image):
    """Of the code to the image, (D, D)."""
    size = image.numel()
    found = torch.autograd.functional.jacobian(lambda point: glow.encode(point, LABELS[:1]), image)
    return found.reshape(size, size)


SHAPES = {
    "plain": ((3, 8, 8), {"prior": "learned"}),
    "channel": ((3, 8, 8), {"prior": "channel", "levels": 3}),
    "padded": ((1, 6, 9), {"prior": "learned"}),
    "one level": ((1, 4, 4), {"levels": 1}),
    "no bound": ((1, 4, 4), {"scale_range": None}),
    "wide": ((1, 4, 4), {"scale_range": (0.3, 9.0)}),
}


@pytest.fixture(params=SHAPES)
def glow(request):
    shape, options = SHAPES[request.param]
    return make(shape, **options)


def test_squeeze_puts_a_block_into_the_channels():
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    squeezed = squeeze(images)
    assert squeezed.shape == (2, 12, 2, 3)
    for place, (down, right) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        block = squeezed[:, 3 * place : 3 * place + 3]
        assert torch.equal(block, images[:, :, down::2, right::2])
    assert torch.equal(unsqueeze(squeezed), images)


def test_mixing_starts_as_a_rotation_and_normalises():
    torch.manual_seed(0)
    mixing = Mixing(8).double()
    matrix, offset = mixing.affine(torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8).double(), rtol=0, atol=1e-6)
    assert not offset.any()
    scales = torch.linspace(0.5, 4, 8).view(8, 1, 1)
    pixels = 3 + torch.randn(64, 8, 4, 4).double() * scales
    mixing.start(pixels)
    mixed, per_pixel = mixing(pixels)
    values = mixed.transpose(0, 1).flatten(1)
    torch.testing.assert_close(values.mean(1), torch.zeros(8).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(values.square().mean(), torch.tensor(1.0).double())
    matrix, _ = mixing.affine(torch.float64)
    torch.testing.assert_close(per_pixel, torch.linalg.slogdet(matrix)[1])


@pytest.mark.parametrize("bounds", [None, (0.6, 3.0)])
def test_the_couplings_gradient_is_that_of_its_formula(bounds):
    torch.manual_seed(0)
    coupling = Coupling(6, 5, Scaling(bounds)).double()
    nn.init.normal_(coupling.last.weight, std=0.2)
    pixels = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    coupled, determinant = coupling(pixels)
    kept, moved = pixels[:, :3], pixels[:, 3:]
    change = coupling.last(coupling.middle(coupling.first(kept).relu()).relu())
    if bounds is None:
        scale = change[:, 3:].sigmoid()
    else:
        low, high = map(math.log, bounds)
        share = -low / (high - low)
        steep = 1 / ((high - low) * share * (1 - share))
        inside = steep * change[:, 3:] + math.log(share / (1 - share))
        scale = torch.exp(low + (high - low) * inside.sigmoid())
    expected = torch.cat([kept, (moved + change[:, :3]) * scale], dim=1)
    torch.testing.assert_close(coupled, expected)
    torch.testing.assert_close(determinant, scale.log().sum((1, 2, 3)))
    with torch.no_grad():
        for found, wanted in zip(coupling(pixels), (coupled, determinant), strict=True):
            torch.testing.assert_close(found, wanted)
    weights, variables = torch.randn_like(coupled), [pixels, *coupling.parameters()]
    found = torch.autograd.grad(
        (coupled * weights).sum() + (determinant * determinant).sum(), variables
    )
    wanted = torch.autograd.grad(
        (expected * weights).sum() + scale.log().sum((1, 2, 3)).square().sum(), variables
    )
    for mine, plain in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, plain)


def test_a_channel_that_never_varies_stays_finite():
    mixing = Mixing(4)
    mixing.start(torch.full((3, 4, 2, 2), 0.5))
    assert all(weight.isfinite().all() for weight in mixing.parameters())
    assert mixing(torch.full((3, 4, 2, 2), 0.5))[0].abs().max() < 1e-4


def test_images_come_back(glow):
    images = draw(glow.image_shape)
    codes = glow.encode(images, LABELS[:5])
    assert codes.shape == (5, glow.code_size)
    assert (glow.decode(codes) - images).abs().max() < 1e-10
    # In the images' precision, whatever that of the weights.
    single = copy.deepcopy(glow).float()
    codes = single.encode(images, LABELS[:5])
    assert (single.decode(codes) - images).abs().max() < 1e-10
    codes = single.encode(images.float(), LABELS[:5])
    assert codes.dtype == torch.float32
    assert (single.decode(codes) - images).abs().max() < 1e-5


def test_codes_come_back(glow):
    if glow.canvas_shape != glow.image_shape:
        pytest.skip("a padded canvas has more values than its image")
    # Inside [0, 1], where nothing is cut off.
    codes = glow.encode(0.4 + 0.2 * draw(glow.image_shape), LABELS[:5])
    codes = codes + 1e-3 * torch.randn_like(codes)
    again = glow.encode(glow.decode(codes), LABELS[:5])
    torch.testing.assert_close(again, codes, rtol=0, atol=1e-9)


@pytest.mark.parametrize("prior", ["learned", "channel"])
@pytest.mark.parametrize("scale_range", [None, (0.5, 4.0)])
def test_the_log_likelihood_has_the_jacobian_of_autograd(prior, scale_range):
    glow = make((3, 4, 4), prior=prior, scale_range=scale_range)
    images = draw(glow.image_shape, 3)
    expected = []
    for image in images:
        codes = glow.encode(image[None], LABELS[:1])
        determinant = torch.linalg.slogdet(jacobian(glow, image[None]))[1]
        expected.append(determinant - 0.5 * (codes.square() + math.log(2 * math.pi)).sum())
    torch.testing.assert_close(
        glow.log_likelihood(images), torch.stack(expected), rtol=0, atol=1e-6
    )


def test_a_flow_that_has_learned_nothing_is_a_normal_distribution():
    # Couplings that start at zero are constant: the flow is linear, the density that of a normal distribution.
    glow = make((1, 4, 4), moved=0.0)
    images = draw(glow.image_shape, 4)
    matrix = jacobian(glow, images[:1])
    mean = images[0].flatten() - torch.linalg.solve(
        matrix, glow.encode(images[:1], LABELS[:1]).flatten()
    )
    normal = MultivariateNormal(mean, precision_matrix=matrix.T @ matrix)
    torch.testing.assert_close(glow.log_likelihood(images), normal.log_prob(images.flatten(1)))


def test_bits_are_those_of_bins_of_a_255th():
    glow = make()
    levels = (draw(glow.image_shape) * 255).round()
    noise = glow.dequantise(levels / 255) * 256 + 128 - levels
    assert noise.min() >= 0
    assert noise.max() < 1
    inside = (levels + noise - 0.5) / 255
    size = glow.latent_size
    expected = (size * math.log(255) - glow.log_likelihood(inside)) / (size * math.log(2))
    torch.testing.assert_close(glow.bits_per_dimension(levels / 255), expected)


def test_bits_of_padded_images_are_those_of_the_canvas():
    glow = make((1, 6, 9))
    assert glow.canvas_shape == (1, 8, 12)
    images = (draw(glow.image_shape) * 255).round() / 255
    canvases = glow.dequantise(images)
    border = torch.ones(8, 12, dtype=torch.bool)
    border[1:7, 1:10] = False
    assert canvases[:, 0, border].max() < -0.5 + 1 / 256
    density = glow.log_density(canvases)
    expected = (96 * math.log(256) - density) / (54 * math.log(2))
    torch.testing.assert_close(glow.bits_per_dimension(images), expected)


def test_bits_depend_on_seed_and_index_alone():
    glow, images = make(), draw((3, 8, 8))
    indices = torch.tensor([9, 4, 7, 1, 3])
    together = glow.bits_per_dimension(images, 5, indices)
    rows = torch.tensor([3, 1])
    some = glow.bits_per_dimension(images[rows], 5, indices[rows])
    torch.testing.assert_close(some, together[rows])
    assert not torch.allclose(glow.bits_per_dimension(images, 6, indices), together)


def test_levels_hold_the_whole_code(glow):
    codes = glow.encode(draw(glow.image_shape), LABELS[:5])
    parts = glow.split(codes)
    assert list(parts) == list(glow.levels)
    assert torch.equal(glow.join(parts), codes)
    sides = [part.shape[2] for part in parts.values()]
    assert sides == [glow.canvas_shape[1] // 2**level for level in glow.levels]
    for level, part in parts.items():
        assert set(part.flatten().tolist()) == set(codes[:, glow.levels[level]].flatten().tolist())
    channels, height, width = glow.canvas_shape
    assert glow.latent_size == channels * height * width


def test_an_attack_moves_one_level_alone():
    glow = make(levels=3, dtype=torch.float32)
    images = draw(glow.image_shape, 4, torch.float32)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).eval()
    threat = LatentBall(glow, "linf", 0.05, levels=(2,))
    attack = PGD(threat, steps=3, early_stop=False)
    result = attack(model, images, torch.zeros(4, dtype=torch.int64))
    assert result.size["latent"].max() <= 0.05 + 1e-6
    codes = glow.encode(result.images, LABELS[:4]) - glow.encode(images, LABELS[:4])
    inside = (result.images > 0).all() and (result.images < 1).all()
    moved = codes.abs().amax(0)
    assert moved[glow.levels[2]].max() > 0.01
    if inside:
        assert max(moved[glow.levels[level]].max() for level in (1, 3)) < 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_the_attack_path(glow, recompute):
    glow.recompute = recompute
    images = 0.3 + 0.4 * draw(glow.image_shape, 2)
    codes = glow.encode(images, LABELS[:2]).detach()
    chart = glow.chart(codes)
    latents = (codes + 0.02).requires_grad_()
    assert torch.autograd.gradcheck(chart.decode, (latents,), atol=1e-6, fast_mode=True)
    weights = torch.randn_like(images)
    expected = torch.autograd.grad((glow.decode(latents) * weights).sum(), latents)[0]
    found = torch.autograd.grad((chart.decode(latents) * weights).sum(), latents)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all(weight.grad is None for weight in glow.parameters())


def test_the_attack_path_decodes_as_the_plain_one_does(glow):
    codes = glow.encode(draw(glow.image_shape), LABELS[:5]) + 0.1
    chart = glow.chart(codes)
    expected = glow.decode(codes)
    torch.testing.assert_close(chart.decode(codes), expected, rtol=0, atol=1e-12)
    differentiable = chart.decode(codes.detach().requires_grad_())
    torch.testing.assert_close(differentiable, expected, rtol=0, atol=1e-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(chart.decode(codes), expected, rtol=0, atol=1e-12)
    mask = torch.tensor([True, False, False, True, True])
    torch.testing.assert_close(chart.keep(mask).decode(codes[mask]), expected[mask])


def test_the_plain_path_differentiates_twice_and_the_fast_one_refuses():
    glow = make((1, 4, 4), steps=1, scale_range=None)
    codes = glow.encode(0.3 + 0.4 * draw(glow.image_shape, 1), LABELS[:1]).detach().requires_grad_()
    assert torch.autograd.gradgradcheck(glow.decode, (codes,), fast_mode=True)
    first = torch.autograd.grad(glow.chart(codes).decode(codes).sum(), codes, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(first.sum(), codes)


def test_recomputing_needs_memory_that_depth_does_not_add_to():
    def saved(steps, recompute):
        glow = make(steps=steps, dtype=torch.float32)
        glow.recompute = recompute
        codes = glow.encode(draw((3, 8, 8), 4, torch.float32), LABELS[:4]).detach()
        sizes = {}

        def pack(tensor):
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            images = glow.chart(codes).decode(codes.requires_grad_())
        assert images.requires_grad
        return sum(sizes.values())

    assert saved(6, True) == saved(1, True)
    assert saved(6, False) > 3 * saved(1, False) > 6 * saved(1, True)


def test_black_and_white_pixels_keep_their_gradient():
    glow = make((1, 8, 8), dtype=torch.float32)
    images = (draw((1, 8, 8), 4) > 0.5).float()
    codes = glow.encode(images, LABELS[:4]).detach().requires_grad_()
    frozen, chart = glow.frozen(torch.float32), glow.chart(codes)
    outside = frozen.decode(codes)
    assert ((outside < 0) | (outside > 1)).any()
    weights = torch.randn_like(images)
    expected = torch.autograd.grad((outside * weights).sum(), codes)[0]
    found = torch.autograd.grad((chart.decode(codes) * weights).sum(), codes)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_draws_are_the_models_own():
    # Of a linear flow the images are normal, with the moments that the flow has at the mean.
    glow = make((1, 4, 4), moved=0.0)
    codes = glow.sample_codes(torch.zeros(4000, dtype=torch.int64), seed=1).double()
    images = glow.frozen(torch.float64).decode(codes).flatten(1)
    matrix = torch.linalg.inv(jacobian(glow, draw((1, 4, 4), 1)))
    torch.testing.assert_close(images.T.cov(), matrix @ matrix.T, rtol=0.1, atol=0.01)


def test_scales_stay_within_their_bounds():
    glow = make(scale_range=(0.3, 2.5))
    coupling = glow.frozen(torch.float64).levels[0].steps[0].coupling
    far = 1e4 * torch.randn(2, 8, 4, 4).double()
    _, scale, _ = coupling.change(far)
    assert 0.3 - 1e-9 <= scale.min() < 0.301
    assert 2.499 < scale.max() <= 2.5 + 1e-9
    codes = 1e3 * torch.randn(3, glow.code_size).double()
    assert glow.frozen(torch.float64).decode(codes).isfinite().all()


@pytest.mark.parametrize("bounds", [(0.7, 2.0), (0.1, 1.5), (0.3, 9.0)])
def test_a_bounded_scale_starts_as_the_exponential_function(bounds):
    raw = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    scale, log_scale = Scaling(bounds)(raw)
    torch.testing.assert_close(scale, torch.ones_like(scale))
    torch.testing.assert_close(scale.log(), log_scale)
    torch.testing.assert_close(torch.autograd.grad(log_scale, raw)[0], torch.ones_like(raw))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 0}, "levels: expected at least 1"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"width": 0}, "width: expected at least 1"),
        ({"scale_range": (0.0, 2.0)}, r"scale_range: expected \(low, high\) with 0 < low"),
        ({"scale_range": (0.5, 1.0)}, r"scale_range: expected \(low, high\) with 0 < low"),
        ({"prior": "uniform"}, "prior"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_manifold("glow", 3, (3, 8, 8), seed=0, **options)


def test_wrong_images():
    with pytest.raises(InputError, match="images: expected"):
        make().encode(torch.rand(2, 1, 8, 8), LABELS[:2])


def learn(glow, images, steps, batch=32):
    """Real training steps, as the loop takes them."""
    fit, generator = FITS.get("glow")(), torch.Generator().manual_seed(0)
    assert isinstance(fit, GlowFit)
    fit.start(glow, images[:256], LABELS[:1].expand(256))
    optimizer = torch.optim.Adamax(glow.parameters(), lr=2e-3)
    bits = []
    for number in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator)
        step = FitStep(
            glow,
            fit.players(glow),
            images[rows],
            LABELS[:1].expand(batch),
            rows,
            0,
            number,
            steps,
            number,
        )
        for losses in fit.turns(step):
            optimizer.zero_grad()
            losses["manifold"].backward()
            nn.utils.clip_grad_norm_(glow.parameters(), 10.0)
            optimizer.step()
        bits.append(step.metrics["bits_per_dimension"].item())
    return bits


def test_the_fit_learns_and_is_judged_by_bits():
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(300, 1, 1, 1, generator=generator) * 0.8 + 0.1
    images = images + 0.02 * torch.randn(300, 1, 8, 8, generator=generator)
    glow = make((1, 8, 8), dtype=torch.float32, moved=0.0)
    bits = learn(glow, images.clamp(0, 1), 40)
    assert sum(bits[-5:]) / 5 < bits[0] - 0.3
    fit = GlowFit()
    with torch.no_grad():
        judged = fit.validate(glow, images[:9], LABELS[:9], torch.arange(9), 0)
    assert set(judged) == {"bits_per_dimension", "round_trip_error"}
    assert fit.score in judged
    torch.testing.assert_close(judged["bits_per_dimension"], glow.bits_per_dimension(images[:9]))
    assert judged["round_trip_error"].max() < 5e-6
    with pytest.raises(InputError, match="expected a Glow"):
        fit.start(nn.Identity(), images, LABELS)


def test_round_trips_after_training_on_real_images(real_data):
    real_data("cifar10")
    images = load_dataset("cifar10", "train").take(600).batch(torch.arange(600)).images
    glow = build_manifold("glow", 10, (3, 32, 32), seed=0, levels=3, steps=3, width=16)
    assert isinstance(glow, Glow)
    bits = learn(glow, images, 40)
    assert bits[-1] < bits[0] - 0.5
    tests = load_dataset("cifar10", "test").batch(torch.arange(1000)).images
    worst = {torch.float32: 0.0, torch.float64: 0.0}
    with torch.no_grad():
        for part in tests.split(250):
            for dtype in worst:
                exact = part.to(dtype)
                codes = glow.encode(exact, LABELS)
                error = (glow.chart(codes).decode(codes) - exact).abs().max().item()
                worst[dtype] = max(worst[dtype], error)
            signs = torch.randn_like(codes).sign()
            assert glow.chart(codes).decode(codes + 0.1 * signs).isfinite().all()
    assert worst[torch.float32] <= 5e-6
    assert worst[torch.float64] <= 1e-10


def test_codes_that_are_no_numbers_are_refused():
    glow = make(dtype=torch.float32)
    with torch.no_grad():
        glow.flow[0].steps[0].coupling.last.bias[0] = torch.nan
    images = draw(glow.image_shape, 2, torch.float32)
    with pytest.raises(InputError, match="codes: found NaN"):
        LatentBall(glow, radius=0.1).around(images, LABELS[:2])
