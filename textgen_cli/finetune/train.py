"""The training itself: from a network to its best weights, through checkpoints, signals and measurings.

A step, a save or an evaluation that is cut off by a signal leaves the state of the last finished step, from which the
same weights come as if nothing had been. It knows no files but through the Store, and no task.
"""

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any

from transformers import PrinterCallback, TrainerState

from textgen_cli.config.finetune import TrainingConfig
from textgen_cli.errors import OutOfMemory, ResumeError
from textgen_cli.events import Notice, Report
from textgen_cli.finetune import report as told
from textgen_cli.finetune.checkpoint import RESTART, Found, Store
from textgen_cli.finetune.course import STATE, Course
from textgen_cli.finetune.encode import Encoded
from textgen_cli.finetune.evaluate import Evaluation
from textgen_cli.finetune.group import ALONE, Group
from textgen_cli.finetune.plan import arguments
from textgen_cli.finetune.stop import Stop, Stopped
from textgen_cli.finetune.voice import CatchUp, Voice, since_best
from textgen_cli.finetune.ways import Base
from textgen_cli.model import device


@dataclass(frozen=True)
class Trained:
    """How a training ended; the network holds the best weights and is otherwise as it was given."""

    step: int  # that they are of
    last: int  # steps done
    history: list[dict[str, Any]]
    before: dict[str, float]  # figures of the base on the held-out data
    after: dict[str, float]
    seconds: float


def _course(
    base: Base,
    encoded: Encoded,
    config: TrainingConfig,
    store: Store,
    evaluation: Evaluation,
    voice: Voice,
    rows: int,
    report: Report,
) -> Course:
    group = voice.stop.group
    args = arguments(config, base, rows, len(encoded.train), store.folder, group)
    better = evaluation.measure.best
    args.metric_for_best_model = "loss" if better == "perplexity" else better
    args.greater_is_better = evaluation.measure.more_is_better
    course = Course(
        base,
        store,
        encoded,
        config,
        group,
        report,
        args=args,
        callbacks=[voice],
        compute_metrics=evaluation,
        preprocess_logits_for_metrics=evaluation.keep,
    )
    course.remove_callback(PrinterCallback)
    voice.course = course
    return course


def train(
    base: Base,
    encoded: Encoded,
    config: TrainingConfig,
    rows: int,
    store: Store,
    found: Found | None,
    evaluation: Evaluation,
    report: Report,
    measure_more: Callable[[], Mapping[str, float]] = dict,
    group: Group = ALONE,
) -> Trained:
    """Train from the checkpoint `found`, else from the beginning, to the end.

    `measure_more`: figures of the network as it is that need whole answers. Raises ModelError E-DIVERGED, OutputError
    E-WRITE, ResumeError E-CHECKPOINT, OutOfMemory; at a signal it saves and lets the signal do what it did before.
    """
    stop = Stop(group)
    voice = Voice(config, encoded, store, stop, report)
    if group.leads:
        told.begin_log(store.folder, found.step if found else 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        course = _course(base, encoded, config, store, evaluation, voice, rows, report)
        began = time.monotonic()
        try:
            with stop.listening():
                _follow(course, found, voice, measure_more)
                best = _keep_best(course)
                stop.agree()
                with stop.opened():
                    after = _figures(course, measure_more) if encoded.valid is not None else {}
            course.release()
        except Stopped:
            _save_now(course)
            stop.pass_on()
            raise KeyboardInterrupt from None  # somebody ignores the signal that stopped us
        except UnpicklingError as error:
            fact = "a checkpoint holds what is no state of a training, and is not read"
            raise ResumeError("E-CHECKPOINT", str(store.folder), fact, hint=RESTART) from error
        except (RuntimeError, MemoryError) as error:
            if not device.out_of_memory(error):
                raise
            hint = "a smaller --batch-size with --accumulate, or --recompute; then --resume"
            raise OutOfMemory("E-MEMORY", base.name, "training needs more memory", hint=hint) from error
    before = next((line for line in told.read_log(store.folder) if line["step"] == 0), {})
    history = told.read_log(store.folder)
    seconds = time.monotonic() - began
    return Trained(best, course.state.global_step, history, _only_figures(before), after, seconds)


def _follow(
    course: Course, found: Found | None, voice: Voice, more: Callable[[], Mapping[str, float]]
) -> None:
    if found is None:
        if course.eval_dataset is not None:
            _log_before(course, voice, more)
        course.train()
        return
    state = TrainerState.load_from_json(str(found.folder / STATE))
    patience = voice.config.patience
    if patience is not None and since_best(state) >= patience:  # it was over, but for the finished folder
        course.state = state
        course.take(found.folder)
        return
    course.add_callback(CatchUp(course))
    voice.report(Notice(f"goes on from the checkpoint of step {found.step}", "hint"))
    course.train(resume_from_checkpoint=str(found.folder))


def _log_before(course: Course, voice: Voice, more: Callable[[], Mapping[str, float]]) -> None:
    """Measure the base, as the line of step 0."""
    with voice.stop.opened():
        course.evaluate()
        extra = dict(more())
    if extra:
        course.log({f"eval_{name}": value for name, value in extra.items()})
    course.begin_anew()


def _save_now(course: Course) -> None:
    """One more checkpoint, of the last whole step, where there is none yet."""
    if course.chance is not None:
        device.restore_random(course.chance)
    step = course.state.global_step
    taken = [path.name for path in course.store.checkpoints()]
    if step and not course.settled and f"checkpoint-{step}" not in taken and course.optimizer is not None:
        course._save_checkpoint(course.model)


def _keep_best(course: Course) -> int:
    """Give the network the best weights; returns the step that they are of."""
    course.settled = True
    best: int = course.state.best_global_step or course.state.global_step
    if best != course.state.global_step:
        course._load_from_checkpoint(str(course.store.folder / f"checkpoint-{best}"))
    return best


def _figures(course: Course, more: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """What the network, which holds the best weights, makes of the held-out data."""
    best = course.state.best_global_step or course.state.global_step
    if course.measured is not None and course.measured[0] == best == course.state.global_step:
        return _only_figures(course.measured[1]) | dict(more())
    handler, course.callback_handler.callbacks = course.callback_handler.callbacks, []
    try:
        return _only_figures(course.evaluate()) | dict(more())
    finally:
        course.callback_handler.callbacks = handler


def _only_figures(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for name, value in values.items()
        if name.startswith("eval_") and not name.endswith(("runtime", "per_second", "preparation_time"))
    }
