"""What is hung into transformers' Trainer: batches, checks of the loss, evaluations, checkpoints, the polite end."""

from __future__ import annotations

import math
import shutil
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from loops.events import Note, Progress
from loops.finetune import checkpoints
from loops.finetune.session import Run, Stopped, diverged, peak_bytes
from state.files import explained, rename


class Checked:
    """What a Trainer does otherwise here; to stand before transformers' own among the parents.

    Attributes:
        run: the session.
        parent: transformers' Trainer.
    """

    run: Run
    parent: Any
    state: Any
    control: Any
    model: Any

    def training_step(self, *given: Any, **named: Any) -> Any:
        """Compute a batch, forth and back.

        Raises:
            TrainingDiverged: the loss is no number.
        """
        loss = self.parent.training_step(self, *given, **named)
        if not math.isfinite(float(loss)):
            raise diverged("loss", int(self.state.global_step), self.run.spec, self.run.device)
        return loss

    def evaluate(self, *_given: Any, **_named: Any) -> dict[str, float]:
        """Validate by the loss per token; stopped, it is made up for when the training goes on."""
        self.run.step = int(self.state.global_step)
        loss = self.run.validate(self.model, "validating")
        if loss is None:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        metrics = {"eval_loss": loss}
        trainer: Any = self
        trainer.log(dict(metrics))
        self.control = trainer.callback_handler.on_evaluate(trainer.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter, without the pickle of its arguments that the parent writes beside it."""
        self.model.save_pretrained(output_dir, state_dict=state_dict)


class Hooks:
    """What happens between the steps; to stand before transformers' TrainerCallback among the parents.

    Attributes:
        run: the session.
        trainer: that calls.
    """

    run: Run
    trainer: Any

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
        """Make up for an evaluation that was stopped."""
        run = self.run
        if state.global_step and _due(run, state.global_step) and state.global_step not in dict(
                checkpoints.evaluations(state.log_history)):
            self.trainer.evaluate()
        if run.course.stopped or state.global_step >= run.steps:  # else the Trainer would do one step more
            raise Stopped
        run.course.tokens, run.course.spoke = 0, time.monotonic()

    def on_step_end(self, _args: Any, state: Any, control: Any, **_named: Any) -> None:
        """Decide what follows a step."""
        run = self.run
        run.step = int(state.global_step)
        run.emit(Progress("training", "", run.step, run.steps))
        if _due(run, run.step):
            control.should_evaluate = True
        if run.step >= run.steps:
            control.should_save = True
        elif run.course.stop.is_set():
            run.course.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_evaluate(self, _args: Any, state: Any, control: Any, metrics: dict[str, float], **_named: Any) -> None:
        """Keep the best adapter; stop early."""
        run = self.run
        best, loss = checkpoints.best_step(state.log_history), metrics["eval_loss"]
        run.emit(Note(f"After step {run.step:,}: validation loss {loss:.4f}"
                      f"{', the best so far' if best == run.step else ''}."))
        if best == run.step:
            _keep_best(self.trainer.model, checkpoints.best_folder(run.folder, best))
        late = checkpoints.evaluations_since_best(state.log_history)
        if 0 < run.spec.patience <= late and run.step < run.steps:
            run.emit(Note(f"Stopping early: no better for {late} evaluation{'' if late == 1 else 's'}."))
            control.should_save = control.should_training_stop = True

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_named: Any) -> None:
        """Say how it goes."""
        if logs and "loss" in logs:
            _tell(self.run, state, logs)

    def on_save(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
        """Declare the checkpoint whole, then remove what is not kept."""
        run = self.run
        checkpoints.mark(run.folder / f"checkpoint-{state.global_step}", run.course.seconds,
                         max(run.course.earlier_peak, peak_bytes(run.device)))
        checkpoints.rotate(run.folder, run.spec.keep, checkpoints.best_step(state.log_history))


def make_trainer(run: Run, model: Any) -> Any:
    """Return a Trainer for a run; its class is made here because its parent is not installed everywhere."""
    transformers = import_module("transformers")
    spec, device = run.spec, run.device

    def collate(chosen: list[Any]) -> dict[str, Any]:
        batch = run.batch(chosen, spec.packing)
        run.course.tokens += int(batch["input_ids"].numel())
        return batch

    arguments = transformers.TrainingArguments(
        output_dir=str(run.folder), per_device_train_batch_size=spec.batch, max_steps=run.steps,
        gradient_accumulation_steps=spec.accumulation, learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule, warmup_steps=int(spec.warmup * run.steps),
        weight_decay=spec.weight_decay, max_grad_norm=spec.max_grad_norm,
        # QLoRA's own: moments go to the RAM where the GPU's memory runs short
        optim="paged_adamw_32bit" if device.name == "cuda" and device.four_bit else "adamw_torch",
        bf16=device.dtype == "bfloat16", fp16=device.dtype == "float16", use_cpu=device.name == "cpu",
        seed=spec.seed, data_seed=spec.seed, logging_steps=spec.log_every, logging_nan_inf_filter=False,
        save_strategy="steps", save_steps=spec.save_every, eval_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_num_workers=0, dataloader_pin_memory=device.name == "cuda",
        label_names=["labels"])
    hooks: Any = type("Hooks", (Hooks, transformers.TrainerCallback), {"run": run})()
    kind: Any = type("Trainer", (Checked, transformers.Trainer), {"run": run, "parent": transformers.Trainer})
    hooks.trainer = kind(model=model, args=arguments, train_dataset=list(run.trained), data_collator=collate,
                         callbacks=[hooks])
    hooks.trainer.remove_callback(transformers.PrinterCallback)
    return hooks.trainer


def _due(run: Run, step: int) -> bool:
    """Tell whether there is an evaluation after a step."""
    return bool(run.checked) and (step % run.spec.eval_every == 0 or step >= run.steps)


def _keep_best(model: Any, folder: Path) -> None:
    """Write the adapter there; the folder appears whole."""
    partial = folder.with_name(f"{folder.name}.part")
    with explained(folder):
        model.save_pretrained(str(partial))
        if folder.exists():
            shutil.rmtree(folder)
        rename(partial, folder)


def _tell(run: Run, state: Any, logs: dict[str, Any]) -> None:
    """Say in one line how the training goes."""
    now, course = time.monotonic(), run.course
    speed = course.tokens / max(1e-9, now - course.spoke)
    done = max(1, run.step - course.start)
    left = (now - course.began) / done * (run.steps - run.step)
    run.emit(Note(f"Step {run.step:,} of {run.steps:,}, epoch {state.epoch:.2f}: loss {logs['loss']:.4f}, learning "
                  f"rate {logs['learning_rate']:.2g}, {speed:,.0f} tokens/s, about {_duration(left)} left."))
    course.tokens, course.spoke = 0, now


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
