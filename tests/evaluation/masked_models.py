"""Models whose gradients are masked in the ways of the literature, honest ones, and toy data for both.

Every masked model wraps an ordinary network that is not robust at all, so that whatever robustness an attack
by gradient reports for it is not there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from onmanifold.attacks import PGD
from onmanifold.data.dataset import Dataset
from onmanifold.threats import ImageBall

SHAPE, CLASSES = (1, 12, 12), 5
BALL = ImageBall("linf", 0.15)


def make_dataset(count: int = 160, seed: int = 0) -> Dataset:
    """Smooth prototypes of five classes, each sample with smooth and rough noise of its own."""
    prototypes = _smooth(CLASSES, torch.Generator().manual_seed(42))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    images = 0.5 + 0.30 * prototypes[labels] + 0.16 * _smooth(count, generator)
    images = images + 0.05 * torch.randn(images.shape, generator=generator)
    return Dataset(
        name="toy",
        images=images.clamp(0, 1),
        labels=labels,
        classes=tuple("abcde"),
        fingerprint=f"toy-{seed}",
    )


def _smooth(count: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(count, 1, 4, 4, generator=generator)
    return functional.interpolate(coarse, SHAPE[1:], mode="bicubic", align_corners=False)


def _fitted(net: nn.Module, adversarial: bool = False, steps: int = 100) -> nn.Module:
    data = make_dataset(1000, seed=1)
    optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
    attack = PGD(BALL, steps=3, early_stop=False)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        chosen = torch.randint(len(data), (64,), generator=generator)
        images, labels = data.images[chosen], data.labels[chosen]
        if adversarial:
            images = attack.examples(net, images, labels)
        loss = functional.cross_entropy(net(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def _conv(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72 * width, CLASSES),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(144, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def _made(build: Callable[[], nn.Module], adversarial: bool = False) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _fitted(build(), adversarial)


HONEST: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: _made(lambda: _conv(8)),
    "mlp": lambda: _made(_mlp),
    "linear": lambda: _made(lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, CLASSES))),
    "small conv, adversarial training": lambda: _made(lambda: _conv(4), adversarial=True),
    "wide conv, adversarial training": lambda: _made(lambda: _conv(12), adversarial=True),
}


class _Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)


class Saturated(_Wrapped):
    """Logits so large that softmax is 0 or 1 exactly: cross-entropy has no gradient."""

    def forward(self, images: Tensor) -> Tensor:
        return 1e4 * self.net(images)


class Quantised(_Wrapped):
    """Pixels rounded to a few levels: the gradient is zero everywhere."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net((15 * images).round() / 15)


class StraightThrough(_Wrapped):
    """The same with the gradient of the identity: not masked."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + ((15 * images).round() / 15 - images).detach())


class _Shatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        # As a rugged function has them: signs that have nothing to do with where it leads.
        return gradient * torch.randn_like(gradient).sign()


class Shattered(_Wrapped):
    """Right forward, signs of the gradient at random."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(_Shatter.apply(images))


class Rugged(_Wrapped):
    """A fine ripple on the input whose slope hides that of the network: shattered gradients without any trick."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + 0.004 * torch.sin(images * 12_345.0))


class Noisy(_Wrapped):
    """Noise on the input at test time."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images + 0.15 * torch.randn_like(images))


class Dropped(_Wrapped):
    """Dropout of pixels at test time."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(functional.dropout(images, 0.2, training=True))


class Compressed(_Wrapped):
    """Like JPEG: coefficients of blocks of 4×4 pixels, rounded; not differentiable."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        place = torch.arange(4.0)
        matrix = torch.cos(torch.pi / 4 * (place + 0.5) * place.unsqueeze(1)) * 0.5**0.5
        matrix[0] *= 0.5**0.5
        self.register_buffer("matrix", matrix)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            blocks = images.view(-1, 1, 3, 4, 3, 4).transpose(3, 4)
            coefficients = (self.matrix @ blocks @ self.matrix.T / 0.12).round() * 0.12
            images = (
                (self.matrix.T @ coefficients @ self.matrix).transpose(3, 4).reshape(images.shape)
            )
        return self.net(images)


class Detached(_Wrapped):
    """Cut off from the input, but for a constant that keeps autograd quiet."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.detach()) + 0 * images.flatten(1).sum(1, keepdim=True)


class CutOff(_Wrapped):
    """Cut off from the input altogether."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.detach())


class Clipped(_Wrapped):
    """Log-probabilities clipped, as from smoothed labels: flat wherever the model is sure."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).mul(4).log_softmax(1).clamp(-1.2, -0.3)


class Probabilities(_Wrapped):
    """Probabilities in place of logits."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).mul(4).softmax(1)


class Purified(_Wrapped):
    """Moves the input to where the model is surest before it classifies, as test-time defences do."""

    def forward(self, images: Tensor) -> Tensor:
        with torch.enable_grad():
            moved = images.detach().requires_grad_()
            for _ in range(2):
                sureness = self.net(moved).log_softmax(1).amax(1).sum()
                (gradient,) = torch.autograd.grad(sureness, moved)
                moved = (moved + 0.02 * gradient.sign()).detach().requires_grad_()
        return self.net(images + (moved - images).detach())


MASKED: dict[str, type[_Wrapped]] = {
    "saturated": Saturated,
    "quantised": Quantised,
    "shattered": Shattered,
    "rugged": Rugged,
    "noisy": Noisy,
    "dropped": Dropped,
    "compressed": Compressed,
    "detached": Detached,
    "cut off": CutOff,
    "clipped": Clipped,
    "probabilities": Probabilities,
    "purified": Purified,
}
