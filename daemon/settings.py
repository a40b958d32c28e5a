"""The settings: one frozen object from the settings file and the environment, unknown keys refused."""

from __future__ import annotations

import difflib
import json
import os
import re
import tempfile
import tomllib
import types
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from daemon.errors import SettingsWrong
from daemon.watchdog import Limits

FILE = "nightpress.toml"
SOCKET = "nightpressd.sock"
_PLACES = {"state_dir", "deploy_dir", "output_dir", "socket_path", "watch"}  #: relative to the file that names them
SYSTEM_RUNTIME_DIR = Path("/run/nightpress")  #: as the system unit names it
PREFIX = "NIGHTPRESS_"
#: variables with the prefix that are not settings
_NOT_SETTINGS = {"NIGHTPRESS_FAILPOINT", "NIGHTPRESS_TESTING", "NIGHTPRESS_CONFIG_DIR", "NIGHTPRESS_EVENT",
                 "NIGHTPRESS_CI_VENV"}


def _place(systemd: str, xdg: str, home: str) -> Path:
    """Return the folder that systemd gives us, or the XDG one; systemd may list several."""
    given = os.environ.get(systemd, "").split(":")[0]
    if given:
        return Path(given)
    base = os.environ.get(xdg, "")
    return (Path(base) if base.startswith("/") else Path.home() / home) / "nightpress"


def default_state_dir() -> Path:
    """Return `$STATE_DIRECTORY`, else `$XDG_STATE_HOME/nightpress`."""
    return _place("STATE_DIRECTORY", "XDG_STATE_HOME", ".local/state")


def config_dir() -> Path:
    """Return `$CONFIGURATION_DIRECTORY`, else `$XDG_CONFIG_HOME/nightpress`."""
    given = os.environ.get("NIGHTPRESS_CONFIG_DIR")
    return Path(given) if given else _place("CONFIGURATION_DIRECTORY", "XDG_CONFIG_HOME", ".config")


def default_runtime_dir() -> Path:
    """Return `$RUNTIME_DIRECTORY`, else `$XDG_RUNTIME_DIR/nightpress`, else a folder of the user's own in /tmp."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
    if given:
        return Path(given)
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base.startswith("/"):
        return Path(base) / "nightpress"
    return Path(tempfile.gettempdir()) / f"nightpress-{os.getuid()}"


class ModelEntry(BaseModel):
    """A model that the service is to press, as `[[models]]` in the settings file declares it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path = Field(description="the unquantized GGUF")
    name: str | None = Field(None, description="in the deploy folder; from its file unless set")
    target_size: str = Field("24GB", description="levels larger than this are not built")
    max_degradation: float = Field(0.07, ge=0, le=1, description="largest loss that passes, as a share")
    levels: tuple[str, ...] = Field((), description="levels, or a ladder: original (unless set), full, iq, knees")
    gates: tuple[str, ...] = Field((), description="such as empathy:0.05")
    domains: tuple[str, ...] = Field((), description="of calibration text; general unless set, where a level needs it")
    strategy: Literal["walk", "bisect", "refine"] = Field(
        "walk", description="down the levels, halving them, or down and then recipes between the last two")
    priority: int = Field(0, description="higher is done first")

    @field_validator("path")
    @classmethod
    def _at_home(cls, path: Path) -> Path:
        return _expanded(path)


def _expanded(path: Path) -> Path:
    """Return a path with its `~` replaced.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return path.expanduser()
    except RuntimeError as problem:
        raise ValueError(f"{path}: there is no such user") from problem


class Settings(BaseModel):
    """Everything that can be set, with the unit in the name.

    Sources, the later wins: `nightpress.toml` in the configuration folder, `NIGHTPRESS_…` variables,
    options of a command.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state_dir: Path = Field(default_factory=default_state_dir, description="ledger, blobs, checkpoints")
    deploy_dir: Path | None = Field(None, description="releases; `deploy` in the state folder unless set")
    output_dir: Path | None = Field(None, description="summaries; `output` in the state folder unless set")
    socket_path: Path | None = Field(
        None, description="control socket; `nightpressd.sock` in the runtime folder unless set")
    disk_budget_bytes: int = Field(50_000_000_000, gt=0, description="most disk for finished levels")
    keep_releases: int = Field(5, ge=2, description="releases of a model to keep")
    keep_backups: int = Field(5, ge=1, description="JSON backups of the ledger to keep")
    keep_events_days: int = Field(180, ge=1, description="days to keep events in the ledger")
    threads: int = Field(0, ge=0, le=1024, description="threads of the engine; 0 means one per processor")
    gpu_layers: int = Field(0, ge=-1, description="layers to offload to a GPU; -1 means all")

    models: tuple[ModelEntry, ...] = Field((), description="models that the service is to press")
    watch: tuple[Path, ...] = Field((), description="folders in which new unquantized GGUFs are queued")
    watch_settle_s: float = Field(60, gt=0, description="a new file must not change for so long before it is queued")

    sensors: tuple[str, ...] = Field(Limits.sensors, description="sensors that count")
    idle_after_s: float = Field(Limits.idle_after_s, ge=0, description="all sensors must agree for so long")
    hold_down_s: float = Field(Limits.hold_down_s, ge=0, description="once busy, busy for at least so long")
    stale_after_s: float = Field(Limits.stale_after_s, gt=0, description="a reading older than this is busy")
    yield_after_s: float = Field(10, ge=0, description="busy for so long, a stopped worker is ended, its memory freed")
    tick_s: float = Field(5, ge=0.5, le=10, description="between looks; four a second when a job is in work")
    presence_away_s: float = Field(Limits.presence_away_s, ge=0, description="seconds since the last input")
    cpu_percent: float = Field(Limits.cpu_percent, gt=0, le=100, description="of all processors, by others, is busy")
    load_per_cpu: float = Field(Limits.load_per_cpu, gt=0, description="load average by others per processor is busy")
    gpu_percent: float = Field(Limits.gpu_percent, gt=0, le=100, description="of a GPU, by others, is busy")
    gpu_memory_bytes: int = Field(Limits.gpu_memory_bytes, gt=0, description="of a GPU, held by others, is busy")
    memory_pressure_percent: float = Field(
        Limits.memory_pressure_percent, gt=0, le=100, description="stalled for want of memory (PSI) is busy")
    memory_free_bytes: int = Field(Limits.memory_free_bytes, ge=0, description="less available memory is busy")
    temperature_c: float = Field(Limits.temperature_c, gt=0, description="hotter is busy")
    on_battery: bool = Field(Limits.on_battery, description="work on battery too")
    hours: str = Field(Limits.hours, description="local times to work in, such as 22:00-07:00,12:30-13:30")

    dataset_steps: tuple[str, ...] = Field(
        (), description="cleaning steps of a dataset, in order; the usual ones unless set")

    level_timeout_s: float = Field(86_400, ge=0, description="of work that one level may take; 0 for no limit")
    retry_after_s: float = Field(60, gt=0, description="before another attempt; four times longer each time")
    max_attempts: int = Field(5, ge=1, description="attempts of a job without progress before it is given up")
    nightly_at: str = Field("03:30", description="local time of backup, integrity check and retention")
    reevaluate_days: int = Field(7, ge=0, description="days between checks of deployed models; 0 for never")

    on_promote: tuple[str, ...] = Field((), description="command to run after a release, as a list; no shell")
    on_failure: tuple[str, ...] = Field((), description="command to run when a job is given up, as a list")
    webhook: str | None = Field(None, description="URL that is told of releases and failures as JSON")
    hook_timeout_s: float = Field(60, gt=0, description="that a command may take")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line to log")

    @field_validator("state_dir", "deploy_dir", "output_dir", "socket_path")
    @classmethod
    def _at_home(cls, path: Path | None) -> Path | None:
        return _expanded(path) if path is not None else None

    @field_validator("watch")
    @classmethod
    def _all_at_home(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(map(_expanded, paths))

    @property
    def deploy(self) -> Path:
        """Where releases lie."""
        return (self.deploy_dir or self.state_dir / "deploy").absolute()

    @property
    def output(self) -> Path:
        """Where summaries lie."""
        return (self.output_dir or self.state_dir / "output").absolute()

    @property
    def blobs(self) -> Path:
        """Where finished levels lie, by hash."""
        return self.state_dir.absolute() / "blobs"

    @property
    def scratch(self) -> Path:
        """Where checkpoints of unfinished work lie."""
        return self.state_dir.absolute() / "scratch"

    @property
    def socket(self) -> Path:
        """Where a service listens."""
        return (self.socket_path or default_runtime_dir() / SOCKET).absolute()

    @property
    def socket_to_ask(self) -> Path:
        """Where to ask a service: the own one, or that of the whole system where only that is there."""
        system = SYSTEM_RUNTIME_DIR / SOCKET
        if self.socket_path is None and not self.socket.exists() and os.access(system, os.W_OK):
            return system
        return self.socket

    @property
    def limits(self) -> Limits:
        """What counts as idle."""
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__ if hasattr(self, name)})

    @classmethod
    def load(cls, **options: Any) -> Self:
        """Return the settings from file, environment and options; an option that is None is not set.

        Raises:
            SettingsWrong: naming the key, where it stands, and the nearest known key.
        """
        return cls.load_with_sources(**options)[0]

    @classmethod
    def load_with_sources(cls, **options: Any) -> tuple[Self, dict[str, str]]:
        """Return the settings, and where each that is not a default was set; raises as `load`."""
        values, source = _read_file(settings_file())
        for name, value in os.environ.items():
            if name.startswith(PREFIX) and name not in _NOT_SETTINGS:
                key = name.removeprefix(PREFIX).lower()
                if not value and key in _PLACES:  # a place that is set to nothing is not set
                    continue
                values[key] = _from_text(cls, key, value, name)
                source[key] = f"${name}"
        given = {name: value for name, value in options.items() if value is not None}
        values.update(given)
        source.update(dict.fromkeys(given, "the command line"))
        try:
            settings = cls.model_validate(values)
        except ValidationError as problem:
            raise SettingsWrong(_explain(cls, problem.errors()[0], values, source)) from problem
        try:
            settings._check()
        except ValueError as problem:
            raise SettingsWrong(str(problem)) from problem
        return settings, source

    def _check(self) -> None:
        """Make sure of what types cannot say.

        Raises:
            ValueError: in a sentence.
        """
        unknown = set(self.sensors) - set(Limits.sensors)
        if unknown:
            raise ValueError(f"sensors names {min(unknown)!r}; there are {', '.join(Limits.sensors)}.")
        if not re.fullmatch(r"([01][0-9]|2[0-3]):[0-5][0-9]", self.nightly_at):
            raise ValueError(f"nightly_at is {self.nightly_at!r}; write a time of day such as 03:30.")


def settings_file() -> Path:
    """Return where the settings file is looked for."""
    return config_dir() / FILE


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    try:
        if not file.exists():
            return {}, {}
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise SettingsWrong(f"{file} cannot be read: {problem}.") from problem
    for name in _PLACES & values.keys():
        values[name] = _beside(file, values[name])
    models = values.get("models")
    for entry in models if isinstance(models, list) else ():
        if isinstance(entry, dict) and "path" in entry:
            entry["path"] = _beside(file, entry["path"])
    return values, dict.fromkeys(values, str(file))


def _beside(file: Path, value: Any) -> Any:
    """Return a path of the settings file, or a list of them, made absolute; `~` stays for the model to replace."""
    if isinstance(value, list):
        return [_beside(file, part) for part in value]
    if not isinstance(value, str) or value.startswith("~"):
        return value
    return str((file.parent / value).absolute())


def _from_text(cls: type[BaseModel], key: str, text: str, name: str) -> Any:
    """Return the value that a variable holds: a list is JSON, or parts with commas between them."""
    field = cls.model_fields.get(key)
    if field is None or get_origin(field.annotation) is not tuple:
        return text
    if not text.lstrip().startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return json.loads(text)
    except ValueError as problem:
        raise SettingsWrong(f"${name} is no JSON list: {problem}.") from problem


def _explain(cls: type[BaseModel], first: Any, values: dict[str, Any], source: dict[str, str]) -> str:
    place = [str(part) for part in first["loc"]] or ["?"]
    where = source.get(place[0], "the command line")
    if first["type"] == "extra_forbidden":
        nested = len(place) > 1 and place[0] == "models"
        near = difflib.get_close_matches(place[-1], (ModelEntry if nested else cls).model_fields, n=1)
        hint = f" Did you mean {near[0]}?" if near else " `nightpress config show` lists them all."
        return f"{where} sets {'.'.join(place)!r}, which is no setting.{hint}"
    return f"{where} sets {'.'.join(place)} to {first.get('input', values.get(place[0]))!r}: {first['msg']}."


def type_words(annotation: Any) -> str:
    """Return what a setting holds, for people: number, text, path, yes or no, list."""
    if get_origin(annotation) is types.UnionType and type(None) in get_args(annotation):
        return type_words(next(part for part in get_args(annotation) if part is not type(None)))
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    if get_origin(annotation) is tuple:
        return "list"
    return {bool: "yes or no", int: "whole number", float: "number", Path: "path"}.get(annotation, "text")


def template() -> str:
    """Return a settings file that changes nothing: every setting with its default, commented out."""
    lines = ["# Settings of Nightpress. Remove the # before what you change; `nightpress config check` checks it.", ""]
    for name, field in Settings.model_fields.items():
        if name == "models":
            continue
        default = field.get_default(call_default_factory=False)
        shown = "" if default is None or name == "state_dir" else _as_toml(default)
        lines += [f"# {field.description} ({type_words(field.annotation)})", f"# {name} = {shown}".rstrip(), ""]
    lines += ["# Models that the service is to press, one table each:", "# [[models]]"]
    lines += [f"# {name} =  # {field.description}" for name, field in ModelEntry.model_fields.items()]
    return "\n".join(lines) + "\n"


def _as_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_as_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(str(value) if isinstance(value, Path) else value)
