"""Whether images keep their label, where that is known."""

import pytest
import torch

from onmanifold.analysis.validity import (
    check_label,
    keeps_label,
    nearest_class,
    nearest_of_class,
)
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds import FontsManifold, LearnedManifold
from onmanifold.manifolds.project import ProjectionConfig


class Lines(LearnedManifold):
    """Class k has the images whose pixel k is free in [0, 1] and whose others are 0.2."""

    name = "lines"
    box = 1.0

    def __init__(self):
        super().__init__((1, 1, 3), 3, latent_size=1, conditional=True)

    def decode(self, codes):
        own = torch.nn.functional.one_hot(self.labels_of(codes), 3).to(codes)
        return (0.2 + own * (codes[:, :1].clamp(0, 1) - 0.2)).view(-1, 1, 1, 3)

    def encode(self, images, labels):
        return self.codes_of(torch.full((len(images), 1), 0.5).to(images), labels)


def test_the_nearest_line_wins_at_the_known_distance():
    images = torch.tensor([[0.9, 0.2, 0.2], [0.3, 0.2, 0.8], [0.2, 0.6, 0.5]]).double()
    found = nearest_class(Lines(), images.view(3, 1, 1, 3))
    assert found.classes.tolist() == [0, 2, 1]
    deviations = images - 0.2
    for label in range(3):
        others = deviations.clone()
        others[:, label] = 0
        torch.testing.assert_close(found.distances[:, label], others.norm(dim=1), rtol=0, atol=1e-3)
    labels = torch.tensor([0, 1, 1])
    kept = keeps_label(Lines(), images.view(3, 1, 1, 3), labels, batch_size=2)
    assert kept.tolist() == [True, False, True]


def test_letters_are_nearest_to_their_own_class():
    """Letters of clearly different shape, under transformations that are not those of the start."""
    letters = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    letters[:, 0, 3:13, 6:9] = 255
    letters[:, 1, 3:13, 3:13] = 255
    letters[:, 2, 3:13, 3:6] = letters[:, 2, 3:6, 3:13] = 255
    letters[1] = letters[1] // 2
    manifold = FontsManifold(letters)
    labels = torch.tensor([0, 1, 2])
    codes = manifold.sample_codes(labels, seed=3)
    images = manifold.decode(codes)
    found = nearest_class(manifold, images)
    assert found.classes.tolist() == [0, 1, 2]
    own = found.distances.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert bool((own < 0.5).all())


def test_a_manifold_without_classes_is_refused(plane):
    with pytest.raises(InputError, match="plane hold no class"):
        nearest_class(plane, torch.rand(2, 1, 8, 8))


def test_known_codes_put_an_image_on_its_own_manifold():
    """At pixel values where class 1 is as near as the search of class 0 comes, what is known decides."""
    manifold = Lines()
    images = torch.tensor([[0.9, 0.2, 0.2], [0.25, 0.2, 0.8]]).double().view(2, 1, 1, 3)
    labels = torch.tensor([0, 0])
    config = ProjectionConfig(steps=0, restarts=0)
    blind = check_label(manifold, images, labels, config=config)
    # Without a descent the start at 0.5 is what is found: sqrt(0.4²), and the 0.7 of any other class are further.
    torch.testing.assert_close(blind.own, torch.tensor([0.4, (0.25**2 + 0.6**2) ** 0.5]).double())
    assert blind.kept.tolist() == blind.kept_by_search.tolist() == [True, False]
    assert blind.other_class[1] == 2
    codes = torch.tensor([[0.9, 0.0], [0.25, 0.0]]).double()
    known = check_label(manifold, images, labels, codes, config=config)
    torch.testing.assert_close(known.own, torch.tensor([0.0, 0.6]).double(), rtol=0, atol=1e-6)
    assert known.kept_by_search.tolist() == blind.kept_by_search.tolist()
    torch.testing.assert_close(known.other, blind.other)
    with pytest.raises(InputError, match="codes: expected those of the labels' classes"):
        check_label(manifold, images, labels, codes + 1)


def test_the_nearest_of_a_class_is_what_the_class_has():
    images = torch.tensor([[0.9, 0.2, 0.3]]).double().view(1, 1, 1, 3)
    found = nearest_of_class(Lines(), images, torch.tensor([0]))
    expected = torch.tensor([0.9, 0.2, 0.2]).double()
    torch.testing.assert_close(found.points.flatten(), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.distance, torch.tensor([0.1]).double(), rtol=0, atol=1e-3)
