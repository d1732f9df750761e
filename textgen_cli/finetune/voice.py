"""What is done between the steps of a training: told, measured, saved, ended."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.events import Measured, Notice, Progress, Report
from textgen_cli.finetune import report as told
from textgen_cli.finetune.checkpoint import Store
from textgen_cli.finetune.course import Course, is_better
from textgen_cli.finetune.encode import Encoded
from textgen_cli.finetune.stop import Stop
from textgen_cli.model import device


class Voice(TrainerCallback):
    """Tells of steps and figures, decides what is evaluated and saved, and when it is enough."""

    def __init__(
        self, config: TrainingConfig, encoded: Encoded, store: Store, stop: Stop, report: Report
    ) -> None:
        self.config, self.encoded, self.store, self.stop, self.report = config, encoded, store, stop, report
        self.course: Course | None = None
        self.began = time.monotonic()
        self.tokens = (0, self.began)  # seen, when

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.tokens = state.num_input_tokens_seen, time.monotonic()  # what went before is no part of the rate

    def on_epoch_begin(
        self, args: Any, state: TrainerState, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        self.encoded.collate.epoch = int(state.epoch or 0)
        # In an epoch that a checkpoint broke in two the library does not reach the order of several processes.
        order = train_dataloader.batch_sampler
        while hasattr(order, "batch_sampler"):
            order = order.batch_sampler
        if hasattr(order.sampler, "set_epoch"):
            order.sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stop.check()
        self.stop.open = self.stop.group.alone

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stop.open = False
        self.stop.check()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.course is not None
        self.course.chance = device.random_state()
        self.stop.agree()
        self.report(Progress("train", self.course.base.name, state.global_step, state.max_steps, "steps"))
        if self._late():
            self.report(Notice(f"stopped after {self.config.max_time:g} s, as --max-time has it"))
            control.should_training_stop = control.should_evaluate = control.should_save = True
        control.should_evaluate = control.should_evaluate and self.encoded.valid is not None
        control.should_save = control.should_save or control.should_evaluate

    def _late(self) -> bool:
        """Whether --max-time is over, by the clock of any process."""
        limit = self.config.max_time
        return limit is not None and bool(self.stop.group.largest(time.monotonic() - self.began >= limit))

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.stop.agree()

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        # No stop here: the figures are logged, but not yet compared with the best.
        patience = self.config.patience
        if patience is not None and not is_better(args, state, metrics) and since_best(state) >= patience:
            self.report(Notice(f"stopped at step {state.global_step}: no better for {patience} evaluations"))
            control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        values = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        if "train_runtime" in values and "loss" not in values:
            return  # the summary of the whole, which run.py tells
        seen = state.num_input_tokens_seen
        if "loss" in values:
            now = time.monotonic()
            values["tokens_per_second"] = (seen - self.tokens[0]) / max(now - self.tokens[1], 1e-9)
            self.tokens = seen, now
        kept = {
            name: value
            for name, value in values.items()
            if not name.startswith("train_") and name not in _UNTOLD
        }
        if self.stop.group.leads:
            told.log(self.store.folder, state.global_step, kept | {"tokens": seen})
        self.report(Measured(state.global_step, kept))


_UNTOLD = {"total_flos", "num_input_tokens_seen", "eval_model_preparation_time"}


def since_best(state: TrainerState) -> int:
    """Evaluations since the best one."""
    later = [entry for entry in state.log_history if entry["step"] > (state.best_global_step or 0)]
    return sum("eval_loss" in entry for entry in later)


class CatchUp(TrainerCallback):
    """Does the evaluation that a stop cut off, before the first step behind it."""

    def __init__(self, course: Course) -> None:
        self.course = course

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        step, course = state.global_step, self.course
        due = args.eval_strategy != "no" and (step % state.eval_steps == 0 or step >= state.max_steps)
        done = any(entry["step"] == step and "eval_loss" in entry for entry in state.log_history)
        if due and step and not done and course.eval_dataset is not None:
            course._determine_best_metric(metrics=course.evaluate(), trial=None)
