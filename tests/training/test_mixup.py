"""Mixed images: their distribution, and each method against a plain, slow reference."""

import copy
from dataclasses import replace

import pytest
import torch
from scipy.stats import beta, kstest
from torch import nn
from torch.nn import functional

import onmanifold as om
from onmanifold.foundation.errors import ConfigError, InputError
from onmanifold.training import IAT, IJSAT, AdversarialTraining, InputMixup, ManifoldMixup, Step
from onmanifold.training.methods.base import persistent
from onmanifold.training.methods.mixup import Mixture


def make_step(network, dataset, count=20, seed=5):
    images, labels, codes, indices = dataset.batch(torch.arange(count))
    codes = None if codes is None else codes.double()
    network = network.double().train()
    return Step(network, network, images.double(), labels, codes, indices, 0, seed)


def pair_loss(logits, labels, mixture):
    """α · CE(y) + (1 − α) · CE(partner's y), sample by sample."""
    total = 0
    for place, logit in enumerate(logits):
        share, partner = mixture.shares[place], mixture.partners[place]
        own, other = (
            functional.cross_entropy(logit[None], labels[row][None]) for row in (place, partner)
        )
        total = total + share * own + (1 - share) * other
    return total / len(logits)


def mixed(values, mixture):
    return torch.stack(
        [
            mixture.shares[place] * value
            + (1 - mixture.shares[place]) * values[mixture.partners[place]]
            for place, value in enumerate(values)
        ]
    )


def assert_same(network, loss, reference, expected):
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    found = torch.autograd.grad(loss, list(network.parameters()))
    wanted = torch.autograd.grad(expected, list(reference.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("concentration", [0.1, 1.0, 4.0])
def test_shares_have_the_beta_distribution(network, fresh_dataset, concentration):
    step = make_step(network, fresh_dataset(2000), 2000)
    shares = Mixture.draw(concentration, step, "mixup").shares
    assert shares.min() >= 0
    assert shares.max() <= 1
    law = beta(concentration, concentration)
    assert kstest(shares.numpy(), law.cdf).pvalue > 0.01
    assert shares.var().item() == pytest.approx(law.var(), rel=0.1)


def test_partners_are_a_permutation_without_fixed_points(network, dataset):
    mixture = Mixture.draw(1.0, make_step(network, dataset), "mixup")
    assert sorted(mixture.partners.tolist()) == list(range(20))
    assert (mixture.partners != torch.arange(20)).all()
    again = Mixture.draw(1.0, make_step(network, dataset), "mixup")
    assert torch.equal(again.partners, mixture.partners)
    other = Mixture.draw(1.0, make_step(network, dataset, seed=6), "mixup")
    assert not torch.equal(other.partners, mixture.partners)
    assert not torch.equal(
        Mixture.draw(1.0, make_step(network, dataset), "x").shares, mixture.shares
    )


def test_a_sample_keeps_its_share_in_any_batch(network, dataset):
    shares = Mixture.draw(0.5, make_step(network, dataset), "mixup").shares
    fewer = Mixture.draw(0.5, make_step(network, dataset, count=7), "mixup").shares
    torch.testing.assert_close(fewer, shares[:7], rtol=0, atol=0)
    alone = Mixture.draw(0.5, make_step(network, dataset, count=1), "mixup")
    assert alone.partners.tolist() == [0]


def test_no_concentration_mixes_nothing(network, dataset):
    step = make_step(network, dataset)
    expected = functional.cross_entropy(copy.deepcopy(network)(step.images), step.labels)
    torch.testing.assert_close(InputMixup(0.0).loss(step), expected)


def test_input_mixup_equals_the_reference(network, dataset):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    mixture = Mixture.draw(1.0, step, "mixup")
    expected = pair_loss(reference(mixed(step.images, mixture)), step.labels, mixture)
    assert_same(network, InputMixup().loss(step), reference, expected)


@pytest.mark.parametrize("layer", ["", "0", "2", "5"])
def test_manifold_mixup_equals_the_reference(network, dataset, layer):
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    mixture = Mixture.draw(2.0, step, "mixup")
    values = mixed(step.images, mixture) if layer == "" else step.images
    for name, part in reference.named_children():
        values = part(values)
        values = mixed(values, mixture) if name == layer else values
    expected = pair_loss(values, step.labels, mixture)
    method = ManifoldMixup(layers=(layer,))
    assert_same(network, method.loss(step), reference, expected)
    assert not any(part._forward_hooks for part in network.modules())


def test_manifold_mixup_chooses_among_all_parts(network, fresh_dataset):
    dataset, chosen = fresh_dataset(400), set()
    hooked = {}

    def note(name):
        return lambda *_: hooked.setdefault(name)

    for name, part in network.named_children():
        part.register_forward_pre_hook(note(name))
    for start in range(0, 400, 8):
        images, labels, codes, indices = dataset.batch(torch.arange(start, start + 8))
        step = Step(network.train(), network, images, labels, codes, indices, 0, 0)
        place = om.foundation.randomness.integers(0, indices[:1], 7, stream="layer")
        chosen.add(int(place))
        ManifoldMixup().loss(step)
    assert chosen == set(range(7))


def test_a_compiled_classifier_mixes_in_each_step(network, dataset):
    compiled, method = torch.compile(network, backend="eager"), ManifoldMixup(layers=("2",))
    # As in a step that mixes the images themselves: made without mixing, it would know of none later.
    compiled(make_step(network, dataset).images)
    for seed in range(3):
        step = make_step(network, dataset, seed=seed)
        expected = method.loss(step)
        torch.testing.assert_close(method.loss(replace(step, model=compiled)), expected)


def test_manifold_mixup_of_a_classifier_names_its_body(dataset):
    classifier = om.build_classifier("conv_net", 3, (1, 8, 8), channels=[4, 8])
    step = make_step(classifier, dataset)
    assert ManifoldMixup(layers=("body.0",)).loss(step).isfinite()
    with pytest.raises(ConfigError, match=r"has no submodule 'body\.99'"):
        ManifoldMixup(layers=("body.99",)).loss(step)


def examples_of(attack, network, step, images=None, soft_labels=None):
    return persistent(attack).examples(
        copy.deepcopy(network),
        step.images if images is None else images,
        step.labels,
        codes=step.codes if images is None else None,
        seed=step.seed,
        indices=step.indices,
        soft_labels=soft_labels,
    )


def test_iat_equals_the_reference(network, dataset):
    attack = om.PGD(om.ImageBall(radius=0.1), steps=3)
    step = make_step(network, dataset)
    reference = copy.deepcopy(network)
    examples = examples_of(attack, network, step)
    expected = 0
    for stream, images in (("clean", step.images), ("adversarial", examples)):
        mixture = Mixture.draw(1.0, step, stream)
        logits = reference(mixed(images, mixture))
        expected = expected + pair_loss(logits, step.labels, mixture) / 2
    assert_same(network, IAT(attack).loss(step), reference, expected)


def reference_joint_pgd(network, images, codes, tint, step, mixture, start, sizes, steps):
    """PGD by hand on α · CE(y) + (1 − α) · CE(partner's y) of clip(decode(code + λ) + δ)."""
    network = copy.deepcopy(network).eval()

    def render(point):
        return (tint.decode(codes + point["latent"]) + point["image"]).clamp(0, 1)

    best, most, point = dict(start), torch.full((len(images),), -torch.inf).double(), dict(start)
    for number in range(steps + 1):
        point = {name: tensor.detach().requires_grad_() for name, tensor in point.items()}
        logits = network(render(point)).log_softmax(1)
        rows, partners = torch.arange(len(images)), step.labels[mixture.partners]
        values = -mixture.shares * logits[rows, step.labels]
        values = values - (1 - mixture.shares) * logits[rows, partners]
        better = values > most
        for name, tensor in point.items():
            mask = better.view(-1, *[1] * (tensor.ndim - 1))
            best[name] = torch.where(mask, tensor.detach(), best[name])
        most = torch.maximum(most, values.detach())
        if number < steps:
            slopes = torch.autograd.grad(values.sum(), list(point.values()))
            point = {
                name: (tensor.detach() + sizes[name] * slope.sign()).clamp(-radius, radius)
                for (name, tensor), slope, radius in zip(
                    point.items(), slopes, (0.1, 0.2), strict=True
                )
            }
    return render(best).detach()


def test_ijsat_equals_the_reference(network, coded, tint):
    sizes = {"image": 0.04, "latent": 0.1}
    threat = om.JointBall(om.ImageBall(radius=0.1), om.LatentBall(tint, radius=0.2))
    attack = om.PGD(threat, steps=3, step_size=sizes)
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    mixture = Mixture.draw(0.5, step, "mixup")
    images = mixed(step.images, mixture)
    codes = tint.encode(images, step.labels)
    start = threat.around(images, step.labels).random("uniform", step.seed, step.indices)
    examples = reference_joint_pgd(
        network, images, codes, tint, step, mixture, start, sizes, steps=3
    )
    expected = pair_loss(reference(examples), step.labels, mixture)
    assert_same(network, IJSAT(attack, 0.5).loss(step), reference, expected)


def test_mixup_after_the_attack_is_another_method(network, coded, tint):
    threat = om.JointBall(om.ImageBall(radius=0.1), om.LatentBall(tint, radius=0.2))
    attack = om.PGD(threat, steps=3, step_size={"image": 0.04, "latent": 0.1})
    step = make_step(network, coded)
    reference = copy.deepcopy(network)
    mixture = Mixture.draw(1.0, step, "mixup")
    examples = mixed(examples_of(attack, network, step), mixture)
    expected = pair_loss(reference(examples), step.labels, mixture)
    late = IJSAT(attack, 1.0, order="attack_first").loss(step)
    assert_same(network, late, reference, expected)
    robust = IJSAT(attack, 1.0).loss(make_step(network, coded))
    # Finished examples lose strength when they are mixed.
    assert robust > late


def test_ijsat_without_mixup_is_adversarial_training_on_the_encoded_image(network, dataset, tint):
    threat = om.JointBall(om.ImageBall(radius=0.1), om.LatentBall(tint, radius=0.2))
    attack = om.PGD(threat, steps=3, step_size={"image": 0.04, "latent": 0.1})
    mixed_loss = IJSAT(attack, 0.0).loss(make_step(copy.deepcopy(network), dataset))
    plain = AdversarialTraining(attack).loss(make_step(network, dataset))
    torch.testing.assert_close(mixed_loss, plain)


def test_soft_labels_weigh_the_objective():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    images, labels = torch.rand(5, 1, 2, 2).double(), torch.tensor([0, 1, 2, 0, 1])
    attack = om.PGD(om.ImageBall(radius=0.05), steps=4, early_stop=False)
    hard = attack.examples(network, images, labels)
    same = attack.examples(
        network, images, labels, soft_labels=functional.one_hot(labels, 3).double()
    )
    torch.testing.assert_close(hard, same)
    # Of the loss with the labels' own distribution its search finds more than that for the labels does.
    soft = torch.full((5, 3), 1 / 3).double()
    found = attack.examples(network, images, labels, soft_labels=soft)
    loss, other = (
        functional.cross_entropy(network(points), soft, reduction="none")
        for points in (found, hard)
    )
    assert loss.sum() > other.sum()
    margin = om.PGD(om.ImageBall(radius=0.05), objective=om.Margin())
    with pytest.raises(InputError, match="Margin takes no soft labels"):
        margin.examples(network, images, labels, soft_labels=soft)


def test_errors():
    attack = om.PGD(om.ImageBall())
    with pytest.raises(ConfigError, match="concentration: expected a finite number"):
        InputMixup(-0.1)
    with pytest.raises(ConfigError, match=r"order: .*'mix_first' or 'attack_first', found 'both'"):
        IJSAT(attack, order="both")
    with pytest.raises(ConfigError, match="layers: expected at least one"):
        ManifoldMixup(layers=())
    with pytest.raises(ConfigError, match=r"attack: .*'threat' is missing"):
        IAT("pgd")


@pytest.mark.parametrize(
    "attack", [om.PGD(om.ImageBall(), objective=om.Margin()), om.RayS(om.ImageBall())]
)
def test_mixed_labels_need_an_objective_that_takes_them(attack):
    with pytest.raises(ConfigError, match="mixed labels need an objective such as 'ce'"):
        IJSAT(attack)
    assert IJSAT(attack, order="attack_first").attack == attack
