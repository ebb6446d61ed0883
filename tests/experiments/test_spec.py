"""The experiment file: what is accepted, what is refused and with which words, and overrides."""

from __future__ import annotations

from copy import deepcopy

import pytest

from onmanifold.experiments.spec import apply_overrides, load_experiment, read_yaml
from onmanifold.foundation.errors import ConfigError, DataError

MINIMAL = {
    "name": "tiny",
    "dataset": {"type": "fonts", "train": 50, "test": 20, "variant": "easy"},
    "classifier": "mlp",
    "threats": {"image": {"type": "image_ball", "radius": 0.1}, "latent": {"type": "latent_ball"}},
    "methods": {
        "Normal": "normal",
        "AT [PGD-5]": {"type": "adversarial", "attack": {"type": "pgd", "steps": 5}},
    },
    "attacks": {
        "PGD-50": {"type": "pgd", "threat": "image"},
        "FGSM": {"type": "fgsm", "threat": "image"},
    },
}


def changed(**changes):
    return deepcopy(MINIMAL) | changes


def test_minimal_experiment_has_sensible_defaults():
    experiment = load_experiment(MINIMAL)
    assert experiment.seeds == (0,)
    assert experiment.columns == ["standard", "PGD-50", "FGSM", "worst case"]
    assert experiment.dataset.options == {"variant": "easy"}
    assert experiment.classifier == {"type": "mlp"}
    assert experiment.content == MINIMAL


def test_worst_case_stands_behind_its_last_attack():
    experiment = load_experiment(
        changed(worst_case={"worst PGD": ["PGD-50"], "all": ["FGSM", "PGD-50"]})
    )
    assert experiment.columns == ["standard", "PGD-50", "worst PGD", "FGSM", "all"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"atacks": {}}, "unknown key 'atacks'. Did you mean 'attacks'"),
        ({"content": {}}, "unknown key 'content'"),
        (
            {"evaluation": {"batchsize": 3}},
            "evaluation: unknown key 'batchsize'. Did you mean 'batch_size'",
        ),
        ({"evaluation": {"batch_size": 0}}, "batch_size: expected at least 1"),
        ({"dataset": {"train": 3}}, "dataset: expected a name or a mapping with the key 'type'"),
        ({"dataset": {"type": "fonts", "train": -3}}, "dataset.train: expected a number of images"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [1, 1]}, "seeds: found one twice"),
        ({"seeds": "zero"}, "seeds"),
        ({"methods": {}}, "methods: expected at least one"),
        ({"methods": "normal"}, "methods"),
        ({"attacks": {"standard": {"type": "fgsm"}}}, "'standard' cannot be an attack's name"),
        ({"attacks": {"worst case": {"type": "fgsm"}}}, "'worst case' cannot be an attack's name"),
        ({"worst_case": {"w": ["PGD-5"]}}, "unknown attack 'PGD-5'. Did you mean 'PGD-50'"),
        ({"worst_case": {"w": []}}, "worst_case.w: expected at least one attack"),
        ({"worst_case": {"FGSM": ["FGSM"]}}, "'FGSM' is the name of an attack"),
        ({"claims": [{"claim": "c", "lhs": ["Norml", "FGSM"], "rhs": 3}]}, "Did you mean 'Normal'"),
        ({"claims": [{"claim": "c", "lhs": ["Normal", "FGMS"], "rhs": 3}]}, "Did you mean 'FGSM'"),
        ({"claims": {"claim": "c"}}, "claims: expected a list"),
        ({"name": "../up"}, "name: expected a folder's name"),
    ],
)
def test_mistakes_are_named_with_their_place(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(changed(**changes))
    assert message in str(caught.value)
    assert str(caught.value).startswith("experiment")


@pytest.mark.parametrize("key", ["name", "dataset", "classifier", "methods", "attacks"])
def test_missing_keys_are_named(key):
    content = deepcopy(MINIMAL)
    del content[key]
    with pytest.raises(ConfigError, match=f"'{key}' is missing"):
        load_experiment(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "line"),
        ("name: a\nname: b\n", "line 2, column 1: the key 'name' stands twice"),
        ("- a list\n", "expected a mapping, found list"),
        ("", "expected a mapping, found NoneType"),
        ("x: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_experiment(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_experiment(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(DataError, match=r"none\.yaml: No such file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_experiment(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("name=other", ["name"], "other"),
        ("seeds=[1, 2]", ["seeds"], [1, 2]),
        ("training.epochs=3", ["training", "epochs"], 3),
        ("threats.image.radius=0.2", ["threats", "image", "radius"], 0.2),
        ("methods.AT [PGD-5].attack.steps=7", ["methods", "AT [PGD-5]", "attack", "steps"], 7),
        ("methods.AT v1.5.type=normal", ["methods", "AT v1", "5", "type"], "normal"),
        ("methods.Normal.loss=ce", ["methods", "Normal"], {"type": "normal", "loss": "ce"}),
        ("classifier.width=8", ["classifier"], {"type": "mlp", "width": 8}),
        ("dataset.train=9", ["dataset", "train"], 9),
        ("dataset=cifar10", ["dataset"], {"type": "cifar10", "train": 50, "test": 20}),
        ("dataset={type: mnist}", ["dataset"], {"type": "mnist"}),
        ("training={epochs: 2}", ["training"], {"epochs": 2}),
        ("description=a=b", ["description"], "a=b"),
    ],
)
def test_overrides(override, path, value):
    before = deepcopy(MINIMAL)
    found = apply_overrides(MINIMAL, [override])
    for key in path:
        found = found[key]
    assert found == value
    assert before == MINIMAL


def test_later_overrides_win():
    assert apply_overrides(MINIMAL, ["name=a", "name=b"])["name"] == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("name.sub.more=[", "is not YAML"),
        ("seeds.x=1", "expected a mapping"),
        ("dataset.train.x=1", "has no keys below it"),
    ],
)
def test_overrides_that_cannot_be(override, message):
    with pytest.raises(ConfigError) as caught:
        load_experiment(MINIMAL, [override])
    assert message in str(caught.value) or "seeds" in str(caught.value)


def test_misspelt_override_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'training'"):
        load_experiment(MINIMAL, ["trainig.epochs=3"])


def test_what_a_merge_brings_may_be_said_anew(tmp_path):
    path = tmp_path / "merged.yaml"
    path.write_text("a: &base {type: pgd, steps: 5}\nb: {<<: *base, steps: 7}\n")
    assert read_yaml(path)["b"] == {"type": "pgd", "steps": 7}
    path.write_text("a: &base {type: pgd}\nb: {<<: *base, steps: 7, steps: 8}\n")
    with pytest.raises(ConfigError, match="the key 'steps' stands twice"):
        read_yaml(path)


def test_merges_in_merges(tmp_path):
    path = tmp_path / "nested.yaml"
    path.write_text("c: {<<: &b {<<: &a {x: 1}, x: 2}, x: 3}\nd: *b\n")
    assert read_yaml(path) == {"c": {"x": 3}, "d": {"x": 2}}
    for text in ("c: {<<: {x: 1, x: 2}}\n", "a: &a {x: 1}\nc: {<<: *a, <<: *a}\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="stands twice"):
            read_yaml(path)
