"""The rows of the ledger as SQLModel classes; `migrations` creates the tables, a test keeps both equal.

Times are UTC ISO 8601 text. Columns that hold JSON say so. Fractions are fractions, not percent.
"""

from __future__ import annotations

from sqlmodel import Field, SQLModel

from state.clock import utc_now
from state.states import JobState, LevelState, RunState, StageState


class Run(SQLModel, table=True):
    """One execution of a loop."""

    id: int | None = Field(default=None, primary_key=True)
    created_at: str = Field(default_factory=utc_now)
    ended_at: str | None = None
    name: str
    model_path: str
    model_sha256: str
    model_bytes: int
    plan: str  # JSON
    plan_fingerprint: str = Field(index=True)
    state: str = RunState.RUNNING.value
    simulated: bool = False
    engine: str
    chosen_level: str | None = None
    reason: str = ""
    owner_pid: int | None = None
    owner_started: str | None = None
    summary_path: str | None = None


class Candidate(SQLModel, table=True):
    """The model at one level of a run; `degradation` and its bounds are fractions of the baseline."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: int = Field(foreign_key="run.id")
    level: str
    ordinal: int
    state: str = LevelState.PLANNED.value
    forecast_bytes: int | None = None
    bytes: int | None = None
    bits_per_weight: float | None = None
    sha256: str | None = None
    fallbacks: int | None = None
    tensor_types: str = "{}"  # JSON
    degradation: float | None = None
    degradation_low: float | None = None
    degradation_high: float | None = None
    reason: str = ""
    tokens_per_s: float | None = None
    n_scenarios: int | None = None
    simulated: bool = False
    built_s: float | None = None
    measured_s: float | None = None
    signal: str | None = None
    updated_at: str = Field(default_factory=utc_now)
    gates: str = "[]"  # JSON: each gate with its limit, loss, interval and verdict
    imatrix: str = ""  # what the importance matrix was made from; empty for none


class Measurement(SQLModel, table=True):
    """One metric of one level; the level '' is the unquantized baseline."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: int = Field(foreign_key="run.id")
    level: str
    metric: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    error: float | None = None  # standard error
    n: int | None = None
    unit: str = ""


class Response(SQLModel, table=True):
    """A generated reply to a scenario."""

    id: int | None = Field(default=None, primary_key=True)
    run_id: int = Field(foreign_key="run.id")
    level: str
    scenario_id: str
    prompt: str
    text: str
    n_tokens: int
    scores: str = "{}"  # JSON


class Release(SQLModel, table=True):
    """A promotion as history; which release is current, the deploy directory alone says."""

    id: int | None = Field(default=None, primary_key=True)
    model: str
    number: int
    run_id: int = Field(foreign_key="run.id")
    level: str
    sha256: str
    bytes: int
    path: str
    promoted_at: str = Field(default_factory=utc_now)
    rolled_back_at: str | None = None
    simulated: bool = False  # the table allows nothing else


class Event(SQLModel, table=True):
    """Something that happened; `action` is the stable key for machines."""

    id: int | None = Field(default=None, primary_key=True)
    at: str = Field(default_factory=utc_now)
    run_id: int | None = None
    level: str | None = None
    action: str
    data: str = "{}"  # JSON


class Step(SQLModel, table=True):
    """A finished step of work under its fingerprint: the checkpoint that a resumed run reuses."""

    fingerprint: str = Field(primary_key=True)
    run_id: int = Field(foreign_key="run.id")
    level: str
    kind: str
    result: str  # JSON
    finished_at: str = Field(default_factory=utc_now)


class Crash(SQLModel, table=True):
    """A death of the worker while it worked on a fingerprint."""

    id: int | None = Field(default=None, primary_key=True)
    fingerprint: str = Field(index=True)
    run_id: int = Field(foreign_key="run.id")
    level: str
    at: str = Field(default_factory=utc_now)
    signal: str | None = None
    detail: str = ""


class Quarantine(SQLModel, table=True):
    """A fingerprint that is not tried again until released."""

    fingerprint: str = Field(primary_key=True)
    reason: str
    at: str = Field(default_factory=utc_now)


class Modelfile(SQLModel, table=True):
    """The hash of a file as long as its size, time and inode stay the same."""

    path: str = Field(primary_key=True)
    size: int
    mtime_ns: int
    inode: int
    sha256: str


class Job(SQLModel, table=True):
    """A piece of work that the service does when the machine is idle.

    Order: `urgent` first, then `priority`, then `position`. `attempts` counts starts since the last
    progress. `key` names what asked for it, so that the same file is not queued twice by itself.
    """

    id: int | None = Field(default=None, primary_key=True)
    created_at: str = Field(default_factory=utc_now)
    updated_at: str = Field(default_factory=utc_now)
    name: str
    source: str  # command, settings, folder, or reevaluation
    key: str = Field(default="", index=True)
    spec: str  # JSON: the plan, and whether to promote
    priority: int = 0
    position: int = 0
    urgent: bool = False
    state: str = JobState.QUEUED.value
    not_before: str | None = None
    attempts: int = 0
    reason: str = ""
    run_id: int | None = Field(default=None, foreign_key="run.id")
    owner_pid: int | None = None
    owner_started: str | None = None


class Stage(SQLModel, table=True):
    """One execution of a stage of a fine-tuning: what it was given and what it made, each file with its hash.

    `inputs` holds `files` (by role a path and a sha256) and `options`; `outputs` holds `files` and `facts`.
    """

    id: int | None = Field(default=None, primary_key=True)
    pipeline: str = Field(index=True)
    name: str
    fingerprint: str = Field(index=True)
    state: str = StageState.WORKING.value
    inputs: str  # JSON
    outputs: str = "{}"  # JSON
    started_at: str = Field(default_factory=utc_now)
    ended_at: str | None = None
    reason: str = ""
    run_id: int | None = Field(default=None, foreign_key="run.id")
    owner_pid: int | None = None
    owner_started: str | None = None


class Memo(SQLModel, table=True):
    """Something the service keeps in mind over a restart, such as that it was paused."""

    name: str = Field(primary_key=True)
    value: str  # JSON


class Migration(SQLModel, table=True):
    """A step of the schema that this ledger carries."""

    name: str = Field(primary_key=True)
    applied_at: str = Field(default_factory=utc_now)


TABLES: tuple[type[SQLModel], ...] = (
    Run, Candidate, Measurement, Response, Release, Event, Step, Crash, Quarantine, Modelfile, Job, Stage, Memo,
    Migration,
)
