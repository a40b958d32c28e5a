"""Generating calibration text: asks a provider or a model on this machine until there are enough samples.

Every answer is kept in the journal before the next is looked at, so whatever ends it, the same request goes on.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from calibration_data.briefs import SYSTEM, Brief, opening, request, vary
from calibration_data.generator import AT_ONCE, MALFORMED, REASONS, SCHEMA, Sieve, read_answer
from calibration_data.journal import Entry, Journal
from calibration_data.text import Sample
from daemon.errors import Interrupted, WorkerRefused
from daemon.grip import Grip
from daemon.providers import (
    Connection,
    Form,
    JudgeFailed,
    JudgeKeyMissing,
    JudgeSpec,
    OutOfForm,
    Provider,
    ask_at_once,
)
from daemon.supervisor import run_job
from state.faults import NightpressError

LOCAL = "local"
GIVE_UP_AFTER = 5  #: requests in a row that brought no answer, each of them tried several times by the library
#: samples asked for in a row of which none was new
BARREN_AFTER = 60
PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0  #: before the next request after a failure; doubled with each in a row
TIMEOUT_S = 180.0  #: of a request to a provider
MAX_TOKENS = 512  #: of a message, and of an answer, that a model on this machine writes
TEMPERATURE, TOP_P = 0.9, 0.95  #: of that model
SEED_STRIDE = 977  #: requests between the first ones of two seeds; prime to the lengths of the lists in briefs.py

FORM = Form("samples", "Give the samples that were asked for.", SCHEMA)


class GenerationGaveUp(NightpressError):
    """Too little came back to go on; the message says why and what is kept."""

    exit_code = 80


@dataclass(frozen=True)
class Order:
    """What to generate, and by whom.

    Attributes:
        brief: what to write.
        samples: how many.
        provider: anthropic, openai or local.
        model: as the provider calls it; the path of a GGUF for local.
        concurrency: requests under way at once; for local, replies written at once.
        seed: begins elsewhere in the plan of variations, and chooses other tokens where that is ours to choose.
    """

    brief: Brief
    samples: int
    provider: str
    model: str
    concurrency: int
    seed: int = 0

    @property
    def judge_spec(self) -> JudgeSpec:
        """Whom to ask, for a provider."""
        return JudgeSpec(cast("Provider", self.provider), self.model, concurrency=self.concurrency,
                         timeout_s=TIMEOUT_S, temperature=None)


@dataclass(frozen=True)
class Job:
    """One request: its number in the plan, how many samples it asks for, and how long to wait before it."""

    number: int
    samples: int
    pause_s: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What came back: decoded JSON, or why there is none; and tokens."""

    content: Any = None
    problem: Exception | None = None
    sent: int = 0
    received: int = 0


@dataclass(frozen=True)
class Tally:
    """How far it is, this and earlier times together."""

    samples: int
    answers: int
    dropped: Mapping[str, int]
    sent: int
    received: int


#: given what to ask next, yields requests with their answers as they come, until there is none to ask
Writer = Callable[[Callable[[], Job | None]], Generator[tuple[Job, Answer], None, None]]


def tally(journal: Journal) -> Tally:
    """Return how far a journal is."""
    dropped = Counter[str]()
    for entry in journal.entries:
        dropped.update(entry.dropped)
    return Tally(len(journal.samples), len(journal.entries), dict(dropped),
                 sum(entry.sent for entry in journal.entries), sum(entry.received for entry in journal.entries))


def next_number(order: Order, journal: Journal) -> int:
    """Return the number of the next request: behind all that were answered."""
    return max((entry.number + 1 for entry in journal.entries), default=order.seed * SEED_STRIDE)


@dataclass
class _Course:
    """Decides what to ask next and takes what comes back.

    Attributes:
        under_way: samples asked for and not yet answered, by request.
        failures: requests in a row without an answer.
        barren: samples asked for in a row of which none was new.
        answered: some request had an answer.
        last: reasons why the samples of the last barren answers were dropped.
    """

    order: Order
    journal: Journal
    sieve: Sieve
    number: int
    under_way: dict[int, int] = field(default_factory=dict)
    failures: int = 0
    barren: int = 0
    answered: bool = False
    last: Counter[str] = field(default_factory=Counter)

    def missing(self) -> int:
        return max(0, self.order.samples - len(self.journal.samples))

    def next_job(self) -> Job | None:
        """Return what to ask next; None when what is under way may be enough, or a failure asks for restraint."""
        local = self.order.provider == LOCAL
        wanted = self.missing() * (2 if local else 1) - sum(self.under_way.values())  # here, a few more cost little
        if wanted <= 0 or (self.failures and len(self.under_way) >= max(1, self.order.concurrency >> self.failures)):
            return None
        pause_s = min(LONGEST_PAUSE_S, PAUSE_S * 2 ** (self.failures - 1)) if self.failures else 0.0
        job = Job(self.number, 1 if local else min(AT_ONCE, wanted), pause_s)
        self.under_way[job.number] = job.samples
        self.number += 1
        return job

    def take(self, job: Job, answer: Answer) -> None:
        """Keep what is new of an answer.

        Raises:
            GenerationGaveUp: it is one too many without anything new.
            DiskFull, StateUnwritable: it cannot be kept.
        """
        del self.under_way[job.number]
        samples: list[Sample] = []
        dropped = Counter[str]()
        if answer.problem is None:
            found, dropped = read_answer(answer.content, self.order.brief.languages)
            samples, again = self.sieve.sift(found)
            dropped += again
        elif isinstance(answer.problem, OutOfForm):
            dropped[MALFORMED] += 1
        if answer.problem is None or dropped or answer.sent or answer.received:
            self.journal.append(Entry(job.number, tuple(samples), dropped, answer.sent, answer.received))
        self.failures = self.failures + 1 if answer.problem is not None else 0
        self.answered |= answer.problem is None or isinstance(answer.problem, OutOfForm)
        self.last = Counter() if samples else self.last + dropped
        self.barren = 0 if samples else self.barren + job.samples
        if not self.missing():
            return
        if self.failures >= GIVE_UP_AFTER or (self.failures and not self.answered):
            why = str(answer.problem).rstrip(".")
            if isinstance(answer.problem, OutOfForm):
                why = f"{self.order.provider} ({self.order.model}) answers out of form: {why}"
            raise GenerationGaveUp(self.with_what_is_kept(why))
        if self.barren >= BARREN_AFTER:
            told = ", ".join(f"{count} {REASONS[reason]}" for reason, count in self.last.most_common())
            raise GenerationGaveUp(self.with_what_is_kept(f"Nothing new comes any more: the last {self.barren} "
                                                          f"samples asked for brought {told}"))

    def with_what_is_kept(self, why: str) -> str:
        """Return a reason with what is kept, and what to do."""
        kept = len(self.journal.samples)
        if not kept:
            return f"{why}; nothing is kept."
        return (f"{why}; {kept} of {self.order.samples} samples are kept: the same command goes on, and with "
                f"`--num-samples {kept}` it is content with them.")


def generate(order: Order, writer: Writer, journal: Journal, sieve: Sieve, show: Callable[[Tally], None]) -> Tally:
    """Ask until the journal holds enough samples; what is there already counts.

    Args:
        order: what to generate.
        writer: who is asked.
        journal: where answers are kept, open.
        sieve: lets through what is new; it is told what the journal holds.
        show: told how far it is, in this thread.

    Raises:
        GenerationGaveUp: nothing, or nothing new, came back too often.
        Interrupted: the writer was asked to end.
        JudgeKeyMissing, JudgeExtraMissing, WorkerRefused: of the writer.
        DiskFull, StateUnwritable: an answer cannot be kept.
    """
    sieve.add(journal.samples)
    course = _Course(order, journal, sieve, next_number(order, journal))
    show(tally(journal))
    if not course.missing():
        return tally(journal)
    try:
        with closing(writer(course.next_job)) as answers:
            for job, answer in answers:
                course.take(job, answer)
                show(tally(journal))
                if not course.missing():
                    break
    except (Interrupted, JudgeKeyMissing, WorkerRefused) as problem:
        if not journal.samples:
            raise
        why = "Stopped on request" if isinstance(problem, Interrupted) else str(problem).rstrip(".")
        if isinstance(problem, WorkerRefused):
            raise WorkerRefused(course.with_what_is_kept(why), problem.exit_code) from None
        raise type(problem)(course.with_what_is_kept(why)) from None
    return tally(journal)


def provider_writer(order: Order, connection: Connection, stop: threading.Event) -> Writer:
    """Return a writer that asks a provider, several requests at once.

    Errors that another request may not meet are handed on as problems of an answer; a key that is refused ends it.
    """
    counted = [0, 0]

    def ask(job: Job) -> Answer:
        if job.pause_s and stop.wait(job.pause_s):
            raise Interrupted
        try:
            return Answer(connection.ask(SYSTEM, request(order.brief, job.number, job.samples), FORM))
        except (OutOfForm, JudgeFailed) as problem:
            return Answer(problem=problem)

    def write(next_job: Callable[[], Job | None]) -> Generator[tuple[Job, Answer], None, None]:
        with closing(ask_at_once(ask, next_job, order.concurrency, stop)) as answers:
            for job, answer in answers:
                sent, received = connection.sent, connection.received
                yield job, Answer(answer.content, answer.problem, sent - counted[0], received - counted[1])
                counted[:] = sent, received

    return write


def local_writer(order: Order, options: Mapping[str, Any], state_dir: Path, grip: Grip) -> Writer:
    """Return a writer that lets a GGUF write in a worker, as many exchanges at once as the order says."""
    def write(next_job: Callable[[], Job | None]) -> Generator[tuple[Job, Answer], None, None]:
        while True:
            jobs: list[Job] = []
            while len(jobs) < order.concurrency and (job := next_job()) is not None:
                jobs.append(job)
            if not jobs:
                return
            result = run_job({
                "job": "write", "model": order.model, "options": dict(options),
                "prompts": [opening(order.brief, job.number) for job in jobs],
                "sampling": {"temperature": TEMPERATURE, "top_p": TOP_P, "seed": jobs[0].number,
                             "max_tokens": MAX_TOKENS, "batch": order.concurrency}}, state_dir, grip).result
            sent, received = result["sent"], result["received"]
            for job, exchange in zip(jobs, result["exchanges"], strict=True):
                sample = {"topic": vary(order.brief, job.number).subject, "turns": [
                    {"role": "user", "content": exchange["message"]},
                    {"role": "assistant", "content": exchange["answer"]}]}
                yield job, Answer([sample], None, sent, received)
                sent = received = 0

    return write
