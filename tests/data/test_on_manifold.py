"""On-manifold datasets: what is written, what is read back, and that an interruption leaves no trace."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import onmanifold as om
from onmanifold.data.fonts import embedded_folder
from onmanifold.data.on_manifold import beside, load_on_manifold
from onmanifold.data.on_manifold_files import read_shard
from onmanifold.experiments.on_manifold import project_dataset
from onmanifold.foundation.errors import ConfigError, DataError, InputError
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.perceptual import PyramidDistance
from onmanifold.manifolds.project import ProjectionConfig

CLASSES = ("cat", "dog", "fox", "owl")
CONFIG = ProjectionConfig(steps=15, restarts=1, candidates=8)


class Colours(Manifold):
    """Images sigmoid(W z + b) of weights that could be trained: most images are not on it."""

    name, fingerprint, exact = "colours", "colours-1", False
    image_shape = (3, 6, 5)
    code_size = latent_size = 4

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        draw = torch.randn(5, 90, generator=generator, dtype=torch.float64).to(dtype)
        self.weight, self.bias = nn.Parameter(draw[:4]), nn.Parameter(draw[4])
        self.calls = 0

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        logits = torch.logit(images.clamp(0.02, 0.98)).flatten(1) - self.bias
        return logits @ torch.linalg.pinv(self.weight)

    def decode(self, codes: Tensor) -> Tensor:
        # Row by row, so that a sample's image does not depend on its batch.
        rows = (codes.unsqueeze(2) * self.weight).sum(1) + self.bias
        return torch.sigmoid(rows).view(-1, *self.image_shape)


class Squares(Colours):
    """Of two channels, which no picture has."""

    image_shape = (2, 9, 5)


@pytest.fixture
def colours():
    return Colours().eval()


def make_dataset(count: int = 20, name: str = "pets") -> om.Dataset:
    """Colour images in 8 bits, half of them nearly on the manifold, their identities not in order."""
    generator = torch.Generator().manual_seed(1)
    near = Colours().decode(torch.randn(count, 4, generator=generator)).detach()
    noise = torch.rand(near.shape, generator=generator)
    shares = torch.where(torch.arange(count) % 2 == 0, 0.05, 0.8).view(-1, 1, 1, 1)
    images = (255 * (near + shares * (noise - near))).round().to(torch.uint8)
    labels = torch.arange(count) % 3  # nobody is an owl
    indices = 100 + torch.randperm(count, generator=generator)
    return om.Dataset(name, images, labels, CLASSES, "pets-1", indices=indices)


def make(manifold, folder, dataset=None, **options):
    options = {"split": "test", "search": "l2", "config": CONFIG, "shard_size": 6} | options
    dataset = make_dataset() if dataset is None else dataset
    return project_dataset(manifold, dataset, folder, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_is_written_is_read_back(colours, tmp_path):
    dataset = make_dataset()
    make(colours, tmp_path, dataset)
    generated = load_on_manifold("test", tmp_path, manifold=colours)
    png = load_on_manifold("test", tmp_path, images="png")
    original = load_on_manifold("test", tmp_path, images="original")
    for loaded in (generated, png, original):
        assert torch.equal(loaded.labels, dataset.labels)
        assert torch.equal(loaded.indices, dataset.indices)
        assert torch.equal(loaded.codes, generated.codes)
        assert loaded.classes == CLASSES
    with torch.no_grad():
        assert torch.equal(generated.images, colours.decode(generated.codes))
    assert torch.equal(png.images, (255 * generated.images).round().to(torch.uint8))
    assert torch.equal(original.images, dataset.images)
    names = [loaded.name for loaded in (generated, png, original)]
    assert names == ["pets on colours", "pets on colours, 8 bit", "pets, codes on colours"]
    assert len({loaded.fingerprint for loaded in (generated, png, original)}) == 3


@pytest.mark.parametrize("search", ["l2", "perceptual"])
def test_codes_are_those_of_the_projection(colours, tmp_path, search):
    dataset = make_dataset()
    make(colours, tmp_path, dataset, search=search, encoder="own")
    batch = dataset.batch(torch.arange(len(dataset)))
    found = om.project(
        colours,
        batch.images,
        config=CONFIG,
        measure=None if search == "l2" else PyramidDistance(),
        encoder=colours.encode,
        indices=batch.indices,
    )
    loaded = load_on_manifold("test", tmp_path, manifold=colours)
    torch.testing.assert_close(loaded.codes, found.codes, rtol=0, atol=1e-5)
    start = colours.decode(torch.zeros_like(found.codes)).detach()
    if search == "l2":
        far, near = (
            (tensor - batch.images).flatten(1).norm(dim=1) for tensor in (start, loaded.images)
        )
    else:
        far, near = (PyramidDistance()(tensor, batch.images) for tensor in (start, loaded.images))
    assert bool((near < far).all())


def test_encoding_alone_searches_nothing(plane, images, tmp_path):
    some = images(10, on_manifold=True)
    dataset = om.Dataset("plane", some.images.float(), some.labels, CLASSES, "plane-1")
    found = make(plane, tmp_path, dataset, search="encode")
    loaded = load_on_manifold("test", tmp_path, manifold=plane)
    torch.testing.assert_close(loaded.codes, some.codes.float(), rtol=0, atol=1e-5)
    assert found.overall.l1 < 1e-6
    # The same picture is not kept twice, and is read nevertheless.
    column = pq.read_table(tmp_path / "test-00000-of-00002.parquet")["original"]
    assert column.null_count == len(column)
    assert torch.equal(
        load_on_manifold("test", tmp_path, images="original").images,
        load_on_manifold("test", tmp_path, images="png").images,
    )


def test_the_numbers_of_the_reconstruction(colours, tmp_path):
    dataset = make_dataset()
    found = make(colours, tmp_path, dataset)
    originals = dataset.images.double().numpy() / 255
    loaded = load_on_manifold("test", tmp_path, manifold=colours)
    generated = loaded.images.double().numpy()
    pictures = load_on_manifold("test", tmp_path, images="png").images.double().numpy() / 255
    perceptual = PyramidDistance()(loaded.images, dataset.images.float() / 255).numpy()
    assert list(found.classes) == ["cat", "dog", "fox"]
    assert found.measure == "pyramid"
    for name, part in {"all": found.overall, **found.classes}.items():
        rows = np.full(20, True) if name == "all" else np.arange(20) % 3 == CLASSES.index(name)
        difference = generated[rows] - originals[rows]
        expected = {
            "samples": rows.sum(),
            "l1": np.abs(difference).mean(),
            "l2": np.sqrt(np.square(difference).mean()),
            "perceptual": perceptual[rows].mean(),
            "mean_image_l1": np.abs(originals[rows] - originals.mean(0)).mean(),
            "rounding": np.abs(pictures - generated)[rows].mean(),
        }
        for key, value in expected.items():
            assert getattr(part, key) == pytest.approx(value, abs=1e-6), (name, key)
        assert 0 < part.rounding <= 1 / 510
    kept = json.loads((tmp_path / "manifest.json").read_text())["splits"]["test"]
    assert kept["reconstruction"]["overall"]["l1"] == found.overall.l1
    assert kept["measure"]["fingerprint"] == PyramidDistance().fingerprint


def test_a_sample_does_not_depend_on_its_batch_its_file_or_the_others(colours, tmp_path):
    dataset = make_dataset()
    make(colours, tmp_path / "one", dataset)
    make(colours, tmp_path / "two", dataset, batch_size=4, shard_size=20)
    backwards = dataset.subset(torch.arange(19, -1, -2))
    make(colours, tmp_path / "three", backwards, batch_size=3, shard_size=7)
    one, two, three = (
        load_on_manifold("test", tmp_path / name, images="png") for name in ("one", "two", "three")
    )
    torch.testing.assert_close(two.codes, one.codes, rtol=0, atol=1e-5)
    torch.testing.assert_close(three.codes, one.codes[range(19, -1, -2)], rtol=0, atol=1e-5)
    assert torch.equal(three.labels, one.labels[range(19, -1, -2)])


def test_the_manifold_is_left_as_it_was(tmp_path):
    manifold = Colours()
    before = {name: tensor.clone() for name, tensor in manifold.state_dict().items()}
    state = torch.get_rng_state()
    make(manifold, tmp_path)
    load_on_manifold("test", tmp_path, manifold=manifold)
    assert manifold.training
    assert manifold.weight.requires_grad
    assert manifold.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in manifold.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_manifold_in_float64(tmp_path):
    manifold = Colours(torch.float64).eval()
    make(manifold, tmp_path)
    loaded = load_on_manifold("test", tmp_path, manifold=manifold)
    assert loaded.images.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded.images, manifold.decode(loaded.codes.double()).float())


def test_a_manifold_that_can_be_rebuilt_lies_beside_its_images(tmp_path):
    fonts = om.fonts_manifold(embedded_folder())
    letters = om.load_dataset("fonts", "test", size=6, folder=embedded_folder())
    make(fonts, tmp_path, letters, search="encode")
    loaded = om.load_dataset("on_manifold", "test", folder=str(tmp_path))
    assert torch.equal(loaded.images, fonts.decode(loaded.codes))
    assert (loaded.images - letters.images).abs().mean() < 0.01
    again = om.load_dataset(
        "on_manifold", "test", folder=tmp_path, manifold=str(tmp_path / "manifold.safetensors")
    )
    assert again.fingerprint == loaded.fingerprint
    region = om.LatentBall(fonts, radius=0.1).around(
        loaded.images, loaded.labels, codes=loaded.codes
    )
    assert torch.equal(region.render(region.zero()), loaded.images)


def test_the_files_are_as_the_hub_serves_them(colours, tmp_path):
    make(colours, tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "manifest.json",
        *(f"test-0000{number}-of-00004.parquet" for number in range(4)),
    ]
    table = pq.read_table(tmp_path / "test-00003-of-00004.parquet")
    assert len(table) == 2
    row = table.to_pylist()[1]
    loaded = load_on_manifold("test", tmp_path, images="png")
    with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (5, 6))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(pixels, loaded.images[19])
    assert row["label"] == int(loaded.labels[19])
    assert row["index"] == int(loaded.indices[19])
    assert row["code"] == loaded.codes[19].tolist()
    assert table.schema.field("code").type == pa.list_(pa.field("element", pa.float32()))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"names": list(CLASSES), "_type": "ClassLabel"}


def test_both_splits_share_a_folder_and_the_manifold(colours, tmp_path):
    make(colours, tmp_path, split="train")
    trained = contents(tmp_path)
    make(colours, tmp_path, make_dataset(7), split="test")
    both = contents(tmp_path)
    assert all(both[name] == text for name, text in trained.items() if name != "manifest.json")
    splits = json.loads(both["manifest.json"])["splits"]
    assert {name: facts["dataset"]["samples"] for name, facts in splits.items()} == {
        "train": 20,
        "test": 7,
    }
    assert all("reconstruction" in facts for facts in splits.values())
    other = Colours().eval()
    other.fingerprint = "colours-2"
    with pytest.raises(DataError, match=r"manifold.fingerprint of train was colours-1, now it is"):
        make(other, tmp_path, make_dataset(7), split="test")


def spoiled(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        middle = len(whole) // 3
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    elif how == "foreign":
        pq.write_table(pa.table({"a": [1]}), path)
    elif how == "edited":
        table = pq.read_table(path)
        labels = pa.array([2] * len(table))
        pq.write_table(table.set_column(table.column_names.index("label"), "label", labels), path)
    elif how == "other order":
        table = pq.read_table(path)
        pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    else:
        shutil.copyfile(path.with_name("test-00000-of-00004.parquet"), path)


@pytest.mark.parametrize(
    "how",
    ["missing", "truncated", "empty", "flipped", "foreign", "edited", "other order", "copied"],
)
def test_a_damaged_file_is_made_anew_and_no_other(colours, tmp_path, how):
    make(colours, tmp_path, search="encode")
    whole = contents(tmp_path)
    spoiled(tmp_path / "test-00002-of-00004.parquet", how)
    (tmp_path / ".test-00002-of-00004.parquet.1.tmp").write_bytes(b"half")
    colours.calls = 0
    make(colours, tmp_path, search="encode")
    assert colours.calls == 1
    assert contents(tmp_path) == whole
    make(colours, tmp_path, search="encode")
    assert colours.calls == 1


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"seed": 1}, "seed of test was 0, now it is 1"),
        ({"search": "encode"}, "search of test was l2, now it is encode"),
        ({"config": replace(CONFIG, steps=16)}, "config.steps of test was 15, now it is 16"),
        ({"shard_size": 5}, "shard_size of test was 6, now it is 5"),
        ({"encoder": "own"}, "encoder of test was None, now it is own"),
        ({"dataset": make_dataset(19)}, "dataset.samples of test was 20, now it is 19"),
        ({"dataset": make_dataset(name="zoo")}, "dataset.name of test was pets, now it is zoo"),
        (
            {"dataset": replace(make_dataset(), labels=torch.zeros(20, dtype=torch.int64))},
            "dataset.digest of test",
        ),
        ({"dataset": replace(make_dataset(), classes=tuple("abcd"))}, "dataset.classes of test"),
        (
            {"dataset": replace(make_dataset(), transforms=(lambda images, _: 1 - images,))},
            "dataset.digest of test",
        ),
    ],
)
def test_another_projection_is_refused_and_harms_nothing(colours, tmp_path, options, place):
    make(colours, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DataError, match=place):
        make(colours, tmp_path, **options)
    assert contents(tmp_path) == before


def test_what_does_not_matter_is_not_refused(colours, tmp_path):
    make(colours, tmp_path)
    before = contents(tmp_path)
    make(colours, tmp_path, replace(make_dataset(), fingerprint="newer files"), batch_size=3)
    assert contents(tmp_path) == before


def test_a_projection_that_failed_at_once_does_not_hold_the_folder(colours, tmp_path):
    with pytest.raises(InputError, match="l1_weight"):
        make(colours, tmp_path, config=replace(CONFIG, l1_weight=1.0))
    make(colours, tmp_path)
    assert len(load_on_manifold("test", tmp_path, images="png")) == 20


def test_no_stranger_is_overwritten(colours, tmp_path):
    folder = tmp_path / "cifar"
    folder.mkdir()
    pq.write_table(pa.table({"image": [1]}), folder / "test-00000-of-00004.parquet")
    before = contents(folder)
    with pytest.raises(DataError, match=r"no manifest.json of an on-manifold dataset"):
        make(colours, folder)
    (folder / "manifest.json").write_text('{"dataset": "of an evaluation"}')
    with pytest.raises(DataError, match="not the manifest of an on-manifold dataset"):
        make(colours, folder)
    (folder / "manifest.json").unlink()
    assert contents(folder) == before
    with pytest.raises(DataError, match="is a file"):
        make(colours, folder / "test-00000-of-00004.parquet")


def test_a_full_disk_loses_nothing_that_is_finished(colours, tmp_path, monkeypatch):
    make(colours, tmp_path / "whole")
    synchronise, left = os.fsync, 3  # the manifest and two files

    def fsync(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synchronise(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DataError, match=r"No space left on device.*start again to resume"):
        make(colours, tmp_path / "full")
    monkeypatch.undo()
    assert len(list((tmp_path / "full").glob("*.parquet"))) == 2
    make(colours, tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_finished(colours, tmp_path, own_cache):
    def report(name, done, total):
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(colours, tmp_path, progress=report)
    assert len(list(tmp_path.glob("*.parquet"))) == 2
    with pytest.raises(DataError, match=r"test-00002-of-00004.parquet does not exist, as 2 of 4"):
        load_on_manifold("test", tmp_path, images="png")
    seen = []
    make(colours, tmp_path, progress=lambda *told: seen.append(told))
    assert seen == [("test", done, 20) for done in (6, 12, 18, 20)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is not finished"),
        ("truncated", "not a Parquet file, or is truncated"),
        ("empty", "not a Parquet file, or is truncated"),
        ("foreign", "not one of an onmanifold on-manifold dataset"),
        ("edited", "its rows differ"),
        ("other order", "its rows differ"),
    ],
)
def test_a_damaged_file_is_not_read(colours, tmp_path, how, message):
    make(colours, tmp_path)
    spoiled(tmp_path / "test-00002-of-00004.parquet", how)
    with pytest.raises(DataError, match=message) as raised:
        load_on_manifold("test", tmp_path, images="png")
    assert "test-00002-of-00004.parquet" in str(raised.value)


def test_a_changed_picture_is_not_read(colours, tmp_path):
    make(colours, tmp_path)
    path = tmp_path / "test-00001-of-00004.parquet"
    table = pq.read_table(path)
    turned = table["image"].combine_chunks()[::-1]
    pq.write_table(table.set_column(0, "image", pa.concat_arrays([turned])), path)
    with pytest.raises(DataError, match="its pictures differ"):
        load_on_manifold("test", tmp_path, images="png")
    with pytest.raises(DataError, match="its pictures differ"):
        read_shard(path)
    assert len(read_shard(path, pictures=False).labels) == 6


def test_two_processes_share_the_files(colours, tmp_path):
    make(colours, tmp_path / "one")
    # Fabric starts the second process with the same file, so there has to be one.
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "script.py"), __file__, str(tmp_path / "two")]
    subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


TWO_PROCESSES = """
import importlib.util, sys
import torch
from lightning_fabric import Fabric

file, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("test_on_manifold", file)
test = importlib.util.module_from_spec(spec)
sys.modules["test_on_manifold"] = test
spec.loader.exec_module(test)
torch.set_num_threads(1)
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
seen = []
found = test.make(
    test.Colours().eval(), test.Path(out), fabric=fabric, progress=lambda *told: seen.append(told)
)
assert found.overall.samples == 20
# Files 0 and 2 of 4 are of the first process, which alone reports.
assert [done for _, done, _ in seen] == ([6, 12] if fabric.is_global_zero else [])
fabric.barrier()
torch.distributed.destroy_process_group()
"""


def test_files_of_two_projections_are_not_one_dataset(colours, tmp_path):
    make(colours, tmp_path / "one")
    make(colours, tmp_path / "two", seed=1)
    name = "test-00001-of-00004.parquet"
    shutil.copyfile(tmp_path / "two" / name, tmp_path / "one" / name)
    with pytest.raises(DataError, match=f"{name} belongs to another projection"):
        load_on_manifold("test", tmp_path / "one", images="png")


def test_the_manifold_must_be_there_and_be_the_one(colours, tmp_path):
    make(colours, tmp_path)
    with pytest.raises(DataError, match=r"manifold.safetensors does not exist.*images='png'"):
        load_on_manifold("test", tmp_path)
    load_on_manifold("test", tmp_path, manifold=colours)
    other = Colours().eval()
    other.fingerprint = "colours-2"
    with pytest.raises(DataError, match="manifold colours-1; this one is colours-2"):
        load_on_manifold("test", tmp_path, manifold=other)


def test_what_is_not_there_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match="found nothing"):
        om.load_dataset("on_manifold", "test", folder=tmp_path)
    with pytest.raises(ConfigError, match="images"):
        om.load_dataset("on_manifold", "test", folder=tmp_path, images="projected")


def test_the_fingerprint_is_of_the_content(colours, tmp_path):
    make(colours, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "test-00000-of-00004.parquet", (1, 1))
    make(colours, tmp_path / "three", seed=1)
    one, two, three = (
        load_on_manifold("test", tmp_path / name, images="png").fingerprint
        for name in ("one", "two", "three")
    )
    assert one == two
    assert one != three


def test_generated_images_and_natural_ones_in_turns(colours, tmp_path):
    dataset = make_dataset(8)
    make(colours, tmp_path, dataset)
    generated = load_on_manifold("test", tmp_path, manifold=colours)
    natural = load_on_manifold("test", tmp_path, images="original")
    both = beside(generated, natural)
    assert len(both) == 16
    batch = both.batch(torch.tensor([6, 7]))
    assert torch.equal(batch.images[0], generated.images[3])
    assert torch.equal(batch.images[1], dataset.images[3].float() / 255)
    assert torch.equal(batch.codes, generated.codes[[3, 3]])
    assert torch.equal(batch.labels, dataset.labels[[3, 3]])
    assert batch.indices.tolist() == [2 * int(dataset.indices[3]), 2 * int(dataset.indices[3]) + 1]
    pictures = beside(load_on_manifold("test", tmp_path, images="png"), natural)
    assert pictures.images.dtype == torch.uint8
    fingerprints = {one.fingerprint for one in (generated, natural, both, pictures)}
    assert len(fingerprints) == 4
    for other in (natural.subset(torch.arange(7)), replace(natural, indices=None)):
        with pytest.raises(InputError, match="same samples"):
            beside(generated, other)
    with pytest.raises(InputError, match="codes"):
        beside(generated, replace(natural, codes=None))
    with pytest.raises(InputError, match="transforms"):
        beside(generated, replace(natural, transforms=(lambda images, _: images,)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"shard_size": 0}, InputError, "shard_size: expected an integer of at least 1, found 0"),
        ({"batch_size": 2.0}, InputError, "batch_size"),
        ({"split": "validation"}, ConfigError, "split: expected one of train, test"),
        ({"search": "find"}, ConfigError, "search: expected one of perceptual, l2, encode"),
        ({"manifold": nn.Identity()}, InputError, "manifold: expected a Manifold"),
        ({"dataset": make_dataset().subset(torch.arange(0))}, InputError, "at least one image"),
        (
            {"dataset": replace(make_dataset(), images=torch.zeros(20, 1, 6, 5))},
            InputError,
            r"colours generates images \(3, 6, 5\), pets has \(1, 6, 5\)",
        ),
        (
            {"dataset": replace(make_dataset(), indices=torch.zeros(20, dtype=torch.int64))},
            InputError,
            "each identity once",
        ),
        (
            {"manifold": Squares()},
            InputError,
            "manifold: expected images of 1 or 3 channels, found 2",
        ),
        ({"encoder": lambda images, labels: images}, InputError, "an attribute `fingerprint`"),
    ],
)
def test_bad_arguments(colours, tmp_path, options, error, message):
    options = {"manifold": colours} | options
    with pytest.raises(error, match=message):
        make(options.pop("manifold"), tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_codes_that_are_none_are_refused(colours, tmp_path, monkeypatch):
    monkeypatch.setattr(colours, "encode", lambda images, labels: torch.full((6, 4), torch.nan))
    with pytest.raises(InputError, match="NaN"):
        make(colours, tmp_path, search="encode")


def test_fashion_mnist_on_its_principal_components(real_data, tmp_path):
    real_data("fashion_mnist")
    images = om.load_dataset("fashion_mnist", "test")
    manifold = Components(images.batch(torch.arange(1000)).images)
    test = images.subset(torch.arange(1000, 1100))
    found = make(manifold, tmp_path, test, search="encode", shard_size=64)
    assert found.overall.l1 < 0.5 * found.overall.mean_image_l1
    original = load_on_manifold("test", tmp_path, images="original")
    assert torch.equal(original.images, test.images)


class Components(Manifold):
    """The plane of the first principal components of some images."""

    name, fingerprint = "components", "components"
    code_size = latent_size = 40

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.image_shape = tuple(images.shape[1:])
        flat = images.flatten(1)
        axes = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)[2]
        self.register_buffer("mean", flat.mean(0))
        self.register_buffer("axes", axes[: self.code_size].clone())

    def encode(self, images: Tensor, labels: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean) @ self.axes.T

    def decode(self, codes: Tensor) -> Tensor:
        return (self.mean + codes @ self.axes).clamp(0, 1).view(-1, *self.image_shape)
