"""`audit`, the public face of all checks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from onmanifold.attacks import PGD, Attack
from onmanifold.attacks.engine import full_float32, probe, untouched, unwrapped
from onmanifold.data.dataset import Dataset
from onmanifold.evaluation.audits import gradients, manifold, planted, saved, search
from onmanifold.evaluation.audits import model as outputs
from onmanifold.evaluation.audits.checks import Check
from onmanifold.evaluation.audits.report import Audit, Finding
from onmanifold.evaluation.audits.study import BUDGETS, Budget, Saved, Study
from onmanifold.evaluation.audits.subject import Subject, permuted
from onmanifold.evaluation.ledger import Evaluation
from onmanifold.evaluation.progress import Report, shown
from onmanifold.evaluation.shards import LEDGER
from onmanifold.foundation.checks import check_images, check_labels
from onmanifold.foundation.errors import InputError
from onmanifold.foundation.registry import nearest
from onmanifold.threats import Threat

CHECKS = (
    outputs.randomness_of_outputs,
    outputs.finite_outputs,
    outputs.probabilities,
    outputs.inner_optimisation,
    outputs.number_of_classes,
    gradients.attacked_copy,
    gradients.zero_gradients,
    gradients.gradients_agree,
    gradients.loss_rises,
    gradients.objectives_agree,
    search.inside,
    search.unlimited_radius,
    search.more_steps,
    search.larger_radius,
    search.converged,
    search.random_perturbations,
    search.black_box,
    planted.planted_examples,
    manifold.reconstruction,
    manifold.random_subspace,
    manifold.on_manifold_metric,
    saved.saved_images,
    saved.recomputed_accuracy,
    saved.reported_accuracy,
)
"""All checks, in the order in which they are done; the last one counts what the others found."""


def audit(
    model: nn.Module,
    dataset: Dataset,
    threat_or_attacks: Threat | Attack | Mapping[str, Attack],
    *,
    evaluation: Evaluation | str | Path | None = None,
    surrogate: nn.Module | None = None,
    samples: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    budget: Literal["quick", "thorough"] | Budget = "quick",
    checks: Sequence[str] | None = None,
    progress: bool | Report = False,
) -> Audit:
    """Look for signs that a robust accuracy is not what it seems, and say which.

    The checks are those of Carlini et al. 2019 (arXiv:1902.06705), Tramèr et al. 2020 (arXiv:2002.08347), Croce
    et al. 2020 and 2022 (arXiv:2003.01690, 2202.13711) and Zimmermann et al. 2022 (arXiv:2206.13991). An alarm
    does not say that a model is not robust, but that the number for it cannot be trusted before the cause is
    known; no alarm is no proof either. Verdicts take account of the noise of a small sample.

    Args:
        model: Images (B, C, H, W) in [0, 1] to logits (B, K); it is left as it was.
        dataset: Test samples, of which some are drawn at random. Also what a surrogate learns from.
        threat_or_attacks: What was claimed: a threat model, which is audited with PGD; or an attack, or attacks
            by name. Attacks in several threat models are audited in each of them.
        evaluation: An evaluation of the model whose numbers are audited too; or the directory it was made in,
            whose saved images are measured and evaluated again.
        surrogate: A model from which images are transferred, such as the static model of a test-time defence;
            None: a small network is trained on the model's predictions.
        samples: How many are examined; None: 200 (quick) or 1000 (thorough).
        batch_size: Samples per batch.
        seed: Of all that is random.
        budget: How much is spent on it: "quick", "thorough" or a `Budget`.
        checks: Names of those that are done; None: all.
        progress: True: bars on standard error; or a function (name, done, all), called after each check.

    Raises:
        InputError: Something is of the wrong type, shape or range, or the model is right on no sample.
        DataError: The directory of the evaluation is damaged or incomplete.
    """
    if torch.is_inference_mode_enabled():
        # Tensors made in that mode cannot take part in a gradient.
        with torch.inference_mode(False):
            return audit(
                model,
                dataset,
                threat_or_attacks,
                evaluation=evaluation,
                surrogate=surrogate,
                samples=samples,
                batch_size=batch_size,
                seed=seed,
                budget=budget,
                checks=checks,
                progress=progress,
            )
    began = time.perf_counter()
    chosen = _chosen(checks)
    limits = _budget(budget)
    count = limits.samples if samples is None else samples
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"samples: expected an integer of at least 1, found {samples!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected an integer of at least 1, found {batch_size!r}.")
    subject = _subject(model, dataset, count, batch_size, seed)
    studies = [
        Study(subject, threat, attacks, limits, surrogate, _opened(evaluation))
        for threat, attacks in _groups(threat_or_attacks, limits)
    ]
    findings: list[Finding] = []
    todo = [
        (part, study)
        for number, study in enumerate(studies)
        for part in chosen
        if part.scope == "threat" or number == 0
    ]
    names = list(dict.fromkeys(part.name for part, _ in todo))
    with shown(progress, names, len(studies)) as report:
        for part, study in todo:
            findings.append(part(study))
            done = sum(finding.name == part.name for finding in findings)
            report(part.name, len(studies) if part.scope == "model" else done, len(studies))
    facts = {
        "dataset": dataset.name,
        "samples": len(subject.labels),
        "clean_accuracy": float(subject.right.double().mean()),
        "seed": seed,
        "budget": budget if isinstance(budget, str) else "custom",
        "threats": [study.label for study in studies],
        "seconds": round(time.perf_counter() - began, 1),
    }
    return Audit(tuple(findings), facts)


def _chosen(names: Sequence[str] | None) -> list[Check]:
    known = {part.name: part for part in CHECKS}
    for name in names or ():
        if name not in known:
            raise InputError(f"checks: unknown check {name!r}.{nearest(str(name), known)}")
    return [part for part in CHECKS if names is None or part.name in names]


def _budget(budget: str | Budget) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if budget not in BUDGETS:
        raise InputError(f"budget: unknown budget {budget!r}.{nearest(str(budget), BUDGETS)}")
    return BUDGETS[budget]


def _subject(model: nn.Module, dataset: Dataset, count: int, batch_size: int, seed: int) -> Subject:
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch.nn.Module, found {type(model).__name__}.")
    if len(dataset) == 0:
        raise InputError("dataset: it is empty.")
    network = unwrapped(model, compiled=False)
    tensors = [*network.parameters(), *network.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)
    batch = dataset.batch(permuted(dataset, count, seed), device=device)
    images = check_images(batch.images.to(dtype), "dataset.images")
    codes = None if batch.codes is None else batch.codes.to(dtype)
    with untouched(network, seed), full_float32():
        logits = torch.cat([probe(network, part) for part in torch.split(images, batch_size)])
    check_labels(batch.labels, len(images), logits.shape[1], "dataset.labels")
    subject = Subject(
        network, dataset, images, batch.labels, codes, batch.indices, logits, batch_size, seed
    )
    if not bool(subject.right.any()):
        raise InputError(
            "model: it is right on none of the samples, so that there is nothing to attack."
        )
    return subject


def _groups(given: object, budget: Budget) -> list[tuple[Threat, dict[str, Attack]]]:
    """The attacks under audit by threat model; a threat model alone is audited with PGD."""
    if isinstance(given, Threat):
        return [(given, {f"PGD-{budget.steps}": PGD(given, steps=budget.steps)})]
    attacks = {type(given).__name__: given} if isinstance(given, Attack) else given
    if not isinstance(attacks, Mapping) or not attacks:
        raise InputError(
            "threat_or_attacks: expected a threat model, an attack or attacks by name, found "
            f"{type(given).__name__}."
        )
    groups: list[tuple[Threat, dict[str, Attack]]] = []
    for name, attack in attacks.items():
        if not isinstance(attack, Attack):
            raise InputError(f"threat_or_attacks: {name!r}: expected an attack, found {attack!r}.")
        for threat, group in groups:
            if repr(threat) == repr(attack.threat):
                group[str(name)] = attack
                break
        else:
            groups.append((attack.threat, {str(name): attack}))
    return groups


def _opened(evaluation: Evaluation | str | Path | None) -> Saved | None:
    if evaluation is None or isinstance(evaluation, Evaluation):
        return None if evaluation is None else Saved(evaluation, None)
    directory = Path(evaluation)
    return Saved(Evaluation.load(directory / LEDGER), directory)
