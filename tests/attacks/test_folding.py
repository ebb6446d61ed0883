"""The private copy computes what the model computes, or is not used."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from onmanifold.attacks import PGD, Engine
from onmanifold.attacks.engine import frozen
from onmanifold.classifiers import build_classifier
from onmanifold.threats import ImageBall

SHAPE = (3, 8, 8)


def settled(model):
    """Batch norms with statistics and factors that are not the initial ones; in train mode, as in training."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
                (module.running_mean, -0.5, 0.5),
                (module.running_var, 0.3, 2.0),
            ):
                if tensor is not None:
                    drawn = torch.rand(tensor.shape, generator=generator)
                    tensor.data.copy_(low + (high - low) * drawn)
    return model.train()


class Layers(nn.Module):
    """A body written by a test, between two layers that all models here share."""

    def __init__(self, body, **modules):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU()
        self.last = nn.Linear(6, 4)
        for name, module in modules.items():
            self.add_module(name, module)
        self.body = body

    def forward(self, images):
        features = self.norm(self.first(images))
        return self.last(self.body(self, features).mean((2, 3)))


def conv(**options):
    return nn.Conv2d(6, 6, 3, padding=1, **options)


def residual(net, x):
    return net.relu(x + net.bn2(net.conv2(net.relu(net.bn1(net.conv1(net.relu(x)))))))


def tied(net, x):
    return net.conv1(functional.relu(net.conv2(x)))


def make_tied():
    net = Layers(tied, conv1=conv(), conv2=conv())
    net.conv2.weight = net.conv1.weight
    return net


def make_shared_pair():
    pair = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.ReLU())
    return Layers(lambda net, x: net.pair(net.pair(x)), pair=pair)


FOLDABLE = {
    "sequential": lambda: Layers(
        lambda net, x: net.rest(x), rest=nn.Sequential(nn.ReLU(), conv(), nn.BatchNorm2d(6))
    ),
    "residual": lambda: Layers(
        residual,
        conv1=conv(bias=False),
        bn1=nn.BatchNorm2d(6),
        conv2=conv(bias=False),
        bn2=nn.BatchNorm2d(6),
    ),
    "shared_layer": lambda: Layers(
        lambda net, x: net.bn2(net.conv1(net.bn1(net.conv1(x)))),
        conv1=conv(),
        bn1=nn.BatchNorm2d(6),
        bn2=nn.BatchNorm2d(6),
    ),
    "shared_norm": lambda: Layers(
        lambda net, x: net.bn1(net.conv2(net.bn1(net.conv1(x)))),
        conv1=conv(),
        conv2=conv(),
        bn1=nn.BatchNorm2d(6),
    ),
    "shared_pair": make_shared_pair,
    "one_module_two_names": lambda: Layers(
        lambda net, x: net.b(functional.relu(net.a(x))), **dict.fromkeys("ab", conv())
    ),
    "norm_before_conv": lambda: Layers(
        lambda net, x: net.conv1(net.relu(net.bn1(x))), conv1=conv(), bn1=nn.BatchNorm2d(6)
    ),
    "norm_of_a_sum": lambda: Layers(
        lambda net, x: net.bn1(net.conv1(x) + x), conv1=conv(), bn1=nn.BatchNorm2d(6)
    ),
    "no_affine": lambda: Layers(
        lambda net, x: net.bn1(net.conv1(x)), conv1=conv(), bn1=nn.BatchNorm2d(6, affine=False)
    ),
    "no_running_statistics": lambda: Layers(
        lambda net, x: net.bn1(net.conv1(x)),
        conv1=conv(),
        bn1=nn.BatchNorm2d(6, track_running_stats=False),
    ),
    "two_readers": lambda: Layers(
        lambda net, x: (lambda y: net.bn1(y) + y)(net.conv1(x)),
        conv1=conv(),
        bn1=nn.BatchNorm2d(6),
    ),
    "relu_and_skip": lambda: Layers(
        lambda net, x: (lambda y: net.relu(y) + 0.3 * y)(net.conv1(x)), conv1=conv()
    ),
    "relu_of_the_input_of_a_product": lambda: Layers(
        lambda net, x: (lambda y: net.relu(net.conv2(y)) * net.relu(y))(net.conv1(x)),
        conv1=conv(),
        conv2=conv(),
    ),
    "relu_in_place": lambda: Layers(
        lambda net, x: net.act(net.conv1(x)), conv1=conv(), act=nn.ReLU(inplace=True)
    ),
    "functional_relu": lambda: Layers(
        lambda net, x: functional.relu(net.bn1(net.conv1(functional.relu(x)))),
        conv1=conv(),
        bn1=nn.BatchNorm2d(6),
    ),
    "other_activations": lambda: Layers(
        lambda net, x: functional.gelu(net.act(net.conv1(x))), conv1=conv(), act=nn.SiLU()
    ),
    "grouped_and_reflected": lambda: Layers(
        lambda net, x: net.bn1(net.conv1(x)),
        conv1=conv(groups=3, padding_mode="reflect", bias=False),
        bn1=nn.BatchNorm2d(6),
    ),
    "linear_with_norm": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    ),
    "keyword_arguments": lambda: Layers(
        lambda net, x: net.relu(input=net.bn1(input=net.conv1(x))),
        conv1=conv(),
        bn1=nn.BatchNorm2d(6),
    ),
    "tied_weights": make_tied,
    "dropout_off": lambda: Layers(
        lambda net, x: functional.dropout(net.drop(x), 0.5, net.training), drop=nn.Dropout(0.5)
    ),
    "resnet32": lambda: build_classifier("resnet32", 4, SHAPE, seed=0),
}


@pytest.fixture
def images():
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def logits_and_gradient(network, images):
    leaf = images.clone().requires_grad_()
    logits = network(leaf)
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), leaf)[0]


def assert_agrees(model, images, folded, check=True):
    """The network of an attack computes what the model computes in eval mode."""
    flags = [module.training for module in model.modules()]
    model.eval()
    expected = logits_and_gradient(model, images)
    for module, flag in zip(model.modules(), flags, strict=True):
        module.training = flag
    with frozen(model, images, Engine(), check=check) as network:
        assert network.folded == folded
        found = logits_and_gradient(network, images)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * expected[0].abs().max().item())


@pytest.mark.parametrize("name", list(FOLDABLE))
def test_the_copy_agrees_with_the_model_and_follows_its_weights(name, images):
    torch.manual_seed(0)
    model = settled(FOLDABLE[name]())
    assert_agrees(model, images, folded=True)
    # Twice, so that the first refresh is not mistaken for following.
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1).add_(0.05 * torch.randn_like(parameter))
        model.train()(images + torch.randn_like(images))  # moves the running statistics
        # check=False is what training uses: nothing stands between a stale copy and the attack.
        assert_agrees(model, images, folded=True, check=False)


def test_norms_are_indeed_taken_out(images):
    model = settled(FOLDABLE["residual"]())
    with frozen(model, images, Engine()) as network:
        left = [m for m in network._forward.modules() if isinstance(m, nn.BatchNorm2d)]
        assert left == []


@pytest.mark.parametrize("change", ["replaced", "data", "loaded", "statistics", "precision"])
def test_however_weights_change_the_copy_follows(images, change):
    model, other = settled(FOLDABLE["residual"]()), settled(FOLDABLE["residual"]())
    assert_agrees(model, images, folded=True)
    if change == "replaced":
        model.conv1.weight = nn.Parameter(torch.randn_like(model.conv1.weight))
    elif change == "data":
        model.conv1.weight.data = torch.randn_like(model.conv1.weight)
    elif change == "loaded":
        model.load_state_dict(other.state_dict())
    elif change == "statistics":
        model.bn1.running_mean = torch.randn(6)
        model.bn2.running_var = torch.rand(6) + 0.1
    else:
        model, images = model.double(), images.double()
    assert_agrees(model, images, folded=True, check=False)


@pytest.mark.parametrize("check", [True, False])
def test_settings_that_are_no_tensors_are_followed_too(images, check):
    def warm(net, x):
        return x * net.temperature

    model = settled(Layers(warm))
    model.temperature = 1.0
    assert_agrees(model, images, folded=True)
    model.temperature = 3.0
    model.norm.eps = 0.5
    model.eval()
    expected = model(images)
    with frozen(model, images, Engine(), check=check) as network:
        torch.testing.assert_close(network(images), expected)


def test_a_changed_structure_is_traced_again(images):
    model = settled(FOLDABLE["sequential"]())
    assert_agrees(model, images, folded=True)
    model.rest[0] = nn.Tanh()
    assert_agrees(model, images, folded=True, check=False)
    model.rest.append(nn.Sigmoid())
    assert_agrees(model, images, folded=True, check=False)


def hooked(kind):
    model = Layers(lambda net, x: net.relu(x))
    if kind == "forward":
        model.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif kind == "pre":
        model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    else:
        model.norm.register_full_backward_hook(
            lambda module, inputs, outputs: tuple(2 * gradient for gradient in inputs)
        )
    return model


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Layers(lambda net, x: net.conv1(x), conv1=nn.utils.weight_norm(conv()))


class Counter(nn.Module):
    """Scales by the number of its calls, a Python number."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * (1 + 0.5 * (self.calls % 7))


UNFOLDABLE = {
    "forward_hook": lambda: hooked("forward"),
    "forward_pre_hook": lambda: hooked("pre"),
    "backward_hook": lambda: hooked("backward"),
    "parametrisation": lambda: Layers(
        lambda net, x: net.conv1(x), conv1=nn.utils.parametrizations.spectral_norm(conv())
    ),
    "old_weight_norm": old_weight_norm,
    "constant_from_the_images": lambda: Layers(lambda net, x: x * (2.0 if x.mean() > 0 else 1.0)),
    "steps_from_the_batch": lambda: Layers(lambda net, x: sum(row for row in range(len(x))) + x),
    "random_python_number": lambda: Layers(lambda net, x: x + torch.rand(()).item()),
    "baked_tensor": lambda: Layers(lambda net, x: x + torch.rand(6, 1, 1)),
}


@pytest.mark.parametrize("name", list(UNFOLDABLE))
def test_what_cannot_be_copied_exactly_is_not_copied(name, images):
    torch.manual_seed(0)
    model = settled(UNFOLDABLE[name]())
    if "random" in name or "baked" in name:
        with frozen(model, images, Engine()) as network:
            assert not network.folded
        return
    assert_agrees(model, images, folded=False)
    assert_agrees(model, images, folded=False, check=False)


@pytest.mark.parametrize(
    "body",
    [
        lambda net, x: functional.dropout(x, 0.5, training=True),
        lambda net, x: x + torch.randn_like(x),
        lambda net, x: x + 0.1 * torch.rand(x.shape),
    ],
)
def test_random_models_are_attacked_as_they_are(body, images):
    model = settled(Layers(body))
    with frozen(model, images, Engine()) as network:
        one, two = network(images), network(images)
        assert not network.folded
    assert not torch.equal(one, two)
    result = [
        PGD(ImageBall(radius=0.1), steps=3)(
            model, images, torch.zeros(5, dtype=torch.int64), seed=s
        )
        for s in (0, 0)
    ]
    assert torch.equal(result[0].images, result[1].images)


@pytest.mark.parametrize("check", [True, False])
def test_a_counter_in_python_is_not_frozen(images, check):
    model = settled(Layers(lambda net, x: net.count(x), count=Counter()))
    with frozen(model, images, Engine(), check=check) as network:
        assert not network.folded
        before = model.count.calls
        network(images)
        assert model.count.calls == before + 1


def test_nothing_of_the_copy_is_shared_with_the_model_in_a_way_that_shows(images):
    model = settled(FOLDABLE["residual"]())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = list(model.modules())
    with frozen(model, images, Engine(precision="bf16")) as network:
        network(images)
        network.exact(images)
    assert all(one is two for one, two in zip(own, model.modules(), strict=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert type(model.bn1) is nn.BatchNorm2d


def test_folding_can_be_turned_off(images):
    model = settled(FOLDABLE["residual"]())
    with frozen(model, images, Engine(fold=False)) as network:
        assert not network.folded
        assert network._forward is model


def test_attacks_give_the_same_folded_and_unfolded(images):
    model = settled(FOLDABLE["residual"]()).double()
    images = images.double()
    labels = torch.zeros(5, dtype=torch.int64)
    one, two = (
        PGD(ImageBall("l2", 0.5), engine=Engine(fold=fold), early_stop=False)(model, images, labels)
        for fold in (True, False)
    )
    torch.testing.assert_close(one.images, two.images, rtol=0, atol=1e-9)
    torch.testing.assert_close(one.objective, two.objective)


def test_a_compiled_model_is_attacked_and_left_untouched(images):
    model = settled(FOLDABLE["residual"]())
    compiled = torch.compile(model, backend="eager")
    labels = torch.zeros(5, dtype=torch.int64)
    model.bn1.eval()
    flags = [module.training for module in compiled.modules()]
    attack = PGD(ImageBall("l2", 0.5), steps=4)
    expected = attack(model, images, labels)
    result = attack(compiled, images, labels)
    assert [module.training for module in compiled.modules()] == flags
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=1e-5)
    with frozen(compiled, images, Engine()) as network:
        assert network.folded
        # Of a compiled module, eval() does not reach the module inside (pytorch#132986).
        assert not any(module.training for module in compiled.modules())


def test_a_parallel_model_is_attacked_through_its_module(images):
    model = settled(FOLDABLE["residual"]())
    labels = torch.zeros(5, dtype=torch.int64)
    attack = PGD(ImageBall("l2", 0.5), steps=4)
    expected = attack(model, images, labels)
    result = attack(nn.DataParallel(model), images, labels)
    torch.testing.assert_close(result.images, expected.images, rtol=0, atol=1e-6)


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients through, turned around."""

    @staticmethod
    def forward(ctx, images):
        return (8 * images).round() / 8

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class OwnGradient(nn.Module):
    def __init__(self, core, kind):
        super().__init__()
        self.core, self.kind = core, kind

    def forward(self, images):
        if self.kind == "function":
            return self.core(Straight.apply(images))
        if self.kind == "no_grad":
            with torch.no_grad():
                blurred = 0.5 * images
            return self.core(images + blurred)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_()
            step = torch.autograd.grad(self.core(leaf).logsumexp(1).sum(), leaf)[0]
        return self.core(images - 0.01 * step.sign())


@pytest.mark.parametrize("kind", ["function", "no_grad", "inner gradient"])
def test_a_gradient_of_the_models_own_is_not_lost(kind, own_net):
    model, images = OwnGradient(own_net(), kind), torch.rand(6, 1, 8, 8)
    with frozen(model, images, Engine()) as network:
        leaves = [images.clone().requires_grad_() for _ in range(2)]
        found, expected = (
            torch.autograd.grad(call(leaf).square().sum(), leaf)[0]
            for call, leaf in zip((network, model), leaves, strict=True)
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_gradient_is_attacked_in_vain(own_net):
    model = nn.Sequential(Detached(), own_net())
    images = torch.rand(6, 1, 8, 8)
    labels = model(images).argmax(1)
    result = PGD(ImageBall("linf", 0.01), 3, start="zero")(model, images, labels)
    assert torch.equal(result.images, images)


class Detached(nn.Module):
    def forward(self, images):
        return images.detach()


@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_in_a_row_become_one(bias):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20, bias), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4, bias)
    )
    images = torch.rand(5, 1, 8, 8)
    for _ in range(2):
        assert_agrees(net, images, folded=True)
        with frozen(net, images, Engine()) as network:
            layers = [m for m in network._forward.modules() if isinstance(m, nn.Linear)]
        # 64 x 30 is more than 20 x (64 + 30); only layers whose product is small are merged.
        assert len(layers) == 3
        with torch.no_grad():
            net[1].weight.neg_()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias), nn.Linear(20, 4, bias))
    for _ in range(2):
        assert_agrees(net, images, folded=True)
        with frozen(net, images, Engine()) as network:
            layers = [m for m in network._forward.modules() if isinstance(m, nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in layers] == [(4, 64)]
        with torch.no_grad():
            net[1].weight.neg_()
