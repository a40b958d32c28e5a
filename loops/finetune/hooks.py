"""What is hung into transformers' Trainer: batches, checks of the loss, evaluations, checkpoints, the polite end."""

from __future__ import annotations

import shutil
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from loops.events import Note, Progress
from loops.finetune import checkpoints
from loops.finetune.session import Run, Stopped, diverged, peak_bytes
from state.files import explained, rename


def make_trainer(run: Run, model: Any) -> Any:
    """Return a Trainer for a run; its classes are made here because their parents are not installed everywhere."""
    from transformers import PrinterCallback, TrainerCallback, TrainingArguments
    from transformers import Trainer as Parent

    torch = import_module("torch")
    spec, device = run.spec, run.device

    class Trainer(Parent):  # type: ignore[misc]  # of a library without types
        control: Any

        def training_step(self, *given: Any, **named: Any) -> Any:
            loss = super().training_step(*given, **named)
            if not bool(torch.isfinite(loss)):
                raise diverged("loss", int(self.state.global_step), spec, device)
            return loss

        def evaluate(self, *_given: Any, **_named: Any) -> dict[str, float]:
            run.step = int(self.state.global_step)
            loss = run.validate(self.model, "validating")
            if loss is None:  # stopped: the evaluation is made up for when the training goes on
                self.control.should_save = self.control.should_training_stop = True
                return {}
            metrics = {"eval_loss": loss}
            self.log(dict(metrics))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # without the pickle of its arguments that the parent writes
            self.model.save_pretrained(output_dir, state_dict=state_dict)

    class Hooks(TrainerCallback):  # type: ignore[misc]  # of a library without types
        def on_train_begin(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
            if state.global_step and _due(run, state.global_step) and state.global_step not in dict(
                    checkpoints.evaluations(state.log_history)):
                trainer.evaluate()
            if run.course.stopped or state.global_step >= run.steps:  # else the Trainer would do one step more
                raise Stopped
            run.course.tokens, run.course.spoke = 0, time.monotonic()

        def on_step_end(self, _args: Any, state: Any, control: Any, **_named: Any) -> None:
            run.step = int(state.global_step)
            run.emit(Progress("training", "", run.step, run.steps))
            if _due(run, run.step):
                control.should_evaluate = bool(run.checked)
            if run.step >= run.steps:
                control.should_save = True
            elif run.course.stop.is_set():
                run.course.stopped = control.should_save = control.should_training_stop = True
                control.should_evaluate = False

        def on_evaluate(self, _args: Any, state: Any, control: Any, metrics: dict[str, float], **_named: Any) -> None:
            best, loss = checkpoints.best_step(state.log_history), metrics["eval_loss"]
            run.emit(Note(f"After step {run.step:,}: validation loss {loss:.4f}"
                          f"{', the best so far' if best == run.step else ''}."))
            if best == run.step:
                _keep_best(trainer.model, checkpoints.best_folder(run.folder, best))
            late = checkpoints.evaluations_since_best(state.log_history)
            if spec.patience and late >= spec.patience and run.step < run.steps:
                run.emit(Note(f"Stopping early: no better for {late} evaluation{'' if late == 1 else 's'}."))
                control.should_save = control.should_training_stop = True

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None,
                   **_named: Any) -> None:
            if logs and "loss" in logs:
                _tell(run, state, logs)

        def on_save(self, _args: Any, state: Any, _control: Any, **_named: Any) -> None:
            made = run.folder / f"checkpoint-{state.global_step}"
            checkpoints.mark(made, run.course.seconds, max(run.course.earlier_peak, peak_bytes(device)))
            checkpoints.rotate(run.folder, spec.keep, checkpoints.best_step(state.log_history))

    def collate(chosen: list[Any]) -> dict[str, Any]:
        batch = run.batch(chosen, spec.packing)
        run.course.tokens += int(batch["input_ids"].numel())
        return batch

    arguments = TrainingArguments(
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
    trainer = Trainer(model=model, args=arguments, train_dataset=list(run.trained), data_collator=collate,
                      callbacks=[Hooks()])
    trainer.remove_callback(PrinterCallback)
    return trainer


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
