import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from onmanifold.data import cache, load_dataset, sources
from onmanifold.foundation.errors import ConfigError, DataError


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder, name, split, images, labels, part=0, **columns):
    (folder / name).mkdir(parents=True, exist_ok=True)
    encoded = [item if isinstance(item, bytes) else png(item) for item in images]
    table = pa.table(
        {"image": [{"bytes": item, "path": None} for item in encoded], "label": labels, **columns}
    )
    file = folder / name / f"{split}-{part:05d}-of-00002.parquet"
    pq.write_table(table, file)
    return file


def pictures(count, shape=(28, 28), seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    place = tmp_path / "data"
    place.mkdir()
    monkeypatch.setenv("ONMANIFOLD_DATA", str(place))
    return place


@pytest.fixture
def no_hub(monkeypatch):
    def fail(source, split):
        raise ConnectionError("no network")

    monkeypatch.setattr(sources, "_fetch", fail)


def test_parquet_files_become_uint8_images(folder, own_cache):
    first, second = pictures(5), pictures(3, seed=1)
    write(folder, "mnist", "test", first, [0, 1, 2, 3, 4])
    write(folder, "mnist", "test", second, [9, 8, 7], part=1)
    data = load_dataset("mnist", "test")
    assert data.images.dtype == torch.uint8
    assert np.array_equal(data.images[:, 0].numpy(), np.stack(first + second))
    assert data.labels.tolist() == [0, 1, 2, 3, 4, 9, 8, 7]
    assert len(list(own_cache.glob("mnist-test-*.npy"))) == 2


def test_they_are_decoded_once(folder, monkeypatch):
    file = write(folder, "mnist", "train", pictures(5), [0, 1, 2, 3, 4])
    first = load_dataset("mnist", "train")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "decode_all", lambda *_: pytest.fail("decoded again"))
        second = load_dataset("mnist", "train")
    assert torch.equal(first.images, second.images)
    assert first.fingerprint == second.fingerprint
    write(folder, "mnist", "train", pictures(6, seed=2), [0] * 6)
    assert file.exists()
    third = load_dataset("mnist", "train")
    assert len(third) == 6
    assert third.fingerprint != first.fingerprint


@pytest.mark.parametrize("part", ["images", "labels"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_cache_is_built_again(folder, own_cache, part, share):
    write(folder, "mnist", "test", pictures(50), [1] * 50)
    images = load_dataset("mnist", "test").images.clone()
    (file,) = own_cache.glob(f"*-{part}.npy")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    data = load_dataset("mnist", "test")
    assert torch.equal(data.images, images)
    assert data.labels.tolist() == [1] * 50


def test_the_fingerprint_is_of_what_the_files_hold(folder):
    file = write(folder, "mnist", "test", pictures(5), [0, 1, 2, 3, 4])
    first = load_dataset("mnist", "test").fingerprint
    os.utime(file, (1, 1))
    assert load_dataset("mnist", "test").fingerprint == first
    others = pictures(5)
    others[3][5, 5] ^= 1
    write(folder, "mnist", "test", others, [0, 1, 2, 3, 4])
    assert load_dataset("mnist", "test").fingerprint != first
    write(folder, "mnist", "test", pictures(5), [0, 1, 2, 3, 5])
    assert load_dataset("mnist", "test").fingerprint != first


def test_nothing_that_is_done_to_the_images_reaches_the_cache(folder):
    write(folder, "mnist", "test", pictures(5), [1] * 5)
    data = load_dataset("mnist", "test")
    before = data.images.clone()
    data.images.zero_()
    assert torch.equal(load_dataset("mnist", "test").images, before)


def test_a_cache_that_cannot_be_written_is_one_error(folder, tmp_path, monkeypatch):
    write(folder, "mnist", "test", pictures(5), [1] * 5)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ONMANIFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="Could not write"):
        load_dataset("mnist", "test")


def test_a_missing_dataset_says_where_and_how(folder, no_hub):
    with pytest.raises(DataError) as caught:
        load_dataset("svhn", "train")
    message = str(caught.value)
    assert str(folder / "svhn" / "train-*.parquet") in message
    assert "https://huggingface.co/datasets/ufldl-stanford/svhn" in message
    assert "no network" in message
    assert "ONMANIFOLD_DATA" in message


def test_what_is_not_there_is_fetched_from_the_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub

    kept = write(
        tmp_path / "hub", "cropped_digits", "train", pictures(4, (32, 32, 3)), [1, 2, 3, 4]
    )
    files = ("full_numbers/train-0.parquet", "cropped_digits/train-00000.parquet", "README.md")

    class Hub:
        def dataset_info(self, repository, timeout):
            assert repository == "ufldl-stanford/svhn"
            Sibling = type("Sibling", (), {})
            siblings = [Sibling() for _ in files]
            for sibling, name in zip(siblings, files, strict=True):
                sibling.rfilename = name
            return type("Info", (), {"siblings": siblings})

    def download(repository, file, repo_type):
        assert (repository, file, repo_type) == ("ufldl-stanford/svhn", files[1], "dataset")
        return str(kept)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    data = load_dataset("svhn", "train")
    assert data.image_shape == (3, 32, 32)
    assert data.labels.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_parquet_file_is_named(folder, own_cache, share):
    file = write(folder, "mnist", "test", pictures(20), [1] * 20)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match="truncated") as caught:
        load_dataset("mnist", "test")
    assert str(file) in str(caught.value)
    assert not list(own_cache.glob("*.npy"))


def test_a_truncated_image_is_named(folder):
    broken = png(pictures(1)[0])[:-200]
    file = write(folder, "mnist", "test", [*pictures(2), broken], [1, 2, 3])
    with pytest.raises(DataError, match="image 2 of") as caught:
        load_dataset("mnist", "test")
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (pictures(2), [3, 10], "labels 3 to 10, expected 0 to 9"),
        (pictures(2), ["three", "four"], "a whole number in every row"),
        (pictures(2), [1, None], "a whole number in every row"),
        ([pictures(1)[0], pictures(1, (20, 28))[0]], [1, 2], "20x28"),
    ],
)
def test_foreign_content_is_explained(folder, images, labels, message):
    write(folder, "mnist", "test", images, labels)
    with pytest.raises(DataError, match=message):
        load_dataset("mnist", "test")


def test_a_missing_column_is_named(folder):
    (folder / "mnist").mkdir()
    file = folder / "mnist" / "test-0.parquet"
    pq.write_table(pa.table({"picture": [1], "label": [1]}), file)
    with pytest.raises(DataError, match="no column 'image', only picture, label"):
        load_dataset("mnist", "test")


def test_cifar100_has_the_fine_labels(folder):
    images = pictures(3, (32, 32, 3))
    write(folder, "cifar100", "test", images, [0, 0, 0], fine_label=[99, 5, 0])
    data = load_dataset("cifar100", "test")
    assert data.labels.tolist() == [99, 5, 0]
    assert data.num_classes == 100
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), np.stack(images))


def test_celeba_is_56_by_48_and_asks_for_male(folder):
    write(folder, "celeba", "test", pictures(3, (218, 178, 3)), [0, 0, 0], Male=[True, False, True])
    data = load_dataset("celeba", "test")
    assert data.image_shape == (3, 56, 48)
    assert [data.classes[label] for label in data.labels] == ["Male", "Female", "Male"]


def test_the_letters_of_emnist_stand_upright_and_count_from_zero(folder):
    images = pictures(26)
    write(folder, "emnist", "test", images, list(range(1, 27)))
    data = load_dataset("emnist", "test")
    assert np.array_equal(data.images[:, 0].numpy(), np.stack(images).transpose(0, 2, 1))
    assert data.labels.tolist() == list(range(26))


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("mnits", "test", {}, "Did you mean 'mnist'"),
        ("mnist", "valid", {}, "'train' or 'test'"),
        ("mnist", "test", {"size": 3}, "unknown key 'size'"),
        ("imagefolder", "test", {}, "'folder' is missing"),
        ("imagefolder", "test", {"foldr": "x"}, "Did you mean 'folder'"),
    ],
)
def test_wrong_names_and_options_show_the_nearest(folder, name, split, options, message):
    with pytest.raises(ConfigError, match=message):
        load_dataset(name, split, **options)


def test_a_folder_of_images(folder):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number, pixels in enumerate(pictures(count, (6, 8, 3))):
                (folder / split / name / f"{number}.png").write_bytes(png(pixels))
    data = load_dataset("imagefolder", "test", folder=str(folder))
    assert (len(data), data.image_shape, data.classes) == (4, (3, 6, 8), ("cat", "dog"))
    assert sorted(data.labels.tolist()) == [0, 0, 1, 1]
    assert len(load_dataset("imagefolder", "train", folder=str(folder))) == 6
    small = load_dataset("imagefolder", "test", folder=str(folder), size=(4, 4), grey=True)
    assert small.image_shape == (1, 4, 4)
    with pytest.raises(DataError, match="found none"):
        load_dataset("imagefolder", "test", folder=str(folder / "absent"))


def test_a_folder_without_splits_is_for_testing_alone(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number, pixels in enumerate(pictures(9)):
            (folder / name / f"{number}.png").write_bytes(png(pixels))
    data = load_dataset("imagefolder", "test", folder=str(folder))
    # The first images are of both classes, and a file that changes its class changes the set.
    assert set(data.take(9).labels.tolist()) == {0, 1}
    (folder / "cat" / "0.png").rename(folder / "dog" / "9.png")
    moved = load_dataset("imagefolder", "test", folder=str(folder))
    assert sorted(moved.labels.tolist()) == [0] * 8 + [1] * 10
    assert moved.fingerprint != data.fingerprint
    with pytest.raises(DataError, match="train"):
        load_dataset("imagefolder", "train", folder=str(folder))


def test_a_folder_with_one_split_does_not_serve_as_the_other(folder):
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "cat" / "0.png").write_bytes(png(pictures(1)[0]))
    with pytest.raises(DataError, match="test"):
        load_dataset("imagefolder", "test", folder=str(folder))


def test_decoding_portions_meet_without_gaps(monkeypatch):
    monkeypatch.setattr(cache, "_PORTION", 4)
    images = pictures(11, (5, 5))
    decoded = cache.decode_all([png(image) for image in images], "L", None, "here")
    assert np.array_equal(decoded[:, 0].numpy(), np.stack(images))


def test_the_real_fashion_mnist(real_data):
    real_data("fashion_mnist")
    data = load_dataset("fashion_mnist", "test")
    assert (len(data), data.image_shape) == (10_000, (1, 28, 28))
    assert data.labels.bincount().tolist() == [1000] * 10
    # Bags are wide and bright, sandals mostly dark.
    bags, sandals = (data.images[data.labels == label].float().mean() for label in (8, 5))
    assert bags > 1.5 * sandals
