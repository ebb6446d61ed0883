"""Making on-manifold datasets: every image of a dataset projected onto a manifold (DMAT section 3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from onmanifold.attacks.engine import full_float32, untouched
from onmanifold.data.dataset import Batch, Dataset
from onmanifold.data.on_manifold import MANIFOLD_FILE
from onmanifold.data.on_manifold_files import (
    Header,
    Rows,
    read_shard,
    shard_path,
    to_bytes,
    write_shard,
)
from onmanifold.data.sources import Split
from onmanifold.evaluation.processes import Processes
from onmanifold.evaluation.progress import Report, shown
from onmanifold.experiments.manifest import MANIFEST, claim, content_of, key_of
from onmanifold.experiments.reconstruction import Reconstruction, reconstructions
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import CheckpointError, ConfigError, DataError, InputError
from onmanifold.foundation.files import write_json
from onmanifold.foundation.modules import dtype_of
from onmanifold.foundation.registry import describe
from onmanifold.manifolds.base import Manifold
from onmanifold.manifolds.factory import load_manifold, save_manifold
from onmanifold.manifolds.perceptual import PerceptualDistance, perceptual_distance
from onmanifold.manifolds.project import PROJECTIONS, Encoder, ProjectionConfig, project

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Search = Literal["perceptual", "l2", "encode"]


@dataclass(frozen=True)
class OnManifoldData:
    """A finished on-manifold dataset, as `project_dataset` returns it.

    Attributes:
        directory: Where it is: ``load_dataset("on_manifold", split, folder=directory)`` reads it.
        split: "train" or "test".
        measure: Name of the perceptual distance that was measured.
        overall: The reconstruction of all samples.
        classes: That of each class, by name.
    """

    directory: Path
    split: Split
    measure: str
    overall: Reconstruction
    classes: Mapping[str, Reconstruction]


def project_dataset(
    manifold: Manifold,
    dataset: Dataset,
    directory: str | Path,
    *,
    split: Split,
    search: Search = "perceptual",
    config: ProjectionConfig | None = None,
    measure: PerceptualDistance | None = None,
    encoder: Encoder | Literal["own"] | None = None,
    batch_size: int = 256,
    shard_size: int = 256,
    seed: int = 0,
    fabric: Fabric | None = None,
    progress: bool | Report = False,
) -> OnManifoldData:
    """Project a dataset onto a manifold; keep codes, generated images, originals and labels.

    The directory receives ``<split>-00000-of-000NN.parquet`` and so on, ``manifest.json``, which says what
    produced them and how near the images are, and ``manifold.safetensors``, where the manifold can be rebuilt.
    Each file is whole or absent. The same call goes on after any interruption, also kill -9, and ends with the
    same bytes as an undisturbed one: finished files are kept, damaged ones are made anew. Both splits may
    share a directory, one after the other.

    A sample's code depends on (seed, ``dataset.indices``) and not, beyond float rounding, on the batch size
    or the number of processes.

    Args:
        manifold: Projected onto; it is left as it was.
        dataset: What is projected, as `Dataset.batch` gives it; its own codes play no part.
        directory: Where the files go.
        split: What the files are called: "train" or "test".
        search: "perceptual": ``measure`` plus weighted L1 is minimised (DMAT eq. 7, IJSAT eq. 12); "l2": the
            L2 distance (Disentangling eq. 10); "encode": nothing, the codes are ``manifold.encode``'s.
        config: How to search; None: ``PROJECTIONS["quick"]``, or ``PROJECTIONS["fonts"]`` with "l2".
        measure: The perceptual distance that is minimised, and reported; None: `perceptual_distance` chooses.
        encoder: Where the search may start, beside the mean code: "own" (``manifold.encode``), or a function with
            an attribute ``fingerprint``, such as `train_encoder` gives, on the device of the work.
        batch_size: Samples that are projected at once.
        shard_size: Samples per file, and what an interruption costs at most.
        seed: Of all that is random in the search.
        fabric: Several processes share the files, all return the same; a launched
            `lightning_fabric.Fabric`. The work is done on its device; without it, on the manifold's.
        progress: True: a bar on standard error; or a function (split, samples done, all samples).

    Raises:
        InputError: Images or labels do not suit the manifold, or a size is below 1.
        DataError: The directory belongs to another projection (the first difference is named), or cannot be
            written; finished files are kept.
    """
    _check(manifold, dataset, split, search, batch_size, shard_size)
    folder, processes = Path(directory), Processes(fabric)
    if config is None:
        config = PROJECTIONS["fonts" if search == "l2" else "quick"]
    measure = measure or perceptual_distance(image_shape=dataset.image_shape)
    searching = _Searching(_placed(manifold, fabric), search, config, measure, encoder, seed)
    shards = torch.split(torch.arange(len(dataset)), shard_size)
    facts = searching.facts() | {"dataset": content_of(dataset), "shard_size": shard_size}
    header = Header(
        key_of(facts), dataset.name, dataset.classes, manifold.name, manifold.fingerprint
    )
    work = _Work(searching, dataset, folder, split, header, shards, batch_size)
    failure: Exception | None = None
    try:
        manifest = claim(folder, split, facts)
        if processes.rank == 0:
            write_json(folder / MANIFEST, manifest)
            _keep(manifold, folder / MANIFOLD_FILE)
        work.run(processes, progress)
    except Exception as error:
        failure = error
    processes.agree(failure)
    result = work.result()
    if processes.rank == 0:
        manifest["splits"][split]["reconstruction"] = {
            "overall": asdict(result.overall),
            "classes": {name: asdict(value) for name, value in result.classes.items()},
        }
        write_json(folder / MANIFEST, manifest)
        _tidy(folder, split)
    return result


@dataclass(frozen=True)
class _Searching:
    """How a batch becomes rows."""

    manifold: Manifold
    search: Search
    config: ProjectionConfig
    measure: PerceptualDistance
    encoder: Encoder | Literal["own"] | None
    seed: int

    @property
    def device(self) -> torch.device:
        return _device(self.manifold)

    def facts(self) -> dict[str, Any]:
        """All that the codes of images depend on, as plain data; what matters most comes first."""
        searched = self.search != "encode"
        return {
            "manifold": {
                "name": self.manifold.name,
                "fingerprint": self.manifold.fingerprint,
                "spec": self.manifold.spec,
            },
            "search": self.search,
            "config": describe(self.config) if searched else None,
            "measure": {"name": self.measure.name, "fingerprint": self.measure.fingerprint},
            "encoder": _fingerprint(self.encoder) if searched else None,
            "seed": self.seed,
        }

    def rows(self, batch: Batch) -> Rows:
        """The rows of a batch on the manifold's device."""
        dtype = dtype_of(self.manifold)
        images = check_images(batch.images, "dataset.images").to(dtype)
        with untouched(self.manifold, self.seed), full_float32():
            codes = self._codes(images, batch).float()
            with torch.no_grad():
                # What is kept is decoded, so that the code of a row is exactly that of its image.
                generated = self.manifold.decode(codes.to(dtype))
                residual = (generated - images).flatten(1)
                pictures = to_bytes(generated)
                rounding = pictures.to(generated) / 255 - generated
                measures = {
                    "l1": residual.abs().mean(1),
                    "l2": residual.square().mean(1).sqrt(),
                    "perceptual": self.measure(generated, images),
                    "rounding": rounding.abs().flatten(1).mean(1),
                }
        return Rows(
            images=pictures.cpu(),
            originals=to_bytes(images).cpu(),
            labels=batch.labels.cpu(),
            codes=codes.cpu(),
            indices=batch.indices.cpu(),
            measures={name: values.float().cpu() for name, values in measures.items()},
        )

    def _codes(self, images: Tensor, batch: Batch) -> Tensor:
        if self.search == "encode":
            with torch.no_grad():
                codes = self.manifold.encode(images, batch.labels)
            return self.manifold.check_codes(codes, len(images))
        return project(
            self.manifold,
            images,
            labels=batch.labels,
            config=self.config,
            measure=self.measure if self.search == "perceptual" else None,
            encoder=self.manifold.encode if self.encoder == "own" else self.encoder,
            seed=self.seed,
            indices=batch.indices,
        ).codes


@dataclass(frozen=True)
class _Work:
    """The files of one split: which samples are in which, and where they go."""

    searching: _Searching
    dataset: Dataset
    folder: Path
    split: Split
    header: Header
    shards: tuple[Tensor, ...]
    batch_size: int

    def path(self, number: int) -> Path:
        return shard_path(self.folder, self.split, number, len(self.shards))

    def run(self, processes: Processes, progress: bool | Report) -> None:
        """Make this process's files, but for those that are there."""
        own = processes.own(len(self.shards))
        total = sum(len(self.shards[number]) for number in own)
        with shown(progress if processes.rank == 0 else False, [self.split], total) as report:
            done = 0
            for number in own:
                if self._is_whole(number):
                    done += len(self.shards[number])
                    report(self.split, done, total)
                    continue
                parts = []
                for positions in torch.split(self.shards[number], self.batch_size):
                    batch = self.dataset.batch(positions, device=self.searching.device)
                    parts.append(self.searching.rows(batch))
                    done += len(positions)
                    report(self.split, done, total)
                write_shard(self.path(number), _joined(parts), self.header)

    def _is_whole(self, number: int) -> bool:
        """Whether a file is there, undamaged, of this projection and with these samples."""
        try:
            found = read_shard(self.path(number))
        except DataError:
            return False
        expected = self.dataset.indices[self.shards[number].to(self.dataset.indices.device)]
        return found.header.key == self.header.key and torch.equal(found.indices, expected.cpu())

    def result(self) -> OnManifoldData:
        """What the finished files say of the reconstruction."""
        shards = [
            read_shard(self.path(number), pictures=False) for number in range(len(self.shards))
        ]
        overall, classes = reconstructions(shards, self.dataset)
        return OnManifoldData(
            self.folder, self.split, self.searching.measure.name, overall, classes
        )


def _joined(parts: list[Rows]) -> Rows:
    measures = {
        name: torch.cat([part.measures[name] for part in parts]) for name in parts[0].measures
    }
    return Rows(
        images=torch.cat([part.images for part in parts]),
        originals=torch.cat([part.originals for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        codes=torch.cat([part.codes for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        measures=measures,
    )


def _device(manifold: Manifold) -> torch.device:
    tensors = [*manifold.parameters(), *manifold.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _placed(manifold: Manifold, fabric: Fabric | None) -> Manifold:
    """The manifold, or a copy of it on the device to work on."""
    if fabric is None or fabric.device == _device(manifold):
        return manifold
    return copy.deepcopy(manifold).to(fabric.device)


def _keep(manifold: Manifold, path: Path) -> None:
    """Save the manifold, where it can be rebuilt and is not there yet."""
    if not manifold.spec:
        return
    try:
        kept = load_manifold(path).fingerprint == manifold.fingerprint
    except CheckpointError:
        kept = False
    if not kept:
        save_manifold(manifold, path)


def _fingerprint(encoder: Encoder | Literal["own"] | None) -> str | None:
    if encoder is None or isinstance(encoder, str):
        return encoder
    found = getattr(encoder, "fingerprint", None)
    if found is None:
        raise InputError("encoder: expected one with an attribute `fingerprint`, found none.")
    return str(found)


def _check(
    manifold: Manifold,
    dataset: Dataset,
    split: Split,
    search: Search,
    batch_size: int,
    shard_size: int,
) -> None:
    if not isinstance(manifold, Manifold):
        raise InputError(f"manifold: expected a Manifold, found {type(manifold).__name__}.")
    for name, choice, choices in (
        ("split", split, ("train", "test")),
        ("search", search, ("perceptual", "l2", "encode")),
    ):
        if choice not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {choice!r}.")
    if not len(dataset):
        raise InputError("dataset: expected at least one image, found none.")
    if manifold.image_shape[0] not in (1, 3):
        raise InputError(
            f"manifold: expected images of 1 or 3 channels, found {manifold.image_shape[0]}."
        )
    if dataset.image_shape != tuple(manifold.image_shape):
        raise InputError(
            f"dataset: {manifold.name} generates images {tuple(manifold.image_shape)}, "
            f"{dataset.name} has {dataset.image_shape}."
        )
    classes = getattr(manifold, "num_classes", None)
    check_labels(dataset.labels, len(dataset), classes, "dataset.labels")
    if len(set(dataset.indices.tolist())) < len(dataset):
        raise InputError("dataset.indices: expected each identity once.")
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}: expected an integer of at least 1, found {value!r}.")


def _tidy(folder: Path, split: str) -> None:
    """Remove what an interrupted write left behind."""
    for name in (f"{split}-*.parquet", MANIFEST, MANIFOLD_FILE):
        for path in folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)
