import pytest
import torch

from onmanifold.data import Dataset
from onmanifold.foundation.errors import InputError


def make(count=20, **changes):
    fields = {
        "name": "toy",
        "images": torch.randint(0, 256, (count, 3, 4, 5), dtype=torch.uint8),
        "labels": torch.arange(count) % 4,
        "classes": tuple("abcd"),
        "fingerprint": "toy",
        "codes": torch.rand(count, 2),
    }
    return Dataset(**fields | changes)


def test_a_batch_is_floats_in_the_unit_interval():
    data = make()
    batch = data.batch(torch.tensor([3, 1]))
    assert batch.images.dtype == torch.float32
    assert torch.equal((batch.images * 255).round().to(torch.uint8), data.images[[3, 1]])
    assert batch.labels.tolist() == [3, 1]
    assert batch.indices.tolist() == [3, 1]
    assert torch.equal(batch.codes, data.codes[[3, 1]])
    assert (len(data), data.num_classes, data.image_shape) == (20, 4, (3, 4, 5))


def test_float_images_come_as_they_are():
    images = torch.rand(6, 1, 2, 2)
    batch = make(6, images=images).batch(torch.arange(6))
    assert torch.equal(batch.images, images)


def test_identities_survive_subsets_and_splits():
    data = make(indices=torch.arange(100, 120))
    chosen = data.subset(torch.tensor([5, 2])).subset(torch.tensor([1]))
    assert chosen.indices.tolist() == [102]
    assert torch.equal(chosen.images[0], data.images[2])
    rest, held_out = data.split(0.25, seed=3)
    assert (len(rest), len(held_out)) == (15, 5)
    assert sorted(rest.indices.tolist() + held_out.indices.tolist()) == list(range(100, 120))
    again = data.split(0.25, seed=3)[1]
    assert torch.equal(again.indices, held_out.indices)
    assert again.fingerprint == held_out.fingerprint
    other = data.split(0.25, seed=4)[1]
    assert not torch.equal(other.indices, held_out.indices)
    assert len({data.fingerprint, rest.fingerprint, held_out.fingerprint, other.fingerprint}) == 4


def test_take_gives_the_first():
    assert make().take(3).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.arange(20)}, "labels: found 0 to 19"),
        ({"labels": torch.arange(20) - 1}, "labels: found -1"),
        ({"labels": torch.zeros(20)}, "int64"),
        ({"labels": torch.zeros(19, dtype=torch.int64)}, "20 rows"),
        ({"images": torch.zeros(20, 4, 5)}, "N, C, H, W"),
        ({"images": torch.zeros(20, 3, 4, 5, dtype=torch.float64)}, "float32"),
        ({"codes": torch.zeros(3, 2)}, "codes: expected 20"),
    ],
)
def test_wrong_fields_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        make(**changes)


@pytest.mark.parametrize("fraction", [0, 1, -0.5])
def test_a_split_needs_a_proper_fraction(fraction):
    with pytest.raises(InputError, match="fraction"):
        make().split(fraction)
