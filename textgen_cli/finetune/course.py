"""transformers' Trainer with whole checkpoints, an order by length, and a stop at a loss that is no number."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.errors import ModelError, OutputError, UsageError
from textgen_cli.events import Report
from textgen_cli.finetune import divide, thrift, zero
from textgen_cli.finetune.checkpoint import Store
from textgen_cli.finetune.division import ZERO, Division, Zero
from textgen_cli.finetune.encode import Encoded
from textgen_cli.finetune.group import Group
from textgen_cli.finetune.ways import Base, save_net
from textgen_cli.model import device

STATE, SCHEDULER = "trainer_state.json", "scheduler.pt"


class ByLength(Sampler[int]):
    """Rows of like length beside one another, in an order that the seed and the epoch decide alone.

    Little is padded. But a network that begins at random learns later from such batches, if at all, which word of one
    text belongs to which of the other (docs/results.md).
    """

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=order))


class Course(Trainer):
    """A Trainer that saves whole checkpoints, stops at a loss that is no number and leaves its random state alone.

    Where a group divides the weights by FSDP, it is given a network that is divided already.
    """

    def __init__(
        self,
        base: Base,
        store: Store,
        encoded: Encoded,
        config: TrainingConfig,
        group: Group,
        report: Report,
        **rest: Any,
    ) -> None:
        # What the library changes of the network: its forward pass, its settings.
        self.given = vars(base.net).get("forward"), getattr(base.net.config, "use_cache", None)
        self.group, self.divided = group, group.division is not None
        self.fsdp, self.zero = isinstance(group.division, Division), isinstance(group.division, Zero)
        super().__init__(
            model=base.net,
            train_dataset=encoded.train,
            eval_dataset=encoded.valid,
            data_collator=encoded.collate,
            **rest,
        )
        self.base, self.store, self.keep = base, store, config.keep
        if self.fsdp:
            # A network whose parts are in place is not to be copied to every process; precision alone is to be set.
            self.accelerator.prepare_model(base.net, device_placement=False, evaluation_mode=True)
            base.net._is_accelerate_prepared = True
        self.by_length = (config.order or ("random" if base.fresh else "length")) == "length"
        self.lengths = encoded.lengths
        # Others take the number of tokens and leave it aside: accumulated batches would count N times.
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and base.family == "causal"
        self.chance: Any = None  # its state after the last whole step
        self.measured: tuple[int, dict[str, float]] | None = None  # the last evaluation, and after which step
        self.settled = False  # the network holds the best weights, not the last
        self.thrift = thrift.Thrift()
        if not self.divided:  # else a layer's weights are whole in its own forward alone
            first = self._prepare_inputs(dict(encoded.collate([encoded.train[0]])))
            self.thrift = thrift.found(base, first, self.model_accepts_loss_kwargs, config.recompute, report)
        if self.thrift.spared is not None:
            self.preprocess_logits_for_metrics = lambda told, labels: told

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with self.thrift.holding():
            return super().compute_loss(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.thrift.measuring():
            loss, logits, labels = super().prediction_step(*args, **kwargs)
        return loss, logits if self.thrift.spared is None else self.thrift.spared.told, labels

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if len(set(self.lengths)) == 1 or not self.by_length:
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.group.size
        return ByLength(self.lengths, rows, self.args.seed)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.thrift.learning():
            loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise diverged(self.base.name, self.state.global_step + 1)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        before = device.random_state()
        try:
            with self._undivided():
                figures = super().evaluate(*args, **kwargs)
            self.measured = self.state.global_step, figures
            return figures
        finally:
            device.restore_random(before)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The library's; but its loss is a mean over batches, whatever they hold: ours is over all tokens alike."""
        found = super().evaluation_loop(*args, **kwargs)
        if found.metrics and "eval_perplexity" in found.metrics:
            found.metrics["eval_loss"] = math.log(found.metrics["eval_perplexity"])
        return found

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """The library's; but where the figure is as good as the best, the lower loss is better."""
        if not is_better(self.args, self.state, metrics):
            return False
        self.state.best_metric = metrics[f"eval_{self.args.metric_for_best_model}"]
        self.state.best_global_step = self.state.global_step
        return True

    def begin_anew(self) -> None:
        """Forget that the network was made ready to be evaluated: the library would take it as ready to learn, and
        of several processes each would go its own way without a word."""
        if (self.group.size > 1 and not self.divided) or self.zero:
            self.accelerator._models.clear()
            vars(self.model).pop("_is_accelerate_prepared", None)
        self.state.log_history.clear()

    def release(self) -> None:
        """Leave the network as it was given: without the half precision that was put around it."""
        forward, cached = self.given
        for name in ("forward", "_original_forward"):
            vars(self.base.net).pop(name, None)
        if forward is not None:
            self.base.net.forward = forward
        if cached is not None:
            self.base.net.config.use_cache = cached

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        step = self.state.global_step
        own = zero.own if self.zero else divide.own
        if self.group.largest(not all(part.isfinite().all() for part in own(self.base.net).values())):
            raise diverged(self.base.name, step)
        self.store_flos()
        try:
            with self._saving(step) as folder:
                if self.group.leads and not self.divided:
                    save_net(self.model, folder)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                self.state.best_model_checkpoint = None  # a path; the step is told by best_global_step
                if self.group.leads:
                    self.state.save_to_json(str(folder / STATE))
        except (OSError, RuntimeError, SafetensorError) as error:
            if device.out_of_memory(error):
                raise
            # torch and safetensors have errors of their own for a disk that is full
            fact = f"checkpoint of step {step}: {str(error).partition(chr(10))[0]}"
            raise OutputError("E-WRITE", str(self.store.folder), fact, hint=_AGAIN) from error

    # --- where each process has a part of the weights

    def _move_model_to_device(self, *args: Any) -> None:
        if not self.divided:
            super()._move_model_to_device(*args)

    def create_optimizer(self, *args: Any) -> Any:
        divide.own(self.base.net)  # an evaluation may have left whole weights behind
        return super().create_optimizer(*args)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        prepare: Any = super()._prepare_for_training
        if not self.zero:
            return prepare(max_steps, train_dataloader, checkpoint)
        try:
            prepared = prepare(max_steps, train_dataloader, None)
        except zero.FAULTS as error:
            raise zero.refused(error) from error
        except (RuntimeError, OSError) as error:
            if not zero.unbuilt(error):
                raise
            fact = "DeepSpeed cannot compile what it needs for it"
            raise UsageError("E-CONFLICT", ZERO, fact, hint="install a C++ compiler and ninja") from error
        zero.careful(self.deepspeed)
        if checkpoint is not None:
            zero.load(self.deepspeed, Path(checkpoint))
            self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    def take(self, checkpoint: Path) -> None:
        """The network of the checkpoint of a training that is over."""
        if self.zero:  # which holds no network before it is ready to train
            self._prepare_for_training(self.state.max_steps, None, str(checkpoint))
        else:
            self._load_from_checkpoint(str(checkpoint))

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Where DeepSpeed has not begun yet, the network is whole: so the library is to take it."""
        if not self.zero or self.deepspeed is not None:
            yield
            return
        self.is_deepspeed_enabled = False
        try:
            with torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.base.autocast):
                yield
        finally:
            self.is_deepspeed_enabled = True

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, scheduler = Path(output_dir), cast(Any, self.lr_scheduler)
        if not self.divided:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.zero:
            zero.save(self.deepspeed, folder)
        else:
            divide.save_own(self.model, self.optimizer, folder, self.group.number)
        if self.group.leads:
            torch.save(scheduler.state_dict(), folder / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.zero:
            zero.load(self.deepspeed, Path(resume_from_checkpoint))
        elif self.fsdp:
            divide.load_own(self.model, Path(resume_from_checkpoint), self.group.number)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.divided or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.fsdp:
            divide.load_moments(self.optimizer, Path(checkpoint), self.group.number)
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    @contextmanager
    def _saving(self, step: int) -> Iterator[Path]:
        """A folder for the checkpoint of `step`; the first process makes it, and names it when all have written."""
        if self.group.leads:
            with self.store.saving(step) as folder:
                self.group.wait()
                yield folder
                self.group.wait()
            self.store.rotate(self.keep, self.state.best_global_step)
        else:
            self.group.wait()
            yield self.store.staged(step)
            self.group.wait()
        self.group.wait()


def is_better(args: TrainingArguments, state: TrainerState, metrics: Mapping[str, float]) -> bool:
    """Whether an evaluation is better than the best before it: by its figure, where that is equal by its loss."""
    value = metrics[f"eval_{args.metric_for_best_model}"]
    if state.best_metric is None:
        return not math.isnan(value)
    if value == state.best_metric:
        losses = [
            e["eval_loss"]
            for e in state.log_history
            if e["step"] == state.best_global_step and "eval_loss" in e
        ]
        return bool(losses) and metrics["eval_loss"] < losses[-1]
    return value > state.best_metric if args.greater_is_better else value < state.best_metric


_AGAIN = "mend that, then run it again with --resume"


def diverged(name: str, step: int) -> ModelError:
    """The error of a loss or weights that are no numbers."""
    hint = "a smaller --learning-rate, or a warm-up"
    return ModelError("E-DIVERGED", name, f"step {step}: the loss is no number any more", hint=hint)
