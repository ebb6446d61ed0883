import copy
import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from onmanifold.attacks import FGSM, PGD
from onmanifold.evaluation import Evaluation, evaluate, model_digest, recheck
from onmanifold.foundation.errors import CheckpointError, ConfigError, DataError, InputError
from onmanifold.threats import ImageBall, JointBall, LatentBall

BALL = ImageBall(norm="linf", radius=0.02)


def same(first, second, tolerance=0.0):
    assert first.schema.names == second.schema.names
    for name in first.schema.names:
        a, b = first[name], second[name]
        if tolerance and str(a.type) == "double":
            np.testing.assert_allclose(
                a.to_numpy(), b.to_numpy(), rtol=0, atol=tolerance, err_msg=name
            )
        else:
            assert a.equals(b), name


def shard_files(directory, suffix="parquet"):
    return sorted(directory.glob(f"shards/*/*.{suffix}"))


def test_the_ledger_says_what_the_attacks_did(toys):
    model, dataset, attacks = toys.make_model(), toys.make_dataset(), toys.make_attacks()
    evaluation = evaluate(model, dataset, attacks, batch_size=7)
    assert len(evaluation) == len(dataset) == 30
    assert evaluation.names == list(attacks)
    assert evaluation.samples.tolist() == dataset.indices.tolist()
    assert evaluation.accuracy("standard") == pytest.approx(24 / 30)
    clean = model.eval()(dataset.images).argmax(1)
    for name, attack in attacks.items():
        result = attack(model, dataset.images, dataset.labels, dataset.codes, 0, dataset.indices)
        rows = evaluation.to_pandas().query("attack == @name")
        assert rows["clean_prediction"].tolist() == clean.tolist()
        assert rows["adversarial_prediction"].tolist() == result.predictions.tolist()
        assert rows["success"].tolist() == result.success.tolist()
        assert rows["forwards"].tolist() == result.forwards.tolist()
        assert rows["backwards"].tolist() == result.backwards.tolist()
        for variable, size in result.size.items():
            np.testing.assert_allclose(rows[f"size_{variable}"], size, atol=1e-6)
        right = (result.predictions == dataset.labels) & (clean == dataset.labels)
        assert evaluation.accuracy(name) == pytest.approx(right.float().mean().item())
        assert (
            evaluation.worst_case() <= evaluation.accuracy(name) <= evaluation.accuracy("standard")
        )
    # The attacks must do something, or the test above could not fail.
    assert evaluation.worst_case() < evaluation.accuracy("standard")


def test_sizes_of_both_variables(toys):
    plane = toys.Plane()
    joint = JointBall(image=BALL, latent=LatentBall(plane, norm="linf", radius=0.05))
    evaluation = evaluate(
        toys.make_model(), toys.make_dataset(), {"FGSM": FGSM(BALL), "JSA": PGD(joint, steps=3)}
    )
    frame = evaluation.to_pandas().set_index("attack")
    assert frame.loc["FGSM", "size_latent"].isna().all()
    assert frame.loc["JSA", "size_latent"].between(0, 0.05 + 1e-6).all()
    assert frame.loc["JSA", "size_image"].between(0, 0.02 + 1e-6).all()
    assert frame.loc["JSA", "size_image"].max() > 0


@dataclasses.dataclass(frozen=True)
class Relay(PGD):
    """An attack of two members, the second of which finds every other sample that is found."""

    registered_name = "relay"

    @property
    def members(self):
        return "first", "second"

    def search(self, search):
        found = super().search(search)
        fooled = search.objective.fooled(
            search.network(search.region.render(found.variables).clamp(0, 1))
        )
        return dataclasses.replace(found, by=torch.where(fooled, search.indices % 2, -1))


def test_the_ledger_names_the_member_that_fooled_the_model(toys, tmp_path):
    model, dataset = toys.make_model(), toys.make_dataset()
    attacks = {"plain": PGD(BALL, steps=3), "relay": Relay(BALL, steps=3)}
    options = {"batch_size": 8, "directory": tmp_path}
    evaluation = evaluate(model, dataset, attacks, **options)
    columns = evaluation.ledger.select(["attack", "sample", "success", "found_by"]).to_pylist()
    for row in columns:
        found = row["attack"] == "relay" and row["success"]
        assert row["found_by"] == (("first", "second")[row["sample"] % 2] if found else None)
    assert {row["found_by"] for row in columns} == {"first", "second", None}
    # One batch is lost, and one is from before there was the column: only the first is computed again.
    folder = tmp_path / "shards" / evaluation.provenance["attacks"]["relay"]["key"]
    (folder / "000001.parquet").unlink()
    plain = tmp_path / "shards" / evaluation.provenance["attacks"]["plain"]["key"]
    old = pq.read_table(plain / "000002.parquet")
    pq.write_table(old.drop_columns(["found_by"]), plain / "000002.parquet")
    before = (plain / "000002.parquet").read_bytes()
    same(evaluate(model, dataset, attacks, **options).ledger, evaluation.ledger)
    assert (plain / "000002.parquet").read_bytes() == before
    assert (folder / "000001.parquet").exists()


def test_the_model_is_left_as_it_was(toys):
    model = toys.make_model()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model)
    evaluate(model, toys.make_dataset(), toys.make_attacks())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    assert model_digest(model) == model_digest(before)


def test_clean_predictions_are_made_once(toys):
    calls = []

    class Watched(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images):
            calls.append(len(images))
            return self.inner(images)

    def attack(model, images, labels, codes, seed, indices):
        return FGSM(BALL)(model.inner, images, labels, codes, seed, indices)

    evaluate(
        Watched(toys.make_model()), toys.make_dataset(), {"A": attack, "B": attack}, batch_size=10
    )
    assert sum(calls) == 30


def test_float64_ledger_is_the_same_in_any_batch_size(toys):
    model, dataset, attacks = toys.make_model().double(), toys.make_dataset(), toys.make_attacks()
    whole = evaluate(model, dataset, attacks, batch_size=256).ledger
    for batch_size in (1, 7):
        same(evaluate(model, dataset, attacks, batch_size=batch_size).ledger, whole, tolerance=1e-9)


def test_results_follow_the_samples_not_their_order(toys):
    model, dataset = toys.make_model().double(), toys.make_dataset()
    attacks = {"PGD": PGD(BALL, steps=3)}
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    straight = evaluate(model, dataset, attacks).to_pandas().set_index("sample")
    shuffled = (
        evaluate(model, dataset.subset(order), attacks, batch_size=4)
        .to_pandas()
        .set_index("sample")
    )
    assert shuffled.index.tolist() == (order + 1000).tolist()
    np.testing.assert_allclose(
        shuffled["objective"], straight.loc[shuffled.index, "objective"], atol=1e-9
    )
    other = evaluate(model, dataset, attacks, seed=1).to_pandas().set_index("sample")
    assert (other["objective"] != straight["objective"]).any()


def test_resume_after_an_interruption_repeats_no_finished_batch(toys, tmp_path, monkeypatch):
    model, dataset = toys.make_model(), toys.make_dataset()
    attacks = toys.counting_attacks(tmp_path / "calls.txt")
    undisturbed = evaluate(
        model, dataset, toys.counting_attacks(tmp_path / "other.txt"), batch_size=10
    )
    monkeypatch.setenv("TOY_FAIL_AFTER", "4")
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.parquet").exists()
    monkeypatch.delenv("TOY_FAIL_AFTER")
    resumed = evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    calls = (tmp_path / "calls.txt").read_text().split()
    assert calls == ["2/1000", "2/1010", "2/1020", "3/1000", "3/1010", "3/1020"]
    same(resumed.ledger, undisturbed.ledger)
    same(Evaluation.load(tmp_path / "run" / "ledger.parquet").ledger, undisturbed.ledger)
    evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    assert len((tmp_path / "calls.txt").read_text().split()) == 6


def run_toys(toys, *arguments, **environment):
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, toys.__file__, *map(str, arguments)],
        env=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that what it starts can be ended with it
    )


def test_kill_9_loses_no_finished_batch(toys, tmp_path):
    run = tmp_path / "run"
    process = run_toys(toys, tmp_path, TOY_PAUSE="0.3")
    deadline = time.monotonic() + 50
    # 10 clean shards, then 2 × 10 of the attacks: stop in the midst of the first attack.
    while len(shard_files(run)) < 14 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = len(shard_files(run)) - 10
    assert 4 <= finished < 20
    before = (tmp_path / "calls.txt").read_text().split()
    # What a write that was cut off leaves behind; no later run may trip over it, and the end sweeps it up.
    rubbish = shard_files(run)[0].with_name(".000003.parquet.1.tmp")
    rubbish.write_bytes(b"PAR1")

    attacks = toys.counting_attacks(tmp_path / "calls.txt")
    resumed = evaluate(toys.make_model(), toys.make_dataset(), attacks, batch_size=3, directory=run)
    after = (tmp_path / "calls.txt").read_text().split()
    # At most the one batch that was under way is run a second time.
    assert len(after) - len(before) == 20 - finished
    assert len(set(after)) == 20
    undisturbed = evaluate(
        toys.make_model(),
        toys.make_dataset(),
        toys.counting_attacks(tmp_path / "other.txt"),
        batch_size=3,
    )
    same(resumed.ledger, undisturbed.ledger, tolerance=1e-6)
    assert not rubbish.exists()


def test_two_processes_give_the_ledger_of_one(toys, tmp_path):
    process = run_toys(toys, tmp_path, "--processes", 2)
    try:
        _, errors = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    model, dataset, attacks = toys.make_model().double(), toys.make_dataset(), toys.make_attacks()
    for batch_size in (4, 25, 30):
        alone = evaluate(model, dataset, attacks, batch_size=batch_size).ledger
        for name in ("memory", "shared"):
            for rank in (0, 1):
                path = tmp_path / f"{name}-{batch_size}-{rank}.parquet"
                same(Evaluation.load(path).ledger, alone, tolerance=1e-9)
    same(Evaluation.load(tmp_path / "run" / "ledger.parquet").ledger, alone, tolerance=1e-9)
    # Where one process fails, none waits for it for ever.
    assert (tmp_path / "error-1.txt").read_text() == "no such image"
    assert "failed in process 1" in (tmp_path / "error-0.txt").read_text()


def test_fabric_with_one_process_changes_nothing(toys):
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, dataset, attacks = toys.make_model(), toys.make_dataset(), toys.make_attacks()
    expected = evaluate(model, dataset, attacks, batch_size=7).ledger
    wrapped = fabric.setup_module(model)
    same(evaluate(wrapped, dataset, attacks, batch_size=7, fabric=fabric).ledger, expected)


def test_an_edited_attack_is_computed_anew_and_the_others_are_not(toys, tmp_path):
    model, dataset, log = toys.make_model(), toys.make_dataset(), tmp_path / "calls.txt"

    def run(radius, model=model, **options):
        before = len(log.read_text().split()) if log.exists() else 0
        attacks = {
            "kept": toys.Counting(BALL, steps=2, log=str(log)),
            "edited": toys.Counting(ImageBall(norm="linf", radius=radius), steps=3, log=str(log)),
        }
        options = {"batch_size": 10, **options}
        evaluation = evaluate(model, dataset, attacks, directory=tmp_path / "run", **options)
        fresh = evaluate(
            model, dataset, {k: PGD(a.threat, steps=a.steps) for k, a in attacks.items()}, **options
        )
        same(evaluation.ledger, fresh.ledger)
        return [call[0] for call in log.read_text().split()[before:]]

    assert run(0.01) == list("222333")
    assert run(0.05) == list("333")
    assert run(0.01) == []  # what was computed for it before is still there
    assert run(0.05, seed=1) == list("222333")
    assert run(0.05, batch_size=15) == list("2233")
    other = toys.make_model(seed=1)
    assert run(0.05, model=other) == list("222333")
    with torch.no_grad():
        other[4].bias += 1e-3
    assert run(0.05, model=other) == list("222333")


def test_other_samples_or_labels_are_computed_anew(toys, tmp_path):
    model, dataset, log = toys.make_model(), toys.make_dataset(), tmp_path / "calls.txt"
    attacks = {"A": toys.Counting(BALL, steps=2, log=str(log))}
    evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    evaluate(
        model, dataset.subset(torch.arange(10)), attacks, batch_size=10, directory=tmp_path / "run"
    )
    assert log.read_text().split() == ["2/1000", "2/1010", "2/1020", "2/1000"]
    # The fingerprint alone does not know of labels that were put in by hand.
    relabelled = dataclasses.replace(dataset, labels=(dataset.labels + 1) % 3)
    evaluation = evaluate(model, relabelled, attacks, batch_size=10, directory=tmp_path / "run")
    assert evaluation.labels.tolist() == relabelled.labels.tolist()
    assert len(log.read_text().split()) == 7


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_shard_is_computed_anew(toys, tmp_path, damage):
    model, dataset, log = toys.make_model(), toys.make_dataset(), tmp_path / "calls.txt"
    attacks = toys.counting_attacks(log)
    options = {"batch_size": 10, "directory": tmp_path / "run"}
    first = evaluate(model, dataset, attacks, **options)
    key = first.provenance["attacks"]["PGD-3"]["key"]
    shard = tmp_path / "run" / "shards" / key / "000001.parquet"
    whole = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(whole[:-20])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "flipped":
        shard.write_bytes(whole[:30] + bytes([whole[30] ^ 0xFF]) + whole[31:])
    else:
        shard.write_bytes(shard.with_name("000000.parquet").read_bytes())
    second = evaluate(model, dataset, attacks, **options)
    assert log.read_text().split()[6:] == ["3/1010"]
    same(second.ledger, first.ledger)
    assert shard.read_bytes() == whole


def test_a_full_disk_is_one_clear_error_and_finished_shards_stay(toys, tmp_path, monkeypatch):
    model, dataset, log = toys.make_model(), toys.make_dataset(), tmp_path / "calls.txt"
    attacks = toys.counting_attacks(log)
    real, writes = os.fsync, []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) > 6:  # manifest, three clean shards, two of the first attack
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(DataError, match="No space left on device"):
            evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    assert len(shard_files(tmp_path / "run")) == 5
    evaluate(model, dataset, attacks, batch_size=10, directory=tmp_path / "run")
    # The third batch was attacked, could not be kept, and is attacked again; the first two are not.
    assert log.read_text().split().count("2/1000") == 1
    assert log.read_text().split().count("2/1020") == 2


def test_the_manifest_says_what_produced_the_ledger(toys, tmp_path):
    model, dataset, attacks = toys.make_model(), toys.make_dataset(), toys.make_attacks()
    evaluation = evaluate(model, dataset, attacks, seed=4, directory=tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest == evaluation.provenance
    assert manifest["model"] == model_digest(model)
    assert manifest["seed"] == 4
    assert manifest["dataset"]["fingerprint"] == "plane"
    assert manifest["attacks"]["PGD-5"]["attack"]["threat"]["radius"] == 0.02


def test_saved_images_are_checked_again(toys, tmp_path):
    model, dataset, attacks = toys.make_model(), toys.make_dataset(), toys.make_attacks()
    evaluation = evaluate(
        model, dataset, attacks, batch_size=7, directory=tmp_path, save_images=True
    )
    table = recheck(model, tmp_path)
    assert table.index.tolist() == list(attacks)
    assert (table["differing"] == 0).all()
    for name in attacks:
        assert (
            table.loc[name, "rechecked"] == table.loc[name, "accuracy"] == evaluation.accuracy(name)
        )

    # Images that are not adversarial, in place of those of one batch, are found out.
    from safetensors.torch import load_file, save_file

    key = evaluation.provenance["attacks"]["PGD-5"]["key"]
    file = tmp_path / "shards" / key / "000001.safetensors"
    saved = load_file(file)
    save_file({**saved, "images": dataset.images[7:14]}, file)
    table = recheck(model, tmp_path)
    found = dataset.subset(torch.arange(7, 14))
    broken = evaluation.correct("standard")[7:14] & ~evaluation.correct("PGD-5")[7:14]
    assert len(found) == 7
    assert table.loc["PGD-5", "differing"] == broken.sum() > 0
    assert table.loc["FGSM", "differing"] == 0

    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="truncated"):
        recheck(model, tmp_path)
    # Evaluating again repairs what is damaged.
    evaluate(model, dataset, attacks, batch_size=7, directory=tmp_path, save_images=True)
    assert (recheck(model, tmp_path)["differing"] == 0).all()
    with pytest.raises(CheckpointError, match="another model"):
        recheck(toys.make_model(seed=1), tmp_path)


def test_images_asked_for_later_are_made_then(toys, tmp_path):
    model, dataset, attacks = toys.make_model().double(), toys.make_dataset(), {"FGSM": FGSM(BALL)}
    evaluate(model, dataset, attacks, directory=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        recheck(model, tmp_path)
    evaluate(model, dataset, attacks, directory=tmp_path, save_images=True)
    assert recheck(model, tmp_path)["differing"].tolist() == [0]


def test_without_attacks_there_are_clean_predictions(toys):
    evaluation = evaluate(toys.make_model(), toys.make_dataset(), {})
    assert evaluation.accuracy() == pytest.approx(24 / 30)


def test_progress_goes_to_standard_error_or_to_a_function(toys, capsys):
    seen = []
    model, dataset, attacks = toys.make_model(), toys.make_dataset(), {"FGSM": FGSM(BALL)}
    evaluate(model, dataset, attacks, batch_size=20, progress=lambda *news: seen.append(news))
    assert seen == [("standard", 20, 30), ("standard", 30, 30), ("FGSM", 20, 30), ("FGSM", 30, 30)]
    evaluate(model, dataset, attacks, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "FGSM" in captured.err
    assert "30/30" in captured.err


class NaNs(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :3] * torch.nan


class Short(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "resnet"}, "model: expected a torch.nn.Module, found str"),
        ({"model": NaNs()}, "NaN or infinite"),
        ({"model": Short()}, "found label 2, expected 0 to 1"),
        ({"dataset": torch.zeros(3, 1, 6, 6)}, "expected an onmanifold Dataset, found Tensor"),
        ({"attacks": FGSM(BALL)}, "expected attacks by name"),
        ({"attacks": {"standard": FGSM(BALL)}}, "'standard' cannot be an attack's name"),
        ({"attacks": {"FGSM": FGSM}}, "expected an attack, found <class"),
        ({"attacks": {"FGSM": "fgsm"}}, "'FGSM': expected an attack, found 'fgsm'"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, found 0"),
        ({"batch_size": 2.5}, "found 2.5"),
        ({"save_images": True}, "expected a directory"),
    ],
)
def test_bad_arguments(toys, change, message):
    arguments = {
        "model": toys.make_model(),
        "dataset": toys.make_dataset(),
        "attacks": toys.make_attacks(),
    }
    with pytest.raises(InputError, match=message):
        evaluate(**(arguments | change))


def test_bad_directories(toys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file"):
        evaluate(toys.make_model(), toys.make_dataset(), {}, directory=tmp_path / "file")


def test_an_attack_without_a_fingerprint_cannot_be_resumed(toys, tmp_path):
    def attack(*arguments, **options):
        return FGSM(BALL)(*arguments, **options)

    evaluate(toys.make_model(), toys.make_dataset(), {"mine": attack})
    with pytest.raises(ConfigError, match="no fingerprint"):
        evaluate(toys.make_model(), toys.make_dataset(), {"mine": attack}, directory=tmp_path)


def test_wrong_images_in_the_dataset_stop_before_any_attack(toys, tmp_path):
    dataset = toys.make_dataset()
    dataset.images[12, 0, 0, 0] = torch.nan
    attacks = toys.counting_attacks(tmp_path / "calls.txt")
    with pytest.raises(InputError, match=r"dataset\.images: 1 values are NaN") as caught:
        evaluate(toys.make_model(), dataset, attacks, batch_size=10)
    assert caught.value.__notes__ == ["standard, samples 10 to 19"]
    assert not (tmp_path / "calls.txt").exists()


def test_model_digest_tells_models_apart(toys):
    model = toys.make_model()
    digest = model_digest(model)
    assert digest == model_digest(copy.deepcopy(model))
    assert digest == model_digest(copy.deepcopy(model).to(memory_format=torch.channels_last))
    assert digest != model_digest(copy.deepcopy(model).double())
    swapped = copy.deepcopy(model)
    swapped[2] = nn.GELU()  # the same weights
    assert digest != model_digest(swapped)
    moved = copy.deepcopy(model)
    moved[1].running_mean[0] += 1
    assert digest != model_digest(moved)
