"""A small network that learns to answer as the model does: what an adversary without gradients would attack."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.evaluation.audits.study import Study
from onmanifold.threats import ImageBall

# More of them teach the surrogate little.
_IMAGES = 2000
_BATCH = 64
_WIDTH = 24


def student_of(study: Study) -> nn.Module:
    """A surrogate trained on the predictions of the model alone (Papernot et al. 2017).

    It sees the images of the data set with noise of the size of the ball, and asks for no gradient.
    """
    subject = study.subject
    count = min(len(subject.dataset), _IMAGES)
    batch = subject.dataset.batch(torch.arange(count), device=subject.images.device)
    images = batch.images.to(subject.images.dtype)
    amplitude = _amplitude(study)
    generator = torch.Generator().manual_seed(subject.seed)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(subject.seed)
        student = _network(images, subject.logits.shape[1])
        optimiser = torch.optim.Adam(student.parameters(), lr=3e-3)
        for _ in range(study.budget.student_steps):
            chosen = torch.randint(count, (min(_BATCH, count),), generator=generator)
            seen = images[chosen.to(images.device)]
            noise = 2 * torch.rand(seen.shape, generator=generator) - 1
            noisy = (seen + amplitude * noise.to(seen)).clamp(0, 1)
            answers = subject.logits_of(noisy)[0].argmax(1)
            loss = functional.cross_entropy(student(noisy), answers)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return student.eval()


def _amplitude(study: Study) -> float:
    threat = study.threat
    if not isinstance(threat, ImageBall):
        return 0.05
    radius = float(torch.as_tensor(threat.radius).max())
    size = study.subject.images[0].numel()
    share: float = {"linf": 1.0, "l2": (size / 3) ** 0.5, "l1": size / 2}[threat.norm]
    # Uniform noise of this amplitude is about as large as the radius.
    return radius / share


def _network(images: Tensor, classes: int) -> nn.Module:
    channels = images.shape[1]
    network = nn.Sequential(
        nn.Conv2d(channels, _WIDTH, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(_WIDTH, 2 * _WIDTH, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(classes),
    )
    network(images[:1].float().cpu())  # gives the lazy layer its size
    return network.to(images)
