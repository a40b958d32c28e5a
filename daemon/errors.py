"""Errors of the service and its commands."""

from __future__ import annotations

from state.faults import NightpressError


class WorkerCrashed(NightpressError):
    """The worker died twice on work that no level stands for, so this run cannot go on."""

    exit_code = 71


class WorkerRefused(NightpressError):
    """The worker reports that the job cannot be done; it exits with the worker's own code."""

    exit_code = 72

    def __init__(self, message: str | None = None, exit_code: int = 72) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the code of the worker's own error, for the shell


class Interrupted(NightpressError):
    """Stopped on request. The same command goes on where it was."""

    exit_code = 130


class NothingPassed(NightpressError):
    """No level passed, so nothing was promoted."""

    exit_code = 3


class SettingsWrong(NightpressError):
    """The settings are wrong."""

    exit_code = 78


class UnknownLevel(NightpressError):
    """The run has no such level; `nightpress results RUN` shows those it has."""

    exit_code = 62


class RepliesRefused(NightpressError):
    """The text or the replies cannot be read; the message names the line."""

    exit_code = 63


class ServiceMissing(NightpressError):
    """No service runs; start one with `nightpress daemon`, or install it with `nightpress service install`."""

    exit_code = 12


class ServiceRefused(NightpressError):
    """The service refuses; the message says why."""

    exit_code = 13

    def __init__(self, message: str | None = None, exit_code: int = 13) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # the code of the service's own error, for the shell


class OrderRefused(NightpressError):
    """The job cannot be queued; the message says why."""

    exit_code = 15


class NoRecipe(NightpressError):
    """There is nothing quantized in it, so it has no recipe; give a quantized GGUF."""

    exit_code = 84


class Unwell(NightpressError):
    """The service runs, but something is not as it should be; the message says what."""

    exit_code = 17
