import pytest
import torch
from torch.nn import functional

from onmanifold.data import Augmentation
from onmanifold.foundation.errors import InputError

IMAGES = torch.rand(64, 2, 6, 5, generator=torch.Generator().manual_seed(0))
INDICES = torch.arange(64) + 7


def test_nothing_is_the_identity():
    assert torch.equal(Augmentation()(IMAGES, INDICES, seed=0), IMAGES)


def test_about_half_are_mirrored_and_none_is_otherwise_changed():
    images = Augmentation(flip=True)(IMAGES, INDICES, seed=0)
    mirrored = (images == IMAGES.flip(3)).flatten(1).all(1)
    kept = (images == IMAGES).flatten(1).all(1)
    assert bool((mirrored ^ kept).all())
    assert 16 < int(mirrored.sum()) < 48


def test_every_crop_is_one_of_the_padded_image():
    images = Augmentation(crop_padding=2)(IMAGES, INDICES, seed=0)
    windows = functional.pad(IMAGES, [2] * 4).unfold(2, 6, 1).unfold(3, 5, 1)
    same = (windows == images[:, :, None, None]).flatten(4).all(4).all(1)
    found = same.flatten(1).int().argmax(1)
    assert bool(same.flatten(1).any(1).all())
    assert len(found.unique()) > 15


@pytest.mark.parametrize("augmentation", [Augmentation(True, 0), Augmentation(True, 2)])
def test_what_happens_depends_on_seed_epoch_and_index_alone(augmentation):
    whole = augmentation(IMAGES, INDICES, seed=1, epoch=3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = augmentation(IMAGES[order], INDICES[order], seed=1, epoch=3)
    assert torch.equal(shuffled, whole[order])
    parts = [
        augmentation(image, index, seed=1, epoch=3)
        for image, index in zip(IMAGES.split(7), INDICES.split(7), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)
    for other in ({"seed": 2, "epoch": 3}, {"seed": 1, "epoch": 4}):
        assert not torch.equal(augmentation(IMAGES, INDICES, **other), whole)


def test_a_negative_padding_is_refused():
    with pytest.raises(InputError, match="crop_padding"):
        Augmentation(crop_padding=-1)


def test_cutout_is_one_square_cut_at_the_border():
    images = torch.ones(400, 2, 6, 5)
    holes = Augmentation(cutout=3)(images, torch.arange(400), seed=0) == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    sizes = set()
    for hole in holes[:, 0]:
        rows, columns = (hole.any(side).nonzero().squeeze(1) for side in (1, 0))
        assert hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert hole.sum() == len(rows) * len(columns)
        sizes.add((len(rows), len(columns)))
    # The centre may be any pixel: two or three of its rows and columns are inside.
    assert sizes == {(2, 2), (2, 3), (3, 2), (3, 3)}
    with pytest.raises(InputError, match="cutout: expected at least 0"):
        Augmentation(cutout=-1)
