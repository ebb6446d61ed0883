"""The one training loop. It knows no method and no generator: a task yields losses, the loop does the rest.

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

from onmanifold.data.dataset import Batch
from onmanifold.foundation import randomness
from onmanifold.foundation.errors import DivergenceError, InputError
from onmanifold.training.config import TrainingConfig
from onmanifold.training.ema import MovingAverage
from onmanifold.training.guard import Interruption, default_dtype, own_generators, seed_generators
from onmanifold.training.log import Progress
from onmanifold.training.optimizers import make_optimizer
from onmanifold.training.share import Share
from onmanifold.training.state import RunFiles, State
from onmanifold.training.task import Place, Record, Task, Turn

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
    """One run of a task; `train` and `fit` are its public faces.

    Args:
        task: What is trained.
        dataset: The training images; a share of them is held out for validation.
        config: How it is run.
        seed: Of the order of the images, and of all else that is random.
        files: Where checkpoint, best weights and metrics go; None: nowhere.
        fabric: Devices and processes, launched.
    """

    def __init__(
        self,
        task: Task,
        dataset: Dataset,
        config: TrainingConfig,
        seed: int,
        files: RunFiles | None,
        fabric: Fabric,
    ) -> None:
        self.task, self.config, self.seed, self.fabric = task, config, seed, fabric
        self.files = files
        self.share = Share.across(fabric)
        self._take_data(dataset)
        self._take_networks()
        self.state = State()
        self.best: dict[str, dict[str, Tensor]] | None = None
        self.interruption = Interruption()
        self.saved_at = time.monotonic()
        # Of the steps since the last look, on the device.
        self.losses: list[Tensor] = []
        self.record = Record()

    def _take_data(self, dataset: Dataset) -> None:
        config, device, processes = self.config, self.fabric.device, self.share.processes
        self.held_out: Dataset | None = None
        if config.validation_fraction > 0:
            dataset, held_out = dataset.split(config.validation_fraction, self.seed)
            self.held_out = held_out.to(device)
        self.data = dataset.to(device)
        self.steps = math.ceil(len(dataset) / config.batch_size)
        self.sizes = [
            len(part) for part in torch.arange(len(dataset)).tensor_split(max(self.steps, 1))
        ]
        if min(self.sizes) < processes or (self.held_out is not None and not len(self.held_out)):
            held_out_count = 0 if self.held_out is None else len(self.held_out)
            raise InputError(
                f"dataset: {len(dataset)} images to train on and {held_out_count} held out are too few for "
                f"{processes} processes with batch_size {config.batch_size}, validation_fraction "
                f"{config.validation_fraction}."
            )

    def _take_networks(self) -> None:
        config, task = self.config, self.task
        self.dtype = torch.float64 if config.precision == "64-true" else torch.float32
        for module in task.modules.values():
            module.to(self.fabric.device, self.dtype)
            if task.convolutional:
                # The memory format in which convolutions are fastest, on CPUs and GPUs.
                module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if self.share.processes > 1:
                # The initial weights of the first process are the run's.
                weights = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
                module.load_state_dict(self.fabric.broadcast(weights))
        task.autocast = self.fabric.autocast
        self.parameters = {
            name: [parameter for parameter in player.parameters() if parameter.requires_grad]
            for name, player in task.players.items()
        }
        # Fabric would wrap the optimizers for gradient scaling and sharding; neither is used here.
        self.optimizers = {
            name: make_optimizer(parameters, config) for name, parameters in self.parameters.items()
        }
        self.average = None if config.ema is None else MovingAverage(task.model, config.ema)
        buffers = [
            buffer
            for module in task.modules.values()
            for buffer in module.buffers()
            if buffer.is_floating_point()
        ]
        self.shared_buffers = buffers if self.share.processes > 1 else []

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.task.model if self.average is None else self.average.model

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
            if self.state.epoch == self.state.step == 0:
                self._start()
            while not self.finished:
                self._epoch(progress)
                tell(self._finish_epoch())

    def _start(self) -> None:
        """What depends on data: from the whole first batch, so that all processes do the same."""
        self._train_mode()
        seed_generators(self.fabric.device, derive(self.seed, "start"))
        self.task.start(self._batch(self._batches()[0]))
        if self.average is not None:
            self.average.model.load_state_dict(self.task.model.state_dict())

    def _batches(self) -> tuple[Tensor, ...]:
        """The positions of the images of each step of the epoch under way."""
        stream = f"order/{self.state.epoch}"
        order = randomness.permutation(self.seed, len(self.data), stream=stream)
        return torch.split(order, self.sizes)

    def _train_mode(self) -> None:
        for module in self.task.modules.values():
            module.train()

    def _epoch(self, progress: Progress) -> None:
        state, batches = self.state, self._batches()
        self._train_mode()
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
        state, mine = self.state, positions[self.share.rank :: self.share.processes]
        rate = self.rate(state.step)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * self.task.rates.get(name, 1.0)
        batch = self._batch(mine)
        # For modules that draw from the global generators, such as dropout.
        seed_generators(
            self.fabric.device, derive(self.seed, "step", state.epoch, state.step, self.share.rank)
        )
        number = state.epoch * self.steps + state.step
        total = self.config.epochs * self.steps
        # Processes add up their gradients; their shares of a batch may differ in size.
        share, loss = len(mine) / len(positions), torch.zeros((), device=self.fabric.device)
        seed = derive(self.seed, "epoch", state.epoch)
        place = Place(state.epoch, number, total, seed, share, self.share.total)
        for turn in self.task.turns(batch, place, self.record):
            self._move(turn, share)
            # A loss that several players follow counts once.
            parts = {id(part): part.detach() for part in turn.values()}
            loss = loss + torch.stack(list(parts.values())).sum()
            if len(self.optimizers) > 1:
                for name, part in turn.items():
                    self.record.add(f"loss_{name}", part * len(mine), len(mine))
        if self.shared_buffers:
            self.share.average(self.shared_buffers)
        if self.average is not None:
            self.average.update(number + 1)
        self.losses.append(loss * share)

    def _move(self, turn: Turn, share: float) -> None:
        """Let each player of a turn follow the gradient of its loss."""
        for name in turn:
            self.optimizers[name].zero_grad(set_to_none=True)
        for place, (name, loss) in enumerate(turn.items(), start=1):
            # Of one player all parameters are meant, which autograd finds by itself.
            only: dict[str, Any] = {}
            if len(self.optimizers) > 1:
                only["inputs"] = self.parameters[name]
            last = place == len(turn)
            scaled = loss if self.share.processes == 1 else loss * share
            self.fabric.backward(scaled, retain_graph=not last, **only)
        for name in turn:
            parameters = self.parameters[name]
            if self.share.processes > 1:
                self.share.sum_gradients(parameters)
            if self.config.gradient_clip is not None:
                nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            self.optimizers[name].step()

    def _batch(self, positions: Tensor) -> Batch:
        images, labels, codes, indices = self.data.batch(positions)
        if self.config.augmentation is not None:
            seed = derive(self.seed, "epoch", self.state.epoch)
            images, codes = self.config.augmentation(images, indices, seed), None
        images = images.to(self.dtype)
        if self.task.convolutional:
            images = images.contiguous(memory_format=torch.channels_last)
        return Batch(images, labels, codes, indices)

    def rate(self, step: int) -> float:
        """The learning rate of a step of the epoch under way: that of the schedule at the step's middle."""
        progress = self.state.epoch + (step + 0.5) / self.steps
        return self.config.learning_rate * self.config.schedule.factor(progress, self.config.epochs)

    def _wants_look(self) -> bool:
        """Whether there is something to do before the next look; several processes agree only on looks."""
        return self.share.processes == 1 and (self.interruption.wanted or self._overdue())

    def _overdue(self) -> bool:
        elapsed = time.monotonic() - self.saved_at
        return self.files is not None and elapsed >= 60 * self.config.checkpoint_minutes

    def _look(self) -> None:
        """Add up the steps since the last look, and stop where the loss diverged."""
        state, record = self.state, self.record
        losses = self.share.total(torch.stack(self.losses)).tolist()
        for step, loss in enumerate(losses, start=state.step - len(losses)):
            if not abs(loss) <= self.config.loss_limit:
                what = "became NaN" if math.isnan(loss) else f"grew to {loss:.4g}"
                raise self._divergence(f"The training loss {what}", step)
            state.loss += loss * self.sizes[step]
        for name, summed in sorted(record.sums.items()):
            parts = torch.stack([summed, torch.full_like(summed, record.counts[name])])
            before, new = state.logged.get(name, (0.0, 0.0)), self.share.total(parts).tolist()
            state.logged[name] = [before[0] + new[0], before[1] + new[1]]
        self.losses, self.record = [], Record()

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
            tensor
            for module in self.task.modules.values()
            for tensor in module.state_dict().values()
            if tensor.is_floating_point()
        ]
        if not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all()):
            raise self._divergence(
                "The weights became NaN or infinite", max(self.state.step - 1, 0)
            )

    def _save_where_due(self) -> None:
        wishes = torch.tensor([self.interruption.wanted, self._overdue()], dtype=torch.int32)
        interrupted, overdue = self.share.total(wishes).tolist()
        if interrupted or (overdue and self.state.step < self.steps):
            self.save()
        if interrupted:
            raise KeyboardInterrupt

    def _finish_epoch(self) -> dict[str, Any]:
        """Validate, keep the best weights, write checkpoint and metrics."""
        state = self.state
        self._check_weights()
        measured = self.task.validate(
            self.kept, self.held_out, derive(self.seed, "validation"), self.share
        )
        entry = {
            "epoch": state.epoch + 1,
            "train_loss": state.loss / len(self.data),
            **{f"train_{name}": mean for name, mean in state.means()},
            **{f"validation_{name}": value for name, value in measured.items()},
            "learning_rate": self.rate(self.steps - 1),
            "seconds": round(state.seconds, 3),
            "examples_per_second": round(len(self.data) / max(state.seconds, 1e-9), 1),
        }
        state.history.append(entry)
        state.next_epoch()
        # Without a score the latest weights are the best known; of equals, the later.
        found = self.task.score(entry)
        score = float(state.epoch) if found is None else found
        if score >= state.score:
            state.score, state.best_epoch = score, state.epoch
            self._keep_best(entry)
        every = self.config.snapshot_epochs
        if every is not None and (state.epoch % every == 0 or self.finished):
            self._keep_snapshot(entry)
        if self.files is not None:
            pictures = self.files.directory / "pictures"
            self.share.together(
                lambda: self.task.illustrate(self.kept, self.held_out, pictures, state.epoch)
            )
        if state.epoch % self.config.checkpoint_epochs == 0 or self.finished:
            self.save()
        return entry

    def _keep_best(self, entry: Mapping[str, Any]) -> None:
        if self.files is None:
            self.best = {
                name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
                for name, module in {**self.task.modules, "model": self.kept}.items()
            }
            return
        best = self.files.best
        self.share.together(lambda: self.task.keep(self.kept, best, _metadata(entry)))

    def _keep_snapshot(self, entry: Mapping[str, Any]) -> None:
        """Before the checkpoint: a training that is continued after this epoch has it."""
        if self.files is not None:
            path = self.files.snapshot(self.state.epoch)
            self.share.together(lambda: self.task.keep_model(self.kept, path, _metadata(entry)))

    def save(self) -> None:
        """Write the checkpoint; the first process does."""
        self._check_weights()
        self.saved_at = time.monotonic()
        if self.files is not None:
            files = self.files
            self.share.together(
                lambda: files.save(self.state, self.task.modules, self.optimizers, self.average)
            )

    def resume(self) -> None:
        """Continue from the directory's checkpoint, where there is one.

        Raises:
            CheckpointError: It is damaged, or belongs to another run.
        """
        if self.files is None:
            return
        files, first = self.files, self.share.rank == 0

        def load() -> None:
            state = files.load(
                *(self.task.modules, self.optimizers, self.parameters, self.average), check=first
            )
            if state is not None:
                self.state = state
                if first:
                    files.write_metrics(state)

        self.share.together(load, all_act=True)

    def result(self) -> nn.Module:
        """The model with the best weights, in eval mode; what a task keeps beside it is as it was then too."""
        task = self.task
        if self.files is not None:
            self.fabric.barrier()
            task.restore(self.files.best)
        elif self.best is not None:
            for name, module in task.modules.items():
                module.load_state_dict(self.best[name])
        if task.convolutional:
            # As a user expects to find a module; other tools refuse weights in another memory format.
            for module in task.modules.values():
                module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return task.model.eval()


def _metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept beside weights: of which epoch they are, and what was measured of them."""
    return {
        name: value
        for name, value in entry.items()
        if name == "epoch" or name.startswith("validation_")
    }
