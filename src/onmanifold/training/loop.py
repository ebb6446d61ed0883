"""The one training loop. It knows no method by name: a method turns a step into a loss, the loop does the rest.

All that is random depends on the seed and on where the training stands (epoch, step, sample), never on what
happened before; so a checkpoint needs no random state, and a resumed training ends with the same bits as one
that was never stopped.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onmanifold.classifiers import load_classifier
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import DataError, DivergenceError, InputError
from onmanifold.training.config import TrainingConfig
from onmanifold.training.ema import MovingAverage
from onmanifold.training.guard import Interruption, default_dtype, own_generators, seed_generators
from onmanifold.training.log import Progress
from onmanifold.training.methods.base import Method, Step
from onmanifold.training.state import RunFiles, State
from onmanifold.training.validation import validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from onmanifold.data.dataset import Dataset

# Steps between looks at the losses; a look makes a GPU wait for the loop.
_LOOK_EVERY = 20


def derive(seed: int, *purpose: object) -> int:
    """A seed of its own for a purpose, such as an epoch; 63 bits."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Training:
    """One run of a method on a classifier; `train` is its public face.

    Args:
        method: What loss is taken.
        classifier: Trained in place.
        dataset: The training images; a share of them is held out for validation.
        config: How it is run.
        seed: Of the order of the images, and of all else that is random.
        files: Where checkpoint, best weights and metrics go; None: nowhere.
        fabric: Devices and processes, launched.
    """

    def __init__(
        self,
        method: Method,
        classifier: nn.Module,
        dataset: Dataset,
        config: TrainingConfig,
        seed: int,
        files: RunFiles | None,
        fabric: Fabric,
    ) -> None:
        self.method, self.config, self.seed, self.fabric = method, config, seed, fabric
        self.files = files
        self.rank, self.processes = fabric.global_rank, fabric.world_size
        self._take_data(dataset)
        self._take_classifier(classifier)
        self.state = State()
        self.best: dict[str, Tensor] | None = None
        self.interruption = Interruption()
        self.saved_at = time.monotonic()
        # Of the steps since the last look, on the device: mean loss, correct predictions; and their number.
        self.losses: list[Tensor] = []
        self.correct: list[Tensor] = []
        self.counted = 0

    def _take_data(self, dataset: Dataset) -> None:
        config, device = self.config, self.fabric.device
        self.held_out: Dataset | None = None
        if config.validation_fraction > 0:
            dataset, held_out = dataset.split(config.validation_fraction, self.seed)
            self.held_out = held_out.to(device)
        self.data = dataset.to(device)
        self.steps = math.ceil(len(dataset) / config.batch_size)
        self.sizes = [
            len(part) for part in torch.arange(len(dataset)).tensor_split(max(self.steps, 1))
        ]
        if min(self.sizes) < self.processes or (
            self.held_out is not None and not len(self.held_out)
        ):
            held_out_count = 0 if self.held_out is None else len(self.held_out)
            raise InputError(
                f"dataset: {len(dataset)} images to train on and {held_out_count} held out are too few for "
                f"{self.processes} processes with batch_size {config.batch_size}, validation_fraction "
                f"{config.validation_fraction}."
            )

    def _take_classifier(self, classifier: nn.Module) -> None:
        config = self.config
        self.convolutional = any(isinstance(part, nn.Conv2d) for part in classifier.modules())
        if self.convolutional:
            # The memory format in which convolutions are fastest, on CPUs and GPUs.
            classifier = classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classifier = classifier
        self.model = self.fabric.setup_module(classifier)
        self.dtype = torch.float64 if config.precision == "64-true" else torch.float32
        self.parameters = [
            parameter for parameter in classifier.parameters() if parameter.requires_grad
        ]
        # Fabric would wrap the optimizer for gradient scaling and sharding; neither is used here.
        self.optimizer = _optimizer(self.parameters, config)
        self.average = None if config.ema is None else MovingAverage(classifier, config.ema)
        for part in self.model.modules():
            if isinstance(part, nn.parallel.DistributedDataParallel):
                # Before every forward pass the first process would impose its batch-norm statistics
                # on the others, and what these saw would be lost; they are averaged after the step.
                part.broadcast_buffers = False
        buffers = [buffer for buffer in classifier.buffers() if buffer.is_floating_point()]
        self.shared_buffers = buffers if self.processes > 1 else []

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.classifier if self.average is None else self.average.model

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.state.epoch >= self.config.epochs

    def run(self, progress: Progress, tell: Callable[[Mapping[str, Any]], object]) -> None:
        """Train from where the state stands to the end.

        Args:
            progress: Hears of the steps.
            tell: Is given each epoch's entry of the history.

        Raises:
            DivergenceError: The loss became NaN, infinite or larger than the limit.
            DataError: A file could not be written.
            KeyboardInterrupt: Ctrl-C was pressed; the state is saved.
        """
        with (
            own_generators(self.fabric.device),
            default_dtype(self.dtype),
            self.interruption.watched(),
        ):
            while not self.finished:
                self._epoch(progress)
                tell(self._finish_epoch())

    def _epoch(self, progress: Progress) -> None:
        state = self.state
        order = randomness.permutation(self.seed, len(self.data), stream=f"order/{state.epoch}")
        batches = torch.split(order, self.sizes)
        self.model.train()
        began = time.perf_counter()
        while state.step < self.steps:
            self._step(batches[state.step])
            state.step += 1
            if state.step % _LOOK_EVERY == 0 or state.step == self.steps or self._wants_look():
                self._look()
                now = time.perf_counter()
                state.seconds, began = state.seconds + now - began, now
                progress(state.epoch, state.step, state.loss / sum(self.sizes[: state.step]))
                self._save_where_due()

    def _step(self, positions: Tensor) -> None:
        state, mine = self.state, positions[self.rank :: self.processes]
        step = self._prepare(mine)
        rate = self.rate(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # For modules that draw from the global generators, such as dropout.
        seed_generators(
            self.fabric.device, derive(self.seed, "step", state.epoch, state.step, self.rank)
        )
        loss = self.method.loss(step)
        self.optimizer.zero_grad(set_to_none=True)
        # Processes average their gradients; where their shares of a batch differ, so do their weights.
        share = len(mine) / len(positions)
        self.fabric.backward(loss if self.processes == 1 else loss * (share * self.processes))
        if self.config.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        self.optimizer.step()
        if self.shared_buffers:
            self._average_buffers()
        if self.average is not None:
            self.average.update(state.epoch * self.steps + state.step + 1)
        self.losses.append(loss.detach() * share)
        self.correct.append(step.correct)
        self.counted += step.counted

    def _prepare(self, positions: Tensor) -> Step:
        epoch = self.state.epoch
        seed = derive(self.seed, "epoch", epoch)
        images, labels, codes, indices = self.data.batch(positions)
        if self.config.augmentation is not None:
            images, codes = self.config.augmentation(images, indices, seed), None
        images = images.to(self.dtype)
        if self.convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        precision = self.config.attack_precision
        return Step(
            self.model, self.classifier, images, labels, codes, indices, epoch, seed, precision
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step of the epoch under way: that of the schedule at the step's middle."""
        progress = self.state.epoch + (step + 0.5) / self.steps
        return self.config.learning_rate * self.config.schedule.factor(progress, self.config.epochs)

    @torch.no_grad()
    def _average_buffers(self) -> None:
        flat = torch.cat([buffer.flatten() for buffer in self.shared_buffers]) / self.processes
        parts = torch.split(self._total(flat), [buffer.numel() for buffer in self.shared_buffers])
        for buffer, part in zip(self.shared_buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.processes == 1:
            return tensor
        total = self.fabric.all_reduce(tensor.to(self.fabric.device), reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _wants_look(self) -> bool:
        """Whether there is something to do before the next look; several processes agree only on looks."""
        return self.processes == 1 and (self.interruption.wanted or self._overdue())

    def _overdue(self) -> bool:
        elapsed = time.monotonic() - self.saved_at
        return self.files is not None and elapsed >= 60 * self.config.checkpoint_minutes

    def _look(self) -> None:
        """Add up the steps since the last look, and stop where the loss diverged."""
        state = self.state
        losses = self._total(torch.stack(self.losses)).tolist()
        state.correct += int(self._total(torch.stack(self.correct).sum()))
        state.counted += int(self._total(torch.tensor(self.counted)))
        for step, loss in enumerate(losses, start=state.step - len(losses)):
            if not abs(loss) <= self.config.loss_limit:
                what = "became NaN" if math.isnan(loss) else f"grew to {loss:.4g}"
                raise self._divergence(f"The training loss {what}", step)
            state.loss += loss * self.sizes[step]
        self.losses, self.correct, self.counted = [], [], 0

    def _divergence(self, what: str, step: int) -> DivergenceError:
        message = (
            f"{what} in epoch {self.state.epoch + 1}, step {step + 1} of {self.steps}, at learning rate "
            f"{self.rate(step):.4g}. Try a smaller learning rate, a schedule that begins low, or gradient_clip."
        )
        if self.files is not None and self.files.last.exists():
            message += f" The last good state is kept in {self.files.last}."
        return DivergenceError(message)

    def _check_weights(self) -> None:
        """A finite loss may leave weights that are not finite: find them before they are kept."""
        tensors = [
            tensor for tensor in self.classifier.state_dict().values() if tensor.is_floating_point()
        ]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise self._divergence(
                "The weights became NaN or infinite", max(self.state.step - 1, 0)
            )

    def _save_where_due(self) -> None:
        wishes = torch.tensor([self.interruption.wanted, self._overdue()], dtype=torch.int32)
        interrupted, overdue = self._total(wishes).tolist()
        if interrupted or (overdue and self.state.step < self.steps):
            self.save()
        if interrupted:
            raise KeyboardInterrupt

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate, keep the best weights, write checkpoint and metrics."""
        state = self.state
        self._check_weights()
        clean, robust = self._validate()
        entry = {
            "epoch": state.epoch + 1,
            "train_loss": state.loss / len(self.data),
            "train_accuracy": state.correct / state.counted if state.counted else None,
            "validation_accuracy": clean,
            "validation_robust_accuracy": robust,
            "learning_rate": self.rate(self.steps - 1),
            "seconds": round(state.seconds, 3),
            "examples_per_second": round(len(self.data) / max(state.seconds, 1e-9), 1),
        }
        state.history.append(entry)
        state.next_epoch()
        # Without validation the latest weights are the best known; of equals, the later.
        score = float(state.epoch) if clean is None else clean if robust is None else robust
        if score >= state.score:
            state.score, state.best_epoch = score, state.epoch
            if self.files is None:
                self.best = {
                    name: tensor.clone() for name, tensor in self.kept.state_dict().items()
                }
            else:
                files = self.files
                self._together(lambda: files.keep_best(self.kept, entry))
        if state.epoch % self.config.checkpoint_epochs == 0 or self.finished:
            self.save()
        return entry

    def _validate(self) -> tuple[float | None, float | None]:
        if self.held_out is None:
            return None, None
        chosen = self.config.validation_attack
        return validate(
            self.kept,
            self.held_out,
            self.method.attacks if chosen is None else [chosen],
            seed=derive(self.seed, "validation"),
            precision=self.config.attack_precision,
            rank=self.rank,
            processes=self.processes,
            total=self._total,
        )

    def save(self) -> None:
        """Write the checkpoint; the first process does."""
        self._check_weights()
        self.saved_at = time.monotonic()
        if self.files is not None:
            files = self.files
            self._together(
                lambda: files.save(self.state, self.classifier, self.optimizer, self.average)
            )

    def _together(self, act: Callable[[], object], *, all_act: bool = False) -> None:
        """Let the first process act, or all; where one fails all stop, instead of waiting for it.

        Raises:
            DataError: Another process failed.
        """
        failure: Exception | None = None
        if all_act or self.rank == 0:
            try:
                act()
            except Exception as error:
                failure = error
        failures = int(self._total(torch.tensor(0 if failure is None else 1)))
        if failure is not None:
            raise failure
        if failures:
            raise DataError("Another process failed; its message says why.")

    def resume(self) -> None:
        """Continue from the directory's checkpoint, where there is one.

        Raises:
            CheckpointError: It is damaged, or belongs to another run.
        """
        if self.files is None:
            return
        # The initial weights of the first process are the run's; those of the others need not be the same.
        files = self.files

        def load() -> None:
            state = files.load(
                *(self.classifier, self.optimizer, self.parameters, self.average),
                check=self.rank == 0,
            )
            if state is not None:
                self.state = state
                if self.rank == 0:
                    files.write_metrics(state)

        self._together(load, all_act=True)

    def result(self) -> nn.Module:
        """The classifier with the best weights, in eval mode."""
        if self.files is not None:
            self.fabric.barrier()
            load_classifier(self.files.best, self.classifier)
        elif self.best is not None:
            self.classifier.load_state_dict(self.best)
        if self.convolutional:
            # As a user expects to find a module; other tools refuse weights in another memory format.
            self.classifier.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return self.classifier.eval()


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    # The fused form goes through memory once, on CPUs too.
    fused = (
        True if all(parameter.device.type in ("cpu", "cuda") for parameter in parameters) else None
    )
    if config.optimizer == "adam":
        return torch.optim.Adam(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return torch.optim.SGD(
        parameters,
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=fused,
    )
