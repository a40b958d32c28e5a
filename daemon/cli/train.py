"""`nightpress train`: a LoRA adapter on a model, from a dataset folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.options import AsJson, StateDir, print_json


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("train")(train)


def train(
    model_name: Annotated[str, typer.Option(
        metavar="DIR|HUB_ID|starter", help="The model to train: a folder, the id of one that was pulled, or the "
                                           "starter.", show_default=False)],
    dataset_path: Annotated[Path, typer.Option(
        metavar="DIR", help="Folder with train.json and validation.json.", show_default=False)],
    output_dir: Annotated[Path | None, typer.Option(
        "--output-dir", "-o", help="Folder for the adapter. Default: MODEL-DATASET-lora in this folder.",
        show_default=False)] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the rows.")] = 3.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows computed at once.")] = 4,
    gradient_accumulation_steps: Annotated[int, typer.Option(min=1, help="Batches to a step.")] = 4,
    learning_rate: Annotated[float, typer.Option(help="At its highest.")] = 2e-4,
    lr_scheduler: Annotated[str, typer.Option(
        metavar="cosine|linear|constant|constant_with_warmup", help="How it falls.")] = "cosine",
    warmup_ratio: Annotated[float, typer.Option(help="Share of the steps over which it rises.")] = 0.03,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.001,
    max_grad_norm: Annotated[float, typer.Option(help="To which gradients are clipped.")] = 0.3,
    lora_r: Annotated[int, typer.Option("--lora-r", min=1, help="Rank of the adapters.")] = 64,
    lora_alpha: Annotated[int, typer.Option(min=1, help="Their scale, times the rank.")] = 16,
    lora_dropout: Annotated[float, typer.Option(help="Share of their inputs that is left out.")] = 0.1,
    target_modules: Annotated[str | None, typer.Option(
        metavar="NAME,...", show_default=False,
        help="Modules to adapt. Default: of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj those "
             "that the model has.")] = None,
    no_4bit: Annotated[bool, typer.Option(
        "--no-4bit", help="Keep the base in 16 bits, on the CPU 32, instead of NF4.")] = False,
    double_quant: Annotated[bool, typer.Option(
        "--double-quant", help="Quantize the scales of NF4 too.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option(
        help="Compute activations again instead of keeping them: less memory, a third more time.")] = True,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens of a row; longer ones are cut at the left.")] = 2048,
    packing: Annotated[bool, typer.Option(
        "--packing", help="Several rows in one window, which do not see each other.")] = False,
    patience: Annotated[int, typer.Option(
        min=0, help="Stop after so many evaluations without improvement; 0 for never.")] = 0,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    eval_steps: Annotated[int, typer.Option(min=1, help="Steps between evaluations.")] = 100,
    save_total_limit: Annotated[int, typer.Option(min=1, help="Checkpoints to keep.")] = 3,
    logging_steps: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 10,
    chat_template: Annotated[str, typer.Option(
        metavar="chatml|plain|FILE", show_default=False,
        help="How conversations are written. Default: the model's own.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Another one orders rows and begins otherwise.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cuda|mps|cpu", help="Where to train.")] = "auto",
    threads: Annotated[int | None, typer.Option(
        min=1, help="Threads of the CPU. Default: one per processor.", show_default=False)] = None,
    force: Annotated[bool, typer.Option(
        "--force", help="Train although the memory may not suffice; replace another training in the folder.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Fine-tune a model on a dataset: a LoRA adapter on a base in 4 bits (QLoRA), by the loss of the answers alone.

    First it says what memory it will take, and refuses what does not fit. Ctrl-C writes a checkpoint; the same command
    goes on there, exactly. At the end the best adapter by validation loss is in the folder, with training.json.
    """
    from daemon.cli.display import Stages
    from daemon.cli.tables import console
    from daemon.settings import Settings
    from daemon.training import TrainSpec, find_model
    from daemon.training import train as run
    from daemon.workers import grip_of_signals
    from loops.finetune.record import verdict

    settings = Settings.load(state_dir=state_dir, threads=threads)
    model = find_model(model_name, settings)
    dataset = dataset_path.expanduser().absolute()
    output = output_dir.expanduser().absolute() if output_dir else Path.cwd() / f"{model.name}-{dataset.name}-lora"
    modules = tuple(name.strip() for name in (target_modules or "").split(",") if name.strip())
    spec = TrainSpec(
        model, dataset, output, epochs=epochs, batch=batch_size, accumulation=gradient_accumulation_steps,
        learning_rate=learning_rate, schedule=lr_scheduler, warmup=warmup_ratio, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, rank=lora_r, alpha=lora_alpha, dropout=lora_dropout, target_modules=modules,
        four_bit=not no_4bit, double_quant=double_quant, checkpointing=gradient_checkpointing, max_length=max_length,
        packing=packing, patience=patience, eval_every=eval_steps, seed=seed, template=chat_template, device=device,
        save_every=save_steps, log_every=logging_steps, keep=save_total_limit, threads=settings.threads, force=force)
    with Stages(console(stderr=True)) as stages, grip_of_signals() as grip:
        done = run(spec, settings, grip, stages.show)
    if json:
        print_json({"adapter": str(done.adapter), "was_there": done.was_there, **done.record})
        return
    if done.was_there:
        typer.echo(f"{done.adapter} was finished before; nothing was done.")
    typer.echo(verdict(done.record))
    typer.echo(f"Wrote {done.adapter}: {done.steps:,} steps in {done.seconds:,.0f} s on {done.device}, at most "
               f"{done.record['peak_bytes'] / 1e9:,.2f} GB of memory, base in "
               f"{'NF4' if done.four_bit else done.record['dtype']}.")
