"""The shapes of what the control socket takes and answers; OpenAPI is made of them."""

from __future__ import annotations

from typing import Annotated, Any

from annotated_types import Interval
from pydantic import BaseModel, ConfigDict, Field

#: of a job or a run; SQLite has no more than 64 bits
Number = Annotated[int, Interval(ge=-(2**63), le=2**63 - 1)]


class Strict(BaseModel):
    """Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class Sensor(BaseModel):
    """The latest reading of a sensor."""

    sensor: str
    state: str = Field(description="quiet, busy, unknown or absent")
    value: float | None
    limit: float | None
    unit: str
    detail: str


class Working(BaseModel):
    """The job in work."""

    id: int
    name: str
    source: str
    run_id: int | None
    urgent: bool
    stopped: bool = Field(description="its worker is stopped, and keeps its memory")
    ending: bool = Field(description="its worker is being ended")
    level: str = Field(description="in work; empty for the original")
    stage: str
    share: float = Field(description="of the whole run, 0 to 1")
    levels_done: int
    levels: int
    worked_s: float = Field(description="without the time it was stopped")
    left_s: float | None = Field(description="of work still to do; null when it is too early to tell")


class Waiting(BaseModel):
    """A job that waits."""

    id: int
    name: str
    source: str
    urgent: bool
    not_before: str | None


class Release(BaseModel):
    """The last release."""

    model: str
    number: int
    level: str
    bytes: int
    promoted_at: str


class Status(BaseModel):
    """What the service does, and why."""

    state: str = Field(description="working, stopped, waiting, paused, idle or stopping")
    reason: str
    verdict: str = Field(description="of the watchdog: busy, settling or idle")
    verdict_for_s: float
    paused_until: str | None
    job: Working | None
    next: Waiting | None
    queued: int
    release: Release | None
    sensors: list[Sensor]
    conditions: dict[str, str] = Field(description="what is not as it should be; empty when all is well")
    due: dict[str, str] = Field(description="when backup, check and the like come next")
    pid: int
    version: str
    started_at: str
    uptime_s: float
    state_dir: str
    deploy_dir: str
    last_event: int


class Health(BaseModel):
    """Whether all is well."""

    healthy: bool
    conditions: dict[str, str]


class Done(BaseModel):
    """The state that a verb reached, or `already_…` when it was so before."""

    state: str
    message: str
    job: int | None = None
    after: int | None = Field(None, description="number of the last event before, to follow from")
    detail: dict[str, Any] = Field(default_factory=dict)


class Add(Strict):
    """A model to queue: a whole plan as `nightpress run` makes it, a whole fine-tuning, or the parts that matter."""

    plan: dict[str, Any] | None = None
    finetune: dict[str, Any] | None = None
    path: str | None = None
    name: str | None = None
    target_size: str = "24GB"
    max_degradation: float = Field(0.07, ge=0, le=1)
    levels: list[str] = Field(default_factory=list)
    gates: list[str] = Field(default_factory=list)
    priority: int = Field(0, ge=-1000, le=1000)
    promoting: bool = True
    fresh: bool = False
    urgent: bool = False


class Which(Strict):
    """A job by its number; none for the obvious one."""

    job: Number | None = None


class Place(Strict):
    """A place of the queue, 1 for the next."""

    place: int = Field(ge=1, le=1_000_000)


class Pause(Strict):
    """How long to pause; none for until resumed."""

    for_s: float | None = Field(None, gt=0, le=366 * 86_400)


class Promote(Strict):
    """What to release; none for the last run and its choice."""

    run: Number | None = None
    level: str | None = None


class Rollback(Strict):
    """Which model to roll back; none when there is only one."""

    model: str | None = None
