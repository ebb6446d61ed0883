"""Glow against normflows with the same weights, and against the floor: ``python -m benchmarks.glow``.

The floor is what no Glow can avoid: the convolutions of the couplings alone, in channels_last; forward for
decoding and for the likelihood, forward and backward to the input for a step of JSA, and to the weights too for a
step of training. Ratios are medians over rounds of times taken in
the same round, each candidate in a process of its own, as its users run it. onmanifold's attacks and training let
their process keep freed memory; ``--alike`` gives that to normflows too. In the step of JSA normflows is used as
tutorials write PGD, with ``loss.backward()``; "frozen" is normflows without gradients to its parameters, as a user
who knows would have it. ``--train STEPS`` instead trains both from the same weights on a dataset and prints bits
per dimension of its test images.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor, nn
from torch.nn import functional

import onmanifold as om
from benchmarks.timing import interleave_apart, ratio
from onmanifold.foundation.memory import keep_freed_memory
from onmanifold.manifolds import build_manifold
from onmanifold.manifolds.glow import Glow
from onmanifold.manifolds.glow.layers import Coupling, Step
from onmanifold.training.fits.glow import GlowFit

SHAPE = (3, 32, 32)
SETTINGS = {"3 levels, width 128": (3, 128, 64), "4 levels, width 256": (4, 256, 64)}
KINDS = ("decode", "log-likelihood", "training step", "JSA step")
AIMS = {"decode": 1.9, "log-likelihood": 1.6, "training step": 1.4, "JSA step": 2.4}
CLIP = GlowFit.defaults["gradient_clip"]


class Task(NamedTuple):
    """What is timed."""

    kind: str
    setting: str
    batch: int
    device: str
    threads: int
    alike: bool


def our_glow(levels: int, width: int, shape: tuple[int, int, int], **options: object) -> Glow:
    """A Glow with a prior per channel, as normflows has it."""
    glow = build_manifold(
        "glow", image_shape=shape, seed=0, levels=levels, width=width, prior="channel", **options
    )
    assert isinstance(glow, Glow)
    return glow


def moved_weights(glow: Glow) -> Glow:
    """Weights as after some training: actnorms started, all else moved from zero."""
    generator = torch.Generator().manual_seed(0)
    glow.start(torch.rand(64, *glow.image_shape, generator=generator))
    with torch.no_grad():
        for name, weight in glow.named_parameters():
            size = 0.1 / math.sqrt(max(1, weight[0].numel())) if "last" in name else 0.02
            weight += size * torch.randn(weight.shape, generator=generator)
    return glow


def peer_of(glow: Glow) -> nn.Module:
    """The same flow in normflows, from canvases in [-0.5, 0.5]; its coarsest level is its first."""
    import normflows

    flows, bases, merges = [], [], []
    for place, (level, latents) in enumerate(
        zip(reversed(glow.flow), reversed(glow.level_shapes), strict=True)
    ):
        blocks = [block_of(step, first=step is level.steps[0]) for step in reversed(level.steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        base = normflows.distributions.GlowBase(latents)
        base.loc.data.copy_(level.prior.mean.data.view_as(base.loc))
        base.log_scale.data.copy_(level.prior.log_scale.data.view_as(base.log_scale))
        bases.append(base)
        if place:
            merges.append(normflows.flows.Merge())
    return normflows.MultiscaleFlow(bases, flows, merges).eval()


@torch.no_grad()
def block_of(step: Step, first: bool) -> nn.Module:
    """One step as a block of normflows, which numbers the channels of a squeeze in another order."""
    import normflows

    mixing, coupling = step.mixing, step.coupling
    count, width = len(mixing.shift), coupling.middle.in_channels
    block = normflows.flows.GlowBlock(count, width)
    order = torch.arange(count)
    if first:
        order = order.view(4, count // 4).T.flatten().argsort()
    inside, rotation, norm = block.flows[0].flows[1], block.flows[1], block.flows[2]
    norm.t.view(-1)[order], norm.s.view(-1)[order] = -mixing.shift, -mixing.log_scale
    norm.data_dep_init_done.fill_(1.0)
    matrix = torch.empty(count, count, dtype=torch.float64)
    matrix[:, order] = mixing.affine(torch.float64)[0] * (-mixing.log_scale.double()).exp()
    rows, lower, upper = torch.linalg.lu(matrix)
    rotation.P.copy_(rows)
    rotation.L.copy_(lower)
    rotation.U.copy_(upper)
    rotation.sign_S.copy_(upper.diagonal().sign())
    rotation.log_S.copy_(upper.diagonal().abs().log())
    convolutions = [layer for layer in inside.param_map.net if isinstance(layer, nn.Conv2d)]
    for theirs, ours in zip(
        convolutions, (coupling.first, coupling.middle, coupling.last), strict=True
    ):
        theirs.load_state_dict(ours.state_dict())
    interleave_rows(convolutions[2], coupling)
    return block


def interleave_rows(theirs: nn.Conv2d, coupling: Coupling) -> None:
    """Shifts at even places, negated, and scales at odd ones, to which normflows adds 2."""
    weight, bias = coupling.last.weight, coupling.last.bias
    half = len(bias) // 2
    theirs.weight[0::2], theirs.bias[0::2] = -weight[:half], -bias[:half]
    theirs.weight[1::2], theirs.bias[1::2] = weight[half:], bias[half:] - 2


@torch.no_grad()
def start_peer(peer: nn.Module, canvases: Tensor) -> None:
    """normflows' own start for training: scales of sigmoid(2), and its actnorms from the same images."""
    import normflows

    for part in peer.modules():
        if isinstance(part, normflows.flows.GlowBlock):
            part.flows[0].flows[1].param_map.net[-1].bias.zero_()
        elif isinstance(part, normflows.flows.ActNorm):
            part.data_dep_init_done.zero_()
    peer.log_prob(canvases, None)


@functools.cache
def subjects(setting: str, device: str) -> tuple[Glow, nn.Module]:
    """Glow and its peer with the same weights; scales without bounds are what the peer has."""
    levels, width, _ = SETTINGS[setting]
    glow = moved_weights(our_glow(levels, width, SHAPE, scale_range=None))
    return glow.to(device), peer_of(glow.cpu()).to(device)


def images_of(batch: int, device: str) -> Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(1)).to(device)


def their_latents(glow: Glow, codes: Tensor) -> list[Tensor]:
    """Codes as normflows has them: the coarsest level first, not whitened."""
    parts = []
    for level, latents in zip(glow.flow, glow.split(codes).values(), strict=True):
        mean, log_scale = level.prior(None)
        parts.append((latents * log_scale.exp() + mean).detach().contiguous())
    return parts[::-1]


def their_images(peer: nn.Module, latents: list[Tensor]) -> Tensor:
    """Images in [0, 1] of canvases."""
    return (peer.forward_and_log_det(latents)[0] * (256 / 255) + 0.5).clamp(0, 1)


def candidate(name: str, task: Task) -> Callable[[], object]:
    """One of "onmanifold", "normflows", "normflows, frozen" and "floor", for a task."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(task.threads)
    if task.alike or not name.startswith("normflows"):
        keep_freed_memory()
    glow, peer = subjects(task.setting, task.device)
    if name == "floor":
        return floor(glow, task)
    images = images_of(task.batch, task.device)
    make = {
        "decode": decoding,
        "log-likelihood": likelihood,
        "training step": training,
        "JSA step": joint_attack,
    }[task.kind]
    return make(name, glow, peer, images)


def decoding(name: str, glow: Glow, peer: nn.Module, images: Tensor) -> Callable[[], object]:
    labels = torch.zeros(len(images), dtype=torch.int64)
    with torch.no_grad():
        codes = glow.encode(images, labels)
    chart, latents = glow.chart(codes), their_latents(glow, codes)

    def ours() -> Tensor:
        return chart.decode(codes)

    @torch.no_grad()
    def theirs() -> Tensor:
        return their_images(peer, latents)

    return ours if name == "onmanifold" else theirs


def likelihood(name: str, glow: Glow, peer: nn.Module, images: Tensor) -> Callable[[], object]:
    canvases = glow.dequantise(images)

    @torch.no_grad()
    def call() -> Tensor:
        return glow.log_density(canvases) if name == "onmanifold" else peer.log_prob(canvases, None)

    return call


def training(name: str, glow: Glow, peer: nn.Module, images: Tensor) -> Callable[[], object]:
    """A step of maximum likelihood by Adamax, dequantisation included."""
    network = copy.deepcopy(glow if name == "onmanifold" else peer).train()
    if name == "onmanifold":
        # As its training loop does.
        network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adamax(network.parameters(), lr=1e-6)

    def call() -> None:
        optimizer.zero_grad()
        if name == "onmanifold":
            loss = network.bits_per_dimension(images).mean()
        else:
            noise = torch.rand_like(images)
            loss = network.forward_kld(((images * 255).round() + noise) / 256 - 0.5)
        loss.backward()
        optimizer.step()

    return call


def joint_attack(name: str, glow: Glow, peer: nn.Module, images: Tensor) -> Callable[[], object]:
    """One step of JSA (IJSAT eq. 8) through the decoder and a small frozen classifier."""
    classifier = om.build_classifier("conv_net", 10, SHAPE, seed=0).to(images.device).eval()
    classifier.requires_grad_(False)
    peer.requires_grad_(name == "normflows")
    classifier = classifier.to(memory_format=torch.channels_last)
    labels = torch.arange(len(images), device=images.device) % 10
    with torch.no_grad():
        codes = glow.encode(images, labels)
    chart = glow.chart(codes)
    latents = [codes] if name == "onmanifold" else their_latents(glow, codes)

    def decode(points: list[Tensor]) -> Tensor:
        return chart.decode(points[0]) if name == "onmanifold" else their_images(peer, points)

    def call() -> None:
        moves = [torch.zeros_like(part).requires_grad_() for part in latents]
        change = torch.zeros_like(images).requires_grad_()
        decoded = decode([part + move for part, move in zip(latents, moves, strict=True)])
        loss = functional.cross_entropy(classifier((decoded + change).clamp(0, 1)), labels)
        loss.backward()
        for variable in (*moves, change):
            assert variable.grad is not None
            variable.detach().add_(variable.grad.sign(), alpha=0.005)

    return call


def floor(glow: Glow, task: Task) -> Callable[[], object]:
    """The convolutions of all couplings, forward, and backward where the task takes gradients.

    In training to the weights too.
    """
    trains = task.kind == "training step"
    glow = copy.deepcopy(glow).requires_grad_(trains).to(memory_format=torch.channels_last)
    couplings = [step.coupling for level in glow.flow for step in level.steps]
    sides = [
        shape[1]
        for level, shape in zip(glow.flow, glow.level_shapes, strict=True)
        for _ in level.steps
    ]
    backward = trains or task.kind == "JSA step"
    inputs = [
        torch.rand(task.batch, coupling.first.in_channels, side, side, device=task.device)
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_(backward)
        for coupling, side in zip(couplings, sides, strict=True)
    ]

    def call() -> None:
        for coupling, pixels in zip(couplings, inputs, strict=True):
            with torch.set_grad_enabled(backward):
                hidden = coupling.middle(coupling.first(pixels).relu_()).relu_()
                change = coupling.last(hidden)
            if backward:
                weights = list(coupling.parameters()) if trains else []
                torch.autograd.grad(change, [pixels, *weights], change.detach())

    return call


def peak_memory(name: str, task: Task) -> float:
    """MiB by which the first JSA step of a fresh process raises its memory."""
    call = candidate(name, task)
    if task.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What was needed to get here is not counted: the process's peak starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = resource_peak()
    call()
    return resource_peak() - before


def resource_peak() -> float:
    """The process's peak of resident memory in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def check_outputs(setting: str) -> None:
    """Say how far the two are apart, in images and in nats; they must agree before they are timed."""
    glow, peer = subjects(setting, "cpu")
    images = images_of(8, "cpu")
    labels = torch.zeros(8, dtype=torch.int64)
    with torch.no_grad():
        codes = glow.encode(images, labels)
        codes = codes + 0.1 * torch.randn(codes.shape, generator=torch.Generator().manual_seed(2))
        ours = glow.chart(codes).decode(codes)
        theirs = their_images(peer, their_latents(glow, codes))
        canvases = glow.dequantise(images)
        densities = glow.log_density(canvases), peer.log_prob(canvases, None)
    apart = (ours - theirs).abs().max().item()
    nats = (densities[0] / densities[1] - 1).abs().max().item()
    print(f"images apart by at most {apart:.1e}, log-likelihoods by {nats:.1e} of their value")
    if apart > 1e-4 or nats > 1e-4:
        raise SystemExit("The two compute different things: nothing was timed.")


def compare(setting: str, arguments: argparse.Namespace) -> None:
    """Print the ratios of one setting."""
    batch = arguments.batch or SETTINGS[setting][2]
    print(
        f"\nGlow, {setting}, 8 steps, batch {batch}, {arguments.threads} threads, {arguments.device}"
    )
    check_outputs(setting)
    for kind in arguments.only or KINDS:
        task = Task(kind, setting, batch, arguments.device, arguments.threads, arguments.alike)
        names = ["onmanifold", "normflows", "floor"]
        names += ["normflows, frozen"] if kind == "JSA step" else []
        seconds = interleave_apart(candidate, names, task, rounds=arguments.rounds)
        figures = {name: ratio(seconds, name, "onmanifold") for name in names[1:]}
        line = f"{kind:16}{figures['normflows']:6.2f} × as fast as normflows (aim {AIMS[kind]})"
        if "normflows, frozen" in figures:
            line += f", {figures['normflows, frozen']:.2f} × as it frozen"
        line += f"; takes {ratio(seconds, 'onmanifold', 'floor'):.2f} × the floor"
        print(line, flush=True)
    compare_memory(Task("JSA step", setting, batch, arguments.device, arguments.threads, False))


def compare_memory(task: Task) -> None:
    """Print the peaks of memory in a step of JSA, each in a fresh process."""
    context, peaks = multiprocessing.get_context("spawn"), {}
    for name in ("onmanifold", "normflows", "normflows, frozen"):
        with ProcessPoolExecutor(1, context) as pool:
            peaks[name] = pool.submit(peak_memory, name, task).result()
    found = ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
    print(f"peak memory of a JSA step: {found}", flush=True)


def train_both(arguments: argparse.Namespace) -> None:
    """The same steps by both, on the same images with the same noise; bits per dimension of test images.

    1×1 convolutions start alike; scales and actnorms start as each does by itself, from the same images.
    """
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    train = om.load_dataset(arguments.dataset, "train")
    test = om.load_dataset(arguments.dataset, "test").take(arguments.images)
    glow = our_glow(arguments.levels, arguments.width, train.image_shape).to(arguments.device)
    glow.start(train.batch(torch.arange(256), arguments.device).images)
    peer = peer_of(copy.deepcopy(glow).cpu()).to(arguments.device)
    start_peer(peer, glow.dequantise(train.batch(torch.arange(256), arguments.device).images))
    print(f"Glow, {arguments.levels} levels, width {arguments.width}, on {arguments.dataset}")
    steps = arguments.train
    for name, network in (("onmanifold", glow), ("normflows", peer)):
        begin = time.perf_counter()
        steps = learn(network, glow, train, steps, arguments)
        seconds = time.perf_counter() - begin
        with torch.no_grad():
            parts = [
                bits(network.eval(), glow, *test.batch(rows, arguments.device)[::3], seed=0)
                for rows in torch.arange(len(test)).split(200)
            ]
        print(
            f"{name:12}{torch.cat(parts).mean():8.4f} bits per dimension of {len(test)} test images, "
            f"{steps} steps in {seconds:.0f} s",
            flush=True,
        )
        if network is glow and arguments.keep is not None:
            om.save_manifold(glow.eval(), arguments.keep, {"steps": steps})


def learn(
    network: nn.Module, glow: Glow, train: om.Dataset, steps: int, arguments: argparse.Namespace
) -> int:
    """Adamax with a linear warm-up and clipped gradients, as `GlowFit` asks for; returns the number of steps.

    With ``--minutes`` the first of the two takes as many steps as they allow, the second as many as the first.
    """
    batch, rate, warmup = arguments.batch or 64, 1e-3, 100
    optimizer = torch.optim.Adamax(network.train().parameters(), lr=rate)
    generator = torch.Generator().manual_seed(0)
    end = math.inf if steps else time.monotonic() + 60 * arguments.minutes
    number = 0
    while number < (steps or math.inf) and time.monotonic() < end:
        rows = torch.randint(len(train), (batch,), generator=generator)
        images, _, _, indices = train.batch(rows, arguments.device)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (number + 1) / warmup)
        optimizer.zero_grad()
        bits(network, glow, images, indices, seed=number).mean().backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimizer.step()
        number += 1
    return number


def bits(network: nn.Module, glow: Glow, images: Tensor, indices: Tensor, *, seed: int) -> Tensor:
    """Bits per dimension (B,) by either, of the same dequantised canvases."""
    canvases = glow.dequantise(images, seed, indices)
    ours = isinstance(network, Glow)
    found = network.log_density(canvases) if ours else network.log_prob(canvases, None)
    values = math.prod(glow.image_shape)
    return (glow.latent_size * math.log(256) - found) / (values * math.log(2))


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--setting", choices=list(SETTINGS))
    parser.add_argument("--only", nargs="+", choices=list(KINDS))
    parser.add_argument(
        "--batch", type=int, help="images per batch, in place of each setting's own"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alike", action="store_true", help="normflows too keeps freed memory")
    parser.add_argument("--train", type=int, metavar="STEPS", help="train both")
    parser.add_argument(
        "--minutes", type=float, help="train both for as many steps as these allow ours"
    )
    parser.add_argument("--keep", type=Path, help="file for our trained flow")
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--images", type=int, default=2000, help="test images after training")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    if arguments.train or arguments.minutes:
        train_both(arguments)
        return
    for setting in [arguments.setting] if arguments.setting else SETTINGS:
        compare(setting, arguments)


if __name__ == "__main__":
    main()
