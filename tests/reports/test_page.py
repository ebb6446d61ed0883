"""Figures and the page: self-contained, escaped, the same for the same input."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from onmanifold.reports import figures
from onmanifold.reports.claims import Claim, judge
from onmanifold.reports.html import Page, Picture, RunRecord, render_page
from onmanifold.reports.tables import Table

METHODS = ["Normal", "AT <PGD & co>"]


@pytest.fixture(scope="module")
def outcomes():
    rng = np.random.default_rng(0)
    return {(m, c): [rng.random(50) < 0.5] for m in METHODS for c in ("standard", "PGD-50")}


@pytest.fixture(scope="module")
def table(outcomes):
    return Table.of([*METHODS, "Failed"], ["standard", "PGD-50"], outcomes)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(1)
    clean = rng.random((2, 3, 8, 8), dtype=np.float32)
    images = {m: np.clip(clean + 0.1 * (i + 1), 0, 1) for i, m in enumerate(METHODS)}
    return figures.Examples(
        clean,
        ["cat", "dog"],
        {"PGD-50": images},
        {"PGD-50": dict.fromkeys(METHODS, ("cat", "cat"))},
    )


@pytest.fixture(scope="module")
def page(table, outcomes, examples):
    picture = figures.inline_svg(
        figures.to_svg(figures.examples_figure(examples, "PGD-50")), "one", "seen <here>"
    )
    overview = figures.inline_svg(figures.to_svg(figures.accuracy_figure(table)), "two", "overview")
    claim = Claim.parse(
        {
            "claim": "A <b>bold</b> claim",
            "lhs": ["Normal", "standard"],
            "rhs": ["Failed", "standard"],
        },
        "c",
    )
    return render_page(
        Page(
            title="Letters & <fonts>",
            description="<script>alert(1)</script>",
            table=table,
            judgements=judge([claim], outcomes),
            overview=Picture("", "overview", overview),
            examples=[Picture("PGD-50", "caption", picture)],
            runs=[RunRecord("Failed", 0, error="loss became <NaN>")],
            specification="name: demo\n",
            commands=["onmanifold demo"],
            facts=[("Seeds", "0")],
        )
    )


class Links(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed."""

    VOID = ("meta", "br", "link", "img", "image", "use", "path", "stop")

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.identifiers: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.links.append(value)
            if name == "id":
                self.identifiers.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def links(page):
    parser = Links()
    parser.feed(page)
    return parser


def test_page_is_well_formed(links):
    assert links.open == []
    assert "table" in links.tags
    assert "svg" in links.tags


def test_page_fetches_nothing(page, links):
    assert all(link.startswith(("data:", "#")) for link in links.links)
    assert "script" not in links.tags
    assert "link" not in links.tags
    assert "@import" not in page
    assert not re.search(r"https?://", page)
    assert all(url.startswith(("#", "data:")) for url in re.findall(r"url\(([^)]*)\)", page))


def test_references_inside_the_page_exist_once(links):
    assert len(set(links.identifiers)) == len(links.identifiers)
    inner = {link[1:] for link in links.links if link.startswith("#")}
    assert inner
    assert inner <= set(links.identifiers)


def test_values_are_escaped(page):
    assert "<script>" not in page
    assert "AT &lt;PGD &amp; co&gt;" in page
    assert "A &lt;b&gt;bold&lt;/b&gt; claim" in page
    assert "loss became &lt;NaN&gt;" in page
    assert 'aria-label="seen &lt;here&gt;"' in page


def test_what_is_missing_is_shown_as_missing(page):
    assert "not measured" in page
    assert "–" in page


def test_same_input_same_figure(table):
    documents = {figures.to_svg(figures.accuracy_figure(table)) for _ in range(2)}
    assert len(documents) == 1


def test_png_is_a_picture_with_white_ground(examples):
    import io

    from PIL import Image

    data = figures.to_png(figures.examples_figure(examples, "PGD-50"), resolution=50)
    with Image.open(io.BytesIO(data)) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_training_curves_leave_out_what_was_not_recorded():
    history = [{"epoch": e, "train_loss": 1 / e, "validation_accuracy": None} for e in (1, 2, 3)]
    panels = {"loss": ("train_loss", 1.0), "accuracy": ("validation_accuracy", 100.0)}
    figure = figures.training_figure({"Normal": [history, history[:2]]}, panels)
    assert [pane.get_title() for pane in figure.axes] == ["loss"]
    assert figures.training_figure({"Normal": [[]]}, panels) is None


def test_identical_images_do_not_divide_by_zero(examples):
    same = dict.fromkeys(METHODS, examples.clean)
    unmoved = figures.Examples(
        examples.clean,
        examples.labels,
        {"none": same},
        {"none": dict.fromkeys(METHODS, ("cat", "dog"))},
    )
    assert "nan" not in figures.to_svg(figures.examples_figure(unmoved, "none")).lower().replace(
        "banana", ""
    )


def test_colours_differ_in_grey():
    def grey(colour: str) -> float:
        red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
        return 0.299 * red + 0.587 * green + 0.114 * blue

    four = sorted(grey(colour) for colour in figures.COLOURS[:4])
    # Neighbours may be close in grey; markers and dashes are all different then.
    assert max(four) - min(four) > 60
    assert len(set(figures.MARKERS)) == len(figures.MARKERS) == len(figures.COLOURS)


def test_many_methods_are_told_apart_and_fit_into_the_figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"a method whose name is long, number {number}" for number in range(26)]
    entry = {"epoch": 1, "train_loss": 1.0}
    histories = {name: [[entry, {**entry, "epoch": 2}]] for name in names}
    figure = figures.training_figure(histories, {"loss": ("train_loss", 1.0)})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.legends[0].get_window_extent(canvas.get_renderer())
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    lines = figure.axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 26
