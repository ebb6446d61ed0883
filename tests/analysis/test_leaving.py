"""What leaves a manifold, on a plane where all of it is known."""

import math

import pytest
import torch
from torch import nn

from onmanifold.analysis.leaving import measure_leaving
from onmanifold.analysis.successful import NothingRightError, attack_successfully, right_ones
from onmanifold.attacks import PGD, CarliniWagner
from onmanifold.data.dataset import Batch
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.project import ProjectionConfig
from onmanifold.threats import ImageBall, LatentBall


class Halves(nn.Module):
    """Two classes, told by a direction that is partly along the plane, partly across it."""

    def __init__(self, direction, offset):
        super().__init__()
        self.register_buffer("direction", direction)
        self.register_buffer("offset", offset)

    def forward(self, images):
        margin = (images - 0.5).flatten(1) @ self.direction - self.offset
        return 40 * torch.stack([-margin, margin], dim=1)


ALONG, ACROSS = 0.6, 0.8


@pytest.fixture
def scene(plane):
    """A classifier whose gradient has a tangent share of 0.36, images on the plane, and training images on it."""
    generator = torch.Generator().manual_seed(0)
    rows = plane.weight / plane.weight.norm(dim=1, keepdim=True)
    across = torch.randn(64, generator=generator).double()
    across = across - rows.T @ (rows @ across)
    direction = ALONG * rows[0] + ACROSS * across / across.norm()
    codes = 1.4 * torch.rand(40, 6, generator=generator).double() - 0.7
    images = plane.decode(codes)
    classifier = Halves(direction, torch.tensor(0.0).double()).eval()
    labels = classifier(images).argmax(1)
    labels[::10] = 1 - labels[::10]
    train = plane.decode(1.8 * torch.rand(80, 6, generator=generator).double() - 0.9)
    return classifier, Batch(images, labels, codes, torch.arange(100, 140)), train


def test_a_plane_is_left_as_the_gradient_says(plane, scene):
    classifier, batch, train = scene
    attacks = {
        "PGD": PGD(ImageBall(norm="l2", radius=1.0), steps=10, start="zero"),
        "C&W": CarliniWagner(
            ImageBall(norm="l2", radius=2.0), steps=60, rounds=3, first_constant=1.0, bounds="clip"
        ),
        "OM-PGD": PGD(LatentBall(plane, radius=0.7), steps=20),
    }
    config = ProjectionConfig(steps=300, restarts=0, learning_rate=0.01, tolerance=0.0)
    found = measure_leaving(
        classifier, plane, batch, attacks, train, neighbours=20, projection=config
    )
    assert (found.images_seen, len(found.batch.labels)) == (40, 36)
    assert found.on_manifold == ("OM-PGD",)
    assert (found.rank, found.pixels) == (6.0, 64)
    table = found.images.set_index("kind")
    assert list(found.images.kind.unique()) == ["clean", "random perturbation", *attacks]
    assert set(table.loc["PGD"]["sample"]) <= set(found.batch.indices.tolist())
    for name in ("PGD", "C&W"):
        part = table.loc[name]
        # Both follow the gradient, Adam nearly; its share is known. What is across is the distance.
        assert part["share"].to_numpy() == pytest.approx(ALONG**2, abs=0.03)
        assert part.angle.to_numpy() == pytest.approx(math.degrees(math.acos(ALONG)), abs=2)
        distance = (part.to_manifold / part.perturbation).to_numpy()
        assert distance == pytest.approx(ACROSS, abs=0.03)
        # Nearest neighbours on a plane span it, so that this distance is no shorter than the plane's.
        assert (part.to_neighbours >= part.to_manifold - 1e-2).all()
    assert table.loc["clean"].to_manifold.max() < 0.02
    assert table.loc["clean"].share.isna().all()
    moved = table.loc["OM-PGD"]
    for column in ("share", "share_tenth", "share_hundredth"):
        assert moved[column].to_numpy() == pytest.approx(1, abs=1e-6)
    assert moved.to_manifold.max() < 0.02
    assert moved.to_neighbours.max() < 1e-6
    directions = found.directions.set_index("kind").share
    assert directions["loss gradient"].to_numpy() == pytest.approx(ALONG**2, abs=1e-6)
    assert directions["random direction"].mean() == pytest.approx(6 / 64, abs=0.03)


def test_only_successful_examples_of_right_images_count(plane, scene):
    classifier, batch, _ = scene
    kept = right_ones(classifier, plane, batch)
    assert kept.indices.tolist() == [i for i in range(100, 140) if i % 10]
    attack = PGD(ImageBall(norm="l2", radius=0.1), steps=5)
    found = attack_successfully(classifier, attack, kept, plane)
    assert 0 < len(found.rows) < len(kept.labels)
    assert bool((classifier(found.images).argmax(1) != kept.labels[found.rows]).all())
    torch.testing.assert_close(found.origins, kept.images[found.rows])
    assert found.codes is None
    assert found.smaller == ()


def test_on_manifold_examples_know_their_codes(plane, scene):
    classifier, batch, _ = scene
    kept = right_ones(classifier, plane, batch._replace(codes=None))
    torch.testing.assert_close(kept.codes, batch.codes[batch.indices % 10 > 0])
    attack = PGD(LatentBall(plane, radius=0.5, levels=(0, 2)), steps=10)
    found = attack_successfully(classifier, attack, kept, plane)
    assert len(found.rows)
    torch.testing.assert_close(plane.decode(found.codes), found.images)
    torch.testing.assert_close(found.codes[:, 2:5], kept.codes[found.rows][:, 2:5])
    tenth = found.origins + 0.1 * (found.images - found.origins)
    torch.testing.assert_close(found.smaller[0], tenth)


def test_codes_that_are_not_the_images_own_are_not_believed(plane, scene):
    classifier, batch, _ = scene
    own = batch.codes[batch.indices % 10 > 0]
    # Those of a fifth of the images are another manifold's, then those of all.
    mixed = batch.codes.clone()
    mixed[::5] = 0.3
    for codes in (mixed, batch.codes.flip(0)):
        kept = right_ones(classifier, plane, batch._replace(codes=codes))
        torch.testing.assert_close(kept.codes, own)
        torch.testing.assert_close(plane.decode(kept.codes), kept.images)


def test_codes_that_a_manifold_refuses_are_not_believed(plane, scene, monkeypatch):
    classifier, batch, _ = scene

    def refuse(codes):
        raise InputError("codes: there is no such font.")

    monkeypatch.setattr(plane, "decode", refuse)
    kept = right_ones(classifier, plane, batch)
    torch.testing.assert_close(kept.codes, batch.codes[batch.indices % 10 > 0])


def test_wrong_input(plane, scene):
    classifier, batch, train = scene
    with pytest.raises(InputError, match="attacks: expected some"):
        measure_leaving(classifier, plane, batch, {}, train)
    with pytest.raises(InputError, match="none named 'clean'"):
        measure_leaving(classifier, plane, batch, {"clean": PGD(ImageBall())}, train)
    wrong = batch._replace(labels=1 - classifier(batch.images).argmax(1))
    with pytest.raises(NothingRightError, match="it gets no image right"):
        measure_leaving(classifier, plane, wrong, {"PGD": PGD(ImageBall())}, train)
