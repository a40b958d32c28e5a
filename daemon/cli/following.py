"""A job that the service does, handed over and followed to its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daemon.cli.display import Display, Stages
    from daemon.client import Client


def refuse_own(options: Mapping[str, object]) -> None:
    """Refuse options that would change settings, which are the service's own.

    Raises:
        ServiceRefused: one is given; names it.
    """
    from daemon.errors import ServiceRefused

    if given := [option for option, value in options.items() if value is not None]:
        raise ServiceRefused(f"A service runs and does the work by its own settings: leave {' and '.join(given)} out, "
                             "or stop it first with `nightpress stop`.")


def follow(client: Client, order: Mapping[str, Any], shown: Display | Stages, *,
           urgent: bool) -> dict[str, Any] | None:
    """Queue an order, and show what becomes of it.

    Args:
        client: of the service.
        order: fields of the verb `add`.
        shown: is entered once the job is queued, and shown every event.
        urgent: begin at once, whatever the load.

    Returns:
        What is told of the job's end, and as `made` what a fine-tuning came to; None when the user stopped watching.

    Raises:
        ServiceRefused: the job failed or was cancelled, or the service stopped.
    """
    from daemon.cli.face import headline
    from daemon.cli.tables import console
    from daemon.errors import ServiceRefused
    from loops.events import from_line

    errors = console(stderr=True)
    number, made = None, None
    try:
        answer = client.ask("add", {**order, "urgent": urgent, "priority": 1})
        number = answer["job"]
        errors.print(f"The service does it, as job {number}. Now it is {headline(client.status())}.", markup=False)
        if not urgent:
            errors.print(f"It begins when the machine is idle; `nightpress run-now {number}` begins at once.",
                         markup=False)
        with shown:
            for kind, data in client.stream("events", after=answer["after"], job=number):
                if kind == "lagged":  # its end may be among what was missed
                    kind, data = "job", _state(client, answer["job"])
                if kind == "press":
                    shown.show(from_line(data["line"]))
                elif kind == "finetuned":
                    made = data["made"]
                elif kind == "job" and data["action"] == "job.done":
                    return {**data, "made": made}
                elif kind == "job" and data["action"] in {"job.failed", "job.cancelled", "job.quarantined"}:
                    raise ServiceRefused(data["message"], data.get("exit_code") or ServiceRefused.exit_code)
                elif kind == "job" and data["message"]:
                    errors.print(data["message"], markup=False)
    except KeyboardInterrupt:
        errors.print("The service may have it or not: `nightpress status` shows it." if number is None else
                     f"It goes on without you: `nightpress status` shows it, `nightpress cancel {number}` ends it.",
                     markup=False)
        return None
    raise ServiceRefused(f"The service stopped; job {number} goes on when it runs again.")


def _state(client: Client, number: int) -> dict[str, Any]:
    """Return what would be told of a job in the state that it is in."""
    row = next(row for row in client.ask("queue", query={"every": True}) if row["id"] == number)
    return {"action": f"job.{row['state']}", "message": row["reason"], "run": row["run_id"]}
