"""The queue in the ledger: jobs that wait, are in work, or have ended."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from sqlmodel import Session, col, select

from state.clock import utc_now
from state.faults import failpoint
from state.owner import is_live, started
from state.queries import Queries, UnknownJob
from state.records import JobSpec
from state.schema import Job, Memo
from state.states import JobState, advance
from state.transaction import clean, dumps, present, upsert


def _job_row(session: Session, job_id: int) -> Job:
    job = session.get(Job, job_id)
    if job is None:
        raise UnknownJob(f"There is no job {job_id}; `nightpress queue --all` lists the jobs there are.")
    return job


def _waiting(session: Session) -> list[Job]:
    """Return the queued jobs in the order they will be done."""
    return list(session.exec(select(Job).where(Job.state == JobState.QUEUED.value).order_by(
        col(Job.urgent).desc(), col(Job.priority).desc(), col(Job.position), col(Job.id))))


class Jobs(Queries):
    """The part of the ledger that writes the queue."""

    def _writing(self) -> contextlib.AbstractContextManager[Session]:
        """One transaction; the ledger says how."""
        raise NotImplementedError

    def add_job(self, spec: JobSpec) -> int:
        """Put a job at the end of its priority and return its number."""
        with self._writing() as session:
            last = max((job.position for job in _waiting(session)), default=0)
            job = Job(name=clean(spec.name), source=spec.source, key=spec.key, spec=dumps(spec.spec),
                      priority=spec.priority, urgent=spec.urgent, position=last + 1)
            session.add(job)
            session.flush()
            return present(job.id)

    def has_job(self, key: str) -> bool:
        """Tell whether a job with this key was ever queued."""
        return bool(self.rows("SELECT 1 FROM job WHERE key = ? LIMIT 1", (key,)))

    def begin_job(self, job_id: int) -> None:
        """Set a queued job to working, owned by this process, one attempt more."""
        with self._writing() as session:
            job = _job_row(session, job_id)
            job.state = advance(JobState(job.state), JobState.WORKING).value
            job.owner_pid, job.owner_started = os.getpid(), started(os.getpid())
            job.attempts += 1
            job.not_before, job.reason, job.updated_at = None, "", utc_now()
            session.add(job)

    def end_job(self, job_id: int, state: JobState, reason: str = "", *, run_id: int | None = None,
                not_before: str | None = None, attempts: int | None = None) -> None:
        """Take a job to a state with the reason; queued again it keeps its place.

        Args:
            job_id: which.
            state: reached; `queued` to try it again.
            reason: a sentence.
            run_id: the run it led to; None leaves what is recorded.
            not_before: UTC text, earliest moment of the next attempt.
            attempts: to set; None leaves them.

        Raises:
            IllegalTransition: the table in `states` has no such step.
        """
        with self._writing() as session:
            job = _job_row(session, job_id)
            job.state = advance(JobState(job.state), state).value
            job.reason, job.not_before, job.updated_at = clean(reason), not_before, utc_now()
            job.run_id = run_id or job.run_id
            job.attempts = job.attempts if attempts is None else attempts
            job.owner_pid = job.owner_started = None
            if state is not JobState.QUEUED:
                job.urgent = False
            session.add(job)

    def note_progress(self, job_id: int, run_id: int) -> None:
        """Remember that a job in work got on: its attempts count from here again."""
        with self._writing() as session:
            job = _job_row(session, job_id)
            job.run_id, job.attempts = run_id, 1
            session.add(job)

    def hasten_job(self, job_id: int) -> None:
        """Let a job be done next, whatever the load; one that failed or was cancelled is queued again."""
        with self._writing() as session:
            job = _job_row(session, job_id)
            if job.state != JobState.WORKING:
                job.state = advance(JobState(job.state), JobState.QUEUED).value
                job.attempts, job.not_before, job.reason = 0, None, ""
            job.urgent, job.updated_at = True, utc_now()
            session.add(job)

    def move_job(self, job_id: int, place: int) -> int:
        """Move a waiting job to a place of the queue, 1 for the next to be done; return the place it got.

        It takes the priority and urgency of the job whose place it takes.

        Raises:
            UnknownJob: no such job waits.
        """
        with self._writing() as session:
            waiting = _waiting(session)
            moved = next((job for job in waiting if job.id == job_id), None)
            if moved is None:
                raise UnknownJob(f"No job {job_id} waits; `nightpress queue` lists those that do.")
            others = [job for job in waiting if job is not moved]
            index = min(max(place, 1), len(waiting)) - 1
            neighbour = others[index] if index < len(others) else others[-1] if others else moved
            moved.priority, moved.urgent = neighbour.priority, neighbour.urgent
            others.insert(index, moved)
            for position, job in enumerate(others, 1):
                job.position = position
                session.add(job)
        return index + 1

    def requeue_orphans(self) -> list[str]:
        """Queue again the jobs whose service is gone; return one sentence per job. Repeated, it does nothing more."""
        sentences = []
        with self._writing() as session:
            for job in session.exec(select(Job).where(Job.state == JobState.WORKING.value)):
                if is_live(job.owner_pid, job.owner_started):
                    continue
                job.state = advance(JobState(job.state), JobState.QUEUED).value
                job.owner_pid = job.owner_started = None
                job.updated_at = utc_now()
                session.add(job)
                sentences.append(f"Job {job.id} of {job.name} was interrupted and waits again.")
            failpoint("jobs.requeueing")
        return sentences

    def keep_in_mind(self, name: str, value: Any) -> None:
        """Keep a JSON-ready value over restarts; the same name again replaces it."""
        with self._writing() as session:
            upsert(session, Memo, ("name",), [{"name": name, "value": json.dumps(value)}])

    def in_mind(self, name: str) -> Any:
        """Return the value kept under a name, None when there is none."""
        rows = self.rows("SELECT value FROM memo WHERE name = ?", (name,))
        return json.loads(rows[0]["value"]) if rows else None

    def forget_events(self, before: str) -> int:
        """Remove what happened before a moment (UTC text); return how many rows."""
        with self._writing() as session:
            done = session.connection().exec_driver_sql("DELETE FROM event WHERE at < ?", (before,))
            return int(done.rowcount)
