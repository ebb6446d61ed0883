"""Pictures of a manifold and its page: they show what they say, and the page needs nothing else."""

from __future__ import annotations

import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from onmanifold.analysis.quality import Measure, Quality, measure_quality
from onmanifold.data.dataset import Dataset
from onmanifold.foundation.errors import InputError
from onmanifold.manifolds.learned import LearnedManifold
from onmanifold.manifolds.perceptual import PyramidDistance
from onmanifold.reports.figures import to_png, to_svg
from onmanifold.reports.manifold import (
    format_number,
    history_figure,
    latents_figure,
    mosaic_figure,
    write_manifold_report,
)
from onmanifold.reports.manifold_pictures import Mosaic, _between, picture_manifold

SHAPE, NAMES = (1, 8, 8), ("A & B", "<c>", "d")


class Linear(LearnedManifold):
    """Images 1/2 + W z / 20 + the class in the first pixel."""

    name = "linear"

    def __init__(self, box=None, conditional=True):
        super().__init__(SHAPE, len(NAMES), 4, conditional)
        self.box = box
        self.norm = torch.nn.BatchNorm1d(4 + conditional, affine=False)
        self.weight = torch.nn.Parameter(torch.linalg.qr(torch.ones(64, 64).triu())[0][:, 1:5].T)

    def encode(self, images, labels):
        return self.codes_of((images.flatten(1) - 0.5) @ (20 * self.weight.T), labels)

    def decode(self, codes):
        self.norm(codes)  # In train mode it would learn from what it sees.
        images = 0.5 + codes[:, :4] @ self.weight / 20
        if self.conditional:
            images = torch.cat([codes[:, 4:] / 4, images[:, 1:]], dim=1)
        return images.clamp(0, 1).view(-1, *SHAPE)


def dataset(count=40, seed=0, names=NAMES):
    images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return Dataset("toy <data>", images, torch.arange(count) % len(names), names, f"toy-{seed}")


def pictures_of(manifold, **options):
    found = picture_manifold(manifold, dataset(), dataset(seed=1), **options)
    return {mosaic.name: mosaic for mosaic in found}


@pytest.fixture(scope="module")
def pictures():
    return pictures_of(Linear())


def test_every_picture_is_there(pictures):
    assert list(pictures) == [
        *("samples", "reconstructions", "interpolations", "traversals", "nearest")
    ]
    for mosaic in pictures.values():
        assert mosaic.images.dtype == torch.float32
        assert mosaic.images.shape[2:] == SHAPE
        assert mosaic.images.min() >= 0
        assert mosaic.images.max() <= 1


def test_samples_stand_below_their_class(pictures):
    samples = pictures["samples"]
    assert samples.columns == NAMES
    assert torch.equal(samples.images[0, :, 0, 0, 0], torch.arange(3) / 4)
    # Each is another draw.
    rest = samples.images.flatten(0, 1).flatten(1)[:, 1:]
    assert len(rest.unique(dim=0)) == len(rest)
    blind = pictures_of(Linear(conditional=False))["samples"]
    assert blind.columns == ()
    assert "does not know classes" in blind.caption


def test_reconstructions_stand_below_their_images(pictures):
    mosaic, manifold, test = pictures["reconstructions"], Linear(), dataset(seed=1)
    assert mosaic.group == 2
    assert mosaic.columns == NAMES
    for row in range(0, len(mosaic.images), 2):
        for column, image in enumerate(mosaic.images[row]):
            place = (test.images == image).flatten(1).all(1).nonzero().item()
            assert test.labels[place] == column
        codes = manifold.encode(mosaic.images[row], torch.arange(3))
        torch.testing.assert_close(mosaic.images[row + 1], manifold.decode(codes).detach())


@pytest.mark.parametrize("box", [None, 2.0])
def test_interpolations_begin_and_end_at_reconstructions(box):
    found = pictures_of(Linear(box=box))
    mosaic, known = found["interpolations"], found["reconstructions"].images
    assert torch.equal(mosaic.images[:, 0], known[0])
    assert torch.equal(mosaic.images[:, -1], known[2])
    torch.testing.assert_close(mosaic.images[:, 1], known[1])
    torch.testing.assert_close(mosaic.images[:, -2], known[3])
    middle = (known[1] + known[3]) / 2
    straight = torch.allclose(mosaic.images[:, 4], middle, atol=1e-5)
    assert straight == (box is not None)


def test_the_arc_keeps_the_length_and_the_line_the_box():
    first, second = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    first, second = (part / part.norm(dim=1, keepdim=True) * 3 for part in (first, second))
    for share in (0.0, 0.2, 0.5, 1.0):
        found = _between(first, second, share, None)
        assert torch.allclose(found.norm(dim=1), torch.tensor(3.0).double())
        angle = torch.cosine_similarity(first, second, dim=1).acos()
        turned = torch.cosine_similarity(first, found, dim=1).clamp(-1, 1).acos()
        torch.testing.assert_close(turned, share * angle, atol=1e-6, rtol=1e-6)
    # Parallel, opposite and zero latents have no arc.
    for other in (first, -first, torch.zeros_like(first)):
        assert bool(_between(first, other, 0.3, None).isfinite().all())
    assert torch.equal(_between(first, second, 0.5, 9.0), first.lerp(second, 0.5))


def test_a_traversal_moves_one_latent_across_the_box():
    manifold = Linear(box=2.0)
    mosaic = pictures_of(manifold)["traversals"]
    assert mosaic.rows == ("latent 0", "latent 1", "latent 2", "latent 3")
    assert mosaic.columns == ("−2", "−1.5", "−1", "−0.5", "0", "0.5", "1", "1.5", "2")
    # The class took the place of the first pixel, so that codes come from the others.
    basis = 20 * torch.linalg.pinv(manifold.weight[:, 1:].detach())
    for number, row in enumerate(mosaic.images):
        codes = (row.flatten(1)[:, 1:] - 0.5) @ basis
        torch.testing.assert_close(codes[:, number], torch.linspace(-2, 2, 9), atol=1e-3, rtol=0)
        others = codes[:, [other for other in range(4) if other != number]]
        torch.testing.assert_close(others, others[:1].expand_as(others), atol=1e-3, rtol=0)


def test_levels_are_traversed_one_by_one(plane):
    data = dataset(names=NAMES)
    data = Dataset("p", data.images, data.labels, NAMES, "p")
    mosaic = {m.name: m for m in picture_manifold(plane, data, data)}["traversals"]
    assert mosaic.rows == ("level 0", "level 1", "level 2")
    for images, part in zip(mosaic.images, plane.levels.values(), strict=True):
        moved = (plane.encode(images, None) - plane.encode(images[:1], None)).abs().amax(0) > 1e-4
        assert moved.nonzero().flatten().tolist() == list(range(6))[part]


def test_the_nearest_training_image_stands_below_each_sample(pictures):
    images, train = pictures["nearest"].images, dataset().images
    for row in (0, 2):
        distances = (images[row][:, None] - train[None]).flatten(2).norm(dim=2)
        assert torch.equal(images[row + 1], train[distances.argmin(1)])
    rows = [(images[row] - images[row + 1]).flatten(1).norm(dim=1) for row in (0, 2)]
    assert torch.equal(rows[0], rows[0].sort().values)
    assert rows[0].max() <= rows[1].max()


def test_stored_codes_are_taken_and_unlike_fixed_parts_are_told():
    manifold, test = Linear(), dataset(seed=1)
    codes = torch.cat([torch.zeros(40, 4), torch.arange(40)[:, None] % 2], dim=1).float()
    stored = Dataset("s", test.images, test.labels, NAMES, "s", codes=codes)
    found = {m.name: m for m in picture_manifold(manifold, dataset(), stored, stored_codes=True)}
    assert torch.equal(
        found["reconstructions"].images[1::2].flatten(2)[..., 1:].unique(), torch.tensor([0.5])
    )
    assert "fixed part" in found["interpolations"].caption
    with pytest.raises(InputError, match="no codes"):
        picture_manifold(manifold, dataset(), test, stored_codes=True)


def test_one_image_of_a_class_is_enough():
    single = dataset(3, seed=1)
    names = [mosaic.name for mosaic in picture_manifold(Linear(), dataset(), single)]
    assert names == ["samples", "reconstructions", "traversals", "nearest"]


def test_the_manifold_is_left_as_it_was():
    manifold = Linear().train()
    before = manifold.norm.running_mean.clone()
    pictures_of(manifold)
    assert torch.equal(manifold.norm.running_mean, before)
    assert manifold.training
    assert manifold.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(2, 1, 8, 8)}, "images"),
        ({"rows": ("a",)}, "rows: expected 2"),
        ({"columns": ("a",) * 4}, "columns: expected 3"),
    ],
)
def test_wrong_mosaics_are_refused(changes, message):
    values = {"name": "m", "title": "", "caption": "", "images": torch.zeros(2, 3, 1, 8, 8)}
    with pytest.raises(InputError, match=message):
        Mosaic(**values | changes)


def test_a_mosaic_shows_each_image_at_its_place():
    images = torch.zeros(2, 2, 3, 8, 8)
    images[0, 0, 0] = images[0, 1, 1] = images[1, 0, 2] = 1.0
    figure = mosaic_figure(Mosaic("m", "", "", images, rows=("x", "y"), columns=("p", "q")))
    (canvas,) = (np.asarray(shown.get_array()) for shown in figure.axes[0].get_images())
    corners = [canvas[0, 0], canvas[0, -1], canvas[-1, 0], canvas[-1, -1]]
    assert [corner.tolist() for corner in corners] == [
        *([1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 1])
    ]
    assert canvas[:, 8].max() == 0  # The gap is transparent.
    ET.fromstring(to_svg(figure))
    with Image.open(io.BytesIO(to_png(figure, resolution=60))) as picture:
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_rows_that_belong_together_stand_together():
    figure = mosaic_figure(Mosaic("m", "", "", torch.zeros(4, 1, 1, 8, 8), group=2))
    (shown,) = figure.axes[0].get_images()
    empty = np.asarray(shown.get_array())[:, 0, 3] == 0
    gaps = [len(gap) for gap in re.findall("1+", "".join(str(int(row)) for row in empty))]
    assert len(gaps) == 3
    assert gaps[0] == gaps[2] < gaps[1]


def test_numbers_are_short():
    assert format_number(math.nan) == "–"
    assert format_number(0.5) == "0.5"
    assert format_number(-12345.6) == "-12,346"


def test_history_shows_validation_first():
    history = [
        {"epoch": e, "train_loss": 1.0, "validation_l1": 0.1, "seconds": 3.0} for e in (1, 2)
    ]
    figure = history_figure(history)
    assert [pane.get_title() for pane in figure.axes] == ["validation l1", "train loss"]
    assert history_figure([]) is None
    assert history_figure([{"epoch": 1, "validation_l1": None}]) is None


class Page(HTMLParser):
    """Collects identifiers, links and text; checks that tags are closed."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.identifiers, self.tags, self.words = [], [], [], set(), []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset"):
                self.links.append(value)
            if name == "id":
                self.identifiers.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pictures):
    place = tmp_path_factory.mktemp("report")
    quality = measure_quality(
        Linear(box=2.0), dataset(), dataset(seed=1), count=30, perceptual=PyramidDistance()
    )
    history = [{"epoch": epoch, "train_loss": 1 / epoch} for epoch in (1, 2, 3)]
    shown = [pictures["samples"], pictures["nearest"]]
    assert write_manifold_report(place, Linear(box=2.0), quality, shown, history).is_file()
    return place


def test_the_page_needs_nothing_else(folder):
    text = (folder / "manifold.html").read_text()
    page = Page(text)
    assert not {"script", "link"} & page.tags
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"https?://", text)
    assert len(set(page.identifiers)) == len(page.identifiers)
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.identifiers)


def test_the_page_shows_every_figure(folder):
    text = (folder / "manifold.html").read_text()
    words = " ".join(Page(text).words)
    quality = Quality.from_json(folder / "quality.json")
    for measure in quality.measures:
        assert measure.name[1:] in words
        assert format_number(measure.value) in words
        assert measure.note in words
    assert quality.facts["fingerprint"] in words
    assert "toy <data>" in words
    assert "<data>" not in text
    for name in ("samples", "nearest", "distances", "latents", "training"):
        ET.parse(folder / "figures" / f"{name}.svg")
        with Image.open(folder / "figures" / f"{name}.png") as picture:
            picture.verify()


def test_latents_without_any_spread_can_be_drawn():
    series = dict.fromkeys(
        ("code_mean", "code_deviation", "draw_mean", "draw_deviation"), (0.0, 0.0)
    )
    quality = Quality((Measure("x", 1.0),), series, {})
    ET.fromstring(to_svg(latents_figure(quality)))
