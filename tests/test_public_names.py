"""The public names, frozen: whoever adds or removes one changes this list too."""

import subprocess
import sys

import pytest

import onmanifold as om

NAMES = [
    "APGD",
    "ATLD",
    "AWP",
    "AdvProp",
    "AdversarialTraining",
    "Attack",
    "AttackResult",
    "Audit",
    "Augmentation",
    "AutoAttack",
    "BPDA",
    "BudgetCurve",
    "CarliniWagner",
    "Classifier",
    "CorruptionResult",
    "CrossEntropy",
    "Cutout",
    "DLR",
    "DMAT",
    "Dataset",
    "Defence",
    "DefenceEvaluation",
    "Differentiable",
    "Discriminator",
    "Elastic",
    "Engine",
    "Evaluation",
    "FAB",
    "FGSM",
    "FastLPA",
    "FeatureScattering",
    "Fit",
    "FitResult",
    "Fog",
    "FontsManifold",
    "Gabor",
    "IAT",
    "IJSAT",
    "IMT",
    "ImageBall",
    "InputMixup",
    "JPEG",
    "JointAdversarialTraining",
    "JointBall",
    "KullbackLeibler",
    "LabelSmoothing",
    "LatentBall",
    "LearnedManifold",
    "MART",
    "MIA",
    "Manifold",
    "ManifoldMixup",
    "ManifoldProjection",
    "Margin",
    "Method",
    "Normal",
    "Normalize",
    "OnManifoldError",
    "PGD",
    "PerceptualBall",
    "ProjectedAdam",
    "ProjectionConfig",
    "Quality",
    "RLAT",
    "RandomPerturbation",
    "RandomPerturbationTraining",
    "RayS",
    "SAM",
    "Snow",
    "Square",
    "Staged",
    "TRADES",
    "TargetedCrossEntropy",
    "TargetedDLR",
    "TargetedMargin",
    "Threat",
    "TrainingConfig",
    "TrainingResult",
    "Transfer",
    "TransformationBall",
    "Unrolled",
    "VAT",
    "adbd",
    "audit",
    "beside",
    "budget_curve",
    "build_classifier",
    "build_manifold",
    "corrupt",
    "corrupted",
    "distance_by_neighbours",
    "distance_by_projection",
    "evaluate",
    "evaluate_corruptions",
    "evaluate_defence",
    "fit",
    "fonts_manifold",
    "inner_gradient",
    "keeps_label",
    "load_classifier",
    "load_dataset",
    "load_discriminator",
    "load_manifold",
    "measure_quality",
    "nearest_class",
    "perceptual_distance",
    "project",
    "project_dataset",
    "save_classifier",
    "save_manifold",
    "train",
    "transfer",
    "uar",
    "unseen_attacks",
]


def test_the_list_is_frozen():
    assert sorted(om.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_there_and_documented(name):
    found = getattr(om, name)
    assert callable(found)
    assert found.__doc__
    assert found.__name__ == name
    assert name in dir(om)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Pgd"):
        om.Pgd  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, onmanifold; dir(onmanifold); "
        "print(*{'torch', 'numpy', 'pandas', 'matplotlib', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
