"""Whether images keep their label, where that is known."""

import pytest
import torch

from onmanifold.analysis.validity import keeps_label, nearest_class
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds import FontsManifold, LearnedManifold


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
