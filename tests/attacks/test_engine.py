"""Precision, threads, early stop, restarts and counts."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import onmanifold as om
from onmanifold.attacks import FGSM, MIA, PGD, Engine, ProjectedAdam, RandomPerturbation
from onmanifold.attacks.engine import frozen, untouched
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.threats import ImageBall, JointBall, LatentBall


class Watched(nn.Module):
    """A net that writes down the size of each batch, and the threads it runs on."""

    def __init__(self, core):
        super().__init__()
        self.core, self.sizes, self.threads = core, [], []

    def forward(self, images):
        self.sizes.append(len(images))
        self.threads.append(torch.get_num_threads())
        return self.core(images)


UNFOLDED = Engine(fold=False)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_small_models_run_on_one_thread_and_threads_are_put_back(two_threads, small_net, images):
    good, model = images(5), Watched(small_net)
    PGD(ImageBall(radius=0.05), 3, engine=UNFOLDED)(model, good.images, good.labels)
    assert torch.get_num_threads() == 2
    assert set(model.threads[3:-1]) == {1}  # but for the probes and the verification


def test_large_models_keep_their_threads(two_threads, images):
    core = nn.Sequential(nn.Conv2d(1, 600, 3, padding=1), nn.Conv2d(600, 64, 3), nn.Flatten())
    model = Watched(core)
    with frozen(model, torch.rand(10, 1, 8, 8), UNFOLDED) as network:
        assert torch.get_num_threads() == 2
        network(torch.rand(1, 1, 8, 8))
    # The same model is small on one sample.
    with frozen(model, torch.rand(1, 1, 8, 8), UNFOLDED):
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_can_be_set(two_threads, small_net, images, threads):
    good, model = images(5), Watched(small_net)
    engine = Engine(fold=False, threads=threads)
    PGD(ImageBall(radius=0.05), 3, engine=engine)(model, good.images, good.labels)
    assert set(model.threads[2:-1]) == {threads}
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "16"}, "precision: .*found '16'"),
        ({"threads": 0}, "threads: expected at least 1"),
    ],
)
def test_wrong_engines(fields, message):
    with pytest.raises(InputError, match=message):
        Engine(**fields)


def nearly_tied():
    """Logits that bfloat16 cannot tell apart: 1 + 0.01·(mean − 1/2) and 1.001; class 1 unless mean > 0.6."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.full((64,), 0.01 / 64), torch.zeros(64)]))
        model[1].bias.copy_(torch.tensor([0.995, 1.001]))
    return model


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("radius", [0.05, 0.2])
def test_what_bfloat16_claims_is_verified(fold, radius):
    images, labels = torch.full((6, 1, 8, 8), 0.45), torch.ones(6, dtype=torch.int64)
    images[0] = 0.7
    engine = Engine(precision="bf16", fold=fold)
    with frozen(nearly_tied(), images, engine) as network:
        assert (network(images).argmax(1) == 0).all()  # bfloat16 believes that all are fooled
        assert (network.exact(images).argmax(1) == labels).sum() == 5
    attack = PGD(ImageBall(radius=radius), 5, start="zero", engine=engine)
    result = attack(nearly_tied(), images, labels)
    assert result.success.tolist() == [True] + [radius > 0.16] * 5
    assert torch.equal(result.images[0], images[0])


@pytest.mark.parametrize("fold", [True, False])
def test_bfloat16_finds_nearly_as_much(small_net_32, images, fold):
    good = images(300)
    ball = ImageBall("linf", 0.06)
    rates = [
        PGD(ball, 8, engine=Engine(precision=precision, fold=fold))(
            small_net_32, good.images.float(), good.labels
        ).success
        for precision in ("32", "bf16")
    ]
    assert (rates[0].float().mean() - rates[1].float().mean()).abs() < 0.02


def test_bfloat16_is_indeed_used(small_net_32, images):
    good = images(8).images.float()
    for fold in (True, False):
        with frozen(small_net_32, good, Engine(precision="bf16", fold=fold)) as network:
            low, full = network(good), network.exact(good)
        assert low.dtype == full.dtype == torch.float32
        assert 1e-4 < (low - full).abs().max() < 0.1 * full.abs().max()
        torch.testing.assert_close(full, small_net_32(good), rtol=1e-5, atol=1e-5)


def test_float64_is_never_lowered(small_net, images):
    good = images(8)
    with frozen(small_net, good.images, Engine(precision="bf16")) as network:
        torch.testing.assert_close(network(good.images), small_net(good.images))


def brightness():
    """Two logits whose margin for label 0 is the mean brightness minus 0.6."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(16), torch.full((16,), 1 / 16)]))
        model[1].bias.copy_(torch.tensor([0.6, 0.0]))
    return model


def grey(*values):
    return torch.stack([torch.full((1, 4, 4), value, dtype=torch.float64) for value in values])


def test_a_sample_leaves_at_its_first_success():
    # Steps of 0.1: brightness 0.7 is fooled at once, 0.55 after one step, 0.35 after three, 0.1 never.
    model = Watched(brightness())
    attack = PGD(ImageBall("linf", 0.35), 5, 0.1, start="zero", engine=UNFOLDED)
    labels = torch.zeros(4, dtype=torch.int64)
    result = attack(model, grey(0.7, 0.55, 0.35, 0.1), labels)
    assert result.success.tolist() == [True, True, True, False]
    assert result.forwards.tolist() == [1, 2, 4, 6]
    # The pass that shows the success has its backward pass already; only the last point has none.
    assert result.backwards.tolist() == [1, 2, 4, 5]
    expected = grey(0.7, 0.65, 0.65, 0.45)
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.size["image"], torch.tensor([0, 0.1, 0.3, 0.35]).double())
    # After the probes: all four, then those that are left; at the end the verification.
    assert model.sizes[-7:] == [4, 3, 2, 2, 1, 1, 4]


def test_a_fooled_sample_that_has_not_left_yet_stands_still():
    # One of a hundred is too few to make the batch smaller; its first success must stay all the same.
    attack = PGD(ImageBall("linf", 0.35), 5, 0.1, start="zero")
    images = grey(0.55, *[0.1] * 99)
    result = attack(brightness(), images, torch.zeros(100, dtype=torch.int64))
    assert result.success.tolist() == [True] + [False] * 99
    assert result.forwards[:2].tolist() == [2, 6]
    torch.testing.assert_close(result.images[:2], grey(0.65, 0.45), rtol=0, atol=1e-12)


def test_a_first_success_at_the_last_point():
    attack = PGD(ImageBall("linf", 0.5), 2, 0.1, start="zero")
    result = attack(brightness(), grey(0.45, 0.35), torch.zeros(2, dtype=torch.int64))
    assert result.success.tolist() == [True, False]
    assert result.forwards.tolist() == [3, 3]
    assert result.backwards.tolist() == [2, 2]


def test_without_early_stop_all_steps_are_done_and_the_largest_objective_is_kept():
    model = Watched(brightness())
    attack = PGD(ImageBall("linf", 0.35), 5, 0.1, start="zero", early_stop=False, engine=UNFOLDED)
    result = attack(model, grey(0.7, 0.55, 0.35, 0.1), torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(result.images, grey(1.0, 0.9, 0.7, 0.45), rtol=0, atol=1e-12)
    assert result.forwards.tolist() == [6] * 4
    assert result.backwards.tolist() == [5] * 4
    assert model.sizes[-7:] == [4] * 7


def test_fooled_samples_cost_nothing_more(small_net, images):
    good, model = images(256), Watched(small_net)
    attack = PGD(ImageBall("linf", 0.08), 10, restarts=3, engine=UNFOLDED)
    result = attack(model, good.images, good.labels)
    seen = sum(model.sizes) - 256  # without the verification
    assert result.success.float().mean() > 0.5
    # Samples leave once they are a twentieth of the batch, so that some are seen without need.
    assert result.forwards.sum() <= seen <= 1.1 * result.forwards.sum()
    assert (result.forwards[~result.success] == 33).all()


def test_an_attack_ends_when_all_are_fooled():
    model = Watched(brightness())
    attack = PGD(ImageBall(radius=0.1), 50, start="zero", restarts=5, engine=UNFOLDED)
    result = attack(model, grey(0.8, 0.9), torch.zeros(2, dtype=torch.int64))
    assert result.forwards.tolist() == [1, 1]
    assert len(model.sizes) <= 7


def test_the_first_success_of_the_walk_is_returned(small_net, images):
    good = images(60)
    radius, step, steps = 0.06, 0.02, 8
    result = PGD(ImageBall(radius=radius), steps, step, start="zero")(
        small_net, good.images, good.labels
    )
    moved, found = good.images, torch.full((60,), -1)
    expected = good.images.clone()
    for count in range(steps + 1):
        leaf = moved.clone().requires_grad_()
        logits = small_net(leaf)
        new = (logits.argmax(1) != good.labels) & (found < 0)
        found[new], expected[new] = count, moved[new]
        loss = nn.functional.cross_entropy(logits, good.labels, reduction="sum")
        slope = torch.autograd.grad(loss, leaf)[0]
        moved = good.images + (moved + step * slope.sign() - good.images).clamp(-radius, radius)
        moved = moved.clamp(0, 1)
    fooled = found >= 0
    assert len(set(found.tolist())) > 3
    assert torch.equal(result.success, fooled)
    assert torch.equal(result.forwards[fooled], found[fooled].int() + 1)
    torch.testing.assert_close(result.images[fooled], expected[fooled], rtol=0, atol=1e-12)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("attack", [PGD, ProjectedAdam, RandomPerturbation])
def test_restarts_never_find_less(small_net, images, attack, early_stop):
    good = images(60)
    ball = ImageBall("linf", 0.05)
    fields = {} if attack is RandomPerturbation else {"steps": 3}
    results = [
        attack(ball, restarts=restarts, early_stop=early_stop, **fields)(
            small_net, good.images, good.labels
        )
        for restarts in (1, 2, 6)
    ]
    for fewer, more in pairwise(results):
        assert (more.objective >= fewer.objective - 1e-12).all()
        if early_stop:
            assert (more.success >= fewer.success).all()
        # Where nothing better was found, the same point stays.
        same = (more.objective == fewer.objective) & (more.success == fewer.success)
        assert torch.equal(more.images[same], fewer.images[same])
    assert (results[-1].objective > results[0].objective + 1e-3).any()


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "mia", "adam", "random"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_radii_per_sample_with_restarts_and_early_stop(small_net, images, attack, norm):
    # Those that are left after a restart must keep their own radius and step size.
    good = images(40)
    radii = {"linf": 0.1, "l2": 0.6, "l1": 2.5}[norm] * torch.linspace(0, 1, 40).double()

    def make(radius):
        ball = ImageBall(norm, radius)
        return {
            "fgsm": lambda: FGSM(ball, restarts=3, start="uniform"),
            "pgd": lambda: PGD(ball, 4, restarts=3),
            "mia": lambda: MIA(ball, 4, restarts=3, start="uniform"),
            "adam": lambda: ProjectedAdam(ball, 4, restarts=3),
            "random": lambda: RandomPerturbation(ball, restarts=3),
        }[attack]()

    together = make(radii)(small_net, good.images, good.labels)
    assert (together.size["image"] <= radii * (1 + 1e-9)).all()
    assert 0 < together.success.float().mean() < 1
    for row in (3, 17, 36, 39):
        one = slice(row, row + 1)
        alone = make(radii[row].item())(
            small_net, good.images[one], good.labels[one], indices=torch.tensor([row])
        )
        torch.testing.assert_close(alone.images[0], together.images[row], rtol=0, atol=1e-9)
        assert alone.forwards == together.forwards[row]


def test_joint_radii_per_sample_with_restarts(small_net, images, plane):
    good = images(30, on_manifold=True)
    shares = torch.linspace(0, 1, 30).double()
    threat = JointBall(ImageBall("linf", 0.02 * shares), LatentBall(plane, "l2", 0.5 * shares))
    result = PGD(threat, 4, restarts=3)(small_net, good.images, good.labels, good.codes)
    assert (result.size["image"] <= 0.02 * shares + 1e-9).all()
    assert (result.size["latent"] <= 0.5 * shares + 1e-9).all()
    assert 0 < result.success.float().mean() < 1


class Still(Manifold):
    """Every image is its own code; what may move is nothing."""

    name, exact, fingerprint, image_shape = "still", True, "still", (1, 8, 8)
    latent_size, code_size = 1, 65

    def encode(self, images, labels):
        return torch.cat([torch.zeros_like(images[:, 0, 0, :1]), images.flatten(1)], dim=1)

    def decode(self, codes):
        return codes[:, 1:].view(-1, 1, 8, 8) + 0 * codes[:, 0].view(-1, 1, 1, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_joint_ball_whose_latents_are_still_is_an_image_ball(small_net, images, norm):
    # Half of the pixels of black and white images start outside of [0, 1], where clipping leaves them no
    # gradient: they must find back.
    black_and_white = images(100).images.round()
    labels = small_net(black_and_white).argmax(1)
    ball = ImageBall(norm, {"linf": 0.1, "l2": 0.6}[norm])
    joint = JointBall(ball, LatentBall(Still(), radius=0.0))
    step = 0.1 * ball.radius
    one = PGD(ball, 40, step, early_stop=False)(small_net, black_and_white, labels)
    two = PGD(joint, 40, {"image": step, "latent": 0.0}, early_stop=False)(
        small_net, black_and_white, labels
    )
    assert one.success.float().mean() > 0.2
    assert (two.success.float().mean() - one.success.float().mean()).abs() <= 0.03
    assert (two.objective - one.objective).mean().abs() < 0.02 * one.objective.mean()


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_targeted_attack_succeeds_at_its_target_only(small_net, images, early_stop):
    good = images(100)
    labels = small_net(good.images).argmax(1)
    targets = (labels + 2) % 4
    attack = PGD(ImageBall("linf", 0.15), 15, objective="targeted_margin", early_stop=early_stop)
    result = attack(small_net, good.images, labels, targets=targets)
    predictions = small_net(result.images).argmax(1)
    assert torch.equal(result.success, predictions == targets)
    untargeted = PGD(ImageBall("linf", 0.15), 15)(small_net, good.images, labels)
    assert untargeted.success.float().mean() > result.success.float().mean()
    by_chance = (untargeted.predictions == targets).float().mean()
    assert by_chance + 0.3 < result.success.float().mean() < 1


def test_an_objective_by_its_name_is_the_objective(small_net, images):
    good = images(10)
    from onmanifold.objectives import Margin

    one, two = (
        PGD(ImageBall(), 3, objective=objective)(small_net, good.images, good.labels)
        for objective in ("margin", Margin())
    )
    assert torch.equal(one.images, two.images)


def test_attacks_inside_inference_mode(small_net, images):
    good = images(10)
    attack = PGD(ImageBall(radius=0.06), 5)
    expected = attack(small_net, good.images, good.labels)
    with torch.inference_mode():
        result = attack(small_net, good.images.clone(), good.labels)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(result.images, expected.images)


def test_random_models_are_seeded_and_the_generator_is_put_back(images, own_net):
    model = nn.Sequential(own_net(torch.float64), Noise())
    good = images(10)
    attack = PGD(ImageBall(radius=0.06), 5)
    before = torch.get_rng_state()
    one = attack(model, good.images, good.labels, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    two = attack(model, good.images, good.labels, seed=1)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.success, two.success)


class Noise(nn.Module):
    def forward(self, logits):
        return logits + 0.3 * torch.randn_like(logits)


def test_untouched_restores_what_its_block_changed(own_net):
    net = own_net().train()
    net[0].weight.requires_grad_(False)
    statistics = net[1].running_mean.clone()
    batches = net[1].num_batches_tracked.clone()

    def interrupted():
        with untouched(net):
            assert not any(module.training for module in net.modules())
            assert not any(parameter.requires_grad for parameter in net.parameters())
            net.train()
            net(torch.rand(4, 1, 8, 8))
            assert not torch.equal(net[1].running_mean, statistics)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(module.training for module in net.modules())
    assert torch.equal(net[1].running_mean, statistics)
    assert torch.equal(net[1].num_batches_tracked, batches)
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 6


@pytest.mark.parametrize("fold", [True, False])
def test_compiling_changes_nothing_but_speed(small_net, images, monkeypatch, fold):
    # The eager backend stands for the real one, which needs a C++ compiler and minutes.
    compile_ = torch.compile
    used = []

    def eager(graph, **options):
        used.append(graph)
        return compile_(graph, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", eager)
    good = images(20)
    one, two = (
        PGD(ImageBall(radius=0.06), 4, engine=Engine(compile=flag, fold=fold))(
            small_net, good.images, good.labels
        )
        for flag in (False, True)
    )
    assert bool(used) == fold
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-9)


class _Bump(nn.Module):
    """On one pixel: fooled only between 0.35 and 0.45, while the cross-entropy is largest at 1."""

    def forward(self, images: Tensor) -> Tensor:
        pixel = images.flatten(1)[:, 0]
        rival = torch.where((pixel > 0.35) & (pixel < 0.45), 10.0, -10.0) + 3.0 * pixel
        # A third and fourth class raise the cross-entropy together without ever winning alone.
        others = -1.0 + 0.9 * pixel
        return torch.stack([0.0 * pixel, rival, others, others], dim=1)


def test_a_success_on_the_way_is_kept_without_early_stop_too():
    images, labels = torch.full((1, 1, 1, 1), 0.1, dtype=torch.float64), torch.tensor([0])
    ball = om.ImageBall(norm="linf", radius=0.9)
    settings = {"steps": 9, "step_size": 0.1, "start": "zero"}
    stopped = om.PGD(ball, **settings)(_Bump(), images, labels)
    whole = om.PGD(ball, early_stop=False, **settings)(_Bump(), images, labels)
    assert stopped.success.item()
    assert whole.success.item()
    assert 0.35 < whole.images.item() < 0.45
    assert whole.objective >= stopped.objective
    assert whole.forwards.item() == 10


def test_confidence_is_reached_before_a_sample_leaves():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False).double())
    model[1].weight.data = weight
    images = torch.full((8, 1, 4, 4), 0.5, dtype=torch.float64)
    labels = model(images).argmax(1)
    attack = om.PGD(
        om.ImageBall(norm="linf", radius=0.4), steps=40, objective=om.Margin(confidence=1.0)
    )
    result = attack(model, images, labels)
    assert result.success.all()
    assert torch.allclose(result.objective, torch.ones_like(result.objective))


def test_nan_gradients_do_not_pass_for_robustness():
    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            flat = images.flatten(1)
            none = 0.0 * (flat.sum(1, keepdim=True) * 0.0).sqrt()
            return torch.cat([flat[:, :1] - 0.5, 0.5 - flat[:, :1]], dim=1) + none

    images = torch.full((4, 1, 2, 2), 0.6)
    labels = torch.zeros(4, dtype=torch.int64)
    attack = om.PGD(om.ImageBall(norm="linf", radius=0.3), steps=10, restarts=5)
    assert attack(Root(), images, labels).variables["image"].isfinite().all()


def test_success_is_decided_in_float32_under_a_surrounding_autocast():
    model = om.build_classifier("conv_net", image_shape=(1, 28, 28), seed=0).eval()
    images = torch.rand(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = om.PGD(om.ImageBall(norm="linf", radius=0.02), steps=5)(model, images, labels)
    with torch.no_grad():
        assert torch.equal(result.predictions, model(result.images).argmax(1))


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_compiled_copies_are_made_once_and_follow_the_weights(monkeypatch, precision):
    made, compile_ = [], torch.compile

    def counted(graph, dynamic):
        made.append(graph)
        return compile_(graph, dynamic=dynamic, backend="eager")

    monkeypatch.setattr(torch, "compile", counted)
    model = om.build_classifier("conv_net", image_shape=(1, 28, 28), seed=0).eval()
    images = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(8, dtype=torch.int64)
    settings = {"steps": 3, "early_stop": False}
    ball = om.ImageBall(norm="linf", radius=0.05)
    fast = om.PGD(ball, engine=Engine(precision=precision, compile=True), **settings)
    plain = om.PGD(ball, engine=Engine(precision=precision), **settings)
    for _ in range(3):
        found, expected = fast(model, images, labels), plain(model, images, labels)
        assert torch.allclose(found.objective, expected.objective, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    assert len(made) == (1 if precision == "32" else 2)


def test_a_model_that_casts_inside_runs_bfloat16_by_autocast():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.last = nn.Linear(4, 3)

        def forward(self, images):
            return self.last(self.norm(self.first(images)).mean((2, 3)).float())

    model = Casting().eval()
    images = torch.rand(4, 1, 8, 8)
    attack = om.PGD(om.ImageBall(), steps=2, engine=Engine(precision="bf16"))
    assert attack(model, images, torch.zeros(4, dtype=torch.int64)).images.shape == images.shape


class TakesGradients(nn.Module):
    """Moves each image a little before it classifies it, as test-time defences do."""

    def __init__(self, core):
        super().__init__()
        self.core = core

    def forward(self, images):
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            step = torch.autograd.grad(self.core(leaf).logsumexp(1).sum(), leaf)[0]
        return self.core(images - 0.01 * step.sign())


def test_a_model_that_takes_gradients_is_attacked_on_several_threads(two_threads, own_net):
    model, images = TakesGradients(own_net()), torch.rand(40, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    result = PGD(ImageBall("linf", 0.05), 5)(model, images, labels)
    assert result.success.any()
