"""`nightpress calibration generate`: calibration text written by a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.options import AsJson, StateDir, print_json

if TYPE_CHECKING:
    from calibration_data.briefs import Brief
    from calibration_data.catalogue import Catalogue
    from calibration_data.journal import Journal
    from calibration_data.text import Sample
    from daemon.generating import Order, Tally
    from daemon.grip import Grip
    from daemon.settings import Settings

PROVIDERS = ("anthropic", "openai", "local")
AT_ONCE = {"anthropic": 4, "openai": 4, "local": 16}  #: --concurrency, unless told


def generate(
    domain: Annotated[str | None, typer.Option(
        help="More text like this domain's; its samples are the examples.", show_default=False)] = None,
    custom_purpose: Annotated[str | None, typer.Option(
        metavar="TEXT", help="What the model will be used for, in a sentence.", show_default=False)] = None,
    custom_examples: Annotated[list[str] | None, typer.Option(
        metavar="FILE|TEXT", help="An example of what is wanted, or a file of them; repeat for more.",
        show_default=False)] = None,
    num_samples: Annotated[int, typer.Option(min=1, max=10_000, help="Samples to generate.")] = 250,
    provider: Annotated[str, typer.Option(
        help="anthropic or openai, with a key in the environment, or local: a GGUF on this machine.")] = "anthropic",
    model: Annotated[str | None, typer.Option(
        help="As the provider calls it; with local the path of a GGUF. Default: a small one of the provider's, with "
             "local the starter.", show_default=False)] = None,
    language: Annotated[str, typer.Option(help="Two-letter code, or several with commas between.")] = "en",
    name: Annotated[str | None, typer.Option(
        help="Of the domain that comes of it. Default: from the domain or the purpose.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(
        "--output", "-o", help="Where to write. Default: NAME.txt in your folder of domains.",
        show_default=False)] = None,
    licence: Annotated[str, typer.Option(help="What the file's header says of it.")] = "generated",
    concurrency: Annotated[int | None, typer.Option(
        min=1, max=64, help="Requests at once; with local replies at once. Default: 4, with local 16.",
        show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, max=1_000_000, help="Another one varies the requests otherwise.")] = 0,
    price_in: Annotated[float | None, typer.Option(
        min=0.0, help="Price of a million tokens sent, to tell the cost.", show_default=False)] = None,
    price_out: Annotated[float | None, typer.Option(
        min=0.0, help="Price of a million tokens received.", show_default=False)] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the provider is asked.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an interrupted command kept.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    state_dir: StateDir = None,
    json: AsJson = False,
) -> None:
    """Let a model write calibration text for a domain, or for a purpose of yours.

    Says first about how many tokens it takes, and asks whether to go ahead. The purpose and the examples go to the
    provider. Samples that repeat others, the domains that ship, or text that models are judged by are dropped.
    Ctrl-C keeps what there is; the same command goes on.
    """
    from dataclasses import replace

    from calibration_data.briefs import GenerationRefused, fingerprint
    from calibration_data.catalogue import Catalogue
    from calibration_data.generator import finish
    from calibration_data.journal import open_journal
    from calibration_data.text import Header, write
    from daemon.cli.calibration import check_output, write_text
    from daemon.generating import tally
    from daemon.settings import config_dir
    from state.clock import utc_now
    from state.files import explained, make_folder

    if provider not in PROVIDERS:
        raise GenerationRefused(f"{provider[:40]!r} is no provider. Those there are: {', '.join(PROVIDERS)}.")
    if not (said := " ".join(licence.split())).isprintable() or not said:
        raise GenerationRefused("--licence is empty or no plain text.")
    catalogue = Catalogue(config_dir() / "calibration")
    brief = _brief(catalogue, domain, custom_purpose, custom_examples or [], language)
    if name is not None or output is not None:
        brief = replace(brief, name=name if name is not None else _slug(output.stem if output else ""))
    file = output.expanduser() if output else config_dir() / "calibration" / f"{brief.name}.txt"
    if output is None:
        _check_free(brief.name)
        with explained(file.parent):
            make_folder(file.parent, 0o700)
    check_output(file, force=force)
    order, called = _order(brief, num_samples, provider, model, concurrency, seed)
    request = fingerprint(brief, provider=provider, model=called, seed=seed)
    prices = _prices(price_in, price_out)
    with open_journal(file.with_name(f".{file.name}.partial"), request, f"{provider}, {called}, {brief.name}",
                      fresh=fresh) as journal:
        before = len(journal.samples)
        if before < num_samples:
            _write_samples(order, called, journal, catalogue, state_dir, prices, yes=yes)
        header = Header(brief.name, ", ".join(brief.languages), said,
                        f"generated by Nightpress with {provider} ({called}) on {utc_now()[:10]}, request {request}")
        samples = finish(journal.samples[:num_samples], header)
        write_text(file, write(samples), force=force)
        done = tally(journal)
        if before <= num_samples:
            journal.remove()
    _tell(file, samples, done, before, prices, as_json=json)


def _brief(catalogue: Catalogue, domain: str | None, purpose: str | None, examples: list[str],
           language: str) -> Brief:
    """Return what is to be written.

    Raises:
        GenerationRefused: neither or both of a domain and a purpose, or one that is no text.
        UnknownDomain, CalibrationRefused: there is no such domain, or an example cannot be read.
    """
    from calibration_data.briefs import DOMAINS, Brief, GenerationRefused

    languages = tuple(dict.fromkeys(code.strip() for code in language.split(",")))
    shown = tuple(sample for example in examples for sample in _examples(catalogue, example))
    if (domain is None) == (purpose is None):
        raise GenerationRefused("Say what to write: either --domain NAME or --custom-purpose TEXT"
                                f"{'' if domain is None else ', not both'}.")
    if purpose is not None:
        said = " ".join(purpose.split()).rstrip(".")
        return Brief(_slug(said.lower(), 4), said, languages, examples=shown)
    assert domain is not None  # noqa: S101 - one of the two is given
    own = catalogue.load(domain)
    what, subjects = DOMAINS.get(domain, (f"{domain}, as the examples show", ("",)))
    return Brief(f"{domain[:54]}-generated", what, languages, subjects, shown or own)


def _examples(catalogue: Catalogue, given: str) -> tuple[Sample, ...]:
    """Return the samples of an example: of a domain or a file, else the text itself if it is more than a word.

    Raises:
        UnknownDomain, CalibrationRefused: it is neither, or cannot be read.
    """
    from calibration_data.text import CalibrationRefused, parse

    if len(given.split()) < 2 or ("\n" not in given and len(given) < 256 and Path(given).expanduser().exists()):
        return catalogue.open(given)[1]
    samples = parse(given, "--custom-examples")
    if not samples:
        raise CalibrationRefused("An example of --custom-examples is empty.")
    return samples


def _slug(text: str, words: int = 64) -> str:
    """Return a text as the name of a domain: its first words, of letters and digits alone."""
    import re

    return "-".join(re.findall(r"[A-Za-z0-9_]+", text)[:words]).strip("-_")[:64].strip("-_") or "custom"


def _check_free(name: str) -> None:
    """Refuse the name of a domain that ships.

    Raises:
        GenerationRefused: it is one.
    """
    from calibration_data.briefs import GenerationRefused
    from calibration_data.catalogue import BUILT_IN

    if name in BUILT_IN:
        raise GenerationRefused(f"{name} is the name of a domain that ships with Nightpress. Give another with --name.")


def _order(brief: Brief, samples: int, provider: str, model: str | None, concurrency: int | None,
           seed: int) -> tuple[Order, str]:
    """Return the order, and what the model is called in the file's header.

    Raises:
        GenerationRefused: there is no such model on this machine.
    """
    from calibration_data.briefs import GenerationRefused
    from daemon.generating import Order
    from daemon.providers import DEFAULT_MODELS
    from loops.starter import STARTER_GGUF
    from state.files import sha256_file

    at_once = concurrency or AT_ONCE[provider]
    if provider != "local":
        called = model or dict(DEFAULT_MODELS.items())[provider]  # type: ignore[index]  # a provider, as was checked
        return Order(brief, samples, provider, called, at_once, seed), called
    path = Path(model).expanduser().absolute() if model else STARTER_GGUF
    try:
        if not path.is_file():
            raise GenerationRefused(f"There is no model {path}: --model with --provider local is the path of a GGUF.")
        called = f"{path.name}, sha256 {sha256_file(path)[:16]}"
    except (OSError, ValueError) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise GenerationRefused(f"The model {str(path)[:200]} cannot be read: {reason}.") from problem
    return Order(brief, samples, provider, str(path), at_once, seed), called


def _prices(price_in: float | None, price_out: float | None) -> tuple[float, float] | None:
    """Return both prices, None where neither was given.

    Raises:
        GenerationRefused: one is no number.
    """
    import math

    from calibration_data.briefs import GenerationRefused

    if price_in is None and price_out is None:
        return None
    prices = (price_in or 0.0, price_out or 0.0)
    if not all(map(math.isfinite, prices)):  # the option keeps out what is negative or no number
        raise GenerationRefused("A price is a number, of a million tokens.")
    return prices


def _write_samples(order: Order, called: str, journal: Journal, catalogue: Catalogue, state_dir: Path | None,
                   prices: tuple[float, float] | None, *, yes: bool) -> None:
    """Fill the journal, after the estimate and, where it costs, the user's consent."""
    from contextlib import ExitStack

    from calibration_data.generator import Sieve, shipped
    from daemon.cli.calibration import judged_by
    from daemon.cli.tables import console
    from daemon.generating import LOCAL, generate, local_writer, provider_writer
    from daemon.providers import Connection
    from daemon.settings import Settings
    from daemon.workers import grip_of_signals
    from loops.starter import STARTER_GGUF

    local = order.provider == LOCAL
    with ExitStack() as stack:
        connection = None if local else stack.enter_context(Connection(order.judge_spec))
        _tell_estimate(order, called, journal, prices)
        if order.model == str(STARTER_GGUF):
            console(stderr=True).print("The starter is far too small to write anything of use: this only shows how it "
                                       "works. --model names another GGUF.", markup=False)
        if not local and not yes:
            _ask_consent()
        sieve = Sieve([*shipped(), *order.brief.examples], judged_by(catalogue, []).values())
        grip, show = stack.enter_context(grip_of_signals()), stack.enter_context(_progress(order))
        if connection is not None:
            writer = provider_writer(order, connection, grip.ending)
        else:
            settings = Settings.load(state_dir=state_dir)
            writer = local_writer(order, _engine_options(settings, grip), settings.state_dir, grip)
        generate(order, writer, journal, sieve, show)


def _engine_options(settings: Settings, grip: Grip) -> dict[str, Any]:
    from dataclasses import asdict

    from daemon.engine import engine_options

    return asdict(engine_options(settings, grip))


def _tell_estimate(order: Order, called: str, journal: Journal, prices: tuple[float, float] | None) -> None:
    """Say what will be done, before it is."""
    from calibration_data.generator import estimate, price
    from daemon.cli.tables import console
    from daemon.generating import LOCAL, next_number

    out = console(stderr=True)
    kept = len(journal.samples)
    if kept:
        out.print(f"{kept} samples are kept from before; going on.", markup=False)
    about = estimate(order.brief, order.samples - kept, next_number(order, journal), local=order.provider == LOCAL)
    cost = f", {price(about.sent, about.received, *prices):,.2f} at the prices given" if prices else ""
    out.print(f"{order.provider} ({called}) writes {order.samples - kept} samples in about {about.requests} requests: "
              f"about {about.sent:,} tokens sent and {about.received:,} received{cost}.", markup=False)


def _ask_consent() -> None:
    """Ask whether to go ahead.

    Raises:
        GenerationRefused: nobody can be asked.
        Abort: the answer is no.
    """
    import sys

    from calibration_data.briefs import GenerationRefused

    if not sys.stdin.isatty():
        raise GenerationRefused("This costs tokens, and there is no terminal to ask for consent: --yes gives it.")
    typer.confirm("Go ahead?", abort=True, err=True)


@contextmanager
def _progress(order: Order) -> Iterator[Callable[[Tally], None]]:
    """Show how far it is: a bar on a terminal, a line for each tenth elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from daemon.cli.tables import console

    out = console(stderr=True)
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(),
                   TextColumn("left"), TimeRemainingColumn(), console=out, transient=True, disable=not out.is_terminal)
    task = bar.add_task("writing", total=order.samples)
    said = [0]

    def show(tally: Tally) -> None:
        dropped = sum(tally.dropped.values())
        bar.update(task, completed=min(tally.samples, order.samples),
                   description=f"writing, {dropped} dropped" if dropped else "writing")
        tenth = 10 * tally.samples // order.samples
        if not out.is_terminal and said[0] < tenth < 10:
            said[0] = tenth
            out.print(f"{tally.samples} of {order.samples} samples, {dropped} dropped", markup=False)

    with bar:
        yield show


def _tell(file: Path, samples: tuple[Sample, ...], done: Tally, before: int, prices: tuple[float, float] | None, *,
          as_json: bool) -> None:
    """Say what came of it."""
    from calibration_data.checks import ENOUGH_WORDS, count_words
    from calibration_data.generator import REASONS, price

    words = count_words(samples)
    cost = price(done.sent, done.received, *prices) if prices else None
    if as_json:
        print_json({"output": str(file), "domain": samples[0].header.domain, "samples": len(samples), "words": words,
                    "kept_from_before": before, "answers": done.answers,
                    "dropped": {reason: done.dropped.get(reason, 0) for reason in REASONS},
                    "tokens_sent": done.sent, "tokens_received": done.received, "cost": cost,
                    "source": samples[0].header.source})
        return
    dropped = ", ".join(f"{count} {told}" for reason, told in REASONS.items() if (count := done.dropped.get(reason)))
    typer.echo(f"Wrote {len(samples)} samples, {words:,} words, to {file}.")
    typer.echo(f"{done.answers} answers; dropped: {dropped or 'nothing'}.")
    typer.echo(f"{done.sent:,} tokens sent, {done.received:,} received" + (f", {cost:,.2f}." if prices else "."))
    if before > len(samples):
        typer.echo(f"{before - len(samples)} more are kept: --num-samples {before} --force writes them too.")
    if words < ENOUGH_WORDS:
        typer.echo(f"That is little: {ENOUGH_WORDS:,} words or more calibrate well.")
