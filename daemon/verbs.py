"""The verbs of the control socket: one table for the server, the client, the command line and the tests."""

from __future__ import annotations

from dataclasses import dataclass

VERSION = "v1"


@dataclass(frozen=True)
class Verb:
    """One thing that can be asked of the service.

    Attributes:
        name: of the client's method and of the handler.
        method: of HTTP.
        path: with `{…}` for what is named in it.
        changes: it changes something; otherwise it only reads.
        summary: one line for people.
    """

    name: str
    method: str
    path: str
    changes: bool
    summary: str


VERBS = {verb.name: verb for verb in (
    Verb("status", "GET", "/v1/status", False, "What the service does, and why."),
    Verb("health", "GET", "/v1/health", False, "Whether all is well."),
    Verb("queue", "GET", "/v1/queue", False, "The jobs that wait, or all of them."),
    Verb("runs", "GET", "/v1/runs", False, "The newest runs."),
    Verb("run", "GET", "/v1/runs/{run_id}", False, "One run with its levels and measurements."),
    Verb("events", "GET", "/v1/events", False, "What happens, as a stream of server-sent events."),
    Verb("logs", "GET", "/v1/logs", False, "The last lines of the log, and on request those to come, as a stream."),
    Verb("metrics", "GET", "/metrics", False, "Figures for Prometheus."),
    Verb("add", "POST", "/v1/queue", True, "Queue a model."),
    Verb("remove", "DELETE", "/v1/queue/{job_id}", True, "Take a waiting job off the queue."),
    Verb("move", "POST", "/v1/queue/{job_id}/move", True, "Move a waiting job to another place."),
    Verb("run_now", "POST", "/v1/run-now", True, "Do a job now, whatever the load."),
    Verb("cancel", "POST", "/v1/cancel", True, "End the job in work for good."),
    Verb("pause", "POST", "/v1/pause", True, "Do no work until told to resume."),
    Verb("resume", "POST", "/v1/resume", True, "Work again."),
    Verb("promote", "POST", "/v1/promote", True, "Release a level that passed."),
    Verb("rollback", "POST", "/v1/rollback", True, "Go back to the release before."),
    Verb("release_quarantine", "DELETE", "/v1/quarantine/{key}", True, "Allow again what killed the engine."),
    Verb("reevaluate", "POST", "/v1/reevaluate", True, "Queue a check of every deployed model."),
    Verb("backup", "POST", "/v1/backup", True, "Write the ledger as JSON now."),
    Verb("reload", "POST", "/v1/reload", True, "Load the settings anew."),
    Verb("stop", "POST", "/v1/stop", True, "Stop the service."),
)}
