"""What every attack promises on every threat model."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from onmanifold.attacks import FGSM, MIA, PGD, Engine, ProjectedAdam, RandomPerturbation
from onmanifold.foundation.errors import InputError
from onmanifold.threats import ImageBall

COUNT = 23
CLASSES = 4
DRAWN = ("fog", "snow", "gabor")


def run(attack, model, batch, rows=None, seed=0, dtype=None):
    """Attack the selected rows of a batch."""
    images, labels, codes, indices = batch
    rows = torch.arange(len(images)) if rows is None else rows
    images, codes = images[rows], None if codes is None else codes[rows]
    if dtype is not None:
        images = images.to(dtype)
    return attack(model, images, labels[rows], codes, seed=seed, indices=indices[rows])


def to_the_end(attack):
    """The attack without early stop, where it can be told so."""
    return replace(attack, early_stop=False) if hasattr(attack, "early_stop") else attack


def norm(values, name):
    order = {"linf": float("inf"), "l2": 2, "l1": 1}[name]
    return torch.linalg.vector_norm(values.flatten(1), order, dim=1)


def test_radius_0_is_the_identity(threat_name, make_threat, make_attack, batch, small_net):
    good = batch(COUNT)
    result = run(make_attack(make_threat(0.0)), small_net, good)
    torch.testing.assert_close(result.images, good.images, rtol=0, atol=1e-12)
    wrong = small_net(good.images).argmax(1) != good.labels
    assert torch.equal(result.success, wrong)
    if threat_name not in DRAWN:
        assert all((size == 0).all() for size in result.size.values())


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_what_is_returned_is_inside_and_success_is_true_of_it(
    threat, make_attack, batch, small_net_32, precision
):
    good = batch(COUNT)
    attack = replace(make_attack(threat), engine=Engine(precision=precision))
    result = run(attack, small_net_32, good, dtype=torch.float32)
    assert result.images.dtype == torch.float32
    assert result.images.shape == good.images.shape
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert not result.images.requires_grad

    codes = None if good.codes is None else good.codes.float()
    region = threat.around(good.images.float(), good.labels, codes)
    for name, ball in region.balls.items():
        size = norm(result.variables[name], ball.norm)
        torch.testing.assert_close(result.size[name], size, rtol=1e-5, atol=1e-7)
        assert (size <= ball.radius * (1 + 1e-5)).all()
    rendered = region.render(result.variables)
    torch.testing.assert_close(result.images, rendered.clamp(0, 1), rtol=0, atol=1e-6)
    if "image" in region.balls and len(region.balls) == 1:
        change = norm(result.images - good.images.float(), region.balls["image"].norm)
        assert (change <= region.balls["image"].radius * (1 + 1e-5) + 1e-6).all()

    with torch.no_grad():
        predictions = small_net_32(result.images).argmax(1)
    assert torch.equal(result.predictions, predictions)
    assert torch.equal(result.success, predictions != good.labels)
    # One label in ten is wrong from the start, and no attack may lose those.
    assert result.success.sum() >= 3


def test_attacks_find_more_than_chance(
    threat_name, threat, make_attack, attack_name, batch, small_net
):
    good = batch(200)
    rate = run(make_attack(threat), small_net, good).success.float().mean()
    chance = run(RandomPerturbation(threat), small_net, good).success.float().mean()
    assert 0.1 <= chance < 0.4
    # The flakes of an image of eight pixels leave an attack little to choose.
    gain = {"random": 0.0}.get(attack_name, -0.01 if threat_name == "snow" else 0.04)
    assert rate >= chance + gain
    assert rate < 1  # else nothing could be learned from the tests of this file


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda threat, steps, **rest: PGD(threat, steps=steps, step_size=sizes(threat), **rest),
        lambda threat, steps, **rest: MIA(threat, steps=steps, step_size=sizes(threat), **rest),
        lambda threat, steps, **rest: ProjectedAdam(threat, steps=steps, restarts=1, **rest),
        lambda threat, steps, **rest: RandomPerturbation(threat, restarts=steps, **rest),
        lambda threat, steps, **rest: PGD(
            threat, steps=2, restarts=steps, step_size=sizes(threat), **rest
        ),
    ],
    ids=["pgd", "mia", "adam", "random", "restarts"],
)
def test_more_steps_or_restarts_never_report_less(threat, make, batch, small_net, early_stop):
    good = batch(COUNT)
    before = None
    for steps in (1, 2, 5, 9):
        result = run(make(threat, steps, early_stop=early_stop), small_net, good)
        if before is not None:
            assert (result.objective >= before.objective - 1e-12).all()
            if early_stop:
                assert (result.success >= before.success).all()
        before = result


def sizes(threat):
    """Large step sizes, so that a search overshoots."""
    parts = {"image": threat.image, "latent": threat.latent} if hasattr(threat, "image") else None
    return (
        {name: 0.7 * part.radius for name, part in parts.items()} if parts else 0.7 * threat.radius
    )


def test_float64_results_do_not_depend_on_the_batch(threat, make_attack, batch, small_net):
    good = batch(256)
    attack = make_attack(threat)
    whole = run(attack, small_net, good)
    again = run(attack, small_net, good)
    assert torch.equal(again.images, whole.images)
    seven = torch.tensor([255, 3, 77, 120, 10, 0, 200])
    for rows in [seven, *torch.tensor([[10], [255], [131], [64], [2]])]:
        part = run(attack, small_net, good, rows)
        torch.testing.assert_close(part.images, whole.images[rows], rtol=0, atol=1e-9)
        torch.testing.assert_close(part.objective, whole.objective[rows], rtol=1e-9, atol=1e-9)
        assert torch.equal(part.success, whole.success[rows])
        assert torch.equal(part.forwards, whole.forwards[rows])
        assert torch.equal(part.backwards, whole.backwards[rows])


def test_float32_success_does_not_depend_on_the_batch(threat, make_attack, batch, small_net_32):
    good = batch(512)
    attack = make_attack(threat)
    whole = run(attack, small_net_32, good, dtype=torch.float32).success
    parts = [
        run(attack, small_net_32, good, rows, dtype=torch.float32).success
        for rows in torch.arange(512).split(73)
    ]
    assert (torch.cat(parts).float().mean() - whole.float().mean()).abs() <= 0.002


def test_another_seed_is_another_start(threat, make_attack, attack_name, batch, small_net):
    good = batch(COUNT)
    one, two = (run(make_attack(threat), small_net, good, seed=seed) for seed in (0, 1))
    differ = (one.images - two.images).abs().flatten(1).amax(1) > 1e-6
    if attack_name in ("fgsm", "mia", "fab", "rays", "carlini_wagner"):
        assert not differ.any()
    else:
        assert differ.sum() >= 3


class Disturbed(nn.Module):
    """A net in which all that an attack might change is set to something unusual."""

    def __init__(self, core):
        super().__init__()
        self.core = core
        self.dropout = nn.Dropout(0.5)
        self.late_norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("calls", torch.zeros(1))
        self.calls_left, self.error = [-1], None
        self.core.train()
        self.core[1].eval()
        self.late_norm.training = True
        self.dropout.training = False
        self.core[0].weight.requires_grad_(False)
        self.core[6].weight.grad = torch.ones_like(self.core[6].weight)

    def forward(self, images):
        self.calls += 1
        self.calls_left[0] -= 1
        if self.calls_left[0] == 0:
            raise self.error
        return self.late_norm(self.dropout(self.core(images)))


def snapshot(model):
    parameters = {
        name: (parameter, parameter._version, parameter.clone(), parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }
    return {
        "flags": [module.training for module in model.modules()],
        "parameters": parameters,
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "buffers": {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()},
        "attributes": {name: dict(vars(module)) for name, module in model.named_modules()},
        "random": torch.get_rng_state(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
    }


def assert_same(model, before):
    after = snapshot(model)
    assert after["flags"] == before["flags"]
    for name, (parameter, version, value, wants) in before["parameters"].items():
        found = after["parameters"][name]
        assert found[0] is parameter
        assert found[1] == version
        assert torch.equal(found[2], value)
        assert found[3] == wants
    for gradient, expected in zip(after["gradients"], before["gradients"], strict=True):
        assert (gradient is None) == (expected is None)
        assert gradient is None or torch.equal(gradient, expected)
    assert after["buffers"].keys() == before["buffers"].keys()
    for name, (buffer, value) in before["buffers"].items():
        assert after["buffers"][name][0] is buffer
        assert torch.equal(after["buffers"][name][1], value)
    for name, attributes in before["attributes"].items():
        assert after["attributes"][name].keys() == attributes.keys()
    assert torch.equal(after["random"], before["random"])
    assert after["threads"] == before["threads"]
    assert after["grad"] == before["grad"]


@pytest.fixture
def disturbed(own_net):
    return Disturbed(own_net()).double()


def test_the_model_is_left_untouched(threat, make_attack, batch, disturbed):
    good = batch(7)
    before = snapshot(disturbed)
    run(make_attack(threat), disturbed, good)
    assert_same(disturbed, before)
    codes = good.codes
    make_attack(threat).examples(disturbed, good.images, good.labels, codes, indices=good.indices)
    assert_same(disturbed, before)


@pytest.mark.parametrize("call", ["__call__", "examples"])
@pytest.mark.parametrize(("fold", "fail_at"), [(True, 1), (False, 1), (False, 2), (False, 3)])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("broken"), RuntimeError("broken")]
)
def test_the_model_is_left_untouched_also_by_an_interruption(
    attack_name, make_attack, images, disturbed, call, fold, fail_at, error
):
    good = images(7)
    disturbed.calls_left, disturbed.error = [fail_at], error
    engine = Engine(threads=torch.get_num_threads() + 1, fold=fold)
    attack = to_the_end(replace(make_attack(ImageBall("l2", 0.3)), engine=engine))
    before = snapshot(disturbed)
    with pytest.raises((type(error), InputError)) as caught:
        getattr(attack, call)(disturbed, good.images, good.labels)
    # A failure while the model is read may be one of its copy.
    assert type(error) in (type(caught.value), type(caught.value.__cause__))
    assert_same(disturbed, before)


def test_buffers_that_are_replaced_are_put_back(make_attack, attack_name, images, own_net):
    class Counting(nn.Sequential):
        def forward(self, batch):
            self.calls = self.calls + 1
            return super().forward(batch)

    model = Counting(*own_net(torch.float64))
    model.register_buffer("calls", torch.zeros(1))
    before = snapshot(model)
    good = images(3)
    make_attack(ImageBall("linf", 0.05))(model, good.images, good.labels)
    assert_same(model, before)


def test_a_module_shared_with_others_keeps_its_flags(images, own_net):
    net = own_net(torch.float64).train()
    model = nn.Sequential(net, nn.Identity())
    good = images(3)
    PGD(ImageBall("linf", 0.05), steps=2)(model, good.images, good.labels)
    assert all(module.training for module in net.modules())


def test_attacks_work_where_gradients_are_off(make_attack, attack_name, images, small_net):
    good = images(COUNT)
    attack = make_attack(ImageBall("linf", 0.05))
    expected = attack(small_net, good.images, good.labels).images
    with torch.no_grad():
        found = attack(small_net, good.images, good.labels).images
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


def test_images_that_want_a_gradient_get_none(make_attack, attack_name, images, small_net):
    good = images(COUNT)
    leaf = good.images.clone().requires_grad_()
    result = make_attack(ImageBall("linf", 0.05))(small_net, leaf, good.labels)
    assert not result.images.requires_grad
    assert leaf.grad is None
    assert torch.equal(leaf, good.images)


def test_the_arguments_are_left_untouched(threat, make_attack, batch, small_net):
    good = batch(COUNT)
    copies = copy.deepcopy(good)
    run(make_attack(threat), small_net, good)
    for tensor, before in zip(good, copies, strict=True):
        assert tensor is before or torch.equal(tensor, before)


def test_examples_are_the_images_of_a_call(threat, make_attack, batch, small_net):
    good = batch(COUNT)
    attack = make_attack(threat)
    result = run(attack, small_net, good)
    found = attack.examples(small_net, good.images, good.labels, good.codes, indices=good.indices)
    torch.testing.assert_close(found, result.images, rtol=0, atol=1e-12)
    assert not found.requires_grad


def test_passes_are_counted(threat, make_attack, attack_name, batch, own_net):
    good = batch(COUNT)
    model = own_net(torch.float64)
    result = run(to_the_end(make_attack(threat)), model, good)
    if attack_name in ("fab", "rays", "carlini_wagner", "square", "autoattack"):
        # Their numbers depend on what they find; each has its own tests.
        needed = result.found_by is None or torch.tensor(
            [name != "clean" for name in result.found_by]
        )
        assert ((result.forwards >= 1) | ~torch.as_tensor(needed)).all()
        assert result.forwards.max() >= 5
        assert (result.backwards.max() > 0) == (attack_name not in ("rays", "square"))
        return
    attack = make_attack(threat)
    steps = {"fgsm": 1, "random": 0}.get(attack_name) or getattr(attack, "steps", 0)
    targets = CLASSES - 1 if attack_name == "apgd_t" else 1
    restarts = targets * attack.restarts
    # The l1 ball of APGD shrinks in phases, each of which begins with a pass of its own.
    norms = {ball.norm for ball in threat.around(*good[:3]).balls.values()}
    starts = 3 if attack_name.startswith("apgd") and "l1" in norms else 1
    assert (result.forwards == restarts * (steps + starts)).all()
    assert (result.backwards == restarts * steps).all()
    assert result.forwards.dtype == result.backwards.dtype == torch.int32


def test_a_one_step_attack_from_the_image_is_the_closed_form(images, small_net):
    good = images(COUNT)
    leaf = good.images.clone().requires_grad_()
    nn.functional.cross_entropy(small_net(leaf), good.labels, reduction="sum").backward()
    expected = (good.images + 0.05 * leaf.grad.sign()).clamp(0, 1)
    found = FGSM(ImageBall("linf", 0.05), early_stop=False)(small_net, good.images, good.labels)
    gained = nn.functional.cross_entropy(small_net(expected), good.labels, reduction="none")
    better = gained > nn.functional.cross_entropy(small_net(leaf), good.labels, reduction="none")
    assert better.float().mean() > 0.9
    torch.testing.assert_close(found.images[better], expected[better], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.images[~better], good.images[~better], rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_on_a_gpu(threat, make_attack, batch, own_net, plane, squashed, precision):
    good = batch(200)
    on_gpu = type(good)(*(part if part is None else part.cuda() for part in good))
    attack = replace(make_attack(threat), engine=Engine(precision=precision))
    model = own_net().cuda()
    generator = torch.cuda.get_rng_state()
    result = run(attack, model, on_gpu, dtype=torch.float32)
    assert result.images.is_cuda
    assert torch.equal(model(result.images).argmax(1) != on_gpu.labels, result.success)
    assert torch.equal(torch.cuda.get_rng_state(), generator)
    on_cpu = run(attack, own_net(), good, dtype=torch.float32)
    difference = int(result.success.sum()) - int(on_cpu.success.sum())
    # Of 200.
    assert abs(difference) <= (2 if precision == "32" else 6)
