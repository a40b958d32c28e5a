"""The stages of fine-tunings in the ledger: what each was given, what it made, and how it ended.

A finished stage is never changed. So from the hash of a file the way back to the data can be followed, whatever was
done since.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from sqlmodel import Session, col, select

from state.clock import utc_now
from state.faults import failpoint
from state.jobs import Jobs
from state.owner import is_live, started
from state.queries import Row
from state.records import StageSpec
from state.schema import Stage
from state.states import StageState, advance
from state.transaction import clean, dumps, present

_SINCE = "007_stages"


def _stage_row(session: Session, stage_id: int) -> Stage:
    stage = session.get(Stage, stage_id)
    if stage is None:
        raise RuntimeError(f"there is no stage {stage_id}")
    return stage


class Stages(Jobs):
    """The part of the ledger that keeps the stages of fine-tunings."""

    def begin_stage(self, spec: StageSpec) -> int:
        """Set a stage to working, owned by this process, and return its number.

        The one of the same pipeline, name and fingerprint that was interrupted or failed goes on; one that is finished
        stays as it is, and another row begins.
        """
        with self._writing() as session:
            stage = session.exec(select(Stage).where(
                Stage.pipeline == spec.pipeline, Stage.name == spec.name, Stage.fingerprint == spec.fingerprint,
                col(Stage.state).in_([StageState.INTERRUPTED.value, StageState.FAILED.value]),
            ).order_by(col(Stage.id).desc())).first()
            if stage is None:
                stage = Stage(pipeline=clean(spec.pipeline), name=spec.name, fingerprint=spec.fingerprint, inputs="{}")
            else:
                stage.state = advance(StageState(stage.state), StageState.WORKING).value
            stage.inputs, stage.ended_at, stage.reason = dumps(spec.inputs), None, ""
            stage.owner_pid, stage.owner_started = os.getpid(), started(os.getpid())
            session.add(stage)
            session.flush()
            number = present(stage.id)
            failpoint("stage.beginning")
        return number

    def end_stage(self, stage_id: int, state: StageState, reason: str = "", *,
                  outputs: Mapping[str, Any] | None = None, run_id: int | None = None) -> None:
        """Record how a stage ended.

        Args:
            stage_id: which.
            state: reached.
            reason: a sentence, where it did not finish.
            outputs: what it made.
            run_id: the run it led to.

        Raises:
            IllegalTransition: the table in `states` has no such step.
        """
        with self._writing() as session:
            stage = _stage_row(session, stage_id)
            stage.state = advance(StageState(stage.state), state).value
            stage.reason, stage.ended_at = clean(reason), utc_now()
            stage.outputs, stage.run_id = dumps(outputs or {}), run_id or stage.run_id
            stage.owner_pid = stage.owner_started = None
            session.add(stage)
            failpoint("stage.ending")

    def recover_stages(self) -> list[str]:
        """Mark stages whose process is gone as interrupted; return one sentence per stage."""
        sentences = []
        with self._writing() as session:
            for stage in session.exec(select(Stage).where(Stage.state == StageState.WORKING.value)):
                if is_live(stage.owner_pid, stage.owner_started):
                    continue
                stage.state = advance(StageState(stage.state), StageState.INTERRUPTED).value
                stage.ended_at, stage.reason = utc_now(), "Its process ended."
                stage.owner_pid = stage.owner_started = None
                session.add(stage)
                sentences.append(f"Stage {stage.name} of {stage.pipeline} was interrupted.")
            failpoint("stages.recovering")
        return sentences

    def stages(self, pipeline: str | None = None) -> list[Row]:
        """Return the stages of a pipeline, or of all, oldest first."""
        if _SINCE not in self.migrations():
            return []
        return self.rows("SELECT * FROM stage WHERE ?1 IS NULL OR pipeline = ?1 ORDER BY id", (pipeline,))

    def finished_stage(self, pipeline: str, name: str, fingerprint: str) -> Row | None:
        """Return the newest stage that finished under this fingerprint, None when there is none."""
        if _SINCE not in self.migrations():
            return None
        rows = self.rows("SELECT * FROM stage WHERE pipeline = ? AND name = ? AND fingerprint = ? "
                         "AND state = 'finished' ORDER BY id DESC LIMIT 1", (pipeline, name, fingerprint))
        return rows[0] if rows else None

    def stages_that_made(self, sha256: str) -> list[Row]:
        """Return the finished stages that have an output, or a file in an output, with this hash, newest first."""
        if _SINCE not in self.migrations():
            return []
        return self.rows(
            "SELECT * FROM stage WHERE state = 'finished' AND EXISTS (SELECT 1 FROM json_tree(outputs, '$.files') "
            "WHERE atom = ?) ORDER BY id DESC", (sha256,))
